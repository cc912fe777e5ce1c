//! The folder of the cache: which files there are, and how those of one blob are opened.
//!
//! ```text
//!   lock                who opens, makes, promotes or removes files has it, for some system calls
//!   partial/HEX.map     the sidecar of a blob that is here in part
//!   partial/HEX.data    its bytes, at the places that they have in the blob; sparse
//!   whole/HEX           a complete blob whose sha256 was right: a plain file
//!   touched/            no blobs, and not looked after here: see `logs`
//! ```

use super::claim;
use super::digest::BlobDigest;
use super::extent_set::Extents;
use super::faults::{DiskFaults, DiskStep, allow};
use super::listing::touch;
use super::pair::Pair;
use super::sidecar::{HEADER_USED_BYTES, Header};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::{CACHE_LOCK_MS_MAX, CACHE_POLL_MS_MAX};
use crate::source::{FileIdentity, MappedFile, open_regular, open_regular_for_writing};
use nix::fcntl::OFlag;
use std::fs::{DirBuilder, File, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where the blobs' files are.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    root: PathBuf,
    faults: Option<Arc<dyn DiskFaults>>,
}

/// The files of a blob, open.
#[derive(Debug)]
pub(super) enum Opened {
    /// A plain file: complete and right.
    Whole(MappedFile),
    /// Some of it.
    Partial(Pair),
}

/// The right to open, make and remove files; ends when dropped, or with the process.
#[derive(Debug)]
pub(super) struct FolderLock {
    _file: File,
}

impl Folder {
    /// The folder at `root`, made where it is not there yet.
    ///
    /// # Errors
    /// `Io` and its relatives.
    pub(super) fn create(root: &Path, faults: Option<Arc<dyn DiskFaults>>) -> Result<Self> {
        let folder = Self { root: root.to_owned(), faults };
        folder.make()?;
        Ok(folder)
    }

    /// Makes what of the folder is not there.
    ///
    /// # Errors
    /// As [`Folder::create`].
    pub(super) fn make(&self) -> Result<()> {
        make_folder(&self.root)?;
        // First: who could rename what is in it would not need to write into that.
        check_root(&self.root)?;
        for folder in [self.partial_folder(), self.whole_folder()] {
            make_folder(&folder)?;
            check_owner(&folder)?;
        }
        Ok(())
    }

    pub(super) fn map_path(&self, digest: &BlobDigest) -> PathBuf {
        self.partial_folder().join(format!("{}.map", digest.hex()))
    }

    pub(super) fn data_path(&self, digest: &BlobDigest) -> PathBuf {
        self.partial_folder().join(format!("{}.data", digest.hex()))
    }

    pub(super) fn whole_path(&self, digest: &BlobDigest) -> PathBuf {
        self.whole_folder().join(digest.hex())
    }

    pub(super) fn partial_folder(&self) -> PathBuf {
        self.root.join("partial")
    }

    pub(super) fn whole_folder(&self) -> PathBuf {
        self.root.join("whole")
    }

    pub(super) fn allow(&self, step: DiskStep) -> io::Result<()> {
        allow(self.faults.as_deref(), step)
    }

