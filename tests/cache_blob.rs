//! One blob through the cache: hits, misses, joining, reading ahead, failures of registry and disk,
//! promotion, eviction, looking after the folder.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "cache/lengths.rs"]
mod lengths;
#[path = "cache/source.rs"]
mod source;

use obd_ublk::cache::{
    BlobDigest, Cache, CachedBlob, Commit, DiskStep, Maintenance, Promotion, Settings,
};
use obd_ublk::error::ErrorKind;
use obd_ublk::source::RemoteBlob;
use source::{
    BadDisk, Blob, EXTENT, blob_in, check_read, data_path, digest_of, eventually, open, quiet,
};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

fn read_error(cached: &CachedBlob, at: u64, length: usize) -> obd_ublk::error::Error {
    cached.read(at, &mut vec![0; length]).unwrap_err()
}

fn map_path(folder: &Path, blob: &Blob) -> PathBuf {
    folder.join("partial").join(format!("{}.map", blob.digest.hex()))
}

fn write_at(path: &Path, at: u64, bytes: &[u8]) {
    std::fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn maintenance(folder: &Path) -> Maintenance {
    Maintenance::open(&quiet(folder, 4096)).unwrap()
}

#[test]
fn a_read_fetches_its_extents_once_in_one_request_and_then_they_are_here() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(1, 10 * EXTENT + 100, EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    assert_eq!((cached.bytes(), cached.name()), (41_060, "registry.example.com/sha256:blob"));
    assert!(!cached.is_here(0, 1));
    check_read(&cached, &blob, EXTENT + 10, 2 * EXTENT);
    assert_eq!(*blob.log.lock().unwrap(), [(4096, 3 * EXTENT)], "three neighbours, one request");
    assert!(cached.is_here(4096, 12_288) && !cached.is_here(4095, 2));
    check_read(&cached, &blob, EXTENT, 3 * EXTENT);
    check_read(&cached, &blob, 10 * EXTENT + 1, 99);
    assert_eq!(blob.requests(), 2, "the short last extent");
    let stats = cached.stats();
    assert_eq!((stats.hits, stats.misses), (1, 2));
    assert_eq!((stats.needed_bytes, stats.fetched_bytes), (8192 + 12_288 + 99, 12_288 + 100));
    assert_eq!((stats.fetches, stats.degraded, stats.verified), (2, 0, 0));
}

#[test]
fn an_extent_that_a_codec_found_wrong_is_fetched_once_more_and_not_again_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(31, 4 * EXTENT, EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, EXTENT);
    blob.lies.store(1, Ordering::Relaxed);
    let mut found = vec![0; EXTENT];
    cached.read(4096, &mut found).unwrap();
    assert!(found != blob.bytes[EXTENT..2 * EXTENT], "the lie is stored as the truth");
    assert!(cached.discard(5000, 10));
    assert!(!cached.is_here(4096, 4096) && cached.is_here(0, 4096));
    check_read(&cached, &blob, 0, 4 * EXTENT);
    assert_eq!(blob.times(), [1, 2, 1, 1]);
    assert_eq!((cached.stats().discarded, cached.stats().quarantined), (1, 1));
    // Another reader that saw the old bytes may read again, and nothing is fetched for it.
    assert!(cached.discard(5000, 10));
    check_read(&cached, &blob, 0, 4 * EXTENT);
    assert_eq!(blob.times(), [1, 2, 1, 1]);
    // No bytes, and bytes beyond the end, are nothing to throw away.
    assert!(!cached.discard(5000, 0));
    assert!(!cached.discard(4 * 4096, 1) && !cached.discard(u64::MAX, 2));
    let next = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&next, &blob, 0, 4 * EXTENT);
    assert_eq!((next.stats().verified, next.stats().fetches), (4, 0));
}

#[test]
fn a_complete_blob_that_changed_at_rest_is_found_out_by_its_codec_and_goes() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(32, 4 * EXTENT, EXTENT);
    check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 4 * EXTENT);
    assert_eq!(maintenance(folder.path()).promote(&blob.digest).unwrap(), Promotion::Done);
    let whole = folder.path().join("whole").join(blob.digest.hex());
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    // What is as it was published is not thrown away, whatever a codec says.
    assert!(!cached.discard(0, 100));
    assert!(whole.exists());
    write_at(&whole, 4096 + 9, &[!blob.bytes[EXTENT + 9]]);
    assert!(cached.discard(4096, 100));
    assert!(!whole.exists());
    let requests = blob.requests();
    check_read(&cached, &blob, 0, 4 * EXTENT);
    assert!(blob.requests() > requests, "fetched anew");
    assert_eq!(cached.stats().discarded, 1);
    assert!(cached.is_complete());
}

