//! Snapshots: the upper of a served device becomes a layer, and a new upper takes its place, while
//! the device is read and written.
//!
//! ```text
//!   new pair, config under a temporary name, everything opened       (the device goes on)
//!   writes stop -- flush -- intent -- seal -- link LAYER -- rename the config -- writes go on
//!   state file -- parcel -- the old pair's names and the intent go
//! ```
//!
//! The rename of the config is the commit point: killed before it, the device comes back with its
//! old upper, after it with the new one. What tells the two apart is the intent, a file beside the
//! index of the old pair, durable before the first byte of the seal: [`settle()`] finds it and ends
//! what was begun, one way or the other. A snapshot that fails takes back what it did and the
//! device goes on as before.
//!
//! Paths are the caller's. The server has left the caller's mounts, so every place is found and
//! held open by a thread that goes back to them (`places`), and used from there on by descriptor.

mod finish;
mod intent;
mod places;
mod settle;
mod take;
#[cfg(test)]
mod tests;

pub(super) use finish::{finish, work};
pub(super) use settle::{Settled, settle, settle_state};
pub(super) use take::{Leftovers, take};

use super::persist::PersistDir;
use super::served_disk::pair_paths;
use super::state::{LayerFile, State};
use crate::format::config::ImageConfig;
use crate::upper::PairPaths;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// What a snapshot is to make. Every path is absolute, in the mounts of who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOrder {
    /// The file that the old upper becomes. Must not exist, and be on the same file system.
    pub layer: PathBuf,
    /// The folder of the new upper.
    pub upper: PathBuf,
    /// The config of the image with the layer and the new upper. May only exist if it is the one
    /// that is attached.
    pub config: PathBuf,
}

/// What a snapshot made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Size of the layer in bytes.
    pub layer_bytes: u64,
    /// How long writes waited.
    pub pause_ms: f64,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
}

/// What of a device's state is another one after a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct After {
    pub(super) config: PathBuf,
    pub(super) config_content: Value,
    pub(super) layers: Vec<LayerFile>,
    pub(super) upper: LayerFile,
}

/// A device that persists comes back as what it is now. A snapshot that is taken is not undone for
/// want of this: it is told.
fn remember(id: u32, config: &Path) {
    let persist = PersistDir::of_host();
    let noted = persist.load(id).and_then(|entry| {
        let Some(mut entry) = entry else { return Ok(()) };
        config.clone_into(&mut entry.config);
        persist.save(&entry)
    });
    if let Err(error) = noted {
        tracing::error!("note the snapshot for the next boot: {error:#}");
    }
}

/// The files of the upper that a device is written through.
fn paths_of(state: &State) -> Option<PairPaths> {
    let text = serde_json::to_vec(&state.config_content).unwrap_or_default();
    ImageConfig::parse(&text).ok().as_ref().and_then(pair_paths)
}

impl After {
    /// Makes it part of a device's state.
    pub(super) fn enter(self, state: &mut State) {
        let Self { config, config_content, layers, upper } = self;
        state.unsettled = paths_of(state).map(|paths| (paths.data, paths.index));
        state.config = config;
        state.config_content = config_content;
        state.layers = layers;
        state.upper = Some(upper);
        // The new upper is in a folder that somebody named: nothing removes it unasked.
        state.ephemeral = false;
    }
}
