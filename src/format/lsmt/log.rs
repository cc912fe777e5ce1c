//! The log of a writable pair in batches: what makes a torn tail visible in a format that has no
//! checksum, and stays readable for the reference.
//!
//! ```text
//!   index file  | header 4096 | the reference's entries ... | open | batch | batch | closed | ...
//!   one batch   | entries 16 B each | padding | mark 16 B |   whole sectors, on a sector boundary
//! ```
//!
//! A mark is an entry whose start sector says "padding", so the reference skips it; its other
//! fields carry a checksum, the batch's length and a kind. `upper` writes a batch with every flush
//! and scans the log at open; `image` scans it for a read-only view. The scan knows two owners of
//! what comes next. Behind `open` and `batch` the log is ours: only whole batches count, and what
//! lies behind the last is what a power cut left of one. Behind `closed`, or where no mark is, it
//! is the reference's: every entry counts as it stands, until an `open` mark.

use super::header::HEADER_BYTES;
use super::index::{check_log_entries, check_segment};
use super::segment::SegmentMapping;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::LOG_BATCH_SECTORS_MAX;
use crate::units::{SECTOR_SIZE, to_u64, whole_sectors};

/// Entries in one sector of a log.
pub const LOG_SECTOR_ENTRIES: usize = 32;

const ENTRY: usize = SegmentMapping::BYTES;
const SECTOR: usize = LOG_SECTOR_ENTRIES * ENTRY;
const _: () = assert!(to_u64(SECTOR) == SECTOR_SIZE);

/// Where the mark begins in the last sector of a batch.
const MARK_AT: usize = SECTOR - ENTRY;

/// Bytes 12 to 14 of a mark, `bMk`: the upper bits of the mapped sector. They keep chance from
/// making a mark of somebody's padding; the top bit is the `zeroed` of an entry and stays clear.
const MARK_TAG: [u8; 3] = [0x62, 0x4d, 0x6b];

/// What a mark says of the log behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkKind {
    /// A writer of ours begins here. One sector, no entries.
    Open,
    /// The end of one flush.
    Batch,
    /// The pair was closed; whoever appends next may be the reference. One sector, no entries.
    Closed,
}

impl MarkKind {
    const fn code(self) -> u8 {
        match self {
            Self::Open => 1,
            Self::Batch => 2,
            Self::Closed => 3,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Open),
            2 => Some(Self::Batch),
            3 => Some(Self::Closed),
            _ => None,
        }
    }
}

/// Bytes of a batch of so many entries.
#[must_use]
pub const fn batch_bytes(entries: usize) -> u64 {
    to_u64((entries + 1).div_ceil(LOG_SECTOR_ENTRIES)) * SECTOR_SIZE
}

/// A batch as it lies at `at_byte` of the index file, a sector boundary: `entries` (whole ones),
/// padding, and the mark.
///
/// # Panics
/// When it is longer than a batch may be, or not on a boundary: bugs of the caller.
#[must_use]
pub fn encode_batch(entries: &[u8], at_byte: u64, kind: MarkKind) -> Vec<u8> {
    let (whole, rest) = entries.as_chunks::<ENTRY>();
    assert!(rest.is_empty() && at_byte.is_multiple_of(SECTOR_SIZE), "entries, on a boundary");
    let sectors = batch_bytes(whole.len()) / SECTOR_SIZE;
    assert!(sectors <= LOG_BATCH_SECTORS_MAX, "a batch of {sectors} sectors");
    let slots = (whole.len() + 1).next_multiple_of(LOG_SECTOR_ENTRIES);
    let mut bytes = Vec::with_capacity(slots * ENTRY);
    bytes.extend_from_slice(entries);
    for _ in whole.len() + 1..slots {
        bytes.extend_from_slice(&SegmentMapping::PADDING);
    }
    let mut mark = mark_frame(sectors, kind);
    let crc = mark_crc(crc32c::crc32c_append(batch_seed(at_byte), &bytes), &mark);
    if let Some(field) = mark.get_mut(8..12) {
        field.copy_from_slice(&crc.to_le_bytes());
    }
    bytes.extend_from_slice(&mark);
    bytes
}

