//! Processes that share one cache: each extent is fetched once by all of them together, also when
//! one is killed or stopped in the middle of a fetch, and nobody ever reads a wrong byte.
//!
//! This program has no test harness: it starts itself again as `reader`, each with its own cache on
//! the same folder. What they fetch is a file, and every fetch writes a line to a log when it
//! begins and one when it has ended.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "cache/source.rs"]
mod source;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use obd_ublk::cache::{BlobDigest, Cache, Maintenance, Settings};
use obd_ublk::error::Result;
use obd_ublk::source::{Fetch, RemoteBlob};
use source::{Random, bytes_of, digest_of, eventually};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const EXTENT: usize = 128 << 10;
const EXTENTS: usize = 48;
const BLOB_BYTES: usize = EXTENTS * EXTENT - 777;

/// A blob in a file, whose fetches are logged.
#[derive(Debug)]
struct LoggedFile {
    truth: File,
    log: File,
    delay: Duration,
}

impl LoggedFile {
    /// One line, whole, whatever others write: the file is open for appending.
    fn tell(&self, what: char, at: u64, length: usize) {
        let line = format!("{what} {at} {length} {}\n", std::process::id());
        (&self.log).write_all(line.as_bytes()).unwrap();
    }
}

impl Fetch for LoggedFile {
    fn name(&self) -> &str {
        "a file"
    }

    fn bytes(&self) -> u64 {
        self.truth.metadata().unwrap().len()
    }

    fn fetch(&self, offset_bytes: u64, dst: &mut [u8], _deadline: Instant) -> Result<()> {
        self.tell('b', offset_bytes, dst.len());
        std::thread::sleep(self.delay);
        self.truth.read_exact_at(dst, offset_bytes).unwrap();
        self.tell('e', offset_bytes, dst.len());
        Ok(())
    }

    fn cancel(&self) {}
}

/// The other processes: `reader FOLDER DIGEST SEED DELAY_MS DEADLINE_MS`.
fn reader(arguments: &[String]) {
    let [folder, digest, seed, delay_ms, deadline_ms] = arguments else { panic!("arguments") };
    let folder = Path::new(folder);
    let number = |text: &str| text.parse::<u64>().unwrap();
    let open = |name: &str| File::open(folder.join(name)).unwrap();
    let log = File::options().append(true).create(true).open(folder.join("log")).unwrap();
    let delay = Duration::from_millis(number(delay_ms));
    let fetch = Arc::new(LoggedFile { truth: open("truth"), log, delay });
    let truth = std::fs::read(folder.join("truth")).unwrap();
    let settings = Settings {
        folder: folder.join("cache"),
        deadline: Duration::from_millis(number(deadline_ms)),
        ..Settings::default()
    };
    let cache = Cache::open(settings).unwrap();
    let cached = cache.blob(&BlobDigest::parse(digest).unwrap(), fetch).unwrap();
    let mut random = Random(number(seed));
    let mut buffer = vec![0; 600 << 10];
    let mut check = |at: usize, length: usize| {
        let found = &mut buffer[..length];
        cached.read(u64::try_from(at).unwrap(), found).unwrap();
        assert!(found == &truth[at..at + length], "wrong bytes at {at}");
    };
    for _ in 0..40 {
        let at = random.index(truth.len() - 1);
        check(at, 1 + random.index((truth.len() - at).min(600 << 10)));
    }
    for at in (0..truth.len()).step_by(EXTENT / 2) {
        check(at, (truth.len() - at).min(EXTENT / 2));
    }
    let stats = cached.stats();
    assert_eq!(stats.quarantined, 0, "no kill leaves a bad extent");
    println!("{}", stats.waited_in_vain);
}

/// One shared folder.
struct World {
    folder: tempfile::TempDir,
    digest: BlobDigest,
}

/// A reader of it.
struct Reader(Child);

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Reader {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), signal).unwrap();
    }

    /// How often it waited in vain, once it has read everything.
    fn join(mut self) -> u64 {
        let mut told = String::new();
        std::io::Read::read_to_string(self.0.stdout.as_mut().unwrap(), &mut told).unwrap();
        assert!(self.0.wait().unwrap().success(), "a reader failed");
        told.trim().parse().unwrap()
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let truth = bytes_of(seed, BLOB_BYTES);
        std::fs::write(folder.path().join("truth"), &truth).unwrap();
        std::fs::write(folder.path().join("log"), b"").unwrap();
        Self { folder, digest: digest_of(&truth) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, seed: usize, delay_ms: u64, deadline_ms: u64) -> Reader {
        let child = Command::new(std::env::current_exe().unwrap())
            .arg("reader")
            .arg(self.folder.path())
            .arg(self.digest.to_string())
            .args([seed.to_string(), delay_ms.to_string(), deadline_ms.to_string()])
            .stdout(Stdio::piped())
            .spawn();
        Reader(child.unwrap())
    }

    /// How often each extent was fetched to the end, and how many fetches began.
    fn fetched(&self) -> (Vec<u64>, usize) {
        let log = std::fs::read_to_string(self.path("log")).unwrap();
        let mut times = vec![0; EXTENTS];
        let mut begun = 0;
        for line in log.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let (at, length): (usize, usize) =
                (words[1].parse().unwrap(), words[2].parse().unwrap());
            if words[0] == "b" {
                begun += 1;
                continue;
            }
            let touched = at / EXTENT..(at + length).div_ceil(EXTENT);
            times[touched].iter_mut().for_each(|times| *times += 1);
        }
        (times, begun)
    }

    fn check_folder(&self) {
        let settings = Settings { folder: self.path("cache"), ..Settings::default() };
        let checked = Maintenance::open(&settings).unwrap().check(false).unwrap();
        assert!(checked.is_clean(), "{checked:?}");
    }
}

