//! So many bytes a second: numbers only.

use std::time::Duration;

/// How fast something may go on.
#[derive(Debug)]
pub(super) struct Pace {
    /// 0 for no limit.
    bytes_per_second: u64,
    /// When what was taken is paid for, on the caller's clock.
    free_at: Duration,
}

impl Pace {
    /// No more than so many bytes a second; 0 for no limit.
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, free_at: Duration::ZERO }
    }

    /// How long to wait at `now` before `bytes` more. Time that passed unused is not saved up.
    pub(super) fn take(&mut self, now: Duration, bytes: u64) -> Duration {
        let micros = bytes.saturating_mul(1_000_000).checked_div(self.bytes_per_second);
        let Some(micros) = micros else { return Duration::ZERO };
        let begin = self.free_at.max(now);
        self.free_at = begin.saturating_add(Duration::from_micros(micros));
        begin.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_limit_is_no_wait() {
        let mut pace = Pace::new(0);
        assert_eq!(pace.take(Duration::ZERO, u64::MAX), Duration::ZERO);
        assert_eq!(pace.take(Duration::ZERO, 1), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn what_was_begun_by_any_time_is_the_rate_and_one_piece(
            rate in 1_u64..10_000_000,
            pieces in prop::collection::vec((0_u64..3_000_000, 1_u64..1_000_000), 1..50),
        ) {
            let mut pace = Pace::new(rate);
            let (mut now, mut begun) = (Duration::ZERO, 0_u64);
            for (idle_micros, bytes) in pieces {
                now += Duration::from_micros(idle_micros);
                now += pace.take(now, bytes);
                let allowed = u128::from(rate) * now.as_micros() / 1_000_000;
                // Rounded to microseconds, for each piece.
                prop_assert!(u128::from(begun) <= allowed + 50 * 10);
                begun += bytes;
            }
        }
    }
}
