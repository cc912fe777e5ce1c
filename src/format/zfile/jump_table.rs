//! Where each compressed block lies: the lengths on disk, turned into offsets.

use super::crc::{BLOCK_CRC_BYTES, STRUCTURE_SEED, crc32c_raw};
use super::frame::compressed_bytes_bound;
use super::header::{Flags, HEADER_BYTES, Layout};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{to_u64, to_usize};
use std::ops::Range;

/// Blocks that share one 64-bit base. 64 blocks of at most 64 KiB and some fit 32 bits easily, and
/// the bases cost an eighth of a byte a block.
const GROUP_BLOCKS: usize = 64;

/// Bytes of an entry on disk.
const ENTRY_BYTES: usize = 4;

/// The jump table in memory: 4 bytes and an eighth for each block, two loads for a range.
#[derive(Debug)]
pub struct JumpTable {
    // Offset of the first block of each group; one more for the end.
    bases: Box<[u64]>,
    // Offset of each block in its group; one more for the end.
    deltas: Box<[u32]>,
    block_count: u64,
    original_bytes: u64,
    block_bytes: u32,
    compressed_bytes_max: u32,
}

/// A jump table in the making. It takes the stored bytes piece by piece and grows with them: a
/// header that lies about the number of blocks costs nothing, and a hole in the file ends it at
/// once, because a length of zero is impossible.
#[derive(Debug)]
pub struct JumpTableBuilder<'a> {
    layout: &'a Layout,
    bases: Vec<u64>,
    deltas: Vec<u32>,
    // Where the next block begins, and the first of its group.
    offset: u64,
    base: u64,
    checksum: u32,
    compressed_bytes_max: u32,
}

impl<'a> JumpTableBuilder<'a> {
    /// An empty table for the blocks that `layout` promises.
    #[must_use]
    pub fn new(layout: &'a Layout) -> Self {
        Self {
            layout,
            bases: Vec::new(),
            deltas: Vec::new(),
            offset: HEADER_BYTES + u64::from(layout.header.dict_bytes),
            base: 0,
            checksum: STRUCTURE_SEED,
            compressed_bytes_max: 0,
        }
    }

    /// Appends the next bytes of the stored table: whole entries.
    ///
    /// # Errors
    /// `Corrupt` at the first length that is impossible, or when there are too many.
    pub fn push(&mut self, bytes: &[u8]) -> Result<()> {
        let header = &self.layout.header;
        let (entries, rest) = bytes.as_chunks::<ENTRY_BYTES>();
        let count = to_u64(self.deltas.len()).saturating_add(to_u64(entries.len()));
        if count > header.block_count || !rest.is_empty() {
            return Err(self.wrong_size(to_u64(bytes.len())));
        }
        self.checksum = crc32c_raw(self.checksum, bytes);
        let crc_bytes = if header.has_block_crc { to_u64(BLOCK_CRC_BYTES) } else { 0 };
        let longest = compressed_bytes_bound(header.algorithm, header.block_bytes) + crc_bytes;
        self.deltas.reserve(entries.len());
        for entry in entries {
            let len = u32::from_le_bytes(*entry);
            if u64::from(len) <= crc_bytes || u64::from(len) > longest {
                let expected = format!("{} to {longest}", crc_bytes + 1);
                return Err(self.impossible(len, &expected));
            }
            self.compressed_bytes_max = self.compressed_bytes_max.max(len);
            self.mark();
            // At most a billion blocks of some 64 KiB: far from overflow.
            self.offset += u64::from(len);
        }
        Ok(())
    }

    /// Notes where the next block begins.
    fn mark(&mut self) {
        if self.deltas.len().is_multiple_of(GROUP_BLOCKS) {
            self.base = self.offset;
            self.bases.push(self.base);
        }
        self.deltas.push(delta(self.offset, self.base));
    }

