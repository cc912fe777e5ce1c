//! What a header says, and what header, trailer and file must agree on.

use super::*;
use proptest::prelude::*;

const FILE_BYTES: u64 = 12288;

fn sealed_header() -> Header {
    let flags = Flags::HEADER.with(Flags::DATA_FILE).with(Flags::SEALED);
    Header::new(flags, 1 << 20, UuidText::NIL, UuidText::NIL)
}

/// The trailer of a layer of [`FILE_BYTES`] bytes with an index of one block at byte 4096.
fn trailer() -> Header {
    Header {
        index_offset_bytes: 4096,
        index_entries: 256,
        ..Header::new(Flags::DATA_FILE.with(Flags::SEALED), 1 << 20, UuidText::NIL, UuidText::NIL)
    }
}

#[test]
fn a_header_is_390_bytes_of_fields_in_a_block_of_4096() {
    let mut header = sealed_header();
    header.user_tag = [b'z'; USER_TAG_BYTES];
    let bytes = header.encode();
    assert_eq!(bytes.len(), 4096);
    assert_eq!(bytes[389], b'z');
    assert!(bytes[390..].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[24..32], [0x86, 1, 0, 0, 7, 0, 0, 0], "size 390, flags 7");
    assert_eq!(bytes[130..134], [0, 0, 1, 1], "reserved, version, sub-version");
    assert_eq!(Header::parse(&bytes, 0).unwrap(), header);
}

