//! One piece of work on several threads.

use std::panic::resume_unwind;
use std::thread::{Builder, scope};

/// Runs `work` on this thread and on others, `threads` in all, and returns what each of them
/// returns. The work shares itself out: where there can be no more threads, those that there are do
/// all of it.
pub(super) fn on_threads<T: Send>(threads: usize, work: impl Fn() -> T + Sync) -> Vec<T> {
    on_threads_by(|| Builder::new().name("image-work".to_owned()), threads, work)
}

fn on_threads_by<T: Send>(
    builder: impl Fn() -> Builder,
    threads: usize,
    work: impl Fn() -> T + Sync,
) -> Vec<T> {
    scope(|scope| {
        let mut helpers = Vec::new();
        for _ in 1..threads {
            match builder().spawn_scoped(scope, &work) {
                Ok(helper) => helpers.push(helper),
                Err(error) => {
                    tracing::debug!(%error, have = helpers.len() + 1, threads, "no more threads");
                    break;
                }
            }
        }
        let mut outcomes = vec![work()];
        for helper in helpers {
            // A panic in a helper is a bug; let it surface as one.
            outcomes.push(helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        outcomes
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Opening an image, or pulling one, panicked on a host that had no threads to spare.
    #[test]
    fn the_work_is_done_by_the_threads_that_there_can_be() {
        let share = |builder: fn() -> Builder| {
            let next = AtomicUsize::new(0);
            let done = AtomicUsize::new(0);
            let work = || {
                while next.fetch_add(1, Ordering::Relaxed) < 100 {
                    done.fetch_add(1, Ordering::Relaxed);
                }
            };
            let threads = on_threads_by(builder, 4, work).len();
            (threads, done.load(Ordering::Relaxed))
        };
        assert_eq!(share(Builder::new), (4, 100));
        // A stack that no address space has room for: the kernel refuses each.
        assert_eq!(share(|| Builder::new().stack_size(1 << 50)), (1, 100));
    }
}
