//! The cache against the bytes of its blobs: random reads, kills, evictions, damage at rest, full
//! and broken disks, a registry that fails, in one thread step by step and in many at once.
//!
//! `OBD_UBLK_CACHE_OPS` sets how many operations, `OBD_UBLK_CACHE_SEED` the seed. With
//! `OBD_UBLK_CACHE_DISK_IS_BAD` the folder of temporary files may be too small or fail by itself.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "cache/source.rs"]
mod source;

use obd_ublk::cache::{Cache, CachedBlob, DiskStep, Maintenance, Settings};
use obd_ublk::error::ErrorKind;
use obd_ublk::source::{Fetch, RemoteBlob};
use source::{BadDisk, Blob, Random, quiet};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const EXTENT: usize = 4096;
const PROCESSES: usize = 3;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

const STEPS: [DiskStep; 7] = [
    DiskStep::Open,
    DiskStep::ReadRecords,
    DiskStep::ReadData,
    DiskStep::WriteData,
    DiskStep::WriteRecords,
    DiskStep::Sync,
    DiskStep::Link,
];

fn random_faults(random: &mut Random) -> Vec<(DiskStep, i32)> {
    let errno = [libc::EIO, libc::ENOSPC, libc::EROFS][random.index(3)];
    (0..random.index(4)).map(|_| (STEPS[random.index(STEPS.len())], errno)).collect()
}

/// Some processes, of which a process is a cache of its own, and what they share.
struct World {
    folder: tempfile::TempDir,
    blobs: Vec<Arc<Blob>>,
    disk: Arc<BadDisk>,
    processes: Vec<Vec<CachedBlob>>,
}

impl World {
    fn new(random: &mut Random) -> Self {
        let blobs = (0..3).map(|_| {
            let length = 1 + random.index(40 * EXTENT);
            Blob::new(random.next(), length, EXTENT)
        });
        let mut world = Self {
            folder: tempfile::tempdir().unwrap(),
            blobs: blobs.collect(),
            disk: Arc::default(),
            processes: Vec::new(),
        };
        world.processes = (0..PROCESSES).map(|_| world.process()).collect();
        world
    }

    fn settings(&self) -> Settings {
        Settings { faults: Some(Arc::clone(&self.disk) as _), ..quiet(self.folder.path(), 4096) }
    }

    fn process(&self) -> Vec<CachedBlob> {
        let cache = Cache::open(self.settings()).unwrap();
        let open = |blob: &Arc<Blob>| {
            cache.blob(&blob.digest, Arc::clone(blob) as Arc<dyn Fetch>).unwrap()
        };
        self.blobs.iter().map(open).collect()
    }

    /// Changes bytes of a random file, as a disk does that nobody looks at.
    fn damage(&self, random: &mut Random) {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(self.folder.path().join("partial")).unwrap() {
            paths.push(entry.unwrap().path());
        }
        paths.sort();
        if paths.is_empty() {
            return;
        }
        damage_file(&paths[random.index(paths.len())], random);
    }

    /// One random operation.
    fn step(&mut self, random: &mut Random, is_faulty: &mut bool, told: &str) {
        match random.below(100) {
            0..80 => self.read(random, *is_faulty, told),
            80..86 => {
                // A kill, and the next process.
                let victim = random.index(PROCESSES);
                self.processes[victim] = self.process();
            }
            86..89 => {
                let digest = self.blobs[random.index(self.blobs.len())].digest;
                self.maintenance().remove(&digest, true).unwrap();
            }
            89..91 => drop(self.maintenance().collect(Some(random.below(200_000))).unwrap()),
            91..93 => {
                let digest = self.blobs[random.index(self.blobs.len())].digest;
                // Whatever it finds: missing, busy, a disk that fails.
                let _ = self.maintenance().promote(&digest);
            }
            93..95 => drop(self.maintenance().check(random.one_in(2)).unwrap()),
            95..97 => {
                let faults = random_faults(random);
                *is_faulty = !faults.is_empty();
                self.disk.set(&faults);
            }
            _ => {
                // The power goes, the disk rots, all begin anew.
                self.processes.clear();
                for _ in 0..random.below(4) {
                    self.damage(random);
                }
                self.processes = (0..PROCESSES).map(|_| self.process()).collect();
            }
        }
    }

    fn maintenance(&self) -> Maintenance {
        // Its own disk does not fail: what people run by hand may.
        Maintenance::open(&quiet(self.folder.path(), 4096)).unwrap()
    }

