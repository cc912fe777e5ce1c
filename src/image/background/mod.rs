//! What goes on beside the reads of a served image: learning what is touched first, fetching ahead
//! what a trace names, downloading whole layers.
//!
//! ```text
//!   Reader --note--> Touches (once for each chunk) --> first-touch log, saved for the next attach
//!                    Recording (each read)         --> trace file, for overlaybd's users
//!   trace file, acceleration layer, first-touch log --> replay --> RemoteBlob::fetch_ahead
//!   `download` of the config, most of a blob wanted --> download --> RemoteBlob::fetch_ahead
//! ```
//!
//! Reads come first: whatever is fetched here waits while a read waits for the same blob. All of it
//! is a help that may fail, be late or useless without anybody noticing but by the time it takes;
//! `export` and the like do without. Threads hold blobs and never the image, so that it goes when
//! its last user goes.

mod download;
mod pace;
mod replay;
mod stop;
mod touch_log;
mod touches;
mod trace_file;

use super::Image;
use super::payload::Payload;
use crate::cache::TouchLogs;
use crate::format::config::{ImageConfig, ServiceConfig};
use crate::limits::{BACKGROUND_LOOK_MS, LEARN_MS_MAX, REPLAY_THREADS_MAX};
use crate::source::{RemoteBlob, Source, distinct};
use crate::units::to_usize;
use download::{Downloads, Plan};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stop::Stop;
use touch_log::TouchLog;
use touches::Touches;
use trace_file::{Recording, TraceWish};

/// What goes on beside the reads of one image. It stops when this is dropped; a recording is
/// written by [`Background::end`] alone.
#[derive(Debug)]
pub struct Background {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stop: Stop,
    touches: Touches,
    recording: Option<Recording>,
    log: Option<TouchLog>,
    /// What the layers elsewhere go on to need.
    needed: Vec<PathBuf>,
}

impl Background {
    /// Begins what the configs wish for an image of these payloads; `None` for nothing. The first
    /// touches are learned in the folder `logs`.
    fn begin(
        payloads: &[Payload],
        config: &ImageConfig,
        service: &ServiceConfig,
        logs: Option<TouchLogs>,
    ) -> Option<Self> {
        let blobs: Vec<_> = payloads.iter().filter_map(blob_of).collect();
        let (recording, mut trace) = match TraceWish::of(config) {
            TraceWish::Record(recording) => (Some(recording), None),
            TraceWish::Replay(trace) => (None, Some(trace)),
            TraceWish::Nothing => (None, None),
        };
        if blobs.is_empty() && recording.is_none() {
            return None;
        }
        let log = logs.filter(|_| !blobs.is_empty()).map(|logs| TouchLog::of(logs, config));
        if trace.is_none() {
            trace = log.as_ref().and_then(TouchLog::load);
        }
        let touches = Touches::new(payloads.iter().map(Payload::bytes));
        let needed = if blobs.is_empty() { Vec::new() } else { needed(config, service) };
        let shared = Arc::new(Shared { stop: Stop::default(), touches, recording, log, needed });
        if let Some(trace) = trace.filter(|_| !blobs.is_empty()) {
            let wished =
                to_usize(u64::from(service.prefetch_config.concurrency)).unwrap_or(usize::MAX);
            replay::begin(&shared, payloads, trace, wished.clamp(1, REPLAY_THREADS_MAX));
        }
        let plan = Plan::of(config.download.as_ref().unwrap_or(&service.download));
        shared.begin_thread(Downloads::new(distinct(blobs), plan));
        Some(Self { shared })
    }

    /// Takes note of a read of a layer.
    #[inline]
    pub(super) fn note(&self, layer: u16, offset_bytes: u64, len_bytes: usize) {
        let shared = &*self.shared;
        let bytes = crate::units::to_u64(len_bytes);
        shared.touches.note(layer, offset_bytes, bytes);
        if let Some(recording) = &shared.recording {
            recording.note(layer, offset_bytes, bytes);
        }
    }

    /// Nothing new is begun any more. Does not wait.
    pub(super) fn stop(&self) {
        self.shared.stop.set();
    }

    /// Ends everything, and writes down what was learned and recorded.
    pub fn end(&self) {
        self.stop();
        self.shared.save();
        if let Some(recording) = &self.shared.recording {
            recording.finish();
        }
    }

