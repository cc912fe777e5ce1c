//! `inspect`: what a file is and what its headers say, wrapping by wrapping.

use super::facts::{Facts, Rows};
use super::output::print_facts;
use crate::error::{Result, ResultExt};
use crate::format::config::ImageConfig;
use crate::format::{lsmt, trace, zfile};
use crate::image::{
    HostSettings, Layer, LayerKind, Payload, Scratch, parse_image_config, read_if_config,
};
use crate::limits::TRACE_BYTES_MAX;
use crate::source::Source;
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use clap::Parser;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Print what a layer file, zfile, index, trace or config is and what its headers say
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// The file
    file: PathBuf,
    /// List every index entry
    #[arg(long)]
    entries: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let facts = match read_if_config(&args.file, HostSettings::default())? {
        Some(text) => config_facts(parse_image_config(&args.file, &text)?).into(),
        None => file_facts(args).context(|| format!("inspect {}", args.file.display()))?,
    };
    print_facts(facts, args.json)
}

fn config_facts(config: ImageConfig) -> Value {
    let lowers: Vec<Value> = config
        .lowers
        .iter()
        .map(|lower| {
            let candidates = lower.local_candidates();
            let found = candidates.iter().find(|path| path.exists());
            json!({
                "found": found.map(|path| path.display().to_string()),
                "digest": lower.digest,
                "size": lower.size,
            })
        })
        .collect();
    let upper = config.upper.map(|upper| json!({ "data": upper.data, "index": upper.index }));
    json!({
        "kind": "image config",
        "repo_blob_url": config.repo_blob_url,
        "lowers": lowers,
        "upper": upper,
        "acceleration_layer": config.acceleration_layer,
    })
}

fn file_facts(args: &Args) -> Result<Facts> {
    let source = Source::open(&args.file)?;
    let mut head = [0; 16];
    if source.bytes() >= to_u64(head.len()) {
        source.read(0, &mut head)?;
    }
    if trace::has_magic(&head) && source.bytes() <= TRACE_BYTES_MAX {
        return trace_facts(&source);
    }
    let payload = Payload::open(source.clone())?;
    let mut facts = Facts::from(json!({ "file_bytes": source.bytes() }));
    let wrapping = payload.wrapping();
    if wrapping.tar {
        let (offset, bytes) = (wrapping.offset_bytes, wrapping.stored_bytes);
        facts = facts.with("tar", json!({ "payload_offset": offset, "payload_bytes": bytes }));
    }
    if let Some(part) = payload.zfile() {
        facts = facts.with("zfile", zfile_facts(&part.header));
    }
    if let Some(lsmt) = lsmt_facts(args, source, &payload)? {
        facts = facts.with("lsmt", lsmt);
    }
    let kind = match (payload.zfile().is_some(), facts.has("lsmt")) {
        (true, true) => "compressed layer",
        (false, true) => "layer",
        (true, false) => "zfile",
        (false, false) => "unknown",
    };
    Ok(facts.with("kind", json!(kind)))
}

/// Takes memory for the file (24 bytes a record) until it is parsed to as many a record.
fn trace_facts(source: &Source) -> Result<Facts> {
    let mut bytes = vec![0; to_usize(source.bytes()).unwrap_or(0)];
    source.read(0, &mut bytes)?;
    let records = trace::parse(&bytes)?.records;
    let facts = Facts::from(json!({ "kind": "prefetch trace" }));
    Ok(facts.with("records", Rows::of(records, record_facts)))
}

fn record_facts(record: &trace::Record) -> Value {
    json!({
        "op": format!("{:?}", record.op),
        "layer": record.layer_index,
        "bytes": record.bytes,
        "offset": record.offset_bytes,
    })
}

fn zfile_facts(header: &zfile::Header) -> Value {
    let algorithm = match header.algorithm {
        zfile::Algorithm::Lz4 => "lz4",
        zfile::Algorithm::Zstd => "zstd",
    };
    json!({
        "algorithm": algorithm,
        "block_bytes": header.block_bytes,
        "blocks": header.block_count,
        "original_bytes": header.original_bytes,
        "block_crc": header.has_block_crc,
        "jump_table_offset": header.index_offset_bytes,
        "level": header.level,
    })
}

/// `None` when the payload is no LSMT file at all.
fn lsmt_facts(args: &Args, source: Source, payload: &Payload) -> Result<Option<Facts>> {
    if payload.bytes() < lsmt::HEADER_BYTES {
        return Ok(None);
    }
    let mut scratch = Scratch::new(std::iter::once(payload))?;
    let mut bytes = vec![0; to_usize(lsmt::HEADER_BYTES).unwrap_or(0)];
    scratch.read(payload, 0, 0, &mut bytes)?;
    if !lsmt::has_magic(&bytes) {
        return Ok(None);
    }
    let header = lsmt::Header::parse(&bytes, 0)?;
    let is_file_of_pair = !header.flags.is_data_file() || header.flags.is_sparse_writable();
    match Layer::open_sealed(args.file.display().to_string(), source) {
        Ok(layer) => Ok(Some(layer_facts(args, layer))),
        // One file of a writable pair has no trailer: its header is all there is.
        Err(_) if is_file_of_pair || !header.flags.is_sealed() => {
            let mut facts = header_facts(&header);
            facts["role"] = json!(if header.flags.is_data_file() {
                "data file of a writable pair"
            } else {
                "index file of a writable pair"
            });
            Ok(Some(facts.into()))
        }
        Err(error) => Err(error),
    }
}

fn header_facts(header: &lsmt::Header) -> Value {
    json!({
        "virtual_bytes": header.virtual_size_bytes,
        "uuid": header.uuid.to_string(),
        "parent_uuid": header.parent_uuid.to_string(),
        "version": format!("{}.{}", header.version, header.sub_version),
        "user_tag": header.user_tag_text().escape_ascii().to_string(),
        "flags": header.flags.to_string(),
    })
}

fn layer_facts(args: &Args, layer: Layer) -> Facts {
    let mut facts = header_facts(&layer.header);
    let zeroed: u64 = layer.segments.iter().filter(|s| s.zeroed).map(|s| s.sectors).sum();
    let data: u64 = layer.segments.iter().filter(|s| !s.zeroed).map(|s| s.sectors).sum();
    facts["role"] = json!(match layer.kind {
        LayerKind::Sealed => "read-only layer",
        LayerKind::WritableAppend | LayerKind::WritableSparse => "writable pair",
    });
    facts["layer_bytes"] = json!(layer.payload.bytes());
    facts["index_entries"] = json!(layer.segments.len());
    facts["index_entries_stored"] = json!(layer.stored_entries);
    facts["data_bytes"] = json!(data * SECTOR_SIZE);
    facts["zeroed_bytes"] = json!(zeroed * SECTOR_SIZE);
    let facts = Facts::from(facts);
    if !args.entries {
        return facts;
    }
    facts.with("entries", Rows::of(layer.segments, segment_facts))
}

fn segment_facts(segment: &lsmt::SegmentMapping) -> Value {
    json!({
        "start_sector": segment.start_sector,
        "sectors": segment.sectors,
        "mapped_sector": segment.mapped_sector,
        "zeroed": segment.zeroed,
    })
}
