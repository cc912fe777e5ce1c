//! A client for what no sane client does. It trusts nothing and asserts every byte of a reply.

// NBD is in network order; these are a client's words, made here and not by the code under test.
#![allow(clippy::big_endian_bytes)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;

#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    /// The size that the server stated.
    pub(crate) size_bytes: u64,
    cookie: u64,
}

impl Client {
    /// A connection that has said nothing yet.
    pub(crate) fn connect(socket: &Path) -> UnixStream {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// A client that is ready for requests, by way of `NBD_OPT_GO`.
    pub(crate) fn new(socket: &Path) -> Self {
        let mut stream = Self::connect(socket);
        assert_eq!(receive(&mut stream, 18), b"NBDMAGICIHAVEOPT\0\x03");
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        send_option(&mut stream, 7, b"\0\0\0\0\0\0");
        let (reply, facts) = option_reply(&mut stream, 7);
        assert_eq!((reply, &facts[..2], &facts[10..]), (3, &[0, 0][..], &[0x01, 0x07][..]));
        assert_eq!(option_reply(&mut stream, 7), (1, Vec::new()));
        let size_bytes = u64::from_be_bytes(facts[2..10].try_into().unwrap());
        Self { stream, size_bytes, cookie: 0x1122_3344_5566_7788 }
    }

    /// Sends a request, and `payload` after it; returns its cookie.
    pub(crate) fn ask(&mut self, command: u16, offset: u64, len: u32, payload: &[u8]) -> u64 {
        self.cookie = self.cookie.wrapping_mul(3);
        let mut bytes = b"\x25\x60\x95\x13\0\0".to_vec();
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).unwrap();
        self.cookie
    }

    /// The next reply must be to `cookie`; its error and, without one, `len` bytes of data.
    pub(crate) fn answer(&mut self, cookie: u64, len: usize) -> Result<Vec<u8>, u32> {
        let head = receive(&mut self.stream, 16);
        assert_eq!((&head[..4], &head[8..]), (&b"\x67\x44\x66\x98"[..], &cookie.to_be_bytes()[..]));
        match u32::from_be_bytes(head[4..8].try_into().unwrap()) {
            0 => Ok(receive(&mut self.stream, len)),
            errno => Err(errno),
        }
    }

    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        let cookie = self.ask(READ, offset, len, &[]);
        self.answer(cookie, usize::try_from(len).unwrap())
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Whether the server hung up, without another byte.
    pub(crate) fn is_hung_up_on(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0))
            || self.stream.read(&mut [0]).is_err_and(|error| error.kind() != TIMED_OUT)
    }
}

const TIMED_OUT: std::io::ErrorKind = std::io::ErrorKind::WouldBlock;

pub(crate) fn receive(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

pub(crate) fn send_option(stream: &mut UnixStream, code: u32, data: &[u8]) {
    stream.write_all(b"IHAVEOPT").unwrap();
    stream.write_all(&code.to_be_bytes()).unwrap();
    stream.write_all(&u32::try_from(data.len()).unwrap().to_be_bytes()).unwrap();
    stream.write_all(data).unwrap();
}

/// The next reply must be to option `code`; its type and its data.
pub(crate) fn option_reply(stream: &mut UnixStream, code: u32) -> (u32, Vec<u8>) {
    let head = receive(stream, 20);
    assert_eq!(head[..8], *b"\x00\x03\xe8\x89\x04\x55\x65\xa9");
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    assert_eq!(word(8), code);
    (word(12), receive(stream, usize::try_from(word(16)).unwrap()))
}
