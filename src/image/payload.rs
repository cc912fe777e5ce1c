//! A layer's content behind its wrapping: the bytes of the LSMT file, wherever they lie.
//!
//! ```text
//!   file --> [tar wrapper] --> [zfile] --> LSMT file
//! ```
//!
//! Every layer is probed in this order, whatever its name says; each wrapping is optional.

use crate::error::{Error, Result, ResultExt};
use crate::format::tar;
use crate::format::zfile::{self, Algorithm, Header, JumpTable, JumpTableBuilder};
use crate::limits::INDEX_PIECE_BYTES;
use crate::source::Source;
use crate::units::{to_u64, to_usize};
use std::ops::Range;
use std::sync::Arc;

/// What lies around a layer's LSMT file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wrapping {
    /// First byte of the payload inside a tar wrapper; 0 without one.
    pub offset_bytes: u64,
    /// Length of the payload as stored.
    pub stored_bytes: u64,
    /// Whether there is a tar wrapper.
    pub tar: bool,
}

/// The zfile part of a payload.
#[derive(Debug)]
pub struct ZfilePart {
    /// The authoritative header.
    pub header: Header,
    /// Where each compressed block lies in the stored payload.
    pub jump_table: JumpTable,
}

/// A layer's bytes after unwrapping. A clone is of the same open file.
#[derive(Clone, Debug)]
pub struct Payload {
    source: Source,
    wrapping: Wrapping,
    zfile: Option<Arc<ZfilePart>>,
}

impl Payload {
    /// Probes a source for its wrappings and checks their structure. The jump table takes memory as
    /// it is read: see [`INDEX_PIECE_BYTES`].
    ///
    /// # Errors
    /// When it is a tar wrapper or a zfile, and broken.
    pub fn open(source: Source) -> Result<Self> {
        let file_bytes = source.bytes();
        let head_bytes = file_bytes.min(to_u64(tar::HEAD_BYTES));
        let head = read_vec(&source, 0, head_bytes)?;
        let wrapper =
            tar::parse_wrapper(&head, file_bytes).context(|| "parse the tar wrapper".to_owned())?;
        let wrapping = match wrapper {
            Some(found) => Wrapping {
                offset_bytes: found.payload_offset_bytes,
                stored_bytes: found.payload_bytes,
                tar: true,
            },
            None => Wrapping { offset_bytes: 0, stored_bytes: file_bytes, tar: false },
        };
        let zfile = open_zfile(&source, wrapping)?.map(Arc::new);
        Ok(Self { source, wrapping, zfile })
    }

    /// A payload whose structure another process has parsed and checked.
    #[must_use]
    pub(super) fn restored(
        source: Source,
        wrapping: Wrapping,
        zfile: Option<(Header, JumpTable)>,
    ) -> Self {
        let zfile = zfile.map(|(header, jump_table)| Arc::new(ZfilePart { header, jump_table }));
        Self { source, wrapping, zfile }
    }

    /// A payload that is the whole file as it is, never probed: the data file of a writable pair.
    #[must_use]
    pub fn plain(source: Source) -> Self {
        let wrapping = Wrapping { offset_bytes: 0, stored_bytes: source.bytes(), tar: false };
        Self { source, wrapping, zfile: None }
    }

