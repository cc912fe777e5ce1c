//! One thread's way to read and write a pair, with the memory that this takes.

use super::{IDLE, Pair, read, write};
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{DATA_START_SECTOR, SegmentMapping};
use crate::limits::UPPER_ROOM_TRIES_MAX;
use crate::map::{Content, Stretch};
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Longest extent of one entry, in whole pages so that what is split stays aligned.
const EXTENT_SECTORS_MAX: u64 = SegmentMapping::SECTORS_MAX & !7;

/// Entries of one zeroed range that are published at a time.
const ZERO_ENTRIES_AT_ONCE: usize = 256;

/// One thread's reader and writer of a [`Pair`].
#[derive(Debug)]
pub struct PairWorker {
    pair: Arc<Pair>,
    seen: Arc<AtomicU64>,
    found: Vec<Stretch>,
    segments: Vec<SegmentMapping>,
}

impl Pair {
    /// A worker for the calling thread.
    #[must_use]
    pub fn worker(self: &Arc<Self>) -> PairWorker {
        let seen = Arc::new(AtomicU64::new(IDLE));
        write(&self.state).readers.push(Arc::clone(&seen));
        PairWorker { pair: Arc::clone(self), seen, found: Vec::new(), segments: Vec::new() }
    }

    /// Makes `segments` what is read, in order, and notes them in the journal. Blocks on a flush
    /// when the journal is full. On an error none or a front of them was published; how many.
    fn publish(&self, segments: &[SegmentMapping]) -> Result<(), (usize, Error)> {
        let mut done = 0;
        while let Some(rest) = segments.get(done..).filter(|rest| !rest.is_empty()) {
            let mut state = write(&self.state);
            self.check_writable().map_err(|error| (done, error))?;
            let room = to_usize(self.journal.room()).unwrap_or(usize::MAX);
            if room == 0 {
                drop(state);
                self.flush().map_err(|error| (done, error))?;
                continue;
            }
            for segment in rest.iter().take(room) {
                let number = self.journal.publish(segment);
                state.apply(segment, number);
                done += 1;
            }
        }
        Ok(())
    }

    /// Takes back the space of `segments`, which nothing points at.
    fn give_back(&self, segments: &[SegmentMapping]) {
        let mut state = write(&self.state);
        for segment in segments.iter().filter(|segment| !segment.zeroed) {
            state.space.give_back(segment.mapped_sector..segment.mapped_end_sector());
        }
    }

    fn full(&self) -> Error {
        let message = format!("{}: the pair is full: its quota is used up", self.name);
        Error::new(ErrorKind::NoSpace, message)
    }
}

impl PairWorker {
    /// The pair.
    #[must_use]
    pub fn pair(&self) -> &Arc<Pair> {
        &self.pair
    }

    /// Fills `dst` (whole sectors) from `start_sector` on; `below` fills what the pair has not.
    /// Blocks on the disk, and on no flush.
    ///
    /// # Errors
    /// `OutOfRange`, `Io`, and what `below` says.
    pub fn read(
        &mut self,
        start_sector: u64,
        dst: &mut [u8],
        below: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let range = self.pair.range_of("read", start_sector, dst.len())?;
        self.found.clear();
        {
            let state = read(&self.pair.state);
            state.map.look_up(range, &mut self.found);
            // Under the lock: whoever frees space from here on sees that we are in this epoch.
            self.seen.store(state.epoch, Ordering::Relaxed);
        }
        let outcome = self.fill(dst, below);
        self.seen.store(IDLE, Ordering::Release);
        outcome
    }

    /// What of `sectors` the pair has not.
    pub fn gaps(&mut self, sectors: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.found.clear();
        read(&self.pair.state).map.look_up(sectors, &mut self.found);
        let gaps = self.found.iter().filter(|stretch| stretch.content.is_none());
        gaps.map(|stretch| stretch.start_sector..stretch.end_sector)
    }

    fn fill(
        &self,
        dst: &mut [u8],
        mut below: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let mut rest = dst;
        for stretch in &self.found {
            let sectors = stretch.end_sector - stretch.start_sector;
            let len = to_usize(sectors.saturating_mul(SECTOR_SIZE)).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_mut(len.min(rest.len()));
            rest = later;
            match stretch.content {
                None => below(stretch.start_sector, now)?,
                Some(Content::Zero) => now.fill(0),
                Some(Content::Data { sector }) => {
                    let at_byte = sector.saturating_mul(SECTOR_SIZE);
                    self.pair.data.read_at(at_byte, now).map_err(|error| {
                        let (bytes, name) = (now.len(), &self.pair.name);
                        Error::io(format!("read {bytes} bytes at byte {at_byte} of {name}"), &error)
                    })?;
                }
            }
        }
        debug_assert!(rest.is_empty(), "stretches cover the request");
        Ok(())
    }

