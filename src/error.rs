//! One error type for the library: what kind, what happened where, and why.
//!
//! The kind decides the errno that the kernel sees and the exit code that the caller sees; the
//! table is [`ErrorKind`]. The text is located: what, where, found, expected. The context is a
//! verb phrase added on the way up ("open layer 3 (file a.lsmt)"); `{:#}` prints the whole chain.

use std::{fmt, io};

/// Shorthand used throughout the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, coarse enough to act on. Each kind has one errno and one exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The command line is wrong. Exit code 64.
    Usage,
    /// A configuration file is wrong. Exit code 2.
    InvalidConfig,
    /// The bytes are not of the expected format at all (magic, wrapper). Exit code 3, EIO.
    InvalidFormat,
    /// Well-formed, but a version, flag, codec or kernel feature we do not have. Exit code 4.
    Unsupported,
    /// A structure contradicts itself or its file. Exit code 5, EIO.
    Corrupt,
    /// A checksum or digest does not match. Exit code 5, EILSEQ.
    Integrity,
    /// A range outside the device or the file. Exit code 1, EINVAL.
    OutOfRange,
    /// A file or blob does not exist. Exit code 6, ENODATA.
    NotFound,
    /// A registry wants other credentials than we have. Exit code 7, ENOLINK.
    Unauthorized,
    /// A registry cannot be reached, or says that it cannot serve now. Exit code 8, ENOLINK.
    Unavailable,
    /// The storage medium has no space. Exit code 9, ENOSPC.
    NoSpace,
    /// A write to something read-only. Exit code 1, EROFS.
    ReadOnly,
    /// The device is in use (mounted, held). Exit code 12, EBUSY.
    Busy,
    /// The operating system refused a file operation. Exit code 1, the errno itself.
    Io,
    /// The kernel's ublk driver or io_uring refused. Exit code 11, EIO.
    Kernel,
    /// The operation was given up because the device stops. Exit code 1, EIO.
    Canceled,
    /// A deadline passed. Exit code 8, ETIMEDOUT.
    Timeout,
}

impl ErrorKind {
    /// The exit code of a command that ends with this error. Stable: scripts depend on it.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Io | Self::OutOfRange | Self::ReadOnly | Self::Canceled => 1,
            Self::InvalidConfig => 2,
            Self::InvalidFormat => 3,
            Self::Unsupported => 4,
            Self::Corrupt | Self::Integrity => 5,
            Self::NotFound => 6,
            Self::Unauthorized => 7,
            Self::Unavailable | Self::Timeout => 8,
            Self::NoSpace => 9,
            Self::Kernel => 11,
            Self::Busy => 12,
            Self::Usage => 64,
        }
    }

    /// The positive errno that a block request fails with. Chosen so that the kernel's own log
    /// names the cause: EILSEQ prints "protection", ENODATA "critical medium", ENOLINK
    /// "recoverable transport".
    #[must_use]
    pub const fn errno(self) -> i32 {
        match self {
            Self::Usage | Self::InvalidConfig | Self::OutOfRange => libc::EINVAL,
            Self::InvalidFormat | Self::Corrupt | Self::Io | Self::Kernel | Self::Canceled => {
                libc::EIO
            }
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::Integrity => libc::EILSEQ,
            Self::NotFound => libc::ENODATA,
            Self::Unauthorized | Self::Unavailable => libc::ENOLINK,
            Self::NoSpace => libc::ENOSPC,
            Self::ReadOnly => libc::EROFS,
            Self::Busy => libc::EBUSY,
            Self::Timeout => libc::ETIMEDOUT,
        }
    }

    /// The kind's stable name in JSON output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::InvalidConfig => "invalid-config",
            Self::InvalidFormat => "invalid-format",
            Self::Unsupported => "unsupported",
            Self::Corrupt => "corrupt",
            Self::Integrity => "integrity",
            Self::OutOfRange => "out-of-range",
            Self::NotFound => "not-found",
            Self::Unauthorized => "unauthorized",
            Self::Unavailable => "unavailable",
            Self::NoSpace => "no-space",
            Self::ReadOnly => "read-only",
            Self::Busy => "busy",
            Self::Io => "io",
            Self::Kernel => "kernel",
            Self::Canceled => "canceled",
            Self::Timeout => "timeout",
        }
    }
}

