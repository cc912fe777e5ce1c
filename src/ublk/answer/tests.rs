//! Requests of every kind against a disk that fails where it is told to.

use super::*;
use crate::disk::{Geometry, Worker};
use crate::telemetry::trouble;
use libublk::sys;
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const BOUNDS: Bounds =
    Bounds { sectors: 100, buffer_bytes: 4096, read_only: true, zeroes_sectors_max: 0 };

impl<D: Disk> Server<'_, D> {
    /// The answer to a request that waits for no flush.
    fn answer_now(&mut self, descriptor: Descriptor, buffer: &mut [u8]) -> i32 {
        match self.answer(descriptor, buffer) {
            Answer::Now(answer) => answer,
            other => panic!("{other:?}"),
        }
    }
}

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
        Geometry {
            sectors: BOUNDS.sectors,
            read_only: true,
            optimal_io_bytes: 4096,
            discard_granularity_bytes: None,
        }
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
                return Err(Error::new(ErrorKind::Integrity, format!("sector {sector} is bad")));
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
    assert_eq!(server.answer_now(read(5, 2), &mut buffer), 1024);
    assert_eq!((buffer[0], buffer[511], buffer[512], buffer[1023]), (5, 5, 6, 6));
    assert_eq!(buffer[1024..], [0xee; 3072]);
    let total = counters.snapshot().total();
    assert_eq!((total.requests, total.read_bytes, total.errors), (1, 1024, 0));
}

#[test]
fn a_failed_read_answers_its_errno_and_leaves_its_story() {
    let (disk, counters) = (Fake::default(), DeviceCounters::new(1));
    let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
    assert_eq!(server.answer_now(read(89, 2), &mut [0; 4096]), -libc::EILSEQ);
    let stats = counters.snapshot();
    assert_eq!((stats.total().errors, stats.total().read_bytes), (1, 0));
    assert_eq!(
        stats.last_error.as_deref(),
        Some("read 2 sectors from sector 89: sector 90 is bad")
    );
    assert_eq!(server.answer_now(read(0, 1), &mut [0; 4096]), 512, "and the next one is served");
}

#[test]
fn a_panicking_reader_fails_one_request_and_is_replaced() {
    let (disk, counters) = (Fake::default(), DeviceCounters::new(1));
    let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
    assert_eq!(server.answer_now(read(96, 1), &mut [0; 4096]), -libc::EIO);
    assert_eq!(server.answer_now(read(1, 1), &mut [0; 4096]), 512);
    assert_eq!(disk.workers.load(Ordering::Relaxed), 2);
    let stats = counters.snapshot();
    assert_eq!((stats.total().panics, stats.total().errors), (1, 1));
    assert!(stats.last_error.unwrap().contains("sector 96 is cursed"));
}

/// Sectors from 50 on are far away.
struct Far(Fake);

struct FarWorker(FakeWorker);

impl Disk for Far {
    type Worker = FarWorker;

    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn worker(&self) -> Result<FarWorker> {
        self.0.worker().map(FarWorker)
    }

    fn may_wait(&self) -> bool {
        true
    }
}

impl Worker for FarWorker {
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        self.0.read(start_sector, dst)
    }

    fn would_wait(&mut self, sectors: Range<u64>) -> bool {
        sectors.end > 50
    }
}

#[test]
fn a_read_that_would_wait_is_left_to_others_and_answered_later() {
    let (disk, counters) = (Far(Fake::default()), DeviceCounters::new(1));
    let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
    let mut buffer = [0xee; 4096];
    assert_eq!(server.answer_now(read(48, 2), &mut buffer), 1024, "what is here is read at once");
    for (outcome, expected) in
        [(Ok(()), 1024), (Err(Error::new(ErrorKind::Timeout, "too far")), -libc::ETIMEDOUT)]
    {
        let answer = server.answer(read(49, 2), &mut buffer);
        let Answer::Elsewhere { waiting, start_sector, len_bytes } = answer else {
            panic!("{answer:?}");
        };
        assert_eq!((start_sector, len_bytes), (49, 1024));
        assert_eq!(server.missed(waiting, outcome), expected);
    }
    // What is no read, or not on the disk, is answered as ever.
    let refused = ask(sys::UBLK_IO_OP_WRITE, 60, 1);
    assert_eq!(server.answer_now(refused, &mut buffer), -libc::EROFS);
    assert_eq!(server.answer_now(read(99, 2), &mut buffer), -libc::EINVAL);
    let stats = counters.snapshot();
    assert_eq!((stats.total().read_bytes, stats.total().errors), (2048, 3));
    let expected = "read 2 sectors from sector 49: too far";
    assert!(stats.last_error.unwrap() != expected, "a later one");
}

