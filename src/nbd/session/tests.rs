//! Conversations with one session over a socket pair, with a disk that fails where it is told to.

// Requests are made here as a client makes them.
#![allow(clippy::big_endian_bytes)]

use super::*;
use crate::disk::{Geometry, Worker};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::thread::JoinHandle;

const SECTORS: u64 = 200_000;

/// Byte B of sector N is `pattern(N, B)`; sectors 90 to 94 are bad, 95 to 99 panic.
#[derive(Default)]
struct Fake {
    workers: Arc<AtomicU32>,
    workers_max: u32,
    /// Bad sectors fail with this errno.
    errno: i32,
}

struct FakeWorker(i32);

fn pattern(sector: u64, byte: usize) -> u8 {
    u8::try_from((sector * 31 + u64::try_from(byte).unwrap()) % 251).unwrap()
}

fn expected(offset: u64, len: usize) -> Vec<u8> {
    let at = |index| offset + u64::try_from(index).unwrap();
    (0..len).map(|i| pattern(at(i) / 512, usize::try_from(at(i) % 512).unwrap())).collect()
}

impl Disk for Fake {
    type Worker = FakeWorker;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: SECTORS,
            read_only: true,
            optimal_io_bytes: 4096,
            discard_granularity_bytes: None,
        }
    }

    fn worker(&self) -> Result<FakeWorker> {
        let made = self.workers.fetch_add(1, Ordering::Relaxed);
        assert!(self.workers_max == 0 || made < self.workers_max, "no more readers");
        Ok(FakeWorker(self.errno))
    }
}

impl Worker for FakeWorker {
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        assert!(dst.len().is_multiple_of(512) && !dst.is_empty(), "whole sectors");
        for (sector, bytes) in (start_sector..).zip(dst.chunks_mut(512)) {
            assert!(sector < SECTORS && !(95..100).contains(&sector), "sector {sector} is cursed");
            if (90..95).contains(&sector) {
                let error = io::Error::from_raw_os_error(self.0);
                return Err(Error::io(format!("sector {sector}"), &error));
            }
            for (index, byte) in bytes.iter_mut().enumerate() {
                *byte = pattern(sector, index);
            }
        }
        Ok(())
    }
}

/// The client's end, and the session's outcome.
struct Peer<D: Disk> {
    stream: UnixStream,
    session: JoinHandle<Result<()>>,
    shared: Arc<Shared<D>>,
}

impl<D: Disk> Peer<D> {
    /// Before its first byte.
    fn silent(disk: D) -> Self {
        let read_only = disk.geometry().read_only;
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let export = Export { size_bytes: SECTORS * 512, preferred_bytes: 4096, read_only };
        let shared = Arc::new(Shared { disk, export, errors: AtomicU64::new(0) });
        let given = Arc::clone(&shared);
        let session = std::thread::spawn(move || serve(&theirs, &given));
        Self { stream, session, shared }
    }

