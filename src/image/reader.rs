//! One thread's reader: plan, copy or decode, into the request's buffer.

use super::Parts;
use super::blocks::{BlockCache, Found};
use super::payload::{Payload, ZfilePart};
use crate::disk::Worker;
use crate::error::{Error, ErrorKind, Result};
use crate::format::zfile::{Algorithm, Decoder};
use crate::map::Target;
use crate::source::Source;
use crate::units::{SECTOR_SIZE, bytes_to_sectors, to_u64, to_usize};
use std::ops::Range;
use std::sync::Arc;

/// Decoding only the front of a block costs up to three times as much per byte as decoding the
/// whole (measured with lz4 1.10), so it pays up to this share of a block, with something to spare.
const FRONT_SHARE: usize = 8;

/// The memory that reading compressed layers takes: codec contexts, one compressed record, and
/// the blocks decoded last. Sized once for a set of payloads.
#[derive(Debug)]
pub struct Scratch {
    lz4: Option<Decoder>,
    zstd: Option<Decoder>,
    record: Box<[u8]>,
    blocks: BlockCache,
}

impl Scratch {
    /// Scratch for reading any of `payloads`.
    ///
    /// # Errors
    /// When a codec context cannot be had.
    pub fn new<'a>(payloads: impl Iterator<Item = &'a Payload>) -> Result<Self> {
        let mut this =
            Self { lz4: None, zstd: None, record: Box::default(), blocks: BlockCache::new(0) };
        let (mut record_bytes, mut block_bytes) = (0, 0);
        for part in payloads.filter_map(Payload::zfile) {
            record_bytes = record_bytes.max(part.jump_table.compressed_bytes_max());
            block_bytes = block_bytes.max(part.header.block_bytes);
            let decoder = match part.header.algorithm {
                Algorithm::Lz4 => &mut this.lz4,
                Algorithm::Zstd => &mut this.zstd,
            };
            if decoder.is_none() {
                *decoder = Some(Decoder::new(part.header.algorithm)?);
            }
        }
        // Both are bounded: a block by its format's 64 KiB, a record by the codec's worst case.
        this.record = vec![0; to_usize(u64::from(record_bytes)).unwrap_or(0)].into_boxed_slice();
        this.blocks = BlockCache::new(to_usize(u64::from(block_bytes)).unwrap_or(0));
        Ok(this)
    }

    /// Fills `dst` with the payload's (decompressed) bytes from `offset_bytes` on. `layer` tells
    /// the payloads that share this scratch apart.
    ///
    /// # Errors
    /// `OutOfRange`, `Io`, `Integrity` or `Corrupt`, with the block and its bytes in the file.
    #[inline]
    pub fn read(
        &mut self,
        payload: &Payload,
        layer: u16,
        offset_bytes: u64,
        dst: &mut [u8],
    ) -> Result<()> {
        let Some(part) = payload.zfile() else { return payload.read_stored(offset_bytes, dst) };
        let end = offset_bytes.checked_add(to_u64(dst.len()));
        if end.is_none_or(|end| end > payload.bytes()) {
            let message = format!(
                "read {} bytes at byte {offset_bytes}: the decompressed layer has only {}",
                dst.len(),
                payload.bytes()
            );
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        let block_bytes = u64::from(part.header.block_bytes);
        let mut block = offset_bytes / block_bytes;
        let mut skip = to_usize(offset_bytes % block_bytes).unwrap_or(0);
        let mut rest = dst;
        while !rest.is_empty() {
            let original = part.jump_table.block_original_bytes(block);
            let len =
                (to_usize(u64::from(original)).unwrap_or(0).saturating_sub(skip)).min(rest.len());
            if len == 0 {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("zfile block {block} is empty"),
                ));
            }
            let (now, later) = rest.split_at_mut(len);
            self.read_block(payload, part, (layer, block), skip, now)
                .map_err(|error| block_context(error, part, block))?;
            (rest, skip, block) = (later, 0, block + 1);
        }
        Ok(())
    }

    /// `dst` from `skip` bytes into one block on; it does not reach beyond the block.
    #[inline]
    fn read_block(
        &mut self,
        payload: &Payload,
        part: &ZfilePart,
        (layer, block): (u16, u64),
        skip: usize,
        dst: &mut [u8],
    ) -> Result<()> {
        let decoder = match part.header.algorithm {
            Algorithm::Lz4 => self.lz4.as_mut(),
            Algorithm::Zstd => self.zstd.as_mut(),
        };
        let Some(decoder) = decoder else {
            return Err(Error::new(ErrorKind::Unsupported, "scratch of another image"));
        };
        let original = to_usize(u64::from(part.jump_table.block_original_bytes(block)));
        let original = original.unwrap_or(0);
        let stored = part.jump_table.compressed_range(block);
        let record = to_usize(stored.end - stored.start).and_then(|len| self.record.get_mut(..len));
        let Some(record) = record else {
            return Err(Error::new(ErrorKind::Unsupported, "scratch of another image"));
        };
        let has_crc = part.header.has_block_crc;
        if dst.len() == original {
            return load(payload, &stored, record, |record| decoder.decode(record, has_crc, dst));
        }
        let wanted = skip + dst.len();
        let (room, seen_before) = match self.blocks.find(layer, block, wanted) {
            Found::Hit(bytes) => {
                dst.copy_from_slice(&bytes[skip..]);
                return Ok(());
            }
            Found::Miss { room, seen_before } => (room, seen_before),
        };
        // The first visit may decode only as far as it must; whoever comes back gets the whole.
        let front_pays = decoder.decodes_prefix() && wanted <= original / FRONT_SHARE;
        let valid = if front_pays && !seen_before { wanted } else { original };
        load(payload, &stored, record, |record| {
            if valid == original {
                decoder.decode(record, has_crc, &mut room[..original])
            } else {
                decoder.decode_prefix(record, has_crc, &mut room[..valid], original)
            }
        })?;
        dst.copy_from_slice(&room[skip..wanted]);
        self.blocks.filled(layer, block, valid);
        Ok(())
    }
}

