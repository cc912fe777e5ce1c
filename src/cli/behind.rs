//! A layer that is compressed behind the caller's back, once a snapshot was taken.
//!
//! A process of its own does it, which neither the caller's end nor that of its login ends. The
//! file has its name when it is whole and durable; until then, and if it never comes to that, a log
//! beside it tells how far it is.

use super::making::ZfileArgs;
use super::own;
use crate::error::{Error, Result, ResultExt};
use crate::make::{MakeOptions, recompress_layer};
use crate::{server, telemetry};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::AtomicBool;

/// The hidden command of the process that compresses.
pub(super) const COMPRESS_COMMAND: &str = "compress-layer";

/// What the hidden command is told.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[arg()]
    layer: PathBuf,

    #[arg()]
    output: PathBuf,

    #[command(flatten)]
    zfile: ZfileArgs,
}

/// Where the process tells what it does.
pub(super) fn log_of(output: &Path) -> PathBuf {
    let mut name = OsString::from(output);
    name.push(".log");
    name.into()
}

/// Starts to compress `layer` into `output`, and does not wait for it.
///
/// # Errors
/// When no process can be started.
pub(super) fn begin(layer: &Path, output: &Path, zfile: &ZfileArgs) -> Result<()> {
    let mut command = own::program();
    command.arg(COMPRESS_COMMAND).args(zfile.arguments()).arg("--").arg(layer).arg(output);
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn();
    child.map(drop).map_err(|error| Error::io("start to compress the layer", &error))
}

/// The hidden command.
///
/// # Errors
/// As [`recompress_layer`]; the log tells of it.
pub(super) fn run(args: &Args) -> Result<()> {
    server::leave_caller()?;
    let log = log_of(&args.output);
    telemetry::log_to(&log)?;
    tracing::info!(layer = %args.layer.display(), "compressing");
    let options = MakeOptions { zfile: Some(args.zfile.options()?), ..MakeOptions::default() };
    let canceled = AtomicBool::new(false);
    let made = recompress_layer(&args.layer, &args.output, &options, &canceled)
        .context(|| format!("compress {}", args.layer.display()))
        .inspect_err(|error| tracing::error!("{error:#}"))?;
    tracing::info!(file_bytes = made.file_bytes, "done");
    // It has served; a file that is whole needs no story.
    let _ = std::fs::remove_file(&log);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_stands_beside_the_file() {
        assert_eq!(log_of(Path::new("/a/b.zfile")), Path::new("/a/b.zfile.log"));
    }
}
