//! Ending a snapshot whose server did not.

use super::intent::{Intent, NewUpper};
use super::places::hex_of;
use super::{After, paths_of, remember};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::CONFIG_BYTES_MAX;
use crate::server::state::State;
use crate::source::{FileIdentity, Place};
use crate::upper::{self, Journal, PairPaths};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How an interrupted snapshot ended.
#[derive(Debug, PartialEq)]
pub(in crate::server) enum Settled {
    /// There was none.
    None,
    /// It is undone: the pair is the upper that it was.
    Undone,
    /// It is done: the pair is a layer now.
    Done(Box<After>),
}

/// Ends the snapshot of the pair at `paths` that was interrupted, if one was. Nobody may serve the
/// pair. Called again after a failure or a kill, it goes on.
///
/// # Errors
/// An intent that cannot be believed, and what the operating system says.
pub(in crate::server) fn settle(paths: &PairPaths) -> Result<Settled> {
    let index = match Place::of(&paths.index) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Settled::None),
        other => other?,
    };
    // Where links lead to, if the file is there still.
    let index = Place::of_file(&paths.index).unwrap_or(index);
    let Some(intent) = Intent::read(&index)? else { return Ok(Settled::None) };
    let is_here = check_is_of(&intent, paths)?;
    if let Some(after) = committed(&intent)? {
        tracing::info!(layer = %intent.layer.display(), "a snapshot was done, ending it");
        finish(&intent, paths, &index)?;
        return Ok(Settled::Done(Box::new(after)));
    }
    if !is_here {
        let message = format!("{} is gone, and so is what it became", paths.data.display());
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    tracing::info!(layer = %intent.layer.display(), "a snapshot was not done, undoing it");
    // First of all that it is undone, whoever goes on with that.
    let undone = Intent { after: None, ..intent };
    undone.write(&index)?;
    unseal(&undone)?;
    if let Ok(layer) = Place::of(&undone.layer) {
        remove_file_of(&layer, &undone)?;
    }
    remove_upper(&undone.upper)?;
    if let Ok(place) = Place::of(&undone.config_temporary) {
        place.remove().map_err(|error| told("remove", &place, &error))?;
    }
    Intent::remove(&index)?;
    Ok(Settled::Undone)
}

/// Whether the data file of the pair is there. Refuses a pair that is another one than the intent
/// tells of: the folder was copied, and the file that it names may be in use.
fn check_is_of(intent: &Intent, paths: &PairPaths) -> Result<bool> {
    let found = match std::fs::canonicalize(&paths.data) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => {
            return Err(Error::io(format!("resolve {}", paths.data.display()), &error));
        }
        Ok(found) => found,
    };
    if found == intent.data.path {
        return Ok(true);
    }
    let message = format!(
        "{}: the snapshot that was interrupted is one of {}: if this is a copy of that, made in \
         its middle, take one that is whole",
        found.display(),
        intent.data.path.display()
    );
    Err(Error::new(ErrorKind::Corrupt, message))
}

/// The old names go, if what they name has its new one; and last the intent.
fn finish(intent: &Intent, paths: &PairPaths, index: &Place) -> Result<()> {
    let layer = Place::of(&intent.layer)
        .and_then(|place| place.identity().map_err(|error| told("stat", &place, &error)));
    let has_name =
        layer.is_ok_and(|found| found.is_some_and(|found| intent.is_file(&intent.data, found)));
    if !has_name {
        // Moved since, perhaps: the only name that is left may be this one.
        tracing::warn!(layer = %intent.layer.display(), "a layer is not where it was made");
        return Ok(());
    }
    if let Ok(data) = Place::of(&paths.data) {
        remove_file_of(&data, intent)?;
    }
    index.remove().map_err(|error| told("remove", index, &error))?;
    let _ =
        std::fs::remove_file(Journal::path_in(&upper::journal_folder(), intent.data.identity()));
    Intent::remove(index)
}

