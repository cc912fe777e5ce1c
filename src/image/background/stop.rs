//! A flag that wakes who waits for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Stop {
    is_set: AtomicBool,
    gate: Mutex<()>,
    bell: Condvar,
}

impl Stop {
    pub(super) fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self) {
        let _gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_set.store(true, Ordering::Relaxed);
        self.bell.notify_all();
    }

    /// Waits so long, or until it is set.
    pub(super) fn wait(&self, time: Duration) {
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.bell.wait_timeout_while(gate, time, |()| !self.is_set());
    }
}
