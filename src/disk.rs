//! The request seam: what a front end (ublk, NBD) asks of a disk, and nothing about how.
//!
//! A front end owns threads and buffers; a [`Disk`] hands each of its threads one [`Worker`] with
//! that thread's scratch memory, so that a read that hits takes no lock and allocates nothing.
//!
//! A disk that can be written has a volatile cache: a write that returned survives the death of
//! this process, and only a flush makes it survive that of the machine. Flushing is the disk's and
//! not a worker's, because it concerns what all of them wrote.

use crate::error::{Error, ErrorKind, Result};
use crate::waiting;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a front end must know before it can announce the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the virtual disk in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether changes are refused. A read-only disk has no volatile cache; another one has.
    pub read_only: bool,
    /// The read size in bytes that costs least per byte (the largest compression block), a power
    /// of two of at least 4096.
    pub optimal_io_bytes: u32,
    /// The unit in bytes, whole sectors, in which the disk gives space back that nobody needs any
    /// more; `None` where it never does, so that nobody is told to discard. Only a wish: any
    /// sectors may be discarded, and all of them read as zeros then.
    pub discard_granularity_bytes: Option<u32>,
}

/// What becomes of the space that zeroed sectors had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// It may be given back: a discard, or zeros that may be a hole.
    Free,
    /// It stays, or is taken now: a later write to these sectors should not run out of space.
    Keep,
}

/// A virtual disk that any number of threads read and, unless it is read-only, change.
///
/// Requests that overlap while they are in flight may take effect in any order, but one sector is
/// never a mixture of two. What a front end does not do: call with no sectors at all.
pub trait Disk: Send + Sync + 'static {
    /// The per-thread reader and writer.
    type Worker: Worker;

    /// Size and abilities; constant for the life of the disk.
    fn geometry(&self) -> Geometry;

    /// A worker for the calling thread. Takes all memory that its requests will need.
    ///
    /// # Errors
    /// When memory or a codec context cannot be had.
    fn worker(&self) -> Result<Self::Worker>;

    /// Makes durable, on every worker's behalf, what [`Worker::write`] and
    /// [`Worker::write_zeroes`] had done when this was called: all calls that had returned by then,
    /// whether or not their requests are answered yet. Blocks until it is so. May be called by any
    /// thread, and by several at a time, while workers go on. Nothing to do on a read-only disk.
    ///
    /// # Errors
    /// What the layers below say; then none of it may be taken for durable, and a disk that cannot
    /// tell what was lost must go on failing.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Whether reads may have to wait for bytes from elsewhere, so that a front end should ask
    /// [`Worker::would_wait`] first; constant for the life of the disk.
    fn may_wait(&self) -> bool {
        false
    }

    /// Makes all reads that wait for bytes from elsewhere fail soon, those to come included: the
    /// disk is about to go away. Called by any thread, at any time.
    fn cancel(&self) {}
}

/// One thread's way to the disk's bytes.
///
/// Every error's `errno` is what the kernel or the client is told.
pub trait Worker {
    /// Fills `dst` (whole sectors) with the disk's content from `start_sector` on. Blocks until
    /// the bytes are there. On an error the content of `dst` is unspecified.
    ///
    /// # Errors
    /// `OutOfRange` beyond the end of the disk; otherwise what the layers below say.
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()>;

    /// Whether [`Worker::read`] of these sectors would wait for bytes from elsewhere: no I/O, and
    /// only a hint. Never called where [`Disk::may_wait`] says no.
    fn would_wait(&mut self, sectors: Range<u64>) -> bool {
        let _ = sectors;
        false
    }

