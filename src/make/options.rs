//! How layers are made.

use crate::error::{Error, ErrorKind, Result};
use crate::format::zfile::{Encoder, WriteOptions};
use crate::limits::{
    MAKE_PIECE_BYTES, MAKE_TABLE_BYTES, MAKE_THREADS_MAX, MAKE_WAITING_PER_THREAD,
    ZFILE_BLOCK_SIZE_MAX, ZFILE_BLOCK_SIZE_MIN,
};
use crate::units::{to_u64, to_usize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The version of our bytes: the same input and options give the same layer with every program
/// that says the same here. To be changed with whatever changes a byte: the codecs' versions, the
/// layout, the defaults. `tests/make_digests.rs` fails when bytes change and this does not.
pub const CONSISTENCY: &str = "obd-c2";

/// The codecs that the bytes depend on: the crates that `Cargo.toml` pins, and the version of the C
/// library that each brings along.
pub const CODECS: [(&str, &str); 2] =
    [("lz4", "lzzzz 2.0.0 (1.10.0)"), ("zstd", "zstd-sys 2.1.2 (1.5.7)")];

// zstd-sys takes what the host has where this is set, whatever its value.
const _: () = assert!(
    option_env!("ZSTD_SYS_USE_PKG_CONFIG").is_none(),
    "unset ZSTD_SYS_USE_PKG_CONFIG: with the host's zstd a layer's bytes are those of the host"
);

/// Whether zeros that are stored in the input take room in the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroDetection {
    /// Every sector of data stays data: the bytes are those of the reference's tools.
    Off,
    /// Blocks of 4096 bytes of the disk. What is left of the data keeps its alignment, so that
    /// reading 4 KiB of the disk decodes one block and not two.
    #[default]
    Blocks,
    /// Single sectors: the least data, not the fastest to read.
    Sectors,
}

impl ZeroDetection {
    /// Sectors of the disk that are looked at together; `None` when nobody looks.
    pub(super) fn granule_sectors(self) -> Option<u64> {
        match self {
            Self::Off => None,
            Self::Blocks => Some(8),
            Self::Sectors => Some(1),
        }
    }
}

/// How a layer is made. The default is what the reference's `commit -z` does, with zeros left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MakeOptions {
    /// How it is compressed; `None` for a raw layer.
    pub zfile: Option<WriteOptions>,
    /// Whether it is wrapped as registries expect it.
    pub tar: bool,
    /// What becomes of zeros.
    pub zeros: ZeroDetection,
    /// Threads; 0 for one on each core. They change nothing but the time it takes.
    pub threads: usize,
}

impl Default for MakeOptions {
    fn default() -> Self {
        Self {
            zfile: Some(WriteOptions::default()),
            tar: false,
            zeros: ZeroDetection::default(),
            threads: 0,
        }
    }
}

impl MakeOptions {
    /// Whether these can be.
    ///
    /// # Errors
    /// `Usage` for a block size or a level that no reader knows.
    pub fn check(&self) -> Result<()> {
        let Some(zfile) = &self.zfile else { return Ok(()) };
        let sizes = ZFILE_BLOCK_SIZE_MIN..=ZFILE_BLOCK_SIZE_MAX;
        if !zfile.block_bytes.is_power_of_two() || !sizes.contains(&zfile.block_bytes) {
            let message = format!(
                "blocks of {} bytes: expected a power of two from 4096 to 65536",
                zfile.block_bytes
            );
            return Err(Error::new(ErrorKind::Usage, message));
        }
        Encoder::new(zfile).map(drop)
    }

    /// The threads that will work.
    #[must_use]
    pub fn thread_count(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        let wanted = if self.threads == 0 { all() } else { self.threads };
        wanted.clamp(1, MAKE_THREADS_MAX)
    }

    /// Bytes of memory that making a layer takes at most, whatever the size of the layer, beside
    /// the indexes of its input and its own: each thread has a piece, what becomes of it, and what
    /// waits to be written.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let block_bytes = self.zfile.as_ref().map_or(0, |zfile| zfile.block_bytes);
        let block_bytes = to_usize(u64::from(block_bytes)).unwrap_or(0);
        // A piece, twice when blanks are put between, with the block that it completes.
        let piece = 2 * MAKE_PIECE_BYTES + 2 * block_bytes;
        // What does not compress grows by less than a 64th.
        let encoded = (MAKE_PIECE_BYTES + 2 * block_bytes) / 64 * 65 + 4096;
        let each = piece + (1 + MAKE_WAITING_PER_THREAD) * encoded;
        to_u64(self.thread_count() * each + 2 * MAKE_TABLE_BYTES)
    }
}

/// How somebody follows the work, and ends it.
#[derive(Clone, Copy, Debug)]
pub struct Watch<'a> {
    /// Bytes of data of the input that are done.
    pub done: &'a AtomicU64,
    /// Set to end the work soon, with `Canceled`.
    pub canceled: &'a AtomicBool,
}

impl Watch<'_> {
    pub(super) fn check(&self) -> Result<()> {
        if self.canceled.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Canceled, "making the layer was ended"));
        }
        Ok(())
    }
}
