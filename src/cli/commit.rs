//! `commit`: what was written to an upper, as a layer.

use super::args::{pair_in_config, pair_of_config};
use super::making::{LayerArgs, make};
use super::output;
use super::table::format_bytes;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::image::{Layer, check_output, load_image_config};
use crate::make::Content;
use crate::source::Source;
use crate::upper::{self, PairPaths};
use serde_json::json;
use std::path::{Path, PathBuf};

/// What says how a layer is written: nothing of it is, when the upper itself becomes one.
const NOT_WITH_SEAL: [&str; 9] = [
    "commit_sealed",
    "compress",
    "tar",
    "zero_detection",
    "no_zero_detection",
    "threads",
    "uuid",
    "parent_uuid",
    "user_tag",
];

/// Write what an upper holds as a layer: raw, or compressed with -z
///
/// Not while it is attached. The upper is only read, but for --seal. Blocks of zeros are left out.
/// The same upper and options give the same bytes, on any machine and with any number of threads.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// CONFIG OUT, or DATA INDEX OUT: the config that names the upper, or its two files, and the
    /// layer, which is replaced as a whole if it exists; with --seal no OUT; with --commit_sealed
    /// LAYER OUT
    #[arg(required = true, num_args = 1..=3, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,

    /// Compress the layer to a zfile
    #[arg(short = 'z', long = "zfile")]
    pub(crate) compress: bool,

    /// Seal the upper where it is: its data file becomes a layer, what was overwritten included.
    /// Not one in sparse form that has the size of the layer below
    #[arg(long, conflicts_with_all = NOT_WITH_SEAL)]
    pub(crate) seal: bool,

    /// Write a layer that was sealed as a new one
    #[arg(long = "commit_sealed", visible_alias = "commit-sealed")]
    pub(crate) commit_sealed: bool,

    #[command(flatten)]
    pub(crate) layer: LayerArgs,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.compress && !args.layer.zfile.is_default() {
        let message = "--algorithm, --level, --bs and --no-crc say how to compress: add -z";
        return Err(Error::new(ErrorKind::Usage, message));
    }
    if args.seal {
        return seal(args);
    }
    let (content, output) = match args.files.as_slice() {
        [layer, output] if args.commit_sealed => (sealed(layer)?, output),
        [config, output] if !args.commit_sealed => (upper_of(config, output)?, output),
        [data, index, output] if !args.commit_sealed => {
            let paths = PairPaths { data: data.clone(), index: index.clone() };
            (Content::of_pair(&paths)?, output)
        }
        _ if args.commit_sealed => return Err(usage("--commit_sealed LAYER OUT")),
        _ => return Err(usage("CONFIG OUT or DATA INDEX OUT")),
    };
    make(&content, &args.layer, args.compress, output, args.json)
}

/// The content of the upper that the config at `path` names, for an output that must not be any
/// part of that image, its lowers included.
fn upper_of(path: &Path, output: &Path) -> Result<Content> {
    let config = load_image_config(path, None)?;
    let pair = pair_in_config(path, &config)?;
    check_output(path, &config, output)?;
    Content::of_pair(&pair)
}

fn usage(expected: &str) -> Error {
    Error::new(ErrorKind::Usage, format!("expected {expected}"))
}

/// The content of one sealed layer.
pub(crate) fn sealed(path: &Path) -> Result<Content> {
    let name = path.display().to_string();
    let layer = Source::open(path)
        .and_then(|source| Layer::open_sealed(name.clone(), source))
        .context(|| format!("open {name}"))?;
    Content::of_layer(layer)
}

fn seal(args: &Args) -> Result<()> {
    let paths = match args.files.as_slice() {
        [config] => pair_of_config(config)?,
        [data, index] => PairPaths { data: data.clone(), index: index.clone() },
        _ => return Err(usage("CONFIG or DATA INDEX with --seal")),
    };
    let file_bytes = upper::seal(&paths)?;
    let shown = paths.data.display().to_string();
    if args.json {
        let facts = json!({ "layer": shown, "file_bytes": file_bytes });
        return output::print_facts(facts, true);
    }
    output::print(&format!("{shown}: {}\n", format_bytes(file_bytes)))
}
