//! Every golden case reads as the reference wrote it: flattened, extracted or refused.
//!
//! The images were made by the reference tools; `expected_sha256` is of the flattened disk, from
//! the reference's own reader or, where that cannot read its own file, from the write model.

// The helpers of a test may panic as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::golden::{Case, Golden, Materialised, hex};
use obd_ublk::disk::{Disk, Worker};
use obd_ublk::error::{Error, ErrorKind};
use obd_ublk::format::trace;
use obd_ublk::image::{Image, Payload, Scratch, Stack, load_image_config, load_service_config};
use obd_ublk::source::Source;
use sha2::{Digest, Sha256};
use std::sync::atomic::AtomicU64;

/// Kinds that flatten to a virtual disk.
fn is_disk(case: &Case) -> bool {
    let other = ["zfile(plain)", "corrupt", "turboOCI", "prefetch-trace"];
    !other.contains(&case.kind.as_str())
}

fn open(case: &Case, files: &Materialised) -> Image {
    let config = files.config(case);
    Image::open_config(&config, None).unwrap_or_else(|e| panic!("{}: {e:#}", case.name))
}

fn flattened_sha256(image: &Image) -> String {
    let mut hash = Sha256::new();
    image.export_to_stream(&mut hash, &AtomicU64::new(0)).unwrap();
    hex(&hash.finalize())
}

