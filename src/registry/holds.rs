//! Hosts that asked to be left alone for a while (`Retry-After`), and until when: registries, the
//! stores they redirect to, mirrors and token servers alike. The clock is handed in.

use crate::limits::REGISTRY_HOSTS_MAX;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What hosts have asked for, by their names with ports.
#[derive(Debug, Default)]
pub(super) struct Holds {
    until: Mutex<HashMap<String, Instant>>,
}

impl Holds {
    /// How long `host` is still to be left alone; zero if it may be asked.
    pub(super) fn left(&self, host: &str, now: Instant) -> Duration {
        let until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.get(host).map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// Leaves `host` alone for so long, and not for less than it asked for before.
    pub(super) fn add(&self, host: &str, pause: Duration, now: Instant) {
        let Some(end) = now.checked_add(pause) else { return };
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        if until.len() >= REGISTRY_HOSTS_MAX {
            until.retain(|_, until| *until > now);
        }
        if until.len() >= REGISTRY_HOSTS_MAX && !until.contains_key(host) {
            // No image has so many: whoever sends us to them may be asked too early.
            until.clear();
        }
        let known = until.entry(host.to_owned()).or_insert(end);
        *known = end.max(*known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_left_alone_for_the_longest_that_it_asked_for() {
        let (holds, now) = (Holds::default(), Instant::now());
        let seconds = Duration::from_secs;
        assert_eq!(holds.left("h:1", now), Duration::ZERO);
        holds.add("h:1", seconds(5), now);
        holds.add("h:1", seconds(2), now);
        assert_eq!(holds.left("h:1", now + seconds(1)), seconds(4));
        assert_eq!(holds.left("h:2", now), Duration::ZERO, "nobody else is");
        assert_eq!(holds.left("h:1", now + seconds(6)), Duration::ZERO);
    }

    #[test]
    fn no_more_hosts_are_remembered_than_an_image_can_have() {
        let (holds, now) = (Holds::default(), Instant::now());
        let second = Duration::from_secs(1);
        for number in 0..REGISTRY_HOSTS_MAX {
            holds.add(&number.to_string(), second * (1 + u32::from(number == 0)), now);
        }
        holds.add("one more", second, now + second);
        assert_eq!(holds.left("0", now + second), second, "only what is over has gone");
        for number in 0..2 * REGISTRY_HOSTS_MAX {
            holds.add(&number.to_string(), second, now + second);
            assert!(holds.until.lock().unwrap().len() <= REGISTRY_HOSTS_MAX);
        }
    }
}
