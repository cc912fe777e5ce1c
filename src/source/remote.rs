//! The seam between a blob that lies elsewhere and those who keep pieces of it.
//!
//! `registry` fetches, `cache` keeps what was fetched and is read like a file, and neither knows
//! the other: both know these two traits, and `image` puts them together.

use crate::error::Result;
use std::fmt;
use std::ops::Range;
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
    /// [`ErrorKind`](crate::error::ErrorKind). The content of `dst` is unspecified then.
    fn fetch(&self, offset_bytes: u64, dst: &mut [u8], deadline: Instant) -> Result<()>;

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
    /// can be; the rest is fetched, which blocks for as long as the blob's own deadline says.
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

    /// Makes reads that wait fail soon, with `Canceled`, those to come included: nobody will look
    /// at their bytes.
    fn cancel(&self);
}
