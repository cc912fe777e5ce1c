//! The threads: each takes a piece, reads it, waits for its turn to be placed, compresses it and
//! sees to it that what is next in order is written.
//!
//! One lock guards what passes between them: the cursor, whose turn it is, what waits to be
//! written, the first failure. It is held for arithmetic only. The layout is taken out of it by the
//! piece whose turn it is and put back for the next. A thread that would run too far ahead of what
//! is written waits, so that memory is bounded; the piece that everybody waits for never waits for
//! one behind it, so that the work always goes on.

use super::content::{Cursor, Feed, Piece};
use super::layout::{Cutter, Layout};
use super::options::{MakeOptions, Watch};
use super::sink::Sink;
use crate::error::{Error, Result};
use crate::format::zfile::{
    Encoder, REFERENCE_RECORD_BYTES_MAX, STRUCTURE_SEED, WriteOptions, crc32c_raw,
};
use crate::image::Scratch;
use crate::limits::{MAKE_TABLE_BYTES, MAKE_WAITING_PER_THREAD};
use crate::units::{to_u64, to_usize};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Why the work ended early.
#[derive(Debug)]
pub(super) enum Stop {
    /// It failed.
    Failed(Error),
    /// The reference could not read what came out.
    LongRecord,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// What decides where bytes lie; with the piece whose turn it is.
#[derive(Debug)]
pub(super) struct Placer {
    /// Of a layer. A file is cut as it is.
    pub(super) layout: Option<Layout>,
    pub(super) cutter: Cutter,
}

/// What the threads share, and where the result goes.
pub(super) struct Pipeline<'a> {
    pub(super) feed: Feed<'a>,
    pub(super) options: &'a MakeOptions,
    pub(super) watch: &'a Watch<'a>,
    pub(super) sink: &'a dyn Sink,
    /// What the sink is called.
    pub(super) name: &'a str,
    /// Where in the sink that begins which is not in a wrapper.
    pub(super) base_byte: u64,
    /// Where the part of a jump table waits for which there is no room in memory.
    pub(super) spill: Option<&'a File>,
}

/// A compressed piece: the first `len` bytes, and the lengths of the records as the table has them.
#[derive(Debug, Default)]
struct Encoded {
    bytes: Vec<u8>,
    len: usize,
    table: Vec<u8>,
}

/// The jump table so far.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) crc: u32,
    pub(super) blocks: u64,
    /// What is in memory, and how much of it went to the spill before.
    pub(super) bytes: Vec<u8>,
    pub(super) spilled: u64,
}

impl Table {
    fn add(&mut self, lengths: &[u8]) {
        self.crc = crc32c_raw(self.crc, lengths);
        self.blocks += to_u64(lengths.len() / 4);
        self.bytes.extend_from_slice(lengths);
    }
}

struct State<'a> {
    cursor: Cursor<'a>,
    /// The number of the next piece, of the one to be placed, and of the one to be written.
    next: u64,
    turn: u64,
    front: u64,
    placer: Option<Placer>,
    waiting: BTreeMap<u64, Encoded>,
    spare: Vec<Encoded>,
    /// Where the next record is written, from the base.
    at_byte: u64,
    table: Table,
    stop: Option<Stop>,
}

/// What is left when all pieces are written.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) placer: Placer,
    pub(super) table: Table,
    pub(super) at_byte: u64,
}

struct Shared<'a> {
    state: Mutex<State<'a>>,
    changed: Condvar,
}

impl<'a> Shared<'a> {
    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        // Whoever panicked told the others to stop; nothing here is half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'g>(&self, state: MutexGuard<'g, State<'a>>) -> MutexGuard<'g, State<'a>> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self, stop: Stop) {
        let mut state = self.lock();
        // The one that begins again wins: what else went wrong may go right then.
        if state.stop.is_none() || matches!(stop, Stop::LongRecord) {
            state.stop = Some(stop);
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// Ends the others when its thread panics: they would wait for its piece for ever.
struct Alarm<'s, 'a>(&'s Shared<'a>);

impl Drop for Alarm<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop(Stop::Failed(Error::new(crate::error::ErrorKind::Io, "a thread panicked")));
        }
    }
}