#[test]
fn only_the_390_bytes_are_needed_and_not_one_less() {
    let bytes = sealed_header().encode();
    assert!(Header::parse(&bytes[..390], 0).is_ok());
    let error = Header::parse(&bytes[..389], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn bytes_without_the_magic_are_another_format() {
    let mut bytes = sealed_header().encode();
    bytes[23] ^= 1;
    assert!(!has_magic(&bytes));
    assert!(!has_magic(b"LSMT\0\x01\x02\0"), "half a magic");
    let error = Header::parse(&bytes, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFormat);
    // At the end of a layer the same bytes mean damage.
    let error = Header::parse_trailer(&bytes, 8192).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().starts_with("lsmt trailer: magic at byte 8192: found"), "{error}");
}

#[test]
fn a_newer_version_is_refused_and_an_older_is_read() {
    for (version, kind) in [(0, None), (1, None), (2, Some(ErrorKind::Unsupported))] {
        let bytes = Header { version, sub_version: 9, ..sealed_header() }.encode();
        let found = Header::parse(&bytes, 0).err().map(|error| error.kind());
        assert_eq!(found, kind, "version {version}");
    }
}

#[test]
fn unknown_flags_are_kept_and_change_nothing() {
    let flags = Flags::from_bits(0xdead_bee8 | 0b111);
    let header = Header { flags, ..sealed_header() };
    let parsed = Header::parse(&header.encode(), 0).unwrap();
    assert_eq!(parsed.flags.bits(), 0xdead_beef);
    let trailer = Header { flags: Flags::from_bits(0xffff_ffee), ..trailer() };
    assert!(locate_sealed_index(&parsed, &trailer, FILE_BYTES).is_ok());
}

#[test]
fn the_trailer_says_where_the_index_lies() {
    // The header's own numbers are those of the day it was created and must not matter.
    let header = Header { virtual_size_bytes: 512, index_entries: u64::MAX, ..sealed_header() };
    let index = locate_sealed_index(&header, &trailer(), FILE_BYTES).unwrap();
    let expected = SealedIndex { offset_bytes: 4096, entries: 256, virtual_size_bytes: 1 << 20 };
    assert_eq!(index, expected);
    assert_eq!((index.index_bytes(), index.data_end_sector()), (4096, 8));
}

#[test]
fn a_layer_sealed_in_place_keeps_an_unsealed_header() {
    let header = Header { flags: Flags::HEADER.with(Flags::DATA_FILE), ..sealed_header() };
    assert!(locate_sealed_index(&header, &trailer(), FILE_BYTES).is_ok());
    let sparse = Flags::SPARSE_WRITABLE;
    let header = Header { flags: header.flags.with(sparse), ..header };
    let trailer = Header { flags: trailer().flags.with(sparse), ..trailer() };
    assert!(locate_sealed_index(&header, &trailer, FILE_BYTES).is_ok(), "nor is sparse an error");
}

#[test]
fn a_layer_without_data_ends_in_index_and_trailer() {
    let empty = Header { index_entries: 0, ..trailer() };
    let index = locate_sealed_index(&sealed_header(), &empty, 8192).unwrap();
    assert_eq!(index.index_bytes(), 0);
}

#[test]
fn a_layer_that_contradicts_itself_is_refused_with_the_field_named() {
    type Change = fn(&mut Header, &mut Header, &mut u64);
    let cases: [(&str, Change); 14] = [
        ("lsmt layer: file size at byte 0", |_, _, bytes| *bytes = 8191),
        ("lsmt layer: file size at byte 0", |_, _, bytes| *bytes = 0),
        ("lsmt header: flags at byte 28", |h, _, _| h.flags = Flags::DATA_FILE),
        ("lsmt header: flags at byte 28", |h, _, _| h.flags = Flags::HEADER),
        ("lsmt trailer: flags at byte 8220", |_, t, _| t.flags = Flags::from_bits(7)),
        ("lsmt trailer: flags at byte 8220", |_, t, _| t.flags = Flags::SEALED),
        ("lsmt trailer: flags at byte 8220", |_, t, _| t.flags = Flags::DATA_FILE),
        ("lsmt trailer: index_offset at byte 8224", |_, t, _| t.index_offset_bytes = 3584),
        ("lsmt trailer: index_offset at byte 8224", |_, t, _| t.index_offset_bytes = 4097),
        ("lsmt trailer: index_offset at byte 8224", |_, t, _| t.index_offset_bytes = 8704),
        ("lsmt trailer: index_size at byte 8232", |_, t, _| t.index_entries = 257),
        ("lsmt trailer: index_size at byte 8232", |_, t, _| t.index_entries = 1 << 60),
        ("lsmt trailer: virtual_size at byte 8240", |_, t, _| t.virtual_size_bytes = 513),
        ("lsmt trailer: virtual_size at byte 8240", |_, t, _| {
            t.virtual_size_bytes = (1 << 59) + 512;
        }),
    ];
    for (place, change) in cases {
        let (mut header, mut trailer, mut bytes) = (sealed_header(), trailer(), FILE_BYTES);
        change(&mut header, &mut trailer, &mut bytes);
        let error = locate_sealed_index(&header, &trailer, bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().starts_with(place), "{error} is not about {place}");
    }
}

#[test]
fn an_index_beyond_a_million_entries_is_not_supported() {
    let trailer = |entries| Header { index_entries: entries, ..trailer() };
    let bytes = 4096 + 16 * 1_000_001 + 4096;
    assert!(locate_sealed_index(&sealed_header(), &trailer(1_000_000), bytes).is_ok());
    let error = locate_sealed_index(&sealed_header(), &trailer(1_000_001), bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

fn data_header(flags: Flags) -> Header {
    let uuid = UuidText::from_text("7ef467d0-0b38-4f86-8c31-d139e5583409").unwrap();
    Header::new(Flags::HEADER.with(Flags::DATA_FILE).with(flags), 1 << 20, uuid, UuidText::NIL)
}

fn index_header() -> Header {
    Header { flags: Flags::HEADER, index_offset_bytes: 4096, ..data_header(Flags::default()) }
}

#[test]
fn an_append_pair_takes_its_virtual_size_from_the_index_file() {
    let index = Header { virtual_size_bytes: 2 << 20, ..index_header() };
    let pair = check_writable_pair(&data_header(Flags::default()), Some(&index)).unwrap();
    assert_eq!((pair.virtual_size_bytes, pair.sparse), (2 << 20, false));
    assert_eq!(pair.uuid.to_string(), "7EF467D0-0B38-4F86-8C31-D139E5583409");
    assert!(pair.parent_uuid.is_nil());
}

#[test]
fn a_virtual_size_is_changed_and_nothing_else() {
    let mut bytes = index_header().encode();
    set_virtual_size(&mut bytes[..512], 3 << 20);
    let changed = Header { virtual_size_bytes: 3 << 20, ..index_header() };
    assert_eq!(bytes, changed.encode());
}

#[test]
fn a_sparse_layer_needs_no_index_file() {
    let data = data_header(Flags::SPARSE_WRITABLE);
    let pair = check_writable_pair(&data, None).unwrap();
    assert_eq!((pair.virtual_size_bytes, pair.sparse), (1 << 20, true));
}

#[test]
fn files_that_are_no_writable_pair_are_refused() {
    let data = data_header(Flags::default());
    let other = UuidText::from_text("00000000-0000-0000-0000-000000000001").unwrap();
    let cases = [
        ("sealed data", data_header(Flags::SEALED), Some(index_header())),
        ("a trailer", Header { flags: Flags::DATA_FILE, ..data.clone() }, Some(index_header())),
        ("two index files", index_header(), Some(index_header())),
        ("two data files", data.clone(), Some(data.clone())),
        ("no index header", data.clone(), None),
        (
            "a sealed index",
            data.clone(),
            Some(Header { flags: Flags::HEADER.with(Flags::SEALED), ..index_header() }),
        ),
        ("a moved log", data.clone(), Some(Header { index_offset_bytes: 8192, ..index_header() })),
        ("another's index", data.clone(), Some(Header { uuid: other, ..index_header() })),
        ("odd size", data, Some(Header { virtual_size_bytes: 1, ..index_header() })),
    ];
    for (name, data, index) in cases {
        let error = check_writable_pair(&data, index.as_ref()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
    }
}

#[test]
fn a_uuid_has_one_shape_and_prints_without_its_nul() {
    for text in [
        "",
        "7ef467d0",
        "7ef467d0-0b38-4f86-8c31-d139e558340x",
        "7ef467d00b38-4f86-8c31-d139e55834090",
    ] {
        assert_eq!(UuidText::from_text(text), None, "{text}");
    }
    assert!(UuidText::NIL.is_nil());
    assert!(UuidText::from_bytes([0; 37]).is_nil());
    assert_eq!(UuidText::from_bytes([b'\n'; 37]).to_string(), "\\n".repeat(37));
}

proptest! {
    #[test]
    fn any_390_bytes_with_the_magic_survive_a_round_trip(
        tail in prop::collection::vec(any::<u8>(), 366),
    ) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(&tail);
        bytes[132] &= 1;
        let header = Header::parse(&bytes, 0).unwrap();
        prop_assert_eq!(&header.encode()[..390], &bytes[..]);
    }

    #[test]
    fn an_accepted_index_lies_inside_its_file(
        offset in prop_oneof![0..20_000_u64, any::<u64>()],
        entries in prop_oneof![0..2000_u64, any::<u64>()],
        size in any::<u64>(),
        file_bytes in prop_oneof![0..20_000_u64, any::<u64>()],
    ) {
        let trailer = Header {
            index_offset_bytes: offset,
            index_entries: entries,
            virtual_size_bytes: size & !511,
            ..trailer()
        };
        if let Ok(index) = locate_sealed_index(&sealed_header(), &trailer, file_bytes) {
            prop_assert!(index.offset_bytes >= 4096);
            prop_assert!(index.offset_bytes + index.index_bytes() + 4096 <= file_bytes);
            prop_assert!(index.virtual_size_bytes <= 1 << 59);
        }
    }
}
