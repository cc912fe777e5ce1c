//! The words of the NBD protocol: bytes to values and values to bytes, and nothing else.
//!
//! Newstyle handshake in its fixed form, simple replies. A number on this wire is in network
//! order, unlike everything on our disks: this is the one file that says `be`. What a client may
//! ask for is decided here as well ([`plan`], [`answer_option`]), so that hostile input meets
//! all of the rules without a socket. No length that a client states leads to memory here.
#![allow(clippy::big_endian_bytes)]

use crate::disk::Space;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{NBD_OPTION_BYTES_MAX, NBD_REQUEST_BYTES_MAX};
use crate::units::{SECTOR_SHIFT, SECTOR_SIZE, range_from, to_u64, to_usize};
use std::ops::Range;

/// `NBDMAGIC`: the server's first eight bytes.
const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: newstyle; also before each option.
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1;
const HANDSHAKE_NO_ZEROES: u16 = 1 << 1;

/// Bytes of the server's greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes of the client's answer to it.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes before the data of an option.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of a request, without the payload of a write.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a reply, without the data of a read.
pub const REPLY_BYTES: usize = 16;

/// Zeros after the answer to `NBD_OPT_EXPORT_NAME`, for clients that did not decline them.
const EXPORT_NAME_ZEROS: usize = 124;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 0x8000_0001;
const REP_ERR_INVALID: u32 = 0x8000_0003;
const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const FLAG_HAS_FLAGS: u16 = 1;
const FLAG_READ_ONLY: u16 = 1 << 1;
const FLAG_SEND_FLUSH: u16 = 1 << 2;
const FLAG_SEND_FUA: u16 = 1 << 3;
const FLAG_SEND_TRIM: u16 = 1 << 5;
const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// All connections see the same bytes at once, and a flush on one is a flush for all of them.
const FLAGS_COMMON: u16 = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_CAN_MULTI_CONN;
const FLAGS_WRITABLE: u16 = FLAG_SEND_FUA | FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES;

/// The change must be durable before it is answered. A client that was offered it may put it on
/// any command.
const COMMAND_FUA: u16 = 1;
/// Zeros must not be a hole.
const COMMAND_NO_HOLE: u16 = 1 << 1;

/// The error numbers of the protocol; the wire has no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// No error.
    Success = 0,
    /// Not permitted: a write to what is read-only.
    Permission = 1,
    /// Input or output error.
    Io = 5,
    /// Out of memory.
    NoMemory = 12,
    /// The request is wrong.
    Invalid = 22,
    /// No space.
    NoSpace = 28,
    /// A value is too large.
    Overflow = 75,
    /// Not supported.
    NotSupported = 95,
    /// The server is ending.
    Shutdown = 108,
}

impl Errno {
    /// The number that is nearest to one of this system's. What is neither the client's fault nor
    /// known to the protocol (a checksum, a deadline) is an I/O error.
    #[must_use]
    pub const fn nearest(errno: i32) -> Self {
        match errno {
            libc::EPERM | libc::EROFS => Self::Permission,
            libc::ENOMEM => Self::NoMemory,
            libc::EINVAL => Self::Invalid,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpace,
            libc::EOVERFLOW => Self::Overflow,
            libc::EOPNOTSUPP => Self::NotSupported,
            libc::ESHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }
}

/// What is served: the one export, whose name is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes, a multiple of the sector size.
    pub size_bytes: u64,
    /// The read size that costs least per byte, a power of two of at least 4096.
    pub preferred_bytes: u32,
    /// Whether every change is refused.
    pub read_only: bool,
}

impl Export {
    /// The transmission flags.
    fn flags(self) -> u16 {
        FLAGS_COMMON | if self.read_only { FLAG_READ_ONLY } else { FLAGS_WRITABLE }
    }
}

/// Appends numbers to bytes, most significant byte first.
trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }
}

/// Takes numbers from the front of bytes.
struct Take<'a>(&'a [u8]);

impl<'a> Take<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(front)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*front)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

fn garbage(what: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidFormat, format!("{what}: found {found}, expected {expected}"))
}

/// The server's first words.
#[must_use]
pub fn greeting() -> Vec<u8> {
    let mut out = Vec::with_capacity(GREETING_BYTES);
    out.put_u64(MAGIC);
    out.put_u64(OPTION_MAGIC);
    out.put_u16(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES);
    out
}

/// What the client said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// It does not want the zeros after the answer to `NBD_OPT_EXPORT_NAME`.
    pub no_zeroes: bool,
}

