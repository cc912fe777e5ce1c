//! A complete blob under the reference's name for it, in a folder that is not the cache's: a link
//! to the plain file, else a copy.
//!
//! A copy gets that name when it is whole. Where the file system can, it has none before, and a
//! process that dies leaves nothing. Elsewhere it has a name that nobody else can have, and a lock
//! for as long as its writer lives: what is found without one is a dead writer's, and the next copy
//! into that folder removes it.

use super::digest::BlobDigest;
use super::faults::DiskStep;
use super::store::{Folder, sync_folder};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::COMMIT_FOLDER_NAMES_MAX;
use crate::source::{FileIdentity, open_regular};
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, renameat2};
use nix::unistd::{geteuid, linkat};
use std::ffi::OsStr;
use std::fs::{File, Metadata, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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

/// How often another name is tried for a copy, when somebody else has taken it for a dead one's.
const NAME_TRIES: usize = 16;

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
    let linked = std::fs::hard_link(folder.whole_path(digest), &target);
    let commit = outcome(linked).or_else(|_| {
        // Another file system, or one without links, or too many of them.
        remove_leftovers(dir);
        copy_unnamed(&source, dir, &target).unwrap_or_else(|| copy_hidden(&source, dir, &target))
    });
    let commit = commit.map_err(|error| named(&error))?;
    if commit == Commit::Made {
        sync_folder(dir)?;
    }
    Ok(commit)
}

/// What it means that a file was given the name, or could not be.
fn outcome(given: io::Result<()>) -> io::Result<Commit> {
    match given {
        Ok(()) => Ok(Commit::Made),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Commit::WasThere),
        Err(error) => Err(error),
    }
}

/// Copies to a file that has no name until it is whole; `None` where that cannot be done.
fn copy_unnamed(source: &File, dir: &Path, target: &Path) -> Option<io::Result<Commit>> {
    let mut options = File::options();
    options.write(true).mode(0o444).custom_flags(OFlag::O_TMPFILE.bits());
    let file = options.open(dir).ok()?;
    // Without `/proc` it could not be given one later.
    path_of(&file).exists().then_some(())?;
    if let Err(error) = copy(source, &file) {
        return Some(Err(error));
    }
    outcome(link_open(&file, target)).ok().map(Ok)
}

/// Copies to a file with a name of its own, which goes in any case.
fn copy_hidden(source: &File, dir: &Path, target: &Path) -> io::Result<Commit> {
    let hidden = Hidden::create(dir)?;
    copy(source, &hidden.file)?;
    hidden.publish(target)
}

/// Copies all of a file to a new one, durably. The standard library lets the kernel share the
/// blocks where the file system can.
fn copy(mut source: &File, mut to: &File) -> io::Result<()> {
    source.rewind()?;
    let expected = source.metadata()?.len();
    let copied = io::copy(&mut source, &mut to)?;
    if copied != expected {
        let message = format!("copied {copied} bytes, expected {expected}");
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
    }
    to.sync_all()
}

fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Gives an open file a name, which must be free: this very file, whatever its names lead to.
fn link_open(file: &File, target: &Path) -> io::Result<()> {
    let flags = AtFlags::AT_SYMLINK_FOLLOW;
    Ok(linkat(AT_FDCWD, &path_of(file), AT_FDCWD, target, flags)?)
}

/// A file that is being written, locked; its name goes with this.
#[derive(Debug)]
struct Hidden {
    file: File,
    path: PathBuf,
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // Not there any more where it was renamed.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Hidden {
    fn create(dir: &Path) -> io::Result<Self> {
        for _ in 0..NAME_TRIES {
            // A new state's hash of nothing is random.
            let lot = RandomState::new().build_hasher().finish();
            let path = dir.join(format!(".{COMMIT_NAME}.{lot:016x}"));
            let made = File::options().write(true).create_new(true).mode(0o444).open(&path);
            let file = match made {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            };
            // Where there are no locks nobody else gets one, and nothing is removed.
            let is_taken = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
            if !is_taken && file.metadata()?.nlink() > 0 {
                return Ok(Self { file, path });
            }
            // Before it had its lock somebody took it for a dead one's.
        }
        Err(io::Error::other("no name for a copy stays"))
    }

    /// Gives the file its name, which must be free.
    fn publish(&self, target: &Path) -> io::Result<Commit> {
        if let Ok(commit) = outcome(link_open(&self.file, target)) {
            return Ok(commit);
        }
        // No `/proc`, or no links: by its name, if that is still this file's.
        let found = std::fs::symlink_metadata(&self.path)?;
        if identity_of(&found) != FileIdentity::of(&self.file)? {
            return Err(io::Error::other(format!("{} was replaced", self.path.display())));
        }
        if let Ok(commit) = outcome(std::fs::hard_link(&self.path, target)) {
            return Ok(commit);
        }
        let flags = RenameFlags::RENAME_NOREPLACE;
        let renamed = renameat2(AT_FDCWD, &self.path, AT_FDCWD, target, flags);
        outcome(renamed.map_err(io::Error::from)).or_else(|_| {
            // Some file systems rename only over what may have come since.
            if std::fs::symlink_metadata(target).is_ok() {
                return Ok(Commit::WasThere);
            }
            outcome(std::fs::rename(&self.path, target))
        })
    }
}

