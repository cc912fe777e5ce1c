//! A random workload on a recorded pair, and what each sector may hold at any moment of it.

// Each test uses a part of it.
#![allow(dead_code)]

use crate::recorder::{Meanwhile, Op, Random, RecordedFile, RecordedFolder, Shared, World, lock};
use obd_ublk::error::Result;
use obd_ublk::format::lsmt::{Flags, HEADER_BYTES, Header, SegmentMapping, UuidText};
use obd_ublk::source::{FileIdentity, SharedMemory};
use obd_ublk::upper::{Journal, Pair, PairOptions, PairWorker, Parts};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

pub(crate) const DISK_SECTORS: u64 = 24;
const OPS_MAX: u64 = 200;
/// Small, so that writers meet a full one.
const JOURNAL_ENTRIES: u32 = 16;

/// What a sector holds: a stamp, or what lies below.
pub(crate) type Stamp = Option<u64>;

/// Memory for a journal, with these words.
pub(crate) fn memory_of(words: Option<&[u64]>) -> SharedMemory {
    let memory = SharedMemory::private(Journal::words(JOURNAL_ENTRIES));
    for (word, value) in memory.words().iter().zip(words.unwrap_or_default()) {
        word.store(*value, Ordering::Release);
    }
    memory
}

/// Opens the pair of a world, in the boot with this number.
pub(crate) fn open_image(world: &Shared, memory: SharedMemory, boot_id: u128) -> Result<Arc<Pair>> {
    let index = lock(world).index;
    let file = |file| Box::new(RecordedFile { world: Arc::clone(world), file });
    let parts = Parts {
        name: "image".to_owned(),
        data: file(0),
        index: file(index),
        folder: Box::new(RecordedFolder(Arc::clone(world))),
        journal: Journal::in_memory(memory, JOURNAL_ENTRIES),
        file: FileIdentity { device_number: 1, inode: 2 },
        boot_id,
    };
    let options = PairOptions { rewrite_entries_min: 96, ..PairOptions::default() };
    Pair::open_parts(parts, &options)
}

/// The stamps of all sectors.
pub(crate) fn content_of(worker: &mut PairWorker) -> Vec<Stamp> {
    let mut bytes = vec![0; usize::try_from(DISK_SECTORS * 512).unwrap()];
    let below = |_, gap: &mut [u8]| {
        gap.fill(0xbb);
        Ok(())
    };
    worker.read(0, &mut bytes, below).expect("a disk that was opened can be read");
    let stamp = |sector: &[u8]| {
        let first = u64::from_le_bytes(*sector.first_chunk().unwrap());
        let whole = sector.chunks(8).all(|word| word == first.to_le_bytes());
        if !whole {
            return Some(u64::MAX);
        }
        (first != 0xbbbb_bbbb_bbbb_bbbb).then_some(first)
    };
    bytes.chunks(512).map(stamp).collect()
}

/// A value that a sector had: from which operation on it may be there, and from which on it was
/// acknowledged.
#[derive(Clone, Copy, Debug)]
struct Value {
    stamp: Stamp,
    issued: usize,
    acknowledged: usize,
}

/// What happened.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) first: (Vec<u8>, Vec<u8>),
    pub(crate) ops: Vec<Op>,
    /// The journal in front of each operation.
    pub(crate) journals: Vec<Vec<u64>>,
    history: Vec<Vec<Value>>,
    /// Sizes in sectors: from which operation on it may be there, and from which on it must.
    sizes: Vec<(u64, usize, usize)>,
    /// When a flush returned, and how many values each sector had when it began.
    flushes: Vec<(usize, Vec<usize>)>,
}

impl Run {
    /// What `sector` may hold after a power cut behind so many operations.
    pub(crate) fn durable_values(&self, sector: usize, ops: usize) -> Vec<Stamp> {
        let flushed = self.flushes.iter().rev().find(|(ended, _)| *ended <= ops);
        let from = flushed.map_or(0, |(_, counts)| counts[sector] - 1);
        self.values(sector, from, ops)
    }

    /// What `sector` may hold when the process was killed after so many operations.
    pub(crate) fn acknowledged_values(&self, sector: usize, ops: usize) -> Vec<Stamp> {
        let values = &self.history[sector];
        let known = values.iter().rposition(|value| value.acknowledged <= ops).unwrap();
        self.values(sector, known, ops)
    }

    /// What size the disk may have after a power cut behind so many operations.
    pub(crate) fn sizes(&self, ops: usize) -> Vec<u64> {
        let known = self.sizes.iter().rposition(|(_, _, ended)| *ended <= ops).unwrap();
        let possible = self.sizes[known..].iter().filter(|(_, begun, _)| *begun <= ops);
        possible.map(|(sectors, ..)| *sectors).collect()
    }