/// Reads the client's answer to the greeting.
///
/// # Errors
/// `InvalidFormat` for a flag that was not offered: the connection must be closed.
pub fn parse_client_flags(bytes: [u8; CLIENT_FLAGS_BYTES]) -> Result<Client> {
    let flags = u32::from_be_bytes(bytes);
    // A client without the first flag knows no errors in option replies. It is served all the
    // same: all that it can send is the name of the export, which has no error reply.
    if flags & !u32::from(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES) != 0 {
        return Err(garbage("client flags", format!("{flags:#x}"), "at most 0x3"));
    }
    Ok(Client { no_zeroes: flags & u32::from(HANDSHAKE_NO_ZEROES) != 0 })
}

/// The head of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub code: u32,
    /// Bytes of data that follow.
    pub len_bytes: u32,
}

/// What to do with the data of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionData {
    /// Read this many bytes and hand them to [`answer_option`].
    Read(usize),
    /// Read and forget this many bytes, then send [`option_too_big`].
    Skip(u64),
}

/// Reads the head of an option and says what to do with its data.
///
/// # Errors
/// `InvalidFormat` when it is none, or when its data is longer than anybody would skip: the
/// connection must be closed.
pub fn parse_option_header(bytes: [u8; OPTION_HEADER_BYTES]) -> Result<(OptionHeader, OptionData)> {
    let mut take = Take(&bytes);
    let (magic, code, len) = (take.u64(), take.u32(), take.u32());
    let (Some(magic), Some(code), Some(len_bytes)) = (magic, code, len) else {
        return Err(garbage("option", "less", "16 bytes"));
    };
    if magic != OPTION_MAGIC {
        return Err(garbage("option magic", format!("{magic:#x}"), format!("{OPTION_MAGIC:#x}")));
    }
    let header = OptionHeader { code, len_bytes };
    if len_bytes > NBD_REQUEST_BYTES_MAX {
        let expected = format!("at most {NBD_REQUEST_BYTES_MAX}");
        return Err(garbage("option length", len_bytes, expected));
    }
    if len_bytes <= NBD_OPTION_BYTES_MAX
        && let Some(len) = to_usize(u64::from(len_bytes))
    {
        return Ok((header, OptionData::Read(len)));
    }
    Ok((header, OptionData::Skip(u64::from(len_bytes))))
}

/// What follows an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another option.
    Option,
    /// Requests.
    Requests,
    /// The connection's end, as soon as the answer is sent.
    Close,
}

/// Appends the answer to one option to `out`.
pub fn answer_option(
    client: Client,
    export: Export,
    header: OptionHeader,
    data: &[u8],
    out: &mut Vec<u8>,
) -> Next {
    let code = header.code;
    match code {
        // The oldest option: no reply but the export itself, and no word for "no such export".
        OPT_EXPORT_NAME if !data.is_empty() => Next::Close,
        OPT_EXPORT_NAME => {
            out.put_u64(export.size_bytes);
            out.put_u16(export.flags());
            if !client.no_zeroes {
                out.resize(out.len() + EXPORT_NAME_ZEROS, 0);
            }
            Next::Requests
        }
        OPT_ABORT => {
            option_reply(out, code, REP_ACK, &[]);
            Next::Close
        }
        OPT_LIST if !data.is_empty() => {
            refuse_option(out, code, REP_ERR_INVALID, "NBD_OPT_LIST has no data");
            Next::Option
        }
        OPT_LIST => {
            // One export, whose name has no bytes.
            option_reply(out, code, REP_SERVER, &0_u32.to_be_bytes());
            option_reply(out, code, REP_ACK, &[]);
            Next::Option
        }
        OPT_INFO | OPT_GO => answer_info(export, code, data, out),
        // Structured replies, meta contexts, TLS and what nobody has thought of yet.
        _ => {
            refuse_option(out, code, REP_ERR_UNSUP, "not supported");
            Next::Option
        }
    }
}

/// Appends the answer to an option whose data was skipped.
pub fn option_too_big(header: OptionHeader, out: &mut Vec<u8>) -> Next {
    if header.code == OPT_EXPORT_NAME {
        return Next::Close;
    }
    refuse_option(out, header.code, REP_ERR_TOO_BIG, "the option's data is too long");
    Next::Option
}

