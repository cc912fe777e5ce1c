//! `prefetch`: the layers of an image in a registry, pulled into the cache before they are needed.

use super::args::HostArgs;
use super::output::{print_facts, with_progress};
use crate::error::Result;
use crate::image::Prefetch;
use crate::limits::{PREFETCH_LAYERS_DEFAULT, PREFETCH_LAYERS_MAX};
use serde_json::json;
use std::path::PathBuf;

/// Pull all layers of an image into the cache, whole and checked
///
/// What devices of the image are fetching meanwhile is not fetched twice. Interrupted, it goes on
/// where it stopped when it is run again.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image's config.v1.json, or docker://REFERENCE
    #[arg(value_name = "CONFIG|REFERENCE")]
    config: PathBuf,

    /// Layers to pull at a time
    #[arg(long, value_name = "COUNT", default_value_t = PREFETCH_LAYERS_DEFAULT)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=i64::from(PREFETCH_LAYERS_MAX)))]
    layers: u16,

    #[command(flatten)]
    host: HostArgs,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (config, service) = args.host.image(&args.config)?;
    let prefetch = Prefetch::open(&config, &service)?;
    let layers = usize::from(args.layers);
    let done = with_progress(prefetch.bytes(), |progress| prefetch.run(layers, progress))?;
    let facts = json!({
        "layers": done.layers,
        "local_layers": done.local_layers,
        "bytes": done.bytes,
        "fetched_bytes": done.fetched_bytes,
    });
    print_facts(facts, args.json)
}
