//! The executor below all requests: one for the process, on threads of its own.
//!
//! It is started at first use, so that a process that forks before it reads anything may do so.
//! Its threads are marked as I/O flushers where the process may do that: a read that pages wait for
//! must not itself wait for pages to be written.

use crate::error::Error;
use std::future::Future;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Handle, Runtime};

/// Threads that poll sockets, decrypt, and copy bodies to where they belong. One does some GB/s; a
/// second one is woken for every other thing that happens: a sixth of the processor time of a cold
/// miss. What is checked and stored is so by those who wait for it.
const WORKERS: usize = 1;

/// Threads for what blocks: name look-ups, credential files and helpers.
const BLOCKING_MAX: usize = 16;

static RUNTIME: Mutex<Option<Runtime>> = Mutex::new(None);

/// The process's executor.
///
/// # Errors
/// `Io` when its threads cannot be started.
pub(super) fn handle() -> crate::error::Result<Handle> {
    let mut runtime = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(runtime) = runtime.as_ref() {
        return Ok(runtime.handle().clone());
    }
    let started = Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_MAX)
        .thread_name("registry")
        .on_thread_start(mark_as_flusher)
        .enable_all()
        .build()
        .map_err(|error| Error::io("start the threads that speak to registries", &error))?;
    Ok(runtime.insert(started).handle().clone())
}

/// How long after its deadline work that ends there by itself is still waited for: its own error
/// tells more, and on a busy machine a timer is late.
const GRACE: Duration = Duration::from_secs(2);

/// What became of work instead of its result.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// The executor does not get on.
    Late,
    /// It panicked.
    Died,
}

/// Has the executor do `work`, which ends by itself at `deadline`, and waits for it: on a clock of
/// its own, so that a bug that blocks the executor's thread is an error and not a hang.
///
/// # Errors
/// When there is no result a little after `deadline`.
pub(super) fn run<T: Send + 'static>(
    handle: &Handle,
    deadline: Instant,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Lost> {
    let (sender, receiver) = sync_channel(1);
    let task = handle.spawn(async move {
        // Nobody may be waiting any more.
        let _ = sender.send(work.await);
    });
    let left = deadline.saturating_duration_since(Instant::now()).saturating_add(GRACE);
    receiver.recv_timeout(left).map_err(|error| {
        task.abort();
        match error {
            RecvTimeoutError::Timeout => Lost::Late,
            RecvTimeoutError::Disconnected => Lost::Died,
        }
    })
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

    #[test]
    fn work_that_nobody_does_or_that_dies_is_given_up() {
        // Its tasks run only while somebody blocks on it, and nobody does.
        let idle = Builder::new_current_thread().build().unwrap();
        let now = Instant::now();
        assert_eq!(run(idle.handle(), now, async { 1 }), Err(Lost::Late));
        assert!(now.elapsed() >= GRACE);
        let soon = Instant::now() + Duration::from_secs(60);
        assert_eq!(run(&handle().unwrap(), soon, async { 2 }), Ok(2));
        let dying = async { assert!(std::hint::black_box(false), "this task is meant to fail") };
        assert_eq!(run(&handle().unwrap(), soon, dying), Err(Lost::Died));
    }
}
