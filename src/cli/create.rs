//! `create`: a new disk that can be written.

use super::args::parse_size;
use super::output;
use crate::error::Result;
use crate::server;
use serde_json::json;
use std::path::PathBuf;

/// Make a writable disk, empty or on top of an image, and print its config
///
/// The folder gets the two files of an upper, which an overlaybd image may have on top, and a
/// config.v1.json to attach. The image below is not changed, and must stay where it is.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder; it is made if it is not there
    #[arg(value_name = "DIR")]
    folder: PathBuf,

    /// The image below: its config.v1.json, or the file of one layer
    #[arg(long, value_name = "CONFIG|LAYER")]
    on: Option<PathBuf>,

    /// Size of the disk in bytes, or with K, M, G or T for powers of 1024 [default: the image's]
    #[arg(long, value_parser = parse_size, required_unless_present = "on")]
    size: Option<u64>,

    /// In overlaybd's sparse form: the data file is the disk itself behind a header; slower, and
    /// with weaker promises after a power cut
    #[arg(long)]
    sparse: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let config = server::create_disk(&args.folder, args.size, args.on.as_deref(), args.sparse)?;
    let shown = config.display().to_string();
    if args.json {
        return output::print_or_fail(&format!("{}\n", json!({"config": shown})));
    }
    output::print_or_fail(&format!("{shown}\n"))
}
