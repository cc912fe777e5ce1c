//! The vectors of `format-spec/vectors/` that the zfile page shows, decoded and held against the
//! fields written beside them and against the files of the golden set that they were cut from.

// The helpers of a test may panic as the test itself may.
#![allow(clippy::expect_used)]

mod common;

use common::golden::{Golden, hex as to_hex};
use common::vectors::{fields, hex, len, number, part};
use obd_ublk::error::ErrorKind;
use obd_ublk::format::zfile::{
    Algorithm, BLOCK_CRC_BYTES, BLOCK_SEED, Decoder, Flags, HEADER_BYTES, Header, JumpTable,
    Layout, STRUCTURE_SEED, WriteOptions, crc32c_raw, has_magic, layout, needs_trailer, write,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A record's fields; `size` and `digest`, which no reader keeps, are taken from the bytes.
fn header_json(header: &Header, record: &[u8]) -> Value {
    let word = |at: usize| u32::from_le_bytes(*record[at..].first_chunk().expect("four bytes"));
    json!({
        "size": word(24),
        "digest": word(28),
        "flags": header.flags.bits(),
        "index_offset": header.index_offset_bytes,
        "index_size": header.block_count,
        "original_file_size": header.original_bytes,
        "index_crc": header.index_crc,
        "block_size": header.block_bytes,
        "algo": match header.algorithm {
            Algorithm::Lz4 => 1,
            Algorithm::Zstd => 2,
        },
        "level": header.level,
        "dict_size": header.dict_bytes,
        "verify": u8::from(header.has_block_crc),
    })
}

/// Parses a record that the reference wrote and checks that we would write the same bytes.
fn record(bytes: &[u8], at_byte: u64, expected: &Value) -> Header {
    let header = Header::parse(bytes, at_byte).expect("a record");
    assert_eq!(&header_json(&header, bytes), expected);
    assert_eq!(header.encode(), bytes[..512], "we write what the reference wrote");
    header
}

/// Decodes a record, whole and with each byte flipped, and returns the content.
fn content(record: &[u8], algorithm: Algorithm, original_bytes: u64) -> Vec<u8> {
    let mut decoder = Decoder::new(algorithm).expect("a decoder");
    let mut dst = vec![0xa5; usize::try_from(original_bytes).expect("a length in memory")];
    for at in 0..record.len() {
        let mut bad = record.to_vec();
        bad[at] ^= 0x10;
        let error = decoder.decode(&bad, true, &mut dst).expect_err("a flipped bit");
        assert_eq!(error.kind(), ErrorKind::Integrity, "byte {at}");
    }
    decoder.decode(record, true, &mut dst).expect("a good record");
    dst
}

fn algorithm(value: &Value) -> Algorithm {
    if number(value) == 1 { Algorithm::Lz4 } else { Algorithm::Zstd }
}

#[test]
fn every_vector_lies_in_the_golden_set_where_it_says() {
    let golden = Golden::load();
    for name in [
        "zfile-header-overwritten",
        "zfile-streamed",
        "zfile-jump-table",
        "zfile-lz4-record",
        "zfile-zstd-record",
    ] {
        let (bytes, fields) = (hex(name), fields(name));
        let file = fields["golden"].as_str().expect("a file of the set");
        let file = std::fs::read(golden.root().join(file)).expect("read the file");
        let found = part(&file, number(&fields["golden_at_byte"]), len(&bytes));
        assert!(found == bytes, "{name} is cut from the file");
    }
}

#[test]
fn an_overwritten_header_decodes_to_its_fields_and_back() {
    let name = "zfile-header-overwritten";
    let (bytes, fields) = (hex(name), fields(name));
    assert_eq!(len(&bytes), HEADER_BYTES);
    let header = record(&bytes, 0, &fields["header"]);
    assert!(!needs_trailer(&header));
    let payload_bytes = number(&fields["payload_bytes"]);
    let found = layout(&header, None, payload_bytes).expect("a layout");
    let start = number(&fields["header"]["index_offset"]);
    let end = start + 4 * number(&fields["header"]["index_size"]);
    assert_eq!(found.index, start..end);
    assert_eq!(end, payload_bytes - HEADER_BYTES, "nothing between jump table and trailer");
    assert_eq!(json!(header.flags.bits() & !0b01101 | 0b00100), fields["trailer_flags"]);
}

#[test]
fn a_streamed_zfile_decodes_to_its_fields_and_back() {
    let name = "zfile-streamed";
    let (bytes, fields) = (hex(name), fields(name));
    assert_eq!(json!(bytes.len()), fields["payload_bytes"]);
    let trailer_at = len(&bytes) - HEADER_BYTES;
    let header = record(&bytes, 0, &fields["header"]);
    assert!(needs_trailer(&header));
    let trailer = record(part(&bytes, trailer_at, 512), trailer_at, &fields["trailer"]);
    let found = layout(&header, Some(&trailer), len(&bytes)).expect("a layout");
    let index_bytes = found.index.end - found.index.start;
    let table = JumpTable::parse(part(&bytes, found.index.start, index_bytes), &found);
    let table = table.expect("a jump table");
    let mut whole = Vec::new();
    let mut lengths = Vec::new();
    for block in 0..table.block_count() {
        let range = table.compressed_range(block);
        lengths.push(range.end - range.start);
        let record = part(&bytes, range.start, range.end - range.start);
        let original_bytes = u64::from(table.block_original_bytes(block));
        whole.extend(content(record, Algorithm::Zstd, original_bytes));
    }
    assert_eq!(json!(lengths), fields["lengths"]);
    assert!(whole == vec![0; 262_149], "zeros throughout");
    let options = WriteOptions {
        level: 0,
        algorithm: Algorithm::Zstd,
        block_bytes: 65536,
        block_crc: true,
        overwrite_header: false,
    };
    let ours = write(&whole, &options).expect("a zfile");
    assert_eq!(ours[..512], bytes[..512], "the header knows nothing but the options");
}

#[test]
fn a_jump_table_decodes_to_its_ranges() {
    let (bytes, fields) = (hex("zfile-jump-table"), fields("zfile-jump-table"));
    let authoritative = &fields["authoritative"];
    let field = |name: &str| number(&authoritative[name]);
    let header = Header {
        flags: Flags::from_bits(field("flags")),
        index_offset_bytes: field("index_offset"),
        block_count: field("index_size"),
        original_bytes: field("original_file_size"),
        index_crc: crc32c_raw(STRUCTURE_SEED, &bytes),
        block_bytes: u32::try_from(field("block_size")).expect("32 bits"),
        algorithm: algorithm(&authoritative["algo"]),
        level: 0,
        dict_bytes: 0,
        has_block_crc: field("verify") == 1,
    };
    // The digest in the fields vouches for every one of them, the checksum of the table included.
    assert_eq!(header_json(&header, &header.encode()), *authoritative);
    let found = layout(&header, None, number(&fields["payload_bytes"])).expect("a layout");
    let table = JumpTable::parse(&bytes, &found).expect("a jump table");
    let ranges: Vec<_> = (0..table.block_count())
        .map(|block| table.compressed_range(block))
        .map(|range| json!([range.start, range.end]))
        .collect();
    assert_eq!(json!(ranges), fields["ranges"]);
    let shifted = Layout { index: found.index.start + 1..found.index.end + 1, ..found };
    let error = JumpTable::parse(&bytes, &shifted).expect_err("a gap of one byte");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn an_lz4_and_a_zstd_record_decode_to_their_content() {
    for name in ["zfile-lz4-record", "zfile-zstd-record"] {
        let (bytes, fields) = (hex(name), fields(name));
        let (body, stored) = bytes.split_last_chunk::<BLOCK_CRC_BYTES>().expect("a checksum");
        assert_eq!(json!(u32::from_le_bytes(*stored)), fields["checksum"], "{name}");
        assert_eq!(json!(crc32c_raw(BLOCK_SEED, body)), fields["checksum"], "{name}");
        let original_bytes = number(&fields["original_bytes"]);
        let content = content(&bytes, algorithm(&fields["algo"]), original_bytes);
        assert_eq!(json!(to_hex(&Sha256::digest(&content))), fields["content_sha256"], "{name}");
    }
}

#[test]
fn the_record_of_4096_zeros_is_always_the_same_30_bytes() {
    let bytes = hex("zfile-lz4-record");
    assert_eq!(bytes.len(), 30);
    let zeros = vec![0; 3 * 4096];
    let file = write(&zeros, &WriteOptions::default()).expect("a zfile");
    for block in 0..3 {
        assert_eq!(file[512 + block * 30..][..30], bytes, "block {block}");
    }
}

#[test]
fn an_old_header_decodes_to_its_fields_without_its_garbage() {
    let (bytes, fields) = (hex("zfile-header-old"), fields("zfile-header-old"));
    assert!(has_magic(&bytes));
    let raw = u64::from_le_bytes(*bytes[32..].first_chunk().expect("eight bytes"));
    assert_eq!(json!(raw), fields["raw_flags"]);
    let header = Header::parse(&bytes, 0).expect("a header without a digest");
    assert_eq!(header_json(&header, &bytes), fields["header"]);
    assert!(needs_trailer(&header));
    // The same garbage under bit 4 is a wrong digest.
    let mut promised = bytes.clone();
    promised[32] |= 1 << 4;
    let error = Header::parse(&promised, 0).expect_err("a digest of garbage");
    assert_eq!(error.kind(), ErrorKind::Integrity);
}
