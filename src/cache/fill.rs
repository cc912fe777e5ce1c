//! Bringing extents that are missing: from what other processes stored, else by fetching.
//!
//! ```text
//!   look at the records --all right--> done
//!     missing: claim --taken--> look again a little later, past the cache when patience ends
//!       claimed: look again, quarantine what is bad, fetch, data, record, let go
//!   the disk fails, is full, over quota, or the extent's place is bad: fetch, keep nothing
//! ```
//!
//! A claim is held while something is fetched, which ends at the deadline, and while it is stored.
//! Where that takes long all the same (a dead disk, credentials that nobody brings, a process that
//! is stopped), those who wait for the claim do not: they fetch for themselves ([`Patience`]).
//!
//! What was thrown away once, by whatever process, is fetched from the origin itself: who gave the
//! wrong bytes would give them again ([`Doubt`]).

use super::blob::canceled;
use super::buffers::{Buffer, Buffers};
use super::claim::Claim;
use super::doubt::Doubt;
use super::extent_set::{Extents, next_missing};
use super::flight::Outcome;
use super::gate::Gate;
use super::pair::Pair;
use super::stats::{Counters, count};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{CACHE_IMPATIENCE_MS, CACHE_PATIENCE_MS, CACHE_POLL_MS_MAX};
use crate::source::{Fetch, too_short};
use crate::units::{to_u64, to_usize};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// For whom extents are brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A read waits for them.
    Demand,
    /// A reader may come to them: not worth waiting for anything, or fetching without keeping.
    Ahead,
    /// They are to be kept: not worth fetching otherwise, and worth knowing why not.
    Keep,
}

/// How it ended.
#[derive(Debug)]
pub(super) enum Brought {
    /// They are here.
    Here,
    /// They could not be kept: their bytes, and what was stored in this call all the same.
    Bytes(Arc<[u8]>),
    /// The pair was evicted, removed or became a plain file: another must be opened.
    Retired,
    /// Nothing was worth doing.
    Nothing,
    /// Others are fetching them for longer than is waited for at a time.
    Taken,
    /// Why they cannot be kept.
    NotKept(Error),
}

impl Brought {
    /// The bytes of what could not be kept.
    pub(super) fn bytes(self) -> Option<Arc<[u8]>> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// What those who joined the flight get. `first_byte` is where the bytes begin in the blob.
    pub(super) fn outcome(&self, first_byte: u64) -> Outcome {
        match self {
            Self::Bytes(bytes) => Outcome::Bytes(first_byte, Arc::clone(bytes)),
            // Who joined looks again, and fetches without keeping where that is the only way.
            _ => Outcome::Stored,
        }
    }
}

/// What comes of one flight besides what is here after it.
#[derive(Debug, Default)]
pub(super) struct Haul<'a> {
    /// Bytes that went to the disk.
    pub(super) stored: u64,
    /// Whose read waits for it: where in the blob it goes on, and the rest of its memory.
    read: Option<(u64, &'a mut [u8])>,
    /// Bytes that the read got.
    pub(super) done: usize,
}

impl<'a> Haul<'a> {
    /// For a read at byte `at` of the blob, which takes what was fetched while it is at hand: from
    /// the mapping it would be copied out of pages that nobody has touched yet.
    pub(super) fn of_read(at: u64, dst: &'a mut [u8]) -> Self {
        Self { read: Some((at, dst)), ..Self::default() }
    }

    fn take(&mut self, bytes: &[u8], first_byte: u64) {
        let Some((at, dst)) = &mut self.read else { return };
        let rest = dst.get_mut(self.done..).unwrap_or_default();
        self.done += copy_from(bytes, first_byte, *at + to_u64(self.done), rest);
    }
}

/// Copies what `bytes`, which begin at `first_byte`, have of `dst`, which begins at `at`.
pub(super) fn copy_from(bytes: &[u8], first_byte: u64, at: u64, dst: &mut [u8]) -> usize {
    let from = at.checked_sub(first_byte).and_then(to_usize);
    let Some(found) = from.and_then(|from| bytes.get(from..)) else { return 0 };
    let length = found.len().min(dst.len());
    let (Some(to), Some(from)) = (dst.get_mut(..length), found.get(..length)) else { return 0 };
    to.copy_from_slice(from);
    length
}

/// How long to wait for what others are fetching of a blob. Who waited in vain waits shortly for a
/// while: whoever it was has more than one extent.
#[derive(Debug)]
pub(super) struct Patience {
    begun: Instant,
    lost_until_ms: AtomicU64,
}

