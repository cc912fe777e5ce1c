//! The tar wrapper that a layer blob may sit in.
//!
//! Registries and image tools expect a layer to be a tar; overlaybd hides its blob in one: a
//! single member whose bytes are the zfile or the LSMT file. `image::open` hands over the first
//! [`HEAD_BYTES`] of every blob and reads on behind the headers if this says so. Only the way to
//! the first member is parsed: its name is not looked at, what follows it is never read.
//!
//! Two forms are in use: a pax header with the size, then a ustar header that says 0 (what
//! current tools write); a plain ustar header (older images). `format-spec/tar.md` tells both.

use crate::error::{Error, ErrorKind, Result};
use crate::units::{to_u64, to_usize};

/// Bytes of a header and the unit to which everything is filled up.
const BLOCK_BYTES: usize = 512;

/// Bytes at the start of a blob within which the member's header has to end. The reference's
/// headers end at byte 1536; 16 KiB leaves room for the attributes other tools add.
pub const HEAD_BYTES: usize = 16 * 1024;

const MODE_AT: usize = 100;
const OWNER_AT: usize = 108;
const SIZE_AT: usize = 124;
const TIME_AT: usize = 136;
const CHECKSUM_AT: usize = 148;
const TYPE_AT: usize = 156;
const MAGIC_AT: usize = 257;
const OWNER_NAME_AT: usize = 265;
const GROUP_NAME_AT: usize = 297;

/// POSIX ustar: magic and version.
const MAGIC_USTAR: &[u8; 8] = b"ustar\x0000";

/// GNU tar: the same place, spelled differently. Its numbers may be binary.
const MAGIC_GNU: &[u8; 8] = b"ustar  \0";

/// Where the blob lies inside its wrapper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrapper {
    /// First byte of the payload. A multiple of 512, at most [`HEAD_BYTES`].
    pub payload_offset_bytes: u64,
    /// Bytes of the payload; never 0, and inside the file.
    pub payload_bytes: u64,
}

/// The wrapper around the blob whose first bytes are `head` and which has `file_bytes` bytes.
///
/// `head` is the whole file or at least [`HEAD_BYTES`] of it; more is ignored. `None` means that
/// this is no tar: the first block lacks the magic, or its checksum does not match.
///
/// # Errors
/// `Unsupported` when the first member is not a regular file or its headers do not end within
/// [`HEAD_BYTES`]; `Corrupt` when headers contradict themselves or the file; `Integrity` when the
/// checksum of a later header does not match.
pub fn parse_wrapper(head: &[u8], file_bytes: u64) -> Result<Option<Wrapper>> {
    let head = head.get(..HEAD_BYTES).unwrap_or(head);
    let Some(first) = head.first_chunk::<BLOCK_BYTES>() else { return Ok(None) };
    if !has_magic(first) || !has_valid_checksum(first) {
        return Ok(None);
    }
    let mut at = 0;
    let mut pax_size = None;
    // Each turn moves at least one block forward, so there are at most HEAD_BYTES / 512 of them.
    loop {
        let block = header_block(head, at, file_bytes)?;
        let size = header_size(block, at)?;
        at += BLOCK_BYTES;
        match block[TYPE_AT] {
            // What a global header says is a default for all members; the reference skips it, too.
            b'g' => {
                let records = pax_records(head, at, size, file_bytes)?;
                at += records.len().next_multiple_of(BLOCK_BYTES);
            }
            b'x' => {
                let records = pax_records(head, at, size, file_bytes)?;
                pax_size = parse_pax_size(records, at)?.or(pax_size);
                at += records.len().next_multiple_of(BLOCK_BYTES);
            }
            b'0' | 0 | b'7' => {
                // The reference goes by the header when the pax size is 0, and so do we.
                let bytes = pax_size.filter(|bytes| *bytes > 0).unwrap_or(size);
                return member(at, bytes, file_bytes).map(Some);
            }
            other => {
                return Err(Error::field(
                    ErrorKind::Unsupported,
                    "tar wrapper: member type",
                    to_u64(at - BLOCK_BYTES + TYPE_AT),
                    format_args!("'{}'", other.escape_ascii()),
                    "'0', a regular file",
                ));
            }
        }
    }
}

