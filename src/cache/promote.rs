//! A complete blob: checked against its sha256, made durable, and given a name as a plain file.
//!
//! The plain file is the data file under another name, so nothing is copied and who has it mapped
//! goes on. It is read and synced without any claim; then all extents are claimed for the moment
//! in which it gets its name, so that nobody is writing into what was checked.

use super::claim;
use super::digest::BlobDigest;
use super::faults::DiskStep;
use super::pair::Pair;
use super::sidecar::Record;
use super::store::{Folder, sync_folder};
use crate::error::{Error, ErrorKind, Result};
use crate::source::{FileIdentity, open_regular, open_regular_for_writing};
use crate::units::{to_u64, to_usize};
use sha2::{Digest, Sha256};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Bytes that are read and hashed at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// Records that are read at a time, when a complete blob is to be found out.
const RECORDS_AT_ONCE: u64 = 1 << 16;

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
    /// fetched was wrong. All of it was thrown away.
    Condemned,
}

/// Promotes a blob.
///
/// # Errors
/// `Io`, `NoSpace`, `Timeout` for the folder's lock; nothing has changed then.
pub(super) fn promote(folder: &Folder, pair: &Pair) -> Result<Promotion> {
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
    if !is_filled(pair).map_err(named)? {
        return Ok(Promotion::Incomplete);
    }
    if sha256_of(pair.data().file(), pair.extents().blob_bytes()).map_err(named)? != digest {
        return throw_away(folder, pair, &claims);
    }
    pair.sync().map_err(named)?;
    let all = 0..pair.extents().count();
    let Some(_claim) = claim::try_extents(&claims, &all).map_err(named)? else {
        return Ok(Promotion::Busy);
    };
    if pair.is_retired().map_err(named)? || !is_filled(pair).map_err(named)? {
        return Ok(Promotion::Busy);
    }
    // Once more, now that nobody can write: an extent may have been repaired since, with the same
    // bytes. Nothing is left to write as a rule.
    pair.sync().map_err(named)?;
    give_name(folder, pair, &digest)?;
    Ok(Promotion::Done)
}

/// Whether every extent has a record.
fn is_filled(pair: &Pair) -> io::Result<bool> {
    let count = pair.extents().count();
    let mut at = 0;
    while at < count {
        let piece = at..at.saturating_add(RECORDS_AT_ONCE).min(count);
        at = piece.end;
        if !pair.records(&piece)?.iter().all(|record| matches!(record, Record::Filled(_))) {
            return Ok(false);
        }
    }
    Ok(true)
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
    match std::fs::hard_link(folder.data_path(digest), &whole) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(named(&error)),
        _ => {}
    }
    // Behind the name: a pair that is not promoted after all must stay one that can be written.
    let readable = Permissions::from_mode(0o444);
    pair.data().file().set_permissions(readable).map_err(|error| named(&error))?;
    sync_folder(&folder.whole_folder())?;
    // Only now that the plain file will be there after a power cut.
    folder.remove_pair(digest, &lock)
}

/// All is here and it is not the blob: which extents are damaged? None: all were fetched wrong.
fn throw_away(folder: &Folder, pair: &Pair, claims: &File) -> Result<Promotion> {
    let digest = pair.header().digest;
    let damaged = quarantine_damaged(pair, claims)?;
    if damaged > 0 {
        tracing::warn!(%digest, damaged, "a complete blob had damaged extents");
        return Ok(Promotion::Damaged(damaged));
    }
    let lock = folder.lock()?;
    if pair.is_retired().map_err(|error| Error::io("look at the sidecar", &error))? {
        return Ok(Promotion::Busy);
    }
    folder.remove_pair(&digest, &lock)?;
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
            damaged += 1;
        }
    }
    if damaged > 0 {
        pair.states().forget();
    }
    Ok(damaged)
}

/// What became of the wish to have a complete blob in a folder of the reference's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// It is there now.
    Made,
    /// A file of that name was there.
    WasThere,
    /// The blob is not complete here.
    Incomplete,
}

/// The name under which the reference looks for a complete layer in its folder.
const COMMIT_NAME: &str = "overlaybd.commit";

/// See [`super::Maintenance::commit_into`].
pub(super) fn commit_into(folder: &Folder, digest: &BlobDigest, dir: &Path) -> Result<Commit> {
    let target = dir.join(COMMIT_NAME);
    let named = |error: &io::Error| Error::io(format!("make {}", target.display()), error);
    let source = match open_regular(&folder.whole_path(digest)) {
        Ok(source) => source,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Commit::Incomplete),
        Err(error) => return Err(error),
    };
    folder.allow(DiskStep::Link).map_err(|error| named(&error))?;
    match std::fs::hard_link(folder.whole_path(digest), &target) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(Commit::WasThere),
        // Another file system, or one without links, or too many of them.
        Err(_) => {
            let beside = dir.join(format!(".{COMMIT_NAME}.{}", std::process::id()));
            let copied = copy(&source, &beside).and_then(|()| {
                std::fs::hard_link(&beside, &target).or_else(|error| {
                    // Without links there is only renaming, which would replace what came since.
                    if error.kind() == io::ErrorKind::AlreadyExists || target.exists() {
                        return Ok(());
                    }
                    std::fs::rename(&beside, &target)
                })
            });
            let _ = std::fs::remove_file(&beside);
            copied.map_err(|error| named(&error))?;
        }
    }
    sync_folder(dir)?;
    Ok(Commit::Made)
}

/// Copies a file that was just opened to a new one, durably. The standard library lets the kernel
/// share the blocks where the file system can.
fn copy(source: &File, to: &Path) -> io::Result<()> {
    let _ = std::fs::remove_file(to);
    let file = File::options().write(true).create_new(true).mode(0o444).open(to)?;
    io::copy(&mut &*source, &mut &file)?;
    file.sync_all()
}
