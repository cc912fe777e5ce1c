//! What a tar wrapper may say.

use super::*;
use proptest::prelude::*;

const FILE_BYTES: u64 = 1 << 20;

/// A header of member type `kind` with `size` as its size field and a right checksum.
fn header(kind: u8, size: &[u8], magic: &[u8; 8]) -> [u8; 512] {
    let mut block = [0; 512];
    block[..16].copy_from_slice(b"overlaybd.commit");
    block[SIZE_AT..SIZE_AT + size.len()].copy_from_slice(size);
    block[TYPE_AT] = kind;
    block[MAGIC_AT..MAGIC_AT + 8].copy_from_slice(magic);
    with_checksum(block)
}

fn with_checksum(mut block: [u8; 512]) -> [u8; 512] {
    let sum = format!("{:>6o} \0", byte_sum(&block));
    block[CHECKSUM_AT..TYPE_AT].copy_from_slice(sum.as_bytes());
    block
}

fn member(size: &[u8]) -> [u8; 512] {
    header(b'0', size, MAGIC_USTAR)
}

/// A pax header and its records, filled up to whole blocks.
fn pax(kind: u8, records: &[u8]) -> Vec<u8> {
    let size = format!("{:>11o} ", records.len());
    let mut bytes = header(kind, size.as_bytes(), MAGIC_USTAR).to_vec();
    bytes.extend_from_slice(records);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// `overlaybd.pax` as the reference writes it, and the member behind it.
fn reference_head(payload_bytes: &str) -> Vec<u8> {
    let record = format!("{} size={payload_bytes}\n", payload_bytes.len() + 9);
    [pax(b'x', record.as_bytes()), member(b"          0 ").to_vec()].concat()
}

fn found(payload_offset_bytes: u64, payload_bytes: u64) -> Option<Wrapper> {
    Some(Wrapper { payload_offset_bytes, payload_bytes })
}

#[test]
fn the_wrapper_of_the_reference_gives_the_size_in_a_pax_record() {
    let head = reference_head("238592");
    assert_eq!(head.len(), 1536);
    assert_eq!(parse_wrapper(&head, FILE_BYTES).unwrap(), found(1536, 238_592));
}

#[test]
fn a_plain_header_gives_the_size_itself() {
    let binary = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0xa4, 0x08];
    let sizes: [&[u8]; 5] =
        [b"00000722010\0", b"     722010 ", b"000000722010", b"722010\0\0\0\0\0\0", &binary];
    for size in sizes {
        for magic in [MAGIC_USTAR, MAGIC_GNU] {
            for kind in [b'0', 0, b'7'] {
                let head = header(kind, size, magic);
                let wrapper = parse_wrapper(&head, FILE_BYTES).unwrap();
                assert_eq!(wrapper, found(512, 0o722010), "{}", size.escape_ascii());
            }
        }
    }
}

#[test]
fn pax_records_may_be_long_and_many() {
    let comment = format!("1018 comment={}\n", "c".repeat(1018 - 14));
    let records = [comment.as_bytes(), b"9 size=1\n", b"12 size=777\n", b"8 a=bc\n\n"].concat();
    assert_eq!(&records[1018..][..9], b"9 size=1\n");
    let head = [pax(b'g', b"11 size=55\n"), pax(b'x', &records), member(b"").to_vec()].concat();
    // The member's last size counts; a global one does not.
    let at = 1024 + 512 + 1536 + 512;
    assert_eq!(parse_wrapper(&head, FILE_BYTES).unwrap(), found(at, 777));
}

#[test]
fn a_pax_size_of_zero_leaves_it_to_the_header() {
    let head = [pax(b'x', b"9 size=0\n"), member(b"00000001000\0").to_vec()].concat();
    assert_eq!(parse_wrapper(&head, FILE_BYTES).unwrap(), found(1536, 512));
    // And one that is there overrules it.
    let head = [pax(b'x', b"9 size=5\n"), member(b"00000001000\0").to_vec()].concat();
    assert_eq!(parse_wrapper(&head, FILE_BYTES).unwrap(), found(1536, 5));
}

