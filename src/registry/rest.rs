//! When a mirror or a peer that could not be reached is asked again. The clock is handed in.
//!
//! ```text
//!   asked --fails--> rests, twice as long each time --over--> one request tries it, the others go
//!     past it --answers--> asked by all
//! ```

use crate::limits::{MIRROR_REST_MS, MIRROR_REST_MS_MAX, MIRROR_TRIAL_MS};
use std::time::{Duration, Instant};

/// How one host fares as a mirror or peer.
#[derive(Debug)]
pub(super) struct Rest {
    until: Instant,
    /// Rests since it answered last.
    failures: u32,
    /// Whether one request is finding out how it is.
    is_tried: bool,
}

impl Rest {
    pub(super) const fn new(now: Instant) -> Self {
        Self { until: now, failures: 0, is_tried: false }
    }

    /// Whether it is not to be asked now.
    pub(super) fn is_resting(&self, now: Instant) -> bool {
        now < self.until
    }

    /// Whether the caller may ask it. After a rest that is one caller, whose outcome decides for
    /// all; one that never tells it delays the next by [`MIRROR_TRIAL_MS`].
    pub(super) fn begin(&mut self, now: Instant) -> bool {
        if self.is_resting(now) {
            return false;
        }
        if self.failures > 0 {
            self.until = now + Duration::from_millis(MIRROR_TRIAL_MS);
            self.is_tried = true;
        }
        true
    }

    /// It could not be reached, or was too slow.
    pub(super) fn failed(&mut self, now: Instant) {
        // Those who asked together fail together: that is one failure.
        if self.is_resting(now) && !self.is_tried {
            return;
        }
        let doubled = MIRROR_REST_MS.saturating_mul(1 << self.failures.min(16));
        self.until = now + Duration::from_millis(doubled.min(MIRROR_REST_MS_MAX));
        self.failures = self.failures.saturating_add(1);
        self.is_tried = false;
    }

    /// It answered, whatever the answer was.
    pub(super) fn answered(&mut self, now: Instant) {
        if self.failures > 0 {
            *self = Self::new(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn a_host_rests_longer_each_time_and_then_one_request_tries_it() {
        let mut now = Instant::now();
        let mut rest = Rest::new(now);
        assert!(rest.begin(now) && rest.begin(now), "all ask one that works");
        for length in [MIRROR_REST_MS, 2 * MIRROR_REST_MS, 4 * MIRROR_REST_MS] {
            rest.failed(now);
            // Another request that was under way at the same time.
            rest.failed(now);
            assert!(!rest.begin(now + ms(length - 1)), "{length}");
            now += ms(length);
            assert!(rest.begin(now), "{length}");
            assert!(!rest.begin(now), "{length}: one of them");
        }
        for _ in 0..40 {
            rest.failed(now);
            now += ms(MIRROR_REST_MS_MAX);
            assert!(rest.begin(now), "never longer than that");
        }
        rest.answered(now);
        assert!(rest.begin(now) && rest.begin(now), "it works again");
        rest.failed(now);
        assert!(rest.begin(now + ms(MIRROR_REST_MS)), "from the beginning");
    }

    #[test]
    fn a_trial_that_never_ends_is_not_waited_for() {
        let now = Instant::now();
        let mut rest = Rest::new(now);
        rest.failed(now);
        let over = now + ms(MIRROR_REST_MS);
        assert!(rest.begin(over) && !rest.begin(over));
        assert!(rest.begin(over + ms(MIRROR_TRIAL_MS)));
    }
}
