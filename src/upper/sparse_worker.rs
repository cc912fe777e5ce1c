//! One thread's way to read and write an upper in sparse form.

use super::sparse::{BLOCK_SECTORS, SparseUpper, byte_of};
use super::storage::Storage;
use super::{range_of, read};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SPARSE_BLOCK_BYTES;
use crate::map::{Content, Stretch};
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use std::ops::Range;
use std::sync::Arc;

/// Sectors of zeros that are written at a time, whole blocks.
const ZERO_SECTORS: u64 = 128;

static ZEROS: [u8; 65_536] = [0; 65_536];
const _: () = assert!(ZERO_SECTORS * SECTOR_SIZE == to_u64(ZEROS.len()));

/// One thread's reader and writer of a [`SparseUpper`].
#[derive(Debug)]
pub struct SparseWorker {
    upper: Arc<SparseUpper>,
    found: Vec<Stretch>,
    freed: Vec<Range<u64>>,
    block: Box<[u8]>,
}

/// What fills a range of the layers below.
type Below<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> Result<()>;

impl SparseUpper {
    /// A worker for the calling thread.
    #[must_use]
    pub fn worker(self: &Arc<Self>) -> SparseWorker {
        let block = vec![0; to_usize(SPARSE_BLOCK_BYTES).unwrap_or(0)].into_boxed_slice();
        let upper = Arc::clone(self);
        SparseWorker { upper, found: Vec::new(), freed: Vec::new(), block }
    }

    /// The whole blocks around a range.
    fn blocks_of(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start - range.start % BLOCK_SECTORS;
        let end = range.end.next_multiple_of(BLOCK_SECTORS).min(self.virtual_sectors);
        start..end.max(range.end)
    }

    fn read_file(&self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        let at_byte = byte_of(start_sector);
        self.data.read_at(at_byte, dst).map_err(|error| {
            let (bytes, name) = (dst.len(), &self.name);
            Error::io(format!("read {bytes} bytes at byte {at_byte} of {name}"), &error)
        })
    }

    fn write_file(&self, start_sector: u64, src: &[u8]) -> Result<()> {
        let at_byte = byte_of(start_sector);
        self.data.write_at(at_byte, src).map_err(|error| {
            let (bytes, name) = (src.len(), &self.name);
            Error::io(format!("write {bytes} bytes at byte {at_byte} of {name}"), &error)
        })
    }
}

impl SparseWorker {
    /// The upper.
    #[must_use]
    pub fn upper(&self) -> &Arc<SparseUpper> {
        &self.upper
    }

    /// Fills `dst` (whole sectors) from `start_sector` on; `below` fills what the upper has not.
    /// Blocks on the disk, and on writes that overlap.
    ///
    /// # Errors
    /// `OutOfRange`, `Io`, and what `below` says.
    pub fn read(
        &mut self,
        start_sector: u64,
        dst: &mut [u8],
        mut below: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let Self { upper, found, .. } = self;
        let range = range_of("read", start_sector, dst.len(), upper.virtual_sectors)?;
        let _claim = upper.claims.share(range.clone());
        fill(upper, found, range, dst, &mut below)
    }

    /// Writes `src` (whole sectors) from `start_sector` on. When it returns, reads see it and a
    /// kill of the process does not undo it; a power cut may, until the next flush. `below` fills
    /// what a block lacks.
    ///
    /// # Errors
    /// `NoSpace` when the disk or the quota is full, `OutOfRange`, `Io`, and what `below` says.
    /// Each sector is old or new then.
    pub fn write(
        &mut self,
        start_sector: u64,
        src: &[u8],
        mut below: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let sectors = self.upper.virtual_sectors;
        let range = range_of("write", start_sector, src.len(), sectors)?;
        self.write_range(range, src, &mut below)
    }

