//! A complete blob: checked against its sha256, made durable, and given a name as a plain file.
//!
//! The plain file is the data file under another name, so nothing is copied and who has it mapped
//! goes on. It is read and synced without any claim, and nobody waits for that:
//!
//! ```text
//!   for each piece: its records, its bytes; are they what the records say?  --no--> quarantine
//!   claim all extents: nobody writes now
//!   are the records still those of the bytes that were hashed?  --no--> busy, once more later
//!   right digest: sync, name       wrong: what was fetched was wrong, all of it goes
//! ```
//!
//! Whoever writes an extent writes its record as well, so an extent that was repaired or fetched
//! once more between the hash and the claim has another record, unless its bytes are the same.

use super::claim;
use super::digest::BlobDigest;
use super::doubt::Doubt;
use super::faults::DiskStep;
use super::pair::{Pair, RECORDS_AT_ONCE};
use super::sidecar::Record;
use super::store::{Folder, sync_folder};
use crate::error::{Error, ErrorKind, Result};
use crate::source::{FileIdentity, open_regular_for_writing};
use crate::units::{to_u64, to_usize};
use sha2::{Digest, Sha256};
use std::fs::{File, Permissions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// Bytes that are read and hashed at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// What became of a blob that should be complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promotion {
    /// It is a plain file now.
    Done,
    /// Extents are missing.
    Incomplete,
    /// Another process is at it, or writes it; later.
    Busy,
    /// So many extents were damaged and thrown away; they are fetched again when they are needed.
    Damaged(u64),
    /// Every extent is as it was fetched, and all together they have another digest: what was
    /// fetched was wrong. All of it was thrown away, and is fetched from the origin alone.
    Condemned,
}

/// Promotes a blob. Raises `doubt` before others can fetch again what was wrong.
///
/// # Errors
/// `Io`, `NoSpace`, `Timeout` for the folder's lock; nothing has changed then.
pub(super) fn promote(folder: &Folder, pair: &Pair, doubt: &Doubt) -> Result<Promotion> {
    let digest = pair.header().digest;
    let named = |error: io::Error| Error::io(format!("promote {digest}"), &error);
    // Its own open file, so that the claims of this process's readers count as others' do.
    let claims = match open_regular_for_writing(&folder.map_path(&digest)) {
        Ok(claims) => claims,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Promotion::Busy),
        Err(error) => return Err(error),
    };
    let is_same =
        FileIdentity::of(&claims).map_err(named)? == FileIdentity::of(pair.map()).map_err(named)?;
    let promotion = claim::try_promotion(&claims).map_err(named)?;
    // Looked at behind the claim: whoever had it may have promoted or removed the pair.
    if !is_same || promotion.is_none() || pair.is_retired().map_err(named)? {
        return Ok(Promotion::Busy);
    }
    if records_of(pair).map_err(named)?.is_none() {
        return Ok(Promotion::Incomplete);
    }
    let (found, records) = match hash(pair).map_err(named)? {
        Hashed::All { blob, records } => (blob, records),
        Hashed::Incomplete => return Ok(Promotion::Incomplete),
        Hashed::Damaged => return throw_damaged_away(pair, &claims),
    };
    pair.sync().map_err(named)?;
    let all = 0..pair.extents().count();
    let Some(_claim) = claim::try_extents(&claims, &all).map_err(named)? else {
        return Ok(Promotion::Busy);
    };
    // What was hashed is what is here only if no extent was written since.
    if pair.is_retired().map_err(named)? || records_of(pair).map_err(named)? != Some(records) {
        return Ok(Promotion::Busy);
    }
    if found != digest {
        return throw_all_away(folder, pair, &digest, doubt);
    }
    // Once more, now that nobody can write: an extent may have been repaired since, with the same
    // bytes. Nothing is left to write as a rule.
    pair.sync().map_err(named)?;
    give_name(folder, pair, &digest)?;
    Ok(Promotion::Done)
}

