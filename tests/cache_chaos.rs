//! Everything at once: processes that share one cache read blobs of a registry that fails or lies
//! in a fifth of its answers and whose tokens and redirects end, while processes are killed, the
//! cache is far too small, and what lies on the disk changes between two lives. Never a wrong byte,
//! never a read past its deadline, and a bounded number of requests.
//!
//! This program has no test harness: it starts itself again as `reader`.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tools/mock-registry/mod.rs"]
mod mock;
#[path = "common/random.rs"]
mod random;

use mock::answer::Bearer;
use mock::{Auth, Mock, Part, fault};
use obd_ublk::cache::{BlobDigest, Cache, Maintenance, Settings};
use obd_ublk::registry::{Digest, Options, Pace, Registry};
use obd_ublk::source::RemoteBlob;
use random::Random;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Requests of a run, unless this variable asks for more.
const REQUESTS: u64 = 100_000;
const VARIABLE: &str = "OBD_UBLK_CHAOS_REQUESTS";

const BLOBS: usize = 6;
const BLOB_BYTES: usize = 4 << 20;
const EXTENT: u64 = 4096;
/// Half of the blobs fit.
const QUOTA: u64 = 12 << 20;

const PROCESSES: usize = 8;
/// Of each process, most of which wait for an answer or a retry.
const THREADS: usize = 16;
/// Of each thread, before its process goes on with another blob.
const READS: usize = 60;
const FAULT_PERCENT: u64 = 20;
const DEADLINE: Duration = Duration::from_secs(20);
/// How late a read may be on a machine that has more to do than processors.
const LATE: Duration = Duration::from_secs(1);

/// What one process has done: written down after each read, because it may be killed after any.
#[derive(Debug, Default)]
struct Tally {
    counts: [AtomicU64; TALLIED.len()],
}

const TALLIED: [&str; 6] = ["reads", "wrong", "late", "failed", "quarantined", "hits"];

impl Tally {
    fn of(&self, name: &str) -> &AtomicU64 {
        &self.counts[TALLIED.iter().position(|it| *it == name).unwrap()]
    }

    fn get(&self, name: &str) -> u64 {
        self.of(name).load(Ordering::Relaxed)
    }

    fn add(&self, name: &str, more: u64) {
        self.of(name).fetch_add(more, Ordering::Relaxed);
    }

    fn write(&self, file: &File) {
        let each = self.counts.iter().flat_map(|it| it.load(Ordering::Relaxed).to_le_bytes());
        file.write_all_at(&each.collect::<Vec<u8>>(), 0).unwrap();
    }

    fn add_file(&self, path: &Path) {
        let bytes = std::fs::read(path).unwrap();
        for (count, bytes) in self.counts.iter().zip(bytes.as_chunks().0) {
            count.fetch_add(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
    }
}

fn content(blob: usize) -> Vec<u8> {
    let seed = u64::try_from(blob).unwrap() << 40;
    let words = (0..).flat_map(|number| fault::mix(seed, number).to_le_bytes());
    words.take(BLOB_BYTES).collect()
}

fn settings(folder: &Path) -> Settings {
    Settings {
        folder: folder.join("cache"),
        quota_bytes: QUOTA,
        extent_bytes: EXTENT,
        deadline: DEADLINE,
        tick: Duration::from_millis(200),
        ..Settings::default()
    }
}

/// The other processes: `reader FOLDER PLACE SEED`. Reads until it is killed, or has read enough.
fn reader(arguments: &[String]) {
    let [folder, place, seed] = arguments else { panic!("arguments") };
    let folder = Path::new(folder);
    let seed: u64 = seed.parse().unwrap();
    let file = File::create(folder.join("tallies").join(std::process::id().to_string())).unwrap();
    let tally = Tally::default();
    tally.write(&file);
    let digests = std::fs::read_to_string(folder.join("digests")).unwrap();
    let digests: Vec<&str> = digests.lines().collect();
    let cache = Cache::open(settings(folder)).unwrap();
    let pace = Pace { head: Duration::from_secs(5), ..Pace::default() };
    let registry = Registry::new(Options { pace, ..Options::default() }).unwrap();
    let mut random = Random(seed | 1);
    for _ in 0..40 {
        let number = random.index(BLOBS);
        let bytes = u64::try_from(BLOB_BYTES).ok();
        let blob = registry.blob(place, digests[number], bytes, Instant::now()).unwrap();
        let digest = BlobDigest::parse(digests[number]).unwrap();
        let cached = cache.blob(&digest, Arc::new(blob)).unwrap();
        let truth = File::open(folder.join(format!("truth{number}"))).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                let (cached, truth, tally, file) = (&cached, &truth, &tally, &file);
                let mut random = Random(random.next() | 1);
                scope.spawn(move || {
                    for _ in 0..READS {
                        let at = random.index(BLOB_BYTES - 1);
                        let length = 1 + random.index(20_000.min(BLOB_BYTES - at));
                        let mut expected = vec![0; length];
                        truth.read_exact_at(&mut expected, u64::try_from(at).unwrap()).unwrap();
                        read_one(cached, at, &expected, tally);
                        tally.write(file);
                    }
                });
            }
        });
        let stats = cached.stats();
        tally.add("quarantined", stats.quarantined);
        tally.add("hits", stats.hits);
        tally.write(&file);
    }
}

