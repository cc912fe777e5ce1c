//! One block to its record: compress, append the checksum.

use super::crc::{BLOCK_CRC_BYTES, BLOCK_SEED, crc32c_raw};
use super::frame::compressed_bytes_bound;
use super::header::Algorithm;
use super::writer::WriteOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::units::to_usize;
use std::fmt;

/// The reference compresses zstd blocks at this level whatever its options say.
const ZSTD_LEVEL_DEFAULT: i32 = 3;

/// Longest record that the reference's reader can take: it fetches compressed bytes into a buffer
/// of 64 KiB. Ours takes any.
pub const REFERENCE_RECORD_BYTES_MAX: usize = 65_536;

/// A thread's encoder. Its context is made once.
pub struct Encoder {
    codec: Codec,
    block_crc: bool,
    record_bytes_max: usize,
}

enum Codec {
    Lz4,
    /// The slower search of the same format, at this level.
    Lz4Thorough(i32),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Encoder {
    /// An encoder. The level is 0 for the reference's choice; 3 to 12 for lz4 (its thorough
    /// search), 1 to 22 for zstd.
    ///
    /// # Errors
    /// `Usage` for another level; when the codec gets no memory.
    pub fn new(options: &WriteOptions) -> Result<Self> {
        let level = i32::from(options.level);
        let refused = |expected: &str| {
            let message = format!("level {level}: expected 0 (the usual one) or {expected}");
            Err(Error::new(ErrorKind::Usage, message))
        };
        let codec = match (options.algorithm, level) {
            (Algorithm::Lz4, 0) => Codec::Lz4,
            (Algorithm::Lz4, 3..=12) => Codec::Lz4Thorough(level),
            (Algorithm::Lz4, _) => return refused("3 to 12 for lz4"),
            (Algorithm::Zstd, 0..=22) => {
                let level = if level == 0 { ZSTD_LEVEL_DEFAULT } else { level };
                let context = zstd::bulk::Compressor::new(level);
                Codec::Zstd(context.map_err(|error| Error::io("make a zstd context", &error))?)
            }
            (Algorithm::Zstd, _) => return refused("1 to 22 for zstd"),
        };
        let bound = to_usize(compressed_bytes_bound(options.algorithm, options.block_bytes));
        let record_bytes_max = bound.unwrap_or(0) + BLOCK_CRC_BYTES;
        Ok(Self { codec, block_crc: options.block_crc, record_bytes_max })
    }

    /// Room that [`Encoder::encode`] needs.
    #[must_use]
    pub fn record_bytes_max(&self) -> usize {
        self.record_bytes_max
    }

    /// Writes the record of `block` to the front of `dst` and returns its length.
    ///
    /// # Errors
    /// When the codec fails, which it does not with [`Encoder::record_bytes_max`] of room.
    #[inline]
    pub fn encode(&mut self, block: &[u8], dst: &mut [u8]) -> Result<usize> {
        let room = dst.len().saturating_sub(BLOCK_CRC_BYTES);
        let body = dst.get_mut(..room).unwrap_or_default();
        let len = match &mut self.codec {
            Codec::Lz4 => {
                let level = lzzzz::lz4::ACC_LEVEL_DEFAULT;
                lzzzz::lz4::compress(block, body, level).map_err(|error| failed(&error))?
            }
            Codec::Lz4Thorough(level) => {
                lzzzz::lz4_hc::compress(block, body, *level).map_err(|error| failed(&error))?
            }
            Codec::Zstd(context) => {
                context.compress_to_buffer(block, body).map_err(|error| failed(&error))?
            }
        };
        if !self.block_crc {
            return Ok(len);
        }
        let crc = crc32c_raw(BLOCK_SEED, dst.get(..len).unwrap_or_default());
        let end = len + BLOCK_CRC_BYTES;
        if let Some(field) = dst.get_mut(len..end) {
            field.copy_from_slice(&crc.to_le_bytes());
        }
        Ok(end)
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.codec {
            Codec::Lz4 | Codec::Lz4Thorough(_) => "Encoder(lz4)",
            Codec::Zstd(_) => "Encoder(zstd)",
        })
    }
}

#[cold]
fn failed(error: &dyn fmt::Display) -> Error {
    Error::new(ErrorKind::Io, format!("compress a block: {error}"))
}

#[cfg(test)]
mod tests {
    use super::super::Decoder;
    use super::*;

    #[test]
    fn every_level_decodes_to_the_block_and_others_are_refused() {
        let block: Vec<u8> = (0..4096_u32).map(|i| (i * i / 77).to_le_bytes()[0]).collect();
        for (algorithm, good) in [
            (Algorithm::Lz4, [0].iter().copied().chain(3..=12).collect::<Vec<u8>>()),
            (Algorithm::Zstd, (0..=22).collect()),
        ] {
            for level in 0..=30 {
                let options = WriteOptions { algorithm, level, ..WriteOptions::default() };
                let encoder = Encoder::new(&options);
                if !good.contains(&level) {
                    assert_eq!(encoder.unwrap_err().kind(), ErrorKind::Usage);
                    continue;
                }
                let mut encoder = encoder.unwrap();
                let mut record = vec![0; encoder.record_bytes_max()];
                let len = encoder.encode(&block, &mut record).unwrap();
                let mut decoded = vec![0; 4096];
                let mut decoder = Decoder::new(algorithm).unwrap();
                decoder.decode(&record[..len], true, &mut decoded).unwrap();
                assert!(decoded == block, "{algorithm:?} {level}");
            }
        }
    }
}
