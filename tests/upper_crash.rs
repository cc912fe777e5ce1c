//! Power cuts and kills at every storage operation of random workloads.
//!
//! A workload runs on recorded files (see `upper/recorder.rs`); then the power is cut behind each
//! of its operations, several times with other losses, and what is left is opened. It must open,
//! and every sector must hold what the last flush left there or something that was written later.
//! Some images are opened on recorded files again and cut during that; some are written to. For
//! kills the files are as they were and the journal is that of the moment, and every acknowledged
//! write must be there. `OBD_UBLK_CRASH_IMAGES` sets how many images, `OBD_UBLK_CRASH_SEED` the
//! first seed.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "upper/recorder.rs"]
mod recorder;
#[path = "common/seeds.rs"]
mod seeds;
#[path = "upper/workload.rs"]
mod workload;

use recorder::{Disk, Random, Shared, World, lock};
use seeds::{number, run_seeds};
use workload::{Run, content_of, memory_of, open_image, run};

/// Images of the power cut test where nobody says another number.
const IMAGES_DEFAULT: u64 = 100_000;

/// Opens an image and compares every sector with what it may hold after `ops` operations.
fn check(run: &Run, ops: usize, world: &Shared, seed: u64, random: &mut Random) {
    let told = |what: &str| format!("seed {seed}, cut behind operation {ops}: {what}");
    let pair = open_image(world, memory_of(None), 2)
        .unwrap_or_else(|error| panic!("{}", told(&format!("{error:#}"))));
    let (size, sizes) = (pair.virtual_sectors(), run.sizes(ops));
    assert!(sizes.contains(&size), "{}", told(&format!("{size} sectors, not of {sizes:?}")));
    let mut worker = pair.worker();
    let found = content_of(&mut worker);
    for (sector, stamp) in found.iter().enumerate() {
        let may_be = run.durable_values(sector, ops);
        assert!(
            may_be.contains(stamp),
            "{}",
            told(&format!("sector {sector} is {stamp:x?}, not of {may_be:x?}"))
        );
    }
    if !random.one_in(8) {
        return;
    }
    // What is written next to it changes nothing of the rest, even when it fills all free space.
    let target = random.index(found.len());
    for round in 1_u64..12 {
        let at = u64::try_from(target).unwrap();
        worker.write(at, &round.to_le_bytes().repeat(64)).unwrap();
        pair.flush().unwrap();
    }
    let mut expected = found;
    expected[target] = Some(11);
    assert_eq!(content_of(&mut worker), expected, "{}", told("written to"));
    drop((worker, pair));
    let mut worker = open_image(world, memory_of(None), 3).unwrap().worker();
    assert_eq!(content_of(&mut worker), expected, "{}", told("written to and cut"));
}

/// Cuts the power behind every operation of one workload; how many images that made.
fn cut_everywhere(seed: u64) -> u64 {
    let run = run(seed);
    let mut random = Random(seed ^ 0xc0de);
    let mut disk = Disk::of(run.first.0.clone(), run.first.1.clone());
    let mut images = 0;
    for ops in 0..=run.ops.len() {
        if let Some(op) = ops.checked_sub(1).map(|last| &run.ops[last]) {
            disk.apply(op);
        }
        for _ in 0..2 {
            let (data, index) = disk.cut(&mut random);
            images += 1;
            if random.one_in(4) {
                images += cut_again(&run, ops, (&data, &index), seed, &mut random);
            }
            check(&run, ops, &World::of(data, index), seed, &mut random);
        }
    }
    images
}

/// Opens an image, cuts the power at one operation of that, and opens what is left.
fn cut_again(
    run: &Run,
    ops: usize,
    (data, index): (&[u8], &[u8]),
    seed: u64,
    random: &mut Random,
) -> u64 {
    let world = World::of(data.to_vec(), index.to_vec());
    drop(open_image(&world, memory_of(None), 2));
    let reopening = std::mem::take(&mut lock(&world).ops);
    let mut disk = Disk::of(data.to_vec(), index.to_vec());
    for op in reopening.iter().take(random.index(reopening.len() + 1)) {
        disk.apply(op);
    }
    let (data, index) = disk.cut(random);
    check(run, ops, &World::of(data, index), seed, random);
    1
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed_and_leaves_nothing_that_was_never_written() {
    run_seeds("power cuts", number("OBD_UBLK_CRASH_IMAGES", IMAGES_DEFAULT), cut_everywhere);
}

/// Kills the process in front of every operation of one workload.
fn kill_everywhere(seed: u64) -> u64 {
    let run = run(seed);
    let mut disk = Disk::of(run.first.0.clone(), run.first.1.clone());
    for (ops, op) in run.ops.iter().enumerate() {
        let (data, index) = disk.kept();
        let memory = memory_of(Some(&run.journals[ops]));
        let world = World::of(data, index);
        let told = |what: &str| format!("seed {seed}, killed before operation {ops}: {what}");
        for _ in 0..2 {
            let pair = open_image(&world, memory.clone(), 1)
                .unwrap_or_else(|error| panic!("{}", told(&format!("{error:#}"))));
            for (sector, stamp) in content_of(&mut pair.worker()).iter().enumerate() {
                let may_be = run.acknowledged_values(sector, ops);
                let what = format!("sector {sector} is {stamp:x?}, not of {may_be:x?}");
                assert!(may_be.contains(stamp), "{}", told(&what));
            }
        }
        disk.apply(op);
    }
    u64::try_from(run.ops.len()).unwrap()
}

#[test]
fn a_kill_loses_no_acknowledged_write() {
    run_seeds("kills", number("OBD_UBLK_CRASH_IMAGES", IMAGES_DEFAULT) / 10, kill_everywhere);
}
