//! One open disk: its layers, their merged map, and how a request becomes bytes.
//!
//! ```text
//!   config --open--> Stack (layers with their indexes) --merge--> Image (payloads + flat map)
//!                                                                   | worker()
//!                                                                 Reader, one per thread
//! ```
//!
//! A read asks the map for its extents; zeros are filled, a raw layer's bytes are copied out of
//! the mapped file straight into the request's buffer, a compressed layer's blocks are decoded
//! straight into it. A reader owns all memory that this takes, so a read that hits allocates
//! nothing and takes no lock. `Stack` keeps what only tools need (`inspect`, `explain`, `verify`).

mod blocks;
mod check;
mod export;
mod layer;
mod open;
mod payload;
mod reader;
mod stack;

pub use check::{LayerReport, check_layers, work_bytes};
pub use layer::{Layer, LayerKind};
pub use open::{
    check_output, load_image_config, load_service_config, looks_like_json, open_each, read_config,
};
pub use payload::{Payload, Wrapping, ZfilePart};
pub use reader::{Reader, Scratch};
pub use stack::{Provenance, Stack};

use crate::disk::{Disk, Geometry};
use crate::error::Result;
use crate::map::FlatMap;
use crate::units::SECTOR_SIZE;
use std::path::Path;
use std::sync::Arc;

/// An open image: every layer found, checked and merged.
#[derive(Debug)]
pub struct Image {
    parts: Arc<Parts>,
}

/// What all readers of an image share.
#[derive(Debug)]
struct Parts {
    payloads: Box<[Payload]>,
    map: FlatMap,
}

impl Image {
    /// Opens the image that a `config.v1.json` describes, read-only. Relative paths in the config
    /// are taken from the current directory. An upper is part of the view, and is not written.
    ///
    /// # Errors
    /// Located: which layer, which file, what is wrong with it.
    pub fn open_config(config: &Path, service_config: Option<&Path>) -> Result<Self> {
        let service = load_service_config(service_config)?;
        let (config, _) = load_image_config(config)?;
        Stack::open(&config, &service)?.into_image()
    }

    /// The merged map.
    #[must_use]
    pub fn map(&self) -> &FlatMap {
        &self.parts.map
    }

    /// Size of the virtual disk in bytes.
    #[must_use]
    pub fn virtual_bytes(&self) -> u64 {
        self.parts.map.virtual_sectors() * SECTOR_SIZE
    }
}

impl Disk for Image {
    type Worker = Reader;

    fn geometry(&self) -> Geometry {
        let blocks = self.parts.payloads.iter().filter_map(Payload::block_bytes);
        Geometry {
            sectors: self.parts.map.virtual_sectors(),
            read_only: true,
            optimal_io_bytes: blocks.max().unwrap_or(4096),
        }
    }

    fn worker(&self) -> Result<Reader> {
        Reader::new(Arc::clone(&self.parts))
    }
}
