//! A writable disk in memory, for the null target and for tests: what the front ends do with
//! writes can be seen without an image. It begins as zeros and has no space that can run out.

use obd_ublk::disk::{Disk, Geometry, Space, Worker};
use obd_ublk::error::{Error, ErrorKind, Result};
use obd_ublk::units::{SECTOR_SIZE, to_u64};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of a piece, which has a lock and memory of its own.
const PIECE_BYTES: usize = 64 * 1024;

/// The content of a piece; `None` for zeros.
type Piece = Mutex<Option<Box<[u8]>>>;

/// The disk.
#[derive(Debug)]
pub(crate) struct RamDisk {
    sectors: u64,
    pieces: Arc<[Piece]>,
    /// How long a flush takes.
    flush_time: Duration,
    flushes: AtomicU64,
}

impl RamDisk {
    /// A disk of `sectors` sectors.
    pub(crate) fn new(sectors: u64, flush_time: Duration) -> Self {
        let count = (sectors * SECTOR_SIZE).div_ceil(to_u64(PIECE_BYTES));
        let pieces = (0..count).map(|_| Mutex::new(None)).collect();
        Self { sectors, pieces, flush_time, flushes: AtomicU64::new(0) }
    }

    /// How often the disk was flushed.
    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }
}

impl Disk for RamDisk {
    type Worker = RamWorker;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.sectors,
            read_only: false,
            optimal_io_bytes: 65536,
            discard_granularity_bytes: Some(4096),
        }
    }

    fn worker(&self) -> Result<RamWorker> {
        Ok(RamWorker { sectors: self.sectors, pieces: Arc::clone(&self.pieces) })
    }

    fn flush(&self) -> Result<()> {
        std::thread::sleep(self.flush_time);
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// One thread's way to the disk.
#[derive(Debug)]
pub(crate) struct RamWorker {
    sectors: u64,
    pieces: Arc<[Piece]>,
}

impl RamWorker {
    /// Calls `act` for each piece that `len_bytes` from `start_sector` on touch, with the part of
    /// the piece and the part of the request.
    fn each(
        &self,
        start_sector: u64,
        len_bytes: u64,
        mut act: impl FnMut(&Piece, Range<usize>, Range<usize>),
    ) -> Result<()> {
        let sectors = len_bytes / SECTOR_SIZE;
        let end_sector = start_sector.checked_add(sectors).filter(|end| *end <= self.sectors);
        if end_sector.is_none() || sectors == 0 || !len_bytes.is_multiple_of(SECTOR_SIZE) {
            let message = format!("{len_bytes} bytes from sector {start_sector}");
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let (mut at, mut done) = (start_sector * SECTOR_SIZE, 0);
        while done < len_bytes {
            let (piece, skip) = (at / to_u64(PIECE_BYTES), at % to_u64(PIECE_BYTES));
            let part = (to_u64(PIECE_BYTES) - skip).min(len_bytes - done);
            let inside = size(skip)..size(skip + part);
            act(&self.pieces[size(piece)], inside, size(done)..size(done + part));
            (at, done) = (at + part, done + part);
        }
        Ok(())
    }
}

impl Worker for RamWorker {
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        self.each(start_sector, to_u64(dst.len()), |piece, inside, outside| {
            match &*piece.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(bytes) => dst[outside].copy_from_slice(&bytes[inside]),
                None => dst[outside].fill(0),
            }
        })
    }

    fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        self.each(start_sector, to_u64(src.len()), |piece, inside, outside| {
            let mut piece = piece.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = piece.get_or_insert_with(|| vec![0; PIECE_BYTES].into_boxed_slice());
            bytes[inside].copy_from_slice(&src[outside]);
        })
    }

    fn write_zeroes(&mut self, sectors: Range<u64>, space: Space) -> Result<()> {
        let len_bytes = (sectors.end - sectors.start) * SECTOR_SIZE;
        self.each(sectors.start, len_bytes, |piece, inside, _| {
            let mut piece = piece.lock().unwrap_or_else(PoisonError::into_inner);
            match &mut *piece {
                None => {}
                Some(_) if inside == (0..PIECE_BYTES) && space == Space::Free => *piece = None,
                Some(bytes) => bytes[inside].fill(0),
            }
        })
    }
}
