//! The threads of the background: what is worth doing and nobody waits for.
//!
//! Bounded in threads and in jobs; a job too many is dropped. Reads never wait for a place here.
//! Threads start when there is something to do and end with the pool, each after the job it is in.

use super::flight::lock;
use crate::limits::{CACHE_JOBS_MAX, CACHE_THREADS_MAX};
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One piece of work.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// The threads.
pub(super) struct Pool {
    inner: Arc<Inner>,
    thread_count_max: usize,
}

struct Inner {
    state: Mutex<State>,
    bell: Condvar,
    /// What to do every so often.
    tick: Box<dyn Fn() + Send + Sync>,
    tick_every: Duration,
}

struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    next_tick: Instant,
    ended: bool,
}

impl Pool {
    /// A pool without threads yet. Once there is one, `tick` runs about every `tick_every`, never
    /// twice at a time.
    pub(super) fn new(
        thread_count_max: usize,
        tick_every: Duration,
        tick: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let state = State {
            jobs: VecDeque::new(),
            threads: 0,
            idle: 0,
            next_tick: Instant::now() + tick_every,
            ended: false,
        };
        let inner = Inner {
            state: Mutex::new(state),
            bell: Condvar::new(),
            tick: Box::new(tick),
            tick_every,
        };
        let thread_count_max = thread_count_max.min(CACHE_THREADS_MAX);
        Self { inner: Arc::new(inner), thread_count_max }
    }

    /// Hands over a job; false when it was dropped because too many wait.
    pub(super) fn push(&self, job: Job) -> bool {
        let mut state = lock(&self.inner.state);
        if state.jobs.len() >= CACHE_JOBS_MAX || self.thread_count_max == 0 {
            return false;
        }
        state.jobs.push_back(job);
        if state.idle < state.jobs.len() {
            self.start_one(&mut state);
        }
        if state.threads == 0 {
            // Nobody would ever do it.
            state.jobs.clear();
            return false;
        }
        drop(state);
        self.inner.bell.notify_one();
        true
    }

    /// Makes sure that there is a thread, so that ticks come.
    pub(super) fn start(&self) {
        let mut state = lock(&self.inner.state);
        if state.threads == 0 {
            self.start_one(&mut state);
        }
    }

    fn start_one(&self, state: &mut State) {
        if state.threads >= self.thread_count_max {
            return;
        }
        let inner = Arc::clone(&self.inner);
        let thread = std::thread::Builder::new().name("obd-cache".to_owned());
        // Where none can be had, what is here does; with none at all jobs are dropped.
        state.threads += usize::from(thread.spawn(move || inner.work()).is_ok());
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = lock(&self.inner.state);
        state.ended = true;
        state.jobs.clear();
        drop(state);
        // Not joined: the last owner of a pool may be one of its own threads.
        self.inner.bell.notify_all();
    }
}

impl Inner {
    fn work(&self) {
        // A read may come to wait for what this thread fetches: the kernel must not make it wait
        // for memory that only such reads can free. Needs a privilege that tests do not have.
        let _ = rustix::process::configure_io_flusher_behavior(true);
        while let Some(job) = self.next() {
            // A panic is a bug; it must not take the thread that later jobs count on.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("bug: a job of the cache panicked");
            }
        }
    }

    /// The next job; waits for one.
    fn next(&self) -> Option<Job> {
        let mut state = lock(&self.state);
        loop {
            if state.ended {
                return None;
            }
            let now = Instant::now();
            if now >= state.next_tick {
                // Far away while it runs, so that no other thread begins it too.
                state.next_tick = now + Duration::from_secs(86_400);
                drop(state);
                if catch_unwind(AssertUnwindSafe(&self.tick)).is_err() {
                    tracing::error!("bug: a look after the cache panicked");
                }
                state = lock(&self.state);
                state.next_tick = Instant::now() + self.tick_every;
                continue;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            state.idle += 1;
            let left = state.next_tick.saturating_duration_since(now);
            let waited = self.bell.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.idle -= 1;
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.inner.state);
        write!(f, "Pool({} threads, {} jobs)", state.threads, state.jobs.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    #[test]
    fn jobs_beyond_the_limit_are_dropped_and_a_panic_stops_nothing() {
        let pool = Pool::new(1, Duration::from_secs(60), || {});
        let (hold, held) = channel::<()>();
        assert!(pool.push(Box::new(move || held.recv().unwrap())));
        let (tell, told) = channel();
        let mut taken = 0;
        for _ in 0..2 * CACHE_JOBS_MAX {
            let tell = tell.clone();
            taken += usize::from(pool.push(Box::new(move || {
                tell.send(()).unwrap();
                panic!("a bug in a job, which a test puts there");
            })));
        }
        assert!((CACHE_JOBS_MAX - 1..=CACHE_JOBS_MAX).contains(&taken), "{taken}");
        hold.send(()).unwrap();
        drop(tell);
        assert_eq!(told.iter().count(), taken);
    }

    #[test]
    fn ticks_come_while_jobs_do_and_end_with_the_pool() {
        let ticks = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&ticks);
        let pool = Pool::new(2, Duration::from_millis(2), move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        pool.start();
        let end = Instant::now() + Duration::from_secs(20);
        while ticks.load(Ordering::Relaxed) < 3 {
            assert!(Instant::now() < end, "no ticks");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(pool);
        while Arc::strong_count(&ticks) > 1 {
            assert!(Instant::now() < end, "a thread stays");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
