//! `explain`: from a sector of the disk to the bytes of a file that it comes from.

use super::output::print_facts;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Layer, Provenance, Stack, load_image_config, load_service_config};
use crate::units::{SECTOR_SIZE, sectors_to_bytes};
use clap::Parser;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Tell which layer, bytes and compression block a sector of the disk comes from
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// The image's config.v1.json
    config: PathBuf,
    /// The sector (512 bytes) of the virtual disk; as the kernel's log prints it
    lba: u64,
    /// Host-wide settings [default: /etc/overlaybd/overlaybd.json, which may be absent]
    #[arg(long, value_name = "FILE")]
    service_config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let service = load_service_config(args.service_config.as_deref())?;
    let (config, _) = load_image_config(&args.config)?;
    let stack = Stack::open(&config, &service)?;
    let sectors = stack.virtual_bytes() / SECTOR_SIZE;
    if args.lba >= sectors {
        let message = format!("sector {}: the disk has only {sectors} sectors", args.lba);
        return Err(Error::new(ErrorKind::OutOfRange, message));
    }
    print_facts(&facts(&stack, args.lba), args.json)
}

fn facts(stack: &Stack, lba: u64) -> Value {
    let mut facts = json!({ "sector": lba, "disk_byte": sectors_to_bytes(lba) });
    let told = match stack.provenance(lba) {
        Provenance::Hole => json!({ "reads_as": "zeros", "because": "no layer has it" }),
        Provenance::Zeroed { layer, segment } => json!({
            "reads_as": "zeros",
            "because": "the layer's entry says zeroed",
            "layer": layer,
            "file": stack.layers()[layer].name,
            "entry": { "start_sector": segment.start_sector, "sectors": segment.sectors },
        }),
        Provenance::Data { layer, sector, segment } => {
            let open = &stack.layers()[layer];
            let mut data = json!({
                "reads_as": "data",
                "layer": layer,
                "file": open.name,
                "entry": {
                    "start_sector": segment.start_sector,
                    "sectors": segment.sectors,
                    "mapped_sector": segment.mapped_sector,
                },
                "layer_byte": sectors_to_bytes(sector),
            });
            merge(&mut data, place_in_file(open, sector));
            data
        }
    };
    merge(&mut facts, told);
    facts
}

/// Where the sector lies in the file as stored.
fn place_in_file(layer: &Layer, sector: u64) -> Value {
    let Some(byte) = sectors_to_bytes(sector) else { return json!({}) };
    let base = layer.payload.wrapping().offset_bytes;
    let Some(zfile) = layer.payload.zfile() else {
        return json!({ "file_bytes": { "start": base + byte, "end": base + byte + SECTOR_SIZE } });
    };
    let block_bytes = u64::from(zfile.header.block_bytes);
    let block = byte / block_bytes;
    if block >= zfile.jump_table.block_count() {
        return json!({});
    }
    let stored = zfile.jump_table.compressed_range(block);
    json!({
        "zfile_block": block,
        "byte_in_block": byte % block_bytes,
        "block_bytes": zfile.jump_table.block_original_bytes(block),
        "file_bytes": { "start": base + stored.start, "end": base + stored.end },
    })
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}