    fn values(&self, sector: usize, from: usize, ops: usize) -> Vec<Stamp> {
        let values = self.history[sector][from..].iter();
        values.filter(|value| value.issued <= ops).map(|value| value.stamp).collect()
    }
}

/// A pair without entries.
pub(crate) fn files_of_a_new_pair() -> (Vec<u8>, Vec<u8>) {
    let uuid = UuidText::from_text("5A5C4689-0000-0000-0000-000000000001").unwrap();
    let flags = Flags::HEADER.with(Flags::DATA_FILE);
    let header = Header::new(flags, DISK_SECTORS * 512, uuid, UuidText::NIL);
    let index_header =
        Header { flags: Flags::HEADER, index_offset_bytes: HEADER_BYTES, ..header.clone() };
    (header.encode(), index_header.encode())
}

/// A pair without entries, or one that the reference has written.
fn first_files(random: &mut Random, history: &mut [Vec<Value>]) -> (Vec<u8>, Vec<u8>) {
    let (mut data, mut index) = files_of_a_new_pair();
    if random.one_in(2) {
        return (data, index);
    }
    for number in 0..random.below(70) {
        let start_sector = random.below(DISK_SECTORS);
        let zeroed = random.one_in(4);
        let mapped_sector = u64::try_from(data.len() / 512).unwrap();
        let segment = SegmentMapping { start_sector, sectors: 1, mapped_sector, zeroed, tag: 0 };
        index.extend_from_slice(&segment.encode());
        let stamp = if zeroed { 0 } else { 1 << 40 | number };
        if !zeroed {
            data.extend_from_slice(&stamp.to_le_bytes().repeat(64));
        }
        let values = &mut history[usize::try_from(start_sector).unwrap()];
        *values = vec![Value { stamp: Some(stamp), issued: 0, acknowledged: 0 }];
    }
    // Torn, or grown before its bytes arrived.
    let torn = random.index(40);
    let entries = (index.len() + torn) / 16 * 16;
    index.resize(entries.max(index.len()), 0);
    index.resize(index.len() + random.index(16), 0x11);
    (data, index)
}

/// A write, or zeros, with what its sectors hold then.
#[derive(Clone)]
struct Change {
    sectors: Range<u64>,
    stamps: Vec<u64>,
    zero: bool,
}

impl Change {
    fn make(&self, worker: &mut PairWorker) {
        if self.zero {
            worker.zero(self.sectors.clone()).unwrap();
        } else {
            let bytes = self.stamps.iter().flat_map(|stamp| stamp.to_le_bytes().repeat(64));
            worker.write(self.sectors.start, &bytes.collect::<Vec<_>>()).unwrap();
        }
    }
}

struct Stage {
    world: Shared,
    memory: SharedMemory,
    /// Both are there but for the moment of a compaction.
    pair: Option<Arc<Pair>>,
    worker: Option<PairWorker>,
    history: Vec<Vec<Value>>,
    flushes: Vec<(usize, Vec<usize>)>,
    sizes: Vec<(u64, usize, usize)>,
    next_stamp: u64,
}

impl Stage {
    fn done(&self) -> usize {
        lock(&self.world).ops.len()
    }

    fn plan(&mut self, random: &mut Random, zero: bool) -> Change {
        let start = random.below(DISK_SECTORS);
        let sectors = start..(start + 1 + random.below(8)).min(DISK_SECTORS);
        let first = self.next_stamp;
        self.next_stamp += sectors.end - sectors.start;
        let stamps = (first..self.next_stamp).map(|stamp| if zero { 0 } else { stamp }).collect();
        Change { sectors, stamps, zero }
    }

    /// Notes a change that was made between two operations.
    fn note(&mut self, change: &Change, issued: usize, acknowledged: usize) {
        for (sector, stamp) in change.sectors.clone().zip(&change.stamps) {
            let value = Value { stamp: Some(*stamp), issued, acknowledged };
            self.history[usize::try_from(sector).unwrap()].push(value);
        }
    }

    fn change(&mut self, random: &mut Random, zero: bool) {
        let change = self.plan(random, zero);
        let issued = self.done();
        change.make(self.worker.as_mut().unwrap());
        self.note(&change, issued, self.done());
    }

