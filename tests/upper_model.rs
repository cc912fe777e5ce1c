//! A pair against a flat array: random operations, failures, threads, and the reference's pairs.
//!
//! `OBD_UBLK_MODEL_OPS` sets how many operations, `OBD_UBLK_MODEL_SEED` the seed.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "upper/recorder.rs"]
mod recorder;
#[path = "upper/workload.rs"]
mod workload;

use common::golden::{Golden, hex};
use obd_ublk::disk::{Disk, Worker};
use obd_ublk::error::ErrorKind;
use obd_ublk::format::lsmt::UuidText;
use obd_ublk::image::{Image, UpperChoice, WritableImage};
use obd_ublk::upper::{NewPair, Pair, PairOptions, PairPaths, create, new_uuid};
use recorder::{Fault, Random, World, lock};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use workload::{content_of, memory_of, open_image};

const DISK_SECTORS: u64 = 512;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn len(sectors: u64) -> usize {
    usize::try_from(sectors * 512).unwrap()
}

fn options(folder: &Path) -> PairOptions {
    PairOptions {
        journal_folder: folder.join("run"),
        rewrite_entries_min: 4096,
        ..PairOptions::default()
    }
}

fn fresh(folder: &Path, sectors: u64) -> PairPaths {
    let paths = PairPaths { data: folder.join("data"), index: folder.join("index") };
    let new = NewPair {
        virtual_bytes: sectors * 512,
        uuid: new_uuid().unwrap(),
        parent_uuid: UuidText::NIL,
    };
    create(&paths, &new).unwrap();
    paths
}

fn zeros(_: u64, gap: &mut [u8]) -> obd_ublk::error::Result<()> {
    gap.fill(0);
    Ok(())
}

#[test]
fn random_operations_do_what_a_flat_array_does() {
    let ops = number("OBD_UBLK_MODEL_OPS", 1_000_000);
    let seed = number("OBD_UBLK_MODEL_SEED", 1);
    let folder = tempfile::tempdir().unwrap();
    let (paths, options) = (fresh(folder.path(), DISK_SECTORS), options(folder.path()));
    let mut random = Random(seed);
    let mut flat = vec![0; len(DISK_SECTORS)];
    let mut pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    let mut bytes = vec![0; len(DISK_SECTORS)];
    let mut compactions = 0;
    for op in 0..ops {
        let start = random.below(DISK_SECTORS);
        let end = (start + 1 + random.below(16)).min(DISK_SECTORS);
        let (from, to) = (len(start), len(end));
        match random.below(1000) {
            0..=499 => {
                let stamp = random.next().to_le_bytes();
                bytes[..to - from].chunks_mut(8).for_each(|word| word.copy_from_slice(&stamp));
                worker.write(start, &bytes[..to - from]).unwrap();
                flat[from..to].copy_from_slice(&bytes[..to - from]);
            }
            500..=599 => {
                worker.zero(start..end).unwrap();
                flat[from..to].fill(0);
            }
            600..=607 => pair.flush().unwrap(),
            608 if random.one_in(20) => {
                drop(worker);
                if random.one_in(2) {
                    pair.close().unwrap();
                }
                drop(pair);
                pair = Pair::open(&paths, &options).unwrap();
                worker = pair.worker();
                worker.read(0, &mut bytes, zeros).unwrap();
                assert!(bytes == flat, "seed {seed}: another disk after the reopening at {op}");
            }
            609 if random.one_in(20) => {
                drop(worker);
                let done = pair.compact().unwrap();
                assert_eq!(done.after.file_bytes, 4096 + done.before.live_bytes, "seed {seed}");
                compactions += 1;
                pair = Pair::open(&paths, &options).unwrap();
                worker = pair.worker();
                worker.read(0, &mut bytes, zeros).unwrap();
                assert!(bytes == flat, "seed {seed}: another disk after the compaction at {op}");
            }
            _ => {
                worker.read(start, &mut bytes[..to - from], zeros).unwrap();
                assert!(bytes[..to - from] == flat[from..to], "seed {seed}, operation {op}");
            }
        }
    }
    // The space of a disk that is overwritten for ever stays bounded: what is live, what waits for
    // a flush, and some waste.
    let usage = pair.usage();
    println!("{ops} operations, seed {seed}, {compactions} compactions: {usage:?}");
    assert!(usage.file_bytes < 24 * DISK_SECTORS * 512, "{usage:?}");
    assert!(usage.index_bytes < 4096 + 8192 * 16, "{usage:?}");
}

