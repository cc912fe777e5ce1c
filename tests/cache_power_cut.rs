//! Power cuts: whatever a disk kept of what was written, nothing torn and nothing unfilled is read.
//!
//! The cache syncs nothing on the way of a read, so at a cut every sector of its two files may be
//! as it was after any operation so far, torn between two of these, or garbage; a file may be of
//! any length that it had, or not be there. A chain of images is made: each is the rest of a
//! workload that ran on the one before. Every image is opened and read whole, and every byte must
//! be the blob's. `OBD_UBLK_CRASH_IMAGES` sets how many, `OBD_UBLK_CRASH_SEED` the first seed.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/seeds.rs"]
mod seeds;
#[path = "cache/source.rs"]
mod source;

use obd_ublk::cache::{BlobDigest, CachedBlob, Maintenance, Promotion};
use obd_ublk::source::{Fetch, RemoteBlob};
use seeds::{number, run_seeds};
use source::{Blob, Random, open, quiet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const EXTENT: usize = 4096;
const SECTOR: usize = 512;

/// Images where nobody says another number.
const IMAGES_DEFAULT: u64 = 12_000;

/// A file's content, or that there is none.
type Content = Option<Vec<u8>>;

/// The files of a blob: sidecar, data, and the plain file.
type Files = [Content; 3];

fn paths(folder: &Path, digest: &BlobDigest) -> [PathBuf; 3] {
    let partial = |end: &str| folder.join("partial").join(format!("{}.{end}", digest.hex()));
    [partial("map"), partial("data"), folder.join("whole").join(digest.hex())]
}

fn take(folder: &Path, digest: &BlobDigest) -> Files {
    paths(folder, digest).map(|path| std::fs::read(path).ok())
}

fn put(folder: &Path, digest: &BlobDigest, files: &Files) {
    for name in ["partial", "whole"] {
        std::fs::create_dir_all(folder.join(name)).unwrap();
    }
    for (path, content) in paths(folder, digest).iter().zip(files) {
        let _ = std::fs::remove_file(path);
        if let Some(content) = content {
            std::fs::write(path, content).unwrap();
        }
    }
}

/// What a cut leaves of a file that had these contents, one after the other.
fn cut(history: &[Content], random: &mut Random) -> Content {
    let versions: Vec<&Vec<u8>> = history.iter().flatten().collect();
    let newest = versions.last()?;
    if random.one_in(30) {
        return None;
    }
    let longest = versions.iter().map(|version| version.len()).max().unwrap_or(0);
    // Nearly all of the newest, any, or nearly all as it was at first.
    let taste = random.below(3);
    let mut left = vec![0; longest];
    for at in (0..longest).step_by(SECTOR) {
        let end = (at + SECTOR).min(longest);
        let mut pick = || match taste {
            0 if !random.one_in(10) => versions.len() - 1,
            2 if !random.one_in(10) => 0,
            _ => random.index(versions.len()),
        };
        let (one, other) = (versions[pick()], versions[pick()]);
        let torn = if random.one_in(8) { at + random.index(SECTOR) } else { end };
        for (byte, to) in (at..end).zip(&mut left[at..end]) {
            let from = if byte < torn { one } else { other };
            *to = from.get(byte).copied().unwrap_or(0);
        }
        if random.one_in(40) {
            left[at + random.index(end - at)..end].fill(random.next().to_le_bytes()[0]);
        }
    }
    match random.below(20) {
        0 => left.truncate(random.index(longest + 1)),
        1 => left.truncate(versions[random.index(versions.len())].len()),
        _ => left.truncate(newest.len()),
    }
    Some(left)
}

fn cached_in(folder: &Path, blob: &Arc<Blob>) -> CachedBlob {
    let cache = open(folder, 4096);
    cache.blob(&blob.digest, Arc::clone(blob) as Arc<dyn Fetch>).unwrap()
}

fn read(cached: &CachedBlob, blob: &Blob, at: usize, length: usize, told: &str) {
    let mut found = vec![0xcc; length];
    cached.read(u64::try_from(at).unwrap(), &mut found).unwrap();
    assert!(found == blob.bytes[at..at + length], "{told}: wrong bytes of {at}+{length}");
}

/// Opens an image and reads all of it, twice.
fn judge(folder: &Path, blob: &Arc<Blob>, files: &Files, random: &mut Random, told: &str) {
    put(folder, &blob.digest, files);
    let before = blob.fetched_extents();
    let cached = cached_in(folder, blob);
    for _ in 0..3 {
        let at = random.index(blob.bytes.len());
        read(&cached, blob, at, 1 + random.index(blob.bytes.len() - at), told);
    }
    read(&cached, blob, 0, blob.bytes.len(), told);
    let count = u64::try_from(blob.fetched.len()).unwrap();
    let fetched = blob.fetched_extents() - before;
    assert!(fetched <= count, "{told}: {fetched} of {count} extents fetched");
    drop(cached);
    let again = cached_in(folder, blob);
    read(&again, blob, 0, blob.bytes.len(), told);
    let stats = again.stats();
    assert_eq!((stats.fetches, stats.quarantined), (0, 0), "{told}: it is healed");
}

/// Runs a workload on an image and notes the files after each operation.
fn run(folder: &Path, blob: &Arc<Blob>, random: &mut Random, histories: &mut [Vec<Content>; 3]) {
    let mut cached = cached_in(folder, blob);
    for _ in 0..1 + random.below(6) {
        if random.one_in(6) {
            // A kill, and the next process.
            cached = cached_in(folder, blob);
        }
        let at = random.index(blob.bytes.len());
        let length = 1 + random.index((blob.bytes.len() - at).min(3 * EXTENT));
        read(&cached, blob, at, length, "in the workload");
        for (history, content) in histories.iter_mut().zip(take(folder, &blob.digest)) {
            history.push(content);
        }
    }
}

/// One chain of images; how many were judged.
fn chain(seed: u64) -> u64 {
    let mut random = Random(seed);
    let (folder, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let length = 1 + random.index(12 * EXTENT);
    let blob = Blob::new(random.next(), length, EXTENT);
    let mut files: Files = [None, None, None];
    let mut images = 0;
    for generation in 0..4 {
        put(folder.path(), &blob.digest, &files);
        let mut histories = files.clone().map(|content| vec![content]);
        run(folder.path(), &blob, &mut random, &mut histories);
        for cut_number in 0..6 {
            files = [0, 1, 2].map(|file| cut(&histories[file], &mut random));
            let told = format!("seed {seed}, generation {generation}, cut {cut_number}");
            judge(copy.path(), &blob, &files, &mut random, &told);
            images += 1;
        }
    }
    images
}

#[test]
fn nothing_torn_or_unfilled_is_read_after_a_power_cut() {
    run_seeds("power cuts", number("OBD_UBLK_CRASH_IMAGES", IMAGES_DEFAULT), chain);
}

#[test]
fn a_cut_around_promotion_leaves_the_plain_file_or_the_pair() {
    for seed in 0..200 {
        let mut random = Random(seed);
        let (folder, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let blob = Blob::new(seed, 1 + random.index(6 * EXTENT), EXTENT);
        cached_in(folder.path(), &blob).fill(0..blob.bytes()).unwrap();
        let pair = take(folder.path(), &blob.digest);
        let maintenance = Maintenance::open(&quiet(folder.path(), 4096)).unwrap();
        assert_eq!(maintenance.promote(&blob.digest).unwrap(), Promotion::Done);
        let [map, data, whole] = take(folder.path(), &blob.digest);
        assert!(map.is_none() && data.is_none());
        // The data was synced before it got the second name, which was durable before the first
        // names were removed: the sidecar alone may be torn.
        let torn = cut(&[None, pair[0].clone()], &mut random);
        let left = [
            [torn.clone(), pair[1].clone(), None],
            [torn.clone(), pair[1].clone(), whole.clone()],
            [torn, None, whole.clone()],
            [None, pair[1].clone(), whole.clone()],
            [None, None, whole],
        ];
        for (at, files) in left.iter().enumerate() {
            judge(copy.path(), &blob, files, &mut random, &format!("seed {seed}, case {at}"));
        }
    }
}