    /// Writes `src` (whole sectors) from `start_sector` on. When it returns, reads see it and a
    /// kill of the process does not undo it; a power cut may, until the next flush.
    ///
    /// # Errors
    /// `NoSpace` when the disk or the quota is full: nothing has changed, and later writes may
    /// work. `OutOfRange`, `Io`.
    pub fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        let range = self.pair.range_of("write", start_sector, src.len())?;
        self.pair.check_writable()?;
        self.reserve(range.clone()).or_else(|full| self.reserve_after_flush(range, full))?;
        if let Err(error) = self.put(src) {
            self.pair.give_back(&self.segments);
            return Err(error);
        }
        self.pair.publish(&self.segments).map_err(|(done, error)| {
            self.pair.give_back(self.segments.get(done..).unwrap_or_default());
            error
        })
    }

    /// As [`PairWorker::reserve`] where that found the quota used up: what newer writes cover is
    /// free when those are durable and the reads that began before have ended. Other writers may be
    /// quicker to take it; then there is more that they cover.
    fn reserve_after_flush(&mut self, range: Range<u64>, full: Error) -> Result<()> {
        for _ in 0..UPPER_ROOM_TRIES_MAX {
            let (has_pending, has_resting) = {
                let state = read(&self.pair.state);
                (state.space.has_pending(), state.space.has_resting())
            };
            if has_pending {
                self.pair.flush()?;
            } else if has_resting {
                std::thread::sleep(Duration::from_millis(1));
            }
            // In any case: somebody else may have freed it since.
            match self.reserve(range.clone()) {
                Err(_) if has_pending || has_resting => {}
                outcome => return outcome,
            }
        }
        Err(full)
    }

    /// Finds space for `range`: all of it or none.
    fn reserve(&mut self, range: Range<u64>) -> Result<()> {
        self.segments.clear();
        let mut state = write(&self.pair.state);
        state.settle();
        let mut here = range.start;
        while here < range.end {
            let wanted = (range.end - here).min(EXTENT_SECTORS_MAX);
            let Some(place) = state.space.allocate(wanted) else {
                drop(state);
                self.pair.give_back(&self.segments);
                return Err(self.pair.full());
            };
            let sectors = place.end - place.start;
            self.segments.push(SegmentMapping {
                start_sector: here,
                sectors,
                mapped_sector: place.start,
                zeroed: false,
                tag: 0,
            });
            here += sectors;
        }
        Ok(())
    }

    /// Writes `src` to the space that was found.
    fn put(&self, src: &[u8]) -> Result<()> {
        let mut rest = src;
        for segment in &self.segments {
            let len = to_usize(segment.sectors * SECTOR_SIZE).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(len.min(rest.len()));
            rest = later;
            let at_byte = segment.mapped_sector.saturating_mul(SECTOR_SIZE);
            self.pair.data.write_at(at_byte, now).map_err(|error| {
                let (bytes, name) = (now.len(), &self.pair.name);
                Error::io(format!("write {bytes} bytes at byte {at_byte} of {name}"), &error)
            })?;
        }
        debug_assert!(rest.is_empty(), "the space covers the request");
        Ok(())
    }

    /// Makes `sectors` read as zeros, whatever lies below. Takes no space; a discard is the same.
    ///
    /// # Errors
    /// `OutOfRange`, `Io`.
    pub fn zero(&mut self, sectors: Range<u64>) -> Result<()> {
        if sectors.start > sectors.end || sectors.end > self.pair.virtual_sectors() {
            let message = format!("zero sectors {sectors:?}: not on the disk");
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        self.pair.check_writable()?;
        let mut here = sectors.start;
        while here < sectors.end {
            self.segments.clear();
            while here < sectors.end && self.segments.len() < ZERO_ENTRIES_AT_ONCE {
                let length = (sectors.end - here).min(SegmentMapping::SECTORS_MAX);
                self.segments.push(SegmentMapping {
                    start_sector: here,
                    sectors: length,
                    // Means nothing, but the reference wants it inside the file.
                    mapped_sector: DATA_START_SECTOR,
                    zeroed: true,
                    tag: 0,
                });
                here += length;
            }
            self.pair.publish(&self.segments).map_err(|(_, error)| error)?;
        }
        Ok(())
    }

    /// As [`Pair::flush`].
    ///
    /// # Errors
    /// As there.
    pub fn flush(&mut self) -> Result<()> {
        self.pair.flush()
    }
}

impl Drop for PairWorker {
    fn drop(&mut self) {
        write(&self.pair.state).readers.retain(|seen| !Arc::ptr_eq(seen, &self.seen));
    }
}

const _: () = assert!(to_u64(ZERO_ENTRIES_AT_ONCE) < SegmentMapping::SECTORS_MAX);
