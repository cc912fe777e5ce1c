//! One queue's answers: a request in, an `i32` out, whatever the reader does.
//!
//! Knows nothing of rings and devices, so that all of it is tested without a kernel.

use super::request::{self, Bounds, Descriptor, Request};
use super::stats::{DeviceCounters, QueueCounters};
use crate::disk::{Disk, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::units::to_u64;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Reads for one queue.
pub(super) struct Server<'a, D: Disk> {
    disk: &'a D,
    /// `None` after a panic, until a new reader can be had.
    worker: Option<D::Worker>,
    bounds: Bounds,
    counters: &'a QueueCounters,
    device_counters: &'a DeviceCounters,
    device_id: u32,
    queue_index: u16,
}

impl<'a, D: Disk> Server<'a, D> {
    /// The server for one queue of one device, with all memory that reads will need.
    pub(super) fn new(
        disk: &'a D,
        bounds: Bounds,
        device_counters: &'a DeviceCounters,
        (device_id, queue_index): (u32, u16),
    ) -> Result<Self> {
        let Some(counters) = device_counters.queue(queue_index) else {
            let message = format!("queue {queue_index} was not asked for");
            return Err(Error::new(ErrorKind::Kernel, message));
        };
        let worker = Some(new_worker(disk)?);
        Ok(Self { disk, worker, bounds, counters, device_counters, device_id, queue_index })
    }

    /// Counts one `io_uring_enter`.
    pub(super) fn entered(&self) {
        self.counters.enters.add(1);
    }

    /// Serves one request: its data is in `buffer` when this returns the answer.
    pub(super) fn answer(&mut self, descriptor: Descriptor, buffer: &mut [u8]) -> i32 {
        self.counters.requests.add(1);
        match request::decode(descriptor, self.bounds) {
            Ok(Request::Read { start_sector, len_bytes }) => match buffer.get_mut(..len_bytes) {
                Some(dst) => self.read(start_sector, dst),
                None => self.refuse(descriptor, libc::EINVAL),
            },
            Ok(Request::Flush) => 0,
            Err(errno) => self.refuse(descriptor, errno),
        }
    }

    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> i32 {
        match self.try_read(start_sector, dst) {
            Ok(()) => {
                self.counters.read_bytes.add(to_u64(dst.len()));
                request::done(dst.len())
            }
            Err(error) => {
                let sectors = dst.len() >> crate::units::SECTOR_SHIFT;
                let range = format!("read {sectors} sectors from sector {start_sector}");
                let error = error.context(range);
                self.complain(&error);
                request::failed(&error)
            }
        }
    }

    /// Reads; a panic of the reader is an error like any other.
    fn try_read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        let worker = match &mut self.worker {
            Some(worker) => worker,
            none => none.insert(new_worker(self.disk)?),
        };
        // What a panicking reader leaves behind is not used again: the reader is replaced, and
        // the buffer's content is not handed out.
        match catch_unwind(AssertUnwindSafe(|| worker.read(start_sector, dst))) {
            Ok(outcome) => outcome,
            Err(panic) => {
                self.counters.panics.add(1);
                self.worker = None;
                Err(panicked("read", panic.as_ref()))
            }
        }
    }

    fn refuse(&self, descriptor: Descriptor, errno: i32) -> i32 {
        let Descriptor { op_flags, sector_count, start_sector } = descriptor;
        let message = format!(
            "refused request: operation {}, {sector_count} sectors from sector {start_sector}",
            op_flags & 0xff
        );
        self.complain(&Error::new(ErrorKind::OutOfRange, message));
        -errno
    }

    /// Counts a failure and leaves its text for who asks. The log gets the 1st, 2nd, 4th, 8th...:
    /// a bad layer under a busy reader must not fill the disk that the log is on.
    pub(super) fn complain(&self, error: &Error) {
        self.counters.errors.add(1);
        let errors = self.counters.errors.get();
        let text = format!("{error:#}");
        if errors.is_power_of_two() {
            tracing::error!(
                dev_id = self.device_id, queue = self.queue_index, errors, error = %text,
                "request failed"
            );
        }
        self.device_counters.set_last_error(text);
    }
}

