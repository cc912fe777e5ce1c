//! One compressed block: check its CRC, decode it.

use super::crc::{BLOCK_CRC_BYTES, BLOCK_SEED, crc32c_raw};
use super::header::Algorithm;
use crate::error::{Error, ErrorKind, Result};
use std::fmt;

/// The longest that `block_bytes` can become: the codecs' own documented bounds.
#[must_use]
pub const fn compressed_bytes_bound(algorithm: Algorithm, block_bytes: u32) -> u64 {
    let bytes = block_bytes as u64;
    match algorithm {
        // LZ4_COMPRESSBOUND.
        Algorithm::Lz4 => bytes + bytes / 255 + 16,
        // ZSTD_COMPRESSBOUND, whose second term vanishes from 128 KiB on.
        Algorithm::Zstd => bytes + (bytes >> 8) + ((128 << 10) - bytes) / 2048,
    }
}

/// The record of a 4 KiB block of zeros as every lz4 writer makes it, its checksum included: nine
/// of ten blocks of a typical base layer, because the reference's commit keeps zeros as data.
const ZERO_BLOCK_LZ4: [u8; 30] = [
    0x1f, 0x00, 0x01, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xff, 0xff, 0xff, 0xf6, 0x50, 0x00, 0x00, 0x00, 0x00, 0x00, 0x24, 0x17, 0x91, 0xb4,
];

/// Bytes of that block.
const ZERO_BLOCK_BYTES: usize = 4096;

/// A thread's decoder of one algorithm. Its context is made once; decoding allocates nothing.
pub struct Decoder(Codec);

enum Codec {
    Lz4,
    Zstd(zstd::bulk::Decompressor<'static>),
}

impl Decoder {
    /// A decoder with its context.
    ///
    /// # Errors
    /// When the codec gets no memory.
    pub fn new(algorithm: Algorithm) -> Result<Self> {
        Ok(Self(match algorithm {
            Algorithm::Lz4 => Codec::Lz4,
            Algorithm::Zstd => {
                let context = zstd::bulk::Decompressor::new();
                Codec::Zstd(context.map_err(|error| Error::io("make a zstd context", &error))?)
            }
        }))
    }

    /// Whether the front of a block can be decoded for less than the whole.
    #[must_use]
    pub const fn decodes_prefix(&self) -> bool {
        matches!(self.0, Codec::Lz4)
    }

    /// Checks the record's CRC (its last 4 bytes, with `has_crc`) and decodes it to exactly
    /// `dst.len()` bytes.
    ///
    /// # Errors
    /// `Integrity` when the CRC does not match, `Corrupt` when it does not decode to that length.
    /// The content of `dst` is then unspecified.
    #[inline]
    pub fn decode(&mut self, record: &[u8], has_crc: bool, dst: &mut [u8]) -> Result<()> {
        if self.is_zero_block(record, has_crc, dst.len()) {
            dst.fill(0);
            return Ok(());
        }
        let body = checked_body(record, has_crc)?;
        let decoded = match &mut self.0 {
            Codec::Lz4 => lzzzz::lz4::decompress(body, dst).ok(),
            Codec::Zstd(context) => context.decompress_to_buffer(body, dst).ok(),
        };
        if decoded == Some(dst.len()) { Ok(()) } else { Err(undecodable(decoded, dst.len())) }
    }

    /// Comparing 30 bytes, the checksum among them, proves the answer.
    #[inline]
    fn is_zero_block(&self, record: &[u8], has_crc: bool, block_bytes: usize) -> bool {
        has_crc
            && block_bytes == ZERO_BLOCK_BYTES
            && record == ZERO_BLOCK_LZ4
            && matches!(self.0, Codec::Lz4)
    }

    /// As [`Decoder::decode`], for the first `dst.len()` of a block of `original_bytes`. The CRC
    /// still covers the whole record. zstd decodes whole blocks only: `Unsupported`.
    ///
    /// # Errors
    /// As [`Decoder::decode`].
    pub fn decode_prefix(
        &mut self,
        record: &[u8],
        has_crc: bool,
        dst: &mut [u8],
        original_bytes: usize,
    ) -> Result<()> {
        if !self.decodes_prefix() {
            let message = "decode the front of a zstd block";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let body = checked_body(record, has_crc)?;
        let wanted = dst.len().min(original_bytes);
        // The codec stops when `dst` is full: its length is both target and bound.
        let decoded = lzzzz::lz4::decompress_partial(body, dst, wanted).ok();
        if decoded == Some(dst.len()) { Ok(()) } else { Err(undecodable(decoded, dst.len())) }
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Codec::Lz4 => "Decoder(lz4)",
            Codec::Zstd(_) => "Decoder(zstd)",
        })
    }
}

/// The compressed body, once its checksum vouches for it.
#[inline]
fn checked_body(record: &[u8], has_crc: bool) -> Result<&[u8]> {
    if !has_crc {
        return Ok(record);
    }
    let Some((body, stored)) = record.split_last_chunk::<BLOCK_CRC_BYTES>() else {
        let expected = format_args!("a body and {BLOCK_CRC_BYTES} bytes of checksum");
        return Err(Error::corrupt("zfile block: record", 0, record.len(), expected));
    };
    let (stored, computed) = (u32::from_le_bytes(*stored), crc32c_raw(BLOCK_SEED, body));
    if stored == computed { Ok(body) } else { Err(wrong_checksum(computed, stored, body.len())) }
}

#[cold]
fn wrong_checksum(computed: u32, stored: u32, body_bytes: usize) -> Error {
    let message = format!(
        "zfile block: checksum of its {body_bytes} bytes: found {computed:#010x}, \
         expected {stored:#010x}"
    );
    Error::new(ErrorKind::Integrity, message)
}

#[cold]
fn undecodable(decoded: Option<usize>, expected: usize) -> Error {
    let found = decoded.map_or("no valid stream".to_owned(), |bytes| format!("{bytes} bytes"));
    let message = format!("zfile block: decodes to {found}, expected {expected} bytes");
    Error::new(ErrorKind::Corrupt, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_of_a_block_of_zeros_is_what_the_codec_makes_and_decodes() {
        let mut body = vec![0; 5000];
        let zeros = [0; ZERO_BLOCK_BYTES];
        let level = lzzzz::lz4::ACC_LEVEL_DEFAULT;
        let len = lzzzz::lz4::compress(&zeros, &mut body, level).unwrap();
        body.truncate(len);
        let crc = crc32c_raw(BLOCK_SEED, &body);
        body.extend_from_slice(&crc.to_le_bytes());
        assert_eq!(body, ZERO_BLOCK_LZ4);
        let mut block = [1; ZERO_BLOCK_BYTES];
        Decoder::new(Algorithm::Lz4).unwrap().decode(&ZERO_BLOCK_LZ4, true, &mut block).unwrap();
        assert_eq!(block, zeros);
    }

    #[test]
    fn the_record_of_zeros_means_nothing_for_another_size_or_codec() {
        for (algorithm, bytes) in [(Algorithm::Lz4, 8192), (Algorithm::Zstd, 4096)] {
            let mut decoder = Decoder::new(algorithm).unwrap();
            let decoded = decoder.decode(&ZERO_BLOCK_LZ4, true, &mut vec![0; bytes]);
            assert_eq!(decoded.unwrap_err().kind(), ErrorKind::Corrupt, "{algorithm:?} {bytes}");
        }
    }
}
