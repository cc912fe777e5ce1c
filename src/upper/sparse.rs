//! The sparse form: the data file is the disk behind a header, a hole is a sector never written.
//!
//! ```text
//!   write  --> whole blocks in place; what a block lacks comes from below first (copy-up)
//!   zero   --> zeros, written; a hole only where nothing lies below
//!   flush  --> sync the data file
//!   open   --> the file system's extents are the map
//! ```
//!
//! Which sectors the disk has is for the file system alone to tell, and it tells by its blocks. So
//! a write into a hole fills the whole block, and a hole is never made over layers: what a discard
//! left would show them again after the next open. Writes go in place, so a power cut may leave an
//! unflushed sector as old or as new only as far as the file system orders data and extents and the
//! disk writes whole sectors; `format-spec/upper.md` says where that is so. A kill loses nothing:
//! what was written is in the page cache, the extents included.
//!
//! A pair in append form has none of these limits. This one exists for tools that want a plain
//! image behind the header.

use super::claims::Claims;
use super::journal::{Journal, JournalKey, boot_id};
use super::open::{
    check_distinct, check_not_sealed, check_wishes, lock_data, prepare_folder, read_header,
    too_short,
};
use super::room::{Room, watch};
use super::storage::Storage;
use super::{PairOptions, PairPaths, Usage, read, write};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::lsmt::{
    DATA_START_SECTOR, HEADER_BYTES, UuidText, WritablePair, check_writable_pair,
    segments_of_sparse_file,
};
use crate::limits::SPARSE_BLOCK_BYTES;
use crate::map::{Content, UpperMap};
use crate::source::{FileIdentity, data_extents_of, open_regular, open_regular_for_writing};
use crate::units::{SECTOR_SIZE, sectors_to_bytes, whole_sectors};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{FsType, fstatfs};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

/// Sectors of one block.
pub(super) const BLOCK_SECTORS: u64 = SPARSE_BLOCK_BYTES / SECTOR_SIZE;

/// ZFS stores a block of zeros as a hole.
const ZFS: FsType = FsType(0x2fc1_2fc1);

/// An open upper in sparse form, for any number of threads.
#[derive(Debug)]
pub struct SparseUpper {
    pub(super) name: String,
    pub(super) data: File,
    pub(super) virtual_sectors: u64,
    /// Whether holes show layers below; otherwise they are zeros.
    pub(super) over_lowers: bool,
    pub(super) claims: Claims,
    /// Which sectors the file has: each at its own place, or zeros that were made a hole.
    pub(super) map: RwLock<UpperMap>,
    head: WritablePair,
    quota_bytes: Option<u64>,
    room: Mutex<Room>,
    /// Holds no entries: it names the owner, and remembers a failed sync for this boot.
    journal: Journal,
    failed: OnceLock<String>,
    closed: AtomicBool,
}

/// Whether the data file of a pair is one in sparse form.
///
/// # Errors
/// `InvalidFormat` for what is no LSMT file, `Corrupt`, `Io`.
pub fn is_sparse(data: &File) -> Result<bool> {
    let header = read_header(data, 0)?.ok_or_else(|| too_short("data"))?;
    Ok(header.flags.is_sparse_writable() && !header.flags.is_sealed())
}

impl SparseUpper {
    /// Opens an upper in sparse form for writing. Blocks on the disk.
    ///
    /// # Errors
    /// As [`Pair::open`](super::Pair::open); `Unsupported` over layers on a file system whose
    /// blocks are larger than 4096 bytes.
    pub fn open(paths: &PairPaths, options: &PairOptions) -> Result<Arc<Self>> {
        Self::open_with(open_regular_for_writing(&paths.data)?, paths, options)
    }

    /// As [`SparseUpper::open`] with a data file that is open already, read and write.
    ///
    /// # Errors
    /// As there.
    pub fn open_with(data: File, paths: &PairPaths, options: &PairOptions) -> Result<Arc<Self>> {
        let name = paths.data.display().to_string();
        let identity = |file: &File| {
            FileIdentity::of(file).map_err(|error| Error::io(format!("stat {name}"), &error))
        };
        let file = identity(&data)?;
        // Empty, but the reference wants it to be there.
        let index_file = identity(&open_regular(&paths.index)?)?;
        check_distinct(paths, file, index_file, &options.lowers)?;
        let journal_path = Journal::path_in(&options.journal_folder, file);
        lock_data(&data, &name, &journal_path)?;
        let head = read_head(&data, options).context(|| format!("open the upper {name}"))?;
        let over_lowers = options.lower_bytes > 0;
        if over_lowers {
            check_blocks(&data).context(|| format!("open the upper {name}"))?;
        }
        let (journal, failure) = open_journal(&options.journal_folder, file, head.uuid, &name)?;
        let failed = failure.map_or_else(OnceLock::new, OnceLock::from);
        let stated = head.virtual_size_bytes;
        let virtual_bytes = if stated == 0 { options.lower_bytes } else { stated };
        Self {
            map: RwLock::new(map_of(&data, virtual_bytes, &name)?),
            name,
            data,
            virtual_sectors: whole_sectors(virtual_bytes),
            over_lowers,
            claims: Claims::default(),
            head,
            quota_bytes: options.quota_bytes,
            room: Mutex::default(),
            journal,
            failed,
            closed: false.into(),
        }
        .lengthened(virtual_bytes)
        .map(Arc::new)
    }

