//! The threads with a disk that reads when the test lets it, and without a kernel's device.

use super::*;
use crate::disk::{Geometry, Worker};
use std::sync::mpsc::{Receiver, Sender, channel};

const PATIENCE: Duration = Duration::from_secs(20);

const AWHILE: Duration = Duration::from_millis(50);

/// Says which sector a read has begun at, and ends it when told to.
struct Gate {
    began: Sender<u64>,
    ends: Mutex<Receiver<()>>,
    is_open: bool,
}

struct Gated(Arc<Gate>);

struct GatedWorker(Arc<Gate>);

impl Disk for Gated {
    type Worker = GatedWorker;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: 100,
            read_only: true,
            optimal_io_bytes: 4096,
            discard_granularity_bytes: None,
        }
    }

    fn worker(&self) -> Result<GatedWorker> {
        Ok(GatedWorker(Arc::clone(&self.0)))
    }
}

impl Worker for GatedWorker {
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        assert!(start_sector != 66, "sector 66 is cursed");
        self.0.began.send(start_sector).unwrap();
        if !self.0.is_open {
            self.0.ends.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        }
        if start_sector == 99 {
            return Err(Error::new(ErrorKind::Timeout, "too far away"));
        }
        dst.fill(u8::try_from(start_sector).unwrap());
        if start_sector == 77 {
            dst.fill(u8::from(waiting::since() < Instant::now() - AWHILE));
        }
        Ok(())
    }
}

fn bench(is_open: bool) -> (Misses<Gated>, Receiver<u64>, Sender<()>) {
    let ((began, begun), (end, ends)) = (channel(), channel());
    let gate = Gate { began, ends: Mutex::new(ends), is_open };
    let disk = Arc::new(Gated(Arc::new(gate)));
    (Misses::new(disk, 2, 64).unwrap(), begun, end)
}

fn miss(tag: u16, start_sector: u64) -> Miss {
    Miss { tag, start_sector, len_bytes: 1024, buffer: IoBuf::new(4096) }
}

/// Waits until `count` reads came back to a queue.
fn take(desk: &Desk<'_, Gated>, count: usize) -> Vec<Missed> {
    let deadline = Instant::now() + PATIENCE;
    let mut all: Vec<Missed> = Vec::new();
    while all.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} came back", all.len());
        let mut some = Vec::new();
        desk.outbox().take(&mut some);
        all.append(&mut some);
        std::thread::sleep(Duration::from_millis(1));
    }
    all.sort_by_key(|missed| missed.tag);
    all
}

#[test]
fn reads_that_wait_do_not_wait_for_each_other_and_come_back_to_their_queue() {
    let (misses, begun, end) = bench(false);
    let (one, two) = (misses.desk(0).unwrap(), misses.desk(1).unwrap());
    assert!(misses.desk(2).is_none());
    for tag in 0..8 {
        assert!(one.ask(miss(tag, u64::from(tag))).is_ok());
        assert!(two.ask(miss(tag, 50 + u64::from(tag))).is_ok());
    }
    // All have begun before any has ended.
    let mut seen: Vec<u64> = (0..16).map(|_| begun.recv_timeout(PATIENCE).unwrap()).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..8).chain(50..58).collect::<Vec<_>>());
    for _ in 0..16 {
        end.send(()).unwrap();
    }
    for (desk, base) in [(&one, 0_u8), (&two, 50)] {
        for (missed, tag) in take(desk, 8).iter().zip(0_u8..) {
            assert_eq!(missed.tag, u16::from(tag));
            assert!(missed.outcome.is_ok());
            assert_eq!(missed.buffer.as_slice()[..1024], [base + tag; 1024]);
        }
    }
    misses.end(PATIENCE).unwrap();
    assert!(one.ask(miss(0, 0)).is_err(), "nobody is there any more");
}

#[test]
fn more_reads_than_threads_wait_their_turn() {
    let (misses, begun, end) = bench(false);
    let desk = misses.desk(0).unwrap();
    let count = u16::try_from(MISS_THREADS_MAX).unwrap() + 20;
    for tag in 0..count {
        assert!(desk.ask(miss(tag, 1)).is_ok());
    }
    for _ in 0..MISS_THREADS_MAX {
        begun.recv_timeout(PATIENCE).unwrap();
    }
    assert!(begun.recv_timeout(Duration::from_millis(50)).is_err(), "no more at a time");
    for _ in 0..count {
        end.send(()).unwrap();
    }
    assert_eq!(take(&desk, usize::from(count)).len(), usize::from(count));
}

/// With all threads stuck, a read once had its whole time anew when one of them came to it: several
/// times the deadline after it was asked for.
#[test]
fn a_read_waits_since_it_was_asked_for_and_not_since_a_thread_came_to_it() {
    let (misses, begun, end) = bench(false);
    let desk = misses.desk(0).unwrap();
    let count = u16::try_from(MISS_THREADS_MAX).unwrap();
    for tag in 0..count {
        assert!(desk.ask(miss(tag, 1)).is_ok());
        begun.recv_timeout(PATIENCE).unwrap();
    }
    assert!(desk.ask(miss(count, 77)).is_ok());
    std::thread::sleep(AWHILE);
    for _ in 0..=count {
        end.send(()).unwrap();
    }
    let mut back = take(&desk, usize::from(count) + 1);
    let last = back.last_mut().unwrap();
    assert_eq!((last.tag, last.buffer.as_mut_slice()[0]), (count, 1));
}

#[test]
fn a_read_that_fails_or_panics_comes_back_with_its_buffer() {
    let (misses, _begun, _end) = bench(true);
    let desk = misses.desk(0).unwrap();
    for (tag, sector) in [(0, 99), (1, 66), (2, 7)] {
        assert!(desk.ask(miss(tag, sector)).is_ok());
    }
    let too_long = Miss { len_bytes: 8192, ..miss(3, 5) };
    assert!(desk.ask(too_long).is_ok());
    let back = take(&desk, 4);
    let kinds: Vec<_> = back.iter().map(|it| it.outcome.as_ref().map_err(Error::kind)).collect();
    let expected =
        [Err(ErrorKind::Timeout), Err(ErrorKind::Io), Ok(&()), Err(ErrorKind::OutOfRange)];
    assert_eq!(kinds, expected);
    assert!(back.iter().all(|missed| missed.buffer.len() == 4096));
}

#[test]
fn the_end_waits_for_reads_and_gives_up_in_time() {
    let (misses, begun, end) = bench(false);
    let desk = misses.desk(0).unwrap();
    assert!(desk.ask(miss(0, 1)).is_ok());
    begun.recv_timeout(PATIENCE).unwrap();
    let error = misses.end(Duration::from_millis(30)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    end.send(()).unwrap();
    misses.end(PATIENCE).unwrap();
}
