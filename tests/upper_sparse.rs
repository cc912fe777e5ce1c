//! Uppers in sparse form: against a flat array, from several threads, and the reference's own.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "upper/recorder.rs"]
mod recorder;

use common::golden::{Golden, hex};
use obd_ublk::disk::{Disk, Space, Worker};
use obd_ublk::error::{ErrorKind, Result};
use obd_ublk::format::config::ImageConfig;
use obd_ublk::image::{Image, SparseImage, load_image_config};
use obd_ublk::upper::{
    Form, Pair, PairOptions, PairPaths, SparseUpper, SparseWorker, create_fresh, is_sparse,
};
use recorder::Random;
use sha2::{Digest, Sha256};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::Duration;

const DISK_SECTORS: u64 = 1003;

fn len(sectors: u64) -> usize {
    usize::try_from(sectors * 512).unwrap()
}

fn options(folder: &Path, lower_bytes: u64) -> PairOptions {
    PairOptions { journal_folder: folder.join("run"), lower_bytes, ..PairOptions::default() }
}

fn fresh(folder: &Path, over_lowers: bool) -> PairPaths {
    let paths = PairPaths { data: folder.join("data"), index: folder.join("index") };
    create_fresh(&paths, DISK_SECTORS * 512, Form::Sparse { over_lowers }).unwrap();
    paths
}

/// Layers below that have another byte in every sector, and end before the disk does.
fn below(sector: u64, gap: &mut [u8]) -> Result<()> {
    for (number, sector_of) in (sector..).zip(gap.chunks_mut(512)) {
        sector_of.fill(if number < 900 { number.to_le_bytes()[0] | 1 } else { 0 });
    }
    Ok(())
}

fn content(worker: &mut SparseWorker) -> Vec<u8> {
    let mut bytes = vec![0xee; len(DISK_SECTORS)];
    worker.read(0, &mut bytes, below).unwrap();
    bytes
}

#[test]
fn random_operations_do_what_a_flat_array_does_and_survive_every_reopening() {
    for (over_lowers, seed) in [(true, 1), (false, 2), (true, 3)] {
        let folder = tempfile::tempdir().unwrap();
        let paths = fresh(folder.path(), over_lowers);
        let options = options(folder.path(), if over_lowers { 900 * 512 } else { 0 });
        let mut flat = vec![0; len(DISK_SECTORS)];
        if over_lowers {
            below(0, &mut flat).unwrap();
        }
        let mut random = Random(seed);
        let mut upper = SparseUpper::open(&paths, &options).unwrap();
        let mut worker = upper.worker();
        for op in 0..20_000 {
            let start = random.below(DISK_SECTORS);
            let end = (start + 1 + random.below(24)).min(DISK_SECTORS);
            let place = len(start)..len(end);
            match random.below(1000) {
                0..=399 => {
                    let bytes = random.next().to_le_bytes().repeat(len(end - start) / 8);
                    worker.write(start, &bytes, below).unwrap();
                    flat[place].copy_from_slice(&bytes);
                }
                400..=499 => {
                    worker.zero(start..end, random.one_in(2), below).unwrap();
                    flat[place].fill(0);
                }
                500..=505 => upper.flush().unwrap(),
                506..=509 => {
                    drop(worker);
                    if random.one_in(2) {
                        upper.close().unwrap();
                    }
                    drop(upper);
                    upper = SparseUpper::open(&paths, &options).unwrap();
                    worker = upper.worker();
                    assert!(content(&mut worker) == flat, "seed {seed}, reopened at {op}");
                }
                510 if random.one_in(5) => {
                    worker.zero(0..DISK_SECTORS, true, below).unwrap();
                    flat.fill(0);
                }
                _ => {
                    let mut bytes = vec![0xee; len(end - start)];
                    worker.read(start, &mut bytes, below).unwrap();
                    assert!(bytes == flat[place], "seed {seed}, operation {op}");
                }
            }
        }
        assert!(content(&mut worker) == flat, "seed {seed}");
    }
}

