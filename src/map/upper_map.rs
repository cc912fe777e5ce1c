//! The live map of a writable upper: which sectors it holds, and where in its data file.
//!
//! `upper` inserts one range for each write and looks up one range for each read, both under its
//! lock. What an insertion covers up is handed out, since that space of the data file is free as
//! soon as it is safe. Pieces are disjoint and joined where they continue each other, so a disk
//! that is written in order stays small. Pure; a lookup fills memory that the caller keeps.

use std::collections::BTreeMap;
use std::ops::Range;

/// What a sector of the upper holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros, which hide what lies below.
    Zero,
    /// Data.
    Data {
        /// First sector, counted from the start of the data file.
        sector: u64,
    },
}

impl Content {
    /// The content `sectors` further on.
    #[must_use]
    pub fn advanced(self, sectors: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Data { sector } => Self::Data { sector: sector + sectors },
        }
    }
}

/// A stretch of the disk; without content it is not the upper's, and what lies below is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// First sector of the virtual disk.
    pub start_sector: u64,
    /// One past the last sector.
    pub end_sector: u64,
    /// Content of the first sector; the following sectors follow.
    pub content: Option<Content>,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    end_sector: u64,
    content: Content,
}

/// The pieces of an upper, by their first sector.
#[derive(Clone, Debug, Default)]
pub struct UpperMap {
    pieces: BTreeMap<u64, Piece>,
    data_sectors: u64,
}

impl UpperMap {
    /// A map of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Pieces in the map.
    #[must_use]
    pub fn piece_count(&self) -> usize {
        self.pieces.len()
    }

    /// Sectors of the data file that the map points at.
    #[must_use]
    pub fn data_sectors(&self) -> u64 {
        self.data_sectors
    }

    /// All pieces, in order.
    pub fn pieces(&self) -> impl Iterator<Item = (Range<u64>, Content)> + '_ {
        self.pieces.iter().map(|(&start, piece)| (start..piece.end_sector, piece.content))
    }

    /// Puts `content` at `sectors`, which are not none, over whatever was there. The sectors of the
    /// data file that nothing points at any more are appended to `freed`.
    pub fn insert(&mut self, sectors: Range<u64>, content: Content, freed: &mut Vec<Range<u64>>) {
        debug_assert!(sectors.start < sectors.end, "a range of something");
        let Range { start, end } = sectors;
        if let Content::Data { .. } = content {
            self.data_sectors += end - start;
        }
        // One look at the tree tells of both neighbours, which decides nearly all writes.
        let mut back = self.pieces.range_mut(..=end).rev();
        let mut before = back.next();
        let mut next = None;
        if before.as_ref().is_some_and(|(first, _)| **first == end) {
            next = before.map(|(_, piece)| *piece);
            before = back.next();
        }
        if let Some((first, piece)) = &mut before
            && piece.end_sector > start
        {
            if **first == start && piece.end_sector == end {
                let old = std::mem::replace(&mut piece.content, content);
                self.data_sectors -= free(old, end - start, freed);
                return;
            }
            return self.put_over(start..end, content, freed);
        }
        let next = next.filter(|next| content.advanced(end - start) == next.content);
        let end_sector = next.map_or(end, |next| next.end_sector);
        let is_joined = if let Some((&first, before)) = before
            && before.end_sector == start
            && before.content.advanced(start - first) == content
        {
            before.end_sector = end_sector;
            true
        } else {
            false
        };
        if next.is_some() {
            self.pieces.remove(&end);
        }
        if !is_joined {
            self.pieces.insert(start, Piece { end_sector, content });
        }
    }

    /// Puts `content` at `sectors` where something is.
    fn put_over(&mut self, sectors: Range<u64>, content: Content, freed: &mut Vec<Range<u64>>) {
        let Range { start, end } = sectors;
        let before = self.pieces.range_mut(..start).next_back();
        if let Some((&first, piece)) = before
            && piece.end_sector > start
        {
            let old = *piece;
            piece.end_sector = start;
            self.cover(start, &(start..end), old.content.advanced(start - first), old, freed);
        }
        while let Some((&first, _)) = self.pieces.range(start..end).next() {
            let Some(old) = self.pieces.remove(&first) else { break };
            self.cover(first, &(start..end), old.content, old, freed);
        }
        self.put_joined(start, end, content);
    }

    /// Frees what `sectors` cover of `old` from `here` on, where it holds `content`, and keeps what
    /// lies behind.
    fn cover(
        &mut self,
        here: u64,
        sectors: &Range<u64>,
        content: Content,
        old: Piece,
        freed: &mut Vec<Range<u64>>,
    ) {
        let covered_end = old.end_sector.min(sectors.end);
        self.data_sectors -= free(content, covered_end - here, freed);
        if old.end_sector > sectors.end {
            let rest =
                Piece { end_sector: old.end_sector, content: content.advanced(sectors.end - here) };
            self.pieces.insert(sectors.end, rest);
        }
    }

    /// Puts a piece where nothing is, joined with the neighbours that it continues.
    fn put_joined(&mut self, start: u64, end: u64, content: Content) {
        let mut end_sector = end;
        if let Some(next) = self.pieces.get(&end).copied()
            && content.advanced(end - start) == next.content
        {
            self.pieces.remove(&end);
            end_sector = next.end_sector;
        }
        if let Some((&first, before)) = self.pieces.range_mut(..start).next_back()
            && before.end_sector == start
            && before.content.advanced(start - first) == content
        {
            before.end_sector = end_sector;
            return;
        }
        self.pieces.insert(start, Piece { end_sector, content });
    }

    /// Appends to `found` what lies at `sectors`, in order and without gaps.
    pub fn look_up(&self, sectors: Range<u64>, found: &mut Vec<Stretch>) {
        let Range { start, end } = sectors;
        let mut here = start;
        let before = self.pieces.range(..=start).next_back();
        let first = before.filter(|(_, piece)| piece.end_sector > start).map_or(start, |p| *p.0);
        for (&at, piece) in self.pieces.range(first..end) {
            if at > here {
                found.push(Stretch { start_sector: here, end_sector: at, content: None });
            }
            let from = at.max(here);
            here = piece.end_sector.min(end);
            let content = Some(piece.content.advanced(from - at));
            found.push(Stretch { start_sector: from, end_sector: here, content });
        }
        if here < end {
            found.push(Stretch { start_sector: here, end_sector: end, content: None });
        }
    }
}

