//! What the background does for each open blob.

use super::blob::{CachedBlob, Residence, Slot};
use super::commit::{Commit, commit_into};
use super::flight::lock;
use super::listing::touch;
use super::pair::Pair;
use super::promote::{Promotion, promote};
use super::stats::count;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::{CACHE_POLL_MS_MAX, CACHE_PROMOTE_PAUSE_MS_MAX};
use crate::source::MappedFile;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// When to do again what failed: hashing all of a blob at every tick would help nobody.
#[derive(Debug, Default)]
pub(super) struct Retry {
    failures: u32,
    due: Option<Instant>,
}

impl Retry {
    /// It failed: again after a pause, twice as long each time.
    fn failed(&mut self, now: Instant, tick: Duration) {
        let pause = tick.saturating_mul(1 << self.failures.min(20));
        self.failures = self.failures.saturating_add(1);
        self.due = now.checked_add(pause.min(Duration::from_millis(CACHE_PROMOTE_PAUSE_MS_MAX)));
    }

    /// Whether it is time: true once each time.
    fn take_due(&mut self, now: Instant) -> bool {
        self.due.take_if(|due| *due <= now).is_some()
    }
}

impl CachedBlob {
    /// Makes a plain file of a blob all of whose bytes are here, if they have its digest, and puts
    /// it into the folders that want it. Reads all of it; waits until `deadline` for whoever else
    /// is at it.
    ///
    /// # Errors
    /// `Timeout`; why the cache cannot be used for it; `Io`.
    pub fn promote(&self, deadline: Instant) -> Result<Promotion> {
        let slot = &self.slot;
        loop {
            let residence = slot.residence.load_full();
            let promotion = match &*residence {
                // Another process found it damaged and removed it.
                Residence::Whole(file) if !slot.is_named(file) => {
                    slot.reopen(&residence);
                    Promotion::Incomplete
                }
                Residence::Whole(_) => {
                    slot.commit();
                    return Ok(Promotion::Done);
                }
                Residence::Nothing => {
                    slot.reopen_or_tell(&residence).context(|| self.keeping())?;
                    Promotion::Busy
                }
                // Somebody else promoted or removed it.
                Residence::Partial(pair) if pair.is_retired().unwrap_or(false) => {
                    slot.reopen(&residence);
                    Promotion::Busy
                }
                Residence::Partial(_) => slot.promote_once(&residence)?,
            };
            if promotion != Promotion::Busy {
                return Ok(promotion);
            }
            if Instant::now() >= deadline {
                let message = format!("{}: another process is at it for too long", slot.digest);
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            std::thread::sleep(Duration::from_millis(CACHE_POLL_MS_MAX));
        }
    }
}

impl Slot {
    /// Looks after the blob's files, every so often.
    pub(super) fn tick(self: &Arc<Self>) {
        let residence = self.residence.load_full();
        if matches!(&*residence, Residence::Whole(_)) {
            self.commit();
        }
        let was_used = self.used.swap(false, Ordering::Relaxed);
        let is_gone = match &*residence {
            Residence::Whole(file) => {
                if was_used {
                    touch(file.file());
                }
                !self.is_named(file)
            }
            Residence::Partial(pair) => {
                if was_used {
                    touch(pair.map());
                }
                pair.is_retired().unwrap_or(false)
            }
            // Perhaps the cache can be used again.
            Residence::Nothing => true,
        };
        if is_gone {
            // Frees the space of what was evicted; or takes the plain file that it became.
            self.reopen(&residence);
            return;
        }
        let Some(pair) = residence.pair() else { return };
        let has_stored = self.stored_bytes.swap(0, Ordering::Relaxed) > 0;
        if has_stored && let Err(error) = pair.sync() {
            // Only so is it heard that the kernel gave up writing what it had taken.
            self.shared.gate.close(&error);
            return;
        }
        if lock(&self.retry).take_due(Instant::now()) {
            self.look_due.store(true, Ordering::Release);
            self.promotion_asked.store(false, Ordering::Release);
        }
        // Other processes may have stored what was missing here. The first thing that is done then
        // is to look at the records.
        let is_look_due = self.look_due.swap(false, Ordering::AcqRel) && !pair.has_failed_to_sync();
        if has_stored || is_look_due || pair.states().is_complete() {
            self.promote_later();
        }
    }

    /// Has the whole checked and promoted, in the background.
    pub(super) fn promote_later(self: &Arc<Self>) {
        if self.promotion_asked.swap(true, Ordering::AcqRel) {
            return;
        }
        let weak = Arc::downgrade(self);
        let job = move || {
            if let Some(slot) = weak.upgrade() {
                slot.promote_and_log(&slot.residence.load_full());
            }
        };
        if !self.shared.pool.push(Box::new(job)) {
            self.look_due.store(true, Ordering::Release);
            self.promotion_asked.store(false, Ordering::Release);
        }
    }

