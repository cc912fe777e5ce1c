//! The control protocol: one request line in, one reply line out, both JSON.
//!
//! ```text
//!   {"v":1,"op":"stop"}            {"v":1,"ok":true}
//!   {"v":1,"op":"stat"}            {"v":1,"ok":true,"stat":{...}}
//!   {"v":9,"op":"ping"}            {"v":1,"error":{"kind":"unsupported","message":"..."}}
//! ```
//!
//! Pure: bytes and values only. The same lines tell a starter how its server's start went (see
//! [`Readiness`]). Unknown fields are ignored, so that either end may learn new ones.

pub mod notes;

use super::kernel::Counters;
use super::snapshot::{SnapshotOrder, SnapshotReport};
use super::state::Recovery;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::ERROR_TEXT_BYTES_MAX;
use crate::source::RemoteUsage;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The version of this protocol.
pub const VERSION: u32 = 1;

/// What a client can ask of the server of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Are you there?
    Ping,
    /// What has the device done?
    Stat,
    /// Stop and delete the device, unless it is in use. The reply comes when it is gone.
    Stop,
    /// The same, but a device in use is stopped as soon as it is not; the reply comes at once.
    StopLazy,
    /// Stop and delete the device though it is in use.
    StopForce,
    /// Make the upper a layer and put a new one in its place. The reply comes when that is done.
    Snapshot(Box<SnapshotOrder>),
    /// Grow the disk to so many bytes. The reply comes when the kernel knows.
    Resize(u64),
}

impl Op {
    fn name(&self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::Stat => "stat",
            Self::Stop => "stop",
            Self::StopLazy => "stop-lazy",
            Self::StopForce => "stop-force",
            Self::Snapshot(_) => "snapshot",
            Self::Resize(_) => "resize",
        }
    }
}

#[derive(Debug, Serialize)]
struct Request<'a> {
    v: u32,
    op: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<&'a SnapshotOrder>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size_bytes: Option<u64>,
}

#[derive(Deserialize)]
struct RawRequest {
    v: u32,
    op: String,
    #[serde(default)]
    snapshot: Option<Box<SnapshotOrder>>,
    #[serde(default)]
    size_bytes: Option<u64>,
}

/// The answer to one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The server's [`VERSION`].
    pub v: u32,
    /// Whether it was done.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Refusal>,
    /// The answer to [`Op::Stat`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stat: Option<DeviceStat>,
    /// The answer to [`Op::Snapshot`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotReport>,
    /// The answer to [`Op::Resize`]: the size before, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resized: Option<u64>,
}

/// An error on its way between processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The stable name of its kind.
    pub kind: String,
    /// Its whole chain.
    pub message: String,
}

/// What a server tells about its device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceStat {
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// The server's process.
    pub pid: u32,
    /// The config that was attached.
    pub config: PathBuf,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// How long the device has been usable.
    pub uptime_ms: u64,
    /// Whether the device outlives its server.
    pub recoverable: bool,
    /// How often a successor took over.
    pub recovery_count: u64,
    /// How the last one did.
    pub last_recovery: Option<Recovery>,
    /// What the queues have done, if the front end counts.
    pub counters: Option<Counters>,
    /// How much the upper holds, if there is one that is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upper: Option<UpperUsage>,
    /// What layers in a registry cost its server so far, if it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemoteStat>,
}

/// What layers in a registry cost so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RemoteStat {
    /// How many they are; one that is there twice counts once.
    pub layers: u64,
    /// How many of them are complete in the cache, by their digest.
    pub whole_layers: u64,
    /// Their bytes, as they are stored.
    pub layer_bytes: u64,
    /// Reads that found all their bytes in the cache.
    pub hits: u64,
    /// Reads that did not.
    pub misses: u64,
    /// Bytes that reads asked for.
    pub needed_bytes: u64,
    /// Bytes that were fetched.
    pub fetched_bytes: u64,
    /// The last two, the second in percent of the first; none before anything was asked for.
    pub fetched_percent: Option<u64>,
    /// Bytes that were fetched before a read asked for them.
    pub ahead_bytes: u64,
    /// Fetches that failed.
    pub fetch_failures: u64,
    /// Extents that were kept, found bad and thrown away.
    pub quarantined_extents: u64,
    /// Of these, those whose content a layer's own checksums found wrong: fetched once more.
    pub refetched_extents: u64,
    /// Extents that were served without being kept.
    pub degraded_extents: u64,
    /// Requests, those included that were made again.
    pub requests: u64,
    /// Requests that were made again.
    pub retries: u64,
    /// Times that a fetch waited for credentials that work.
    pub credential_waits: u64,
}

