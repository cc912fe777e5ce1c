//! Compares a block device with what it should hold, without hashing gigabytes of holes.
//!
//! ```text
//! obd-ublk-device-check pack RAW PACK         the blocks of a raw image that are not zero
//! obd-ublk-device-check check DEVICE PACK     read them back: direct and buffered, in parallel
//! obd-ublk-device-check storm DEVICE COUNT    open, read one page, close; from eight threads
//! obd-ublk-device-check churn DEVICE FIRST    write for ever, say which step is durable
//! obd-ublk-device-check audit DEVICE FIRST-DURABLE...
//!                                             whether every sector is what these churns left
//! obd-ublk-device-check kills COUNT SIGNAL DEVICE[=PACK]... [MOUNT=SUMS]...
//!                                             kill their servers one after the other while the
//!                                             packed blocks and the mounted files are read; how
//!                                             fast they came back
//! ```
//!
//! Used by the tests that run in a virtual machine: the pack is made on the host from `export`,
//! and read back from `/dev/ublkbN` in the guest. Between the packed blocks holes are sampled.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "device-check/churn.rs"]
mod churn;
#[path = "device-check/kills.rs"]
mod kills;

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;

const BLOCK: usize = 4096;

/// Every how many blocks of a hole one is read: a prime, so that no stride of the image hides.
const HOLE_STEP: u64 = 997;

const THREADS: usize = 4;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A page-aligned buffer, as direct I/O wants it.
#[repr(align(4096))]
struct Page([u8; BLOCK]);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["pack", raw, pack] => make_pack(raw, pack),
        ["check", device, pack] => check(device, pack),
        ["storm", device, count] => storm(device, count),
        ["churn", device, first] => churn::churn(device, first),
        ["audit", device, ref rounds @ ..] => churn::audit(device, rounds),
        ["kills", count, signal, ref targets @ ..] => kills::run(count, signal, targets),
        _ => Err("usage: pack RAW PACK | check DEVICE PACK | storm DEVICE COUNT | \
                  churn DEVICE FIRST | audit DEVICE FIRST-DURABLE... | \
                  kills COUNT SIGNAL DEVICE[=PACK]... [MOUNT=SUMS]..."
            .into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("device-check: {error}");
            ExitCode::FAILURE
        }
    }
}

/// PACK: size of the disk, then (offset, block) for every block that is not zero, in order.
fn make_pack(raw: &str, pack: &str) -> Result<()> {
    let mut raw = File::open(raw)?;
    let size = raw.seek(SeekFrom::End(0))?;
    raw.rewind()?;
    let mut out = std::io::BufWriter::new(File::create(pack)?);
    out.write_all(&size.to_le_bytes())?;
    let mut buffer = vec![0; BLOCK * 256];
    let mut at = 0_u64;
    while at < size {
        let len = usize::try_from((size - at).min(u64::try_from(buffer.len())?))?;
        raw.read_exact(&mut buffer[..len])?;
        for (i, block) in (0_u64..).zip(buffer[..len].chunks(BLOCK)) {
            if block.iter().any(|&byte| byte != 0) {
                let mut padded = [0; BLOCK];
                padded[..block.len()].copy_from_slice(block);
                out.write_all(&(at + i * BLOCK as u64).to_le_bytes())?;
                out.write_all(&padded)?;
            }
        }
        at += u64::try_from(len)?;
    }
    Ok(out.flush()?)
}

struct Expected {
    size: u64,
    blocks: Vec<(u64, Vec<u8>)>,
}

fn load_pack(pack: &str) -> Result<Expected> {
    let mut file = std::io::BufReader::new(File::open(pack)?);
    let mut number = [0; 8];
    file.read_exact(&mut number)?;
    let size = u64::from_le_bytes(number);
    let mut blocks = Vec::new();
    while file.read_exact(&mut number).is_ok() {
        let mut block = vec![0; BLOCK];
        file.read_exact(&mut block)?;
        blocks.push((u64::from_le_bytes(number), block));
    }
    Ok(Expected { size, blocks })
}

fn check(device: &str, pack: &str) -> Result<()> {
    let expected = load_pack(pack)?;
    let size = File::open(device)?.seek(SeekFrom::End(0))?;
    if size != expected.size {
        return Err(format!("{device}: found {size} bytes, expected {}", expected.size).into());
    }
    for direct in [true, false] {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let expected = &expected;
                    scope.spawn(move || check_share(device, expected, direct, thread))
                })
                .collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })?;
    }
    println!("{device}: {} blocks are right, direct and buffered", expected.blocks.len());
    Ok(())
}

/// Every `THREADS`th block, and samples of the holes between.
fn check_share(device: &str, expected: &Expected, direct: bool, thread: usize) -> Result<()> {
    let file = open(device, direct)?;
    let mut page = Box::new(Page([0; BLOCK]));
    let mut hole_from = 0;
    for (i, (offset, block)) in expected.blocks.iter().enumerate() {
        if i % THREADS == thread {
            compare(&file, *offset, expected.size, block, &mut page, direct)?;
            sample_hole(&file, hole_from, *offset, &mut page, direct)?;
        }
        hole_from = offset + BLOCK as u64;
    }
    if thread == 0 {
        let whole = expected.size / BLOCK as u64 * BLOCK as u64;
        sample_hole(&file, hole_from, whole, &mut page, direct)?;
    }
    Ok(())
}

fn sample_hole(file: &File, from: u64, to: u64, page: &mut Page, direct: bool) -> Result<()> {
    let mut at = from;
    while at + BLOCK as u64 <= to {
        compare(file, at, to, &[0; BLOCK], page, direct)?;
        at += HOLE_STEP * BLOCK as u64;
    }
    Ok(())
}

fn compare(
    file: &File,
    offset: u64,
    size: u64,
    block: &[u8],
    page: &mut Page,
    direct: bool,
) -> Result<()> {
    let len = usize::try_from((size - offset).min(BLOCK as u64))?;
    let how = if direct { "direct" } else { "buffered" };
    file.read_exact_at(&mut page.0[..len], offset)
        .map_err(|error| format!("{how} read of {len} bytes at {offset}: {error}"))?;
    if page.0[..len] == block[..len] {
        return Ok(());
    }
    let at = page.0[..len].iter().zip(block).position(|(a, b)| a != b).unwrap_or(0);
    let (found, wanted) = (page.0[at], block[at]);
    let place = offset + u64::try_from(at)?;
    Err(format!("{how}: byte {place}: found {found:#x}, expected {wanted:#x}").into())
}

fn open(device: &str, direct: bool) -> Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(device);
    Ok(opened.map_err(|error| format!("open {device}: {error}"))?)
}

fn storm(device: &str, count: &str) -> Result<()> {
    let count: u32 = count.parse()?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(move || -> Result<()> {
                    let mut page = Box::new(Page([0; BLOCK]));
                    for _ in 0..count / 8 {
                        open(device, true)?.read_exact_at(&mut page.0, 0)?;
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}
