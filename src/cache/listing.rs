//! What is in the folder, and looking after it by hand: `cache ls|stat|gc|rm|fsck`.

use super::Settings;
use super::check::{self, Checked};
use super::claim;
use super::commit::{self, Commit};
use super::digest::BlobDigest;
use super::doubt::Doubt;
use super::evict::{self, Trimmed};
use super::promote::{self, Promotion};
use super::sidecar::{Header, RECORD_BYTES, Record};
use super::store::{Folder, read_header};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::CACHE_BLOBS_MAX;
use crate::units::SECTOR_SIZE;
use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// One blob in the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub digest: BlobDigest,
    /// Whether it is complete, checked, and a plain file.
    pub is_whole: bool,
    /// Length of the blob in bytes.
    pub blob_bytes: u64,
    /// Bytes that its files take of the disk.
    pub disk_bytes: u64,
    /// When it was opened or read last, to within a tick.
    pub last_used: SystemTime,
    /// Whether a process has it open through the cache.
    pub in_use: bool,
    /// Whether the plain file has another name elsewhere: removing it here would free nothing, and
    /// it does not count against the quota.
    pub is_linked_elsewhere: bool,
}

/// All of them together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Complete blobs.
    pub whole: u64,
    /// Blobs that are here in part.
    pub partial: u64,
    /// Blobs that are open.
    pub in_use: u64,
    /// Bytes of the disk that count against the quota.
    pub disk_bytes: u64,
    /// Bytes of complete blobs that have a name elsewhere too, which do not count.
    pub shared_bytes: u64,
    /// Extents that have a record, of blobs that are here in part.
    pub filled_extents: u64,
    /// Extents that were found bad and not fetched again yet.
    pub quarantined_extents: u64,
}

/// Looking after a cache that any number of processes may be using.
#[derive(Clone, Debug)]
pub struct Maintenance {
    folder: Folder,
    quota_bytes: u64,
}

impl Maintenance {
    /// Opens the folder that `settings` name.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open(settings: &Settings) -> Result<Self> {
        let folder = Folder::create(&settings.folder, settings.faults.clone())?;
        Ok(Self { folder, quota_bytes: settings.quota_bytes })
    }

    /// Every blob, by digest. Blocks for a few system calls for each.
    ///
    /// # Errors
    /// `Io`.
    pub fn list(&self) -> Result<Vec<Entry>> {
        list(&self.folder)
    }

    /// The sums. Reads the sidecars.
    ///
    /// # Errors
    /// `Io`.
    pub fn usage(&self) -> Result<Usage> {
        let mut usage = Usage::default();
        for entry in self.list()? {
            usage.in_use += u64::from(entry.in_use);
            if entry.is_linked_elsewhere {
                usage.shared_bytes += entry.disk_bytes;
            } else {
                usage.disk_bytes += entry.disk_bytes;
            }
            if entry.is_whole {
                usage.whole += 1;
                continue;
            }
            usage.partial += 1;
            // One that goes away meanwhile, or has no header, has no extents.
            for record in sidecar_records(&self.folder, &entry.digest).unwrap_or_default() {
                usage.filled_extents += u64::from(matches!(record, Record::Filled(_)));
                usage.quarantined_extents += u64::from(matches!(record, Record::Quarantined(_)));
            }
        }
        Ok(usage)
    }

    /// Evicts what was not used longest until no more than `target_bytes` are taken, the quota
    /// where none are said. Blobs that are open and were read lately stay.
    ///
    /// # Errors
    /// `Io`, `Timeout` for the folder's lock.
    pub fn collect(&self, target_bytes: Option<u64>) -> Result<Trimmed> {
        evict::trim(&self.folder, target_bytes.unwrap_or(self.quota_bytes), SystemTime::now())
    }

    /// Removes a blob; whether it was there. Who has it open goes on with it.
    ///
    /// # Errors
    /// `Busy` for one that is open, unless `force`; `Io`, `Timeout` for the folder's lock.
    pub fn remove(&self, digest: &BlobDigest, force: bool) -> Result<bool> {
        let lock = self.folder.lock()?;
        let whole = entry_of_whole(&self.folder, digest)?;
        let partial = entry_of_pair(&self.folder, digest)?;
        let found: Vec<_> = whole.into_iter().chain(partial).collect();
        if !force && found.iter().any(|entry| entry.in_use) {
            let message = format!("{digest} is open: not removed");
            return Err(Error::new(ErrorKind::Busy, message));
        }
        self.folder.remove_pair(digest, &lock)?;
        self.folder.remove_whole(digest, &lock)?;
        Ok(!found.is_empty())
    }

    /// Reads everything and compares it with its checksums; with `repair` what is bad is thrown
    /// away. Blocks for as long as reading all of it takes.
    ///
    /// # Errors
    /// `Io` for the folder itself. What is wrong with a blob is in the report.
    pub fn check(&self, repair: bool) -> Result<Checked> {
        check::check(&self.folder, repair)
    }

    /// Makes a plain file of a blob all of whose bytes are here, if they have its digest. Reads
    /// all of it.
    ///
    /// # Errors
    /// `NotFound` when nothing of it is here; `Io`.
    pub fn promote(&self, digest: &BlobDigest) -> Result<Promotion> {
        let lock = self.folder.lock()?;
        // First: beside a pair, a plain file is no proof that this was done.
        let pair = match self.folder.open_for_check(digest, &lock) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let whole = entry_of_whole(&self.folder, digest)?;
                return whole.map(|_| Promotion::Done).ok_or(error);
            }
            opened => opened?,
        };
        drop(lock);
        promote::promote(&self.folder, &pair, &Doubt::new())
    }

    /// Gives a complete blob the name `overlaybd.commit` in the folder `dir` too: by a link where
    /// that can be, else by a copy. Durable when this returns.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub fn commit_into(&self, digest: &BlobDigest, dir: &Path) -> Result<Commit> {
        commit::commit_into(&self.folder, digest, dir)
    }
}

