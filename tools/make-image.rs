//! Makes the image that benchmarks read: `FOLDER/raw` and the same bytes as a layer, raw
//! (`layer.raw`) and compressed (`layer.lz4`, `layer.zstd`).
//!
//! `obd-ublk-make-image FOLDER [MEGABYTES]`; without a size, `FOLDER/raw` is there already.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../benches/common/mod.rs"]
mod common;

use common::{image_like, layer_of};
use obd_ublk::format::zfile::{self, Algorithm, WriteOptions};
use std::path::PathBuf;

fn main() {
    let mut args = std::env::args().skip(1);
    let Some(folder) = args.next().map(PathBuf::from) else {
        eprintln!("usage: obd-ublk-make-image FOLDER [MEGABYTES]");
        std::process::exit(64);
    };
    let data = match args.next() {
        None => std::fs::read(folder.join("raw")).expect("FOLDER/raw"),
        Some(megabytes) => {
            let data = image_like(megabytes.parse::<usize>().expect("megabytes") << 20, 7);
            std::fs::write(folder.join("raw"), &data).unwrap();
            data
        }
    };
    let layer = layer_of(&data);
    std::fs::write(folder.join("layer.raw"), &layer).unwrap();
    for (name, algorithm) in [("layer.lz4", Algorithm::Lz4), ("layer.zstd", Algorithm::Zstd)] {
        let options = WriteOptions { algorithm, block_bytes: 4096, ..WriteOptions::default() };
        std::fs::write(folder.join(name), zfile::write(&layer, &options).unwrap()).unwrap();
    }
}