    /// A file that ends early reads as holes to its end.
    fn lengthened(self, virtual_bytes: u64) -> Result<Self> {
        let told = |error: std::io::Error| Error::io(format!("size {}", self.name), &error);
        let wanted = HEADER_BYTES.saturating_add(virtual_bytes);
        if self.data.len_bytes().map_err(told)? < wanted {
            Storage::set_len(&self.data, wanted).map_err(told)?;
        }
        Ok(self)
    }

    /// Size of the virtual disk in sectors.
    #[must_use]
    pub fn virtual_sectors(&self) -> u64 {
        self.virtual_sectors
    }

    /// What its header says.
    #[must_use]
    pub fn head(&self) -> &WritablePair {
        &self.head
    }

    /// The data file, with the lock that keeps other writers out.
    #[must_use]
    pub fn data_file(&self) -> &File {
        &self.data
    }

    /// Whether discarded space can be given back: not where layers below would show.
    #[must_use]
    pub fn can_discard(&self) -> bool {
        !self.over_lowers
    }

    /// Why nothing can be written any more, if so.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// What there is to say about the room that is left, as of the last flush.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        super::lock(&self.room).warning()
    }

    /// What it holds now.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let live_bytes = read(&self.map).data_sectors().saturating_mul(SECTOR_SIZE);
        Usage {
            live_bytes,
            file_bytes: HEADER_BYTES.saturating_add(live_bytes),
            dead_bytes: 0,
            free_bytes: 0,
            index_bytes: 0,
            unflushed_entries: 0,
            quota_bytes: self.quota_bytes,
        }
    }

    /// Makes every write that was acknowledged before the call durable.
    ///
    /// # Errors
    /// When the sync fails, now or ever before: nothing is written any more.
    pub fn flush(&self) -> Result<()> {
        self.check_not_failed()?;
        self.data.sync_data().map_err(|error| {
            self.journal.set_failed();
            let error = Error::io(format!("sync {}", self.name), &error);
            let why = format!("{}: writing ended when a sync failed: {error:#}", self.name);
            let _ = self.failed.set(why);
            error
        })?;
        watch(&self.room, &self.data, &self.name, &self.usage());
        Ok(())
    }

    /// Flushes and lets go of the file. Later writes fail, reads go on.
    ///
    /// # Errors
    /// As [`SparseUpper::flush`].
    pub fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return self.check_not_failed();
        }
        // Whoever writes now does so before the flush or is refused.
        drop(self.claims.take(0..u64::MAX));
        self.flush()?;
        if let Some(path) = self.journal.path() {
            let _ = std::fs::remove_file(path);
        }
        let _ = self.data.unlock();
        Ok(())
    }

    fn check_not_failed(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |why| Err(Error::new(ErrorKind::Io, why.clone())))
    }

    pub(super) fn check_writable(&self) -> Result<()> {
        self.check_not_failed()?;
        if self.closed.load(Ordering::Acquire) {
            let message = format!("{}: the upper is closed", self.name);
            return Err(Error::new(ErrorKind::ReadOnly, message));
        }
        Ok(())
    }

    /// Refuses to take `new_sectors` more than the quota has room for.
    pub(super) fn check_quota(&self, new_sectors: u64) -> Result<()> {
        let Some(quota) = self.quota_bytes else { return Ok(()) };
        let wanted = new_sectors.saturating_mul(SECTOR_SIZE);
        if new_sectors == 0 || self.usage().file_bytes.saturating_add(wanted) <= quota {
            return Ok(());
        }
        let message = format!("{}: the upper is full: its quota is used up", self.name);
        Err(Error::new(ErrorKind::NoSpace, message))
    }

    /// The file has `range` now.
    pub(super) fn note(&self, range: Range<u64>, freed: &mut Vec<Range<u64>>) {
        if range.start < range.end {
            let content = Content::Data { sector: DATA_START_SECTOR + range.start };
            write(&self.map).insert(range, content, freed);
            freed.clear();
        }
    }

    /// Notes what the file has in `range` after a write that failed half-way.
    pub(super) fn look_again(&self, range: &Range<u64>, freed: &mut Vec<Range<u64>>) {
        let bytes = byte_of(range.start)..byte_of(range.end);
        for extent in data_extents_of(&self.data, &self.name, bytes).unwrap_or_default() {
            let sectors = |byte: u64| byte.saturating_sub(HEADER_BYTES) / SECTOR_SIZE;
            let start = sectors(extent.start).max(range.start);
            self.note(start..sectors(extent.end).min(range.end), freed);
        }
    }

    /// Makes `range` a hole, which shows zeros; whether the file system can.
    pub(super) fn punch(&self, range: Range<u64>, freed: &mut Vec<Range<u64>>) -> Result<bool> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let number = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let (start, end) = (byte_of(range.start), byte_of(range.end));
        match fallocate(&self.data, mode, number(start), number(end - start)) {
            Ok(()) => {
                write(&self.map).insert(range, Content::Zero, freed);
                freed.clear();
                Ok(true)
            }
            Err(nix::errno::Errno::EOPNOTSUPP) => Ok(false),
            Err(errno) => {
                let action = format!("punch bytes {start} to {end} of {}", self.name);
                Err(Error::io(action, &errno.into()))
            }
        }
    }
}

