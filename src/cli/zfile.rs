//! `zfile`: one zfile by itself, whatever it holds.

use super::output::with_progress;
use super::output_file::OutputFile;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::image::{Payload, Scratch};
use crate::source::Source;
use crate::units::{to_u64, to_usize};
use clap::Parser;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Bytes decoded at a time; a multiple of every block size.
const PIECE_BYTES: u64 = 4 << 20;

/// Decompress a zfile (raw or in a tar wrapper)
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// Extract: decompress IN to OUT
    #[arg(short = 'x', long, required = true)]
    extract: bool,
    /// The zfile
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The decompressed file; replaced as a whole if it exists
    #[arg(value_name = "OUT")]
    output: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let shown = args.input.display();
    let payload = Payload::open(Source::open(&args.input)?).context(|| format!("open {shown}"))?;
    if payload.zfile().is_none() {
        return Err(Error::new(ErrorKind::InvalidFormat, format!("{shown} is not a zfile")));
    }
    let mut scratch = Scratch::new(std::iter::once(&payload))?;
    let output = OutputFile::create(&args.output)?;
    let failed =
        |error: &std::io::Error| Error::io(format!("write {}", args.output.display()), error);
    with_progress(payload.bytes(), |progress| {
        let piece_bytes = PIECE_BYTES.min(payload.bytes());
        let mut buffer = vec![0; to_usize(piece_bytes).unwrap_or(0)];
        let mut here = 0;
        while here < payload.bytes() {
            let len = to_u64(buffer.len()).min(payload.bytes() - here);
            let part = &mut buffer[..to_usize(len).unwrap_or(0)];
            scratch.read(&payload, 0, here, part).context(|| format!("extract {shown}"))?;
            output.file().write_all(part).map_err(|error| failed(&error))?;
            here += len;
            progress.fetch_add(len, Ordering::Relaxed);
        }
        Ok(())
    })?;
    output.commit()
}
