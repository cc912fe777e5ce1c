//! `obd-ublk-null`: serves a disk that needs no image, to test and measure the front end alone.
//!
//! Every 8 bytes of the disk hold their own index as a little-endian number, so a reader can tell
//! for any byte whether it is the right one: `obd-ublk-null --verify /dev/ublkbN` does.
//!
//! ```text
//! obd-ublk-null [--sectors N] [--queues N] [--depth N] [--id N] [--request-bytes N]
//!               [--latency-us N] [--fail-sector N] [--panic-sector N] [--fail-worker N]
//!               [--mbr] [--no-fill]
//! obd-ublk-null --writable [--flush-us N] [as above, without --latency-us and what follows]
//! obd-ublk-null --verify PATH [--seconds N]
//! obd-ublk-null --cycles N [as above]
//! obd-ublk-null --list | --delete ID | --facts
//! ```
//!
//! With `--writable` the disk is memory that begins as zeros and keeps what is written.
//!
//! Prints the device's path once it can be used, serves until SIGTERM or SIGINT, then prints its
//! counters and what it cost as one line of JSON.

mod ram_disk;

use clap::Parser;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::time::TimeValLike;
use obd_ublk::disk::{Disk, Geometry, Worker};
use obd_ublk::error::{Error, ErrorKind, Result};
use obd_ublk::ublk::{self, Device, DeviceOptions, Watch};
use obd_ublk::units::{SECTOR_SIZE, to_u64};
use ram_disk::RamDisk;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

#[derive(Debug, Parser)]
#[command(about = "A block device whose content is a function of the position")]
struct Arguments {
    /// Size of the disk in sectors of 512 bytes.
    #[arg(long, default_value_t = 1 << 21)]
    sectors: u64,
    #[arg(long)]
    queues: Option<u16>,
    #[arg(long)]
    depth: Option<u16>,
    #[arg(long)]
    id: Option<u32>,
    #[arg(long)]
    request_bytes: Option<u32>,
    /// Sleep this long in every read.
    #[arg(long, default_value_t = 0)]
    latency_us: u64,
    /// Serve memory that can be written.
    #[arg(long, conflicts_with_all = ["latency_us", "no_fill", "fail_sector", "panic_sector",
        "mbr", "fail_worker", "cycles"])]
    writable: bool,
    /// Sleep this long in every flush of a writable disk.
    #[arg(long, default_value_t = 0, requires = "writable")]
    flush_us: u64,
    /// Leave the content to chance: the front end's cost alone.
    #[arg(long)]
    no_fill: bool,
    /// Reads that touch this sector fail.
    #[arg(long)]
    fail_sector: Option<u64>,
    /// Reads that touch this sector panic.
    #[arg(long)]
    panic_sector: Option<u64>,
    /// Put a partition table into sector 0, to see who reads it.
    #[arg(long)]
    mbr: bool,
    /// The N-th reader (from 0) cannot be made.
    #[arg(long)]
    fail_worker: Option<u32>,
    /// Start and stop this many devices one after the other, then say what is left of them.
    #[arg(long)]
    cycles: Option<u32>,
    /// Check the content of a device or file.
    #[arg(long)]
    verify: Option<PathBuf>,
    /// How long to check random positions.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// List the kernel's devices.
    #[arg(long)]
    list: bool,
    /// Delete a device.
    #[arg(long)]
    delete: Option<u32>,
    /// What this host can do.
    #[arg(long)]
    facts: bool,
}

/// The disk, and at once its reader's settings.
#[derive(Debug)]
struct Pattern {
    sectors: u64,
    latency: Option<Duration>,
    fill: bool,
    fail_sector: Option<u64>,
    panic_sector: Option<u64>,
    mbr: bool,
    fail_worker: Option<u32>,
    workers: AtomicU32,
}

struct PatternWorker {
    latency: Option<Duration>,
    fill: bool,
    fail_sector: Option<u64>,
    panic_sector: Option<u64>,
    mbr: bool,
}

impl Disk for Pattern {
    type Worker = PatternWorker;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.sectors,
            read_only: true,
            optimal_io_bytes: 65536,
            discard_granularity_bytes: None,
        }
    }

    fn worker(&self) -> Result<PatternWorker> {
        let made = self.workers.fetch_add(1, Ordering::Relaxed);
        if self.fail_worker == Some(made) {
            return Err(Error::new(ErrorKind::Io, format!("reader {made} is not to be had")));
        }
        let Self { latency, fill, fail_sector, panic_sector, mbr, .. } = *self;
        Ok(PatternWorker { latency, fill, fail_sector, panic_sector, mbr })
    }
}

