//! The merge against a naive reference that paints an array sector by sector.

use super::*;
use proptest::prelude::*;

fn data(layer: u16, sector: u64) -> Target {
    Target::Data { layer, sector }
}

fn stroke(start: u64, sectors: u64, height: u32, target: Target) -> Stroke {
    Stroke { start_sector: start, end_sector: start + sectors, height, target }
}

fn run(start: u64, end: u64, target: Target) -> Run {
    Run { start_sector: start, end_sector: end, target }
}

#[test]
fn the_higher_stroke_hides_the_lower_and_trims_its_edges() {
    let runs = paint(vec![
        stroke(0, 100, 0, data(0, 8)),
        stroke(10, 20, 1, data(1, 50)),
        stroke(15, 5, 2, Target::Zero),
    ]);
    assert_eq!(
        runs,
        [
            run(0, 10, data(0, 8)),
            run(10, 15, data(1, 50)),
            run(15, 20, Target::Zero),
            run(20, 30, data(1, 60)),
            run(30, 100, data(0, 38)),
        ]
    );
}

#[test]
fn neighbours_that_continue_each_other_become_one_run() {
    let cases = [
        (vec![stroke(0, 8, 0, data(0, 8)), stroke(8, 8, 0, data(0, 16))], 1),
        (vec![stroke(0, 8, 0, data(0, 8)), stroke(8, 8, 1, data(1, 16))], 2),
        (vec![stroke(0, 8, 0, data(0, 8)), stroke(8, 8, 0, data(0, 17))], 2),
        (vec![stroke(0, 8, 0, data(0, 8)), stroke(9, 8, 0, data(0, 17))], 2),
        (vec![stroke(0, 8, 0, Target::Zero), stroke(8, 8, 3, Target::Zero)], 1),
    ];
    for (strokes, count) in cases {
        assert_eq!(paint(strokes.clone()).len(), count, "{strokes:?}");
    }
}

#[test]
fn with_seams_only_what_is_of_one_stroke_is_one_run() {
    let strokes = vec![
        stroke(0, 8, 0, data(0, 8)),
        stroke(8, 8, 0, data(0, 16)),
        stroke(16, 8, 0, Target::Zero),
        stroke(24, 8, 3, Target::Zero),
        // Below another, which does not cut it in two.
        stroke(26, 2, 0, data(0, 50)),
    ];
    assert_eq!(
        paint_with_seams(strokes),
        [
            run(0, 8, data(0, 8)),
            run(8, 16, data(0, 16)),
            run(16, 24, Target::Zero),
            run(24, 32, Target::Zero),
        ]
    );
}

#[test]
fn a_disk_without_runs_is_one_extent_of_zeros() {
    let map = FlatMap::build(&[], 1000).unwrap();
    let all: Vec<_> = map.extents(0, 5000).collect();
    assert_eq!(all, [Extent { start_sector: 0, sectors: 1000, target: Target::Zero }]);
    assert_eq!(map.extents(1000, 1).count(), 0, "beyond the end there is nothing");
}

#[test]
fn a_disk_of_no_sectors_has_no_extents() {
    let map = FlatMap::build(&[], 0).unwrap();
    assert_eq!((map.entry_count(), map.extents(0, 8).count()), (0, 0));
}

#[test]
fn what_lies_beyond_the_end_of_the_disk_is_cut_off() {
    let map = FlatMap::build(&[run(5, 50, data(0, 8)), run(60, 70, data(0, 90))], 20).unwrap();
    let all: Vec<_> = map.extents(0, 20).collect();
    assert_eq!(
        all,
        [
            Extent { start_sector: 0, sectors: 5, target: Target::Zero },
            Extent { start_sector: 5, sectors: 15, target: data(0, 8) },
        ]
    );
}

#[test]
fn a_layer_beyond_the_addressable_size_is_refused() {
    let far = 1 << 48;
    for (sector, good) in [(far - 8, false), (far - 9, true), (far, false)] {
        assert_eq!(FlatMap::build(&[run(0, 8, data(0, sector))], 8).is_ok(), good, "{sector}");
    }
    assert!(FlatMap::build(&[], 1 << 51).is_err(), "more sectors than an entry can address");
}

