//! Signals as events: no handler runs, so nothing is interrupted.
//!
//! SIGTERM, SIGINT and SIGHUP are blocked in the first thread before there are others, which
//! inherit that, and one thread waits for them. It must be started after the server has left the
//! caller's mounts: a thread in the old mount namespace would keep all of it alive.

use super::control::Event;
use crate::error::{Error, Result};
use nix::sys::signal::{SigSet, Signal};
use std::sync::mpsc::Sender;

fn ending() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect()
}

/// Blocks the signals that ask for the end, in this thread and those it will start.
///
/// # Errors
/// What the operating system says.
pub(super) fn block() -> Result<()> {
    ending().thread_block().map_err(|errno| Error::io("block signals", &errno.into()))
}

/// Starts the thread that turns those signals into events.
///
/// # Errors
/// When no thread can be had.
pub(super) fn forward(events: Sender<Event>) -> Result<()> {
    let wait = move || {
        let signals = ending();
        while let Ok(signal) = signals.wait() {
            if events.send(Event::Signal(signal.as_str())).is_err() {
                break;
            }
        }
    };
    let spawned = std::thread::Builder::new().name("signals".to_owned()).spawn(wait);
    spawned.map(drop).map_err(|error| Error::io("start the signal thread", &error))
}
