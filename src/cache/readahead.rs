//! How far to fetch ahead of a reader: numbers only.
//!
//! A few streams are followed at a time. A read that goes on where one stands widens its window:
//! to twice the read at first, then fourfold, up to [`CACHE_AHEAD_BYTES_MAX`]: each step waits for
//! a registry's first byte. A read that belongs to none halves all windows and begins a stream of
//! its own, which fetches nothing ahead before it was continued. So a sequential reader is soon
//! 8 MiB ahead, several beside each other are too, and random reads fetch what they need. Once half
//! of the blob is here, who goes on reading is likely to want the rest, and the window is as wide
//! as requests are left for ([`CACHE_AHEAD_REST_BYTES_MAX`]).
//!
//! A stream asks to be told when the reader comes to its mark, almost a window in front of the end
//! of what was asked for, so that hits between two marks cost nothing.

use crate::limits::{
    CACHE_AHEAD_BYTES_MAX, CACHE_AHEAD_BYTES_MIN, CACHE_AHEAD_REST_BYTES_MAX, CACHE_STREAMS_MAX,
};
use std::ops::Range;

/// What to fetch ahead, in extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// The extents to fetch: empty if only the mark moves, because the window shrank.
    pub extents: Range<u64>,
    /// The extent whose reading is to be told.
    pub mark: u64,
}

/// One reader that goes on and on.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The extent that it read last, plus one.
    next: u64,
    /// Where what was asked for ahead of it ends.
    asked_to: u64,
    /// In extents; 0 while it was not continued.
    window: u64,
    /// Grows with every observation; 0 for one that is free.
    used_at: u64,
}

/// The streams of one blob.
#[derive(Debug)]
pub struct Readahead {
    streams: [Stream; CACHE_STREAMS_MAX],
    now: u64,
    extent_count: u64,
    window_min: u64,
    window_max: u64,
    window_rest: u64,
}

impl Readahead {
    /// A planner for a blob of so many extents of so many bytes.
    #[must_use]
    pub fn new(extent_count: u64, extent_bytes: u64) -> Self {
        let extents = |bytes: u64| (bytes / extent_bytes.max(1)).max(1);
        Self {
            streams: [Stream::default(); CACHE_STREAMS_MAX],
            now: 0,
            extent_count,
            window_min: extents(CACHE_AHEAD_BYTES_MIN),
            window_max: extents(CACHE_AHEAD_BYTES_MAX),
            window_rest: extents(CACHE_AHEAD_REST_BYTES_MAX),
        }
    }

    /// A read that missed, or that came to a mark, touches `read`, and so many extents of the blob
    /// are here. What to fetch ahead of it now.
    pub fn observe(&mut self, read: &Range<u64>, here: u64) -> Option<Ahead> {
        if read.start >= read.end || read.end > self.extent_count {
            return None;
        }
        self.now += 1;
        let is_half_here = here >= self.extent_count.div_ceil(2);
        let max = if is_half_here { self.window_rest } else { self.window_max };
        let (now, min) = (self.now, self.window_min);
        let known = self.streams.iter_mut().find(|stream| stream.is_continued_by(read));
        let Some(stream) = known else {
            self.begin(read);
            return None;
        };
        stream.used_at = now;
        // A reader of small pieces comes to the same extent again: no progress, no growth.
        if read.end <= stream.next {
            return None;
        }
        stream.next = read.end;
        let step_max = self.window_max / 8;
        let due = stream.asked_to.saturating_sub(stream.reserve(step_max));
        if read.end < due {
            // A mark that was left by a wider window is used up; without another one the reader
            // would come to the end of what was asked for unnoticed.
            return Some(Ahead { extents: stream.asked_to..stream.asked_to, mark: due - 1 });
        }
        stream.window = stream.wider(read.end - read.start).clamp(min, max);
        let start = stream.asked_to.max(read.end);
        let end = read.end.saturating_add(stream.window).min(self.extent_count);
        if start >= end {
            return None;
        }
        stream.asked_to = end;
        let mark = end.saturating_sub(stream.reserve(step_max) + 1).clamp(read.end, end - 1);
        Some(Ahead { extents: start..end, mark })
    }

