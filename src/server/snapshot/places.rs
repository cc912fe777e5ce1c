//! Everything a snapshot needs, found and opened where its caller sees it.

use super::SnapshotOrder;
use super::intent::{Intent, NewUpper};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::ImageConfig;
use crate::server::config_view::{self, ConfigView};
use crate::server::process::boot_id;
use crate::server::served_disk::pair_paths;
use crate::server::state::{LayerFile, State};
use crate::source::{FileIdentity, Place};
use crate::upper::{self, NewPair, PairFiles, PairPaths};
use nix::sched::{CloneFlags, setns, unshare};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The places and files of one snapshot. Dropped without [`Places::keep`], what was made goes.
#[derive(Debug)]
pub(super) struct Places {
    /// The data file of the old pair.
    pub(super) data: Place,
    /// The index file of the old pair.
    pub(super) index: Place,
    /// Where the layer is to be.
    pub(super) layer: Place,
    /// Where the config is to be.
    pub(super) config: Place,
    /// Where it is already.
    pub(super) config_temporary: Place,
    /// What it says.
    pub(super) view: ConfigView,
    /// What is written beside the old index.
    pub(super) intent: Intent,
    /// The new pair.
    pub(super) upper: PairPaths,
    /// Its files; taken when it is opened.
    pub(super) files: Option<PairFiles>,
    /// What is there under the config's name, if that is to be replaced.
    replaces: Option<FileIdentity>,
    made: Vec<Place>,
    made_folder: Option<Place>,
    keeps_intent: bool,
}

impl Drop for Places {
    fn drop(&mut self) {
        for place in self.made.drain(..) {
            if let Err(error) = place.remove() {
                tracing::warn!("{}: left of a snapshot: {error}", place.path().display());
            }
        }
        if let Some(folder) = self.made_folder.take() {
            // Somebody may have put something there meanwhile.
            let _ = folder.remove_folder();
        }
        if !self.keeps_intent
            && let Err(error) = Intent::remove(&self.index)
        {
            tracing::warn!("left of a snapshot: {error:#}");
        }
    }
}

impl Places {
    /// What was made stays, and the intent that tells of it.
    pub(super) fn keep(&mut self) {
        self.keeps_intent = true;
        self.made.clear();
        self.made_folder = None;
    }

    /// Gives the config its name: the commit point.
    pub(super) fn commit(&self) -> std::io::Result<()> {
        let Self { config, config_temporary, replaces, .. } = self;
        if replaces.is_none() {
            return config_temporary.rename_to_free(config);
        }
        if config.identity()? != *replaces {
            return Err(std::io::ErrorKind::AlreadyExists.into());
        }
        config_temporary.rename_over(config)
    }

    /// The intent stays for who comes next: not everything could be taken back.
    pub(super) fn keep_intent(&mut self) {
        self.keeps_intent = true;
    }

    /// Finds and makes all that `order` needs, for the device in `state`, whose upper `old` has the
    /// data file `data`. Makes the new pair and the config under its temporary name.
    ///
    /// # Errors
    /// What is in the way, with the path. Nothing that was made is left then.
    pub(super) fn find(
        order: &SnapshotOrder,
        state: &State,
        old: &PairPaths,
        data: &LayerFile,
        new: &NewPair,
    ) -> Result<Self> {
        let data_place = Place::of_file(&old.data)?;
        check_same(&data_place, data.identity())?;
        let index = Place::of_file(&old.index)?;
        let layer = Place::of(&order.layer)?;
        check_free(&layer)?;
        check_can_be_linked(&data_place, &layer)?;
        let config = Place::of(&order.config)?;
        let replaces = check_replaceable(&config, state)?;
        let view = config_after(state, order)?;
        let parsed = serde_json::to_vec(&view.content).unwrap_or_default();
        let parsed = ImageConfig::parse(&parsed).context(|| "make the config".to_owned())?;
        let gone = || Error::new(ErrorKind::InvalidConfig, "the config got no upper");
        let upper = pair_paths(&parsed).ok_or_else(gone)?;
        if !upper::is_vacant(&upper) {
            let message = format!("the new upper: {} is there already", upper.data.display());
            return Err(Error::new(ErrorKind::Usage, message));
        }
        let text = format!("{:#}\n", view.content);
        let config_temporary = config.beside(&format!(".{}.snapshot", new.uuid))?;
        check_apart(&[&data_place, &index, &layer, &config], &upper)?;
        check_elsewhere(&[&layer, &config], &order.upper, state)?;
        let config_sha256 = hex_of(text.as_bytes());
        let made_folder = Some(order.upper.clone()).filter(|folder| !folder.exists());
        let intent = Intent {
            schema: Intent::SCHEMA,
            boot_id: boot_id(),
            data: LayerFile { path: data_place.path().to_owned(), ..data.clone() },
            data_bytes: None,
            layer: layer.path().to_owned(),
            upper: NewUpper {
                data: upper.data.clone(),
                index: upper.index.clone(),
                uuid: new.uuid.to_string(),
                made_folder,
            },
            config: config.path().to_owned(),
            config_temporary: config_temporary.path().to_owned(),
            config_sha256,
            after: None,
        };
        intent.write(&index)?;
        let mut places = Self {
            intent,
            data: data_place,
            index,
            layer,
            config,
            config_temporary,
            view,
            upper,
            files: None,
            replaces,
            made: Vec::new(),
            made_folder: None,
            keeps_intent: false,
        };
        places.make_config(text.as_bytes())?;
        places.make_upper(order, new)?;
        Ok(places)
    }

