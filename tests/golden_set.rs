//! The checked-in golden set is what its manifest says, and comes back to life unharmed.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::golden::{Golden, NOT_KEPT, sha256_of_file};
use nix::unistd::{Whence, lseek};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

#[test]
fn every_file_of_every_case_has_the_size_and_digest_of_the_manifest() {
    let golden = Golden::load();
    for case in golden.cases() {
        let case_files = golden.materialise(case);
        for (file, digest) in &case.file_sha256 {
            if NOT_KEPT.contains(&file.as_str()) {
                continue;
            }
            let path = case_files.path(file);
            assert_eq!(path.metadata().unwrap().len(), case.file_size[file], "size of {file}");
            assert_eq!(&sha256_of_file(&path), digest, "sha256 of {file}");
        }
    }
}

#[test]
fn a_rebuilt_sparse_file_has_data_exactly_where_the_manifest_says() {
    let golden = Golden::load();
    let sparse: Vec<_> = golden.cases().iter().filter(|c| c.sparse_file.is_some()).collect();
    assert_eq!(sparse.len(), 3);
    for case in sparse {
        let case_files = golden.materialise(case);
        let path = case_files.path(case.sparse_file.as_ref().unwrap());
        assert_eq!(data_extents(&path, 4096), case.extents(), "{}", case.name);
    }
}

/// The data extents of a file from byte `from` on, as the file system tells them.
fn data_extents(path: &Path, from: i64) -> Vec<Range<u64>> {
    let file = std::fs::File::open(path).unwrap();
    let mut extents = Vec::new();
    let mut position = from;
    // ENXIO: no data beyond `position`.
    while let Ok(start) = lseek(&file, position, Whence::SeekData) {
        position = lseek(&file, start, Whence::SeekHole).unwrap();
        extents.push(u64::try_from(start).unwrap()..u64::try_from(position).unwrap());
    }
    extents
}

#[test]
fn no_file_lies_in_the_folder_that_the_manifest_does_not_know() {
    let golden = Golden::load();
    let mut known: BTreeSet<String> = BTreeSet::from(["manifest.json".to_owned()]);
    for case in golden.cases() {
        let packed = |file: &String| match case.sparse_file.as_ref() == Some(file) {
            true => format!("{file}.packed"),
            false => file.clone(),
        };
        known.extend(case.files.iter().map(packed));
        known.extend(case.config());
    }
    for file in NOT_KEPT {
        assert!(known.remove(file), "{file} is in the manifest");
    }
    let mut found = BTreeSet::new();
    collect_files(golden.root(), golden.root(), &mut found);
    assert_eq!(found, known);
}

fn collect_files(root: &Path, folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_files(root, &path, found);
        } else {
            found.insert(path.strip_prefix(root).unwrap().display().to_string());
        }
    }
}

#[test]
fn a_case_can_be_opened_from_its_shipped_config_and_from_an_absolute_one() {
    let golden = Golden::load();
    for name in ["stack3", "stack3-rw", "ext4-3layers-2"] {
        let case = golden.case(name);
        let case_files = golden.materialise(case);
        let shipped = case_files.path(&case.config().unwrap());
        let made = case_files.config(case);
        let read = |path: &Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
        };
        let (shipped, made) = (read(&shipped), read(&made));
        let lowers = shipped["lowers"].as_array().unwrap();
        assert_eq!(made["lowers"].as_array().unwrap().len(), lowers.len(), "{name}");
        for (index, lower) in lowers.iter().enumerate() {
            let absolute = made["lowers"][index]["file"].as_str().unwrap();
            let relative = lower["file"].as_str().unwrap();
            assert_eq!(Path::new(absolute), case_files.path(relative), "{name} layer {index}");
            assert!(Path::new(absolute).is_file(), "{absolute}");
        }
        assert_eq!(made["upper"].get("data").is_some(), shipped["upper"].get("data").is_some());
    }
}
