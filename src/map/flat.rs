//! The merged map: every sector of the virtual disk, without a gap, in one sorted array.
//!
//! An entry has no length: it ends where the next one starts, and holes are entries too. So a
//! lookup has one question, "the last entry that starts at or before this sector", and no branch
//! for "not covered". A bucket table answers most of it: the disk is cut into as many equal
//! buckets as there are entries (rounded down to a power of two), and each bucket knows the entry
//! that its first sector lies in. What is left is a search among the entries that start inside
//! one bucket, on average one or two. Memory: 16 bytes an entry and at most 4 for the table.

use super::Target;
use super::paint::{Run, append};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{INDEX_ENTRIES_MAX, LAYER_SECTORS_MAX, VIRTUAL_SECTORS_MAX};
use crate::units::{to_u64, to_usize};

/// Below this many candidates a plain walk beats a binary search: no mispredicted halving.
const WALK_MAX: usize = 8;

/// A [`Target`] in one word: layer in the top 16 bits, sector in the lower 48; all ones is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packed(pub(super) u64);

impl Packed {
    pub(super) const ZERO: Self = Self(u64::MAX);
    const SECTOR_BITS: u32 = LAYER_SECTORS_MAX.trailing_zeros();

    pub(super) fn pack(target: Target) -> Option<Self> {
        match target {
            Target::Zero => Some(Self::ZERO),
            Target::Data { layer, sector } if sector < LAYER_SECTORS_MAX && layer < u16::MAX => {
                Some(Self(u64::from(layer) << Self::SECTOR_BITS | sector))
            }
            Target::Data { .. } => None,
        }
    }

    #[inline]
    pub(super) fn unpack_at(self, sectors_in: u64) -> Target {
        if self == Self::ZERO {
            return Target::Zero;
        }
        // The shift leaves 16 bits.
        let layer = (self.0 >> Self::SECTOR_BITS) as u16;
        Target::Data { layer, sector: (self.0 & (LAYER_SECTORS_MAX - 1)) + sectors_in }
    }
}

/// The merged map of a stack. Immutable, shared by all queues.
#[derive(Debug)]
pub struct FlatMap {
    // One more start than targets: the last is the end of the disk.
    starts: Box<[u64]>,
    targets: Box<[Packed]>,
    // For bucket b the last entry that starts at or before sector b << shift; one extra at the end.
    buckets: Box<[u32]>,
    shift: u32,
}

/// One piece of a request: consecutive sectors with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First sector of the virtual disk.
    pub start_sector: u64,
    /// Length; never 0.
    pub sectors: u64,
    /// Where the bytes are.
    pub target: Target,
}

impl FlatMap {
    /// The map of a disk of `virtual_sectors` from disjoint, sorted runs. What no run covers is
    /// zero; what lies beyond the end is cut off.
    ///
    /// # Errors
    /// `Corrupt` when the disk or a layer is larger than the format can address, or there are
    /// more entries than [`INDEX_ENTRIES_MAX`].
    pub fn build(runs: &[Run], virtual_sectors: u64) -> Result<Self> {
        if virtual_sectors > VIRTUAL_SECTORS_MAX {
            return Err(too_large("sectors of the virtual disk", virtual_sectors));
        }
        let cover = cover(runs, virtual_sectors);
        if to_u64(cover.len()) > INDEX_ENTRIES_MAX {
            return Err(too_large("entries in the merged map", to_u64(cover.len())));
        }
        let mut starts = Vec::with_capacity(cover.len() + 1);
        let mut targets = Vec::with_capacity(cover.len());
        for run in &cover {
            let last = run.target.advanced(run.end_sector - run.start_sector);
            let (Some(packed), Some(_)) = (Packed::pack(run.target), Packed::pack(last)) else {
                return Err(too_large("sector of a layer", run.start_sector));
            };
            starts.push(run.start_sector);
            targets.push(packed);
        }
        starts.push(virtual_sectors);
        let (buckets, shift) = bucket_table(&starts);
        let (starts, targets) = (starts.into_boxed_slice(), targets.into_boxed_slice());
        Ok(Self { starts, targets, buckets, shift })
    }

    /// Size of the virtual disk in sectors.
    #[must_use]
    pub fn virtual_sectors(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Entries of the map, holes included.
    #[must_use]
    pub fn entry_count(&self) -> usize {
        self.targets.len()
    }

    /// Bytes of memory that the map holds.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of_val(&*self.starts) + size_of_val(&*self.targets) + size_of_val(&*self.buckets)
    }

