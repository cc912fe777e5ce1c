//! What the engine asks of the files that it writes, and the real ones.
//!
//! The seam is here so that a test can record every operation and cut the power between any two.
//! Metadata (sizes, names) and data are separate operations because file systems keep them apart.

use super::open::INTENT_SUFFIX;
use crate::error::{Error, ErrorKind, Result};
use crate::source::Place;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

/// What is left of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystemRoom {
    /// Bytes that this process may still take.
    pub available_bytes: u64,
    /// Bytes of all of it.
    pub total_bytes: u64,
}

/// A file that can be read and written at any place by any number of threads.
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// Fills `dst` from `at_byte` on.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end; what the operating system says.
    fn read_at(&self, at_byte: u64, dst: &mut [u8]) -> io::Result<()>;

    /// Writes all of `src` at `at_byte`, and lengthens the file where needed.
    ///
    /// # Errors
    /// What the operating system says; part of it may be written then.
    fn write_at(&self, at_byte: u64, src: &[u8]) -> io::Result<()>;

    /// Cuts the file, or lengthens it with zeros.
    ///
    /// # Errors
    /// What the operating system says.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Makes durable what was written, and the size that reading it back needs.
    ///
    /// # Errors
    /// What the operating system says. What of it is durable is unknown then, for ever.
    fn sync_data(&self) -> io::Result<()>;

    /// The length.
    ///
    /// # Errors
    /// What the operating system says.
    fn len_bytes(&self) -> io::Result<u64>;

    /// What is left of the file system that the file lies on; `None` where there is none.
    ///
    /// # Errors
    /// What the operating system says.
    fn room(&self) -> io::Result<Option<FileSystemRoom>> {
        Ok(None)
    }

    /// The real file, if it is one: what is handed to another process.
    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// Where an index file lies: how another takes its place.
pub trait Folder: Send + Sync + std::fmt::Debug {
    /// Makes an empty file beside the index, over what an interrupted attempt left.
    ///
    /// # Errors
    /// What the operating system says.
    fn create_beside(&self) -> io::Result<Box<dyn Storage>>;

    /// Gives the file made last the name of the index.
    ///
    /// # Errors
    /// What the operating system says.
    fn replace_index(&self) -> io::Result<()>;

    /// Removes the file beside, if it is there.
    ///
    /// # Errors
    /// What the operating system says.
    fn remove_beside(&self) -> io::Result<()>;

    /// Makes the names durable.
    ///
    /// # Errors
    /// What the operating system says.
    fn sync(&self) -> io::Result<()>;
}

impl Storage for File {
    fn as_file(&self) -> Option<&File> {
        Some(self)
    }

    fn room(&self) -> io::Result<Option<FileSystemRoom>> {
        let found = nix::sys::statvfs::fstatvfs(self)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.fragment_size());
        Ok(Some(FileSystemRoom {
            available_bytes: bytes(found.blocks_available()),
            total_bytes: bytes(found.blocks()),
        }))
    }

    fn read_at(&self, at_byte: u64, dst: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(dst, at_byte)
    }

    fn write_at(&self, at_byte: u64, src: &[u8]) -> io::Result<()> {
        self.write_all_at(src, at_byte)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        File::set_len(self, bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.metadata().map(|metadata| metadata.len())
    }
}

/// The folder of an index file, held open.
#[derive(Debug)]
pub(super) struct IndexFolder {
    index: Place,
    beside: Place,
    mode: u32,
}

impl IndexFolder {
    /// The folder of the file `index` at `path`. What replaces it may be opened by whoever may open
    /// it. Not through links: the file is replaced where it lies.
    pub(super) fn of(path: &Path, index: &File) -> Result<Self> {
        let place = Place::of_file(path)?;
        let metadata = index
            .metadata()
            .map_err(|error| Error::io(format!("stat {}", path.display()), &error))?;
        let beside = place.beside(".rewrite")?;
        Ok(Self { index: place, beside, mode: metadata.permissions().mode() & 0o777 })
    }

    /// Refuses a pair whose snapshot was interrupted: whether it is still a pair, only who ends the
    /// snapshot finds out.
    pub(super) fn check_no_intent(&self) -> Result<()> {
        let place = self.index.beside(INTENT_SUFFIX)?;
        let shown = place.path().display();
        let told = |error| Error::io(format!("look for {shown}"), &error);
        if place.identity().map_err(told)?.is_none() {
            return Ok(());
        }
        let message = format!("{shown} tells of a snapshot that is under way or was interrupted");
        Err(Error::new(ErrorKind::Busy, message))
    }
}

impl Folder for IndexFolder {
    fn create_beside(&self) -> io::Result<Box<dyn Storage>> {
        self.remove_beside()?;
        Ok(Box::new(self.beside.create_new(self.mode)?))
    }

    fn replace_index(&self) -> io::Result<()> {
        self.beside.rename_over(&self.index)
    }

    fn remove_beside(&self) -> io::Result<()> {
        self.beside.remove()
    }

    fn sync(&self) -> io::Result<()> {
        self.index.sync()
    }
}

/// Makes the names in the folder of `path` durable.
pub(super) fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}
