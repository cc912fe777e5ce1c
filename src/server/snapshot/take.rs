//! Taking a snapshot: the steps, and the way back from each of them.

use super::intent::Intent;
use super::places::{Places, in_mounts_of};
use super::{After, SnapshotOrder, SnapshotReport};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::image::{Image, Layer, LiveImage, WritableImage};
use crate::server::state::{LayerFile, State};
use crate::source::{FileIdentity, Place};
use crate::units::SECTOR_SIZE;
use crate::upper::{NewPair, Pair, Seal, new_uuid};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long writes in flight may take to end: as long as a disk that is not dead takes at worst.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);

/// What is left to do when the device's state is written down: the old pair's names go.
#[derive(Debug)]
pub(in crate::server) struct Leftovers {
    data: Place,
    file: FileIdentity,
    index: Place,
    pair: Arc<Pair>,
}

/// Called before every step that changes something; a test dies there.
pub(super) type Probe<'a> = &'a dyn Fn(&'static str) -> Result<()>;

/// Takes a snapshot of `live`, the image of the device in `state`, for process `pid`. Returns what
/// the device is now, to be written down and handed on; then [`Leftovers::remove`] ends it.
///
/// # Errors
/// What is in the way. The device then goes on as before, and nothing of the attempt is left.
pub(in crate::server) fn take(
    live: &LiveImage,
    state: &State,
    order: &SnapshotOrder,
    pid: i32,
) -> Result<(SnapshotReport, After, Leftovers)> {
    take_probed(live, state, order, pid, &|_| Ok(()))
}

pub(super) fn take_probed(
    live: &LiveImage,
    state: &State,
    order: &SnapshotOrder,
    pid: i32,
    probe: Probe<'_>,
) -> Result<(SnapshotReport, After, Leftovers)> {
    let of_before = live.current();
    let old = Arc::clone(of_before.pair());
    let data = file_of(&old, &of_before.paths().data)?;
    let new = NewPair {
        virtual_bytes: old.virtual_sectors().saturating_mul(SECTOR_SIZE),
        uuid: new_uuid()?,
        parent_uuid: old.head().uuid,
    };
    let paths = of_before.paths().clone();
    let found = in_mounts_of(pid, || Places::find(order, state, &paths, &data, &new));
    let mut places = found?;
    let upper = open_upper(&mut places, &of_before)?;
    // Nothing can fail any more once the config has its name.
    let leftovers = Leftovers {
        data: places.data.try_clone()?,
        file: data.identity(),
        index: places.index.try_clone()?,
        pair: Arc::clone(&old),
    };
    drop(of_before);
    // Most of what is unflushed goes now, so that the pause is short.
    old.flush()?;
    let since = Instant::now();
    let changed = live.change(since + DRAIN_PATIENCE, |current| {
        let steps = Steps { old: &old, places: &mut places, state, probe };
        let (image, layer_bytes, after) = steps.run(current, Arc::clone(&upper))?;
        Ok((image, (layer_bytes, after)))
    });
    // Its journal would outlive its files.
    let (layer_bytes, after) = changed.inspect_err(|_| upper.retire())?;
    let pause_ms = since.elapsed().as_secs_f64() * 1000.0;
    let report = SnapshotReport { layer_bytes, pause_ms, disk_bytes: new.virtual_bytes };
    Ok((report, after, leftovers))
}

/// What identifies the data file of a pair.
fn file_of(pair: &Pair, path: &Path) -> Result<LayerFile> {
    let Some(file) = pair.data_file() else {
        return Err(Error::new(ErrorKind::Unsupported, "the upper is no file"));
    };
    LayerFile::of(path, file)
}

/// The new pair, open and empty.
fn open_upper(places: &mut Places, below: &WritableImage) -> Result<Arc<Pair>> {
    let Some(files) = places.files.take() else {
        return Err(Error::new(ErrorKind::NotFound, "the new upper has no files"));
    };
    below.open_next(files).context(|| "open the new upper".to_owned())
}

/// The steps while writes are stopped.
struct Steps<'a> {
    old: &'a Pair,
    places: &'a mut Places,
    state: &'a State,
    probe: Probe<'a>,
}