fn answer_info(export: Export, code: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
    let Some(wanted) = parse_info(data) else {
        refuse_option(out, code, REP_ERR_INVALID, "the option's data contradicts itself");
        return Next::Option;
    };
    if !wanted.name.is_empty() {
        refuse_option(out, code, REP_ERR_UNKNOWN, "the only export has the empty name");
        return Next::Option;
    }
    let mut info = Vec::with_capacity(14);
    info.put_u16(INFO_EXPORT);
    info.put_u64(export.size_bytes);
    info.put_u16(export.flags());
    option_reply(out, code, REP_INFO, &info);
    if wanted.block_size {
        info.clear();
        info.put_u16(INFO_BLOCK_SIZE);
        // Any byte can be read, but a part of a sector costs as much as the whole; what is
        // written is whole sectors.
        info.put_u32(1 << SECTOR_SHIFT);
        info.put_u32(export.preferred_bytes);
        info.put_u32(NBD_REQUEST_BYTES_MAX);
        option_reply(out, code, REP_INFO, &info);
    }
    option_reply(out, code, REP_ACK, &[]);
    if code == OPT_GO { Next::Requests } else { Next::Option }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
struct InfoWanted<'a> {
    name: &'a [u8],
    block_size: bool,
}

fn parse_info(data: &[u8]) -> Option<InfoWanted<'_>> {
    let mut take = Take(data);
    let name_len = to_usize(u64::from(take.u32()?))?;
    let name = take.bytes(name_len)?;
    let count = take.u16()?;
    if take.0.len() != usize::from(count) * size_of::<u16>() {
        return None;
    }
    let mut block_size = false;
    while let Some(kind) = take.u16() {
        block_size |= kind == INFO_BLOCK_SIZE;
    }
    Some(InfoWanted { name, block_size })
}

fn option_reply(out: &mut Vec<u8>, code: u32, reply: u32, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(code);
    out.put_u32(reply);
    // All of our replies are a few words long.
    out.put_u32(u32::try_from(data.len()).unwrap_or(0));
    out.extend_from_slice(data);
}

fn refuse_option(out: &mut Vec<u8>, code: u32, reply: u32, why: &str) {
    option_reply(out, code, reply, why.as_bytes());
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Bytes.
    Read,
    /// Put bytes; they follow the request.
    Write,
    /// The end of the connection.
    Disconnect,
    /// Make what was written durable.
    Flush,
    /// Forget bytes.
    Trim,
    /// Bring bytes nearer.
    Cache,
    /// Put zeros.
    WriteZeroes,
    /// Anything else, by its number.
    Other(u16),
}

impl Command {
    fn of(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            other => Self::Other(other),
        }
    }
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// What is asked for.
    pub command: Command,
    /// The client's name for the request, repeated in its reply.
    pub cookie: u64,
    /// The first byte that is meant.
    pub offset_bytes: u64,
    /// How many bytes are meant.
    pub len_bytes: u32,
}

/// Reads a request.
///
/// # Errors
/// `InvalidFormat` when it is none: nobody knows where the next one starts, and the connection
/// must be closed.
pub fn parse_request(bytes: &[u8; REQUEST_BYTES]) -> Result<Request> {
    let mut take = Take(bytes);
    let mut parse = || {
        let magic = take.u32()?;
        let (flags, command) = (take.u16()?, Command::of(take.u16()?));
        let (cookie, offset_bytes) = (take.u64()?, take.u64()?);
        let request = Request { flags, command, cookie, offset_bytes, len_bytes: take.u32()? };
        Some((magic, request))
    };
    match parse() {
        Some((REQUEST_MAGIC, request)) => Ok(request),
        Some((magic, _)) => {
            Err(garbage("request magic", format!("{magic:#x}"), format!("{REQUEST_MAGIC:#x}")))
        }
        None => Err(garbage("request", "less", "28 bytes")),
    }
}

/// Whole sectors that cover what was asked for, and where in them that lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first sector.
    pub start_sector: u64,
    /// Bytes of all sectors, a multiple of the sector size; 0 for an empty read.
    pub cover_bytes: usize,
    /// Bytes before the first that was asked for, less than a sector.
    pub skip_bytes: usize,
    /// Bytes that were asked for.
    pub len_bytes: usize,
}

/// What is to be done about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Read and reply with data.
    Read(Span),
    /// Receive the payload, then write it.
    Write {
        /// The first sector.
        start_sector: u64,
        /// Bytes of the payload, whole sectors, at least one.
        len_bytes: usize,
        /// Flush before the reply.
        durable: bool,
    },
    /// Make sectors read as zeros.
    Zeroes {
        /// At least one; as many as the client likes.
        sectors: Range<u64>,
        /// What becomes of their space.
        space: Space,
        /// Flush before the reply.
        durable: bool,
    },
    /// Flush.
    Flush,
    /// Nothing is left to be done: reply with success.
    Done,
    /// Skip the payload, then reply with an error.
    Refuse {
        /// The error.
        errno: Errno,
        /// Bytes that follow the request, to be skipped.
        payload_bytes: u32,
    },
    /// The client takes its leave; there is no reply.
    Disconnect,
    /// The payload is longer than anybody would skip: close the connection.
    HangUp,
}

