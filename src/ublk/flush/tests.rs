//! The flusher with a disk that flushes when the test lets it, and without a kernel's device.

#![allow(unsafe_code)]

use super::*;
use crate::disk::{Geometry, Worker};
use crate::error::ErrorKind;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

const PATIENCE: Duration = Duration::from_secs(20);

/// How a flush is to end.
enum End {
    Good,
    Bad,
    Panic,
}

/// Says when a flush has begun, and ends it as it is told. Untold, it is good at once.
struct Gate {
    began: Mutex<Sender<()>>,
    ends: Mutex<Receiver<End>>,
}

struct NoWorker;

impl Worker for NoWorker {
    fn read(&mut self, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}

impl Disk for Gate {
    type Worker = NoWorker;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: 1,
            read_only: false,
            optimal_io_bytes: 4096,
            discard_granularity_bytes: None,
        }
    }

    fn worker(&self) -> Result<NoWorker> {
        Ok(NoWorker)
    }

    fn flush(&self) -> Result<()> {
        let _ = self.began.lock().unwrap().send(());
        let end = self.ends.lock().unwrap().recv();
        match end.unwrap_or(End::Good) {
            End::Good => Ok(()),
            End::Bad => Err(Error::new(ErrorKind::NoSpace, "full")),
            End::Panic => panic!("told to panic"),
        }
    }
}

/// A flusher of two queues, and the strings of its disk.
struct Bench {
    flusher: Arc<Flusher>,
    disk: Arc<Gate>,
    began: Mutex<Receiver<()>>,
    ends: Option<Sender<End>>,
}

impl Bench {
    fn new() -> Self {
        let ((tell, began), (ends, told)) = (channel(), channel());
        let disk = Arc::new(Gate { began: Mutex::new(tell), ends: Mutex::new(told) });
        let flusher = Arc::new(Flusher::start(Arc::clone(&disk), 2, 64).unwrap());
        Self { flusher, disk, began: Mutex::new(began), ends: Some(ends) }
    }

    fn ask(&self, queue_index: u16, tag: u16) {
        assert!(self.flusher.desk(queue_index).unwrap().ask(tag));
    }

    fn wait_begun(&self) {
        self.began.lock().unwrap().recv_timeout(PATIENCE).unwrap();
    }

    fn end(&self, end: End) {
        self.ends.as_ref().unwrap().send(end).unwrap();
    }

    /// What came back to a queue: tags, and what they are told.
    fn taken(&self, queue_index: u16) -> Vec<(u16, Option<String>)> {
        let mut flushed = Vec::new();
        self.flusher.desk(queue_index).unwrap().outbox().take(&mut flushed);
        let told = |f: Flushed| (f.tag, f.failure.map(|error| format!("{error:#}")));
        flushed.into_iter().map(told).collect()
    }

    fn is_readable(&self, queue_index: u16, patience: PollTimeout) -> bool {
        let desk = self.flusher.desk(queue_index).unwrap();
        let mut fds = [PollFd::new(desk.outbox().wake(), PollFlags::POLLIN)];
        poll(&mut fds, patience).unwrap() == 1
    }

    fn wait_taken(&self, queue_index: u16) -> Vec<(u16, Option<String>)> {
        assert!(self.is_readable(queue_index, PollTimeout::from(20_000_u16)), "nothing came back");
        self.taken(queue_index)
    }
}

#[test]
fn those_that_come_during_a_flush_wait_for_the_next_and_share_it() {
    let bench = Bench::new();
    bench.ask(0, 1);
    bench.wait_begun();
    for (queue_index, tag) in [(0, 2), (1, 1), (1, 63)] {
        bench.ask(queue_index, tag);
    }
    assert!(bench.taken(0).is_empty() && bench.taken(1).is_empty(), "no flush is over");
    bench.end(End::Good);
    assert_eq!(bench.wait_taken(0), [(1, None)], "the one that came before it began");
    // The second flush has begun and is not over: nobody else may be answered.
    bench.wait_begun();
    assert!(bench.taken(0).is_empty() && bench.taken(1).is_empty());
    bench.end(End::Good);
    assert_eq!(bench.wait_taken(0), [(2, None)]);
    assert_eq!(bench.wait_taken(1), [(1, None), (63, None)]);
    assert!(bench.began.lock().unwrap().try_recv().is_err(), "two flushes for four requests");
}

