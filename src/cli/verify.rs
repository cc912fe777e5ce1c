//! `verify`: every checksum and index rule of one layer or of all layers of a config.

use super::args::HostArgs;
use super::output::{print_facts, with_progress};
use crate::error::{Error, ErrorKind, Result};
use crate::format::config::ImageConfig;
use crate::image::{
    Layer, LayerReport, Stack, check_layers, open_each, parse_image_config, read_if_config,
    work_bytes,
};
use crate::source::Source;
use clap::Parser;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Check every CRC and index rule of a layer file, or of all layers of a config, on all cores
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// A layer file, or a config.v1.json
    #[arg(value_name = "FILE|CONFIG")]
    path: PathBuf,
    #[command(flatten)]
    host: HostArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A layer that could be opened, or the reason why not.
struct Examined {
    name: String,
    opened: Result<Layer>,
    digest: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let text = read_if_config(&args.path, args.host.settings())?;
    let examined = if let Some(text) = text {
        let service = args.host.service()?;
        let config = parse_image_config(&args.path, &text)?;
        let each = open_each(&config, &service);
        each.into_iter().zip(digests(&config)).map(examined).collect()
    } else {
        vec![examined((open_file(&args.path), None))]
    };
    let mut facts = Vec::new();
    let (mut names, mut layers, mut digests, mut worst) = (vec![], vec![], vec![], None);
    for one in examined {
        match one.opened {
            Ok(layer) => {
                names.push(one.name);
                layers.push(layer);
                digests.push(one.digest);
            }
            Err(error) => {
                facts.push(
                    json!({ "layer": one.name, "ok": false, "errors": [format!("{error:#}")] }),
                );
                worst.get_or_insert(error);
            }
        }
    }
    let total = work_bytes(&layers, &digests);
    let reports = with_progress(total, |progress| check_layers(&layers, &digests, progress))?;
    for ((name, layer), mut report) in names.iter().zip(&layers).zip(reports) {
        facts.push(told(name, layer, &report));
        if !report.errors.is_empty() {
            worst.get_or_insert(report.errors.swap_remove(0));
        }
    }
    let stack_error = merge_check(worst.is_none(), layers);
    let ok = worst.is_none() && stack_error.is_none();
    print_facts(json!({ "ok": ok, "layers": facts }), args.json)?;
    worst.or(stack_error).map_or(Ok(()), |error| Err(error.context("verify")))
}

fn examined((opened, digest): (Result<Layer>, Option<String>)) -> Examined {
    let name = opened.as_ref().map_or_else(ToString::to_string, |layer| layer.name.clone());
    Examined { name, opened, digest }
}

fn open_file(path: &Path) -> Result<Layer> {
    let name = path.display().to_string();
    Source::open(path)
        .and_then(|source| Layer::open_sealed(name, source))
        .map_err(|error| error.context(format!("open {}", path.display())))
}

/// The digests that the config states, one per layer, the upper included.
fn digests(config: &ImageConfig) -> Vec<Option<String>> {
    let of = |digest: &str| digest.strip_prefix("sha256:").map(str::to_ascii_lowercase);
    let lowers = config.stack_lowers();
    lowers.iter().map(|lower| of(&lower.digest)).chain(config.upper.iter().map(|_| None)).collect()
}

/// Together the layers must fit the map, too.
fn merge_check(all_opened: bool, layers: Vec<Layer>) -> Option<Error> {
    if !all_opened {
        return None;
    }
    let stack = Stack::from_layers(layers).ok()?;
    if stack.virtual_bytes() == 0 {
        return Some(Error::new(ErrorKind::Corrupt, "no layer states a virtual size"));
    }
    stack.merge().err()
}

fn told(name: &str, layer: &Layer, report: &LayerReport) -> Value {
    let errors: Vec<String> = report.errors.iter().map(|error| format!("{error:#}")).collect();
    let mut facts = json!({
        "layer": name,
        "ok": report.damaged == 0,
        "index_entries": layer.segments.len(),
        "bytes_read": report.bytes,
        "blocks": report.blocks,
        "checksums_compared": report.checksums,
        "digest_compared": report.digest_checked,
    });
    if report.damaged > 0 {
        facts["damaged"] = json!(report.damaged);
        facts["errors"] = json!(errors);
    }
    if layer.payload.zfile().is_none_or(|zfile| !zfile.header.has_block_crc) {
        facts["note"] = json!("the content of this layer has no checksums");
    }
    facts
}
