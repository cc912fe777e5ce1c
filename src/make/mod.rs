//! Making layers: from a writable pair, a sealed layer or a whole stack to one file that the
//! reference and we read.
//!
//! ```text
//!   runs of the input --> pieces --read, find zeros--> place, in order --> compress --> write
//!                         [ many threads           ]  [ one at a time ]  [ many threads        ]
//! ```
//!
//! The `commit`, `merge` and `zfile` commands and a snapshot's background work call [`write_layer`]
//! and [`compress_file`]. Which sectors lie where is decided by `layout`, which is pure and passes
//! from piece to piece in order, so that the bytes are the same for any number of threads; nothing
//! else that could differ between two runs (time, user, locale, host) is in a layer. Memory is a
//! function of the options, [`MakeOptions::memory_bytes`], beside the indexes of the input; a long
//! jump table waits in a file without a name. A source is only read, an [`OutputFile`] gets its
//! name when it is complete and synced, and whatever ends the process before leaves nothing.
//!
//! Zeros: a block of 4 KiB of the disk that is stored as zeros becomes a zeroed entry and takes no
//! room ([`ZeroDetection`]). A record that the reference could not read (64 KiB that do not
//! compress) makes the layer be written again with blank sectors in each block, see `layout`.

mod content;
mod diff;
mod finish;
mod layout;
mod options;
mod output_file;
mod pipeline;
mod sink;
mod zeros;

pub use content::{Content, Identity};
pub use diff::{DiffSummary, diff};
pub use options::{CODECS, CONSISTENCY, MakeOptions, Watch, ZeroDetection};
pub use output_file::OutputFile;
pub use sink::Sink;

// For callers that choose a codec and have nothing else to do with formats.
pub use crate::format::zfile::{Algorithm, WriteOptions as ZfileOptions};

use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::image::{Layer, Payload};
use crate::source::{Source, is_same_file};
use finish::Job;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// What was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// Length of the file.
    pub file_bytes: u64,
    /// Length of what is in its wrappers: the LSMT file, or the file that was compressed.
    pub content_bytes: u64,
    /// Sectors of data that it holds.
    pub data_sectors: u64,
    /// Sectors that its entries say are zero.
    pub zeroed_sectors: u64,
    /// Entries of its index, without padding.
    pub entries: u64,
    /// Compressed blocks.
    pub blocks: u64,
    /// Whether blocks hold blank sectors each, so that the reference can read them.
    pub relaxed: bool,
}

/// Writes `content` as one sealed layer to `output`, which is replaced as a whole. Blocks, on all
/// cores, as long as it takes to read and compress the content.
///
/// # Errors
/// `InvalidConfig` when the output is a part of the input; `Unsupported` for more entries than a
/// layer may have; `Canceled`; what is wrong with the input; `NoSpace` and what else the operating
/// system says. Nothing is left then, and what was under the name is still there.
pub fn write_layer(
    content: &Content,
    identity: &Identity,
    options: &MakeOptions,
    output: &Path,
    watch: &Watch<'_>,
) -> Result<Made> {
    content.check_output(output)?;
    write_layer_as(content, identity, options, open_output(output)?, watch)
}

fn write_layer_as(
    content: &Content,
    identity: &Identity,
    options: &MakeOptions,
    output: OutputFile,
    watch: &Watch<'_>,
) -> Result<Made> {
    to_file(output, |file, folder, name| {
        let job = Job { options, watch, folder, name };
        job.write_layer(content, identity, file)
    })
}

/// As [`write_layer`], into any sink. A jump table that is too long for memory waits in `folder`.
///
/// # Errors
/// As there. What the sink holds then is nothing.
pub fn write_layer_to(
    content: &Content,
    identity: &Identity,
    options: &MakeOptions,
    sink: &dyn Sink,
    folder: &Path,
    watch: &Watch<'_>,
) -> Result<Made> {
    let job = Job { options, watch, folder, name: "the layer" };
    job.write_layer(content, identity, sink)
}

/// Compresses what `payload` holds, whatever it is, to the zfile `output`, which is replaced as a
/// whole.
///
/// # Errors
/// As [`write_layer`]; `Unsupported` where blocks of 64 KiB do not compress: the reference could
/// not read them.
pub fn compress_file(
    payload: &Payload,
    options: &MakeOptions,
    output: &Path,
    watch: &Watch<'_>,
) -> Result<Made> {
    if let Source::Mapped(mapped) = payload.source() {
        refuse_same(mapped.path(), output)?;
    }
    to_file(open_output(output)?, |file, folder, name| {
        let job = Job { options, watch, folder, name };
        job.compress(payload, file)
    })
}

/// The sealed layer at `input` once more, as `options` say, under `output`, where nothing may be:
/// what a snapshot does with a layer that it sealed, in the background. UUIDs, virtual size and tag
/// stay. Set `canceled` to end it early; it looks after each piece of 256 KiB.
///
/// # Errors
/// As [`write_layer`].
pub fn recompress_layer(
    input: &Path,
    output: &Path,
    options: &MakeOptions,
    canceled: &AtomicBool,
) -> Result<Made> {
    let layer = Source::open(input)
        .and_then(|source| Layer::open_sealed(input.display().to_string(), source))
        .context(|| format!("open {}", input.display()))?;
    let content = Content::of_layer(layer)?;
    let done = AtomicU64::new(0);
    let watch = Watch { done: &done, canceled };
    content.check_output(output)?;
    let output = OutputFile::create_new(output)?;
    write_layer_as(&content, content.identity(), options, output, &watch)
}

fn streamed(output: &Path) -> Error {
    let message = format!("{}: a layer is not written from front to back", output.display());
    Error::new(ErrorKind::Unsupported, message)
}

/// The output, unless that is a pipe: to open one would be to wait for somebody who reads.
fn open_output(output: &Path) -> Result<OutputFile> {
    if std::fs::metadata(output).is_ok_and(|found| found.file_type().is_fifo()) {
        return Err(streamed(output));
    }
    OutputFile::create(output)
}

fn to_file(
    file: OutputFile,
    write: impl FnOnce(&std::fs::File, &Path, &str) -> Result<Made>,
) -> Result<Made> {
    let name = file.target().display().to_string();
    if file.is_stream() {
        return Err(streamed(file.target()));
    }
    let made = write(file.file(), output_file::folder_of(file.target()), &name)?;
    file.commit()?;
    Ok(made)
}

/// Refuses to put the output in the place of an input.
///
/// # Errors
/// `InvalidConfig`.
pub(crate) fn refuse_same(input: &Path, output: &Path) -> Result<()> {
    if !is_same_file(input, output) {
        return Ok(());
    }
    let message =
        format!("{} is read ({}) and must not be written", output.display(), input.display());
    Err(Error::new(ErrorKind::InvalidConfig, message))
}
