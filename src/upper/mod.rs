//! The writable top of an image: a pair of files that takes writes and never loses a flushed one.
//!
//! ```text
//!   write --> space --> data file --> map + journal                (acknowledged)
//!   flush --> sync data file --> batch of entries to the index file, synced --> journal cleared
//!   open  --> log of the index file, the journal of this boot on top --> map, free space
//! ```
//!
//! Data is never put over data that something still points at, so a write that a power cut stops
//! has not happened; only a durable batch of index entries makes it last. The entries of writes
//! since are in the journal, in memory that outlives the process: killed, it loses nothing. A
//! [`Pair`] is shared by all threads, each with a [`PairWorker`]; no lock is held across I/O that a
//! read or a write waits for. `format-spec/upper.md` tells the files and the rules.
//!
//! Beside it stands the other form that overlaybd has, [`SparseUpper`], which writes in place.
//! [`compact()`] and [`resize()`] work on a pair that nobody has open; `create` makes one.
//!
//! `image` composes it with the layers below. Nothing here knows those, a front end or a config.

mod claims;
mod compact;
mod create;
mod flush;
mod journal;
mod log;
mod open;
mod overlay;
mod resize;
mod room;
mod seal;
mod space;
mod sparse;
mod sparse_worker;
mod storage;
mod worker;

pub use compact::compact;
pub use create::{
    Form, NewPair, check_vacant, create, create_as, create_filled, create_fresh, is_of_pair,
    is_vacant, new_uuid, remove_unused,
};
pub use journal::{Journal, JournalKey, boot_id};
pub use open::{
    INTENT_SUFFIX, PairFiles, PairOptions, PairPaths, Parts, RUN_DIR_DEFAULT, RUN_DIR_VARIABLE,
    is_sealed_sparse, journal_folder, open_data, remove,
};
pub use overlay::overlay_journal;
pub use resize::resize;
pub use seal::{Seal, seal};
pub use sparse::{SparseUpper, is_sparse};
pub use sparse_worker::SparseWorker;
pub use storage::{FileSystemRoom, Folder, Storage};
pub use worker::PairWorker;

use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{SegmentMapping, WritablePair};
use crate::map::{Content, UpperMap};
use crate::units::{SECTOR_SIZE, bytes_to_sectors, to_u64};
use flush::Turns;
use log::Log;
use room::Room;
use space::Space;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, RwLock};

/// An open pair, for any number of threads.
#[derive(Debug)]
pub struct Pair {
    name: String,
    head: WritablePair,
    /// Only ever grows: a request that was checked stays right.
    virtual_sectors: AtomicU64,
    data: Box<dyn Storage>,
    journal: Journal,
    state: RwLock<State>,
    log: Mutex<Log>,
    turns: Mutex<Turns>,
    turned: Condvar,
    /// Why nothing can be written any more.
    failed: OnceLock<String>,
    closed: AtomicBool,
    quota_bytes: Option<u64>,
    room: Mutex<Room>,
}

/// What a write changes and a read looks at: never locked across I/O.
#[derive(Debug)]
struct State {
    map: UpperMap,
    space: Space,
    /// Grows when covered space may become free; a read notes the one that it began in.
    epoch: u64,
    readers: Vec<Arc<AtomicU64>>,
    freed: Vec<Range<u64>>,
}

/// What a reader notes that is in no read.
const IDLE: u64 = u64::MAX;

impl State {
    /// Puts `segment`, which is entry `number` of the journal, over what was there.
    fn apply(&mut self, segment: &SegmentMapping, number: u64) {
        let Self { map, space, freed, epoch, .. } = self;
        freed.clear();
        map.insert(segment.start_sector..segment.end_sector(), content_of(segment), freed);
        let mut rests = false;
        for range in freed.drain(..) {
            rests |= space.covered(number, range, *epoch);
        }
        *epoch += u64::from(rests);
    }

    /// Frees what no read can look at any more.
    fn settle(&mut self) {
        if self.space.has_resting() {
            let seen = self.readers.iter().map(|reader| reader.load(Ordering::Acquire));
            let oldest = seen.min().unwrap_or(IDLE);
            self.space.settle(oldest);
        }
    }
}

