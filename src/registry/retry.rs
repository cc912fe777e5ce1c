//! When to ask again, and when to give up. Arithmetic only: the clock is handed in.

use crate::error::ErrorKind;
use crate::limits::{
    REGISTRY_BACKOFF_MS_MAX, REGISTRY_BACKOFF_MS_MIN, REGISTRY_RETRIES_BURST,
    REGISTRY_RETRIES_PER_SECOND, REGISTRY_RETRY_AFTER_MS_MAX,
};
use std::time::{Duration, Instant, SystemTime};

/// What may help against a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Time: the network or the server is in trouble.
    Wait,
    /// A few tries: an answer that should not be, from a cache or proxy on the way.
    Few,
    /// Time, as long as the host asked for; nothing was sent.
    Hold,
    /// Another token or another credential.
    Credentials,
    /// Nothing.
    Nothing,
}

/// What a status other than success means: what may help, and what it is in the end if that does
/// not.
#[must_use]
pub(super) const fn classify(status: u16) -> (Remedy, ErrorKind) {
    match status {
        401 | 403 | 407 => (Remedy::Credentials, ErrorKind::Unauthorized),
        404 | 410 => (Remedy::Nothing, ErrorKind::NotFound),
        408 | 425 | 429 | 500 | 502..=504 | 506..=599 => (Remedy::Wait, ErrorKind::Unavailable),
        // 416 among them: a range inside the length we were told, and the registry has no such.
        400..=499 | 501 | 505 => (Remedy::Nothing, ErrorKind::Corrupt),
        _ => (Remedy::Few, ErrorKind::Corrupt),
    }
}

/// What `Retry-After` says, in either of its forms; `None` for neither. At most
/// [`REGISTRY_RETRY_AFTER_MS_MAX`].
#[must_use]
pub(super) fn retry_after(header: &str, now: SystemTime) -> Option<Duration> {
    let longest = Duration::from_millis(REGISTRY_RETRY_AFTER_MS_MAX);
    let text = header.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than a number has are a long time too.
        return Some(text.parse().map_or(longest, Duration::from_secs).min(longest));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default().min(longest))
}

/// The pauses between the attempts of one request: each twice as long as the one before, and a
/// random half of it, so that those who failed together do not come again together.
#[derive(Debug)]
pub(super) struct Backoff {
    next_ms: u64,
    random: fastrand::Rng,
}

impl Backoff {
    /// The pauses of one request; `random` decides the jitter.
    #[must_use]
    pub(super) const fn new(random: fastrand::Rng) -> Self {
        Self { next_ms: REGISTRY_BACKOFF_MS_MIN, random }
    }

    /// A moment by which those who wait for the same thing differ.
    pub(super) fn spread(&mut self) -> Duration {
        Duration::from_millis(self.random.u64(0..=REGISTRY_BACKOFF_MS_MIN))
    }

    /// The next pause.
    pub(super) fn next_pause(&mut self) -> Duration {
        let whole = self.next_ms;
        self.next_ms = whole.saturating_mul(2).min(REGISTRY_BACKOFF_MS_MAX);
        Duration::from_millis(self.random.u64(whole / 2..=whole))
    }
}

/// What all requests to one host may retry: a burst, and then a steady rate. A host that is down
/// sees few requests, however many reads wait for it; one that comes back is seen at once.
#[derive(Debug)]
pub(super) struct Budget {
    /// Retries that are left, in thousandths; negative while some have been promised a later time.
    left_milli: i64,
    counted_at: Instant,
}

const MILLI: i64 = 1000;

/// What a success gives back: half a retry, so that one failure in five never meets the rate.
const SUCCESS_MILLI: i64 = MILLI / 2;

impl Budget {
    /// A full budget.
    #[must_use]
    pub(super) const fn new(now: Instant) -> Self {
        Self { left_milli: REGISTRY_RETRIES_BURST * MILLI, counted_at: now }
    }

    /// Takes one retry. Returns how long to wait until it may be made.
    pub(super) fn take(&mut self, now: Instant) -> Duration {
        self.refill(now);
        self.left_milli = self.left_milli.saturating_sub(MILLI);
        let owed = u64::try_from(-self.left_milli).unwrap_or(0);
        Duration::from_millis(owed / REGISTRY_RETRIES_PER_SECOND.unsigned_abs())
    }

    /// Puts back a retry that was taken and not made.
    pub(super) fn put_back(&mut self) {
        self.add(MILLI);
    }

