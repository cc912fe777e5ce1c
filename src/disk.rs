//! The request seam: what a front end (ublk today) asks of a disk, and nothing about how.
//!
//! A front end owns threads and buffers; a [`Disk`] hands each of its threads one [`Worker`] with
//! that thread's scratch memory, so that a read that hits takes no lock and allocates nothing.

use crate::error::Result;

/// What a front end must know before it can announce the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the virtual disk in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether writes are refused. A read-only disk has no volatile cache either.
    pub read_only: bool,
    /// The read size in bytes that costs least per byte (the largest compression block), a power
    /// of two of at least 4096.
    pub optimal_io_bytes: u32,
}

/// A virtual disk that any number of threads read.
pub trait Disk: Send + Sync + 'static {
    /// The per-thread reader.
    type Worker: Worker;

    /// Size and abilities; constant for the life of the disk.
    fn geometry(&self) -> Geometry;

    /// A reader for the calling thread. Takes all memory that reads will need.
    ///
    /// # Errors
    /// When memory or a codec context cannot be had.
    fn worker(&self) -> Result<Self::Worker>;
}

/// One thread's way to the disk's bytes.
pub trait Worker {
    /// Fills `dst` (whole sectors) with the disk's content from `start_sector` on. Blocks until
    /// the bytes are there. On an error the content of `dst` is unspecified.
    ///
    /// # Errors
    /// `OutOfRange` beyond the end of the disk; otherwise what the layers below say. The error's
    /// `errno` is what the kernel is told.
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()>;
}
