//! Writing zfiles: the two records around the blocks, and a whole zfile from bytes in memory (for
//! tests, benchmarks and fixtures). Pure, single-threaded.

use super::crc::{STRUCTURE_SEED, crc32c_raw};
use super::encoder::Encoder;
use super::header::{Algorithm, Flags, HEADER_BYTES, Header};
use crate::error::Result;
use crate::units::{to_u64, to_usize};

/// How to write a zfile. The default is what the reference's `commit -z` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// How to compress.
    pub algorithm: Algorithm,
    /// How hard to try: see [`Encoder::new`]. 0 is the reference's, whatever its options say.
    pub level: u8,
    /// Bytes of a block before compression.
    pub block_bytes: u32,
    /// Whether each block gets a checksum.
    pub block_crc: bool,
    /// Whether the header says what the trailer says (a file that could be rewritten) or not (one
    /// that was streamed).
    pub overwrite_header: bool,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Lz4,
            level: 0,
            block_bytes: 4096,
            block_crc: true,
            overwrite_header: true,
        }
    }
}

/// What is known of a zfile when its last block is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Where the jump table begins: the header and all records lie in front of it.
    pub index_offset_bytes: u64,
    /// Blocks, and entries of the jump table.
    pub block_count: u64,
    /// Bytes before compression.
    pub original_bytes: u64,
    /// The raw CRC-32C of the jump table.
    pub index_crc: u32,
}

/// The header and the trailer of a finished zfile.
#[must_use]
pub fn finished_records(options: &WriteOptions, totals: &Totals) -> [[u8; 512]; 2] {
    let trailer = Header {
        flags: Flags::DATA.with(Flags::SEALED).with(Flags::DIGEST),
        index_offset_bytes: totals.index_offset_bytes,
        block_count: totals.block_count,
        original_bytes: totals.original_bytes,
        index_crc: totals.index_crc,
        block_bytes: options.block_bytes,
        algorithm: options.algorithm,
        level: options.level,
        dict_bytes: 0,
        has_block_crc: options.block_crc,
    };
    let flags = Flags::HEADER.with(Flags::DATA).with(Flags::DIGEST);
    let header = if options.overwrite_header {
        Header { flags: flags.with(Flags::HEADER_OVERWRITTEN), ..trailer.clone() }
    } else {
        let unknown = Header { flags, ..trailer.clone() };
        Header { index_offset_bytes: 0, block_count: 0, original_bytes: 0, index_crc: 0, ..unknown }
    };
    [header.encode(), trailer.encode()]
}