/// Every blob in the folder. Names that are nothing of ours are passed over.
pub(super) fn list(folder: &Folder) -> Result<Vec<Entry>> {
    let mut found = BTreeMap::new();
    for name in names(&folder.partial_folder())? {
        let digits = name.strip_suffix(".map").or_else(|| name.strip_suffix(".data"));
        let digest = digits.and_then(BlobDigest::from_hex);
        found.extend(digest.map(|digest| ((digest, false), ())));
    }
    for name in names(&folder.whole_folder())? {
        found.extend(BlobDigest::from_hex(&name).map(|digest| ((digest, true), ())));
    }
    let mut entries = Vec::with_capacity(found.len());
    for (digest, is_whole) in found.into_keys() {
        let entry = if is_whole {
            entry_of_whole(folder, &digest)?
        } else {
            entry_of_pair(folder, &digest)?
        };
        entries.extend(entry);
    }
    Ok(entries)
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let named = |error: &io::Error| Error::io(format!("list {}", folder.display()), error);
    let listed = std::fs::read_dir(folder).map_err(|error| named(&error))?;
    let mut names = Vec::new();
    // Two files for each blob.
    for entry in listed.take(2 * CACHE_BLOBS_MAX) {
        let entry = entry.map_err(|error| named(&error))?;
        names.extend(entry.file_name().into_string());
    }
    Ok(names)
}

pub(super) fn disk_bytes(metadata: &Metadata) -> u64 {
    // The kernel counts in sectors, whatever the file system's block is.
    metadata.blocks().saturating_mul(SECTOR_SIZE)
}

/// A file's metadata; `None` when it is not there.
fn look_at(path: &Path) -> Result<Option<Metadata>> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("look at {}", path.display()), &error)),
    }
}

pub(super) fn entry_of_whole(folder: &Folder, digest: &BlobDigest) -> Result<Option<Entry>> {
    let path = folder.whole_path(digest);
    let Some(metadata) = look_at(&path)? else { return Ok(None) };
    Ok(Some(Entry {
        digest: *digest,
        is_whole: true,
        blob_bytes: metadata.len(),
        disk_bytes: disk_bytes(&metadata),
        last_used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        in_use: is_open(&path),
        is_linked_elsewhere: metadata.nlink() > 1,
    }))
}

pub(super) fn entry_of_pair(folder: &Folder, digest: &BlobDigest) -> Result<Option<Entry>> {
    let map_path = folder.map_path(digest);
    let map = look_at(&map_path)?;
    let data = look_at(&folder.data_path(digest))?;
    if map.is_none() && data.is_none() {
        return Ok(None);
    }
    let last_used = map.as_ref().and_then(|map| map.modified().ok());
    let sum = |of: fn(&Metadata) -> u64| map.as_ref().map_or(0, of) + data.as_ref().map_or(0, of);
    Ok(Some(Entry {
        digest: *digest,
        is_whole: false,
        blob_bytes: data.as_ref().map_or(0, Metadata::len),
        disk_bytes: sum(disk_bytes),
        // One half of a pair is nothing that anybody used.
        last_used: last_used.filter(|_| data.is_some()).unwrap_or(SystemTime::UNIX_EPOCH),
        in_use: is_open(&map_path),
        is_linked_elsewhere: false,
    }))
}

/// Whether a process has the file open through the cache. One that cannot be asked is not.
fn is_open(path: &Path) -> bool {
    crate::source::open_regular(path).is_ok_and(|file| claim::is_used(&file).unwrap_or(false))
}

/// Marks a file as used now.
pub(super) fn touch(file: &File) {
    let times = std::fs::FileTimes::new().set_modified(SystemTime::now());
    // A file system that keeps no times evicts in another order.
    let _ = file.set_times(times);
}

/// Whether an entry was used within `recent` of `now`.
pub(super) fn is_recent(entry: &Entry, now: SystemTime, recent: Duration) -> bool {
    // A clock that was set back makes everything recent.
    now.duration_since(entry.last_used).map_or(true, |age| age < recent)
}

/// All records of a sidecar.
fn sidecar_records(folder: &Folder, digest: &BlobDigest) -> Result<Vec<Record>> {
    let mut file = folder.sidecar(digest)?;
    let named = |error: &io::Error| Error::io(format!("read the sidecar of {digest}"), error);
    let header = read_header(&file).map_err(|error| named(&error))??;
    let mut records = Vec::new();
    let mut piece = vec![0; 4096 * RECORD_BYTES];
    file.seek(SeekFrom::Start(Header::record_at(0))).map_err(|error| named(&error))?;
    let mut extent = 0;
    while extent < header.extents.count() {
        let length = file.read(&mut piece).map_err(|error| named(&error))?;
        let read = piece.get(..length).unwrap_or_default();
        let (whole, _) = read.as_chunks::<RECORD_BYTES>();
        if whole.is_empty() {
            break;
        }
        for bytes in whole {
            records.push(header.decode_record(extent, bytes));
            extent += 1;
        }
    }
    Ok(records)
}
