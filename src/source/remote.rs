//! The seam between a blob that lies elsewhere and those who keep pieces of it.
//!
//! `registry` fetches, `cache` keeps what was fetched and is read like a file, and neither knows
//! the other: both know these two traits, and `image` puts them together.

use crate::error::{Error, ErrorKind, Result};
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

macro_rules! sums {
    ($(#[$of:meta])* $type:ident { $($(#[$doc:meta])* $name:ident,)* }) => {
        $(#[$of])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $type {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl $type {
            /// Adds those of another blob.
            pub fn add(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
            }
        }
    };
}

sums! {
    /// What was asked of the other side, since the blob was opened.
    FetchUsage {
        /// Requests, those included that were made again.
        requests,
        /// Requests that were made again.
        retries,
        /// Times that a fetch waited for credentials that work.
        credential_waits,
    }
}

sums! {
    /// What blobs that lie elsewhere cost this process so far.
    RemoteUsage {
        /// How many they are.
        blobs,
        /// How many of them are complete here and were found right.
        whole_blobs,
        /// Their bytes.
        blob_bytes,
        /// Reads that found all their bytes here.
        hits,
        /// Reads that did not.
        misses,
        /// Bytes that reads asked for.
        needed_bytes,
        /// Bytes that were fetched.
        fetched_bytes,
        /// Bytes of these that were fetched before a read asked for them.
        ahead_bytes,
        /// Fetches that failed.
        fetch_failures,
        /// Extents that were kept, found bad and thrown away.
        quarantined_extents,
        /// Of these, those whose content a layer's own checksums found wrong: fetched once more.
        refetched_extents,
        /// Extents that were served without being kept.
        degraded_extents,
        /// Requests, those included that were made again.
        requests,
        /// Requests that were made again.
        retries,
        /// Times that a fetch waited for credentials that work.
        credential_waits,
    }
}

impl RemoteUsage {
    /// Adds those of a blob that shares what is kept with one that was added: only what it asked
    /// for by itself.
    fn add_sharing(&mut self, other: &Self) {
        let Self { requests, retries, credential_waits, .. } = *other;
        self.add(&Self { requests, retries, credential_waits, ..Self::default() });
    }
}

/// What several blobs cost together. The same layer twice in an image is kept once, and counts so.
pub fn usage_of<'a>(blobs: impl IntoIterator<Item = &'a dyn RemoteBlob>) -> RemoteUsage {
    let mut seen = HashSet::new();
    let mut sum = RemoteUsage::default();
    for blob in blobs {
        if blob.kept_as().is_none_or(|kept| seen.insert(kept)) {
            sum.add(&blob.usage());
        } else {
            sum.add_sharing(&blob.usage());
        }
    }
    sum
}

/// One of those that share what is kept, and all others, in their order.
#[must_use]
pub fn distinct(mut blobs: Vec<Arc<dyn RemoteBlob>>) -> Vec<Arc<dyn RemoteBlob>> {
    let mut seen = HashSet::new();
    blobs.retain(|blob| blob.kept_as().is_none_or(|kept| seen.insert(kept)));
    blobs
}

/// The error for memory that does not hold what is to come into it: a bug of who lent it.
pub(crate) fn too_short(name: &str, length: usize) -> Error {
    let message = format!("bug: {length} bytes of {name} do not fit the memory lent for them");
    Error::new(ErrorKind::OutOfRange, message)
}

/// Fetches pieces of one blob that lies elsewhere. Keeps nothing.
pub trait Fetch: Send + Sync + fmt::Debug {
    /// What to call the blob in messages: its host and digest, never a secret.
    fn name(&self) -> &str;

    /// Length of the blob in bytes.
    fn bytes(&self) -> u64;

    /// Fills `dst` with the blob's bytes from `offset_bytes` on, exactly. Blocks, and tries again
    /// where that may help, until `deadline` at most. Any number of threads call this at a time.
    ///
    /// # Errors
    /// `OutOfRange` beyond the end; else why the bytes could not be had, by the kinds of
    /// [`ErrorKind`]. The content of `dst` is unspecified then.
    fn fetch(&self, offset_bytes: u64, dst: &mut [u8], deadline: Instant) -> Result<()>;

    /// As [`Fetch::fetch`], from the blob's origin itself and past all others that may have it: for
    /// when bytes that somebody gave were wrong.
    ///
    /// # Errors
    /// As there.
    fn fetch_from_origin(
        &self,
        offset_bytes: u64,
        dst: &mut [u8],
        deadline: Instant,
    ) -> Result<()> {
        self.fetch(offset_bytes, dst, deadline)
    }

    /// As [`Fetch::fetch`], or [`Fetch::fetch_from_origin`] where `from_origin`, into the first
    /// `length` bytes of memory that is lent and comes back: whoever fetches on threads of its own
    /// fills it there, without a copy or a wake-up for each piece of an answer.
    ///
    /// # Errors
    /// As there; the memory comes back all the same.
    fn fetch_lent(
        &self,
        (offset_bytes, from_origin): (u64, bool),
        mut memory: Vec<u8>,
        length: usize,
        deadline: Instant,
    ) -> (Vec<u8>, Result<()>) {
        let fetched = match memory.get_mut(..length) {
            None => Err(too_short(self.name(), length)),
            Some(dst) if from_origin => self.fetch_from_origin(offset_bytes, dst, deadline),
            Some(dst) => self.fetch(offset_bytes, dst, deadline),
        };
        (memory, fetched)
    }

