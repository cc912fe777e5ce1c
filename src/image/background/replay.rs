//! Fetching ahead what a trace names, in its order.
//!
//! A trace is a hint of somebody else: what it names beyond a layer's end is passed over, and when
//! most of what is read is not in it, it is of another use of the image and given up.

use super::Shared;
use super::stop::Stop;
use super::touches::join;
use crate::format::trace::{Record, Trace};
use crate::image::payload::Payload;
use crate::limits::{BACKGROUND_YIELD_MS, REPLAY_FAILURES_MAX, REPLAY_PIECE_BYTES_MAX};
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
    let records = pieces(&trace.records);
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

/// The records, joined and cut so that none takes long.
fn pieces(records: &[Record]) -> Vec<Record> {
    let step = to_usize(REPLAY_PIECE_BYTES_MAX).unwrap_or(usize::MAX);
    let mut pieces = Vec::with_capacity(records.len());
    for record in join(records, REPLAY_PIECE_BYTES_MAX) {
        if record.bytes <= REPLAY_PIECE_BYTES_MAX {
            pieces.push(record);
            continue;
        }
        let end = record.offset_bytes.saturating_add(record.bytes);
        // What one record can say is more than any layer has.
        for offset_bytes in (record.offset_bytes..end).step_by(step).take(records.len().max(4096)) {
            let bytes = REPLAY_PIECE_BYTES_MAX.min(end - offset_bytes);
            pieces.push(Record { offset_bytes, bytes, ..record });
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
        let expected = [
            record(0, 128),
            record(1 << 40, most),
            record((1 << 40) + most, most),
            record((1 << 40) + 2 * most, 1),
        ];
        assert_eq!(pieces(&records), expected);
        // Nothing that a record says takes memory without end.
        assert_eq!(pieces(&[record(0, 1 << 62)]).len(), 4096);
    }
}