impl RemoteStat {
    /// The same, as it is told.
    #[must_use]
    pub fn of(usage: &RemoteUsage) -> Self {
        let (needed, fetched) = (usage.needed_bytes, usage.fetched_bytes);
        Self {
            layers: usage.blobs,
            whole_layers: usage.whole_blobs,
            layer_bytes: usage.blob_bytes,
            hits: usage.hits,
            misses: usage.misses,
            needed_bytes: needed,
            fetched_bytes: fetched,
            fetched_percent: fetched.saturating_mul(100).checked_div(needed),
            ahead_bytes: usage.ahead_bytes,
            fetch_failures: usage.fetch_failures,
            quarantined_extents: usage.quarantined_extents,
            refetched_extents: usage.refetched_extents,
            degraded_extents: usage.degraded_extents,
            requests: usage.requests,
            retries: usage.retries,
            credential_waits: usage.credential_waits,
        }
    }
}

/// How much a writable upper holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpperUsage {
    /// Its data file.
    pub data: PathBuf,
    /// Bytes of the data file that are seen.
    pub live_bytes: u64,
    /// Bytes of the data file.
    pub file_bytes: u64,
    /// Bytes of the data file that nothing points at any more; later writes take them.
    pub dead_bytes: u64,
    /// Bytes of the index file.
    pub index_bytes: u64,
    /// Index entries of writes that no flush has made durable yet.
    pub unflushed_entries: u64,
    /// Why nothing can be written any more, if so.
    pub failure: Option<String>,
    /// Bytes of the data file that cannot be written again now: what counts against the quota.
    #[serde(default)]
    pub used_bytes: u64,
    /// Most bytes of the data file, if that is bounded.
    #[serde(default)]
    pub quota_bytes: Option<u64>,
    /// How much of the quota is used.
    #[serde(default)]
    pub quota_percent: Option<u64>,
    /// That there is little room left, as of the last flush.
    #[serde(default)]
    pub warning: Option<String>,
}

/// What a server tells the process that started it, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Readiness {
    /// The device can be opened and the result file says so.
    Ready {
        /// The number N of `/dev/ublkbN`.
        id: u32,
    },
    /// There is no device, and nothing is left of the attempt.
    Failed(Refusal),
}

impl Reply {
    /// The request was carried out.
    #[must_use]
    pub fn done() -> Self {
        Self { v: VERSION, ok: true, error: None, stat: None, snapshot: None, resized: None }
    }

    /// The answer to [`Op::Snapshot`].
    #[must_use]
    pub fn snapshot(report: SnapshotReport) -> Self {
        Self { snapshot: Some(report), ..Self::done() }
    }

    /// The answer to [`Op::Resize`].
    #[must_use]
    pub fn resized(before_bytes: u64) -> Self {
        Self { resized: Some(before_bytes), ..Self::done() }
    }

    /// The answer to [`Op::Stat`].
    #[must_use]
    pub fn stat(stat: DeviceStat) -> Self {
        Self { stat: Some(stat), ..Self::done() }
    }

    /// The request was not carried out.
    #[must_use]
    pub fn refused(error: &Error) -> Self {
        Self { ok: false, error: Some(Refusal::of(error)), ..Self::done() }
    }

    /// The reply itself if the request was carried out, otherwise the server's error.
    ///
    /// # Errors
    /// What the server said.
    pub fn into_result(self) -> Result<Self> {
        match &self.error {
            Some(refusal) => Err(refusal.to_error()),
            None if self.ok => Ok(self),
            None => Err(Error::new(ErrorKind::Corrupt, "control reply: neither ok nor error")),
        }
    }
}

impl Refusal {
    /// `error`, ready to travel.
    #[must_use]
    pub fn of(error: &Error) -> Self {
        let mut message = format!("{error:#}");
        // What others wrote (a path, a digest) may be longer than the line that carries it.
        if message.len() > ERROR_TEXT_BYTES_MAX {
            message.truncate(message.floor_char_boundary(ERROR_TEXT_BYTES_MAX));
            message.push_str("...");
        }
        Self { kind: error.kind().name().to_owned(), message }
    }