    /// The table, once all of it was pushed.
    ///
    /// # Errors
    /// `Integrity` when its checksum does not match; `Corrupt` when entries are missing or the
    /// lengths do not add up to where the table starts (every writer lays blocks without gaps).
    pub fn finish(mut self) -> Result<JumpTable> {
        let (header, at_byte) = (&self.layout.header, self.layout.index.start);
        if to_u64(self.deltas.len()) != header.block_count {
            return Err(self.wrong_size(0));
        }
        if header.flags.has(Flags::DIGEST) && self.checksum != header.index_crc {
            let (found, expected) = (self.checksum, header.index_crc);
            let (found, expected) =
                (format!("checksum {found:#010x}"), format!("{expected:#010x}"));
            let kind = ErrorKind::Integrity;
            return Err(Error::field(kind, "zfile jump table", at_byte, found, expected));
        }
        if self.offset != at_byte {
            let found = format!("blocks that end at {}", self.offset);
            return Err(Error::corrupt("zfile jump table: sum", at_byte, found, at_byte));
        }
        self.mark();
        Ok(JumpTable {
            bases: self.bases.into_boxed_slice(),
            deltas: self.deltas.into_boxed_slice(),
            block_count: header.block_count,
            original_bytes: header.original_bytes,
            block_bytes: header.block_bytes,
            compressed_bytes_max: self.compressed_bytes_max,
        })
    }

    #[cold]
    fn impossible(&self, found: u32, expected: &str) -> Error {
        let block = self.deltas.len();
        let at_byte = self.layout.index.start + to_u64(block * ENTRY_BYTES);
        let what = format!("zfile jump table: length of block {block}");
        Error::corrupt(&what, at_byte, found, expected)
    }

    #[cold]
    fn wrong_size(&self, more_bytes: u64) -> Error {
        let bytes = to_u64(self.deltas.len() * ENTRY_BYTES).saturating_add(more_bytes);
        let expected = format_args!("{} entries of 4 bytes", self.layout.header.block_count);
        let found = format_args!("{bytes} bytes");
        Error::corrupt("zfile jump table", self.layout.index.start, found, expected)
    }
}

impl JumpTable {
    /// The table stored as `bytes`, which lie at `layout.index`.
    ///
    /// # Errors
    /// As [`JumpTableBuilder`].
    pub fn parse(bytes: &[u8], layout: &Layout) -> Result<Self> {
        let mut table = JumpTableBuilder::new(layout);
        table.push(bytes)?;
        table.finish()
    }

    /// Number of blocks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.block_count
    }

    /// Length of the longest record, its checksum included.
    #[must_use]
    pub fn compressed_bytes_max(&self) -> u32 {
        self.compressed_bytes_max
    }

    /// Where the record of `block` (body and checksum) lies in the zfile. Empty, at the end, for a
    /// block that does not exist.
    #[inline]
    #[must_use]
    pub fn compressed_range(&self, block: u64) -> Range<u64> {
        debug_assert!(block < self.block_count);
        self.offset_of(block)..self.offset_of(block.saturating_add(1))
    }

    /// The lengths of all records in order, their checksums included: the table as stored.
    pub fn record_lengths(&self) -> impl Iterator<Item = u32> {
        let mut start = self.offset_of(0);
        (1..=self.block_count).map(move |block| {
            let end = self.offset_of(block);
            let len = end - start;
            start = end;
            // It was 32 bits wide when it was read.
            u32::try_from(len).unwrap_or(u32::MAX)
        })
    }

    #[inline]
    fn offset_of(&self, block: u64) -> u64 {
        let block = to_usize(block).unwrap_or(usize::MAX).min(self.deltas.len().saturating_sub(1));
        let base = self.bases.get(block / GROUP_BLOCKS).copied().unwrap_or(0);
        base + self.deltas.get(block).copied().map_or(0, u64::from)
    }

    /// Length of `block` before compression: the block size, except for the last block.
    #[inline]
    #[must_use]
    pub fn block_original_bytes(&self, block: u64) -> u32 {
        let start = block.saturating_mul(u64::from(self.block_bytes));
        let left = self.original_bytes.saturating_sub(start);
        u32::try_from(left).map_or(self.block_bytes, |left| left.min(self.block_bytes))
    }
}

