//! A blob that lies elsewhere, read through the cache.
//!
//! A [`Slot`] is what all readers of one digest in this process share: the open files, the flights,
//! the planner and the counters. A [`CachedBlob`] is one reader's view of it, with the reader's own
//! way to fetch. A hit is a look at one byte for each extent and a copy out of a mapping; the rest
//! of this file is for misses.

use super::Shared;
use super::digest::BlobDigest;
use super::discard::Discards;
use super::doubt::Doubt;
use super::extent_set::{Extents, next_missing};
use super::fill::{Brought, Filler, Haul, Patience, Purpose, copy_from};
use super::flight::{Begun, Flights, Outcome, Ticket, lock};
use super::line::{Line, Place};
use super::pair::Pair;
use super::readahead::Readahead;
use super::stats::{Counters, Stats, count};
use super::store::Opened;
use super::upkeep::Retry;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::{
    CACHE_AHEAD_AT_ONCE_MAX, CACHE_AHEAD_BYTES_MAX, CACHE_COMMITS_MAX, CACHE_JOIN_BYTES_MAX,
};
use crate::source::{Fetch, MappedFile, RemoteBlob, RemoteUsage};
use crate::units::{to_u64, to_usize};
use crate::waiting;
use arc_swap::ArcSwap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What there is of a blob on this host.
#[derive(Debug)]
pub(super) enum Residence {
    /// All of it, checked.
    Whole(MappedFile),
    /// Some of it.
    Partial(Pair),
    /// The cache cannot be used for it.
    Nothing,
}

impl From<Opened> for Residence {
    fn from(opened: Opened) -> Self {
        match opened {
            Opened::Whole(file) => Self::Whole(file),
            Opened::Partial(pair) => Self::Partial(pair),
        }
    }
}

impl Residence {
    /// The pair, if it is one.
    pub(super) fn pair(&self) -> Option<&Pair> {
        match self {
            Self::Partial(pair) => Some(pair),
            Self::Whole(_) | Self::Nothing => None,
        }
    }
}

/// One blob in this process.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) digest: BlobDigest,
    pub(super) extents: Extents,
    pub(super) shared: Arc<Shared>,
    pub(super) residence: ArcSwap<Residence>,
    pub(super) counters: Counters,
    pub(super) flights: Flights,
    /// Who fetches ahead, whoever asked for it.
    ahead: Line,
    planner: Mutex<Readahead>,
    patience: Patience,
    /// Of everybody but the blob's origin.
    pub(super) doubt: Doubt,
    reopening: AtomicBool,
    /// Whether it was read since the last tick.
    pub(super) used: AtomicBool,
    /// Bytes stored since the last tick.
    pub(super) stored_bytes: AtomicU64,
    /// Folders that are to have the blob as `overlaybd.commit` once it is complete.
    pub(super) wanted_in: Mutex<Vec<PathBuf>>,
    /// Whether somebody was asked to check and promote the whole.
    pub(super) promotion_asked: AtomicBool,
    /// Whether the records are to be looked at: all of it may be here without anybody's having
    /// seen all of it, where who stored the last of it died.
    pub(super) look_due: AtomicBool,
    /// When to promote again what could not be.
    pub(super) retry: Mutex<Retry>,
    /// How often the whole was found to have another digest.
    pub(super) condemned: AtomicU32,
    /// Extents whose content was found wrong.
    pub(super) discards: Mutex<Discards>,
}

/// A blob that lies elsewhere, read through the cache. See [`super::Cache::blob`].
#[derive(Debug)]
pub struct CachedBlob {
    pub(super) slot: Arc<Slot>,
    pub(super) fetch: Arc<dyn Fetch>,
    pub(super) canceled: AtomicBool,
}

/// The background is not canceled: its fetches are.
static NEVER: AtomicBool = AtomicBool::new(false);