#[test]
fn a_reader_that_cannot_be_replaced_fails_every_request() {
    let (disk, counters) = (Fake { workers_max: 1, ..Fake::default() }, DeviceCounters::new(1));
    let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
    for _ in 0..3 {
        assert_eq!(server.answer_now(read(96, 1), &mut [0; 4096]), -libc::EIO);
    }
    assert_eq!(counters.snapshot().total().errors, 3);
}

#[test]
fn a_request_longer_than_the_tags_buffer_touches_nothing() {
    let (disk, counters) = (Fake::default(), DeviceCounters::new(1));
    let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
    let mut short = [0xee; 512];
    assert_eq!(server.answer_now(read(0, 2), &mut short), -libc::EINVAL);
    assert_eq!(short, [0xee; 512]);
}

#[test]
fn a_flush_succeeds_and_a_write_is_refused() {
    let (disk, counters) = (Fake::default(), DeviceCounters::new(2));
    let mut server = Server::new(&disk, BOUNDS, &counters, (7, 1)).unwrap();
    assert_eq!(server.answer_now(ask(sys::UBLK_IO_OP_FLUSH, 0, 0), &mut [0; 4096]), 0);
    assert_eq!(server.answer_now(ask(sys::UBLK_IO_OP_WRITE, 0, 1), &mut [0; 512]), -libc::EROFS);
    let stats = counters.snapshot();
    assert_eq!((stats.queues[1].requests, stats.queues[1].errors), (2, 1));
    assert_eq!(stats.queues[0].requests, 0);
}

thread_local! {
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static STEP: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// A clock that moves by `STEP` with every look at it.
fn stepping_clock() -> Duration {
    NOW.set(NOW.get() + STEP.get());
    NOW.get()
}

fn with_ring() -> (tempfile::TempDir, PathBuf, DeviceCounters) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trouble");
    let ring = TroubleRing::open(&path).unwrap();
    let counters = DeviceCounters::new(2).with_trouble_ring(Some(Arc::new(ring)));
    (folder, path, counters)
}

#[test]
fn failed_requests_of_every_kind_are_recorded_and_good_ones_are_not() {
    let disk = Fake::default();
    let (_folder, path, counters) = with_ring();
    let mut server = Server::new(&disk, BOUNDS, &counters, (7, 1)).unwrap();
    let began_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    let fua = 1 << 13;
    for (descriptor, answer) in [
        (read(0, 1), 512),
        (read(89, 2), -libc::EILSEQ),
        (read(96, 1), -libc::EIO),
        (ask(sys::UBLK_IO_OP_WRITE | fua, 3, 4), -libc::EROFS),
        (ask(sys::UBLK_IO_OP_DISCARD, 5, 6), -libc::EOPNOTSUPP),
        (read(99, 2), -libc::EINVAL),
        (ask(sys::UBLK_IO_OP_FLUSH, 0, 0), 0),
    ] {
        assert_eq!(server.answer_now(descriptor, &mut [0; 4096]), answer);
    }
    let records = trouble::read(&path).unwrap();
    let facts: Vec<_> = records
        .iter()
        .map(|r| (r.operation, r.start_sector, r.sectors, r.errno, r.queue))
        .collect();
    assert_eq!(
        facts,
        [
            (0, 89, 2, libc::EILSEQ, 1),
            (0, 96, 1, libc::EIO, 1),
            (1, 3, 4, libc::EROFS, 1),
            (3, 5, 6, libc::EOPNOTSUPP, 1),
            (0, 99, 2, libc::EINVAL, 1),
        ]
    );
    assert_eq!(records[0].text, "read 2 sectors from sector 89: sector 90 is bad");
    assert!(records[1].text.contains("sector 96 is cursed"));
    assert_eq!(records[2].text, "refused request: operation 1, 4 sectors from sector 3");
    assert!(u128::from(records[0].unix_ms) >= began_ms);
    assert_eq!(records[0].server_pid, std::process::id());
    assert_eq!(counters.snapshot().total().errors, 5, "the counters are as without a ring");
}

