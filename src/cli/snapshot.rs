//! `snapshot`: what was written to a device becomes a layer.

use super::args::{DeviceName, trusted_run_dir};
use super::behind::Promise;
use super::freeze::Frozen;
use super::making::ZfileArgs;
use super::{host, output};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::make::MakeOptions;
use crate::server::{self, SnapshotOrder};
use serde_json::json;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Make a layer of what was written to a device, which goes on with a new upper
///
/// Writes wait for some milliseconds. The upper's data file becomes the layer, where
/// it lies, and gets a second name; the device goes on with an empty upper in a folder of its own,
/// and the new config names both. Whatever is killed in between, the device comes back as it was
/// before, or as it is after; the moment in between is the rename of the new config. The layer
/// holds what a power cut at that moment would have left on a disk: to have a mounted file system
/// write out what it holds back, and be whole in the layer, give --freeze.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device: N, /dev/ublkbN, or the config it was attached from
    #[arg(value_name = "DEVICE")]
    device: OsString,

    /// The layer; on the file system of the upper, and not there yet
    #[arg(long, value_name = "LAYER")]
    out: PathBuf,

    /// The folder of the new upper; it is made if it is not there
    #[arg(long, value_name = "DIR")]
    upper: PathBuf,

    /// The new config; not there yet, or the one that is attached
    #[arg(long, value_name = "FILE")]
    config_out: PathBuf,

    /// Compress the layer into this file afterwards, in the background: it is there when it is
    /// whole, and FILE.log tells what went wrong otherwise. The device goes on with LAYER
    #[arg(long, value_name = "FILE")]
    commit: Option<PathBuf>,

    #[command(flatten)]
    zfile: ZfileArgs,

    /// Freeze the file system on the device meanwhile; it must be mounted where you can see it
    #[arg(long)]
    freeze: bool,

    /// Print what was made as JSON, and errors too
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let commit = args.commit.as_deref().map(real).transpose()?;
    if commit.is_none() && !args.zfile.is_default() {
        let message = "--algorithm, --level, --bs and --no-crc say how to compress: add --commit";
        return Err(Error::new(ErrorKind::Usage, message));
    }
    // What cannot be written is refused before anything is done.
    args.zfile
        .options()
        .and_then(|zfile| MakeOptions { zfile: Some(zfile), ..MakeOptions::default() }.check())?;
    let run = trusted_run_dir()?;
    let id = DeviceName::parse(&args.device).resolve(&run)?;
    let order = SnapshotOrder {
        layer: real(&args.out)?,
        upper: real(&args.upper)?,
        config: real(&args.config_out)?,
    };
    let (config, layer) = (order.config.clone(), order.layer.clone());
    let mut promise = commit.map(|file| Promise::make(file, &order)).transpose()?;
    let frozen = if args.freeze { Some(freeze(id)?) } else { None };
    let report = server::snapshot(&run, id, order);
    // Thawed whatever came of it.
    let was_frozen = frozen.map_or(Ok(()), Frozen::thaw);
    let report = report?;
    was_frozen.context(|| "the snapshot was taken, but not of a frozen file system".to_owned())?;
    if let Some(promise) = &mut promise {
        promise
            .begin(&layer, &args.zfile)
            .context(|| "the snapshot was taken, but its layer is not compressed".to_owned())?;
    }
    let layer = args.out.display().to_string();
    if args.json {
        let facts = json!({
            "layer": layer,
            "layer_bytes": report.layer_bytes,
            "config": config.display().to_string(),
            "pause_ms": report.pause_ms,
            "commit": promise.map(|promise| promise.output().display().to_string()),
        });
        return output::print_facts(facts, true);
    }
    let bytes = report.layer_bytes;
    output::print(&format!("{layer}  {bytes} bytes  writes waited {:.3} ms\n", report.pause_ms))
}

/// An absolute path with the links of its folder resolved: what a config can say for ever.
fn real(path: &Path) -> Result<PathBuf> {
    let told = |error| Error::io(format!("find {}", path.display()), &error);
    let path = std::path::absolute(path).map_err(told)?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        let message = format!("{}: expected the name of a file", path.display());
        return Err(Error::new(ErrorKind::Usage, message));
    };
    Ok(std::fs::canonicalize(parent).map_err(told)?.join(name))
}

fn freeze(id: u32) -> Result<Frozen> {
    let name = format!("ublkb{id}");
    let mounts = host::mounts_of_device(&name);
    let Some(mount) = mounts.first() else {
        let message = format!("/dev/{name} is not mounted where this program could see it");
        return Err(Error::new(ErrorKind::Usage, message));
    };
    Frozen::freeze(mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_told_without_the_links_of_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let base = std::fs::canonicalize(folder.path()).unwrap();
        std::fs::create_dir(base.join("real")).unwrap();
        std::os::unix::fs::symlink("real", base.join("link")).unwrap();
        assert_eq!(real(&base.join("link/layer")).unwrap(), base.join("real/layer"));
        assert_eq!(real(&base.join("none/layer")).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(real(Path::new("/")).unwrap_err().kind(), ErrorKind::Usage);
    }
}