#[test]
fn what_lies_beyond_the_end_is_refused_and_nothing_is_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(2, EXTENT + 5, EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, EXTENT + 5);
    for (at, length) in [(4101, 1), (4100, 2), (0, 4102), (u64::MAX, 1), (1 << 40, 7)] {
        assert_eq!(read_error(&cached, at, length).kind(), ErrorKind::OutOfRange, "{at} {length}");
        assert!(!cached.is_here(at, u64::try_from(length).unwrap()));
    }
    cached.read(0, &mut []).unwrap();
    cached.read(4101, &mut []).unwrap();
    let empty = Blob::new(3, 0, EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &empty);
    cached.read(0, &mut []).unwrap();
    assert!(cached.is_complete());
    assert_eq!(read_error(&cached, 0, 1).kind(), ErrorKind::OutOfRange);
}

#[test]
fn the_next_process_finds_what_was_stored_and_checks_it_at_its_first_use() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(4, 8 * EXTENT, EXTENT);
    check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 5 * EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 100, 4 * EXTENT);
    check_read(&cached, &blob, 100, 4 * EXTENT);
    assert_eq!(blob.requests(), 1);
    let stats = cached.stats();
    assert_eq!((stats.verified, stats.hits, stats.fetches), (5, 1, 0), "checked once");
}

#[test]
fn an_extent_that_was_damaged_at_rest_is_quarantined_fetched_once_more_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(5, 8 * EXTENT, EXTENT);
    check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 8 * EXTENT);
    let data = data_path(folder.path(), &blob);
    write_at(&data, 3 * 4096 + 77, &[!blob.bytes[3 * EXTENT + 77]]);
    write_at(&data, 5 * 4096, &[0; EXTENT]);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, 8 * EXTENT);
    assert_eq!(blob.times(), [1, 1, 1, 2, 1, 2, 1, 1]);
    assert_eq!(cached.stats().quarantined, 2);
    let next = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&next, &blob, 0, 8 * EXTENT);
    assert_eq!((next.stats().quarantined, next.stats().verified, blob.requests()), (0, 8, 3));
}

#[test]
fn files_of_nonsense_are_made_anew() {
    let blob = Blob::new(6, 4 * EXTENT, EXTENT);
    type Damage = fn(&Path, &Path);
    let damages: [(&str, Damage); 9] = [
        ("no data", |_, data| std::fs::remove_file(data).unwrap()),
        ("no sidecar", |map, _| std::fs::remove_file(map).unwrap()),
        ("an empty sidecar", |map, _| std::fs::write(map, b"").unwrap()),
        ("a short sidecar", |map, _| std::fs::write(map, [7; 4100]).unwrap()),
        ("a flipped bit", |map, _| write_at(map, 20, &[1])),
        ("short data", |_, data| std::fs::write(data, [7; 4100]).unwrap()),
        ("long data", |_, data| write_at(data, 1 << 20, &[1])),
        ("a link to a device", |map, _| {
            std::fs::remove_file(map).unwrap();
            std::os::unix::fs::symlink("/dev/zero", map).unwrap();
        }),
        ("random records", |map, _| write_at(map, 4096, &source::bytes_of(9, 64))),
    ];
    for (what, damage) in damages {
        let folder = tempfile::tempdir().unwrap();
        check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 4 * EXTENT);
        damage(&map_path(folder.path(), &blob), &data_path(folder.path(), &blob));
        let cached = blob_in(&open(folder.path(), 4096), &blob);
        check_read(&cached, &blob, 0, 4 * EXTENT);
        assert_eq!(cached.stats().degraded, 0, "{what}: stored again");
        drop(cached);
        let next = blob_in(&open(folder.path(), 4096), &blob);
        check_read(&next, &blob, 0, 4 * EXTENT);
        assert_eq!((next.stats().verified, next.stats().fetches), (4, 0), "{what}");
    }
}

#[test]
fn a_failed_fetch_is_told_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(7, 4 * EXTENT, EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    blob.fail(Some(ErrorKind::NotFound));
    let error = read_error(&cached, 5, 10);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        format!("{error:#}"),
        "read 10 bytes at byte 5 of registry.example.com/sha256:blob: the registry says no"
    );
    blob.fail(None);
    check_read(&cached, &blob, 0, 4 * EXTENT);
    assert_eq!(cached.stats().fetch_failures, 1);
}

