//! One at a time: many want the same thing, one gets it, all have it.

use std::fmt;
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use tokio::sync::watch;

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
        tokio::spawn(async move {
            let got = work.await;
            // Nobody may be waiting any more.
            let _ = sender.send(Some(got));
        });
        *current = Some(receiver.clone());
        receiver
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    }

    #[test]
    fn those_who_come_together_are_served_once() {
        let flight: Arc<Flight<u64>> = Arc::default();
        let started = Arc::new(AtomicU64::new(0));
        runtime().block_on(async {
            let mut tasks = Vec::new();
            for _ in 0..50 {
                let (flight, started) = (Arc::clone(&flight), Arc::clone(&started));
                tasks.push(tokio::spawn(async move {
                    let work = || async move {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        started.fetch_add(1, Ordering::SeqCst) + 1
                    };
                    flight.join(work).await
                }));
            }
            for task in tasks {
                assert_eq!(task.await.unwrap(), Some(1));
            }
            assert_eq!(flight.join(|| async { 7 }).await, Some(7), "the next one is new");
        });
        assert_eq!(started.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn the_work_outlives_the_one_who_started_it() {
        let flight: Arc<Flight<u64>> = Arc::default();
        runtime().block_on(async {
            let slow = || async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                1
            };
            let impatient = tokio::time::timeout(Duration::from_millis(1), flight.join(slow));
            assert!(impatient.await.is_err());
            assert_eq!(flight.join(|| async { 2 }).await, Some(1));
        });
    }

    #[test]
    fn a_lost_task_is_no_eternity() {
        let flight: Arc<Flight<u64>> = Arc::default();
        runtime().block_on(async {
            let lost = || async {
                assert!(std::hint::black_box(false), "this task is meant to fail");
                1
            };
            assert_eq!(flight.join(lost).await, None);
            assert_eq!(flight.join(|| async { 2 }).await, Some(2));
        });
    }
}
