//! The whole disk, flattened: into a file that has holes where the disk has zeros, or a stream.

use super::Image;
use super::reader::Reader;
use super::together::on_threads;
use crate::disk::{Disk, Worker};
use crate::error::{Error, Result};
use crate::map::Target;
use crate::units::{SECTOR_SIZE, to_usize};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the disk that a thread flattens at a time. A multiple of every block size, so that no
/// block is decoded twice.
const PIECE_BYTES: u64 = 4 << 20;

/// Zeros stored as data become holes of this size: the block of every common file system.
const HOLE_BYTES: usize = 4096;

impl Image {
    /// Writes the disk's content to `file` on all cores. With `zeros_are_there` (a new file of the
    /// right length) zeros are left out, which makes holes. `progress` counts the bytes done.
    ///
    /// # Errors
    /// The first that a thread meets: of a layer, or of the file.
    pub fn export_to_file(
        &self,
        file: &File,
        zeros_are_there: bool,
        progress: &AtomicU64,
    ) -> Result<()> {
        let next = AtomicU64::new(0);
        let work = || -> Result<()> {
            let mut reader = self.worker()?;
            let mut buffer = vec![0; to_usize(PIECE_BYTES).unwrap_or(0)];
            loop {
                let Some((start, end)) = self.next_piece(&next, zeros_are_there, progress) else {
                    return Ok(());
                };
                let stopped = self.export_piece(
                    &mut reader,
                    file,
                    zeros_are_there,
                    (start, end),
                    &mut buffer,
                );
                if stopped.is_err() {
                    // The others stop at their next piece.
                    next.store(self.virtual_bytes(), Ordering::Relaxed);
                    return stopped;
                }
                progress.fetch_add(end - start, Ordering::Relaxed);
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        on_threads(threads, work).into_iter().collect()
    }

    /// Takes the next piece of work: a hole, however large, is passed over in one step where it
    /// need not be written.
    fn next_piece(
        &self,
        next: &AtomicU64,
        zeros_are_there: bool,
        progress: &AtomicU64,
    ) -> Option<(u64, u64)> {
        let total = self.virtual_bytes();
        loop {
            let start = next.load(Ordering::Relaxed);
            if start >= total {
                return None;
            }
            let mut end = start.saturating_add(PIECE_BYTES).min(total);
            let first = self.map().extents(start / SECTOR_SIZE, u64::MAX).next()?;
            let extent_end = (first.start_sector + first.sectors) * SECTOR_SIZE;
            let skip = zeros_are_there && first.target == Target::Zero && extent_end >= end;
            if skip {
                // Down to a piece's boundary, so that no block is decoded twice.
                end =
                    if extent_end == total { total } else { extent_end - extent_end % PIECE_BYTES };
            }
            let taken = next.compare_exchange(start, end, Ordering::Relaxed, Ordering::Relaxed);
            if taken.is_err() {
                continue;
            }
            if !skip {
                return Some((start, end));
            }
            progress.fetch_add(end - start, Ordering::Relaxed);
        }
    }

    fn export_piece(
        &self,
        reader: &mut Reader,
        file: &File,
        zeros_are_there: bool,
        (start, end): (u64, u64),
        buffer: &mut [u8],
    ) -> Result<()> {
        let first = start / SECTOR_SIZE;
        let buffer = &mut buffer[..to_usize(end - start).unwrap_or(0)];
        reader.read(first, buffer)?;
        let failed = |at: u64, error: &std::io::Error| {
            Error::io(format!("write the output at byte {at}"), error)
        };
        if !zeros_are_there {
            return file.write_all_at(buffer, start).map_err(|error| failed(start, &error));
        }
        let mut at = start;
        for (zeros, part) in runs_of_zeros(buffer) {
            if !zeros {
                file.write_all_at(part, at).map_err(|error| failed(at, &error))?;
            }
            at += crate::units::to_u64(part.len());
        }
        Ok(())
    }

    /// Writes the disk's content to a stream, in order, zeros and all.
    ///
    /// # Errors
    /// Of a layer, or of the stream.
    pub fn export_to_stream(&self, out: &mut dyn Write, progress: &AtomicU64) -> Result<()> {
        let mut reader = self.worker()?;
        let mut buffer = vec![0; to_usize(PIECE_BYTES).unwrap_or(0)];
        let failed = |error: &std::io::Error| Error::io("write the output", error);
        let mut start = 0;
        while start < self.virtual_bytes() {
            let end = (start + PIECE_BYTES).min(self.virtual_bytes());
            let part = &mut buffer[..to_usize(end - start).unwrap_or(0)];
            reader.read(start / SECTOR_SIZE, part)?;
            out.write_all(part).map_err(|error| failed(&error))?;
            progress.fetch_add(end - start, Ordering::Relaxed);
            start = end;
        }
        out.flush().map_err(|error| failed(&error))
    }
}

/// Cuts `bytes` into stretches of blocks that are all zeros and stretches that are not.
fn runs_of_zeros(bytes: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    let is_zero = |block: &[u8]| block.iter().all(|&byte| byte == 0);
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let mut blocks = rest.chunks(HOLE_BYTES);
        let first = blocks.next()?;
        let zeros = is_zero(first);
        let len = first.len()
            + blocks.take_while(|block| is_zero(block) == zeros).map(<[u8]>::len).sum::<usize>();
        let (run, after) = rest.split_at(len);
        rest = after;
        Some((zeros, run))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_and_data_are_told_apart_by_block() {
        let mut bytes = vec![0; HOLE_BYTES * 5 + 100];
        bytes[HOLE_BYTES * 2] = 1;
        bytes[HOLE_BYTES * 3 + 7] = 1;
        let runs: Vec<_> = runs_of_zeros(&bytes).map(|(zeros, run)| (zeros, run.len())).collect();
        assert_eq!(
            runs,
            [(true, HOLE_BYTES * 2), (false, HOLE_BYTES * 2), (true, HOLE_BYTES + 100)]
        );
    }
}