/// Ends the interrupted snapshot of a device whose server is dead, and tells what its state is.
///
/// # Errors
/// As [`settle`].
pub(in crate::server) fn settle_state(mut state: State, folder: &Path) -> Result<State> {
    if let Some((data, index)) = state.unsettled.clone() {
        // What became of it is known: it is a layer.
        settle(&PairPaths { data, index })?;
        state.unsettled = None;
        state.save(folder)?;
    }
    let Some(paths) = paths_of(&state) else { return Ok(state) };
    if let Settled::Done(after) = settle(&paths)? {
        remember(state.id, &after.config);
        after.enter(&mut state);
        state.unsettled = None;
        state.save(folder)?;
    }
    Ok(state)
}

fn told(what: &str, place: &Place, error: &std::io::Error) -> Error {
    Error::io(format!("{what} {}", place.path().display()), error)
}

/// What the device is now, if the config got its name. It has when it is there, and also when it is
/// nowhere: under its temporary name it was durable before, and that goes only by the rename, or by
/// who wrote down that all is undone.
fn committed(intent: &Intent) -> Result<Option<After>> {
    let Some(after) = &intent.after else { return Ok(None) };
    let is_there = |path: &Path| has_hash(path, &intent.config_sha256);
    if is_there(&intent.config)? || !is_there(&intent.config_temporary)? {
        return Ok(Some(after.clone()));
    }
    Ok(None)
}

/// Whether a file with this SHA-256 is there.
fn has_hash(path: &Path, sha256: &str) -> Result<bool> {
    let file = Place::of(path).and_then(|place| place.open());
    let file = match file {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    let mut text = Vec::new();
    file.take(CONFIG_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
    Ok(hex_of(&text) == sha256)
}

/// Removes the name, if it is one of this very file.
fn remove_file_of(place: &Place, intent: &Intent) -> Result<()> {
    let found = place.identity().map_err(|error| told("stat", place, &error))?;
    if found.is_some_and(|found| intent.is_file(&intent.data, found)) {
        place
            .remove()
            .and_then(|()| place.sync())
            .map_err(|error| told("remove", place, &error))?;
    }
    Ok(())
}

/// Cuts the data file where it ended before it may have got a seal.
fn unseal(intent: &Intent) -> Result<()> {
    let Intent { data, data_bytes: Some(bytes), .. } = intent else { return Ok(()) };
    let place = &Place::of(&data.path)?;
    let file = place.open_for_writing()?;
    let found = file.metadata().map_err(|error| told("stat", place, &error))?;
    let identity = FileIdentity { device_number: found.dev(), inode: found.ino() };
    if !intent.is_file(data, identity) || found.len() < *bytes {
        let message = format!(
            "{}: a snapshot of another file, or of a longer one, was interrupted: found {} bytes, \
             expected {} at least",
            place.path().display(),
            found.len(),
            bytes
        );
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    let cut = file.set_len(*bytes).and_then(|()| file.sync_all());
    cut.map_err(|error| told("cut", place, &error))
}

/// Removes the new pair, which nobody has written to: writes went to the old one.
fn remove_upper(new: &NewUpper) -> Result<()> {
    let told = |path: &Path| {
        let path = path.to_owned();
        move |error| Error::io(format!("remove {}", path.display()), &error)
    };
    if upper::is_of_pair(&new.data, &new.uuid) {
        let file = File::open(&new.data).and_then(|data| FileIdentity::of(&data));
        let journal = file.map(|file| Journal::path_in(&upper::journal_folder(), file));
        let _ = journal.and_then(std::fs::remove_file);
        std::fs::remove_file(&new.data).map_err(told(&new.data))?;
    }
    if upper::is_of_pair(&new.index, &new.uuid) {
        std::fs::remove_file(&new.index).map_err(told(&new.index))?;
    }
    if let Some(folder) = &new.made_folder {
        // Somebody may have put something there meanwhile.
        let _ = std::fs::remove_dir(folder);
    }
    Ok(())
}
