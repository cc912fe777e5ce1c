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
//! its last user goes. Only the threads of replay and download ever wait for a registry: those of
//! the log and the recording do not, nor does who ends or hands on all of it.

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

/// Whose reads these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// The first of an attach: what is read now is what it begins with.
    Attach,
    /// A server that takes over has those of its predecessor before it.
    Successor,
}

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
    /// Where the first touches are learned, if they are.
    lesson: Option<TouchLog>,
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
        turn: Turn,
    ) -> Option<Self> {
        let blobs: Vec<_> = payloads.iter().filter_map(blob_of).collect();
        let (recording, mut trace) = match TraceWish::of(config) {
            TraceWish::Record(recording) => (Some(*recording), None),
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
        let lesson = log.filter(|_| turn == Turn::Attach);
        let shared = Arc::new(Shared { stop: Stop::default(), touches, recording, lesson, needed });
        if let Some(trace) = trace.filter(|_| !blobs.is_empty()) {
            let wished =
                to_usize(u64::from(service.prefetch_config.concurrency)).unwrap_or(usize::MAX);
            replay::begin(&shared, payloads, trace, wished.clamp(1, REPLAY_THREADS_MAX));
        }
        let plan = Plan::of(config.download.as_ref().unwrap_or(&service.download));
        shared.begin_downloads(Downloads::new(distinct(blobs), plan));
        shared.begin_looking(Duration::from_millis(LEARN_MS_MAX));
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

    /// Ends what a successor begins anew, and leaves to it what was learned and recorded so far.
    pub fn hand_on(&self) {
        self.stop();
        self.shared.save();
        if let Some(recording) = &self.shared.recording {
            recording.hand_on();
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
        if let Some(lesson) = &self.lesson {
            lesson.save(records);
        }
    }

    /// Starts the thread that downloads. Without one there is no help.
    fn begin_downloads(self: &Arc<Self>, mut downloads: Downloads) {
        let shared = Arc::clone(self);
        let begun = Instant::now();
        begin_thread("image-download", move || {
            let look = Duration::from_millis(BACKGROUND_LOOK_MS);
            while !shared.stop.is_set() && downloads.look(&shared.stop, begun) {
                shared.stop.wait(downloads.next_look(begun, look));
            }
        });
    }

    /// Starts the thread that ends the lesson after `learn_for`, and the recording when it is to
    /// end, if there is either.
    fn begin_looking(self: &Arc<Self>, learn_for: Duration) {
        if self.lesson.is_none() && self.recording.is_none() {
            return;
        }
        let shared = Arc::clone(self);
        let begun = Instant::now();
        begin_thread("image-background", move || {
            let mut is_learning = shared.lesson.is_some();
            let mut is_recording = shared.recording.is_some();
            while !shared.stop.is_set() && (is_learning || is_recording) {
                let left = learn_for.saturating_sub(begun.elapsed());
                if is_learning && left.is_zero() {
                    shared.save();
                    is_learning = false;
                }
                let ended = |recording: &Recording| recording.look_for_end();
                is_recording = is_recording && !shared.recording.as_ref().is_none_or(ended);
                let pause = if is_learning { left } else { RECORDING_PAUSE };
                shared.stop.wait(if is_recording { pause.min(RECORDING_PAUSE) } else { pause });
            }
        });
    }
}

/// How often it is looked whether a recording is to end.
const RECORDING_PAUSE: Duration = Duration::from_secs(1);

fn begin_thread(name: &str, work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().name(name.to_owned());
    if let Err(error) = thread.spawn(work) {
        tracing::warn!(%error, name, "no thread for the background");
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
        self.begin_background_in(config, service, touch_logs(service), Turn::Attach);
    }

    /// As [`Image::begin_background`] in a server that takes over from one that has begun it and
    /// handed it on: a recording goes on, and what is touched first was learned before.
    pub fn continue_background(&self, config: &ImageConfig, service: &ServiceConfig) {
        self.begin_background_in(config, service, touch_logs(service), Turn::Successor);
    }

    fn begin_background_in(
        &self,
        config: &ImageConfig,
        service: &ServiceConfig,
        logs: Option<TouchLogs>,
        turn: Turn,
    ) {
        if self.parts.background.get().is_some() {
            return;
        }
        let begun = Background::begin(&self.parts.payloads, config, service, logs, turn);
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

    /// Ends that here, and leaves what was learned and recorded to [`Image::continue_background`]
    /// in another process.
    pub fn hand_on_background(&self) {
        if let Some(background) = self.background() {
            background.hand_on();
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