impl Slot {
    pub(super) fn new(digest: BlobDigest, extents: Extents, shared: Arc<Shared>) -> Self {
        let residence = shared.open(&digest, extents).unwrap_or_else(|error| {
            // Without a folder that was told once for all blobs.
            if shared.folder.is_some() {
                let error = format!("{error:#}");
                tracing::warn!(%digest, error, "read past the cache");
            }
            Residence::Nothing
        });
        Self {
            digest,
            extents,
            residence: ArcSwap::from_pointee(residence),
            counters: Counters::default(),
            flights: Flights::default(),
            ahead: Line::new(CACHE_AHEAD_AT_ONCE_MAX),
            planner: Mutex::new(Readahead::new(extents.count(), extents.extent_bytes())),
            patience: Patience::new(),
            doubt: Doubt::new(),
            reopening: AtomicBool::new(false),
            used: AtomicBool::new(true),
            stored_bytes: AtomicU64::new(0),
            wanted_in: Mutex::default(),
            promotion_asked: AtomicBool::new(false),
            look_due: AtomicBool::new(true),
            retry: Mutex::default(),
            condemned: AtomicU32::new(0),
            discards: Mutex::default(),
            shared,
        }
    }

    /// Opens the blob's files anew, in place of `old`. Another thread that is at it already is
    /// left alone.
    pub(super) fn reopen(&self, old: &Arc<Residence>) {
        // That it still cannot be opened was told when it could not be at first.
        let is_known = matches!(&**old, Residence::Nothing);
        if let Err(error) = self.reopen_or_tell(old)
            && !is_known
        {
            let error = format!("{error:#}");
            tracing::warn!(digest = %self.digest, error, "read past the cache");
        }
    }

    /// As [`Slot::reopen`].
    ///
    /// # Errors
    /// Why the cache cannot be used for the blob.
    pub(super) fn reopen_or_tell(&self, old: &Arc<Residence>) -> Result<()> {
        if self.reopening.swap(true, Ordering::AcqRel) {
            // It takes some system calls; the caller looks again.
            std::thread::sleep(Duration::from_millis(1));
            return Ok(());
        }
        let mut failed = None;
        if Arc::ptr_eq(&self.residence.load_full(), old) {
            let opened = self.shared.open(&self.digest, self.extents);
            let opened = opened.unwrap_or_else(|error| {
                failed = Some(error);
                Residence::Nothing
            });
            self.residence.store(Arc::new(opened));
            // What comes in its place is to be checked and promoted as well.
            *lock(&self.retry) = Retry::default();
            self.look_due.store(true, Ordering::Release);
            self.promotion_asked.store(false, Ordering::Release);
        }
        self.reopening.store(false, Ordering::Release);
        failed.map_or(Ok(()), Err)
    }

    /// Extents that are fetched by one request.
    pub(super) fn join_max(&self) -> u64 {
        self.extents.in_bytes(CACHE_JOIN_BYTES_MAX)
    }

    /// Refuses a blob whose bytes were complete twice and wrong twice.
    pub(super) fn check_not_condemned(&self) -> Result<()> {
        if self.condemned.load(Ordering::Relaxed) < 2 {
            return Ok(());
        }
        let message = format!("{}: its bytes, fetched twice, have another digest", self.digest);
        Err(Error::new(ErrorKind::Integrity, message))
    }

