//! Cold reads of a layer in a registry, over what a bare client needs for the same bytes.
//!
//!     cargo bench --bench pull [-- MEGABYTES [ROUNDS [sequential|library|late|limited|misses]]]
//!
//! The server is this program once more, pinned to one core: it has the blob in memory and answers
//! ranges. The bare client asks for 1 MiB at a time, on eight connections, compares a
//! CRC-32C with what it should be and writes a file. In the line `library` it does so by the HTTP
//! library that we use, which tells its part of the line before from ours. Ours is an image of that
//! blob, opened with an empty cache and read from its first to its last sector.

// A measurement stops at the first thing that is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/mod.rs"]
mod common;

use common::{image_like, layer_of};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use obd_ublk::cache::{BlobDigest, Cache, Settings};
use obd_ublk::disk::{Disk, Worker};
use obd_ublk::image::{Layer, Stack};
use obd_ublk::registry::{Digest, Options, Registry};
use obd_ublk::source::{RemoteBlob, Source};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// Connections of the bare client. Ours has up to twelve and what reads need, by itself.
const CONNECTIONS: usize = 8;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    let number = |at: usize, otherwise: usize| {
        arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(otherwise)
    };
    if arguments.first().is_some_and(|first| first == "serve") {
        serve(number(1, 256), number(2, 0), number(3, 0));
        return;
    }
    let megabytes = number(0, 256);
    let rounds = number(1, 7);
    println!("{megabytes} MiB, {rounds} alternating rounds, medians; the server has one core");
    let names = ["sequential", "library", "late", "limited", "misses"];
    let wanted = arguments.get(2).map(String::as_str);
    assert!(wanted.is_none_or(|wanted| names.contains(&wanted)), "expected one of {names:?}");
    let only = |name: &str| wanted.is_none_or(|wanted| wanted == name);
    if only("sequential") {
        sequential("cold sequential", ">= 0.85", megabytes, rounds, bare);
    }
    if only("library") {
        let name = "cold sequential, over the HTTP library";
        sequential(name, "none", megabytes, rounds, by_library);
    }
    if only("late") {
        late_first_bytes(megabytes, rounds.min(3));
    }
    if only("limited") {
        limited(megabytes, rounds.min(3));
    }
    if only("misses") {
        random_misses(megabytes, rounds);
    }
}

/// The blob: the same bytes in every process.
fn blob_of(megabytes: usize) -> Arc<[u8]> {
    layer_of(&image_like(megabytes * MIB, 11)).into()
}

/// A server in a process of its own.
struct Server {
    child: Child,
    address: String,
    blob: Arc<[u8]>,
    digest: String,
}

impl Server {
    fn start(megabytes: usize, delay_ms: usize, bytes_per_second: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["serve", &megabytes.to_string(), &delay_ms.to_string()])
            .arg(bytes_per_second.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut address).unwrap();
        let blob = blob_of(megabytes);
        let digest = Digest::of(&blob).to_string();
        Self { child, address: address.trim().to_owned(), blob, digest }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(megabytes: usize, delay_ms: usize, bytes_per_second: usize) {
    let mut core = nix::sched::CpuSet::new();
    core.set(0).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &core).unwrap();
    let blob = blob_of(megabytes);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("{}", listener.local_addr().unwrap());
    let free_at = Arc::new(Mutex::new(Instant::now()));
    for stream in listener.incoming() {
        let (blob, free_at) = (Arc::clone(&blob), Arc::clone(&free_at));
        std::thread::spawn(move || {
            let pace = |bytes: usize| {
                if bytes_per_second == 0 {
                    return;
                }
                let time = Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
                let mut free_at = free_at.lock().unwrap();
                *free_at = (*free_at).max(Instant::now()) + time;
                let until = *free_at;
                drop(free_at);
                std::thread::sleep(until.saturating_duration_since(Instant::now()));
            };
            let _ = answer(stream.unwrap(), &blob, Duration::from_millis(delay_ms as u64), pace);
        });
    }
}

/// Answers the requests of one connection.
fn answer(
    mut stream: TcpStream,
    blob: &[u8],
    delay: Duration,
    pace: impl Fn(usize),
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut range = 0..blob.len();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim().to_ascii_lowercase();
            if let Some(told) = line.strip_prefix("range: bytes=") {
                let (first, last) = told.split_once('-').unwrap();
                range = first.parse().unwrap()..last.parse::<usize>().unwrap() + 1;
            }
            if line.is_empty() {
                break;
            }
        }
        std::thread::sleep(delay);
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\n\
             Content-Range: bytes {}-{}/{}\r\n\r\n",
            range.len(),
            range.start,
            range.end - 1,
            blob.len()
        );
        stream.write_all(head.as_bytes())?;
        for piece in blob[range].chunks(64 << 10) {
            pace(piece.len());
            stream.write_all(piece)?;
        }
    }
}

