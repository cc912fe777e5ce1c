//! Which files an image is made of, so that whoever opens it anew can tell whether they are still
//! the same.

use super::Image;
use crate::source::Source;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// What identifies the file of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerIdentity {
    /// Its path when it was opened.
    pub path: PathBuf,
    /// The file system it is on.
    pub dev: u64,
    /// Its number there.
    pub ino: u64,
    /// Its length in bytes when it was opened.
    pub bytes: u64,
}

impl Image {
    /// The files of the layers, lowest first; of a writable pair the data file. A layer without one
    /// (in memory, or elsewhere) is left out, as is one whose file system does not answer.
    #[must_use]
    pub fn layer_identities(&self) -> Vec<LayerIdentity> {
        let sources = self.parts.payloads.iter().map(super::Payload::source);
        sources
            .filter_map(|source| match source {
                Source::Memory(_) | Source::Remote(_) => None,
                Source::Mapped(file) => {
                    let metadata = file.file().metadata().ok()?;
                    Some(LayerIdentity {
                        path: file.path().to_owned(),
                        dev: metadata.dev(),
                        ino: metadata.ino(),
                        bytes: file.bytes(),
                    })
                }
            })
            .collect()
    }
}