#[test]
fn many_entries_in_one_bucket_are_still_found() {
    // One far run makes the buckets huge; all others crowd into the first.
    let mut runs: Vec<Run> = (0..1000).map(|i| run(i * 2, i * 2 + 1, data(0, 8 + i * 3))).collect();
    runs.push(run(1 << 40, (1 << 40) + 8, data(1, 8)));
    let map = FlatMap::build(&runs, 1 << 41).unwrap();
    for i in 0..1000 {
        let extent = map.extents(i * 2, 1).next().unwrap();
        assert_eq!(extent.target, data(0, 8 + i * 3), "run {i}");
        assert_eq!(map.extents(i * 2 + 1, 1).next().unwrap().target, Target::Zero);
    }
    assert_eq!(map.extents((1 << 40) + 3, 1).next().unwrap().target, data(1, 11));
}

/// One random layer: sorted, disjoint strokes, some of zeros, with lengths from 1 up.
fn layer(index: u16, sectors: u64) -> impl Strategy<Value = Vec<Stroke>> {
    let gap_len = (0_u64..40, 1_u64..60, 0_u8..4, 0_u64..1000);
    prop::collection::vec(gap_len, 0..24).prop_map(move |parts| {
        let mut here = 0;
        let mut strokes = Vec::new();
        for (gap, len, kind, sector) in parts {
            let start = here + gap;
            // The last strokes may reach beyond the end of the disk: trims.
            if start > sectors + 30 {
                break;
            }
            let target = if kind == 0 { Target::Zero } else { data(index, 8 + sector) };
            strokes.push(stroke(start, len, u32::from(index), target));
            here = start + len;
        }
        strokes
    })
}

/// A stack of 1..=64 layers over a disk of up to 600 sectors.
fn stack() -> impl Strategy<Value = (u64, Vec<Vec<Stroke>>)> {
    (1_u64..600, 1_u16..=64).prop_flat_map(|(sectors, layers)| {
        let all: Vec<_> = (0..layers).map(|index| layer(index, sectors)).collect();
        (Just(sectors), all)
    })
}

/// Paints an array, bottom layer first.
fn naive(sectors: u64, layers: &[Vec<Stroke>]) -> Vec<Target> {
    let mut disk = vec![Target::Zero; usize::try_from(sectors).unwrap()];
    for strokes in layers {
        for stroke in strokes {
            for sector in stroke.start_sector..stroke.end_sector.min(sectors) {
                disk[usize::try_from(sector).unwrap()] =
                    stroke.target.advanced(sector - stroke.start_sector);
            }
        }
    }
    disk
}

/// Checks the map against the array: right, complete, disjoint, joined, and any sub-range too.
fn check(sectors: u64, layers: &[Vec<Stroke>], ranges: &[(u64, u64)]) {
    let expected = naive(sectors, layers);
    let map = FlatMap::build(&paint(layers.concat()), sectors).unwrap();
    for &(start, len) in ranges.iter().chain(&[(0, sectors)]) {
        let mut here = start;
        let mut before: Option<Extent> = None;
        for extent in map.extents(start, len) {
            assert_eq!(extent.start_sector, here, "no gap, no overlap");
            assert!(extent.sectors > 0);
            for i in 0..extent.sectors {
                let sector = usize::try_from(here + i).unwrap();
                assert_eq!(extent.target.advanced(i), expected[sector], "sector {sector}");
            }
            if let Some(before) = before {
                assert!(!before.target.continues_at(before.sectors, extent.target), "joined");
            }
            here += extent.sectors;
            before = Some(extent);
        }
        assert_eq!(here, (start + len).min(sectors).max(start), "the whole range is covered");
    }
}

fn cases() -> u32 {
    // 10^5 in CI (set by the test script); a developer's plain `cargo test` stays quick.
    std::env::var("OBD_UBLK_MAP_CASES").map_or(2_000, |n| n.parse().expect("a number"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    /// Top wins, zeroed hides, edges are trimmed, neighbours are joined: for any stack.
    #[test]
    fn the_merged_map_equals_a_sector_by_sector_reference(
        (sectors, layers) in stack(),
        ranges in prop::collection::vec((0_u64..700, 0_u64..300), 4),
    ) {
        check(sectors, &layers, &ranges);
    }

    /// The log of a writable pair: any overlap, the later entry wins.
    #[test]
    fn a_painted_log_equals_replaying_it(
        log in prop::collection::vec((0_u64..300, 1_u64..40, 0_u8..4, 0_u64..1000), 0..200),
    ) {
        let layers: Vec<Vec<Stroke>> = log
            .iter()
            .zip(0_u32..)
            .map(|(&(start, len, kind, sector), height)| {
                let target = if kind == 0 { Target::Zero } else { data(3, 8 + sector) };
                vec![stroke(start, len, height, target)]
            })
            .collect();
        check(320, &layers, &[]);
    }
}
