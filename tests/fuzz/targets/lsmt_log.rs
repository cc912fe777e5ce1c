//! Strategy: a log of pieces, raw bytes as well as batches with the right checksum, so that the
//! fuzzer gets past them; then single bytes are changed, and it is scanned as a whole and in two.
//! Invariant: both say the same, nothing that counts points outside the data file or lies behind
//! the end, and the log up to its end says the same again: what is cut off has no part in it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::lsmt::{HEADER_BYTES, LogScan, LogScanner, MarkKind, encode_batch};

fn scan(log: &[u8], data_end_sector: u64, cut: usize) -> Result<LogScan, String> {
    let mut scanner = LogScanner::new(data_end_sector);
    let (front, back) = log.split_at(cut);
    let pushed = scanner
        .push(front, HEADER_BYTES)
        .and_then(|()| scanner.push(back, HEADER_BYTES + cut as u64));
    pushed.map(|()| scanner.finish()).map_err(|error| error.to_string())
}

/// The pieces that `program` says: a byte of kind, one of length in entries, and the entries.
fn log_of(mut program: &[u8]) -> Vec<u8> {
    let mut log: Vec<u8> = Vec::new();
    while let [kind, entries, rest @ ..] = program {
        let len = (usize::from(*entries) * 16).min(rest.len() / 16 * 16);
        let (entries, later) = rest.split_at(len);
        program = later;
        if kind % 5 == 0 {
            log.extend_from_slice(entries);
            continue;
        }
        // A batch begins on a sector.
        log.resize(log.len().next_multiple_of(512), 0);
        let at_byte = HEADER_BYTES + log.len() as u64;
        match kind % 5 {
            1 => log.extend(encode_batch(&[], at_byte, MarkKind::Open)),
            2 => log.extend(encode_batch(&[], at_byte, MarkKind::Closed)),
            3 => log.extend(encode_batch(entries, at_byte, MarkKind::Batch)),
            _ => {
                let batch = encode_batch(entries, at_byte, MarkKind::Batch);
                log.extend_from_slice(&batch[..batch.len() / 2]);
            }
        }
    }
    log
}

fuzz_target!(|data: &[u8]| {
    let [end_low, end_high, edits, rest @ ..] = data else { return };
    let data_end_sector = u64::from(u16::from_le_bytes([*end_low, *end_high])) << 4;
    let edits_len = (usize::from(*edits % 8) * 4).min(rest.len());
    let (edits, program) = rest.split_at(edits_len);
    let mut log = log_of(program);
    for edit in edits.chunks_exact(4) {
        let at =
            usize::from(u16::from_le_bytes([edit[0], edit[1]])) << 4 | usize::from(edit[2] & 15);
        if let Some(byte) = log.get_mut(at) {
            *byte = edit[3];
        }
    }
    let whole = scan(&log, data_end_sector, 0);
    let cut = (log.len() / 512 / 2) * 512;
    assert_eq!(whole, scan(&log, data_end_sector, cut));
    let Ok(found) = whole else { return };
    assert!((HEADER_BYTES..=HEADER_BYTES + log.len() as u64).contains(&found.end_byte));
    assert_eq!(found.slots, (found.end_byte - HEADER_BYTES) / 16);
    assert!(found.segments.len() as u64 <= found.slots);
    for segment in &found.segments {
        assert!(segment.sectors > 0);
        assert!(segment.zeroed || segment.mapped_end_sector() <= data_end_sector);
    }
    let kept = &log[..(found.end_byte - HEADER_BYTES) as usize];
    assert_eq!(Ok(found), scan(kept, data_end_sector, 0));
});