#[test]
fn a_read_ends_at_its_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(8, 4 * EXTENT, EXTENT);
    blob.slow(Duration::from_secs(3600));
    let settings = Settings { deadline: Duration::from_millis(50), ..quiet(folder.path(), 4096) };
    let cached = blob_in(&Cache::open(settings).unwrap(), &blob);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(read_error(&cached, 0, 10).kind(), ErrorKind::Timeout));
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn fifty_threads_fetch_each_extent_once() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(9, 64 * EXTENT, EXTENT);
    blob.slow(Duration::from_millis(2));
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    let together = std::sync::Barrier::new(50);
    std::thread::scope(|scope| {
        for thread in 0..50_u64 {
            let (cached, blob, together) = (&cached, &blob, &together);
            scope.spawn(move || {
                let mut random = source::Random(thread);
                together.wait();
                for _ in 0..100 {
                    let at = random.index(blob.bytes.len());
                    let length = 1 + random.index((blob.bytes.len() - at).min(5 * EXTENT));
                    check_read(cached, blob, at, length);
                }
            });
        }
    });
    check_read(&cached, &blob, 0, 64 * EXTENT);
    assert_eq!(blob.times(), [1; 64]);
    assert!(cached.stats().joined > 0);
}

#[test]
fn fifty_threads_fetch_once_where_nothing_can_be_kept() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(10, 4 * EXTENT, EXTENT);
    blob.slow(Duration::from_millis(300));
    let settings = Settings { folder: folder.path().join("file/x"), ..quiet(folder.path(), 4096) };
    std::fs::write(folder.path().join("file"), b"").unwrap();
    assert!(Cache::open(settings.clone()).is_err());
    let cached = blob_in(&Cache::open_or_bypass(settings), &blob);
    let together = std::sync::Barrier::new(50);
    std::thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| {
                together.wait();
                check_read(&cached, &blob, 100, 2 * EXTENT);
            });
        }
    });
    assert_eq!(blob.requests(), 1, "who waits for a fetch gets its bytes");
    assert_eq!(cached.stats().degraded, 3);
    assert_eq!(cached.fill(0..4096).unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn two_caches_on_one_folder_fetch_each_extent_once() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(11, 40 * EXTENT, EXTENT);
    blob.slow(Duration::from_millis(1));
    let caches: Vec<Cache> = (0..8).map(|_| open(folder.path(), 4096)).collect();
    std::thread::scope(|scope| {
        for (seed, cache) in (0..).zip(&caches) {
            let blob = &blob;
            scope.spawn(move || {
                let cached = blob_in(cache, blob);
                let mut random = source::Random(seed);
                for _ in 0..60 {
                    let at = random.index(blob.bytes.len() - 2 * EXTENT);
                    check_read(&cached, blob, at, 2 * EXTENT);
                }
                check_read(&cached, blob, 0, 40 * EXTENT);
                assert_eq!(cached.stats().waited_in_vain, 0);
            });
        }
    });
    assert_eq!(blob.times(), [1; 40]);
}

#[test]
fn a_full_or_broken_disk_costs_the_cache_and_no_read() {
    let cases = [
        (DiskStep::WriteData, libc::ENOSPC),
        (DiskStep::WriteRecords, libc::ENOSPC),
        (DiskStep::WriteData, libc::EIO),
        (DiskStep::WriteRecords, libc::EROFS),
        (DiskStep::ReadRecords, libc::EIO),
        (DiskStep::ReadData, libc::EIO),
        (DiskStep::Open, libc::EIO),
        (DiskStep::Open, libc::ENOSPC),
    ];
    for (step, errno) in cases {
        let folder = tempfile::tempdir().unwrap();
        let blob = Blob::new(12, 16 * EXTENT, EXTENT);
        check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 4 * EXTENT);
        let disk = Arc::new(BadDisk::default());
        disk.set(&[(step, errno)]);
        let settings =
            Settings { faults: Some(Arc::clone(&disk) as _), ..quiet(folder.path(), 4096) };
        let cached = blob_in(&Cache::open(settings).unwrap(), &blob);
        check_read(&cached, &blob, 0, 16 * EXTENT);
        check_read(&cached, &blob, 3 * EXTENT + 1, 6 * EXTENT);
        assert!(disk.failed.load(Ordering::Relaxed) > 0, "{step:?}");
        assert!(cached.stats().degraded > 0, "{step:?} {errno}");
        disk.set(&[]);
        drop(cached);
        let next = blob_in(&open(folder.path(), 4096), &blob);
        check_read(&next, &blob, 0, 16 * EXTENT);
        assert_eq!(next.stats().quarantined, 0, "{step:?}: nothing bad was left");
    }
}

