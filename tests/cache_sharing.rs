//! What one process must not take for granted while another one works on the same blob: that what
//! was hashed is what gets a name, that what was here still is; and what the background must leave
//! to reads.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "cache/source.rs"]
mod source;

use obd_ublk::cache::{Cache, Commit, DiskFaults, DiskStep, Maintenance, Promotion};
use obd_ublk::error::Result;
use obd_ublk::limits::{BLOB_REQUESTS_AT_ONCE_MAX, CACHE_AHEAD_AT_ONCE_MAX};
use obd_ublk::source::{Fetch, RemoteBlob};
use source::{Blob, EXTENT, blob_in, check_read, data_path, eventually, open, quiet};
use std::fmt;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

fn maintenance(folder: &Path) -> Maintenance {
    Maintenance::open(&quiet(folder, 4096)).unwrap()
}

fn whole_path(folder: &Path, blob: &Blob) -> PathBuf {
    folder.join("whole").join(blob.digest.hex())
}

fn damage(folder: &Path, blob: &Blob, at: u64) {
    let file = std::fs::File::options().write(true).open(data_path(folder, blob)).unwrap();
    file.write_all_at(b"damage", at).unwrap();
}

/// Does something in front of the first sync: after all was hashed, before it is committed.
struct Meanwhile(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Meanwhile")
    }
}

impl DiskFaults for Meanwhile {
    fn before(&self, step: DiskStep) -> io::Result<()> {
        if step == DiskStep::Sync {
            let act = self.0.lock().unwrap().take();
            act.into_iter().for_each(|act| act());
        }
        Ok(())
    }
}

/// Promotes the blob in `folder`; `act` happens between its hash and its commit.
fn promote_while(folder: &Path, blob: &Blob, act: impl FnOnce() + Send + 'static) -> Promotion {
    let faults = Some(Arc::new(Meanwhile(Mutex::new(Some(Box::new(act))))) as _);
    let settings = obd_ublk::cache::Settings { faults, ..quiet(folder, 4096) };
    Maintenance::open(&settings).unwrap().promote(&blob.digest).unwrap()
}

/// Another reader finds an extent wrong between the hash and the commit, and what comes in its
/// place is wrong: it was hashed as it had been, and got its name as it was then.
#[test]
fn an_extent_that_is_fetched_once_more_after_the_hash_is_not_promoted_unseen() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(50, 6 * EXTENT, EXTENT);
    let other = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&other, &blob, 0, 6 * EXTENT);
    let (fetched, reader) = (Arc::clone(&blob), blob_in(&open(folder.path(), 4096), &blob));
    check_read(&reader, &blob, 0, 6 * EXTENT);
    let found = promote_while(folder.path(), &blob, move || {
        fetched.lies.store(1, Ordering::Relaxed);
        assert!(reader.discard(4096, 10));
        reader.read(4096, &mut [0; EXTENT]).unwrap();
    });
    assert_eq!(found, Promotion::Busy);
    assert!(!whole_path(folder.path(), &blob).exists());
    assert_eq!(blob.times(), [1, 2, 1, 1, 1, 1]);
    // The next look hashes what is there now.
    let maintenance = maintenance(folder.path());
    assert_eq!(maintenance.promote(&blob.digest).unwrap(), Promotion::Condemned);
    assert!(!whole_path(folder.path(), &blob).exists());
}

#[test]
fn an_extent_that_is_repaired_after_the_hash_with_the_same_bytes_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(51, 6 * EXTENT, EXTENT);
    let reader = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&reader, &blob, 0, 6 * EXTENT);
    let repaired = Arc::clone(&blob);
    let found = promote_while(folder.path(), &blob, move || {
        assert!(reader.discard(4096, 10));
        check_read(&reader, &repaired, 4096, EXTENT);
    });
    assert_eq!(found, Promotion::Done);
    assert_eq!(std::fs::read(whole_path(folder.path(), &blob)).unwrap(), blob.bytes);
}

