//! What to do about a device whose server is gone: pure decisions.

use crate::limits::{RECOVERY_SETTLED_MS, RECOVERY_TRIES_MAX};
use crate::server::state::Phase;
use std::time::Duration;

/// What is known of a device when its server is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Remains {
    /// How far the server had come; `None` if it had not written that down.
    pub(super) phase: Option<Phase>,
    /// Whether the kernel keeps the device for a successor.
    pub(super) recoverable: bool,
    /// Whether the process that is written down still runs: then it is another one that died.
    pub(super) server_lives: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing: the device is somebody else's business now.
    Forget,
    /// Delete what is left of it.
    Clear,
    /// Start a successor.
    Revive,
}

/// The decision. `repeats_takeovers` is the kernel's word for [`Phase::Taking`].
pub(super) fn verdict(remains: Remains, repeats_takeovers: bool) -> Verdict {
    if remains.server_lives {
        return Verdict::Forget;
    }
    match remains.phase {
        Some(Phase::Live) if remains.recoverable => Verdict::Revive,
        // On kernels that cannot repeat it nobody can ever serve that device again.
        Some(Phase::Taking) if repeats_takeovers => Verdict::Revive,
        None | Some(Phase::Starting | Phase::Live | Phase::Taking | Phase::Stopping) => {
            Verdict::Clear
        }
    }
}

/// How long to wait before each try for a device whose servers keep dying early: the first at
/// once, for readers wait; then time enough for a full disk or a lack of memory to pass.
const DELAYS_MS: [u64; RECOVERY_TRIES_MAX as usize] = [0, 100, 500, 2000, 5000];

/// The deaths of one device's servers that came early, in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Deaths {
    early: u32,
}

impl Deaths {
    /// One more death, of a server that had served for `served` (`None`: never got there). Returns
    /// how long to wait before the next try; `None` when it is time to give up.
    pub(super) fn add(&mut self, served: Option<Duration>) -> Option<Duration> {
        if served.is_some_and(|served| served >= Duration::from_millis(RECOVERY_SETTLED_MS)) {
            self.early = 0;
        }
        let delay = usize::try_from(self.early).ok().and_then(|early| DELAYS_MS.get(early));
        self.early = self.early.saturating_add(1);
        delay.map(|&delay| Duration::from_millis(delay))
    }

    /// How many there were.
    pub(super) fn count(self) -> u32 {
        self.early
    }
}

/// How a supervisor is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// As a service of systemd.
    Service,
    /// As a process of the one that needs it.
    Process,
}

/// How many times systemd is asked before it is done without. The second time is for a supervisor
/// that was ending at the first: its unit was there still, and so systemd started none.
const SERVICE_TRIES_MAX: u32 = 2;

/// How to start a supervisor after `starts` that led to none.
pub(super) fn way(systemd_rules: bool, starts: u32) -> Way {
    if systemd_rules && starts < SERVICE_TRIES_MAX { Way::Service } else { Way::Process }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_comes_back_only_from_where_it_was_usable() {
        let remains =
            |phase, recoverable, server_lives| Remains { phase, recoverable, server_lives };
        for (remains, repeats, expected) in [
            (remains(Some(Phase::Live), true, false), false, Verdict::Revive),
            (remains(Some(Phase::Live), false, false), true, Verdict::Clear),
            (remains(Some(Phase::Live), true, true), true, Verdict::Forget),
            (remains(Some(Phase::Taking), true, false), true, Verdict::Revive),
            (remains(Some(Phase::Taking), true, false), false, Verdict::Clear),
            (remains(Some(Phase::Starting), true, false), true, Verdict::Clear),
            (remains(Some(Phase::Stopping), true, false), true, Verdict::Clear),
            (remains(None, false, false), true, Verdict::Clear),
        ] {
            assert_eq!(verdict(remains, repeats), expected, "{remains:?} {repeats}");
        }
    }

    #[test]
    fn servers_that_die_early_are_replaced_ever_later_and_then_not_at_all() {
        let mut deaths = Deaths::default();
        let early = Some(Duration::from_millis(RECOVERY_SETTLED_MS - 1));
        let delays: Vec<_> = (0..7).map(|_| deaths.add(early).map(|d| d.as_millis())).collect();
        let expected = [Some(0), Some(100), Some(500), Some(2000), Some(5000), None, None];
        assert_eq!(delays, expected);
        assert_eq!(deaths.count(), 7);
        assert_eq!(deaths.add(None), None, "never usable is early too");
    }

    #[test]
    fn a_server_that_has_settled_may_die_as_often_as_it_likes() {
        let mut deaths = Deaths::default();
        for _ in 0..100 {
            let settled = Some(Duration::from_millis(RECOVERY_SETTLED_MS));
            assert_eq!(deaths.add(settled), Some(Duration::ZERO));
            assert_eq!(deaths.add(None), Some(Duration::from_millis(100)));
        }
    }

    #[test]
    fn systemd_is_asked_twice_and_then_done_without() {
        let ways = |rules| [0, 1, 2, 3].map(|starts| way(rules, starts));
        assert_eq!(ways(true), [Way::Service, Way::Service, Way::Process, Way::Process]);
        assert_eq!(ways(false), [Way::Process; 4]);
    }
}