    /// The error as it was, its chain in one text. A kind of a newer version becomes `Io`.
    #[must_use]
    pub fn to_error(&self) -> Error {
        let kind = KINDS.iter().find(|kind| kind.name() == self.kind);
        Error::new(kind.copied().unwrap_or(ErrorKind::Io), self.message.clone())
    }
}

/// Every kind that can travel.
const KINDS: [ErrorKind; 15] = [
    ErrorKind::Usage,
    ErrorKind::InvalidConfig,
    ErrorKind::InvalidFormat,
    ErrorKind::Unsupported,
    ErrorKind::Corrupt,
    ErrorKind::Integrity,
    ErrorKind::OutOfRange,
    ErrorKind::NotFound,
    ErrorKind::NoSpace,
    ErrorKind::ReadOnly,
    ErrorKind::Busy,
    ErrorKind::Io,
    ErrorKind::Kernel,
    ErrorKind::Canceled,
    ErrorKind::Timeout,
];

/// The line that asks for `op`.
#[must_use]
pub fn encode_request(op: &Op) -> Vec<u8> {
    let snapshot = if let Op::Snapshot(order) = op { Some(&**order) } else { None };
    let size_bytes = if let Op::Resize(bytes) = op { Some(*bytes) } else { None };
    line(&Request { v: VERSION, op: op.name(), snapshot, size_bytes })
}

/// The operation that a request line asks for.
///
/// # Errors
/// `Usage` for what is no request, `Unsupported` for another version or operation.
pub fn parse_request(line: &[u8]) -> Result<Op> {
    let request: RawRequest = serde_json::from_slice(line)
        .map_err(|error| Error::new(ErrorKind::Usage, format!("control request: {error}")))?;
    let unsupported = |message| Err(Error::new(ErrorKind::Unsupported, message));
    if request.v != VERSION {
        let found = request.v;
        return unsupported(format!("control request: v: found {found}, expected {VERSION}"));
    }
    match request.op.as_str() {
        "ping" => Ok(Op::Ping),
        "stat" => Ok(Op::Stat),
        "stop" => Ok(Op::Stop),
        "stop-lazy" => Ok(Op::StopLazy),
        "stop-force" => Ok(Op::StopForce),
        "snapshot" => {
            let missing = || Error::new(ErrorKind::Usage, "control request: snapshot of what?");
            request.snapshot.map(Op::Snapshot).ok_or_else(missing)
        }
        "resize" => {
            let missing = || Error::new(ErrorKind::Usage, "control request: resize to what?");
            request.size_bytes.map(Op::Resize).ok_or_else(missing)
        }
        other => unsupported(format!("control request: op: found {other:?}")),
    }
}

/// The line of a reply.
#[must_use]
pub fn encode_reply(reply: &Reply) -> Vec<u8> {
    line(reply)
}