    pub(super) fn filler<'a>(
        &'a self,
        pair: Option<&'a Pair>,
        fetch: &'a dyn Fetch,
        (purpose, canceled): (Purpose, &'a AtomicBool),
        deadline: Instant,
    ) -> Filler<'a> {
        Filler {
            extents: self.extents,
            pair,
            fetch,
            counters: &self.counters,
            gate: &self.shared.gate,
            buffers: &self.shared.buffers,
            patience: &self.patience,
            doubt: &self.doubt,
            purpose,
            canceled,
            deadline,
        }
    }

    /// Brings the extents of a ticket and lands it.
    pub(super) fn fly(
        self: &Arc<Self>,
        ticket: Ticket<'_>,
        residence: &Arc<Residence>,
        filler: &Filler<'_>,
        haul: &mut Haul<'_>,
    ) -> Result<Brought> {
        let extents = ticket.extents();
        // Somebody may have landed between our look and our ticket.
        let here = residence.pair().is_some_and(|pair| pair.states().are_here(&extents));
        let brought = if here { Ok(Brought::Here) } else { filler.bring(&extents, haul) };
        if matches!(brought, Ok(Brought::Retired)) {
            self.reopen(residence);
        }
        ticket.land(match &brought {
            Ok(brought) => brought.outcome(self.extents.bytes_of(&extents).start),
            Err(error) => Outcome::failed(error),
        });
        if haul.stored > 0 {
            self.stored_bytes.fetch_add(haul.stored, Ordering::Relaxed);
            if self.shared.gate.stored(haul.stored) {
                self.shared.trim_later(false);
            }
        }
        if residence.pair().is_some_and(|pair| pair.states().is_complete()) {
            self.promote_later();
        }
        if self.shared.gate.take_is_full() {
            self.shared.trim_later(true);
        } else if self.shared.gate.is_recheck_due() {
            self.shared.trim_later(false);
        }
        brought
    }

    /// Fetches extents ahead of a reader, as long as nothing is in the way. With `waits` it waits
    /// for its turn, until that is set; without, what has no place now is not fetched.
    fn fetch_ahead(
        self: &Arc<Self>,
        fetch: &dyn Fetch,
        extents: Range<u64>,
        waits: Option<&AtomicBool>,
    ) -> Result<()> {
        let residence = self.residence.load_full();
        let Some(pair) = residence.pair() else { return Ok(()) };
        let mut at = extents.start;
        while at < extents.end {
            let is_here = |extent| pair.states().are_here(&(extent..extent + 1));
            let run = next_missing(at..extents.end, self.join_max(), is_here);
            let Some(run) = run else { break };
            at = run.end;
            // Before the flight begins: who joins it waits for a fetch, not for a place.
            let Some(_place) = self.place_ahead(waits)? else { break };
            let Begun::Mine(ticket) = self.flights.begin(run, 0) else { continue };
            at = ticket.extents().end;
            let deadline = Instant::now() + self.shared.settings.deadline;
            let filler = self.filler(Some(pair), fetch, (Purpose::Ahead, &NEVER), deadline);
            let mut haul = Haul::default();
            if !matches!(self.fly(ticket, &residence, &filler, &mut haul)?, Brought::Here) {
                break;
            }
        }
        Ok(())
    }

    /// A place among those who fetch ahead; `None` when there is none and it is not waited for.
    fn place_ahead(&self, waits: Option<&AtomicBool>) -> Result<Option<Place<'_>>> {
        let Some(is_canceled) = waits else {
            let place = self.ahead.try_enter();
            count(&self.counters.ahead_dropped, u64::from(place.is_none()));
            return Ok(place);
        };
        let deadline = Instant::now() + self.shared.settings.deadline;
        let place = self.ahead.enter(is_canceled, deadline);
        if place.is_none() && is_canceled.load(Ordering::Relaxed) {
            return Err(canceled());
        }
        let late = || Error::new(ErrorKind::Timeout, "others fetch ahead for too long");
        place.ok_or_else(late).map(Some)
    }
}

impl CachedBlob {
    pub(super) fn new(slot: Arc<Slot>, fetch: Arc<dyn Fetch>) -> Self {
        Self { slot, fetch, canceled: AtomicBool::new(false) }
    }

