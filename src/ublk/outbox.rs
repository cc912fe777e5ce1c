//! What other threads hand back to a queue: its ring polls an eventfd, and nothing else of it is
//! shared.
//!
//! A queue that ends while something of its is elsewhere never looks here again, and what is put
//! here is dropped with it.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What one queue gets back.
#[derive(Debug)]
pub(super) struct Outbox<T> {
    items: Mutex<Vec<T>>,
    /// Readable while there may be something in `items`.
    wake: File,
}

impl<T> Outbox<T> {
    /// An empty one. Up to `capacity` things are put into it without taking memory.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(super) fn new(capacity: usize) -> Result<Self> {
        // SAFETY: no memory is passed; the outcome is checked before it is used.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(Error::io("make an eventfd", &std::io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        let wake = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        Ok(Self { items: Mutex::new(Vec::with_capacity(capacity)), wake })
    }

    /// Hands `items` back, and wakes the queue if there are any.
    pub(super) fn put(&self, items: impl Iterator<Item = T>) {
        let mut kept = self.locked();
        let had = kept.len();
        kept.extend(items);
        let wake = kept.len() > had;
        drop(kept);
        if wake {
            // Fails only when nothing more fits: then it is readable anyway.
            let _ = (&self.wake).write(&1_u64.to_le_bytes());
        }
    }

    /// What becomes readable when there is something to [take](Outbox::take).
    pub(super) fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// As [`Outbox::wake_fd`], borrowed.
    #[cfg(test)]
    pub(super) fn wake(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.wake)
    }

    /// Moves all that came back into `items`, which must be empty. Never blocks for longer than
    /// another thread needs to put something in.
    pub(super) fn take(&self, items: &mut Vec<T>) {
        // Before the look: what comes after it makes the descriptor readable again.
        let _ = (&self.wake).read(&mut [0; 8]);
        std::mem::swap(&mut *self.locked(), items);
    }

    fn locked(&self) -> MutexGuard<'_, Vec<T>> {
        // Whole between any two of its operations.
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