/// The payload of `bytes` bytes behind a header that ends at `at`.
fn member(at: usize, bytes: u64, file_bytes: u64) -> Result<Wrapper> {
    let offset = to_u64(at);
    let room = file_bytes.saturating_sub(offset);
    if bytes == 0 || bytes > room {
        return Err(Error::corrupt(
            "tar wrapper: payload size",
            to_u64(at - BLOCK_BYTES + SIZE_AT),
            format_args!("{bytes} bytes"),
            format_args!("1 to {room} bytes, the rest of the file"),
        ));
    }
    Ok(Wrapper { payload_offset_bytes: offset, payload_bytes: bytes })
}

/// The header at `at`, its magic and checksum verified.
fn header_block(head: &[u8], at: usize, file_bytes: u64) -> Result<&[u8; BLOCK_BYTES]> {
    let rest = head.get(at..).unwrap_or_default();
    let Some(block) = rest.first_chunk::<BLOCK_BYTES>() else {
        return Err(beyond_head("header", at, file_bytes));
    };
    if !has_magic(block) {
        let found = block[MAGIC_AT..MAGIC_AT + MAGIC_USTAR.len()].escape_ascii();
        let at_byte = to_u64(at + MAGIC_AT);
        return Err(Error::corrupt("tar wrapper: magic", at_byte, found, "ustar"));
    }
    if !has_valid_checksum(block) {
        return Err(Error::field(
            ErrorKind::Integrity,
            "tar wrapper: header checksum",
            to_u64(at + CHECKSUM_AT),
            block[CHECKSUM_AT..TYPE_AT].escape_ascii(),
            format_args!("octal {:o}, the sum of the header's bytes", byte_sum(block)),
        ));
    }
    Ok(block)
}

/// What `head` cannot show: the file ends there, or the headers are longer than we read.
fn beyond_head(what: &str, at: usize, file_bytes: u64) -> Error {
    let what = format!("tar wrapper: {what}");
    if file_bytes <= to_u64(HEAD_BYTES) {
        let found = format!("the end of the file, {file_bytes} bytes");
        return Error::corrupt(&what, to_u64(at), found, "all of it inside the file");
    }
    let expected = format!("all headers within {HEAD_BYTES} bytes");
    Error::field(ErrorKind::Unsupported, &what, to_u64(at), "more", expected)
}

fn has_magic(block: &[u8; BLOCK_BYTES]) -> bool {
    let found = &block[MAGIC_AT..MAGIC_AT + MAGIC_USTAR.len()];
    found == MAGIC_USTAR || found == MAGIC_GNU
}

/// Whether the stored checksum is the sum of the header's bytes, taken as unsigned (POSIX) or as
/// signed (historic tools) numbers. They differ only where a byte is above 127.
fn has_valid_checksum(block: &[u8; BLOCK_BYTES]) -> bool {
    let Some(stored) = parse_octal(&block[CHECKSUM_AT..TYPE_AT]) else { return false };
    let unsigned = byte_sum(block);
    let high_bytes = block.iter().filter(|byte| **byte > 127).count();
    let signed = unsigned.checked_sub(256 * to_u64(high_bytes));
    stored == unsigned || Some(stored) == signed
}

/// The sum of the header's bytes with blanks in place of the checksum.
fn byte_sum(block: &[u8; BLOCK_BYTES]) -> u64 {
    let around = block[..CHECKSUM_AT].iter().chain(&block[TYPE_AT..]);
    let blanks = to_u64(TYPE_AT - CHECKSUM_AT) * u64::from(b' ');
    around.map(|byte| u64::from(*byte)).sum::<u64>() + blanks
}

/// The number in the size field of the header at `at`.
fn header_size(block: &[u8; BLOCK_BYTES], at: usize) -> Result<u64> {
    let field = &block[SIZE_AT..SIZE_AT + 12];
    let size = match field {
        // GNU's binary form: a set top bit, then a big-endian number. Only 64 bits are of use.
        [0x80, 0, 0, 0, digits @ ..] => {
            Some(digits.iter().fold(0, |size, byte| size << 8 | u64::from(*byte)))
        }
        octal => parse_octal(octal),
    };
    size.ok_or_else(|| {
        let at_byte = to_u64(at + SIZE_AT);
        Error::corrupt("tar wrapper: size", at_byte, field.escape_ascii(), "an octal number")
    })
}