fn identity_of(metadata: &Metadata) -> FileIdentity {
    FileIdentity { device_number: metadata.dev(), inode: metadata.ino() }
}

/// Removes what writers left that were killed. What cannot be looked at or removed stays.
fn remove_leftovers(dir: &Path) {
    let Ok(listed) = std::fs::read_dir(dir) else { return };
    for entry in listed.take(COMMIT_FOLDER_NAMES_MAX).flatten() {
        if is_hidden_name(&entry.file_name()) {
            remove_if_left(&entry.path());
        }
    }
}

/// Whether [`Hidden`] makes such names.
fn is_hidden_name(name: &OsStr) -> bool {
    let name = name.to_str().and_then(|name| name.strip_prefix('.'));
    let lot = name.and_then(|name| name.strip_prefix(COMMIT_NAME)?.strip_prefix('.'));
    let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    lot.is_some_and(|lot| lot.len() == 16 && lot.bytes().all(is_digit))
}

/// Removes a file of ours that nobody has locked.
fn remove_if_left(path: &Path) {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let Ok(file) = File::options().read(true).custom_flags(flags).open(path) else { return };
    let is_ours =
        file.metadata().is_ok_and(|found| found.is_file() && found.uid() == geteuid().as_raw());
    if is_ours && file.try_lock().is_ok() && std::fs::remove_file(path).is_ok() {
        tracing::info!(path = %path.display(), "removed: left by a copy that was killed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Copying = fn(&File, &Path, &Path) -> io::Result<Commit>;

    const BOTH: [Copying; 2] =
        [|source, dir, target| copy_unnamed(source, dir, target).unwrap(), copy_hidden];

    fn names(dir: &Path) -> Vec<String> {
        let listed = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<_> =
            listed.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn layer(dir: &Path) -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..=250).cycle().take(300_000).collect();
        std::fs::write(dir.join("layer"), &bytes).unwrap();
        (File::open(dir.join("layer")).unwrap(), bytes)
    }

    #[test]
    fn either_way_a_copy_is_whole_alone_and_over_nothing() {
        let from = tempfile::tempdir().unwrap();
        let (source, bytes) = layer(from.path());
        for copying in BOTH {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join(COMMIT_NAME);
            assert_eq!(copying(&source, dir.path(), &target).unwrap(), Commit::Made);
            assert_eq!(std::fs::read(&target).unwrap(), bytes);
            assert_eq!(target.metadata().unwrap().mode() & 0o777, 0o444);
            std::fs::remove_file(&target).unwrap();
            std::fs::write(&target, b"what came first").unwrap();
            assert_eq!(copying(&source, dir.path(), &target).unwrap(), Commit::WasThere);
            assert_eq!(std::fs::read(&target).unwrap(), b"what came first");
            assert_eq!(names(dir.path()), [COMMIT_NAME]);
        }
    }

    /// Another process removed the file and had one of its own under the same name: that one, empty
    /// still, was linked.
    #[test]
    fn what_is_under_the_hidden_name_meanwhile_is_not_what_gets_the_name() {
        let from = tempfile::tempdir().unwrap();
        let (source, bytes) = layer(from.path());
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join(COMMIT_NAME);
        let hidden = Hidden::create(dir.path()).unwrap();
        copy(&source, &hidden.file).unwrap();
        // So that it can still be linked.
        std::fs::hard_link(&hidden.path, dir.path().join("other")).unwrap();
        std::fs::remove_file(&hidden.path).unwrap();
        std::fs::write(&hidden.path, b"").unwrap();
        assert_eq!(hidden.publish(&target).unwrap(), Commit::Made);
        assert_eq!(std::fs::read(&target).unwrap(), bytes);
    }

    #[test]
    fn a_copy_that_lost_its_only_name_is_an_error_and_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join(COMMIT_NAME);
        let hidden = Hidden::create(dir.path()).unwrap();
        std::fs::remove_file(&hidden.path).unwrap();
        std::fs::write(&hidden.path, b"").unwrap();
        assert!(hidden.publish(&target).is_err());
        assert!(!target.exists());
    }

    #[test]
    fn what_a_killed_copy_left_goes_and_what_a_living_one_writes_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let dead = path(".overlaybd.commit.0123456789abcdef");
        std::fs::write(&dead, b"half of one").unwrap();
        let living = Hidden::create(dir.path()).unwrap();
        let others = [
            ".overlaybd.commit.0123456789abcde",
            ".overlaybd.commit.0123456789ABCDEF",
            "overlaybd.commit.0123456789abcdef",
            "overlaybd.commit",
        ];
        for name in others {
            std::fs::write(path(name), b"somebody's").unwrap();
        }
        let link = path(".overlaybd.commit.0000000000000000");
        std::os::unix::fs::symlink(path("overlaybd.commit"), &link).unwrap();
        std::fs::create_dir(path(".overlaybd.commit.0000000000000001")).unwrap();
        remove_leftovers(dir.path());
        assert!(!dead.exists() && living.path.exists());
        assert_eq!(names(dir.path()).len(), others.len() + 3);
        let left = living.path.clone();
        drop(living);
        assert!(!left.exists());
    }
}