    /// Locks the folder.
    ///
    /// # Errors
    /// `Timeout` after [`CACHE_LOCK_MS_MAX`], `Io`.
    pub(super) fn lock(&self) -> Result<FolderLock> {
        let path = self.root.join("lock");
        let named = |error: &io::Error| Error::io(format!("lock {}", path.display()), error);
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits());
        let file = options.open(&path).map_err(|error| named(&error))?;
        let end = Instant::now() + Duration::from_millis(CACHE_LOCK_MS_MAX);
        let mut pause_ms = 1;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(FolderLock { _file: file }),
                Err(TryLockError::Error(error)) => return Err(named(&error)),
                Err(TryLockError::WouldBlock) if Instant::now() >= end => {
                    let message = format!("{} is held by another process", path.display());
                    return Err(Error::new(ErrorKind::Timeout, message));
                }
                Err(TryLockError::WouldBlock) => {
                    std::thread::sleep(Duration::from_millis(pause_ms));
                    pause_ms = (pause_ms * 2).min(CACHE_POLL_MS_MAX);
                }
            }
        }
    }

    /// Opens a blob: the plain file, else the pair of files, which is made if there is none that
    /// can be used.
    ///
    /// # Errors
    /// `Busy` when somebody has a pair of another shape open, `Corrupt` when what is here has
    /// another length: whoever says how long the blob is may be wrong, so nothing is removed.
    /// `Timeout` for the lock, `NoSpace`, `Io`.
    pub(super) fn open(&self, digest: &BlobDigest, extents: Extents) -> Result<Opened> {
        let action = || format!("open {digest} in the cache {}", self.root.display());
        let named = |error| Error::io("begin", &error).context(action());
        self.allow(DiskStep::Open).map_err(named)?;
        let lock = self.lock()?;
        let whole = self.open_whole(digest, extents.blob_bytes(), &lock).context(action)?;
        if let Some(file) = whole {
            // What a kill in the middle of a promotion left: nobody may fill the plain file.
            self.remove_pair(digest, &lock)?;
            return Ok(Opened::Whole(file));
        }
        if let Some(pair) = self.open_pair(digest, extents).context(action)? {
            touch(pair.map());
            return Ok(Opened::Partial(pair));
        }
        self.remove_pair(digest, &lock)?;
        let made = self.make_pair(digest, extents, &lock).inspect_err(|_| {
            // Half a pair is nothing: on a full disk there would be one for each blob.
            let _ = self.remove_pair(digest, &lock);
        });
        made.context(action).map(Opened::Partial)
    }

    /// How long a blob is, by what is kept of it: the plain file, or a pair in which something is
    /// stored, which nothing is where the registry has the blob in another length. `None` when that
    /// tells nothing.
    pub(super) fn known_bytes(&self, digest: &BlobDigest) -> Option<u64> {
        let bytes_of = |file: File| file.metadata().ok().map(|metadata| metadata.len());
        let whole = open_regular(&self.whole_path(digest)).ok().and_then(bytes_of);
        if let Some(bytes) = whole.filter(|bytes| *bytes > 0) {
            return Some(bytes);
        }
        let header = read_header(&self.sidecar(digest).ok()?).ok()?.ok()?;
        let is_stored = holds_bytes(&self.data_path(digest)).ok()?;
        (header.digest == *digest && is_stored).then(|| header.extents.blob_bytes())
    }

    /// The plain file. One of another length is refused: a config says how long a blob is, and one
    /// that is wrong is more likely than a file that was cut, which `fsck` finds. Of one that was
    /// emptied nothing is lost.
    fn open_whole(
        &self,
        digest: &BlobDigest,
        bytes: u64,
        lock: &FolderLock,
    ) -> Result<Option<MappedFile>> {
        let path = self.whole_path(digest);
        let file = match MappedFile::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if file.bytes() == 0 && bytes > 0 {
            tracing::warn!(%digest, "a complete blob was emptied: removed");
            self.remove_whole(digest, lock)?;
            return Ok(None);
        }
        if file.bytes() != bytes {
            let what = format!("length of {}", path.display());
            return Err(Error::corrupt(&what, 0, file.bytes(), bytes));
        }
        touch(file.file());
        let used = claim::mark_used(file.file());
        used.map_err(|error| Error::io(format!("lock {}", path.display()), &error))?;
        Ok(Some(file))
    }

    /// The pair that is there; `None` when there is none that can be used.
    fn open_pair(&self, digest: &BlobDigest, extents: Extents) -> Result<Option<Pair>> {
        let (map_path, data_path) = (self.map_path(digest), self.data_path(digest));
        let map = match open_regular_for_writing(&map_path) {
            Ok(map) => map,
            Err(error) if is_replaceable(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let named = |error: &io::Error| Error::io(format!("read {}", map_path.display()), error);
        let header = match read_header(&map).map_err(|error| named(&error))? {
            Ok(header) if header.digest == *digest && header.extents == extents => header,
            found => {
                if claim::is_used(&map).map_err(|error| named(&error))? {
                    let message = format!("found {found:?} in use, expected {extents:?}");
                    return Err(Error::new(ErrorKind::Busy, message));
                }
                if let Ok(Header { digest: of, extents: here, .. }) = &found
                    && of == digest
                    && here.blob_bytes() != extents.blob_bytes()
                    && holds_bytes(&data_path).map_err(|error| named(&error))?
                {
                    let what = format!("blob length in {}", map_path.display());
                    return Err(Error::corrupt(&what, 16, here.blob_bytes(), extents.blob_bytes()));
                }
                tracing::warn!(%digest, ?found, "a sidecar that cannot be used: made anew");
                return Ok(None);
            }
        };
        let data = match open_regular_for_writing(&data_path) {
            Ok(data) => data,
            Err(error) if is_replaceable(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = |file: &File| file.metadata().map(|metadata| metadata.len());
        let map_bytes = length(&map).map_err(|error| named(&error))?;
        let data_bytes = length(&data).map_err(|error| named(&error))?;
        if map_bytes != header.file_bytes() || data_bytes != extents.blob_bytes() {
            tracing::warn!(%digest, map_bytes, data_bytes, "files of another length: made anew");
            return Ok(None);
        }
        self.take(header, data, &data_path, map).map(Some)
    }

    /// Makes the files of a blob of which nothing is here. Killed at any point it leaves no header,
    /// or a pair without records.
    fn make_pair(&self, digest: &BlobDigest, extents: Extents, _lock: &FolderLock) -> Result<Pair> {
        let salt = RandomState::new().build_hasher().finish();
        let header = Header { digest: *digest, extents, salt };
        let (map_path, data_path) = (self.map_path(digest), self.data_path(digest));
        let make = |path: &Path, bytes: u64| {
            let mut options = File::options();
            options.read(true).write(true).create_new(true).mode(0o600);
            let file = options.open(path)?;
            file.set_len(bytes)?;
            Ok::<File, io::Error>(file)
        };
        let named =
            |path: &Path, error: &io::Error| Error::io(format!("make {}", path.display()), error);
        let data = make(&data_path, extents.blob_bytes());
        let data = data.map_err(|error| named(&data_path, &error))?;
        let map = make(&map_path, header.file_bytes()).and_then(|map| {
            map.write_all_at(&header.encode(), 0)?;
            Ok(map)
        });
        let map = map.map_err(|error| named(&map_path, &error))?;
        self.take(header, data, &data_path, map)
    }

    /// Makes the files of a blob of which everything was thrown away: whoever fills them, in
    /// whatever process, knows that. The caller has removed those of before.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub(super) fn make_suspect_pair(
        &self,
        digest: &BlobDigest,
        extents: Extents,
        lock: &FolderLock,
    ) -> Result<()> {
        let pair = self.make_pair(digest, extents, lock)?;
        pair.quarantine_all().map_err(|error| Error::io("write the records", &error))
    }

    fn take(&self, header: Header, data: File, data_path: &Path, map: File) -> Result<Pair> {
        let named = |error: &io::Error| Error::io(format!("use {}", data_path.display()), error);
        claim::mark_used(&map).map_err(|error| named(&error))?;
        let identity = FileIdentity::of(&data).map_err(|error| named(&error))?;
        let bytes = header.extents.blob_bytes();
        let data = MappedFile::adopt(data_path.to_owned(), data.into(), identity, bytes)?;
        Ok(Pair::new(header, data, map, self.faults.clone()))
    }

    /// Removes the names of a pair; who has it open goes on. The sidecar goes first: data without
    /// one is nothing.
    ///
    /// # Errors
    /// `Io` and its relatives, not for names that are not there.
    pub(super) fn remove_pair(&self, digest: &BlobDigest, _lock: &FolderLock) -> Result<()> {
        remove(&self.map_path(digest))?;
        remove(&self.data_path(digest))
    }

    /// Removes the name of a plain file.
    ///
    /// # Errors
    /// As [`Folder::remove_pair`].
    pub(super) fn remove_whole(&self, digest: &BlobDigest, _lock: &FolderLock) -> Result<()> {
        remove(&self.whole_path(digest))
    }

    /// Opens the sidecar of a blob for looking at it.
    ///
    /// # Errors
    /// `NotFound`, `InvalidFormat`, `Io`.
    pub(super) fn sidecar(&self, digest: &BlobDigest) -> Result<File> {
        open_regular(&self.map_path(digest))
    }

    /// Opens the pair of a blob as it is, for checking it.
    ///
    /// # Errors
    /// `NotFound` when there is none that can be used; what is wrong with its header; `Io`.
    pub(super) fn open_for_check(&self, digest: &BlobDigest, _lock: &FolderLock) -> Result<Pair> {
        let map = self.sidecar(digest)?;
        let named = |error: &io::Error| Error::io(format!("read the sidecar of {digest}"), error);
        let header = read_header(&map).map_err(|error| named(&error))??;
        if header.digest != *digest {
            let kind = ErrorKind::InvalidFormat;
            return Err(Error::field(kind, "sidecar digest", 24, header.digest, digest));
        }
        let pair = self.open_pair(digest, header.extents)?;
        pair.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{digest}: not a whole pair")))
    }
}

/// The outer result is the disk's, the inner one tells what the header is worth.
pub(super) fn read_header(map: &File) -> io::Result<Result<Header>> {
    let mut bytes = [0; HEADER_USED_BYTES];
    match map.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(Header::decode(&bytes)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Ok(Err(Error::corrupt("sidecar", 0, "fewer bytes", HEADER_USED_BYTES)))
        }
        Err(error) => Err(error),
    }
}

/// Whether anything was stored in a data file: nothing is where the registry has the blob in
/// another length than the config says.
fn holds_bytes(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(found.is_file() && found.blocks() > 0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether what is in the place of a file may be replaced: it is not there, or no file.
fn is_replaceable(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidFormat)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", path.display()), &error))
        }
        _ => Ok(()),
    }
}