impl Pipeline<'_> {
    /// Makes everything that is made of pieces; `at_byte` is where the first record goes.
    pub(super) fn run(&self, placer: Placer, at_byte: u64) -> Result<Written, Stop> {
        let is_relaxed = placer.layout.as_ref().is_some_and(Layout::is_relaxed);
        let table = Table { crc: STRUCTURE_SEED, blocks: 0, bytes: Vec::new(), spilled: 0 };
        let state = State {
            cursor: self.feed.cursor(is_relaxed),
            next: 0,
            turn: 0,
            front: 0,
            placer: Some(placer),
            waiting: BTreeMap::new(),
            spare: Vec::new(),
            at_byte,
            table,
            stop: None,
        };
        let shared = Shared { state: Mutex::new(state), changed: Condvar::new() };
        let threads = self.options.thread_count();
        let work = || {
            let _alarm = Alarm(&shared);
            if let Err(stop) = self.work(&shared, threads) {
                shared.stop(stop);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // This thread does all of it alone if there can be no other.
                if std::thread::Builder::new().spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
        let state = shared.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        match (state.stop, state.placer) {
            (None, Some(placer)) => {
                Ok(Written { placer, table: state.table, at_byte: state.at_byte })
            }
            (Some(stop), _) => Err(stop),
            (None, None) => {
                let message = "the pieces ended without the layout";
                Err(Stop::Failed(Error::new(crate::error::ErrorKind::Io, message)))
            }
        }
    }

    fn work(&self, shared: &Shared<'_>, threads: usize) -> Result<(), Stop> {
        let mut scratch = self.feed.scratch()?;
        let mut encoder = self.options.zfile.as_ref().map(RecordEncoder::new).transpose()?;
        let mut piece = Piece::default();
        let ahead = to_u64(threads * MAKE_WAITING_PER_THREAD);
        while let Some(number) = take(shared, &mut piece, ahead) {
            self.watch.check()?;
            self.make(shared, number, &mut scratch, &mut piece, encoder.as_mut())?;
        }
        Ok(())
    }

    fn make(
        &self,
        shared: &Shared<'_>,
        number: u64,
        scratch: &mut Scratch,
        piece: &mut Piece,
        encoder: Option<&mut RecordEncoder>,
    ) -> Result<(), Stop> {
        let granule = self.options.zeros.granule_sectors();
        self.feed.read(scratch, piece, granule)?;
        let read = piece.len;
        let Some(mut placer) = await_turn(shared, number) else { return Ok(()) };
        if let Some(layout) = &mut placer.layout {
            layout.place(piece)?;
        }
        placer.cutter.cut(piece);
        pass_turn(shared, placer);
        let encoded = match encoder {
            Some(encoder) => {
                let mut encoded = shared.lock().spare.pop().unwrap_or_default();
                encoder.encode(piece, &mut encoded)?;
                encoded
            }
            None => {
                self.write(piece.at_byte, &piece.head)?;
                let body = piece.data.get(piece.body.clone()).unwrap_or_default();
                self.write(piece.at_byte + to_u64(piece.head.len()), body)?;
                Encoded::default()
            }
        };
        shared.lock().waiting.insert(number, encoded);
        self.drain(shared)?;
        self.watch.done.fetch_add(to_u64(read), Ordering::Relaxed);
        Ok(())
    }

    /// Writes what is next in order, as long as there is any.
    fn drain(&self, shared: &Shared<'_>) -> Result<()> {
        loop {
            let mut state = shared.lock();
            let front = state.front;
            let Some(encoded) = state.waiting.remove(&front) else { return Ok(()) };
            state.front += 1;
            let at_byte = state.at_byte;
            state.at_byte += to_u64(encoded.len);
            state.table.add(&encoded.table);
            let full = self.spill.filter(|_| state.table.bytes.len() >= MAKE_TABLE_BYTES);
            let table = full.map(|file| {
                let bytes = std::mem::take(&mut state.table.bytes);
                let at = state.table.spilled;
                state.table.spilled += to_u64(bytes.len());
                (file, at, bytes)
            });
            drop(state);
            shared.changed.notify_all();
            if let Some((file, at, bytes)) = table {
                file.write_all_at(&bytes, at).map_err(|error| {
                    Error::io(format!("keep the jump table of {}", self.name), &error)
                })?;
            }
            self.write(at_byte, encoded.bytes.get(..encoded.len).unwrap_or_default())?;
            shared.lock().spare.push(encoded);
        }
    }

    /// Writes behind the base.
    pub(super) fn write(&self, at_byte: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.write_raw(self.base_byte + at_byte, bytes)
    }

    /// Writes anywhere.
    pub(super) fn write_raw(&self, at_byte: u64, bytes: &[u8]) -> Result<()> {
        self.sink
            .write_at(at_byte, bytes)
            .map_err(|error| Error::io(format!("write {} at byte {at_byte}", self.name), &error))
    }

    /// Compresses and writes `bytes` behind everything: the last block may be short.
    pub(super) fn append(&self, written: &mut Written, bytes: &[u8]) -> Result<(), Stop> {
        let Some(options) = &self.options.zfile else {
            self.write(written.at_byte, bytes)?;
            written.at_byte += to_u64(bytes.len());
            return Ok(());
        };
        let mut encoder = RecordEncoder::new(options)?;
        let mut encoded = Encoded::default();
        for part in bytes.chunks(crate::limits::MAKE_PIECE_BYTES) {
            let whole = 0..part.len();
            let mut piece = Piece { data: part.to_vec(), body: whole, ..Piece::default() };
            encoder.encode(&mut piece, &mut encoded)?;
            let records = encoded.bytes.get(..encoded.len).unwrap_or_default();
            self.write(written.at_byte, records)?;
            written.at_byte += to_u64(encoded.len);
            written.table.add(&encoded.table);
        }
        Ok(())
    }
}

/// The number of the next piece, filled in; `None` when there is none, or somebody stopped.
fn take(shared: &Shared<'_>, piece: &mut Piece, ahead: u64) -> Option<u64> {
    let mut state = shared.lock();
    while state.stop.is_none() && state.next - state.front > ahead {
        state = shared.wait(state);
    }
    if state.stop.is_some() || !state.cursor.next(piece) {
        return None;
    }
    state.next += 1;
    Some(state.next - 1)
}

fn await_turn(shared: &Shared<'_>, number: u64) -> Option<Placer> {
    let mut state = shared.lock();
    loop {
        if state.stop.is_some() {
            return None;
        }
        if state.turn == number
            && let Some(placer) = state.placer.take()
        {
            return Some(placer);
        }
        state = shared.wait(state);
    }
}

fn pass_turn(shared: &Shared<'_>, placer: Placer) {
    let mut state = shared.lock();
    state.placer = Some(placer);
    state.turn += 1;
    drop(state);
    shared.changed.notify_all();
}

/// Turns the blocks of a piece into records.
struct RecordEncoder {
    encoder: Encoder,
    block_bytes: usize,
}

impl RecordEncoder {
    fn new(options: &WriteOptions) -> Result<Self> {
        let block_bytes = to_usize(u64::from(options.block_bytes)).unwrap_or(0).max(1);
        Ok(Self { encoder: Encoder::new(options)?, block_bytes })
    }

    fn encode(&mut self, piece: &mut Piece, encoded: &mut Encoded) -> Result<(), Stop> {
        let body = piece.data.get(piece.body.clone()).unwrap_or_default();
        let head = std::iter::once(piece.head.as_slice()).filter(|head| !head.is_empty());
        let blocks = head
            .flat_map(|head| head.chunks(self.block_bytes))
            .chain(body.chunks(self.block_bytes));
        let count =
            piece.head.len().div_ceil(self.block_bytes) + body.len().div_ceil(self.block_bytes);
        let most = count * self.encoder.record_bytes_max();
        if encoded.bytes.len() < most {
            encoded.bytes.resize(most, 0);
        }
        encoded.table.clear();
        encoded.len = 0;
        for block in blocks {
            let room = encoded.bytes.get_mut(encoded.len..).unwrap_or_default();
            let len = self.encoder.encode(block, room)?;
            if len > REFERENCE_RECORD_BYTES_MAX {
                return Err(Stop::LongRecord);
            }
            // Just compared with far less.
            let stored = u32::try_from(len).unwrap_or(u32::MAX);
            encoded.table.extend_from_slice(&stored.to_le_bytes());
            encoded.len += len;
        }
        Ok(())
    }
}