#[test]
fn threads_that_write_their_own_sectors_and_read_all_see_whole_sectors() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 4000;
    let folder = tempfile::tempdir().unwrap();
    let (paths, options) = (fresh(folder.path(), 64), options(folder.path()));
    let pair = Pair::open(&paths, &options).unwrap();
    let stop = AtomicBool::new(false);
    let read_all = |worker: &mut obd_ublk::upper::PairWorker, last: &mut [u64]| {
        let mut bytes = vec![0; len(64)];
        worker.read(0, &mut bytes, zeros).unwrap();
        for (sector, last) in bytes.chunks(512).zip(last.iter_mut()) {
            let stamp = u64::from_le_bytes(*sector.first_chunk().unwrap());
            assert!(sector.chunks(8).all(|word| word == stamp.to_le_bytes()), "a torn sector");
            assert!(stamp >= *last, "an older value came back: {stamp} behind {last}");
            *last = stamp;
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (mut worker, mut last) = (pair.worker(), [0; 64]);
                while !stop.load(Ordering::Relaxed) {
                    read_all(&mut worker, &mut last);
                }
            });
        }
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let mut worker = pair.worker();
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        let start = thread * 16 + round % 8;
                        worker.write(start, &round.to_le_bytes().repeat(64 * 3)).unwrap();
                        if round % 16 == 0 {
                            worker.flush().unwrap();
                        }
                    }
                })
            })
            .collect();
        let joined: Vec<_> = writers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        stop.store(true, Ordering::Relaxed);
        assert!(joined.iter().all(Result::is_ok));
    });
    let mut last = [0; 64];
    read_all(&mut pair.worker(), &mut last);
    assert!(pair.usage().file_bytes < 4 << 20, "space is used again: {:?}", pair.usage());
}

#[test]
fn a_full_disk_fails_the_write_and_nothing_else() {
    let files = workload::files_of_a_new_pair();
    let world = World::of(files.0, files.1);
    let pair = open_image(&world, memory_of(None), 1).unwrap();
    let mut worker = pair.worker();
    worker.write(0, &[1; 1024]).unwrap();
    let before = content_of(&mut worker);
    for errno in [libc::ENOSPC, libc::EDQUOT] {
        lock(&world).fault = Some((Fault::DataWrite, errno));
        let error = worker.write(0, &[2; 512]).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, libc::ENOSPC));
        assert_eq!(content_of(&mut worker), before);
    }
    lock(&world).fault = None;
    worker.write(0, &[3; 512]).unwrap();
    pair.flush().unwrap();
    assert_eq!(content_of(&mut worker)[0], Some(u64::from_le_bytes([3; 8])));
}

