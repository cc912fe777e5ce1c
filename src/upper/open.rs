//! Opening a pair: everything is checked before anything is written.

use super::journal::{Journal, JournalKey, boot_id};
use super::log::{self, Log};
use super::overlay::entries_of;
use super::space::Space;
use super::storage::{Folder, IndexFolder, Storage};
use super::{Pair, State, content_of};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::lsmt::{
    self, DATA_START_SECTOR, HEADER_BYTES, Header, LogScan, UuidText, WritablePair,
    check_writable_pair,
};
use crate::limits::{LAYER_SECTORS_MAX, LOG_REWRITE_ENTRIES_MIN};
use crate::map::{Content, UpperMap};
use crate::source::{FileIdentity, open_regular_for_writing};
use crate::units::{SECTOR_SIZE, to_usize, whole_sectors};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, OnceLock, RwLock};
use std::time::Duration;

/// The variable that moves the run folder, for tests and for several instances on one host.
pub const RUN_DIR_VARIABLE: &str = "OBD_UBLK_RUN_DIR";

/// The variable that lets journals lie on a disk: for tests, which have no other place.
const JOURNAL_ANYWHERE_VARIABLE: &str = "OBD_UBLK_TEST_JOURNAL_ANYWHERE";

/// The run folder otherwise: on a tmpfs on every current system.
pub const RUN_DIR_DEFAULT: &str = "/run/obd-ublk";

/// What the name of an index file has at its end while its pair is becoming a layer.
pub const INTENT_SUFFIX: &str = ".snapshot";

/// The folder of this host for journals. It need not exist.
#[must_use]
pub fn journal_folder() -> PathBuf {
    let run = std::env::var_os(RUN_DIR_VARIABLE).filter(|path| !path.is_empty());
    PathBuf::from(run.unwrap_or_else(|| RUN_DIR_DEFAULT.into())).join("upper")
}

/// The two files of a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairPaths {
    /// The data file.
    pub data: PathBuf,
    /// The index file.
    pub index: PathBuf,
}

/// What a pair is opened for.
#[derive(Clone, Debug)]
pub struct PairOptions {
    /// Where its journal lies.
    pub journal_folder: PathBuf,
    /// What the pair must name as its parent, if that matters.
    pub parent_uuid: Option<UuidText>,
    /// The size that its disk must have, if that matters.
    pub virtual_bytes: Option<u64>,
    /// The size of the layers below, for a pair that does not say its own.
    pub lower_bytes: u64,
    /// The files of the layers below, none of which may be written.
    pub lowers: Vec<FileIdentity>,
    /// Most bytes of the data file.
    pub quota_bytes: Option<u64>,
    /// From how many entries on the log may be rewritten.
    pub rewrite_entries_min: u64,
}

impl Default for PairOptions {
    fn default() -> Self {
        Self {
            journal_folder: journal_folder(),
            parent_uuid: None,
            virtual_bytes: None,
            lower_bytes: 0,
            lowers: Vec::new(),
            quota_bytes: None,
            rewrite_entries_min: LOG_REWRITE_ENTRIES_MIN,
        }
    }
}

/// The files of a pair, open for writing and not looked into yet.
#[derive(Debug)]
pub struct PairFiles {
    paths: PairPaths,
    data: File,
    index: File,
    folder: IndexFolder,
}

impl PairFiles {
    /// Opens them.
    ///
    /// # Errors
    /// `NotFound` for half a pair, `InvalidFormat` for what is no file, `Io`.
    pub fn open(paths: &PairPaths) -> Result<Self> {
        Self::with_data(open_data(paths)?, paths)
    }

    fn with_data(data: File, paths: &PairPaths) -> Result<Self> {
        let index = open_regular_for_writing(&paths.index)?;
        let folder = IndexFolder::of(&paths.index, &index)?;
        Ok(Self { paths: paths.clone(), data, index, folder })
    }

    /// What identifies the data file.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn data_identity(&self) -> Result<FileIdentity> {
        let told = |error| Error::io(format!("stat {}", self.paths.data.display()), &error);
        FileIdentity::of(&self.data).map_err(told)
    }
}

