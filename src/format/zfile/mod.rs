//! zfile: any file, cut into blocks of equal size that are compressed one by one.
//!
//! ```text
//!   | header 512 | block 0 [CRC] | block 1 [CRC] | ... | jump table: u32 each | trailer 512 |
//! ```
//!
//! `image::payload` reads the header, asks [`needs_trailer`], takes the authoritative one to
//! [`layout`], and hands the jump table's bytes to [`JumpTableBuilder`] in pieces: attach path,
//! once per layer. [`JumpTable::compressed_range`] and [`Decoder::decode`] are the hot path: no
//! allocation, no I/O. `make` writes the records of an [`Encoder`] between
//! [`finished_records`]. `format-spec/zfile.md` tells the format.

mod crc;
mod encoder;
mod frame;
mod header;
mod jump_table;
mod writer;

pub use crc::{BLOCK_CRC_BYTES, BLOCK_SEED, STRUCTURE_SEED, crc32c_raw};
pub use encoder::{Encoder, REFERENCE_RECORD_BYTES_MAX};
pub use frame::{Decoder, compressed_bytes_bound};
pub use header::{
    Algorithm, Flags, HEADER_BYTES, Header, Layout, has_magic, layout, layout_of_believed,
    needs_trailer,
};
pub use jump_table::{JumpTable, JumpTableBuilder};
pub use writer::{Totals, WriteOptions, finished_records, write};