#[test]
fn an_extent_that_is_thrown_away_after_the_hash_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(52, 6 * EXTENT, EXTENT);
    let reader = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&reader, &blob, 0, 6 * EXTENT);
    let found = promote_while(folder.path(), &blob, move || assert!(reader.discard(0, 10)));
    assert_eq!(found, Promotion::Busy);
    let maintenance = maintenance(folder.path());
    assert_eq!(maintenance.promote(&blob.digest).unwrap(), Promotion::Incomplete);
}

/// What was wrong when it was hashed and right a moment later was thrown away as a whole, as if the
/// registry had another blob under that name.
#[test]
fn a_blob_that_is_made_right_after_the_hash_is_not_condemned() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(53, 6 * EXTENT, EXTENT);
    let reader = blob_in(&open(folder.path(), 4096), &blob);
    blob.lies.store(1, Ordering::Relaxed);
    reader.read(0, &mut [0; 6 * EXTENT]).unwrap();
    let repaired = Arc::clone(&blob);
    let found = promote_while(folder.path(), &blob, move || {
        assert!(reader.discard(0, 10));
        check_read(&reader, &repaired, 0, 6 * EXTENT);
    });
    assert_eq!(found, Promotion::Busy);
    let maintenance = maintenance(folder.path());
    assert_eq!(maintenance.promote(&blob.digest).unwrap(), Promotion::Done);
    assert_eq!(std::fs::read(whole_path(folder.path(), &blob)).unwrap(), blob.bytes);
    assert_eq!(blob.fetched_extents(), 7);
}

/// `prefetch` had looked at all extents, another process threw one away, and `prefetch` went round
/// and round: all was here by its own word, and nothing could be promoted.
#[test]
fn what_another_process_threw_away_is_fetched_by_who_believed_that_all_is_here() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(54, 6 * EXTENT, EXTENT);
    let (puller, reader) =
        (blob_in(&open(folder.path(), 4096), &blob), blob_in(&open(folder.path(), 4096), &blob));
    puller.fill(0..6 * 4096).unwrap();
    check_read(&reader, &blob, 0, 6 * EXTENT);
    assert!(reader.discard(2 * 4096, 4097));
    assert!(puller.is_complete(), "it does not know");
    check_read(&puller, &blob, 0, 6 * EXTENT);
    let soon = Instant::now() + Duration::from_secs(60);
    assert_eq!(puller.promote(soon).unwrap(), Promotion::Incomplete);
    assert!(!puller.is_complete() && !puller.is_here(3 * 4096, 1) && puller.is_here(0, 8192));
    puller.fill(0..6 * 4096).unwrap();
    assert_eq!(puller.promote(soon).unwrap(), Promotion::Done);
    assert_eq!(blob.times(), [1, 1, 2, 2, 1, 1]);
    check_read(&reader, &blob, 0, 6 * EXTENT);
    check_read(&puller, &blob, 0, 6 * EXTENT);
}

#[test]
fn damage_that_another_process_finds_is_repaired_by_who_believed_in_the_extent() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(55, 6 * EXTENT, EXTENT);
    let puller = blob_in(&open(folder.path(), 4096), &blob);
    puller.fill(0..6 * 4096).unwrap();
    damage(folder.path(), &blob, 4096);
    let checked = maintenance(folder.path()).check(true).unwrap();
    assert_eq!(checked.extents_bad, [(blob.digest, 1)]);
    let soon = Instant::now() + Duration::from_secs(60);
    assert_eq!(puller.promote(soon).unwrap(), Promotion::Incomplete);
    puller.fill(0..6 * 4096).unwrap();
    assert_eq!(puller.promote(soon).unwrap(), Promotion::Done);
    check_read(&puller, &blob, 0, 6 * EXTENT);
    assert_eq!(blob.times(), [1, 2, 1, 1, 1, 1]);
}

