//! The cost of a lookup in the merged map, for 1 and for 32 layers with the same number of
//! entries, against a binary search over the same starts; and of the merge itself.
//!
//! `cargo bench --bench lookup`; with `--count LAYERS LOOKUPS` it only looks up, for counting
//! instructions (`benches/instructions.sh` does, under valgrind).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
#![allow(clippy::cast_precision_loss)]

mod common;

use common::{Random, alternate};
use obd_ublk::map::{FlatMap, Stroke, Target, paint};
use std::hint::black_box;
use std::time::Instant;

const LOOKUPS: usize = 1_000_000;

/// `entries` entries of 1..=64 sectors with gaps, dealt to `layers` layers at random: the merged
/// map has the same entries whatever the number of layers.
fn strokes(entries: u64, layers: u16) -> Vec<Stroke> {
    let mut random = Random(9);
    let mut here = 0;
    let mut strokes = Vec::new();
    for i in 0..entries {
        let start = here + random.below(32);
        let end = start + 1 + random.below(64);
        // Drawn even for one layer, so that both see the same sequence.
        let layer = u16::try_from(random.below(32)).unwrap() % layers;
        let target = Target::Data { layer, sector: 8 + i * 100 };
        strokes.push(Stroke {
            start_sector: start,
            end_sector: end,
            height: u32::from(layer),
            target,
        });
        here = end;
    }
    // As indexes arrive: one layer after the other, each sorted.
    strokes.sort_by_key(|stroke| (stroke.height, stroke.start_sector));
    strokes
}

fn map_of(entries: u64, layers: u16) -> FlatMap {
    let runs = paint(strokes(entries, layers));
    let end = runs.last().unwrap().end_sector;
    FlatMap::build(&runs, end).unwrap()
}

fn look_up(map: &FlatMap, lookups: usize) -> u64 {
    let mut random = Random(3);
    let mut sum = 0;
    for _ in 0..lookups {
        let sector = random.below(map.virtual_sectors());
        sum += map.extents(sector, 8).map(|extent| extent.sectors).sum::<u64>();
    }
    sum
}

fn compare(entries: u64) {
    let map = map_of(entries, 1);
    let runs = paint(strokes(entries, 1));
    let starts: Vec<u64> = runs.iter().map(|run| run.start_sector).collect();
    let mut random = Random(5);
    let sectors: Vec<u64> = (0..LOOKUPS).map(|_| random.below(map.virtual_sectors())).collect();
    let outcome = alternate(
        9,
        || sectors.iter().for_each(|&sector| _ = black_box(map.lookup(sector))),
        || {
            for &sector in &sectors {
                black_box(starts.partition_point(|&start| start <= sector));
            }
        },
    );
    outcome.print(&format!("lookup in {entries} entries"), LOOKUPS as u64, "-");
    let per_entry = map.memory_bytes() as f64 / map.entry_count() as f64;
    println!("{:<28} {per_entry:.1} bytes an entry", "  memory");
}

fn merge(layers: u16, entries: u64) {
    let strokes = strokes(entries, layers);
    let mut times: Vec<_> = (0..7)
        .map(|_| {
            let fresh = strokes.clone();
            let start = Instant::now();
            let runs = paint(fresh);
            let end = runs.last().unwrap().end_sector;
            black_box(FlatMap::build(&runs, end).unwrap());
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("merge {layers} layers, {entries} entries: {:.1} ms", times[3].as_secs_f64() * 1e3);
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|arg| arg == "--count") {
        let map = map_of(100_000, args[at + 1].parse().unwrap());
        println!("{}", look_up(&map, args[at + 2].parse().unwrap()));
        return;
    }
    for entries in [1_000, 10_000, 100_000, 1_000_000] {
        compare(entries);
    }
    merge(50, 1_000_000);
    merge(1, 20_000);
}
