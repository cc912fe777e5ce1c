//! Prefetch traces: which bytes of which layer were read when an image was recorded.
//!
//! The file is a header of 24 bytes and records of 24 bytes, dumped from the reference's memory;
//! the gaps between fields hold whatever lay on its heap, and the checksum covers them. `prefetch`
//! parses a trace once at attach and reads what it names; `record` encodes one. A record is a
//! hint: it is checked for arithmetic here and against the layer's size where it is used.
//! `format-spec/trace.md` tells the format.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::TRACE_BYTES_MAX;
use crate::units::to_u64;

/// Bytes by which a trace is known, at its front.
pub const MAGIC_BYTES: usize = 4;

/// CRC-32 of "Container Image Trace Format", little-endian.
const MAGIC: [u8; MAGIC_BYTES] = 3_270_449_184_u32.to_le_bytes();

/// Bytes of the header and of each record.
const UNIT_BYTES: usize = 24;

const DATA_SIZE_AT: u64 = 8;
const CHECKSUM_AT: u64 = 16;

/// What was done to the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// A read; `R` on disk.
    Read,
    /// A write; `W` on disk. The reference's recorder has the letter but never records one.
    Write,
}

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// What was done.
    pub op: Op,
    /// The layer, counted from the lowest.
    pub layer_index: u32,
    /// Bytes accessed. Any number: the reference records reads of up to 4 MiB.
    pub bytes: u64,
    /// Where, in the layer's LSMT file: behind the tar wrapper, after decompression. The range's
    /// end is at most 2^63 - 1.
    pub offset_bytes: u64,
}

/// A recorded trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The accesses in the order they happened.
    pub records: Vec<Record>,
}

/// Whether `bytes` begin as a trace does. A file that does not may be a list of paths.
#[must_use]
pub fn has_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// The trace in `bytes`, a whole file.
///
/// # Errors
/// `InvalidFormat` without the magic, `Unsupported` beyond our size limit, `Integrity` when the
/// checksum does not match, `Corrupt` when sizes or records contradict themselves.
pub fn parse(bytes: &[u8]) -> Result<Trace> {
    if !has_magic(bytes) {
        let front = bytes.get(..bytes.len().min(MAGIC.len())).unwrap_or_default();
        return Err(Error::field(
            ErrorKind::InvalidFormat,
            "trace: magic",
            0,
            format_args!("\"{}\"", front.escape_ascii()),
            format_args!("\"{}\"", MAGIC.escape_ascii()),
        ));
    }
    if to_u64(bytes.len()) > TRACE_BYTES_MAX {
        return Err(Error::field(
            ErrorKind::Unsupported,
            "trace: length",
            0,
            format_args!("{} bytes", bytes.len()),
            format_args!("at most {TRACE_BYTES_MAX} bytes"),
        ));
    }
    let Some((header, data)) = bytes.split_first_chunk::<UNIT_BYTES>() else {
        let found = format!("{} bytes", bytes.len());
        return Err(Error::corrupt("trace: length", 0, found, "at least 24 bytes"));
    };
    check_header(header, data)?;
    let (units, rest) = data.as_chunks::<UNIT_BYTES>();
    if !rest.is_empty() {
        let found = format!("{} bytes", data.len());
        return Err(Error::corrupt("trace: data_size", DATA_SIZE_AT, found, "whole records"));
    }
    let mut records = Vec::with_capacity(units.len());
    for (index, unit) in (1..).zip(units) {
        records.push(parse_record(unit, to_u64(UNIT_BYTES) * index)?);
    }
    Ok(Trace { records })
}

/// The header's size and checksum match the records behind it.
fn check_header(header: &[u8; UNIT_BYTES], data: &[u8]) -> Result<()> {
    let [_, _, _, _, _, _, _, _, data_size @ .., c0, c1, c2, c3, _, _, _, _] = *header;
    let data_size = u64::from_le_bytes(data_size);
    if data_size != to_u64(data.len()) {
        return Err(Error::corrupt(
            "trace: data_size",
            DATA_SIZE_AT,
            data_size,
            format_args!("{}, the bytes behind the header", data.len()),
        ));
    }
    let stated = u32::from_le_bytes([c0, c1, c2, c3]);
    let computed = checksum(data);
    if stated != computed {
        return Err(Error::field(
            ErrorKind::Integrity,
            "trace: checksum",
            CHECKSUM_AT,
            format_args!("{stated:#010x}"),
            format_args!("{computed:#010x}, that of the records"),
        ));
    }
    Ok(())
}

fn parse_record(unit: &[u8; UNIT_BYTES], at_byte: u64) -> Result<Record> {
    let [letter, _, _, _, l0, l1, l2, l3, numbers @ ..] = *unit;
    let op = match letter {
        b'R' => Op::Read,
        b'W' => Op::Write,
        _ => {
            let found = format!("'{}'", letter.escape_ascii());
            return Err(Error::corrupt("trace record: op", at_byte, found, "'R' or 'W'"));
        }
    };
    let [b0, b1, b2, b3, b4, b5, b6, b7, offset @ ..] = numbers;
    let bytes = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
    let offset_bytes = u64::from_le_bytes(offset);
    match offset_bytes.checked_add(bytes) {
        // The reference's offset is signed: the sign bit must not be reached.
        Some(end) if i64::try_from(end).is_ok() => {}
        _ => {
            return Err(Error::corrupt(
                "trace record: range",
                at_byte,
                format_args!("{bytes} bytes from byte {offset_bytes}"),
                "an end below 2^63",
            ));
        }
    }
    let layer_index = u32::from_le_bytes([l0, l1, l2, l3]);
    Ok(Record { op, layer_index, bytes, offset_bytes })
}

/// The file for `trace`. Gaps between fields are zero.
#[must_use]
pub fn encode(trace: &Trace) -> Vec<u8> {
    let mut data = Vec::with_capacity(trace.records.len() * UNIT_BYTES);
    for record in &trace.records {
        let letter = match record.op {
            Op::Read => b'R',
            Op::Write => b'W',
        };
        data.extend_from_slice(&[letter, 0, 0, 0]);
        data.extend_from_slice(&record.layer_index.to_le_bytes());
        data.extend_from_slice(&record.bytes.to_le_bytes());
        data.extend_from_slice(&record.offset_bytes.to_le_bytes());
    }
    let mut bytes = Vec::with_capacity(UNIT_BYTES + data.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&to_u64(data.len()).to_le_bytes());
    bytes.extend_from_slice(&checksum(&data).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&data);
    bytes
}

/// CRC-32C with seed 0 and no inversion at either end, as the reference computes it.
fn checksum(data: &[u8]) -> u32 {
    !crc32c::crc32c_append(!0, data)
}

#[cfg(test)]
mod tests;