#[test]
fn a_blob_that_another_process_evicted_or_removed_is_fetched_anew_by_a_pull() {
    for is_whole in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let blob = Blob::new(56, 6 * EXTENT, EXTENT);
        let soon = Instant::now() + Duration::from_secs(60);
        let maintenance = maintenance(folder.path());
        let puller = blob_in(&open(folder.path(), 4096), &blob);
        puller.fill(0..6 * 4096).unwrap();
        if is_whole {
            assert_eq!(puller.promote(soon).unwrap(), Promotion::Done);
            // It opens the plain file, which then has a name elsewhere, too.
            assert_eq!(puller.promote(soon).unwrap(), Promotion::Done);
            let commit = maintenance.commit_into(&blob.digest, dir.path()).unwrap();
            assert_eq!(commit, Commit::Made);
        }
        assert!(maintenance.remove(&blob.digest, true).unwrap());
        check_read(&puller, &blob, 0, 6 * EXTENT);
        assert_eq!(puller.promote(soon).unwrap(), Promotion::Incomplete, "{is_whole}");
        puller.fill(0..6 * 4096).unwrap();
        assert_eq!(puller.promote(soon).unwrap(), Promotion::Done, "{is_whole}");
        assert_eq!(std::fs::read(whole_path(folder.path(), &blob)).unwrap(), blob.bytes);
        assert_eq!(blob.times(), [2; 6], "{is_whole}");
    }
}

/// Whatever was under the name was taken for the blob, and what had just been checked was removed.
#[test]
fn what_was_checked_takes_the_place_of_what_is_under_its_name() {
    for by_reader in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let blob = Blob::new(59, 6 * EXTENT, EXTENT);
        let whole = whole_path(folder.path(), &blob);
        let puller = blob_in(&open(folder.path(), 4096), &blob);
        puller.fill(0..6 * 4096).unwrap();
        let soon = Instant::now() + Duration::from_secs(60);
        let promote = || match by_reader {
            true => puller.promote(soon),
            false => maintenance(folder.path()).promote(&blob.digest),
        };
        // A folder with something in it is in the way, and nothing is lost by it.
        std::fs::create_dir(&whole).unwrap();
        std::fs::write(whole.join("file"), b"somebody's").unwrap();
        let error = promote().unwrap_err();
        assert!(format!("{error:#}").contains("not empty"), "{error:#}");
        assert!(data_path(folder.path(), &blob).exists());
        std::fs::remove_file(whole.join("file")).unwrap();
        assert_eq!(promote().unwrap(), Promotion::Done);
        assert_eq!(std::fs::read(&whole).unwrap(), blob.bytes);
        // Once more, with a file of the right length.
        assert!(maintenance(folder.path()).remove(&blob.digest, true).unwrap());
        let other = blob_in(&open(folder.path(), 4096), &blob);
        other.fill(0..6 * 4096).unwrap();
        std::fs::write(&whole, vec![7; 6 * EXTENT]).unwrap();
        let done = if by_reader { other.promote(soon) } else { promote() };
        assert_eq!(done.unwrap(), Promotion::Done);
        assert_eq!(std::fs::read(&whole).unwrap(), blob.bytes);
        assert!(!data_path(folder.path(), &blob).exists());
        check_read(&other, &blob, 0, 6 * EXTENT);
        assert_eq!(blob.times(), [2; 6]);
    }
}

/// A registry with so many places for one blob, as `registry::Blob` has them, where whatever begins
/// in the second half of the blob hangs until the door is opened.
#[derive(Debug)]
struct Hanging {
    blob: Arc<Blob>,
    places: Mutex<usize>,
    bell: Condvar,
    is_open: AtomicBool,
}

impl Hanging {
    fn wait_until(&self, is_so: impl Fn(&mut usize) -> bool) {
        let mut places = self.places.lock().unwrap();
        while !is_so(&mut places) {
            places = self.bell.wait(places).unwrap();
        }
    }

