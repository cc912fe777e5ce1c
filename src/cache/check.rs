//! Reading everything in the folder and comparing it with its checksums.

use super::digest::BlobDigest;
use super::listing::{entry_of_pair, entry_of_whole, list};
use super::pair::Pair;
use super::promote::{quarantine_damaged, sha256_of};
use super::sidecar::Record;
use super::store::{Folder, FolderLock};
use crate::error::{Error, ErrorKind, Result};
use crate::source::open_regular;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Complete blobs whose bytes have their digest.
    pub whole_right: u64,
    /// Complete blobs whose bytes have not.
    pub whole_bad: Vec<BlobDigest>,
    /// Extents of other blobs whose bytes are what their records say.
    pub extents_right: u64,
    /// How many extents' bytes are not, by blob.
    pub extents_bad: Vec<(BlobDigest, u64)>,
    /// Files that belong to nothing: one half of a pair, or a pair without a header.
    pub strays: Vec<BlobDigest>,
    /// Blobs that were left as they are, because another process had the folder's lock for too
    /// long: what is wrong with them is not known, or was not removed.
    pub busy: Vec<BlobDigest>,
    /// Blobs that could not be read, and why.
    pub unreadable: Vec<(BlobDigest, String)>,
}

impl Checked {
    /// Whether nothing was wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let Self { whole_bad, extents_bad, strays, .. } = self;
        let is_any_bad = !(whole_bad.is_empty() && extents_bad.is_empty() && strays.is_empty());
        !is_any_bad && self.unreadable.is_empty() && self.busy.is_empty()
    }
}

/// Checks every blob in the folder. A bad complete blob is removed under `repair`, a bad extent
/// quarantined, a stray removed.
pub(super) fn check(folder: &Folder, repair: bool) -> Result<Checked> {
    let mut checked = Checked::default();
    for entry in list(folder)? {
        let digest = entry.digest;
        let done = if entry.is_whole {
            check_whole(folder, &digest, repair, &mut checked)
        } else {
            check_pair(folder, &digest, repair, &mut checked)
        };
        match done {
            Ok(()) => {}
            // Evicted or promoted meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Busy) => {
                checked.busy.push(digest);
            }
            Err(error) => checked.unreadable.push((digest, format!("{error:#}"))),
        }
    }
    Ok(checked)
}

fn check_whole(
    folder: &Folder,
    digest: &BlobDigest,
    repair: bool,
    checked: &mut Checked,
) -> Result<()> {
    let path = folder.whole_path(digest);
    let file = open_regular(&path)?;
    let named = |error| Error::io(format!("read {}", path.display()), &error);
    let bytes = file.metadata().map_err(named)?.len();
    if sha256_of(&file, bytes).map_err(named)? == *digest {
        checked.whole_right += 1;
        return Ok(());
    }
    checked.whole_bad.push(*digest);
    if repair {
        let lock = folder.lock()?;
        if entry_of_whole(folder, digest)?.is_some_and(|entry| entry.blob_bytes == bytes) {
            folder.remove_whole(digest, &lock)?;
        }
    }
    Ok(())
}

fn check_pair(
    folder: &Folder,
    digest: &BlobDigest,
    repair: bool,
    checked: &mut Checked,
) -> Result<()> {
    let lock = folder.lock()?;
    let pair = match folder.open_for_check(digest, &lock) {
        Ok(pair) => pair,
        Err(error) if is_of_content(&error) => {
            return check_stray(folder, digest, (repair, &lock), checked);
        }
        Err(error) => return Err(error),
    };
    drop(lock);
    let bad = count_bad(&pair, checked)?;
    if bad > 0 {
        checked.extents_bad.push((*digest, bad));
        if repair {
            quarantine_damaged(&pair, pair.map())?;
        }
    }
    Ok(())
}

fn count_bad(pair: &Pair, checked: &mut Checked) -> Result<u64> {
    let mut scratch = Vec::new();
    let mut bad = 0;
    for extent in 0..pair.extents().count() {
        let records = pair.records(&(extent..extent + 1));
        let records = records.map_err(|error| Error::io("read a record", &error))?;
        let Some(Record::Filled(expected)) = records.first() else { continue };
        if pair.checksum_of(extent, &mut scratch)? == *expected {
            checked.extents_right += 1;
        } else {
            bad += 1;
        }
    }
    Ok(bad)
}

/// Whether what is there is no pair, by what it is. Every other error is one of looking: a lock
/// that somebody has, a disk that fails, a descriptor too many, and says nothing of the files.
fn is_of_content(error: &Error) -> bool {
    use ErrorKind::{Corrupt, Integrity, InvalidFormat, NotFound, Unsupported};
    matches!(error.kind(), NotFound | InvalidFormat | Integrity | Unsupported | Corrupt)
}

/// Files that are no pair, and were none under the lock under which pairs are made.
fn check_stray(
    folder: &Folder,
    digest: &BlobDigest,
    (repair, lock): (bool, &FolderLock),
    checked: &mut Checked,
) -> Result<()> {
    let Some(entry) = entry_of_pair(folder, digest)? else { return Ok(()) };
    if entry.in_use {
        return Ok(());
    }
    checked.strays.push(*digest);
    if repair {
        folder.remove_pair(digest, lock)?;
    }
    Ok(())
}
