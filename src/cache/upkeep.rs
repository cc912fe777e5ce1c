//! What the background does for each open blob.

use super::blob::{Residence, Slot};
use super::flight::lock;
use super::listing::touch;
use super::promote::{Commit, Promotion, commit_into, promote};
use super::stats::count;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

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
                file.file().metadata().is_ok_and(|metadata| metadata.nlink() == 0)
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
        // Other processes may have stored what was missing here.
        if has_stored || pair.states().is_complete() {
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
                slot.promote_now(&slot.residence.load_full());
            }
        };
        if !self.shared.pool.push(Box::new(job)) {
            self.promotion_asked.store(false, Ordering::Release);
        }
    }

    fn promote_now(&self, residence: &Arc<Residence>) {
        let (Some(folder), Some(pair)) = (&self.shared.folder, residence.pair()) else { return };
        match promote(folder, pair) {
            Ok(Promotion::Done) => {
                count(&self.counters.promoted, 1);
                tracing::info!(digest = %self.digest, "complete and right: a plain file now");
                self.commit();
                // Stays asked: there is nothing to promote any more.
                return;
            }
            Ok(Promotion::Damaged(extents)) => count(&self.counters.quarantined, extents),
            Ok(Promotion::Condemned) => {
                count(&self.counters.condemned, 1);
                self.condemned.fetch_add(1, Ordering::AcqRel);
                self.reopen(residence);
            }
            Ok(Promotion::Incomplete | Promotion::Busy) => {}
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(digest = %self.digest, error, "not promoted");
                // Stays asked: hashing all of it at every tick helps nobody. The next process may.
                return;
            }
        }
        self.promotion_asked.store(false, Ordering::Release);
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