    fn free_places(&self) -> usize {
        *self.places.lock().unwrap()
    }

    fn open_the_door(&self) {
        let _places = self.places.lock().unwrap();
        self.is_open.store(true, Ordering::Relaxed);
        self.bell.notify_all();
    }
}

/// Lets go of who hangs, also when a test fails: its threads are waited for.
struct AtTheDoor<'a>(&'a Hanging);

impl Drop for AtTheDoor<'_> {
    fn drop(&mut self) {
        self.0.open_the_door();
    }
}

impl Fetch for Hanging {
    fn name(&self) -> &str {
        self.blob.name()
    }

    fn bytes(&self) -> u64 {
        self.blob.bytes()
    }

    fn fetch(&self, offset_bytes: u64, dst: &mut [u8], deadline: Instant) -> Result<()> {
        let take = |places: &mut usize| {
            let rest = places.checked_sub(1);
            *places = rest.unwrap_or(*places);
            rest.is_some()
        };
        self.wait_until(take);
        if offset_bytes >= self.bytes() / 2 {
            self.wait_until(|_| self.is_open.load(Ordering::Relaxed));
        }
        let fetched = self.blob.fetch(offset_bytes, dst, deadline);
        *self.places.lock().unwrap() += 1;
        self.bell.notify_all();
        fetched
    }

    fn cancel(&self) {}
}

/// A replay, a download and the readahead of one blob could have all its requests under way, so
/// that a read of something else of it waited until one of them ended.
#[test]
fn a_read_goes_through_while_all_that_is_fetched_ahead_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(57, 128 * EXTENT, EXTENT);
    let hanging = Arc::new(Hanging {
        blob: Arc::clone(&blob),
        places: Mutex::new(BLOB_REQUESTS_AT_ONCE_MAX),
        bell: Condvar::new(),
        is_open: AtomicBool::new(false),
    });
    let cache = open(folder.path(), 4096);
    let cached = cache.blob(&blob.digest, Arc::clone(&hanging) as Arc<dyn Fetch>).unwrap();
    let canceled = cache.blob(&blob.digest, Arc::clone(&hanging) as Arc<dyn Fetch>).unwrap();
    std::thread::scope(|scope| {
        let at_the_door = AtTheDoor(&hanging);
        // So many that those of the background alone would take every place.
        let ahead = |number: u64| {
            let at = (64 + 2 * number) * 4096;
            let cached = &cached;
            scope.spawn(move || cached.fetch_ahead(at..at + 4096))
        };
        let fetching: Vec<_> = (0..20).map(ahead).collect();
        let left = BLOB_REQUESTS_AT_ONCE_MAX - CACHE_AHEAD_AT_ONCE_MAX;
        eventually("as many as may be", || hanging.free_places() == left);
        // Who waits for a place and goes away waits no more.
        let gone = scope.spawn(|| canceled.fetch_ahead(127 * 4096..128 * 4096));
        canceled.cancel();
        assert!(gone.join().unwrap().is_err());
        check_read(&cached, &blob, 0, 10 * EXTENT);
        check_read(&cached, &blob, 20 * EXTENT, EXTENT);
        assert_eq!(hanging.free_places(), left, "and no more than that were under way");
        drop(at_the_door);
        for fetched in fetching {
            fetched.join().unwrap().unwrap();
        }
    });
    check_read(&cached, &blob, 64 * EXTENT, 64 * EXTENT);
    assert_eq!(hanging.free_places(), BLOB_REQUESTS_AT_ONCE_MAX);
}

/// Keeps the memory that it was lent, or gives back less.
#[derive(Debug)]
struct Keeping {
    blob: Arc<Blob>,
    gives_back: usize,
}

impl Fetch for Keeping {
    fn name(&self) -> &str {
        self.blob.name()
    }

    fn bytes(&self) -> u64 {
        self.blob.bytes()
    }