    fn make_config(&mut self, text: &[u8]) -> Result<()> {
        // Its name has a UUID in it: it is nobody else's.
        let place = self.config_temporary.try_clone()?;
        let copy = place.try_clone()?;
        let written = place.create_new(0o644).and_then(|mut file| {
            self.made.push(copy);
            file.write_all(text)?;
            file.sync_all()?;
            // That it is gone means later that it was renamed.
            place.sync()
        });
        written.map_err(|error| Error::io(format!("write {}", place.path().display()), &error))
    }

    fn make_upper(&mut self, order: &SnapshotOrder, new: &NewPair) -> Result<()> {
        let folder = &order.upper;
        if !folder.exists() {
            let place = Place::of(folder)?;
            let told = |error| Error::io(format!("make {}", folder.display()), &error);
            std::fs::create_dir(folder).map_err(told)?;
            let synced = place.sync();
            self.made_folder = Some(place);
            synced.map_err(told)?;
        }
        upper::create(&self.upper, new).context(|| "make the new upper".to_owned())?;
        self.made.push(Place::of(&self.upper.data)?);
        self.made.push(Place::of(&self.upper.index)?);
        self.files = Some(PairFiles::open(&self.upper)?);
        Ok(())
    }
}

/// The SHA-256 of `bytes` in hexadecimal digits.
pub(super) fn hex_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check_same(place: &Place, expected: FileIdentity) -> Result<()> {
    let told = |error| Error::io(format!("stat {}", place.path().display()), &error);
    if place.identity().map_err(told)? == Some(expected) {
        return Ok(());
    }
    let message = format!(
        "{} is not the upper that is attached: was it moved, or mounted elsewhere?",
        place.path().display()
    );
    Err(Error::new(ErrorKind::InvalidConfig, message))
}

fn check_free(place: &Place) -> Result<()> {
    let shown = place.path().display();
    match place.identity() {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(Error::new(ErrorKind::Usage, format!("{shown} is there already"))),
        Err(error) => Err(Error::io(format!("stat {shown}"), &error)),
    }
}

/// The layer is the upper's data file under another name. Whether that can be, only the kernel
/// knows.
fn check_can_be_linked(data: &Place, layer: &Place) -> Result<()> {
    let trial = layer.beside(".snapshot")?;
    let is_left = |found: Option<FileIdentity>| {
        found.is_some() && data.identity().is_ok_and(|identity| identity == found)
    };
    if trial.identity().is_ok_and(is_left) {
        // Of an attempt that was killed right here.
        let _ = trial.remove();
    }
    let linked = data.link_to(&trial).and_then(|()| trial.remove());
    linked.map_err(|error| {
        let message = format!(
            "make {}: the layer is the upper {} under another name, and must be on the same file \
             system",
            layer.path().display(),
            data.path().display()
        );
        Error::io(message, &error)
    })
}

/// No two of them are one.
fn check_apart(places: &[&Place], upper: &PairPaths) -> Result<()> {
    let of_upper = [Place::of(&upper.data), Place::of(&upper.index)];
    // Without its folder, none of the upper's is there.
    let all: Vec<&Place> = places.iter().copied().chain(of_upper.iter().flatten()).collect();
    for (at, one) in all.iter().enumerate() {
        for two in all.iter().skip(at + 1) {
            let is_same = one.is_same_as(two);
            let is_same = is_same.map_err(|error| Error::io("compare two folders", &error))?;
            if is_same {
                let message = format!(
                    "{} and {} are one place: every file of a snapshot has its own",
                    one.path().display(),
                    two.path().display()
                );
                return Err(Error::new(ErrorKind::Usage, message));
            }
        }
    }
    Ok(())
}

