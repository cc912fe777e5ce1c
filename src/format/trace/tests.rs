//! What a trace may say.

use super::*;
use proptest::prelude::*;

fn trace() -> Trace {
    let record = Record { op: Op::Read, layer_index: 2, bytes: 4 << 20, offset_bytes: 149_504 };
    let write = Record { op: Op::Write, layer_index: 0, bytes: 0, offset_bytes: 0 };
    Trace { records: vec![record, write] }
}

/// `encode(&trace())` with `bytes[at] = value` and the checksum made right again.
fn patched(at: usize, value: u8) -> Vec<u8> {
    let mut bytes = encode(&trace());
    bytes[at] = value;
    let sum = checksum(&bytes[24..]).to_le_bytes();
    bytes[16..20].copy_from_slice(&sum);
    bytes
}

#[test]
fn a_trace_is_units_of_24_bytes() {
    let bytes = encode(&trace());
    assert_eq!(bytes.len(), 72);
    assert_eq!(bytes[..16], *b"\x20\x18\xef\xc2\0\0\0\0\x30\0\0\0\0\0\0\0");
    assert_eq!(bytes[24..48], *b"R\0\0\0\x02\0\0\0\0\0\x40\0\0\0\0\0\0\x48\x02\0\0\0\0\0");
    assert_eq!(parse(&bytes).unwrap(), trace());
    assert_eq!(parse(&encode(&Trace::default())).unwrap(), Trace::default());
}

#[test]
fn the_checksum_covers_the_gaps_between_fields() {
    // The reference leaves garbage in the gaps; it has to be summed, not looked at.
    let bytes = patched(25, 0x56);
    assert_eq!(parse(&bytes).unwrap(), trace());
    let mut changed = bytes;
    changed[25] = 0x57;
    assert_eq!(parse(&changed).unwrap_err().kind(), ErrorKind::Integrity);
    // The gaps of the header are not.
    let mut bytes = encode(&trace());
    (bytes[4], bytes[20]) = (1, 1);
    assert_eq!(parse(&bytes).unwrap(), trace());
}

#[test]
fn the_checksum_is_crc_32c_without_inversions() {
    assert_eq!(checksum(&[]), 0);
    assert_eq!(checksum(&[0; 100]), 0, "seed 0 stays 0 over zeros");
    assert_eq!(checksum(b"123456789"), 0x58e3_fa20);
}

#[test]
fn a_list_of_paths_is_another_format() {
    for bytes in [&b""[..], b"/usr/bin/*\n", &encode(&trace())[..3]] {
        assert!(!has_magic(bytes));
        assert_eq!(parse(bytes).unwrap_err().kind(), ErrorKind::InvalidFormat);
    }
}

#[test]
fn a_trace_that_contradicts_itself_is_refused() {
    let whole = encode(&trace());
    let longer = [&whole[..], &[0; 24]].concat();
    let mut uneven = [&whole[..], &[0; 8]].concat();
    uneven[8] = 56;
    let sum = checksum(&uneven[24..]).to_le_bytes();
    uneven[16..20].copy_from_slice(&sum);
    let cases = [
        ("trace: length at byte 0", whole[..23].to_vec()),
        ("trace: data_size at byte 8", whole[..71].to_vec()),
        ("trace: data_size at byte 8", longer),
        ("trace: data_size at byte 8", uneven),
        ("trace record: op at byte 48", patched(48, b'X')),
        ("trace record: range at byte 24", patched(47, 0x80)),
        ("trace record: range at byte 24", patched(39, 0x80)),
    ];
    for (place, bytes) in cases {
        let error = parse(&bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().starts_with(place), "{error} is not about {place}");
    }
}

#[test]
fn a_range_ends_below_the_sign_bit() {
    let last = Record { op: Op::Read, layer_index: 0, bytes: 1, offset_bytes: (1 << 63) - 2 };
    let ok = Trace { records: vec![last] };
    assert_eq!(parse(&encode(&ok)).unwrap(), ok);
    let over = Trace { records: vec![Record { bytes: 2, ..last }] };
    assert_eq!(parse(&encode(&over)).unwrap_err().kind(), ErrorKind::Corrupt);
}

proptest! {
    #[test]
    fn a_trace_survives_a_round_trip(
        records in prop::collection::vec(
            (any::<bool>(), any::<u32>(), 0..1_u64 << 62, 0..1_u64 << 62), 0..20,
        )
    ) {
        let records = records.into_iter().map(|(read, layer_index, bytes, offset_bytes)| Record {
            op: if read { Op::Read } else { Op::Write }, layer_index, bytes, offset_bytes,
        });
        let trace = Trace { records: records.collect() };
        prop_assert_eq!(parse(&encode(&trace)).unwrap(), trace);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(
        units in prop::collection::vec(any::<[u8; 24]>(), 0..6), cut in 0..24_usize,
    ) {
        // A right header, so that the records are reached.
        let mut bytes = encode(&Trace::default());
        bytes.extend(units.iter().flatten());
        bytes.truncate((bytes.len() - cut).max(24));
        let size = to_u64(bytes.len() - 24).to_le_bytes();
        bytes[8..16].copy_from_slice(&size);
        let sum = checksum(&bytes[24..]).to_le_bytes();
        bytes[16..20].copy_from_slice(&sum);
        if let Ok(trace) = parse(&bytes) {
            prop_assert_eq!(trace.records.len(), units.len());
        }
    }
}
