//! `commit` over the bare loop that it cannot do without: compress and checksum the same blocks.
//!
//! `cargo bench --bench make`
//!
//! One core: the time of a commit over that of the loop. Two: what the second core gains, as a
//! share of what it gains for two loops on half of the blocks each. Input and output are in memory,
//! no block is zero, and both compress in place: neither wins by leaving something out.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::{image_like, layer_of};
use nix::sys::resource::{UsageWho, getrusage};
use obd_ublk::format::zfile::{Algorithm, BLOCK_SEED, WriteOptions, crc32c_raw};
use obd_ublk::image::Layer;
use obd_ublk::make::{Content, MakeOptions, Watch, write_layer};
use obd_ublk::source::Source;
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

const BYTES: usize = 128 << 20;
const ROUNDS: usize = 11;

fn bare(data: &[u8], algorithm: Algorithm) {
    let mut record = vec![0; 8192];
    let mut zstd = zstd::bulk::Compressor::new(3).unwrap();
    for block in data.chunks(4096) {
        let len = match algorithm {
            Algorithm::Lz4 => {
                lzzzz::lz4::compress(block, &mut record, lzzzz::lz4::ACC_LEVEL_DEFAULT).unwrap()
            }
            Algorithm::Zstd => zstd.compress_to_buffer(block, &mut record[..]).unwrap(),
        };
        black_box(crc32c_raw(BLOCK_SEED, &record[..len]));
    }
}

fn two_bare(data: &[u8], algorithm: Algorithm) {
    let (one, other) = data.split_at(data.len() / 2);
    std::thread::scope(|scope| {
        scope.spawn(|| bare(one, algorithm));
        bare(other, algorithm);
    });
}

fn commit(content: &Content, algorithm: Algorithm, threads: usize, output: &Path) {
    let zfile = WriteOptions { algorithm, ..WriteOptions::default() };
    let options = MakeOptions { zfile: Some(zfile), threads, ..MakeOptions::default() };
    let (done, canceled) = (AtomicU64::new(0), AtomicBool::new(false));
    let watch = Watch { done: &done, canceled: &canceled };
    write_layer(content, content.identity(), &options, output, &watch).unwrap();
}

/// Seconds by the clock on the wall, and of the processor in user and kernel mode.
#[derive(Clone, Copy)]
struct Took {
    wall: f64,
    cpu: f64,
}

fn measure(work: impl FnOnce()) -> Took {
    let cpu = || {
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        let seconds =
            |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        seconds(usage.user_time()) + seconds(usage.system_time())
    };
    let (start, used) = (Instant::now(), cpu());
    work();
    Took { wall: start.elapsed().as_secs_f64(), cpu: cpu() - used }
}

/// Medians over all rounds, in seconds, and of the ratios within each.
struct Outcome {
    ours: f64,
    floor: f64,
    ratio: f64,
    cpu_ratio: f64,
}

impl Outcome {
    fn print(&self, name: &str, blocks: u64, goal: &str) {
        let per = |seconds: f64| seconds * 1e9 / blocks as f64;
        println!(
            "{name:<20} ours {:>6.0} ns  floor {:>6.0} ns  ratio {:.3}  CPU {:.3}  goal {goal}",
            per(self.ours),
            per(self.floor),
            self.ratio,
            self.cpu_ratio
        );
    }
}

fn rounds(mut ours: impl FnMut() -> Took, mut floor: impl FnMut() -> Took) -> Outcome {
    // Once for the caches.
    let _ = (ours(), floor());
    let pairs: Vec<(Took, Took)> = (0..ROUNDS).map(|_| (ours(), floor())).collect();
    let median = |of: fn(&(Took, Took)) -> f64| {
        let mut all: Vec<f64> = pairs.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Outcome {
        ours: median(|(ours, _)| ours.wall),
        floor: median(|(_, floor)| floor.wall),
        ratio: median(|(ours, floor)| ours.wall / floor.wall),
        cpu_ratio: median(|(ours, floor)| ours.cpu / floor.cpu),
    }
}

fn main() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let data = image_like(BYTES, 3);
    assert!(data.chunks(4096).all(|block| block.iter().any(|&byte| byte != 0)));
    let input = folder.path().join("layer");
    std::fs::write(&input, layer_of(&data)).unwrap();
    let layer = Layer::open_sealed("layer".to_owned(), Source::open(&input).unwrap()).unwrap();
    let content = Content::of_layer(layer).unwrap();
    let output = folder.path().join("out");
    let blocks = u64::try_from(BYTES / 4096).unwrap();
    println!("{blocks} blocks of 4096 bytes, {ROUNDS} alternating rounds, medians");
    for (name, algorithm) in [("lz4", Algorithm::Lz4), ("zstd", Algorithm::Zstd)] {
        // What the last round left is freed outside of the clock.
        let fresh = |threads| {
            let _ = std::fs::remove_file(&output);
            measure(|| commit(&content, algorithm, threads, &output))
        };
        let one = rounds(|| fresh(1), || measure(|| bare(&data, algorithm)));
        one.print(&format!("{name} 4K, one core"), blocks, "<= 1.2");
        let two = rounds(|| fresh(2), || measure(|| two_bare(&data, algorithm)));
        two.print(&format!("{name} 4K, two cores"), blocks, "-");
        let (ours, floor) = (one.ours / two.ours, one.floor / two.floor);
        let share = ours / floor;
        println!("{name} 4K, second core gains    ours {ours:.3}  floor {floor:.3}");
        println!("{name} 4K, share of that gain   {share:.3}  goal >= 0.9");
        let compressed = output.metadata().unwrap().len();
        println!("{name} 4K, {BYTES} bytes become {compressed}");
    }
}
