//! What it costs to hand an image to another process: 50 GB in blocks of 4 KiB, 20,000 extents.
//!
//!     cargo bench --bench parcel

// A measurement stops at the first thing that is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use obd_ublk::disk::Disk;
use obd_ublk::format::parcel::{self, LayerFacts, PackedLayer};
use obd_ublk::format::zfile::{Algorithm, Flags, HEADER_BYTES, Header, JumpTable, Layout};
use obd_ublk::image::{Image, Parcel};
use obd_ublk::map::{FlatMap, Run, Target};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

const BLOCKS: u64 = 12_500_000;
const EXTENTS: u64 = 20_000;
const ROUNDS: usize = 7;

/// Header and jump table of a layer whose records have 1500 to 2523 bytes.
fn zfile() -> (Header, JumpTable) {
    let lens = (0..BLOCKS).map(|block| u32::try_from(1500 + block * 37 % 1024).unwrap());
    let start = HEADER_BYTES + lens.clone().map(u64::from).sum::<u64>();
    let table: Vec<u8> = lens.flat_map(u32::to_le_bytes).collect();
    let header = Header {
        flags: Flags::HEADER.with(Flags::DATA).with(Flags::HEADER_OVERWRITTEN).with(Flags::DIGEST),
        index_offset_bytes: start,
        block_count: BLOCKS,
        original_bytes: BLOCKS * 4096,
        index_crc: obd_ublk::format::zfile::crc32c_raw(0, &table),
        block_bytes: 4096,
        algorithm: Algorithm::Lz4,
        level: 0,
        dict_bytes: 0,
        has_block_crc: true,
    };
    let layout = Layout { header: header.clone(), index: start..start + BLOCKS * 4 };
    (header, JumpTable::parse(&table, &layout).unwrap())
}

/// An image without content: only what was parsed of it.
fn image(file: &File) -> Image {
    let (header, jump_table) = zfile();
    let file_bytes = header.index_offset_bytes + BLOCKS * 4;
    file.set_len(file_bytes).unwrap();
    let sectors = BLOCKS * 8 / EXTENTS;
    let runs: Vec<Run> = (0..EXTENTS)
        .map(|i| Run {
            start_sector: i * sectors,
            end_sector: (i + 1) * sectors,
            // Neighbours do not continue each other.
            target: Target::Data { layer: 0, sector: (EXTENTS - 1 - i) * sectors },
        })
        .collect();
    let map = FlatMap::build(&runs, EXTENTS * sectors).unwrap().to_stored();
    let metadata = file.metadata().unwrap();
    let facts = LayerFacts {
        path: b"layer".to_vec(),
        file_bytes,
        device_number: metadata.dev(),
        inode: metadata.ino(),
        payload_offset_bytes: 0,
        payload_bytes: file_bytes,
        tar: false,
    };
    let layers = [PackedLayer { facts, zfile: Some((&header, &jump_table)) }];
    let map = Parcel::seal(|out| parcel::encode(&layers, &map, out)).unwrap();
    Image::unpack(Parcel { map, layers: vec![file.try_clone().unwrap().into()] }).unwrap()
}

fn main() {
    let file = tempfile::tempfile().unwrap();
    let mut image = image(&file);
    let (mut pack, mut unpack) = (Duration::MAX, Duration::MAX);
    let mut bytes = 0;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let parcel = image.pack().unwrap();
        pack = pack.min(start.elapsed());
        bytes = File::from(parcel.map.try_clone().unwrap()).metadata().unwrap().len();
        let start = Instant::now();
        let next = Image::unpack(parcel).unwrap();
        unpack = unpack.min(start.elapsed());
        image = next;
    }
    assert_eq!(image.geometry().sectors, BLOCKS * 8);
    assert_eq!(image.map().entry_count(), usize::try_from(EXTENTS).unwrap());
    println!(
        "{BLOCKS} zblocks, {EXTENTS} extents: parcel {bytes} bytes, pack {:.1} ms, unpack {:.1} ms \
         (best of {ROUNDS})",
        pack.as_secs_f64() * 1e3,
        unpack.as_secs_f64() * 1e3
    );
}
