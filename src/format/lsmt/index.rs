//! Lists of segment mappings: the index of a sealed layer, the log of a writable pair, and the
//! mapping that a sparse file implies.
//!
//! `image::open` hands over the bytes that [`super::header::locate_sealed_index`] pointed at, or
//! the tail of an index file, or the data extents of a sparse file, and gets checked segments for
//! `map`: whatever comes out of here lies inside the layer's data and inside 50 bits of sectors.
//! Memory is bounded by the input: 32 bytes for each 16 of index.
//!
//! A sealed index is sorted and free of overlap. A log is neither: later entries win, and it is
//! for `map` to replay them in order.

use std::ops::Range;

use super::header::{DATA_START_SECTOR, HEADER_BYTES};
use super::segment::SegmentMapping;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{INDEX_ENTRIES_MAX, VIRTUAL_SECTORS_MAX};
use crate::units::{SECTOR_SIZE, bytes_to_sectors, to_u64, whole_sectors};

/// Entries to whose multiple `commit` fills up an index: one 4096-byte block.
const COMMIT_GROUP_ENTRIES: usize = 256;

/// Entries to whose multiple an index is filled up when a layer is sealed in place: one sector.
const SEAL_GROUP_ENTRIES: usize = 32;

/// The segments in the index of a sealed layer; `bytes` lie at `at_byte` of the file, and its
/// data ends before sector `data_end_sector`.
///
/// Padding is skipped wherever it stands. An entry of length zero maps nothing and is dropped, but
/// only after the checks: an index page that was lost to zeros is an error, not an empty disk.
///
/// # Errors
/// `Corrupt`, with the entry's position, when entries are out of order, overlap, or point outside
/// the layer's data; when `bytes` are no whole entries.
pub fn parse_sealed_index(
    bytes: &[u8],
    at_byte: u64,
    data_end_sector: u64,
) -> Result<Vec<SegmentMapping>> {
    let (entries, rest) = bytes.as_chunks::<{ SegmentMapping::BYTES }>();
    if !rest.is_empty() {
        return Err(Error::corrupt(
            "lsmt index: length",
            at_byte,
            format_args!("{} bytes", bytes.len()),
            "whole entries of 16 bytes",
        ));
    }
    let mut segments = Vec::with_capacity(entries.len());
    let mut free_sector = 0;
    for (at, entry) in entry_positions(entries, at_byte) {
        let segment = SegmentMapping { tag: 0, ..SegmentMapping::decode_any(entry) };
        if segment.is_padding() {
            continue;
        }
        check_segment(&segment, at, data_end_sector)?;
        if segment.start_sector < free_sector {
            return Err(Error::corrupt(
                "lsmt index: entry order",
                at,
                format_args!("start sector {}", segment.start_sector),
                format_args!("at least {free_sector}, the end of the entry before"),
            ));
        }
        free_sector = segment.end_sector();
        if segment.sectors > 0 {
            segments.push(segment);
        }
    }
    Ok(segments)
}

/// The log of a writable append pair, or a stretch of it, in file order; later entries win. `bytes`
/// lie at `at_byte` of the index file, and the data file ends before sector `data_end_sector`.
///
/// A tail shorter than an entry is a torn append and ignored. Padding is skipped wherever it
/// stands (group commit fills up with it). Entries of length zero are skipped unchecked: a blank
/// slot is what a crash leaves where the file had grown before its bytes arrived.
///
/// # Errors
/// `Corrupt`, with the entry's position, when an entry points outside the data file;
/// `Unsupported` when the log has more entries than our limit.
pub fn parse_writable_log(
    bytes: &[u8],
    at_byte: u64,
    data_end_sector: u64,
) -> Result<Vec<SegmentMapping>> {
    let (entries, _torn) = bytes.as_chunks::<{ SegmentMapping::BYTES }>();
    check_log_entries(to_u64(entries.len()), at_byte)?;
    let mut segments = Vec::new();
    for (at, entry) in entry_positions(entries, at_byte) {
        if let Some(segment) = SegmentMapping::decode(entry) {
            check_segment(&segment, at, data_end_sector)?;
            segments.push(SegmentMapping { tag: 0, ..segment });
        }
    }
    Ok(segments)
}

/// Refuses a log, at `at_byte` of its file, of more entries than our limit: to be asked of the
/// file's length before any of it is read.
///
/// # Errors
/// `Unsupported`.
pub fn check_log_entries(entries: u64, at_byte: u64) -> Result<()> {
    if entries <= INDEX_ENTRIES_MAX {
        return Ok(());
    }
    Err(Error::field(
        ErrorKind::Unsupported,
        "lsmt log: length",
        at_byte,
        format_args!("{entries} entries"),
        format_args!("at most {INDEX_ENTRIES_MAX} entries"),
    ))
}

type Entry = [u8; SegmentMapping::BYTES];

/// Each entry with the byte of the file it lies at.
fn entry_positions(entries: &[Entry], at_byte: u64) -> impl Iterator<Item = (u64, &Entry)> {
    (0..).zip(entries).map(move |(index, entry)| {
        (at_byte.saturating_add(to_u64(SegmentMapping::BYTES) * index), entry)
    })
}

