//! Header and trailer of an LSMT file, and what the two together promise.
//!
//! Both are the same 390-byte record, padded with zeros to 4096. A sealed layer begins with one
//! and ends with another; the one at the end is authoritative and says where the index lies. The
//! header of a layer that was sealed in place still says "not sealed", so the header is asked for
//! nothing but what kind of file this is. A writable pair has a header in each of its two files.
//!
//! `image::open` calls [`Header::parse`], [`Header::parse_trailer`] and [`locate_sealed_index`]
//! once per layer; `commit` and the writable upper call [`Header::encode`]. Nothing here trusts a
//! number before it was held against the size of the file and against [`crate::limits`].

use std::fmt;

use super::Fields;
use super::segment::SegmentMapping;
use crate::error::{Error, ErrorKind, Result};
use crate::format::flags::flag_word;
use crate::limits::{SEALED_INDEX_ENTRIES_MAX, VIRTUAL_SECTORS_MAX};
use crate::units::{SECTOR_SIZE, bytes_to_sectors, to_u64, to_usize, whole_sectors};

/// Space that a header or a trailer takes on disk.
pub const HEADER_BYTES: u64 = 4096;

/// Bytes of that space that carry fields; the rest is zero when written, ignored when read.
pub const HEADER_STRUCT_BYTES: usize = 390;

/// Bytes of the user tag.
pub const USER_TAG_BYTES: usize = 256;

/// First sector of a layer's file that can hold data.
pub const DATA_START_SECTOR: u64 = whole_sectors(HEADER_BYTES);

/// The version we write, and the newest that we read.
pub const VERSION: u8 = 1;

/// The sub-version we write. Readers ignore it.
pub const SUB_VERSION: u8 = 1;

/// `LSMT`, NUL, 1, 2, NUL; then the UUID d2637e65-4494-4c08-d2a2-c8ec4fcfae8a as the reference
/// lays it in memory.
const MAGIC: [u8; 24] = [
    0x4c, 0x53, 0x4d, 0x54, 0x00, 0x01, 0x02, 0x00, //
    0x65, 0x7e, 0x63, 0xd2, 0x94, 0x44, 0x08, 0x4c, //
    0xa2, 0xd2, 0xc8, 0xec, 0x4f, 0xcf, 0xae, 0x8a,
];

// Where the fields lie that errors point at.
const FLAGS_AT: u64 = 28;
const INDEX_OFFSET_AT: u64 = 32;
const INDEX_SIZE_AT: u64 = 40;
const VIRTUAL_SIZE_AT: u64 = 48;
const UUID_AT: u64 = 56;
const VERSION_AT: u64 = 132;

/// Whether `bytes` begin with the magic of an LSMT header or trailer. Too few bytes do not.
#[must_use]
pub fn has_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

flag_word! {
    /// The flag word. Unknown bits are kept and ignored: files of 2021 hold garbage there.
    Flags: u32
}

impl Flags {
    /// This record is a header; without it, a trailer.
    pub const HEADER: Self = Self(1);
    /// The file holds data; without it, it is the index file of a writable pair.
    pub const DATA_FILE: Self = Self(1 << 1);
    /// The layer is sealed.
    pub const SEALED: Self = Self(1 << 2);
    /// The layer is, or was before it was sealed, a sparse writable file.
    pub const SPARSE_WRITABLE: Self = Self(1 << 4);

    /// The flags in `bits`, unknown ones included.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// Whether the record is a header and not a trailer.
    #[must_use]
    pub const fn is_header(self) -> bool {
        self.has(Self::HEADER)
    }

    /// Whether the file holds data and not the log of a writable pair.
    #[must_use]
    pub const fn is_data_file(self) -> bool {
        self.has(Self::DATA_FILE)
    }

    /// Whether the record says "sealed". Only a trailer is to be believed.
    #[must_use]
    pub const fn is_sealed(self) -> bool {
        self.has(Self::SEALED)
    }

    /// Whether the file is addressed by LBA instead of by index.
    #[must_use]
    pub const fn is_sparse_writable(self) -> bool {
        self.has(Self::SPARSE_WRITABLE)
    }
}

/// A UUID as the 37 bytes that a header holds: text and a NUL. Informational; never checked for
/// shape, because the reference does not check it either.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct UuidText([u8; Self::BYTES]);

impl UuidText {
    /// Bytes of the field, the closing NUL included.
    pub const BYTES: usize = 37;

    /// The text for "none".
    pub const NIL: Self = Self(*b"00000000-0000-0000-0000-000000000000\0");

