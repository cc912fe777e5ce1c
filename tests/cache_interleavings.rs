//! Single flight and residency in every order in which threads can run.
//!
//! The two files of the cache that hold this logic are compiled here once more, with the locks and
//! atomics of a model checker in the place of `src/cache/sync.rs`. It runs each test many times,
//! each time with another order of the threads' steps and other answers of relaxed reads, and fails
//! it when one of them deadlocks. A data file is a relaxed byte for each extent, so that only the
//! state can be what publishes it.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod error {
    pub(crate) use obd_ublk::error::{Error, ErrorKind, Result};
}

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU64, Ordering};
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
}

#[allow(dead_code)]
#[path = "../src/cache/flight.rs"]
mod flight;
#[allow(dead_code)]
#[path = "../src/cache/states.rs"]
mod states;

use flight::{Begun, Flights, Outcome};
use loom::thread;
use states::States;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use sync::{AtomicU8, Ordering};

/// What the threads of one process share.
struct Process {
    flights: Flights,
    states: States,
    /// The data file: 7 where it has the blob's byte.
    data: Vec<AtomicU8>,
    /// How often each extent was fetched.
    fetched: Vec<std::sync::atomic::AtomicU32>,
    /// How many fetches fail before one succeeds.
    failures: std::sync::atomic::AtomicU32,
}

impl Process {
    fn new(extents: usize, failures: u32) -> Arc<Self> {
        Arc::new(Self {
            flights: Flights::default(),
            states: States::new(u64::try_from(extents).unwrap()),
            data: (0..extents).map(|_| AtomicU8::new(0)).collect(),
            fetched: (0..extents).map(|_| std::sync::atomic::AtomicU32::new(0)).collect(),
            failures: failures.into(),
        })
    }

    fn fetch(&self, extents: Range<u64>) -> bool {
        let counter = std::sync::atomic::Ordering::Relaxed;
        let left = self.failures.load(counter);
        if left > 0 {
            self.failures.store(left - 1, counter);
            return false;
        }
        for extent in extents {
            let at = usize::try_from(extent).unwrap();
            self.fetched[at].fetch_add(1, counter);
            self.data[at].store(7, Ordering::Relaxed);
            self.states.set_here(extent);
        }
        true
    }

    /// A read, as `CachedBlob` does it: hit, else fly or join, until all is here.
    fn read(&self, extents: Range<u64>) {
        let deadline = Instant::now() + Duration::from_secs(3600);
        loop {
            let missing = extents.clone().find(|at| !self.states.are_here(&(*at..at + 1)));
            let Some(start) = missing else { break };
            match self.flights.begin(start..extents.end, 1) {
                Begun::Mine(ticket) => {
                    let mut done = true;
                    for extent in ticket.extents() {
                        let one = extent..extent + 1;
                        done &= self.states.are_here(&one) || self.fetch(one);
                    }
                    if done {
                        ticket.land(Outcome::Stored);
                    }
                    // Else it is dropped: the fetch was given up.
                }
                Begun::Theirs(flight) => {
                    flight.wait(deadline).unwrap();
                }
            }
        }
        for extent in extents {
            let found = self.data[usize::try_from(extent).unwrap()].load(Ordering::Relaxed);
            assert_eq!(found, 7, "extent {extent} is here and its bytes are not");
        }
    }

    fn times(&self) -> Vec<u32> {
        self.fetched.iter().map(|times| times.load(std::sync::atomic::Ordering::Relaxed)).collect()
    }
}

/// Runs readers of these ranges in every order with at most so many preemptions.
fn in_every_order(preemptions: usize, extents: usize, failures: u32, reads: &[Range<u64>]) {
    let reads = reads.to_vec();
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let process = Process::new(extents, failures);
        let others: Vec<_> = reads[1..]
            .iter()
            .cloned()
            .map(|read| {
                let process = Arc::clone(&process);
                thread::spawn(move || process.read(read))
            })
            .collect();
        process.read(reads[0].clone());
        others.into_iter().for_each(|other| other.join().unwrap());
        assert_eq!(process.times(), vec![1; extents], "each extent once");
        assert!(process.states.is_complete());
    });
}

#[test]
fn threads_that_miss_the_same_extent_fetch_it_once() {
    in_every_order(3, 1, 0, &[0..1, 0..1, 0..1]);
}

#[test]
fn threads_that_miss_overlapping_extents_fetch_each_once() {
    in_every_order(3, 3, 0, &[0..2, 1..3]);
    in_every_order(2, 2, 0, &[0..2, 1..2, 0..1]);
}

#[test]
fn who_waits_for_a_fetch_that_is_given_up_tries_again() {
    in_every_order(3, 1, 1, &[0..1, 0..1]);
    in_every_order(2, 1, 2, &[0..1, 0..1, 0..1]);
}

#[test]
fn the_count_of_what_is_here_survives_forgetting_at_any_moment() {
    loom::model(|| {
        let states = Arc::new(States::new(2));
        let other = Arc::clone(&states);
        let filling = thread::spawn(move || {
            other.set_here(0);
            other.set_here(1);
        });
        states.forget();
        filling.join().unwrap();
        let all = states.are_here(&(0..2));
        // Forgetting after the last fill leaves less; nothing is counted twice or lost.
        assert_eq!(states.is_complete(), all);
        states.set_here(0);
        states.set_here(1);
        assert!(states.is_complete());
        states.distrust(1..2);
        assert!(!states.is_complete() && states.are_here(&(0..1)));
    });
}
