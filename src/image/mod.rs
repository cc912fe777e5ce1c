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
//! nothing and takes no lock. A [`Parcel`] carries an image into the process that takes over when
//! this one dies. A [`WritableImage`] puts a pair of `upper` on top of the lowers, and a
//! [`SparseImage`] one in sparse form. `Stack` keeps what only tools need (`inspect`, `explain`,
//! `verify`).

mod background;
mod blocks;
mod check;
#[cfg(feature = "registry")]
mod elsewhere;
mod export;
mod identity;
mod layer;
mod live;
mod open;
mod parcel;
mod payload;
#[cfg(feature = "registry")]
mod prefetch;
mod reader;
mod single;
mod sparse_image;
mod stack;
mod together;
mod writable;

pub use background::Background;
pub use check::{LayerReport, check_layers, work_bytes};
#[cfg(feature = "registry")]
pub use elsewhere::cache_settings;
pub use identity::LayerIdentity;
pub use layer::{Layer, LayerKind};
pub use live::{LiveImage, LiveWorker};
pub use open::{
    HostSettings, check_output, load_image_config, load_image_config_with, load_service_config,
    open_each, parse_image_config, read_config, read_if_config,
};
pub use parcel::Parcel;
pub use payload::{Payload, Wrapping, ZfilePart};
#[cfg(feature = "registry")]
pub use prefetch::{Prefetch, Prefetched};
pub use reader::{Reader, Scratch};
pub use single::{is_reference, read_config_or_layer};
pub use sparse_image::{SparseImage, SparseImageWorker};
pub use stack::{Provenance, Stack};
pub use writable::{UpperChoice, WritableImage, WritableWorker};

use crate::disk::{Disk, Geometry};
use crate::error::Result;
use crate::format::config::ServiceConfig;
use crate::limits::EXPORT_CHECK_SECONDS_MAX;
use crate::map::FlatMap;
use crate::source::{RemoteBlob, RemoteUsage, Source, usage_of};
use crate::units::SECTOR_SIZE;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

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
    /// What goes on beside the reads of a served image.
    background: OnceLock<Arc<Background>>,
}

impl Parts {
    fn new(payloads: Box<[Payload]>, map: FlatMap) -> Self {
        Self { payloads, map, background: OnceLock::new() }
    }

    /// The layers that lie elsewhere.
    fn remote_blobs(&self) -> impl Iterator<Item = &dyn RemoteBlob> {
        self.payloads.iter().filter_map(|payload| match payload.source() {
            Source::Remote(blob) => Some(&**blob),
            Source::Mapped(_) | Source::Memory(_) => None,
        })
    }
}

impl Image {
    /// Opens the image that a `config.v1.json` describes, read-only, or the one layer that is there
    /// in its place. Relative paths in the config are taken from the current directory. An upper is
    /// part of the view, and is not written.
    ///
    /// # Errors
    /// Located: which layer, which file, what is wrong with it.
    pub fn open_config(config: &Path, service_config: Option<&Path>) -> Result<Self> {
        let host = HostSettings { service_config, ..HostSettings::default() };
        let text = read_config_or_layer(config, host)?;
        Self::open_bytes(config, &text, service_config)
    }

    /// As [`Image::open_config`] for a config that was read already, as `bytes` from `config`: who
    /// judged it (where its results go, whether it is writable) then knows that the image is of
    /// the same text, though somebody replaced the file meanwhile.
    ///
    /// # Errors
    /// As [`Image::open_config`], but for reading the config.
    pub fn open_bytes(config: &Path, bytes: &[u8], service_config: Option<&Path>) -> Result<Self> {
        Self::open_text(config, bytes, &load_service_config(service_config)?)
    }

    /// As [`Image::open_bytes`], with settings of the host that were read already.
    ///
    /// # Errors
    /// As there.
    pub fn open_text(config: &Path, bytes: &[u8], service: &ServiceConfig) -> Result<Self> {
        let config = parse_image_config(config, bytes)?;
        Stack::open(&config, service)?.into_image()
    }

    /// What its layers in a registry cost this process so far, one that is there twice once; `None`
    /// when all are here.
    #[must_use]
    pub fn remote_usage(&self) -> Option<RemoteUsage> {
        let sum = usage_of(self.parts.remote_blobs());
        (sum.blobs > 0).then_some(sum)
    }

    /// Fails if a layer without checksums of its own was read whole from a registry by now and is
    /// not what its digest says: what was read of it may be wrong. Takes the digests of those that
    /// nobody has checked.
    ///
    /// # Errors
    /// `Integrity`, naming the layer.
    pub fn check_remote(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(EXPORT_CHECK_SECONDS_MAX);
        for payload in &self.parts.payloads {
            let has_checksums = payload.zfile().is_some_and(|part| part.header.has_block_crc);
            if let Source::Remote(blob) = payload.source()
                && !has_checksums
            {
                blob.check(deadline)?;
            }
        }
        Ok(())
    }

    /// The merged map.
    #[must_use]
    pub fn map(&self) -> &FlatMap {
        &self.parts.map
    }

    /// The files behind the map, by the numbers of the layers.
    #[must_use]
    pub fn payloads(&self) -> &[Payload] {
        &self.parts.payloads
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
            discard_granularity_bytes: None,
        }
    }

    fn worker(&self) -> Result<Reader> {
        Reader::new(Arc::clone(&self.parts))
    }

    fn may_wait(&self) -> bool {
        self.parts.remote_blobs().next().is_some()
    }

    fn cancel(&self) {
        if let Some(background) = self.parts.background.get() {
            background.stop();
        }
        self.parts.remote_blobs().for_each(|blob| blob.cancel());
    }
}
