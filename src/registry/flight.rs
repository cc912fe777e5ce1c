//! One at a time: many want the same thing, one gets it, all have it.

use super::sync::{Mutex, spawn, watch};
use std::fmt;
use std::future::Future;
use std::sync::PoisonError;

/// Something that is being got by at most one task.
pub(super) struct Flight<T> {
    current: Mutex<Option<watch::Receiver<Option<T>>>>,
}

impl<T> Default for Flight<T> {
    fn default() -> Self {
        Self { current: Mutex::new(None) }
    }
}

impl<T> fmt::Debug for Flight<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Flight")
    }
}

impl<T: Clone + Send + Sync + 'static> Flight<T> {
    /// Waits for what is being got, or starts to get it. The work runs as a task of its own: it
    /// does not end with the one who happened to start it. `None` if that task was lost.
    pub(super) async fn join<F>(&self, start: impl FnOnce() -> F) -> Option<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut receiver = self.receiver(start);
        let got = receiver.wait_for(Option::is_some).await.ok()?;
        got.clone()
    }

    /// Starts to get it without waiting, unless somebody does already.
    pub(super) fn begin<F>(&self, start: impl FnOnce() -> F)
    where
        F: Future<Output = T> + Send + 'static,
    {
        drop(self.receiver(start));
    }

    fn receiver<F>(&self, start: impl FnOnce() -> F) -> watch::Receiver<Option<T>>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // What has arrived is history, and so is a task that was lost.
        let is_under_way = |receiver: &&watch::Receiver<Option<T>>| {
            receiver.borrow().is_none() && receiver.has_changed().is_ok()
        };
        if let Some(receiver) = current.as_ref().filter(is_under_way) {
            return receiver.clone();
        }
        let (sender, receiver) = watch::channel(None);
        let work = start();
        spawn(async move {
            let got = work.await;
            // Nobody may be waiting any more.
            let _ = sender.send(Some(got));
        });
        *current = Some(receiver.clone());
        receiver
    }
}
