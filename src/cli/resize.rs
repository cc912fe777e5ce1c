//! `resize`: a larger disk.

use super::args::{DeviceName, pair_of_config, parse_size};
use super::output;
use crate::error::{Error, ErrorKind, Result};
use crate::server::device_path;
use crate::upper::{self, PairOptions};
use serde_json::json;
use std::ffi::OsString;

/// Make the disk of an upper larger, while it is not attached
///
/// Its content stays; what comes behind it reads as zeros. Tell the file system afterwards, with
/// resize2fs or xfs_growfs for instance. A power cut meanwhile leaves the old size or the new. A
/// disk that is attached keeps its size until it is detached.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The config that names the upper
    #[arg(value_name = "CONFIG")]
    disk: OsString,

    /// The new size in bytes, or with K, M, G or T for powers of 1024; not below what it has
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    size: u64,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let config = match DeviceName::parse(&args.disk) {
        DeviceName::Config(path) => path,
        DeviceName::Id(id) => {
            let device = device_path(id);
            let message = format!(
                "{0} cannot be resized while it is attached: detach it, resize its config, and \
                 attach that again",
                device.display()
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    };
    let before = upper::resize(&pair_of_config(&config)?, &PairOptions::default(), args.size)?;
    if args.json {
        let facts = json!({ "size_bytes_before": before, "size_bytes": args.size });
        return output::print_facts(facts, true);
    }
    output::print(&format!("{before} -> {} bytes\n", args.size))
}
