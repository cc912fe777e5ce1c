//! What servers, successors and people say to the supervisor, and what it answers: pure.
//!
//! ```text
//!   server      guard ------------> guarded      I serve device N: see to it when I die
//!               parcel ... parcel ->             what a successor needs, as open files
//!               live -------------->             the device can be used
//!               <------------- yield             another takes over now: end
//!   successor   <-- parcel ... , go              that server is gone: take over
//!               prepared ---------->             (upgrade) I could take over; then `go` comes
//!               live, or refused -->
//!   people      ping, recover, upgrade, retire -> done, or refused
//!               look ------------->             device N may be gone
//! ```
//!
//! One JSON object per packet, with the version of the [protocol](super).

use super::{Refusal, VERSION};
use crate::error::{Error, ErrorKind, Result};
use crate::server::process::Process;
use serde::{Deserialize, Serialize};

/// One packet's meaning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Note {
    /// A server is about to serve device `id`.
    Guard {
        /// The number N of `/dev/ublkbN`.
        id: u32,
        /// The server's process.
        server: Process,
    },
    /// The supervisor knows.
    Guarded,
    /// Some of a parcel's files, in order.
    Parcel {
        /// Whether these are the last ones.
        last: bool,
    },
    /// The device can be used.
    Live,
    /// A successor has everything it needs.
    Prepared,
    /// The server is to end without stopping its device.
    Yield,
    /// The successor is to take over.
    Go {
        /// When the supervisor saw the death, in nanoseconds of the monotonic clock.
        seen_ns: u64,
    },
    /// Are you there?
    Ping,
    /// Try again to bring device `id` back.
    Recover {
        /// The number N of `/dev/ublkbN`.
        id: u32,
    },
    /// Let the program in the packet's file serve device `id` from now on.
    Upgrade {
        /// The number N of `/dev/ublkbN`.
        id: u32,
    },
    /// End, for a supervisor of another version to come: the servers start one of theirs.
    Retire,
    /// Device `id` may be gone: look, and forget it if it is. Not answered.
    Look {
        /// The number N of `/dev/ublkbN`.
        id: u32,
    },
    /// It was done.
    Done {
        /// How long the device's readers waited, for an upgrade, in microseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pause_us: Option<u64>,
    },
    /// It was not done.
    Refused {
        /// Why not.
        error: Refusal,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    v: u32,
    #[serde(flatten)]
    note: Note,
}

impl Note {
    /// A refusal that tells `error`.
    #[must_use]
    pub fn refused(error: &Error) -> Self {
        Self::Refused { error: Refusal::of(error) }
    }

    /// The packet's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // String keys and no maps of its own: writing to memory cannot fail.
        serde_json::to_vec(&Envelope { v: VERSION, note: self.clone() }).unwrap_or_default()
    }

    /// The note in a packet.
    ///
    /// # Errors
    /// `Usage` for what is no note, `Unsupported` for another version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Versioned {
            v: u32,
        }
        let told =
            |error: serde_json::Error| Error::new(ErrorKind::Usage, format!("note: {error}"));
        let Versioned { v } = serde_json::from_slice(bytes).map_err(told)?;
        if v != VERSION {
            let message = format!("note: v: found {v}, expected {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        serde_json::from_slice::<Envelope>(bytes).map(|it| it.note).map_err(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_these_packets() {
        let server = Process { pid: 7, start_ticks: 9 };
        let error = Refusal { kind: "busy".to_owned(), message: "m".to_owned() };
        for (note, text) in [
            (
                Note::Guard { id: 3, server },
                r#"{"v":1,"op":"guard","id":3,"server":{"pid":7,"start_ticks":9}}"#,
            ),
            (Note::Guarded, r#"{"v":1,"op":"guarded"}"#),
            (Note::Parcel { last: true }, r#"{"v":1,"op":"parcel","last":true}"#),
            (Note::Live, r#"{"v":1,"op":"live"}"#),
            (Note::Go { seen_ns: 5 }, r#"{"v":1,"op":"go","seen_ns":5}"#),
            (Note::Upgrade { id: 0 }, r#"{"v":1,"op":"upgrade","id":0}"#),
            (Note::Retire, r#"{"v":1,"op":"retire"}"#),
            (Note::Done { pause_us: None }, r#"{"v":1,"op":"done"}"#),
            (Note::Done { pause_us: Some(8) }, r#"{"v":1,"op":"done","pause_us":8}"#),
            (
                Note::Refused { error },
                r#"{"v":1,"op":"refused","error":{"kind":"busy","message":"m"}}"#,
            ),
        ] {
            assert_eq!(String::from_utf8(note.encode()).unwrap(), text);
            assert_eq!(Note::parse(text.as_bytes()).unwrap(), note);
        }
    }

    #[test]
    fn what_is_no_note_is_refused_with_the_reason() {
        for (text, kind, told) in [
            ("", ErrorKind::Usage, "EOF"),
            ("[]", ErrorKind::Usage, "invalid length"),
            (r#"{"op":"ping"}"#, ErrorKind::Usage, "missing field `v`"),
            (r#"{"v":1}"#, ErrorKind::Usage, "missing field `op`"),
            (r#"{"v":1,"op":"dance"}"#, ErrorKind::Usage, "unknown variant"),
            (r#"{"v":1,"op":"guard","id":-1}"#, ErrorKind::Usage, "invalid value"),
            (r#"{"v":2,"op":"whatever"}"#, ErrorKind::Unsupported, "found 2, expected 1"),
        ] {
            let error = Note::parse(text.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), kind, "{text}");
            assert!(error.to_string().contains(told), "{text}: {error}");
        }
    }
}