    /// The field as it lies on disk.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// The field for `text`, or `None` unless it has the canonical shape (8-4-4-4-12 hexadecimal
    /// digits). Written in upper case, as the reference does.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        let shaped = digits.len() == Self::BYTES - 1
            && digits.iter().enumerate().all(|(at, byte)| match at {
                8 | 13 | 18 | 23 => *byte == b'-',
                _ => byte.is_ascii_hexdigit(),
            });
        if !shaped {
            return None;
        }
        let mut field = [0; Self::BYTES];
        for (to, from) in field.iter_mut().zip(digits) {
            *to = from.to_ascii_uppercase();
        }
        Some(Self(field))
    }

    /// The bytes as they lie on disk.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Whether the field names no UUID: all zero digits, or empty.
    #[must_use]
    pub fn is_nil(&self) -> bool {
        self.text().iter().all(|byte| matches!(byte, b'0' | b'-'))
    }

    /// The bytes before the first NUL.
    fn text(&self) -> &[u8] {
        self.0.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

impl Default for UuidText {
    fn default() -> Self {
        Self::NIL
    }
}

impl fmt::Display for UuidText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.text().escape_ascii())
    }
}

impl fmt::Debug for UuidText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UuidText({self})")
    }
}

/// A header or a trailer; [`Flags::is_header`] says which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the field `size` says, 390. Readers ignore it.
    pub struct_bytes: u32,
    /// What kind of record in what kind of file.
    pub flags: Flags,
    /// Where the index begins. Zero in the header of a data file, 4096 in that of an index file.
    pub index_offset_bytes: u64,
    /// Entries in the index, padding included. Only a trailer carries it.
    pub index_entries: u64,
    /// Size of the virtual disk.
    pub virtual_size_bytes: u64,
    /// The layer's UUID.
    pub uuid: UuidText,
    /// The UUID of the layer below; nil when there is none.
    pub parent_uuid: UuidText,
    /// Bytes 130 and 131: levels in old files, zero in new ones. Ignored.
    pub reserved: [u8; 2],
    /// Format version.
    pub version: u8,
    /// Format sub-version. Ignored.
    pub sub_version: u8,
    /// Free text; not closed by a NUL when it fills the field.
    pub user_tag: [u8; USER_TAG_BYTES],
}

impl Header {
    /// A record of our version without an index.
    #[must_use]
    pub fn new(flags: Flags, virtual_size_bytes: u64, uuid: UuidText, parent: UuidText) -> Self {
        Self {
            struct_bytes: 390,
            flags,
            index_offset_bytes: 0,
            index_entries: 0,
            virtual_size_bytes,
            uuid,
            parent_uuid: parent,
            reserved: [0; 2],
            version: VERSION,
            sub_version: SUB_VERSION,
            user_tag: [0; USER_TAG_BYTES],
        }
    }

    /// The record at the front of `bytes`, which lie at `at_byte` of their file.
    ///
    /// # Errors
    /// `InvalidFormat` when the magic is not there, `Corrupt` when the bytes end too early,
    /// `Unsupported` when the version is newer than ours.
    pub fn parse(bytes: &[u8], at_byte: u64) -> Result<Self> {
        if !has_magic(bytes) {
            return Err(Error::field(
                ErrorKind::InvalidFormat,
                "lsmt header: magic",
                at_byte,
                describe_magic(bytes),
                "\"LSMT\" and its UUID",
            ));
        }
        let Some(header) = Self::parse_fields(bytes) else {
            return Err(Error::corrupt(
                "lsmt header: length",
                at_byte,
                format_args!("{} bytes", bytes.len()),
                format_args!("{HEADER_STRUCT_BYTES} bytes"),
            ));
        };
        if header.version > VERSION {
            return Err(Error::field(
                ErrorKind::Unsupported,
                "lsmt header: version",
                at_byte.saturating_add(VERSION_AT),
                header.version,
                format_args!("at most {VERSION}"),
            ));
        }
        Ok(header)
    }

    /// [`Header::parse`] for the end of a file that already proved to be LSMT.
    ///
    /// # Errors
    /// As [`Header::parse`], but a missing magic is `Corrupt`: the file was cut, or never sealed.
    pub fn parse_trailer(bytes: &[u8], at_byte: u64) -> Result<Self> {
        if has_magic(bytes) {
            return Self::parse(bytes, at_byte);
        }
        Err(Error::corrupt(
            "lsmt trailer: magic",
            at_byte,
            describe_magic(bytes),
            "\"LSMT\" and its UUID (was the layer cut short, or never sealed?)",
        ))
    }

