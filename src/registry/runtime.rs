//! The executors below all requests, each on threads of its own: one for the process as long as it
//! reads from one registry, and another one for the next, so that a server that floods us costs no
//! other registry's reads more than their share of the processor.
//!
//! They are started at first use, so that a process that forks before it reads anything may do so.
//! Their threads are marked as I/O flushers where the process may do that: a read that pages wait
//! for must not itself wait for pages to be written.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::REGISTRY_EXECUTORS_MAX;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Handle, Runtime};

/// Threads of one that poll sockets, decrypt, and copy bodies to where they belong. One does some
/// GB/s; a second one is woken for every other thing that happens: a sixth of the processor time of
/// a cold miss. What is checked and stored is so by those who wait for it.
const WORKERS: usize = 1;

/// Tasks between two looks at clocks and sockets. Of the usual 61, each of which may take in tens
/// of megabytes of what is no body before the HTTP library lets it go, a few connections make a
/// minute in which no deadline passes. With 1, a task that gives way comes before all others again.
const TASKS_PER_LOOK: u32 = 4;

/// Threads of one for what blocks: name look-ups, credential files and helpers.
const BLOCKING_MAX: usize = 16;

static EXECUTORS: Mutex<[Option<Runtime>; REGISTRY_EXECUTORS_MAX]> =
    Mutex::new([const { None }; REGISTRY_EXECUTORS_MAX]);

static LANES: AtomicUsize = AtomicUsize::new(0);

/// Which of the executors serves a registry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane(usize);

impl Lane {
    /// The one whose turn it is.
    pub(super) fn next() -> Self {
        Self(LANES.fetch_add(1, Ordering::Relaxed) % REGISTRY_EXECUTORS_MAX)
    }

    /// Its executor.
    ///
    /// # Errors
    /// `Io` when its threads cannot be started.
    pub(super) fn executor(self) -> Result<Handle> {
        let mut executors = EXECUTORS.lock().unwrap_or_else(PoisonError::into_inner);
        let none = || Error::io("start an executor", &std::io::Error::other("bug: no such lane"));
        let place = executors.get_mut(self.0).ok_or_else(none)?;
        if let Some(runtime) = place {
            return Ok(runtime.handle().clone());
        }
        Ok(place.insert(start()?).handle().clone())
    }
}

fn start() -> Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    builder
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_MAX)
        .event_interval(TASKS_PER_LOOK)
        .thread_name("registry")
        .on_thread_start(mark_as_flusher)
        .enable_all();
    let failed = |error| Error::io("start the threads that speak to registries", &error);
    builder.build().map_err(failed)
}

/// How long after its deadline work that ends there by itself is still waited for: its own error
/// tells more, and on a busy machine a timer is late.
const GRACE: Duration = Duration::from_millis(500);

/// How often those who wait look whether they still want to. The work looks, too, and at once: this
/// is for an executor that does not get on.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What became of work instead of its result.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// The executor does not get on.
    Late,
    /// Nobody wants it any more, and the executor does not get on.
    Unwanted,
    /// It panicked.
    Died,
}

impl Lost {
    /// The error of what was to be done.
    pub(super) fn error(&self, what: &str) -> Error {
        let (kind, why) = match self {
            Self::Late => (ErrorKind::Timeout, "its executor hangs"),
            Self::Unwanted => (ErrorKind::Canceled, "the reader is going away"),
            Self::Died => (ErrorKind::Io, "bug: it panicked"),
        };
        Error::new(kind, format!("{what}: {why}"))
    }
}

/// Has the executor do `work`, which ends by itself at `deadline` and when it is not wanted, and
/// waits for it: on a clock of its own, so that whatever keeps the executor's thread busy is an
/// error and not a hang.
///
/// # Errors
/// When there is no result a little after `deadline`, or after it is not wanted.
pub(super) fn run<T: Send + 'static>(
    handle: &Handle,
    deadline: Instant,
    is_wanted: impl Fn() -> bool,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Lost> {
    let (sender, receiver) = sync_channel(1);
    let task = handle.spawn(async move {
        // Nobody may be waiting any more.
        let _ = sender.send(work.await);
    });
    let end = deadline.max(Instant::now()) + GRACE;
    let mut was_wanted = true;
    let lost = loop {
        let left = end.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left.min(LOOK_EVERY)) {
            Ok(done) => return Ok(done),
            Err(RecvTimeoutError::Disconnected) => break Lost::Died,
            Err(RecvTimeoutError::Timeout) if left <= LOOK_EVERY => break Lost::Late,
            // The work had the time between two looks to end by itself.
            Err(RecvTimeoutError::Timeout) if !was_wanted => break Lost::Unwanted,
            Err(RecvTimeoutError::Timeout) => was_wanted = is_wanted(),
        }
    };
    task.abort();
    Err(lost)
}

fn mark_as_flusher() {
    // It takes CAP_SYS_RESOURCE. Without it there is no device to serve either.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!("a thread could not be marked as an I/O flusher: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn work_that_nobody_does_or_that_dies_is_given_up() {
        // Its tasks run only while somebody blocks on it, and nobody does.
        let idle = Builder::new_current_thread().build().unwrap();
        let now = Instant::now();
        assert_eq!(run(idle.handle(), now, || true, async { 1 }), Err(Lost::Late));
        assert!(now.elapsed() >= GRACE);
        let soon = Instant::now() + Duration::from_secs(60);
        let executor = Lane::next().executor().unwrap();
        assert_eq!(run(&executor, soon, || true, async { 2 }), Ok(2));
        let dying = async { assert!(std::hint::black_box(false), "this task is meant to fail") };
        assert_eq!(run(&executor, soon, || true, dying), Err(Lost::Died));
    }

    #[test]
    fn work_that_is_not_wanted_any_more_is_waited_for_no_longer_than_a_moment() {
        let idle = Builder::new_current_thread().build().unwrap();
        let (now, soon) = (Instant::now(), Instant::now() + Duration::from_secs(60));
        let is_wanted = || now.elapsed() < Duration::from_millis(600);
        assert_eq!(run(idle.handle(), soon, is_wanted, async { 1 }), Err(Lost::Unwanted));
        assert!(now.elapsed() >= Duration::from_millis(600));
        assert!(now.elapsed() < Duration::from_secs(10), "{:?}", now.elapsed());
    }

    #[test]
    fn a_task_that_does_nothing_but_give_way_keeps_no_other_from_its_turn() {
        let executor = start().unwrap();
        let busy = executor.spawn(async {
            loop {
                tokio::task::yield_now().await;
            }
        });
        let soon = Instant::now() + Duration::from_secs(60);
        let neighbour = async {
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_millis(1)).await;
                tokio::spawn(async {}).await.unwrap();
            }
        };
        assert_eq!(run(executor.handle(), soon, || true, neighbour), Ok(()));
        busy.abort();
    }

    #[test]
    fn registries_have_executors_of_their_own_until_there_are_many() {
        // Other tests take their turns, too.
        let lanes = (0..8 * REGISTRY_EXECUTORS_MAX).map(|_| Lane::next().0);
        let lanes: BTreeSet<usize> = lanes.collect();
        assert_eq!(lanes.len(), REGISTRY_EXECUTORS_MAX);
        assert!(lanes.iter().all(|lane| Lane(*lane).executor().is_ok()));
    }
}