    /// The counters of this blob, of all its readers in this process.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.slot.counters.read()
    }

    /// Whether every byte is here.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.is_here(0, self.bytes())
    }

    /// Has the background put the blob into the folder `dir` as `overlaybd.commit` once it is
    /// complete and was found right, as [`super::Maintenance::commit_into`] does. False when too
    /// many folders were asked for already.
    pub fn commit_when_complete(&self, dir: PathBuf) -> bool {
        let mut wanted = lock(&self.slot.wanted_in);
        let is_known = wanted.contains(&dir);
        if !is_known && wanted.len() < CACHE_COMMITS_MAX {
            wanted.push(dir);
            return true;
        }
        is_known
    }

    pub(super) fn check_in_time(&self, deadline: Instant) -> Result<()> {
        if self.canceled.load(Ordering::Relaxed) {
            return Err(canceled());
        }
        if Instant::now() < deadline {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Timeout, "the deadline passed"))
    }

    /// Until when the request may wait of which this is a part; without one, from now on.
    pub(super) fn deadline(&self) -> Instant {
        waiting::since() + self.slot.shared.settings.deadline
    }

    pub(super) fn check_range(&self, bytes: &Range<u64>) -> Result<()> {
        if bytes.start <= bytes.end && bytes.end <= self.bytes() {
            return Ok(());
        }
        let (name, have) = (self.fetch.name(), self.bytes());
        let message = format!("read bytes {bytes:?} of {name}: the blob has only {have} bytes");
        Err(Error::new(ErrorKind::OutOfRange, message))
    }

    /// By whom a flight is, for those who join it. Never 0, which is the background's.
    fn fetcher(&self) -> usize {
        Arc::as_ptr(&self.fetch).cast::<()>().addr()
    }

    /// A read that did not find everything here.
    #[cold]
    fn read_slowly(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        let end = offset_bytes.saturating_add(to_u64(dst.len()));
        self.check_range(&(offset_bytes..end))?;
        if dst.is_empty() {
            return Ok(());
        }
        count(&self.slot.counters.misses, 1);
        let _waiting = Waiting::begin(&self.slot.shared.waiting);
        self.plan_ahead(offset_bytes..end);
        self.spread_rest(&(offset_bytes..end));
        let deadline = self.deadline();
        let mut at = offset_bytes;
        let mut rest = dst;
        while !rest.is_empty() {
            let done = self.read_piece(at, rest, deadline).context(|| {
                let name = self.fetch.name();
                format!("read {} bytes at byte {offset_bytes} of {name}", end - offset_bytes)
            })?;
            at += to_u64(done);
            rest = rest.get_mut(done..).unwrap_or_default();
        }
        Ok(())
    }

    /// Reads the front of `dst`; how much. 0 when the caller has to look again.
    fn read_piece(&self, at: u64, dst: &mut [u8], deadline: Instant) -> Result<usize> {
        let slot = &self.slot;
        self.check_in_time(deadline)?;
        slot.check_not_condemned()?;
        let extents = slot.extents.touched_by(&(at..at + to_u64(dst.len())));
        let residence = slot.residence.load_full();
        let mut run = match &*residence {
            Residence::Whole(file) => {
                if file.read(at, dst).is_ok() {
                    return Ok(dst.len());
                }
                if slot.remove_if_cut(&residence, file) {
                    return Ok(0);
                }
                // The disk below the plain file fails: what cannot be read is fetched.
                extents
            }
            Residence::Partial(pair) => {
                let here =
                    extents.clone().find(|extent| !pair.states().are_here(&(*extent..extent + 1)));
                let here = extents.start..here.unwrap_or(extents.end);
                if !here.is_empty() {
                    return Ok(self.read_here(pair, &here, at, dst));
                }
                let is_here = |extent| pair.states().are_here(&(extent..extent + 1));
                let run = next_missing(extents, slot.join_max(), is_here).unwrap_or(here);
                pair.states().alike_front(run)
            }
            Residence::Nothing => extents,
        };
        run.end = run.end.min(run.start.saturating_add(slot.join_max()));
        let mut haul = Haul::of_read(at, dst);
        let brought = self.bring(&residence, run, &mut haul, deadline)?;
        let done = haul.done;
        Ok(brought.map_or(done, |(first_byte, bytes)| copy_from(&bytes, first_byte, at, dst)))
    }

    /// Copies what is here from a pair; 0 when its file fails.
    fn read_here(&self, pair: &Pair, here: &Range<u64>, at: u64, dst: &mut [u8]) -> usize {
        let length = self.slot.extents.bytes_of(here).end.saturating_sub(at);
        let length = to_usize(length).unwrap_or(usize::MAX).min(dst.len());
        let Some(front) = dst.get_mut(..length) else { return 0 };
        if pair.read_if_here(at, front).is_some() {
            return length;
        }
        tracing::warn!(digest = %self.slot.digest, ?here, "a file of the cache cannot be read");
        pair.states().distrust(here.clone());
        0
    }

    /// Brings missing extents, or waits for who does. The bytes from some byte of the blob on where
    /// they could not be kept; `None` when it is time to look again.
    pub(super) fn bring(
        &self,
        residence: &Arc<Residence>,
        run: Range<u64>,
        haul: &mut Haul<'_>,
        deadline: Instant,
    ) -> Result<Option<(u64, Arc<[u8]>)>> {
        let slot = &self.slot;
        let filler = slot.filler(
            residence.pair(),
            &*self.fetch,
            (Purpose::Demand, &self.canceled),
            deadline,
        );
        let flight = match slot.flights.begin(run.clone(), self.fetcher()) {
            Begun::Theirs(flight) => flight,
            Begun::Mine(ticket) => {
                let first_byte = slot.extents.bytes_of(&ticket.extents()).start;
                let brought = slot.fly(ticket, residence, &filler, haul)?;
                return Ok(brought.bytes().map(|bytes| (first_byte, bytes)));
            }
        };
        count(&slot.counters.joined, 1);
        let is_ours = flight.is_by(self.fetcher());
        let until = if is_ours { deadline } else { slot.patience.until(deadline) };
        match flight.wait(until) {
            Ok(Outcome::Stored) => Ok(None),
            Ok(Outcome::Bytes(first_byte, bytes)) => Ok(Some((first_byte, bytes))),
            Ok(Outcome::Failed(kind, text)) if is_ours => Err(Error::new(kind, &*text)),
            // Somebody else's credentials, or the background: we try for ourselves.
            Ok(Outcome::Failed(..)) => Ok(None),
            Err(error) if is_ours => Err(error),
            Err(_) => {
                let first_byte = slot.extents.bytes_of(&run).start;
                let brought = filler.give_up_waiting(&run)?;
                Ok(brought.bytes().map(|bytes| (first_byte, bytes)))
            }
        }
    }

    /// A read touches something that is missing or marked: what to fetch ahead of it?
    fn plan_ahead(&self, bytes: Range<u64>) {
        let slot = &self.slot;
        let residence = slot.residence.load();
        let Some(pair) = residence.pair() else { return };
        let touched = slot.extents.touched_by(&bytes);
        pair.states().unmark(touched.clone());
        if !slot.shared.gate.is_open() {
            return;
        }
        let here = pair.states().here();
        let Some(ahead) = lock(&slot.planner).observe(&touched, here) else { return };
        pair.states().mark(ahead.mark);
        self.spread(ahead.extents);
    }

    /// Has the background fetch what one request cannot bring of a long read, at the same time.
    fn spread_rest(&self, bytes: &Range<u64>) {
        let slot = &self.slot;
        let touched = slot.extents.touched_by(bytes);
        let residence = slot.residence.load();
        let Some(pair) = residence.pair().filter(|_| slot.shared.gate.is_open()) else { return };
        let is_here = |extent| pair.states().are_here(&(extent..extent + 1));
        let first = next_missing(touched.clone(), slot.join_max(), is_here);
        let Some(first) = first.filter(|first| first.end < touched.end) else { return };
        let most = slot.extents.in_bytes(CACHE_AHEAD_BYTES_MAX);
        self.spread(first.end..touched.end.min(first.end.saturating_add(most)));
    }

    /// Hands extents to the background, one job for each request.
    pub(super) fn spread(&self, extents: Range<u64>) {
        let slot = &self.slot;
        let mut at = extents.start;
        while at < extents.end {
            let piece = at..at.saturating_add(slot.join_max()).min(extents.end);
            at = piece.end;
            let (weak, fetch) = (Arc::downgrade(slot), Arc::clone(&self.fetch));
            let job = move || {
                if let Some(slot) = weak.upgrade() {
                    // Who needs it finds out what is wrong.
                    let _ = slot.fetch_ahead(&*fetch, piece, None);
                }
            };
            if !slot.shared.pool.push(Box::new(job)) {
                count(&slot.counters.ahead_dropped, 1);
            }
        }
    }
}

