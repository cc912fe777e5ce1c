//! What a snapshot is about to do, durable before it does it: once before it makes anything, and
//! once more, with what is known then, before it seals.

use super::After;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::STATE_BYTES_MAX;
use crate::server::process::boot_id;
use crate::server::state::LayerFile;
use crate::source::{FileIdentity, Place};
use crate::upper::INTENT_SUFFIX;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::path::PathBuf;

/// The version of the file.
const SCHEMA: u32 = 1;

/// What it is written under.
const TEMPORARY_SUFFIX: &str = ".snapshot.new";

/// See the module text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Intent {
    pub(super) schema: u32,
    /// The boot it was written in: device numbers mean nothing in another.
    pub(super) boot_id: String,
    /// The data file of the old pair.
    pub(super) data: LayerFile,
    /// Its length without a seal, from when on it may have one.
    pub(super) data_bytes: Option<u64>,
    /// What the data file is to be called as a layer.
    pub(super) layer: PathBuf,
    /// The new pair.
    pub(super) upper: NewUpper,
    /// What the config is to be called.
    pub(super) config: PathBuf,
    /// What it is written under.
    pub(super) config_temporary: PathBuf,
    /// The SHA-256 of the config, in hexadecimal digits: there under its name, it is done.
    pub(super) config_sha256: String,
    /// The state of the device then, from when on the config may get its name. Without it, what was
    /// begun is undone.
    pub(super) after: Option<After>,
}

/// The pair that a snapshot makes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct NewUpper {
    pub(super) data: PathBuf,
    pub(super) index: PathBuf,
    /// What tells its files from any that were there.
    pub(super) uuid: String,
    /// The folder that was made for it.
    pub(super) made_folder: Option<PathBuf>,
}

impl Intent {
    /// The current version, told.
    pub(super) const SCHEMA: u32 = SCHEMA;

    /// Writes it beside the old index, durably.
    ///
    /// # Errors
    /// What the operating system says; nothing is there then.
    pub(super) fn write(&self, index: &Place) -> Result<()> {
        let (place, temporary) = (index.beside(INTENT_SUFFIX)?, index.beside(TEMPORARY_SUFFIX)?);
        let text = serde_json::to_vec(self).map_err(|error| {
            // A path that is no UTF-8.
            let message = format!("write {}: {error}", place.path().display());
            Error::new(ErrorKind::InvalidConfig, message)
        })?;
        let written = temporary.remove().and_then(|()| {
            let mut file = temporary.create_new(0o600)?;
            file.write_all(&text)?;
            file.sync_all()?;
            temporary.rename_over(&place)?;
            place.sync()
        });
        written.map_err(|error| {
            // Not the one that may be there already: what it tells is true still.
            let _ = temporary.remove();
            Error::io(format!("write {}", place.path().display()), &error)
        })
    }

    /// The intent beside an index, if there is one.
    ///
    /// # Errors
    /// `Corrupt` for what is none, `Unsupported` for that of another version, both with the path.
    pub(super) fn read(index: &Place) -> Result<Option<Self>> {
        let place = index.beside(INTENT_SUFFIX)?;
        let file = match place.open() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let shown = place.path().display();
        let mut text = Vec::new();
        file.take(STATE_BYTES_MAX)
            .read_to_end(&mut text)
            .map_err(|error| Error::io(format!("read {shown}"), &error))?;
        let found: Self = serde_json::from_slice(&text).map_err(|error| {
            let message = format!("{shown}: no intent of a snapshot: {error}");
            Error::new(ErrorKind::Corrupt, message)
        })?;
        if found.schema != SCHEMA {
            let message = format!("{shown}: schema: found {}, expected {SCHEMA}", found.schema);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(Some(found))
    }

    /// Whether this is the file that it was about.
    pub(super) fn is_file(&self, file: &LayerFile, found: FileIdentity) -> bool {
        let is_of_boot = self.boot_id == boot_id();
        found.inode == file.ino && (!is_of_boot || found.device_number == file.dev)
    }

    /// Removes it, durably: the last step of every snapshot.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn remove(index: &Place) -> Result<()> {
        let place = index.beside(INTENT_SUFFIX)?;
        place
            .remove()
            .and_then(|()| place.sync())
            .map_err(|error| Error::io(format!("remove {}", place.path().display()), &error))
    }
}