/// An open pair in its parts: the real files, or a test's.
#[derive(Debug)]
pub struct Parts {
    /// What to call it in messages.
    pub name: String,
    /// The data file. Its lock is the caller's.
    pub data: Box<dyn Storage>,
    /// The index file.
    pub index: Box<dyn Storage>,
    /// The folder of the index file.
    pub folder: Box<dyn Folder>,
    /// The journal.
    pub journal: Journal,
    /// The identity of the data file.
    pub file: FileIdentity,
    /// The identity of this boot.
    pub boot_id: u128,
}

/// Removes a pair that nobody writes any more, with what its journal in `journals` holds.
///
/// # Errors
/// `Io`; files that are not there are none.
pub fn remove(paths: &PairPaths, journals: &Path) -> Result<()> {
    let journal = File::open(&paths.data).and_then(|data| FileIdentity::of(&data)).ok();
    let journal = journal.map(|file| Journal::path_in(journals, file));
    // The data file last: while it is there, the journal can be found.
    for path in [Some(&paths.index), journal.as_ref(), Some(&paths.data)].into_iter().flatten() {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", path.display()), &error));
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// The data file of a pair, for who must lock it before the pair is opened.
///
/// # Errors
/// As [`Pair::open`] for this file.
pub fn open_data(paths: &PairPaths) -> Result<File> {
    open_regular_for_writing(&paths.data)
}

impl Pair {
    /// Opens a pair for writing. Blocks on the disk.
    ///
    /// # Errors
    /// `NotFound` for half a pair, `Busy` when somebody else writes it, `Unsupported` for a sparse
    /// or a sealed one, `InvalidConfig` for one that does not fit, `Corrupt`; all of them before
    /// anything is written.
    pub fn open(paths: &PairPaths, options: &PairOptions) -> Result<Arc<Self>> {
        Self::open_with(open_data(paths)?, paths, options)
    }

    /// As [`Pair::open`] with a data file that is open already, read and write: that of a server
    /// that died, whose lock the descriptor still holds.
    ///
    /// # Errors
    /// As [`Pair::open`].
    pub fn open_with(data: File, paths: &PairPaths, options: &PairOptions) -> Result<Arc<Self>> {
        Self::open_files(PairFiles::with_data(data, paths)?, options)
    }

    /// As [`Pair::open`] with files that were opened before, by whoever can reach them.
    ///
    /// # Errors
    /// As [`Pair::open`].
    pub fn open_files(files: PairFiles, options: &PairOptions) -> Result<Arc<Self>> {
        let PairFiles { paths, data, index, folder } = files;
        let name = paths.data.display().to_string();
        let identity = |file: &File, path: &Path| {
            FileIdentity::of(file)
                .map_err(|error| Error::io(format!("stat {}", path.display()), &error))
        };
        let file = identity(&data, &paths.data)?;
        let index_file = identity(&index, &paths.index)?;
        check_distinct(&paths, file, index_file, &options.lowers)?;
        let journal_path = Journal::path_in(&options.journal_folder, file);
        lock_data(&data, &name, &journal_path)?;
        folder.check_no_intent()?;
        // Once without a journal, so that nothing is made for a pair that is refused.
        read_heads(&data, &index, options).context(|| format!("open the pair {name}"))?;
        prepare_folder(&options.journal_folder)?;
        let parts = Parts {
            name,
            data: Box::new(data),
            index: Box::new(index),
            folder: Box::new(folder),
            journal: Journal::open(&journal_path)?,
            file,
            boot_id: boot_id()?,
        };
        Self::open_parts(parts, options)
    }

    /// As [`Pair::open`] with everything opened and locked by the caller.
    ///
    /// # Errors
    /// As [`Pair::open`].
    pub fn open_parts(parts: Parts, options: &PairOptions) -> Result<Arc<Self>> {
        let name = parts.name.clone();
        Self::assemble(parts, options).map(Arc::new).context(|| format!("open the pair {name}"))
    }

    fn assemble(parts: Parts, options: &PairOptions) -> Result<Self> {
        let Parts { name, data, index, folder, journal, file, boot_id } = parts;
        let head = read_heads(data.as_ref(), index.as_ref(), options)?;
        let (data_bytes, index_bytes) = (length(data.as_ref())?, length(index.as_ref())?);
        let key = JournalKey { boot_id, uuid: head.uuid, file };
        let resumed = journal.belongs_to(&key)?;
        if resumed {
            journal.check_index_length(index_bytes)?;
        }
        let data_end_sector = whole_sectors(data_bytes);
        let scan = log::scan(index.as_ref(), index_bytes, data_end_sector)?;
        let entries = if resumed { entries_of(&journal, data_end_sector)? } else { Vec::new() };
        let limit_sector = options.quota_bytes.map_or(LAYER_SECTORS_MAX, whole_sectors);
        let space_end = data_bytes.div_ceil(SECTOR_SIZE);
        let mut state = State::replay(&scan, space_end, limit_sector.min(LAYER_SECTORS_MAX));
        state.replay_journal(&entries, &journal);
        let failed = OnceLock::new();
        if resumed && journal.has_failed() {
            let why = format!(
                "{name}: a sync of it failed since this boot, and what was written before may not \
                 be there; it can be read (remove {} to go back to what was flushed before)",
                journal.name()
            );
            let _ = failed.set(why);
        }
        let mut log = Log::resume(index, folder, &scan, options.rewrite_entries_min);
        if !resumed {
            journal.begin(&key, scan.end_byte, index_bytes);
        }
        journal.set_owner(std::process::id());
        if failed.get().is_none() {
            log.mend(scan.owner, index_bytes, &journal)?;
        }
        let bytes = if head.virtual_size_bytes == 0 {
            options.lower_bytes
        } else {
            head.virtual_size_bytes
        };
        Ok(Self {
            name,
            head,
            virtual_sectors: AtomicU64::new(whole_sectors(bytes)),
            data,
            journal,
            state: RwLock::new(state),
            log: Mutex::new(log),
            turns: Mutex::default(),
            turned: Condvar::new(),
            failed,
            closed: false.into(),
            quota_bytes: options.quota_bytes,
            room: Mutex::default(),
        })
    }
}

impl State {
    /// The map of a log, and what it leaves free of a data file that ends at `end_sector`.
    fn replay(scan: &LogScan, end_sector: u64, limit_sector: u64) -> Self {
        let mut map = UpperMap::new();
        let mut freed = Vec::new();
        for segment in &scan.segments {
            map.insert(segment.start_sector..segment.end_sector(), content_of(segment), &mut freed);
            freed.clear();
        }
        let mut used: Vec<Range<u64>> = map.pieces().filter_map(data_range).collect();
        let space = Space::new(&mut used, end_sector, limit_sector);
        Self { map, space, epoch: 0, readers: Vec::new(), freed }
    }

    /// Puts the entries of a journal on top. What they point at is in use, and what they cover is
    /// free only when they are durable. A front of them may be in the log already: put there once
    /// more they cover themselves for a moment, so what is covered is told from the outcome.
    fn replay_journal(&mut self, entries: &[lsmt::SegmentMapping], journal: &Journal) {
        let Some(last) = journal.held().end.checked_sub(1) else { return };
        let mut before: Vec<Range<u64>> = self.map.pieces().filter_map(data_range).collect();
        for segment in entries {
            let range = segment.start_sector..segment.end_sector();
            self.map.insert(range, content_of(segment), &mut self.freed);
            if !segment.zeroed {
                before.push(segment.mapped_sector..segment.mapped_end_sector());
                self.space.occupy(segment.mapped_sector..segment.mapped_end_sector());
            }
        }
        self.freed.clear();
        let mut live: Vec<Range<u64>> = self.map.pieces().filter_map(data_range).collect();
        self.space.covered_but(last, &mut before, &mut live);
    }
}

fn data_range((range, content): (Range<u64>, Content)) -> Option<Range<u64>> {
    let Content::Data { sector } = content else { return None };
    Some(sector..sector + (range.end - range.start))
}

fn length(file: &dyn Storage) -> Result<u64> {
    file.len_bytes().map_err(|error| Error::io("ask for the length of a file", &error))
}

/// The two files are two, and none of the layers below.
pub(super) fn check_distinct(
    paths: &PairPaths,
    data: FileIdentity,
    index: FileIdentity,
    lowers: &[FileIdentity],
) -> Result<()> {
    let refused = |what: String| Err(Error::new(ErrorKind::InvalidConfig, what));
    if data == index {
        return refused(format!(
            "{} and {} are one file, expected the data and the index of a pair",
            paths.data.display(),
            paths.index.display()
        ));
    }
    for (path, file) in [(&paths.data, data), (&paths.index, index)] {
        if let Some(number) = lowers.iter().position(|lower| *lower == file) {
            let path = path.display();
            return refused(format!("{path} is layer {number} of the image, which is read-only"));
        }
    }
    Ok(())
}

/// How often the lock is tried, a millisecond apart: what a writer was forking when it closed the
/// pair, or was killed, has the lock with it until its own program begins.
const LOCK_TRIES_MAX: u32 = 200;

/// Locks the pair, or tells who has it. The lock goes with the last descriptor of the open file.
/// Blocks for a fifth of a second when somebody has it.
pub(super) fn lock_data(data: &File, name: &str, journal: &Path) -> Result<()> {
    let mut locked = data.try_lock();
    for _ in 1..LOCK_TRIES_MAX {
        if !matches!(locked, Err(TryLockError::WouldBlock)) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
        locked = data.try_lock();
    }
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::Error(error)) => Err(Error::io(format!("lock {name}"), &error)),
        Err(TryLockError::WouldBlock) => {
            let owner = Journal::snapshot(journal).ok().flatten().and_then(|found| found.owner());
            let alive = owner.filter(|pid| Path::new(&format!("/proc/{pid}")).exists());
            let who = alive.map_or_else(
                || "another process".to_owned(),
                |pid| format!("the process with id {pid}"),
            );
            Err(Error::new(ErrorKind::Busy, format!("{name} is being written by {who}")))
        }
    }
}

