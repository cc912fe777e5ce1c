//! `compact`: a writable pair without what was overwritten.

use super::args::PairArgs;
use super::output;
use super::table::format_bytes;
use crate::error::Result;
use crate::upper::{self, Compacted, PairOptions};
use serde_json::{Value, json};

/// Shrink the files of an upper to what is seen of it
///
/// Not while it is attached. What was overwritten or discarded goes, the rest moves together in the
/// same data file, and the index file is written anew. A power cut at any moment leaves the pair as
/// it was or compacted. Overlaybd's own tools read the result.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pair: PairArgs,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let done = upper::compact(&args.pair.paths()?, &PairOptions::default())?;
    if args.json { output::print_facts(facts(&done), true) } else { output::print(&text(&done)) }
}

fn facts(done: &Compacted) -> Value {
    json!({
        "data_bytes_before": done.before.file_bytes,
        "data_bytes": done.after.file_bytes,
        "index_bytes_before": done.before.index_bytes,
        "index_bytes": done.after.index_bytes,
        "moved_bytes": done.moved_bytes,
    })
}

fn text(done: &Compacted) -> String {
    format!(
        "data {} -> {}, index {} -> {}\n",
        format_bytes(done.before.file_bytes),
        format_bytes(done.after.file_bytes),
        format_bytes(done.before.index_bytes),
        format_bytes(done.after.index_bytes)
    )
}
