//! `create`: a new disk that can be written.

use super::args::parse_size;
use super::making::parse_uuid;
use super::mkfs::{copy_append, copy_sparse, make_ext4};
use super::output;
use crate::error::Result;
use crate::format::lsmt::UuidText;
use crate::server;
use crate::upper::{Form, NewPair, PairPaths, check_vacant, create_as, create_filled, new_uuid};
use serde_json::json;
use std::path::PathBuf;

/// Make a writable disk, empty or on top of an image, and print its config
///
/// The folder gets the two files of an upper, which an overlaybd image may have on top, and a
/// config.v1.json to attach. The image below is not changed, and must stay where it is.
///
/// With DATA INDEX SIZE, as overlaybd's own tool has it, just the two files of an upper are made.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder, which is made if it is not there; or, in front of INDEX and SIZE, the data file
    #[arg(value_name = "DIR|DATA")]
    folder: PathBuf,

    /// The index file
    #[arg(value_name = "INDEX", requires = "gibibytes")]
    index: Option<PathBuf>,

    /// Size of the disk in GiB, or with K, M, G or T; 0 for "ask the layer below"
    #[arg(value_name = "SIZE", value_parser = parse_gibibytes, conflicts_with_all = ["on", "size"])]
    gibibytes: Option<u64>,

    /// The image below: its config.v1.json, or the file of one layer
    #[arg(long, value_name = "CONFIG|LAYER")]
    on: Option<PathBuf>,

    /// Size of the disk in bytes, or with K, M, G or T for powers of 1024 [default: the image's]
    #[arg(long, value_parser = parse_size, required_unless_present_any = ["on", "index"])]
    size: Option<u64>,

    /// In overlaybd's sparse form: the data file is the disk itself behind a header; slower, and
    /// with weaker promises after a power cut
    #[arg(short = 's', long)]
    sparse: bool,

    /// Put an empty ext4 file system on it, as overlaybd's converter does (needs e2fsprogs)
    #[arg(long, requires = "index")]
    mkfs: bool,

    /// UUID of the layer below
    #[arg(short = 'u', long, requires = "index", value_parser = parse_uuid, value_name = "UUID")]
    parent_uuid: Option<UuidText>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let (Some(index), Some(bytes)) = (&args.index, args.gibibytes) {
        let paths = PairPaths { data: args.folder.clone(), index: index.clone() };
        create_pair(&paths, bytes, args)?;
        if args.json {
            let (data, index) = (paths.data.display(), paths.index.display());
            let facts = json!({"data": data.to_string(), "index": index.to_string()});
            return output::print_or_fail(&format!("{facts}\n"));
        }
        return Ok(());
    }
    let config = server::create_disk(&args.folder, args.size, args.on.as_deref(), args.sparse)?;
    let shown = config.display().to_string();
    if args.json {
        return output::print_or_fail(&format!("{}\n", json!({"config": shown})));
    }
    output::print_or_fail(&format!("{shown}\n"))
}

/// Makes the two files of an upper. Whether layers will lie below is not known here: the sparse
/// form is checked for both.
fn create_pair(paths: &PairPaths, virtual_bytes: u64, args: &Args) -> Result<()> {
    let form = if args.sparse { Form::Sparse { over_lowers: true } } else { Form::Append };
    let parent_uuid = args.parent_uuid.unwrap_or(UuidText::NIL);
    let new = NewPair { virtual_bytes, uuid: new_uuid()?, parent_uuid };
    if !args.mkfs {
        return create_as(paths, &new, form);
    }
    // What is there already should not be told after minutes of mkfs.
    check_vacant(paths)?;
    let plain = make_ext4(&paths.data, virtual_bytes)?;
    create_filled(paths, &new, form, |data, index| match form {
        Form::Sparse { .. } => copy_sparse(&plain, data),
        Form::Append => copy_append(&plain, data, index),
    })
}

/// A number of GiB, as overlaybd's own tool has it; or a size with its unit.
pub(crate) fn parse_gibibytes(text: &str) -> Result<u64, String> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return parse_size(&format!("{text}G"));
    }
    parse_size(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_number_is_gibibytes_and_a_unit_is_believed() {
        for (text, bytes) in [
            ("64", 64 << 30),
            ("0", 0),
            ("1", 1 << 30),
            ("512K", 512 << 10),
            ("3M", 3 << 20),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_gibibytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "1.5", "-1", "17179869184"] {
            assert!(parse_gibibytes(text).is_err(), "{text}");
        }
    }
}