#[test]
fn storing_goes_on_when_the_disk_has_recovered() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(13, 16 * EXTENT, EXTENT);
    let disk = Arc::new(BadDisk::default());
    let settings = Settings { faults: Some(Arc::clone(&disk) as _), ..quiet(folder.path(), 4096) };
    let cached = blob_in(&Cache::open(settings).unwrap(), &blob);
    disk.set(&[(DiskStep::WriteData, libc::ENOSPC)]);
    check_read(&cached, &blob, 0, 4 * EXTENT);
    assert!(!cached.is_here(0, 1));
    disk.set(&[]);
    std::thread::sleep(Duration::from_millis(5));
    check_read(&cached, &blob, 0, 4 * EXTENT);
    assert!(cached.is_here(0, 4 * 4096));
    assert_eq!(blob.times()[..5], [2, 2, 2, 2, 0]);
}

#[test]
fn a_data_file_that_somebody_cuts_is_read_past() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(14, 16 * EXTENT, EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, 16 * EXTENT);
    let data = std::fs::File::options().write(true).open(data_path(folder.path(), &blob)).unwrap();
    data.set_len(6 * 4096).unwrap();
    check_read(&cached, &blob, 0, 16 * EXTENT);
    check_read(&cached, &blob, 9 * EXTENT, 2 * EXTENT);
    assert!(cached.stats().degraded > 0);
}

fn with_background(folder: &Path) -> Settings {
    Settings { threads: 4, tick: Duration::from_millis(20), ..quiet(folder, 4096) }
}

#[test]
fn a_sequential_reader_is_fetched_ahead_and_random_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(15, 24 << 20, 1 << 17);
    // As a registry: so long that the background gets its turn on a busy machine too.
    blob.slow(Duration::from_millis(5));
    let settings = Settings { extent_bytes: 1 << 17, ..with_background(folder.path()) };
    let cached = blob_in(&Cache::open(settings).unwrap(), &blob);
    for at in (0..blob.bytes.len()).step_by(64 << 10) {
        check_read(&cached, &blob, at, 64 << 10);
    }
    assert_eq!(blob.times(), [1; 192], "each once, whoever came first");
    let stats = cached.stats();
    assert!(stats.ahead_bytes > stats.fetched_bytes / 2, "{stats:?}");
    let largest = blob.log.lock().unwrap().iter().map(|(_, length)| *length).max();
    assert_eq!(largest, Some(1 << 20), "requests are bounded");

    let other = Blob::new(16, 24 << 20, 1 << 17);
    let cached = blob_in(&open(folder.path(), 1 << 17), &other);
    let mut random = source::Random(7);
    for _ in 0..64 {
        let at = random.index(other.bytes.len() - 4096);
        check_read(&cached, &other, at, 4096);
    }
    assert_eq!(cached.stats().ahead_bytes, 0);
}

#[test]
fn a_complete_blob_becomes_a_plain_file() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(17, 20 * EXTENT + 1, EXTENT);
    let cached = blob_in(&Cache::open(with_background(folder.path())).unwrap(), &blob);
    cached.fill(0..cached.bytes()).unwrap();
    eventually("promoted", || cached.stats().promoted == 1);
    let whole = folder.path().join("whole").join(blob.digest.hex());
    assert_eq!(std::fs::read(&whole).unwrap(), blob.bytes);
    assert_eq!(std::fs::read_dir(folder.path().join("partial")).unwrap().count(), 0);
    check_read(&cached, &blob, 5, 19 * EXTENT);
    let next = blob_in(&open(folder.path(), 4096), &blob);
    assert!(next.is_complete());
    check_read(&next, &blob, 5, 19 * EXTENT);
    assert_eq!((next.stats().misses, next.stats().hits), (0, 1));
    assert_eq!(blob.fetched_extents(), 21);

    let dir = tempfile::tempdir().unwrap();
    let maintenance = maintenance(folder.path());
    let commit_into = |digest: &BlobDigest| maintenance.commit_into(digest, dir.path()).unwrap();
    assert_eq!(commit_into(&digest_of(b"other")), Commit::Incomplete);
    assert_eq!(commit_into(&blob.digest), Commit::Made);
    let commit = dir.path().join("overlaybd.commit");
    assert_eq!(commit.metadata().unwrap().ino(), whole.metadata().unwrap().ino());
    assert_eq!(commit_into(&blob.digest), Commit::WasThere);
    let usage = maintenance.usage().unwrap();
    assert_eq!((usage.whole, usage.disk_bytes), (1, 0), "shared with another's folder");
    assert!(usage.shared_bytes >= 20 * 4096, "{usage:?}");
    assert_eq!(maintenance.collect(Some(0)).unwrap().removed, 0, "would free nothing");
}