#[test]
fn bytes_that_are_no_tar_are_left_to_the_next_probe() {
    let mut bad_sum = member(b"00000001000\0");
    bad_sum[0] ^= 1;
    let mut no_sum = member(b"00000001000\0");
    no_sum[CHECKSUM_AT] = b'8';
    let old = header(b'0', b"00000001000\0", b"\0\0\0\0\0\0\0\0");
    let unfinished = header(b'x', b"         12 ", b"xxtar\0xx");
    let cases: [&[u8]; 6] = [b"", &[0; 511], &[0; 512], &bad_sum, &no_sum, &old];
    for head in cases {
        assert_eq!(parse_wrapper(head, FILE_BYTES).unwrap(), None);
    }
    assert_eq!(parse_wrapper(&unfinished, FILE_BYTES).unwrap(), None);
}

#[test]
fn a_sum_of_signed_bytes_is_a_checksum_too() {
    let mut block = member(b"00000001000\0");
    block[0] = 0xe4;
    block = with_checksum(block);
    assert!(parse_wrapper(&block, FILE_BYTES).unwrap().is_some(), "unsigned");
    let sum = format!("{:06o}\0 ", byte_sum(&block) - 256);
    block[CHECKSUM_AT..TYPE_AT].copy_from_slice(sum.as_bytes());
    assert!(parse_wrapper(&block, FILE_BYTES).unwrap().is_some(), "signed");
}

#[test]
fn the_payload_lies_inside_the_file() {
    let head = member(b"00000001000\0");
    assert_eq!(parse_wrapper(&head, 1024).unwrap(), found(512, 512));
    for (head, file_bytes) in [
        (head.to_vec(), 1023),
        (member(b"00000000000\0").to_vec(), 1024),
        (member(b"            ").to_vec(), 1024),
        (reference_head("18446744073709551615"), FILE_BYTES),
    ] {
        let error = parse_wrapper(&head, file_bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().starts_with("tar wrapper: payload size"), "{error}");
    }
}

#[test]
fn a_tar_that_contradicts_itself_is_refused_with_the_place_named() {
    let next = member(b"00000001000\0").to_vec();
    let mut bad_sum = next.clone();
    bad_sum[0] ^= 1;
    let behind = |records: &[u8]| [pax(b'x', records), next.clone()].concat();
    let corrupt = ErrorKind::Corrupt;
    let cases = [
        ("tar wrapper: size at byte 124", corrupt, member(b"00000000008\0").to_vec()),
        ("tar wrapper: size at byte 124", corrupt, member(b"1 1").to_vec()),
        ("tar wrapper: size at byte 124", corrupt, member(&[0xff; 12]).to_vec()),
        ("tar wrapper: pax record at byte 512", corrupt, behind(b"13 size=777\n")),
        ("tar wrapper: pax record at byte 512", corrupt, behind(b"11 size=777\n")),
        ("tar wrapper: pax record at byte 512", corrupt, behind(b"9 sizes7\n")),
        ("tar wrapper: pax record at byte 512", corrupt, behind(b"0 \n")),
        ("tar wrapper: pax record at byte 512", corrupt, behind(b"2 \n")),
        ("tar wrapper: pax record at byte 512", corrupt, behind(&[b'9'; 40])),
        ("tar wrapper: pax record at byte 521", corrupt, behind(b"9 size=7\n9 size7\n")),
        ("tar wrapper: pax size at byte 512", corrupt, behind(b"11 size=-7\n")),
        ("tar wrapper: pax size at byte 512", corrupt, behind(b"8 size=\n")),
        ("tar wrapper: magic at byte 1281", corrupt, behind(b"9 size=7\n")),
        (
            "tar wrapper: header checksum at byte 1172",
            ErrorKind::Integrity,
            [pax(b'x', b"9 size=7\n"), bad_sum].concat(),
        ),
        (
            "tar wrapper: member type at byte 156",
            ErrorKind::Unsupported,
            header(b'5', b"00000000000\0", MAGIC_USTAR).to_vec(),
        ),
        (
            "tar wrapper: member type at byte 156",
            ErrorKind::Unsupported,
            header(b'L', b"00000000000\0", MAGIC_GNU).to_vec(),
        ),
    ];
    for (place, kind, mut head) in cases {
        if place.contains("magic") {
            head[1024 + MAGIC_AT] = 0;
        }
        let error = parse_wrapper(&head, FILE_BYTES).unwrap_err();
        assert!(error.to_string().starts_with(place), "{error} is not about {place}");
        assert_eq!(error.kind(), kind, "{error}");
    }
}

