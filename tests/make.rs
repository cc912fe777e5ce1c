//! Making layers: what is written obeys every rule of the format, holds what it was made of, and
//! is the same every time.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

#[path = "make/checker.rs"]
mod checker;
#[path = "make/commands.rs"]
mod commands;
#[path = "make/content.rs"]
mod content;
#[path = "make/digests.rs"]
mod digests;
#[path = "make/golden.rs"]
mod golden;
#[path = "make/pairs.rs"]
mod pairs;
#[path = "common/random.rs"]
mod random;
#[path = "make/stacks.rs"]
mod stacks;

use checker::{Sector, check};
use content::{Fill, content, layer_of, open, random_disk, sector};
use obd_ublk::error::ErrorKind;
use obd_ublk::format::zfile::{Algorithm, WriteOptions};
use obd_ublk::image::Stack;
use obd_ublk::make::{
    Content, Made, MakeOptions, Sink, Watch, ZeroDetection, write_layer, write_layer_to,
};
use random::Random;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// A sink in memory, which may fail at its n-th write.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    writes: AtomicUsize,
    fails_at: Option<usize>,
}

impl Sink for Memory {
    fn write_at(&self, at_byte: u64, bytes: &[u8]) -> io::Result<()> {
        if Some(self.writes.fetch_add(1, Ordering::Relaxed)) == self.fails_at {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut file = self.bytes.lock().unwrap();
        let (start, len) = (usize::try_from(at_byte).unwrap(), bytes.len());
        if file.len() < start + len {
            file.resize(start + len, 0);
        }
        file[start..start + len].copy_from_slice(bytes);
        Ok(())
    }

    fn clear(&self) -> io::Result<()> {
        self.bytes.lock().unwrap().clear();
        Ok(())
    }
}

fn make(content: &Content, options: &MakeOptions) -> (Vec<u8>, Made) {
    let sink = Memory::default();
    let (done, canceled) = (AtomicU64::new(0), AtomicBool::new(false));
    let watch = Watch { done: &done, canceled: &canceled };
    let folder = std::env::temp_dir();
    let made = write_layer_to(content, content.identity(), options, &sink, &folder, &watch);
    let made = made.unwrap();
    assert_eq!(done.into_inner(), content.data_bytes(), "progress ends with the work");
    let bytes = sink.bytes.into_inner().unwrap();
    assert_eq!(u64::try_from(bytes.len()).unwrap(), made.file_bytes);
    (bytes, made)
}

/// Every combination of what changes bytes.
fn all_options() -> Vec<MakeOptions> {
    let mut all = Vec::new();
    for zeros in [ZeroDetection::Off, ZeroDetection::Blocks, ZeroDetection::Sectors] {
        for tar in [false, true] {
            all.push(MakeOptions { zfile: None, tar, zeros, threads: 1 });
            for (algorithm, level) in [
                (Algorithm::Lz4, 0),
                (Algorithm::Lz4, 9),
                (Algorithm::Zstd, 0),
                (Algorithm::Zstd, 1),
            ] {
                for block_bytes in [4096, 8192, 16384, 32768, 65536] {
                    for block_crc in [false, true] {
                        let options = WriteOptions {
                            algorithm,
                            level,
                            block_bytes,
                            block_crc,
                            ..WriteOptions::default()
                        };
                        all.push(MakeOptions { zfile: Some(options), tar, zeros, threads: 1 });
                    }
                }
            }
        }
    }
    all
}

/// Checks what `file` holds against what it was made of.
fn judge(disk: &[Sector], file: &[u8], made: &Made, options: &MakeOptions) {
    let checked = check(file);
    assert_eq!(checked.virtual_bytes, u64::try_from(disk.len()).unwrap() * 512);
    let found = checked.sectors();
    for (at, (was, is)) in disk.iter().zip(&found).enumerate() {
        match (was, is) {
            (Sector::Data(bytes), Sector::Zeroed) => {
                assert!(bytes.iter().all(|&byte| byte == 0), "sector {at} lost its data");
                assert_ne!(options.zeros, ZeroDetection::Off);
            }
            _ => assert!(was == is, "sector {at}: {options:?}"),
        }
    }
    let is_zero = |sector: &Sector| matches!(sector, Sector::Data(bytes) if *bytes == [0; 512]);
    let stored_zeros = match options.zeros {
        ZeroDetection::Off => 0,
        ZeroDetection::Blocks => found.chunks(8).filter(|block| block.iter().all(is_zero)).count(),
        ZeroDetection::Sectors => found.iter().filter(|sector| is_zero(sector)).count(),
    };
    assert_eq!(stored_zeros, 0, "{options:?}");
    let count = |wanted: fn(&Sector) -> bool| {
        u64::try_from(found.iter().filter(|sector| wanted(sector)).count()).unwrap()
    };
    assert_eq!(made.data_sectors, count(|sector| matches!(sector, Sector::Data(_))));
    assert_eq!(made.zeroed_sectors, count(|sector| *sector == Sector::Zeroed));
    assert_eq!(made.entries, u64::try_from(checked.entries.len()).unwrap());
    assert_eq!(made.content_bytes, u64::try_from(checked.lsmt.len()).unwrap());
    match (&options.zfile, &checked.zfile) {
        (None, None) => {}
        (Some(wanted), Some(found)) => {
            assert_eq!(found.algorithm, if wanted.algorithm == Algorithm::Lz4 { 1 } else { 2 });
            assert_eq!(found.block_bytes, usize::try_from(wanted.block_bytes).unwrap());
            assert_eq!((found.has_crc, found.level), (wanted.block_crc, wanted.level));
            assert_eq!(made.blocks, u64::try_from(found.records).unwrap());
        }
        other => panic!("{other:?}"),
    }
}

/// What our own reader makes of it.
fn read_back(disk: &[Sector], file: Vec<u8>) {
    let image = Stack::from_layers(vec![open(file)]).unwrap().into_image().unwrap();
    let mut flat = Vec::new();
    image.export_to_stream(&mut flat, &AtomicU64::new(0)).unwrap();
    let wanted: Vec<u8> = disk.iter().flat_map(content::bytes).collect();
    assert!(flat == wanted);
}

#[test]
fn every_option_makes_a_layer_that_obeys_the_rules_and_holds_its_content() {
    let mut random = Random(11);
    let mut disk = random_disk(1200, &mut random);
    // All that a short disk can have: one sector of each kind, zeros on and off a boundary.
    for (at, fill) in [(0, Fill::Incompressible), (1199, Fill::Zeros), (700, Fill::Text)] {
        disk[at] = Sector::Data(sector(fill, 1, &mut random));
    }
    disk[100..356].fill(Sector::Data(vec![0; 512]));
    disk[357..380].fill(Sector::Zeroed);
    for options in all_options() {
        let (file, made) = make(&content(&disk, true), &options);
        judge(&disk, &file, &made, &options);
        read_back(&disk, file);
    }
}

#[test]
fn random_content_of_runs_from_one_sector_to_eight_mebibytes_survives() {
    let all = all_options();
    for seed in 0..20 {
        let mut random = Random(seed);
        let sectors = if seed % 4 == 0 { 50_000 } else { 4000 };
        let disk = random_disk(sectors, &mut random);
        let content = content(&disk, random.one_in(2));
        let options =
            MakeOptions { threads: random.index(4), ..all[random.index(all.len())].clone() };
        let (file, made) = make(&content, &options);
        judge(&disk, &file, &made, &options);
        read_back(&disk, file);
    }
}

#[test]
fn a_layer_of_nothing_is_a_layer() {
    for options in all_options() {
        let disk = vec![Sector::Nothing; 64];
        let (file, made) = make(&content(&disk, false), &options);
        judge(&disk, &file, &made, &options);
        assert_eq!(made.entries, 0);
    }
}

#[test]
fn blocks_of_64_kib_that_do_not_compress_are_written_so_that_the_reference_can_read_them() {
    let mut random = Random(5);
    let noise: Vec<Sector> =
        (0..4000).map(|at| Sector::Data(sector(Fill::Incompressible, at, &mut random))).collect();
    let content = content(&noise, false);
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        for block_crc in [false, true] {
            let zfile =
                WriteOptions { algorithm, block_crc, block_bytes: 65536, ..Default::default() };
            let options = MakeOptions { zfile: Some(zfile), threads: 2, ..Default::default() };
            let (file, made) = make(&content, &options);
            assert!(made.relaxed);
            // The checker refuses a record of more than 64 KiB.
            judge(&noise, &file, &made, &options);
            read_back(&noise, file);
        }
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads() {
    for seed in [3, 4] {
        let mut random = Random(seed);
        let disk = random_disk(40_000, &mut random);
        let content = content(&disk, true);
        for options in all_options().into_iter().step_by(17) {
            let of = |threads| make(&content, &MakeOptions { threads, ..options.clone() }).0;
            let one = of(1);
            for threads in [2, 3, 8] {
                assert!(of(threads) == one, "{threads} threads: {options:?}");
            }
        }
    }
}

#[test]
fn a_full_disk_is_told_at_whichever_write_it_happens() {
    let mut random = Random(9);
    let content = content(&random_disk(4000, &mut random), false);
    let (done, canceled) = (AtomicU64::new(0), AtomicBool::new(false));
    let watch = Watch { done: &done, canceled: &canceled };
    for options in
        [MakeOptions::default(), MakeOptions { zfile: None, tar: true, ..Default::default() }]
    {
        let whole = Memory::default();
        let folder = std::env::temp_dir();
        let write = |sink: &Memory| {
            write_layer_to(&content, content.identity(), &options, sink, &folder, &watch)
        };
        write(&whole).unwrap();
        let writes = whole.writes.into_inner();
        assert!(writes > 4);
        for fails_at in 0..writes {
            let sink = Memory { fails_at: Some(fails_at), ..Memory::default() };
            let error = write(&sink).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            assert!(error.to_string().starts_with("write the layer at byte "), "{error}");
        }
    }
}

#[test]
fn work_that_is_canceled_ends_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(2);
    let content = content(&random_disk(4000, &mut random), false);
    let output = folder.path().join("layer");
    let (done, canceled) = (AtomicU64::new(0), AtomicBool::new(true));
    let watch = Watch { done: &done, canceled: &canceled };
    let made = write_layer(&content, content.identity(), &MakeOptions::default(), &output, &watch);
    assert_eq!(made.unwrap_err().kind(), ErrorKind::Canceled);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn two_hundred_and_fifty_five_layers_merge_and_one_more_does_not() {
    let mut random = Random(21);
    let mut seen = vec![Sector::Nothing; 2000];
    let mut layers = Vec::new();
    for _ in 0..255 {
        let mut disk = vec![Sector::Nothing; 2000];
        for _ in 0..4 {
            let start = random.index(1990);
            let length = random.index(10) + 1;
            let fill = [Fill::Text, Fill::Incompressible, Fill::Zeros][random.index(3)];
            for sector_of_disk in &mut disk[start..start + length] {
                *sector_of_disk = Sector::Data(sector(fill, random.next(), &mut random));
            }
        }
        for (top, below) in seen.iter_mut().zip(&disk) {
            if *below != Sector::Nothing {
                top.clone_from(below);
            }
        }
        layers.push(layer_of(&disk, false));
    }
    let stack = |layers: &[Vec<u8>]| {
        Stack::from_layers(layers.iter().map(|layer| open(layer.clone())).collect())
    };
    let merged = Content::of_stack(stack(&layers).unwrap()).unwrap();
    for options in
        [MakeOptions::default(), MakeOptions { zeros: ZeroDetection::Off, ..Default::default() }]
    {
        let (file, made) = make(&merged, &options);
        judge(&seen, &file, &made, &options);
        read_back(&seen, file);
    }
    layers.push(layers[0].clone());
    assert_eq!(stack(&layers).unwrap_err().kind(), ErrorKind::InvalidConfig);
}

/// A layer with more entries than the reference reads used to be written by other tools.
#[test]
fn a_layer_never_has_more_entries_than_the_reference_reads() {
    // Every other sector, as many as an index may have and some: no entry can be joined.
    let entries: Vec<_> = (0..600_000_u64)
        .map(|at| obd_ublk::format::lsmt::SegmentMapping {
            start_sector: at * 4,
            sectors: 2,
            mapped_sector: 8,
            zeroed: false,
            tag: 0,
        })
        .collect();
    // One sector of data and one of zeros: left out, it would double the entries.
    let mut data = vec![1; 512];
    data.extend([0; 512]);
    let layer = obd_ublk::format::lsmt::write_sealed(&entries, &data, 4 * 600_000 * 512);
    let content = Content::of_layer(open(layer)).unwrap();
    let options = MakeOptions { zeros: ZeroDetection::Sectors, ..MakeOptions::default() };
    let (file, made) = make(&content, &options);
    assert!((600_000..=999_936).contains(&made.entries), "{}", made.entries);
    let checked = check(&file);
    assert_eq!(checked.entries.iter().map(|entry| entry.1).sum::<u64>(), 1_200_000);
}

/// Whether a relaxed layer has room for its entries can depend on what is read: then it is laid out
/// without being stored first.
#[test]
fn a_relaxed_layer_that_may_have_too_many_entries_is_tried_before_it_is_written() {
    const ENTRIES: u64 = 999_936;
    let mut random = Random(3);
    let data: Vec<u8> =
        (0..512).flat_map(|at| sector(Fill::Incompressible, at, &mut random)).collect();
    let zfile = WriteOptions { block_bytes: 65536, ..WriteOptions::default() };
    let options = MakeOptions { zfile: Some(zfile), threads: 2, ..Default::default() };
    // As many as there may be, of two sectors each: behind 112 none lies in two blocks, which have
    // 120; behind an odd one each 60th does.
    for (first, fits) in [(2, true), (1, false)] {
        let entry = |at: u64| obd_ublk::format::lsmt::SegmentMapping {
            start_sector: at * 4,
            sectors: if at == 0 { first } else { 2 },
            mapped_sector: 8 + at * 2 % 512,
            zeroed: false,
            tag: 0,
        };
        let entries: Vec<_> = (0..ENTRIES).map(entry).collect();
        let layer = obd_ublk::format::lsmt::write_sealed(&entries, &data, 4 * ENTRIES * 512);
        let content = Content::of_layer(open(layer)).unwrap();
        let (sink, folder) = (Counted::default(), std::env::temp_dir());
        let (done, canceled) = (AtomicU64::new(0), AtomicBool::new(false));
        let watch = Watch { done: &done, canceled: &canceled };
        let made = write_layer_to(&content, content.identity(), &options, &sink, &folder, &watch);
        match made {
            Ok(made) => assert_eq!((made.entries, made.relaxed, fits), (ENTRIES, true, true)),
            Err(error) => {
                assert!(!fits && error.kind() == ErrorKind::Unsupported, "{error}");
                assert!(error.to_string().contains("choose blocks of 32 KiB or less"), "{error}");
                assert_eq!(sink.0.into_inner(), 0, "nothing was written");
            }
        }
    }
}

/// A sink that counts what was written since it was emptied.
#[derive(Default)]
struct Counted(AtomicU64);

impl Sink for Counted {
    fn write_at(&self, _: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.fetch_add(u64::try_from(bytes.len()).unwrap(), Ordering::Relaxed);
        Ok(())
    }

    fn clear(&self) -> io::Result<()> {
        self.0.store(0, Ordering::Relaxed);
        Ok(())
    }
}

/// Whatever a damaged layer says, it is refused or makes a layer that obeys the rules.
#[test]
fn layers_with_flipped_bits_are_refused_or_obeyed() {
    let mut refused = 0;
    for seed in 0..300 {
        let mut random = Random(seed);
        let disk = random_disk(400, &mut random);
        let mut layer = layer_of(&disk, random.one_in(2));
        let structure = 390 + 4096 + 16 * 256;
        for _ in 0..=random.below(3) {
            // In the header, the index or the trailer, where every bit means something.
            let at = random.index(structure);
            let at = if at < 390 { at } else { layer.len() - (structure - at) };
            layer[at] ^= 1 << random.below(8);
        }
        let source = obd_ublk::source::Source::Memory(layer.into());
        let opened = obd_ublk::image::Layer::open_sealed("memory".to_owned(), source);
        let Ok(content) = opened.and_then(Content::of_layer) else {
            refused += 1;
            continue;
        };
        let sink = Memory::default();
        let (done, canceled) = (AtomicU64::new(0), AtomicBool::new(false));
        let watch = Watch { done: &done, canceled: &canceled };
        let options = MakeOptions { threads: 2, ..MakeOptions::default() };
        let folder = std::env::temp_dir();
        let made = write_layer_to(&content, content.identity(), &options, &sink, &folder, &watch);
        if made.is_ok() {
            let file = sink.bytes.into_inner().unwrap();
            assert!(file.starts_with(b"ZFile"));
            obd_ublk::image::Layer::open_sealed(
                "made".to_owned(),
                obd_ublk::source::Source::Memory(file.into()),
            )
            .unwrap();
        }
    }
    assert!(refused > 50, "{refused}");
}

#[test]
fn memory_is_a_function_of_the_options() {
    let of = |threads, block_bytes| {
        let zfile = WriteOptions { block_bytes, ..WriteOptions::default() };
        MakeOptions { threads, zfile: Some(zfile), ..Default::default() }.memory_bytes()
    };
    assert!(of(1, 4096) < 5 << 20, "{}", of(1, 4096));
    assert!(of(2, 65536) < 10 << 20, "{}", of(2, 65536));
    assert_eq!(of(1000, 4096), of(64, 4096));
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    common::golden::hex(&Sha256::digest(bytes))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
