//! Where the bytes go: the seam at which tests let a disk fill up.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Something that can be written at any place by any number of threads.
pub trait Sink: Sync {
    /// Writes all of `bytes` at `at_byte`.
    ///
    /// # Errors
    /// What the operating system says.
    fn write_at(&self, at_byte: u64, bytes: &[u8]) -> io::Result<()>;

    /// Empties it, to begin again.
    ///
    /// # Errors
    /// What the operating system says.
    fn clear(&self) -> io::Result<()>;
}

/// Keeps nothing: to see what would be written.
pub(super) struct Nowhere;

impl Sink for Nowhere {
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn clear(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for File {
    fn write_at(&self, at_byte: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, at_byte)
    }

    fn clear(&self) -> io::Result<()> {
        // A device has no length; what it holds is written over.
        if self.metadata()?.is_file() { self.set_len(0) } else { Ok(()) }
    }
}
