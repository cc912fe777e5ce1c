//! An image with an upper in sparse form on top: layers are read through the holes of its file.

use super::writable::describe_lowers;
use super::{Image, Reader};
use crate::disk::{Disk, Geometry, Space, Worker};
use crate::error::Result;
use crate::units::{SECTOR_SIZE, to_u64, to_usize, whole_sectors};
use crate::upper::{PairOptions, PairPaths, SparseUpper, SparseWorker};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

/// In what units an upper without layers below gives space back: a page, as most file systems do.
const DISCARD_GRANULARITY_BYTES: u32 = 4096;

/// An open image whose upper is in sparse form.
#[derive(Debug)]
pub struct SparseImage {
    lowers: Option<Image>,
    upper: Arc<SparseUpper>,
}

/// One thread's reader and writer of a [`SparseImage`].
#[derive(Debug)]
pub struct SparseImageWorker {
    above: SparseWorker,
    below: Option<Reader>,
    below_sectors: u64,
}

impl SparseImage {
    /// Puts the upper at `paths`, whose data file may be open already, on top of an image, if there
    /// is one below it.
    ///
    /// # Errors
    /// As [`SparseUpper::open`].
    pub fn on_top_of(
        lowers: Option<Image>,
        paths: &PairPaths,
        data: Option<File>,
        mut options: PairOptions,
    ) -> Result<Self> {
        describe_lowers(&mut options, lowers.as_ref());
        let upper = match data {
            Some(data) => SparseUpper::open_with(data, paths, &options)?,
            None => SparseUpper::open(paths, &options)?,
        };
        Ok(Self { lowers, upper })
    }

    /// What lies below the upper.
    #[must_use]
    pub fn lowers(&self) -> Option<&Image> {
        self.lowers.as_ref()
    }

    /// The upper.
    #[must_use]
    pub fn upper(&self) -> &Arc<SparseUpper> {
        &self.upper
    }
}

impl Disk for SparseImage {
    type Worker = SparseImageWorker;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.upper.virtual_sectors(),
            read_only: false,
            optimal_io_bytes: self
                .lowers
                .as_ref()
                .map_or(4096, |lowers| lowers.geometry().optimal_io_bytes),
            // Over layers a hole would show them.
            discard_granularity_bytes: self
                .upper
                .can_discard()
                .then_some(DISCARD_GRANULARITY_BYTES),
        }
    }

    fn worker(&self) -> Result<SparseImageWorker> {
        let below = self.lowers.as_ref().map(Disk::worker).transpose()?;
        let below_sectors =
            self.lowers.as_ref().map_or(0, |lowers| whole_sectors(lowers.virtual_bytes()));
        Ok(SparseImageWorker { above: self.upper.worker(), below, below_sectors })
    }

    fn flush(&self) -> Result<()> {
        self.upper.flush()
    }
}

/// Fills a gap of the upper from the layers below; the upper may be larger than they are.
fn fill_from(
    below: &mut Option<Reader>,
    below_sectors: u64,
    sector: u64,
    gap: &mut [u8],
) -> Result<()> {
    let inside = below_sectors.saturating_sub(sector).saturating_mul(SECTOR_SIZE);
    let len = to_usize(inside.min(to_u64(gap.len()))).unwrap_or(0);
    let (covered, beyond) = gap.split_at_mut(len);
    beyond.fill(0);
    match below {
        Some(below) if !covered.is_empty() => below.read(sector, covered),
        _ => Ok(()),
    }
}

impl Worker for SparseImageWorker {
    /// What the upper has is here, but only its file system knows that: asked of all that lies
    /// below, which at worst moves a read to another thread.
    fn would_wait(&mut self, sectors: Range<u64>) -> bool {
        let below_sectors = self.below_sectors;
        let Some(below) = &mut self.below else { return false };
        let sectors = sectors.start..sectors.end.min(below_sectors);
        !sectors.is_empty() && below.would_wait(sectors)
    }

    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        let Self { above, below, below_sectors } = self;
        above.read(start_sector, dst, |sector, gap| fill_from(below, *below_sectors, sector, gap))
    }

    fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        let Self { above, below, below_sectors } = self;
        above.write(start_sector, src, |sector, gap| fill_from(below, *below_sectors, sector, gap))
    }

    fn write_zeroes(&mut self, sectors: Range<u64>, space: Space) -> Result<()> {
        let Self { above, below, below_sectors } = self;
        above.zero(sectors, space == Space::Free, |sector, gap| {
            fill_from(below, *below_sectors, sector, gap)
        })
    }
}