    /// Length of the LSMT file (after decompression).
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.zfile {
            Some(part) => part.header.original_bytes,
            None => self.wrapping.stored_bytes,
        }
    }

    /// The file that everything is read from.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The wrapping that was found.
    #[must_use]
    pub fn wrapping(&self) -> Wrapping {
        self.wrapping
    }

    /// The zfile part, if the payload is compressed.
    #[must_use]
    pub fn zfile(&self) -> Option<&ZfilePart> {
        self.zfile.as_deref()
    }

    /// Size of a compression block, if the payload is compressed.
    #[must_use]
    pub fn block_bytes(&self) -> Option<u32> {
        self.zfile.as_ref().map(|part| part.header.block_bytes)
    }

    /// The codec, if the payload is compressed.
    #[must_use]
    pub fn algorithm(&self) -> Option<Algorithm> {
        self.zfile.as_ref().map(|part| part.header.algorithm)
    }

    /// Reads stored (still compressed) bytes at an offset in the stored payload.
    ///
    /// # Errors
    /// As [`Source::read`].
    #[inline]
    pub fn read_stored(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        // The sum cannot overflow: the wrapping was checked to lie inside the file, and the source
        // refuses what lies beyond it.
        let at_byte = self.wrapping.offset_bytes.saturating_add(offset_bytes);
        match &self.zfile {
            Some(part) if part.header.has_block_crc => self.source.read_vouched(at_byte, dst),
            _ => self.source.read(at_byte, dst),
        }
    }

    /// Where in the blob the stored bytes behind `len` bytes of the payload lie; `None` for no
    /// bytes and those beyond the end.
    pub(super) fn blob_range(&self, offset_bytes: u64, len: u64) -> Option<Range<u64>> {
        let end = offset_bytes.checked_add(len).filter(|end| *end <= self.bytes())?;
        if len == 0 {
            return None;
        }
        let stored = match &self.zfile {
            None => offset_bytes..end,
            Some(part) => {
                let block_bytes = u64::from(part.header.block_bytes);
                let (first, last) = (offset_bytes / block_bytes, (end - 1) / block_bytes);
                let first = part.jump_table.compressed_range(first);
                first.start..part.jump_table.compressed_range(last).end
            }
        };
        let start = self.wrapping.offset_bytes.checked_add(stored.start)?;
        let end = self.wrapping.offset_bytes.checked_add(stored.end)?;
        (start < end).then_some(start..end)
    }

    /// Has stored bytes whose content is wrong fetched once more, where they lie elsewhere. Whether
    /// reading them again may help.
    #[cold]
    pub(super) fn discard_stored(&self, stored: &Range<u64>) -> bool {
        let Source::Remote(blob) = &self.source else { return false };
        let at_byte = self.wrapping.offset_bytes.saturating_add(stored.start);
        blob.discard(at_byte, stored.end.saturating_sub(stored.start))
    }
}

fn open_zfile(source: &Source, wrapping: Wrapping) -> Result<Option<ZfilePart>> {
    let read = |offset: u64, len: u64| read_vec(source, wrapping.offset_bytes + offset, len);
    if wrapping.stored_bytes < zfile::HEADER_BYTES {
        return Ok(None);
    }
    let head = read(0, zfile::HEADER_BYTES)?;
    if !zfile::has_magic(&head) {
        return Ok(None);
    }
    let context = |what: &'static str| move || format!("parse the zfile {what}");
    let header = Header::parse(&head, 0).context(context("header"))?;
    let trailer = if zfile::needs_trailer(&header) {
        let at_byte = wrapping.stored_bytes - zfile::HEADER_BYTES;
        let bytes = read(at_byte, zfile::HEADER_BYTES)?;
        Some(Header::parse_trailer(&bytes, at_byte).context(context("trailer"))?)
    } else {
        None
    };
    let layout = zfile::layout(&header, trailer.as_ref(), wrapping.stored_bytes)
        .context(context("layout"))?;
    let start = wrapping.offset_bytes + layout.index.start;
    let end = wrapping.offset_bytes + layout.index.end;
    let mut table = JumpTableBuilder::new(&layout);
    read_in_pieces(source, start..end, |_, piece| {
        table.push(piece).context(context("jump table"))
    })?;
    let jump_table = table.finish().context(context("jump table"))?;
    Ok(Some(ZfilePart { header: layout.header, jump_table }))
}

/// Hands the bytes of `range` to `take`, which may end it with an error, in order and in pieces of
/// [`INDEX_PIECE_BYTES`]; with each comes its place.
pub(super) fn read_in_pieces(
    source: &Source,
    range: Range<u64>,
    mut take: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut here = range.start;
    let mut buffer = Vec::new();
    while here < range.end {
        let piece_bytes = (range.end - here).min(INDEX_PIECE_BYTES);
        buffer.resize(to_usize(piece_bytes).unwrap_or(0), 0);
        source.read(here, &mut buffer)?;
        take(here, &buffer)?;
        here += piece_bytes;
    }
    Ok(())
}

/// `len` bytes in fresh memory. The range is checked against the source before memory is taken.
fn read_vec(source: &Source, offset_bytes: u64, len: u64) -> Result<Vec<u8>> {
    let fits = offset_bytes.checked_add(len).is_some_and(|end| end <= source.bytes());
    let Some(len) = to_usize(len).filter(|_| fits) else {
        return Err(Error::corrupt("structure", offset_bytes, len, source.bytes()));
    };
    let mut bytes = vec![0; len];
    source.read(offset_bytes, &mut bytes)?;
    Ok(bytes)
}