/// Makes the folder of journals, and checks that it is in memory and that nobody else can put one
/// there.
pub(super) fn prepare_folder(folder: &Path) -> Result<()> {
    let named = |error: io::Error| Error::io(format!("make {}", folder.display()), &error);
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(named)?;
    let found = std::fs::metadata(folder).map_err(named)?;
    let place = JournalPlace {
        mode: found.mode() & 0o7777,
        owner: found.uid(),
        file_system: statfs(folder).map_err(|errno| named(errno.into()))?.filesystem_type(),
    };
    let anywhere = std::env::var_os(JOURNAL_ANYWHERE_VARIABLE).is_some();
    place
        .check(nix::unistd::geteuid().as_raw(), anywhere)
        .map_err(|what| Error::new(ErrorKind::Unsupported, format!("{}: {what}", folder.display())))
}

/// What is known of the folder of journals.
#[derive(Clone, Copy, Debug)]
struct JournalPlace {
    mode: u32,
    owner: u32,
    file_system: FsType,
}

/// What the headers of Linux do not tell of ramfs.
const RAMFS: FsType = FsType(0x8584_58f6);

impl JournalPlace {
    /// What is wrong with it for the user `me`; `anywhere` lets it be on a disk.
    fn check(self, me: u32, anywhere: bool) -> std::result::Result<(), String> {
        let Self { mode, owner, file_system } = self;
        if mode & 0o022 != 0 {
            let expected = "expected a folder that only its owner can write to";
            return Err(format!("found mode {mode:o}, {expected}"));
        }
        if owner != me {
            return Err(format!("found a folder of user {owner}, expected one of user {me}"));
        }
        if !anywhere && file_system != TMPFS_MAGIC && file_system != RAMFS {
            let found = file_system.0;
            return Err(format!(
                "found a file system of type {found:#x}, expected tmpfs or ramfs, which ends with \
                 the machine as a journal must; {RUN_DIR_VARIABLE} moves the folder"
            ));
        }
        Ok(())
    }
}

