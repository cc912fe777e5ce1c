//! Strategy: a small valid zfile whose jump table is replaced by the input. Invariant: a table
//! that parses has ranges that follow each other and lie before the table.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::zfile::{self, Algorithm, Header, JumpTable, WriteOptions};

fuzz_target!(|data: &[u8]| {
    let Some((&choice, table)) = data.split_first() else { return };
    let block_bytes = 4096_u32 << (choice % 5);
    let algorithm = if choice & 8 == 0 { Algorithm::Lz4 } else { Algorithm::Zstd };
    let blocks = (table.len() / 4) as u64;
    let block_crc = choice & 16 == 0;
    let options = WriteOptions { algorithm, block_bytes, block_crc, ..WriteOptions::default() };
    let Ok(file) = zfile::write(&[0; 1], &options) else { return };
    let Ok(mut header) = Header::parse(&file[..512], 0) else { return };
    header.block_count = blocks;
    header.original_bytes = blocks * u64::from(block_bytes);
    let sizes = table.chunks_exact(4).map(|b| u64::from(u32::from_le_bytes(b.try_into().unwrap())));
    let start = 512 + sizes.sum::<u64>();
    header.index_offset_bytes = start;
    header.flags = header.flags.without_digest();
    let layout = zfile::Layout { header, index: start..start + blocks * 4 };
    let Ok(parsed) = JumpTable::parse(table, &layout) else { return };
    let mut end = 512;
    for block in 0..parsed.block_count() {
        let range = parsed.compressed_range(block);
        assert_eq!(range.start, end);
        assert!(range.end - range.start <= u64::from(parsed.compressed_bytes_max()));
        end = range.end;
    }
    assert_eq!(end, start);
});