/// Each of them copies the same block up, and must not undo what another one wrote to it.
#[test]
fn threads_that_write_the_sectors_of_one_block_lose_none() {
    let folder = tempfile::tempdir().unwrap();
    let paths = fresh(folder.path(), true);
    let upper = SparseUpper::open(&paths, &options(folder.path(), 900 * 512)).unwrap();
    // All at the same block at the same time, each for a while with what it found below.
    let start = Barrier::new(4);
    let slow = |sector, gap: &mut [u8]| {
        std::thread::sleep(Duration::from_micros(50));
        below(sector, gap)
    };
    std::thread::scope(|scope| {
        for thread in 0_u8..4 {
            let mut worker = upper.worker();
            let start = &start;
            scope.spawn(move || {
                for block in 0..100 {
                    start.wait();
                    for turn in 0..2 {
                        let sector = block * 8 + u64::from(thread) * 2 + turn;
                        worker.write(sector, &[thread | 0x80; 512], slow).unwrap();
                        let mut seen = [0; 512];
                        worker.read(sector, &mut seen, below).unwrap();
                        assert!(seen == [thread | 0x80; 512], "sector {sector}");
                    }
                }
            });
        }
    });
    let seen = content(&mut upper.worker());
    for (sector, bytes) in seen.chunks(512).take(800).enumerate() {
        let thread = u8::try_from(sector % 8 / 2).unwrap();
        assert!(bytes.iter().all(|byte| *byte == thread | 0x80), "sector {sector}");
    }
}

#[test]
fn zeros_over_layers_are_data_and_over_nothing_a_hole() {
    let (with, without) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let blocks = |paths: &PairPaths| std::fs::metadata(&paths.data).unwrap().blocks();
    let paths = fresh(with.path(), true);
    let upper = SparseUpper::open(&paths, &options(with.path(), 900 * 512)).unwrap();
    assert!(!upper.can_discard());
    upper.worker().zero(0..800, true, below).unwrap();
    upper.flush().unwrap();
    assert_eq!(upper.usage().live_bytes, 800 * 512);
    assert!(blocks(&paths) >= 800);
    let paths = fresh(without.path(), false);
    let upper = SparseUpper::open(&paths, &options(without.path(), 0)).unwrap();
    assert!(upper.can_discard());
    let mut worker = upper.worker();
    worker.write(0, &[1; 800 * 512], below).unwrap();
    upper.flush().unwrap();
    let full = blocks(&paths);
    worker.zero(0..800, true, below).unwrap();
    upper.flush().unwrap();
    assert_eq!(upper.usage().live_bytes, 0);
    assert!(full >= 800 && blocks(&paths) < 100, "{full} blocks, then {}", blocks(&paths));
    worker.write(0, &[1; 800 * 512], below).unwrap();
    worker.zero(0..800, false, below).unwrap();
    assert_eq!(upper.usage().live_bytes, 800 * 512, "the space stays");
}

#[test]
fn a_quota_counts_whole_blocks_and_fails_the_write_alone() {
    let folder = tempfile::tempdir().unwrap();
    let paths = fresh(folder.path(), true);
    let options = PairOptions { quota_bytes: Some(3 * 4096), ..options(folder.path(), 900 * 512) };
    let upper = SparseUpper::open(&paths, &options).unwrap();
    let mut worker = upper.worker();
    worker.write(7, &[0x55; 1024], below).unwrap();
    assert_eq!(upper.usage().live_bytes, 2 * 4096, "a sector of each of two blocks");
    let before = content(&mut worker);
    let error = worker.write(16, &[0x66; 512], below).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, libc::ENOSPC));
    assert!(content(&mut worker) == before);
    worker.write(0, &[0x77; 16 * 512], below).unwrap();
    upper.flush().unwrap();
    assert!(upper.warning().unwrap().contains("100 % of the quota"));
}

#[test]
fn what_fails_below_fails_the_write_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let paths = fresh(folder.path(), true);
    let upper = SparseUpper::open(&paths, &options(folder.path(), 900 * 512)).unwrap();
    let mut worker = upper.worker();
    let before = content(&mut worker);
    let broken = |_, _: &mut [u8]| Err(obd_ublk::error::Error::new(ErrorKind::Integrity, "bad"));
    assert_eq!(worker.write(1, &[1; 512], broken).unwrap_err().kind(), ErrorKind::Integrity);
    assert!(content(&mut worker) == before);
    worker.write(0, &[1; 4096], broken).unwrap();
    worker.write(1, &[2; 512], broken).unwrap();
}