/// A number in octal digits between blanks or NULs; a blank field is 0. `None` for anything else.
fn parse_octal(field: &[u8]) -> Option<u64> {
    let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !is_blank(byte)).unwrap_or(field.len());
    let digits = field.get(start..)?;
    let end = digits.iter().position(is_blank).unwrap_or(digits.len());
    let (digits, rest) = digits.split_at(end);
    if !rest.iter().all(is_blank) {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// The `size` bytes of pax records at `at`.
fn pax_records(head: &[u8], at: usize, size: u64, file_bytes: u64) -> Result<&[u8]> {
    let end = to_usize(size).and_then(|size| at.checked_add(size));
    end.and_then(|end| head.get(at..end)).ok_or_else(|| beyond_head("pax records", at, file_bytes))
}

/// The value of the last `size` record, if there is one. Every record has to be well-formed:
/// `<length of the whole record> <key>=<value>\n`.
fn parse_pax_size(mut records: &[u8], at: usize) -> Result<Option<u64>> {
    let mut size = None;
    let mut at = at;
    while !records.is_empty() {
        let Some((record, key, value)) = split_pax_record(records) else {
            let shown = records.get(..records.len().min(32)).unwrap_or_default();
            return Err(Error::corrupt(
                "tar wrapper: pax record",
                to_u64(at),
                format_args!("\"{}\"", shown.escape_ascii()),
                "\"<length> <key>=<value>\\n\"",
            ));
        };
        if key == b"size" {
            let Some(bytes) = parse_decimal(value) else {
                let found = format!("\"{}\"", value.escape_ascii());
                let at_byte = to_u64(at);
                return Err(Error::corrupt("tar wrapper: pax size", at_byte, found, "a number"));
            };
            size = Some(bytes);
        }
        at += record;
        records = records.get(record..).unwrap_or_default();
    }
    Ok(size)
}

/// Length, key and value of the first record in `records`.
fn split_pax_record(records: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let blank = records.iter().position(|byte| *byte == b' ')?;
    let length = to_usize(parse_decimal(records.get(..blank)?)?)?;
    let (newline, body) = records.get(blank + 1..length)?.split_last()?;
    if *newline != b'\n' {
        return None;
    }
    let equals = body.iter().position(|byte| *byte == b'=')?;
    Some((length, body.get(..equals)?, body.get(equals + 1..)?))
}

/// A number in decimal digits, at least one.
fn parse_decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// Bytes in front of the payload of a wrapper that we write.
pub const WRITTEN_HEAD_BYTES: u64 = 1536;

/// The headers in front of a payload of `payload_bytes`, byte for byte those of the reference's
/// `commit -t`: the size is told by a pax header, as some payloads are too long for the other.
#[must_use]
pub fn encode_head(payload_bytes: u64) -> Vec<u8> {
    let mut record = String::new();
    // The length counts its own digits.
    for digits in 1..4 {
        let body = format!(" size={payload_bytes}\n");
        let length = body.len() + digits;
        record = format!("{length}{body}");
        if record.len() == length {
            break;
        }
    }
    let mut head = header(b"overlaybd.pax", b'x', None, to_u64(record.len()));
    head.extend_from_slice(record.as_bytes());
    head.resize(2 * BLOCK_BYTES, 0);
    head.extend_from_slice(&header(b"overlaybd.commit", b'0', Some("root"), 0));
    head
}

/// What follows a payload of `payload_bytes`: zeros up to a block, and two blocks of them.
#[must_use]
pub fn encode_tail(payload_bytes: u64) -> Vec<u8> {
    let used = to_usize(payload_bytes % to_u64(BLOCK_BYTES)).unwrap_or(0);
    vec![0; used.next_multiple_of(BLOCK_BYTES) - used + 2 * BLOCK_BYTES]
}

/// A header as the reference's library fills it in: numbers right-aligned between blanks.
fn header(name: &[u8], kind: u8, owner: Option<&str>, size: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(field) = block.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    put(0, name);
    put(SIZE_AT, format!("{size:11o} ").as_bytes());
    put(TYPE_AT, &[kind]);
    put(MAGIC_AT, MAGIC_USTAR);
    if let Some(owner) = owner {
        put(MODE_AT, b"100644 ");
        put(OWNER_AT, b"     0 \0     0 ");
        put(TIME_AT, b"          0 ");
        put(OWNER_NAME_AT, owner.as_bytes());
        put(GROUP_NAME_AT, owner.as_bytes());
    }
    let sum = block.first_chunk().map_or(0, byte_sum);
    let sum = format!("{sum:6o} \0");
    if let Some(field) = block.get_mut(CHECKSUM_AT..TYPE_AT) {
        field.copy_from_slice(sum.as_bytes());
    }
    block
}

#[cfg(test)]
mod tests;
