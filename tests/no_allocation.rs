//! A read that hits takes no memory and gives none back: not ours, and not the codecs'. Nor does a
//! write over what is there already, but for nodes of the trees of free extents.
//!
//! This program has its own `malloc` and `free`, which count and pass on to the C library's. Rust's
//! allocator ends in them and so do lz4 and zstd, which a Rust allocator that counts would not see.
//! Every thread has its own counters, so that the test runner's threads do not matter.

// The one test with `unsafe`: nothing safe can stand where C looks for `malloc`.
#![allow(unsafe_code)]
// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::golden::{Golden, Materialised};
use obd_ublk::cache::{BlobDigest, Cache, Settings};
use obd_ublk::disk::{Disk, Geometry, Worker};
use obd_ublk::format::zfile::Algorithm;
use obd_ublk::image::{Image, Layer, Stack, load_image_config, load_service_config};
use obd_ublk::source::{Fetch, Source};
use obd_ublk::upper::{Form, Pair, PairOptions, PairPaths, SparseUpper, create_fresh};
use std::collections::BTreeSet;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// The C library's heap with counters.
mod heap {
    use std::cell::Cell;
    use std::ffi::{c_int, c_void};

    // Constant and without a destructor: using them allocates nothing.
    thread_local! {
        static TAKEN: Cell<u64> = const { Cell::new(0) };
        static GIVEN_BACK: Cell<u64> = const { Cell::new(0) };
    }

    fn count(counter: &'static std::thread::LocalKey<Cell<u64>>) {
        counter.set(counter.get() + 1);
    }

    /// How often `work` took memory on this thread, and how often it gave some back.
    pub(crate) fn used_by(work: impl FnOnce()) -> (u64, u64) {
        let before = (TAKEN.get(), GIVEN_BACK.get());
        work();
        (TAKEN.get() - before.0, GIVEN_BACK.get() - before.1)
    }

    // The names under which glibc keeps its own functions when a program has others.
    unsafe extern "C" {
        fn __libc_malloc(bytes: usize) -> *mut c_void;
        fn __libc_calloc(count: usize, bytes: usize) -> *mut c_void;
        fn __libc_realloc(old: *mut c_void, bytes: usize) -> *mut c_void;
        fn __libc_memalign(alignment: usize, bytes: usize) -> *mut c_void;
        fn __libc_free(old: *mut c_void);
    }

    #[unsafe(no_mangle)]
    extern "C" fn malloc(bytes: usize) -> *mut c_void {
        count(&TAKEN);
        // SAFETY: the same contract, passed on.
        unsafe { __libc_malloc(bytes) }
    }

    #[unsafe(no_mangle)]
    extern "C" fn calloc(count_of: usize, bytes: usize) -> *mut c_void {
        count(&TAKEN);
        // SAFETY: the same contract, passed on.
        unsafe { __libc_calloc(count_of, bytes) }
    }

    /// Counts as both: it takes memory, and gives back what it had.
    #[unsafe(no_mangle)]
    extern "C" fn realloc(old: *mut c_void, bytes: usize) -> *mut c_void {
        count(&TAKEN);
        count(&GIVEN_BACK);
        // SAFETY: the same contract, passed on; the caller had `old` from one of these functions,
        // and they all have it from the library's heap.
        unsafe { __libc_realloc(old, bytes) }
    }

    #[unsafe(no_mangle)]
    extern "C" fn posix_memalign(to: *mut *mut c_void, alignment: usize, bytes: usize) -> c_int {
        count(&TAKEN);
        // SAFETY: any numbers may be asked for; it answers with null to what it cannot give.
        let found = unsafe { __libc_memalign(alignment, bytes) };
        if found.is_null() {
            return libc::ENOMEM;
        }
        // SAFETY: the caller's contract is that `to` can be written.
        unsafe { to.write(found) };
        0
    }

    #[unsafe(no_mangle)]
    extern "C" fn aligned_alloc(alignment: usize, bytes: usize) -> *mut c_void {
        count(&TAKEN);
        // SAFETY: any numbers may be asked for.
        unsafe { __libc_memalign(alignment, bytes) }
    }

    #[unsafe(no_mangle)]
    extern "C" fn free(old: *mut c_void) {
        if !old.is_null() {
            count(&GIVEN_BACK);
        }
        // SAFETY: as in `realloc`.
        unsafe { __libc_free(old) };
    }
}

/// The longest read of the test: the largest request that a device takes.
const READ_SECTORS_MAX: u64 = 1024;

/// Reads per image.
const READS: u64 = 4000;

/// A fixed linear congruential sequence: the same reads every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(0x9e37_79b9_7f4a_7c15);
        (self.0 >> 33) % limit
    }

    /// A range on the disk. Lengths of every magnitude are equally likely: one sector, a page, a
    /// block, many blocks.
    fn range(&mut self, disk_sectors: u64) -> (u64, u64) {
        let longest = (1 << self.below(11)).min(READ_SECTORS_MAX);
        let sectors = (1 + self.below(longest)).min(disk_sectors);
        (self.below(disk_sectors - sectors + 1), sectors)
    }
}