impl Steps<'_> {
    fn run(self, current: &WritableImage, upper: Arc<Pair>) -> Result<(WritableImage, u64, After)> {
        (self.probe)("suspend")?;
        self.old.suspend()?;
        let seal = self.old.plan_seal().inspect_err(|_| self.old.resume())?;
        match self.seal_and_commit(&seal, current, &upper) {
            Ok((lowers, after)) => {
                self.places.keep();
                let paths = self.places.upper.clone();
                let image = WritableImage::with_pair(Some(lowers), paths, upper);
                Ok((image, seal.sealed_bytes, after))
            }
            // A test that dies here leaves everything as it lies.
            Err(error) if error.kind() == ErrorKind::Canceled => {
                self.places.keep();
                Err(error)
            }
            Err(error) => Err(match self.undo(&seal) {
                Ok(()) => error,
                Err(left) => {
                    self.places.keep_intent();
                    error.context(format!("{left:#}"))
                }
            }),
        }
    }

    fn seal_and_commit(
        &self,
        seal: &Seal,
        current: &WritableImage,
        upper: &Pair,
    ) -> Result<(Image, After)> {
        let places = &*self.places;
        let after = self.after(seal, upper)?;
        let data_bytes = Some(seal.data_bytes);
        let intent = Intent { data_bytes, after: Some(after.clone()), ..places.intent.clone() };
        (self.probe)("intent")?;
        intent.write(&places.index)?;
        (self.probe)("seal")?;
        self.old.seal(seal)?;
        (self.probe)("link")?;
        let named = |what: &str, place: &Place| format!("{what} {}", place.path().display());
        let linked = places.data.link_to(&places.layer).and_then(|()| places.layer.sync());
        linked.map_err(|error| Error::io(named("make", &places.layer), &error))?;
        let layer = open_layer(&places.layer, seal, &intent.data)?;
        let lowers = Image::with_layer(current.lowers(), layer)?;
        (self.probe)("commit")?;
        let renamed = places.commit();
        renamed.map_err(|error| Error::io(named("write", &places.config), &error))?;
        if let Err(error) = places.config.sync() {
            // It is there for everybody to see, and there is no way back.
            tracing::error!("{}: {error}", named("sync the folder of", &places.config));
        }
        (self.probe)("committed")?;
        Ok((lowers, after))
    }

    fn after(&self, seal: &Seal, upper: &Pair) -> Result<After> {
        let mut layers = self.state.layers.clone();
        let path = self.places.layer.path().to_owned();
        let data = self.places.intent.data.clone();
        layers.push(LayerFile { path, bytes: seal.sealed_bytes, ..data });
        let upper = file_of(upper, &self.places.upper.data)?;
        let config = self.places.config.path().to_owned();
        Ok(After { config, config_content: self.places.view.content.clone(), layers, upper })
    }

    /// Back to the device as it was. What was made, and last the intent, goes with the places.
    fn undo(&self, seal: &Seal) -> Result<()> {
        let Places { layer, data, .. } = &*self.places;
        let is_ours = |place: &Place| {
            let found = place.identity().ok().flatten();
            found.is_some() && found == data.identity().ok().flatten()
        };
        if is_ours(layer) {
            let told = |error| Error::io(format!("remove {}", layer.path().display()), &error);
            layer.remove().and_then(|()| layer.sync()).map_err(told)?;
        }
        self.old.unseal(seal)?;
        // Before anything is written again: who finds the intent must not cut the data file.
        let harmless = Intent { data_bytes: None, after: None, ..self.places.intent.clone() };
        harmless.write(&self.places.index)?;
        self.old.resume();
        (self.probe)("resumed")
    }
}

/// The sealed file as a layer, checked like any other.
fn open_layer(place: &Place, seal: &Seal, data: &LayerFile) -> Result<Layer> {
    let identity = data.identity();
    let file = place.open()?;
    Layer::adopt_sealed(place.path().to_owned(), file, identity, seal.sealed_bytes)
        .context(|| "open the new layer".to_owned())
}

impl Leftovers {
    /// Removes the names of the old pair, whose data lives on as a layer, and last the intent.
    pub(in crate::server) fn remove(self) {
        self.pair.retire();
        let is_ours = self.data.identity().is_ok_and(|found| found == Some(self.file));
        let removed = if is_ours { self.data.remove() } else { Ok(()) };
        let removed = removed
            .and_then(|()| self.index.remove())
            .and_then(|()| self.data.sync())
            .map_err(|error| Error::io("remove the names of the old upper", &error))
            .and_then(|()| Intent::remove(&self.index));
        if let Err(error) = removed {
            tracing::warn!("left of a snapshot: {error:#}");
        }
    }
}
