//! Where everything lies in the layer, decided piece by piece in the order of the disk. Pure.
//!
//! ```text
//!   | header 8 sectors | data, packed in the order of the disk | index | trailer |
//!   relaxed: the last 8 sectors of each 128 of the data are blank, and nothing maps to them
//! ```
//!
//! The data is packed as the reference packs it, and so are the entries: cut into units of 64
//! sectors from the start of a run, joined again while they stay below the longest an entry can
//! be. Entries that zeros add are counted against what a layer may have: as room gets short only
//! longer zeros are left out, in the end none.
//!
//! Relaxed: the reference's reader takes no record above 64 KiB, but 64 KiB that do not compress
//! become one. With blank sectors in each block they stay below. One would do for lz4; zstd stores
//! a block as it is unless it saves more than a 64th, and with 8 of them what is aligned stays so.
//! The bytes of the disk are the same, and the blanks take a few bytes after compression. Each
//! block takes an entry, so that some 57 GiB of data is the most such a layer can hold.

use super::content::{Piece, UNIT_SECTORS};
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{DATA_START_SECTOR, SegmentMapping};
use crate::limits::SEALED_INDEX_ENTRIES_MAX;
use crate::map::Target;
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use std::ops::Range;

/// Sectors of a block of 64 KiB, and how many of them are data in a relaxed layer.
const BLOCK_SECTORS: u64 = 128;
const RELAXED_SECTORS: u64 = 120;
const BLANK_SECTORS: u64 = BLOCK_SECTORS - RELAXED_SECTORS;

/// Entries that a layer may have: with padding, the reference's limit.
const ENTRIES_MAX: u64 = SEALED_INDEX_ENTRIES_MAX - SEALED_INDEX_ENTRIES_MAX % 256;

const SECTOR: usize = 512;
const BLANK: [u8; 4096] = [0; 4096];
const _: () = assert!(to_u64(SECTOR) == SECTOR_SIZE);
const _: () = assert!(to_u64(BLANK.len()) == BLANK_SECTORS * SECTOR_SIZE);

/// The index of a layer as it grows, and where its data ends.
#[derive(Debug)]
pub(super) struct Layout {
    entries: Vec<SegmentMapping>,
    next_sector: u64,
    is_relaxed: bool,
    packed: Vec<u8>,
    pub(super) data_sectors: u64,
    pub(super) zeroed_sectors: u64,
}

impl Layout {
    /// A layer without anything, whose content needs at most so many entries.
    ///
    /// # Errors
    /// `Unsupported` for more than a layer may have.
    pub(super) fn new(entries_needed: u64) -> Result<Self> {
        if entries_needed > ENTRIES_MAX {
            return Err(too_many(entries_needed, false));
        }
        Ok(Self::empty(false))
    }

    /// A relaxed layer without anything. Whether its content fits is asked of
    /// [`RelaxedEntries::fit`] before.
    pub(super) fn relaxed() -> Self {
        Self::empty(true)
    }

    fn empty(is_relaxed: bool) -> Self {
        Self {
            entries: Vec::new(),
            next_sector: DATA_START_SECTOR,
            is_relaxed,
            packed: Vec::new(),
            data_sectors: 0,
            zeroed_sectors: 0,
        }
    }

    pub(super) fn is_relaxed(&self) -> bool {
        self.is_relaxed
    }

    /// The entries, once everything has its place.
    pub(super) fn entries(&self) -> &[SegmentMapping] {
        &self.entries
    }

    /// Blank bytes between the data and the index: the block that both share has no other.
    pub(super) fn blank_end_bytes(&self) -> usize {
        if self.is_relaxed { BLANK.len() } else { 0 }
    }

