//! The vectors of `format-spec/vectors/` that the LSMT, tar and trace pages show, decoded and held
//! against the fields written beside them.

// The helpers of a test may panic as the test itself may.
#![allow(clippy::expect_used)]

mod common;

use common::vectors::{fields, hex, len, number, part};
use obd_ublk::error::ErrorKind;
use obd_ublk::format::lsmt::SegmentMapping;
use obd_ublk::format::lsmt::{
    HEADER_BYTES, Header, SealedIndex, check_writable_pair, locate_sealed_index,
};
use obd_ublk::format::lsmt::{
    encode_committed_index, encode_index, parse_sealed_index, parse_writable_log,
    segments_of_sparse_file,
};
use obd_ublk::format::{tar, trace};
use serde_json::{Value, json};

fn header_json(header: &Header) -> Value {
    json!({
        "size": header.struct_bytes,
        "flags": header.flags.bits(),
        "index_offset": header.index_offset_bytes,
        "index_size": header.index_entries,
        "virtual_size": header.virtual_size_bytes,
        "uuid": header.uuid.to_string(),
        "parent_uuid": header.parent_uuid.to_string(),
        "version": header.version,
        "sub_version": header.sub_version,
        "user_tag": header.user_tag_text().escape_ascii().to_string(),
    })
}

fn segments_json(segments: &[SegmentMapping]) -> Value {
    let one = |segment: &SegmentMapping| {
        json!({
            "start_sector": segment.start_sector,
            "sectors": segment.sectors,
            "mapped_sector": segment.mapped_sector,
            "zeroed": segment.zeroed,
        })
    };
    segments.iter().map(one).collect()
}

/// Decodes a whole sealed layer and holds it against its fields; gives back where its index lies
/// and what it says.
fn sealed_layer(name: &str) -> (Vec<u8>, SealedIndex, Vec<SegmentMapping>) {
    let (bytes, fields) = (hex(name), fields(name));
    assert_eq!(json!(bytes.len()), fields["file_bytes"]);
    let trailer_at = len(&bytes) - HEADER_BYTES;
    let header = Header::parse(&bytes, 0).expect("a header");
    let trailer_bytes = part(&bytes, trailer_at, HEADER_BYTES);
    let trailer = Header::parse_trailer(trailer_bytes, trailer_at).expect("a trailer");
    assert_eq!(header_json(&header), fields["header"]);
    assert_eq!(header_json(&trailer), fields["trailer"]);
    assert_eq!(trailer.encode(), trailer_bytes, "we write what the reference wrote");
    let index = locate_sealed_index(&header, &trailer, len(&bytes)).expect("an index");
    let segments = parse_sealed_index(
        part(&bytes, index.offset_bytes, index.index_bytes()),
        index.offset_bytes,
        index.data_end_sector(),
    )
    .expect("segments");
    assert_eq!(segments_json(&segments), fields["segments"]);
    (bytes, index, segments)
}

#[test]
fn a_layer_sealed_in_place_decodes_to_its_fields() {
    let (bytes, index, segments) = sealed_layer("lsmt-sealed-in-place");
    // The slots behind the counted entries are memory of the writer and must not be read.
    let counted = part(&bytes, index.offset_bytes, index.index_bytes());
    assert_eq!(encode_index(&segments), counted);
    let uncounted = part(&bytes, index.offset_bytes, len(&bytes) - 4096 - index.offset_bytes);
    let error = parse_sealed_index(uncounted, 4096, 8).expect_err("garbage");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn a_committed_layer_decodes_to_its_fields_and_back() {
    let (bytes, index, segments) = sealed_layer("lsmt-committed");
    let header = Header::parse(&bytes, 0).expect("a header").encode();
    let trailer = Header::parse(part(&bytes, index.offset_bytes + index.index_bytes(), 4096), 0);
    let trailer = trailer.expect("a trailer").encode();
    let rebuilt = [header, encode_committed_index(&segments), trailer].concat();
    assert!(rebuilt == bytes, "a layer without data is header, index and trailer");
}

#[test]
fn an_index_of_data_and_zeroed_segments_decodes_to_its_fields_and_back() {
    let (bytes, fields) = (hex("lsmt-index"), fields("lsmt-index"));
    let at_byte = number(&fields["at_byte"]);
    let segments = parse_sealed_index(&bytes, at_byte, at_byte / 512).expect("segments");
    assert_eq!(segments_json(&segments), fields["segments"]);
    assert_eq!(encode_index(&segments), bytes);
}

#[test]
fn an_append_pair_decodes_to_its_fields_and_back() {
    let (data, data_fields) = (hex("lsmt-writable-data"), fields("lsmt-writable-data"));
    let (index, index_fields) = (hex("lsmt-writable-index"), fields("lsmt-writable-index"));
    let data_header = Header::parse(&data, 0).expect("a data header");
    let index_header = Header::parse(&index, 0).expect("an index header");
    assert_eq!(header_json(&data_header), data_fields["header"]);
    assert_eq!(header_json(&index_header), index_fields["header"]);
    let pair = check_writable_pair(&data_header, Some(&index_header)).expect("a pair");
    assert_eq!((pair.sparse, pair.virtual_size_bytes), (false, 16 << 20));
    let data_end_sector = number(&data_fields["file_bytes"]) / 512;
    let log = parse_writable_log(&index[4096..], 4096, data_end_sector).expect("a log");
    assert_eq!(segments_json(&log), index_fields["log"]);
    let rebuilt = [index_header.encode(), encode_committed_index(&log)].concat();
    assert!(rebuilt == index, "group commit of 4096 bytes fills up like commit does");
}

#[test]
fn a_sparse_file_decodes_to_its_fields() {
    let (bytes, fields) = (hex("lsmt-sparse"), fields("lsmt-sparse"));
    let header = Header::parse(&bytes, 0).expect("a header");
    assert_eq!(header_json(&header), fields["header"]);
    let pair = check_writable_pair(&header, None).expect("a sparse layer");
    assert!(pair.sparse);
    let extents = fields["data_extents"].as_array().expect("extents");
    let extents: Vec<_> = extents.iter().map(|e| number(&e[0])..number(&e[1])).collect();
    let segments = segments_of_sparse_file(&extents, pair.virtual_size_bytes).expect("segments");
    assert_eq!(segments_json(&segments), fields["segments"]);
}

#[test]
fn a_tar_wrapper_decodes_to_its_fields() {
    for name in ["tar-pax", "tar-plain"] {
        let (bytes, fields) = (hex(name), fields(name));
        let wrapper = tar::parse_wrapper(&bytes, number(&fields["file_bytes"]));
        let wrapper = wrapper.expect("no contradiction").expect("a tar");
        assert_eq!(json!(wrapper.payload_offset_bytes), fields["payload_offset"], "{name}");
        assert_eq!(json!(wrapper.payload_bytes), fields["payload_bytes"], "{name}");
    }
}

#[test]
fn a_prefetch_trace_decodes_to_its_fields() {
    let (bytes, fields) = (hex("trace"), fields("trace"));
    let parsed = trace::parse(&bytes).expect("a trace");
    let records: Vec<_> = parsed
        .records
        .iter()
        .map(|record| {
            let op = if record.op == trace::Op::Read { "R" } else { "W" };
            json!([op, record.layer_index, record.bytes, record.offset_bytes])
        })
        .collect();
    assert_eq!(json!(records), fields["records"]);
    // Ours has no garbage in the gaps, hence another checksum, and says the same.
    let ours = trace::encode(&parsed);
    assert_ne!(ours, bytes);
    assert_eq!(trace::parse(&ours).expect("our own"), parsed);
}
