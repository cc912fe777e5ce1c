//! `diff`: where two disks differ.

use super::facts::{Facts, Rows};
use super::output::{self, with_progress};
use crate::error::Result;
use crate::image::Image;
use crate::make::{Watch, diff};
use crate::units::SECTOR_SIZE;
use serde_json::{Value, json};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

/// Print the extents in which two images differ, in bytes: one line each, start and length
///
/// Extents that both read from the same place of the same layer are not read. What only the larger
/// disk has differs. The exit code is 0 whether they differ or not.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The one image: its config.v1.json, or the file of one layer
    #[arg(value_name = "CONFIG|LAYER")]
    one: PathBuf,

    /// The other
    #[arg(value_name = "CONFIG|LAYER")]
    other: PathBuf,

    /// Host-wide settings [default: /etc/overlaybd/overlaybd.json, which may be absent]
    #[arg(long, value_name = "FILE")]
    service_config: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let service = args.service_config.as_deref();
    let one = Image::open_config(&args.one, service)?;
    let other = Image::open_config(&args.other, service)?;
    let canceled = AtomicBool::new(false);
    let total = one.virtual_bytes().min(other.virtual_bytes());
    let (extents, summary) =
        with_progress(total, |done| diff(&one, &other, &Watch { done, canceled: &canceled }))?;
    if args.json {
        let facts = Facts::from(json!({
            "virtual_bytes": [one.virtual_bytes(), other.virtual_bytes()],
            "same": extents.is_empty(),
            "differing_bytes": summary.differing_sectors.saturating_mul(SECTOR_SIZE),
            "compared_bytes": summary.compared_sectors.saturating_mul(SECTOR_SIZE),
        }));
        return output::print_facts(facts.with("extents", Rows::of(extents, row)), true);
    }
    output::print_lines(extents.iter().map(|extent| {
        let [start, length] = bytes(extent);
        format!("{start} {length}")
    }))
}

fn bytes(extent: &Range<u64>) -> [u64; 2] {
    let sectors = extent.end - extent.start;
    [extent.start.saturating_mul(SECTOR_SIZE), sectors.saturating_mul(SECTOR_SIZE)]
}

fn row(extent: &Range<u64>) -> Value {
    let [start, length] = bytes(extent);
    json!({ "start": start, "bytes": length })
}
