//! A log file of bounded size, as this process's standard error.
//!
//! Everything that a server says goes there, panics and the words of C libraries included, because
//! it is the descriptor that is moved. Our own lines are counted; when the file has reached
//! [`LOG_BYTES_MAX`] it gets the ending `.1`, over the one before, and a new one is begun.

use crate::error::{Error, Result};
use crate::limits::LOG_BYTES_MAX;
use crate::units::to_u64;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The log file, once there is one.
static LOG: Mutex<Option<LogFile>> = Mutex::new(None);

struct LogFile {
    path: PathBuf,
    bytes: u64,
}

/// Makes the file at `path` this process's standard error.
///
/// # Errors
/// What the operating system says.
pub fn log_to(path: &Path) -> Result<()> {
    let told = |error: &io::Error| Error::io(format!("open log {}", path.display()), error);
    let file = open(path).map_err(|error| told(&error))?;
    let bytes = file.metadata().map_err(|error| told(&error))?.len();
    nix::unistd::dup2_stderr(file)
        .map_err(|errno| Error::io("move standard error to the log", &errno.into()))?;
    *LOG.lock().unwrap_or_else(PoisonError::into_inner) =
        Some(LogFile { path: path.to_owned(), bytes });
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Standard error that turns the log over when it is full.
#[derive(Debug)]
pub(super) struct BoundedStderr;

impl Write for BoundedStderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(log) = &mut *log {
            if log.bytes >= LOG_BYTES_MAX {
                log.turn_over();
            }
            log.bytes = log.bytes.saturating_add(to_u64(line.len()));
        }
        io::stderr().write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl LogFile {
    /// Begins a new file. If that cannot be done the old one goes on: words are worth more than
    /// the bound, and the next attempt comes after as many bytes again.
    fn turn_over(&mut self) {
        self.bytes = 0;
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        let turned = std::fs::rename(&self.path, old).and_then(|()| open(&self.path));
        let moved = turned.and_then(|file| nix::unistd::dup2_stderr(file).map_err(Into::into));
        if let Err(error) = moved {
            let _ = writeln!(io::stderr(), "the log is not turned over: {error}");
        }
    }
}