/// What a look at all bytes found.
enum Hashed {
    /// Every extent is what its record says: the digest of the blob, and that of the records.
    All { blob: BlobDigest, records: RecordsDigest },
    /// An extent has no record any more.
    Incomplete,
    /// An extent is not what its record says, or was just written.
    Damaged,
}

/// The records of all extents, in short: two of them are alike if each extent had the same bytes.
type RecordsDigest = [u8; 32];

/// Reads all records; `None` when an extent has none.
fn records_of(pair: &Pair) -> io::Result<Option<RecordsDigest>> {
    let count = pair.extents().count();
    let mut hash = Sha256::new();
    let mut at = 0;
    while at < count {
        let piece = at..at.saturating_add(RECORDS_AT_ONCE).min(count);
        at = piece.end;
        let Some(checksums) = checksums_of(pair, &piece)? else { return Ok(None) };
        checksums.iter().for_each(|checksum| hash.update(checksum.to_le_bytes()));
    }
    Ok(Some(hash.finalize().into()))
}

/// What the records of some extents say; `None` when one of them has none.
fn checksums_of(pair: &Pair, extents: &Range<u64>) -> io::Result<Option<Vec<u64>>> {
    let records = pair.records(extents)?.into_iter();
    let filled = records.map(|record| match record {
        Record::Filled(checksum) => Some(checksum),
        Record::Empty | Record::Torn | Record::Quarantined(_) => None,
    });
    Ok(filled.collect())
}

/// Reads all bytes, and compares each extent with its record. Blocks for as long as that takes.
fn hash(pair: &Pair) -> io::Result<Hashed> {
    let extents = pair.extents();
    let extent_bytes = to_usize(extents.extent_bytes()).unwrap_or(usize::MAX);
    let (mut blob, mut records) = (Sha256::new(), Sha256::new());
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < extents.count() {
        let piece = at..at.saturating_add(extents.in_bytes(PIECE_BYTES)).min(extents.count());
        at = piece.end;
        // Before the bytes: who writes them in between changes the record for good.
        let Some(checksums) = checksums_of(pair, &piece)? else { return Ok(Hashed::Incomplete) };
        let place = extents.bytes_of(&piece);
        bytes.resize(to_usize(place.end - place.start).unwrap_or(0), 0);
        pair.data().file().read_exact_at(&mut bytes, place.start)?;
        for ((extent, content), checksum) in piece.zip(bytes.chunks(extent_bytes)).zip(checksums) {
            if pair.header().checksum(extent, content) != checksum {
                return Ok(Hashed::Damaged);
            }
            records.update(checksum.to_le_bytes());
        }
        blob.update(&bytes);
    }
    let blob = BlobDigest::new(blob.finalize().into());
    Ok(Hashed::All { blob, records: records.finalize().into() })
}

/// The sha256 of so many bytes of a file. Blocks for as long as reading them takes.
pub(super) fn sha256_of(file: &File, bytes: u64) -> io::Result<BlobDigest> {
    let mut hash = Sha256::new();
    let mut piece = vec![0; to_usize(PIECE_BYTES.min(bytes)).unwrap_or(0)];
    let mut at = 0;
    while at < bytes {
        let length = to_usize((bytes - at).min(PIECE_BYTES)).unwrap_or(0);
        let part = piece.get_mut(..length).unwrap_or_default();
        file.read_exact_at(part, at)?;
        hash.update(&*part);
        at += to_u64(part.len());
    }
    Ok(BlobDigest::new(hash.finalize().into()))
}