/// Where a sector of the disk lies in the file.
pub(super) fn byte_of(sector: u64) -> u64 {
    HEADER_BYTES.saturating_add(sectors_to_bytes(sector).unwrap_or(u64::MAX))
}

fn read_head(data: &File, options: &PairOptions) -> Result<WritablePair> {
    let header = read_header(data, 0)?.ok_or_else(|| too_short("data"))?;
    let head = check_writable_pair(&header, None)?;
    check_not_sealed(data, &head)?;
    check_wishes(&head, options)?;
    Ok(head)
}

/// The journal in `folder` of the upper with this data file, which is ours now; and why nothing may
/// be written any more, if so.
pub(super) fn open_journal(
    folder: &Path,
    file: FileIdentity,
    uuid: UuidText,
    name: &str,
) -> Result<(Journal, Option<String>)> {
    prepare_folder(folder)?;
    let journal = Journal::open(&Journal::path_in(folder, file))?;
    let key = JournalKey { boot_id: boot_id()?, uuid, file };
    let is_ours = journal.belongs_to(&key)?;
    if !is_ours {
        journal.begin(&key, 0, 0);
    }
    journal.set_owner(std::process::id());
    let has_failed = is_ours && journal.has_failed();
    let why = || format!("{name}: a sync of it failed since this boot; it can be read");
    Ok((journal, has_failed.then(why)))
}

/// What the file system says that the file has.
fn map_of(data: &File, virtual_bytes: u64, name: &str) -> Result<UpperMap> {
    let told = |error: std::io::Error| Error::io(format!("stat {name}"), &error);
    let extents = data_extents_of(data, name, HEADER_BYTES..data.len_bytes().map_err(told)?)?;
    let mut map = UpperMap::new();
    let mut freed = Vec::new();
    for segment in segments_of_sparse_file(&extents, virtual_bytes)? {
        let content = Content::Data { sector: segment.mapped_sector };
        map.insert(segment.start_sector..segment.end_sector(), content, &mut freed);
        freed.clear();
    }
    Ok(map)
}

/// Refuses a file system that would take more than a block of ours for written, or less.
///
/// # Errors
/// `Unsupported`, `Io`.
pub(super) fn check_blocks(data: &File) -> Result<()> {
    let unsupported = |message: String| Err(Error::new(ErrorKind::Unsupported, message));
    let told = |error: &std::io::Error| Error::io("ask for the file system's blocks", error);
    let block_bytes = data.metadata().map_err(|error| told(&error))?.blksize();
    if block_bytes > SPARSE_BLOCK_BYTES {
        return unsupported(format!(
            "the file system gives space in {block_bytes} bytes, expected at most \
             {SPARSE_BLOCK_BYTES}: a write would hide more of the layers below than it covers; use \
             an upper in append form"
        ));
    }
    let found = fstatfs(data).map_err(|errno| told(&errno.into()))?;
    if found.filesystem_type() == ZFS {
        return unsupported("ZFS makes holes of written zeros: use an upper in append form".into());
    }
    Ok(())
}

const _: () = assert!(SPARSE_BLOCK_BYTES == HEADER_BYTES);
