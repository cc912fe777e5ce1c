//! Having whole blobs in the cache while other processes are at them too, and why that is not
//! possible where it is not.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "cache/source.rs"]
mod source;

use obd_ublk::cache::{Cache, CachedBlob, DiskFaults, DiskStep, Settings};
use obd_ublk::error::{Error, ErrorKind};
use obd_ublk::source::{Fetch, RemoteBlob};
use source::{BadDisk, Blob, blob_in, check_read, eventually, quiet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One request brings eight of these.
const EXTENT: usize = 128 << 10;
const RUN: usize = 8 * EXTENT;

fn settings(folder: &Path, deadline: Duration) -> Settings {
    Settings { deadline, ..quiet(folder, 128 << 10) }
}

/// Has all of a blob fetched; how many bytes were told as here.
fn pull(cached: &CachedBlob) -> Result<u64, Error> {
    let progress = AtomicU64::new(0);
    cached.fill_counted(0..cached.bytes(), &progress)?;
    Ok(progress.into_inner())
}

/// The second one said that there was no space, because the first one was slower than the second
/// had patience.
#[test]
fn two_pulls_of_one_blob_over_a_slow_link_share_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(200, 4 * RUN, EXTENT);
    blob.slow(Duration::from_secs(3));
    let settings = settings(folder.path(), Duration::from_secs(5));
    let pulling = || {
        let cached = blob_in(&Cache::open(settings.clone()).unwrap(), &blob);
        pull(&cached).map(|bytes| (bytes, cached.is_complete()))
    };
    let both = std::thread::scope(|scope| {
        [scope.spawn(pulling), scope.spawn(pulling)].map(|pulling| pulling.join().unwrap())
    });
    for pulled in both {
        assert_eq!(pulled.unwrap(), (blob.bytes(), true));
    }
    assert_eq!(blob.times(), [1; 32]);
}

/// That one was told as a cache without space, too.
#[test]
fn what_a_stuck_process_fetches_is_named_after_all_else_is_here() {
    let folder = tempfile::tempdir().unwrap();
    let (stuck, good) = (Blob::new(201, 3 * RUN, EXTENT), Blob::new(201, 3 * RUN, EXTENT));
    stuck.slow(Duration::from_secs(3600));
    let of_stuck = Cache::open(settings(folder.path(), Duration::from_secs(12))).unwrap();
    let of_stuck = blob_in(&of_stuck, &stuck);
    let cached = Cache::open(settings(folder.path(), Duration::from_secs(2))).unwrap();
    let cached = blob_in(&cached, &good);
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| of_stuck.read(u64::try_from(RUN).unwrap(), &mut [0; EXTENT]));
        eventually("on its way", || stuck.flying.load(Ordering::Relaxed) == 1);
        let begun = Instant::now();
        let pulling = scope.spawn(|| pull(&cached));
        // Who reads meanwhile does not wait with it.
        check_read(&cached, &good, RUN, EXTENT);
        let error = pulling.join().unwrap().unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error:#}");
        assert!(format!("{error:#}").contains("fetched by another process"), "{error:#}");
        assert!(cached.is_here(0, 1 << 20) && cached.is_here(2 << 20, 1 << 20));
        assert!(!cached.is_here(1 << 20, 1));
        // Once it is gone, its part is had as well.
        assert!(hanging.join().unwrap().is_err());
        assert_eq!(pull(&cached).unwrap(), good.bytes());
        assert!(cached.is_complete());
    });
}

#[test]
fn an_obstacle_on_the_disk_is_told_by_its_name_and_nothing_is_fetched_for_it() {
    for (errno, kind, told) in [
        (libc::ENOSPC, ErrorKind::NoSpace, "No space left"),
        (libc::EROFS, ErrorKind::ReadOnly, "Read-only"),
        (libc::EIO, ErrorKind::Io, "Input/output"),
    ] {
        for step in [DiskStep::WriteData, DiskStep::WriteRecords, DiskStep::ReadRecords] {
            let folder = tempfile::tempdir().unwrap();
            let blob = Blob::new(202, 3 * RUN, EXTENT);
            let disk = Arc::new(BadDisk::default());
            let faults = Some(Arc::clone(&disk) as Arc<dyn DiskFaults>);
            let settings = Settings { faults, ..settings(folder.path(), Duration::from_secs(30)) };
            let cached = blob_in(&Cache::open(settings).unwrap(), &blob);
            disk.set(&[(step, errno)]);
            let error = pull(&cached).unwrap_err();
            assert_eq!(error.kind(), kind, "{error:#}");
            assert!(format!("{error:#}").contains(told), "{error:#}");
            assert!(blob.requests() <= 1, "{step:?}");
            disk.set(&[]);
            assert_eq!(pull(&cached).unwrap(), blob.bytes());
        }
    }
}

#[test]
fn a_quota_that_is_used_up_is_told_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(203, 3 * RUN, EXTENT);
    let settings =
        Settings { quota_bytes: 4096, ..settings(folder.path(), Duration::from_secs(30)) };
    let error = pull(&blob_in(&Cache::open(settings).unwrap(), &blob)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(format!("{error:#}").contains("quota of 4096 bytes"), "{error:#}");
}

#[test]
fn a_folder_that_cannot_be_used_is_named_and_one_that_can_be_again_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(204, RUN, EXTENT);
    let settings = settings(folder.path(), Duration::from_secs(30));
    let cache = Cache::open(settings.clone()).unwrap();
    let lock = std::fs::File::create(folder.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let cached = blob_in(&cache, &blob);
    let error = pull(&cached).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(format!("{error:#}").contains("held by another process"), "{error:#}");
    let soon = Instant::now() + Duration::from_secs(60);
    assert_eq!(cached.promote(soon).unwrap_err().kind(), ErrorKind::Timeout);
    lock.unlock().unwrap();
    assert_eq!(pull(&cached).unwrap(), blob.bytes());
    let nowhere = Settings { folder: folder.path().join("lock/x"), ..settings };
    let cached = blob_in(&Cache::open_or_bypass(nowhere), &blob);
    let error = format!("{:#}", pull(&cached).unwrap_err());
    assert!(error.contains("lock/x"), "{error}");
}
