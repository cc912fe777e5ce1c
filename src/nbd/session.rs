//! One client from its first byte to its last.
//!
//! The thread that runs this has a reader of its own and one buffer: a read lands in it where its
//! reply's head can stand right before the first byte that was asked for, so that head and data
//! leave in one system call, and an unaligned read is never copied. A write's payload lands in the
//! same place. The buffer grows to the largest request of the client and stays; requests that fit
//! allocate nothing. A flush holds up its own client only.
//!
//! A request that fails, or a worker that panics, fails one request. The connection ends when the
//! client says so, or when what it says makes no sense any more.

use super::protocol::{
    self, Errno, Export, Next, OptionData, Plan, REPLY_BYTES, Request, Span, cover_bytes_max,
};
use super::wire::Wire;
use crate::disk::{self, Disk, Guarded, Space};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{NBD_HANDSHAKE_MS_MAX, ZEROES_SECTORS_MAX};
use crate::units::{to_u64, to_usize};
use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Where sectors land in the buffer: a cache line, with room for the head of a reply before it.
const SECTORS_AT: usize = 64;

/// Bytes of sectors that the buffer has room for at first: most clients' largest read.
const FIRST_COVER_BYTES: usize = 256 * 1024 + 1024;

const _: () = assert!(SECTORS_AT >= REPLY_BYTES);

/// What all sessions of one server share.
#[derive(Debug)]
pub(super) struct Shared<D> {
    /// What is served.
    pub(super) disk: D,
    /// How it is told to clients.
    pub(super) export: Export,
    /// Requests that failed, over all clients.
    pub(super) errors: AtomicU64,
}

/// Serves one client until it leaves.
///
/// # Errors
/// When it does not leave in good order: it is cut off, late, or says what is no NBD.
pub(super) fn serve<D: Disk>(stream: &UnixStream, shared: &Shared<D>) -> Result<()> {
    let mut wire = Wire::new(stream, Duration::from_millis(NBD_HANDSHAKE_MS_MAX));
    if !negotiate(&mut wire, shared.export)? {
        return Ok(());
    }
    wire.without_deadline().map_err(|error| told("handshake", &error))?;
    Session::new(wire, shared)?.transmit()
}

fn told(what: &str, error: &io::Error) -> Error {
    Error::io(format!("nbd {what}"), error)
}

/// The handshake; whether requests follow.
fn negotiate(wire: &mut Wire<'_>, export: Export) -> Result<bool> {
    let failed = |error: io::Error| told("handshake", &error);
    wire.send(&protocol::greeting()).map_err(failed)?;
    let Some(flags) = wire.take().map_err(failed)? else { return Ok(false) };
    let client = protocol::parse_client_flags(flags)?;
    let mut out = Vec::new();
    loop {
        let Some(header) = wire.take().map_err(failed)? else { return Ok(false) };
        let (header, data) = protocol::parse_option_header(header)?;
        out.clear();
        let next = match data {
            OptionData::Read(len) => {
                let data = wire.take_vec(len).map_err(failed)?;
                protocol::answer_option(client, export, header, &data, &mut out)
            }
            OptionData::Skip(len_bytes) => {
                wire.skip(len_bytes).map_err(failed)?;
                protocol::option_too_big(header, &mut out)
            }
        };
        let sent = wire.send(&out);
        match next {
            // A client that aborts need not wait for the answer.
            Next::Close => return Ok(false),
            Next::Option => sent.map_err(failed)?,
            Next::Requests => return sent.map(|()| true).map_err(failed),
        }
    }
}

/// The part of a conversation in which bytes are read and written.
struct Session<'a, D: Disk> {
    wire: Wire<'a>,
    shared: &'a Shared<D>,
    worker: Guarded<'a, D>,
    buffer: Vec<u8>,
}

impl<'a, D: Disk> Session<'a, D> {
    fn new(wire: Wire<'a>, shared: &'a Shared<D>) -> Result<Self> {
        let worker = Guarded::new(&shared.disk)?;
        let mut this = Self { wire, shared, worker, buffer: Vec::new() };
        this.make_room(FIRST_COVER_BYTES)?;
        Ok(this)
    }

    fn transmit(mut self) -> Result<()> {
        let failed = |error: io::Error| told("transmission", &error);
        while let Some(bytes) = self.wire.take().map_err(failed)? {
            let request = protocol::parse_request(&bytes)?;
            match protocol::plan(&request, self.shared.export) {
                Plan::Read(span) => self.read(request, span),
                Plan::Write { start_sector, len_bytes, durable } => {
                    self.write(request, start_sector, len_bytes, durable)
                }
                Plan::Zeroes { sectors, space, durable } => {
                    let done = self.zero(sectors, space, durable);
                    self.reply(request, "zero", done)
                }
                Plan::Flush => {
                    let done = disk::flush(&self.shared.disk);
                    self.reply(request, "flush", done)
                }
                Plan::Done => self.wire.send(&protocol::reply(Errno::Success, request.cookie)),
                Plan::Refuse { errno, payload_bytes } => {
                    self.complain(&refused(request));
                    let skipped = self.wire.skip(u64::from(payload_bytes));
                    skipped.and_then(|()| self.wire.send(&protocol::reply(errno, request.cookie)))
                }
                Plan::Disconnect => return Ok(()),
                Plan::HangUp => return Err(refused(request).context("hang up on the client")),
            }
            .map_err(failed)?;
        }
        // Without a farewell, but between two requests: nothing is lost.
        Ok(())
    }

