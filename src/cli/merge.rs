//! `merge`: a whole stack as one layer.

use super::making::{LayerArgs, make};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{check_output, load_image_config, load_service_config};
use crate::make::Content;
use std::path::PathBuf;

/// Write all layers of an image, its upper included, as one layer
///
/// Not while its upper is attached. The layers are only read. The new one holds what is seen
/// through them and needs nothing below.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image's config.v1.json, or the file of one layer
    #[arg(value_name = "CONFIG|LAYER")]
    config: PathBuf,

    /// The layer; replaced as a whole if it exists
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// Write a raw layer instead of a zfile
    #[arg(long)]
    raw: bool,

    #[command(flatten)]
    layer: LayerArgs,

    /// Host-wide settings [default: /etc/overlaybd/overlaybd.json, which may be absent]
    #[arg(long, value_name = "FILE")]
    service_config: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.raw && !args.layer.zfile.is_default() {
        let message = "--algorithm, --level, --bs and --no-crc say how to compress: not with --raw";
        return Err(Error::new(ErrorKind::Usage, message));
    }
    let service = load_service_config(args.service_config.as_deref())?;
    let config = load_image_config(&args.config, args.service_config.as_deref())?;
    check_output(&args.config, &config, &args.output)?;
    let content = Content::of_image(&config, &service)?;
    make(&content, &args.layer, !args.raw, &args.output, args.json)
}
