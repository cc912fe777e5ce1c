//! A layer that is compressed behind the caller's back, once a snapshot was taken.
//!
//! A process of its own does it, which neither the caller's end nor that of its login ends. The
//! file has its name when it is whole and durable, and takes the place of nothing. Until then, and
//! if it never comes to that, a log beside it tells how far it is. The log is made before the
//! snapshot, and must not be there: whoever has it has the right to the file.

use super::making::ZfileArgs;
use super::own;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::make::{MakeOptions, recompress_layer};
use crate::server::{self, SnapshotOrder};
use nix::sys::stat::fstat;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::AtomicBool;

/// The hidden command of the process that compresses.
pub(super) const COMPRESS_COMMAND: &str = "compress-layer";

/// What the hidden command is told. Its standard error is the log.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[arg()]
    layer: PathBuf,

    #[arg()]
    output: PathBuf,

    #[command(flatten)]
    zfile: ZfileArgs,
}

/// The right to make a file later, and the log of that. Dropped, it is given back.
#[derive(Debug)]
pub(super) struct Promise {
    output: PathBuf,
    log: Option<File>,
}

/// Where the process tells what it does.
fn log_of(output: &Path) -> PathBuf {
    let mut name = OsString::from(output);
    name.push(".log");
    name.into()
}

impl Promise {
    /// Promises `output`, beside what the snapshot will make.
    ///
    /// # Errors
    /// `Usage` when it, or its log, is there already or is a name of the snapshot's; what the
    /// operating system says.
    pub(super) fn make(output: PathBuf, order: &SnapshotOrder) -> Result<Self> {
        let log = log_of(&output);
        for path in [&output, &log] {
            let is_of_snapshot = *path == order.layer
                || *path == order.config
                || path.starts_with(&order.upper)
                || order.upper.starts_with(path);
            if is_of_snapshot || path.symlink_metadata().is_ok() {
                let what =
                    if is_of_snapshot { "is the snapshot's own" } else { "is there already" };
                let message = format!("{} {what}", path.display());
                return Err(Error::new(ErrorKind::Usage, message));
            }
        }
        // Never what somebody else has put there, and no link.
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&log)
            .map_err(|error| Error::io(format!("make {}", log.display()), &error))?;
        Ok(Self { output, log: Some(file) })
    }

    /// The file that will be.
    pub(super) fn output(&self) -> &Path {
        &self.output
    }

    /// Starts to compress `layer`, and does not wait for it.
    ///
    /// # Errors
    /// When no process can be started.
    pub(super) fn begin(&mut self, layer: &Path, zfile: &ZfileArgs) -> Result<()> {
        let Some(log) = &self.log else { return Ok(()) };
        let told = |error| Error::io("start to compress the layer", &error);
        let mut command = own::program();
        command.arg(COMPRESS_COMMAND).args(zfile.arguments());
        command.arg("--").arg(layer).arg(&self.output).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(log.try_clone().map_err(told)?).spawn().map_err(told)?;
        // It is that process's now.
        self.log = None;
        Ok(())
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if self.log.is_some() {
            let _ = std::fs::remove_file(log_of(&self.output));
        }
    }
}

/// The hidden command.
///
/// # Errors
/// As [`recompress_layer`]; the log tells of it.
pub(super) fn run(args: &Args) -> Result<()> {
    server::leave_caller()?;
    tracing::info!(layer = %args.layer.display(), "compressing");
    let options = MakeOptions { zfile: Some(args.zfile.options()?), ..MakeOptions::default() };
    let canceled = AtomicBool::new(false);
    recompress_layer(&args.layer, &args.output, &options, &canceled)
        .context(|| format!("compress {}", args.layer.display()))?;
    // It has served; a file that is whole needs no story.
    let log = log_of(&args.output);
    let is_ours = fstat(std::io::stderr()).is_ok_and(|own| {
        let found = log.symlink_metadata();
        found.is_ok_and(|found| (found.dev(), found.ino()) == (own.st_dev, own.st_ino))
    });
    if is_ours {
        let _ = std::fs::remove_file(&log);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(folder: &Path) -> SnapshotOrder {
        SnapshotOrder {
            layer: folder.join("layer"),
            upper: folder.join("upper"),
            config: folder.join("config.json"),
        }
    }

    #[test]
    fn a_promise_is_given_once_and_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let (order, output) = (order(folder.path()), folder.path().join("zfile"));
        let promise = Promise::make(output.clone(), &order).unwrap();
        assert!(log_of(&output).exists());
        let error = Promise::make(output.clone(), &order).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        drop(promise);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        Promise::make(output, &order).unwrap();
    }

    /// The log of such a file was written into the layer, and the config was replaced by the file.
    #[test]
    fn what_the_snapshot_makes_and_what_is_there_is_not_promised() {
        let folder = tempfile::tempdir().unwrap();
        let order = order(folder.path());
        std::fs::write(folder.path().join("there"), "precious").unwrap();
        std::fs::write(folder.path().join("x.log"), "precious").unwrap();
        std::os::unix::fs::symlink("nowhere", folder.path().join("link.log")).unwrap();
        for name in ["layer", "config.json", "upper", "upper/writable_data", "there", "x", "link"] {
            let error = Promise::make(folder.path().join(name), &order).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{name}");
        }
        let of_log = SnapshotOrder { layer: folder.path().join("y.log"), ..order };
        assert!(Promise::make(folder.path().join("y"), &of_log).is_err());
        assert_eq!(std::fs::read(folder.path().join("x.log")).unwrap(), b"precious");
    }
}
