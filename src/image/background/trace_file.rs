//! Trace files, as overlaybd's users have them: an empty one asks for a recording, one with records
//! is replayed.
//!
//! ```text
//!   TRACE (0 bytes) --attach--> TRACE.lock appears --removed, or detach--> TRACE written, TRACE.ok
//!   TRACE.lock --upgrade--> TRACE.draft --successor--> goes on, TRACE written in the end
//!   TRACE, or the file `trace` in the `dir` of an acceleration layer --attach--> replayed
//! ```

use crate::error::{Error, ErrorKind, Result};
use crate::format::config::ImageConfig;
use crate::format::trace::{self, Op, Record, Trace};
use crate::limits::{RECORD_BYTES_MAX, RECORD_COUNT_MAX, TRACE_BYTES_MAX};
use crate::source::{Place, open_regular};
use crate::units::{to_u64, to_usize};
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The name of the trace in the folder of an acceleration layer.
const LAYER_TRACE: &str = "trace";

/// What a config wishes for.
#[derive(Debug)]
pub(super) enum TraceWish {
    Record(Box<Recording>),
    Replay(Trace),
    Nothing,
}

impl TraceWish {
    /// What is wrong with a trace is told and keeps nobody from reading the image.
    pub(super) fn of(config: &ImageConfig) -> Self {
        let wish = if config.acceleration_layer {
            let Some(path) = trace_of_layer(config) else {
                tracing::info!("no trace is replayed: the acceleration layer has no dir");
                return Self::Nothing;
            };
            load(&path, TRACE_BYTES_MAX).map(Self::Replay)
        } else if config.record_trace_path.is_empty() {
            return Self::Nothing;
        } else {
            Self::of_file(Path::new(&config.record_trace_path))
        };
        wish.unwrap_or_else(|error| {
            let error = format!("{error:#}");
            tracing::warn!(error, "no trace is replayed or recorded");
            Self::Nothing
        })
    }

    fn of_file(path: &Path) -> Result<Self> {
        let Ok(found) = std::fs::metadata(path) else {
            // Only a file that is there is a wish.
            return Ok(Self::Nothing);
        };
        if found.len() > 0 {
            return load(path, TRACE_BYTES_MAX).map(Self::Replay);
        }
        Recording::begin(path).map(|recording| Self::Record(Box::new(recording)))
    }
}

/// The trace of the acceleration layer. `None` where that has no folder: in a registry it is an
/// archive, which whoever pulls it unpacks there.
fn trace_of_layer(config: &ImageConfig) -> Option<PathBuf> {
    let layer = config.lowers.last().filter(|layer| !layer.dir.is_empty())?;
    Some(Path::new(&layer.dir).join(LAYER_TRACE))
}

/// The trace in a file of so many bytes at most.
///
/// # Errors
/// `NotFound`, `Io`, `Unsupported` for a longer one; what is wrong with it.
fn load(path: &Path, bytes_max: u64) -> Result<Trace> {
    read(path, &open_regular(path)?, bytes_max)
}