/// What it takes to have ranges of the blob in order, by clients on a thread each, compared with
/// their checksums and written to a file: time and processor time. `get` fills a buffer.
fn pulled<C: Send>(
    server: &Server,
    clients: Vec<C>,
    ranges: &[Range<usize>],
    get: impl Fn(&mut C, &Range<usize>, &mut [u8]) + Sync,
) -> Cost {
    let folder = tempfile::tempdir().unwrap();
    let file = File::create(folder.path().join("blob")).unwrap();
    let next = AtomicUsize::new(0);
    let expected: Vec<u32> =
        ranges.iter().map(|range| crc32c::crc32c(&server.blob[range.clone()])).collect();
    let work = |mut client: C| {
        let mut buffer = vec![0; MIB];
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(range) = ranges.get(at) else { return };
            let buffer = &mut buffer[..range.len()];
            get(&mut client, range, buffer);
            assert_eq!(crc32c::crc32c(buffer), expected[at]);
            file.write_all_at(buffer, range.start as u64).unwrap();
        }
    };
    Cost::of(|| {
        std::thread::scope(|scope| {
            for client in clients {
                scope.spawn(|| work(client));
            }
        });
    })
}

/// By a bare client, whose connections are measured, too.
fn bare(server: &Server, connections: usize, ranges: &[Range<usize>]) -> Cost {
    let clients: Vec<Option<Client>> = (0..connections).map(|_| None).collect();
    pulled(server, clients, ranges, |client, range, buffer| {
        client.get_or_insert_with(|| Client::new(server)).get(range, buffer);
    })
}

/// By the HTTP library, with an executor and a client for each thread. What a process sets up once
/// is not measured here either.
fn by_library(server: &Server, connections: usize, ranges: &[Range<usize>]) -> Cost {
    let url = format!("http://{}/v2/a/blobs/x", server.address);
    let _ = rustls::crypto::ring::default_provider().install_default();
    let clients = (0..connections).map(|_| {
        let client = reqwest::Client::builder().http1_only().tcp_nodelay(true).no_proxy();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        (client.tls_certs_only([]).build().unwrap(), runtime.unwrap())
    });
    pulled(server, clients.collect(), ranges, |(client, runtime), range, buffer| {
        let wanted = format!("bytes={}-{}", range.start, range.end - 1);
        let mut done = 0;
        runtime.block_on(async {
            let request = client.get(&url).header(reqwest::header::RANGE, wanted);
            let mut response = request.send().await.unwrap();
            while let Some(piece) = response.chunk().await.unwrap() {
                buffer[done..done + piece.len()].copy_from_slice(&piece);
                done += piece.len();
            }
        });
        assert_eq!(done, buffer.len());
    })
}

struct Client {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Client {
    fn new(server: &Server) -> Self {
        let stream = TcpStream::connect(&server.address).unwrap();
        stream.set_nodelay(true).unwrap();
        let reader = BufReader::with_capacity(64 << 10, stream.try_clone().unwrap());
        Self { stream, reader }
    }

    fn get(&mut self, range: &Range<usize>, buffer: &mut [u8]) {
        let request = format!(
            "GET /v2/a/blobs/x HTTP/1.1\r\nHost: a\r\nRange: bytes={}-{}\r\n\r\n",
            range.start,
            range.end - 1
        );
        self.stream.write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            self.reader.read_line(&mut line).unwrap();
        }
        self.reader.read_exact(buffer).unwrap();
    }
}

/// Time by the clock and of this process's threads.
#[derive(Clone, Copy)]
struct Cost {
    wall: Duration,
    cpu: Duration,
}

impl Cost {
    fn of(work: impl FnOnce()) -> Self {
        let cpu = || {
            let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
            let micros =
                usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
            Duration::from_micros(micros.try_into().unwrap())
        };
        let (begun, before) = (Instant::now(), cpu());
        work();
        Self { wall: begun.elapsed(), cpu: cpu() - before }
    }
}

