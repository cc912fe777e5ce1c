//! What goes wrong with the folder of a cache while processes use it, and that the cache helps
//! again afterwards: nothing that fails once may switch it off for the life of a process.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "cache/source.rs"]
mod source;

use obd_ublk::cache::{Cache, CachedBlob, DiskFaults, DiskStep, Maintenance, Settings};
use obd_ublk::source::RemoteBlob;
use source::{BadDisk, Blob, EXTENT, blob_in, check_read, data_path, eventually, open, quiet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(30);

/// A reader of `new` that stores nothing more, because a reader of `old`, which comes first, takes
/// more than the quota.
fn over_the_quota(folder: &Path, old: &Arc<Blob>, new: &Arc<Blob>) -> (CachedBlob, CachedBlob) {
    let other = blob_in(&open(folder, 4096), old);
    check_read(&other, old, 0, 100 * EXTENT);
    let settings = Settings { quota_bytes: 300 << 10, tick: TICK, ..quiet(folder, 4096) };
    let cached = blob_in(&Cache::open(settings).unwrap(), new);
    for at in 0..20 {
        check_read(&cached, new, at * EXTENT, EXTENT);
    }
    assert!(cached.stats().degraded > 0, "the other one is in use and takes more than the quota");
    (other, cached)
}

#[test]
fn storing_goes_on_when_others_made_room() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Blob::new(31, 100 * EXTENT, EXTENT), Blob::new(32, 100 * EXTENT, EXTENT));
    let (other, cached) = over_the_quota(folder.path(), &old, &new);
    drop(other);
    std::thread::sleep(2 * TICK);
    check_read(&cached, &new, 30 * EXTENT, EXTENT);
    check_read(&cached, &new, 40 * EXTENT, EXTENT);
    assert!(cached.is_here(40 * 4096, 4096));
    assert!(!data_path(folder.path(), &old).exists());
}

/// Nobody looked at the quota again after a look that failed, so that nothing was stored any more.
#[test]
fn storing_goes_on_after_a_look_at_the_quota_that_failed() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Blob::new(60, 100 * EXTENT, EXTENT), Blob::new(61, 100 * EXTENT, EXTENT));
    let (other, cached) = over_the_quota(folder.path(), &old, &new);
    let (whole, away) = (folder.path().join("whole"), folder.path().join("away"));
    std::fs::rename(&whole, &away).unwrap();
    std::thread::sleep(2 * TICK);
    check_read(&cached, &new, 30 * EXTENT, EXTENT);
    std::fs::rename(&away, &whole).unwrap();
    drop(other);
    std::thread::sleep(2 * TICK);
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

fn with_background(folder: &Path) -> Settings {
    Settings { threads: 2, tick: Duration::from_millis(20), ..quiet(folder, 4096) }
}

/// A disk on which no blob can be begun as long as there is a file.
#[derive(Debug)]
struct FullOf(PathBuf);

impl DiskFaults for FullOf {
    fn before(&self, step: DiskStep) -> io::Result<()> {
        if step == DiskStep::Open && self.0.exists() {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    }
}

/// Room was made when a fill found the disk full, and a blob that could not even be begun has no
/// fills.
#[test]
fn a_blob_that_cannot_be_begun_on_a_full_disk_has_room_made_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Blob::new(62, 10 * EXTENT, EXTENT), Blob::new(63, 10 * EXTENT, EXTENT));
    check_read(&blob_in(&open(folder.path(), 4096), &old), &old, 0, 10 * EXTENT);
    let full: Arc<dyn DiskFaults> = Arc::new(FullOf(data_path(folder.path(), &old)));
    let settings = Settings { faults: Some(full), ..with_background(folder.path()) };
    let cached = blob_in(&Cache::open(settings).unwrap(), &new);
    check_read(&cached, &new, 0, EXTENT);
    eventually("there is room", || !data_path(folder.path(), &old).exists());
    eventually("stored", || {
        check_read(&cached, &new, 0, EXTENT);
        cached.is_here(0, 4096)
    });
}

/// Otherwise each of them would evict an eighth of the cache.
#[test]
fn room_is_made_once_for_all_blobs_that_cannot_be_begun_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let olds: Vec<_> = (80..104).map(|seed| Blob::new(seed, 10 * EXTENT, EXTENT)).collect();
    for old in &olds {
        check_read(&blob_in(&open(folder.path(), 4096), old), old, 0, 10 * EXTENT);
    }
    let full: Arc<dyn DiskFaults> = Arc::new(FullOf(folder.path().to_owned()));
    let pause = Duration::from_secs(5);
    let settings = Settings { faults: Some(full), pause, ..with_background(folder.path()) };
    let cache = Cache::open(settings).unwrap();
    let news: Vec<_> = (110..120).map(|seed| Blob::new(seed, EXTENT, EXTENT)).collect();
    let opened: Vec<_> = news.iter().map(|new| blob_in(&cache, new)).collect();
    let kept = || olds.iter().filter(|old| data_path(folder.path(), old).exists()).count();
    eventually("there is room", || kept() < olds.len());
    std::thread::sleep(Duration::from_millis(200));
    assert!(kept() >= 20, "an eighth, and not once for each blob: {} are left", kept());
    drop(opened);
}

/// Who stored the last of it died before it was promoted, and nobody else had seen all of it.
#[test]
fn a_complete_blob_is_promoted_by_the_next_process_that_reads_any_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(64, 10 * EXTENT, EXTENT);
    check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 10 * EXTENT);
    let cached = blob_in(&Cache::open(with_background(folder.path())).unwrap(), &blob);
    check_read(&cached, &blob, 0, EXTENT);
    eventually("promoted", || cached.stats().promoted == 1);
    let whole = folder.path().join("whole").join(blob.digest.hex());
    assert_eq!(std::fs::read(whole).unwrap(), blob.bytes);
    assert_eq!(blob.requests(), 1);
}