#[test]
fn a_request_that_takes_a_second_is_recorded_though_its_answer_is_right() {
    let disk = Fake::default();
    let (_folder, path, counters) = with_ring();
    let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
    server.clock = stepping_clock;
    for (step_us, start_sector) in [(999_999, 1), (1_000_000, 2), (7_000_001, 3)] {
        STEP.set(Duration::from_micros(step_us));
        assert_eq!(server.answer_now(read(start_sector, 1), &mut [0; 512]), 512);
    }
    let records = trouble::read(&path).unwrap();
    let facts: Vec<_> =
        records.iter().map(|r| (r.start_sector, r.errno, r.duration_us, &*r.text)).collect();
    assert_eq!(facts, [(2, 0, 1_000_000, "slow"), (3, 0, 7_000_001, "slow")]);
    let total = counters.snapshot().total();
    assert_eq!((total.errors, counters.snapshot().last_error), (0, None));
}

#[test]
fn a_failure_is_recorded_with_the_time_it_took() {
    let disk = Fake::default();
    let (_folder, path, counters) = with_ring();
    let mut server = Server::new(&disk, BOUNDS, &counters, (7, 0)).unwrap();
    server.clock = stepping_clock;
    STEP.set(Duration::from_millis(3));
    assert_eq!(server.answer_now(read(90, 1), &mut [0; 512]), -libc::EILSEQ);
    assert_eq!(trouble::read(&path).unwrap()[0].duration_us, 3000);
}

#[test]
fn the_coarse_clock_moves_forward() {
    let start = coarse_clock();
    assert!(start > Duration::ZERO);
    std::thread::sleep(Duration::from_millis(50));
    let took = coarse_clock() - start;
    assert!(took >= Duration::from_millis(30) && took < Duration::from_secs(20), "{took:?}");
}

#[test]
fn a_queue_that_was_not_asked_for_is_not_served() {
    let (disk, counters) = (Fake::default(), DeviceCounters::new(1));
    let Err(error) = Server::new(&disk, BOUNDS, &counters, (7, 1)) else {
        panic!("queue 1 of one queue is served");
    };
    assert_eq!(error.kind(), ErrorKind::Kernel);
}

const WRITABLE: Bounds = Bounds { read_only: false, zeroes_sectors_max: 64, ..BOUNDS };

/// Every change as a line of text; sector 90 has no room, and sector 95 panics.
#[derive(Default)]
struct Scribe(Arc<std::sync::Mutex<Vec<String>>>);

struct ScribeWorker(Arc<std::sync::Mutex<Vec<String>>>);

impl Disk for Scribe {
    type Worker = ScribeWorker;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: BOUNDS.sectors,
            read_only: false,
            optimal_io_bytes: 4096,
            discard_granularity_bytes: Some(4096),
        }
    }

    fn worker(&self) -> Result<ScribeWorker> {
        Ok(ScribeWorker(Arc::clone(&self.0)))
    }
}

impl ScribeWorker {
    fn note(&self, start_sector: u64, line: String) -> Result<()> {
        assert!(start_sector < 95, "sector {start_sector} is cursed");
        if start_sector >= 90 {
            return Err(Error::new(ErrorKind::NoSpace, "full"));
        }
        self.0.lock().unwrap().push(line);
        Ok(())
    }
}

impl Worker for ScribeWorker {
    fn read(&mut self, _: u64, dst: &mut [u8]) -> Result<()> {
        dst.fill(7);
        Ok(())
    }

    fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        let line = format!("write {start_sector}+{} {}", src.len(), src[0]);
        self.note(start_sector, line)
    }

    fn write_zeroes(&mut self, sectors: Range<u64>, space: Space) -> Result<()> {
        self.note(sectors.start, format!("zero {sectors:?} {space:?}"))
    }
}