    /// The entry that `sector` lies in. `sector` must be on the disk.
    #[inline]
    #[must_use]
    pub fn lookup(&self, sector: u64) -> usize {
        debug_assert!(sector < self.virtual_sectors());
        let bucket = to_usize(sector >> self.shift).unwrap_or(usize::MAX);
        let (Some(&low), Some(&high)) = (self.buckets.get(bucket), self.buckets.get(bucket + 1))
        else {
            return self.targets.len();
        };
        let (low, high) = (low as usize, high as usize);
        // Entries after `low` and up to `high` start inside the bucket (or at its end).
        let inside = self.starts.get(low + 1..=high).unwrap_or(&[]);
        let passed = if inside.len() <= WALK_MAX {
            inside.iter().take_while(|&&start| start <= sector).count()
        } else {
            inside.partition_point(|&start| start <= sector)
        };
        low + passed
    }

    /// The extents that cover `start_sector..start_sector + sectors`, in order, without a gap.
    /// Cut off at the end of the disk. Allocates nothing.
    #[inline]
    #[must_use]
    pub fn extents(&self, start_sector: u64, sectors: u64) -> Extents<'_> {
        let end_sector = start_sector.saturating_add(sectors).min(self.virtual_sectors());
        let entry = if start_sector < end_sector { self.lookup(start_sector) } else { 0 };
        Extents { map: self, entry, here: start_sector, end_sector }
    }
}

/// Iterator over the [`Extent`]s of one request.
#[derive(Clone, Debug)]
pub struct Extents<'a> {
    map: &'a FlatMap,
    entry: usize,
    here: u64,
    end_sector: u64,
}

impl Iterator for Extents<'_> {
    type Item = Extent;

    #[inline]
    fn next(&mut self) -> Option<Extent> {
        if self.here >= self.end_sector {
            return None;
        }
        let start = *self.map.starts.get(self.entry)?;
        let until = (*self.map.starts.get(self.entry + 1)?).min(self.end_sector);
        let target = self.map.targets.get(self.entry)?.unpack_at(self.here - start);
        let extent = Extent { start_sector: self.here, sectors: until - self.here, target };
        self.entry += 1;
        self.here = until;
        Some(extent)
    }
}

/// The runs with their gaps filled by zeros and everything beyond the end cut off.
fn cover(runs: &[Run], virtual_sectors: u64) -> Vec<Run> {
    let mut cover = Vec::with_capacity(runs.len().saturating_mul(2).saturating_add(1));
    let mut here = 0;
    let zeros_until = |cover: &mut Vec<Run>, here: u64, end_sector: u64| {
        if here < end_sector {
            append(cover, Run { start_sector: here, end_sector, target: Target::Zero });
        }
    };
    for run in runs.iter().take_while(|run| run.start_sector < virtual_sectors) {
        debug_assert!(run.start_sector >= here, "runs are disjoint and sorted");
        zeros_until(&mut cover, here, run.start_sector);
        let end_sector = run.end_sector.min(virtual_sectors);
        append(&mut cover, Run { end_sector, ..*run });
        here = end_sector;
    }
    zeros_until(&mut cover, here, virtual_sectors);
    cover
}

/// See the module text. `starts` ends with the size of the disk.
fn bucket_table(starts: &[u64]) -> (Box<[u32]>, u32) {
    let virtual_sectors = starts.last().copied().unwrap_or(0);
    let entries = starts.len().saturating_sub(1);
    if entries == 0 {
        return (Box::default(), 0);
    }
    let wanted = 1_u64 << entries.ilog2();
    // The smallest power-of-two bucket size that needs no more than `wanted` buckets.
    let shift = virtual_sectors.div_ceil(wanted).next_power_of_two().trailing_zeros();
    let count = to_usize(virtual_sectors.div_ceil(1 << shift)).unwrap_or(0);
    let mut buckets = Vec::with_capacity(count + 1);
    let mut entry = 0_u32;
    for bucket in 0..=to_u64(count) {
        let first_sector = bucket << shift;
        while starts[..entries].get(entry as usize + 1).is_some_and(|&next| next <= first_sector) {
            entry += 1;
        }
        buckets.push(entry);
    }
    (buckets.into_boxed_slice(), shift)
}

fn too_large(what: &str, found: u64) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("merge the layers: too many or too large: {what}: {found}"),
    )
}
