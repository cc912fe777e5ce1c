//! Why one attempt failed, and what may help.

use super::retry::{self, Remedy};
use crate::error::{Error, ErrorKind};
use std::time::Duration;

/// What a `resultFile` says of a remote layer that could not be opened: the reference's words,
/// which others look for.
#[must_use]
pub fn result_text(url: &str, kind: ErrorKind) -> String {
    let why = match kind {
        ErrorKind::Unauthorized => "Authentication failed",
        ErrorKind::Unavailable => "Connection failed",
        ErrorKind::Timeout => "Get meta timedout",
        ErrorKind::NotFound => "No such file or directory",
        ErrorKind::Busy => "Too many requests",
        _ => "Unexpected response",
    };
    format!("failed to open remote file {url}: {why}")
}

/// Whether a refusal by this status tells nothing of what else is in the repository: a scanner of
/// images says 403 of one blob, and a password that is wrong is wrong for all.
#[must_use]
pub(super) const fn is_of_one(status: u16) -> bool {
    status == 403
}

/// A failed attempt. The text names status, host and path, and never a secret.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) remedy: Remedy,
    pub(super) kind: ErrorKind,
    pub(super) text: String,
    /// How long the host asks to be left alone.
    pub(super) retry_after: Option<Duration>,
    /// See [`is_of_one`].
    pub(super) is_of_one: bool,
}

impl Fault {
    pub(super) fn new(remedy: Remedy, kind: ErrorKind, text: impl Into<String>) -> Self {
        Self { remedy, kind, text: text.into(), retry_after: None, is_of_one: false }
    }

    /// An answer that must not be believed.
    pub(super) fn malformed(text: impl Into<String>) -> Self {
        Self::new(Remedy::Few, ErrorKind::Corrupt, text)
    }

    /// Nobody there, or nobody who can serve.
    pub(super) fn unavailable(text: impl Into<String>) -> Self {
        Self::new(Remedy::Wait, ErrorKind::Unavailable, text)
    }

    /// Too slow.
    pub(super) fn slow(text: impl Into<String>) -> Self {
        Self::new(Remedy::Wait, ErrorKind::Timeout, text)
    }

    /// A host that is to be left alone for so long, and was not asked.
    pub(super) fn on_hold(place: &str, left: Duration) -> Self {
        let text = format!("{place}: to be left alone for {left:.1?} more, as it asked");
        let retry_after = Some(left);
        Self { retry_after, ..Self::new(Remedy::Hold, ErrorKind::Unavailable, text) }
    }

    /// Other credentials are wanted.
    pub(super) fn unauthorized(text: impl Into<String>) -> Self {
        Self::new(Remedy::Credentials, ErrorKind::Unauthorized, text)
    }

    /// A status other than success.
    pub(super) fn status(status: u16, place: &str, retry_after: Option<Duration>) -> Self {
        let (remedy, kind) = retry::classify(status);
        let text = format!("HTTP status {status} from {place}");
        Self { remedy, kind, text, retry_after, is_of_one: is_of_one(status) }
    }

    /// The same fault, which nothing helps against.
    pub(super) fn hopeless(mut self) -> Self {
        self.remedy = Remedy::Nothing;
        self
    }

    pub(super) fn error(&self) -> Error {
        Error::new(self.kind, self.text.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_in_the_words_of_the_reference() {
        for (kind, why) in [
            (ErrorKind::Unauthorized, "Authentication failed"),
            (ErrorKind::Unavailable, "Connection failed"),
            (ErrorKind::Timeout, "Get meta timedout"),
            (ErrorKind::NotFound, "No such file or directory"),
            (ErrorKind::Corrupt, "Unexpected response"),
            (ErrorKind::Integrity, "Unexpected response"),
        ] {
            let expected = format!("failed to open remote file https://h/x: {why}");
            assert_eq!(result_text("https://h/x", kind), expected);
        }
    }
}