    /// Gives what is in `piece` its place, and leaves in it what is to be stored.
    ///
    /// # Errors
    /// `Unsupported` for more entries than a layer may have.
    pub(super) fn place(&mut self, piece: &mut Piece) -> Result<()> {
        let Piece { parts, stretches, data, .. } = piece;
        let (mut from, mut to) = (0, 0);
        let mut stretches = stretches.iter();
        self.packed.clear();
        for part in parts.iter() {
            if part.target == Target::Zero {
                self.add_zeroed(part.start_sector..part.start_sector + part.sectors)?;
                continue;
            }
            let (mut here, end) = (part.start_sector, part.start_sector + part.sectors);
            while here < end {
                let Some(stretch) = stretches.next() else {
                    return Err(Error::new(ErrorKind::OutOfRange, "a part without its data"));
                };
                let len = to_usize(stretch.sectors).unwrap_or(0) * SECTOR;
                let sectors = here..here + stretch.sectors;
                if stretch.is_zero && stretch.sectors >= self.zeros_min(piece.entries_left) {
                    self.add_zeroed(sectors)?;
                } else if self.is_relaxed {
                    let bytes = data.get(from..from + len).unwrap_or_default();
                    self.add_relaxed(sectors, bytes)?;
                } else {
                    if from != to {
                        data.copy_within(from..from + len, to);
                    }
                    to += len;
                    self.add_data(sectors)?;
                }
                from += len;
                here += stretch.sectors;
            }
        }
        if self.is_relaxed {
            std::mem::swap(data, &mut self.packed);
            to = data.len();
        }
        piece.len = to;
        Ok(())
    }

    /// The shortest zeros that are worth two more entries: any, as long as there is room for half
    /// as many again. Relaxed, 256 sectors of data take as many entries themselves.
    fn zeros_min(&self, entries_left: u64) -> u64 {
        let taken = to_u64(self.entries.len()).saturating_add(entries_left);
        let free = ENTRIES_MAX.saturating_sub(taken);
        match free {
            _ if free > ENTRIES_MAX / 2 => 1,
            _ if free > ENTRIES_MAX / 4 => 32,
            _ if free > ENTRIES_MAX / 16 || self.is_relaxed => 256,
            _ => u64::MAX,
        }
    }

    fn add_zeroed(&mut self, sectors: Range<u64>) -> Result<()> {
        self.zeroed_sectors += sectors.end - sectors.start;
        let mut here = sectors.start;
        while here < sectors.end {
            let length = (sectors.end - here).min(SegmentMapping::SECTORS_MAX);
            self.add(here, length, true)?;
            here += length;
        }
        Ok(())
    }

    fn add_data(&mut self, sectors: Range<u64>) -> Result<()> {
        self.data_sectors += sectors.end - sectors.start;
        let mut here = sectors.start;
        while here < sectors.end {
            let length = (sectors.end - here).min(UNIT_SECTORS);
            self.add(here, length, false)?;
            self.next_sector += length;
            here += length;
        }
        Ok(())
    }

    /// As [`Layout::add_data`], with its bytes, around the blank sectors.
    fn add_relaxed(&mut self, sectors: Range<u64>, bytes: &[u8]) -> Result<()> {
        let (mut here, mut rest) = (sectors.start, bytes);
        while here < sectors.end {
            let room = RELAXED_SECTORS - self.next_sector % BLOCK_SECTORS;
            let length = (sectors.end - here).min(room);
            self.add_data(here..here + length)?;
            let (now, later) = rest.split_at(to_usize(length).unwrap_or(0) * SECTOR);
            self.packed.extend_from_slice(now);
            (here, rest) = (here + length, later);
            if length == room {
                self.packed.extend_from_slice(&BLANK);
                self.next_sector += BLANK_SECTORS;
            }
        }
        Ok(())
    }

    /// One more entry, joined to the last where it continues it.
    fn add(&mut self, start_sector: u64, sectors: u64, zeroed: bool) -> Result<()> {
        let mapped_sector = self.next_sector;
        if let Some(last) = self.entries.last_mut()
            && last.zeroed == zeroed
            && last.end_sector() == start_sector
            && last.mapped_end_sector() == mapped_sector
            && last.sectors + sectors < SegmentMapping::SECTORS_MAX
        {
            last.sectors += sectors;
            return Ok(());
        }
        if to_u64(self.entries.len()) >= ENTRIES_MAX {
            return Err(too_many(ENTRIES_MAX + 1, self.is_relaxed));
        }
        self.entries.push(SegmentMapping { start_sector, sectors, mapped_sector, zeroed, tag: 0 });
        Ok(())
    }
}

#[cold]
fn too_many(entries: u64, is_relaxed: bool) -> Error {
    let mut message =
        format!("{entries} index entries: a layer may have {ENTRIES_MAX}, as the reference reads");
    if is_relaxed {
        message.push_str(
            "; blocks of 64 KiB that do not compress take one each: \
             choose blocks of 32 KiB or less",
        );
    }
    Error::new(ErrorKind::Unsupported, message)
}

