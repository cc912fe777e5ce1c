//! Many seeds, judged by two threads: for tests of power cuts.

// Each test uses a part of it.
#![allow(dead_code)]

use std::sync::atomic::{AtomicU64, Ordering};

/// The number in an environment variable.
pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Runs `one` for seeds from the first on, on two threads, until it has judged enough images.
pub(crate) fn run_seeds(what: &str, wanted: u64, one: impl Fn(u64) -> u64 + Sync) {
    let first = number("OBD_UBLK_CRASH_SEED", 1);
    let (next, done) = (AtomicU64::new(first), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while done.load(Ordering::Relaxed) < wanted {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    done.fetch_add(one(seed), Ordering::Relaxed);
                }
            });
        }
    });
    let (done, last) = (done.into_inner(), next.into_inner());
    println!("{what}: {done} images, seeds {first}..{last}, all as they must be");
    assert!(done >= wanted);
}