#[test]
fn changes_reach_the_disk_and_are_answered_by_what_they_are() {
    let (disk, counters) = (Scribe::default(), DeviceCounters::new(1));
    let mut server = Server::new(&disk, WRITABLE, &counters, (7, 0)).unwrap();
    let mut buffer = [0xab; 4096];
    for (descriptor, answer) in [
        (ask(sys::UBLK_IO_OP_WRITE, 3, 8), 4096),
        (ask(sys::UBLK_IO_OP_WRITE, 4, 1), 512),
        (ask(sys::UBLK_IO_OP_DISCARD, 10, 64), 0),
        (ask(sys::UBLK_IO_OP_WRITE_ZEROES | sys::UBLK_IO_F_NOUNMAP, 1, 2), 0),
        (read(3, 1), 512),
        (ask(sys::UBLK_IO_OP_WRITE, 90, 1), -libc::ENOSPC),
        (ask(sys::UBLK_IO_OP_DISCARD, 90, 1), -libc::ENOSPC),
        (ask(sys::UBLK_IO_OP_WRITE, 95, 1), -libc::EIO),
        (ask(sys::UBLK_IO_OP_WRITE, 0, 9), -libc::EINVAL),
        (ask(sys::UBLK_IO_OP_WRITE_SAME, 0, 1), -libc::EOPNOTSUPP),
    ] {
        assert_eq!(server.answer_now(descriptor, &mut buffer), answer, "{descriptor:?}");
    }
    let noted = disk.0.lock().unwrap().join(", ");
    assert_eq!(noted, "write 3+4096 171, write 4+512 171, zero 10..74 Free, zero 1..3 Keep");
    let total = counters.snapshot().total();
    assert_eq!((total.requests, total.errors, total.panics, total.read_bytes), (10, 5, 1, 512));
    assert_eq!((total.writes, total.written_bytes, total.discards, total.flushes), (2, 4608, 2, 0));
}

#[test]
fn a_write_that_is_longer_than_the_tags_buffer_reaches_nothing() {
    let (disk, counters) = (Scribe::default(), DeviceCounters::new(1));
    let mut server = Server::new(&disk, WRITABLE, &counters, (7, 0)).unwrap();
    let write = ask(sys::UBLK_IO_OP_WRITE, 0, 2);
    assert_eq!(server.answer_now(write, &mut [0; 512]), -libc::EINVAL);
    assert!(disk.0.lock().unwrap().is_empty());
}

#[test]
fn what_must_be_durable_is_answered_by_its_flush_alone() {
    let (disk, counters) = (Scribe::default(), DeviceCounters::new(1));
    let mut server = Server::new(&disk, WRITABLE, &counters, (7, 0)).unwrap();
    let fua = sys::UBLK_IO_F_FUA;
    for (descriptor, answer) in [
        (ask(sys::UBLK_IO_OP_WRITE | fua, 3, 2), 1024),
        (ask(sys::UBLK_IO_OP_WRITE_ZEROES | fua, 3, 2), 0),
        (ask(sys::UBLK_IO_OP_FLUSH, 0, 0), 0),
    ] {
        let Answer::AfterFlush(waiting) = server.answer(descriptor, &mut [0; 4096]) else {
            panic!("{descriptor:?} did not wait");
        };
        assert_eq!(server.flushed(waiting, None), answer);
        let lost = Error::new(ErrorKind::NoSpace, "lost");
        assert_eq!(server.flushed(waiting, Some(&lost)), -libc::ENOSPC);
    }
    let total = counters.snapshot().total();
    assert_eq!((total.requests, total.flushes, total.errors), (3, 3, 3));
    assert_eq!(counters.snapshot().last_error.as_deref(), Some("lost"));
    // A write that failed has nothing to be flushed.
    let failed = server.answer_now(ask(sys::UBLK_IO_OP_WRITE | fua, 90, 1), &mut [0; 512]);
    assert_eq!(failed, -libc::ENOSPC);
}

#[test]
fn the_time_that_a_flush_takes_counts_as_its_requests() {
    let disk = Scribe::default();
    let (_folder, path, counters) = with_ring();
    let mut server = Server::new(&disk, WRITABLE, &counters, (7, 0)).unwrap();
    server.clock = stepping_clock;
    STEP.set(Duration::from_millis(1500));
    let flush = ask(sys::UBLK_IO_OP_FLUSH, 0, 0);
    let Answer::AfterFlush(waiting) = server.answer(flush, &mut []) else { panic!("no flush") };
    assert_eq!(server.flushed(waiting, None), 0);
    let records = trouble::read(&path).unwrap();
    assert_eq!(
        (records[0].operation, records[0].duration_us, &*records[0].text),
        (2, 1_500_000, "slow")
    );
}
