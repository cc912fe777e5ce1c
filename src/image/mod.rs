//! One open disk: its layers, their merged map, and how a request becomes bytes. (under work)

use crate::disk::{Disk, Geometry, Worker};
use crate::error::{Error, ErrorKind, Result};
use std::path::Path;

/// An open image: every layer found, verified and merged.
#[derive(Debug)]
pub struct Image {}

impl Image {
    /// Opens the image that a `config.v1.json` describes, read-only.
    ///
    /// # Errors
    /// Located: which layer, which file, what is wrong with it.
    pub fn open_config(_config: &Path, _service_config: Option<&Path>) -> Result<Self> {
        Err(Error::new(ErrorKind::Unsupported, "not built yet"))
    }
}

impl Disk for Image {
    type Worker = Reader;
    fn geometry(&self) -> Geometry {
        Geometry { sectors: 0, read_only: true, optimal_io_bytes: 4096 }
    }
    fn worker(&self) -> Result<Reader> {
        Err(Error::new(ErrorKind::Unsupported, "not built yet"))
    }
}

/// One thread's reader of an [`Image`].
#[derive(Debug)]
pub struct Reader {}

impl Worker for Reader {
    fn read(&mut self, _start_sector: u64, _dst: &mut [u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "not built yet"))
    }
}
