//! What a week of overwriting costs in space, in miniature: a full disk of 64 MiB that is written a
//! hundred times over, with a flush every so many writes. Counts, not times: they are the same on
//! every machine, in every build.
//!
//! `cargo bench --bench upper_space --profile dev`

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::Random;
use obd_ublk::upper::{Form, Pair, PairOptions, PairPaths, PairWorker, Usage, create_fresh};
use std::path::Path;

const BLOCK_BYTES: usize = 4096;
const BLOCKS: u64 = 16_384;
const TIMES_OVER: u64 = 100;

/// Where writes go.
#[derive(Clone, Copy)]
enum Pattern {
    /// One block, all alike.
    Uniform,
    /// One block, the k-th by 1 / k: some blocks all the time, most hardly ever.
    Zipf,
    /// 1 to 16 blocks, all alike: extents of many lengths.
    Mixed,
}

/// The first of so many blocks to write.
struct Source {
    pattern: Pattern,
    random: Random,
    /// Sums of 1 / k, scaled.
    weights: Vec<u64>,
}

impl Source {
    fn new(pattern: Pattern) -> Self {
        let mut sum = 0;
        let weights = (1..=BLOCKS).map(|rank| {
            sum += (1 << 32) / rank;
            sum
        });
        Self { pattern, random: Random(11), weights: weights.collect() }
    }

    fn next(&mut self) -> (u64, u64) {
        match self.pattern {
            Pattern::Uniform => (self.random.below(BLOCKS), 1),
            Pattern::Zipf => {
                let at = self.random.below(*self.weights.last().unwrap());
                let rank = self.weights.partition_point(|sum| *sum <= at);
                // Neighbours in rank are none on the disk.
                (u64::try_from(rank).unwrap() * 7919 % BLOCKS, 1)
            }
            Pattern::Mixed => {
                let blocks = 1 + self.random.below(16);
                (self.random.below(BLOCKS - blocks + 1), blocks)
            }
        }
    }
}

#[derive(Default)]
struct Counts {
    writes: u64,
    flushes: u64,
    rewrites: u64,
    index_written: u64,
    peak_bytes: u64,
}

fn fill(folder: &Path, journals: &Path) -> PairWorker {
    let paths = PairPaths { data: folder.join("data"), index: folder.join("index") };
    create_fresh(&paths, BLOCKS * 4096, Form::Append).unwrap();
    let options = PairOptions { journal_folder: journals.to_owned(), ..PairOptions::default() };
    let mut worker = Pair::open(&paths, &options).unwrap().worker();
    for block in 0..BLOCKS {
        worker.write(block * 8, &[1; BLOCK_BYTES]).unwrap();
    }
    worker.flush().unwrap();
    worker
}

fn run(worker: &mut PairWorker, pattern: Pattern, flush_every: u64) -> Counts {
    let mut source = Source::new(pattern);
    let bytes = vec![7; BLOCK_BYTES * 16];
    let mut counts = Counts::default();
    let mut written = 0;
    let mut before = worker.pair().usage();
    while written < BLOCKS * TIMES_OVER {
        let (block, blocks) = source.next();
        let len = usize::try_from(blocks).unwrap() * BLOCK_BYTES;
        worker.write(block * 8, &bytes[..len]).unwrap();
        written += blocks;
        counts.writes += 1;
        if counts.writes.is_multiple_of(flush_every) {
            worker.flush().unwrap();
            let after = worker.pair().usage();
            count(&mut counts, &before, &after);
            before = after;
        }
    }
    counts
}

fn count(counts: &mut Counts, before: &Usage, after: &Usage) {
    counts.flushes += 1;
    counts.peak_bytes = counts.peak_bytes.max(after.file_bytes);
    if after.index_bytes < before.index_bytes {
        counts.rewrites += 1;
        counts.index_written += after.index_bytes;
    } else {
        counts.index_written += after.index_bytes - before.index_bytes;
    }
}

fn main() {
    println!(
        "pattern  flush  writes   flushes  data/live  peak/live  free   rewrites  index KiB  \
         index/data written"
    );
    for (name, pattern) in
        [("uniform", Pattern::Uniform), ("zipf", Pattern::Zipf), ("mixed", Pattern::Mixed)]
    {
        for flush_every in [1, 16, 256, 4096] {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            let mut worker = fill(folder.path(), &folder.path().join("upper"));
            let counts = run(&mut worker, pattern, flush_every);
            let usage = worker.pair().usage();
            let live = usage.live_bytes;
            let hundredths = |bytes: u64| {
                let ratio = bytes * 100 / live;
                format!("{}.{:02}", ratio / 100, ratio % 100)
            };
            let data_written = BLOCKS * TIMES_OVER * 4096;
            println!(
                "{name:<8} {flush_every:<6} {:<8} {:<8} {:<10} {:<10} {:<6} {:<9} {:<10} {} ppm",
                counts.writes,
                counts.flushes,
                hundredths(usage.file_bytes),
                hundredths(counts.peak_bytes),
                hundredths(usage.free_bytes),
                counts.rewrites,
                usage.index_bytes / 1024,
                counts.index_written * 1_000_000 / data_written,
            );
        }
    }
}