#[test]
fn a_failure_is_the_whole_groups_and_the_next_group_has_its_own_luck() {
    let bench = Bench::new();
    bench.ask(0, 1);
    bench.wait_begun();
    bench.ask(0, 2);
    bench.ask(1, 3);
    bench.end(End::Good);
    assert_eq!(bench.wait_taken(0), [(1, None)]);
    bench.wait_begun();
    bench.end(End::Bad);
    let told = Some("flush the disk: full".to_owned());
    assert_eq!(bench.wait_taken(0), [(2, told.clone())]);
    assert_eq!(bench.wait_taken(1), [(3, told)]);
    bench.ask(0, 2);
    bench.end(End::Good);
    assert_eq!(bench.wait_taken(0), [(2, None)]);
}

#[test]
fn a_flush_that_panics_is_a_failure_and_not_the_last_flush() {
    let bench = Bench::new();
    bench.ask(1, 9);
    bench.end(End::Panic);
    let told = bench.wait_taken(1);
    let text = told[0].1.as_deref().unwrap();
    assert!(text.contains("the flush panicked: told to panic"), "{text}");
    bench.ask(1, 9);
    bench.end(End::Good);
    assert_eq!(bench.wait_taken(1), [(9, None)]);
}

#[test]
fn a_queue_is_woken_when_something_came_back_and_never_otherwise() {
    let bench = Bench::new();
    assert!(!bench.is_readable(0, PollTimeout::ZERO));
    bench.ask(0, 5);
    bench.end(End::Good);
    assert_eq!(bench.wait_taken(0), [(5, None)]);
    assert!(!bench.is_readable(0, PollTimeout::ZERO), "a look takes the signal away");
    assert!(!bench.is_readable(1, PollTimeout::ZERO), "the other queue sleeps on");
    assert!(bench.flusher.desk(2).is_none());
}

#[test]
fn the_end_waits_for_a_flush_in_progress_and_answers_nobody() {
    let bench = Bench::new();
    bench.ask(0, 1);
    bench.wait_begun();
    bench.ask(0, 2);
    let error = bench.flusher.end(Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(!bench.flusher.desk(1).unwrap().ask(3), "nobody is taken any more");
    bench.end(End::Good);
    bench.flusher.end(PATIENCE).unwrap();
    assert_eq!(bench.taken(0), [(1, None)], "what was begun is told, what waited is not");
    assert_eq!(Arc::strong_count(&bench.disk), 1, "the disk is let go of");
}

#[test]
fn a_flusher_that_nobody_ends_ends_when_it_is_dropped() {
    let mut bench = Bench::new();
    bench.ask(0, 1);
    bench.wait_begun();
    bench.ends = None;
    let Bench { flusher, disk, .. } = bench;
    drop(flusher);
    let deadline = Instant::now() + PATIENCE;
    while Arc::strong_count(&disk) > 1 {
        assert!(Instant::now() < deadline, "the thread lives on");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// As a queue's ring is: the poll is what wakes it, and one that is armed late misses nothing.
#[test]
fn a_ring_like_a_queues_is_woken_by_every_group() {
    let mut bench = Bench::new();
    bench.ends = None;
    let desk = bench.flusher.desk(0).unwrap();
    let mut ring = IoUring::<squeue::Entry, cqueue::Entry>::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(4)
        .unwrap();
    let mut flushed = Vec::new();
    for round in 0..200_u16 {
        assert!(desk.ask(round % 64));
        if round % 2 == 1 {
            assert!(bench.is_readable(0, PollTimeout::from(20_000_u16)), "late on purpose");
        }
        let events = u32::from(libc::POLLIN.unsigned_abs());
        let poll =
            opcode::PollAdd::new(types::Fd(desk.outbox().wake_fd()), events).build().user_data(7);
        // SAFETY: a poll touches no memory, and the descriptor lives as long as the bench.
        unsafe { ring.submission().push(&poll) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        let entry = ring.completion().next().unwrap();
        assert!(entry.user_data() == 7 && entry.result() > 0, "{entry:?}");
        desk.outbox().take(&mut flushed);
        assert_eq!(flushed.drain(..).map(|f| f.tag).collect::<Vec<_>>(), [round % 64]);
    }
}

#[test]
fn every_tag_of_busy_queues_comes_back_exactly_once() {
    let mut bench = Bench::new();
    bench.ends = None;
    let bench = &bench;
    std::thread::scope(|scope| {
        for queue_index in 0..2 {
            scope.spawn(move || {
                for round in 0..100 {
                    let tags: Vec<u16> = (0..64).filter(|tag| (tag + round) % 7 > 2).collect();
                    tags.iter().for_each(|tag| bench.ask(queue_index, *tag));
                    let mut back = Vec::new();
                    while back.len() < tags.len() {
                        back.extend(bench.wait_taken(queue_index).into_iter().map(|(tag, _)| tag));
                    }
                    back.sort_unstable();
                    assert_eq!(back, tags);
                }
            });
        }
    });
}