/// A mark without its checksum.
fn mark_frame(sectors: u64, kind: MarkKind) -> [u8; ENTRY] {
    let [p0, p1, p2, p3, p4, p5, p6, ..] = SegmentMapping::PADDING;
    let place = u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, 0]) | sectors << 50;
    let [a0, a1, a2, a3, a4, a5, a6, a7] = place.to_le_bytes();
    let [t0, t1, t2] = MARK_TAG;
    [a0, a1, a2, a3, a4, a5, a6, a7, 0, 0, 0, 0, t0, t1, t2, kind.code()]
}

/// The checksum covers the place, so that sectors of an older batch at another place are no part
/// of this one.
fn batch_seed(at_byte: u64) -> u32 {
    crc32c::crc32c(&at_byte.to_le_bytes())
}

/// The checksum `crc` of what lies in front of a mark, and the mark's own fields.
fn mark_crc(crc: u32, mark: &[u8; ENTRY]) -> u32 {
    let (front, rest) = mark.split_at(8);
    let crc = crc32c::crc32c_append(crc, front);
    crc32c::crc32c_append(crc, rest.get(4..).unwrap_or_default())
}

/// The length in sectors, checksum and kind of a mark; `None` when the entry is none.
fn parse_mark(entry: &[u8; ENTRY]) -> Option<(u64, u32, MarkKind)> {
    let fields = SegmentMapping::decode_any(entry);
    let [.., c0, c1, c2, c3, t0, t1, t2, code] = *entry;
    let is_mark = fields.is_padding() && [t0, t1, t2] == MARK_TAG;
    let kind = MarkKind::from_code(code).filter(|_| is_mark)?;
    Some((fields.sectors, u32::from_le_bytes([c0, c1, c2, c3]), kind))
}

/// Who appends behind the part of the log that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogOwner {
    /// The reference, or nobody yet.
    Reference,
    /// A writer of ours, which may have been stopped.
    Ours,
}

/// What a log holds.
#[derive(Debug, PartialEq, Eq)]
pub struct LogScan {
    /// The entries that count, in order; later ones win. Tags are 0.
    pub segments: Vec<SegmentMapping>,
    /// Where what counts ends in the index file. Behind it lies a torn batch if the log is ours,
    /// or a torn entry of the reference.
    pub end_byte: u64,
    /// Who wrote last.
    pub owner: LogOwner,
    /// Slots up to the end, padding included.
    pub slots: u64,
    /// Blank slots were skipped, which the reference would refuse.
    pub has_blanks: bool,
}

/// Reads a log piece by piece. Memory grows with the entries only, and the time with the bytes,
/// whatever they say.
#[derive(Debug)]
pub struct LogScanner {
    data_end_sector: u64,
    scan: LogScan,
    /// Entries of a batch whose mark has not come yet begin here in the list.
    counted: usize,
    /// Checksum of the batch so far, and the sectors it has.
    batch: (u32, u64),
}

impl LogScanner {
    /// A scanner for the log of a pair whose data file ends before `data_end_sector`.
    #[must_use]
    pub fn new(data_end_sector: u64) -> Self {
        let scan = LogScan {
            segments: Vec::new(),
            end_byte: HEADER_BYTES,
            owner: LogOwner::Reference,
            slots: 0,
            has_blanks: false,
        };
        Self { data_end_sector, scan, counted: 0, batch: (batch_seed(HEADER_BYTES), 0) }
    }

    /// The next bytes, which lie at `at_byte`: whole sectors, but for the last piece of the file.
    ///
    /// # Errors
    /// `Corrupt`, with the entry's position, for an entry that counts and points outside the data
    /// file, and for a tail that is longer than a batch; `Unsupported` for too many entries.
    pub fn push(&mut self, bytes: &[u8], at_byte: u64) -> Result<()> {
        let end_byte = at_byte.saturating_add(to_u64(bytes.len()));
        check_log_entries(end_byte.saturating_sub(HEADER_BYTES) / to_u64(ENTRY), at_byte)?;
        let (sectors, rest) = bytes.as_chunks::<SECTOR>();
        let mut here = at_byte;
        for sector in sectors {
            match self.scan.owner {
                LogOwner::Reference => self.push_foreign(sector, here)?,
                LogOwner::Ours => self.push_own(sector, here)?,
            }
            here += SECTOR_SIZE;
        }
        if self.scan.owner == LogOwner::Reference {
            let (entries, _torn) = rest.as_chunks::<ENTRY>();
            self.push_entries(entries, here)?;
            self.scan.end_byte = here + to_u64(entries.len() * ENTRY);
        }
        Ok(())
    }

