//! One command to the driver at a time on the whole host, on kernels that need it.
//!
//! Some kernels hang for ever when many devices come and go at once (see `features`). There, and
//! only there, ADD_DEV, START_DEV and DEL_DEV wait for each other: across processes, by a lock on
//! the driver's own control node, which every process of this host that makes devices has. Opening
//! and checking images is never under it.

use super::control::CONTROL_PATH;
use super::features::needs_one_command_at_a_time;
use crate::error::{Error, ErrorKind, Result};
use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to wait for others: a storm of attaches has a few hundred before us, each of which
/// takes some tens of milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(2);

/// The lock, held until it is dropped; nothing where it is not needed.
#[derive(Debug)]
pub(super) struct HostLock(Option<File>);

impl HostLock {
    /// Waits for the lock, if this kernel needs it.
    ///
    /// # Errors
    /// `Timeout` when others hold it for too long, and what the operating system says.
    pub(super) fn take() -> Result<Self> {
        if needs_one_command_at_a_time() {
            return lock(Path::new(CONTROL_PATH), PATIENCE).map(|file| Self(Some(file)));
        }
        Ok(Self(None))
    }
}

impl Drop for HostLock {
    fn drop(&mut self) {
        if let Some(file) = self.0.take() {
            // Closing it would do; a descriptor that leaked into another process would not.
            let _ = file.unlock();
        }
    }
}

fn lock(path: &Path, patience: Duration) -> Result<File> {
    let told = |error: &std::io::Error| Error::io(format!("lock {}", path.display()), error);
    let file = File::open(path).map_err(|error| told(&error))?;
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            Err(TryLockError::WouldBlock) => {
                let seconds = patience.as_secs();
                let message = format!(
                    "another process has kept the ublk driver busy for {seconds} s; this kernel \
                     hangs when devices come and go at once, so they take turns"
                );
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            Err(TryLockError::Error(error)) => return Err(told(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_second_waits_and_gives_up_in_the_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = HostLock(Some(lock(file.path(), PATIENCE).unwrap()));
        let error = lock(file.path(), Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        let waiting = std::thread::scope(|scope| {
            let second = scope.spawn(|| lock(file.path(), PATIENCE).map(drop));
            std::thread::sleep(Duration::from_millis(20));
            drop(first);
            second.join().unwrap()
        });
        waiting.unwrap();
    }
}