impl Patience {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), lost_until_ms: AtomicU64::new(0) }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Until when to wait: at least half of the time is left for fetching alone.
    pub(super) fn until(&self, deadline: Instant) -> Instant {
        let now = Instant::now();
        let is_lost = self.now_ms() < self.lost_until_ms.load(Ordering::Relaxed);
        let most = if is_lost { CACHE_POLL_MS_MAX } else { CACHE_PATIENCE_MS };
        now + (deadline.saturating_duration_since(now) / 2).min(Duration::from_millis(most))
    }

    fn lose(&self) {
        let until = self.now_ms().saturating_add(CACHE_IMPATIENCE_MS);
        self.lost_until_ms.store(until, Ordering::Relaxed);
    }
}

/// Everything that bringing needs.
#[derive(Debug)]
pub(super) struct Filler<'a> {
    pub(super) extents: Extents,
    /// None where the cache cannot be used.
    pub(super) pair: Option<&'a Pair>,
    pub(super) fetch: &'a dyn Fetch,
    pub(super) counters: &'a Counters,
    pub(super) gate: &'a Gate,
    pub(super) buffers: &'a Buffers,
    pub(super) patience: &'a Patience,
    pub(super) doubt: &'a Doubt,
    pub(super) purpose: Purpose,
    /// Whether nobody waits any more.
    pub(super) canceled: &'a AtomicBool,
    pub(super) deadline: Instant,
}

/// Extents that could not be stored, and their bytes.
type NotKept = (Range<u64>, Arc<[u8]>);

/// What stopped storing.
enum Obstacle {
    Disk(io::Error),
    Fetch(Error),
}

impl From<io::Error> for Obstacle {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

impl Filler<'_> {
    /// Brings `wanted`, which no other thread of this process is bringing.
    ///
    /// # Errors
    /// Why the bytes could not be fetched.
    pub(super) fn bring(&self, wanted: &Range<u64>, haul: &mut Haul<'_>) -> Result<Brought> {
        let Some(pair) = self.pair else { return self.past_the_cache(wanted) };
        match self.bring_into(pair, wanted, haul) {
            Ok(brought) => Ok(brought),
            Err(Obstacle::Fetch(error)) => Err(error),
            Err(Obstacle::Disk(error)) => {
                self.gate.close(&error);
                self.past_the_cache(wanted)
            }
        }
    }

    fn bring_into(
        &self,
        pair: &Pair,
        wanted: &Range<u64>,
        haul: &mut Haul<'_>,
    ) -> Result<Brought, Obstacle> {
        let patience = self.patience.until(self.deadline);
        let mut pause_ms = 1;
        loop {
            let Some(missing) = first_missing(pair, wanted) else { return Ok(Brought::Here) };
            let looked = pair.look(&(missing.start..wanted.end))?;
            count(&self.counters.verified, looked.verified);
            let Some(missing) = first_missing(pair, wanted) else { return Ok(Brought::Here) };
            let is_bypassed = pair.states().is_bypassed(&missing);
            if is_bypassed && self.purpose == Purpose::Keep {
                let message = "the cache's disk cannot be read where they are";
                return Ok(Brought::NotKept(Error::new(ErrorKind::Io, message)));
            }
            if is_bypassed || !self.gate.is_open() {
                return self.past_the_cache(wanted).map_err(Obstacle::Fetch);
            }
            if let Some((claim, claimed)) = pair.claim_front(&missing)? {
                if pair.is_retired()? {
                    return Ok(Brought::Retired);
                }
                let Some((run, bytes)) = self.fill(pair, &claimed, &claim, haul)? else {
                    continue;
                };
                drop(claim);
                if run == *wanted && self.purpose != Purpose::Keep {
                    return Ok(Brought::Bytes(bytes));
                }
                return self.past_the_cache(wanted).map_err(Obstacle::Fetch);
            }
            if self.purpose == Purpose::Ahead {
                return Ok(Brought::Nothing);
            }
            if pause_ms == 1 {
                count(&self.counters.waited, 1);
            }
            if self.canceled.load(Ordering::Relaxed) {
                return Err(Obstacle::Fetch(canceled()));
            }
            if Instant::now() >= patience {
                return self.give_up_waiting(wanted).map_err(Obstacle::Fetch);
            }
            std::thread::sleep(Duration::from_millis(pause_ms));
            pause_ms = (pause_ms * 2).min(CACHE_POLL_MS_MAX);
        }
    }