/// One more read waits, as long as this lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The error for who waits for nothing any more.
pub(super) fn canceled() -> Error {
    Error::new(ErrorKind::Canceled, "the reader is going away")
}

impl RemoteBlob for CachedBlob {
    fn name(&self) -> &str {
        self.fetch.name()
    }

    fn bytes(&self) -> u64 {
        self.slot.extents.blob_bytes()
    }

    fn read(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        let slot = &self.slot;
        if !slot.used.load(Ordering::Relaxed) {
            slot.used.store(true, Ordering::Relaxed);
        }
        count(&slot.counters.needed_bytes, to_u64(dst.len()));
        let found = match &**slot.residence.load() {
            Residence::Partial(pair) => pair.read_if_here(offset_bytes, dst),
            // As a local layer: nothing vouches for the zeros behind the end of a cut file.
            Residence::Whole(file) => file.read(offset_bytes, dst).ok().map(|()| false),
            Residence::Nothing => None,
        };
        let Some(is_marked) = found else { return self.read_slowly(offset_bytes, dst) };
        count(&slot.counters.hits, 1);
        if is_marked {
            self.plan_ahead(offset_bytes..offset_bytes.saturating_add(to_u64(dst.len())));
        }
        Ok(())
    }

    fn is_here(&self, offset_bytes: u64, bytes: u64) -> bool {
        let Some(end) = offset_bytes.checked_add(bytes).filter(|end| *end <= self.bytes()) else {
            return false;
        };
        match &**self.slot.residence.load() {
            Residence::Whole(_) => true,
            Residence::Partial(pair) => {
                pair.states().are_here(&self.slot.extents.touched_by(&(offset_bytes..end)))
            }
            Residence::Nothing => false,
        }
    }

