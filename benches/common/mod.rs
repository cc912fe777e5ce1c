//! What the benchmarks share: data that compresses like an image, layers made of it, rounds that
//! alternate between us and the floor, and medians.

#![allow(dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use obd_ublk::format::lsmt::{self, SegmentMapping};
use std::time::{Duration, Instant};

/// A xorshift sequence: the same numbers every time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Bytes that compress about 2:1, like the binaries and scripts of an image: words of a skewed
/// dictionary, and every few hundred bytes a run of noise.
pub(crate) fn image_like(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let words: Vec<Vec<u8>> = (0..512)
        .map(|_| (0..4 + random.below(12)).map(|_| random.next().to_le_bytes()[3]).collect())
        .collect();
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        let skewed = random.below(8) * random.below(8) * random.below(9);
        bytes.extend_from_slice(&words[usize::try_from(skewed).unwrap()]);
        if random.below(40) == 0 {
            bytes.extend((0..48).map(|_| random.next().to_le_bytes()[5]));
        }
    }
    bytes.truncate(len);
    bytes
}

/// The LSMT file of one layer that holds `data` at sector 0 of a disk of the same size, cut into
/// entries of 8 MiB as the format demands.
pub(crate) fn layer_of(data: &[u8]) -> Vec<u8> {
    let sectors = u64::try_from(data.len()).unwrap() / 512;
    let mut segments = Vec::new();
    let mut start = 0;
    while start < sectors {
        let len = (sectors - start).min(16376);
        segments.push(SegmentMapping {
            start_sector: start,
            sectors: len,
            mapped_sector: 8 + start,
            zeroed: false,
            tag: 0,
        });
        start += len;
    }
    lsmt::write_sealed(&segments, data, sectors * 512)
}

/// Runs `a` and `b` in turn and returns the medians of their times.
pub(crate) fn alternate(rounds: usize, mut a: impl FnMut(), mut b: impl FnMut()) -> Outcome {
    alternate_timed(rounds, || timed(&mut a), || timed(&mut b))
}

/// How long `work` takes.
pub(crate) fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// As [`alternate`] for work that says itself how long the part took that counts.
pub(crate) fn alternate_timed(
    rounds: usize,
    mut a: impl FnMut() -> Duration,
    mut b: impl FnMut() -> Duration,
) -> Outcome {
    // Once for the caches.
    let _ = (a(), b());
    let pairs: Vec<_> = (0..rounds).map(|_| (a(), b())).collect();
    let mut ratios: Vec<f64> =
        pairs.iter().map(|(a, b)| a.as_secs_f64() / b.as_secs_f64()).collect();
    ratios.sort_by(f64::total_cmp);
    Outcome {
        ours: median(pairs.iter().map(|pair| pair.0).collect()),
        floor: median(pairs.iter().map(|pair| pair.1).collect()),
        ratio: ratios[ratios.len() / 2],
        lowest: ratios[0],
        highest: ratios[ratios.len() - 1],
    }
}

pub(crate) struct Outcome {
    pub(crate) ours: Duration,
    pub(crate) floor: Duration,
    pub(crate) ratio: f64,
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
}

impl Outcome {
    /// One line: nanoseconds per operation of both, the median of the paired ratios, its range.
    pub(crate) fn print(&self, name: &str, operations: u64, goal: &str) {
        let per = |time: Duration| time.as_secs_f64() * 1e9 / operations as f64;
        println!(
            "{name:<28} ours {:>8.0} ns  floor {:>8.0} ns  ratio {:.3} ({:.3}..{:.3})  goal {goal}",
            per(self.ours),
            per(self.floor),
            self.ratio,
            self.lowest,
            self.highest
        );
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