#[test]
fn after_a_failed_sync_or_append_nothing_is_written_and_reads_stay_right() {
    for (fault, lasting) in
        [(Fault::DataSync, true), (Fault::IndexSync, true), (Fault::IndexWrite, false)]
    {
        let files = workload::files_of_a_new_pair();
        let world = World::of(files.0, files.1);
        let memory = memory_of(None);
        let pair = open_image(&world, memory.clone(), 1).unwrap();
        let mut worker = pair.worker();
        worker.write(0, &[1; 512]).unwrap();
        pair.flush().unwrap();
        worker.write(1, &[2; 512]).unwrap();
        lock(&world).fault = Some((fault, libc::EIO));
        assert_eq!(pair.flush().unwrap_err().errno(), libc::EIO, "{fault:?}");
        lock(&world).fault = None;
        let before = content_of(&mut worker);
        assert_eq!(before[1], Some(u64::from_le_bytes([2; 8])));
        for outcome in [worker.write(2, &[4; 512]), worker.zero(0..1), pair.flush(), pair.close()] {
            assert_eq!(outcome.unwrap_err().errno(), libc::EIO, "{fault:?}");
        }
        assert_eq!(content_of(&mut worker), before);
        assert!(pair.failure().is_some());
        drop((worker, pair));
        // The kernel forgets what a sync could not write, so not even a new process may go on.
        let pair = open_image(&world, memory, 1).unwrap();
        let mut worker = pair.worker();
        assert_eq!(content_of(&mut worker), before, "{fault:?}");
        assert_eq!(worker.write(2, &[4; 512]).is_err(), lasting, "{fault:?}");
        assert_eq!(pair.flush().is_err(), lasting, "{fault:?}");
    }
}

#[test]
fn a_rewrite_that_has_no_room_leaves_the_old_log_in_use() {
    let files = workload::files_of_a_new_pair();
    let world = World::of(files.0, files.1);
    let pair = open_image(&world, memory_of(None), 1).unwrap();
    let mut worker = pair.worker();
    lock(&world).fault = Some((Fault::Create, libc::ENOSPC));
    for round in 0_u8..20 {
        worker.write(0, &[round; 512]).unwrap();
        pair.flush().unwrap();
    }
    assert_eq!(lock(&world).index, 1);
    let before = content_of(&mut worker);
    drop((worker, pair));
    let mut worker = open_image(&world, memory_of(None), 2).unwrap().worker();
    assert_eq!(content_of(&mut worker), before);
}

#[test]
fn a_compaction_that_fails_leaves_the_pair_as_it_was() {
    let cases = [
        (Fault::DataWrite, libc::ENOSPC, ErrorKind::NoSpace),
        (Fault::Create, libc::ENOSPC, ErrorKind::NoSpace),
        (Fault::Rename, libc::EIO, ErrorKind::Io),
    ];
    for (fault, errno, kind) in cases {
        let files = workload::files_of_a_new_pair();
        let world = World::of(files.0, files.1);
        let pair = open_image(&world, memory_of(None), 1).unwrap();
        let mut worker = pair.worker();
        worker.write(0, &[1; 4096]).unwrap();
        worker.write(9, &[2; 1024]).unwrap();
        worker.zero(2..6).unwrap();
        pair.flush().unwrap();
        let before = content_of(&mut worker);
        drop(worker);
        lock(&world).fault = Some((fault, errno));
        assert_eq!(pair.compact().unwrap_err().kind(), kind, "{fault:?}");
        lock(&world).fault = None;
        let pair = open_image(&world, memory_of(None), 2).unwrap();
        assert_eq!(content_of(&mut pair.worker()), before, "{fault:?}");
        let done = pair.compact().unwrap();
        assert_eq!(done.after.file_bytes, 4096 + 6 * 512, "{fault:?}");
        let mut worker = open_image(&world, memory_of(None), 3).unwrap().worker();
        assert_eq!(content_of(&mut worker), before, "{fault:?}");
    }
}

