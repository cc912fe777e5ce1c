//! Which sectors of the data file may be written: what is free, and what will be.
//!
//! ```text
//!   covered by a newer write --> pending (until that is durable) --> resting (until no read that
//!   began before can look at it) --> free --> written again
//! ```
//!
//! What is young rests at once: it was handed out since the entries of the last flush were taken,
//! so no durable entry, and none that is about to be, points at it. A disk that is written over
//! and over without a flush so takes the space of what it holds, and not of what was written.
//!
//! Numbers in, ranges out, no I/O. Allocation takes the smallest free extent that fits, else the
//! end of the file, and pieces only where the file may not grow. Free neighbours are joined.

use crate::limits::UPPER_FREE_EXTENTS_MAX;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

/// The sectors of one data file.
#[derive(Debug, Default)]
pub(super) struct Space {
    end_sector: u64,
    limit_sector: u64,
    /// What is handed out from here on is young. Free space in front of it is not, though it may
    /// be handed out later: one number for each flush costs a write nothing.
    young_sector: u64,
    free: Free,
    /// With the number of the journal entry that must be durable.
    pending: VecDeque<(u64, Range<u64>)>,
    /// With the epoch in which a read may still see them.
    resting: VecDeque<(u64, Range<u64>)>,
    reuse: bool,
}

/// Free extents, by place and by length.
#[derive(Debug, Default)]
struct Free {
    by_start: BTreeMap<u64, u64>,
    by_length: BTreeSet<(u64, u64)>,
    sectors: u64,
}

impl Free {
    fn remove(&mut self, start: u64, end: u64) {
        self.by_start.remove(&start);
        self.by_length.remove(&(end - start, start));
        self.sectors -= end - start;
    }

    fn insert(&mut self, start: u64, end: u64) {
        self.by_start.insert(start, end);
        self.by_length.insert((end - start, start));
        self.sectors += end - start;
    }

    /// Adds a range that has no free neighbours, if it is one.
    fn add_plain(&mut self, range: Range<u64>) {
        if range.start < range.end {
            self.insert(range.start, range.end);
        }
    }

    /// Adds a range, joined with its neighbours. Of too many, the shortest is forgotten.
    fn add(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        if let Some((&before, &before_end)) = self.by_start.range(..start).next_back()
            && before_end == start
        {
            self.remove(before, before_end);
            start = before;
        }
        if let Some(&after_end) = self.by_start.get(&end) {
            self.remove(end, after_end);
            end = after_end;
        }
        self.insert(start, end);
        if self.by_start.len() > UPPER_FREE_EXTENTS_MAX
            && let Some(&(length, first)) = self.by_length.first()
        {
            self.remove(first, first + length);
        }
    }

    /// `sectors` out of the smallest extent that has them.
    fn take(&mut self, sectors: u64) -> Option<Range<u64>> {
        let &(length, start) = self.by_length.range((sectors, 0)..).next()?;
        self.remove(start, start + length);
        if length > sectors {
            self.insert(start + sectors, start + length);
        }
        Some(start..start + sectors)
    }

    /// The longest extent.
    fn take_longest(&mut self) -> Option<Range<u64>> {
        let &(length, start) = self.by_length.last()?;
        self.remove(start, start + length);
        Some(start..start + length)
    }
}

impl Space {
    /// The space of a file that ends before `end_sector` and may grow to `limit_sector`. `used` are
    /// the ranges that something points at, in any order. Where two of them overlap nothing is ever
    /// reused: no writer we know makes such a pair, and what one name lets go another still needs.
    pub(super) fn new(used: &mut [Range<u64>], end_sector: u64, limit_sector: u64) -> Self {
        let first = crate::format::lsmt::DATA_START_SECTOR;
        let young_sector = end_sector;
        let mut this =
            Self { end_sector, limit_sector, young_sector, reuse: true, ..Self::default() };
        used.sort_unstable_by_key(|range| range.start);
        let mut here = first;
        for range in used {
            if range.start < here {
                this.reuse = false;
                this.free = Free::default();
                return this;
            }
            this.free.add(here..range.start);
            here = range.end;
        }
        this.free.add(here..end_sector);
        this
    }

