//! Memory that outlives the process: a small file, mapped to be written, or plain memory.
//!
//! `upper` keeps its journal here. What is stored is in the page cache the moment it is stored, so
//! a process that is killed leaves it behind; on tmpfs it is never written to a disk. The words are
//! atomic because another process may look at them. The file's space is allocated before it is
//! mapped, so that no store can fail for want of it; nobody but us may cut the file, which lies in
//! a folder of ours.
//!
//! This is one of the rooms where `unsafe` is allowed: a mapping becomes a slice of atomic words.
#![allow(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::units::{to_u64, to_usize};
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bytes of one word.
const WORD_BYTES: usize = 8;

/// A fixed number of words that several processes may see.
#[derive(Clone, Debug)]
pub struct SharedMemory {
    words: Words,
    path: Option<PathBuf>,
}

#[derive(Clone, Debug)]
enum Words {
    Mapped(Arc<MmapRaw>),
    Memory(Arc<[AtomicU64]>),
}

impl SharedMemory {
    /// Maps the file at `path`, which is made or enlarged to `words`, zeros where it was shorter.
    ///
    /// # Errors
    /// `InvalidFormat` for anything but a regular file, `NoSpace`, `Io`.
    pub fn open(path: &Path, words: usize) -> Result<Self> {
        let named = |error: &std::io::Error| Error::io(format!("map {}", path.display()), error);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits())
            .open(path)
            .map_err(|error| named(&error))?;
        if !file.metadata().map_err(|error| named(&error))?.is_file() {
            let message = format!("map {}: expected a regular file", path.display());
            return Err(Error::new(ErrorKind::InvalidFormat, message));
        }
        let bytes = words.saturating_mul(WORD_BYTES);
        let length = i64::try_from(bytes).unwrap_or(i64::MAX);
        fallocate(&file, FallocateFlags::empty(), 0, length)
            .map_err(|errno| named(&errno.into()))?;
        let map = MmapOptions::new().len(bytes).map_raw(&file).map_err(|error| named(&error))?;
        Ok(Self { words: Words::Mapped(Arc::new(map)), path: Some(path.to_owned()) })
    }

    /// A private copy of the file at `path`, if there is one that has at least `words`.
    ///
    /// # Errors
    /// `Io`.
    pub fn snapshot(path: &Path, words: usize) -> Result<Option<Self>> {
        let named = |error: &std::io::Error| Error::io(format!("read {}", path.display()), error);
        let file = match super::open_regular(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = file.metadata().map_err(|error| named(&error))?.len();
        let bytes = words.saturating_mul(WORD_BYTES);
        if to_usize(length).is_none_or(|length| length < bytes) {
            return Ok(None);
        }
        let mut copy = vec![0; bytes];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut copy, 0)
            .map_err(|error| named(&error))?;
        let (words, _) = copy.as_chunks::<WORD_BYTES>();
        let words = words.iter().map(|word| AtomicU64::new(u64::from_le_bytes(*word).to_le()));
        Ok(Some(Self { words: Words::Memory(words.collect()), path: Some(path.to_owned()) }))
    }

    /// So many words of memory that ends with its last clone: for tests.
    #[must_use]
    pub fn private(words: usize) -> Self {
        let words = (0..words).map(|_| AtomicU64::new(0)).collect();
        Self { words: Words::Memory(words), path: None }
    }

    /// The words. They hold little-endian numbers.
    #[inline]
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        match &self.words {
            Words::Memory(words) => words,
            Words::Mapped(map) => {
                // SAFETY: the mapping is `map.len()` bytes of readable and writable memory, page
                // aligned, and lives as long as the `Arc` that `self` holds. Nothing but these
                // atomic words ever refers to it, in this process or another, so that every
                // access is atomic; any bit pattern is a number.
                unsafe {
                    let first = map.as_mut_ptr().cast::<AtomicU64>();
                    std::slice::from_raw_parts(first, map.len() / WORD_BYTES)
                }
            }
        }
    }

    /// The file's path; none for private memory.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// How many words fit `bytes` of a file.
    #[must_use]
    pub fn words_in(bytes: u64) -> usize {
        to_usize(bytes / to_u64(WORD_BYTES)).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_was_stored_is_there_for_the_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        assert!(SharedMemory::snapshot(&path, 4).unwrap().is_none());
        let memory = SharedMemory::open(&path, 4).unwrap();
        memory.words()[3].store(7_u64.to_le(), Ordering::Release);
        let copy = SharedMemory::snapshot(&path, 4).unwrap().unwrap();
        assert_eq!(copy.words()[3].load(Ordering::Acquire), 7_u64.to_le());
        drop(memory);
        let again = SharedMemory::open(&path, 8).unwrap();
        assert_eq!(again.words().len(), 8);
        assert_eq!(again.words()[3].load(Ordering::Acquire), 7_u64.to_le());
        assert!(SharedMemory::snapshot(&path, 9).unwrap().is_none(), "it is shorter");
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        std::fs::write(&target, b"x").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(SharedMemory::open(&link, 4).is_err());
        assert_eq!(std::fs::read(&target).unwrap(), b"x");
    }
}