/// 64 blocks of at most 64 KiB and a little: always fits.
fn delta(offset: u64, base: u64) -> u32 {
    u32::try_from(offset - base).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::header::{Algorithm, Header};
    use super::*;
    use proptest::prelude::*;

    fn layout(lens: &[u32], has_block_crc: bool) -> (Layout, Vec<u8>) {
        let bytes: Vec<u8> = lens.iter().flat_map(|len| len.to_le_bytes()).collect();
        let start = 512 + lens.iter().map(|&len| u64::from(len)).sum::<u64>();
        let header = Header {
            flags: Flags::from_bits(0b11011),
            index_offset_bytes: start,
            block_count: to_u64(lens.len()),
            original_bytes: (to_u64(lens.len()) * 4096).saturating_sub(100),
            index_crc: crc32c_raw(0, &bytes),
            block_bytes: 4096,
            algorithm: Algorithm::Lz4,
            level: 0,
            dict_bytes: 0,
            has_block_crc,
        };
        (Layout { header, index: start..start + to_u64(bytes.len()) }, bytes)
    }

    proptest! {
        #[test]
        fn ranges_are_the_running_sum_of_the_lengths(
            lens in prop::collection::vec(5_u32..4116, 0..400),
            piece_entries in 1_usize..200,
        ) {
            let (layout, bytes) = layout(&lens, true);
            let mut table = JumpTableBuilder::new(&layout);
            for piece in bytes.chunks(piece_entries * ENTRY_BYTES) {
                table.push(piece).unwrap();
            }
            let table = table.finish().unwrap();
            let mut start = 512;
            for (block, &len) in (0..).zip(&lens) {
                let end = start + u64::from(len);
                prop_assert_eq!(table.compressed_range(block), start..end);
                start = end;
            }
            prop_assert_eq!(table.record_lengths().collect::<Vec<_>>(), &lens[..]);
            prop_assert_eq!(table.compressed_bytes_max(), lens.iter().copied().max().unwrap_or(0));
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let (mut layout, _) = layout(&[], true);
            layout.header.block_count = to_u64(bytes.len() / 4);
            layout.index.end = layout.index.start + to_u64(bytes.len());
            layout.header.flags = layout.header.flags.without_digest();
            let _ = JumpTable::parse(&bytes, &layout);
        }
    }

    #[test]
    fn only_the_last_block_is_short() {
        let (layout, bytes) = layout(&[100, 100, 100], true);
        let table = JumpTable::parse(&bytes, &layout).unwrap();
        let sizes: Vec<_> = (0..4).map(|block| table.block_original_bytes(block)).collect();
        assert_eq!(sizes, [4096, 4096, 3996, 0]);
    }

    #[test]
    fn impossible_lengths_are_refused_with_their_place() {
        // lz4's worst case for 4096 bytes is 4128; with the checksum 4132.
        for (lens, has_crc, good) in [
            (vec![5, 4132], true, true),
            (vec![5, 4133], true, false),
            (vec![4, 100], true, false),
            (vec![0, 100], false, false),
            (vec![1, 4128], false, true),
        ] {
            let (layout, bytes) = layout(&lens, has_crc);
            assert_eq!(JumpTable::parse(&bytes, &layout).is_ok(), good, "{lens:?}");
        }
    }

    #[test]
    fn a_table_that_does_not_end_where_it_starts_is_refused() {
        let (mut layout, bytes) = layout(&[100, 200], true);
        layout.index = layout.index.start + 1..layout.index.end + 1;
        let error = JumpTable::parse(&bytes, &layout).unwrap_err();
        assert!(error.to_string().contains("blocks that end at 812, expected 813"), "{error}");
    }

    /// A sparse file with a header that promises a billion blocks used to cost 8 GB of memory
    /// before its first length was looked at: its checksum of zeros is a correct 0.
    #[test]
    fn a_table_of_zeros_ends_at_its_first_entry_whatever_its_checksum() {
        let (mut layout, bytes) = layout(&[100, 200], true);
        layout.header.block_count = 1_000_000_000;
        layout.header.index_crc = 0;
        let mut table = JumpTableBuilder::new(&layout);
        table.push(&bytes).unwrap();
        let error = table.push(&[0; 4096]).unwrap_err();
        let told = "length of block 2 at byte 820: found 0, expected 5 to 4132";
        assert!(error.to_string().contains(told), "{error}");
        assert!(table.deltas.capacity() <= 2048, "{}", table.deltas.capacity());
    }

    #[test]
    fn a_table_of_another_size_than_promised_is_refused() {
        let (layout, bytes) = layout(&[100, 200, 300], true);
        let more = [&bytes[..], &100_u32.to_le_bytes()].concat();
        for (bytes, found) in [(&bytes[..8], 8), (&bytes[..11], 11), (&more, 16), (&[], 0)] {
            let error = JumpTable::parse(bytes, &layout).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            let told = format!("found {found} bytes, expected 3 entries of 4 bytes");
            assert!(error.to_string().ends_with(&told), "{error}");
        }
    }

    #[test]
    fn a_wrong_checksum_is_an_integrity_error() {
        let (layout, mut bytes) = layout(&[100, 200], true);
        bytes[0] ^= 1;
        assert_eq!(JumpTable::parse(&bytes, &layout).unwrap_err().kind(), ErrorKind::Integrity);
    }
}