/// `content` as a zfile.
///
/// # Errors
/// When the codec fails, which it does not for a destination of its own bound.
pub fn write(content: &[u8], options: &WriteOptions) -> Result<Vec<u8>> {
    let mut file = vec![0; to_usize(HEADER_BYTES).unwrap_or(0)];
    let mut table: Vec<u8> = Vec::new();
    let mut encoder = Encoder::new(options)?;
    let mut record = vec![0; encoder.record_bytes_max()];
    let block_bytes = to_usize(u64::from(options.block_bytes)).unwrap_or(1).max(1);
    for block in content.chunks(block_bytes) {
        let len = encoder.encode(block, &mut record)?;
        file.extend_from_slice(record.get(..len).unwrap_or_default());
        // Bounded by that of a block of 64 KiB.
        table.extend_from_slice(&u32::try_from(len).unwrap_or(0).to_le_bytes());
    }
    let totals = Totals {
        index_offset_bytes: to_u64(file.len()),
        block_count: to_u64(table.len() / 4),
        original_bytes: to_u64(content.len()),
        index_crc: crc32c_raw(STRUCTURE_SEED, &table),
    };
    let [header, trailer] = finished_records(options, &totals);
    if let Some(front) = file.first_chunk_mut() {
        *front = header;
    }
    file.extend_from_slice(&table);
    file.extend_from_slice(&trailer);
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::super::{Decoder, JumpTable, layout, needs_trailer};
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    /// Reads a whole zfile back through the format's own parts.
    fn read_back(file: &[u8]) -> Vec<u8> {
        let header = Header::parse(&file[..512], 0).unwrap();
        let at = file.len() - 512;
        let trailer = Header::parse(&file[at..], to_u64(at)).unwrap();
        let trailer = needs_trailer(&header).then_some(&trailer);
        let found = layout(&header, trailer, to_u64(file.len())).unwrap();
        let index = to_usize(found.index.start).unwrap()..to_usize(found.index.end).unwrap();
        let table = JumpTable::parse(&file[index], &found).unwrap();
        let mut decoder = Decoder::new(found.header.algorithm).unwrap();
        let mut content = Vec::new();
        for block in 0..table.block_count() {
            let range = table.compressed_range(block);
            let record = &file[to_usize(range.start).unwrap()..to_usize(range.end).unwrap()];
            let original = usize::try_from(table.block_original_bytes(block)).unwrap();
            let mut bytes = vec![0; original];
            decoder.decode(record, found.header.has_block_crc, &mut bytes).unwrap();
            if decoder.decodes_prefix() {
                let mut front = vec![0; original / 3 + 1];
                decoder
                    .decode_prefix(record, found.header.has_block_crc, &mut front, original)
                    .unwrap();
                assert!(bytes.starts_with(&front));
            }
            content.extend_from_slice(&bytes);
        }
        content
    }

    fn options() -> impl Strategy<Value = WriteOptions> {
        (any::<bool>(), 0_u32..5, any::<bool>(), any::<bool>()).prop_map(
            |(lz4, shift, block_crc, overwrite_header)| WriteOptions {
                level: 0,
                algorithm: if lz4 { Algorithm::Lz4 } else { Algorithm::Zstd },
                block_bytes: 4096 << shift,
                block_crc,
                overwrite_header,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn what_is_written_reads_back_for_every_option(
            options in options(),
            noise in any::<u64>(),
            len in 0_usize..300_000,
            compressible in any::<bool>(),
        ) {
            let mut state = noise | 1;
            let content: Vec<u8> = (0..len)
                .map(|i| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    if compressible && i % 64 > 3 { 7 } else { state.to_le_bytes()[3] }
                })
                .collect();
            prop_assert!(read_back(&write(&content, &options).unwrap()) == content);
        }

        #[test]
        fn a_flipped_bit_of_a_record_with_a_checksum_is_never_decoded(
            options in options(), at in any::<prop::sample::Index>(), bit in 0_u32..8,
        ) {
            let content: Vec<u8> = (0..4096_u32).map(|i| (i / 7).to_le_bytes()[0]).collect();
            let options = WriteOptions { block_crc: true, ..options };
            let file = write(&content, &options).unwrap();
            let trailer = Header::parse(&file[file.len() - 512..], 0).unwrap();
            let end = to_usize(trailer.index_offset_bytes).unwrap();
            let mut record = file[512..end].to_vec();
            record[at.index(end - 512)] ^= 1 << bit;
            let mut decoder = Decoder::new(options.algorithm).unwrap();
            let error = decoder.decode(&record, true, &mut vec![0; 4096]).unwrap_err();
            prop_assert_eq!(error.kind(), ErrorKind::Integrity);
        }

        #[test]
        fn any_record_decodes_or_fails(
            record in prop::collection::vec(any::<u8>(), 0..6000),
            lz4 in any::<bool>(),
            crc in any::<bool>(),
        ) {
            let algorithm = if lz4 { Algorithm::Lz4 } else { Algorithm::Zstd };
            let mut decoder = Decoder::new(algorithm).unwrap();
            let _ = decoder.decode(&record, crc, &mut vec![0; 4096]);
        }
    }

    #[test]
    fn incompressible_blocks_of_64_kib_grow_and_read_back() {
        // The reference cannot read these: its buffer ends at 64 KiB.
        let mut state = 88_172_645_463_325_252_u64;
        let content: Vec<u8> = (0..200_000)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[2]
            })
            .collect();
        for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
            let options = WriteOptions { algorithm, block_bytes: 65536, ..WriteOptions::default() };
            let file = write(&content, &options).unwrap();
            assert!(file.len() > content.len());
            assert!(read_back(&file) == content);
        }
    }
}
