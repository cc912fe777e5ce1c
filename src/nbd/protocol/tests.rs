//! Exact bytes for every word of the protocol, and hostile input for every parser.

use super::*;
use proptest::prelude::*;

const EXPORT: Export =
    Export { size_bytes: 0x0102_0304_0600, preferred_bytes: 0x1_0000, read_only: true };
const CLIENT: Client = Client { no_zeroes: true };
const OPTION_REPLY: &[u8] = b"\x00\x03\xe8\x89\x04\x55\x65\xa9";

fn option(code: u32, data: &[u8]) -> (Next, Vec<u8>) {
    let mut out = Vec::new();
    let header = OptionHeader { code, len_bytes: u32::try_from(data.len()).unwrap() };
    let next = answer_option(CLIENT, EXPORT, header, data, &mut out);
    (next, out)
}

/// An option reply: its magic, then `words` and `data`.
fn replied(code: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let words = [code, reply, len].map(u32::to_be_bytes).concat();
    [OPTION_REPLY, &words, data].concat()
}

/// The data of GO and INFO.
fn info(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&u16::try_from(wanted.len()).unwrap().to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

fn request(flags: u16, command: u16, offset_bytes: u64, len_bytes: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = b"\x25\x60\x95\x13".to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(b"cookie!!");
    bytes.extend_from_slice(&offset_bytes.to_be_bytes());
    bytes.extend_from_slice(&len_bytes.to_be_bytes());
    bytes.try_into().unwrap()
}

fn planned(flags: u16, command: u16, offset_bytes: u64, len_bytes: u32, size_bytes: u64) -> Plan {
    let request = parse_request(&request(flags, command, offset_bytes, len_bytes)).unwrap();
    assert_eq!(request.cookie.to_be_bytes(), *b"cookie!!");
    plan(&request, Export { size_bytes, preferred_bytes: 4096, read_only: true })
}

/// What is planned on a writable disk of 1 MiB.
fn planned_writable(flags: u16, command: u16, offset_bytes: u64, len_bytes: u32) -> Plan {
    let request = parse_request(&request(flags, command, offset_bytes, len_bytes)).unwrap();
    plan(&request, Export { size_bytes: 1 << 20, preferred_bytes: 4096, read_only: false })
}

#[test]
fn a_writable_export_says_what_it_can() {
    let export = Export { read_only: false, ..EXPORT };
    let mut out = Vec::new();
    let header = OptionHeader { code: 1, len_bytes: 0 };
    assert_eq!(answer_option(CLIENT, export, header, b"", &mut out), Next::Requests);
    // Has flags, flush, durable writes, trim, zeros, many connections.
    assert_eq!(out, b"\x00\x00\x01\x02\x03\x04\x06\x00\x01\x6d");
}

#[test]
fn changes_of_whole_sectors_are_planned_with_their_flags() {
    let write = |start_sector, len_bytes, durable| Plan::Write { start_sector, len_bytes, durable };
    let zeroes = |sectors, space, durable| Plan::Zeroes { sectors, space, durable };
    for (flags, command, offset, len, expected) in [
        (0, 1, 0, 512, write(0, 512, false)),
        (1, 1, 1024, 4096, write(2, 4096, true)),
        (0, 1, (1 << 20) - 512, 512, write(2047, 512, false)),
        (0, 1, 0, 1 << 20, write(0, 1 << 20, false)),
        (0, 4, 512, 1024, zeroes(1..3, Space::Free, false)),
        (1, 4, 512, 1024, zeroes(1..3, Space::Free, true)),
        (0, 6, 0, 1 << 20, zeroes(0..2048, Space::Free, false)),
        (2, 6, 0, 512, zeroes(0..1, Space::Keep, false)),
        (3, 6, 0, 512, zeroes(0..1, Space::Keep, true)),
        (0, 3, 0, 0, Plan::Flush),
        // Offered, so it may stand on any command.
        (1, 3, 0, 0, Plan::Flush),
        (0, 1, 1024, 0, Plan::Done),
        (0, 4, 1024, 0, Plan::Done),
        (0, 2, 0, 0, Plan::Disconnect),
    ] {
        let plan = planned_writable(flags, command, offset, len);
        assert_eq!(plan, expected, "command {command}, flags {flags}, {len} bytes at {offset}");
    }
    let read = planned_writable(1, 0, 1, 1);
    assert!(matches!(read, Plan::Read(span) if span.skip_bytes == 1), "{read:?}");
}

#[test]
fn changes_that_cannot_be_made_are_refused_and_take_their_payload_along() {
    for (flags, command, offset, len, errno) in [
        (0, 1, 1, 512, Errno::Invalid),
        (0, 1, 0, 513, Errno::Invalid),
        (0, 1, 511, 1, Errno::Invalid),
        (2, 1, 0, 512, Errno::Invalid),
        (0x10, 6, 0, 512, Errno::Invalid),
        (2, 4, 0, 512, Errno::Invalid),
        (0, 4, 0, 511, Errno::Invalid),
        (0, 6, 1, 512, Errno::Invalid),
        (0, 1, 1 << 20, 512, Errno::NoSpace),
        (0, 1, (1 << 20) - 512, 1024, Errno::NoSpace),
        (0, 1, u64::MAX - 511, 512, Errno::NoSpace),
        (0, 6, 0, (1 << 20) + 512, Errno::NoSpace),
        (0, 4, 0, (1 << 20) + 512, Errno::Invalid),
        (0, 4, u64::MAX - 511, 512, Errno::Invalid),
        (0, 5, 0, 512, Errno::Invalid),
        (2, 3, 0, 0, Errno::Invalid),
        (4, 0, 0, 512, Errno::Invalid),
    ] {
        let payload_bytes = if command == 1 { len } else { 0 };
        let plan = planned_writable(flags, command, offset, len);
        let expected = Plan::Refuse { errno, payload_bytes };
        assert_eq!(plan, expected, "command {command}, flags {flags}, {len} bytes at {offset}");
    }
    assert_eq!(planned_writable(0, 1, 0, (32 << 20) + 1), Plan::HangUp);
}

#[test]
fn the_greeting_is_fixed_newstyle_and_offers_no_zeroes() {
    assert_eq!(greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn a_client_may_choose_only_what_was_offered() {
    for (flags, no_zeroes) in [(0, false), (1, false), (2, true), (3, true)] {
        let client = parse_client_flags([0, 0, 0, flags]).unwrap();
        assert_eq!(client.no_zeroes, no_zeroes, "{flags}");
    }
    for flags in [[0, 0, 0, 4], [0x80, 0, 0, 3], [3, 0, 0, 0], [0xff; 4]] {
        let error = parse_client_flags(flags).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{flags:?}");
    }
}

#[test]
fn the_data_of_an_option_is_read_skipped_or_refused_by_its_length() {
    let parse = |len: u32| {
        let bytes = [&b"IHAVEOPT\x00\x00\x00\x07"[..], &len.to_be_bytes()].concat();
        parse_option_header(bytes.try_into().unwrap()).map(|(header, data)| {
            assert_eq!(header, OptionHeader { code: 7, len_bytes: len });
            data
        })
    };
    assert_eq!(parse(0).unwrap(), OptionData::Read(0));
    assert_eq!(parse(8192).unwrap(), OptionData::Read(8192));
    assert_eq!(parse(8193).unwrap(), OptionData::Skip(8193));
    assert_eq!(parse(32 << 20).unwrap(), OptionData::Skip(32 << 20));
    for len in [(32 << 20) + 1, u32::MAX] {
        assert_eq!(parse(len).unwrap_err().kind(), ErrorKind::InvalidFormat);
    }
    let error = parse_option_header(*b"IHAVEOPS\x00\x00\x00\x07\x00\x00\x00\x00").unwrap_err();
    assert!(error.to_string().contains("expected 0x49484156454f5054"), "{error}");
}

#[test]
fn the_oldest_option_gets_the_export_and_its_zeros_unless_declined() {
    let facts = b"\x00\x00\x01\x02\x03\x04\x06\x00\x01\x07";
    assert_eq!(option(1, b""), (Next::Requests, facts.to_vec()));
    let mut out = Vec::new();
    let header = OptionHeader { code: 1, len_bytes: 0 };
    let old = Client { no_zeroes: false };
    assert_eq!(answer_option(old, EXPORT, header, b"", &mut out), Next::Requests);
    assert_eq!(out, [&facts[..], &[0; 124]].concat());
    // It has no word for "no such export" but the end.
    assert_eq!(option(1, b"other"), (Next::Close, Vec::new()));
    let mut out = Vec::new();
    assert_eq!(option_too_big(header, &mut out), Next::Close);
    assert_eq!(out, b"");
}

#[test]
fn go_and_info_tell_the_export_and_block_sizes_to_who_asks() {
    let facts = b"\x00\x00\x00\x00\x01\x02\x03\x04\x06\x00\x01\x07";
    let sizes = b"\x00\x03\x00\x00\x02\x00\x00\x01\x00\x00\x02\x00\x00\x00";
    for (code, next) in [(7, Next::Requests), (6, Next::Option)] {
        let told = [replied(code, 3, facts), replied(code, 1, b"")].concat();
        // Name, description and what has no meaning yet are not told, and that is allowed.
        for wanted in [&[][..], &[0], &[1, 2], &[0x1234]] {
            assert_eq!(option(code, &info(b"", wanted)), (next, told.clone()), "{wanted:?}");
        }
        let told = [replied(code, 3, facts), replied(code, 3, sizes), replied(code, 1, b"")];
        for wanted in [&[3][..], &[3, 3], &[0, 1, 3]] {
            assert_eq!(option(code, &info(b"", wanted)), (next, told.concat()), "{wanted:?}");
        }
        let unknown = replied(code, 0x8000_0006, b"the only export has the empty name");
        assert_eq!(option(code, &info(b"x", &[3])), (Next::Option, unknown));
    }
}

#[test]
fn go_with_data_that_contradicts_itself_is_refused() {
    let invalid = replied(7, 0x8000_0003, b"the option's data contradicts itself");
    let good = info(b"name", &[0, 3]);
    let longer = [&good[..], b"\x00"].concat();
    let bad_name = [&b"\xff\xff\xff\xff"[..], &good[4..]].concat();
    let bad_count = [&b"\x00\x00\x00\x00\xff\xff"[..], b"\x00\x03"].concat();
    let cut = (0..good.len()).map(|len| good[..len].to_vec());
    for data in cut.chain([longer, bad_name, bad_count]) {
        assert_eq!(option(7, &data), (Next::Option, invalid.clone()), "{data:?}");
    }
}

#[test]
fn the_list_has_one_export_without_a_name() {
    let one = [replied(3, 2, b"\x00\x00\x00\x00"), replied(3, 1, b"")].concat();
    assert_eq!(option(3, b""), (Next::Option, one));
    let invalid = replied(3, 0x8000_0003, b"NBD_OPT_LIST has no data");
    assert_eq!(option(3, b"x"), (Next::Option, invalid));
}

#[test]
fn what_is_not_supported_is_said_so_and_an_abort_is_acknowledged() {
    // TLS, structured replies, meta contexts, extended headers, the withdrawn, the unknown.
    for code in [0, 4, 5, 8, 9, 10, 11, 12, u32::MAX] {
        let unsupported = replied(code, 0x8000_0001, b"not supported");
        assert_eq!(option(code, b"data"), (Next::Option, unsupported));
    }
    assert_eq!(option(2, b""), (Next::Close, replied(2, 1, b"")));
    let mut out = Vec::new();
    let header = OptionHeader { code: 7, len_bytes: 1 << 20 };
    assert_eq!(option_too_big(header, &mut out), Next::Option);
    assert_eq!(out, replied(7, 0x8000_0009, b"the option's data is too long"));
}

#[test]
fn a_request_is_read_field_by_field() {
    let bytes = request(0x0102, 0, 0x1112_1314_1516_1718, 0x2122_2324);
    let expected = Request {
        flags: 0x0102,
        command: Command::Read,
        cookie: u64::from_be_bytes(*b"cookie!!"),
        offset_bytes: 0x1112_1314_1516_1718,
        len_bytes: 0x2122_2324,
    };
    assert_eq!(parse_request(&bytes).unwrap(), expected);
    let mut bad = bytes;
    bad[3] ^= 1;
    let error = parse_request(&bad).unwrap_err();
    assert_eq!(error.to_string(), "request magic: found 0x25609512, expected 0x25609513");
    assert_eq!(error.kind(), ErrorKind::InvalidFormat);
}

#[test]
fn a_read_becomes_the_sectors_that_cover_it() {
    let size = 1 << 40;
    for (offset, len, (start_sector, cover_bytes, skip_bytes)) in [
        (0, 512, (0, 512, 0)),
        (512, 4096, (1, 4096, 0)),
        (0, 1, (0, 512, 0)),
        (511, 1, (0, 512, 511)),
        (511, 2, (0, 1024, 511)),
        (513, 511, (1, 512, 1)),
        (513, 512, (1, 1024, 1)),
        (700, 0, (1, 0, 188)),
        (size - 1, 1, (size / 512 - 1, 512, 511)),
        (size, 0, (size / 512, 0, 0)),
        (1, 32 << 20, (0, (32 << 20) + 512, 1)),
    ] {
        let len_bytes = usize::try_from(len).unwrap();
        let expected = Plan::Read(Span { start_sector, cover_bytes, skip_bytes, len_bytes });
        assert_eq!(planned(0, 0, offset, len, size), expected, "{len} bytes at {offset}");
    }
}

#[test]
fn a_read_that_is_not_on_the_disk_or_too_long_is_invalid() {
    let invalid = Plan::Refuse { errno: Errno::Invalid, payload_bytes: 0 };
    let size = 64 << 20;
    for (offset, len) in [
        (size, 1),
        (size - 1, 2),
        (size - 512, 513),
        (size + 1, 0),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (u64::MAX - 511, 512),
        (0, (32 << 20) + 1),
        (0, u32::MAX),
    ] {
        assert_eq!(planned(0, 0, offset, len, size), invalid, "{len} bytes at {offset}");
    }
    assert_eq!(planned(0, 0, 0, 1, 0), invalid, "an empty disk");
}

#[test]
fn writes_are_not_permitted_and_what_was_not_offered_is_invalid() {
    let refuse = |errno, payload_bytes| Plan::Refuse { errno, payload_bytes };
    for (flags, command, len, expected) in [
        (0, 1, 512, refuse(Errno::Permission, 512)),
        (1, 1, 32 << 20, refuse(Errno::Permission, 32 << 20)),
        (0, 1, 0, refuse(Errno::Permission, 0)),
        (0, 1, (32 << 20) + 1, Plan::HangUp),
        (0, 1, u32::MAX, Plan::HangUp),
        (0, 2, 0, Plan::Disconnect),
        (7, 2, 9, Plan::Disconnect),
        (0, 3, 0, Plan::Done),
        (1, 3, 0, refuse(Errno::Invalid, 0)),
        (0, 4, 512, refuse(Errno::Permission, 0)),
        (0, 6, u32::MAX, refuse(Errno::Permission, 0)),
        (0, 5, 512, refuse(Errno::Invalid, 0)),
        (0, 7, 512, refuse(Errno::Invalid, 0)),
        (0, 8, 512, refuse(Errno::Invalid, 0)),
        (0, 0xffff, u32::MAX, refuse(Errno::Invalid, 0)),
        (1, 0, 512, refuse(Errno::Invalid, 0)),
        (4, 0, 512, refuse(Errno::Invalid, 0)),
    ] {
        let plan = planned(flags, command, 0, len, 1 << 20);
        assert_eq!(plan, expected, "command {command}, flags {flags}, {len} bytes");
    }
}

#[test]
fn a_reply_repeats_the_cookie() {
    let cookie = u64::from_be_bytes(*b"cookie!!");
    assert_eq!(reply(Errno::Success, cookie), *b"\x67\x44\x66\x98\x00\x00\x00\x00cookie!!");
    assert_eq!(reply(Errno::Shutdown, cookie), *b"\x67\x44\x66\x98\x00\x00\x00\x6ccookie!!");
}

#[test]
fn every_failure_has_the_nearest_number_of_the_protocol() {
    for (kind, errno) in [
        (ErrorKind::Corrupt, Errno::Io),
        (ErrorKind::Integrity, Errno::Io),
        (ErrorKind::Timeout, Errno::Io),
        (ErrorKind::NotFound, Errno::Io),
        (ErrorKind::Busy, Errno::Io),
        (ErrorKind::OutOfRange, Errno::Invalid),
        (ErrorKind::Unsupported, Errno::NotSupported),
        (ErrorKind::NoSpace, Errno::NoSpace),
        (ErrorKind::ReadOnly, Errno::Permission),
    ] {
        assert_eq!(Errno::nearest(Error::new(kind, "x").errno()), errno, "{kind:?}");
    }
    for (number, errno) in [
        (libc::EPERM, Errno::Permission),
        (libc::ENOMEM, Errno::NoMemory),
        (libc::EDQUOT, Errno::NoSpace),
        (libc::EOVERFLOW, Errno::Overflow),
        (libc::ESHUTDOWN, Errno::Shutdown),
        (libc::EACCES, Errno::Io),
        (0, Errno::Io),
    ] {
        assert_eq!(Errno::nearest(number), errno, "{number}");
    }
    let wire = [
        (Errno::Success, 0),
        (Errno::Permission, 1),
        (Errno::Io, 5),
        (Errno::NoMemory, 12),
        (Errno::Invalid, 22),
        (Errno::NoSpace, 28),
        (Errno::Overflow, 75),
        (Errno::NotSupported, 95),
        (Errno::Shutdown, 108),
    ];
    for (errno, number) in wire {
        assert_eq!(errno as u32, number, "{errno:?}");
    }
}

proptest! {
    #[test]
    fn a_span_covers_exactly_what_was_asked_for(
        offset in any::<u64>(), len in any::<u32>(), sectors in 0_u64..1 << 50,
        near in any::<bool>(),
    ) {
        let size = sectors * 512;
        let offset = if near { size.saturating_sub(offset % 5000) } else { offset };
        let len = if near { len % 6000 } else { len };
        let fits = offset.checked_add(u64::from(len)).is_some_and(|end| end <= size);
        match planned(0, 0, offset, len, size) {
            Plan::Read(span) => {
                prop_assert!(fits && len <= 32 << 20);
                let start = span.start_sector * 512;
                let end = start + u64::try_from(span.cover_bytes).unwrap();
                prop_assert_eq!(start + u64::try_from(span.skip_bytes).unwrap(), offset);
                prop_assert_eq!(u32::try_from(span.len_bytes).unwrap(), len);
                prop_assert!(span.skip_bytes < 512 && span.cover_bytes % 512 == 0);
                prop_assert!(end <= size && to_u64(span.cover_bytes) <= cover_bytes_max());
                if len > 0 {
                    let asked_end = offset + u64::from(len);
                    prop_assert!(end >= asked_end && end - asked_end < 512);
                }
            }
            other => {
                let invalid = Plan::Refuse { errno: Errno::Invalid, payload_bytes: 0 };
                prop_assert_eq!(other, invalid);
                prop_assert!(!fits || len > 32 << 20);
            }
        }
    }

    #[test]
    fn any_option_is_answered_with_whole_replies(
        code in prop_oneof![0_u32..13, any::<u32>()],
        data in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let (next, out) = option(code, &data);
        prop_assert_eq!(next == Next::Close, code == 2 || code == 1 && !data.is_empty());
        if code == 1 {
            return Ok(());
        }
        let mut take = Take(&out);
        while !take.0.is_empty() {
            prop_assert_eq!(take.bytes(8), Some(OPTION_REPLY));
            prop_assert_eq!(take.u32(), Some(code));
            let _reply = take.u32();
            let len = usize::try_from(take.u32().unwrap()).unwrap();
            prop_assert!(take.bytes(len).is_some());
        }
        prop_assert!(!out.is_empty());
    }
}