    /// Up to `sectors` that may be written now; fewer where only shorter extents are left, none
    /// when the file is full.
    pub(super) fn allocate(&mut self, sectors: u64) -> Option<Range<u64>> {
        if let Some(found) = self.free.take(sectors) {
            return Some(found);
        }
        let end = self.end_sector.checked_add(sectors)?;
        if end <= self.limit_sector {
            let start = std::mem::replace(&mut self.end_sector, end);
            return Some(start..end);
        }
        self.free.take_longest()
    }

    /// `range` is in use after all: an entry of the journal points at it.
    pub(super) fn occupy(&mut self, range: Range<u64>) {
        let Range { start, end } = range;
        let before = self.free.by_start.range(..=start).next_back();
        let first = before.filter(|(_, before_end)| **before_end > start).map_or(start, |b| *b.0);
        let mut from = first;
        while let Some((&at, &at_end)) = self.free.by_start.range(from..end).next() {
            // What is put back in front of the range is not met again.
            from = start;
            self.free.remove(at, at_end);
            self.free.add_plain(at..at_end.min(start));
            self.free.add_plain(at.max(end)..at_end);
        }
    }

    /// Takes back what was allocated and came to nothing.
    pub(super) fn give_back(&mut self, range: Range<u64>) {
        self.free.add(range);
    }

    /// `range` is covered by the journal entry `number`; reads that began in `epoch` or before may
    /// still look at it. Whether some of it waits for those alone: then the next read must begin in
    /// another epoch.
    #[inline]
    pub(super) fn covered(&mut self, number: u64, range: Range<u64>, epoch: u64) -> bool {
        if !self.reuse {
            return false;
        }
        let young = range.start.max(self.young_sector)..range.end;
        let old = range.start..range.end.min(self.young_sector);
        if !old.is_empty() && self.pending.len() < UPPER_FREE_EXTENTS_MAX {
            self.pending.push_back((number, old));
        }
        if young.is_empty() || self.resting.len() >= UPPER_FREE_EXTENTS_MAX {
            return false;
        }
        self.resting.push_back((epoch, young));
        true
    }

    /// The entries of a flush are about to be taken, and until [`Space::flush_taken`] nothing is
    /// young.
    pub(super) fn flush_begins(&mut self) {
        self.young_sector = u64::MAX;
    }

    /// They were taken when `end_sector` was the end of what was handed out: what lies behind it
    /// is in none of them.
    pub(super) fn flush_taken(&mut self, end_sector: u64) {
        self.young_sector = end_sector;
    }

    /// What is in `before` and not in `live`, both in any order, is covered by the journal entries
    /// up to `number`.
    pub(super) fn covered_but(
        &mut self,
        number: u64,
        before: &mut [Range<u64>],
        live: &mut [Range<u64>],
    ) {
        before.sort_unstable_by_key(|range| range.start);
        live.sort_unstable_by_key(|range| range.start);
        if live.windows(2).any(|two| matches!(two, [one, next] if next.start < one.end)) {
            // As in `new`: what is shared is never reused.
            self.reuse = false;
            self.free = Free::default();
        }
        let mut done = 0;
        let mut next_live = 0;
        for range in before {
            let mut here = range.start.max(done);
            done = done.max(range.end);
            while here < range.end {
                while live.get(next_live).is_some_and(|live| live.end <= here) {
                    next_live += 1;
                }
                let kept = live.get(next_live).filter(|live| live.start < range.end);
                let gap_end = kept.map_or(range.end, |live| live.start.max(here));
                if here < gap_end {
                    // No read began yet, and nothing is young.
                    self.covered(number, here..gap_end, 0);
                }
                here = kept.map_or(range.end, |live| live.end);
            }
        }
    }