/// An error with its kind, its story and its cause.
///
/// `Display` prints the outermost context; the alternate form (`{:#}`) prints the chain, outermost
/// first, joined by `: `.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    // Outermost last: pushed on the way up.
    context: Vec<String>,
    os_error: Option<i32>,
}

impl Error {
    /// An error of `kind` told by `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), context: Vec::new(), os_error: None }))
    }

    /// A field of a structure that contradicts its format: what, where, found, expected.
    pub fn field(
        kind: ErrorKind,
        what: &str,
        at_byte: u64,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        Self::new(kind, format!("{what} at byte {at_byte}: found {found}, expected {expected}"))
    }

    /// [`Error::field`] of kind [`ErrorKind::Corrupt`].
    pub fn corrupt(
        what: &str,
        at_byte: u64,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        Self::field(ErrorKind::Corrupt, what, at_byte, found, expected)
    }

    /// A failed operating system call. The kind follows the errno; the errno itself is kept.
    pub fn io(action: impl Into<String>, error: &io::Error) -> Self {
        // By the standard library's kind, which outlives being wrapped; the errno does not.
        let kind = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NotFound,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            io::ErrorKind::ResourceBusy => ErrorKind::Busy,
            io::ErrorKind::TimedOut => ErrorKind::Timeout,
            _ => ErrorKind::Io,
        };
        let mut this = Self::new(kind, format!("{}: {error}", action.into()));
        this.0.os_error = error.raw_os_error();
        this
    }

    /// The same error, told from one level further up. `action` is a verb phrase.
    #[must_use]
    pub fn context(mut self, action: impl Into<String>) -> Self {
        self.0.context.push(action.into());
        self
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The positive errno for a block request that fails with this error.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self.0.kind {
            ErrorKind::Io => self.0.os_error.unwrap_or(libc::EIO),
            kind => kind.errno(),
        }
    }

    /// The exit code of a command that ends with this error.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        self.0.kind.exit_code()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !f.alternate() {
            return f.write_str(self.0.context.last().unwrap_or(&self.0.message));
        }
        for action in self.0.context.iter().rev() {
            write!(f, "{action}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self:#})", self.0.kind)
    }
}

impl std::error::Error for Error {}

/// Adds context to a result without a closure at every call.
pub trait ResultExt<T> {
    /// See [`Error::context`]; `action` runs only on failure.
    ///
    /// # Errors
    /// The error it was called on, with the context added.
    fn context(self, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.context(action()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_told_from_the_outside_in() {
        let error = Error::corrupt("lsmt trailer: index_size", 42, 7, "at most 3")
            .context("parse the trailer")
            .context("open layer 0");
        assert_eq!(error.to_string(), "open layer 0");
        assert_eq!(
            format!("{error:#}"),
            "open layer 0: parse the trailer: lsmt trailer: index_size at byte 42: found 7, \
             expected at most 3"
        );
        assert_eq!((error.exit_code(), error.errno()), (5, libc::EIO));
    }

    #[test]
    fn a_failed_system_call_keeps_its_errno() {
        let denied = std::io::Error::from_raw_os_error(libc::EACCES);
        assert_eq!(Error::io("open x", &denied).errno(), libc::EACCES);
        let missing = std::io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(Error::io("open x", &missing).kind(), ErrorKind::NotFound);
        for (errno, kind) in [
            (libc::ENOTDIR, ErrorKind::NotFound),
            (libc::ENOSPC, ErrorKind::NoSpace),
            (libc::EDQUOT, ErrorKind::NoSpace),
            (libc::EROFS, ErrorKind::ReadOnly),
            (libc::EBUSY, ErrorKind::Busy),
            (libc::ETIMEDOUT, ErrorKind::Timeout),
            (libc::EIO, ErrorKind::Io),
        ] {
            let error = std::io::Error::from_raw_os_error(errno);
            assert_eq!(Error::io("x", &error).kind(), kind, "{errno}");
            let wrapped = std::io::Error::new(error.kind(), "told by a library");
            assert_eq!(Error::io("x", &wrapped).kind(), kind, "{errno}, wrapped");
        }
    }
}