    fn fetch_ahead(&self, bytes: Range<u64>) -> Result<()> {
        self.check_range(&bytes)?;
        self.slot.check_not_condemned()?;
        if self.canceled.load(Ordering::Relaxed) {
            return Err(canceled());
        }
        if !self.slot.shared.gate.is_open() {
            return Ok(());
        }
        let extents = self.slot.extents.touched_by(&bytes);
        self.slot.fetch_ahead(&*self.fetch, extents, Some(&self.canceled))
    }

    fn kept_as(&self) -> Option<usize> {
        Some(Arc::as_ptr(&self.slot).addr())
    }

    fn here_bytes(&self) -> u64 {
        match &**self.slot.residence.load() {
            Residence::Whole(_) => self.bytes(),
            Residence::Partial(pair) => {
                let here = pair.states().here().saturating_mul(self.slot.extents.extent_bytes());
                here.min(self.bytes())
            }
            Residence::Nothing => 0,
        }
    }

    fn is_busy(&self) -> bool {
        self.slot.shared.waiting.load(Ordering::Relaxed) > 0
    }

    fn check(&self, deadline: Instant) -> Result<()> {
        if self.is_complete()
            && let Err(error) = self.promote(deadline)
        {
            // Of what keeps it, which tells nothing of the bytes.
            tracing::warn!("{} is not checked: {error:#}", self.name());
        }
        if self.slot.condemned.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let message = format!("{}: what was fetched has another digest", self.name());
        Err(Error::new(ErrorKind::Integrity, message))
    }

    fn usage(&self) -> RemoteUsage {
        let stats = self.stats();
        let asked = self.fetch.usage();
        let is_whole = matches!(&**self.slot.residence.load(), Residence::Whole(_));
        RemoteUsage {
            blobs: 1,
            whole_blobs: u64::from(is_whole || stats.promoted > 0),
            blob_bytes: self.bytes(),
            hits: stats.hits,
            misses: stats.misses,
            needed_bytes: stats.needed_bytes,
            fetched_bytes: stats.fetched_bytes,
            ahead_bytes: stats.ahead_bytes,
            fetch_failures: stats.fetch_failures,
            quarantined_extents: stats.quarantined,
            refetched_extents: stats.discarded,
            degraded_extents: stats.degraded,
            requests: asked.requests,
            retries: asked.retries,
            credential_waits: asked.credential_waits,
        }
    }

    fn discard(&self, offset_bytes: u64, bytes: u64) -> bool {
        let end = offset_bytes.checked_add(bytes);
        end.is_some_and(|end| self.discard_now(&(offset_bytes..end)))
    }

    fn cancel(&self) {
        self.canceled.store(true, Ordering::Relaxed);
        self.slot.ahead.wake();
        self.fetch.cancel();
    }
}