    fn promote_and_log(&self, residence: &Arc<Residence>) {
        match self.promote_once(residence) {
            // Stays asked: there is nothing to promote any more.
            Ok(Promotion::Done) => return,
            Ok(Promotion::Busy) => self.look_due.store(true, Ordering::Release),
            Ok(_) => {}
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(digest = %self.digest, error, "not promoted");
                // Stays asked until then. What the kernel gave up writing it may still show us, and
                // not after the next boot: not tried again here.
                if !residence.pair().is_some_and(Pair::has_failed_to_sync) {
                    let tick = self.shared.settings.tick;
                    lock(&self.retry).failed(Instant::now(), tick.saturating_mul(2));
                }
                return;
            }
        }
        self.promotion_asked.store(false, Ordering::Release);
    }

    fn promote_once(&self, residence: &Arc<Residence>) -> Result<Promotion> {
        let (Some(folder), Some(pair)) = (&self.shared.folder, residence.pair()) else {
            return Ok(Promotion::Incomplete);
        };
        let promotion = promote(folder, pair, &self.doubt)?;
        let failed = |error| Error::io(format!("look for {}", self.digest), &error);
        match promotion {
            Promotion::Done => {
                count(&self.counters.promoted, 1);
                tracing::info!(digest = %self.digest, "complete and right: a plain file now");
                self.commit();
            }
            Promotion::Damaged(extents) => count(&self.counters.quarantined, extents),
            Promotion::Condemned => {
                count(&self.counters.condemned, 1);
                self.condemned.fetch_add(1, Ordering::AcqRel);
                self.reopen(residence);
            }
            Promotion::Incomplete if pair.states().is_complete() => {
                // This process believes in extents that another one has thrown away.
                let lost = pair.look_for_lost().map_err(failed)?;
                if lost > 0 {
                    tracing::info!(digest = %self.digest, lost, "thrown away by another process");
                }
            }
            Promotion::Incomplete | Promotion::Busy => {}
        }
        Ok(promotion)
    }

    /// Whether a plain file is still the one in the folder: it may live on under another name, that
    /// of an `overlaybd.commit`. Where that cannot be told it is.
    pub(super) fn is_named(&self, file: &MappedFile) -> bool {
        let Some(folder) = &self.shared.folder else { return true };
        let found = std::fs::symlink_metadata(folder.whole_path(&self.digest));
        match (found, file.file().metadata()) {
            (Ok(named), Ok(open)) => (named.dev(), named.ino()) == (open.dev(), open.ino()),
            (Err(error), _) => error.kind() != io::ErrorKind::NotFound,
            (_, Err(_)) => true,
        }
    }

    /// A plain file could not be read: takes it out of the way, if it was cut since it was opened
    /// with the blob's length, and opens what is begun anew; whether it did. One that a failing
    /// disk has is left, and so is one that cannot be removed.
    pub(super) fn remove_if_cut(&self, residence: &Arc<Residence>, file: &MappedFile) -> bool {
        let blob_bytes = self.extents.blob_bytes();
        let is_cut = file.file().metadata().is_ok_and(|found| found.len() != blob_bytes);
        let Some(folder) = self.shared.folder.as_ref().filter(|_| is_cut) else { return false };
        let removed = folder.lock().and_then(|folder_lock| {
            // Somebody may have done so already, and the name may be of another file by now.
            let is_named = self.is_named(file);
            if is_named {
                folder.remove_whole(&self.digest, &folder_lock)?;
            }
            Ok(is_named)
        });
        match removed {
            Ok(true) => tracing::warn!(digest = %self.digest, "a complete blob was cut: removed"),
            Ok(false) => {}
            Err(error) => {
                let error = format!("{error:#}");
                tracing::debug!(digest = %self.digest, error, "cut, and cannot be removed");
                return false;
            }
        }
        self.reopen(residence);
        true
    }

    /// Puts the plain file where it is wanted too. Each folder is tried once.
    fn commit(&self) {
        let Some(folder) = &self.shared.folder else { return };
        let wanted = std::mem::take(&mut *lock(&self.wanted_in));
        for dir in wanted {
            match commit_into(folder, &self.digest, &dir) {
                Ok(Commit::Made | Commit::WasThere) => {}
                // Evicted in this moment: it will be complete again.
                Ok(Commit::Incomplete) => lock(&self.wanted_in).push(dir),
                Err(error) => {
                    let (dir, error) = (dir.display(), format!("{error:#}"));
                    tracing::warn!(%dir, error, "no overlaybd.commit");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_after_a_failure_doubles_up_to_its_limit_and_ends_once() {
        let (begun, tick) = (Instant::now(), Duration::from_secs(10));
        let mut retry = Retry::default();
        assert!(!retry.take_due(begun + Duration::from_secs(1 << 20)), "nothing failed");
        for seconds in [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600] {
            retry.failed(begun, tick);
            assert!(!retry.take_due(begun + Duration::from_secs(seconds - 1)));
            assert!(retry.take_due(begun + Duration::from_secs(seconds)), "{seconds}");
            assert!(!retry.take_due(begun + Duration::from_secs(seconds)), "once");
        }
    }
}