impl Worker for PatternWorker {
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        if let Some(latency) = self.latency {
            std::thread::sleep(latency);
        }
        let end_sector = start_sector + to_u64(dst.len()) / SECTOR_SIZE;
        let touches = |sector: Option<u64>| {
            sector.is_some_and(|sector| (start_sector..end_sector).contains(&sector))
        };
        assert!(!touches(self.panic_sector), "told to panic");
        if touches(self.fail_sector) {
            return Err(Error::new(ErrorKind::Integrity, "told to fail"));
        }
        if self.fill {
            for (index, word) in (start_sector * SECTOR_SIZE / 8..).zip(dst.chunks_exact_mut(8)) {
                word.copy_from_slice(&index.to_le_bytes());
            }
        }
        if self.mbr && start_sector == 0 {
            // One Linux partition of 64 sectors from sector 64 on, and the signature.
            dst[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 64, 0, 0, 0, 64, 0, 0, 0]);
            dst[510..512].copy_from_slice(&[0x55, 0xaa]);
        }
        Ok(())
    }
}

fn disk_and_options(arguments: &Arguments) -> (Arc<Pattern>, DeviceOptions) {
    let defaults = DeviceOptions::default();
    let options = DeviceOptions {
        id: arguments.id,
        queues: arguments.queues,
        depth: arguments.depth.unwrap_or(defaults.depth),
        request_bytes: arguments.request_bytes.unwrap_or(defaults.request_bytes),
        recoverable: false,
    };
    let disk = Pattern {
        sectors: arguments.sectors,
        latency: (arguments.latency_us > 0).then(|| Duration::from_micros(arguments.latency_us)),
        fill: !arguments.no_fill,
        fail_sector: arguments.fail_sector,
        panic_sector: arguments.panic_sector,
        mbr: arguments.mbr,
        fail_worker: arguments.fail_worker,
        workers: AtomicU32::new(0),
    };
    (Arc::new(disk), options)
}

/// Starts and stops devices; descriptors, threads and memory must not grow with their number.
fn cycle(arguments: &Arguments, count: u32) -> Result<()> {
    let (disk, options) = disk_and_options(arguments);
    let mut slowest = Duration::ZERO;
    let asked = Instant::now();
    for index in 0..count {
        let began = Instant::now();
        let device = Device::start(Arc::clone(&disk), &options, Watch::nobody())
            .map_err(|error| error.context(format!("cycle {index}")))?;
        let mut first = [0; 4096];
        let opened = File::open(device.path());
        opened
            .and_then(|node| node.read_exact_at(&mut first, 0))
            .map_err(|error| Error::io("read the device", &error))?;
        device.stop()?;
        slowest = slowest.max(began.elapsed());
    }
    let entries = |folder: &str| std::fs::read_dir(folder).map_or(0, Iterator::count);
    println!(
        "{count} cycles in {} ms, slowest {} ms; left: {} descriptors, {} threads, {} devices",
        asked.elapsed().as_millis(),
        slowest.as_millis(),
        entries("/proc/self/fd"),
        entries("/proc/self/task"),
        ublk::list()?.len(),
    );
    Ok(())
}

/// Serves the disk that the arguments describe.
fn serve(arguments: &Arguments) -> Result<()> {
    let (pattern, options) = disk_and_options(arguments);
    if !arguments.writable {
        return serve_disk(pattern, &options, || 0);
    }
    let flush_time = Duration::from_micros(arguments.flush_us);
    let disk = Arc::new(RamDisk::new(arguments.sectors, flush_time));
    serve_disk(Arc::clone(&disk), &options, || disk.flushes())
}

