//! The parcel: what a server has parsed of its image, as bytes for its successor.
//!
//! `image::parcel` writes it into sealed memory while the image is served, and reads it back in
//! the process that takes over: no layer is opened, read or parsed again. It never lies on a disk
//! and no two versions understand each other: a successor of another version starts from the
//! config. All the same it is read like any hostile input: the same checks as at opening stand
//! between these bytes and a reader.
//!
//! ```text
//!   | header 32 | layer | ... | layer | map | CRC-32C of all before |
//!   header: magic 8, version u32, layers u32, total bytes u64, bytes of the map u64
//!   layer:  file bytes, device, inode, payload offset, payload bytes (u64 each),
//!           flags u32 (1 tar, 2 zfile), length of the path u32, path
//!           [zfile: its believed header as stored (512), its jump table as stored]
//! ```
//!
//! The map is `map`'s business (`FlatMap::from_stored`). Numbers are little-endian.

use super::zfile::{self, Header, JumpTable};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{LAYER_COUNT_MAX, PARCEL_BYTES_MAX};
use crate::units::{to_u64, to_usize};
use std::io::{self, Write};

/// Bytes of the fixed front.
pub const HEADER_BYTES: usize = 32;

const MAGIC: [u8; 8] = *b"OBDPARCL";

/// Goes up with any change of what the bytes mean.
const VERSION: u32 = 1;

/// Bytes of a layer's record before its path.
const RECORD_BYTES: usize = 48;

const CRC_BYTES: usize = 4;

const FLAG_TAR: u32 = 1;
const FLAG_ZFILE: u32 = 2;

/// Bytes that the encoder collects before it writes them.
const CHUNK_BYTES: usize = 64 * 1024;

/// What is kept of a layer apart from its compression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerFacts {
    /// The path that it was opened by, for messages; any bytes.
    pub path: Vec<u8>,
    /// Length of its file when it was opened.
    pub file_bytes: u64,
    /// With `inode`: which file it is.
    pub device_number: u64,
    /// See `device_number`.
    pub inode: u64,
    /// Where the payload begins in the file.
    pub payload_offset_bytes: u64,
    /// Length of the payload as stored.
    pub payload_bytes: u64,
    /// Whether there is a tar wrapper.
    pub tar: bool,
}

/// A layer on its way into a parcel.
#[derive(Debug)]
pub struct PackedLayer<'a> {
    /// What is known of its file.
    pub facts: LayerFacts,
    /// The believed header and the jump table of a compressed one.
    pub zfile: Option<(&'a Header, &'a JumpTable)>,
}

/// A layer out of a parcel, checked.
#[derive(Debug)]
pub struct ParcelLayer {
    /// What is known of its file.
    pub facts: LayerFacts,
    /// The believed header and the jump table of a compressed one.
    pub zfile: Option<(Header, JumpTable)>,
}

/// A parcel, taken apart.
#[derive(Debug)]
pub struct Contents<'a> {
    /// The layers, lowest first.
    pub layers: Vec<ParcelLayer>,
    /// The merged map as it was stored.
    pub map: &'a [u8],
}

