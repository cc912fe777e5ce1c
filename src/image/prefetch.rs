//! Pulling the layers of an image into the cache, whole, without opening it.
//!
//! Devices and other pulls that run meanwhile share every extent: whoever comes first fetches it.
//! Killed at any point it leaves what was fetched so far to the next one.

use super::elsewhere::Elsewhere;
use super::open::{Found, find_lower};
use super::together::on_threads;
use crate::cache::{CachedBlob, Promotion};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::{ImageConfig, ServiceConfig};
use crate::limits::{
    PREFETCH_CHECK_BYTES_PER_SECOND_MIN, PREFETCH_CHECK_SECONDS_MIN, PREFETCH_ROUNDS_MAX,
};
use crate::source::{RemoteBlob, usage_of};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The layers of an image that are not in local files.
#[derive(Debug)]
pub struct Prefetch {
    blobs: Vec<(usize, CachedBlob)>,
    local_layers: u64,
}

/// What was pulled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefetched {
    /// Layers that are plain files in the cache now; one that is there twice counts once.
    pub layers: u64,
    /// Layers that were local files before.
    pub local_layers: u64,
    /// Bytes of the first.
    pub bytes: u64,
    /// Bytes of these that this process fetched; others were here, or came through others.
    pub fetched_bytes: u64,
}

impl Prefetch {
    /// Finds the layers of a config, one that is in it twice once. Asks for their lengths where the
    /// config does not tell them.
    ///
    /// # Errors
    /// That of the lowest layer that cannot be found.
    pub fn open(config: &ImageConfig, service: &ServiceConfig) -> Result<Self> {
        let mut this = Self { blobs: Vec::new(), local_layers: 0 };
        let mut elsewhere = None;
        let mut seen = HashSet::new();
        for (number, lower) in config.stack_lowers().iter().enumerate() {
            let told = || format!("find layer {number}");
            match find_lower(lower).context(told)? {
                Found::Here(_) => this.local_layers += 1,
                Found::Nowhere(looked) => {
                    let url = &config.repo_blob_url;
                    if url.is_empty() && lower.repo_blob_url.is_empty() {
                        return Err(super::elsewhere::nowhere(&looked)).context(told);
                    }
                    let elsewhere = match &elsewhere {
                        Some(elsewhere) => elsewhere,
                        None => elsewhere.insert(Elsewhere::new(service)?),
                    };
                    // In any case, because each may have a folder that wants it.
                    let blob = elsewhere.blob(lower, url).context(told)?;
                    if blob.kept_as().is_none_or(|kept| seen.insert(kept)) {
                        this.blobs.push((number, blob));
                    }
                }
            }
        }
        Ok(this)
    }

    /// Bytes of all layers to pull.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blobs.iter().map(|(_, blob)| blob.bytes()).fold(0, u64::saturating_add)
    }

    /// Pulls all of them, so many at a time, and checks each against its digest. `progress` counts
    /// the bytes that are here.
    ///
    /// # Errors
    /// The first that a layer meets; layers that were begun are finished, no other is begun.
    pub fn run(&self, layers_at_once: usize, progress: &AtomicU64) -> Result<Prefetched> {
        let next = AtomicUsize::new(0);
        let stopped = AtomicBool::new(false);
        let failed = Mutex::new(None);
        let work = || {
            while !stopped.load(Ordering::Relaxed) {
                let Some((number, blob)) = self.blobs.get(next.fetch_add(1, Ordering::Relaxed))
                else {
                    return;
                };
                let pulled = pull(blob, progress);
                if let Err(error) = pulled.context(|| format!("pull layer {number}")) {
                    stopped.store(true, Ordering::Relaxed);
                    lock(&failed).get_or_insert(error);
                }
            }
        };
        on_threads(layers_at_once.min(self.blobs.len()), work);
        if let Some(error) = lock(&failed).take() {
            return Err(error);
        }
        let blobs = self.blobs.iter().map(|(_, blob)| -> &dyn RemoteBlob { blob });
        let usage = usage_of(blobs);
        Ok(Prefetched {
            layers: usage.blobs,
            local_layers: self.local_layers,
            bytes: usage.blob_bytes,
            fetched_bytes: usage.fetched_bytes,
        })
    }
}

/// Brings all of a blob here and makes a plain file of it.
fn pull(blob: &CachedBlob, progress: &AtomicU64) -> Result<()> {
    // What is fetched again was counted already.
    let again = AtomicU64::new(0);
    let mut counted = progress;
    for _ in 0..PREFETCH_ROUNDS_MAX {
        blob.fill_counted(0..blob.bytes(), counted)?;
        counted = &again;
        let deadline = Instant::now() + check_time(blob.bytes());
        let promotion = blob.promote(deadline).context(|| format!("check {}", blob.name()))?;
        match promotion {
            Promotion::Done => return Ok(()),
            other => tracing::debug!(blob = blob.name(), ?other, "not whole yet"),
        }
    }
    let message = format!("{}: fetched and checked in vain, again and again", blob.name());
    Err(Error::new(ErrorKind::Integrity, message))
}

/// How long another process is given to check a layer of so many bytes.
const fn check_time(bytes: u64) -> Duration {
    let of_its_bytes = bytes / PREFETCH_CHECK_BYTES_PER_SECOND_MIN;
    Duration::from_secs(PREFETCH_CHECK_SECONDS_MIN.saturating_add(of_its_bytes))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_was_stopped_is_waited_for_as_long_as_one_that_checks_needs() {
        for (bytes, seconds) in [(0, 20), (50_000_000, 21), (64 << 20, 21), (10 << 30, 234)] {
            assert_eq!(check_time(bytes), Duration::from_secs(seconds), "{bytes}");
        }
    }
}
