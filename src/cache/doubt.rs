//! Whether a blob's bytes are taken from anybody but its origin.
//!
//! A mirror or a peer that gave wrong bytes gives them again. So, when wrong bytes of a blob were
//! noticed, by a decoder or by the digest of the whole, those that come next are fetched from the
//! origin itself ([`Fetch::fetch_from_origin`](crate::source::Fetch::fetch_from_origin)). Who gave
//! the wrong ones is not asked: several may have had a part in it. Other processes learn of it from
//! the records of what was thrown away.

use crate::limits::{CACHE_DISCARD_REST_MS, CACHE_DISTRUST_MS};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// An extent is thrown away once while it rests. If others were asked again before that is over,
/// what they get wrong could stay.
const _: () = assert!(CACHE_DISTRUST_MS > 2 * CACHE_DISCARD_REST_MS);

/// What is thought of everybody but the origin, of one blob in one process.
#[derive(Debug)]
pub(super) struct Doubt {
    begun: Instant,
    until_ms: AtomicU64,
}

impl Doubt {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), until_ms: AtomicU64::new(0) }
    }

    /// Bytes were wrong: none from others for a while.
    pub(super) fn raise(&self) {
        self.until_ms.fetch_max(self.now_ms().saturating_add(CACHE_DISTRUST_MS), Ordering::AcqRel);
    }

    /// All bytes together were wrong, and nothing but a digest tells: none from others any more.
    pub(super) fn raise_for_good(&self) {
        self.until_ms.store(u64::MAX, Ordering::Release);
    }

    /// Whether only the origin is to be asked.
    pub(super) fn is_raised(&self) -> bool {
        match self.until_ms.load(Ordering::Acquire) {
            0 => false,
            until => self.now_ms() < until,
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubt_passes_and_one_for_good_does_not() {
        let doubt = Doubt::new();
        assert!(!doubt.is_raised());
        doubt.raise();
        assert!(doubt.is_raised());
        let begun = doubt.begun.checked_sub(std::time::Duration::from_millis(CACHE_DISTRUST_MS));
        let later = Doubt { begun: begun.unwrap(), ..doubt };
        assert!(!later.is_raised(), "after a while");
        later.raise_for_good();
        later.raise();
        assert!(later.is_raised());
        assert_eq!(later.until_ms.load(Ordering::Relaxed), u64::MAX);
    }
}
