//! Counters of a served device: written by its queue threads, read by whoever asks.
//!
//! Each queue's counters have one writer and lie in cache lines of their own, so that counting
//! costs a plain add and no reader slows a queue down. Only a failed request takes a lock, to
//! leave its text. The trouble ring, which keeps more of them and longer, comes along.

use crate::telemetry::trouble::TroubleRing;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What one queue has done since the device was started. Read while the queue runs, the numbers
/// are each exact but not of the same instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Requests answered, failed ones included.
    pub requests: u64,
    /// Bytes of reads that succeeded.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Bytes of those.
    pub written_bytes: u64,
    /// Flushes that succeeded, those of writes that had to be durable included.
    pub flushes: u64,
    /// Discards and writes of zeros that succeeded.
    pub discards: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests that failed because the worker panicked; also counted in `errors`.
    pub panics: u64,
    /// Calls of `io_uring_enter`: with `requests` the size of a batch.
    pub enters: u64,
}

/// What a device has done since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// One entry per queue.
    pub queues: Vec<QueueStats>,
    /// The text of the last request that failed, with its whole chain.
    pub last_error: Option<String>,
}

impl DeviceStats {
    /// The sum over all queues.
    #[must_use]
    pub fn total(&self) -> QueueStats {
        self.queues.iter().fold(QueueStats::default(), |sum, queue| QueueStats {
            requests: sum.requests + queue.requests,
            read_bytes: sum.read_bytes + queue.read_bytes,
            writes: sum.writes + queue.writes,
            written_bytes: sum.written_bytes + queue.written_bytes,
            flushes: sum.flushes + queue.flushes,
            discards: sum.discards + queue.discards,
            errors: sum.errors + queue.errors,
            panics: sum.panics + queue.panics,
            enters: sum.enters + queue.enters,
        })
    }
}

/// One queue's counters. 128 bytes: two cache lines, because processors fetch pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct QueueCounters {
    pub(super) requests: Counter,
    pub(super) read_bytes: Counter,
    pub(super) writes: Counter,
    pub(super) written_bytes: Counter,
    pub(super) flushes: Counter,
    pub(super) discards: Counter,
    pub(super) errors: Counter,
    pub(super) panics: Counter,
    pub(super) enters: Counter,
}

/// A number with one writer.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`. Only the queue's own thread may call this: it is no atomic addition.
    pub(super) fn add(&self, amount: u64) {
        let value = self.0.load(Ordering::Relaxed).wrapping_add(amount);
        self.0.store(value, Ordering::Relaxed);
    }

    /// Sets a number that is counted elsewhere. As [`Counter::add`].
    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters of one device.
#[derive(Debug, Default)]
pub(super) struct DeviceCounters {
    queues: Vec<QueueCounters>,
    last_error: Mutex<Option<String>>,
    trouble_ring: Option<Arc<TroubleRing>>,
}

impl DeviceCounters {
    pub(super) fn new(queues: u16) -> Self {
        Self { queues: (0..queues).map(|_| QueueCounters::default()).collect(), ..Self::default() }
    }

    /// The same counters, whose queues keep a record of every failed or slow request in `ring`.
    pub(super) fn with_trouble_ring(self, ring: Option<Arc<TroubleRing>>) -> Self {
        Self { trouble_ring: ring, ..self }
    }

    /// Where failed and slow requests are recorded, if anywhere.
    pub(super) fn trouble_ring(&self) -> Option<&TroubleRing> {
        self.trouble_ring.as_deref()
    }

    /// The counters of `queue`, if the device has that many.
    pub(super) fn queue(&self, queue: u16) -> Option<&QueueCounters> {
        self.queues.get(usize::from(queue))
    }

    pub(super) fn set_last_error(&self, text: String) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }

    pub(super) fn snapshot(&self) -> DeviceStats {
        let last_error = self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let queues = self.queues.iter().map(|queue| QueueStats {
            requests: queue.requests.get(),
            read_bytes: queue.read_bytes.get(),
            writes: queue.writes.get(),
            written_bytes: queue.written_bytes.get(),
            flushes: queue.flushes.get(),
            discards: queue.discards.get(),
            errors: queue.errors.get(),
            panics: queue.panics.get(),
            enters: queue.enters.get(),
        });
        DeviceStats { queues: queues.collect(), last_error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_the_sum_over_the_queues() {
        let counters = DeviceCounters::new(2);
        for (queue, amount) in [(0, 1), (1, 10), (1, 100)] {
            let queue = counters.queue(queue).unwrap();
            queue.requests.add(amount);
            queue.read_bytes.add(amount * 512);
            queue.writes.add(amount * 5);
            queue.written_bytes.add(amount * 6);
            queue.flushes.add(amount * 7);
            queue.discards.add(amount * 8);
            queue.errors.add(amount * 2);
            queue.panics.add(amount * 3);
            queue.enters.add(amount * 4);
        }
        counters.set_last_error("first".into());
        counters.set_last_error("second".into());
        let stats = counters.snapshot();
        assert_eq!(
            (stats.queues[0].requests, stats.queues[1].requests, stats.last_error.as_deref()),
            (1, 110, Some("second"))
        );
        let expected = QueueStats {
            requests: 111,
            read_bytes: 111 * 512,
            writes: 111 * 5,
            written_bytes: 111 * 6,
            flushes: 111 * 7,
            discards: 111 * 8,
            errors: 222,
            panics: 333,
            enters: 444,
        };
        assert_eq!(stats.total(), expected);
    }

    #[test]
    fn queues_do_not_share_cache_lines() {
        assert_eq!(size_of::<QueueCounters>(), 128);
        assert!(DeviceCounters::new(1).queue(1).is_none());
    }
}