    /// What was found.
    #[must_use]
    pub fn finish(mut self) -> LogScan {
        self.scan.segments.truncate(self.counted);
        self.scan.slots = (self.scan.end_byte - HEADER_BYTES) / to_u64(ENTRY);
        self.scan
    }

    /// One sector of a log of the reference: entries, or the mark of a writer of ours.
    fn push_foreign(&mut self, sector: &[u8; SECTOR], at_byte: u64) -> Result<()> {
        let end_byte = at_byte + SECTOR_SIZE;
        if let Some((1, crc, MarkKind::Open)) = last_mark(sector)
            && crc == crc_with(batch_seed(at_byte), sector)
        {
            self.begin_batch(end_byte, LogOwner::Ours);
            return Ok(());
        }
        let (entries, _) = sector.as_chunks::<ENTRY>();
        self.push_entries(entries, at_byte)?;
        self.scan.end_byte = end_byte;
        Ok(())
    }

    fn push_entries(&mut self, entries: &[[u8; ENTRY]], at_byte: u64) -> Result<()> {
        for (index, entry) in (0..).zip(entries) {
            if let Some(segment) = SegmentMapping::decode(entry) {
                let at_byte = at_byte + to_u64(ENTRY) * index;
                check_segment(&segment, at_byte, self.data_end_sector)?;
                self.scan.segments.push(SegmentMapping { tag: 0, ..segment });
            } else if !SegmentMapping::decode_any(entry).is_padding() {
                self.scan.has_blanks = true;
            }
        }
        self.counted = self.scan.segments.len();
        Ok(())
    }

    /// One sector of a log of ours: part of a batch, which counts when its mark fits.
    fn push_own(&mut self, sector: &[u8; SECTOR], at_byte: u64) -> Result<()> {
        let (crc, sectors) = self.batch;
        let sectors = sectors + 1;
        if sectors > LOG_BATCH_SECTORS_MAX {
            return Err(Error::field(
                ErrorKind::Corrupt,
                "lsmt log: mark of a batch",
                self.scan.end_byte,
                format_args!("none in {} sectors", whole_sectors(at_byte - self.scan.end_byte)),
                format_args!(
                    "one within {LOG_BATCH_SECTORS_MAX} sectors (was the pair written by \
                              another program before it was closed?)"
                ),
            ));
        }
        let (entries, _) = sector.as_chunks::<ENTRY>();
        let decoded = entries.iter().filter_map(SegmentMapping::decode);
        self.scan.segments.extend(decoded.map(|segment| SegmentMapping { tag: 0, ..segment }));
        let mark = last_mark(sector)
            .filter(|(length, found, _)| *length == sectors && *found == crc_with(crc, sector));
        let Some((_, _, kind)) = mark else {
            self.batch = (crc32c::crc32c_append(crc, sector), sectors);
            return Ok(());
        };
        let batch = self.scan.segments.get(self.counted..).unwrap_or_default();
        for segment in batch {
            check_segment(segment, self.scan.end_byte, self.data_end_sector)?;
        }
        self.counted = self.scan.segments.len();
        let owner = if kind == MarkKind::Closed { LogOwner::Reference } else { LogOwner::Ours };
        self.begin_batch(at_byte + SECTOR_SIZE, owner);
        Ok(())
    }

    /// What counts ends at `end_byte`; what follows begins there.
    fn begin_batch(&mut self, end_byte: u64, owner: LogOwner) {
        self.scan.end_byte = end_byte;
        self.scan.owner = owner;
        self.batch = (batch_seed(end_byte), 0);
    }
}

fn last_mark(sector: &[u8; SECTOR]) -> Option<(u64, u32, MarkKind)> {
    parse_mark(sector.last_chunk::<ENTRY>()?)
}

/// The checksum of a batch that ends with `sector`, from that of what lies in front.
fn crc_with(crc: u32, sector: &[u8; SECTOR]) -> u32 {
    let (front, _) = sector.split_at(MARK_AT);
    let crc = crc32c::crc32c_append(crc, front);
    sector.last_chunk::<ENTRY>().map_or(crc, |mark| mark_crc(crc, mark))
}

#[cfg(test)]
mod tests;