    /// After a handshake of the oldest form.
    fn new(disk: D) -> Self {
        let flags = if disk.geometry().read_only { 0x07 } else { 0x6d };
        let mut this = Self::silent(disk);
        this.send(b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00");
        assert_eq!(this.receive(18), protocol::greeting());
        assert_eq!(this.receive(10), [0, 0, 0, 0, 0x06, 0x1a, 0x80, 0, 0x01, flags]);
        this
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn ask(&mut self, command: u16, offset_bytes: u64, len_bytes: u32) {
        self.ask_flagged(0, command, offset_bytes, len_bytes);
    }

    fn ask_flagged(&mut self, flags: u16, command: u16, offset_bytes: u64, len_bytes: u32) {
        let mut bytes = b"\x25\x60\x95\x13".to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes().iter().chain(b"cookie!!"));
        bytes.extend(offset_bytes.to_be_bytes().iter().chain(&len_bytes.to_be_bytes()));
        self.send(&bytes);
    }

    /// The error of the next reply.
    fn errno(&mut self) -> u8 {
        let reply = self.receive(16);
        assert_eq!((&reply[..7], &reply[8..]), (&b"\x67\x44\x66\x98\0\0\0"[..], &b"cookie!!"[..]));
        reply[7]
    }

    /// What is left to be read, and how the session ended.
    fn end(mut self) -> (Vec<u8>, Result<()>) {
        let mut rest = Vec::new();
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        let _ = self.stream.read_to_end(&mut rest);
        (rest, self.session.join().unwrap())
    }
}

impl Peer<Fake> {
    fn assert_reads(&mut self, offset: u64, len: usize) {
        self.ask(0, offset, u32::try_from(len).unwrap());
        assert_eq!(self.errno(), 0, "{len} bytes at {offset}");
        assert!(self.receive(len) == expected(offset, len), "{len} bytes at {offset}");
    }
}

mod writing;

#[test]
fn reads_of_any_place_and_length_return_exactly_their_bytes() {
    let mut peer = Peer::new(Fake::default());
    for offset in [0_u64, 1, 511, 512, 513, 51_200, 60_001] {
        for len in [1_usize, 2, 511, 512, 513, 4096, 5000, 300_000] {
            if (offset + len as u64) > 90 * 512 && offset < 100 * 512 {
                continue;
            }
            peer.assert_reads(offset, len);
        }
    }
    peer.assert_reads(SECTORS * 512 - 1, 1);
    peer.assert_reads(SECTORS * 512 - 513, 513);
    peer.assert_reads(777, 0);
    // The largest, at the worst alignment; then a small one from the same buffer.
    peer.assert_reads(60_001, 32 << 20);
    peer.assert_reads(3, 5);
    peer.ask(2, 0, 0);
    let (rest, outcome) = peer.end();
    outcome.unwrap();
    assert_eq!(rest, b"");
}

#[test]
fn many_requests_in_flight_are_answered_in_order() {
    let mut peer = Peer::new(Fake::default());
    for index in 0..200 {
        peer.ask(0, 51_200 + index * 512, 512);
    }
    for index in 0..200 {
        assert_eq!(peer.errno(), 0);
        assert_eq!(peer.receive(512), expected(51_200 + index * 512, 512), "{index}");
    }
    peer.end().1.unwrap();
}

#[test]
fn a_failed_read_is_told_by_its_errno_and_the_next_is_served() {
    for (errno, told) in [
        (libc::EIO, 5),
        (libc::ENOSPC, 28),
        (libc::EINVAL, 22),
        (libc::EOPNOTSUPP, 95),
        (libc::EACCES, 5),
        (libc::EILSEQ, 5),
        (libc::EROFS, 1),
    ] {
        let mut peer = Peer::new(Fake { errno, ..Fake::default() });
        peer.ask(0, 89 * 512, 1024);
        assert_eq!(peer.errno(), told, "{errno}");
        peer.assert_reads(89 * 512, 512);
        assert_eq!(peer.shared.errors.load(Ordering::Relaxed), 1);
        peer.end().1.unwrap();
    }
}

#[test]
fn a_panicking_reader_fails_one_request_and_is_replaced() {
    let mut peer = Peer::new(Fake::default());
    peer.ask(0, 96 * 512, 512);
    assert_eq!(peer.errno(), 5);
    peer.assert_reads(0, 512);
    assert_eq!(peer.shared.disk.workers.load(Ordering::Relaxed), 2);
    assert_eq!(peer.shared.errors.load(Ordering::Relaxed), 1);
    peer.end().1.unwrap();
}

#[test]
fn a_reader_that_cannot_be_replaced_fails_every_request() {
    let mut peer = Peer::new(Fake { workers_max: 1, ..Fake::default() });
    for _ in 0..3 {
        peer.ask(0, 96 * 512, 512);
        assert_eq!(peer.errno(), 5);
    }
    peer.ask(0, 0, 512);
    assert_eq!(peer.errno(), 5);
    peer.end().1.unwrap();
}

#[test]
fn a_refused_write_takes_its_payload_with_it() {
    let mut peer = Peer::new(Fake::default());
    // The payload looks like a request: who does not skip it is out of step.
    for payload in [0, 28, 100_000, 32 << 20] {
        peer.ask(1, 0, payload);
        let words = b"\x25\x60\x95\x13\0\0\0\0cookie!?\0\0\0\0\0\0\0\0\0\0\0\x01".iter().cycle();
        let bytes: Vec<u8> = words.take(usize::try_from(payload).unwrap()).copied().collect();
        peer.send(&bytes);
        assert_eq!(peer.errno(), 1, "{payload} bytes");
        peer.assert_reads(512, 512);
    }
    for command in [4, 6] {
        peer.ask(command, 0, 4096);
        assert_eq!(peer.errno(), 1);
    }
    peer.ask(3, 0, 0);
    assert_eq!(peer.errno(), 0, "a flush has nothing to do");
    peer.ask(0, SECTORS * 512 - 1, 2);
    assert_eq!(peer.errno(), 22);
    peer.end().1.unwrap();
}

#[test]
fn a_write_longer_than_anybody_would_skip_ends_the_connection() {
    let mut peer = Peer::new(Fake::default());
    peer.ask(1, 0, (32 << 20) + 1);
    let (rest, outcome) = peer.end();
    assert_eq!(rest, b"");
    let text = format!("{:#}", outcome.unwrap_err());
    assert!(text.contains("33554433 bytes at byte 0"), "{text}");
}

#[test]
fn garbage_for_a_request_ends_the_connection_and_half_a_request_too() {
    let mut peer = Peer::new(Fake::default());
    peer.send(&[0xee; 28]);
    let (rest, outcome) = peer.end();
    assert_eq!((rest, outcome.unwrap_err().kind()), (Vec::new(), ErrorKind::InvalidFormat));
    let mut peer = Peer::new(Fake::default());
    peer.send(&[0x25, 0x60, 0x95, 0x13, 0]);
    let (rest, outcome) = peer.end();
    assert_eq!(rest, b"");
    assert!(format!("{:#}", outcome.unwrap_err()).starts_with("nbd transmission: "));
}

#[test]
fn a_handshake_may_fail_at_every_byte_without_a_word() {
    let go = b"\x00\x00\x00\x01IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00";
    for len in 0..go.len() {
        let mut peer = Peer::silent(Fake::default());
        peer.send(&go[..len]);
        let (rest, outcome) = peer.end();
        assert_eq!(rest, protocol::greeting(), "{len} bytes");
        // Between two messages a client may leave.
        assert_eq!(outcome.is_ok(), [0, 4].contains(&len), "{len} bytes: {outcome:?}");
    }
    for bad in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], b"\0\0\0\x01IHAVEOPX\0\0\0\0\0\0\0\0"]
    {
        let mut peer = Peer::silent(Fake::default());
        peer.send(bad);
        let (rest, outcome) = peer.end();
        let outcome = outcome.unwrap_err();
        assert!(rest.is_empty() || rest == protocol::greeting(), "unread bytes may eat it");
        assert_eq!(outcome.kind(), ErrorKind::InvalidFormat, "{outcome:#}");
        assert_eq!(outcome.exit_code(), 3);
    }
}

#[test]
fn an_oversized_option_is_refused_and_the_next_is_heard() {
    let mut peer = Peer::silent(Fake::default());
    peer.send(b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\x00\x01\x00\x00");
    peer.send(&[0x49; 65_536]);
    peer.send(b"IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00");
    assert_eq!(peer.receive(18), protocol::greeting());
    let refused = peer.receive(20 + "the option's data is too long".len());
    assert_eq!(refused[8..16], [0, 0, 0, 7, 0x80, 0, 0, 9]);
    assert_eq!(peer.receive(10).len(), 10);
    peer.assert_reads(0, 512);
    peer.end().1.unwrap();
}
