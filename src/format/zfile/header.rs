//! The 512-byte header and trailer, and which of the two to believe.

use super::crc::{STRUCTURE_SEED, crc32c_raw};
use crate::error::{Error, ErrorKind, Result};
use crate::format::flags::flag_word;
use crate::limits::{ZFILE_BLOCK_SIZE_MAX, ZFILE_BLOCK_SIZE_MIN, ZFILE_BLOCKS_MAX};
use std::ops::Range;

/// Space that a header or a trailer takes on disk.
pub const HEADER_BYTES: u64 = 512;

/// [`HEADER_BYTES`] as a length in memory.
const SPACE: usize = 512;

/// Bytes of that space that carry fields, as the field `size` says.
const STRUCT_BYTES: u32 = 96;

const MAGIC: [u8; 24] = *b"ZFile\0\x01\0tuji.yyf@Alibaba";

// Where the fields lie.
const SIZE_AT: usize = 24;
const DIGEST_AT: usize = 28;
const FLAGS_AT: usize = 32;
const INDEX_OFFSET_AT: usize = 40;
const INDEX_SIZE_AT: usize = 48;
const ORIGINAL_SIZE_AT: usize = 56;
const INDEX_CRC_AT: usize = 64;
const BLOCK_SIZE_AT: usize = 72;
const ALGORITHM_AT: usize = 76;
const LEVEL_AT: usize = 77;
const USE_DICT_AT: usize = 78;
const DICT_SIZE_AT: usize = 84;
const VERIFY_AT: usize = 88;

/// Whether `bytes` begin with the magic of a zfile. Too few bytes do not.
#[must_use]
pub fn has_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// How the blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Raw LZ4 blocks.
    Lz4,
    /// One zstd frame per block.
    Zstd,
}

flag_word! {
    /// The flag word. Bits from 6 up are ignored and not kept: images of 2021 hold garbage there.
    Flags: u64
}

impl Flags {
    /// This record is a header; without it, a trailer.
    pub const HEADER: Self = Self(1);
    /// The file holds data (always set).
    pub const DATA: Self = Self(1 << 1);
    /// The file is complete; set in trailers only.
    pub const SEALED: Self = Self(1 << 2);
    /// The header was rewritten at the end and says what the trailer says.
    pub const HEADER_OVERWRITTEN: Self = Self(1 << 3);
    /// `digest` and `index_crc` are valid.
    pub const DIGEST: Self = Self(1 << 4);
    /// The jump table is compressed: defined, never written, ignored by the reference.
    pub const INDEX_COMPRESSED: Self = Self(1 << 5);

    const KNOWN: u64 = (1 << 6) - 1;

    /// The flags in `bits`; unknown ones are dropped.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits & Self::KNOWN)
    }

    /// These flags without the promise of a digest.
    #[must_use]
    pub const fn without_digest(self) -> Self {
        Self(self.0 & !Self::DIGEST.0)
    }
}

/// A header or a trailer; [`Flags::HEADER`] says which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What kind of record, and what it promises.
    pub flags: Flags,
    /// Where the jump table begins in the zfile.
    pub index_offset_bytes: u64,
    /// Blocks, and entries of the jump table.
    pub block_count: u64,
    /// Length of the file before compression.
    pub original_bytes: u64,
    /// Raw CRC-32C of the jump table, valid with [`Flags::DIGEST`].
    pub index_crc: u32,
    /// Bytes of one block before compression; a power of two from 4 KiB to 64 KiB.
    pub block_bytes: u32,
    /// How the blocks are compressed.
    pub algorithm: Algorithm,
    /// The level as stored; informational.
    pub level: u8,
    /// Bytes of a dictionary between header and data; 0, as dictionaries are not supported.
    pub dict_bytes: u32,
    /// Whether every block is followed by its checksum.
    pub has_block_crc: bool,
}

