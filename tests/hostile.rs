//! Golden layers cut at every structural boundary and with every bit of their structures flipped:
//! never a panic, and where a checksum covers the damage never a wrong byte.

// The helpers of a test may panic as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::golden::Golden;
use obd_ublk::disk::{Disk, Worker};
use obd_ublk::error::Result;
use obd_ublk::image::{Image, Layer, Payload, Stack};
use obd_ublk::source::Source;
use std::ops::Range;
use std::sync::Arc;

const PAGE_SECTORS: u64 = 8;

fn open(bytes: &[u8]) -> Result<Image> {
    let source = Source::Memory(Arc::from(bytes));
    let layer = Layer::open_sealed("hostile".to_owned(), source)?;
    Stack::from_layers(vec![layer])?.into_image()
}

/// A layer, and what a reader of the undamaged file sees in the pages that hold data.
struct Victim {
    name: &'static str,
    bytes: Vec<u8>,
    sectors: u64,
    pages: Vec<(u64, Vec<u8>)>,
}

impl Victim {
    fn load(name: &'static str) -> Self {
        let golden = Golden::load();
        let bytes = std::fs::read(golden.root().join(&golden.case(name).files[0])).unwrap();
        let image = open(&bytes).unwrap();
        let sectors = image.geometry().sectors;
        let mut worker = image.worker().unwrap();
        let mut page = [0; 4096];
        let mut pages = Vec::new();
        for extent in image.map().extents(0, sectors) {
            let start = extent.start_sector / PAGE_SECTORS * PAGE_SECTORS;
            let start = start.min(sectors - PAGE_SECTORS);
            worker.read(start, &mut page).unwrap();
            pages.push((start, page.to_vec()));
        }
        pages.dedup();
        Self { name, bytes, sectors, pages }
    }

    /// Opens damaged bytes and reads every page of interest. Wrong bytes are a failure where
    /// `covered` says that a checksum stands between the damage and the reader.
    fn survive(&self, bytes: &[u8], covered: bool, what: &str) {
        let Ok(image) = open(bytes) else { return };
        let mut worker = image.worker().unwrap();
        let mut page = [0; 4096];
        if covered {
            assert_eq!(image.geometry().sectors, self.sectors, "{}: {what}", self.name);
        }
        for (start, expected) in &self.pages {
            if worker.read(*start, &mut page).is_ok() && covered {
                assert!(page[..] == expected[..], "{}: {what}: wrong page at {start}", self.name);
            }
        }
    }

    fn flip_every_bit(&self, range: Range<usize>, covered: bool, what: &str) {
        let mut bytes = self.bytes.clone();
        for at in range {
            for bit in 0..8 {
                bytes[at] ^= 1 << bit;
                self.survive(&bytes, covered, &format!("{what}: bit {bit} of byte {at}"));
                bytes[at] ^= 1 << bit;
            }
        }
    }

    fn number(&self, at: usize) -> usize {
        let bytes = self.bytes[at..at + 8].try_into().unwrap();
        usize::try_from(u64::from_le_bytes(bytes)).unwrap()
    }
}

const LSMT: [&str; 4] =
    ["lsmt-commit-bigdiscard", "lsmt-seal-nozeroes", "lsmt-seal-discardonly", "lsmt-commit-none"];

/// Digest and block CRC, header overwritten; trailer only; in a tar wrapper.
const ZFILE: [&str; 3] =
    ["zfile-zstd-4k-random", "zfilelib-zstd-4k-crc1-ow0", "zfilelib-lz4-16k-crc1-ow0-tar"];

/// Where the zfile begins in the file.
fn zfile_start(victim: &Victim) -> (usize, usize) {
    let payload = Payload::open(Source::Memory(Arc::from(&victim.bytes[..]))).unwrap();
    let wrapping = payload.wrapping();
    let start = usize::try_from(wrapping.offset_bytes).unwrap();
    (start, start + usize::try_from(wrapping.stored_bytes).unwrap())
}

#[test]
fn a_raw_layer_cut_anywhere_is_refused_and_never_panics() {
    for name in LSMT {
        let victim = Victim::load(name);
        let len = victim.bytes.len();
        let index = victim.number(len - 4096 + 32);
        let marks = [0, 1, 24, 390, 512, 4095, 4096, 4097, index, index + 16, len - 4096, len - 1];
        for mark in marks {
            for cut in [mark.saturating_sub(1), mark, mark + 1] {
                let bytes = &victim.bytes[..cut.min(len - 1)];
                assert!(open(bytes).is_err(), "{name} cut at {cut}");
            }
        }
    }
}

#[test]
fn a_compressed_layer_cut_anywhere_is_refused_or_reads_right() {
    for name in ZFILE {
        let victim = Victim::load(name);
        let (start, end) = zfile_start(&victim);
        let trailer = end - 512;
        let table = start + victim.number(trailer + 40);
        let len = victim.bytes.len();
        let marks =
            [0, 512, 1024, 1536, start, start + 96, start + 512, table, table + 4, trailer, end];
        for mark in marks.into_iter().chain((0..len).step_by(len / 200)) {
            for cut in [mark.saturating_sub(1), mark, mark + 1] {
                victim.survive(&victim.bytes[..cut.min(len)], true, &format!("cut at {cut}"));
            }
        }
    }
}

#[test]
fn every_flipped_bit_of_a_raw_layers_structures_is_survived() {
    for name in LSMT {
        let victim = Victim::load(name);
        let len = victim.bytes.len();
        let index = victim.number(len - 4096 + 32);
        victim.flip_every_bit(0..390, false, "header");
        victim.flip_every_bit(len - 4096..len - 4096 + 390, false, "trailer");
        let index_end = (index + 2048).min(len - 4096);
        victim.flip_every_bit(index..index_end, false, "index");
    }
}

#[test]
fn every_flipped_bit_under_a_digest_is_found_before_a_wrong_byte_is_read() {
    for name in ZFILE {
        let victim = Victim::load(name);
        let (start, end) = zfile_start(&victim);
        let trailer = end - 512;
        let table = start + victim.number(trailer + 40);
        victim.flip_every_bit(start..start + 96, true, "zfile header");
        victim.flip_every_bit(trailer..trailer + 96, true, "zfile trailer");
        victim.flip_every_bit(table..(table + 256).min(trailer), true, "jump table");
    }
}

#[test]
fn a_flipped_bit_anywhere_in_compressed_data_is_an_error_or_harmless() {
    for name in ZFILE {
        let victim = Victim::load(name);
        let (start, end) = zfile_start(&victim);
        let table = start + victim.number(end - 512 + 40);
        let mut bytes = victim.bytes.clone();
        // A prime step: all positions in a record get their turn.
        for at in (start + 512..table).step_by(97) {
            let bit = at % 8;
            bytes[at] ^= 1 << bit;
            victim.survive(&bytes, true, &format!("bit {bit} of byte {at}"));
            bytes[at] ^= 1 << bit;
        }
    }
}

#[test]
fn every_flipped_bit_of_a_tar_wrapper_is_survived() {
    for name in ["tar-raw", "zfile-zstd-32k-tar-text"] {
        Victim::load(name).flip_every_bit(0..1536, false, "wrapper");
    }
}