/// Serves `disk` to the end; `disk_flushes` tells how often it was flushed.
fn serve_disk<D: Disk>(
    disk: Arc<D>,
    options: &DeviceOptions,
    disk_flushes: impl Fn() -> u64,
) -> Result<()> {
    // Before any thread exists, so that only `wait` below sees them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().map_err(|errno| Error::io("block signals", &errno.into()))?;
    let asked = Instant::now();
    let device = Device::start(disk, options, Watch::nobody())?;
    let start_us = asked.elapsed().as_micros();
    println!("{}", device.path().display());
    let _ = std::io::stdout().flush();
    let _ = signals.wait();
    let stats = device.stats();
    let total = stats.total();
    let asked = Instant::now();
    device.stop()?;
    println!(
        "{{\"requests\":{},\"read_bytes\":{},\"writes\":{},\"written_bytes\":{},\"flushes\":{},\
         \"disk_flushes\":{},\"discards\":{},\"errors\":{},\"panics\":{},\"enters\":{},\
         \"cpu_us\":{},\"start_us\":{start_us},\"stop_us\":{},\"last_error\":{:?}}}",
        total.requests,
        total.read_bytes,
        total.writes,
        total.written_bytes,
        total.flushes,
        disk_flushes(),
        total.discards,
        total.errors,
        total.panics,
        total.enters,
        cpu_us(),
        asked.elapsed().as_micros(),
        stats.last_error.unwrap_or_default()
    );
    Ok(())
}

fn cpu_us() -> i64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| {
        usage.user_time().num_microseconds() + usage.system_time().num_microseconds()
    })
}

/// A page-aligned window into `memory`, as O_DIRECT wants.
fn aligned(memory: &mut [u8], len_bytes: usize) -> &mut [u8] {
    let start = memory.as_ptr().align_offset(4096);
    &mut memory[start..start + len_bytes]
}

fn check(file: &File, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
    file.read_exact_at(dst, offset_bytes)
        .map_err(|error| Error::io(format!("read at byte {offset_bytes}"), &error))?;
    for (index, word) in (offset_bytes / 8..).zip(dst.chunks_exact(8)) {
        if word != index.to_le_bytes() {
            return Err(Error::corrupt("word", index * 8, format!("{word:02x?}"), index));
        }
    }
    Ok(())
}

/// Reads the whole device in order through the page cache, then random runs of sectors with
/// O_DIRECT, and the last sector.
fn verify(path: &Path, seconds: u64) -> Result<()> {
    let open = |flags| {
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
        opened.map_err(|error| Error::io(format!("open {}", path.display()), &error))
    };
    let (buffered, direct) = (open(0)?, open(libc::O_DIRECT)?);
    let end = std::io::Seek::seek(&mut &buffered, std::io::SeekFrom::End(0));
    let size = end.map_err(|error| Error::io("find the size", &error))?;
    let mut memory = vec![0; (1 << 20) + 4096];
    let mut offset = 0;
    while offset < size {
        let len_bytes = usize::try_from((size - offset).min(1 << 20)).unwrap_or(0);
        check(&buffered, offset, aligned(&mut memory, len_bytes))?;
        offset += 1 << 20;
    }
    check(&direct, size - SECTOR_SIZE, aligned(&mut memory, 512))?;
    let (started, mut seed, mut runs) = (Instant::now(), 0x9e37_79b9_7f4a_7c15_u64, 0_u64);
    while started.elapsed().as_secs() < seconds {
        // xorshift64: any sequence will do, and this one needs no crate.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let start = (seed >> 8) % (size / SECTOR_SIZE);
        let count = (1 + seed % 300).min(size / SECTOR_SIZE - start);
        let len_bytes = usize::try_from(count * SECTOR_SIZE).unwrap_or(0);
        check(&direct, start * SECTOR_SIZE, aligned(&mut memory, len_bytes))?;
        runs += 1;
    }
    println!("{} bytes in order and {runs} direct runs are right", size);
    Ok(())
}

fn run(arguments: &Arguments) -> Result<()> {
    if let Some(path) = &arguments.verify {
        return verify(path, arguments.seconds);
    }
    if let Some(id) = arguments.delete {
        return ublk::delete(id);
    }
    if arguments.list {
        ublk::list()?.iter().for_each(|device| println!("{device:?}"));
        return Ok(());
    }
    if arguments.facts {
        let facts = ublk::features();
        println!("{facts:?}\n{}", facts.feature_names().join(" "));
        return Ok(());
    }
    match arguments.cycles {
        Some(count) => cycle(arguments, count),
        None => serve(arguments),
    }
}

fn main() -> ExitCode {
    let subscriber = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false);
    // As the program does it: without the words of crates that use `log`.
    let _ = tracing::subscriber::set_global_default(subscriber.finish());
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("obd-ublk-null: {error:#}");
            ExitCode::from(error.exit_code())
        }
    }
}
