//! A larger disk: of a pair that nobody has open, or of one that is served while its writers wait.
//!
//! Both headers say how large it is, and the index file's counts, here and in the reference. So the
//! data file's is written first, in place, where it changes nothing; then a new index file with a
//! header that says the new size takes the old one's name, by the one rename that every rewrite of
//! a log is. A power cut in front of it leaves the old disk, one behind it the new. Nothing reads
//! the data file's number, so even a torn one does no harm, and the next resize mends it.

use super::{Pair, PairOptions, PairPaths, lock, read};
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::set_virtual_size;
use crate::limits::VIRTUAL_SECTORS_MAX;
use crate::units::{SECTOR_SIZE, bytes_to_sectors, sectors_to_bytes, to_usize, whole_sectors};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Grows the pair at `paths`, which nobody writes, to a disk of `virtual_bytes`, and leaves it
/// closed; the size that it had. The size that it has already is none too few. Blocks on the disk.
///
/// # Errors
/// As [`Pair::open`] and [`Pair::resize`].
pub fn resize(paths: &PairPaths, options: &PairOptions, virtual_bytes: u64) -> Result<u64> {
    Pair::open(paths, options)?.resize(virtual_bytes)
}

impl Pair {
    /// Grows the disk to `virtual_bytes` and closes the pair; the size that it had. Nobody else
    /// may have it.
    ///
    /// # Errors
    /// `Usage` for a size that is no disk's or too small, `Busy` when somebody has the pair,
    /// `Unsupported` when it takes its size from the layers below it, `NoSpace`, `Io`. Its size is
    /// as it was then.
    pub fn resize(self: Arc<Self>, virtual_bytes: u64) -> Result<u64> {
        let name = self.name.clone();
        let pair = Arc::into_inner(self).ok_or_else(|| {
            Error::new(ErrorKind::Busy, format!("{name}: somebody still reads or writes it"))
        })?;
        let resized = pair.grow(virtual_bytes);
        let closed = pair.close();
        resized.and_then(|before| closed.map(|()| before))
    }

    /// Grows the disk to `virtual_bytes`; the size that it had. Nobody may write meanwhile. Reads
    /// go on, and those behind the old end find what lies below, or zeros. Blocks on the disk: a
    /// flush, and a new index file.
    ///
    /// # Errors
    /// As [`Pair::resize`]; after a failure that leaves unknown what would last, as any write.
    pub fn grow(&self, virtual_bytes: u64) -> Result<u64> {
        self.check_writable()?;
        let before = sectors_to_bytes(self.virtual_sectors()).unwrap_or(u64::MAX);
        self.check_size(before, virtual_bytes)?;
        if virtual_bytes > before {
            self.write_size(virtual_bytes)?;
            self.virtual_sectors.store(whole_sectors(virtual_bytes), Ordering::Release);
        }
        Ok(before)
    }

    fn check_size(&self, found: u64, virtual_bytes: u64) -> Result<()> {
        if self.head.virtual_size_bytes == 0 {
            let message = format!("{}: the pair has the size of the layers below it", self.name);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let usage = |message: String| Err(Error::new(ErrorKind::Usage, message));
        let sectors = bytes_to_sectors(virtual_bytes);
        if sectors.is_none_or(|sectors| sectors > VIRTUAL_SECTORS_MAX) {
            return usage(format!("a disk of {virtual_bytes} bytes: expected whole sectors"));
        }
        if virtual_bytes < found {
            let message = "bytes: the disk has more, and what lies behind would be cut off";
            return usage(format!("{virtual_bytes} {message} ({found} bytes)"));
        }
        Ok(())
    }

    fn write_size(&self, virtual_bytes: u64) -> Result<()> {
        self.flush()?;
        let mut log = lock(&self.log);
        let live: Vec<_> = read(&self.state).map.pieces().collect();
        // One sector, so that a disk writes all of it or nothing.
        let mut sector = vec![0; to_usize(SECTOR_SIZE).unwrap_or(0)];
        let told =
            |error: std::io::Error| Error::io(format!("write the header of {}", self.name), &error);
        self.data.read_at(0, &mut sector).map_err(told)?;
        set_virtual_size(&mut sector, virtual_bytes);
        self.data.write_at(0, &sector).map_err(told)?;
        self.data.sync_data().map_err(|error| self.lost(told(error)))?;
        log.replace(&live, Some(virtual_bytes), &self.journal, &self.name).map_err(|failure| {
            if failure.may_be_lost { self.lost(failure.error) } else { failure.error }
        })
    }
}
