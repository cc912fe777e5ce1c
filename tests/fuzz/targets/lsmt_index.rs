//! Strategy: any bytes as a sealed index, as the log of a pair, and as extents of a sparse file.
//! Invariant: a sealed index that parses is sorted, disjoint and inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::lsmt;

fuzz_target!(|data: &[u8]| {
    let (head, rest) = data.split_at(data.len().min(8));
    let mut number = [0; 8];
    number[..head.len()].copy_from_slice(head);
    let end_sector = u64::from_le_bytes(number);
    if let Ok(segments) = lsmt::parse_sealed_index(rest, 4096, end_sector) {
        assert!(segments.windows(2).all(|w| w[0].end_sector() <= w[1].start_sector));
        let inside = |s: &lsmt::SegmentMapping| s.zeroed || s.mapped_end_sector() <= end_sector;
        assert!(segments.iter().all(inside));
    }
    if let Ok(log) = lsmt::parse_writable_log(rest, 4096, end_sector) {
        assert!(log.iter().all(|s| s.sectors > 0));
    }
    // Extents of up to 256 MiB: whoever has petabytes of data has petabytes worth of entries.
    let words: Vec<u64> =
        rest.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap()) >> 36).collect();
    let extents: Vec<_> = words.chunks_exact(2).map(|w| w[0]..w[1]).collect();
    let _ = lsmt::segments_of_sparse_file(&extents, end_sector >> 43 << 9);
});
