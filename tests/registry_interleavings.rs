//! Single flight of tokens and redirects in every order in which tasks can run.
//!
//! The file that holds it is compiled here once more, with the lock of a model checker, a task per
//! thread, and a channel made of its lock and condition variable in the place of
//! `src/registry/sync.rs`. The checker runs each test many times, each time with another order of
//! the threads' steps, and fails it when one of them deadlocks.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod sync {
    pub(crate) use loom::sync::Mutex;
    use std::task::{Context, Poll, Waker};

    /// Runs `work` as tokio does, beside whoever starts it. Nothing here has to wait: work that
    /// does is lost, as with a runtime that ends or a panic.
    pub(crate) fn spawn(work: impl Future<Output = ()> + Send + 'static) {
        loom::thread::spawn(move || {
            let _ = run(work);
        });
    }

    /// Runs `work` on this thread up to its end, or to where it has to wait.
    pub(crate) fn run<T>(work: impl Future<Output = T>) -> Poll<T> {
        let mut work = Box::pin(work);
        work.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    /// What `tokio::sync::watch` promises, for one value that is sent once.
    pub(crate) mod watch {
        use loom::sync::{Arc, Condvar, Mutex, MutexGuard};

        struct Shared<T> {
            /// The value, and whether the sender is gone.
            state: Mutex<(T, bool)>,
            changed: Condvar,
        }

        pub(crate) struct Sender<T>(Arc<Shared<T>>);

        pub(crate) struct Receiver<T>(Arc<Shared<T>>);

        pub(crate) struct Ref<'a, T>(MutexGuard<'a, (T, bool)>);

        impl<T> std::ops::Deref for Ref<'_, T> {
            type Target = T;

            fn deref(&self) -> &T {
                &self.0.0
            }
        }

        pub(crate) fn channel<T>(value: T) -> (Sender<T>, Receiver<T>) {
            let shared =
                Arc::new(Shared { state: Mutex::new((value, false)), changed: Condvar::new() });
            (Sender(Arc::clone(&shared)), Receiver(shared))
        }

        impl<T> Sender<T> {
            pub(crate) fn send(&self, value: T) -> Result<(), ()> {
                self.0.state.lock().unwrap().0 = value;
                self.0.changed.notify_all();
                Ok(())
            }
        }

        impl<T> Drop for Sender<T> {
            fn drop(&mut self) {
                self.0.state.lock().unwrap().1 = true;
                self.0.changed.notify_all();
            }
        }

        impl<T> Clone for Receiver<T> {
            fn clone(&self) -> Self {
                Self(Arc::clone(&self.0))
            }
        }

        impl<T> Receiver<T> {
            pub(crate) fn borrow(&self) -> Ref<'_, T> {
                Ref(self.0.state.lock().unwrap())
            }

            pub(crate) fn has_changed(&self) -> Result<(), ()> {
                if self.0.state.lock().unwrap().1 { Err(()) } else { Ok(()) }
            }

            /// Blocks its thread, which runs nothing else.
            pub(crate) async fn wait_for(
                &mut self,
                is_met: impl Fn(&T) -> bool,
            ) -> Result<Ref<'_, T>, ()> {
                let mut state = self.0.state.lock().unwrap();
                loop {
                    if is_met(&state.0) {
                        return Ok(Ref(state));
                    }
                    if state.1 {
                        return Err(());
                    }
                    state = self.0.changed.wait(state).unwrap();
                }
            }
        }
    }
}

#[path = "../src/registry/flight.rs"]
mod flight;

use flight::Flight;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;
use std::sync::Arc;
use std::task::Poll;

/// The requests for a token, each of which gives its number.
struct Requests {
    started: AtomicU32,
    ended: AtomicU32,
    /// How many of the first ones are lost.
    lost: u32,
}

/// Counts the end of a request, whichever it is.
struct UnderWay(Arc<Requests>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::SeqCst);
    }
}

impl Requests {
    async fn ask(self: Arc<Self>) -> u32 {
        let number = self.started.fetch_add(1, Ordering::SeqCst) + 1;
        let under_way = UnderWay(Arc::clone(&self));
        assert_eq!(self.ended.load(Ordering::SeqCst) + 1, number, "two requests at once");
        if number <= self.lost {
            std::future::pending::<()>().await;
        }
        drop(under_way);
        number
    }
}

/// A flight and what it is for, shared by those who want a token.
#[derive(Clone)]
struct Shared {
    flight: Arc<Flight<u32>>,
    requests: Arc<Requests>,
}

impl Shared {
    /// The token of the request that was joined; none if that one was lost.
    fn join(&self) -> Option<u32> {
        let requests = Arc::clone(&self.requests);
        match sync::run(self.flight.join(|| requests.ask())) {
            Poll::Ready(token) => token,
            Poll::Pending => panic!("the channel blocks its thread"),
        }
    }

    /// Renews ahead of time, without waiting.
    fn begin(&self) {
        let requests = Arc::clone(&self.requests);
        self.flight.begin(|| requests.ask());
    }
}

/// Runs `one` beside `other`, each with whether requests are lost, in every order with at most so
/// many preemptions.
fn in_every_order(preemptions: usize, lost: u32, one: fn(&Shared, bool), other: fn(&Shared, bool)) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let (started, ended) = (AtomicU32::new(0), AtomicU32::new(0));
        let requests = Arc::new(Requests { started, ended, lost });
        let shared = Shared { flight: Arc::default(), requests };
        let theirs = shared.clone();
        let beside = thread::spawn(move || other(&theirs, lost > 0));
        one(&shared, lost > 0);
        beside.join().unwrap();
    });
}

/// Wants a token, and a newer one when that is not good any more.
fn wants_two(shared: &Shared, may_be_lost: bool) {
    let first = shared.join();
    assert!(first.is_some() || may_be_lost);
    // No more than the first request is lost here, and that one is over.
    let second = shared.join().unwrap();
    assert!(first.is_none_or(|first| second > first), "{second} had arrived before it was wanted");
}

fn wants_one(shared: &Shared, may_be_lost: bool) {
    assert!(shared.join().is_some() || may_be_lost);
}

fn renews(shared: &Shared, _: bool) {
    shared.begin();
}

#[test]
fn at_most_one_request_is_under_way_and_each_who_joins_has_one_that_was_not_over() {
    in_every_order(3, 0, wants_one, wants_one);
    in_every_order(2, 0, wants_two, wants_one);
}

#[test]
fn a_renewal_ahead_of_time_is_joined_or_over() {
    in_every_order(2, 0, wants_two, renews);
    in_every_order(3, 0, renews, renews);
}

#[test]
fn a_request_that_is_lost_leaves_nobody_waiting_and_the_next_one_is_new() {
    in_every_order(2, 1, wants_two, wants_one);
    in_every_order(2, 1, wants_two, renews);
    in_every_order(3, 2, wants_one, wants_one);
}
