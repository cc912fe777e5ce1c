//! One layer: its payload and its index, checked.

use super::payload::{Payload, read_in_pieces};
use super::reader::Scratch;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::lsmt::{self, Header, SegmentMapping};
use crate::source::{FileIdentity, MappedFile, Source};
use crate::units::{SECTOR_SIZE, to_u64, to_usize, whole_sectors};
use crate::upper;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a layer is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// Written by `commit`, `close_seal` or `merge`: one file, header and trailer.
    Sealed,
    /// A writable pair in append form: data file and index log.
    WritableAppend,
    /// A writable pair in sparse form: the data file's holes are the index.
    WritableSparse,
}

/// An open layer with its index.
#[derive(Debug)]
pub struct Layer {
    /// How it is stored.
    pub kind: LayerKind,
    /// What identifies it in messages: its path.
    pub name: String,
    /// The authoritative header (the trailer of a sealed layer).
    pub header: Header,
    /// Size of the virtual disk in bytes as this layer has it; 0 when it does not say.
    pub virtual_bytes: u64,
    /// The index: sorted and disjoint if sealed or sparse, a log if append.
    pub segments: Vec<SegmentMapping>,
    /// Entries as stored, padding included.
    pub stored_entries: u64,
    /// The bytes.
    pub payload: Payload,
}

impl Layer {
    /// Opens a sealed layer, whatever it is wrapped in.
    ///
    /// # Errors
    /// `InvalidFormat` when it is no LSMT file, `Corrupt` or `Integrity` when it is a broken one.
    pub fn open_sealed(name: String, source: Source) -> Result<Self> {
        let payload = Payload::open(source)?;
        let bytes = payload.bytes();
        let mut scratch = Scratch::new(std::iter::once(&payload))?;
        if bytes < 2 * lsmt::HEADER_BYTES {
            let found = format!("{bytes} bytes");
            return Err(Error::field(
                ErrorKind::InvalidFormat,
                "lsmt file",
                0,
                found,
                "a header and a trailer of 4096 bytes each",
            ));
        }
        let header = read_header(&mut scratch, &payload, 0, "lsmt header")?;
        let trailer_at = bytes - lsmt::HEADER_BYTES;
        let trailer = read_header(&mut scratch, &payload, trailer_at, "lsmt trailer")?;
        let index = lsmt::locate_sealed_index(&header, &trailer, bytes)
            .context(|| "locate the index".to_owned())?;
        let index_bytes = index.entries.saturating_mul(to_u64(SegmentMapping::BYTES));
        let stored = read_vec(&mut scratch, &payload, index.offset_bytes, index_bytes)?;
        let data_end_sector = whole_sectors(index.offset_bytes);
        let segments = lsmt::parse_sealed_index(&stored, index.offset_bytes, data_end_sector)
            .context(|| "parse the index".to_owned())?;
        Ok(Self {
            kind: LayerKind::Sealed,
            name,
            virtual_bytes: index.virtual_size_bytes,
            header: trailer,
            segments,
            stored_entries: index.entries,
            payload,
        })
    }

    /// As [`Layer::open_sealed`] for an open file of `bytes`; `path` is for messages.
    ///
    /// # Errors
    /// As there; `Corrupt` for another file than the expected one.
    pub fn adopt_sealed(
        path: PathBuf,
        file: File,
        expected: FileIdentity,
        bytes: u64,
    ) -> Result<Self> {
        let name = path.display().to_string();
        let mapped = MappedFile::adopt(path, file.into(), expected, bytes)?;
        Self::open_sealed(name, Source::Mapped(Arc::new(mapped)))
    }

    /// Opens a writable pair as a read-only view of what it holds now: what was flushed, and what
    /// the journal of its server holds, which may be running.
    ///
    /// # Errors
    /// As [`Layer::open_sealed`]; `Corrupt` for a journal that does not fit the pair.
    pub fn open_writable(data: &Path, index: &Path) -> Result<Self> {
        let (layer, _) = Self::open_flushed(data, index)?;
        let identity = match layer.payload.source() {
            Source::Mapped(mapped) if layer.kind == LayerKind::WritableAppend => {
                FileIdentity::of(mapped.file())
                    .map_err(|error| Error::io(format!("stat {}", data.display()), &error))?
            }
            _ => return Ok(layer),
        };
        let view = || {
            let (layer, index_bytes) = Self::open_flushed(data, index)?;
            let data_end_sector = whole_sectors(layer.payload.bytes());
            Ok((layer, index_bytes, data_end_sector))
        };
        let uuid = layer.header.uuid;
        drop(layer);
        let (mut layer, unflushed) = upper::overlay_journal(identity, uuid, view)?;
        layer.segments.extend(unflushed);
        Ok(layer)
    }

