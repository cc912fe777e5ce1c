//! What an index, a log and a sparse file may say.

// A file with one data extent is what is meant.
#![allow(clippy::single_range_in_vec_init)]

use super::*;
use proptest::prelude::*;

const DATA_END: u64 = 1000;

fn data(start_sector: u64, sectors: u64, mapped_sector: u64) -> SegmentMapping {
    SegmentMapping { start_sector, sectors, mapped_sector, zeroed: false, tag: 0 }
}

fn zeroed(start_sector: u64, sectors: u64, mapped_sector: u64) -> SegmentMapping {
    SegmentMapping { zeroed: true, ..data(start_sector, sectors, mapped_sector) }
}

/// An entry that [`SegmentMapping::encode`] refuses to write: length zero.
fn blank(start_sector: u64, mapped_sector: u64) -> [u8; 16] {
    let mut bytes = data(start_sector, 1, mapped_sector).encode();
    bytes[6] &= 0b11;
    bytes[7] = 0;
    bytes
}

#[test]
fn a_sealed_index_comes_back_in_order_without_tags() {
    let segments = [data(0, 8, 8), zeroed(8, 16383, 8), data(1 << 40, 1, 999)];
    let written = segments.map(|segment| SegmentMapping { tag: 7, ..segment });
    let parsed = parse_sealed_index(&encode_index(&written), 0, DATA_END).unwrap();
    assert_eq!(parsed, segments);
    assert_eq!(parse_sealed_index(&[], 4096, 8).unwrap(), []);
}

#[test]
fn padding_is_skipped_wherever_it_stands() {
    let mut padded = data(0, 1, 8).encode();
    padded[..7].copy_from_slice(&SegmentMapping::PADDING[..7]);
    let bytes = [
        SegmentMapping::PADDING,
        data(0, 8, 8).encode(),
        padded,
        data(8, 1, 16).encode(),
        SegmentMapping::PADDING,
    ]
    .concat();
    let expected = [data(0, 8, 8), data(8, 1, 16)];
    assert_eq!(parse_sealed_index(&bytes, 0, DATA_END).unwrap(), expected);
    assert_eq!(parse_writable_log(&bytes, 0, DATA_END).unwrap(), expected);
}

#[test]
fn a_sealed_entry_outside_the_data_or_out_of_order_is_refused_where_it_lies() {
    let cases: [(&str, Vec<[u8; 16]>); 10] = [
        ("disorder", vec![data(8, 8, 8).encode(), data(0, 8, 8).encode()]),
        ("overlap by one", vec![data(0, 9, 8).encode(), data(8, 8, 8).encode()]),
        ("the same twice", vec![data(0, 1, 8).encode(), data(0, 1, 8).encode()]),
        ("zeroed overlap", vec![zeroed(0, 9, 8).encode(), zeroed(8, 1, 8).encode()]),
        ("in the header", vec![data(0, 1, 8).encode(), data(1, 1, 7).encode()]),
        ("in the index", vec![data(0, 1, 8).encode(), data(1, 2, 999).encode()]),
        ("zeroed in the header", vec![data(0, 1, 8).encode(), zeroed(1, 1, 7).encode()]),
        ("zeroed in the index", vec![data(0, 1, 8).encode(), zeroed(1, 1, 1001).encode()]),
        ("beyond 2^50", vec![data(0, 1, 8).encode(), data((1 << 50) - 2, 3, 8).encode()]),
        ("a page of zeros", vec![data(0, 1, 8).encode(), [0; 16]]),
    ];
    for (name, entries) in cases {
        let error = parse_sealed_index(&entries.concat(), 8192, DATA_END).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}");
        assert!(error.to_string().contains("at byte 8208: found"), "{name}: {error}");
    }
}

#[test]
fn a_segment_may_touch_its_neighbours_and_both_ends_of_the_data() {
    let segments = [data(0, 8, 8), data(8, 992, 8), zeroed(1000, 1, 1000)];
    let bytes = encode_index(&segments);
    assert_eq!(parse_sealed_index(&bytes, 0, DATA_END).unwrap(), segments);
    let last = [data((1 << 50) - 2, 2, 8)];
    assert_eq!(parse_sealed_index(&encode_index(&last), 0, DATA_END).unwrap(), last);
}