fn bytes_of(sectors: u64) -> usize {
    usize::try_from(sectors * 512).unwrap()
}

/// How a layer is stored, in words.
fn kind_of(layer: &Layer) -> String {
    let tar = if layer.payload.wrapping().tar { " in tar" } else { "" };
    let Some(zfile) = layer.payload.zfile() else { return format!("{:?}{tar}", layer.kind) };
    let algorithm = match zfile.header.algorithm {
        Algorithm::Lz4 => "lz4",
        Algorithm::Zstd => "zstd",
    };
    let crc = if zfile.header.has_block_crc { "crc" } else { "no crc" };
    format!("{algorithm} {}K {crc}", zfile.header.block_bytes / 1024)
}

/// Random reads of a warm image: what they cost, after it was made sure that they are right.
fn cost_of_reads(name: &str, image: &Image) -> (u64, u64) {
    let Geometry { sectors, .. } = image.geometry();
    let mut worker = image.worker().unwrap();
    let mut whole = vec![0; bytes_of(sectors)];
    worker.read(0, &mut whole).unwrap();
    let mut buffer = vec![0xa5; bytes_of(READ_SECTORS_MAX)];
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    heap::used_by(|| {
        for _ in 0..READS {
            let (start, len) = random.range(sectors);
            let dst = &mut buffer[..bytes_of(len)];
            worker.read(start, dst).unwrap();
            let expected = &whole[bytes_of(start)..bytes_of(start + len)];
            assert!(dst == expected, "{name}: {len} sectors at {start}");
        }
    })
}

fn open(golden: &Golden, name: &str) -> (Materialised, Stack) {
    let case = golden.case(name);
    let files = golden.materialise(case);
    let config = load_image_config(&files.config(case), None).unwrap();
    let stack = Stack::open(&config, &load_service_config(None).unwrap()).unwrap();
    (files, stack)
}

