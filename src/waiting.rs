//! Since when the request that a thread serves has been waiting for bytes from elsewhere.
//!
//! A request has one deadline, and may take many reads of several blobs: those of its blocks, and
//! those of what was wrong and is fetched once more. Each has what is left of the request's time.
//! The front end begins a [`Request`] on the thread that serves it (`disk::Guarded`), and who waits
//! for a blob asks [`since`] when that began (`cache`). It is the thread's and no parameter: all
//! that lies between the two neither waits nor knows of time. Without a request, as where an image
//! is opened or exported, every read has a time of its own.

use std::cell::Cell;
use std::marker::PhantomData;
use std::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No request.
    Idle,
    /// A request that has not waited yet: the clock is not looked at for those that never do.
    Begun,
    /// One that waits since then.
    Waits(Instant),
}

thread_local! {
    static STATE: Cell<State> = const { Cell::new(State::Idle) };
}

/// The request that this thread serves, for as long as this lives. One within another is a part of
/// it.
#[derive(Debug)]
#[must_use]
pub struct Request {
    is_outer: bool,
    /// It belongs to its thread.
    bound: PhantomData<*const ()>,
}

impl Request {
    /// A request whose time begins when it has to wait for something.
    pub fn begin() -> Self {
        Self::enter(State::Begun)
    }

    /// A request that waits since then.
    pub fn begun_at(asked: Instant) -> Self {
        Self::enter(State::Waits(asked))
    }

    fn enter(state: State) -> Self {
        let is_outer = STATE.get() == State::Idle;
        if is_outer {
            STATE.set(state);
        }
        Self { is_outer, bound: PhantomData }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.is_outer {
            STATE.set(State::Idle);
        }
    }
}

/// Since when this thread's request has been waiting: since now, if it was not before.
#[must_use]
pub fn since() -> Instant {
    match STATE.get() {
        State::Waits(since) => since,
        State::Idle => Instant::now(),
        State::Begun => {
            let now = Instant::now();
            STATE.set(State::Waits(now));
            now
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_request_waits_since_it_first_did_and_the_next_one_anew() {
        let early = Instant::now().checked_sub(Duration::from_secs(9)).unwrap();
        let first = since();
        {
            let _request = Request::begin();
            let begun = since();
            assert!(begun >= first);
            {
                let _part = Request::begun_at(early);
                assert_eq!(since(), begun, "a part of it");
            }
            assert_eq!(since(), begun);
            std::thread::scope(|scope| {
                scope.spawn(|| assert!(since() >= begun, "another thread's is another"));
            });
        }
        assert_eq!(STATE.get(), State::Idle);
        let _asked = Request::begun_at(early);
        assert_eq!(since(), early);
    }
}