impl Header {
    /// The record at the front of `bytes`, which lie at `at_byte` of the zfile.
    ///
    /// # Errors
    /// `InvalidFormat` when the magic is not there, `Integrity` when the digest does not match,
    /// `Unsupported` for codecs and dictionaries that nobody writes, `Corrupt` otherwise.
    pub fn parse(bytes: &[u8], at_byte: u64) -> Result<Self> {
        if !has_magic(bytes) {
            let found = bytes.get(..8).unwrap_or(bytes).escape_ascii().to_string();
            let kind = ErrorKind::InvalidFormat;
            return Err(Error::field(kind, "zfile: magic", at_byte, found, "\"ZFile\""));
        }
        let Some(record) = bytes.first_chunk::<SPACE>() else {
            let found = format_args!("{} bytes", bytes.len());
            return Err(Error::corrupt("zfile header: length", at_byte, found, "512 bytes"));
        };
        let fields = Fields { record, at_byte };
        let flags = Flags::from_bits(fields.u64_at(FLAGS_AT));
        if flags.has(Flags::DIGEST) {
            fields.check_digest()?;
        }
        let header = Self {
            flags,
            index_offset_bytes: fields.u64_at(INDEX_OFFSET_AT),
            block_count: fields.u64_at(INDEX_SIZE_AT),
            original_bytes: fields.u64_at(ORIGINAL_SIZE_AT),
            index_crc: fields.u32_at(INDEX_CRC_AT),
            block_bytes: fields.block_bytes()?,
            algorithm: fields.algorithm()?,
            level: fields.u8_at(LEVEL_AT),
            dict_bytes: fields.no_dictionary()?,
            has_block_crc: fields.u8_at(VERIFY_AT) != 0,
        };
        Ok(header)
    }

    /// [`Header::parse`] for the end of a file whose header is a zfile's.
    ///
    /// # Errors
    /// As [`Header::parse`], but a missing magic is `Corrupt`: the file was cut, or never finished.
    pub fn parse_trailer(bytes: &[u8], at_byte: u64) -> Result<Self> {
        if has_magic(bytes) {
            return Self::parse(bytes, at_byte);
        }
        let found = bytes.get(..8).unwrap_or(bytes).escape_ascii().to_string();
        let expected = "\"ZFile\" (was the file cut short, or never finished?)";
        Err(Error::corrupt("zfile trailer: magic", at_byte, found, expected))
    }

    /// The record as it lies on disk, its digest included where [`Flags::DIGEST`] promises one.
    #[must_use]
    pub fn encode(&self) -> [u8; SPACE] {
        let mut record = [0; SPACE];
        let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(SIZE_AT, &STRUCT_BYTES.to_le_bytes());
        put(FLAGS_AT, &self.flags.bits().to_le_bytes());
        put(INDEX_OFFSET_AT, &self.index_offset_bytes.to_le_bytes());
        put(INDEX_SIZE_AT, &self.block_count.to_le_bytes());
        put(ORIGINAL_SIZE_AT, &self.original_bytes.to_le_bytes());
        put(INDEX_CRC_AT, &self.index_crc.to_le_bytes());
        put(BLOCK_SIZE_AT, &self.block_bytes.to_le_bytes());
        let algorithm = match self.algorithm {
            Algorithm::Lz4 => 1,
            Algorithm::Zstd => 2,
        };
        put(ALGORITHM_AT, &[algorithm, self.level]);
        put(DICT_SIZE_AT, &self.dict_bytes.to_le_bytes());
        put(VERIFY_AT, &[u8::from(self.has_block_crc)]);
        if self.flags.has(Flags::DIGEST) {
            let digest = crc32c_raw(STRUCTURE_SEED, &record).to_le_bytes();
            record[DIGEST_AT..DIGEST_AT + 4].copy_from_slice(&digest);
        }
        record
    }
}

/// Reads fields of a record; the offsets are constants inside its 512 bytes.
struct Fields<'a> {
    record: &'a [u8; SPACE],
    at_byte: u64,
}