/// Writes a parcel to `out`.
///
/// # Errors
/// Those of `out`; `InvalidInput` when it would be larger than [`PARCEL_BYTES_MAX`].
pub fn encode(layers: &[PackedLayer<'_>], map: &[u8], out: &mut dyn Write) -> io::Result<()> {
    let total_bytes = encoded_bytes(layers, map);
    if total_bytes > PARCEL_BYTES_MAX {
        let message = format!("a parcel of {total_bytes} bytes, at most {PARCEL_BYTES_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let too_many = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut encoder = Encoder { out, buffer: Vec::with_capacity(CHUNK_BYTES + 1024), crc: 0 };
    encoder.put(&MAGIC)?;
    encoder.put(&VERSION.to_le_bytes())?;
    encoder.put(&u32::try_from(layers.len()).map_err(too_many)?.to_le_bytes())?;
    encoder.put(&total_bytes.to_le_bytes())?;
    encoder.put(&to_u64(map.len()).to_le_bytes())?;
    for layer in layers {
        encoder.put_layer(layer)?;
    }
    for chunk in map.chunks(CHUNK_BYTES) {
        encoder.put(chunk)?;
    }
    encoder.finish()
}

fn encoded_bytes(layers: &[PackedLayer<'_>], map: &[u8]) -> u64 {
    let zfile_bytes = |zfile: &(&Header, &JumpTable)| {
        zfile::HEADER_BYTES.saturating_add(zfile.1.block_count().saturating_mul(4))
    };
    let records = layers.iter().map(|layer| {
        to_u64(RECORD_BYTES + layer.facts.path.len())
            .saturating_add(layer.zfile.as_ref().map_or(0, zfile_bytes))
    });
    records.fold(to_u64(HEADER_BYTES + map.len() + CRC_BYTES), u64::saturating_add)
}

/// Writes in large chunks, and keeps the checksum of what it wrote.
struct Encoder<'a> {
    out: &'a mut dyn Write,
    buffer: Vec<u8>,
    crc: u32,
}

impl Encoder<'_> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() < CHUNK_BYTES { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.crc = crc32c::crc32c_append(self.crc, &self.buffer);
        self.out.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    fn put_layer(&mut self, layer: &PackedLayer<'_>) -> io::Result<()> {
        let PackedLayer { facts, zfile } = layer;
        for number in [
            facts.file_bytes,
            facts.device_number,
            facts.inode,
            facts.payload_offset_bytes,
            facts.payload_bytes,
        ] {
            self.put(&number.to_le_bytes())?;
        }
        let flags = if facts.tar { FLAG_TAR } else { 0 };
        let flags = flags | if zfile.is_some() { FLAG_ZFILE } else { 0 };
        self.put(&flags.to_le_bytes())?;
        let path_bytes = u32::try_from(facts.path.len());
        let path_bytes = path_bytes.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.put(&path_bytes.to_le_bytes())?;
        self.put(&facts.path)?;
        let Some((header, jump_table)) = zfile else { return Ok(()) };
        self.put(&header.encode())?;
        for len in jump_table.record_lengths() {
            self.put(&len.to_le_bytes())?;
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        self.out.write_all(&self.crc.to_le_bytes())
    }
}

/// What the front of a parcel says about the rest, held against the length of the whole: to be
/// asked before memory is taken for it.
///
/// # Errors
/// `InvalidFormat` without the magic, `Unsupported` for another version, `Corrupt` for a length
/// that is not the stated one or beyond [`PARCEL_BYTES_MAX`].
pub fn check_front(front: &[u8], parcel_bytes: u64) -> Result<()> {
    if !front.starts_with(&MAGIC) {
        let found = front.get(..MAGIC.len()).unwrap_or(front).escape_ascii();
        let kind = ErrorKind::InvalidFormat;
        return Err(Error::field(kind, "parcel: magic", 0, found, MAGIC.escape_ascii()));
    }
    let mut cursor = Cursor { bytes: front, at: MAGIC.len() };
    let version = cursor.u32("version")?;
    if version != VERSION {
        let kind = ErrorKind::Unsupported;
        return Err(Error::field(kind, "parcel: version", 8, version, VERSION));
    }
    let _layer_count = cursor.u32("layers")?;
    let total_bytes = cursor.u64("length")?;
    if total_bytes != parcel_bytes || total_bytes > PARCEL_BYTES_MAX {
        let expected = format!("{parcel_bytes}, its length, and at most {PARCEL_BYTES_MAX}");
        return Err(Error::corrupt("parcel: length", 16, total_bytes, expected));
    }
    Ok(())
}

/// Takes a whole parcel apart. The jump tables take as much memory as they have in `bytes`.
///
/// # Errors
/// As [`check_front`]; `Integrity` when the checksum does not match; `Corrupt` when a part
/// contradicts itself or another.
pub fn decode(bytes: &[u8]) -> Result<Contents<'_>> {
    check_front(bytes, to_u64(bytes.len()))?;
    let Some((body, stored_crc)) = bytes.split_last_chunk::<CRC_BYTES>() else {
        return Err(Error::corrupt("parcel: length", 0, bytes.len(), "a header and a checksum"));
    };
    let (found, expected) = (crc32c::crc32c(body), u32::from_le_bytes(*stored_crc));
    if found != expected {
        let (found, expected) = (format!("{found:#010x}"), format!("{expected:#010x}"));
        let (kind, at_byte) = (ErrorKind::Integrity, to_u64(body.len()));
        return Err(Error::field(kind, "parcel: checksum", at_byte, found, expected));
    }
    let mut cursor = Cursor { bytes: body, at: 12 };
    let layer_count = cursor.u32("layers")?;
    let layer_count = to_usize(u64::from(layer_count)).unwrap_or(usize::MAX);
    if layer_count == 0 || layer_count > LAYER_COUNT_MAX {
        let expected = format!("1 to {LAYER_COUNT_MAX}");
        return Err(Error::corrupt("parcel: layers", 12, layer_count, expected));
    }
    cursor.at = 24;
    let map_bytes = cursor.u64("length of the map")?;
    let mut layers = Vec::with_capacity(layer_count);
    for _ in 0..layer_count {
        layers.push(cursor.layer()?);
    }
    let map = cursor.take(map_bytes, "map")?;
    if cursor.at != body.len() {
        let found = format!("{} bytes more", body.len() - cursor.at);
        return Err(Error::corrupt("parcel: end", to_u64(cursor.at), found, "the checksum"));
    }
    Ok(Contents { layers, map })
}

/// Reads on; never beyond the end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(found) = to_usize(len).and_then(|len| rest.get(..len)) else {
            let what = format!("parcel: {what}");
            let found = format!("{len} bytes");
            let expected = format!("at most {}, the rest", rest.len());
            return Err(Error::corrupt(&what, to_u64(self.at), found, expected));
        };
        self.at += found.len();
        Ok(found)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        let bytes = self.take(4, what)?;
        Ok(bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        let bytes = self.take(8, what)?;
        Ok(bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    fn layer(&mut self) -> Result<ParcelLayer> {
        let at_byte = to_u64(self.at);
        let mut facts = LayerFacts {
            file_bytes: self.u64("length of a layer's file")?,
            device_number: self.u64("device of a layer's file")?,
            inode: self.u64("inode of a layer's file")?,
            payload_offset_bytes: self.u64("offset of a layer's payload")?,
            payload_bytes: self.u64("length of a layer's payload")?,
            tar: false,
            path: Vec::new(),
        };
        let end = facts.payload_offset_bytes.checked_add(facts.payload_bytes);
        if end.is_none_or(|end| end > facts.file_bytes) {
            let found = format!("{} + {}", facts.payload_offset_bytes, facts.payload_bytes);
            let expected = format!("at most {}, the file's length", facts.file_bytes);
            return Err(Error::corrupt("parcel: end of a payload", at_byte, found, expected));
        }
        let flags = self.u32("flags of a layer")?;
        if flags & !(FLAG_TAR | FLAG_ZFILE) != 0 {
            return Err(Error::corrupt("parcel: flags of a layer", at_byte, flags, "0 to 3"));
        }
        facts.tar = flags & FLAG_TAR != 0;
        let path_bytes = self.u32("length of a layer's path")?;
        facts.path = self.take(u64::from(path_bytes), "path of a layer")?.to_vec();
        let zfile = (flags & FLAG_ZFILE != 0).then(|| self.zfile(facts.payload_bytes));
        Ok(ParcelLayer { facts, zfile: zfile.transpose()? })
    }

    fn zfile(&mut self, payload_bytes: u64) -> Result<(Header, JumpTable)> {
        let at_byte = to_u64(self.at);
        let header = Header::parse(self.take(zfile::HEADER_BYTES, "zfile header")?, at_byte)?;
        let layout = zfile::layout_of_believed(&header, payload_bytes)?;
        let table = self.take(layout.index.end - layout.index.start, "jump table")?;
        let jump_table = JumpTable::parse(table, &layout)?;
        Ok((header, jump_table))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> LayerFacts {
        LayerFacts {
            path: b"/images/a\xff.lsmt".to_vec(),
            file_bytes: 100_000,
            device_number: 2049,
            inode: 77,
            payload_offset_bytes: 1536,
            payload_bytes: 90_000,
            tar: true,
        }
    }

    /// A parcel of two layers, the upper one a zfile of `content_bytes` bytes.
    fn parcel(content_bytes: usize, overwrite_header: bool) -> (Vec<u8>, Header, Vec<u32>) {
        let options = zfile::WriteOptions { overwrite_header, ..Default::default() };
        let file = zfile::write(&vec![7; content_bytes], &options).unwrap();
        let first = Header::parse(&file[..512], 0).unwrap();
        let trailer = Header::parse(&file[file.len() - 512..], 0).unwrap();
        let trailer = (!overwrite_header).then_some(trailer);
        let layout = zfile::layout(&first, trailer.as_ref(), to_u64(file.len())).unwrap();
        let index = usize::try_from(layout.index.start).unwrap();
        let end = usize::try_from(layout.index.end).unwrap();
        let table = JumpTable::parse(&file[index..end], &layout).unwrap();
        let lengths = table.record_lengths().collect();
        let layers = [
            PackedLayer { facts: facts(), zfile: None },
            PackedLayer {
                facts: LayerFacts {
                    file_bytes: to_u64(file.len()),
                    payload_bytes: to_u64(file.len()),
                    payload_offset_bytes: 0,
                    tar: false,
                    ..facts()
                },
                zfile: Some((&layout.header, &table)),
            },
        ];
        let mut bytes = Vec::new();
        encode(&layers, b"the map", &mut bytes).unwrap();
        (bytes, layout.header, lengths)
    }

    fn repaired(mut bytes: Vec<u8>) -> Vec<u8> {
        let body = bytes.len() - CRC_BYTES;
        let crc = crc32c::crc32c(&bytes[..body]).to_le_bytes();
        bytes[body..].copy_from_slice(&crc);
        bytes
    }

    #[test]
    fn what_was_packed_is_unpacked_with_a_header_or_a_trailer_alone() {
        for overwrite_header in [true, false] {
            // More than one chunk of the encoder: 20,000 blocks have 80 KB of jump table.
            let (bytes, header, lengths) = parcel(20_000 * 4096 + 1, overwrite_header);
            assert_eq!(lengths.len(), 20_001);
            let contents = decode(&bytes).unwrap();
            assert_eq!(contents.map, b"the map");
            assert_eq!(contents.layers[0].facts, facts());
            assert!(contents.layers[0].zfile.is_none());
            let (found, table) = contents.layers[1].zfile.as_ref().unwrap();
            assert_eq!(*found, header);
            assert_eq!(table.record_lengths().collect::<Vec<_>>(), lengths);
            assert_eq!(table.compressed_range(0).start, 512);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_an_error() {
        let (bytes, ..) = parcel(3 * 4096, true);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << bit;
                assert!(decode(&bad).is_err(), "bit {bit} of byte {at}");
                // With a checksum that fits it need not be an error, but must not panic.
                let _ = decode(&repaired(bad));
            }
            assert!(decode(&bytes[..at]).is_err(), "cut at {at}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(decode(&longer).is_err());
    }

    #[test]
    fn impossible_fields_are_refused_by_name_under_a_checksum_that_fits() {
        let (bytes, ..) = parcel(3 * 4096, true);
        let total = to_u64(bytes.len());
        let first_layer = HEADER_BYTES;
        let cases: [(usize, Vec<u8>, ErrorKind, &str); 9] = [
            (0, vec![b'X'], ErrorKind::InvalidFormat, "parcel: magic"),
            (8, vec![2], ErrorKind::Unsupported, "parcel: version at byte 8: found 2"),
            (12, vec![0], ErrorKind::Corrupt, "parcel: layers at byte 12: found 0"),
            (12, vec![0, 1], ErrorKind::Corrupt, "found 256, expected 1 to 255"),
            (12, vec![1], ErrorKind::Corrupt, "parcel: end"),
            (16, (total + 1).to_le_bytes().to_vec(), ErrorKind::Corrupt, "parcel: length"),
            (24, vec![8], ErrorKind::Corrupt, "parcel: map"),
            (first_layer, vec![0; 8], ErrorKind::Corrupt, "parcel: end of a payload"),
            (first_layer + 44, vec![255; 4], ErrorKind::Corrupt, "parcel: path of a layer"),
        ];
        for (at, patch, kind, told) in cases {
            let mut bad = bytes.clone();
            bad[at..at + patch.len()].copy_from_slice(&patch);
            let error = decode(&repaired(bad)).unwrap_err();
            assert_eq!(error.kind(), kind, "{error:#}");
            assert!(format!("{error:#}").contains(told), "{told}: {error:#}");
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_memory_is_taken() {
        let (mut bytes, ..) = parcel(4096, true);
        let huge = PARCEL_BYTES_MAX + 1;
        bytes[16..24].copy_from_slice(&huge.to_le_bytes());
        let error = check_front(&bytes[..HEADER_BYTES], huge).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
}