const MINUTE_MS: u64 = 60_000;

fn processes_on_one_cold_blob_download_each_extent_once() {
    for count in [2, 8, 50] {
        let world = World::new(1);
        let readers: Vec<_> = (0..count).map(|seed| world.start(seed, 3, MINUTE_MS)).collect();
        let in_vain: u64 = readers.into_iter().map(Reader::join).sum();
        assert_eq!(world.fetched().0, vec![1; EXTENTS], "{count} processes");
        assert_eq!(in_vain, 0);
        world.check_folder();
    }
}

fn a_process_killed_in_mid_fetch_frees_its_claim_and_no_extent_is_fetched_twice() {
    let world = World::new(2);
    let victim = world.start(0, 3_600_000, MINUTE_MS);
    eventually("the victim fetches", || world.fetched().1 > 0);
    let others: Vec<_> = (1..8).map(|seed| world.start(seed, 1, MINUTE_MS)).collect();
    eventually("the others have what they can get", || world.fetched().0.iter().sum::<u64>() > 10);
    std::thread::sleep(Duration::from_millis(300));
    victim.signal(Signal::SIGKILL);
    let killed = Instant::now();
    let in_vain: u64 = others.into_iter().map(Reader::join).sum();
    assert!(killed.elapsed() < Duration::from_secs(25), "nobody waited for its patience to end");
    assert_eq!(world.fetched().0, vec![1; EXTENTS]);
    assert_eq!(in_vain, 0);
    world.check_folder();
}

fn nobody_waits_for_ever_for_a_process_that_is_stopped_in_mid_fetch() {
    let world = World::new(3);
    let victim = world.start(0, 3_600_000, MINUTE_MS);
    eventually("the victim fetches", || world.fetched().1 > 0);
    victim.signal(Signal::SIGSTOP);
    let others: Vec<_> = (1..4).map(|seed| world.start(seed, 1, 4000)).collect();
    let in_vain: u64 = others.into_iter().map(Reader::join).sum();
    assert!(in_vain > 0, "they fetched for themselves what it holds");
    victim.signal(Signal::SIGKILL);
    drop(victim);
    world.start(9, 1, MINUTE_MS).join();
    world.check_folder();
}

fn kills_at_random_moments_leave_nothing_bad() {
    let kills = std::env::var("OBD_UBLK_CACHE_KILLS").map_or(40, |text| text.parse().unwrap());
    let mut random = Random(4);
    let mut done = 0;
    while done < kills {
        let world = World::new(random.next());
        let mut readers: Vec<_> = (0..4).map(|seed| world.start(seed, 2, MINUTE_MS)).collect();
        for _ in 0..8 {
            std::thread::sleep(Duration::from_millis(random.below(60)));
            let victim = readers.swap_remove(random.index(readers.len()));
            // It may have ended by itself already.
            victim.signal(Signal::SIGKILL);
            drop(victim);
            done += 1;
            let delay_ms = random.below(4);
            readers.push(world.start(random.index(1000), delay_ms, MINUTE_MS));
        }
        for reader in readers {
            reader.join();
        }
        world.check_folder();
        let (times, _) = world.fetched();
        assert!(times.iter().all(|times| *times >= 1));
        // A victim's fetch may have ended and not been stored: a request for each of its threads.
        let twice: u64 = times.iter().map(|times| times - 1).sum();
        assert!(twice <= 8 * 9 * 8, "{twice} extents fetched again after 8 kills");
    }
    println!("{done} kills");
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "reader") {
        return reader(&arguments[1..]);
    }
    let tests: [(&str, fn()); 4] = [
        (
            "processes_on_one_cold_blob_download_each_extent_once",
            processes_on_one_cold_blob_download_each_extent_once,
        ),
        (
            "a_process_killed_in_mid_fetch_frees_its_claim_and_no_extent_is_fetched_twice",
            a_process_killed_in_mid_fetch_frees_its_claim_and_no_extent_is_fetched_twice,
        ),
        (
            "nobody_waits_for_ever_for_a_process_that_is_stopped_in_mid_fetch",
            nobody_waits_for_ever_for_a_process_that_is_stopped_in_mid_fetch,
        ),
        ("kills_at_random_moments_leave_nothing_bad", kills_at_random_moments_leave_nothing_bad),
    ];
    for (name, test) in tests {
        let begun = Instant::now();
        // A panic ends the program, and with it this test, as a failure.
        test();
        println!("test {name} ... ok ({:.1} s)", begun.elapsed().as_secs_f64());
    }
    println!("{} passed, 0 failed", tests.len());
}
