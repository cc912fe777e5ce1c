//! The reference's layers, written once more.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::checker::check;
use crate::common::golden::{Case, Golden, Materialised, hex};
use crate::make;
use obd_ublk::error::ErrorKind;
use obd_ublk::format::zfile::{Algorithm, WriteOptions};
use obd_ublk::image::{Image, Layer, Stack};
use obd_ublk::make::{Content, MakeOptions, ZeroDetection, recompress_layer};
use obd_ublk::source::Source;
use obd_ublk::upper::PairPaths;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

struct Hash(Sha256);

impl Write for Hash {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn flattened(image: &Image) -> String {
    let mut hash = Hash(Sha256::new());
    image.export_to_stream(&mut hash, &AtomicU64::new(0)).unwrap();
    hex(&hash.0.finalize())
}

fn open_memory(bytes: Vec<u8>) -> Layer {
    Layer::open_sealed("memory".to_owned(), Source::Memory(Arc::from(bytes))).unwrap()
}

fn open_path(path: &Path) -> Layer {
    Layer::open_sealed(path.display().to_string(), Source::open(path).unwrap()).unwrap()
}

/// The layers of a case, the upper last.
fn contents(case: &Case, files: &Materialised) -> Vec<Content> {
    let mut all: Vec<Content> = case
        .layers()
        .iter()
        .map(|layer| Content::of_layer(open_path(&files.path(layer))).unwrap())
        .collect();
    if let Some(upper) = case.upper() {
        let paths = PairPaths { data: files.path(&upper.data), index: files.path(&upper.index) };
        all.push(Content::of_pair(&paths).unwrap());
    }
    all
}

fn readable(golden: &Golden) -> Vec<&Case> {
    let disk = |case: &&Case| {
        case.virtual_size.is_some() && case.expected_sha256.is_some() && case.kind != "turboOCI"
    };
    let found: Vec<_> = golden.cases().iter().filter(disk).collect();
    assert!(found.len() > 40, "{}", found.len());
    found
}

#[test]
fn every_image_of_the_reference_committed_anew_or_merged_reads_the_same() {
    let golden = Golden::load();
    let zfile = |algorithm, block_bytes| {
        Some(WriteOptions { algorithm, block_bytes, ..WriteOptions::default() })
    };
    let choices = [
        MakeOptions { zfile: None, ..MakeOptions::default() },
        MakeOptions { zfile: zfile(Algorithm::Lz4, 4096), tar: true, ..MakeOptions::default() },
        MakeOptions { zfile: zfile(Algorithm::Zstd, 65536), ..MakeOptions::default() },
    ];
    for (number, case) in readable(&golden).into_iter().enumerate() {
        let files = golden.materialise(case);
        let options = &choices[number % choices.len()];
        let layers: Vec<Layer> = contents(case, &files)
            .iter()
            .map(|content| {
                let (file, _) = make(content, options);
                check(&file);
                open_memory(file)
            })
            .collect();
        let expected = case.expected_sha256.as_ref().unwrap();
        let again = Stack::from_layers(layers).unwrap().into_image().unwrap();
        assert_eq!(&flattened(&again), expected, "{} committed", case.name);
        let config = files.config(case);
        let config = obd_ublk::image::load_image_config(&config, None).unwrap();
        let stack = Stack::open(&config, &obd_ublk::format::config::ServiceConfig::default());
        let merged = Content::of_stack(stack.unwrap()).unwrap();
        let (file, _) = make(&merged, &choices[(number + 1) % choices.len()]);
        check(&file);
        let image = Stack::from_layers(vec![open_memory(file)]).unwrap().into_image().unwrap();
        assert_eq!(&flattened(&image), expected, "{} merged", case.name);
    }
}

/// What makes the reference's bytes: its options.
fn options_of(case: &Case, file: &[u8]) -> MakeOptions {
    let checked = check(file);
    let zfile = checked.zfile.map(|found| WriteOptions {
        algorithm: if found.algorithm == 1 { Algorithm::Lz4 } else { Algorithm::Zstd },
        block_bytes: u32::try_from(found.block_bytes).unwrap(),
        block_crc: found.has_crc,
        ..WriteOptions::default()
    });
    let tar = case.kind.ends_with("+tar");
    MakeOptions { zfile, tar, zeros: ZeroDetection::Off, threads: 2 }
}

/// A layer that the reference committed holds nothing but live data in order: committed again
/// without zero detection it must come out as it is.
#[test]
fn without_zero_detection_the_bytes_are_those_of_the_reference() {
    let golden = Golden::load();
    let mut same = 0;
    for case in golden.cases() {
        let committed = case.kind.starts_with("lsmt-raw(commit)")
            || case.kind == "lsmt-raw+tar"
            || case.kind.starts_with("zfile(lsmt)");
        // Written with the header as it was at first; or not readable by the reference.
        let other = case.name.starts_with("zfilelib") || case.name.ends_with("64k-incompressible");
        if !committed || other {
            continue;
        }
        let path = golden.root().join(&case.layers()[0]);
        let theirs = std::fs::read(&path).unwrap();
        let options = options_of(case, &theirs);
        let (ours, _) = make(&Content::of_layer(open_path(&path)).unwrap(), &options);
        if case.name.contains("zstd") {
            // Another version of the codec: what is in the blocks is the same.
            assert!(check(&ours).lsmt == check(&theirs).lsmt, "{}", case.name);
        } else {
            assert!(ours == theirs, "{}", case.name);
            same += 1;
        }
    }
    assert_eq!(same, 12);
}

#[test]
fn damaged_layers_are_refused_and_leave_nothing() {
    let golden = Golden::load();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let canceled = AtomicBool::new(false);
    let mut refused = 0;
    for case in golden.of_kind("corrupt") {
        let input = golden.root().join(&case.files[0]);
        let made = recompress_layer(&input, &output, &MakeOptions::default(), &canceled);
        match made {
            Err(error) => {
                let kinds = [ErrorKind::Corrupt, ErrorKind::Integrity, ErrorKind::InvalidFormat];
                let unsupported = error.kind() == ErrorKind::Unsupported;
                assert!(kinds.contains(&error.kind()) || unsupported, "{}: {error}", case.name);
                assert!(crate::names(folder.path()).is_empty(), "{}", case.name);
                refused += 1;
            }
            // Without checksums damage can go unseen.
            Ok(_) => assert_eq!(case.name, "bad-zfile-nocrc-block"),
        }
        let _ = std::fs::remove_file(&output);
    }
    assert!(refused >= 10, "{refused}");
}

#[test]
fn a_snapshot_can_have_its_sealed_layer_compressed() {
    let golden = Golden::load();
    let folder = tempfile::tempdir().unwrap();
    let case = golden.case("lsmt-seal-random");
    let input = golden.root().join(&case.files[0]);
    let output = folder.path().join("overlaybd.commit");
    let canceled = AtomicBool::new(false);
    let options = MakeOptions { threads: 1, ..MakeOptions::default() };
    recompress_layer(&input, &output, &options, &canceled).unwrap();
    let checked = check(&std::fs::read(&output).unwrap());
    assert_eq!(checked.uuid, case.rest["uuid"].as_str().unwrap());
    assert_eq!(checked.parent_uuid, case.rest["parent_uuid"].as_str().unwrap());
    let image = Stack::from_layers(vec![open_path(&output)]).unwrap().into_image().unwrap();
    assert_eq!(&flattened(&image), case.expected_sha256.as_ref().unwrap());
    let error = recompress_layer(&output, &output, &options, &canceled).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert_eq!(crate::names(folder.path()), ["overlaybd.commit"]);
}
