//! Batches as they are written, torn and taken for what they are not.

use super::*;
use proptest::prelude::*;

const DATA_END: u64 = 1 << 20;

fn segment(start_sector: u64) -> SegmentMapping {
    SegmentMapping { start_sector, sectors: 8, mapped_sector: 8, zeroed: false, tag: 0 }
}

fn entries(starts: std::ops::Range<u64>) -> Vec<u8> {
    starts.flat_map(|start| segment(start).encode()).collect()
}

fn scan(log: &[u8]) -> Result<LogScan> {
    let mut scanner = LogScanner::new(DATA_END);
    scanner.push(log, HEADER_BYTES)?;
    Ok(scanner.finish())
}

fn append(log: &mut Vec<u8>, entries: &[u8], kind: MarkKind) {
    let at_byte = HEADER_BYTES + to_u64(log.len());
    log.extend_from_slice(&encode_batch(entries, at_byte, kind));
}

fn starts(scan: &LogScan) -> Vec<u64> {
    scan.segments.iter().map(|segment| segment.start_sector).collect()
}

#[test]
fn the_bytes_of_a_mark_are_those_of_the_specification() {
    let batch = encode_batch(&segment(1).encode(), HEADER_BYTES, MarkKind::Batch);
    assert_eq!(batch.len(), SECTOR);
    assert_eq!(batch[16..32], SegmentMapping::PADDING);
    let mark = &batch[MARK_AT..];
    assert_eq!(mark[..8], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x07, 0x00]);
    assert_eq!(mark[8..12], MARK_VECTOR_CRC);
    assert_eq!(mark[12..], [0x62, 0x4d, 0x6b, 2]);
    assert_eq!(SegmentMapping::decode(mark.first_chunk().unwrap()), None, "the reference skips it");
}

/// Worked out by hand: CRC-32C of the place, the 31 slots in front and the mark without its sum.
const MARK_VECTOR_CRC: [u8; 4] = [0x77, 0x14, 0xf6, 0xac];

#[test]
fn entries_of_the_reference_count_up_to_a_torn_one() {
    let mut log = entries(0..40);
    log.extend_from_slice(&[0; 16]);
    log.extend_from_slice(&entries(40..41)[..9]);
    let found = scan(&log).unwrap();
    assert_eq!(starts(&found), (0..40).collect::<Vec<_>>());
    assert_eq!((found.owner, found.end_byte), (LogOwner::Reference, HEADER_BYTES + 41 * 16));
    assert!(found.has_blanks);
}

#[test]
fn a_batch_counts_when_its_mark_is_there_and_not_before() {
    let mut log = Vec::new();
    append(&mut log, &[], MarkKind::Open);
    append(&mut log, &entries(0..31), MarkKind::Batch);
    let whole = log.len();
    append(&mut log, &entries(50..100), MarkKind::Batch);
    assert_eq!(starts(&scan(&log).unwrap()).len(), 81);
    for cut in whole..log.len() {
        let found = scan(&log[..cut]).unwrap();
        assert_eq!(starts(&found), (0..31).collect::<Vec<_>>(), "cut at {cut}");
        assert_eq!((found.owner, found.end_byte), (LogOwner::Ours, HEADER_BYTES + to_u64(whole)));
    }
}

#[test]
fn what_the_reference_appends_to_a_closed_log_counts() {
    let mut log = Vec::new();
    append(&mut log, &[], MarkKind::Open);
    append(&mut log, &entries(0..2), MarkKind::Batch);
    append(&mut log, &[], MarkKind::Closed);
    log.extend_from_slice(&entries(7..8));
    let found = scan(&log).unwrap();
    assert_eq!((starts(&found), found.owner), (vec![0, 1, 7], LogOwner::Reference));
    log.resize(log.len().next_multiple_of(SECTOR), 0);
    append(&mut log, &[], MarkKind::Open);
    append(&mut log, &entries(9..10), MarkKind::Batch);
    log.extend_from_slice(&entries(11..12));
    let found = scan(&log).unwrap();
    assert_eq!((starts(&found), found.owner), (vec![0, 1, 7, 9], LogOwner::Ours));
}

#[test]
fn a_batch_at_another_place_is_none() {
    let mut log = Vec::new();
    append(&mut log, &[], MarkKind::Open);
    let moved = encode_batch(&entries(0..1), HEADER_BYTES + 5 * SECTOR_SIZE, MarkKind::Batch);
    log.extend_from_slice(&moved);
    assert!(starts(&scan(&log).unwrap()).is_empty());
}

#[test]
fn a_tail_longer_than_a_batch_is_refused() {
    let mut log = Vec::new();
    append(&mut log, &[], MarkKind::Open);
    let most = usize::try_from(LOG_BATCH_SECTORS_MAX).unwrap() * SECTOR;
    log.extend_from_slice(&entries(0..1).repeat(most / 16));
    assert!(starts(&scan(&log).unwrap()).is_empty());
    log.resize(log.len() + SECTOR, 0);
    assert_eq!(scan(&log).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn an_entry_that_points_outside_is_refused_where_it_counts() {
    let outside = SegmentMapping { mapped_sector: DATA_END, ..segment(0) }.encode();
    assert_eq!(scan(&outside).unwrap_err().kind(), ErrorKind::Corrupt);
    let mut log = Vec::new();
    append(&mut log, &[], MarkKind::Open);
    let before = log.len();
    append(&mut log, &outside, MarkKind::Batch);
    assert_eq!(scan(&log).unwrap_err().kind(), ErrorKind::Corrupt);
    log.truncate(before);
    log.extend_from_slice(&outside.repeat(40));
    assert!(starts(&scan(&log).unwrap()).is_empty(), "a torn batch may say anything");
}

proptest! {
    #[test]
    fn a_damaged_batch_drops_itself_and_nothing_in_front(
        sizes in prop::collection::vec(0_u64..70, 1..5),
        at in any::<prop::sample::Index>(),
        bit in 0_u8..8,
    ) {
        let mut log = Vec::new();
        append(&mut log, &[], MarkKind::Open);
        let mut before = 0;
        let mut whole = Vec::new();
        for size in sizes {
            before = log.len();
            whole = starts(&scan(&log).unwrap());
            append(&mut log, &entries(0..size), MarkKind::Batch);
        }
        let at = before + at.index(log.len() - before);
        log[at] ^= 1 << bit;
        let found = scan(&log).unwrap();
        prop_assert_eq!(starts(&found), whole);
        prop_assert_eq!(found.end_byte, HEADER_BYTES + to_u64(before));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let _ = scan(&bytes);
    }
}
