//! How many fetches ahead of reads one blob has under way: fewer than it may have requests, so that
//! a read never waits for a place behind them.

use super::flight::lock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// See the module text.
#[derive(Debug)]
pub(super) struct Line {
    under_way: Mutex<usize>,
    most: usize,
    bell: Condvar,
}

/// The right to fetch ahead, until it is dropped.
#[derive(Debug)]
pub(super) struct Place<'a>(&'a Line);

impl Line {
    /// So many places.
    pub(super) fn new(most: usize) -> Self {
        Self { under_way: Mutex::new(0), most, bell: Condvar::new() }
    }

    /// A place, if there is one now.
    pub(super) fn try_enter(&self) -> Option<Place<'_>> {
        let mut under_way = lock(&self.under_way);
        if *under_way >= self.most {
            return None;
        }
        *under_way += 1;
        Some(Place(self))
    }

    /// A place; waits for one until `deadline`, or until `canceled` is set and [`Line::wake`]
    /// called.
    pub(super) fn enter(&self, canceled: &AtomicBool, deadline: Instant) -> Option<Place<'_>> {
        let mut under_way = lock(&self.under_way);
        while *under_way >= self.most {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || canceled.load(Ordering::Relaxed) {
                return None;
            }
            let waited = self.bell.wait_timeout(under_way, left);
            under_way = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *under_way += 1;
        Some(Place(self))
    }

    /// Has those who wait look at whether they still should.
    pub(super) fn wake(&self) {
        // Behind the lock, so that nobody is between a look and the wait.
        drop(lock(&self.under_way));
        self.bell.notify_all();
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut under_way = lock(&self.0.under_way);
        *under_way = under_way.saturating_sub(1);
        drop(under_way);
        self.0.bell.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn there_are_so_many_places_and_who_waits_gets_the_next_one() {
        let line = Line::new(2);
        let far = Instant::now() + Duration::from_secs(3600);
        let one = line.try_enter().unwrap();
        let other = line.enter(&AtomicBool::new(false), far).unwrap();
        assert!(line.try_enter().is_none());
        assert!(line.enter(&AtomicBool::new(false), Instant::now()).is_none());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| line.enter(&AtomicBool::new(false), far).is_some());
            drop(one);
            assert!(waiting.join().unwrap());
        });
        drop(other);
        assert!(line.try_enter().is_some());
    }

    #[test]
    fn who_goes_away_waits_no_more() {
        let line = Line::new(0);
        let canceled = AtomicBool::new(false);
        let far = Instant::now() + Duration::from_secs(3600);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| line.enter(&canceled, far).is_none());
            canceled.store(true, Ordering::Relaxed);
            line.wake();
            assert!(waiting.join().unwrap());
        });
    }
}
