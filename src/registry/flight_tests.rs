//! Single flight with a runtime. `tests/registry_interleavings.rs` has every order of its steps.

use super::flight::Flight;
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
