//! What goes wrong with the folder of a cache while processes use it, and that the cache helps
//! again afterwards: nothing that fails once may switch it off for the life of a process.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "cache/source.rs"]
mod source;

use obd_ublk::cache::{Cache, CachedBlob, Maintenance, Settings};
use obd_ublk::source::{Fetch, RemoteBlob};
use source::{Blob, open, quiet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const EXTENT: usize = 4096;

fn blob_in(cache: &Cache, blob: &Arc<Blob>) -> CachedBlob {
    cache.blob(&blob.digest, Arc::clone(blob) as Arc<dyn Fetch>).unwrap()
}

fn check_read(cached: &CachedBlob, blob: &Blob, at: usize, length: usize) {
    let mut found = vec![0; length];
    cached.read(u64::try_from(at).unwrap(), &mut found).unwrap();
    assert!(found == blob.bytes[at..at + length], "{length} bytes at {at}");
}

fn data_path(folder: &Path, blob: &Blob) -> PathBuf {
    folder.join("partial").join(format!("{}.data", blob.digest.hex()))
}

/// Nobody looked at the quota again after a look that failed, so that nothing was stored any more.
#[test]
fn storing_goes_on_after_a_look_at_the_quota_that_failed() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Blob::new(60, 100 * EXTENT, EXTENT), Blob::new(61, 100 * EXTENT, EXTENT));
    let other = blob_in(&open(folder.path(), 4096), &old);
    check_read(&other, &old, 0, 100 * EXTENT);
    let tick = Duration::from_millis(30);
    let settings = Settings { quota_bytes: 300 << 10, tick, ..quiet(folder.path(), 4096) };
    let cached = blob_in(&Cache::open(settings).unwrap(), &new);
    for at in 0..20 {
        check_read(&cached, &new, at * EXTENT, EXTENT);
    }
    assert!(cached.stats().degraded > 0, "the other one is in use and takes more than the quota");
    let (whole, away) = (folder.path().join("whole"), folder.path().join("away"));
    std::fs::rename(&whole, &away).unwrap();
    std::thread::sleep(2 * tick);
    check_read(&cached, &new, 30 * EXTENT, EXTENT);
    std::fs::rename(&away, &whole).unwrap();
    drop(other);
    std::thread::sleep(2 * tick);
    check_read(&cached, &new, 40 * EXTENT, EXTENT);
    check_read(&cached, &new, 50 * EXTENT, EXTENT);
    assert!(cached.is_here(50 * 4096, 4096));
    assert!(!data_path(folder.path(), &old).exists());
}

#[test]
fn what_cannot_be_removed_keeps_nothing_else_from_being_evicted() {
    let folder = tempfile::tempdir().unwrap();
    let blobs: Vec<_> = (70..73).map(|seed| Blob::new(seed, 10 * EXTENT, EXTENT)).collect();
    for blob in &blobs {
        check_read(&blob_in(&open(folder.path(), 4096), blob), blob, 0, 10 * EXTENT);
    }
    // Never used, by its looks: the first to go.
    let stuck = folder.path().join("partial").join(format!("{}.map", "0a".repeat(32)));
    std::fs::create_dir(&stuck).unwrap();
    let maintenance = Maintenance::open(&quiet(folder.path(), 4096)).unwrap();
    let trimmed = maintenance.collect(Some(0)).unwrap();
    assert_eq!((trimmed.removed, trimmed.stuck), (3, 1));
    assert!(blobs.iter().all(|blob| !data_path(folder.path(), blob).exists()));
    // It is told of by who repairs, and in nobody's way there either.
    check_read(&blob_in(&open(folder.path(), 4096), &blobs[0]), &blobs[0], 0, 10 * EXTENT);
    std::fs::remove_file(data_path(folder.path(), &blobs[0])).unwrap();
    let checked = maintenance.check(true).unwrap();
    assert_eq!((checked.strays.len(), checked.unreadable.len()), (2, 1), "{checked:?}");
    assert_eq!(maintenance.list().unwrap().len(), 1);
}
