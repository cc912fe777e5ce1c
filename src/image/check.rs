//! Checking every byte that a checksum or a codec can vouch for, on all cores.
//!
//! Opening a layer checks its structure: headers, digests, index order, bounds. What is left is
//! its content: every compression block is read, its CRC compared and the block decoded; a raw
//! layer has no checksum, so its bytes are read to find a failing disk; a blob with a digest in
//! the config is hashed. Damage does not stop the check: each block is reported.

use super::layer::Layer;
use super::reader::Scratch;
use super::together::on_threads;
use crate::error::{Error, ErrorKind, Result};
use crate::source::{Source, data_extents};
use crate::units::{to_u64, to_usize};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Decompressed bytes in one piece of work: small enough to spread one layer over all cores, large
/// enough that taking a piece costs nothing.
const PIECE_BYTES: u64 = 1 << 20;

/// Bytes hashed per read.
const HASH_BYTES: u64 = 1 << 20;

/// Errors kept per layer; the others are only counted. A destroyed layer has millions.
const ERRORS_KEPT_MAX: usize = 20;

/// What a check found in one layer.
#[derive(Debug, Default)]
pub struct LayerReport {
    /// Decompressed bytes read.
    pub bytes: u64,
    /// Compression blocks checked.
    pub blocks: u64,
    /// Blocks whose CRC was compared (a zfile may have none).
    pub checksums: u64,
    /// Whether the whole blob was compared with the digest in the config.
    pub digest_checked: bool,
    /// How many pieces are damaged.
    pub damaged: u64,
    /// The first of them.
    pub errors: Vec<Error>,
}

impl LayerReport {
    fn damage(&mut self, error: Error) {
        self.damaged += 1;
        if self.errors.len() < ERRORS_KEPT_MAX {
            self.errors.push(error);
        }
    }

    fn absorb(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.blocks += other.blocks;
        self.checksums += other.checksums;
        self.digest_checked |= other.digest_checked;
        self.damaged += other.damaged;
        let room = ERRORS_KEPT_MAX.saturating_sub(self.errors.len());
        self.errors.extend(other.errors.into_iter().take(room));
    }
}

/// One piece of work.
enum Piece {
    Content { layer: usize, offset_bytes: u64, len: u64 },
    Digest { layer: usize },
}

/// Checks the content of `layers`; `digests` are the expected sha256 of the stored files in hex,
/// one per layer where known. `progress` counts the bytes done, out of [`work_bytes`].
///
/// # Errors
/// Only when memory or a codec cannot be had; damage is in the reports, one per layer.
pub fn check_layers(
    layers: &[Layer],
    digests: &[Option<String>],
    progress: &AtomicU64,
) -> Result<Vec<LayerReport>> {
    let plan = Work::plan(layers, digests)?;
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || -> Result<Vec<LayerReport>> {
        let mut reports: Vec<LayerReport> = layers.iter().map(|_| LayerReport::default()).collect();
        let mut scratch = Scratch::new(layers.iter().map(|layer| &layer.payload))?;
        let mut buffer = Vec::new();
        while let Some(piece) = plan.piece(next.fetch_add(1, Ordering::Relaxed)) {
            match piece {
                Piece::Content { layer, offset_bytes, len } => {
                    let range = (offset_bytes, len);
                    check_piece(layers, layer, range, &mut scratch, &mut buffer, &mut reports);
                    progress.fetch_add(len, Ordering::Relaxed);
                }
                Piece::Digest { layer } => {
                    let wanted = digests.get(layer).and_then(Option::as_deref).unwrap_or("");
                    check_digest(&layers[layer], wanted, &mut reports[layer], progress);
                }
            }
        }
        Ok(reports)
    };
    let mut total: Vec<LayerReport> = layers.iter().map(|_| LayerReport::default()).collect();
    for reports in on_threads(threads, work) {
        for (sum, report) in total.iter_mut().zip(reports?) {
            sum.absorb(report);
        }
    }
    Ok(total)
}

/// The bytes that [`check_layers`] will count in its progress; may be more than it reads when a
/// file has holes.
#[must_use]
pub fn work_bytes(layers: &[Layer], digests: &[Option<String>]) -> u64 {
    let content = layers.iter().map(|layer| layer.payload.bytes());
    let with_digest = layers.iter().zip(digests).filter(|(_, digest)| digest.is_some());
    let hashed = with_digest.map(|(layer, _)| layer.payload.source().bytes());
    content.chain(hashed).fold(0, u64::saturating_add)
}

