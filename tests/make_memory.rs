//! What making a layer takes of memory: a function of the options, not of the layer. In a process
//! of its own, because the kernel tells of the largest child only.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use nix::sys::resource::{UsageWho, getrusage};
use obd_ublk::format::lsmt::{self, SegmentMapping};
use obd_ublk::limits::MAKE_TABLE_BYTES;
use obd_ublk::make::MakeOptions;
use std::path::Path;
use std::process::Command;

/// A layer of `mebibytes` that its index makes of 1 MiB of data.
fn layer(path: &Path, mebibytes: u64) {
    let data: Vec<u8> = (0..1 << 18_u32).flat_map(|at: u32| (at / 3).to_le_bytes()).collect();
    let entries: Vec<_> = (0..mebibytes)
        .map(|number| SegmentMapping {
            start_sector: number * 2048,
            sectors: 2048,
            mapped_sector: 8,
            zeroed: false,
            tag: 0,
        })
        .collect();
    std::fs::write(path, lsmt::write_sealed(&entries, &data, mebibytes << 20)).unwrap();
}

/// Most that any child so far had in memory at a time, in bytes.
fn largest_child() -> u64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    u64::try_from(usage.max_rss()).unwrap() * 1024
}

#[test]
fn a_layer_of_hundreds_of_thousands_of_blocks_takes_no_more_memory_than_a_small_one() {
    let folder = tempfile::tempdir().unwrap();
    let make = |mebibytes: u64| {
        layer(&folder.path().join("layer"), mebibytes);
        let program = env!("CARGO_BIN_EXE_obd-ublk");
        let run = |arguments: &[&str]| {
            let status = Command::new(program).args(arguments).current_dir(folder.path()).output();
            assert!(status.unwrap().status.success(), "{arguments:?}");
        };
        run(&["merge", "layer", "out", "--threads", "2"]);
        let used = largest_child();
        run(&["zfile", "--check", "out"]);
        used
    };
    let small = make(1);
    let large = make(1200);
    let blocks = 1200 << 20 >> 12;
    assert!(blocks * 4 > MAKE_TABLE_BYTES, "the jump table had to wait in a file");
    let bound = MakeOptions { threads: 2, ..MakeOptions::default() }.memory_bytes();
    println!("small {small}, large {large}, bound {bound}");
    assert!(large < small + bound, "small {small}, large {large}, bound {bound}");
}