#[test]
fn the_copy_for_another_file_system_is_whole_or_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let blob = Blob::new(18, 300 * EXTENT + 17, EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    cached.fill(0..cached.bytes()).unwrap();
    let maintenance = maintenance(folder.path());
    assert_eq!(maintenance.promote(&blob.digest).unwrap(), Promotion::Done);
    // Once the name that a process of another PID namespace, with our number, was writing under.
    let other = shm.path().join(format!(".overlaybd.commit.{}", std::process::id()));
    std::fs::write(&other, b"half of one").unwrap();
    // And what a killed one left.
    std::fs::write(shm.path().join(".overlaybd.commit.0123456789abcdef"), b"a whole").unwrap();
    assert_eq!(maintenance.commit_into(&blob.digest, shm.path()).unwrap(), Commit::Made);
    let commit = shm.path().join("overlaybd.commit");
    assert_eq!(std::fs::read(&commit).unwrap(), blob.bytes);
    assert_eq!(std::fs::read(&other).unwrap(), b"half of one");
    assert_eq!(std::fs::read_dir(shm.path()).unwrap().count(), 2, "nothing else beside it");
}

#[test]
fn processes_that_complete_a_blob_together_promote_it() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(19, 10 * EXTENT, EXTENT);
    let one = blob_in(&Cache::open(with_background(folder.path())).unwrap(), &blob);
    let other = blob_in(&Cache::open(with_background(folder.path())).unwrap(), &blob);
    one.fill(0..5 * 4096).unwrap();
    other.fill(5 * 4096..10 * 4096).unwrap();
    eventually("promoted", || one.stats().promoted + other.stats().promoted >= 1);
    assert_eq!(blob.fetched_extents(), 10);
    eventually("both have the plain file", || one.is_complete() && other.is_complete());
    check_read(&one, &blob, 0, 10 * EXTENT);
    check_read(&other, &blob, 0, 10 * EXTENT);
}

#[test]
fn a_blob_of_another_digest_is_fetched_anew_once_and_then_refused() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(20, 10 * EXTENT, EXTENT);
    let cached = blob_in(&Cache::open(with_background(folder.path())).unwrap(), &blob);
    blob.lies.store(1, Ordering::Relaxed);
    cached.fill(0..cached.bytes()).unwrap();
    eventually("condemned", || cached.stats().condemned == 1);
    eventually("healed", || cached.fill(0..cached.bytes()).is_ok() && cached.stats().promoted == 1);
    check_read(&cached, &blob, 0, 10 * EXTENT);
    assert_eq!((blob.times(), cached.stats().condemned), (vec![2; 10], 1));

    let bad = Blob::new(21, 10 * EXTENT, EXTENT);
    bad.lies.store(u64::MAX, Ordering::Relaxed);
    let cached = blob_in(&Cache::open(with_background(folder.path())).unwrap(), &bad);
    eventually("condemned twice", || {
        cached.fill(0..cached.bytes()).is_err() && cached.stats().condemned >= 2
    });
    assert_eq!(read_error(&cached, 0, 10).kind(), ErrorKind::Integrity);
    assert_eq!(cached.fill(0..10).unwrap_err().kind(), ErrorKind::Integrity);
    assert!(!folder.path().join("whole").join(bad.digest.hex()).exists());
}

#[test]
fn a_damaged_extent_of_a_complete_blob_is_found_by_promotion_and_healed() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(22, 10 * EXTENT, EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    cached.fill(0..cached.bytes()).unwrap();
    drop(cached);
    write_at(&data_path(folder.path(), &blob), 4 * 4096, b"damage");
    let maintenance = maintenance(folder.path());
    assert_eq!(maintenance.promote(&blob.digest).unwrap(), Promotion::Damaged(1));
    assert_eq!(maintenance.promote(&blob.digest).unwrap(), Promotion::Incomplete);
    assert_eq!(maintenance.usage().unwrap().quarantined_extents, 1);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, 10 * EXTENT);
    assert_eq!(maintenance.promote(&blob.digest).unwrap(), Promotion::Done);
    assert_eq!(blob.times(), [1, 1, 1, 1, 2, 1, 1, 1, 1, 1]);
}

#[test]
fn a_complete_file_that_lost_its_length_is_read_past_until_it_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(23, 10 * EXTENT, EXTENT);
    blob_in(&open(folder.path(), 4096), &blob).fill(0..10 * 4096).unwrap();
    assert_eq!(maintenance(folder.path()).promote(&blob.digest).unwrap(), Promotion::Done);
    let whole = folder.path().join("whole").join(blob.digest.hex());
    std::fs::File::options().write(true).open(&whole).unwrap().set_len(4096).unwrap();
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, 10 * EXTENT);
    assert!(whole.exists() && !cached.is_here(0, 1));
    let checked = maintenance(folder.path()).check(true).unwrap();
    assert_eq!(checked.whole_bad, [blob.digest]);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, 10 * EXTENT);
    assert!(!whole.exists() && cached.is_complete());
}