    /// Counts a request that went well.
    pub(super) fn succeeded(&mut self) {
        self.add(SUCCESS_MILLI);
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted_at).as_millis();
        self.counted_at = now.max(self.counted_at);
        // One retry per second is one thousandth per millisecond.
        let gained = i64::try_from(passed).unwrap_or(i64::MAX);
        self.add(gained.saturating_mul(REGISTRY_RETRIES_PER_SECOND));
    }

    fn add(&mut self, milli: i64) {
        let full = REGISTRY_RETRIES_BURST * MILLI;
        self.left_milli = self.left_milli.saturating_add(milli).min(full);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_status_has_its_remedy() {
        for (status, expected) in [
            (400, (Remedy::Nothing, ErrorKind::Corrupt)),
            (401, (Remedy::Credentials, ErrorKind::Unauthorized)),
            (403, (Remedy::Credentials, ErrorKind::Unauthorized)),
            (404, (Remedy::Nothing, ErrorKind::NotFound)),
            (408, (Remedy::Wait, ErrorKind::Unavailable)),
            (410, (Remedy::Nothing, ErrorKind::NotFound)),
            (416, (Remedy::Nothing, ErrorKind::Corrupt)),
            (429, (Remedy::Wait, ErrorKind::Unavailable)),
            (500, (Remedy::Wait, ErrorKind::Unavailable)),
            (501, (Remedy::Nothing, ErrorKind::Corrupt)),
            (502, (Remedy::Wait, ErrorKind::Unavailable)),
            (503, (Remedy::Wait, ErrorKind::Unavailable)),
            (504, (Remedy::Wait, ErrorKind::Unavailable)),
            (599, (Remedy::Wait, ErrorKind::Unavailable)),
            (204, (Remedy::Few, ErrorKind::Corrupt)),
            (304, (Remedy::Few, ErrorKind::Corrupt)),
        ] {
            assert_eq!(classify(status), expected, "{status}");
        }
    }

    #[test]
    fn retry_after_is_understood_in_both_forms() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let longest = Duration::from_millis(REGISTRY_RETRY_AFTER_MS_MAX);
        for (header, expected) in [
            ("0", Some(Duration::ZERO)),
            (" 7 ", Some(Duration::from_secs(7))),
            ("86400", Some(longest)),
            ("99999999999999999999", Some(longest)),
            ("Sun, 06 Nov 1994 08:49:40 GMT", Some(Duration::from_secs(3))),
            ("Sunday, 06-Nov-94 08:49:40 GMT", Some(Duration::from_secs(3))),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(Duration::ZERO)),
            ("Sat, 06 Nov 2094 08:49:40 GMT", Some(longest)),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(header, now), expected, "{header}");
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut backoff = Backoff::new(fastrand::Rng::with_seed(1));
        let mut whole = REGISTRY_BACKOFF_MS_MIN;
        for _ in 0..12 {
            let pause = backoff.next_pause();
            assert!(pause >= Duration::from_millis(whole / 2), "{pause:?} {whole}");
            assert!(pause <= Duration::from_millis(whole), "{pause:?} {whole}");
            whole = (2 * whole).min(REGISTRY_BACKOFF_MS_MAX);
        }
    }

    #[test]
    fn those_who_failed_together_do_not_come_again_together() {
        let pauses = (0..100).map(|seed| {
            let mut backoff = Backoff::new(fastrand::Rng::with_seed(seed));
            backoff.next_pause();
            backoff.next_pause()
        });
        let different: std::collections::BTreeSet<Duration> = pauses.collect();
        assert!(different.len() > 50, "{}", different.len());
    }

    #[test]
    fn a_dead_host_sees_a_burst_and_then_a_steady_rate() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        for _ in 0..REGISTRY_RETRIES_BURST {
            assert_eq!(budget.take(start), Duration::ZERO);
        }
        let step = 1000 / REGISTRY_RETRIES_PER_SECOND.unsigned_abs();
        assert_eq!(budget.take(start), Duration::from_millis(step));
        assert_eq!(budget.take(start), Duration::from_millis(2 * step));
        budget.put_back();
        assert_eq!(budget.take(start), Duration::from_millis(2 * step));
        let later = start + Duration::from_millis(2 * step);
        assert_eq!(budget.take(later), Duration::from_millis(step));
    }

    proptest! {
        #[test]
        fn no_more_retries_than_burst_and_rate_allow(
            waits_ms in prop::collection::vec(0_u64..50, 500)
        ) {
            let start = Instant::now();
            let (mut now, mut budget, mut made) = (start, Budget::new(start), 0_u64);
            for wait in waits_ms {
                now += Duration::from_millis(wait);
                if budget.take(now) == Duration::ZERO {
                    made += 1;
                } else {
                    budget.put_back();
                }
                let passed_ms = u64::try_from((now - start).as_millis()).unwrap();
                let rate = REGISTRY_RETRIES_PER_SECOND.unsigned_abs();
                let burst = REGISTRY_RETRIES_BURST.unsigned_abs();
                prop_assert!(made <= burst + passed_ms * rate / 1000);
            }
        }
    }
}