fn give_name(folder: &Folder, pair: &Pair, digest: &BlobDigest) -> Result<()> {
    let whole = folder.whole_path(digest);
    let named = |error: &io::Error| Error::io(format!("make {}", whole.display()), error);
    folder.allow(DiskStep::Link).map_err(|error| named(&error))?;
    let lock = folder.lock()?;
    // The name must still be that of this very file.
    if pair.is_retired().map_err(|error| named(&error))? {
        return Err(Error::new(ErrorKind::Busy, format!("{digest} was removed meanwhile")));
    }
    link_over(pair, &folder.data_path(digest), &whole).map_err(|error| named(&error))?;
    // Behind the name: a pair that is not promoted after all must stay one that can be written.
    let readable = Permissions::from_mode(0o444);
    pair.data().file().set_permissions(readable).map_err(|error| named(&error))?;
    sync_folder(&folder.whole_folder())?;
    // Only now that the plain file will be there after a power cut.
    folder.remove_pair(digest, &lock)
}

/// Gives the data file its second name. What is there already is not what was hashed, unless it is
/// this very file: it gives way. Who has it open goes on with it.
fn link_over(pair: &Pair, data: &Path, whole: &Path) -> io::Result<()> {
    match std::fs::hard_link(data, whole) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        linked => return linked,
    }
    let found = std::fs::symlink_metadata(whole)?;
    let identity = FileIdentity { device_number: found.dev(), inode: found.ino() };
    if identity == FileIdentity::of(pair.data().file())? {
        // A kill in the middle of a promotion left both names.
        return Ok(());
    }
    tracing::warn!(whole = %whole.display(), "replaced: not what was fetched and checked");
    if found.is_dir() {
        // A full one is somebody's, and an error each time.
        std::fs::remove_dir(whole)?;
    }
    std::fs::rename(data, whole)
}

/// All is here and something is not what its record says.
fn throw_damaged_away(pair: &Pair, claims: &File) -> Result<Promotion> {
    let damaged = quarantine_damaged(pair, claims)?;
    if damaged == 0 {
        // It was being repaired when it was looked at.
        return Ok(Promotion::Busy);
    }
    let digest = pair.header().digest;
    tracing::warn!(%digest, damaged, "a complete blob had damaged extents");
    Ok(Promotion::Damaged(damaged))
}

/// Every extent is as it was fetched, and all together they are not the blob. The caller has all
/// claims.
fn throw_all_away(
    folder: &Folder,
    pair: &Pair,
    digest: &BlobDigest,
    doubt: &Doubt,
) -> Result<Promotion> {
    let lock = folder.lock()?;
    if pair.is_retired().map_err(|error| Error::io("look at the sidecar", &error))? {
        return Ok(Promotion::Busy);
    }
    doubt.raise_for_good();
    folder.remove_pair(digest, &lock)?;
    // Other processes learn it from the files that they will find.
    if let Err(error) = folder.make_suspect_pair(digest, pair.extents(), &lock) {
        tracing::warn!(%digest, error = format!("{error:#}"), "begun anew by whoever reads it");
    }
    drop(lock);
    tracing::error!(%digest, "all bytes were fetched and have another digest: thrown away");
    Ok(Promotion::Condemned)
}

/// Throws away the extents whose bytes are not what their records say; how many. `claims` is the
/// sidecar, opened by nobody who fills.
///
/// # Errors
/// `Io`.
pub(super) fn quarantine_damaged(pair: &Pair, claims: &File) -> Result<u64> {
    let named = |error: io::Error| Error::io("check the extents of the cache", &error);
    let mut scratch = Vec::new();
    let mut damaged = 0;
    for extent in 0..pair.extents().count() {
        // One claim at a time, so that readers get in between.
        let one = extent..extent + 1;
        let Some(claim) = claim::try_extents(claims, &one).map_err(named)? else { continue };
        let record = pair.records(&one).map_err(named)?.first().copied();
        let Some(Record::Filled(expected)) = record else { continue };
        if pair.checksum_of(extent, &mut scratch)? != expected {
            pair.quarantine(extent, &claim).map_err(named)?;
            pair.states().set_missing(extent);
            damaged += 1;
        }
    }
    if damaged > 0 {
        pair.states().forget();
    }
    Ok(damaged)
}