    /// Folders in which files are made at the end, and what layers elsewhere go on to need.
    pub(super) fn needed(&self) -> Vec<PathBuf> {
        let recorded = self.shared.recording.iter().filter_map(Recording::folder);
        recorded.chain(self.shared.needed.iter().cloned()).collect()
    }
}

impl Drop for Background {
    /// Of an image whose serving did not end but never began, or went on in another process: what
    /// is recorded there is not ours to end.
    fn drop(&mut self) {
        self.stop();
        self.shared.save();
        if let Some(recording) = &self.shared.recording {
            recording.give_up();
        }
    }
}

impl Shared {
    /// Writes down the first touches, once.
    fn save(&self) {
        let Some(records) = self.touches.take_learned() else { return };
        if let Some(log) = &self.log {
            log.save(records);
        }
    }

    /// Starts the thread that looks around every so often. Without one there is no help.
    fn begin_thread(self: &Arc<Self>, mut downloads: Downloads) {
        let shared = Arc::clone(self);
        let begun = Instant::now();
        let thread = std::thread::Builder::new().name("image-background".to_owned());
        let spawned = thread.spawn(move || {
            let learn_until = begun + Duration::from_millis(LEARN_MS_MAX);
            let mut is_learning = shared.log.is_some();
            let mut is_recording = shared.recording.is_some();
            loop {
                if shared.stop.is_set() {
                    return;
                }
                if is_learning && Instant::now() >= learn_until {
                    shared.save();
                    is_learning = false;
                }
                is_recording =
                    is_recording && shared.recording.as_ref().is_some_and(|it| !it.look_for_end());
                let is_downloading = downloads.look(&shared.stop, begun);
                if !(is_learning || is_recording || is_downloading) {
                    return;
                }
                let look = Duration::from_millis(BACKGROUND_LOOK_MS);
                let pause = if is_recording { Duration::from_secs(1) } else { look };
                shared.stop.wait(pause.min(downloads.next_look(begun, look)));
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for the background");
        }
    }
}

fn blob_of(payload: &Payload) -> Option<Arc<dyn RemoteBlob>> {
    match payload.source() {
        Source::Remote(blob) => Some(Arc::clone(blob)),
        Source::Mapped(_) | Source::Memory(_) => None,
    }
}

impl Image {
    /// Begins what helps a served image beside its reads: replay of traces and of what was touched
    /// first last time, download of whole layers, recording. Once; for images that are served.
    pub fn begin_background(&self, config: &ImageConfig, service: &ServiceConfig) {
        self.begin_background_in(config, service, touch_logs(service));
    }

    fn begin_background_in(
        &self,
        config: &ImageConfig,
        service: &ServiceConfig,
        logs: Option<TouchLogs>,
    ) {
        if self.parts.background.get().is_some() {
            return;
        }
        let begun = Background::begin(&self.parts.payloads, config, service, logs);
        if let Some(background) = begun {
            let _ = self.parts.background.set(Arc::new(background));
        }
    }

    /// Ends that, and writes down what was learned and recorded.
    pub fn end_background(&self) {
        if let Some(background) = self.background() {
            background.end();
        }
    }

    /// What goes on beside its reads, for who outlives it.
    #[must_use]
    pub fn background(&self) -> Option<Arc<Background>> {
        self.parts.background.get().cloned()
    }

    /// Folders and files that a served image goes on to need by their paths, besides its layers:
    /// those in which it makes files, and those of its layers elsewhere (the cache, credentials).
    #[must_use]
    pub fn needed_paths(&self) -> Vec<PathBuf> {
        self.parts.background.get().map_or(Vec::new(), |background| background.needed())
    }
}

#[cfg(feature = "registry")]
fn touch_logs(service: &ServiceConfig) -> Option<TouchLogs> {
    Some(TouchLogs::of(&super::elsewhere::cache_settings(service).folder))
}

#[cfg(not(feature = "registry"))]
fn touch_logs(_service: &ServiceConfig) -> Option<TouchLogs> {
    None
}

#[cfg(feature = "registry")]
use super::elsewhere::needed;

#[cfg(not(feature = "registry"))]
fn needed(_config: &ImageConfig, _service: &ServiceConfig) -> Vec<PathBuf> {
    Vec::new()
}

#[cfg(test)]
mod tests;