/// Nothing of it is to lie on the device itself, whose writes wait while it is made.
fn check_elsewhere(places: &[&Place], upper: &Path, state: &State) -> Result<()> {
    let Ok(device) = std::fs::metadata(state.device_path()) else { return Ok(()) };
    let told = |error| Error::io("find out where folders lie", &error);
    let parent = upper.parent().filter(|_| !upper.exists()).unwrap_or(upper);
    let mut numbers = vec![std::fs::metadata(parent).map_err(told)?.dev()];
    for place in places {
        numbers.push(place.device_number().map_err(told)?);
    }
    if !numbers.contains(&device.rdev()) {
        return Ok(());
    }
    let message = "a file of the snapshot would lie on the device itself, whose writes wait for it";
    Err(Error::new(ErrorKind::Usage, message))
}

/// Nobody else's config is overwritten, and no layer. What is there, if it may be.
fn check_replaceable(config: &Place, state: &State) -> Result<Option<FileIdentity>> {
    let attached = Place::of(&state.config).and_then(|place| {
        place.identity().map_err(|error| Error::io("stat the attached config", &error))
    });
    let shown = config.path().display();
    match config.identity() {
        Ok(None) => Ok(None),
        Ok(Some(found)) if is_layer(state, found) => {
            let message = format!("{shown} is a layer of the image");
            Err(Error::new(ErrorKind::Usage, message))
        }
        Ok(found) if attached.is_ok_and(|attached| attached == found) => Ok(found),
        Ok(Some(_)) => {
            let message = format!("{shown} is there already, and not what is attached");
            Err(Error::new(ErrorKind::Usage, message))
        }
        Err(error) => Err(Error::io(format!("stat {shown}"), &error)),
    }
}

fn is_layer(state: &State, found: FileIdentity) -> bool {
    let mut layers = state.layers.iter().chain(&state.upper);
    layers.any(|layer| layer.identity() == found)
}

/// The config of the image with the old upper as a layer and a new one on top.
fn config_after(state: &State, order: &SnapshotOrder) -> Result<ConfigView> {
    let mut content = state.config_content.clone();
    let text = |path: &Path| {
        path.to_str().map(ToOwned::to_owned).ok_or_else(|| {
            let message = format!("{} cannot be told in JSON", path.display());
            Error::new(ErrorKind::InvalidConfig, message)
        })
    };
    let layer = serde_json::json!({ "file": text(&order.layer)? });
    let top = content.as_object_mut();
    let top = top.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the config is no object"))?;
    top.remove("upper");
    // A trace is one of the image without the layer.
    let had_trace = top.remove("accelerationLayer").is_some_and(|value| value == true);
    let lowers = top.entry("lowers").or_insert_with(|| Vec::<()>::new().into());
    if let Some(lowers) = lowers.as_array_mut() {
        if had_trace {
            lowers.pop();
        }
        lowers.push(layer);
    } else {
        *lowers = vec![layer].into();
    }
    let text = serde_json::to_vec(&content).unwrap_or_default();
    config_view::parse(&text, Path::new("/"))?.with_upper(&order.upper)
}

/// Runs `find` in the mounts of process `pid`, on this thread, which comes back to its own.
///
/// # Errors
/// What `find` says; what keeps the thread from going there. From a failure to come back the thread
/// must end.
pub(super) fn in_mounts_of<T>(pid: i32, find: impl FnOnce() -> Result<T>) -> Result<T> {
    let told = |what: &'static str| {
        move |errno: nix::Error| {
            Error::io(format!("{what} the mounts of process {pid}"), &errno.into())
        }
    };
    let open =
        |path: &str| File::open(path).map_err(|error| Error::io(format!("open {path}"), &error));
    let own = open("/proc/thread-self/ns/mnt")?;
    let theirs = open(&format!("/proc/{pid}/ns/mnt"))?;
    let is_same = FileIdentity::of(&own).ok() == FileIdentity::of(&theirs).ok();
    if is_same {
        return find();
    }
    // A thread that shares its working folder with others cannot change its mounts.
    unshare(CloneFlags::CLONE_FS).map_err(told("leave for"))?;
    setns(theirs, CloneFlags::CLONE_NEWNS).map_err(told("go to"))?;
    let outcome = find();
    setns(own, CloneFlags::CLONE_NEWNS).map_err(told("come back from"))?;
    outcome
}