/// An image of the server's blob with an empty cache, and what `work` with its blob costs.
fn ours(server: &Server, work: impl FnOnce(&dyn Fn(u64, &mut [u8]), u64)) -> Cost {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { folder: folder.path().join("cache"), ..Settings::default() };
    // Once for a process and all its blobs: its trust in certificates takes milliseconds to read.
    let registry = Registry::new(Options::default()).unwrap();
    let mut kept = None;
    let cost = Cost::of(|| {
        let cache = Cache::open(settings).unwrap();
        let place = format!("http://{}/v2/a/blobs", server.address);
        let deadline = Instant::now() + Duration::from_secs(60);
        let bytes = server.blob.len() as u64;
        let blob = registry.blob(&place, &server.digest, Some(bytes), deadline).unwrap();
        let digest = BlobDigest::parse(&server.digest).unwrap();
        let blob = Arc::new(cache.blob(&digest, Arc::new(blob)).unwrap());
        let source = Source::Remote(Arc::clone(&blob) as Arc<dyn RemoteBlob>);
        let layer = Layer::open_sealed("layer".to_owned(), source).unwrap();
        let image = Stack::from_layers(vec![layer]).unwrap().into_image().unwrap();
        let worker = std::cell::RefCell::new(image.worker().unwrap());
        let read =
            |sector: u64, buffer: &mut [u8]| worker.borrow_mut().read(sector, buffer).unwrap();
        work(&read, image.virtual_bytes());
        kept = Some((cache, blob));
    });
    // The background takes the sum of a complete blob, which must not cost the bare client's time.
    if let Some((_cache, blob)) = kept.filter(|(_, blob)| blob.is_complete()) {
        let end = Instant::now() + Duration::from_secs(60);
        while blob.usage().whole_blobs == 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    cost
}

fn read_all(read: &dyn Fn(u64, &mut [u8]), bytes: u64) {
    let mut buffer = vec![0; MIB];
    for start in (0..bytes).step_by(MIB) {
        read(start / 512, &mut buffer);
    }
}

fn whole(blob: &[u8]) -> Vec<Range<usize>> {
    (0..blob.len()).step_by(MIB).map(|start| start..(start + MIB).min(blob.len())).collect()
}

fn median(mut numbers: Vec<f64>) -> (f64, f64, f64) {
    numbers.sort_by(f64::total_cmp);
    (numbers[numbers.len() / 2], numbers[0], numbers[numbers.len() - 1])
}

/// Prints the rates of both and the median of the paired ratios.
fn report(name: &str, goal: &str, pairs: &[(f64, f64)], unit: &str) {
    let (first, ..) = median(pairs.iter().map(|pair| pair.0).collect());
    let (second, ..) = median(pairs.iter().map(|pair| pair.1).collect());
    let (ratio, low, high) = median(pairs.iter().map(|pair| pair.0 / pair.1).collect());
    println!(
        "{name:<44} ours {first:>8.1} {unit:<6} bare {second:>8.1} {unit:<6} ratio {ratio:.2} \
         ({low:.2}..{high:.2})  goal {goal}"
    );
}

fn sequential(
    name: &str,
    goal: &str,
    megabytes: usize,
    rounds: usize,
    bare: impl Fn(&Server, usize, &[Range<usize>]) -> Cost,
) {
    let server = Server::start(megabytes, 0, 0);
    let ranges = whole(&server.blob);
    let mib = server.blob.len() as f64 / MIB as f64;
    let mut pairs = Vec::new();
    for _ in 0..rounds {
        let other = bare(&server, CONNECTIONS, &ranges);
        let own = ours(&server, read_all);
        pairs.push((mib / own.wall.as_secs_f64(), mib / other.wall.as_secs_f64()));
    }
    report(name, goal, &pairs, "MiB/s");
}

fn late_first_bytes(megabytes: usize, rounds: usize) {
    let server = Server::start(megabytes, 100, 0);
    let ranges = whole(&server.blob);
    let mib = server.blob.len() as f64 / MIB as f64;
    let mut pairs = Vec::new();
    for _ in 0..rounds {
        let other = bare(&server, 1, &ranges);
        let own = ours(&server, read_all);
        pairs.push((mib / own.wall.as_secs_f64(), mib / other.wall.as_secs_f64()));
    }
    report("100 ms to the first byte, over one stream", ">= 8", &pairs, "MiB/s");
}

fn limited(megabytes: usize, rounds: usize) {
    let server = Server::start(megabytes, 0, 100_000_000);
    let ranges = whole(&server.blob);
    let mut pairs = Vec::new();
    for _ in 0..rounds {
        let other = bare(&server, CONNECTIONS, &ranges);
        let own = ours(&server, read_all);
        pairs.push((own.wall.as_secs_f64(), other.wall.as_secs_f64()));
    }
    report("full read at 100 MB/s, time", "<= 1.05", &pairs, "s");
}

/// Reads of 4 KiB, each of which misses two extents of 128 KiB: 256 KiB as one request.
fn random_misses(megabytes: usize, rounds: usize) {
    const MISSES: usize = 400;
    const MISS: usize = 256 << 10;
    let server = Server::start(megabytes, 0, 0);
    // Every second 256 KiB, in an order that is nobody's stream.
    let count = server.blob.len() / MISS / 2;
    let places: Vec<usize> = (0..MISSES.min(count)).map(|n| n * 7919 % count * 2 * MISS).collect();
    let ranges: Vec<_> = places.iter().map(|place| *place..place + MISS).collect();
    let mut pairs = Vec::new();
    for _ in 0..rounds {
        let other = bare(&server, 1, &ranges);
        let own = ours(&server, |read, _| {
            let mut buffer = vec![0; MISS - 8192];
            for place in &places {
                // The disk's first byte is the blob's 4097th: inside these two extents.
                read(*place as u64 / 512, &mut buffer);
            }
        });
        let each = |cost: Cost| cost.cpu.as_secs_f64() * 1e6 / places.len() as f64;
        pairs.push((each(own), each(other)));
    }
    report("processor time of a cold miss of 256 KiB", "<= 2.2", &pairs, "us");
}
