//! A persistent cache of blobs that lie elsewhere, shared by all processes of a host.
//!
//! ```text
//!   read --> states in memory --all here--> copy from the mapped data file          (a hit)
//!              | missing
//!              v
//!            flight (one thread of this process) --> claim (one process of this host)
//!              --> records on disk, checked --> fetch --> data, record --> state
//!   background: fetch ahead, promote what is complete, keep the quota, let go of what was evicted
//! ```
//!
//! What is stored is believed for its checksum only. Each extent of a blob has a record with a
//! 64-bit checksum in a sidecar, and a process looks at an extent's bytes through its own open file
//! and compares before it serves them for the first time. So nothing depends on the order of
//! writeback and nothing is ever synced for a read: after a kill or a power cut an extent is right
//! or it is fetched again. This trusts an open file, not a boot: it also finds what was damaged at
//! rest, or lost by a disk that went away and came back.
//!
//! Nothing that a reader may have mapped is cut, punched or moved; files are only unlinked. A disk
//! that is full or fails costs the cache's help, never a read: reads go past it (`gate`). No lock
//! is held across I/O within the process; between processes a claim is held while its extents are
//! fetched, and nobody waits for one for ever (`fill`).
//!
//! [`Cache::blob`] gives what `image` reads as a [`crate::source::Source::Remote`]; it knows how to
//! fetch by [`Fetch`] alone and nothing of registries. [`Maintenance`] is for people: list, check,
//! remove. [`TouchLogs`] are small files beside the blobs. `format-spec/cache.md` tells all files.

mod blob;
mod buffers;
mod check;
mod claim;
mod commit;
mod digest;
mod discard;
mod doubt;
mod evict;
mod extent_set;
mod faults;
mod fill;
mod flight;
#[cfg(test)]
mod flight_tests;
mod gate;
mod line;
mod listing;
mod logs;
mod pair;
mod pool;
mod promote;
mod pull;
mod readahead;
mod sidecar;
mod states;
mod stats;
mod store;
mod sync;
mod upkeep;

pub use blob::CachedBlob;
pub use check::Checked;
pub use commit::Commit;
pub use digest::BlobDigest;
pub use evict::Trimmed;
pub use extent_set::{Extents, next_missing};
pub use faults::{DiskFaults, DiskStep};
pub use listing::{Entry, Maintenance, Usage};
pub use logs::{CheckedLogs, TouchLogEntry, TouchLogs};
pub use promote::Promotion;
pub use readahead::{Ahead, Readahead};
pub use sidecar::{HEADER_BYTES, HEADER_USED_BYTES, Header, RECORD_BYTES, Record};
pub use stats::Stats;

use crate::error::{Error, ErrorKind, Result};
use crate::limits::{
    CACHE_EXTENT_BYTES, CACHE_PAUSE_MS, CACHE_QUOTA_BYTES_DEFAULT, CACHE_READ_MS_DEFAULT,
    CACHE_THREADS_MAX, CACHE_TICK_MS,
};
use crate::source::Fetch;
use blob::{Residence, Slot};
use buffers::Buffers;
use flight::lock;
use gate::Gate;
use pool::Pool;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use store::Folder;

/// Where the cache is unless told otherwise. Never the reference's folder, whose daemon cuts files.
pub const FOLDER_DEFAULT: &str = "/var/lib/obd-ublk/cache/v1";

/// How a cache is used. All processes that share a folder should say the same.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where it is.
    pub folder: PathBuf,
    /// Bytes that it may take of its disk.
    pub quota_bytes: u64,
    /// Bytes of one extent, a power of two from 4 KiB to 1 MiB. Blobs that are here in another
    /// size are begun anew when nobody has them open.
    pub extent_bytes: u64,
    /// How long one read may take.
    pub deadline: Duration,
    /// Threads that fetch ahead and look after the cache. With 0 nothing is fetched ahead, promoted
    /// or let go of by itself, and the quota is kept by those who read.
    pub threads: usize,
    /// How long storing is not tried again after the disk failed; 5 s at most.
    pub pause: Duration,
    /// How often the background looks after open blobs.
    pub tick: Duration,
    /// Where a test makes the disk fail.
    pub faults: Option<Arc<dyn DiskFaults>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            folder: FOLDER_DEFAULT.into(),
            quota_bytes: CACHE_QUOTA_BYTES_DEFAULT,
            extent_bytes: CACHE_EXTENT_BYTES,
            deadline: Duration::from_millis(CACHE_READ_MS_DEFAULT),
            threads: CACHE_THREADS_MAX,
            pause: Duration::from_millis(CACHE_PAUSE_MS),
            tick: Duration::from_millis(CACHE_TICK_MS),
            faults: None,
        }
    }
}

/// A cache, in one process.
#[derive(Clone, Debug)]
pub struct Cache {
    shared: Arc<Shared>,
}

/// What all blobs of a process share.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    /// None when it cannot be used at all.
    folder: Option<Folder>,
    /// Why not, for who needs it.
    why_no_folder: (ErrorKind, String),
    gate: Gate,
    pool: Pool,
    buffers: Arc<Buffers>,
    /// Reads that wait for bytes now.
    waiting: AtomicUsize,
    slots: Arc<Mutex<Slots>>,
}

type Slots = HashMap<BlobDigest, Weak<Slot>>;

impl Cache {
    /// Opens the cache, whose folder is made where it is not there.
    ///
    /// # Errors
    /// Why the folder cannot be used.
    pub fn open(settings: Settings) -> Result<Self> {
        let folder = Folder::create(&settings.folder, settings.faults.clone())?;
        Ok(Self::with(settings, Ok(folder)))
    }

