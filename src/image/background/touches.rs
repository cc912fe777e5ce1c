//! What was touched first: which chunks of which layer, in their order, once each.
//!
//! Asked at every read of a layer, so a chunk that was touched before costs one look at a bit. The
//! same bits tell how much of what was read a trace had foretold.

use crate::format::trace::{Op, Record};
use crate::limits::{REPLAY_JUDGE_MIN, TOUCH_CHUNKS_MAX, TOUCH_RECORDS_MAX};
use crate::units::{to_u64, to_usize};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// The smallest chunk: half an extent of the cache, which may be compressed by half.
const CHUNK_SHIFT_MIN: u32 = 16;

/// The first touches of all layers of an image.
#[derive(Debug)]
pub(super) struct Touches {
    layers: Box<[Layer]>,
    learned: Mutex<Option<Vec<Record>>>,
    is_learning: AtomicBool,
    foretold: AtomicU64,
    others: AtomicU64,
}

#[derive(Debug)]
struct Layer {
    bytes: u64,
    chunk_shift: u32,
    touched: Bits,
    planned: Bits,
}

/// A bit for each chunk.
#[derive(Debug)]
struct Bits(Box<[AtomicU64]>);

impl Bits {
    fn new(count: u64) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    #[inline]
    fn word(&self, chunk: u64) -> Option<(&AtomicU64, u64)> {
        Some((self.0.get(to_usize(chunk / 64)?)?, 1 << (chunk % 64)))
    }