#[test]
fn a_removed_blob_is_read_on_and_begun_anew_at_the_next_miss() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(24, 10 * EXTENT, EXTENT);
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, 5 * EXTENT);
    let maintenance = maintenance(folder.path());
    assert_eq!(maintenance.remove(&blob.digest, false).unwrap_err().kind(), ErrorKind::Busy);
    assert!(maintenance.remove(&blob.digest, true).unwrap());
    assert!(!maintenance.remove(&blob.digest, true).unwrap());
    check_read(&cached, &blob, 0, 5 * EXTENT);
    assert_eq!(blob.requests(), 1, "its files are still mapped");
    check_read(&cached, &blob, 4 * EXTENT, 2 * EXTENT);
    assert_eq!(cached.stats().degraded, 0);
    assert!(data_path(folder.path(), &blob).exists(), "new files");
    assert!(!cached.is_here(0, 1));
    check_read(&cached, &blob, 0, 10 * EXTENT);
    drop(cached);
    assert!(maintenance.remove(&blob.digest, false).unwrap());
}

#[test]
fn the_quota_is_kept_by_evicting_what_was_not_used_longest() {
    let folder = tempfile::tempdir().unwrap();
    let quota_bytes = 2 << 20;
    let settings = Settings { quota_bytes, ..quiet(folder.path(), 4096) };
    let cache = Cache::open(settings.clone()).unwrap();
    let blobs: Vec<_> = (0..12).map(|seed| Blob::new(100 + seed, 100 * EXTENT, EXTENT)).collect();
    for blob in &blobs {
        let cached = blob_in(&cache, blob);
        check_read(&cached, blob, 0, 100 * EXTENT);
        // So that the order by time is the order of use.
        std::thread::sleep(Duration::from_millis(12));
    }
    let maintenance = Maintenance::open(&settings).unwrap();
    let usage = maintenance.usage().unwrap();
    assert!(usage.disk_bytes <= quota_bytes + (64 << 10), "{usage:?}");
    assert!((3..=5).contains(&usage.partial), "{usage:?}");
    let kept: Vec<_> = maintenance.list().unwrap().iter().map(|entry| entry.digest).collect();
    assert!(kept.contains(&blobs[11].digest) && !kept.contains(&blobs[0].digest));
    let trimmed = maintenance.collect(Some(0)).unwrap();
    assert_eq!((trimmed.removed, trimmed.bytes), (usage.partial, 0));
    assert_eq!(maintenance.list().unwrap(), []);
}

#[test]
fn an_open_blob_larger_than_the_quota_is_read_past_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { quota_bytes: 256 << 10, ..quiet(folder.path(), 4096) };
    let blob = Blob::new(25, 1 << 20, EXTENT);
    let cached = blob_in(&Cache::open(settings.clone()).unwrap(), &blob);
    for at in (0..blob.bytes.len()).step_by(EXTENT) {
        check_read(&cached, &blob, at, EXTENT);
    }
    let usage = Maintenance::open(&settings).unwrap().usage().unwrap();
    assert!(usage.disk_bytes <= (256 << 10) + (32 << 10), "{usage:?}");
    assert!(cached.stats().degraded > 0);
    check_read(&cached, &blob, 0, 1 << 20);
}

#[test]
fn a_check_finds_what_is_wrong_and_repairs_it() {
    let folder = tempfile::tempdir().unwrap();
    let blobs: Vec<_> = (0..4).map(|seed| Blob::new(200 + seed, 6 * EXTENT, EXTENT)).collect();
    let cache = open(folder.path(), 4096);
    for blob in &blobs {
        blob_in(&cache, blob).fill(0..6 * 4096).unwrap();
    }
    let maintenance = maintenance(folder.path());
    for blob in &blobs[..2] {
        assert_eq!(maintenance.promote(&blob.digest).unwrap(), Promotion::Done);
    }
    let clean = maintenance.check(false).unwrap();
    assert!(clean.is_clean(), "{clean:?}");
    assert_eq!((clean.whole_right, clean.extents_right), (2, 12));

    let whole = folder.path().join("whole").join(blobs[1].digest.hex());
    write_at(&whole, 9, b"damage");
    write_at(&data_path(folder.path(), &blobs[2]), 4096, b"damage");
    std::fs::remove_file(map_path(folder.path(), &blobs[3])).unwrap();
    for repair in [false, true] {
        let found = maintenance.check(repair).unwrap();
        assert_eq!(found.whole_bad, [blobs[1].digest]);
        assert_eq!(found.extents_bad, [(blobs[2].digest, 1)]);
        assert_eq!(found.strays, [blobs[3].digest]);
        assert_eq!((found.whole_right, found.extents_right), (1, 5));
    }
    let repaired = maintenance.check(false).unwrap();
    assert!(repaired.is_clean(), "{repaired:?}");
    for blob in &blobs {
        check_read(&blob_in(&cache, blob), blob, 0, 6 * EXTENT);
    }
    assert_eq!(blobs.iter().map(|blob| blob.fetched_extents()).sum::<u64>(), 24 + 6 + 1 + 6);
}