    /// As [`Cache::open`]; where that fails, reads go past the cache.
    #[must_use]
    pub fn open_or_bypass(settings: Settings) -> Self {
        let folder = Folder::create(&settings.folder, settings.faults.clone());
        if let Err(error) = &folder {
            tracing::warn!(error = format!("{error:#}"), "no cache: all reads are fetched");
        }
        Self::with(settings, folder)
    }

    fn with(settings: Settings, folder: Result<Folder>) -> Self {
        let slots: Arc<Mutex<Slots>> = Arc::default();
        let buffers: Arc<Buffers> = Arc::default();
        let looked_after = (Arc::clone(&slots), Arc::clone(&buffers));
        let pool = Pool::new(settings.threads, settings.tick, move || {
            let (slots, buffers) = &looked_after;
            for slot in live(slots) {
                slot.tick();
            }
            buffers.tick();
        });
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let gate = Gate::new(settings.quota_bytes, ms(settings.pause), ms(settings.tick));
        let waiting = AtomicUsize::new(0);
        let (folder, why_no_folder) = match folder {
            Ok(folder) => (Some(folder), (ErrorKind::Io, String::new())),
            Err(error) => (None, (error.kind(), format!("{error:#}"))),
        };
        let shared =
            Shared { settings, folder, why_no_folder, gate, pool, buffers, waiting, slots };
        Self { shared: Arc::new(shared) }
    }

    /// A blob, read through the cache. Blocks for some system calls, 2 s at most where other
    /// processes are busy in the folder; a folder that cannot be used is no error.
    ///
    /// # Errors
    /// `Unsupported` for an extent size that cannot be, or a blob too large for it.
    pub fn blob(&self, digest: &BlobDigest, fetch: Arc<dyn Fetch>) -> Result<CachedBlob> {
        let extents = Extents::new(fetch.bytes(), self.shared.settings.extent_bytes)?;
        self.shared.pool.start();
        let known = |slots: &Slots| slots.get(digest).and_then(Weak::upgrade);
        let found = known(&lock(&self.shared.slots)).filter(|slot| slot.extents == extents);
        if let Some(slot) = found {
            return Ok(CachedBlob::new(slot, fetch));
        }
        // Opened without the lock. Two threads may do so at a time; the later one's goes away.
        let opened = Arc::new(Slot::new(*digest, extents, Arc::clone(&self.shared)));
        let mut slots = lock(&self.shared.slots);
        slots.retain(|_, slot| slot.strong_count() > 0);
        let slot = match known(&slots).filter(|slot| slot.extents == extents) {
            Some(slot) => slot,
            None => {
                slots.insert(*digest, Arc::downgrade(&opened));
                Arc::clone(&opened)
            }
        };
        drop(slots);
        Ok(CachedBlob::new(slot, fetch))
    }

    /// How long a blob is, as far as what is kept of it tells; nobody is asked. Blocks for a few
    /// system calls. A plain file that was cut since it was checked tells another length than the
    /// blob's: to be asked for elsewhere when the content turns out wrong.
    #[must_use]
    pub fn known_bytes(&self, digest: &BlobDigest) -> Option<u64> {
        self.shared.folder.as_ref().and_then(|folder| folder.known_bytes(digest))
    }

    /// The counters of all blobs that are open in this process, together.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut sum = Stats::default();
        for slot in live(&self.shared.slots) {
            sum.add(&slot.counters.read());
        }
        sum
    }

    /// The list, check and removal of what is in the folder.
    ///
    /// # Errors
    /// As [`Cache::open`].
    pub fn maintenance(&self) -> Result<Maintenance> {
        Maintenance::open(&self.shared.settings)
    }
}

/// The slots that somebody has open.
fn live(slots: &Mutex<Slots>) -> Vec<Arc<Slot>> {
    lock(slots).values().filter_map(Weak::upgrade).collect()
}

impl Shared {
    /// Opens the files of a blob.
    ///
    /// # Errors
    /// Why it has to be read past the cache.
    fn open(self: &Arc<Self>, digest: &BlobDigest, extents: Extents) -> Result<Residence> {
        let Some(folder) = &self.folder else {
            let (kind, why) = &self.why_no_folder;
            return Err(Error::new(*kind, why));
        };
        let opened = folder.open(digest, extents).or_else(|error| {
            if error.kind() != ErrorKind::NotFound {
                return Err(error);
            }
            // Somebody removed the folder.
            folder.make()?;
            folder.open(digest, extents)
        });
        opened.map(Into::into).inspect_err(|error| {
            // It may be our own unused blobs that fill the disk. The next tick tries again.
            if error.kind() == ErrorKind::NoSpace && self.gate.close_if_open() {
                self.trim_later(true);
            }
        })
    }

    /// Keeps the quota, in the background; with `make_room` it is the disk that is full.
    fn trim_later(self: &Arc<Self>, make_room: bool) {
        let weak = Arc::downgrade(self);
        let trim = move || {
            if let Some(shared) = weak.upgrade() {
                shared.trim(make_room);
            }
        };
        if !self.pool.push(Box::new(trim)) {
            // Too busy, or no threads: the quota does not wait for those.
            self.trim(make_room);
        }
    }

    fn trim(&self, make_room: bool) {
        let Some(folder) = &self.folder else { return };
        let quota_bytes = self.settings.quota_bytes;
        match evict::keep_quota(folder, quota_bytes, make_room) {
            Ok(trimmed) => self.gate.set_over_quota(trimmed.bytes > quota_bytes),
            Err(error) => {
                // Nothing is stored while over the quota: somebody has to look again.
                self.gate.put_off_recheck();
                let error = format!("{error:#}");
                tracing::warn!(error, "the cache's quota cannot be kept");
            }
        }
    }
}