    fn read(&self, random: &mut Random, is_faulty: bool, told: &str) {
        let which = random.index(self.blobs.len());
        let (blob, cached) = (&self.blobs[which], &self.processes[random.index(PROCESSES)][which]);
        let at = random.index(blob.bytes.len());
        let length = 1 + random.index((blob.bytes.len() - at).min(6 * EXTENT));
        let (at_byte, count) = (u64::try_from(at).unwrap(), u64::try_from(length).unwrap());
        let was_here = cached.is_here(at_byte, count);
        let failure = random.one_in(20).then_some(ErrorKind::Timeout);
        blob.fail(failure);
        let before = blob.fetched_extents();
        let mut found = vec![0xcc; length];
        let answer = cached.read(at_byte, &mut found);
        blob.fail(None);
        let fetched = blob.fetched_extents() - before;
        if let Err(error) = answer {
            assert_eq!(Some(error.kind()), failure, "{told}: {error:#}");
            assert!(!was_here || is_faulty, "{told}: a hit needs no registry");
            return;
        }
        assert!(found == blob.bytes[at..at + length], "{told}: wrong bytes of {at}+{length}");
        let touched = (at + length).div_ceil(EXTENT) - at / EXTENT;
        let touched = u64::try_from(touched).unwrap();
        // A fill that cannot be kept may be fetched with its neighbours once more.
        let is_bad = is_faulty || std::env::var_os("OBD_UBLK_CACHE_DISK_IS_BAD").is_some();
        let most = if is_bad { 2 * touched } else { touched };
        assert!(fetched <= most, "{told}: {fetched} extents fetched for {touched}");
        assert!(!was_here || fetched == 0, "{told}: fetched what was here");
    }
}

fn damage_file(path: &Path, random: &mut Random) {
    let file = std::fs::File::options().write(true).read(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    if length == 0 {
        return;
    }
    let at = random.below(length);
    match random.below(8) {
        0 => file.set_len(at).unwrap(),
        1 => file.set_len(length + at).unwrap(),
        // Into a hole of a full disk: no damage done.
        2 => drop(file.write_all_at(&[0; EXTENT], at)),
        _ => {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            byte[0] ^= 1 << random.below(8);
            drop(file.write_all_at(&byte, at));
        }
    }
}

#[test]
fn no_read_is_ever_wrong_whatever_happens_to_processes_disk_and_registry() {
    let ops = number("OBD_UBLK_CACHE_OPS", 30_000);
    let first = number("OBD_UBLK_CACHE_SEED", 1);
    let mut done = 0;
    let mut seed = first;
    while done < ops {
        let mut random = Random(seed);
        let mut world = World::new(&mut random);
        let mut is_faulty = false;
        for op in 0..500 {
            world.step(&mut random, &mut is_faulty, &format!("seed {seed}, operation {op}"));
        }
        done += 500;
        seed += 1;
    }
    println!("{done} operations, seeds {first}..{seed}, every byte right");
}

#[test]
fn no_read_is_wrong_while_everything_happens_at_once() {
    let mut random = Random(number("OBD_UBLK_CACHE_SEED", 1));
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(BadDisk::default());
    let settings = Settings {
        quota_bytes: 3 << 20,
        threads: 4,
        tick: Duration::from_millis(5),
        faults: Some(Arc::clone(&disk) as _),
        ..quiet(folder.path(), 4096)
    };
    let blobs: Vec<_> = (0..6)
        .map(|_| {
            let length = (1 << 19) + random.index(1 << 19);
            Blob::new(random.next(), length, EXTENT)
        })
        .collect();
    let is_over = AtomicBool::new(false);
    let reads_each = number("OBD_UBLK_CACHE_OPS", 30_000) / 15;
    std::thread::scope(|scope| {
        let (settings, blobs, is_over, disk) = (&settings, &blobs, &is_over, &disk);
        let readers: Vec<_> = (0..6_u64)
            .map(|thread| scope.spawn(move || reader(settings, blobs, thread, reads_each)))
            .collect();
        scope.spawn(move || {
            let mut random = Random(77);
            let maintenance = Maintenance::open(&quiet(&settings.folder, 4096)).unwrap();
            while !is_over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(random.below(10)));
                let digest = blobs[random.index(blobs.len())].digest;
                match random.below(6) {
                    0 => disk.set(&random_faults(&mut random)),
                    1 => drop(maintenance.remove(&digest, true)),
                    2 => drop(maintenance.collect(Some(random.below(3 << 20)))),
                    3 => drop(maintenance.check(true)),
                    4 => drop(maintenance.promote(&digest)),
                    _ => disk.set(&[]),
                }
            }
        });
        for reader in readers {
            // Noted before it is told: the others must end too.
            let ended = reader.join();
            if ended.is_err() {
                is_over.store(true, Ordering::Relaxed);
            }
            ended.unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
    });
}

/// A process that reads in sequence and at random, and begins anew now and then.
fn reader(settings: &Settings, blobs: &[Arc<Blob>], seed: u64, reads: u64) {
    let mut random = Random(seed);
    let mut cache = Cache::open(settings.clone()).unwrap();
    let mut position = 0;
    for _ in 0..reads {
        if random.one_in(200) {
            cache = Cache::open(settings.clone()).unwrap();
        }
        let blob = &blobs[random.index(blobs.len())];
        let cached = cache.blob(&blob.digest, Arc::clone(blob) as Arc<dyn Fetch>).unwrap();
        for _ in 0..1 + random.below(8) {
            let length = 1 + random.index(5 * EXTENT);
            if random.one_in(3) {
                position = random.index(blob.bytes.len());
            }
            let at = position % blob.bytes.len();
            let length = length.min(blob.bytes.len() - at);
            position = at + length;
            let mut found = vec![0xcc; length];
            cached.read(u64::try_from(at).unwrap(), &mut found).unwrap();
            assert!(found == blob.bytes[at..at + length], "wrong bytes of {at}+{length}");
        }
    }
}
