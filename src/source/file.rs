//! Opening a layer's file without being fooled by what it is.

use crate::error::{Error, ErrorKind, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Opens a regular file for reading. Symbolic links are followed; anything that is not a regular
/// file in the end (a FIFO would block, a device would answer anything) is refused.
///
/// # Errors
/// `NotFound`, `InvalidFormat` for a directory, FIFO, socket or device, `Io`.
pub fn open_regular(path: &Path) -> Result<File> {
    open_checked(path, OpenOptions::new().read(true), "")
}

/// As [`open_regular`], for reading and writing.
///
/// # Errors
/// As there.
pub fn open_regular_for_writing(path: &Path) -> Result<File> {
    open_checked(path, OpenOptions::new().read(true).write(true), " for writing")
}

fn open_checked(path: &Path, options: &mut OpenOptions, purpose: &str) -> Result<File> {
    let action = || format!("open {}{purpose}", path.display());
    let named = |error: &std::io::Error| Error::io(action(), error);
    let file = options
        // Non-blocking, so that opening a FIFO returns; regular files ignore it.
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path)
        .map_err(|error| named(&error))?;
    let kind = file.metadata().map_err(|error| named(&error))?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    let message = format!("{}: found {kind:?}, expected a regular file", action());
    Err(Error::new(ErrorKind::InvalidFormat, message))
}

/// What tells a file from every other while it is open, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// The device that its file system lies on.
    pub device_number: u64,
    /// Its number there.
    pub inode: u64,
}

impl FileIdentity {
    /// The identity of an open file.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn of(file: &File) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { device_number: metadata.dev(), inode: metadata.ino() })
    }
}

/// Takes over a descriptor that another process opened. `path` is for messages, and need not lead
/// anywhere any more.
///
/// # Errors
/// `InvalidFormat` for anything but a regular file that can be read, `Corrupt` for another file
/// than the expected one, `Io`.
pub(super) fn adopt_regular(path: &Path, fd: OwnedFd, expected: FileIdentity) -> Result<File> {
    let action = || format!("take over {}", path.display());
    let named = |error: &std::io::Error| Error::io(action(), error);
    let file = File::from(fd);
    let kind = file.metadata().map_err(|error| named(&error))?.file_type();
    if !kind.is_file() {
        let message = format!("{}: found {kind:?}, expected a regular file", action());
        return Err(Error::new(ErrorKind::InvalidFormat, message));
    }
    let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|errno| named(&errno.into()))?;
    let flags = OFlag::from_bits_retain(flags);
    if flags & OFlag::O_ACCMODE == OFlag::O_WRONLY || flags.contains(OFlag::O_PATH) {
        let message = format!("{}: found flags {flags:?}, expected to read it", action());
        return Err(Error::new(ErrorKind::InvalidFormat, message));
    }
    let found = FileIdentity::of(&file).map_err(|error| named(&error))?;
    if found != expected {
        let message = format!("{}: found {found:?}, expected {expected:?}", action());
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    Ok(file)
}

/// Whether two paths lead to the same file. False when one of them leads nowhere.
#[must_use]
pub fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    identity(one).is_some_and(|identity_of_one| Some(identity_of_one) == identity(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_a_fifo_does_not_block() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [fifo.as_path(), folder.path(), Path::new("/dev/null")] {
            assert_eq!(
                open_regular(path).unwrap_err().kind(),
                ErrorKind::InvalidFormat,
                "{path:?}"
            );
        }
        let missing = folder.path().join("missing");
        assert_eq!(open_regular(&missing).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
