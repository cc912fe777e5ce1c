//! Ranges that requests in flight work on, where they work in place.
//!
//! A write that copies a block up writes sectors that are not its own, and the kernel may show a
//! reader half of a write. So whoever writes a range has it alone; readers share it. Requests that
//! do not overlap do not meet. The list is as long as there are requests in flight, and takes no
//! memory once it has been that long.

use super::lock;
use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

/// The ranges of one disk.
#[derive(Debug, Default)]
pub(super) struct Claims {
    held: Mutex<Vec<Held>>,
    freed: Condvar,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    range: Range<u64>,
    alone: bool,
}

impl Held {
    fn excludes(&self, other: &Self) -> bool {
        let overlap = self.range.start < other.range.end && other.range.start < self.range.end;
        overlap && (self.alone || other.alone)
    }
}

/// A range that is held until this is dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    held: Held,
}

impl Claims {
    /// Waits until nobody writes `range`.
    pub(super) fn share(&self, range: Range<u64>) -> Claim<'_> {
        self.claim(Held { range, alone: false })
    }

    /// Waits until nobody reads or writes `range`.
    pub(super) fn take(&self, range: Range<u64>) -> Claim<'_> {
        self.claim(Held { range, alone: true })
    }

    fn claim(&self, wanted: Held) -> Claim<'_> {
        let mut held = lock(&self.held);
        while held.iter().any(|other| other.excludes(&wanted)) {
            held = self.freed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.push(wanted.clone());
        Claim { claims: self, held: wanted }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = lock(&self.claims.held);
        if let Some(place) = held.iter().position(|other| *other == self.held) {
            held.swap_remove(place);
        }
        drop(held);
        self.claims.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn only_readers_share_a_range() {
        let claims = Claims::default();
        let held = |range, alone| Held { range, alone };
        for (one, other, excludes) in [
            (held(0..8, false), held(4..12, false), false),
            (held(0..8, true), held(4..12, false), true),
            (held(0..8, false), held(7..8, true), true),
            (held(0..8, true), held(8..16, true), false),
        ] {
            assert_eq!(one.excludes(&other), excludes, "{one:?} {other:?}");
            assert_eq!(other.excludes(&one), excludes, "{one:?} {other:?}");
        }
        let (one, other) = (claims.share(0..8), claims.share(0..8));
        drop(one);
        assert_eq!(lock(&claims.held).len(), 1, "one of two that are alike is left");
        drop(other);
        drop(claims.take(0..8));
    }

    #[test]
    fn who_wants_a_range_alone_waits_for_those_who_have_it() {
        let claims = Claims::default();
        let let_go = AtomicBool::new(false);
        let reader = claims.share(0..8);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let _alone = claims.take(7..9);
                assert!(let_go.load(Ordering::Acquire), "the reader was still there");
            });
            drop(claims.take(8..16));
            let_go.store(true, Ordering::Release);
            drop(reader);
            writer.join().unwrap();
        });
    }
}