#[test]
fn one_process_writes_it_and_no_append_pair_is_taken_for_one() {
    let folder = tempfile::tempdir().unwrap();
    let paths = fresh(folder.path(), false);
    let options = options(folder.path(), 0);
    let upper = SparseUpper::open(&paths, &options).unwrap();
    let error = SparseUpper::open(&paths, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    upper.close().unwrap();
    let error = upper.worker().write(0, &[1; 512], below).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    SparseUpper::open(&paths, &options).unwrap();
    assert_eq!(Pair::open(&paths, &options).unwrap_err().kind(), ErrorKind::Unsupported);
    let append = PairPaths { data: folder.path().join("d"), index: folder.path().join("i") };
    create_fresh(&append, 4096, Form::Append).unwrap();
    assert!(!is_sparse(&std::fs::File::open(&append.data).unwrap()).unwrap());
    assert!(SparseUpper::open(&append, &options).is_err());
    let half = PairPaths { index: folder.path().join("none"), ..paths };
    assert_eq!(SparseUpper::open(&half, &options).unwrap_err().kind(), ErrorKind::NotFound);
}

/// The files of the upper that a config names, and the layers below it.
fn parts_of(config: &Path) -> (PairPaths, Option<Image>) {
    let mut parsed: ImageConfig = load_image_config(config, None).unwrap();
    let upper = parsed.upper.take().unwrap();
    let paths = PairPaths {
        data: PathBuf::from(upper.data.as_str()),
        index: PathBuf::from(upper.index.as_str()),
    };
    let lowers = config.with_file_name("lowers.json");
    let mut text: serde_json::Value =
        serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
    text.as_object_mut().unwrap().remove("upper");
    std::fs::write(&lowers, text.to_string()).unwrap();
    let has_lowers = !text["lowers"].as_array().unwrap().is_empty();
    (paths, has_lowers.then(|| Image::open_config(&lowers, None).unwrap()))
}

#[test]
fn uppers_of_the_reference_are_written_and_read_as_images() {
    let golden = Golden::load();
    for name in ["rw-sparse", "stack2-rwsparse", "stack1-rwsparse-discard"] {
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
        assert_eq!(Some(&hex(&Sha256::digest(&expected))), case.expected_sha256.as_ref(), "{name}");
        let open = || {
            let (paths, lowers) = parts_of(&config);
            SparseImage::on_top_of(lowers, &paths, None, options(copy.dir(), 0)).unwrap()
        };
        let image = open();
        let geometry = image.geometry();
        assert_eq!(geometry.discard_granularity_bytes.is_some(), name == "rw-sparse");
        let mut worker = image.worker().unwrap();
        let mut random = Random(9);
        for round in 0..150 {
            let start = random.below(geometry.sectors);
            let end = (start + 1 + random.below(64)).min(geometry.sectors);
            let place = len(start)..len(end);
            if random.one_in(4) {
                let space = if random.one_in(2) { Space::Free } else { Space::Keep };
                worker.write_zeroes(start..end, space).unwrap();
                expected[place].fill(0);
            } else {
                let fill = vec![random.next().to_le_bytes()[0]; len(end - start)];
                worker.write(start, &fill).unwrap();
                expected[place].copy_from_slice(&fill);
            }
            if round % 50 == 0 {
                image.flush().unwrap();
                assert!(read_image() == expected, "{name}, while it is written");
            }
        }
        image.upper().close().unwrap();
        drop((worker, image));
        assert!(read_image() == expected, "{name}, closed");
        let mut bytes = vec![0; expected.len()];
        open().worker().unwrap().read(0, &mut bytes).unwrap();
        assert!(bytes == expected, "{name}, opened again");
    }
}

#[test]
fn a_new_upper_has_the_bytes_of_the_references_but_for_its_uuid() {
    let golden = Golden::load();
    let case = golden.case("rw-sparse");
    let copy = golden.materialise(case);
    let (theirs, _) = parts_of(&copy.config(case));
    let folder = tempfile::tempdir().unwrap();
    let ours = PairPaths { data: folder.path().join("d"), index: folder.path().join("i") };
    create_fresh(&ours, case.virtual_size.unwrap(), Form::Sparse { over_lowers: true }).unwrap();
    let header = |paths: &PairPaths| {
        let mut bytes = std::fs::read(&paths.data).unwrap();
        bytes.truncate(4096);
        bytes[56..93].fill(0);
        bytes
    };
    assert!(header(&ours) == header(&theirs));
    let size = |path: &Path| std::fs::metadata(path).unwrap().len();
    assert_eq!(size(&ours.data), size(&theirs.data));
    assert_eq!((size(&ours.index), size(&theirs.index)), (0, 0));
    let _: Arc<SparseUpper> = SparseUpper::open(&ours, &options(folder.path(), 0)).unwrap();
}