    fn parse_fields(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields { rest: bytes };
        let _magic: [u8; MAGIC.len()] = fields.take()?;
        Some(Self {
            struct_bytes: fields.take_u32()?,
            flags: Flags(fields.take_u32()?),
            index_offset_bytes: fields.take_u64()?,
            index_entries: fields.take_u64()?,
            virtual_size_bytes: fields.take_u64()?,
            uuid: UuidText(fields.take()?),
            parent_uuid: UuidText(fields.take()?),
            reserved: fields.take()?,
            version: fields.take_u8()?,
            sub_version: fields.take_u8()?,
            user_tag: fields.take()?,
        })
    }

    /// The record as it lies on disk: [`HEADER_BYTES`] bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SPACE);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&self.struct_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.flags.0.to_le_bytes());
        bytes.extend_from_slice(&self.index_offset_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.index_entries.to_le_bytes());
        bytes.extend_from_slice(&self.virtual_size_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.uuid.0);
        bytes.extend_from_slice(&self.parent_uuid.0);
        bytes.extend_from_slice(&self.reserved);
        bytes.extend_from_slice(&[self.version, self.sub_version]);
        bytes.extend_from_slice(&self.user_tag);
        debug_assert_eq!(bytes.len(), HEADER_STRUCT_BYTES);
        bytes.resize(SPACE, 0);
        bytes
    }

    /// The user tag before its first NUL.
    #[must_use]
    pub fn user_tag_text(&self) -> &[u8] {
        self.user_tag.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

/// [`HEADER_BYTES`] as a length in memory.
const SPACE: usize = 4096;
const _: () = assert!(to_u64(SPACE) == HEADER_BYTES);

fn describe_magic(bytes: &[u8]) -> String {
    let front = bytes.get(..bytes.len().min(8)).unwrap_or_default();
    format!("\"{}\"", front.escape_ascii())
}

/// Where the index of a sealed layer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedIndex {
    /// First byte of the index; data ends here. A multiple of 512, at least 4096.
    pub offset_bytes: u64,
    /// Entries, padding included. At most [`SEALED_INDEX_ENTRIES_MAX`].
    pub entries: u64,
    /// Size of the virtual disk. A multiple of 512; zero means "ask the layer below".
    pub virtual_size_bytes: u64,
}

impl SealedIndex {
    /// Bytes of the index.
    #[must_use]
    pub const fn index_bytes(&self) -> u64 {
        // At most a million entries: 16 MB.
        self.entries * to_u64(SegmentMapping::BYTES)
    }

    /// First sector of the file that is not data.
    #[must_use]
    pub const fn data_end_sector(&self) -> u64 {
        whole_sectors(self.offset_bytes)
    }
}

/// Where the index lies in a sealed layer of `file_bytes` with this `header` and `trailer`.
///
/// # Errors
/// `Corrupt` when header, trailer and file contradict each other; `Unsupported` when a number is
/// beyond our limits.
pub fn locate_sealed_index(
    header: &Header,
    trailer: &Header,
    file_bytes: u64,
) -> Result<SealedIndex> {
    let trailer_at = match file_bytes.checked_sub(HEADER_BYTES) {
        Some(at) if at >= HEADER_BYTES => at,
        _ => {
            return Err(Error::corrupt(
                "lsmt layer: file size",
                0,
                format_args!("{file_bytes} bytes"),
                format_args!("at least {} bytes, header and trailer", 2 * HEADER_BYTES),
            ));
        }
    };
    if !(header.flags.is_header() && header.flags.is_data_file()) {
        return Err(bad_flags("lsmt header", 0, header.flags, "a header (1) of a data file (2)"));
    }
    let flags = trailer.flags;
    if flags.is_header() || !flags.is_data_file() || !flags.is_sealed() {
        let expected = "a trailer (not 1) of a data file (2) that is sealed (4)";
        return Err(bad_flags("lsmt trailer", trailer_at, flags, expected));
    }
    check_index_bounds(trailer, trailer_at)?;
    check_virtual_size("lsmt trailer", trailer, trailer_at)?;
    Ok(SealedIndex {
        offset_bytes: trailer.index_offset_bytes,
        entries: trailer.index_entries,
        virtual_size_bytes: trailer.virtual_size_bytes,
    })
}

fn bad_flags(record: &str, at_byte: u64, found: Flags, expected: &str) -> Error {
    let at_byte = at_byte.saturating_add(FLAGS_AT);
    Error::corrupt(&format!("{record}: flags"), at_byte, found, expected)
}