#[test]
fn an_entry_of_length_zero_inside_the_data_maps_nothing() {
    let bytes = [data(0, 8, 8).encode(), blank(8, 8), data(8, 1, 16).encode()].concat();
    let parsed = parse_sealed_index(&bytes, 0, DATA_END).unwrap();
    assert_eq!(parsed, [data(0, 8, 8), data(8, 1, 16)]);
}

#[test]
fn a_sealed_index_is_whole_entries() {
    let error = parse_sealed_index(&[0xff; 17], 4096, DATA_END).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn a_log_keeps_the_order_it_was_written_in() {
    let log = [data(8, 8, 8), data(0, 16, 16), zeroed(4, 8, 32), data(8, 8, 40)];
    let written = log.map(|segment| SegmentMapping { tag: 3, ..segment });
    assert_eq!(parse_writable_log(&encode_index(&written), 4096, DATA_END).unwrap(), log);
}

#[test]
fn what_a_crash_tears_off_a_log_is_ignored() {
    let whole = encode_index(&[data(0, 8, 8)]);
    for torn in 0..16 {
        let bytes = [&whole[..], &[0; 32], &whole[..], &whole[..torn]].concat();
        let parsed = parse_writable_log(&bytes, 4096, DATA_END).unwrap();
        assert_eq!(parsed, [data(0, 8, 8); 2], "{torn} bytes of the next entry");
    }
}

#[test]
fn a_log_entry_whose_data_is_not_there_is_refused() {
    for entry in [data(0, 1, 7), data(0, 2, 999), zeroed(0, 1, 1001), data((1 << 50) - 2, 3, 8)] {
        let bytes = encode_index(&[data(0, 1, 8), entry]);
        let error = parse_writable_log(&bytes, 4096, DATA_END).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("at byte 4112"), "{error}");
    }
}

#[test]
fn a_sparse_file_is_its_data_extents_shifted_by_the_header() {
    let extents = [4096..8192, 12288..12800];
    let segments = segments_of_sparse_file(&extents, 1 << 20).unwrap();
    assert_eq!(segments, [data(0, 8, 8), data(16, 1, 24)]);
    assert_eq!(segments_of_sparse_file(&[], 0).unwrap(), []);
}

#[test]
fn the_header_is_no_data_and_nothing_lies_behind_the_virtual_size() {
    let cases: [(&[Range<u64>], &[SegmentMapping]); 5] = [
        (&[0..4096], &[]),
        (&[0..4608], &[data(0, 1, 8)]),
        (&[0..1 << 40], &[data(0, 16, 8)]),
        (&[4096 + 8192..1 << 40], &[]),
        (&[4096 + 7680..4096 + 8192, 1 << 20..1 << 21], &[data(15, 1, 23)]),
    ];
    for (extents, expected) in cases {
        assert_eq!(segments_of_sparse_file(extents, 8192).unwrap(), expected, "{extents:?}");
    }
}

#[test]
fn a_sector_that_is_data_in_part_is_data_and_is_counted_once() {
    let extents = [4097..4098, 4099..4609, 5000..5001];
    assert_eq!(segments_of_sparse_file(&extents, 1 << 20).unwrap(), [data(0, 1, 8), data(1, 1, 9)]);
}

#[test]
fn a_long_extent_is_split_where_an_entry_ends() {
    let max = SegmentMapping::SECTORS_MAX;
    let bytes = 4096..4096 + (2 * max + 1) * 512;
    let segments = segments_of_sparse_file(&[bytes], 1 << 30).unwrap();
    let expected = [data(0, max, 8), data(max, max, 8 + max), data(2 * max, 1, 8 + 2 * max)];
    assert_eq!(segments, expected);
}