fn content_of(segment: &SegmentMapping) -> Content {
    if segment.zeroed { Content::Zero } else { Content::Data { sector: segment.mapped_sector } }
}

/// How much a pair holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of the data file that are seen.
    pub live_bytes: u64,
    /// Bytes of the data file.
    pub file_bytes: u64,
    /// Bytes of the data file that nothing points at, those that can be written again included.
    pub dead_bytes: u64,
    /// Bytes of the data file that can be written again now.
    pub free_bytes: u64,
    /// Bytes of the index file.
    pub index_bytes: u64,
    /// Writes that no flush has made durable yet, in index entries.
    pub unflushed_entries: u64,
    /// Most bytes of the data file, if that is bounded.
    pub quota_bytes: Option<u64>,
}

/// What a compaction did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// What the pair held before.
    pub before: Usage,
    /// What it holds now.
    pub after: Usage,
    /// Bytes of the data file that were copied.
    pub moved_bytes: u64,
}

impl Pair {
    /// Size of the virtual disk in sectors.
    #[must_use]
    pub fn virtual_sectors(&self) -> u64 {
        self.virtual_sectors.load(Ordering::Acquire)
    }

    /// What its headers said when it was opened.
    #[must_use]
    pub fn head(&self) -> &WritablePair {
        &self.head
    }

    /// What the pair holds now.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let held = self.journal.held();
        // Not from the log, which a flush holds while it waits for the disk.
        let index_bytes = self.journal.base();
        let state = read(&self.state);
        let bytes = |sectors: u64| sectors.saturating_mul(SECTOR_SIZE);
        let file_sectors = state.space.end_sector();
        let start = crate::format::lsmt::DATA_START_SECTOR;
        let dead = file_sectors.saturating_sub(start).saturating_sub(state.map.data_sectors());
        Usage {
            live_bytes: bytes(state.map.data_sectors()),
            file_bytes: bytes(file_sectors),
            dead_bytes: bytes(dead),
            free_bytes: bytes(state.space.free_sectors()),
            index_bytes,
            unflushed_entries: held.end.saturating_sub(held.start),
            quota_bytes: self.quota_bytes,
        }
    }

    /// The data file, with the lock that keeps other writers out, for a process that takes over.
    #[must_use]
    pub fn data_file(&self) -> Option<&std::fs::File> {
        self.data.as_file()
    }

    /// Why nothing can be written any more, if so.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// The sectors of `bytes` from `start_sector` on.
    fn range_of(&self, what: &str, start_sector: u64, bytes: usize) -> Result<Range<u64>> {
        range_of(what, start_sector, bytes, self.virtual_sectors())
    }

    fn check_not_failed(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |why| Err(Error::new(ErrorKind::Io, why.clone())))
    }

    fn check_writable(&self) -> Result<()> {
        self.check_not_failed()?;
        if self.closed.load(Ordering::Acquire) {
            let message = format!("{}: the pair is closed", self.name);
            return Err(Error::new(ErrorKind::ReadOnly, message));
        }
        Ok(())
    }

    /// Nothing is written from now on: `error` leaves unknown what of it would last.
    fn fail(&self, error: Error) -> Error {
        let why = format!("{}: writing ended when an earlier write failed: {error:#}", self.name);
        // The first failure is the one that matters.
        let _ = self.failed.set(why);
        error
    }
}

/// The sectors of `bytes` from `start_sector` on, on a disk of so many.
fn range_of(what: &str, start_sector: u64, bytes: usize, disk_sectors: u64) -> Result<Range<u64>> {
    let end = bytes_to_sectors(to_u64(bytes))
        .and_then(|sectors| start_sector.checked_add(sectors))
        .filter(|end| *end <= disk_sectors);
    end.map(|end| start_sector..end).ok_or_else(|| {
        let message = format!("{what} {bytes} bytes at sector {start_sector}: not on the disk");
        Error::new(ErrorKind::OutOfRange, message)
    })
}

/// A lock whose holder cannot leave half a change behind: each is one assignment or an insertion
/// that does not panic between its steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn read<T>(state: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn write<T>(state: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
