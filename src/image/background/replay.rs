//! Fetching ahead what a trace names, in its order.
//!
//! A trace is a hint of somebody else: what it names beyond a layer's end is passed over, and when
//! most of what is read is not in it, it is of another use of the image and given up.

use super::Shared;
use super::stop::Stop;
use super::touches::push_joined;
use crate::format::trace::{Record, Trace};
use crate::image::payload::Payload;
use crate::limits::{
    BACKGROUND_YIELD_MS, REPLAY_FAILURES_MAX, REPLAY_PIECE_BYTES_MAX, REPLAY_PIECES_MAX,
};
use crate::source::{RemoteBlob, Source};
use crate::units::to_usize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long to wait between two looks at whether a read waits.
const YIELD_PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct Replay {
    shared: Arc<Shared>,
    payloads: Box<[Payload]>,
    records: Vec<Record>,
    next: AtomicUsize,
    failures: AtomicU32,
}

/// Begins a replay by so many threads, which end with it.
pub(super) fn begin(shared: &Arc<Shared>, payloads: &[Payload], trace: Trace, threads: usize) {
    let lengths: Vec<u64> = payloads.iter().map(Payload::bytes).collect();
    let records = pieces(&trace.records, &lengths);
    // Up to the largest file, while the pieces are few.
    drop(trace);
    records.iter().for_each(|record| shared.touches.plan(record));
    tracing::info!(records = records.len(), "fetching ahead what a trace names");
    let replay = Arc::new(Replay {
        shared: Arc::clone(shared),
        payloads: payloads.into(),
        records,
        next: AtomicUsize::new(0),
        failures: AtomicU32::new(0),
    });
    for _ in 0..threads {
        let replay = Arc::clone(&replay);
        let thread = std::thread::Builder::new().name("image-replay".to_owned());
        if let Err(error) = thread.spawn(move || replay.run()) {
            tracing::warn!(%error, "no thread for the replay of a trace");
            return;
        }
    }
}

/// What the records name of layers of these lengths, joined and cut so that no piece takes long.
fn pieces(records: &[Record], lengths: &[u64]) -> Vec<Record> {
    let mut pieces = Vec::new();
    for record in records {
        let layer = to_usize(u64::from(record.layer_index)).and_then(|at| lengths.get(at));
        let Some(&layer_bytes) = layer else { continue };
        // What a record says may be more than any layer has.
        let end = record.offset_bytes.saturating_add(record.bytes).min(layer_bytes);
        let mut offset_bytes = record.offset_bytes;
        while offset_bytes < end {
            let bytes = REPLAY_PIECE_BYTES_MAX.min(end - offset_bytes);
            push_joined(
                &mut pieces,
                Record { offset_bytes, bytes, ..*record },
                REPLAY_PIECE_BYTES_MAX,
            );
            if pieces.len() > REPLAY_PIECES_MAX {
                pieces.pop();
                tracing::info!(
                    pieces = pieces.len(),
                    "a long trace: the rest is not fetched ahead"
                );
                return pieces;
            }
            offset_bytes += bytes;
        }
    }
    pieces
}

impl Replay {
    fn run(&self) {
        loop {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(record) = self.records.get(at) else { return };
            if self.shared.stop.is_set()
                || self.failures.load(Ordering::Relaxed) >= REPLAY_FAILURES_MAX
            {
                return;
            }
            if self.shared.touches.is_trace_useless() {
                // Told by the one who finds it, and the others find nothing more.
                if self.next.swap(usize::MAX / 2, Ordering::Relaxed) < self.records.len() {
                    tracing::info!("most of what is read is not in the trace: given up");
                }
                return;
            }
            self.fetch(record);
        }
    }

    fn fetch(&self, record: &Record) {
        let layer = to_usize(u64::from(record.layer_index));
        let Some(payload) = layer.and_then(|layer| self.payloads.get(layer)) else { return };
        let Source::Remote(blob) = payload.source() else { return };
        let bytes = payload.bytes().saturating_sub(record.offset_bytes).min(record.bytes);
        let Some(stored) = payload.blob_range(record.offset_bytes, bytes) else { return };
        if blob.is_here(stored.start, stored.end - stored.start) {
            return;
        }
        let_reads_pass(&**blob, &self.shared.stop);
        if let Err(error) = blob.fetch_ahead(stored) {
            let error = format!("{error:#}");
            tracing::debug!(error, "what a trace names cannot be fetched");
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Waits while reads wait for bytes, for a while: where they always do, the background goes on
/// slowly.
pub(super) fn let_reads_pass(blob: &dyn RemoteBlob, stop: &Stop) {
    let until = Instant::now() + Duration::from_millis(BACKGROUND_YIELD_MS);
    while blob.is_busy() && Instant::now() < until && !stop.is_set() {
        std::thread::sleep(YIELD_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::trace::Op;

    #[test]
    fn records_are_joined_and_cut_into_pieces() {
        let record =
            |offset_bytes, bytes| Record { op: Op::Read, layer_index: 3, bytes, offset_bytes };
        let most = REPLAY_PIECE_BYTES_MAX;
        let records = [record(0, 100), record(100, 28), record(1 << 40, 2 * most + 1)];
        let lengths = [0, 0, 0, 1 << 50];
        let expected = [
            record(0, 128),
            record(1 << 40, most),
            record((1 << 40) + most, most),
            record((1 << 40) + 2 * most, 1),
        ];
        assert_eq!(pieces(&records, &lengths), expected);
        // Of a layer that ends earlier, of one without bytes, of one that is not there.
        assert_eq!(pieces(&records, &[0, 0, 0, 110]), [record(0, 110)]);
        assert_eq!(pieces(&records, &[1 << 50, 0, 0, 0]), []);
        assert_eq!(pieces(&records, &[1 << 50]), []);
    }

    #[test]
    fn the_pieces_are_few_however_much_the_records_say() {
        let all = Record { op: Op::Read, layer_index: 0, bytes: 1 << 62, offset_bytes: 0 };
        let records = vec![all; 20_000];
        // A layer of three pieces: each record has those, and no more than the limit together.
        let length = 2 * REPLAY_PIECE_BYTES_MAX + 5;
        let found = pieces(&records, &[length]);
        assert_eq!(found.len(), 60_000.min(REPLAY_PIECES_MAX));
        assert_eq!(found[2], Record { offset_bytes: length - 5, bytes: 5, ..all });
        // One that is as long as it says.
        let found = pieces(&records, &[1 << 62]);
        assert_eq!(found.len(), REPLAY_PIECES_MAX);
        let apart = |n: u64| Record { bytes: 1, offset_bytes: 2 * n, ..all };
        let many: Vec<_> = (0..crate::units::to_u64(REPLAY_PIECES_MAX) + 10).map(apart).collect();
        assert_eq!(pieces(&many, &[1 << 62]), many[..REPLAY_PIECES_MAX]);
    }
}