    /// A flush, and changes that others make after its entries were taken.
    fn flush_amid_changes(&mut self, random: &mut Random) {
        let counts = self.history.iter().map(Vec::len).collect();
        let mut changes = Vec::new();
        for _ in 0..=random.below(3) {
            let zero = random.one_in(4);
            changes.push(self.plan(random, zero));
        }
        let pair = Arc::clone(self.pair.as_ref().unwrap());
        let made = Arc::new(Mutex::new(Vec::new()));
        let act = {
            let (pair, made) = (Arc::clone(&pair), Arc::clone(&made));
            let (world, changes) = (Arc::clone(&self.world), changes.clone());
            move || {
                let mut worker = pair.worker();
                for change in &changes {
                    // One more would wait for the flush that waits here.
                    if pair.usage().unflushed_entries == u64::from(JOURNAL_ENTRIES) {
                        break;
                    }
                    let issued = lock(&world).ops.len();
                    change.make(&mut worker);
                    made.lock().unwrap().push((issued, lock(&world).ops.len()));
                }
            }
        };
        let of_data = random.one_in(2);
        lock(&self.world).meanwhile = Some(Meanwhile { of_data, act: Box::new(act) });
        pair.flush().unwrap();
        self.flushes.push((self.done(), counts));
        // Still there when there was nothing to flush.
        lock(&self.world).meanwhile = None;
        let made = std::mem::take(&mut *made.lock().unwrap());
        for (change, (issued, acknowledged)) in changes.iter().zip(made) {
            self.note(change, issued, acknowledged);
        }
    }

    fn flush(&mut self, flush: impl FnOnce(&Pair) -> Result<()>) {
        let counts = self.history.iter().map(Vec::len).collect();
        flush(self.pair.as_ref().unwrap()).unwrap();
        self.flushes.push((self.done(), counts));
    }

    /// Opens the pair anew: closed, or killed with its journal kept.
    fn reopen(&mut self, clean: bool) {
        if clean {
            self.flush(Pair::close);
        }
        self.open();
    }

    fn open(&mut self) {
        let pair = open_image(&self.world, self.memory.clone(), 1).unwrap();
        self.worker = Some(pair.worker());
        self.pair = Some(pair);
    }

    fn resize(&mut self) {
        self.worker = None;
        let counts = self.history.iter().map(Vec::len).collect();
        let pair = self.pair.take().unwrap();
        let sectors = pair.virtual_sectors() + 8;
        let begun = self.done();
        pair.resize(sectors * 512).unwrap();
        self.sizes.push((sectors, begun, self.done()));
        self.flushes.push((self.done(), counts));
        self.open();
    }

    /// The same while the pair is served, which it goes on to be.
    fn grow(&mut self) {
        let counts = self.history.iter().map(Vec::len).collect();
        let pair = self.pair.as_ref().unwrap();
        let (sectors, begun) = (pair.virtual_sectors() + 8, self.done());
        pair.grow(sectors * 512).unwrap();
        self.sizes.push((sectors, begun, self.done()));
        self.flushes.push((self.done(), counts));
    }

    fn compact(&mut self) {
        self.worker = None;
        let counts = self.history.iter().map(Vec::len).collect();
        self.pair.take().unwrap().compact().unwrap();
        self.flushes.push((self.done(), counts));
        self.open();
    }
}

/// One workload.
pub(crate) fn run(seed: u64) -> Run {
    let mut random = Random(seed);
    let below = Value { stamp: None, issued: 0, acknowledged: 0 };
    let mut history = vec![vec![below]; usize::try_from(DISK_SECTORS).unwrap()];
    let first = first_files(&mut random, &mut history);
    let world = World::of(first.0.clone(), first.1.clone());
    let memory = memory_of(None);
    lock(&world).journal = Some(memory.clone());
    let pair = open_image(&world, memory.clone(), 1).unwrap();
    let worker = Some(pair.worker());
    let pair = Some(pair);
    let mut stage = Stage {
        world,
        memory,
        pair,
        worker,
        history,
        flushes: Vec::new(),
        sizes: vec![(DISK_SECTORS, 0, 0)],
        next_stamp: 1 << 48,
    };
    for _ in 0..=random.below(OPS_MAX) {
        match random.below(26) {
            0..=13 => stage.change(&mut random, false),
            14..=17 => stage.change(&mut random, true),
            18..=20 => stage.flush(Pair::flush),
            21 => stage.flush_amid_changes(&mut random),
            22 => stage.reopen(true),
            23 => stage.compact(),
            24 if random.index(2) == 0 => stage.grow(),
            24 => stage.resize(),
            _ => stage.reopen(false),
        }
    }
    let mut world = lock(&stage.world);
    Run {
        first,
        ops: std::mem::take(&mut world.ops),
        journals: std::mem::take(&mut world.journals),
        history: stage.history,
        sizes: stage.sizes,
        flushes: stage.flushes,
    }
}