    #[inline]
    fn has(&self, chunk: u64) -> bool {
        self.word(chunk).is_none_or(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Whether it was not set before.
    fn set(&self, chunk: u64) -> bool {
        self.word(chunk).is_some_and(|(word, bit)| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }
}

impl Layer {
    fn new(bytes: u64) -> Self {
        let chunks = |shift: u32| bytes.div_ceil(1 << shift);
        let mut chunk_shift = CHUNK_SHIFT_MIN;
        while chunks(chunk_shift) > TOUCH_CHUNKS_MAX {
            chunk_shift += 1;
        }
        let count = chunks(chunk_shift);
        Self { bytes, chunk_shift, touched: Bits::new(count), planned: Bits::new(count) }
    }

    #[inline]
    fn chunks(&self, offset_bytes: u64, bytes: u64) -> RangeInclusive<u64> {
        let last = offset_bytes.saturating_add(bytes).min(self.bytes).saturating_sub(1);
        offset_bytes >> self.chunk_shift..=last >> self.chunk_shift
    }
}

impl Touches {
    /// For layers of so many bytes, unpacked.
    pub(super) fn new(layers: impl Iterator<Item = u64>) -> Self {
        Self {
            layers: layers.map(Layer::new).collect(),
            learned: Mutex::new(Some(Vec::new())),
            is_learning: AtomicBool::new(true),
            foretold: AtomicU64::new(0),
            others: AtomicU64::new(0),
        }
    }

    /// Takes note of a read.
    #[inline]
    pub(super) fn note(&self, layer_index: u16, offset_bytes: u64, bytes: u64) {
        let Some(layer) = self.layers.get(usize::from(layer_index)) else { return };
        for chunk in layer.chunks(offset_bytes, bytes) {
            if !layer.touched.has(chunk) {
                self.first_touch(layer_index, layer, chunk);
            }
        }
    }

    #[cold]
    fn first_touch(&self, layer_index: u16, layer: &Layer, chunk: u64) {
        if !layer.touched.set(chunk) {
            return;
        }
        let counter = if layer.planned.has(chunk) { &self.foretold } else { &self.others };
        counter.fetch_add(1, Ordering::Relaxed);
        if !self.is_learning.load(Ordering::Relaxed) {
            return;
        }
        let offset_bytes = chunk << layer.chunk_shift;
        let bytes = layer.bytes.saturating_sub(offset_bytes).min(1 << layer.chunk_shift);
        let layer_index = u32::from(layer_index);
        let record = Record { op: Op::Read, layer_index, bytes, offset_bytes };
        let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(records) = &mut *learned else { return };
        records.push(record);
        if records.len() >= TOUCH_RECORDS_MAX {
            self.is_learning.store(false, Ordering::Relaxed);
        }
    }

    /// What was learned; nothing more is. `None` when it was taken before.
    pub(super) fn take_learned(&self) -> Option<Vec<Record>> {
        self.is_learning.store(false, Ordering::Relaxed);
        self.learned.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Takes note that these bytes will be fetched because a trace names them.
    pub(super) fn plan(&self, record: &Record) {
        let layer = to_usize(u64::from(record.layer_index)).and_then(|at| self.layers.get(at));
        let Some(layer) = layer else { return };
        for chunk in layer.chunks(record.offset_bytes, record.bytes) {
            layer.planned.set(chunk);
        }
    }

    /// Whether a trace tells of another use of the image: most of what is touched it did not name.
    pub(super) fn is_trace_useless(&self) -> bool {
        let foretold = self.foretold.load(Ordering::Relaxed);
        let all = foretold.saturating_add(self.others.load(Ordering::Relaxed));
        all >= REPLAY_JUDGE_MIN && foretold.saturating_mul(4) < all
    }
}

/// Joins what lies side by side in the same layer and was touched in a row.
pub(super) fn join(records: &[Record], bytes_max: u64) -> Vec<Record> {
    let mut joined = Vec::with_capacity(records.len());
    records.iter().for_each(|record| push_joined(&mut joined, *record, bytes_max));
    debug_assert!(to_u64(joined.len()) <= to_u64(records.len()), "never more");
    joined
}

/// Adds a record, to the last one where it goes on there and both are not too long together.
pub(super) fn push_joined(joined: &mut Vec<Record>, record: Record, bytes_max: u64) {
    match joined.last_mut() {
        Some(last)
            if last.layer_index == record.layer_index
                && last.offset_bytes.saturating_add(last.bytes) == record.offset_bytes
                && last.bytes.saturating_add(record.bytes) <= bytes_max =>
        {
            last.bytes += record.bytes;
        }
        _ => joined.push(record),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 1 << CHUNK_SHIFT_MIN;

    fn record(layer_index: u32, offset_bytes: u64, bytes: u64) -> Record {
        Record { op: Op::Read, layer_index, bytes, offset_bytes }
    }

    #[test]
    fn each_chunk_is_noted_once_in_the_order_of_first_touches() {
        let touches = Touches::new([10 * CHUNK + 5, 100].into_iter());
        for (layer, offset, bytes) in
            [(0, 9 * CHUNK + 7, CHUNK), (1, 0, 1), (0, 100, 1), (0, 5, CHUNK), (0, 9 * CHUNK, 1)]
        {
            touches.note(layer, offset, bytes);
        }
        // No such layer, and nothing beyond its end.
        touches.note(2, 0, 1);
        touches.note(1, 100, 1);
        let expected = [
            record(0, 9 * CHUNK, CHUNK),
            record(0, 10 * CHUNK, 5),
            record(1, 0, 100),
            record(0, 0, CHUNK),
            record(0, CHUNK, CHUNK),
        ];
        assert_eq!(touches.take_learned().unwrap(), expected);
        assert_eq!(touches.take_learned(), None, "once");
    }

    #[test]
    fn memory_is_bounded_however_large_a_layer_says_it_is() {
        let layer = Layer::new(1 << 62);
        assert!(to_u64(layer.touched.0.len()) * 64 <= TOUCH_CHUNKS_MAX);
        let touches = Touches::new([1 << 62, 0].into_iter());
        touches.note(0, (1 << 62) - 1, u64::MAX);
        touches.note(1, 0, 5);
        touches.note(0, u64::MAX, 5);
        let learned = touches.take_learned().unwrap();
        assert_eq!(learned.len(), 1);
        let many = Touches::new([to_u64(TOUCH_RECORDS_MAX + 10) * CHUNK].into_iter());
        many.note(0, 0, u64::MAX / 2);
        assert_eq!(many.take_learned().unwrap().len(), TOUCH_RECORDS_MAX);
    }

    #[test]
    fn a_trace_that_foretold_less_than_a_quarter_is_useless() {
        let touches = Touches::new([10_000 * CHUNK].into_iter());
        touches.plan(&record(0, 0, REPLAY_JUDGE_MIN / 4 * CHUNK));
        touches.plan(&record(7, 0, 1));
        // Nothing that was foretold.
        touches.note(0, 5000 * CHUNK, (REPLAY_JUDGE_MIN - 1) * CHUNK);
        assert!(!touches.is_trace_useless(), "too early to say");
        touches.note(0, 9000 * CHUNK, 1);
        assert!(touches.is_trace_useless());
        touches.note(0, 0, REPLAY_JUDGE_MIN / 4 * CHUNK);
        assert!(touches.is_trace_useless(), "a fifth");
        touches.plan(&record(0, 8000 * CHUNK, 100 * CHUNK));
        touches.note(0, 8000 * CHUNK, 100 * CHUNK);
        assert!(!touches.is_trace_useless());
    }

    #[test]
    fn neighbours_are_joined_up_to_a_limit() {
        let records = [record(0, 0, 10), record(0, 10, 10), record(0, 20, 10), record(1, 30, 10)];
        assert_eq!(join(&records, 20), [record(0, 0, 20), record(0, 20, 10), record(1, 30, 10)]);
        assert_eq!(join(&[], 20), []);
    }
}