#[test]
fn the_counters_see_rust_and_c_alike() {
    assert_eq!(heap::used_by(|| ()), (0, 0));
    assert_eq!(heap::used_by(|| drop(black_box(Box::new(1)))), (1, 1));
    let grown = heap::used_by(|| {
        let mut bytes = black_box(Vec::with_capacity(1));
        bytes.extend_from_slice(&[0_u8; 4096]);
    });
    assert_eq!(grown, (2, 2), "one realloc takes and gives back");
    #[derive(Clone)]
    #[repr(align(4096))]
    struct Page(#[allow(dead_code)] u8);
    let page = heap::used_by(|| drop(black_box(vec![Page(7); 2])));
    assert_eq!(page, (1, 1), "memory of a coarser alignment");
    // The context is C's: Rust only holds a pointer to it.
    let context = heap::used_by(|| drop(black_box(zstd::bulk::Decompressor::new().unwrap())));
    assert_eq!(context, (1, 1));
}

#[test]
fn a_read_that_hits_neither_takes_memory_nor_gives_any_back() {
    let golden = Golden::load();
    let mut kinds = BTreeSet::new();
    for name in [
        "lsmt-commit-random",
        "lsmt-seal-edges",
        "tar-raw",
        "rw-append",
        "rw-sparse",
        "zfile-lz4-4k-random",
        "zfile-lz4-8k-tar-text",
        "zfile-lz4-16k-random4k",
        "zfile-lz4-32k-tar-mt-adjacent",
        "zfile-lz4-64k-text",
        "zfile-zstd-4k-random",
        "zfile-zstd-16k-tar-edges",
        "zfile-zstd-32k-tar-text",
        "zfile-zstd-64k-mt-random4k",
        "zfilelib-lz4-4k-crc0-ow1",
        "zfilelib-lz4-64k-crc0-ow0",
        "zfilelib-zstd-16k-crc0-ow0-tar",
        "stack8",
        "stack32",
        "stack3-rw",
        "ext4-3layers-2",
    ] {
        let (_files, stack) = open(&golden, name);
        kinds.extend(stack.layers().iter().map(kind_of));
        let image = stack.into_image().unwrap();
        assert_eq!(cost_of_reads(name, &image), (0, 0), "{name}: taken and given back");
    }
    let expected = [
        "Sealed",
        "Sealed in tar",
        "WritableAppend",
        "WritableSparse",
        "lz4 16K crc",
        "lz4 32K crc",
        "lz4 4K crc",
        "lz4 4K no crc",
        "lz4 64K crc",
        "lz4 64K no crc",
        "lz4 8K crc",
        "zstd 16K crc",
        "zstd 16K no crc",
        "zstd 32K crc",
        "zstd 4K crc",
        "zstd 64K crc",
    ];
    assert_eq!(kinds.iter().map(String::as_str).collect::<Vec<_>>(), expected);
}

/// Blocks of 4 KiB of the disk that is written.
const BLOCKS: u64 = 512;

/// A folder with a pair in it, and how to open it.
fn new_pair(form: Form) -> (tempfile::TempDir, PairPaths, PairOptions) {
    let folder = tempfile::tempdir().unwrap();
    let paths = PairPaths { data: folder.path().join("data"), index: folder.path().join("index") };
    create_fresh(&paths, BLOCKS * 4096, form).unwrap();
    let options =
        PairOptions { journal_folder: folder.path().join("run"), ..PairOptions::default() };
    (folder, paths, options)
}

#[test]
fn a_write_over_what_is_there_takes_no_memory_of_its_own() {
    let (_folder, paths, options) = new_pair(Form::Append);
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    let mut random = Random(5);
    let block = [7; 4096];
    let mut seen = [0; 4096];
    let mut round = |writes: u64| {
        let (mut used, mut reads) = ((0, 0), (0, 0));
        for _ in 0..writes {
            let sector = random.below(BLOCKS) * 8;
            let by_write = heap::used_by(|| worker.write(sector, &block).unwrap());
            let by_read = heap::used_by(|| {
                worker.read(sector, &mut seen, |_, _| panic!("below the pair")).unwrap();
            });
            reads = (reads.0 + by_read.0, reads.1 + by_read.1);
            used = (used.0 + by_write.0, used.1 + by_write.1);
        }
        pair.flush().unwrap();
        (used, reads)
    };
    for block_number in 0..BLOCKS {
        pair.worker().write(block_number * 8, &block).unwrap();
    }
    for _ in 0..20 {
        round(256);
    }
    let mut used = (0, 0);
    for _ in 0..20 {
        let (more, reads) = round(256);
        assert_eq!(reads, (0, 0));
        used = (used.0 + more.0, used.1 + more.1);
    }
    // Nodes of the trees of free extents, now and then; nothing for each write.
    assert!(used.0 * 10 < 5120 && used.1 * 3 < 5120, "{used:?} of 5120 writes");
}

#[test]
fn a_write_to_a_sparse_upper_in_place_takes_no_memory() {
    let (_folder, paths, options) = new_pair(Form::Sparse { over_lowers: true });
    let options = PairOptions { lower_bytes: BLOCKS * 4096, ..options };
    let upper = SparseUpper::open(&paths, &options).unwrap();
    let mut worker = upper.worker();
    let below = |_, gap: &mut [u8]| {
        gap.fill(1);
        Ok(())
    };
    worker.write(0, &vec![7; bytes_of(BLOCKS * 8)], below).unwrap();
    let mut random = Random(5);
    let mut seen = [0; 4096];
    let mut round = || {
        for _ in 0..1000 {
            let sector = random.below(BLOCKS * 8 - 8);
            worker.write(sector, &[8; 4096], below).unwrap();
            worker.read(sector, &mut seen, below).unwrap();
        }
    };
    round();
    assert_eq!(heap::used_by(round), (0, 0));
}

/// A blob that lies elsewhere: byte n is the low byte of n / 7.
#[derive(Debug)]
struct Elsewhere;

impl Elsewhere {
    fn fill(at: u64, dst: &mut [u8]) {
        for (n, byte) in (at..).zip(dst) {
            *byte = (n / 7).to_le_bytes()[0];
        }
    }
}

impl Fetch for Elsewhere {
    fn name(&self) -> &str {
        "elsewhere"
    }

    fn bytes(&self) -> u64 {
        3_000_000
    }

    fn fetch(&self, at: u64, dst: &mut [u8], _: Instant) -> obd_ublk::error::Result<()> {
        Self::fill(at, dst);
        Ok(())
    }

    fn cancel(&self) {}
}

#[test]
fn a_hit_in_the_cache_takes_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { folder: folder.path().into(), threads: 0, ..Settings::default() };
    let cache = Cache::open(settings).unwrap();
    let blob = cache.blob(&BlobDigest::new([7; 32]), Arc::new(Elsewhere)).unwrap();
    let source = Source::Remote(Arc::new(blob));
    let mut whole = vec![0; 3_000_000];
    source.read(0, &mut whole).unwrap();
    let mut expected = vec![0; 3_000_000];
    Elsewhere::fill(0, &mut expected);
    assert!(whole == expected);
    let mut buffer = vec![0xa5; 300_000];
    let mut random = Random(7);
    // The first look of a thread at what is exchanged under it takes memory, once.
    source.read(5, &mut buffer[..1]).unwrap();
    let used = heap::used_by(|| {
        for _ in 0..READS {
            let at = random.below(2_700_000);
            let len = usize::try_from(1 + random.below(300_000)).unwrap();
            source.read(at, &mut buffer[..len]).unwrap();
            let start = usize::try_from(at).unwrap();
            assert!(buffer[..len] == whole[start..start + len], "{len} bytes at {at}");
        }
    });
    assert_eq!(used, (0, 0));
}