fn read_one(cached: &dyn RemoteBlob, at: usize, truth: &[u8], tally: &Tally) {
    let mut found = vec![0; truth.len()];
    let began = Instant::now();
    let read = cached.read(u64::try_from(at).unwrap(), &mut found);
    tally.add("reads", 1);
    tally.add("late", u64::from(began.elapsed() > DEADLINE + LATE));
    tally.add("failed", u64::from(read.is_err()));
    tally.add("wrong", u64::from(read.is_ok() && found != truth));
}

/// A process that reads; killed when it is dropped.
struct Reader(Child);

impl Reader {
    fn start(folder: &Path, place: &str, seed: u64) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .arg("reader")
            .arg(folder)
            .args([place, &seed.to_string()])
            // Those of the machine take longer to read than it lives, and there is no TLS here.
            .env("SSL_CERT_FILE", folder.join("authority.pem"))
            .env_remove("SSL_CERT_DIR")
            .stdout(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }

    /// Whether it has read enough. One that failed fails the test.
    fn has_ended(&mut self) -> bool {
        let ended = self.0.try_wait().unwrap();
        assert!(ended.is_none_or(|status| status.success()), "a reader: {ended:?}");
        ended.is_some()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct World {
    folder: tempfile::TempDir,
    front: Mock,
    store: Mock,
    random: Random,
    readers: Vec<Reader>,
    started: usize,
    kills: usize,
    requests: u64,
    tokens: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (front, store) = (Mock::start(), Mock::start());
        let mut digests = String::new();
        for blob in 0..BLOBS {
            let content: Arc<[u8]> = content(blob).into();
            let digest = Digest::of(&content).to_string();
            digests += &format!("{digest}\n");
            std::fs::write(folder.path().join(format!("truth{blob}")), &content).unwrap();
            front.state().content.blobs.insert(digest.clone(), Arc::clone(&content));
            store.state().content.blobs.insert(digest, content);
        }
        std::fs::write(folder.path().join("digests"), digests).unwrap();
        std::fs::create_dir(folder.path().join("tallies")).unwrap();
        let authority = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        std::fs::write(folder.path().join("authority.pem"), authority.cert.pem()).unwrap();
        let realm = format!("{}/token", front.url());
        let bearer = Bearer { good_ms: 700, told_seconds: Some(1), ..Bearer::at(&realm) };
        front.state().auth = Auth::Bearer(bearer);
        front.state().redirect = Some((store.url(), 500));
        front.chaos(FAULT_PERCENT, seed);
        store.chaos(FAULT_PERCENT, seed ^ 1);
        let (readers, random) = (Vec::new(), Random(seed | 1));
        let (started, kills, requests, tokens) = (0, 0, 0, 0);
        Self { folder, front, store, random, readers, started, kills, requests, tokens }
    }

    fn start_one(&mut self) {
        let place = self.front.blobs_of("a/b");
        self.readers.push(Reader::start(self.folder.path(), &place, self.random.next()));
        self.started += 1;
    }

    fn count(&mut self) {
        for mock in [&self.front, &self.store] {
            let tokens = mock.count(Part::Token);
            let all = mock.state().log.len();
            mock.clear();
            self.requests += u64::try_from(all).unwrap();
            self.tokens += u64::try_from(tokens).unwrap();
        }
    }

    /// Some processes come and go, the last ones all at once: what they were at stays as it is.
    fn live(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            while self.readers.len() < PROCESSES {
                self.start_one();
            }
            std::thread::sleep(Duration::from_millis(200 + self.random.below(1000)));
            self.readers.retain_mut(|reader| !reader.has_ended());
            if !self.readers.is_empty() && self.random.below(2) == 0 {
                let victim = self.random.index(self.readers.len());
                drop(self.readers.swap_remove(victim));
                self.kills += 1;
            }
        }
        self.kills += self.readers.len();
        self.readers.clear();
        self.count();
    }