/// The index lies between the header and the trailer, on a sector boundary, and fits.
fn check_index_bounds(trailer: &Header, trailer_at: u64) -> Result<()> {
    let offset = trailer.index_offset_bytes;
    if !(HEADER_BYTES..=trailer_at).contains(&offset) || bytes_to_sectors(offset).is_none() {
        return Err(Error::corrupt(
            "lsmt trailer: index_offset",
            trailer_at.saturating_add(INDEX_OFFSET_AT),
            offset,
            format_args!("a multiple of {SECTOR_SIZE} from {HEADER_BYTES} to {trailer_at}"),
        ));
    }
    let at_byte = trailer_at.saturating_add(INDEX_SIZE_AT);
    let room = (trailer_at - offset) / to_u64(SegmentMapping::BYTES);
    if trailer.index_entries > room {
        return Err(Error::corrupt(
            "lsmt trailer: index_size",
            at_byte,
            format_args!("{} entries", trailer.index_entries),
            format_args!("at most {room} entries between byte {offset} and the trailer"),
        ));
    }
    if trailer.index_entries > SEALED_INDEX_ENTRIES_MAX {
        return Err(Error::field(
            ErrorKind::Unsupported,
            "lsmt trailer: index_size",
            at_byte,
            format_args!("{} entries", trailer.index_entries),
            format_args!("at most {SEALED_INDEX_ENTRIES_MAX} entries"),
        ));
    }
    Ok(())
}

fn check_virtual_size(record: &str, header: &Header, at_byte: u64) -> Result<()> {
    let bytes = header.virtual_size_bytes;
    match bytes_to_sectors(bytes) {
        Some(sectors) if sectors <= VIRTUAL_SECTORS_MAX => Ok(()),
        _ => Err(Error::corrupt(
            &format!("{record}: virtual_size"),
            at_byte.saturating_add(VIRTUAL_SIZE_AT),
            bytes,
            format_args!("a multiple of {SECTOR_SIZE}, at most {VIRTUAL_SECTORS_MAX} sectors"),
        )),
    }
}

/// Changes the virtual size in a record, of which these are at least the first 512 bytes.
pub fn set_virtual_size(record: &mut [u8], bytes: u64) {
    let at = to_usize(VIRTUAL_SIZE_AT).unwrap_or(0);
    if let Some(field) = record.get_mut(at..).and_then(<[u8]>::first_chunk_mut::<8>) {
        *field = bytes.to_le_bytes();
    }
}

/// What the headers of a writable pair agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WritablePair {
    /// Size of the virtual disk. A multiple of 512; zero means "ask the layer below".
    pub virtual_size_bytes: u64,
    /// One sparse file addressed by LBA; without it, an append pair of data and log.
    pub sparse: bool,
    /// The layer's UUID.
    pub uuid: UuidText,
    /// The UUID of the layer below.
    pub parent_uuid: UuidText,
}

/// Whether the header of a data file and that of its index file make a writable pair.
///
/// The index file of a sparse layer stays empty, so `index` is `None` there and ignored if given.
/// The virtual size of an append pair is that of the index file: a resize that was cut off
/// between the two files has not happened yet.
///
/// # Errors
/// `Corrupt` when one is not what it has to be or the two do not belong together.
pub fn check_writable_pair(data: &Header, index: Option<&Header>) -> Result<WritablePair> {
    let flags = data.flags;
    if !flags.is_header() || !flags.is_data_file() || flags.is_sealed() {
        let expected = "a header (1) of a data file (2) that is not sealed (not 4)";
        return Err(bad_flags("lsmt writable data", 0, flags, expected));
    }
    let sparse = flags.is_sparse_writable();
    let sized = match index {
        _ if sparse => data,
        Some(index) => {
            check_index_file(data, index)?;
            index
        }
        None => {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "lsmt writable index: the file has no header, and the data file is not sparse",
            ));
        }
    };
    check_virtual_size("lsmt writable layer", sized, 0)?;
    Ok(WritablePair {
        virtual_size_bytes: sized.virtual_size_bytes,
        sparse,
        uuid: data.uuid,
        parent_uuid: data.parent_uuid,
    })
}

fn check_index_file(data: &Header, index: &Header) -> Result<()> {
    let flags = index.flags;
    if !flags.is_header() || flags.is_data_file() || flags.is_sealed() {
        let expected = "a header (1) of an index file (not 2) that is not sealed (not 4)";
        return Err(bad_flags("lsmt writable index", 0, flags, expected));
    }
    if index.index_offset_bytes != HEADER_BYTES {
        return Err(Error::corrupt(
            "lsmt writable index: index_offset",
            INDEX_OFFSET_AT,
            index.index_offset_bytes,
            HEADER_BYTES,
        ));
    }
    if index.uuid != data.uuid {
        return Err(Error::corrupt(
            "lsmt writable index: uuid",
            UUID_AT,
            index.uuid,
            format_args!("{}, that of the data file", data.uuid),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