impl Fields<'_> {
    fn take<const N: usize>(&self, at: usize) -> [u8; N] {
        self.record.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
    }

    fn u8_at(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.take(at))
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.take(at))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.take(at))
    }

    fn place(&self, at: usize) -> u64 {
        self.at_byte.saturating_add(crate::units::to_u64(at))
    }

    /// The digest covers all 512 bytes, its own field taken as zero.
    fn check_digest(&self) -> Result<()> {
        let mut blank = *self.record;
        blank[DIGEST_AT..DIGEST_AT + 4].fill(0);
        let (found, expected) = (self.u32_at(DIGEST_AT), crc32c_raw(STRUCTURE_SEED, &blank));
        if found == expected {
            return Ok(());
        }
        let at_byte = self.place(DIGEST_AT);
        let (found, expected) = (format!("{found:#010x}"), format!("{expected:#010x}"));
        Err(Error::field(ErrorKind::Integrity, "zfile header: digest", at_byte, found, expected))
    }

    fn block_bytes(&self) -> Result<u32> {
        let found = self.u32_at(BLOCK_SIZE_AT);
        if found.is_power_of_two() && (ZFILE_BLOCK_SIZE_MIN..=ZFILE_BLOCK_SIZE_MAX).contains(&found)
        {
            return Ok(found);
        }
        let expected =
            format!("a power of two from {ZFILE_BLOCK_SIZE_MIN} to {ZFILE_BLOCK_SIZE_MAX}");
        Err(Error::corrupt("zfile header: block_size", self.place(BLOCK_SIZE_AT), found, expected))
    }

    fn algorithm(&self) -> Result<Algorithm> {
        match self.u8_at(ALGORITHM_AT) {
            1 => Ok(Algorithm::Lz4),
            2 => Ok(Algorithm::Zstd),
            found => Err(Error::field(
                ErrorKind::Unsupported,
                "zfile header: algo",
                self.place(ALGORITHM_AT),
                found,
                "1 (lz4) or 2 (zstd)",
            )),
        }
    }

    fn no_dictionary(&self) -> Result<u32> {
        let (used, bytes) = (self.u8_at(USE_DICT_AT), self.u32_at(DICT_SIZE_AT));
        if used == 0 && bytes == 0 {
            return Ok(0);
        }
        let found = format!("use_dict {used}, dict_size {bytes}");
        let at_byte = self.place(USE_DICT_AT);
        let kind = ErrorKind::Unsupported;
        Err(Error::field(kind, "zfile header: dictionary", at_byte, found, "none"))
    }
}

/// Whether the trailer must be read: the header was not rewritten when the file was finished.
#[must_use]
pub fn needs_trailer(header: &Header) -> bool {
    !header.flags.has(Flags::HEADER_OVERWRITTEN)
}

/// The parts of a zfile, checked against its length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The authoritative record.
    pub header: Header,
    /// Where the jump table lies in the zfile, in bytes. Blocks end where it starts.
    pub index: Range<u64>,
}

/// Where the parts lie in a zfile of `payload_bytes`: told by the trailer if there is one, else by
/// the header.
///
/// # Errors
/// `Corrupt` when the records contradict each other or the file.
pub fn layout(header: &Header, trailer: Option<&Header>, payload_bytes: u64) -> Result<Layout> {
    let believed = trailer.unwrap_or(header);
    if !header.flags.has(Flags::HEADER.with(Flags::DATA)) {
        let expected = "a header (1) of data (2)";
        return Err(Error::corrupt("zfile header: flags", 32, header.flags, expected));
    }
    let trailer_at = payload_bytes.saturating_sub(HEADER_BYTES);
    if let Some(trailer) = trailer
        && (trailer.flags.has(Flags::HEADER) || !trailer.flags.has(Flags::DATA.with(Flags::SEALED)))
    {
        let expected = "a trailer (not 1) of data (2) that is sealed (4)";
        let at_byte = trailer_at.saturating_add(32);
        return Err(Error::corrupt("zfile trailer: flags", at_byte, trailer.flags, expected));
    }
    let at = |field: usize| {
        let base = if trailer.is_some() { trailer_at } else { 0 };
        base.saturating_add(crate::units::to_u64(field))
    };
    let blocks = believed.block_count;
    let expected_blocks = believed.original_bytes.div_ceil(u64::from(believed.block_bytes));
    if blocks != expected_blocks || blocks > ZFILE_BLOCKS_MAX {
        let expected = format!("{expected_blocks}, and at most {ZFILE_BLOCKS_MAX}");
        return Err(Error::corrupt("zfile: index_size", at(INDEX_SIZE_AT), blocks, expected));
    }
    // A rewritten header is enough to read by, so a trailer that was cut off is not missed.
    let room = if trailer.is_some() { trailer_at } else { payload_bytes };
    let start = believed.index_offset_bytes;
    let end = start.checked_add(blocks * 4).filter(|&end| start >= HEADER_BYTES && end <= room);
    let Some(end) = end else {
        let expected =
            format!("a jump table of {blocks} entries between {HEADER_BYTES} and {room}");
        return Err(Error::corrupt("zfile: index_offset", at(INDEX_OFFSET_AT), start, expected));
    };
    // Every block takes a byte and its checksum: a table cannot be longer than what it tells of.
    let least = blocks.saturating_mul(if believed.has_block_crc { 5 } else { 1 });
    if start - HEADER_BYTES < least {
        let expected = format!("at least {least} bytes of blocks before the jump table");
        return Err(Error::corrupt("zfile: index_offset", at(INDEX_OFFSET_AT), start, expected));
    }
    Ok(Layout { header: believed.clone(), index: start..end })
}