/// Entries that `sectors` of data in a row take at most in a relaxed layer, behind `before` sectors
/// of other data: one, and one more for each block that begins in them or behind them.
pub(super) fn relaxed_entries(before: u64, sectors: u64) -> u64 {
    let block = |data: u64| data.saturating_add(DATA_START_SECTOR) / RELAXED_SECTORS;
    1 + block(before.saturating_add(sectors)) - block(before)
}

/// How many entries a relaxed layer takes before anything of it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RelaxedEntries {
    /// Sectors that are data, unless they turn out to be zeros.
    pub(super) data_sectors: u64,
    /// Entries, if all of them are kept.
    pub(super) at_most: u64,
}

/// Whether they are few enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    Sure,
    /// It depends on zeros, or on where runs end.
    Open,
}

impl RelaxedEntries {
    /// # Errors
    /// `Unsupported` where they are too many whatever is read.
    pub(super) fn fit(&self, finds_zeros: bool) -> Result<Fit> {
        if self.at_most <= ENTRIES_MAX {
            return Ok(Fit::Sure);
        }
        let blocks = self.data_sectors.saturating_add(DATA_START_SECTOR).div_ceil(RELAXED_SECTORS);
        if !finds_zeros && blocks > ENTRIES_MAX {
            return Err(too_many(blocks, true));
        }
        Ok(Fit::Open)
    }
}

/// Cuts what is stored into blocks; a block that a piece begins is completed by the next.
#[derive(Debug)]
pub(super) struct Cutter {
    block_bytes: usize,
    carry: Vec<u8>,
    /// Bytes that were cut, the carried ones included.
    pub(super) content_bytes: u64,
}

impl Cutter {
    /// A cutter into blocks of so many bytes, with `front` in front of everything.
    pub(super) fn new(block_bytes: usize, front: Vec<u8>) -> Self {
        Self { block_bytes, content_bytes: to_u64(front.len()), carry: front }
    }

    /// Cuts the data of `piece`.
    pub(super) fn cut(&mut self, piece: &mut Piece) {
        let Piece { data, len, head, body, at_byte, .. } = piece;
        *at_byte = self.content_bytes - to_u64(self.carry.len());
        self.content_bytes += to_u64(*len);
        head.clear();
        *body = 0..0;
        let data = data.get(..*len).unwrap_or_default();
        if self.carry.len() + data.len() < self.block_bytes {
            self.carry.extend_from_slice(data);
            return;
        }
        let mut start = 0;
        if !self.carry.is_empty() {
            start = self.block_bytes.saturating_sub(self.carry.len());
            std::mem::swap(head, &mut self.carry);
            head.extend_from_slice(data.get(..start).unwrap_or_default());
        }
        let rest = data.len() - start;
        *body = start..start + rest - rest % self.block_bytes;
        self.carry.extend_from_slice(data.get(body.end..).unwrap_or_default());
    }

    /// What is left, which makes no whole block.
    pub(super) fn take_rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.carry)
    }
}

#[cfg(test)]
mod tests {
    use super::super::content::Part;
    use super::super::zeros::Stretch;
    use super::*;

    fn data(layout: &mut Layout, start_sector: u64, sectors: u64) -> Vec<u8> {
        let mut piece = Piece {
            parts: vec![Part {
                start_sector,
                sectors,
                target: Target::Data { layer: 0, sector: 8 },
            }],
            stretches: vec![Stretch { sectors, is_zero: false }],
            data: vec![1; to_usize(sectors).unwrap() * SECTOR],
            ..Piece::default()
        };
        layout.place(&mut piece).unwrap();
        piece.data.truncate(piece.len);
        piece.data
    }

    fn seen(layout: &Layout) -> Vec<(u64, u64, u64, bool)> {
        let entry = |e: &SegmentMapping| (e.start_sector, e.sectors, e.mapped_sector, e.zeroed);
        layout.entries().iter().map(entry).collect()
    }

    #[test]
    fn entries_are_joined_until_they_are_as_long_as_the_reference_makes_them() {
        let mut layout = Layout::new(10).unwrap();
        for start in (0..20_480).step_by(512) {
            data(&mut layout, start, 512);
        }
        // 255 units of 64 are 16320; one more would be more than 16382.
        assert_eq!(seen(&layout), [(0, 16_320, 8, false), (16_320, 4160, 16_328, false)]);
        layout.add_zeroed(30_000..70_000).unwrap();
        let zeroed = [
            (30_000, 16_383, 20_488, true),
            (46_383, 16_383, 20_488, true),
            (62_766, 7234, 20_488, true),
        ];
        assert_eq!(seen(&layout)[2..], zeroed);
        assert_eq!((layout.data_sectors, layout.zeroed_sectors), (20_480, 40_000));
    }