    /// A read that goes on with nothing known: all streams lose half, the oldest its place.
    fn begin(&mut self, read: &Range<u64>) {
        for stream in &mut self.streams {
            stream.window /= 2;
        }
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used_at) {
            *oldest = Stream { next: read.end, asked_to: read.end, window: 0, used_at: self.now };
        }
    }
}

impl Stream {
    /// How much there must be ahead: below it, more is asked for. What is missing of the window
    /// then is an eighth of it, `step_max` at most: one request where the window is wide, while
    /// the others are under way.
    fn reserve(&self, step_max: u64) -> u64 {
        self.window - (self.window / 8).min(step_max)
    }

    /// The window after one more read of `extents`, if there were no limit.
    fn wider(&self, extents: u64) -> u64 {
        if self.window == 0 { extents.saturating_mul(2) } else { self.window * 4 }
    }

    /// Whether `read` begins in the extent that was read last, or in front of the end of what was
    /// asked for: a reader with several requests in flight is not in order.
    fn is_continued_by(&self, read: &Range<u64>) -> bool {
        let last = self.next.saturating_sub(1);
        self.used_at > 0 && (last..=self.asked_to.max(self.next)).contains(&read.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXTENT: u64 = 128 << 10;

    /// Reads extents one by one and fetches what is planned: how far ahead it was at most, and all
    /// that was fetched ahead.
    fn read_all(planner: &mut Readahead, reads: impl IntoIterator<Item = u64>) -> (u64, u64) {
        let mut here = std::collections::BTreeSet::new();
        let mut marks = std::collections::BTreeSet::new();
        let (mut largest, mut ahead) = (0, 0);
        for extent in reads {
            let is_told = here.insert(extent) || marks.remove(&extent);
            let plan = is_told.then(|| planner.observe(&(extent..extent + 1), 0)).flatten();
            let Some(plan) = plan else { continue };
            largest = largest.max(plan.extents.end - extent - 1);
            ahead += plan.extents.clone().filter(|at| here.insert(*at)).count();
            marks.insert(plan.mark);
        }
        (largest, u64::try_from(ahead).unwrap())
    }

    #[test]
    fn a_sequential_reader_is_soon_8_mib_ahead_and_misses_only_at_the_start() {
        let mut planner = Readahead::new(1000, EXTENT);
        let mut plans = Vec::new();
        let mut here = 0;
        let mut misses = 0;
        let mut mark = None;
        for extent in 0..1000_u64 {
            if extent >= here {
                misses += 1;
                here = extent + 1;
            } else if mark != Some(extent) {
                continue;
            }
            if let Some(plan) = planner.observe(&(extent..extent + 1), 0) {
                assert_eq!(plan.extents.start, here, "nothing twice, nothing left out");
                here = plan.extents.end;
                mark = Some(plan.mark);
                plans.push(here - extent - 1);
            }
        }
        assert_eq!(misses, 2, "the first two");
        assert_eq!(plans[..4], [2, 8, 32, 64], "up to 8 MiB");
        assert_eq!(here, 1000);
    }

    #[test]
    fn who_goes_on_with_half_of_the_blob_here_is_12_mib_ahead() {
        let mut planner = Readahead::new(1000, EXTENT);
        let ahead = |planner: &mut Readahead, at: u64, here| {
            planner.observe(&(at..at + 1), here).map_or(0, |plan| plan.extents.end - at - 1)
        };
        let plans: Vec<_> = (0..5).map(|n| ahead(&mut planner, n * n * 4, 499)).collect();
        assert_eq!(plans, [0, 0, 0, 0, 0], "random");
        for at in 500..504 {
            ahead(&mut planner, at, 499);
        }
        assert_eq!(ahead(&mut planner, 530, 499), 64);
        assert_eq!(ahead(&mut planner, 570, 500), 96);
        assert_eq!(ahead(&mut planner, 950, 900), 0, "a stranger");
        assert_eq!(ahead(&mut planner, 951, 900), 2);
        assert_eq!(ahead(&mut planner, 953, 900), 8);
    }

    #[test]
    fn random_reads_fetch_nothing_ahead() {
        let mut planner = Readahead::new(100_000, EXTENT);
        let reads = (0..2000_u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 47);
        let reads = reads.map(|extent| extent % 100_000);
        let (_, ahead) = read_all(&mut planner, reads);
        assert!(ahead <= 20, "{ahead} extents for 2000 reads");
    }

    #[test]
    fn readers_beside_each_other_are_followed_each() {
        let mut planner = Readahead::new(10_000, EXTENT);
        let reads = (0..400_u64).flat_map(|n| [n, 3000 + n, 7000 + n]);
        let (largest, ahead) = read_all(&mut planner, reads);
        assert_eq!(largest, 64);
        assert!(ahead >= 3 * 390, "{ahead}");
    }

    #[test]
    fn a_window_shrinks_when_reads_become_random() {
        let mut planner = Readahead::new(100_000, EXTENT);
        assert_eq!(read_all(&mut planner, 0..500).0, 64);
        for n in 1..8_u64 {
            assert_eq!(planner.observe(&(n * 9999..n * 9999 + 1), 0), None);
        }
        let widest = planner.streams.iter().map(|stream| stream.window).max();
        assert_eq!(widest, Some(0), "seven strangers halve 64 to nothing");
    }

    #[test]
    fn a_reader_beside_strangers_goes_on_without_a_miss() {
        let mut planner = Readahead::new(10_000, EXTENT);
        let mut marks = std::collections::BTreeSet::new();
        let (mut here, mut misses) = (0, 0);
        for extent in 0..2000_u64 {
            // Each halves the window, so that the reader comes to marks of wider ones.
            if extent % 40 == 39 {
                let far = 3000 + extent * 3;
                assert_eq!(planner.observe(&(far..far + 1), 0), None);
            }
            if extent >= here {
                misses += 1;
                here = extent + 1;
            } else if !marks.remove(&extent) {
                continue;
            }
            if let Some(plan) = planner.observe(&(extent..extent + 1), 0) {
                assert_eq!(plan.extents.start, here, "nothing twice, nothing left out");
                here = plan.extents.end;
                marks.insert(plan.mark);
            }
        }
        assert_eq!(misses, 2, "the first two");
    }

    #[test]
    fn the_same_extent_read_again_is_no_progress() {
        let mut planner = Readahead::new(1000, EXTENT);
        assert_eq!(planner.observe(&(5..6), 0), None);
        for _ in 0..10 {
            assert_eq!(planner.observe(&(5..6), 0), None);
        }
        assert_eq!(planner.observe(&(6..7), 0), Some(Ahead { extents: 7..9, mark: 7 }));
    }

    proptest! {
        #[test]
        fn plans_stay_inside_the_blob_behind_the_read_and_within_the_window(
            count in 1_u64..300,
            here in 0_u64..300,
            reads in prop::collection::vec((0_u64..320, 1_u64..5), 1..80),
        ) {
            let mut planner = Readahead::new(count, EXTENT);
            for (start, len) in reads {
                let read = start..start + len;
                if let Some(plan) = planner.observe(&read, here) {
                    prop_assert!(read.end <= plan.extents.start);
                    prop_assert!(plan.extents.start <= plan.extents.end);
                    // Only the mark moves: then something was asked for ahead of the read.
                    prop_assert!(!plan.extents.is_empty() || read.end < plan.extents.start);
                    prop_assert!(plan.extents.end <= count);
                    let widest = if 2 * here >= count { 96 } else { 64 };
                    prop_assert!(plan.extents.end - read.end <= widest);
                    prop_assert!((read.end..plan.extents.end).contains(&plan.mark));
                }
            }
        }
    }
}
