//! Extents that are as they were stored and wrong all the same: damaged on their way, before our
//! checksum was taken. Only who decodes them notices.
//!
//! ```text
//!   decoder: wrong --> discard: note it in the record, not here any more --> read again: fetched
//!     once more, from the origin --> wrong again: an error, and no further fetch for a while
//! ```
//!
//! An extent is thrown away once within [`CACHE_DISCARD_REST_MS`], so that a blob that was
//! published wrong costs a fetch a minute, however often it is read. Whoever else than the origin
//! may have given what is wrong is not asked for a while ([`Doubt`](super::doubt::Doubt)), so that
//! once is enough.

use super::blob::{CachedBlob, Residence, Slot};
use super::flight::{Begun, Outcome, lock};
use super::pair::Pair;
use super::stats::count;
use crate::error::{Error, Result};
use crate::limits::{
    CACHE_COMPARE_MS_MAX, CACHE_COMPARE_REST_MS, CACHE_DISCARD_REST_MS, CACHE_EXTENTS_MAX,
    CACHE_JOIN_BYTES_MAX, CACHE_POLL_MS_MAX,
};
use crate::source::MappedFile;
use crate::units::to_usize;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often an extent that somebody else has claimed is tried again, [`CACHE_POLL_MS_MAX`] apart:
/// who has the claim of what is here is repairing or promoting it.
const CLAIM_TRIES: u32 = 50;

/// Which extents of a blob were thrown away lately.
#[derive(Debug, Default)]
pub(super) struct Discards {
    begun: Option<Instant>,
    /// A bit for each extent that was thrown away since then; 512 KiB for the largest blob.
    taken: Vec<u64>,
    /// Until when nobody is asked what a plain file should hold: it was in vain.
    unanswered_until: Option<Instant>,
}

impl Discards {
    /// Whether the extent may be thrown away now; notes that it is. There is no limit on how many
    /// may: a bad mirror can have given them all, and each costs one fetch.
    fn take(&mut self, extent: u64, now: Instant) -> bool {
        let rest = Duration::from_millis(CACHE_DISCARD_REST_MS);
        if self.begun.is_none_or(|begun| now.saturating_duration_since(begun) >= rest) {
            self.begun = Some(now);
            self.taken.clear();
        }
        let Some((word, bit)) = place_of(extent) else { return false };
        if self.taken.len() <= word {
            self.taken.resize(word + 1, 0);
        }
        let Some(bits) = self.taken.get_mut(word) else { return false };
        let is_first = *bits & bit == 0;
        *bits |= bit;
        is_first
    }

    /// Makes [`Discards::take`] as if it had not been.
    fn give_back(&mut self, extent: u64) {
        let Some((word, bit)) = place_of(extent) else { return };
        if let Some(bits) = self.taken.get_mut(word) {
            *bits &= !bit;
        }
    }
}

/// The word and the bit of an extent.
fn place_of(extent: u64) -> Option<(usize, u64)> {
    let words = extent.min(CACHE_EXTENTS_MAX) / u64::from(u64::BITS);
    Some((to_usize(words)?, 1 << (extent % u64::from(u64::BITS))))
}

impl CachedBlob {
    /// See [`crate::source::RemoteBlob::discard`].
    pub(super) fn discard_now(&self, bytes: &Range<u64>) -> bool {
        let slot = &self.slot;
        if bytes.start >= bytes.end || bytes.end > slot.extents.blob_bytes() {
            return false;
        }
        // Before anything is thrown away: others may fetch it again at once.
        slot.doubt.raise();
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
    /// has changed since. That is not worth a read's whole time: the read fails either way where
    /// nobody answers, and the next one should not wait as long again.
    fn discard_whole(
        &self,
        residence: &Arc<Residence>,
        file: &MappedFile,
        bytes: &Range<u64>,
    ) -> Result<bool> {
        let slot = &self.slot;
        let most = CACHE_JOIN_BYTES_MAX.min(bytes.end - bytes.start);
        let first = slot.extents.touched_by(bytes).start;
        let now = Instant::now();
        let deadline = self.deadline().min(now + Duration::from_millis(CACHE_COMPARE_MS_MAX));
        {
            let mut discards = lock(&slot.discards);
            if discards.unanswered_until.is_some_and(|until| now < until) {
                return Ok(false);
            }
            if !discards.take(first, now) {
                return Ok(true);
            }
        }
        let mut kept = vec![0; to_usize(most).unwrap_or(0)];
        let mut fetched = kept.clone();
        let is_read = file.read_vouched(bytes.start, &mut kept).is_ok();
        let asked = self.fetch.fetch_from_origin(bytes.start, &mut fetched, deadline);
        asked.inspect_err(|_| {
            let mut discards = lock(&slot.discards);
            discards.give_back(first);
            let rest = Duration::from_millis(CACHE_COMPARE_REST_MS);
            discards.unanswered_until = Some(Instant::now() + rest);
        })?;
        count(&slot.counters.fetches, 1);
        count(&slot.counters.fetched_bytes, most);
        if is_read && kept == fetched {
            return Ok(false);
        }
        let Some(folder) = &slot.shared.folder else { return Ok(false) };
        tracing::warn!(digest = %slot.digest, "a complete blob has changed since: removed");
        let folder_lock = folder.lock()?;
        // Somebody may have done so already, and the name may be of another file by now.
        if slot.is_named(file) {
            folder.remove_whole(&slot.digest, &folder_lock)?;
        }
        drop(folder_lock);
        count(&slot.counters.discarded, 1);
        count(&slot.counters.quarantined, 1);
        slot.reopen(residence);
        Ok(true)
    }
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
                    // One that has landed is known for a moment still: its thread may be held up
                    // before it has taken it off the list, and all tries would be gone at once.
                    std::thread::sleep(pause);
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

    #[test]
    fn an_extent_is_thrown_away_once_in_a_while_however_many_there_are() {
        let mut discards = Discards::default();
        let now = Instant::now();
        let later = now + Duration::from_millis(CACHE_DISCARD_REST_MS);
        assert!(discards.take(7, now));
        assert!(!discards.take(7, now));
        discards.give_back(7);
        assert!(discards.take(7, now), "nothing became of it");
        assert!((0..5000).filter(|extent| *extent != 7).all(|extent| discards.take(extent, now)));
        assert!((0..5000).all(|extent| !discards.take(extent, now)));
        assert!((0..5000).all(|extent| discards.take(extent, later)), "after a rest");
        assert!(discards.take(CACHE_EXTENTS_MAX - 1, later));
        let bytes = discards.taken.len() * 8;
        assert!(bytes <= 512 << 10, "{bytes} bytes for the largest blob");
    }
}
