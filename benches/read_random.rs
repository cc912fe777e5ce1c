//! Random 4 KiB reads of a page-cached image on one thread, over the arithmetic floor: the C
//! codec and the CRC over the same blocks, in the same order, from a mapping of the same file, to
//! the same ring of destinations; a plain copy for raw layers.
//!
//! `cargo bench --bench read_random`

#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
#![allow(clippy::cast_precision_loss)]

mod common;

use common::{Outcome, Random, alternate, image_like, layer_of};
use memmap2::Mmap;
use obd_ublk::disk::{Disk, Worker};
use obd_ublk::format::zfile::{self, Algorithm, WriteOptions};
use obd_ublk::image::{Image, Layer, Stack};
use obd_ublk::source::Source;
use std::hint::black_box;
use std::io::Write;

const DISK_BYTES: usize = 256 << 20;
const READ_BYTES: usize = 4096;
const READS: usize = 40_000;
const ROUNDS: usize = 15;

/// Destinations in turn, as many as one queue has tags: 512 KiB, more than an L1, less than an L2.
const RING: usize = 128;

struct Bench {
    file: tempfile::NamedTempFile,
    image: Image,
    // The reads, as sectors; the same for both sides.
    sectors: Vec<u64>,
}

impl Bench {
    fn new(stored: &[u8]) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(stored).unwrap();
        let source = Source::open(file.path()).unwrap();
        let layer = Layer::open_sealed("bench".to_owned(), source).unwrap();
        let image = Stack::from_layers(vec![layer]).unwrap().into_image().unwrap();
        let mut random = Random(42);
        let pages = u64::try_from(DISK_BYTES / READ_BYTES).unwrap();
        let sectors = (0..READS).map(|_| random.below(pages) * 8).collect();
        Self { file, image, sectors }
    }

    fn map(&self) -> Mmap {
        // SAFETY: the file is this benchmark's own and nobody writes it while it is mapped.
        unsafe { Mmap::map(self.file.as_file()).unwrap() }
    }

    /// Compares our reads with `floor`, which gets a sector and a destination.
    fn run(&self, mut floor: impl FnMut(u64, &mut [u8])) -> Outcome {
        let mut worker = self.image.worker().unwrap();
        let mut ours_ring = vec![0; RING * READ_BYTES];
        let mut floor_ring = vec![0; RING * READ_BYTES];
        self.check(&mut worker, &mut floor);
        alternate(
            ROUNDS,
            || {
                for (&sector, i) in self.sectors.iter().zip((0..RING).cycle()) {
                    let dst = &mut ours_ring[i * READ_BYTES..][..READ_BYTES];
                    worker.read(sector, dst).unwrap();
                    black_box(dst);
                }
            },
            || {
                for (&sector, i) in self.sectors.iter().zip((0..RING).cycle()) {
                    let dst = &mut floor_ring[i * READ_BYTES..][..READ_BYTES];
                    floor(sector, dst);
                    black_box(dst);
                }
            },
        )
    }

    /// Both sides must give the same bytes, or the comparison means nothing.
    fn check(&self, worker: &mut impl Worker, floor: &mut impl FnMut(u64, &mut [u8])) {
        let (mut ours, mut theirs) = (vec![0; READ_BYTES], vec![0; READ_BYTES]);
        for &sector in self.sectors.iter().take(1000) {
            worker.read(sector, &mut ours).unwrap();
            floor(sector, &mut theirs);
            assert!(ours == theirs, "sector {sector}");
        }
    }
}

fn raw(lsmt: &[u8]) {
    let bench = Bench::new(lsmt);
    let map = bench.map();
    let outcome = bench.run(|sector, dst| {
        let start = 4096 + usize::try_from(sector * 512).unwrap();
        dst.copy_from_slice(&map[start..start + READ_BYTES]);
    });
    outcome.print("raw, over memcpy", READS as u64, "<= 2.0");
}

/// The record of block `i` is `offsets[i]..offsets[i + 1]`, its last 4 bytes the CRC.
fn offsets(stored: &[u8]) -> Vec<usize> {
    let number = |at: usize| u64::from_le_bytes(stored[at..at + 8].try_into().unwrap());
    let table = usize::try_from(number(40)).unwrap();
    let count = usize::try_from(number(48)).unwrap();
    let mut offsets = vec![512];
    for size in stored[table..table + count * 4].chunks_exact(4) {
        let size = u32::from_le_bytes(size.try_into().unwrap());
        offsets.push(offsets.last().unwrap() + usize::try_from(size).unwrap());
    }
    offsets
}

fn compressed(name: &str, lsmt: &[u8], algorithm: Algorithm, block_bytes: u32, goal: &str) {
    let options = WriteOptions { algorithm, block_bytes, ..WriteOptions::default() };
    let stored = zfile::write(lsmt, &options).unwrap();
    let offsets = offsets(&stored);
    let bench = Bench::new(&stored);
    let map = bench.map();
    let block = usize::try_from(block_bytes).unwrap();
    let mut whole = vec![0; block];
    let mut zstd = zstd::bulk::Decompressor::new().unwrap();
    let outcome = bench.run(|sector, dst| {
        let byte = 4096 + usize::try_from(sector * 512).unwrap();
        let record = &map[offsets[byte / block]..offsets[byte / block + 1]];
        let (body, crc) = record.split_at(record.len() - 4);
        let found = !crc32c::crc32c_append(!100_007, body);
        assert_eq!(found.to_le_bytes(), crc);
        let target = if block == READ_BYTES { &mut *dst } else { &mut whole };
        let len = match algorithm {
            Algorithm::Lz4 => lzzzz::lz4::decompress(body, target).unwrap(),
            Algorithm::Zstd => zstd.decompress_to_buffer(body, target).unwrap(),
        };
        assert_eq!(len, block);
        if block != READ_BYTES {
            dst.copy_from_slice(&whole[byte % block..][..READ_BYTES]);
        }
    });
    outcome.print(name, READS as u64, goal);
    println!("{:<28} {:.2}:1", "  compressed", lsmt.len() as f64 / stored.len() as f64);
}

fn main() {
    // `cargo bench` passes --bench; nothing else is understood.
    let lsmt = layer_of(&image_like(DISK_BYTES, 7));
    println!("{READS} random reads of {READ_BYTES} bytes, {ROUNDS} alternating rounds, medians");
    raw(&lsmt);
    compressed("lz4 4K, over codec + CRC", &lsmt, Algorithm::Lz4, 4096, "<= 1.2");
    compressed("zstd 4K, over codec + CRC", &lsmt, Algorithm::Zstd, 4096, "<= 1.1");
    compressed("lz4 64K, over codec + CRC", &lsmt, Algorithm::Lz4, 65536, "-");
    compressed("zstd 64K, over codec + CRC", &lsmt, Algorithm::Zstd, 65536, "-");
}
