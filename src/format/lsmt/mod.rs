//! LSMT: the log-structured layer file, header to trailer.
//!
//! ```text
//!   sealed layer      | header 4096 | data sectors ... | index 16 B each | trailer 4096 |
//!   writable append   | header 4096 | data sectors ... |     and beside it
//!                     | header 4096 | log of index entries ... |
//!   writable sparse   | header 4096 | the virtual disk itself, holes where nothing was written |
//! ```
//!
//! `image::open` reads the header and the trailer of each layer, asks `header` where the index
//! lies, reads those bytes and hands them to `index`; `commit` and the writable upper encode
//! with the same types. The answer is a list of [`SegmentMapping`]: which sectors of the
//! virtual disk lie where in this file. Nothing here reads a file, and nothing but the
//! encoding of one entry runs per request: parsing is on the attach path only.
//!
//! LSMT carries no checksum. What a flipped bit cannot be caught by is caught, where possible, by
//! contradiction: order, bounds, flags. `format-spec/lsmt.md` tells the format.

mod header;
mod index;
mod log;
mod segment;
mod writer;

pub use header::{
    DATA_START_SECTOR, Flags, HEADER_BYTES, HEADER_STRUCT_BYTES, Header, SUB_VERSION, SealedIndex,
    USER_TAG_BYTES, UuidText, VERSION, WritablePair, check_writable_pair, has_magic,
    locate_sealed_index, set_virtual_size,
};
pub use index::{
    check_log_entries, check_segment, encode_committed_index, encode_index, encode_sealed_index,
    parse_sealed_index, parse_writable_log, segments_of_sparse_file,
};
pub use log::{
    LOG_SECTOR_ENTRIES, LogOwner, LogScan, LogScanner, MarkKind, batch_bytes, encode_batch,
};
pub use segment::SegmentMapping;
pub use writer::write_sealed;

/// Takes fixed-size fields from the front of a byte slice, so that offsets are sums of sizes.
struct Fields<'a> {
    rest: &'a [u8],
}

impl Fields<'_> {
    /// The next `N` bytes, or `None` when the slice ends before.
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*field)
    }

    /// The next little-endian `u64`.
    fn take_u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// The next little-endian `u32`.
    fn take_u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    /// The next byte.
    fn take_u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }
}
