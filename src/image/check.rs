//! Checking every byte that a checksum or a codec can vouch for, on all cores.
//!
//! Opening a layer checks its structure: headers, digests, index order, bounds. What is left is
//! its content: every compression block is read, its CRC compared and the block decoded; a raw
//! layer has no checksum, so its bytes are read to find a failing disk; a blob with a digest in
//! the config is hashed. Damage does not stop the check: each block is reported.

use super::layer::Layer;
use super::reader::Scratch;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{to_u64, to_usize};
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

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
    let pieces = pieces(layers, digests);
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(pieces.len());
    let work = || -> Result<Vec<LayerReport>> {
        let mut reports: Vec<LayerReport> = layers.iter().map(|_| LayerReport::default()).collect();
        let mut scratch = Scratch::new(layers.iter().map(|layer| &layer.payload))?;
        let mut buffer = Vec::new();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            match *piece {
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
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut total = work()?;
        for helper in helpers {
            let reports = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            for (sum, report) in total.iter_mut().zip(reports) {
                sum.absorb(report);
            }
        }
        Ok(total)
    })
}

/// The bytes that [`check_layers`] will count in its progress.
#[must_use]
pub fn work_bytes(layers: &[Layer], digests: &[Option<String>]) -> u64 {
    let content: u64 = layers.iter().map(|layer| layer.payload.bytes()).sum();
    let with_digest = layers.iter().zip(digests).filter(|(_, digest)| digest.is_some());
    content + with_digest.map(|(layer, _)| layer.payload.source().bytes()).sum::<u64>()
}

fn pieces(layers: &[Layer], digests: &[Option<String>]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (layer, open) in layers.iter().enumerate() {
        if digests.get(layer).is_some_and(Option::is_some) {
            // First: a digest is one long piece, the others fill the gaps.
            pieces.insert(0, Piece::Digest { layer });
        }
        let bytes = open.payload.bytes();
        let mut offset_bytes = 0;
        while offset_bytes < bytes {
            let len = PIECE_BYTES.min(bytes - offset_bytes);
            pieces.push(Piece::Content { layer, offset_bytes, len });
            offset_bytes += len;
        }
    }
    pieces
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
