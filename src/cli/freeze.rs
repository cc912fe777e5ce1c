//! A file system that is frozen for a moment, and thawed whatever happens to who froze it.
//!
//! A process of its own does both, by `fsfreeze`: it thaws when its standard input ends, which it
//! does with this process, however that ends, or when its time is up.

use super::own;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::FREEZE_SECONDS_MAX;
use nix::sys::signal::{SigSet, Signal};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The hidden command of the process that freezes and thaws.
pub(super) const FREEZE_COMMAND: &str = "freeze";

/// What that process says when the file system is frozen.
const FROZEN: &str = "frozen";

/// A frozen file system. Dropped, it is thawed.
#[derive(Debug)]
pub(super) struct Frozen {
    child: Child,
}

impl Frozen {
    /// Freezes the file system at `mount`. Blocks until it has written out what it held back.
    ///
    /// # Errors
    /// What `fsfreeze` says.
    pub(super) fn freeze(mount: &Path) -> Result<Self> {
        let told = |error| Error::io(format!("freeze {}", mount.display()), &error);
        let mut child = own::program()
            .arg(FREEZE_COMMAND)
            .arg(mount)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(told)?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut line).map_err(told)?;
        }
        if line.trim_end() == FROZEN {
            return Ok(Self { child });
        }
        // What went wrong it has told on our standard error.
        let _ = child.wait();
        let message = format!("{} could not be frozen", mount.display());
        Err(Error::new(ErrorKind::Io, message))
    }

    /// Thaws it.
    ///
    /// # Errors
    /// `Timeout` when that was done before, because it was frozen for too long; what `fsfreeze`
    /// says.
    pub(super) fn thaw(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait();
        let status = status.map_err(|error| Error::io("wait for the thaw", &error))?;
        if status.success() {
            return Ok(());
        }
        let message = format!("the file system was thawed early, or not at all: {status}");
        Err(Error::new(ErrorKind::Timeout, message))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The hidden command: freezes the file system at `mount`, says so, and thaws it at the end of
/// standard input, or when [`FREEZE_SECONDS_MAX`] are over.
///
/// # Errors
/// `Timeout` in the latter case; what `fsfreeze` says.
pub(super) fn run(mount: &Path) -> Result<()> {
    // What ends the caller (a Ctrl-C, a login that ends) is not to end this before the thaw.
    let alone = nix::unistd::setsid().map(drop);
    let signals = [Signal::SIGINT, Signal::SIGHUP, Signal::SIGTERM, Signal::SIGPIPE];
    let blocked = signals.into_iter().collect::<SigSet>().thread_block();
    alone.and(blocked).map_err(|errno| Error::io("be independent of the caller", &errno.into()))?;
    fsfreeze("--freeze", mount)?;
    let deadline = Instant::now() + Duration::from_secs(FREEZE_SECONDS_MAX);
    let told = writeln!(std::io::stdout(), "{FROZEN}").is_ok();
    let in_time = told && wait_for_end_of_input(deadline);
    fsfreeze("--unfreeze", mount)?;
    if in_time {
        return Ok(());
    }
    let message = format!("{} was frozen for {FREEZE_SECONDS_MAX} s", mount.display());
    Err(Error::new(ErrorKind::Timeout, message))
}

fn fsfreeze(what: &str, mount: &Path) -> Result<()> {
    let status = Command::new("fsfreeze").arg(what).arg(mount).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            let message = format!("fsfreeze {what} {}: {status}", mount.display());
            Err(Error::new(ErrorKind::Io, message))
        }
        Err(error) => Err(Error::io("run fsfreeze", &error)),
    }
}

/// Whether standard input ends before `deadline`.
fn wait_for_end_of_input(deadline: Instant) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let input = std::io::stdin();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, left) {
            Ok(0) | Err(nix::Error::EINTR) => {}
            // Nobody writes to it: what can be read is its end.
            _ => return true,
        }
    }
}
