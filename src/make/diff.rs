//! Where two disks differ.

use super::options::Watch;
use crate::disk::{Disk, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, Payload};
use crate::limits::{DIFF_EXTENTS_MAX, MAKE_PIECE_BYTES};
use crate::map::Target;
use crate::source::{FileIdentity, Source};
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// What was found besides the extents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiffSummary {
    /// Sectors that differ.
    pub differing_sectors: u64,
    /// Sectors that had to be read and compared; the others share their bytes.
    pub compared_sectors: u64,
}

/// The sectors in which the content of two disks differs, in order, as ranges that do not touch.
/// What only the longer one has differs, whatever it holds. Where both read from the same place of
/// the same file, or both have nothing, no byte is read.
///
/// # Errors
/// `Unsupported` for more than [`DIFF_EXTENTS_MAX`] ranges; `Canceled`; what is wrong with either.
pub fn diff(
    one: &Image,
    other: &Image,
    watch: &Watch<'_>,
) -> Result<(Vec<Range<u64>>, DiffSummary)> {
    let lengths = (one.map().virtual_sectors(), other.map().virtual_sectors());
    let common = lengths.0.min(lengths.1);
    let twins = Twins::of(one, other);
    let mut readers = (one.worker()?, other.worker()?);
    let mut buffers = (vec![0; MAKE_PIECE_BYTES], vec![0; MAKE_PIECE_BYTES]);
    let mut found = Found::default();
    let mut summary = DiffSummary::default();
    let mut here = 0;
    while here < common {
        let first = one.map().extents(here, common - here).next();
        let second = other.map().extents(here, common - here).next();
        let (Some(first), Some(second)) = (first, second) else { break };
        let sectors = first.sectors.min(second.sectors);
        if !twins.are_same(first.target, second.target) {
            let end = here + sectors;
            let mut at = here;
            while at < end {
                watch.check()?;
                let len = ((end - at) * SECTOR_SIZE).min(to_u64(MAKE_PIECE_BYTES));
                let len = to_usize(len).unwrap_or(0);
                let (a, b) = (&mut buffers.0[..len], &mut buffers.1[..len]);
                readers.0.read(at, a)?;
                readers.1.read(at, b)?;
                found.compare(at, a, b)?;
                at += to_u64(len) / SECTOR_SIZE;
            }
            summary.compared_sectors += sectors;
        }
        here += sectors;
        watch.done.store(here.saturating_mul(SECTOR_SIZE), Ordering::Relaxed);
    }
    found.add(common..lengths.0.max(lengths.1))?;
    summary.differing_sectors = found.0.iter().map(|range| range.end - range.start).sum();
    Ok((found.0, summary))
}

/// For each layer of the one disk the layer of the other that is the same file.
struct Twins(Vec<Option<usize>>);

impl Twins {
    fn of(one: &Image, other: &Image) -> Self {
        let others: Vec<_> = other.payloads().iter().map(identity).collect();
        let twin = |payload| {
            let found = identity(payload)?;
            others.iter().position(|other| *other == Some(found))
        };
        Self(one.payloads().iter().map(twin).collect())
    }

    fn are_same(&self, one: Target, other: Target) -> bool {
        match (one, other) {
            (Target::Zero, Target::Zero) => true,
            (
                Target::Data { layer, sector },
                Target::Data { layer: other_layer, sector: other_sector },
            ) => {
                let twin = self.0.get(usize::from(layer)).copied().flatten();
                sector == other_sector && twin == Some(usize::from(other_layer))
            }
            _ => false,
        }
    }
}

fn identity(payload: &Payload) -> Option<(u64, u64)> {
    let Source::Mapped(mapped) = payload.source() else { return None };
    let identity = FileIdentity::of(mapped.file()).ok()?;
    Some((identity.device_number, identity.inode))
}

#[derive(Default)]
struct Found(Vec<Range<u64>>);

impl Found {
    fn compare(&mut self, start_sector: u64, one: &[u8], other: &[u8]) -> Result<()> {
        if one == other {
            return Ok(());
        }
        let sector_bytes = to_usize(SECTOR_SIZE).unwrap_or(1);
        let pairs = one.chunks(sector_bytes).zip(other.chunks(sector_bytes));
        for (sector, (a, b)) in (start_sector..).zip(pairs) {
            if a != b {
                self.add(sector..sector + 1)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let count = self.0.len();
        match self.0.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if count >= DIFF_EXTENTS_MAX => {
                let message = format!("more than {DIFF_EXTENTS_MAX} extents differ");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            _ => self.0.push(range),
        }
        Ok(())
    }
}