    /// Puts `src` (whole sectors) at `start_sector`. When this returns, every worker reads it, and
    /// it survives the death of this process; see [`Disk::flush`] for more. Blocks until then. On
    /// an error each of the sectors has its old or its new content.
    ///
    /// # Errors
    /// `ReadOnly` on a disk that cannot be written, `OutOfRange` beyond the end of the disk,
    /// `NoSpace` when there is none; otherwise what the layers below say.
    fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        let _ = src;
        Err(read_only(start_sector))
    }

    /// Makes `sectors`, at most [`ZEROES_SECTORS_MAX`](crate::limits::ZEROES_SECTORS_MAX) of them,
    /// read as zeros whatever lies below. As durable as a write, and blocks like one.
    ///
    /// # Errors
    /// As [`Worker::write`].
    fn write_zeroes(&mut self, sectors: Range<u64>, space: Space) -> Result<()> {
        let _ = space;
        Err(read_only(sectors.start))
    }
}

fn read_only(start_sector: u64) -> Error {
    Error::new(ErrorKind::ReadOnly, format!("sector {start_sector} is of a read-only disk"))
}

/// A worker that is replaced when it panics: what a panic leaves behind is not used again, and the
/// request that met it fails like any other.
pub(crate) struct Guarded<'a, D: Disk> {
    disk: &'a D,
    /// `None` after a panic, until a new worker can be had.
    worker: Option<D::Worker>,
    panics: u64,
}

impl<'a, D: Disk> Guarded<'a, D> {
    /// A worker, made at once.
    pub(crate) fn new(disk: &'a D) -> Result<Self> {
        Ok(Self { disk, worker: Some(new_worker(disk)?), panics: 0 })
    }

    /// Requests that failed because the worker panicked.
    // NBD counts all failures alike.
    #[cfg_attr(not(feature = "ublk"), allow(dead_code))]
    pub(crate) fn panics(&self) -> u64 {
        self.panics
    }

    /// See [`Worker::read`].
    pub(crate) fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        self.run("read", |worker| worker.read(start_sector, dst))
    }

    /// See [`Worker::would_wait`]; a worker that panics is asked no more.
    #[cfg_attr(not(feature = "ublk"), allow(dead_code))]
    pub(crate) fn would_wait(&mut self, sectors: Range<u64>) -> bool {
        let mut waits = false;
        let asked = self.run("look", |worker| {
            waits = worker.would_wait(sectors);
            Ok(())
        });
        asked.is_ok() && waits
    }

    /// See [`Worker::write`].
    pub(crate) fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        self.run("write", |worker| worker.write(start_sector, src))
    }

    /// See [`Worker::write_zeroes`].
    pub(crate) fn write_zeroes(&mut self, sectors: Range<u64>, space: Space) -> Result<()> {
        self.run("write of zeros", |worker| worker.write_zeroes(sectors, space))
    }

    fn run(&mut self, what: &str, act: impl FnOnce(&mut D::Worker) -> Result<()>) -> Result<()> {
        let worker = match &mut self.worker {
            Some(worker) => worker,
            none => none.insert(new_worker(self.disk)?),
        };
        // All that it waits for comes out of one time.
        let _request = waiting::Request::begin();
        match catch_unwind(AssertUnwindSafe(|| act(worker))) {
            Ok(outcome) => outcome,
            Err(panic) => {
                self.panics += 1;
                self.worker = None;
                Err(panicked(what, panic.as_ref()))
            }
        }
    }
}

/// See [`Disk::flush`]; a panic is an error like any other.
pub(crate) fn flush<D: Disk>(disk: &D) -> Result<()> {
    catch_unwind(AssertUnwindSafe(|| disk.flush()))
        .unwrap_or_else(|panic| Err(panicked("flush", panic.as_ref())))
        .map_err(|error| error.context("flush the disk"))
}

fn new_worker<D: Disk>(disk: &D) -> Result<D::Worker> {
    let made = catch_unwind(AssertUnwindSafe(|| disk.worker()));
    made.unwrap_or_else(|panic| Err(panicked("reader's start", panic.as_ref())))
        .map_err(|error| error.context("prepare a reader"))
}

/// The error for a panic, with its message where it has one.
fn panicked(what: &str, panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    Error::new(ErrorKind::Io, format!("bug: the {what} panicked: {text}"))
}
