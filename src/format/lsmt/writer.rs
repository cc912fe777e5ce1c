//! A sealed layer from bytes in memory: for tests, benchmarks and fixtures. Pure.

use super::header::{Flags, HEADER_BYTES, Header, UuidText};
use super::index::encode_committed_index;
use super::segment::SegmentMapping;
use crate::units::{SECTOR_SIZE, to_u64, to_usize};

/// A layer as the reference's `commit` lays it out: header, `data` (whole sectors, the first at
/// sector 8), the index padded to a page, trailer. The segments are the caller's to get right.
#[must_use]
pub fn write_sealed(segments: &[SegmentMapping], data: &[u8], virtual_size_bytes: u64) -> Vec<u8> {
    let flags = Flags::DATA_FILE.with(Flags::SEALED);
    let header =
        Header::new(flags.with(Flags::HEADER), virtual_size_bytes, UuidText::NIL, UuidText::NIL);
    let index = encode_committed_index(segments);
    let sectors = to_u64(data.len()).div_ceil(SECTOR_SIZE);
    let index_offset_bytes = HEADER_BYTES + sectors * SECTOR_SIZE;
    let trailer = Header {
        flags,
        index_offset_bytes,
        index_entries: to_u64(index.len() / SegmentMapping::BYTES),
        ..header.clone()
    };
    let mut file = header.encode();
    file.extend_from_slice(data);
    file.resize(to_usize(index_offset_bytes).unwrap_or(0), 0);
    file.extend_from_slice(&index);
    file.extend_from_slice(&trailer.encode());
    file
}