    /// Makes `sectors` read as zeros, whatever lies below: by a hole where `give_back` says so and
    /// nothing lies below, else by zeros that are written.
    ///
    /// # Errors
    /// As [`SparseWorker::write`].
    pub fn zero(
        &mut self,
        sectors: Range<u64>,
        give_back: bool,
        mut below: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        if sectors.start > sectors.end || sectors.end > self.upper.virtual_sectors {
            let message = format!("zero sectors {sectors:?}: not on the disk");
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        if sectors.is_empty() {
            return Ok(());
        }
        if give_back && self.upper.can_discard() {
            let Self { upper, freed, .. } = self;
            let _claim = upper.claims.take(sectors.clone());
            upper.check_writable()?;
            if upper.punch(sectors.clone(), freed)? {
                return Ok(());
            }
        }
        let mut here = sectors.start;
        while here < sectors.end {
            // Up to a multiple, so that only the ends are parts of blocks.
            let next = (here + 1).next_multiple_of(ZERO_SECTORS).min(sectors.end);
            let len = to_usize((next - here) * SECTOR_SIZE).unwrap_or(0);
            self.write_range(here..next, ZEROS.get(..len).unwrap_or_default(), &mut below)?;
            here = next;
        }
        Ok(())
    }

    /// As [`SparseUpper::flush`].
    ///
    /// # Errors
    /// As there.
    pub fn flush(&mut self) -> Result<()> {
        self.upper.flush()
    }

    fn write_range(&mut self, range: Range<u64>, src: &[u8], below: Below<'_>) -> Result<()> {
        let upper = Arc::clone(&self.upper);
        // Without layers below, what a block lacks are zeros, and the file system puts them there.
        let blocks = if upper.over_lowers { upper.blocks_of(&range) } else { range.clone() };
        let _claim = upper.claims.take(blocks.clone());
        upper.check_writable()?;
        let missing = self.missing_sectors(&blocks);
        upper.check_quota(missing)?;
        let written = if missing == 0 {
            upper.write_file(range.start, src)
        } else if !upper.over_lowers {
            upper.write_file(range.start, src).map(|()| upper.note(range, &mut self.freed))
        } else {
            self.copy_up(range, src, below)
        };
        written.inspect_err(|_| upper.look_again(&blocks, &mut self.freed))
    }

    /// How many of the sectors the file has not.
    fn missing_sectors(&mut self, blocks: &Range<u64>) -> u64 {
        self.found.clear();
        read(&self.upper.map).look_up(blocks.clone(), &mut self.found);
        let missing = self.found.iter().filter(|stretch| !is_data(stretch));
        missing.map(|stretch| stretch.end_sector - stretch.start_sector).sum()
    }

    /// Writes whole blocks: those at the ends with what they have so far around it.
    fn copy_up(&mut self, range: Range<u64>, src: &[u8], below: Below<'_>) -> Result<()> {
        let upper = Arc::clone(&self.upper);
        let mut here = range.start;
        let mut rest = src;
        while here < range.end {
            let block = upper.blocks_of(&(here..here + 1));
            let is_whole = here == block.start && block.end <= range.end;
            let end = if is_whole {
                let last = upper.blocks_of(&(range.end - 1..range.end));
                if last.end <= range.end { range.end } else { last.start }
            } else {
                block.end.min(range.end)
            };
            let len = to_usize((end - here) * SECTOR_SIZE).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(len.min(rest.len()));
            rest = later;
            if is_whole {
                upper.write_file(here, now)?;
                upper.note(here..end, &mut self.freed);
            } else {
                self.write_part(block, here, now, below)?;
            }
            here = end;
        }
        Ok(())
    }

    /// Writes `part` of one block at `start_sector`, and the rest of it if the file lacks some.
    fn write_part(
        &mut self,
        block: Range<u64>,
        start_sector: u64,
        part: &[u8],
        below: Below<'_>,
    ) -> Result<()> {
        let Self { upper, found, freed, block: buffer } = self;
        let offset = |sectors: u64| to_usize(sectors * SECTOR_SIZE).unwrap_or(usize::MAX);
        let whole = buffer.get_mut(..offset(block.end - block.start)).unwrap_or_default();
        fill(upper, found, block.clone(), whole, below)?;
        if let Some(place) = whole
            .get_mut(offset(start_sector - block.start)..)
            .and_then(|b| b.get_mut(..part.len()))
        {
            place.copy_from_slice(part);
        }
        upper.write_file(block.start, whole)?;
        upper.note(block, freed);
        Ok(())
    }
}

fn is_data(stretch: &Stretch) -> bool {
    matches!(stretch.content, Some(Content::Data { .. }))
}

/// Fills `dst` with what `range`, which is claimed, holds.
fn fill(
    upper: &SparseUpper,
    found: &mut Vec<Stretch>,
    range: Range<u64>,
    dst: &mut [u8],
    below: Below<'_>,
) -> Result<()> {
    found.clear();
    read(&upper.map).look_up(range, found);
    let mut rest = dst;
    for stretch in found.iter() {
        let sectors = stretch.end_sector - stretch.start_sector;
        let len = to_usize(sectors.saturating_mul(SECTOR_SIZE)).unwrap_or(usize::MAX);
        let (now, later) = rest.split_at_mut(len.min(rest.len()));
        rest = later;
        match stretch.content {
            None if upper.over_lowers => below(stretch.start_sector, now)?,
            None | Some(Content::Zero) => now.fill(0),
            Some(Content::Data { .. }) => upper.read_file(stretch.start_sector, now)?,
        }
    }
    Ok(())
}
