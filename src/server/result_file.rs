//! The `resultFile` of a config: `success`, or `failed:` and the reason.
//!
//! The snapshotter makes the file before it attaches and reads it afterwards, so it is written in
//! place, never replaced. The content is exact: no newline, no space after the colon.

use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An open result file. It stays usable when mounts go away between opening and writing.
#[derive(Debug)]
pub(super) struct ResultFile {
    file: File,
    path: PathBuf,
}

impl ResultFile {
    /// Opens or makes the file; what it holds stays until something is written.
    ///
    /// # Errors
    /// What the operating system says. A FIFO without a reader is refused, not waited for.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|error| Error::io(format!("open resultFile {}", path.display()), &error))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Says that the device can be used.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn succeeded(&self) -> Result<()> {
        self.replace("success")
    }

    /// Says why there is no device, in one line.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn failed(&self, reason: &Error) -> Result<()> {
        self.replace(&format!("failed:{}", one_line(&format!("{reason:#}"))))
    }

    fn replace(&self, text: &str) -> Result<()> {
        self.try_replace(text)
            .map_err(|error| Error::io(format!("write resultFile {}", self.path.display()), &error))
    }

    fn try_replace(&self, text: &str) -> std::io::Result<()> {
        // Devices (`/dev/null`) have no length to set.
        if self.file.metadata()?.is_file() {
            self.file.set_len(0)?;
            return std::os::unix::fs::FileExt::write_all_at(&self.file, text.as_bytes(), 0);
        }
        (&self.file).write_all(text.as_bytes())
    }
}

fn one_line(text: &str) -> String {
    text.split(['\n', '\r'])
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn the_content_is_exact_and_replaces_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("init-debug.log");
        std::fs::write(&path, "something much longer than what follows").unwrap();
        let file = ResultFile::open(&path).unwrap();
        let content = || std::fs::read_to_string(&path).unwrap();
        assert_eq!(content(), "something much longer than what follows");
        file.succeeded().unwrap();
        assert_eq!(content(), "success");
        let reason = Error::new(ErrorKind::NotFound, "no such\n file\n").context("open layer 2");
        file.failed(&reason).unwrap();
        assert_eq!(content(), "failed:open layer 2: no such file");
        file.succeeded().unwrap();
        assert_eq!(content(), "success");
    }

    #[test]
    fn a_result_file_that_is_no_file_does_not_hang() {
        ResultFile::open(Path::new("/dev/null")).unwrap().succeeded().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(ResultFile::open(&fifo).unwrap_err().errno(), libc::ENXIO);
        assert!(ResultFile::open(folder.path()).is_err());
    }
}