#[test]
fn pairs_of_the_reference_are_written_to_and_read_as_images() {
    let golden = Golden::load();
    let cases = [
        "rw-append",
        "rw-append-groupcommit",
        "rw-append-reopened",
        "stack3-rw",
        "stack1-rw-discard",
    ];
    for name in cases {
        let case = golden.case(name);
        let copy = golden.materialise(case);
        let config = copy.config(case);
        let read_image = || {
            let image = Image::open_config(&config, None).unwrap();
            let mut bytes = vec![0; usize::try_from(image.virtual_bytes()).unwrap()];
            image.worker().unwrap().read(0, &mut bytes).unwrap();
            bytes
        };
        let mut expected = read_image();
        let digest = hex(&Sha256::digest(&expected));
        assert_eq!(Some(&digest), case.expected_sha256.as_ref(), "{name}");
        let open = || {
            let choice = UpperChoice { data: None, options: options(copy.dir()) };
            WritableImage::open_config(&config, None, choice).unwrap()
        };
        let image = open();
        let mut worker = image.worker().unwrap();
        let mut bytes = vec![0; expected.len()];
        worker.read(0, &mut bytes).unwrap();
        assert!(bytes == expected, "{name}");
        let mut random = Random(7);
        for round in 0..200 {
            let start = random.below(image.virtual_sectors());
            let end = (start + 1 + random.below(64)).min(image.virtual_sectors());
            if random.one_in(4) {
                worker.zero(start..end).unwrap();
                expected[len(start)..len(end)].fill(0);
            } else {
                let fill = vec![random.next().to_le_bytes()[0]; len(end - start)];
                worker.write(start, &fill).unwrap();
                expected[len(start)..len(end)].copy_from_slice(&fill);
            }
            if round % 64 == 0 {
                image.flush().unwrap();
                assert!(read_image() == expected, "{name}, while it is written");
            }
        }
        image.flush().unwrap();
        assert!(read_image() == expected, "{name}, flushed");
        image.close().unwrap();
        drop((worker, image));
        assert!(read_image() == expected, "{name}, closed");
        let mut worker = open().worker().unwrap();
        worker.read(0, &mut bytes).unwrap();
        assert!(bytes == expected, "{name}, opened again");
    }
}

/// A program that another thread had just forked kept the lock of a closed pair for that moment:
/// the pair seemed to be written by another process.
#[test]
fn a_lock_that_is_kept_for_a_moment_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, options) = (fresh(folder.path(), 8), options(folder.path()));
    let held = std::fs::File::open(&paths.data).unwrap();
    held.try_lock().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(10));
            drop(held);
        });
        assert!(Pair::open(&paths, &options).is_ok());
    });
}

#[test]
fn a_reader_of_a_pair_does_not_hold_space_back_when_it_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, options) = (fresh(folder.path(), 8), options(folder.path()));
    let pair: Arc<Pair> = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    let mut seen = [0; 512];
    for round in 0_u8..50 {
        pair.worker().read(0, &mut seen, zeros).unwrap();
        worker.write(0, &[round; 512]).unwrap();
        pair.flush().unwrap();
    }
    assert!(pair.usage().file_bytes <= 4096 + 3 * 512, "{:?}", pair.usage());
}

#[test]
fn a_read_only_view_shows_what_a_killed_server_had_not_flushed() {
    let folder = tempfile::tempdir().unwrap();
    let paths = fresh(folder.path(), 64);
    let run = folder.path().join("run");
    let options = PairOptions { journal_folder: run.join("upper"), ..options(folder.path()) };
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(3, &[1; 1024]).unwrap();
    pair.flush().unwrap();
    worker.write(4, &[2; 1024]).unwrap();
    worker.zero(5..6).unwrap();
    let mut expected = vec![0; len(64)];
    worker.read(0, &mut expected, zeros).unwrap();
    drop((worker, pair));
    let config = folder.path().join("config.json");
    let upper = serde_json::json!({"data": paths.data, "index": paths.index});
    let text = serde_json::json!({"repoBlobUrl": "", "lowers": [], "upper": upper});
    std::fs::write(&config, text.to_string()).unwrap();
    let export = |run: &Path| {
        let program = std::process::Command::new(env!("CARGO_BIN_EXE_obd-ublk"))
            .args(["export".as_ref(), config.as_os_str()])
            .env("OBD_UBLK_RUN_DIR", run)
            .output()
            .unwrap();
        assert!(program.status.success(), "{}", String::from_utf8_lossy(&program.stderr));
        program.stdout
    };
    assert!(export(&run) == expected, "with the journal");
    expected[len(4)..len(5)].fill(1);
    expected[len(5)..len(6)].fill(0);
    assert!(export(folder.path()) == expected, "what was flushed, as after a power cut");
}