/// A stretch of one layer's content; cut into pieces as they are taken.
struct Span {
    layer: usize,
    bytes: Range<u64>,
    // Number of its first piece.
    first_piece: u64,
}

/// All work: digests first, as each is one long piece and the others fill the gaps; then content.
struct Work {
    digests: Vec<usize>,
    spans: Vec<Span>,
    pieces: u64,
}

impl Work {
    fn plan(layers: &[Layer], digests: &[Option<String>]) -> Result<Self> {
        let has_digest = |layer: &usize| digests.get(*layer).is_some_and(Option::is_some);
        let digests: Vec<usize> = (0..layers.len()).filter(has_digest).collect();
        let (mut spans, mut pieces) = (Vec::new(), to_u64(digests.len()));
        for (layer, open) in layers.iter().enumerate() {
            for bytes in stored_ranges(open)? {
                let count = (bytes.end - bytes.start).div_ceil(PIECE_BYTES);
                spans.push(Span { layer, bytes, first_piece: pieces });
                pieces = pieces.saturating_add(count);
            }
        }
        Ok(Self { digests, spans, pieces })
    }

    fn piece(&self, number: u64) -> Option<Piece> {
        if let Some(&layer) = to_usize(number).and_then(|number| self.digests.get(number)) {
            return Some(Piece::Digest { layer });
        }
        if number >= self.pieces {
            return None;
        }
        let after = self.spans.partition_point(|span| span.first_piece <= number);
        let span = self.spans.get(after.checked_sub(1)?)?;
        let offset_bytes = span.bytes.start + (number - span.first_piece) * PIECE_BYTES;
        let len = PIECE_BYTES.min(span.bytes.end - offset_bytes);
        Some(Piece::Content { layer: span.layer, offset_bytes, len })
    }
}

/// What of a layer's content is to be read: all of a compressed one; of a plain file what is not a
/// hole, for a hole has nothing that could be damaged.
fn stored_ranges(layer: &Layer) -> Result<Vec<Range<u64>>> {
    match layer.payload.source() {
        Source::Mapped(file) if layer.payload.zfile().is_none() => {
            let base = layer.payload.wrapping().offset_bytes;
            let end = base + layer.payload.bytes();
            let extents = data_extents(file, base)?.into_iter();
            let inside = extents.map(|extent| extent.start - base..extent.end.min(end) - base);
            Ok(inside.filter(|range| !range.is_empty()).collect())
        }
        _ => Ok(std::iter::once(0..layer.payload.bytes()).collect()),
    }
}

/// A piece starts on a block boundary: every block size divides the piece size.
fn check_piece(
    layers: &[Layer],
    layer: usize,
    (offset_bytes, len): (u64, u64),
    scratch: &mut Scratch,
    buffer: &mut Vec<u8>,
    reports: &mut [LayerReport],
) {
    let (payload, report) = (&layers[layer].payload, &mut reports[layer]);
    let number = u16::try_from(layer).unwrap_or(u16::MAX);
    let step = payload.block_bytes().map_or(len, u64::from);
    let mut here = offset_bytes;
    while here < offset_bytes + len {
        let now = step.min(offset_bytes + len - here);
        buffer.resize(to_usize(now).unwrap_or(0), 0);
        match scratch.read(payload, number, here, buffer) {
            Ok(()) => report.bytes += now,
            Err(error) => report.damage(error),
        }
        if let Some(zfile) = payload.zfile() {
            report.blocks += 1;
            report.checksums += u64::from(zfile.header.has_block_crc);
        }
        here += now;
    }
}

fn check_digest(layer: &Layer, wanted: &str, report: &mut LayerReport, progress: &AtomicU64) {
    let source = layer.payload.source();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; to_usize(HASH_BYTES.min(source.bytes())).unwrap_or(0)];
    let mut here = 0;
    while here < source.bytes() {
        let len = to_u64(buffer.len()).min(source.bytes() - here);
        let part = &mut buffer[..to_usize(len).unwrap_or(0)];
        if let Err(error) = source.read(here, part) {
            report.damage(error);
            return;
        }
        hash.update(&*part);
        here += len;
        progress.fetch_add(len, Ordering::Relaxed);
    }
    report.digest_checked = true;
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found != wanted {
        let expected = format!("sha256:{wanted}");
        let found = format!("sha256:{found}");
        report.damage(Error::field(ErrorKind::Integrity, "digest of the blob", 0, found, expected));
    }
}
