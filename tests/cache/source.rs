//! A blob that lies elsewhere, in memory, with counters, delays and failures; a disk that fails.

// Each test uses a part of it.
#![allow(dead_code)]

#[path = "../common/random.rs"]
mod random;

use obd_ublk::cache::{BlobDigest, Cache, CachedBlob, DiskFaults, DiskStep, Settings};
use obd_ublk::error::{Error, ErrorKind, Result};
use obd_ublk::source::{Fetch, RemoteBlob};
pub(crate) use random::Random;
use sha2::{Digest, Sha256};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes from a seed, no eight of them alike.
pub(crate) fn bytes_of(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub(crate) fn digest_of(bytes: &[u8]) -> BlobDigest {
    BlobDigest::new(Sha256::digest(bytes).into())
}

/// A blob that counts how often each of its extents was fetched.
#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: BlobDigest,
    pub(crate) extent_bytes: usize,
    /// How often each extent was fetched.
    pub(crate) fetched: Vec<AtomicU64>,
    /// The ranges that were fetched, in order.
    pub(crate) log: Mutex<Vec<(u64, usize)>>,
    pub(crate) delay: Mutex<Duration>,
    /// How many fetches there are now, and were at most at one time.
    pub(crate) flying: AtomicU64,
    pub(crate) most_flying: AtomicU64,
    /// What fetching answers instead.
    pub(crate) failure: Mutex<Option<ErrorKind>>,
    /// How many of the next fetches deliver wrong bytes without a word.
    pub(crate) lies: AtomicU64,
}

impl Blob {
    pub(crate) fn new(seed: u64, length: usize, extent_bytes: usize) -> Arc<Self> {
        let bytes = bytes_of(seed, length);
        let count = length.div_ceil(extent_bytes);
        Arc::new(Self {
            digest: digest_of(&bytes),
            bytes,
            extent_bytes,
            fetched: (0..count).map(|_| AtomicU64::new(0)).collect(),
            log: Mutex::default(),
            delay: Mutex::default(),
            flying: AtomicU64::new(0),
            most_flying: AtomicU64::new(0),
            failure: Mutex::default(),
            lies: AtomicU64::new(0),
        })
    }

    pub(crate) fn times(&self) -> Vec<u64> {
        self.fetched.iter().map(|times| times.load(Ordering::Relaxed)).collect()
    }

    pub(crate) fn requests(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    pub(crate) fn fetched_extents(&self) -> u64 {
        self.times().iter().sum()
    }

    pub(crate) fn fail(&self, kind: Option<ErrorKind>) {
        *self.failure.lock().unwrap() = kind;
    }

    pub(crate) fn slow(&self, delay: Duration) {
        *self.delay.lock().unwrap() = delay;
    }
}

impl Fetch for Blob {
    fn name(&self) -> &str {
        "registry.example.com/sha256:blob"
    }

    fn bytes(&self) -> u64 {
        u64::try_from(self.bytes.len()).unwrap()
    }

    fn fetch(&self, offset_bytes: u64, dst: &mut [u8], deadline: Instant) -> Result<()> {
        let delay = *self.delay.lock().unwrap();
        let left = deadline.saturating_duration_since(Instant::now());
        let flying = 1 + self.flying.fetch_add(1, Ordering::Relaxed);
        self.most_flying.fetch_max(flying, Ordering::Relaxed);
        std::thread::sleep(delay.min(left));
        self.flying.fetch_sub(1, Ordering::Relaxed);
        if delay > left {
            return Err(Error::new(ErrorKind::Timeout, "the registry is too slow"));
        }
        if let Some(kind) = *self.failure.lock().unwrap() {
            dst.fill(0xee);
            return Err(Error::new(kind, "the registry says no"));
        }
        let start = usize::try_from(offset_bytes).unwrap();
        dst.copy_from_slice(&self.bytes[start..start + dst.len()]);
        let less = |lies: u64| lies.checked_sub(1);
        if self.lies.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
            dst[0] ^= 1;
        }
        self.log.lock().unwrap().push((offset_bytes, dst.len()));
        let touched = start / self.extent_bytes..(start + dst.len()).div_ceil(self.extent_bytes);
        for times in &self.fetched[touched] {
            times.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn cancel(&self) {}
}

/// A disk that fails where it is told to.
#[derive(Debug, Default)]
pub(crate) struct BadDisk {
    /// The steps that fail, and what they answer.
    pub(crate) failing: Mutex<Vec<(DiskStep, i32)>>,
    pub(crate) failed: AtomicU64,
}

impl BadDisk {
    pub(crate) fn set(&self, failing: &[(DiskStep, i32)]) {
        *self.failing.lock().unwrap() = failing.to_vec();
    }
}

impl DiskFaults for BadDisk {
    fn before(&self, step: DiskStep) -> io::Result<()> {
        let failing = self.failing.lock().unwrap();
        let Some((_, errno)) = failing.iter().find(|(bad, _)| *bad == step) else { return Ok(()) };
        self.failed.fetch_add(1, Ordering::Relaxed);
        Err(io::Error::from_raw_os_error(*errno))
    }
}

/// A cache without a background, so that a test decides what happens when.
pub(crate) fn quiet(folder: &Path, extent_bytes: u64) -> Settings {
    Settings {
        folder: folder.to_owned(),
        extent_bytes,
        threads: 0,
        pause: Duration::ZERO,
        deadline: Duration::from_secs(30),
        ..Settings::default()
    }
}

pub(crate) fn open(folder: &Path, extent_bytes: u64) -> Cache {
    Cache::open(quiet(folder, extent_bytes)).unwrap()
}

/// Waits for something that the background does.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes of the extents of most tests.
pub(crate) const EXTENT: usize = 4096;

pub(crate) fn blob_in(cache: &Cache, blob: &Arc<Blob>) -> CachedBlob {
    cache.blob(&blob.digest, Arc::clone(blob) as Arc<dyn Fetch>).unwrap()
}

pub(crate) fn check_read(cached: &CachedBlob, blob: &Blob, at: usize, length: usize) {
    let mut found = vec![0; length];
    cached.read(u64::try_from(at).unwrap(), &mut found).unwrap();
    assert!(found == blob.bytes[at..at + length], "{length} bytes at {at}");
}

/// Where what is here of a blob in part has its data.
pub(crate) fn data_path(folder: &Path, blob: &Blob) -> PathBuf {
    folder.join("partial").join(format!("{}.data", blob.digest.hex()))
}