/// Hands out the space of `sectors` of `content`; how many sectors that is.
fn free(content: Content, sectors: u64, freed: &mut Vec<Range<u64>>) -> u64 {
    let Content::Data { sector } = content else { return 0 };
    freed.push(sector..sector + sectors);
    sectors
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK_SECTORS: u64 = 64;

    fn sector_of(map: &UpperMap, sector: u64) -> Option<Content> {
        let mut found = Vec::new();
        map.look_up(sector..sector + 1, &mut found);
        assert_eq!(found.len(), 1);
        found[0].content
    }

    #[test]
    fn what_is_written_in_order_is_one_piece_and_an_overwrite_splits_it() {
        let mut map = UpperMap::new();
        let mut freed = Vec::new();
        for i in 0..4 {
            map.insert(i * 8..i * 8 + 8, Content::Data { sector: 8 + i * 8 }, &mut freed);
        }
        assert_eq!((map.piece_count(), map.data_sectors()), (1, 32));
        map.insert(10..12, Content::Zero, &mut freed);
        assert!(matches!(freed.as_slice(), [Range { start: 18, end: 20 }]), "{freed:?}");
        assert_eq!((map.piece_count(), map.data_sectors()), (3, 30));
    }

    proptest! {
        #[test]
        fn the_map_is_a_flat_array_and_freed_space_is_what_nobody_points_at(
            steps in prop::collection::vec((0..DISK_SECTORS, 1_u64..20, any::<bool>()), 1..80),
        ) {
            let mut map = UpperMap::new();
            let mut flat = vec![None; usize::try_from(DISK_SECTORS).unwrap()];
            let mut next = 8;
            for (start, sectors, zero) in steps {
                let end = (start + sectors).min(DISK_SECTORS);
                let content = if zero { Content::Zero } else { Content::Data { sector: next } };
                next += end - start;
                let mut freed = Vec::new();
                map.insert(start..end, content, &mut freed);
                let mut lost: Vec<u64> = Vec::new();
                for sector in start..end {
                    let slot = &mut flat[usize::try_from(sector).unwrap()];
                    if let Some(Content::Data { sector }) = *slot {
                        lost.push(sector);
                    }
                    *slot = Some(content.advanced(sector - start));
                }
                let mut freed: Vec<u64> = freed.into_iter().flatten().collect();
                freed.sort_unstable();
                lost.sort_unstable();
                prop_assert_eq!(freed, lost);
                for sector in 0..DISK_SECTORS {
                    let want = flat[usize::try_from(sector).unwrap()];
                    prop_assert_eq!(sector_of(&map, sector), want);
                }
                let mut all = Vec::new();
                map.look_up(0..DISK_SECTORS, &mut all);
                prop_assert!(all.windows(2).all(|two| two[0].end_sector == two[1].start_sector));
                let data = flat.iter().flatten().filter(|c| **c != Content::Zero).count();
                prop_assert_eq!(map.data_sectors(), u64::try_from(data).unwrap());
            }
        }
    }
}