#[test]
fn the_list_tells_what_is_here() {
    let folder = tempfile::tempdir().unwrap();
    let cache = open(folder.path(), 4096);
    let blob = Blob::new(26, 100 * EXTENT, EXTENT);
    let cached = blob_in(&cache, &blob);
    check_read(&cached, &blob, 0, 10 * EXTENT);
    std::fs::write(folder.path().join("whole/not-a-digest"), b"x").unwrap();
    let maintenance = maintenance(folder.path());
    let list = maintenance.list().unwrap();
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].digest, list[0].is_whole, list[0].in_use), (blob.digest, false, true));
    assert_eq!(list[0].blob_bytes, 409_600);
    assert!((40_960..65_536).contains(&list[0].disk_bytes), "{list:?}");
    let usage = maintenance.usage().unwrap();
    assert_eq!((usage.partial, usage.in_use, usage.filled_extents), (1, 1, 10));
    drop(cached);
    assert!(!maintenance.list().unwrap()[0].in_use);
}

#[test]
fn a_blob_gets_into_its_folder_when_it_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let blob = Blob::new(27, 10 * EXTENT, EXTENT);
    let cached = blob_in(&Cache::open(with_background(folder.path())).unwrap(), &blob);
    assert!(cached.commit_when_complete(dirs[0].path().to_owned()));
    let commit = |dir: usize| dirs[dir].path().join("overlaybd.commit");
    assert!(!commit(0).exists());
    cached.fill(0..cached.bytes()).unwrap();
    eventually("in the first folder", || commit(0).exists());
    assert_eq!(std::fs::read(commit(0)).unwrap(), blob.bytes);
    assert!(cached.commit_when_complete(dirs[1].path().to_owned()));
    eventually("in the second folder", || commit(1).exists());
}

#[test]
fn after_a_failed_sync_everything_is_checked_anew_and_nothing_is_promoted() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(28, 10 * EXTENT, EXTENT);
    let disk = Arc::new(BadDisk::default());
    disk.set(&[(DiskStep::Sync, libc::EIO)]);
    let settings =
        Settings { faults: Some(Arc::clone(&disk) as _), ..with_background(folder.path()) };
    let cached = blob_in(&Cache::open(settings).unwrap(), &blob);
    check_read(&cached, &blob, 0, 5 * EXTENT);
    eventually("forgotten", || !cached.is_here(0, 1));
    check_read(&cached, &blob, 0, 5 * EXTENT);
    assert_eq!((blob.requests(), cached.stats().verified), (1, 5), "checked, not fetched");
    check_read(&cached, &blob, 0, 10 * EXTENT);
    let failed = disk.failed.load(Ordering::Relaxed);
    eventually("tried", || disk.failed.load(Ordering::Relaxed) > failed);
    assert_eq!(cached.stats().promoted, 0);
    assert_eq!(std::fs::read_dir(folder.path().join("whole")).unwrap().count(), 0);
}

#[test]
fn what_a_kill_in_mid_promotion_left_is_cleared_away() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(29, 6 * EXTENT, EXTENT);
    blob_in(&open(folder.path(), 4096), &blob).fill(0..6 * 4096).unwrap();
    let whole = folder.path().join("whole").join(blob.digest.hex());
    std::fs::hard_link(data_path(folder.path(), &blob), &whole).unwrap();
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    assert!(cached.is_complete());
    check_read(&cached, &blob, 0, 6 * EXTENT);
    assert_eq!(std::fs::read_dir(folder.path().join("partial")).unwrap().count(), 0);
}

