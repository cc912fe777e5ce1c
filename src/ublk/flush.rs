//! Flushing, away from the queues: one thread for each device that can be written.
//!
//! ```text
//!   queue 0 -- ask(tag) --+                         +-- outbox 0, its eventfd --> queue 0
//!   queue 1 -- ask(tag) --+--> inbox --> flusher ---+-- outbox 1, its eventfd --> queue 1
//!                                      disk.flush()
//! ```
//!
//! A flush takes as long as a device needs to sync, some milliseconds or more; a queue that waited
//! for it would serve nobody meanwhile. So a queue leaves the tag here and goes on. The flusher
//! takes all that wait and flushes once for them: each came before that flush began, so it covers
//! whatever was written before any of them. Only the queue may answer its tags; it is woken by an
//! eventfd that its ring polls, once for each group.
//!
//! Nothing here touches a tag's buffer or a ring. The memory for all tags is taken at the start. An
//! idle flusher sleeps without a timer.

use super::outbox::Outbox;
use super::thread;
use crate::disk::{self, Disk};
use crate::error::{Error, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The flushing thread of one device. Dropping it tells the thread to end, and does not wait.
#[derive(Debug)]
pub(super) struct Flusher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inbox: Mutex<Inbox>,
    /// Told when something waits, when the thread is to end, and when it has.
    changed: Condvar,
    outboxes: Vec<Outbox<Flushed>>,
}

#[derive(Debug)]
struct Inbox {
    waiting: Vec<Ticket>,
    closing: bool,
    ended: bool,
}

/// A tag whose answer waits for a flush.
#[derive(Clone, Copy, Debug)]
struct Ticket {
    queue_index: u16,
    tag: u16,
}

/// A tag whose flush is over.
#[derive(Clone, Debug)]
pub(super) struct Flushed {
    pub(super) tag: u16,
    /// Why none of the group is durable, if so.
    pub(super) failure: Option<Arc<Error>>,
}

/// One queue's way to the flusher.
#[derive(Clone, Copy, Debug)]
pub(super) struct Desk<'a> {
    shared: &'a Shared,
    outbox: &'a Outbox<Flushed>,
    queue_index: u16,
}

impl Flusher {
    /// Starts the thread for a device of `queues` queues with `depth` tags each.
    ///
    /// # Errors
    /// When there are no descriptors or no thread.
    pub(super) fn start<D: Disk>(disk: Arc<D>, queues: u16, depth: u16) -> Result<Self> {
        let tags = usize::from(queues) * usize::from(depth);
        let outboxes: Result<_> = (0..queues).map(|_| Outbox::new(usize::from(depth))).collect();
        let inbox = Inbox { waiting: Vec::with_capacity(tags), closing: false, ended: false };
        let shared =
            Shared { inbox: Mutex::new(inbox), changed: Condvar::new(), outboxes: outboxes? };
        let shared = Arc::new(shared);
        let given = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("ublk-flush".to_owned());
        thread
            .spawn(move || {
                let _ended = Ended(&given);
                run(&*disk, &given, tags);
                // Before the end is told: who waits for it may rely on the disk being let go.
                drop(disk);
            })
            .map_err(|error| Error::io("start the flushing thread", &error))?;
        Ok(Self { shared })
    }

    /// The desk of a queue, `None` for one that the flusher was not made for.
    pub(super) fn desk(&self, queue_index: u16) -> Option<Desk<'_>> {
        let outbox = self.shared.outboxes.get(usize::from(queue_index))?;
        Some(Desk { shared: &self.shared, outbox, queue_index })
    }

    /// Tells the thread to end, and waits for that up to `patience`. Whoever still waits for a
    /// flush is never answered: call it when no queue is left.
    ///
    /// # Errors
    /// `Timeout` when a flush takes longer. The thread ends after it.
    pub(super) fn end(&self, patience: Duration) -> Result<()> {
        let mut inbox = self.shared.locked();
        inbox.closing = true;
        self.shared.changed.notify_all();
        let changed = &self.shared.changed;
        thread::wait_for_end("a flush", changed, inbox, patience, |inbox| inbox.ended)
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.shared.locked().closing = true;
        self.shared.changed.notify_all();
    }
}

/// Tells that the thread is over, however it ends.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut inbox = self.0.locked();
        // A thread that panicked takes no more.
        inbox.closing = true;
        inbox.ended = true;
        self.0.changed.notify_all();
    }
}

fn run<D: Disk>(disk: &D, shared: &Shared, tags: usize) {
    thread::prepare_helper("the flushing thread");
    let mut group = Vec::with_capacity(tags);
    while shared.take(&mut group) {
        let failure = disk::flush(disk).err().map(Arc::new);
        shared.hand_back(&group, failure.as_ref());
        group.clear();
    }
}

impl Shared {
    /// Waits for tickets and moves all of them into `group`, which is empty; false at the end.
    fn take(&self, group: &mut Vec<Ticket>) -> bool {
        let mut inbox = self.locked();
        while inbox.waiting.is_empty() && !inbox.closing {
            inbox = self.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
        if inbox.closing {
            return false;
        }
        std::mem::swap(&mut inbox.waiting, group);
        true
    }

    fn hand_back(&self, group: &[Ticket], failure: Option<&Arc<Error>>) {
        for (queue_index, outbox) in (0_u16..).zip(&self.outboxes) {
            let own = group.iter().filter(|ticket| ticket.queue_index == queue_index);
            outbox.put(own.map(|ticket| Flushed { tag: ticket.tag, failure: failure.cloned() }));
        }
    }

    fn locked(&self) -> MutexGuard<'_, Inbox> {
        // Whole between any two of its operations.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desk<'_> {
    /// Asks for a flush of all that was written so far, in the name of `tag`, which must not be
    /// waiting already. False when there is no flusher any more: the tag is not kept then.
    pub(super) fn ask(&self, tag: u16) -> bool {
        let mut inbox = self.shared.locked();
        if inbox.closing {
            return false;
        }
        inbox.waiting.push(Ticket { queue_index: self.queue_index, tag });
        self.shared.changed.notify_all();
        true
    }

    /// Where the tags of this queue come back.
    pub(super) fn outbox(&self) -> &Outbox<Flushed> {
        self.outbox
    }
}

#[cfg(test)]
mod tests;
