//! Bringing whole layers here: as overlaybd's `download` settings say, and without them where most
//! of a layer was wanted already.

use super::pace::Pace;
use super::replay::let_reads_pass;
use super::stop::Stop;
use crate::format::config::Download;
use crate::limits::{
    BACKGROUND_WHOLE_PERCENT, DOWNLOAD_PIECE_BYTES_MAX, DOWNLOAD_PIECE_BYTES_MIN,
    DOWNLOAD_TRIES_MAX,
};
use crate::source::RemoteBlob;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The pause before a layer that failed is tried again; each next one is twice as long.
const PAUSE: Duration = Duration::from_secs(1);

/// The longest such pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// How to download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// After which time every layer is wanted; `None` for never.
    pub(super) delay: Option<Duration>,
    pub(super) bytes_per_second: u64,
    pub(super) tries: u32,
    pub(super) piece_bytes: u64,
}

impl Plan {
    /// What these settings mean, with the random part of the delay drawn.
    pub(super) fn of(settings: &Download) -> Self {
        // A new state's hash of nothing is random.
        Self::with(settings, RandomState::new().build_hasher().finish())
    }

    fn with(settings: &Download, lot: u64) -> Self {
        let extra = lot.checked_rem(settings.delay_extra).unwrap_or(0);
        let delay = Duration::from_secs(settings.delay.saturating_add(extra));
        let tries = settings.try_count.clamp(1, u64::from(DOWNLOAD_TRIES_MAX));
        let piece = settings.block_size;
        Self {
            delay: settings.enable.then_some(delay),
            bytes_per_second: settings.max_mbps.saturating_mul(1 << 20),
            tries: u32::try_from(tries).unwrap_or(DOWNLOAD_TRIES_MAX),
            piece_bytes: piece.clamp(DOWNLOAD_PIECE_BYTES_MIN, DOWNLOAD_PIECE_BYTES_MAX),
        }
    }
}

/// The layers of one image, and what became of each.
#[derive(Debug)]
pub(super) struct Downloads {
    open: Vec<Job>,
    plan: Plan,
    pace: Pace,
}

#[derive(Debug)]
struct Job {
    blob: Arc<dyn RemoteBlob>,
    tries_left: u32,
    not_before: Option<Instant>,
}

impl Downloads {
    /// Nothing is fetched before somebody looks.
    pub(super) fn new(blobs: Vec<Arc<dyn RemoteBlob>>, plan: Plan) -> Self {
        let tries_left = plan.tries;
        let job = |blob| Job { blob, tries_left, not_before: None };
        let pace = Pace::new(plan.bytes_per_second);
        Self { open: blobs.into_iter().map(job).collect(), plan, pace }
    }

    fn is_due(&self, begun: Instant) -> bool {
        self.plan.delay.is_some_and(|delay| begun.elapsed() >= delay)
    }

    /// How long until there is something to look at, `usual` at most.
    pub(super) fn next_look(&self, begun: Instant, usual: Duration) -> Duration {
        let now = Instant::now();
        let due = self.plan.delay.map(|delay| delay.saturating_sub(begun.elapsed()));
        let due = due.filter(|left| !left.is_zero());
        let again = self.open.iter().filter_map(|job| job.not_before);
        let again = again.map(|at| at.saturating_duration_since(now));
        let first = again.chain(due).min().unwrap_or(usual);
        first.clamp(Duration::from_millis(10), usual)
    }

    /// Brings here what is due now; false when nothing is left to be done.
    pub(super) fn look(&mut self, stop: &Stop, begun: Instant) -> bool {
        let is_due = self.is_due(begun);
        let Self { open, plan, pace } = self;
        open.retain_mut(|job| {
            if job.blob.is_here(0, job.blob.bytes()) {
                return false;
            }
            let is_resting = job.not_before.is_some_and(|at| Instant::now() < at);
            if !is_resting {
                // A rest that is over is nothing to wake up for.
                job.not_before = None;
            }
            if stop.is_set() || is_resting || !(is_due || is_mostly_here(&*job.blob)) {
                return true;
            }
            job.run(plan, pace, stop, begun)
        });
        !open.is_empty()
    }
}

fn is_mostly_here(blob: &dyn RemoteBlob) -> bool {
    let here = u128::from(blob.here_bytes());
    here * 100 >= u128::from(blob.bytes()) * u128::from(BACKGROUND_WHOLE_PERCENT)
}

impl Job {
    /// One try for all of a blob. Whether there is to be another one.
    fn run(&mut self, plan: &Plan, pace: &mut Pace, stop: &Stop, begun: Instant) -> bool {
        let blob = &*self.blob;
        let mut at = 0;
        let mut failure = None;
        while at < blob.bytes() {
            let piece = at..at.saturating_add(plan.piece_bytes).min(blob.bytes());
            at = piece.end;
            if blob.is_here(piece.start, piece.end - piece.start) {
                continue;
            }
            let_reads_pass(blob, stop);
            stop.wait(pace.take(begun.elapsed(), piece.end - piece.start));
            if stop.is_set() {
                return true;
            }
            if let Err(error) = blob.fetch_ahead(piece) {
                failure = Some(error);
                break;
            }
        }
        if blob.is_here(0, blob.bytes()) {
            tracing::info!(blob = blob.name(), "all of it is here");
            return false;
        }
        self.tries_left = self.tries_left.saturating_sub(1);
        let why = failure.map_or_else(String::new, |error| format!("{error:#}"));
        tracing::info!(blob = blob.name(), left = self.tries_left, why, "not all of it is here");
        let done = plan.tries.saturating_sub(self.tries_left).saturating_sub(1);
        let pause = PAUSE.saturating_mul(1 << done.min(6)).min(PAUSE_MAX);
        self.not_before = Some(Instant::now() + pause);
        self.tries_left > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_a_plan_within_its_bounds() {
        let settings = Download { enable: true, ..Download::default() };
        let plan = Plan::with(&settings, 64);
        let expected = Plan {
            delay: Some(Duration::from_secs(304)),
            bytes_per_second: 100 << 20,
            tries: 5,
            piece_bytes: 262_144,
        };
        assert_eq!(plan, expected);
        assert_eq!(Plan::with(&Download::default(), 64).delay, None);
        let odd = Download {
            enable: true,
            delay: u64::MAX,
            delay_extra: 0,
            max_mbps: u64::MAX,
            try_count: 0,
            block_size: 0,
        };
        let plan = Plan::with(&odd, 7);
        assert_eq!((plan.tries, plan.piece_bytes), (1, DOWNLOAD_PIECE_BYTES_MIN));
        assert_eq!(plan.delay, Some(Duration::from_secs(u64::MAX)));
        let large = Download { block_size: u64::MAX, try_count: u64::MAX, ..settings };
        let plan = Plan::with(&large, 0);
        assert_eq!(plan.piece_bytes, DOWNLOAD_PIECE_BYTES_MAX);
        assert_eq!(plan.tries, DOWNLOAD_TRIES_MAX);
    }
}