#[test]
fn an_open_blob_that_nobody_reads_is_evicted_and_its_space_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(30, 100 * EXTENT, EXTENT);
    let cached = blob_in(&Cache::open(with_background(folder.path())).unwrap(), &blob);
    check_read(&cached, &blob, 0, 50 * EXTENT);
    let data = std::fs::File::open(data_path(folder.path(), &blob)).unwrap();
    let map = std::fs::File::open(map_path(folder.path(), &blob)).unwrap();
    let maintenance = maintenance(folder.path());
    assert_eq!(maintenance.collect(Some(0)).unwrap().removed, 0, "it was read just now");
    // The tick that notes the reads comes first.
    std::thread::sleep(Duration::from_millis(100));
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    map.set_times(std::fs::FileTimes::new().set_modified(long_ago)).unwrap();
    assert_eq!(maintenance.collect(Some(0)).unwrap().removed, 1);
    eventually("let go", || !cached.is_here(0, 1));
    assert_eq!(data.metadata().unwrap().nlink(), 0);
    check_read(&cached, &blob, 0, 50 * EXTENT);
    assert_eq!(cached.stats().degraded, 0);
}

/// Of the root it was not looked at: who can write there can exchange what is in it.
#[test]
fn a_folder_that_others_can_write_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let parent = tempfile::tempdir().unwrap();
    let (folder, link) = (parent.path().join("v1"), parent.path().join("link"));
    std::fs::create_dir_all(folder.join("partial")).unwrap();
    std::os::unix::fs::symlink(&folder, &link).unwrap();
    let set = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    for writable in [folder.join("partial"), folder.clone()] {
        set(&writable, 0o777);
        for path in [&folder, &link] {
            let error = Cache::open(quiet(path, 4096)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error:#}");
            assert!(format!("{error:#}").contains("mode 777"), "{error:#}");
            let blob = Blob::new(33, EXTENT, EXTENT);
            let cached = blob_in(&Cache::open_or_bypass(quiet(path, 4096)), &blob);
            check_read(&cached, &blob, 0, EXTENT);
            assert!(!cached.is_here(0, 1));
        }
        set(&writable, 0o755);
    }
    // Who else can write above it, as in /tmp, is nobody's business here.
    set(parent.path(), 0o1777);
    assert!(Cache::open(quiet(&folder, 4096)).is_ok() && Cache::open(quiet(&link, 4096)).is_ok());
}

#[test]
fn long_reads_and_whole_blobs_are_fetched_by_several_requests_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { extent_bytes: 1 << 17, threads: 8, ..quiet(folder.path(), 4096) };
    let cache = Cache::open(settings).unwrap();
    for (seed, is_read) in [(34, true), (35, false)] {
        let blob = Blob::new(seed, 24 << 20, 1 << 17);
        let cached = blob_in(&cache, &blob);
        blob.slow(Duration::from_millis(200));
        let begun = Instant::now();
        if is_read {
            check_read(&cached, &blob, 0, 8 << 20);
        } else {
            cached.fill(0..8 << 20).unwrap();
        }
        let took = begun.elapsed();
        assert!(blob.most_flying.load(Ordering::Relaxed) >= 6, "{blob:?}");
        assert!(took < Duration::from_millis(1200), "eight requests of 200 ms took {took:?}");
        blob.slow(Duration::ZERO);
        cached.fill(0..24 << 20).unwrap();
        assert_eq!(blob.times(), [1; 192]);
        assert!(cached.is_complete());
    }
}

#[test]
fn a_reader_whose_registry_answers_does_not_wait_for_one_whose_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let (stuck, good) = (Blob::new(36, 8 * EXTENT, EXTENT), Blob::new(36, 8 * EXTENT, EXTENT));
    stuck.slow(Duration::from_secs(3600));
    let settings = Settings { deadline: Duration::from_secs(6), ..quiet(folder.path(), 4096) };
    let (cache, other) = (Cache::open(settings.clone()).unwrap(), Cache::open(settings).unwrap());
    let (first, second) = (blob_in(&cache, &stuck), blob_in(&cache, &good));
    let third = blob_in(&other, &good);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let error = read_error(&first, 0, 4 * EXTENT);
            assert_eq!(error.kind(), ErrorKind::Timeout);
        });
        eventually("on its way", || stuck.flying.load(Ordering::Relaxed) == 1);
        for cached in [&second, &third] {
            scope.spawn(|| {
                let begun = Instant::now();
                check_read(cached, &good, EXTENT, 2 * EXTENT);
                check_read(cached, &good, EXTENT, 3 * EXTENT);
                let took = begun.elapsed();
                assert!(took < Duration::from_secs(5), "{took:?}: patience is lost once");
                assert!(cached.stats().waited_in_vain >= 2);
            });
        }
    });
    check_read(&third, &good, 0, 8 * EXTENT);
    assert_eq!(third.stats().quarantined, 0);
}
