//! What a cache counts for each blob. Counters only grow; each is true by itself, and a snapshot
//! of several may be of slightly different moments.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of one blob in this process.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        /// The counters of a blob, or of several together, at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Their values.
            pub(super) fn read(&self) -> Stats {
                Stats { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl Stats {
            /// Adds those of another blob.
            pub fn add(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
            }

            /// Name and value of each, for reports.
            pub fn fields(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Reads that found all their bytes here.
    hits,
    /// Reads that did not.
    misses,
    /// Bytes that reads asked for.
    needed_bytes,
    /// Bytes that were fetched, for reads and ahead of them.
    fetched_bytes,
    /// Bytes of these that were fetched ahead.
    ahead_bytes,
    /// Requests that fetched them.
    fetches,
    /// Requests that failed.
    fetch_failures,
    /// Reads that waited for another thread's fetch.
    joined,
    /// Waits for what another process was fetching.
    waited,
    /// Of these, those that were given up: the extent was fetched here too and not stored.
    waited_in_vain,
    /// Extents that an earlier process, or another one, had stored, found right.
    verified,
    /// Extents that were stored once and found bad: thrown away and fetched once more.
    quarantined,
    /// Of these, those that were as they had been stored: a codec found their content wrong.
    discarded,
    /// Extents that were served without being stored or although their file failed: the cache's
    /// disk is full or broken, or the quota is used up.
    degraded,
    /// Jobs to fetch ahead that were dropped because too many waited, or were under way.
    ahead_dropped,
    /// Times that all bytes were here and did not have the blob's digest.
    condemned,
    /// Times that the blob was found complete and right, and became a plain file.
    promoted,
}

/// Adds to a counter.
#[inline]
pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}
