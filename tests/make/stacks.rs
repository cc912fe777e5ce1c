//! As many layers as an image may have, through the command line, against a flat array.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::checker::{Sector, check};
use crate::commands::{ok, refused};
use crate::content::{Fill, bytes, content, layer_of, sector};
use crate::random::Random;
use crate::{all_options, make};
use obd_ublk::upper::{Pair, PairOptions, PairPaths};
use serde_json::json;
use std::path::Path;

const SECTORS: usize = 4000;

/// A layer of a few runs that lie over each other and over those of other layers.
fn disk(random: &mut Random) -> Vec<Sector> {
    let mut disk = vec![Sector::Nothing; SECTORS];
    for _ in 0..6 {
        let start = random.index(SECTORS);
        let end = (start + 1 + random.index(40)).min(SECTORS);
        let fill = [Fill::Text, Fill::Incompressible, Fill::Zeros, Fill::Alternating];
        let (fill, discards) = (fill[random.index(4)], random.one_in(5));
        for (at, place) in (0..).zip(&mut disk[start..end]) {
            *place = match discards {
                true => Sector::Zeroed,
                false => Sector::Data(sector(fill, at, random)),
            };
        }
    }
    disk
}

fn write_over(flat: &mut [u8], disk: &[Sector]) {
    for (place, sector) in flat.chunks_mut(512).zip(disk) {
        if *sector != Sector::Nothing {
            place.copy_from_slice(&bytes(sector));
        }
    }
}

/// So many layers, each made with other options, and what is seen through all of them.
fn layers(folder: &Path, count: usize) -> Vec<u8> {
    let (mut random, options) = (Random(33), all_options());
    let mut flat = vec![0; SECTORS * 512];
    for number in 0..count {
        let disk = disk(&mut random);
        write_over(&mut flat, &disk);
        let (layer, _) = make(&content(&disk, random.one_in(2)), &options[number % options.len()]);
        std::fs::write(folder.join(format!("layer {number}")), layer).unwrap();
    }
    flat
}

/// A config of the first of them, with an upper or without.
fn config(folder: &Path, name: &str, count: usize, upper: Option<&PairPaths>) {
    let file = |number| json!({"file": folder.join(format!("layer {number}"))});
    let mut config = json!({"lowers": (0..count).map(file).collect::<Vec<_>>()});
    if let Some(pair) = upper {
        config["upper"] = json!({"data": pair.data, "index": pair.index});
    }
    std::fs::write(folder.join(name), config.to_string()).unwrap();
}

fn is_read_as(folder: &Path, image: &str, flat: &[u8]) -> bool {
    ok(folder, &["export", image, "-o", "flat.raw"]);
    let found = std::fs::read(folder.join("flat.raw")).unwrap();
    std::fs::remove_file(folder.join("flat.raw")).unwrap();
    found == flat
}

#[test]
fn two_hundred_and_fifty_five_layers_merge_by_the_command_to_what_a_flat_array_holds() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let mut flat = layers(here, 255);
    config(here, "config.json", 255, None);
    assert!(is_read_as(here, "config.json", &flat));
    let mut first: Option<Vec<u8>> = None;
    for threads in ["1", "2", "3", "8"] {
        ok(here, &["merge", "config.json", "merged", "--threads", threads]);
        let merged = std::fs::read(here.join("merged")).unwrap();
        check(&merged);
        assert!(*first.get_or_insert_with(|| merged.clone()) == merged, "{threads} threads");
    }
    for options in [
        &["--raw", "--no-zero-detection"][..],
        &["-t", "--algorithm", "zstd", "--bs", "64"],
        &["--zero-detection", "sector", "--bs", "16", "--no-crc"],
        &[],
    ] {
        ok(here, &[&["merge", "config.json", "merged"][..], options].concat());
        let checked = check(&std::fs::read(here.join("merged")).unwrap());
        assert_eq!(checked.virtual_bytes, u64::try_from(flat.len()).unwrap());
        assert!(is_read_as(here, "merged", &flat), "{options:?}");
    }
    assert_eq!(ok(here, &["diff", "config.json", "merged"]), "");

    // An upper is one of them.
    let paths = PairPaths { data: here.join("data"), index: here.join("index") };
    ok(here, &["create", "data", "index", "2000K"]);
    let options = PairOptions { journal_folder: here.join("run"), ..PairOptions::default() };
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(1003, &[0x5a; 5 * 512]).unwrap();
    drop(worker);
    pair.close().unwrap();
    drop(pair);
    config(here, "writable.json", 254, Some(&paths));
    let mut seen = layers(here, 254);
    seen[1003 * 512..1008 * 512].fill(0x5a);
    ok(here, &["merge", "writable.json", "merged"]);
    assert!(is_read_as(here, "merged", &seen), "with an upper");

    let over = disk(&mut Random(34));
    write_over(&mut flat, &over);
    std::fs::write(here.join("layer 255"), layer_of(&over, false)).unwrap();
    config(here, "config.json", 256, None);
    config(here, "writable.json", 255, Some(&paths));
    let before = std::fs::read(here.join("merged")).unwrap();
    for config in ["config.json", "writable.json"] {
        let said = refused(here, 2, &["merge", config, "merged"]);
        assert!(said.contains("255"), "{said}");
    }
    assert!(std::fs::read(here.join("merged")).unwrap() == before, "nothing was replaced");
}
