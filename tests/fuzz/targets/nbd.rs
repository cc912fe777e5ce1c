//! Strategy: the first 8 bytes choose the export's size; the rest is all that one client says,
//! from its flags to its last request. Invariants: no answer is longer than a few words, what is
//! to be skipped is bounded, and a read that is planned lies on the disk, covers exactly what was
//! asked for and fits the largest buffer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::nbd::protocol::{self, Command, Errno, Export, Next, OptionData, Plan};

/// What is left of the client's words.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*front)
    }

    fn slice(&mut self, len: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(front)
    }
}

/// Whether requests follow.
fn negotiate(input: &mut Input<'_>, export: Export) -> Option<bool> {
    let client = protocol::parse_client_flags(input.take()?).ok()?;
    loop {
        let (header, data) = protocol::parse_option_header(input.take()?).ok()?;
        let mut out = Vec::new();
        let next = match data {
            OptionData::Read(len) => {
                assert!(len <= 8192);
                let data = input.slice(len)?;
                protocol::answer_option(client, export, header, data, &mut out)
            }
            OptionData::Skip(len) => {
                assert!(len <= 32 << 20);
                input.slice(len as usize)?;
                protocol::option_too_big(header, &mut out)
            }
        };
        assert!(out.len() <= 256, "{} bytes for {header:?}", out.len());
        match next {
            Next::Option => assert!(out.len() >= 20),
            Next::Requests => return Some(true),
            Next::Close => return Some(false),
        }
    }
}

fn transmit(input: &mut Input<'_>, export: Export) -> Option<()> {
    loop {
        let request = protocol::parse_request(&input.take()?).ok()?;
        match protocol::plan(&request, export) {
            Plan::Read(span) => {
                assert_eq!(request.command, Command::Read);
                let start = span.start_sector * 512;
                let end = start + span.cover_bytes as u64;
                assert_eq!(start + span.skip_bytes as u64, request.offset_bytes);
                assert_eq!(span.len_bytes as u64, u64::from(request.len_bytes));
                assert!(span.skip_bytes < 512 && span.cover_bytes % 512 == 0);
                assert!(end <= export.size_bytes);
                assert!(span.cover_bytes as u64 <= protocol::cover_bytes_max());
                assert!(
                    span.len_bytes == 0 || span.skip_bytes + span.len_bytes <= span.cover_bytes
                );
            }
            Plan::Refuse { errno, payload_bytes } => {
                assert_ne!(errno, Errno::Success);
                assert!(payload_bytes == 0 || request.command == Command::Write);
                assert!(payload_bytes <= 32 << 20);
                input.slice(payload_bytes as usize)?;
            }
            Plan::Write { start_sector, len_bytes, .. } => {
                assert!(!export.read_only && request.command == Command::Write);
                assert_eq!(start_sector * 512, request.offset_bytes);
                assert_eq!(len_bytes as u64, u64::from(request.len_bytes));
                assert!(len_bytes > 0 && len_bytes <= 32 << 20 && len_bytes % 512 == 0);
                assert!(request.offset_bytes + len_bytes as u64 <= export.size_bytes);
                input.slice(len_bytes)?;
            }
            Plan::Zeroes { sectors, .. } => {
                assert!(!export.read_only && !sectors.is_empty());
                assert!(matches!(request.command, Command::Trim | Command::WriteZeroes));
                assert_eq!(sectors.start * 512, request.offset_bytes);
                let len = (sectors.end - sectors.start) * 512;
                assert_eq!(len, u64::from(request.len_bytes));
                assert!(sectors.end * 512 <= export.size_bytes);
            }
            Plan::Flush => assert!(!export.read_only && request.command == Command::Flush),
            Plan::Done if export.read_only => assert_eq!(request.command, Command::Flush),
            Plan::Done => assert_eq!(request.len_bytes, 0),
            Plan::Disconnect | Plan::HangUp => return Some(()),
        }
        let _ = protocol::reply(Errno::nearest(request.len_bytes as i32), request.cookie);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let Some(size) = input.take() else { return };
    // Whole sectors, as every disk has; at most the largest one.
    let size = u64::from_le_bytes(size);
    let size_bytes = (size >> 5) & !511;
    let export = Export { size_bytes, preferred_bytes: 4096, read_only: size & 1 == 0 };
    if negotiate(&mut input, export) == Some(true) {
        let _ = transmit(&mut input, export);
    }
});
