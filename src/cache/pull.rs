//! Bringing a part of a blob, or all of it, here without reading it.
//!
//! ```text
//!   for each run that is missing: bring it; others fetch it for too long?  --> note it, go past
//!   then for each run that was gone past: wait until it is here, or they are gone
//! ```
//!
//! Who only opens a layer goes past what others have as a read does: it wants the bytes. Who pulls
//! a layer wants them kept, which whoever has claimed them has to do, or to die; one that is
//! stopped must not keep the rest from coming.

use super::blob::{CachedBlob, Residence};
use super::extent_set::next_missing;
use super::fill::{Brought, Haul, Purpose};
use super::flight::Begun;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::{CACHE_AHEAD_BYTES_MAX, CACHE_TAKEN_MAX};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What becomes of extents that others are fetching.
enum Theirs<'a> {
    /// Not waited for any longer than a read does.
    AsRead,
    /// Noted here, and gone past.
    Noted(&'a mut Vec<Range<u64>>),
    /// Waited for.
    Awaited,
}

impl CachedBlob {
    /// Brings these bytes here without reading them; for what is about to be read. Blocks as a read
    /// does, [`crate::source::RemoteBlob::read`], for each MiB anew.
    ///
    /// # Errors
    /// As there; `NoSpace` when they cannot be kept now, for whatever reason.
    pub fn fill(&self, bytes: Range<u64>) -> Result<()> {
        self.check_range(&bytes)?;
        let extents = self.slot.extents.touched_by(&bytes);
        self.fill_run(extents, &AtomicU64::new(0), Theirs::AsRead)
    }

    /// As [`CachedBlob::fill`], for having a whole blob: what other processes are fetching is
    /// waited for, after everything else is here, for each MiB as long as a read may take.
    /// `progress` counts the bytes of extents that are here.
    ///
    /// # Errors
    /// As a read; why they cannot be kept, of which `NoSpace` is one reason; `Timeout` for what
    /// another process has begun and does not end.
    pub fn fill_counted(&self, bytes: Range<u64>, progress: &AtomicU64) -> Result<()> {
        self.check_range(&bytes)?;
        let mut taken = Vec::new();
        let extents = self.slot.extents.touched_by(&bytes);
        self.fill_run(extents, progress, Theirs::Noted(&mut taken))?;
        for run in taken {
            self.fill_run(run, progress, Theirs::Awaited)?;
        }
        Ok(())
    }

    fn fill_run(
        &self,
        extents: Range<u64>,
        progress: &AtomicU64,
        mut theirs: Theirs<'_>,
    ) -> Result<()> {
        let window = self.slot.extents.in_bytes(CACHE_AHEAD_BYTES_MAX);
        let mut at = extents.start;
        let mut spread_to = at;
        let mut deadline = self.deadline();
        let passed = |extents: Range<u64>| {
            let bytes = self.slot.extents.bytes_of(&extents);
            progress.fetch_add(bytes.end.saturating_sub(bytes.start), Ordering::Relaxed);
        };
        while at < extents.end {
            self.check_in_time(deadline)?;
            self.slot.check_not_condemned()?;
            let residence = self.slot.residence.load_full();
            let pair = match &*residence {
                Residence::Whole(_) => break,
                Residence::Partial(pair) => pair,
                Residence::Nothing if matches!(theirs, Theirs::AsRead) => {
                    return Err(self.not_kept());
                }
                Residence::Nothing => {
                    self.slot.reopen_or_tell(&residence).context(|| self.keeping())?;
                    continue;
                }
            };
            let is_here = |extent| pair.states().are_here(&(extent..extent + 1));
            let run = next_missing(at..extents.end, self.slot.join_max(), is_here);
            let Some(run) = run else { break };
            if run.start > at {
                // It goes on: each request has its own time.
                passed(at..run.start);
                at = run.start;
                deadline = self.deadline();
            }
            // Half a window at a time, so that the background always has something to do.
            if spread_to < extents.end && spread_to < at.saturating_add(window / 2).max(run.end) {
                let from = spread_to.max(run.end);
                spread_to = at.saturating_add(window).min(extents.end).max(from);
                self.spread(from..spread_to);
            }
            if self.fill_one(&residence, run.clone(), &mut theirs, deadline)? {
                at = run.end;
                deadline = self.deadline();
            }
        }
        passed(at..extents.end);
        Ok(())
    }

    /// Brings a run, or its front; whether it was noted, to be gone past.
    fn fill_one(
        &self,
        residence: &Arc<Residence>,
        run: Range<u64>,
        theirs: &mut Theirs<'_>,
        deadline: Instant,
    ) -> Result<bool> {
        let is_taken = match theirs {
            Theirs::AsRead => {
                let brought = self.bring(residence, run, &mut Haul::default(), deadline)?;
                return brought.map_or(Ok(false), |_| Err(self.not_kept()));
            }
            Theirs::Noted(_) | Theirs::Awaited => self.keep(residence, &run)?,
        };
        if !is_taken {
            return Ok(false);
        }
        if let Theirs::Noted(taken) = theirs
            && note(taken, &run)
        {
            return Ok(true);
        }
        if Instant::now() < deadline {
            return Ok(false);
        }
        let bytes = self.slot.extents.bytes_of(&run);
        let message = format!(
            "bytes {bytes:?} are being fetched by another process for too long; is it stopped?"
        );
        Err(Error::new(ErrorKind::Timeout, message).context(self.keeping()))
    }

    /// Has the front of a run fetched and stored by this process; whether others are at it.
    fn keep(&self, residence: &Arc<Residence>, run: &Range<u64>) -> Result<bool> {
        let slot = &self.slot;
        // Of its own: who waited long for others still needs the time of a request.
        let deadline = self.deadline();
        let how = (Purpose::Keep, &self.canceled);
        let filler = slot.filler(residence.pair(), &*self.fetch, how, deadline);
        // By nobody in particular: a read that joins has less patience, and other ways.
        let ticket = match slot.flights.begin(run.clone(), 0) {
            Begun::Mine(ticket) => ticket,
            Begun::Theirs(flight) => return Ok(flight.wait(deadline).is_err()),
        };
        match slot.fly(ticket, residence, &filler, &mut Haul::default())? {
            Brought::Taken => Ok(true),
            Brought::NotKept(error) => Err(error.context(self.keeping())),
            Brought::Here | Brought::Bytes(_) | Brought::Retired | Brought::Nothing => Ok(false),
        }
    }

    /// What was being done, for messages.
    pub(super) fn keeping(&self) -> String {
        format!("keep {} in the cache", self.fetch.name())
    }

    fn not_kept(&self) -> Error {
        let message = format!("{}: the cache cannot keep it", self.fetch.name());
        Error::new(ErrorKind::NoSpace, message)
    }
}

/// Notes a run; false when there are too many to remember.
fn note(taken: &mut Vec<Range<u64>>, run: &Range<u64>) -> bool {
    if let Some(last) = taken.last_mut()
        && last.end == run.start
    {
        last.end = run.end;
        return true;
    }
    let has_room = taken.len() < CACHE_TAKEN_MAX;
    if has_room {
        taken.push(run.clone());
    }
    has_room
}