fn read(path: &Path, file: &File, bytes_max: u64) -> Result<Trace> {
    let told = |error: &std::io::Error| Error::io(format!("read {}", path.display()), error);
    // The file may be part of an image: what it is, and how long, before memory is taken for it.
    let mut bytes = Vec::new();
    let front = to_u64(trace::MAGIC_BYTES);
    file.take(front).read_to_end(&mut bytes).map_err(|error| told(&error))?;
    if !trace::has_magic(&bytes) {
        let message = format!("{}: no trace (lists of paths are not supported)", path.display());
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let length = file.metadata().map_err(|error| told(&error))?.len();
    if length <= bytes_max {
        // One more, so that the end is found without growing.
        bytes.reserve_exact(to_usize(length + 1).unwrap_or(0));
        file.take((bytes_max + 1).saturating_sub(front))
            .read_to_end(&mut bytes)
            .map_err(|error| told(&error))?;
    }
    // It may have grown since.
    let length = length.max(to_u64(bytes.len()));
    if length > bytes_max {
        let path = path.display();
        let message = format!("{path}: found {length} bytes, expected at most {bytes_max}");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    trace::parse(&bytes).map_err(|error| error.context(format!("parse {}", path.display())))
}

/// A recording under way.
#[derive(Debug)]
pub(super) struct Recording {
    trace: Place,
    lock: Place,
    ok: Place,
    /// What a server that handed the device over had recorded.
    draft: Place,
    /// Whether the lock is ours, and not that of the server that we take over from.
    made_lock: bool,
    /// `None` once it is written, or given up.
    records: Mutex<Option<Vec<Record>>>,
}

impl Recording {
    /// Begins: whoever wants it to end removes the lock.
    fn begin(path: &Path) -> Result<Self> {
        let trace = Place::of_file(path)?;
        let (lock, ok) = (trace.beside(".lock")?, trace.beside(".ok")?);
        let draft = trace.beside(".draft")?;
        let made_lock = match lock.create_new(0o644) {
            Ok(_) => true,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(error) => {
                return Err(Error::io(format!("make {}", lock.path().display()), &error));
            }
        };
        if made_lock {
            // That of an earlier recording, which nobody ended.
            draft.remove().map_err(|error| {
                let _ = lock.remove();
                Error::io(format!("remove {}", draft.path().display()), &error)
            })?;
        }
        tracing::info!(trace = %trace.path().display(), "recording");
        Ok(Self { trace, lock, ok, draft, made_lock, records: Mutex::new(Some(Vec::new())) })
    }

    /// Takes note of a read of a layer.
    pub(super) fn note(&self, layer: u16, offset_bytes: u64, bytes: u64) {
        let mut records = self.records();
        let Some(records) = &mut *records else { return };
        let (mut at, end) = (offset_bytes, offset_bytes.saturating_add(bytes));
        // The reference replays into a buffer of this size.
        while at < end && records.len() < RECORD_COUNT_MAX {
            let bytes = RECORD_BYTES_MAX.min(end - at);
            let layer_index = u32::from(layer);
            records.push(Record { op: Op::Read, layer_index, bytes, offset_bytes: at });
            at += bytes;
        }
    }

    /// Ends it when the lock is gone; whether it has ended.
    pub(super) fn look_for_end(&self) -> bool {
        if matches!(self.lock.identity(), Ok(None)) {
            self.finish();
        }
        self.records().is_none()
    }

    /// Writes the trace, once.
    pub(super) fn finish(&self) {
        let Some(records) = self.take() else { return };
        let count = records.len();
        if count == 0 && !self.made_lock {
            // The server that we were to take over from may be ending it at this moment.
            let _ = self.lock.remove();
            return;
        }
        match self.write(&Trace { records }) {
            Ok(()) => tracing::info!(count, trace = %self.trace.path().display(), "recorded"),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "the recorded trace is lost");
            }
        }
    }

    /// What was recorded, by those before us, too; `None` when that was taken already.
    fn take(&self) -> Option<Vec<Record>> {
        let records = self.records().take()?;
        let draft = self.draft.open();
        let before = draft.and_then(|file| read(self.draft.path(), &file, TRACE_BYTES_MAX));
        match before {
            Ok(Trace { records: mut all }) => {
                all.extend(records);
                all.truncate(RECORD_COUNT_MAX);
                return Some(all);
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "what was recorded before this server is lost");
            }
        }
        Some(records)
    }

    /// Ends it here and leaves what was recorded to the server that takes over, which began before
    /// this one ends and looks for that in the end.
    pub(super) fn hand_on(&self) {
        let Some(records) = self.take() else { return };
        let count = records.len();
        match self.write_draft(&Trace { records }) {
            Ok(()) => tracing::info!(count, "the recording goes on in another process"),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "what was recorded so far is lost");
            }
        }
    }

    /// Not synced: a torn one has a wrong checksum, and the recording begins anew.
    fn write_draft(&self, trace: &Trace) -> Result<()> {
        let beside = self.draft.beside(".new")?;
        let written = beside.remove().and_then(|()| {
            let file = beside.create_new(0o600)?;
            file.write_all_at(&trace::encode(trace), 0)?;
            beside.rename_over(&self.draft)
        });
        written.map_err(|error| {
            let _ = beside.remove();
            Error::io(format!("write {}", self.draft.path().display()), &error)
        })
    }

    /// Leaves all as it was found, unless it has ended already: the empty file goes on asking for a
    /// recording.
    pub(super) fn give_up(&self) {
        if self.records().take().is_none() || !self.made_lock {
            return;
        }
        if let Err(error) = self.lock.remove() {
            tracing::warn!(%error, lock = %self.lock.path().display(), "a lock that stays");
        }
    }

    fn write(&self, trace: &Trace) -> Result<()> {
        let told = |what: &str, place: &Place, error: &std::io::Error| {
            Error::io(format!("{what} {}", place.path().display()), error)
        };
        let file = self.trace.open_for_writing()?;
        let found = file.metadata().map_err(|error| told("look at", &self.trace, &error))?;
        if found.len() > 0 {
            // By the server that we take over from, whose lock was removed at that moment, or by
            // hand. It knows more, or is wanted more.
            let _ = self.draft.remove().and_then(|()| self.lock.remove());
            let message = format!("{}: somebody has written it", self.trace.path().display());
            return Err(Error::new(ErrorKind::Busy, message));
        }
        self.ok.remove().map_err(|error| told("remove", &self.ok, &error))?;
        let written = write_whole(&file, &trace::encode(trace));
        if let Err(error) = written {
            // Empty again, it asks for a recording.
            let _ = file.set_len(0);
            return Err(told("write", &self.trace, &error));
        }
        self.draft.remove().map_err(|error| told("remove", &self.draft, &error))?;
        self.lock.remove().map_err(|error| told("remove", &self.lock, &error))?;
        let made = self.ok.create_new(0o644).map(drop);
        made.map_err(|error| told("make", &self.ok, &error))
    }

    /// The folder in which it makes files.
    pub(super) fn folder(&self) -> Option<PathBuf> {
        self.trace.path().parent().map(Into::into)
    }

    fn records(&self) -> MutexGuard<'_, Option<Vec<Record>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write_whole(file: &File, bytes: &[u8]) -> std::io::Result<()> {
    file.write_all_at(bytes, 0)?;
    file.set_len(to_u64(bytes.len()))?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a layer without a folder, which those of a reference are, a file `trace` in the working
    /// folder used to be replayed.
    #[test]
    fn the_trace_of_a_layer_is_in_its_folder_and_nowhere_else() {
        for (layer, expected) in [
            (r#"{"digest": "sha256:b", "dir": "/l/2"}"#, Some("/l/2/trace")),
            (r#"{"digest": "sha256:b"}"#, None),
            (r#"{"file": "/l/2/layer", "dir": ""}"#, None),
        ] {
            let config =
                format!(r#"{{"lowers": [{{"dir": "/l/1"}}, {layer}], "accelerationLayer": true}}"#);
            let config = ImageConfig::parse(config.as_bytes()).unwrap();
            assert_eq!(trace_of_layer(&config), expected.map(PathBuf::from), "{layer}");
        }
    }

    /// 256 MiB of anything were read into memory before its first bytes were looked at, and of a
    /// trace so long twice as much was taken.
    #[test]
    fn what_is_no_trace_or_too_long_is_known_before_it_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        for (front, told) in
            [(vec![0; 24], "no trace"), (trace::encode(&Trace::default()), "found 300000000")]
        {
            std::fs::write(&path, front).unwrap();
            File::options().write(true).open(&path).unwrap().set_len(300_000_000).unwrap();
            let file = open_regular(&path).unwrap();
            let error = read(&path, &file, TRACE_BYTES_MAX).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(told), "{error:#}");
            let at = std::io::Seek::stream_position(&mut &file).unwrap();
            assert_eq!(at, to_u64(trace::MAGIC_BYTES), "and no more was read");
        }
    }

    #[test]
    fn a_recording_that_is_full_can_be_replayed() {
        let record = Record { op: Op::Read, layer_index: 0, bytes: 1, offset_bytes: 0 };
        let full = Trace { records: vec![record; RECORD_COUNT_MAX] };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), trace::encode(&full)).unwrap();
        assert_eq!(load(file.path(), TRACE_BYTES_MAX).unwrap(), full);
    }
}
