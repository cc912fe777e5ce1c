//! Extents that are as they were stored and wrong all the same: damaged on their way, before our
//! checksum was taken. Only who decodes them notices.
//!
//! ```text
//!   decoder: wrong --> discard: note it in the record, not here any more --> read again: fetched
//!     once more --> wrong again: an error, and no further fetch for a while
//! ```
//!
//! An extent is thrown away once within [`CACHE_DISCARD_REST_MS`], so that a blob that was
//! published wrong costs a fetch a minute, however often it is read.

use super::blob::{CachedBlob, Residence, Slot};
use super::flight::{Begun, Outcome, lock};
use super::pair::Pair;
use super::stats::count;
use crate::error::{Error, Result};
use crate::limits::{
    CACHE_DISCARD_REST_MS, CACHE_DISCARDS_MAX, CACHE_JOIN_BYTES_MAX, CACHE_POLL_MS_MAX,
};
use crate::source::MappedFile;
use crate::units::to_usize;
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often an extent that somebody else has claimed is tried again, [`CACHE_POLL_MS_MAX`] apart:
/// who has the claim of what is here is repairing or promoting it.
const CLAIM_TRIES: u32 = 50;

/// Which extents of a blob were thrown away lately.
#[derive(Debug, Default)]
pub(super) struct Discards {
    at: HashMap<u64, Instant>,
}

impl Discards {
    /// Whether the extent may be thrown away now; notes that it is.
    fn take(&mut self, extent: u64, now: Instant) -> bool {
        let rest = Duration::from_millis(CACHE_DISCARD_REST_MS);
        let is_recent = |at: &Instant| now.saturating_duration_since(*at) < rest;
        if self.at.get(&extent).is_some_and(is_recent) {
            return false;
        }
        if self.at.len() >= CACHE_DISCARDS_MAX {
            self.at.retain(|_, at| is_recent(at));
        }
        // So much that is wrong is no accident, and fetching it again is in vain.
        if self.at.len() >= CACHE_DISCARDS_MAX {
            return false;
        }
        self.at.insert(extent, now);
        true
    }
}

impl CachedBlob {
    /// See [`crate::source::RemoteBlob::discard`].
    pub(super) fn discard_now(&self, bytes: &Range<u64>) -> bool {
        let slot = &self.slot;
        if bytes.start >= bytes.end || bytes.end > slot.extents.blob_bytes() {
            return false;
        }
        let residence = slot.residence.load_full();
        let extents = slot.extents.touched_by(bytes);
        let done = match &*residence {
            Residence::Partial(pair) => slot.discard_from(pair, extents),
            Residence::Whole(file) => self.discard_whole(&residence, file, bytes),
            // What was fetched was not kept: the next read fetches it again.
            Residence::Nothing => {
                let (now, mut discards) = (Instant::now(), lock(&slot.discards));
                return extents.filter(|extent| discards.take(*extent, now)).count() > 0;
            }
        };
        match done {
            Ok(any) => any,
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(digest = %slot.digest, error, "wrong bytes cannot be thrown away");
                false
            }
        }
    }

    /// A plain file had its digest once. It is compared with what is fetched now, and goes when it
    /// has changed since.
    fn discard_whole(
        &self,
        residence: &Arc<Residence>,
        file: &MappedFile,
        bytes: &Range<u64>,
    ) -> Result<bool> {
        let slot = &self.slot;
        let most = CACHE_JOIN_BYTES_MAX.min(bytes.end - bytes.start);
        let first = slot.extents.touched_by(bytes).start;
        if !lock(&slot.discards).take(first, Instant::now()) {
            return Ok(true);
        }
        let mut kept = vec![0; to_usize(most).unwrap_or(0)];
        let mut fetched = kept.clone();
        let is_read = file.read_vouched(bytes.start, &mut kept).is_ok();
        self.fetch.fetch(bytes.start, &mut fetched, self.deadline())?;
        count(&slot.counters.fetches, 1);
        count(&slot.counters.fetched_bytes, most);
        if is_read && kept == fetched {
            return Ok(false);
        }
        let Some(folder) = &slot.shared.folder else { return Ok(false) };
        tracing::warn!(digest = %slot.digest, "a complete blob has changed since: removed");
        let folder_lock = folder.lock()?;
        // Somebody may have done so already, and the name may be of another file by now.
        if file.file().metadata().is_ok_and(|metadata| is_named(&metadata)) {
            folder.remove_whole(&slot.digest, &folder_lock)?;
        }
        drop(folder_lock);
        count(&slot.counters.discarded, 1);
        count(&slot.counters.quarantined, 1);
        slot.promotion_asked.store(false, Ordering::Release);
        slot.reopen(residence);
        Ok(true)
    }
}

/// Whether the file has a name.
fn is_named(metadata: &std::fs::Metadata) -> bool {
    std::os::unix::fs::MetadataExt::nlink(metadata) > 0
}

impl Slot {
    /// Throws away what a pair has of these extents. Whether reading them again may help: also when
    /// that was done a moment ago, because the caller may have seen what was there before.
    fn discard_from(&self, pair: &Pair, extents: Range<u64>) -> Result<bool> {
        let named = |error: io::Error| Error::io("throw extents of the cache away", &error);
        let mut any = false;
        for extent in extents {
            let one = extent..extent + 1;
            let is_first = lock(&self.discards).take(extent, Instant::now());
            any |= if pair.states().is_bypassed(&one) {
                // It was fetched and not kept.
                is_first
            } else if is_first && pair.states().are_here(&one) {
                self.discard_one(pair, extent).map_err(named)?
            } else {
                // Another reader had it thrown away: what comes, or came, instead may be right.
                true
            };
        }
        Ok(any)
    }

    fn discard_one(&self, pair: &Pair, extent: u64) -> io::Result<bool> {
        let one = extent..extent + 1;
        for _ in 0..CLAIM_TRIES {
            let pause = Duration::from_millis(CACHE_POLL_MS_MAX);
            let ticket = match self.flights.begin(one.clone(), 0) {
                Begun::Mine(ticket) => ticket,
                // It may still be the one that brought what is wrong.
                Begun::Theirs(flight) => {
                    let _ = flight.wait(Instant::now() + pause);
                    continue;
                }
            };
            if !pair.states().are_here(&one) {
                ticket.land(Outcome::Stored);
                return Ok(true);
            }
            let Some((claim, _)) = pair.claim_front(&one)? else {
                ticket.land(Outcome::Stored);
                std::thread::sleep(pause);
                continue;
            };
            tracing::warn!(digest = %self.digest, extent, "wrong in content: fetched once more");
            pair.quarantine(extent, &claim)?;
            pair.states().set_missing(extent);
            count(&self.counters.discarded, 1);
            count(&self.counters.quarantined, 1);
            ticket.land(Outcome::Stored);
            return Ok(true);
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::to_u64;

    #[test]
    fn an_extent_is_thrown_away_once_in_a_while_and_not_without_end() {
        let mut discards = Discards::default();
        let now = Instant::now();
        let later = now + Duration::from_millis(CACHE_DISCARD_REST_MS);
        assert!(discards.take(7, now));
        assert!(!discards.take(7, now));
        assert!(discards.take(8, now));
        assert!(discards.take(7, later), "after a rest");
        let mut discards = Discards::default();
        let many = to_u64(CACHE_DISCARDS_MAX);
        assert!((0..many).all(|extent| discards.take(extent, now)));
        assert!(!discards.take(many, now), "too many at one time");
        assert!(discards.take(many, later));
        assert_eq!(discards.at.len(), 1, "those of before are forgotten");
    }
}