#[test]
fn a_blob_that_could_not_be_promoted_is_promoted_later() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(65, 10 * EXTENT, EXTENT);
    let disk = Arc::new(BadDisk::default());
    disk.set(&[(DiskStep::Link, libc::ENOSPC)]);
    let faults = Some(Arc::clone(&disk) as Arc<dyn DiskFaults>);
    let settings = Settings { faults, ..with_background(folder.path()) };
    let cached = blob_in(&Cache::open(settings).unwrap(), &blob);
    check_read(&cached, &blob, 0, 10 * EXTENT);
    eventually("tried twice", || disk.failed.load(Ordering::Relaxed) >= 2);
    assert_eq!(cached.stats().promoted, 0);
    disk.set(&[]);
    eventually("promoted", || cached.stats().promoted == 1);
    assert_eq!(blob.requests(), 1);
}

#[test]
fn a_folder_that_is_removed_while_it_is_used_is_made_again() {
    let parent = tempfile::tempdir().unwrap();
    for promotes in [false, true] {
        let folder = parent.path().join("cache/v1");
        let blob = Blob::new(66, 10 * EXTENT, EXTENT);
        let cached = blob_in(&Cache::open(with_background(&folder)).unwrap(), &blob);
        check_read(&cached, &blob, 0, if promotes { 10 * EXTENT } else { EXTENT });
        eventually("as it should be", || cached.stats().promoted == u64::from(promotes));
        // The background may make a name while they are all removed.
        eventually("removed", || std::fs::remove_dir_all(parent.path().join("cache")).is_ok());
        eventually("stored again", || {
            check_read(&cached, &blob, 5 * EXTENT, EXTENT);
            // Empty, it is just being made, and what is here is what it was in the removed file.
            let found = std::fs::metadata(data_path(&folder, &blob));
            found.is_ok_and(|found| found.blocks() > 0) && cached.is_here(5 * 4096, 4096)
        });
        drop(cached);
        let next = blob_in(&open(&folder, 4096), &blob);
        check_read(&next, &blob, 5 * EXTENT, EXTENT);
        assert_eq!((next.stats().verified, next.stats().fetches), (1, 0), "{promotes}");
        drop(next);
        std::fs::remove_dir_all(parent.path().join("cache")).unwrap();
    }
}

/// What could not be looked at was taken for half a pair, and removed as soon as the lock was free.
#[test]
fn a_repair_that_does_not_get_the_lock_removes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(67, 10 * EXTENT, EXTENT);
    check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 5 * EXTENT);
    let maintenance = Maintenance::open(&quiet(folder.path(), 4096)).unwrap();
    let lock = std::fs::File::open(folder.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let begun = std::time::Instant::now();
    let checked = std::thread::scope(|scope| {
        let checking = scope.spawn(|| maintenance.check(true).unwrap());
        // Until its first try is in vain, and a second one would not be.
        let most = Duration::from_millis(obd_ublk::limits::CACHE_LOCK_MS_MAX);
        std::thread::sleep(most + Duration::from_millis(400));
        lock.unlock().unwrap();
        checking.join().unwrap()
    });
    assert!(begun.elapsed() < Duration::from_secs(60));
    assert!(checked.strays.is_empty() && checked.unreadable.is_empty(), "{checked:?}");
    assert_eq!(checked.busy, [blob.digest]);
    assert!(data_path(folder.path(), &blob).exists());
    assert!(maintenance.check(true).unwrap().is_clean());
    check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 5 * EXTENT);
    assert_eq!(blob.fetched_extents(), 5);
}

/// Such a blob was read past the cache for ever, without a word.
#[test]
fn a_complete_blob_that_was_cut_is_begun_anew() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(68, 10 * EXTENT, EXTENT);
    let whole = folder.path().join("whole").join(blob.digest.hex());
    let soon = || std::time::Instant::now() + Duration::from_secs(60);
    let pull = || {
        let cached = blob_in(&open(folder.path(), 4096), &blob);
        cached.fill(0..10 * 4096).unwrap();
        while !whole.exists() {
            cached.promote(soon()).unwrap();
        }
    };
    let cut = |length| {
        let writable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(&whole, writable).unwrap();
        let file = std::fs::File::options().write(true).open(&whole).unwrap();
        file.set_len(length).unwrap();
    };
    pull();
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, 10 * EXTENT);
    cut(5 * 4096 - 100);
    // What is left is as right as before; a mapping has zeros behind it, up to the end of the page.
    check_read(&cached, &blob, 0, 2 * EXTENT);
    assert!(whole.exists());
    check_read(&cached, &blob, 4 * EXTENT, EXTENT);
    assert!(!whole.exists() && data_path(folder.path(), &blob).exists());
    check_read(&cached, &blob, 0, 10 * EXTENT);
    assert_eq!((blob.fetched_extents(), cached.stats().degraded), (20, 0));
    assert_eq!(cached.promote(soon()).unwrap(), obd_ublk::cache::Promotion::Done);
    // Before it is opened, too, where it is empty; where it is not, the length may be a wrong one.
    for (length, is_kept) in [(0, true), (4096, false)] {
        cut(length);
        let cached = blob_in(&open(folder.path(), 4096), &blob);
        check_read(&cached, &blob, 4 * EXTENT, EXTENT);
        assert_eq!(cached.is_here(4 * 4096, 1), is_kept);
        assert_eq!(whole.exists(), !is_kept);
        if is_kept {
            pull();
        }
    }
}