    /// Fetches for ourselves what somebody else has been fetching for too long.
    ///
    /// # Errors
    /// Why the bytes could not be fetched.
    pub(super) fn give_up_waiting(&self, wanted: &Range<u64>) -> Result<Brought> {
        count(&self.counters.waited_in_vain, 1);
        self.patience.lose();
        if self.purpose == Purpose::Keep {
            return Ok(Brought::Taken);
        }
        self.past_the_cache(wanted)
    }

    /// Fetches and stores the first run of `claimed` that is still missing. The run and its bytes
    /// when they could not be stored.
    fn fill(
        &self,
        pair: &Pair,
        claimed: &Range<u64>,
        claim: &Claim<'_>,
        haul: &mut Haul<'_>,
    ) -> Result<Option<NotKept>, Obstacle> {
        // Somebody may have stored them between our look and our claim.
        let looked = pair.look(claimed)?;
        count(&self.counters.verified, looked.verified);
        for &extent in &looked.bad {
            let digest = pair.header().digest;
            tracing::warn!(%digest, extent, "an extent of the cache is damaged: fetched anew");
            count(&self.counters.quarantined, 1);
            pair.quarantine(extent, claim)?;
        }
        let missing = first_missing(pair, claimed);
        let Some(run) = missing.filter(|run| !pair.states().is_bypassed(run)) else {
            return Ok(None);
        };
        let bytes = self.fetch(&run, looked.has_quarantined).map_err(Obstacle::Fetch)?;
        match pair.store(&run, &bytes, claim) {
            Ok(()) => {
                haul.stored += to_u64(bytes.len());
                haul.take(&bytes, self.extents.bytes_of(&run).start);
                Ok(None)
            }
            Err(error) => {
                self.gate.close(&error);
                count(&self.counters.degraded, run.end - run.start);
                Ok(Some((run, Arc::from(&*bytes))))
            }
        }
    }

    fn past_the_cache(&self, wanted: &Range<u64>) -> Result<Brought> {
        match self.purpose {
            Purpose::Ahead => return Ok(Brought::Nothing),
            Purpose::Keep => return Ok(Brought::NotKept(self.gate.obstacle())),
            Purpose::Demand => {}
        }
        count(&self.counters.degraded, wanted.end - wanted.start);
        self.fetch(wanted, false).map(|bytes| Brought::Bytes(Arc::from(&*bytes)))
    }

    fn fetch(&self, extents: &Range<u64>, is_suspect: bool) -> Result<Buffer<'_>> {
        let bytes = self.extents.bytes_of(extents);
        let length = bytes.end - bytes.start;
        let mut buffer = self.buffers.take(to_usize(length).unwrap_or(0));
        let from_origin = is_suspect || self.doubt.is_raised();
        let fetched = buffer.lend(|memory, length| {
            let what = (bytes.start, from_origin);
            self.fetch.fetch_lent(what, memory, length, self.deadline)
        });
        // Who took the memory must have brought it back: what is stored is what is in it.
        let fetched = fetched.and_then(|()| match to_u64(buffer.len()) == length {
            true => Ok(()),
            false => Err(too_short(self.fetch.name(), to_usize(length).unwrap_or(0))),
        });
        if let Err(error) = fetched {
            count(&self.counters.fetch_failures, 1);
            return Err(error);
        }
        count(&self.counters.fetches, 1);
        count(&self.counters.fetched_bytes, length);
        if self.purpose == Purpose::Ahead {
            count(&self.counters.ahead_bytes, length);
        }
        Ok(buffer)
    }
}

/// The first run of extents that are not here.
fn first_missing(pair: &Pair, extents: &Range<u64>) -> Option<Range<u64>> {
    let is_here = |extent| pair.states().are_here(&(extent..extent + 1));
    next_missing(extents.clone(), u64::MAX, is_here)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_half_of_the_time_ten_seconds_at_most_and_short_once_lost() {
        let patience = Patience::new();
        let wait = |seconds: u64| {
            let now = Instant::now();
            let until = patience.until(now + Duration::from_secs(seconds));
            until.saturating_duration_since(now).as_millis()
        };
        assert!((3900..=4100).contains(&wait(8)), "{}", wait(8));
        assert!((9_900..=10_100).contains(&wait(60)), "{}", wait(60));
        assert_eq!(wait(0), 0);
        patience.lose();
        assert!(wait(60) <= 120, "{}", wait(60));
    }
}
