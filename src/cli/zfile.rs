//! `zfile`: one zfile by itself, whatever it holds.

use super::making::{ZfileArgs, tell};
use super::output::{print_facts, with_progress};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::image::{Payload, Scratch};
use crate::make::{MakeOptions, OutputFile, Watch, ZeroDetection, compress_file, refuse_same};
use crate::source::Source;
use crate::units::{to_u64, to_usize};
use clap::Parser;
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes decoded at a time; a multiple of every block size.
const PIECE_BYTES: u64 = 4 << 20;

/// Compress any file to a zfile; or extract, check or recompress one (raw or in a tar wrapper)
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// Extract: decompress IN to OUT
    #[arg(short = 'x', long, conflicts_with_all = ["check", "recompress", "tar"])]
    pub(crate) extract: bool,

    /// Check: decode every block of IN and compare its checksum; no OUT
    #[arg(long, conflicts_with_all = ["recompress", "tar", "output"])]
    pub(crate) check: bool,

    /// Recompress: what IN holds, compressed anew, without a file in between
    #[arg(long)]
    pub(crate) recompress: bool,

    /// The file that is read
    #[arg(value_name = "IN")]
    pub(crate) input: PathBuf,

    /// The file that is written; replaced as a whole if it exists
    #[arg(value_name = "OUT", required_unless_present = "check")]
    pub(crate) output: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) zfile: ZfileArgs,

    /// Wrap the zfile as registries expect it
    #[arg(short = 't', long)]
    pub(crate) tar: bool,

    /// Threads; they change nothing but the time [default: one for each core]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    pub(crate) threads: usize,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let source = Source::open(&args.input)?;
    if !args.extract && !args.check && !args.recompress {
        return compress(args, &Payload::plain(source));
    }
    if (args.extract || args.check) && !args.zfile.is_default() {
        let message = "--algorithm, --level, --bs and --no-crc say how to compress";
        return Err(Error::new(ErrorKind::Usage, message));
    }
    let shown = args.input.display();
    let payload = Payload::open(source).context(|| format!("open {shown}"))?;
    if payload.zfile().is_none() {
        return Err(Error::new(ErrorKind::InvalidFormat, format!("{shown} is not a zfile")));
    }
    match &args.output {
        Some(output) if args.extract => extract(&args.input, &payload, output),
        _ if args.check => check(args, &payload),
        _ => compress(args, &payload),
    }
}

fn compress(args: &Args, payload: &Payload) -> Result<()> {
    let Some(output) = &args.output else {
        return Err(Error::new(ErrorKind::Usage, "expected IN OUT"));
    };
    let options = MakeOptions {
        zfile: Some(args.zfile.options()?),
        tar: args.tar,
        zeros: ZeroDetection::Off,
        threads: args.threads,
    };
    let canceled = AtomicBool::new(false);
    let made = with_progress(payload.bytes(), |done| {
        compress_file(payload, &options, output, &Watch { done, canceled: &canceled })
    })?;
    tell(&made, args.json)
}

fn extract(input: &Path, payload: &Payload, target: &Path) -> Result<()> {
    refuse_same(input, target)?;
    let output = OutputFile::create(target)?;
    let failed = |error: &std::io::Error| Error::io(format!("write {}", target.display()), error);
    decode(input, payload, |part| output.file().write_all(part).map_err(|error| failed(&error)))?;
    output.commit()
}

fn check(args: &Args, payload: &Payload) -> Result<()> {
    decode(&args.input, payload, |_| Ok(()))?;
    let Some(part) = payload.zfile() else { return Ok(()) };
    let facts = json!({
        "ok": true,
        "blocks": part.jump_table.block_count(),
        "bytes": payload.bytes(),
        "checksums_compared": part.header.has_block_crc,
    });
    print_facts(facts, args.json)
}

/// Decodes all of a zfile, in order.
fn decode(
    input: &Path,
    payload: &Payload,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut scratch = Scratch::new(std::iter::once(payload))?;
    with_progress(payload.bytes(), |progress| {
        let piece_bytes = PIECE_BYTES.min(payload.bytes());
        let mut buffer = vec![0; to_usize(piece_bytes).unwrap_or(0)];
        let mut here = 0;
        while here < payload.bytes() {
            let len = to_u64(buffer.len()).min(payload.bytes() - here);
            let part = &mut buffer[..to_usize(len).unwrap_or(0)];
            scratch
                .read(payload, 0, here, part)
                .context(|| format!("decode {}", input.display()))?;
            take(part)?;
            here += len;
            progress.fetch_add(len, Ordering::Relaxed);
        }
        Ok(())
    })
}