#[test]
fn extents_that_no_file_system_reports_are_refused() {
    let reversed = Range { start: 8192, end: 4096 };
    for extents in [vec![reversed], vec![8192..8192], vec![8192..12288, 12287..16384]] {
        let error = segments_of_sparse_file(&extents, 1 << 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{extents:?}");
    }
    for size in [511, (1 << 59) + 512, u64::MAX] {
        assert!(segments_of_sparse_file(&[], size).is_err(), "a virtual size of {size}");
    }
}

#[test]
fn commit_fills_up_blocks_and_seal_fills_up_sectors() {
    let cases = [(0, 0, 0, 0), (1, 16, 512, 4096), (32, 512, 512, 4096), (257, 4112, 4608, 8192)];
    for (count, plain, sealed, committed) in cases {
        let segments: Vec<_> = (0..count).map(|at| data(at, 1, 8 + at)).collect();
        let bytes = encode_committed_index(&segments);
        assert_eq!(encode_index(&segments).len(), plain);
        assert_eq!(encode_sealed_index(&segments).len(), sealed);
        assert_eq!(bytes.len(), committed);
        assert_eq!(parse_sealed_index(&bytes, 0, DATA_END).unwrap(), segments);
    }
}

prop_compose! {
    /// Sorted, disjoint segments inside the data.
    fn sorted_segments()(
        parts in prop::collection::vec((0..1000_u64, 1..500_u64, 8..500_u64, any::<bool>()), 0..50)
    ) -> Vec<SegmentMapping> {
        let mut at = 0;
        parts.into_iter().map(|(gap, sectors, mapped_sector, zeroed)| {
            let start_sector = at + gap;
            at = start_sector + sectors;
            SegmentMapping { start_sector, sectors, mapped_sector, zeroed, tag: 0 }
        }).collect()
    }
}

proptest! {
    #[test]
    fn an_index_survives_a_round_trip(segments in sorted_segments()) {
        let bytes = encode_committed_index(&segments);
        prop_assert_eq!(parse_sealed_index(&bytes, 0, DATA_END).unwrap(), segments.clone());
        prop_assert_eq!(parse_writable_log(&bytes, 0, DATA_END).unwrap(), segments);
    }

    #[test]
    fn whatever_is_accepted_is_sorted_and_inside(
        // Few start and place bits, so that many inputs get past the first check.
        entries in prop::collection::vec((0..64_u64, 0..4_u64, 6..20_u64, any::<u8>()), 0..8),
        end in 8..24_u64,
    ) {
        let bytes: Vec<u8> = entries.iter().flat_map(|(start, sectors, mapped, top)| {
            let place = (start | sectors << 50).to_le_bytes();
            let mut mapped = mapped.to_le_bytes();
            mapped[6] = top & 0x80;
            mapped[7] = *top;
            [place, mapped].concat()
        }).collect();
        if let Ok(segments) = parse_sealed_index(&bytes, 0, end) {
            prop_assert!(segments.iter().all(|s| s.sectors > 0 && s.tag == 0));
            prop_assert!(segments.iter().all(|s| s.mapped_sector >= 8));
            prop_assert!(segments.iter().all(|s| s.mapped_end_sector() <= end));
            prop_assert!(segments.is_sorted_by(|a, b| a.end_sector() <= b.start_sector));
        }
    }

    #[test]
    fn no_bytes_make_a_parser_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        at in any::<u64>(),
        end in any::<u64>(),
    ) {
        let _ = parse_sealed_index(&bytes, at, end);
        let _ = parse_writable_log(&bytes, at, end);
    }

    #[test]
    fn a_sparse_file_maps_each_data_sector_once(
        cuts in prop::collection::btree_set(0..100_000_u64, 0..20), size in 0..150_u64,
    ) {
        let cuts: Vec<_> = cuts.into_iter().collect();
        let extents: Vec<_> = cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
        let segments = segments_of_sparse_file(&extents, size * 512).unwrap();
        for sector in 0..size {
            let bytes = 4096 + sector * 512..4096 + (sector + 1) * 512;
            let is_data = extents.iter().any(|e| e.start < bytes.end && bytes.start < e.end);
            let covers = |s: &&SegmentMapping| (s.start_sector..s.end_sector()).contains(&sector);
            let hits = segments.iter().filter(covers).count();
            prop_assert_eq!(hits, usize::from(is_data), "sector {}", sector);
        }
        prop_assert!(segments.iter().all(|s| s.end_sector() <= size));
        prop_assert!(segments.iter().all(|s| s.mapped_sector == s.start_sector + 8));
    }
}