/// [`layout`] from the authoritative record alone, as `layout` has returned it before.
///
/// # Errors
/// As [`layout`].
pub fn layout_of_believed(believed: &Header, payload_bytes: u64) -> Result<Layout> {
    if believed.flags.has(Flags::HEADER) {
        return layout(believed, None, payload_bytes);
    }
    let header = Header { flags: Flags::HEADER.with(Flags::DATA), ..believed.clone() };
    layout(&header, Some(believed), payload_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            flags: Flags::from_bits(0b11011),
            index_offset_bytes: 900,
            block_count: 3,
            original_bytes: 9000,
            index_crc: 7,
            block_bytes: 4096,
            algorithm: Algorithm::Lz4,
            level: 0,
            dict_bytes: 0,
            has_block_crc: true,
        }
    }

    #[test]
    fn a_record_parses_to_what_was_encoded() {
        assert_eq!(Header::parse(&header().encode(), 0).unwrap(), header());
    }

    #[test]
    fn every_flipped_bit_under_the_digest_is_found() {
        let good = header().encode();
        for at in 0..SPACE {
            for bit in 0..8 {
                let mut bad = good;
                bad[at] ^= 1 << bit;
                // The one bit that says whether there is a digest at all cannot vouch for itself.
                if at == FLAGS_AT && bit == 4 {
                    continue;
                }
                assert!(Header::parse(&bad, 0).is_err(), "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn garbage_in_unknown_flags_is_ignored_without_a_digest() {
        let mut old = Header { flags: Flags::from_bits(0b01011), ..header() }.encode();
        old[FLAGS_AT + 2] = 0xee;
        old[DIGEST_AT] = 0x77;
        assert_eq!(Header::parse(&old, 0).unwrap().flags.bits(), 0b01011);
    }

    #[test]
    fn impossible_fields_are_refused_with_their_place() {
        let cases = [
            (BLOCK_SIZE_AT, 0_u8, ErrorKind::Corrupt, "block_size at byte 1072"),
            (BLOCK_SIZE_AT + 2, 2, ErrorKind::Corrupt, "block_size at byte 1072"),
            (ALGORITHM_AT, 0, ErrorKind::Unsupported, "algo at byte 1076: found 0"),
            (ALGORITHM_AT, 3, ErrorKind::Unsupported, "algo at byte 1076: found 3"),
            (USE_DICT_AT, 1, ErrorKind::Unsupported, "dictionary at byte 1078"),
            (DICT_SIZE_AT, 1, ErrorKind::Unsupported, "dictionary at byte 1078"),
        ];
        for (at, byte, kind, text) in cases {
            let mut bytes = Header { flags: Flags::from_bits(0b01011), ..header() }.encode();
            bytes[at] = byte;
            if at == BLOCK_SIZE_AT {
                bytes[BLOCK_SIZE_AT + 1] = 0;
            }
            let error = Header::parse(&bytes, 1000).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn a_layout_that_does_not_fit_the_file_is_refused() {
        let good = header();
        assert_eq!(layout(&good, None, 912).unwrap().index, 900..912);
        let cases: [(&str, Header, u64); 6] = [
            ("table beyond the file", good.clone(), 911),
            ("table in the header", Header { index_offset_bytes: 511, ..good.clone() }, 5000),
            ("too few blocks", Header { block_count: 2, ..good.clone() }, 5000),
            ("too many blocks", Header { block_count: 4, ..good.clone() }, 5000),
            ("overflow", Header { index_offset_bytes: u64::MAX, ..good.clone() }, 5000),
            (
                "blocks without end",
                Header { block_count: u64::MAX / 4096 + 1, original_bytes: u64::MAX, ..good },
                u64::MAX,
            ),
        ];
        for (what, header, bytes) in cases {
            assert_eq!(
                layout(&header, None, bytes).unwrap_err().kind(),
                ErrorKind::Corrupt,
                "{what}"
            );
        }
    }

    #[test]
    fn the_trailer_is_believed_where_there_is_one() {
        let first = Header {
            flags: Flags::from_bits(0b10011),
            index_offset_bytes: 0,
            block_count: 0,
            original_bytes: 0,
            ..header()
        };
        assert!(needs_trailer(&first) && !needs_trailer(&header()));
        let trailer = Header { flags: Flags::from_bits(0b10110), ..header() };
        let found = layout(&first, Some(&trailer), 912 + 512).unwrap();
        assert_eq!((found.index, found.header.block_count), (900..912, 3));
        assert!(layout(&first, Some(&trailer), 912 + 511).is_err(), "table overlaps the trailer");
        assert!(layout(&first, Some(&header()), 5000).is_err(), "a header is no trailer");
    }
}