/// Reads one record and decodes it. One that lies elsewhere and is wrong is fetched once more.
#[inline]
fn load(
    payload: &Payload,
    stored: &Range<u64>,
    record: &mut [u8],
    mut decode: impl FnMut(&mut [u8]) -> Result<()>,
) -> Result<()> {
    payload.read_stored(stored.start, record)?;
    let decoded = decode(record);
    if decoded.is_ok() || !payload.discard_stored(stored) {
        return decoded;
    }
    payload.read_stored(stored.start, record)?;
    decode(record)
}

#[cold]
fn block_context(error: Error, part: &ZfilePart, block: u64) -> Error {
    let stored = part.jump_table.compressed_range(block);
    error.context(format!(
        "read zfile block {block} (stored bytes {}..{})",
        stored.start, stored.end
    ))
}

/// One thread's reader of an [`Image`](super::Image).
#[derive(Debug)]
pub struct Reader {
    parts: Arc<Parts>,
    scratch: Scratch,
}

impl Reader {
    pub(super) fn new(parts: Arc<Parts>) -> Result<Self> {
        let scratch = Scratch::new(parts.payloads.iter())?;
        Ok(Self { parts, scratch })
    }
}

impl Worker for Reader {
    #[inline]
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        let Self { parts, scratch } = self;
        let sectors = bytes_to_sectors(to_u64(dst.len()));
        let inside = |sectors: &u64| {
            start_sector.checked_add(*sectors).is_some_and(|end| end <= parts.map.virtual_sectors())
        };
        let Some(sectors) = sectors.filter(inside) else {
            let message =
                format!("read {} bytes at sector {start_sector}: not on the disk", dst.len());
            return Err(Error::new(ErrorKind::OutOfRange, message));
        };
        let mut rest = dst;
        for extent in parts.map.extents(start_sector, sectors) {
            let len = to_usize(extent.sectors * SECTOR_SIZE).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_mut(len.min(rest.len()));
            rest = later;
            match extent.target {
                Target::Zero => now.fill(0),
                Target::Data { layer, sector } => {
                    let payload = parts.payloads.get(usize::from(layer));
                    let Some(payload) = payload else { return Err(no_such_layer(layer)) };
                    let at_byte = sector.saturating_mul(SECTOR_SIZE);
                    if let Some(background) = parts.background.get() {
                        background.note(layer, at_byte, now.len());
                    }
                    scratch
                        .read(payload, layer, at_byte, now)
                        .map_err(|error| layer_context(error, payload, layer))?;
                }
            }
        }
        debug_assert!(rest.is_empty(), "extents cover the request");
        Ok(())
    }

    fn would_wait(&mut self, sectors: Range<u64>) -> bool {
        let parts = &self.parts;
        let count = sectors.end.saturating_sub(sectors.start);
        parts.map.extents(sectors.start, count).any(|extent| {
            let Target::Data { layer, sector } = extent.target else { return false };
            let bytes = extent.sectors.saturating_mul(SECTOR_SIZE);
            let at_byte = sector.saturating_mul(SECTOR_SIZE);
            let payload = parts.payloads.get(usize::from(layer));
            payload.is_some_and(|payload| !is_here(payload, at_byte, bytes))
        })
    }
}

/// Whether the stored bytes behind `len` bytes of a payload are all here.
fn is_here(payload: &Payload, offset_bytes: u64, len: u64) -> bool {
    let Source::Remote(blob) = payload.source() else { return true };
    match payload.blob_range(offset_bytes, len) {
        Some(range) => blob.is_here(range.start, range.end - range.start),
        // Not there at all: the read will say so.
        None => true,
    }
}

#[cold]
fn no_such_layer(layer: u16) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the map names layer {layer}, which does not exist"))
}

#[cold]
fn layer_context(error: Error, payload: &Payload, layer: u16) -> Error {
    error.context(format!("read layer {layer} ({:?})", payload.source()))
}

#[cfg(test)]
mod tests;