    #[test]
    fn a_relaxed_layer_has_blank_sectors_at_the_end_of_each_block() {
        let mut layout = Layout::relaxed();
        // The header is 8 sectors of the first block.
        let stored = data(&mut layout, 0, 300);
        assert_eq!(
            seen(&layout),
            [(0, 112, 8, false), (112, 120, 128, false), (232, 68, 256, false)]
        );
        assert_eq!(stored.len(), 316 * SECTOR);
        let blank: Vec<usize> =
            (0..316).filter(|at| stored[at * SECTOR..][..SECTOR] == [0; SECTOR]).collect();
        assert_eq!(blank, (112..120).chain(240..248).collect::<Vec<_>>());
    }

    /// 57 GiB of blocks of 64 KiB that do not compress were written before the last one was found
    /// to be one entry too many.
    #[test]
    fn a_relaxed_layer_that_cannot_have_room_is_refused_before_it_is_read() {
        // Each block but the first has 120 sectors of data.
        let most = ENTRIES_MAX * RELAXED_SECTORS - DATA_START_SECTOR;
        for (data_sectors, spare, finds_zeros, expected) in [
            (0, 0, false, Some(Fit::Sure)),
            (most, 0, false, Some(Fit::Sure)),
            (most, 1, false, Some(Fit::Open)),
            (most + 1, 0, false, None),
            (most + 1, 0, true, Some(Fit::Open)),
            (1 << 49, 0, false, None),
            (1 << 49, 0, true, Some(Fit::Open)),
        ] {
            // The last block is full only to the sector before its end: see `relaxed_entries`.
            let at_most = relaxed_entries(0, data_sectors.saturating_sub(1)) + spare;
            let fit = RelaxedEntries { data_sectors, at_most }.fit(finds_zeros);
            match fit {
                Ok(fit) => assert_eq!(Some(fit), expected, "{data_sectors} {finds_zeros}"),
                Err(error) => {
                    assert_eq!((expected, error.kind()), (None, ErrorKind::Unsupported));
                    assert!(error.to_string().contains("choose blocks of 32 KiB or less"));
                }
            }
        }
    }

    #[test]
    fn zeros_are_left_out_only_while_there_is_room_for_their_entries() {
        let layout = Layout::new(0).unwrap();
        let min = |left| layout.zeros_min(left);
        assert_eq!(min(0), 1);
        assert_eq!(min(ENTRIES_MAX / 2 - 1), 1);
        assert_eq!(min(ENTRIES_MAX / 2), 32);
        assert_eq!(min(ENTRIES_MAX * 3 / 4), 256);
        assert_eq!(min(ENTRIES_MAX), u64::MAX);
        // There they make room for others.
        assert_eq!(Layout::relaxed().zeros_min(2 * ENTRIES_MAX), 256);
        assert_eq!(Layout::new(ENTRIES_MAX + 1).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn pieces_of_any_length_are_cut_into_the_same_blocks() {
        let whole: Vec<u8> = (0..40_000_u32).map(|i| (i / 7).to_le_bytes()[0]).collect();
        for block_bytes in [512, 4096, 8192] {
            for piece_bytes in [1, 511, 512, 4096, 5000, 40_000] {
                let (front, rest) = whole.split_at(4096);
                let mut cutter = Cutter::new(block_bytes, front.to_vec());
                let mut found = Vec::new();
                for part in rest.chunks(piece_bytes) {
                    let mut piece =
                        Piece { data: part.to_vec(), len: part.len(), ..Piece::default() };
                    cutter.cut(&mut piece);
                    assert_eq!(piece.at_byte, to_u64(found.len()));
                    assert_eq!(piece.body.len() % block_bytes, 0);
                    assert_eq!(piece.head.len() % block_bytes, 0);
                    found.extend_from_slice(&piece.head);
                    found.extend_from_slice(&piece.data[piece.body]);
                }
                let rest = cutter.take_rest();
                assert!(rest.len() < block_bytes.max(4097));
                found.extend(rest);
                assert_eq!(cutter.content_bytes, 40_000);
                assert!(found == whole, "{block_bytes} {piece_bytes}");
            }
        }
    }
}
