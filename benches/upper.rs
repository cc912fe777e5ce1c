//! Writes of 4 KiB into a pair, at random places of its disk, over the bare `pwrite` of the same
//! bytes: both appended to a file of their own, and both over space that is in the file already.
//!
//! `cargo bench --bench upper`

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::{Random, alternate, alternate_timed, timed};
use obd_ublk::format::lsmt::UuidText;
use obd_ublk::upper::{NewPair, Pair, PairOptions, PairPaths, PairWorker, create, new_uuid};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const DISK_BYTES: u64 = 256 << 20;
const WRITES: u64 = 16_384;
const ROUNDS: usize = 15;

fn fresh(folder: &Path, options: &PairOptions) -> PairWorker {
    let paths = PairPaths { data: folder.join("data"), index: folder.join("index") };
    let _ = (std::fs::remove_file(&paths.data), std::fs::remove_file(&paths.index));
    let new = NewPair {
        virtual_bytes: DISK_BYTES,
        uuid: new_uuid().unwrap(),
        parent_uuid: UuidText::NIL,
    };
    create(&paths, &new).unwrap();
    Pair::open(&paths, options).unwrap().worker()
}

fn write_all(worker: &mut PairWorker, block: &[u8]) {
    let mut random = Random(7);
    for _ in 0..WRITES {
        worker.write(random.below(DISK_BYTES / 4096) * 8, block).unwrap();
    }
}

fn main() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let options =
        PairOptions { journal_folder: memory.path().join("upper"), ..PairOptions::default() };
    let block = [0x5a; 4096];
    let bare = folder.path().join("bare");
    println!("{WRITES} writes of 4096 bytes, {ROUNDS} alternating rounds, medians");
    // Making the files, and letting go of those of the round before, is not a write.
    let appended = alternate_timed(
        ROUNDS,
        || {
            let mut worker = fresh(folder.path(), &options);
            timed(|| write_all(&mut worker, &block))
        },
        || {
            let _ = std::fs::remove_file(&bare);
            let file = File::create(&bare).unwrap();
            timed(|| {
                for at in 0..WRITES {
                    file.write_all_at(&block, 4096 + at * 4096).unwrap();
                }
            })
        },
    );
    appended.print("appended, over pwrite", WRITES, "<= 1.15");
    let mut worker = fresh(folder.path(), &options);
    let file = File::create(&bare).unwrap();
    for _ in 0..3 {
        write_all(&mut worker, &block);
        worker.flush().unwrap();
    }
    let places = worker.pair().usage().file_bytes / 4096;
    for at in 0..places {
        file.write_all_at(&block, at * 4096).unwrap();
    }
    let reused = alternate(
        ROUNDS,
        || {
            write_all(&mut worker, &block);
            // Both make what was covered free again and leave no dirty pages to the other.
            worker.flush().unwrap();
        },
        || {
            let mut random = Random(7);
            for _ in 0..WRITES {
                file.write_all_at(&block, random.below(places) * 4096).unwrap();
            }
            file.sync_data().unwrap();
        },
    );
    reused.print("reused and flushed", WRITES, "-");
    println!("{:?}", worker.pair().usage());
}
