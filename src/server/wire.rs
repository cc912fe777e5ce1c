//! Lines over a stream, with a limit on their length and a deadline for the whole of them.

use crate::error::{Error, ErrorKind};
use crate::units::to_u64;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::io::{ErrorKind as IoKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What went wrong when reading a line.
#[derive(Debug)]
pub(super) enum LineError {
    /// The other end closed before the line was whole; how many bytes had come.
    CutOff(u64),
    /// It has more bytes than allowed.
    TooLong,
    /// It was not whole at the deadline.
    Deadline,
    /// The operating system's word.
    Io(std::io::Error),
}

impl LineError {
    /// The error for a line that is `what` ("control request").
    #[must_use]
    pub(super) fn tell(&self, what: &str) -> Error {
        match self {
            Self::CutOff(bytes) => {
                Error::new(ErrorKind::Usage, format!("{what}: cut off after {bytes} bytes"))
            }
            Self::TooLong => Error::new(ErrorKind::Usage, format!("{what}: too long")),
            Self::Deadline => Error::new(ErrorKind::Timeout, format!("{what}: none in time")),
            Self::Io(error) => Error::io(format!("{what}: read"), error),
        }
    }
}

/// Reads one line of at most `bytes_max` bytes, its newline included, within `patience`.
///
/// # Errors
/// See [`LineError`].
pub(super) fn read_line(
    mut stream: &UnixStream,
    bytes_max: u64,
    patience: Duration,
) -> std::result::Result<Vec<u8>, LineError> {
    let deadline = Instant::now() + patience;
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A timeout of zero would mean "for ever".
        if left.is_zero() {
            return Err(LineError::Deadline);
        }
        stream.set_read_timeout(Some(left)).map_err(LineError::Io)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(LineError::CutOff(to_u64(line.len()))),
            Ok(count) => line.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(error) if matches!(error.kind(), IoKind::WouldBlock | IoKind::TimedOut) => {}
            Err(error) if error.kind() == IoKind::Interrupted => {}
            Err(error) => return Err(LineError::Io(error)),
        }
        let end = line.iter().position(|&byte| byte == b'\n');
        let length = end.map_or(line.len(), |end| end + 1);
        if to_u64(length) > bytes_max {
            return Err(LineError::TooLong);
        }
        if end.is_some() {
            line.truncate(length);
            return Ok(line);
        }
    }
}

/// Whether something can be read, be it the end, before `patience` is over.
pub(super) fn is_readable_within(stream: &UnixStream, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            Ok(0) => return false,
            Ok(_) | Err(_) => return true,
        }
    }
}

/// Whether the other end is closed and nothing is left to read. Waits for either.
pub(super) fn is_at_end(stream: &UnixStream) -> bool {
    let mut byte = [0; 1];
    matches!(rustix::net::recv(stream, &mut byte[..], RecvFlags::PEEK), Ok((_, 0)))
}

/// Writes `line`; each piece must be taken within `patience`.
///
/// # Errors
/// What the operating system says.
pub(super) fn write_line(
    mut stream: &UnixStream,
    line: &[u8],
    patience: Duration,
) -> std::io::Result<()> {
    stream.set_write_timeout(Some(patience))?;
    stream.write_all(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn a_line_may_come_in_pieces_and_nothing_behind_it_is_returned() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            for piece in [&b"ab"[..], b"c\nde"] {
                theirs.write_all(piece).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
            theirs
        });
        assert_eq!(read_line(&ours, 100, PATIENCE).unwrap(), b"abc\n");
        drop(writer.join().unwrap());
    }

    #[test]
    fn the_limit_counts_the_newline() {
        for (limit, fits) in [(4, true), (3, false)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(b"abc\n").unwrap();
            assert_eq!(read_line(&ours, limit, PATIENCE).is_ok(), fits, "{limit}");
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"abcd").unwrap();
        assert!(matches!(read_line(&ours, 3, PATIENCE), Err(LineError::TooLong)));
    }

    #[test]
    fn a_dribbling_writer_does_not_move_the_deadline() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            while theirs.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let start = Instant::now();
        let line = read_line(&ours, 1 << 20, Duration::from_millis(200));
        assert!(matches!(line, Err(LineError::Deadline)), "{line:?}");
        assert!(start.elapsed() < Duration::from_secs(5));
        drop(ours);
        writer.join().unwrap();
    }

    #[test]
    fn a_line_without_its_end_is_cut_off() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"abc").unwrap();
        drop(theirs);
        assert!(matches!(read_line(&ours, 100, PATIENCE), Err(LineError::CutOff(3))));
    }
}