    /// What was asked of the other side so far.
    fn usage(&self) -> FetchUsage {
        FetchUsage::default()
    }

    /// Makes fetches that wait fail soon, with `Canceled`, those to come included.
    fn cancel(&self);
}

/// A blob that lies elsewhere, read like a file: from what is here, else by fetching.
pub trait RemoteBlob: Send + Sync + fmt::Debug {
    /// What to call the blob in messages; see [`Fetch::name`].
    fn name(&self) -> &str;

    /// Length of the blob in bytes.
    fn bytes(&self) -> u64;

    /// Fills `dst` from `offset_bytes` on. What is here is copied without a system call where that
    /// can be; the rest is fetched, which blocks for as long as the blob's own deadline says: for
    /// all reads of one request together ([`crate::waiting`]).
    ///
    /// # Errors
    /// As [`Fetch::fetch`].
    fn read(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()>;

    /// Whether [`RemoteBlob::read`] of these bytes would find all of them here: no I/O, and only a
    /// hint, because what is here may be thrown away in the next moment.
    fn is_here(&self, offset_bytes: u64, bytes: u64) -> bool;

    /// Brings these bytes here before anybody asks for them, as far as nothing is in the way: who
    /// is fetching one of them already is not waited for, and what cannot be kept is not fetched.
    /// Blocks as [`RemoteBlob::read`] does.
    ///
    /// # Errors
    /// As there.
    fn fetch_ahead(&self, bytes: Range<u64>) -> Result<()> {
        let _ = bytes;
        Ok(())
    }

    /// A number that blobs have in common whose bytes are kept together: what one of them fetches
    /// is here for all, and counted for all. None for one that shares with no other.
    fn kept_as(&self) -> Option<usize> {
        None
    }

    /// How much of the blob is here, as far as this process knows.
    fn here_bytes(&self) -> u64 {
        0
    }

    /// Whether reads of this blob, or of others that are kept with it, wait for bytes now.
    fn is_busy(&self) -> bool {
        false
    }

    /// What it cost so far.
    fn usage(&self) -> RemoteUsage {
        RemoteUsage { blobs: 1, blob_bytes: self.bytes(), ..RemoteUsage::default() }
    }

    /// Throws away what is kept of these bytes: they were read whole, and their content is wrong.
    /// Whether reading them again may give others. They are fetched once more for that, but not
    /// again and again: to be called once for each read. May block as [`RemoteBlob::read`] does.
    fn discard(&self, offset_bytes: u64, bytes: u64) -> bool {
        let _ = (offset_bytes, bytes);
        false
    }

    /// Fails if all of the blob was here and was not what its digest says, so that reads may have
    /// given wrong bytes which no checksum of theirs tells. Takes the digest if all is here and
    /// nobody has; waits for another process that does until `deadline`.
    ///
    /// # Errors
    /// `Integrity`.
    fn check(&self, deadline: Instant) -> Result<()> {
        let _ = deadline;
        Ok(())
    }

    /// Makes reads that wait fail soon, with `Canceled`, those to come included: nobody will look
    /// at their bytes.
    fn cancel(&self);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whose bytes are kept with those of others of the same number.
    #[derive(Debug)]
    struct Kept(Option<usize>);

    impl RemoteBlob for Kept {
        fn name(&self) -> &str {
            "kept"
        }

        fn bytes(&self) -> u64 {
            100
        }

        fn read(&self, _offset_bytes: u64, _dst: &mut [u8]) -> Result<()> {
            Ok(())
        }

        fn is_here(&self, _offset_bytes: u64, _bytes: u64) -> bool {
            true
        }

        fn kept_as(&self) -> Option<usize> {
            self.0
        }

        fn usage(&self) -> RemoteUsage {
            let fetched_bytes = 60;
            RemoteUsage {
                blobs: 1,
                blob_bytes: 100,
                fetched_bytes,
                requests: 2,
                ..RemoteUsage::default()
            }
        }

        fn cancel(&self) {}
    }

    #[test]
    fn what_is_kept_together_counts_once_and_each_asks_for_itself() {
        for (kept, counted) in [
            (vec![], 0),
            (vec![Some(7)], 1),
            (vec![Some(7), Some(8), Some(7), Some(7)], 2),
            (vec![None, None, Some(7)], 3),
        ] {
            let blobs: Vec<Arc<dyn RemoteBlob>> =
                kept.iter().map(|kept| Arc::new(Kept(*kept)) as Arc<dyn RemoteBlob>).collect();
            let usage = usage_of(blobs.iter().map(|blob| &**blob));
            assert_eq!((usage.blobs, usage.blob_bytes), (counted, 100 * counted), "{kept:?}");
            assert_eq!(usage.fetched_bytes, 60 * counted, "{kept:?}");
            assert_eq!(usage.requests, 2 * crate::units::to_u64(kept.len()), "{kept:?}");
            assert_eq!(crate::units::to_u64(distinct(blobs).len()), counted, "{kept:?}");
        }
    }
}
