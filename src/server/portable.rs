//! What the server asks of a disk so that a successor can serve it: to be packed, and to say which
//! files it is made of.

use super::protocol::UpperUsage;
use super::state::LayerFile;
use super::supervisor::ParcelFiles;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, LiveImage, Parcel};
use crate::source::RemoteUsage;
use std::fmt;
use std::path::PathBuf;

/// What the server asks of a disk, whatever kind it is.
pub(super) trait Kept: Send + Sync + fmt::Debug {
    /// Everything that serving it needs, as open files.
    ///
    /// # Errors
    /// When it cannot be packed; a successor then opens it anew.
    fn pack(&self) -> Result<ParcelFiles>;

    /// The files it is made of, lowest first, without an upper that is written.
    fn layer_files(&self) -> Vec<LayerFile>;

    /// The data file of an upper that is written.
    fn upper_file(&self) -> Option<LayerFile> {
        None
    }

    /// Folders and files that it goes on to need by their paths.
    fn folders(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// How much its upper holds, if it has one that is written.
    fn usage(&self) -> Option<UpperUsage> {
        None
    }

    /// What its layers in a registry cost so far, if it has any.
    fn remote(&self) -> Option<RemoteUsage> {
        None
    }

    /// The image, if it can be exchanged while it is served: that of a snapshot.
    fn live(&self) -> Option<&LiveImage> {
        None
    }

    /// Writes down what its successor cannot know, which serves it from now on: what was recorded
    /// and learned beside its reads. Called while requests are still served, so that none waits.
    fn hand_on(&self) {}

    /// Makes durable what was written and lets go of the upper, once nobody asks for anything any
    /// more.
    ///
    /// # Errors
    /// When what was written since the last flush may be lost.
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// A disk that outlives its server.
pub(super) trait Portable: Disk + Kept {}

impl<D: Disk + Kept> Portable for D {}

impl Kept for Image {
    fn pack(&self) -> Result<ParcelFiles> {
        let Parcel { map, layers } = Image::pack(self)?;
        Ok(std::iter::once(map).chain(layers).collect())
    }

    fn folders(&self) -> Vec<PathBuf> {
        self.needed_paths()
    }

    fn hand_on(&self) {
        self.hand_on_background();
    }

    fn close(&self) -> Result<()> {
        self.end_background();
        Ok(())
    }

    fn remote(&self) -> Option<RemoteUsage> {
        self.remote_usage()
    }

    fn layer_files(&self) -> Vec<LayerFile> {
        let identities = self.layer_identities().into_iter();
        identities
            .map(|it| LayerFile { path: it.path, dev: it.dev, ino: it.ino, bytes: it.bytes })
            .collect()
    }
}

/// The image that was packed into these files.
///
/// # Errors
/// When they are no whole parcel of this version.
pub(super) fn unpack(files: ParcelFiles) -> Result<Image> {
    let mut files = files.into_iter();
    let Some(map) = files.next() else {
        return Err(Error::new(ErrorKind::NotFound, "the parcel is empty"));
    };
    Image::unpack(Parcel { map, layers: files.collect() })
}