#[test]
fn headers_end_within_the_head() {
    // 15 blocks of records and their header leave room for 16 more blocks; then there is none.
    let comment = |blocks: usize| {
        let length = blocks * 512;
        let body = "c".repeat(length - length.to_string().len() - 10);
        pax(b'x', format!("{length} comment={body}\n").as_bytes())
    };
    let size = member(b"00000001000\0").to_vec();
    let fits = [comment(15), comment(14), size.clone()].concat();
    assert_eq!(fits.len(), HEAD_BYTES);
    let wrapper = parse_wrapper(&fits, FILE_BYTES).unwrap();
    assert_eq!(wrapper, found(to_u64(HEAD_BYTES), 512));
    for longer in [[comment(15), comment(15), size.clone()].concat(), comment(40)] {
        let error = parse_wrapper(&longer, FILE_BYTES).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
    // The same shortage in a file that ends there is damage.
    let cut = &reference_head("238592")[..1024];
    let error = parse_wrapper(cut, 1024).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

proptest! {
    #[test]
    fn what_is_found_lies_inside_the_file(
        records in prop::collection::vec(any::<u8>(), 0..1100),
        size in prop::collection::vec(prop::sample::select(b"01234567 \x80\0".to_vec()), 12),
        file_bytes in 0..1_u64 << 40,
        kinds in prop::collection::vec(prop::sample::select(b"xg0L\0".to_vec()), 0..6),
    ) {
        let blocks = kinds.iter().flat_map(|kind| pax(*kind, &records));
        let head: Vec<u8> = blocks.chain(member(&size)).collect();
        if let Ok(Some(wrapper)) = parse_wrapper(&head, file_bytes) {
            prop_assert!(wrapper.payload_bytes > 0);
            prop_assert!(wrapper.payload_offset_bytes <= to_u64(HEAD_BYTES));
            prop_assert!(wrapper.payload_offset_bytes + wrapper.payload_bytes <= file_bytes);
        }
    }

    #[test]
    fn any_size_in_a_pax_record_is_read(bytes in 1..1_u64 << 62) {
        let record = format!(" size={bytes}\n");
        let mut length = record.len() + 1;
        length = record.len() + length.to_string().len();
        let head = [
            pax(b'x', format!("{length}{record}").as_bytes()),
            member(b"          0 ").to_vec(),
        ].concat();
        prop_assert_eq!(parse_wrapper(&head, u64::MAX).unwrap(), found(1536, bytes));
    }
}

#[test]
fn what_is_written_is_what_the_reference_writes_and_parses_to_the_payload() {
    for (case, payload_bytes) in [
        ("zfile-lz4-8k-tar-text/overlaybd.commit", 326_009),
        ("zf-odd-zstd-32k-tar/z.zfile", 80_275),
    ] {
        let path = format!("{}/tests/fixtures/golden/{case}", env!("CARGO_MANIFEST_DIR"));
        let file = std::fs::read(path).unwrap();
        let head = encode_head(payload_bytes);
        assert_eq!(to_u64(head.len()), WRITTEN_HEAD_BYTES);
        assert!(file.starts_with(&head), "{case}");
        let tail = encode_tail(payload_bytes);
        assert!(file.ends_with(&tail), "{case}");
        assert_eq!(to_u64(head.len() + tail.len()) + payload_bytes, to_u64(file.len()));
    }
    for payload_bytes in [1, 7, 99, 10_000_000, 999_999_999, u64::MAX / 2] {
        let found = parse_wrapper(&encode_head(payload_bytes), u64::MAX).unwrap().unwrap();
        assert_eq!(found, Wrapper { payload_offset_bytes: 1536, payload_bytes });
    }
    for payload_bytes in [0, 1, 511, 512, 513] {
        assert_eq!((encode_tail(payload_bytes).len() as u64 + payload_bytes) % 512, 0);
    }
}