    /// Reads and replies, whatever the reader does.
    fn read(&mut self, request: Request, span: Span) -> io::Result<()> {
        match self.try_read(span) {
            Ok(()) => {
                let data_at = SECTORS_AT + span.skip_bytes;
                let head = protocol::reply(Errno::Success, request.cookie);
                let reply = data_at - REPLY_BYTES..data_at + span.len_bytes;
                let Some(reply) = self.buffer.get_mut(reply) else {
                    return self.wire.send(&protocol::reply(Errno::Io, request.cookie));
                };
                // The head overwrites the end of what was read before the first byte wanted.
                reply[..REPLY_BYTES].copy_from_slice(&head);
                self.wire.send(reply)
            }
            Err(error) => self.reply(request, "read", Err(error)),
        }
    }

    /// Replies without data.
    fn reply(&mut self, request: Request, what: &str, outcome: Result<()>) -> io::Result<()> {
        let errno = match outcome {
            Ok(()) => Errno::Success,
            Err(error) => {
                let errno = Errno::nearest(error.errno());
                let (len, offset) = (request.len_bytes, request.offset_bytes);
                self.complain(&error.context(format!("{what} {len} bytes at byte {offset}")));
                errno
            }
        };
        self.wire.send(&protocol::reply(errno, request.cookie))
    }

    /// Receives the payload, writes it and replies. Without memory for it, it is read and
    /// forgotten: the next request is behind it.
    fn write(
        &mut self,
        request: Request,
        start_sector: u64,
        len_bytes: usize,
        durable: bool,
    ) -> io::Result<()> {
        let room = self.make_room(len_bytes);
        let payload = self.buffer.get_mut(SECTORS_AT..SECTORS_AT + len_bytes);
        let done = match (room, payload) {
            (Ok(()), Some(payload)) => {
                self.wire.take_into(payload)?;
                let written = self.worker.write(start_sector, payload);
                written.and_then(|()| self.make_durable(durable))
            }
            (room, _) => {
                self.wire.skip(to_u64(len_bytes))?;
                room.and_then(|()| Err(no_memory(len_bytes)))
            }
        };
        self.reply(request, "write", done)
    }

    /// Zeroes in steps of the length that disks are asked for.
    fn zero(&mut self, sectors: Range<u64>, space: Space, durable: bool) -> Result<()> {
        let mut start_sector = sectors.start;
        while start_sector < sectors.end {
            let count = (sectors.end - start_sector).min(u64::from(ZEROES_SECTORS_MAX));
            self.worker.write_zeroes(start_sector..start_sector + count, space)?;
            start_sector += count;
        }
        self.make_durable(durable)
    }

    fn make_durable(&self, wanted: bool) -> Result<()> {
        if wanted { disk::flush(&self.shared.disk) } else { Ok(()) }
    }

    /// Reads the sectors of `span` into the buffer.
    fn try_read(&mut self, span: Span) -> Result<()> {
        if span.cover_bytes == 0 {
            return Ok(());
        }
        self.make_room(span.cover_bytes)?;
        let sectors = self.buffer.get_mut(SECTORS_AT..SECTORS_AT + span.cover_bytes);
        let sectors = sectors.ok_or_else(|| no_memory(span.cover_bytes))?;
        self.worker.read(span.start_sector, sectors)
    }

    /// Grows the buffer to hold `cover_bytes` of sectors. Nothing is lost if that fails.
    fn make_room(&mut self, cover_bytes: usize) -> Result<()> {
        let wanted = SECTORS_AT + cover_bytes;
        if self.buffer.len() >= wanted {
            return Ok(());
        }
        debug_assert!(to_u64(cover_bytes) <= cover_bytes_max());
        // By doubling, up to the largest request: a client that asks for more each time must not
        // cost an allocation each time.
        let most = SECTORS_AT + to_usize(cover_bytes_max()).unwrap_or(wanted);
        let room = wanted.max((self.buffer.len() * 2).min(most));
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(room).map_err(|_| no_memory(room))?;
        buffer.resize(room, 0);
        self.buffer = buffer;
        Ok(())
    }

    /// Counts a failure. The log gets the 1st, 2nd, 4th, 8th...: a bad layer under a busy client
    /// must not fill the disk that the log is on.
    fn complain(&self, error: &Error) {
        let errors = self.shared.errors.fetch_add(1, Ordering::Relaxed) + 1;
        if errors.is_power_of_two() {
            tracing::error!(errors, error = %format!("{error:#}"), "request failed");
        }
    }
}

fn refused(request: Request) -> Error {
    let Request { command, flags, offset_bytes, len_bytes, .. } = request;
    let message = format!(
        "refused request: {command:?}, flags {flags:#x}, {len_bytes} bytes at byte {offset_bytes}"
    );
    Error::new(ErrorKind::OutOfRange, message)
}

fn no_memory(bytes: usize) -> Error {
    let error = io::Error::from_raw_os_error(libc::ENOMEM);
    Error::io(format!("take {bytes} bytes of memory"), &error)
}

#[cfg(test)]
mod tests;
