//! The bytes of our own layers, pinned.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::checker::Sector;
use crate::content::{Fill, content, random_disk, sector};
use crate::random::Random;
use crate::{all_options, make, sha256};
use obd_ublk::format::zfile::Algorithm;
use obd_ublk::make::{CODECS, CONSISTENCY, MakeOptions};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

fn name(options: &MakeOptions) -> String {
    let codec = options.zfile.as_ref().map_or("raw".to_owned(), |zfile| {
        let algorithm = if zfile.algorithm == Algorithm::Lz4 { "lz4" } else { "zstd" };
        let crc = if zfile.block_crc { "crc" } else { "plain" };
        format!("{algorithm}-{}-{}k-{crc}", zfile.level, zfile.block_bytes / 1024)
    });
    let tar = if options.tar { "tar-" } else { "" };
    format!("{tar}{codec}-{:?}", options.zeros).to_lowercase()
}

/// `Cargo.toml` pins the crates; this, the C libraries that are linked: those they bring along.
#[test]
fn the_codecs_are_the_ones_that_we_say_they_are() {
    let linked = [("lz4", lzzzz::version_string()), ("zstd", zstd::zstd_safe::version_string())];
    for ((codec, told), (name, version)) in CODECS.into_iter().zip(linked) {
        assert_eq!(codec, name);
        assert!(told.ends_with(&format!(" ({version})")), "{told}: linked is {version}");
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let of_the_host = maps.lines().find(|line| line.contains("libzstd") || line.contains("liblz4"));
    assert_eq!(of_the_host, None, "the host's library");
}

/// When this fails, layers made before and after are no longer the same bytes, so that registries
/// and caches keep both: change `make::CONSISTENCY`, and the table with what is printed.
#[test]
fn the_bytes_of_our_layers_change_only_with_the_consistency_version() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/make_digests.json");
    let known: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut random = Random(77);
    let mut disk = random_disk(2400, &mut random);
    // Zeros that blocks find, and those that only sectors find.
    disk[300..337].fill(Sector::Data(vec![0; 512]));
    for at in 100..230_u64 {
        let place = usize::try_from(at).unwrap();
        disk[place] = Sector::Data(sector(Fill::Alternating, at, &mut random));
    }
    let content = content(&disk, true);
    let digests: Map<String, Value> = all_options()
        .iter()
        .map(|options| (name(options), json!(sha256(&make(&content, options).0))))
        .collect();
    let distinct: BTreeSet<&str> = digests.values().filter_map(Value::as_str).collect();
    assert_eq!(distinct.len(), digests.len(), "every option tells in the bytes");
    let found = json!({ "consistency": CONSISTENCY, "digests": digests });
    if found == known {
        return;
    }
    println!("{found:#}");
    assert_ne!(known["consistency"], found["consistency"], "bytes changed: bump make::CONSISTENCY");
    panic!("the table is that of {}: put the one printed above in its place", known["consistency"]);
}
