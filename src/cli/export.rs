//! `export`: the flattened disk as a raw file or stream.

use super::args::HostArgs;
use super::output::with_progress;
use crate::error::{Error, Result};
use crate::image::{Stack, check_output};
use crate::make::OutputFile;
use clap::Parser;
use std::path::PathBuf;

/// Write the whole disk that a config or a layer describes, flattened and raw
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// The image's config.v1.json, or the file of one layer
    #[arg(value_name = "CONFIG|LAYER")]
    config: PathBuf,
    /// Output file, sparse where the disk is zero; `-` is stdout
    #[arg(short, long, default_value = "-")]
    output: PathBuf,
    #[command(flatten)]
    host: HostArgs,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (config, service) = args.host.image(&args.config)?;
    check_output(&args.config, &config, &args.output)?;
    let image = Stack::open(&config, &service)?.into_image()?;
    let total = image.virtual_bytes();
    if args.output.as_os_str() == "-" {
        let mut out = std::io::stdout().lock();
        with_progress(total, |progress| image.export_to_stream(&mut out, progress))?;
        return image.check_remote();
    }
    let output = OutputFile::create(&args.output)?;
    if output.is_stream() {
        with_progress(total, |progress| image.export_to_stream(&mut output.file(), progress))?;
        image.check_remote()?;
        return output.commit();
    }
    if output.is_new() {
        let grown = output.file().set_len(total);
        grown.map_err(|error| Error::io(format!("grow {}", args.output.display()), &error))?;
    }
    with_progress(total, |progress| {
        image.export_to_file(output.file(), output.is_new(), progress)
    })?;
    image.check_remote()?;
    output.commit()
}
