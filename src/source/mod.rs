//! Where bytes come from: a layer's file, mapped into memory, a blob that lies elsewhere, or bytes
//! that a test made.
//!
//! A [`Source`] answers one question: "these bytes, at this offset". It knows nothing of formats.
//! Reads that hit resident pages take no system call and no lock. Nothing here is ever handed out
//! as a slice: bytes are copied first and judged after, so that what a checksum covered is what a
//! decoder sees, even while somebody rewrites the file.

mod file;
mod holes;
mod mmap;
mod place;
mod remote;
mod shared_memory;

pub use file::{FileIdentity, is_same_file, open_regular, open_regular_for_writing};
pub use holes::{data_extents, data_extents_of};
pub use mmap::MappedFile;
pub use place::Place;
pub(crate) use remote::too_short;
pub use remote::{Fetch, FetchUsage, RemoteBlob, RemoteUsage, distinct, usage_of};
pub use shared_memory::SharedMemory;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{to_u64, to_usize};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Bytes with a length, readable at any offset by any number of threads.
#[derive(Clone)]
pub enum Source {
    /// A local file.
    Mapped(Arc<MappedFile>),
    /// Bytes in memory: tests, fuzzing, examples.
    Memory(Arc<[u8]>),
    /// A blob that lies elsewhere.
    Remote(Arc<dyn RemoteBlob>),
}

impl Source {
    /// Opens and maps a regular file for reading.
    ///
    /// # Errors
    /// `NotFound`, `InvalidFormat` for anything but a regular file, `Io`.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self::Mapped(Arc::new(MappedFile::open(path)?)))
    }

    /// Length in bytes, as it was when the source was opened.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Mapped(file) => file.bytes(),
            Self::Memory(bytes) => to_u64(bytes.len()),
            Self::Remote(blob) => blob.bytes(),
        }
    }

    /// Fills `dst` from `offset_bytes` on. May block on the disk that holds the file.
    ///
    /// # Errors
    /// `OutOfRange` beyond the end; `Io` when the file was truncated or its disk fails; what keeps
    /// a blob from being fetched.
    #[inline]
    pub fn read(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        let end = offset_bytes.checked_add(to_u64(dst.len()));
        if end.is_none_or(|end| end > self.bytes()) {
            return Err(self.beyond_the_end(offset_bytes, dst.len()));
        }
        match self {
            Self::Mapped(file) => file.read(offset_bytes, dst),
            Self::Memory(bytes) => {
                let start = to_usize(offset_bytes).unwrap_or(usize::MAX);
                match bytes.get(start..).and_then(|rest| rest.get(..dst.len())) {
                    Some(found) => dst.copy_from_slice(found),
                    None => return Err(self.beyond_the_end(offset_bytes, dst.len())),
                }
                Ok(())
            }
            Self::Remote(blob) => blob.read(offset_bytes, dst),
        }
    }

    /// As [`Source::read`] for bytes whose checksum the caller compares before it believes them:
    /// cheaper, and what a truncation took away may read as zeros.
    ///
    /// # Errors
    /// As [`Source::read`].
    #[inline]
    pub fn read_vouched(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        let end = offset_bytes.checked_add(to_u64(dst.len()));
        match self {
            Self::Mapped(file) if end.is_some_and(|end| end <= file.bytes()) => {
                file.read_vouched(offset_bytes, dst)
            }
            _ => self.read(offset_bytes, dst),
        }
    }

    #[cold]
    fn beyond_the_end(&self, offset_bytes: u64, len: usize) -> Error {
        let have = self.bytes();
        Error::new(
            ErrorKind::OutOfRange,
            format!("read {len} bytes at byte {offset_bytes}: the file has only {have} bytes"),
        )
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mapped(file) => file.fmt(f),
            Self::Memory(bytes) => write!(f, "Memory({} bytes)", bytes.len()),
            Self::Remote(blob) => write!(f, "{}", blob.name()),
        }
    }
}