/// Makes a folder of the cache, and those on the way to it, where they are not there.
///
/// # Errors
/// `Io` and its relatives.
pub(super) fn make_folder(folder: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| Error::io(format!("make {}", folder.display()), &error))
}

/// As [`check_owner`], for the folder that the user names. It may be a link to another disk, if
/// nobody else can lead that elsewhere.
///
/// # Errors
/// As there.
pub(super) fn check_root(root: &Path) -> Result<()> {
    let named = |error| Error::io(format!("look at {}", root.display()), &error);
    let found = std::fs::symlink_metadata(root).map_err(named)?;
    if !found.is_symlink() {
        return check_owner(root);
    }
    let owner = found.uid();
    if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
        let root = root.display();
        let message = format!("{root}: found a link of owner {owner}, expected ours");
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    check_owner(&std::fs::canonicalize(root).map_err(named)?)
}

/// Refuses a folder in which somebody else could put files.
///
/// # Errors
/// `InvalidConfig`; `NotFound`, `Io`.
pub(super) fn check_owner(folder: &Path) -> Result<()> {
    let named = |error| Error::io(format!("look at {}", folder.display()), &error);
    let metadata = std::fs::symlink_metadata(folder).map_err(named)?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    let is_mine = metadata.is_dir() && owner == nix::unistd::geteuid().as_raw();
    if is_mine && mode & 0o022 == 0 {
        return Ok(());
    }
    let folder = folder.display();
    let message =
        format!("{folder}: found owner {owner}, mode {mode:o}, expected only us to write");
    Err(Error::new(ErrorKind::InvalidConfig, message))
}

/// Makes the names in a folder durable.
///
/// # Errors
/// `Io`.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|error| Error::io(format!("sync {}", folder.display()), &error))
}
