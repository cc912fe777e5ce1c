//! What the commands take from a machine when a file is large: each runs with a limit on the memory
//! that it may ask the kernel for, far below what the file's length or its header would suggest.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::golden::Golden;
use obd_ublk::format::lsmt::{self, SegmentMapping};
use obd_ublk::format::trace::{self, Op, Record, Trace};
use obd_ublk::format::zfile::{Algorithm, Flags, Header};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs the program where the kernel refuses it more than `limit_kb` of private memory.
fn run_within(limit_kb: u64, arguments: &[&str], file: &Path) -> Output {
    Command::new("sh")
        .args(["-c", "ulimit -d \"$1\" && shift && exec \"$@\"", "sh", &limit_kb.to_string()])
        .arg(env!("CARGO_BIN_EXE_obd-ublk"))
        .args(arguments)
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Standard output of a run that must succeed.
fn printed(output: Output) -> String {
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {told}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

/// As a tree, a million records took 1.9 GB.
#[test]
fn a_trace_of_600000_records_is_shown_in_sixty_megabytes() {
    let record = |number: u64| Record {
        op: Op::Read,
        layer_index: 7,
        bytes: 4096,
        offset_bytes: number * 4096,
    };
    let trace_of =
        |count| file_of(&trace::encode(&Trace { records: (0..count).map(record).collect() }));
    let json = printed(run_within(60_000, &["inspect", "--json"], trace_of(600_000).path()));
    let last = "      \"bytes\": 4096,\n      \"offset\": 2457595904\n    }\n  ]\n}\n";
    assert!(json.ends_with(last));
    assert_eq!(json.lines().count(), 5 + 6 * 600_000);
    let text = printed(run_within(50_000, &["inspect"], trace_of(200_000).path()));
    assert!(text.starts_with("kind: prefetch trace\nrecords:\n  -\n    op: Read\n    layer: 7\n"));
    assert!(text.ends_with("    bytes: 4096\n    offset: 819195904\n"));
    assert_eq!(text.lines().count(), 2 + 5 * 200_000);
}

#[test]
fn an_index_of_half_a_million_entries_is_shown_in_a_hundred_megabytes() {
    let entry = |number: u64| SegmentMapping {
        start_sector: number * 2,
        sectors: 1,
        mapped_sector: 8,
        zeroed: true,
        tag: 0,
    };
    let entries: Vec<_> = (0..500_000).map(entry).collect();
    let file = file_of(&lsmt::write_sealed(&entries, &[0; 512], 512_000_000));
    let json = printed(run_within(100_000, &["inspect", "--entries", "--json"], file.path()));
    assert_eq!(json.matches("\"mapped_sector\": 8,").count(), 500_000);
    assert!(json.ends_with("    ]\n  },\n  \"kind\": \"layer\"\n}\n"));
    let brief = printed(run_within(100_000, &["inspect", "--json"], file.path()));
    let brief: serde_json::Value = serde_json::from_str(&brief).unwrap();
    assert_eq!(brief["lsmt"]["index_entries"], 500_000);
}

/// A zfile of 9 GB of which the header and `lens`, the front of its jump table, are there. Zeros
/// have the checksum 0 in this format, so that nothing is wrong with a header that states it.
fn sparse_zfile(lens: &[u32]) -> tempfile::NamedTempFile {
    let block_count = 1_000_000_000;
    let header = Header {
        flags: [Flags::DATA, Flags::HEADER_OVERWRITTEN, Flags::DIGEST]
            .into_iter()
            .fold(Flags::HEADER, Flags::with),
        index_offset_bytes: 512 + 5 * block_count,
        block_count,
        original_bytes: 4096 * block_count,
        index_crc: 0,
        block_bytes: 4096,
        algorithm: Algorithm::Lz4,
        level: 0,
        dict_bytes: 0,
        has_block_crc: true,
    };
    let file = file_of(&header.encode());
    file.as_file().set_len(header.index_offset_bytes + 4 * block_count).unwrap();
    let table: Vec<u8> = lens.iter().flat_map(|len| len.to_le_bytes()).collect();
    file.as_file().write_all_at(&table, header.index_offset_bytes).unwrap();
    let kept = file.path().metadata().unwrap().blocks() * 512;
    assert!(kept < 20_000_000, "{kept} bytes: the file system keeps no holes");
    file
}

/// Such a file used to be believed until 4 GB of zeros had been read into memory.
#[test]
fn a_hole_where_a_jump_table_should_be_costs_no_memory() {
    for lens in [&[][..], &vec![7; 1_000_000]] {
        let file = sparse_zfile(lens);
        for command in ["inspect", "verify"] {
            let output = run_within(24_000, &[command], file.path());
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(5), "{}: {told}", output.status);
            let (block, at_byte) = (lens.len(), 5_000_000_512 + 4 * lens.len());
            let place = format!("length of block {block} at byte {at_byte}: found 0");
            assert!(told.contains(&place), "{told}");
        }
    }
}

/// Blank slots in the log of a writable pair are legal, so a hole in it is read to its end; but
/// nothing is kept of it.
#[test]
fn a_hole_in_the_log_of_a_writable_pair_costs_no_memory() {
    let golden = Golden::load();
    let case = golden.case("rw-append");
    let files = golden.materialise(case);
    let index = files.path(&case.upper().unwrap().index);
    let config = files.config(case);
    let log = std::fs::File::options().write(true).open(index).unwrap();
    log.set_len(4096 + 16 * 20_000_000).unwrap();
    let output = run_within(24_000, &["verify", "--json"], &config);
    let report: serde_json::Value = serde_json::from_str(&printed(output)).unwrap();
    let entries = report["layers"][0]["index_entries"].as_u64().unwrap();
    assert!((1..1000).contains(&entries), "{entries}");
    // Beyond the limit nothing is read at all.
    log.set_len(1 << 40).unwrap();
    let output = run_within(24_000, &["verify"], &config);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{told}");
    assert!(told.contains("found 68719476480 entries, expected at most 128000000"), "{told}");
}
