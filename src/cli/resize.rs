//! `resize`: a larger disk.

use super::args::{DeviceName, pair_of_config, parse_size};
use super::output;
use crate::error::{Result, ResultExt};
use crate::server::{self, RunDir, device_path};
use crate::upper::{self, PairOptions};
use serde_json::json;
use std::ffi::OsString;

/// Make the disk of an upper larger, attached or not
///
/// Its content stays; what comes behind it reads as zeros. Tell the file system afterwards, with
/// resize2fs or xfs_growfs for instance. A power cut meanwhile leaves the old size or the new. A
/// disk that is attached grows where the kernel can do that, from 6.16 on; writes wait for some
/// milliseconds.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device, or the config that names the upper of one that is not attached
    #[arg(value_name = "DEV|CONFIG")]
    disk: OsString,

    /// The new size in bytes, or with K, M, G or T for powers of 1024; not below what it has
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    size: u64,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let before = match DeviceName::parse(&args.disk) {
        DeviceName::Config(path) => {
            upper::resize(&pair_of_config(&path)?, &PairOptions::default(), args.size)?
        }
        DeviceName::Id(id) => server::resize(&RunDir::of_host(), id, args.size)
            .context(|| format!("resize {}", device_path(id).display()))?,
    };
    if args.json {
        let facts = json!({ "size_bytes_before": before, "size_bytes": args.size });
        return output::print_facts(facts, true);
    }
    output::print(&format!("{before} -> {} bytes\n", args.size))
}