/// The reply in a line.
///
/// # Errors
/// `Corrupt` for what is no reply, `Unsupported` for another version.
pub fn parse_reply(line: &[u8]) -> Result<Reply> {
    let reply: Reply = serde_json::from_slice(line)
        .map_err(|error| Error::new(ErrorKind::Corrupt, format!("control reply: {error}")))?;
    if reply.v != VERSION {
        let message = format!("control reply: v: found {}, expected {VERSION}", reply.v);
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(reply)
}

/// The line that tells a starter how it went.
#[must_use]
pub fn encode_readiness(readiness: &Readiness) -> Vec<u8> {
    line(readiness)
}

/// What a started server tells; `None` for anything that is no whole line of it.
#[must_use]
pub fn parse_readiness(line: &[u8]) -> Option<Readiness> {
    serde_json::from_slice(line.strip_suffix(b"\n")?).ok()
}

fn line<T: Serialize>(value: &T) -> Vec<u8> {
    // These types have string keys and no maps of their own: writing them to memory cannot fail.
    let mut line = serde_json::to_vec(value).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endless_error_text_still_fits_the_line_that_carries_it() {
        let error = Error::new(ErrorKind::Unsupported, "\u{1}\u{e9}".repeat(100_000));
        let line = encode_readiness(&Readiness::Failed(Refusal::of(&error)));
        assert!(line.len() < usize::try_from(crate::limits::READY_LINE_BYTES_MAX).unwrap());
        let Some(Readiness::Failed(refusal)) = parse_readiness(&line) else { panic!("{line:?}") };
        assert_eq!(refusal.to_error().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn requests_are_these_lines() {
        for (op, line) in [
            (Op::Ping, "{\"v\":1,\"op\":\"ping\"}\n"),
            (Op::Stat, "{\"v\":1,\"op\":\"stat\"}\n"),
            (Op::Stop, "{\"v\":1,\"op\":\"stop\"}\n"),
            (Op::StopLazy, "{\"v\":1,\"op\":\"stop-lazy\"}\n"),
            (Op::StopForce, "{\"v\":1,\"op\":\"stop-force\"}\n"),
            (
                Op::Snapshot(Box::new(SnapshotOrder {
                    layer: "/l".into(),
                    upper: "/u".into(),
                    config: "/c".into(),
                })),
                "{\"v\":1,\"op\":\"snapshot\",\"snapshot\":{\"layer\":\"/l\",\"upper\":\"/u\",\
                 \"config\":\"/c\"}}\n",
            ),
            (Op::Resize(1 << 20), "{\"v\":1,\"op\":\"resize\",\"size_bytes\":1048576}\n"),
        ] {
            assert_eq!(String::from_utf8(encode_request(&op)).unwrap(), line);
            assert_eq!(parse_request(line.as_bytes()).unwrap(), op);
        }
        assert_eq!(parse_request(br#"{"v":1,"op":"ping","new":[]}"#).unwrap(), Op::Ping);
    }

    #[test]
    fn a_request_that_is_not_understood_is_refused_with_the_reason() {
        for (line, kind, told) in [
            ("", ErrorKind::Usage, "EOF"),
            ("GET / HTTP/1.1", ErrorKind::Usage, "expected value"),
            ("{\"op\":\"stop\"}", ErrorKind::Usage, "missing field `v`"),
            ("{\"v\":1}", ErrorKind::Usage, "missing field `op`"),
            ("{\"v\":-1,\"op\":\"stop\"}", ErrorKind::Usage, "invalid value"),
            ("{\"v\":2,\"op\":\"stop\"}", ErrorKind::Unsupported, "v: found 2, expected 1"),
            ("{\"v\":1,\"op\":\"snapshot\"}", ErrorKind::Usage, "of what"),
            ("{\"v\":1,\"op\":\"snapshot\",\"snapshot\":7}", ErrorKind::Usage, "invalid type"),
            ("{\"v\":1,\"op\":\"halt\"}", ErrorKind::Unsupported, "op: found \"halt\""),
        ] {
            let error = parse_request(line.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), kind, "{line}");
            assert!(error.to_string().contains(told), "{line}: {error}");
        }
    }

    #[test]
    fn an_error_keeps_kind_and_story_on_its_way() {
        for kind in KINDS {
            let error = Error::new(kind, "why").context("do it");
            let line = encode_reply(&Reply::refused(&error));
            let back = parse_reply(&line).unwrap().into_result().unwrap_err();
            assert_eq!((back.kind(), back.to_string().as_str()), (kind, "do it: why"));
        }
        let newer = Refusal { kind: "on-fire".to_owned(), message: "m".to_owned() };
        assert_eq!(newer.to_error().kind(), ErrorKind::Io);
    }

    #[test]
    fn replies_are_these_lines() {
        assert_eq!(encode_reply(&Reply::done()), b"{\"v\":1,\"ok\":true}\n");
        let refused = Reply::refused(&Error::new(ErrorKind::Busy, "mounted"));
        assert_eq!(
            encode_reply(&refused),
            b"{\"v\":1,\"error\":{\"kind\":\"busy\",\"message\":\"mounted\"}}\n"
        );
        let empty = parse_reply(b"{\"v\":1}").unwrap().into_result().unwrap_err();
        assert_eq!(empty.kind(), ErrorKind::Corrupt);
        assert_eq!(parse_reply(b"{\"v\":2}").unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(parse_reply(b"ok").unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_readiness_line_that_was_cut_off_says_nothing() {
        let ready = Readiness::Ready { id: 7 };
        let line = encode_readiness(&ready);
        assert_eq!(line, b"{\"ready\":{\"id\":7}}\n");
        assert_eq!(parse_readiness(&line), Some(ready));
        assert_eq!(parse_readiness(&line[..line.len() - 1]), None);
        assert_eq!(parse_readiness(b""), None);
        let failed = Readiness::Failed(Refusal::of(&Error::new(ErrorKind::Busy, "x")));
        assert_eq!(parse_readiness(&encode_readiness(&failed)), Some(failed));
    }
}