/// The decompressed content of a payload, whole.
fn content(payload: &Payload) -> Vec<u8> {
    let mut scratch = Scratch::new(std::iter::once(payload)).unwrap();
    let mut bytes = vec![0; usize::try_from(payload.bytes()).unwrap()];
    scratch.read(payload, 0, 0, &mut bytes).unwrap();
    bytes
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

#[test]
fn every_disk_flattens_to_what_the_reference_wrote() {
    let golden = Golden::load();
    let mut checked = 0;
    for case in golden.cases().iter().filter(|case| is_disk(case)) {
        let files = golden.materialise(case);
        let image = open(case, &files);
        assert_eq!(Some(image.virtual_bytes()), case.virtual_size, "{}", case.name);
        assert_eq!(Some(flattened_sha256(&image)), case.expected_sha256, "{}", case.name);
        checked += 1;
    }
    assert_eq!(checked, 48, "every case of a disk kind");
}

#[test]
fn every_plain_zfile_extracts_to_what_was_compressed() {
    let golden = Golden::load();
    for case in golden.of_kind("zfile(plain)") {
        let files = golden.materialise(case);
        let payload = Payload::open(Source::open(&files.path(&case.files[0])).unwrap()).unwrap();
        assert!(payload.zfile().is_some(), "{}", case.name);
        assert_eq!(Some(sha256(&content(&payload))), case.expected_sha256, "{}", case.name);
    }
}

#[test]
fn every_compressed_layer_decompresses_to_the_lsmt_file_it_was_made_from() {
    let golden = Golden::load();
    let mut checked = 0;
    for case in golden.of_kind("zfile(lsmt)") {
        let files = golden.materialise(case);
        let payload = Payload::open(Source::open(&files.path(&case.files[0])).unwrap()).unwrap();
        let Some(expected) = case.rest.get("zfile_uncompressed_sha256") else { continue };
        assert_eq!(sha256(&content(&payload)), expected.as_str().unwrap(), "{}", case.name);
        assert_eq!(payload.wrapping().tar, case.rest["tar"].as_bool().unwrap(), "{}", case.name);
        let part = payload.zfile().unwrap();
        assert_eq!(u64::from(part.header.block_bytes), case.rest["block_size"].as_u64().unwrap());
        assert_eq!(part.header.has_block_crc, case.rest["crc"].as_bool().unwrap());
        checked += 1;
    }
    assert!(checked >= 14, "{checked} layers");
}

#[test]
fn every_layer_states_the_uuids_that_it_was_made_with() {
    let golden = Golden::load();
    let mut checked = 0;
    for case in golden.cases().iter().filter(|case| is_disk(case)) {
        let Some(uuid) = case.rest.get("uuid").and_then(|uuid| uuid.as_str()) else { continue };
        let files = golden.materialise(case);
        let config = load_image_config(&files.config(case), None).unwrap();
        let stack = Stack::open(&config, &load_service_config(None).unwrap()).unwrap();
        assert_eq!(stack.layers().last().unwrap().header.uuid.to_string(), uuid, "{}", case.name);
        checked += 1;
    }
    assert_eq!(checked, 27, "every layer whose uuid the manifest has");
}

#[test]
fn the_trace_has_the_records_that_the_reference_wrote() {
    let golden = Golden::load();
    let case = golden.case("prefetch-trace");
    let bytes = std::fs::read(golden.root().join(&case.files[0])).unwrap();
    let found: Vec<_> = trace::parse(&bytes)
        .unwrap()
        .records
        .iter()
        .map(|r| {
            serde_json::json!([
                format!("{:?}", r.op).get(..1),
                r.layer_index,
                r.bytes,
                r.offset_bytes
            ])
        })
        .collect();
    assert_eq!(serde_json::Value::from(found), case.rest["records"]);
}

#[test]
fn an_image_is_of_the_config_that_was_read_though_the_file_was_replaced() {
    let golden = Golden::load();
    let case = golden.case("stack3");
    let files = golden.materialise(case);
    let config = files.config(case);
    let bytes = std::fs::read(&config).unwrap();
    std::fs::write(&config, "{ replaced").unwrap();
    let image = Image::open_bytes(&config, &bytes, None).unwrap();
    assert_eq!(Some(flattened_sha256(&image)), case.expected_sha256);
    let error = Image::open_bytes(&config, b"{ replaced", None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    let told = format!("{error:#}");
    assert!(told.starts_with(&format!("parse {}: ", config.display())), "{told}");
}

#[test]
fn turbo_oci_images_are_refused_by_name() {
    let golden = Golden::load();
    for case in golden.of_kind("turboOCI") {
        let error = Image::open_config(&golden.root().join(case.config().unwrap()), None);
        let error = error.expect_err(&case.name);
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:#}");
        assert!(format!("{error:#}").contains("TurboOCI"), "{error:#}");
    }
}

/// A read of every sector, in pieces of one page; how many failed, with the first error.
fn read_everything(image: &Image) -> (u64, Option<Error>) {
    let mut worker = image.worker().unwrap();
    let mut page = [0; 4096];
    let (mut failed, mut first) = (0, None);
    for sector in (0..image.virtual_bytes() / 512).step_by(8) {
        if let Err(error) = worker.read(sector, &mut page) {
            failed += 1;
            first.get_or_insert(error);
        }
    }
    (failed, first)
}

#[test]
fn every_corrupt_layer_behaves_as_the_manifest_expects() {
    let golden = Golden::load();
    for case in golden.of_kind("corrupt") {
        let files = golden.materialise(case);
        let expect = case.rest["expect"].as_str().unwrap();
        let opened = Image::open_config(&files.config(case), None);
        let name = &case.name;
        let located = |error: &Error| {
            let text = format!("{error:#}");
            assert!(text.contains(" at byte ") || text.contains("block "), "{name}: {text}");
            assert!(text.contains("bad"), "{name} names the file: {text}");
        };
        if expect.starts_with("refused") {
            let error = opened.map_or_else(Some, |image| read_everything(&image).1);
            located(&error.unwrap_or_else(|| panic!("{name} was read without an error")));
        } else if expect.starts_with("opens;") {
            let image = opened.unwrap();
            let (failed, first) = read_everything(&image);
            // A damaged block has 8 sectors; each may lie in another page of the disk.
            assert!((1..=8).contains(&failed), "{name}: {failed} pages failed");
            located(&first.unwrap());
        } else {
            assert!(expect.starts_with("no checksum"), "{name}: {expect}");
            match opened {
                Ok(image) => drop(read_everything(&image)),
                Err(error) => located(&error),
            }
        }
    }
}

#[test]
fn what_is_read_around_a_damaged_block_is_right() {
    let golden = Golden::load();
    let (bad, good) = (golden.case("bad-zfile-midblock"), golden.case("zfile-zstd-4k-random"));
    let (bad_files, good_files) = (golden.materialise(bad), golden.materialise(good));
    let (bad, good) = (open(bad, &bad_files), open(good, &good_files));
    let (mut bad_worker, mut good_worker) = (bad.worker().unwrap(), good.worker().unwrap());
    let (mut found, mut expected) = ([0; 512], [0; 512]);
    let mut damaged = 0;
    for sector in 0..good.virtual_bytes() / 512 {
        good_worker.read(sector, &mut expected).unwrap();
        match bad_worker.read(sector, &mut found) {
            Ok(()) => assert_eq!(found, expected, "sector {sector}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Integrity, "{error:#}");
                damaged += 1;
            }
        }
    }
    assert!((1..=8).contains(&damaged), "{damaged} sectors of one 4 KiB block");
}

#[test]
fn reads_of_any_size_and_place_equal_the_flattened_disk() {
    let golden = Golden::load();
    for name in ["stack8", "zfile-lz4-64k-text", "zfile-zstd-16k-tar-edges", "stack3-rw"] {
        let case = golden.case(name);
        let files = golden.materialise(case);
        let image = open(case, &files);
        let mut whole = Vec::new();
        image.export_to_stream(&mut whole, &AtomicU64::new(0)).unwrap();
        let mut worker = image.worker().unwrap();
        // A fixed linear congruential sequence: the same reads every time.
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let sectors = image.virtual_bytes() / 512;
        for _ in 0..3000 {
            let start = next(sectors);
            let len = (1 + next(300)).min(sectors - start);
            let (from, to) = (usize::try_from(start * 512), usize::try_from((start + len) * 512));
            let expected = &whole[from.unwrap()..to.unwrap()];
            let mut found = vec![0xa5; expected.len()];
            worker.read(start, &mut found).unwrap();
            assert!(found == expected, "{name}: {len} sectors at {start}");
        }
    }
}
