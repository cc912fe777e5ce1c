//! Reads that have to wait for bytes from elsewhere, away from the queues.
//!
//! ```text
//!   queue --- ask(tag, buffer) ---> inbox ---> one of some threads: worker.read()
//!     ^                                             |
//!     +------------ outbox, its eventfd <-----------+ tag, buffer, outcome
//! ```
//!
//! A fetch takes as long as a registry does; a queue that waited for it would serve nobody
//! meanwhile, not even who reads what is here. So the queue hands the tag's buffer over, and gets
//! it back with the bytes. Until then nobody else can touch it: it is moved, not lent. Threads are
//! started when they are needed and end when they have had nothing to do for a while. A disk that
//! never waits has none of this.
//!
//! When the device is stopped, the disk is told to let go of what it waits for
//! ([`Disk::cancel`]): the answers come soon, as errors, and the queue can end.

use super::outbox::Outbox;
use super::thread;
use crate::disk::{Disk, Guarded};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MISS_IDLE_SECONDS, MISS_THREADS_MAX};
use crate::waiting;
use libublk::helpers::IoBuf;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(MISS_IDLE_SECONDS);

/// A read that waits.
pub(super) struct Miss {
    /// Whose.
    pub(super) tag: u16,
    /// First sector.
    pub(super) start_sector: u64,
    /// Whole sectors, no more than the buffer.
    pub(super) len_bytes: usize,
    /// Where the bytes go.
    pub(super) buffer: IoBuf<u8>,
}

/// A read that is over.
pub(super) struct Missed {
    pub(super) tag: u16,
    pub(super) buffer: IoBuf<u8>,
    pub(super) outcome: Result<()>,
}

/// The threads of one device. Dropping it tells them to end, and does not wait.
pub(super) struct Misses<D: Disk> {
    disk: Arc<D>,
    shared: Arc<Shared>,
}

struct Shared {
    inbox: Mutex<Inbox>,
    /// Told when something waits, when the threads are to end, and when one has.
    changed: Condvar,
    outboxes: Vec<Outbox<Missed>>,
}

#[derive(Default)]
struct Inbox {
    /// By which queue, since when, and what.
    waiting: VecDeque<(u16, Instant, Miss)>,
    threads: usize,
    idle: usize,
    closing: bool,
}

/// One queue's way to the threads.
pub(super) struct Desk<'a, D: Disk> {
    misses: &'a Misses<D>,
    outbox: &'a Outbox<Missed>,
    queue_index: u16,
}

impl<D: Disk> Misses<D> {
    /// For a device of `queues` queues with `depth` tags each. Starts nothing yet.
    ///
    /// # Errors
    /// When there are no descriptors.
    pub(super) fn new(disk: Arc<D>, queues: u16, depth: u16) -> Result<Self> {
        let outboxes: Result<_> = (0..queues).map(|_| Outbox::new(usize::from(depth))).collect();
        let inbox = Mutex::new(Inbox::default());
        let shared = Shared { inbox, changed: Condvar::new(), outboxes: outboxes? };
        Ok(Self { disk, shared: Arc::new(shared) })
    }

    /// The desk of a queue, `None` for one that this was not made for.
    pub(super) fn desk(&self, queue_index: u16) -> Option<Desk<'_, D>> {
        let outbox = self.shared.outboxes.get(usize::from(queue_index))?;
        Some(Desk { misses: self, outbox, queue_index })
    }

    /// Tells the threads to end, and waits for that up to `patience`. What waits is forgotten: call
    /// it when no queue is left.
    ///
    /// # Errors
    /// `Timeout` when a read takes longer. Its thread ends after it.
    pub(super) fn end(&self, patience: Duration) -> Result<()> {
        let mut inbox = self.shared.locked();
        inbox.closing = true;
        inbox.waiting.clear();
        self.shared.changed.notify_all();
        let changed = &self.shared.changed;
        thread::wait_for_end("a read", changed, inbox, patience, |inbox| inbox.threads == 0)
    }

    /// One more thread, if there may be one; whether there is any.
    fn add_thread(&self, inbox: &mut Inbox) -> bool {
        if inbox.threads >= MISS_THREADS_MAX {
            return true;
        }
        let (disk, shared) = (Arc::clone(&self.disk), Arc::clone(&self.shared));
        let thread = std::thread::Builder::new().name("ublk-miss".to_owned());
        let spawned = thread.spawn(move || {
            // In this order: who waits for the end may rely on the disk being let go.
            let _ended = Ended(&shared);
            let disk = disk;
            run(&*disk, &shared);
        });
        inbox.threads += usize::from(spawned.is_ok());
        inbox.threads > 0
    }
}

impl<D: Disk> Drop for Misses<D> {
    fn drop(&mut self) {
        self.shared.locked().closing = true;
        self.shared.changed.notify_all();
    }
}

/// Tells that a thread is over, however it ends.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.locked().threads -= 1;
        self.0.changed.notify_all();
    }
}

fn run<D: Disk>(disk: &D, shared: &Shared) {
    thread::prepare_helper("a reading thread");
    let mut worker = None;
    while let Some((queue_index, asked, miss)) = shared.next() {
        // It has waited for this thread already.
        let _request = waiting::Request::begun_at(asked);
        let Miss { tag, start_sector, len_bytes, mut buffer } = miss;
        let outcome = match &mut worker {
            Some(worker) => Ok(worker),
            none => Guarded::new(disk).map(|made| none.insert(made)),
        };
        let outcome = outcome.and_then(|worker| {
            let dst = buffer.as_mut_slice().get_mut(..len_bytes);
            let short = || Error::new(ErrorKind::OutOfRange, "the tag's buffer is too short");
            worker.read(start_sector, dst.ok_or_else(short)?)
        });
        if let Some(outbox) = shared.outboxes.get(usize::from(queue_index)) {
            outbox.put(std::iter::once(Missed { tag, buffer, outcome }));
        }
    }
}

impl Shared {
    /// Waits for a read; `None` at the end, or when there was none for a while.
    fn next(&self) -> Option<(u16, Instant, Miss)> {
        let deadline = Instant::now() + IDLE;
        let mut inbox = self.locked();
        loop {
            if inbox.closing {
                return None;
            }
            if let Some(miss) = inbox.waiting.pop_front() {
                return Some(miss);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            inbox.idle += 1;
            let waited = self.changed.wait_timeout(inbox, left);
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
            inbox.idle -= 1;
        }
    }

    fn locked(&self) -> MutexGuard<'_, Inbox> {
        // Whole between any two of its operations.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Disk> Desk<'_, D> {
    /// Leaves a read to the threads; gives it back when there are none, and none can be had. A tag
    /// is never here twice, so as many reads wait at most as there are tags.
    pub(super) fn ask(&self, miss: Miss) -> Result<(), Miss> {
        let mut inbox = self.misses.shared.locked();
        if inbox.closing {
            return Err(miss);
        }
        let is_crowded = inbox.waiting.len() >= inbox.idle;
        if is_crowded && !self.misses.add_thread(&mut inbox) {
            return Err(miss);
        }
        inbox.waiting.push_back((self.queue_index, Instant::now(), miss));
        self.misses.shared.changed.notify_one();
        Ok(())
    }

    /// Where the reads of this queue come back.
    pub(super) fn outbox(&self) -> &Outbox<Missed> {
        self.outbox
    }
}

#[cfg(test)]
mod tests;
