//! Opening a layer's file without being fooled by what it is.

use crate::error::{Error, ErrorKind, Result};
use nix::fcntl::OFlag;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Opens a regular file for reading. Symbolic links are followed; anything that is not a regular
/// file in the end (a FIFO would block, a device would answer anything) is refused.
///
/// # Errors
/// `NotFound`, `InvalidFormat` for a directory, FIFO, socket or device, `Io`.
pub fn open_regular(path: &Path) -> Result<File> {
    let named = |error: &std::io::Error| Error::io(format!("open {}", path.display()), error);
    let file = OpenOptions::new()
        .read(true)
        // Non-blocking, so that opening a FIFO returns; regular files ignore it.
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path)
        .map_err(|error| named(&error))?;
    let kind = file.metadata().map_err(|error| named(&error))?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    let message = format!("open {}: found {kind:?}, expected a regular file", path.display());
    Err(Error::new(ErrorKind::InvalidFormat, message))
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
