//! The executor below all requests: one for the process, on threads of its own.
//!
//! It is started at first use, so that a process that forks before it reads anything may do so.
//! Its threads are marked as I/O flushers where the process may do that: a read that pages wait for
//! must not itself wait for pages to be written.

use crate::error::{Error, Result};
use std::sync::{Mutex, PoisonError};
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
pub(super) fn handle() -> Result<Handle> {
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

fn mark_as_flusher() {
    // It takes CAP_SYS_RESOURCE. Without it there is no device to serve either.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!("a thread could not be marked as an I/O flusher: {error}");
    }
}