/// The segment lies inside what 50 bits can address and inside the file's data.
///
/// # Errors
/// `Corrupt` for the entry at `at_byte`.
pub fn check_segment(segment: &SegmentMapping, at_byte: u64, data_end_sector: u64) -> Result<()> {
    if segment.end_sector() > VIRTUAL_SECTORS_MAX {
        return Err(Error::corrupt(
            "lsmt index: segment end",
            at_byte,
            segment.end_sector(),
            format_args!("at most {VIRTUAL_SECTORS_MAX}"),
        ));
    }
    let (start, end) = (segment.mapped_sector, segment.mapped_end_sector());
    if start < DATA_START_SECTOR || end > data_end_sector {
        return Err(Error::corrupt(
            "lsmt index: mapped sectors",
            at_byte,
            format_args!("{start}..{end}"),
            format_args!("inside the data, {DATA_START_SECTOR}..{data_end_sector}"),
        ));
    }
    Ok(())
}

/// The segments of a sparse writable file, sorted: sector `n` of the virtual disk lies at sector
/// `n + 8` of the file, and what was never written is a hole.
///
/// `extents` are the file's data as `SEEK_DATA` and `SEEK_HOLE` tell it, in bytes. What lies in
/// front of byte 4096 is the header, what lies behind the virtual size is cut off. A sector that
/// is data in part is data: only whole sectors are ever written, the file system's granularity
/// is its own.
///
/// # Errors
/// `Corrupt` when the virtual size is impossible or the extents are empty, reversed, out of order
/// or overlap; `Unsupported` when they make more segments than our limit.
pub fn segments_of_sparse_file(
    extents: &[Range<u64>],
    virtual_size_bytes: u64,
) -> Result<Vec<SegmentMapping>> {
    let disk_sectors = bytes_to_sectors(virtual_size_bytes)
        .filter(|sectors| *sectors <= VIRTUAL_SECTORS_MAX)
        .ok_or_else(|| {
            let expected = format!("whole sectors, at most {VIRTUAL_SECTORS_MAX}");
            Error::corrupt("lsmt sparse file: virtual size", 48, virtual_size_bytes, expected)
        })?;
    let mut segments = Vec::new();
    let mut free_byte = 0;
    let mut free_sector = 0;
    for extent in extents {
        if extent.start < free_byte || extent.end <= extent.start {
            return Err(Error::corrupt(
                "lsmt sparse file: data extent",
                extent.start,
                format_args!("{extent:?}"),
                format_args!("not empty, and from byte {free_byte} on"),
            ));
        }
        free_byte = extent.end;
        let start_sector = whole_sectors(extent.start.saturating_sub(HEADER_BYTES));
        let end_sector = extent.end.saturating_sub(HEADER_BYTES).div_ceil(SECTOR_SIZE);
        let sectors = start_sector.max(free_sector)..end_sector.min(disk_sectors);
        free_sector = free_sector.max(sectors.end);
        push_split(&mut segments, sectors)?;
    }
    Ok(segments)
}

/// Appends `sectors` of a sparse file as segments of at most the length an entry can hold.
fn push_split(segments: &mut Vec<SegmentMapping>, sectors: Range<u64>) -> Result<()> {
    let mut start_sector = sectors.start;
    while start_sector < sectors.end {
        if to_u64(segments.len()) == INDEX_ENTRIES_MAX {
            return Err(Error::field(
                ErrorKind::Unsupported,
                "lsmt sparse file: segments",
                (start_sector + DATA_START_SECTOR).saturating_mul(SECTOR_SIZE),
                "more",
                format_args!("at most {INDEX_ENTRIES_MAX}"),
            ));
        }
        let length = (sectors.end - start_sector).min(SegmentMapping::SECTORS_MAX);
        segments.push(SegmentMapping {
            start_sector,
            sectors: length,
            mapped_sector: start_sector + DATA_START_SECTOR,
            zeroed: false,
            tag: 0,
        });
        start_sector += length;
    }
    Ok(())
}

/// The entries of `segments`, one behind the other, without padding: what is appended to a log.
#[must_use]
pub fn encode_index(segments: &[SegmentMapping]) -> Vec<u8> {
    encode_padded(segments, 1)
}

/// The index of a layer that `commit` writes: filled up with padding to whole 4096-byte blocks.
/// The trailer counts the padding.
#[must_use]
pub fn encode_committed_index(segments: &[SegmentMapping]) -> Vec<u8> {
    encode_padded(segments, COMMIT_GROUP_ENTRIES)
}

/// The index of a layer that is sealed in place: filled up with padding to whole sectors. The
/// trailer does not count the padding.
#[must_use]
pub fn encode_sealed_index(segments: &[SegmentMapping]) -> Vec<u8> {
    encode_padded(segments, SEAL_GROUP_ENTRIES)
}

fn encode_padded(segments: &[SegmentMapping], group_entries: usize) -> Vec<u8> {
    let entries = segments.len().next_multiple_of(group_entries);
    let mut bytes = Vec::with_capacity(entries * SegmentMapping::BYTES);
    for segment in segments {
        bytes.extend_from_slice(&segment.encode());
    }
    for _ in segments.len()..entries {
        bytes.extend_from_slice(&SegmentMapping::PADDING);
    }
    bytes
}

#[cfg(test)]
mod tests;