    /// Journal entries in front of `number` are durable; reads that began in `epoch` or before may
    /// still look at what they covered.
    pub(super) fn flushed(&mut self, number: u64, epoch: u64) {
        while let Some((_, range)) = pop_before(&mut self.pending, number) {
            if self.resting.len() < UPPER_FREE_EXTENTS_MAX {
                self.resting.push_back((epoch, range));
            }
        }
    }

    /// Whether something is covered by what is not durable yet.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether something waits for readers.
    pub(super) fn has_resting(&self) -> bool {
        !self.resting.is_empty()
    }

    /// No read is left that began before `oldest_epoch`.
    pub(super) fn settle(&mut self, oldest_epoch: u64) {
        while let Some((_, range)) = pop_before(&mut self.resting, oldest_epoch) {
            self.free.add(range);
        }
    }

    /// One past the last sector of the file that was handed out.
    pub(super) fn end_sector(&self) -> u64 {
        self.end_sector
    }

    /// Sectors that can be handed out without making the file longer.
    pub(super) fn free_sectors(&self) -> u64 {
        self.free.sectors
    }
}

/// The first of a queue whose number is below `number`.
fn pop_before(queue: &mut VecDeque<(u64, Range<u64>)>, number: u64) -> Option<(u64, Range<u64>)> {
    let (first, _) = queue.front()?;
    if *first < number { queue.pop_front() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(space: &mut Space, sectors: u64) -> Vec<Range<u64>> {
        std::iter::from_fn(|| space.allocate(sectors)).collect()
    }

    #[test]
    fn gaps_are_used_before_the_file_grows_and_pieces_when_it_may_not() {
        let mut space = Space::new(&mut [40..48, 16..24], 56, 64);
        assert_eq!(space.allocate(8), Some(8..16), "the smallest that fits");
        assert_eq!(space.allocate(20), Some(24..40), "the file is full: what there is");
        assert_eq!(whole(&mut space, 4), [48..52, 52..56, 56..60, 60..64]);
    }

    #[test]
    fn covered_space_is_free_when_durable_and_out_of_sight() {
        let mut space = Space::new(&mut [8..16, 16..24], 24, 24);
        space.covered(5, 8..16, 0);
        space.covered(6, 16..24, 0);
        space.settle(u64::MAX);
        assert_eq!(space.allocate(8), None, "not durable");
        space.flushed(6, 3);
        space.settle(3);
        assert_eq!(space.allocate(8), None, "a read of epoch 3 may look at it");
        space.settle(4);
        assert_eq!((space.allocate(8), space.allocate(8)), (Some(8..16), None));
        space.flushed(7, 4);
        space.settle(5);
        assert_eq!((space.allocate(8), space.allocate(8)), (Some(16..24), None));
    }

    #[test]
    fn what_a_journal_covers_is_what_it_left_of_both() {
        let mut space = Space::new(&mut [8..24, 32..40], 64, 64);
        for range in [40..48, 8..16, 48..50, 60..70] {
            space.occupy(range);
        }
        space.covered_but(3, &mut [32..40, 8..24, 40..48, 8..16], &mut [40..48, 10..12]);
        let pending: Vec<_> = space.pending.iter().map(|(_, range)| range.clone()).collect();
        assert_eq!(pending, [8..10, 12..24, 32..40]);
        assert_eq!(whole(&mut space, 8), [24..32, 50..58, 58..60], "the rest is too short");
    }

    #[test]
    fn space_that_two_segments_share_is_never_reused() {
        let mut space = Space::new(&mut [8..16, 12..20], 64, 64);
        space.covered(0, 8..16, 0);
        space.flushed(1, 0);
        space.settle(u64::MAX);
        assert_eq!(space.allocate(1), None);
    }

    #[test]
    fn free_neighbours_are_joined() {
        let mut space = Space::new(&mut [8..20, 20..32], 32, 32);
        for range in [8..16, 24..32, 16..24] {
            space.give_back(range);
        }
        assert_eq!(space.allocate(24), Some(8..32));
        assert_eq!(space.free_sectors(), 0);
    }
}