    /// Changes what lies on the disk, as long as no process has it open that looked at it before.
    fn corrupt(&mut self) -> usize {
        let partial = self.folder.path().join("cache/partial");
        let entries = std::fs::read_dir(partial).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let mut changed = 0;
        for path in paths {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let bytes = file.metadata().unwrap().len();
            if bytes == 0 || self.random.below(2) == 0 {
                continue;
            }
            changed += 1;
            if self.random.below(8) == 0 {
                file.set_len(self.random.below(bytes)).unwrap();
                continue;
            }
            // In many extents of a data file; a sidecar has a few KiB.
            for _ in 0..(bytes / 8192).max(20) {
                let (at, mut byte) = (self.random.below(bytes), [0]);
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            }
        }
        changed
    }

    fn tally(&self) -> Tally {
        let sum = Tally::default();
        for entry in std::fs::read_dir(self.folder.path().join("tallies")).unwrap() {
            sum.add_file(&entry.unwrap().path());
        }
        sum
    }
}

fn everything_at_once_gives_right_bytes_or_a_clear_error_in_time() {
    let wanted = std::env::var(VARIABLE).map_or(REQUESTS, |text| text.parse().unwrap());
    let seed = std::env::var("OBD_UBLK_CHAOS_SEED").map_or(1, |text| text.parse().unwrap());
    let mut world = World::new(seed);
    let maintenance = Maintenance::open(&settings(world.folder.path())).unwrap();
    let begun = Instant::now();
    let (mut corrupted, mut evicted_bytes) = (0, 0);
    for life in 0.. {
        // Enough lives for everything to have happened, on a fast machine too.
        if world.requests >= wanted && life >= 4 {
            break;
        }
        world.live(Duration::from_secs(6));
        if life % 2 == 0 {
            let trimmed = maintenance.collect(Some(QUOTA / 2)).unwrap();
            evicted_bytes += trimmed.removed_bytes;
        }
        corrupted += world.corrupt();
    }
    let sum = world.tally();
    let World { started, kills, requests, tokens, .. } = &world;
    let (started, kills, requests, tokens) = (*started, *kills, *requests, *tokens);
    let seconds = begun.elapsed().as_secs() + 1;
    println!(
        "{requests} requests, {tokens} tokens, {started} processes, {kills} kills, {corrupted} \
         files changed, {evicted_bytes} bytes evicted from outside, {seconds} s; {sum:?}"
    );
    assert_eq!(sum.get("wrong"), 0, "wrong bytes");
    assert_eq!(sum.get("late"), 0, "reads past their deadline");
    // What lies four times is given up: one fetch in some thousands, with all who joined it.
    let (reads, failed) = (sum.get("reads"), sum.get("failed"));
    assert!(failed * 300 <= reads + 3000, "{failed} of {reads} reads failed");
    // It was what it is said to be.
    assert!(corrupted > 0 && kills > 10 && evicted_bytes > 0 && sum.get("hits") > 0);
    assert!(sum.get("quarantined") > 0, "nothing of what was changed was found");
    // Each read has one fetch at most for each run that is missing of its extents, and each fetch
    // its share of retries, refused tokens and resolved redirects.
    assert!(requests <= 2 * reads, "{requests} requests for {reads} reads");
    let processes = u64::try_from(PROCESSES).unwrap();
    let most = 8 * seconds * processes + 4 * u64::try_from(started).unwrap();
    assert!(tokens <= most, "{tokens} tokens in {seconds} s, at most {most}");
    // What is left heals, and is right.
    maintenance.check(true).unwrap();
    assert!(maintenance.check(false).unwrap().is_clean());
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "reader") {
        return reader(&arguments[1..]);
    }
    let begun = Instant::now();
    // A panic ends the program, and with it this test, as a failure.
    everything_at_once_gives_right_bytes_or_a_clear_error_in_time();
    let seconds = begun.elapsed().as_secs_f64();
    let name = "everything_at_once_gives_right_bytes_or_a_clear_error_in_time";
    println!("test {name} ... ok ({seconds:.1} s)");
    println!("1 passed, 0 failed");
}