/// Reads and checks the headers, and that the pair is one that can be written.
fn read_heads(
    data: &dyn Storage,
    index: &dyn Storage,
    options: &PairOptions,
) -> Result<WritablePair> {
    let data_header = read_header(data, 0)?.ok_or_else(|| too_short("data"))?;
    let flags = data_header.flags;
    if flags.is_sparse_writable() && !flags.is_sealed() {
        let message = "the pair is in sparse form, expected one in append form";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let index_header = read_header(index, 0)?.ok_or_else(|| too_short("index"))?;
    let head = check_writable_pair(&data_header, Some(&index_header))?;
    check_not_sealed(data, &head)?;
    check_wishes(&head, options)?;
    Ok(head)
}

/// Whether a pair is the one that is wanted.
pub(super) fn check_wishes(head: &WritablePair, options: &PairOptions) -> Result<()> {
    if let Some(expected) = options.parent_uuid.filter(|uuid| *uuid != head.parent_uuid) {
        let message =
            format!("the pair is one on layer {}, expected layer {expected}", head.parent_uuid);
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    let found = head.virtual_size_bytes;
    if let Some(expected) = options.virtual_bytes.filter(|bytes| *bytes != found) {
        let message = format!("the pair is a disk of {found} bytes, expected {expected}");
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    Ok(())
}

pub(super) fn too_short(what: &str) -> Error {
    let message = format!("the {what} file is shorter than its header of {HEADER_BYTES} bytes");
    Error::new(ErrorKind::Corrupt, message)
}

/// The record at `at_byte`; `None` where the file ends before.
pub(super) fn read_header(file: &dyn Storage, at_byte: u64) -> Result<Option<Header>> {
    let mut bytes = vec![0; to_usize(HEADER_BYTES).unwrap_or(0)];
    match file.read_at(at_byte, &mut bytes) {
        Ok(()) => Header::parse(&bytes, at_byte).map(Some),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(Error::io(format!("read a header at byte {at_byte}"), &error)),
    }
}

/// A layer that was sealed in place has a header that says otherwise, and a trailer: appending
/// would bury it. Somebody's data may end like a trailer, but not with this pair's UUID.
pub(super) fn check_not_sealed(data: &dyn Storage, head: &WritablePair) -> Result<()> {
    if !is_sealed(data, head)? {
        return Ok(());
    }
    let message = "the data file is a sealed layer, which is a lower and cannot be written";
    Err(Error::new(ErrorKind::Unsupported, message))
}

fn is_sealed(data: &dyn Storage, head: &WritablePair) -> Result<bool> {
    let at_byte = length(data)?.checked_sub(HEADER_BYTES).filter(|&at| at >= HEADER_BYTES);
    let Some(at_byte) = at_byte else { return Ok(false) };
    let Ok(Some(trailer)) = read_header(data, at_byte) else { return Ok(false) };
    let flags = trailer.flags;
    Ok(flags.is_sealed() && !flags.is_header() && trailer.uuid == head.uuid)
}

/// Whether the data file is one in sparse form that was sealed where it is: its header says that it
/// can be written, but a trailer follows its data.
///
/// # Errors
/// As [`is_sparse`](super::is_sparse).
pub fn is_sealed_sparse(data: &File) -> Result<bool> {
    let header = read_header(data, 0)?.ok_or_else(|| too_short("data"))?;
    if !header.flags.is_sparse_writable() || header.flags.is_sealed() {
        return Ok(false);
    }
    is_sealed(data, &check_writable_pair(&header, None)?)
}

const _: () = assert!(DATA_START_SECTOR * SECTOR_SIZE == HEADER_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_lies_in_memory_in_a_folder_of_its_owner() {
        let good = JournalPlace { mode: 0o700, owner: 7, file_system: TMPFS_MAGIC };
        let on_disk = JournalPlace { file_system: FsType(0xef53), ..good };
        assert_eq!(good.check(7, false), Ok(()));
        assert_eq!(JournalPlace { file_system: RAMFS, ..good }.check(7, false), Ok(()));
        assert_eq!(on_disk.check(7, true), Ok(()));
        for (place, anywhere, told) in [
            (JournalPlace { mode: 0o1777, ..good }, true, "found mode 1777"),
            (JournalPlace { owner: 0, ..good }, true, "found a folder of user 0"),
            (on_disk, false, "found a file system of type 0xef53, expected tmpfs"),
        ] {
            let error = place.check(7, anywhere).unwrap_err();
            assert!(error.starts_with(told), "{error}");
        }
    }
}