    fn fetch(&self, offset_bytes: u64, dst: &mut [u8], deadline: Instant) -> Result<()> {
        self.blob.fetch(offset_bytes, dst, deadline)
    }

    fn fetch_lent(
        &self,
        _: (u64, bool),
        mut memory: Vec<u8>,
        _: usize,
        _: Instant,
    ) -> (Vec<u8>, Result<()>) {
        memory.truncate(self.gives_back);
        (memory, Ok(()))
    }

    fn cancel(&self) {}
}

#[test]
fn memory_that_was_lent_and_did_not_come_back_is_an_error_and_no_bytes() {
    let blob = Blob::new(58, 4 * EXTENT, EXTENT);
    for gives_back in [0, 1, EXTENT - 1, 2 * EXTENT - 1] {
        let folder = tempfile::tempdir().unwrap();
        let cache = open(folder.path(), 4096);
        let keeping = Arc::new(Keeping { blob: Arc::clone(&blob), gives_back });
        let cached = cache.blob(&blob.digest, keeping).unwrap();
        let error = cached.read(0, &mut vec![0; 2 * EXTENT]).unwrap_err();
        assert!(format!("{error:#}").contains("do not fit the memory lent"), "{error:#}");
        assert_eq!(cached.here_bytes(), 0);
        let whole = cache.blob(&blob.digest, Arc::clone(&blob) as Arc<dyn Fetch>).unwrap();
        check_read(&whole, &blob, 0, 4 * EXTENT);
    }
}

/// A disk that stores so many times and then no more.
#[derive(Debug)]
struct Tiring(AtomicUsize);

impl DiskFaults for Tiring {
    fn before(&self, step: DiskStep) -> io::Result<()> {
        let rest = |left: usize| left.checked_sub(1);
        let counter = Ordering::Relaxed;
        match step {
            DiskStep::WriteData if self.0.fetch_update(counter, counter, rest).is_err() => {
                Err(io::Error::from_raw_os_error(28))
            }
            _ => Ok(()),
        }
    }
}

/// A read takes what is fetched for it while it is at hand: of one flight, and only its own bytes.
#[test]
fn a_read_of_several_runs_gets_each_from_where_it_is() {
    let blob = Blob::new(59, 16 * EXTENT, EXTENT);
    let as_fetch = || Arc::clone(&blob) as Arc<dyn Fetch>;
    for stores in [usize::MAX, 2, 1, 0] {
        let folder = tempfile::tempdir().unwrap();
        let tiring: Arc<dyn DiskFaults> = Arc::new(Tiring(stores.into()));
        let settings =
            obd_ublk::cache::Settings { faults: Some(tiring), ..quiet(folder.path(), 4096) };
        let reading = Cache::open(settings).unwrap();
        let reading = reading.blob(&blob.digest, as_fetch()).unwrap();
        // Another process has some in the middle, which this one has not seen.
        let other = open(folder.path(), 4096);
        let other = other.blob(&blob.digest, as_fetch()).unwrap();
        check_read(&other, &blob, 3 * EXTENT, 2 * EXTENT);
        check_read(&other, &blob, 9 * EXTENT, EXTENT);
        let before = blob.times();
        check_read(&reading, &blob, EXTENT + 100, 11 * EXTENT + 7);
        let after = blob.times();
        let times = (0..16).map(|extent| after[extent] - before[extent]);
        let missing = (0..16).map(|extent| match extent {
            1 | 2 | 5..=8 | 10..=12 => 1,
            _ => 0,
        });
        // Where it cannot be kept, what is wanted is fetched again as a whole.
        assert!(stores < 3 || times.eq(missing), "{stores}: {after:?} after {before:?}");
        for (at, length) in
            [(0, 1), (EXTENT - 1, 2), (5 * EXTENT + 9, 4 * EXTENT), (0, 16 * EXTENT)]
        {
            check_read(&reading, &blob, at, length);
        }
    }
}
