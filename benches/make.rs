//! `commit` over the bare loop that it cannot do without: compress and checksum the same blocks.
//!
//! `cargo bench --bench make`
//!
//! One core: the time of a commit over that of the loop. Two: what the second core gains, as a
//! share of what it gains for two loops on half of the blocks each. Input and output are in memory,
//! no block is zero, and both compress in place: neither wins by leaving something out.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::{alternate, image_like, layer_of};
use nix::sys::resource::{UsageWho, getrusage};
use obd_ublk::format::zfile::{Algorithm, BLOCK_SEED, WriteOptions, crc32c_raw};
use obd_ublk::image::Layer;
use obd_ublk::make::{Content, MakeOptions, Watch, write_layer};
use obd_ublk::source::Source;
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};

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

/// What a work takes of the processor, in user and kernel mode.
fn cpu_seconds(work: impl FnOnce()) -> f64 {
    let now = || {
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        let seconds =
            |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        seconds(usage.user_time()) + seconds(usage.system_time())
    };
    let start = now();
    work();
    now() - start
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
        let (mut ours, mut floor) = (Vec::new(), Vec::new());
        let one = alternate(
            ROUNDS,
            || ours.push(cpu_seconds(|| commit(&content, algorithm, 1, &output))),
            || floor.push(cpu_seconds(|| bare(&data, algorithm))),
        );
        one.print(&format!("{name} 4K, one core"), blocks, "<= 1.2");
        // The same rounds by the processor's clock, which neighbours on the machine stop less.
        let mut ratios: Vec<f64> = ours.iter().zip(&floor).map(|(a, b)| a / b).collect();
        ratios.sort_by(f64::total_cmp);
        println!("{name} 4K, one core, CPU time  ratio {:.3}", ratios[ratios.len() / 2]);
        let two = alternate(
            ROUNDS,
            || commit(&content, algorithm, 2, &output),
            || two_bare(&data, algorithm),
        );
        two.print(&format!("{name} 4K, two cores"), blocks, "-");
        let gain = |one: std::time::Duration, two: std::time::Duration| {
            one.as_secs_f64() / two.as_secs_f64()
        };
        let (ours, floor) = (gain(one.ours, two.ours), gain(one.floor, two.floor));
        let share = ours / floor;
        println!("{name} 4K, second core gains    ours {ours:.3}  floor {floor:.3}");
        println!("{name} 4K, share of that gain   {share:.3}  goal >= 0.9");
        let compressed = output.metadata().unwrap().len();
        println!("{name} 4K, {BYTES} bytes become {compressed}");
    }
}
