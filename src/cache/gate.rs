//! Whether fills may be stored now: not while the quota is used up, and not for a while after the
//! cache's disk was full or failed. Reads go on past the cache then.

use super::flight::lock;
use crate::error::{Error, ErrorKind};
use crate::limits::{CACHE_CHECK_BYTES_MAX, CACHE_PAUSE_MS};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// What all blobs of a process look at before they store something.
#[derive(Debug)]
pub(super) struct Gate {
    begun: Instant,
    quota_bytes: u64,
    pause_ms: u64,
    closed_until_ms: AtomicU64,
    over_quota: AtomicBool,
    recheck_ms: u64,
    next_recheck_ms: AtomicU64,
    unchecked_bytes: AtomicU64,
    is_full: AtomicBool,
    /// How storing failed last; `None` where the disk was too full to begin.
    failure: Mutex<Option<(ErrorKind, String)>>,
}

impl Gate {
    /// An open gate. `pause_ms` is how long a failure closes it; where the quota is used up, it is
    /// looked at again every `recheck_ms`.
    pub(super) fn new(quota_bytes: u64, pause_ms: u64, recheck_ms: u64) -> Self {
        Self {
            begun: Instant::now(),
            quota_bytes,
            pause_ms: pause_ms.min(CACHE_PAUSE_MS),
            closed_until_ms: AtomicU64::new(0),
            over_quota: AtomicBool::new(false),
            recheck_ms,
            next_recheck_ms: AtomicU64::new(0),
            unchecked_bytes: AtomicU64::new(0),
            is_full: AtomicBool::new(false),
            failure: Mutex::default(),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether it is worth trying to store something.
    pub(super) fn is_open(&self) -> bool {
        !self.over_quota.load(Ordering::Relaxed)
            && self.closed_until_ms.load(Ordering::Relaxed) <= self.now_ms()
    }

    /// What keeps from storing, or did when it was tried last.
    pub(super) fn obstacle(&self) -> Error {
        if self.over_quota.load(Ordering::Relaxed) {
            let quota_bytes = self.quota_bytes;
            let message = format!("what is in use takes the cache's quota of {quota_bytes} bytes");
            return Error::new(ErrorKind::NoSpace, message);
        }
        match &*lock(&self.failure) {
            Some((kind, why)) => Error::new(*kind, why),
            None => Error::new(ErrorKind::NoSpace, "the cache's disk is full"),
        }
    }

    /// Storing failed: not again for a while.
    pub(super) fn close(&self, error: &io::Error) {
        let told = Error::io("write to the cache's disk", error);
        *lock(&self.failure) = Some((told.kind(), format!("{told:#}")));
        // At least the next millisecond, so that a pause of none is over then.
        let until = self.now_ms().saturating_add(self.pause_ms);
        if self.closed_until_ms.swap(until, Ordering::Relaxed) < self.now_ms() {
            tracing::warn!(%error, "the cache's disk fails: reading past it for a while");
        }
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            self.is_full.store(true, Ordering::Relaxed);
        }
    }

    /// The disk was too full to begin a blob. Whether that was not known yet: somebody should make
    /// room, once for all blobs that are in the same need.
    pub(super) fn close_if_open(&self) -> bool {
        let (now, until) = (self.now_ms(), self.closed_until_ms.load(Ordering::Relaxed));
        let next = now.saturating_add(self.pause_ms.max(1));
        let order = Ordering::Relaxed;
        let is_first = until <= now
            && self.closed_until_ms.compare_exchange(until, next, order, order).is_ok();
        if is_first {
            *lock(&self.failure) = None;
        }
        is_first
    }

    /// Whether the disk was found full since this was asked last: somebody should make room.
    pub(super) fn take_is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed) && self.is_full.swap(false, Ordering::Relaxed)
    }

    /// Notes what was stored; whether it is time to look at the quota.
    pub(super) fn stored(&self, bytes: u64) -> bool {
        let due = (self.quota_bytes / 32).min(CACHE_CHECK_BYTES_MAX);
        let before = self.unchecked_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) < due {
            return false;
        }
        self.unchecked_bytes.store(0, Ordering::Relaxed);
        true
    }

    /// Whether the quota was used up and it is time to look again: true once each time, until
    /// [`Gate::set_over_quota`] or [`Gate::put_off_recheck`] says how the look ended.
    pub(super) fn is_recheck_due(&self) -> bool {
        let due = self.next_recheck_ms.load(Ordering::Relaxed);
        self.over_quota.load(Ordering::Relaxed)
            && due <= self.now_ms()
            && self.next_recheck_ms.swap(u64::MAX, Ordering::Relaxed) == due
    }

    /// A look at the quota ended, or failed: the next one is due a while from now.
    pub(super) fn put_off_recheck(&self) {
        let next = self.now_ms().saturating_add(self.recheck_ms);
        self.next_recheck_ms.store(next, Ordering::Relaxed);
    }

    /// Says what a look at the quota found.
    pub(super) fn set_over_quota(&self, over: bool) {
        self.put_off_recheck();
        if self.over_quota.swap(over, Ordering::Relaxed) != over {
            tracing::info!(over, quota_bytes = self.quota_bytes, "the cache's quota");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_closes_the_gate_for_a_while_only() {
        let gate = Gate::new(1 << 30, 40, 0);
        assert!(gate.is_open());
        gate.close(&io::Error::from_raw_os_error(libc::EIO));
        assert!(!gate.is_open() && !gate.take_is_full());
        gate.close(&io::Error::from_raw_os_error(libc::ENOSPC));
        assert!(gate.take_is_full());
        assert!(!gate.take_is_full(), "once");
        std::thread::sleep(std::time::Duration::from_millis(60));
        assert!(gate.is_open());
        assert!(gate.close_if_open() && !gate.is_open());
        assert!(!gate.close_if_open(), "one thread makes room");
        std::thread::sleep(std::time::Duration::from_millis(60));
        assert!(gate.is_open());
        assert!(!gate.is_recheck_due());
        gate.set_over_quota(true);
        assert!(!gate.is_open());
        assert!(gate.is_recheck_due());
        assert!(!gate.is_recheck_due(), "one thread looks");
        gate.put_off_recheck();
        assert!(!gate.is_open() && gate.is_recheck_due(), "a look that failed is not the last");
        gate.set_over_quota(false);
        assert!(gate.is_open());
    }

    #[test]
    fn the_quota_is_looked_at_after_a_part_of_it() {
        let gate = Gate::new(32 << 20, 0, 0);
        assert!(!gate.stored(512 << 10));
        assert!(gate.stored(512 << 10));
        assert!(!gate.stored(512 << 10));
        assert!(Gate::new(0, 0, 0).stored(1), "no quota at all: after every fill");
    }
}