/// Decides about a request.
#[must_use]
pub fn plan(request: &Request, export: Export) -> Plan {
    let payload_bytes = if request.command == Command::Write { request.len_bytes } else { 0 };
    let refuse = |errno| Plan::Refuse { errno, payload_bytes };
    match request.command {
        Command::Disconnect => Plan::Disconnect,
        Command::Write if request.len_bytes > NBD_REQUEST_BYTES_MAX => Plan::HangUp,
        Command::Write | Command::Trim | Command::WriteZeroes if export.read_only => {
            refuse(Errno::Permission)
        }
        Command::Write | Command::Trim | Command::WriteZeroes => {
            plan_change(request, export).unwrap_or_else(refuse)
        }
        // No other flag was offered that a read or a flush could have.
        Command::Read | Command::Flush if has_other_flags(request, export, 0) => {
            refuse(Errno::Invalid)
        }
        Command::Flush if export.read_only => Plan::Done,
        Command::Flush => Plan::Flush,
        Command::Read => span(request, export).map_or(refuse(Errno::Invalid), Plan::Read),
        Command::Cache | Command::Other(_) => refuse(Errno::Invalid),
    }
}

/// Whether a request has flags besides `known` ones and what the export offered for all commands.
fn has_other_flags(request: &Request, export: Export, known: u16) -> bool {
    let offered = if export.read_only { 0 } else { COMMAND_FUA };
    request.flags & !(offered | known) != 0
}

/// What to do about a command that changes a disk that can be changed.
fn plan_change(request: &Request, export: Export) -> core::result::Result<Plan, Errno> {
    let command = request.command;
    let known = if command == Command::WriteZeroes { COMMAND_NO_HOLE } else { 0 };
    let (start, len) = (request.offset_bytes, u64::from(request.len_bytes));
    let unaligned = !start.is_multiple_of(SECTOR_SIZE) || !len.is_multiple_of(SECTOR_SIZE);
    if has_other_flags(request, export, known) || unaligned {
        return Err(Errno::Invalid);
    }
    // The protocol's own words for a write beyond the end, and for a trim.
    let beyond = if command == Command::Trim { Errno::Invalid } else { Errno::NoSpace };
    let bytes = range_from(start, len).filter(|bytes| bytes.end <= export.size_bytes);
    let bytes = bytes.ok_or(beyond)?;
    if bytes.is_empty() {
        return Ok(Plan::Done);
    }
    let durable = request.flags & COMMAND_FUA != 0;
    let sectors = bytes.start >> SECTOR_SHIFT..bytes.end >> SECTOR_SHIFT;
    if command == Command::Write {
        let len_bytes = to_usize(len).ok_or(Errno::NoMemory)?;
        return Ok(Plan::Write { start_sector: sectors.start, len_bytes, durable });
    }
    let keep = request.flags & COMMAND_NO_HOLE != 0;
    let space = if keep { Space::Keep } else { Space::Free };
    Ok(Plan::Zeroes { sectors, space, durable })
}

fn span(request: &Request, export: Export) -> Option<Span> {
    let start = request.offset_bytes;
    let end = start.checked_add(u64::from(request.len_bytes))?;
    if end > export.size_bytes || request.len_bytes > NBD_REQUEST_BYTES_MAX {
        return None;
    }
    let cover_start = start - start % SECTOR_SIZE;
    // The size is whole sectors, so the last sector that is touched is on the disk.
    let cover_end = if request.len_bytes == 0 { cover_start } else { round_up(end)? };
    Some(Span {
        start_sector: cover_start >> SECTOR_SHIFT,
        cover_bytes: to_usize(cover_end - cover_start)?,
        skip_bytes: to_usize(start - cover_start)?,
        len_bytes: to_usize(u64::from(request.len_bytes))?,
    })
}

fn round_up(bytes: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(SECTOR_SIZE)
}

/// The head of a reply; the data of a read that succeeded follows.
#[must_use]
pub fn reply(errno: Errno, cookie: u64) -> [u8; REPLY_BYTES] {
    let mut out = [0; REPLY_BYTES];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&(errno as u32).to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// The most bytes that [`Span::cover_bytes`] can have.
#[must_use]
pub fn cover_bytes_max() -> u64 {
    // Unaligned at both ends.
    u64::from(NBD_REQUEST_BYTES_MAX) + 2 * SECTOR_SIZE
}

const _: () = assert!(NBD_OPTION_BYTES_MAX <= NBD_REQUEST_BYTES_MAX);
const _: () = assert!(to_u64(REQUEST_BYTES) == 4 + 2 + 2 + 8 + 8 + 4);

#[cfg(test)]
mod tests;
