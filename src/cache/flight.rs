//! Who fetches what, among the threads of one process: one flight for each extent at a time.
//!
//! The lock is held for looking and noting, never while something is fetched. A flight always
//! lands: its ticket lands it as failed when it is dropped without an outcome.

use super::sync::{Condvar, Mutex, MutexGuard};
use crate::error::{Error, ErrorKind, Result};
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

/// How a flight landed.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// The extents are stored.
    Stored,
    /// The bytes could not be stored; here they are, from this byte of the blob on.
    Bytes(u64, Arc<[u8]>),
    /// They could not be had.
    Failed(ErrorKind, Arc<str>),
}

impl Outcome {
    /// As the outcome of everybody who waits for it.
    pub(super) fn failed(error: &Error) -> Self {
        Self::Failed(error.kind(), format!("{error:#}").into())
    }
}

/// Extents on their way.
#[derive(Debug)]
pub(super) struct Flight {
    extents: Range<u64>,
    /// Who fetches: who waits with other credentials does not take its failure for an answer.
    by: usize,
    landed: Mutex<Option<Outcome>>,
    bell: Condvar,
}

/// All flights of one blob. There are as many as threads that miss at one time.
#[derive(Debug, Default)]
pub(super) struct Flights {
    open: Mutex<Vec<Arc<Flight>>>,
}

/// What became of the wish to fetch.
#[derive(Debug)]
pub(super) enum Begun<'a> {
    /// The caller fetches these.
    Mine(Ticket<'a>),
    /// Somebody else is fetching the first of them.
    Theirs(Arc<Flight>),
}

/// The duty to land a flight.
#[derive(Debug)]
pub(super) struct Ticket<'a> {
    flights: &'a Flights,
    flight: Arc<Flight>,
}

impl Flights {
    /// Begins a flight of `wanted`, or of its front up to where another one is on its way.
    pub(super) fn begin(&self, wanted: Range<u64>, by: usize) -> Begun<'_> {
        let mut open = lock(&self.open);
        let mut end = wanted.end;
        for flight in open.iter() {
            if flight.extents.contains(&wanted.start) {
                return Begun::Theirs(Arc::clone(flight));
            }
            if flight.extents.start > wanted.start {
                end = end.min(flight.extents.start);
            }
        }
        let flight = Arc::new(Flight {
            extents: wanted.start..end,
            by,
            landed: Mutex::new(None),
            bell: Condvar::new(),
        });
        open.push(Arc::clone(&flight));
        Begun::Mine(Ticket { flights: self, flight })
    }
}

impl Ticket<'_> {
    /// What is to be fetched.
    pub(super) fn extents(&self) -> Range<u64> {
        self.flight.extents.clone()
    }

    /// Lands the flight and wakes who waits.
    pub(super) fn land(self, outcome: Outcome) {
        self.flight.land(outcome);
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        lock(&self.flights.open).retain(|flight| !Arc::ptr_eq(flight, &self.flight));
        // Nothing to do after `land`.
        self.flight.land(Outcome::Failed(ErrorKind::Canceled, "the fetch was given up".into()));
    }
}

impl Flight {
    fn land(&self, outcome: Outcome) {
        lock(&self.landed).get_or_insert(outcome);
        self.bell.notify_all();
    }

    /// Whether its failure is that of a fetcher known by this number.
    pub(super) fn is_by(&self, by: usize) -> bool {
        self.by == by
    }

    /// Waits until it lands.
    ///
    /// # Errors
    /// `Timeout` at `deadline`.
    pub(super) fn wait(&self, deadline: Instant) -> Result<Outcome> {
        let mut landed = lock(&self.landed);
        loop {
            if let Some(outcome) = &*landed {
                return Ok(outcome.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let message = format!("extents {:?} are still being fetched", self.extents);
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            let waited = self.bell.wait_timeout(landed, left);
            landed = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The lock; one that a panic left behind guards nothing that could be half done.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