    /// The view of what was flushed, and the length of the index file.
    fn open_flushed(data: &Path, index: &Path) -> Result<(Self, u64)> {
        // The index first: what it points at is in the data file by then.
        let index_source = Source::open(index)?;
        let source = Source::open(data)?;
        let payload = Payload::plain(source);
        let mut scratch = Scratch::new(std::iter::once(&payload))?;
        let data_header = read_header(&mut scratch, &payload, 0, "header of the data file")?;
        let index_payload = Payload::plain(index_source);
        let index_header = if index_payload.bytes() == 0 {
            None
        } else {
            Some(read_header(&mut scratch, &index_payload, 0, "header of the index file")?)
        };
        let pair = lsmt::check_writable_pair(&data_header, index_header.as_ref())?;
        let (kind, segments, stored_entries) = if pair.sparse {
            let extents = data_extents(&payload)?;
            // A layer that asks the one below for its size is as long as its file.
            let disk_bytes = match pair.virtual_size_bytes {
                0 => {
                    payload.bytes().saturating_sub(lsmt::HEADER_BYTES).next_multiple_of(SECTOR_SIZE)
                }
                bytes => bytes,
            };
            let segments = lsmt::segments_of_sparse_file(&extents, disk_bytes)?;
            let entries = to_u64(segments.len());
            (LayerKind::WritableSparse, segments, entries)
        } else {
            let end_sector = whole_sectors(payload.bytes());
            let (segments, entries) = read_log(index_payload.source(), end_sector)?;
            (LayerKind::WritableAppend, segments, entries)
        };
        let layer = Self {
            kind,
            name: data.display().to_string(),
            header: data_header,
            virtual_bytes: pair.virtual_size_bytes,
            segments,
            stored_entries,
            payload,
        };
        Ok((layer, index_payload.bytes()))
    }
}

/// The log in the index file of a writable pair without what a power cut tore, and how many entries
/// the file has, blank ones included.
fn read_log(source: &Source, data_end_sector: u64) -> Result<(Vec<SegmentMapping>, u64)> {
    let entries = source.bytes().saturating_sub(lsmt::HEADER_BYTES) / to_u64(SegmentMapping::BYTES);
    lsmt::check_log_entries(entries, lsmt::HEADER_BYTES)?;
    let mut scanner = lsmt::LogScanner::new(data_end_sector);
    read_in_pieces(source, lsmt::HEADER_BYTES..source.bytes(), |at_byte, piece| {
        scanner.push(piece, at_byte)
    })?;
    Ok((scanner.finish().segments, entries))
}

fn read_header(
    scratch: &mut Scratch,
    payload: &Payload,
    at_byte: u64,
    what: &'static str,
) -> Result<Header> {
    let bytes = read_vec(scratch, payload, at_byte, lsmt::HEADER_BYTES)
        .context(|| format!("read the {what}"))?;
    // Whatever does not start with a header is no LSMT file; one that does not end with a trailer
    // is a broken one.
    let parsed = if at_byte == 0 {
        Header::parse(&bytes, at_byte)
    } else {
        Header::parse_trailer(&bytes, at_byte)
    };
    parsed.context(|| format!("parse the {what}"))
}

/// `len` decompressed bytes in fresh memory, checked against the payload before memory is taken.
fn read_vec(
    scratch: &mut Scratch,
    payload: &Payload,
    offset_bytes: u64,
    len: u64,
) -> Result<Vec<u8>> {
    let fits = offset_bytes.checked_add(len).is_some_and(|end| end <= payload.bytes());
    let Some(len) = to_usize(len).filter(|_| fits) else {
        let expected = format!("at most {} bytes", payload.bytes());
        return Err(Error::corrupt("structure", offset_bytes, format!("{len} bytes"), expected));
    };
    let mut bytes = vec![0; len];
    scratch.read(payload, 0, offset_bytes, &mut bytes)?;
    Ok(bytes)
}

/// The byte ranges of a sparse file that hold data, as its file system tells.
fn data_extents(payload: &Payload) -> Result<Vec<Range<u64>>> {
    let Source::Mapped(mapped) = payload.source() else {
        // Bytes in memory have no holes.
        let whole = lsmt::HEADER_BYTES..payload.bytes();
        return Ok(if whole.is_empty() { Vec::new() } else { vec![whole] });
    };
    crate::source::data_extents(mapped, lsmt::HEADER_BYTES)
}