/// A reader; a panic while making one is an error.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Geometry;
    use libublk::sys;
    use std::sync::atomic::{AtomicU32, Ordering};

    const BOUNDS: Bounds = Bounds { sectors: 100, buffer_bytes: 4096 };

    /// Sector N is 512 bytes of N; sectors 90 to 94 are bad, 95 and up panic.
    #[derive(Default)]
    struct Fake {
        workers: AtomicU32,
        workers_max: u32,
    }

    struct FakeWorker;

    impl Disk for Fake {
        type Worker = FakeWorker;

        fn geometry(&self) -> Geometry {
            Geometry { sectors: BOUNDS.sectors, read_only: true, optimal_io_bytes: 4096 }
        }

        fn worker(&self) -> Result<FakeWorker> {
            let made = self.workers.fetch_add(1, Ordering::Relaxed);
            assert!(self.workers_max == 0 || made < self.workers_max, "no more readers");
            Ok(FakeWorker)
        }
    }

    impl Worker for FakeWorker {
        fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
            for (sector, bytes) in (start_sector..).zip(dst.chunks_mut(512)) {
                assert!(sector < 95, "sector {sector} is cursed");
                if sector >= 90 {
                    return Err(Error::new(
                        ErrorKind::Integrity,
                        format!("sector {sector} is bad"),
                    ));
                }
                bytes.fill(u8::try_from(sector).unwrap());
            }
            Ok(())
        }
    }

    fn ask(op_flags: u32, start_sector: u64, sector_count: u32) -> Descriptor {
        Descriptor { op_flags, sector_count, start_sector }
    }

    fn read(start_sector: u64, sector_count: u32) -> Descriptor {
        ask(sys::UBLK_IO_OP_READ, start_sector, sector_count)
    }

    #[test]
    fn a_read_fills_the_front_of_the_buffer_and_answers_its_length() {
        let (disk, counters) = (Fake::default(), DeviceCounters::new(1));
        let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
        let mut buffer = [0xee; 4096];
        assert_eq!(server.answer(read(5, 2), &mut buffer), 1024);
        assert_eq!((buffer[0], buffer[511], buffer[512], buffer[1023]), (5, 5, 6, 6));
        assert_eq!(buffer[1024..], [0xee; 3072]);
        let total = counters.snapshot().total();
        assert_eq!((total.requests, total.read_bytes, total.errors), (1, 1024, 0));
    }

    #[test]
    fn a_failed_read_answers_its_errno_and_leaves_its_story() {
        let (disk, counters) = (Fake::default(), DeviceCounters::new(1));
        let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
        assert_eq!(server.answer(read(89, 2), &mut [0; 4096]), -libc::EILSEQ);
        let stats = counters.snapshot();
        assert_eq!((stats.total().errors, stats.total().read_bytes), (1, 0));
        assert_eq!(
            stats.last_error.as_deref(),
            Some("read 2 sectors from sector 89: sector 90 is bad")
        );
        assert_eq!(server.answer(read(0, 1), &mut [0; 4096]), 512, "and the next one is served");
    }

    #[test]
    fn a_panicking_reader_fails_one_request_and_is_replaced() {
        let (disk, counters) = (Fake::default(), DeviceCounters::new(1));
        let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
        assert_eq!(server.answer(read(96, 1), &mut [0; 4096]), -libc::EIO);
        assert_eq!(server.answer(read(1, 1), &mut [0; 4096]), 512);
        assert_eq!(disk.workers.load(Ordering::Relaxed), 2);
        let stats = counters.snapshot();
        assert_eq!((stats.total().panics, stats.total().errors), (1, 1));
        assert!(stats.last_error.unwrap().contains("sector 96 is cursed"));
    }

    #[test]
    fn a_reader_that_cannot_be_replaced_fails_every_request() {
        let (disk, counters) = (Fake { workers_max: 1, ..Fake::default() }, DeviceCounters::new(1));
        let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
        for _ in 0..3 {
            assert_eq!(server.answer(read(96, 1), &mut [0; 4096]), -libc::EIO);
        }
        assert_eq!(counters.snapshot().total().errors, 3);
    }

    #[test]
    fn a_request_longer_than_the_tags_buffer_touches_nothing() {
        let (disk, counters) = (Fake::default(), DeviceCounters::new(1));
        let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
        let mut short = [0xee; 512];
        assert_eq!(server.answer(read(0, 2), &mut short), -libc::EINVAL);
        assert_eq!(short, [0xee; 512]);
    }

    #[test]
    fn a_flush_succeeds_and_a_write_is_refused() {
        let (disk, counters) = (Fake::default(), DeviceCounters::new(2));
        let mut server = Server::new(&disk, BOUNDS, &counters, (7, 1)).unwrap();
        assert_eq!(server.answer(ask(sys::UBLK_IO_OP_FLUSH, 0, 0), &mut [0; 4096]), 0);
        assert_eq!(server.answer(ask(sys::UBLK_IO_OP_WRITE, 0, 1), &mut [0; 512]), -libc::EROFS);
        let stats = counters.snapshot();
        assert_eq!((stats.queues[1].requests, stats.queues[1].errors), (2, 1));
        assert_eq!(stats.queues[0].requests, 0);
    }

    #[test]
    fn a_queue_that_was_not_asked_for_is_not_served() {
        let (disk, counters) = (Fake::default(), DeviceCounters::new(1));
        let Err(error) = Server::new(&disk, BOUNDS, &counters, (7, 1)) else {
            panic!("queue 1 of one queue is served");
        };
        assert_eq!(error.kind(), ErrorKind::Kernel);
    }
}
