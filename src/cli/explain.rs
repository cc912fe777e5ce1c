//! `explain`: from a sector of the disk to the bytes of a file that it comes from. `why` asks the
//! same of the requests that failed.

use super::args::HostArgs;
use super::output::print_facts;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Layer, Provenance, Stack};
use crate::units::{SECTOR_SIZE, sectors_to_bytes};
use clap::Parser;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Tell which layer, bytes and compression block a sector of the disk comes from
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// The image's config.v1.json, or the file of one layer
    #[arg(value_name = "CONFIG|LAYER")]
    config: PathBuf,
    /// The sector (512 bytes) of the virtual disk; as the kernel's log prints it
    lba: u64,
    #[command(flatten)]
    host: HostArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (config, service) = args.host.image(&args.config)?;
    let stack = Stack::open(&config, &service)?;
    let sectors = stack.virtual_bytes() / SECTOR_SIZE;
    if args.lba >= sectors {
        let message = format!("sector {}: the disk has only {sectors} sectors", args.lba);
        return Err(Error::new(ErrorKind::OutOfRange, message));
    }
    print_facts(facts(&stack, args.lba, 1), args.json)
}

/// Where `sectors` from `lba` on come from, which are one extent of the disk.
pub(super) fn facts(stack: &Stack, lba: u64, sectors: u64) -> Value {
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
            merge(&mut data, place_in_file(open, sector, sectors));
            data
        }
    };
    merge(&mut facts, told);
    facts
}

/// Where the sectors lie in the file as stored.
fn place_in_file(layer: &Layer, sector: u64, sectors: u64) -> Value {
    let len = sectors_to_bytes(sectors);
    let (Some(byte), Some(len)) = (sectors_to_bytes(sector), len) else { return json!({}) };
    let base = layer.payload.wrapping().offset_bytes;
    let Some(zfile) = layer.payload.zfile() else {
        let start = base.saturating_add(byte);
        return json!({ "file_bytes": { "start": start, "end": start.saturating_add(len) } });
    };
    let block_bytes = u64::from(zfile.header.block_bytes);
    let first = byte / block_bytes;
    let last = byte.saturating_add(len.saturating_sub(1)) / block_bytes;
    if last >= zfile.jump_table.block_count() {
        return json!({});
    }
    let start = zfile.jump_table.compressed_range(first).start;
    let end = zfile.jump_table.compressed_range(last).end;
    let mut place = json!({
        "zfile_block": first,
        "byte_in_block": byte % block_bytes,
        "block_bytes": zfile.jump_table.block_original_bytes(first),
        "file_bytes": { "start": base + start, "end": base + end },
    });
    if last > first {
        merge(&mut place, json!({ "zfile_block_last": last }));
    }
    place
}

/// The same facts in one line, for many of them.
pub(super) fn sentence(facts: &Value, sectors: u64) -> String {
    let number = |pointer: &str| facts.pointer(pointer).and_then(Value::as_u64);
    let word = |pointer: &str| facts.pointer(pointer).and_then(Value::as_str).unwrap_or("");
    let start = number("/sector").unwrap_or(0);
    let mut told = format!("sectors {start}..{}: ", start.saturating_add(sectors));
    if let Some(layer) = number("/layer") {
        told.push_str(&format!("layer {layer} ({}), ", word("/file")));
    }
    if let (Some(start), Some(end)) = (number("/file_bytes/start"), number("/file_bytes/end")) {
        told.push_str(&format!("file bytes {start}..{end}, "));
    }
    match (number("/zfile_block"), number("/zfile_block_last")) {
        (Some(first), Some(last)) => told.push_str(&format!("zblocks {first} to {last}, ")),
        (Some(block), None) => told.push_str(&format!("zblock {block}, ")),
        _ => {}
    }
    match word("/because") {
        "" => told.push_str(word("/reads_as")),
        because => told.push_str(&format!("{} ({because})", word("/reads_as"))),
    }
    told
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}
