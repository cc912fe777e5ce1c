//! A device that is up: its loop, from the first request to the last.
//!
//! It sleeps until something happens: a signal, a control request, a word of the supervisor, the
//! end of the device. Nothing here runs by the clock.

use super::control::{ControlSocket, Event};
use super::kernel::{Kernel, Served};
use super::portable::Kept;
use super::protocol::notes::Note;
use super::protocol::{DeviceStat, RemoteStat};
use super::run_dir::{RunDir, Slot};
use super::served_disk::remove_ephemeral;
use super::state::{Phase, State};
use super::supervisor::{Link, ParcelFiles};
use super::turn::Turn;
use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// How long to wait before another attempt at a supervisor, when there is none to be had.
const ORPHAN_PAUSE: Duration = Duration::from_secs(5);

/// How long a search for a supervisor is waited for when the device is gone: it may have found one
/// and be about to say so.
const SEARCH_PATIENCE: Duration = Duration::from_millis(200);

/// How often a lazy detach looks whether the device is still in use.
const LAZY_PAUSE: Duration = Duration::from_secs(1);

/// How a client wants a device stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopMode {
    /// Not while it is mounted or held.
    Polite,
    /// As soon as it is neither mounted nor held.
    Lazy,
    /// Now: whoever has it mounted gets errors.
    Force,
}

/// What brings the device back when this process dies.
#[derive(Debug)]
pub(super) struct Guarded {
    pub(super) link: Link,
    /// What the supervisor was given, for the next one.
    pub(super) parcel: Arc<ParcelFiles>,
}

/// How it stands with the search for another supervisor, which has a thread of its own: somebody
/// who wants to detach need not wait for it.
#[derive(Debug, Default)]
struct Search {
    /// Nobody guards the device.
    orphaned: bool,
    /// The thread is at it.
    under_way: bool,
    /// When it was begun last: a supervisor that takes no links is not to be asked without end.
    begun: Option<Instant>,
}

impl Search {
    /// Begins, unless that was done just now.
    fn begin<T>(&mut self, up: &Up<T>, run: &RunDir, events: &Sender<Event>) {
        let is_recent = self.begun.is_some_and(|at| at.elapsed() < ORPHAN_PAUSE);
        let Some(guarded) = up.guarded.as_ref().filter(|_| !self.under_way && !is_recent) else {
            return;
        };
        self.begun = Some(Instant::now());
        let (run, id, parcel) = (run.clone(), up.slot.id(), Arc::clone(&guarded.parcel));
        let sender = events.clone();
        let search = move || {
            let link = relink(&run, id, &parcel, &sender)
                .inspect_err(|error| tracing::error!("without a supervisor: {error:#}"));
            let _ = sender.send(Event::Relinked(link.ok()));
        };
        let spawned = std::thread::Builder::new().name("relink".to_owned()).spawn(search);
        self.under_way = spawned.is_ok();
    }

    /// Lets go of a supervisor that was found and not taken note of yet: it would guard a device
    /// that is gone, until this process ends. (A search that goes on for longer is left to that.)
    fn end(&self, inbox: &Receiver<Event>) {
        if !self.under_way {
            return;
        }
        let deadline = Instant::now() + SEARCH_PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match inbox.recv_timeout(left) {
                Ok(Event::Relinked(link)) => {
                    link.iter().for_each(Link::end);
                    return;
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}

/// A device that is up.
pub(super) struct Up<T> {
    pub(super) device: T,
    pub(super) kept: Arc<dyn Kept>,
    pub(super) control: ControlSocket,
    pub(super) state: State,
    pub(super) slot: Slot,
    pub(super) since: Instant,
    pub(super) guarded: Option<Guarded>,
}

/// What the loop does next.
enum Step {
    Wait,
    TakeDown { held: Option<File>, answer: Option<Sender<Result<()>>> },
    Leave,
}

/// Serves until the device is stopped or handed over. Returns when nothing is left to do here.
///
/// # Errors
/// When the device could not be taken down.
pub(super) fn serve<K: Kernel>(
    mut up: Up<K::Device>,
    kernel: &K,
    run: &RunDir,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
) -> Result<()> {
    let mut lazy = up.state.lazy;
    let mut search = Search::default();
    let mut turn = Turn::default();
    loop {
        let pause = if lazy {
            Some(LAZY_PAUSE)
        } else if search.orphaned {
            Some(ORPHAN_PAUSE)
        } else {
            None
        };
        let event = match pause.map(|pause| inbox.recv_timeout(pause)) {
            None => inbox.recv().ok(),
            Some(Ok(event)) => Some(event),
            Some(Err(RecvTimeoutError::Disconnected)) => None,
            Some(Err(RecvTimeoutError::Timeout)) => {
                if search.orphaned {
                    search.begin(&up, run, events);
                }
                if lazy
                    && !turn.is_under_way()
                    && let Ok(held) = kernel.hold(up.slot.id())
                {
                    let outcome = take_down(up, Some(held), None);
                    search.end(inbox);
                    return outcome;
                }
                continue;
            }
        };
        let event = match event {
            Some(Event::Orphaned) => {
                search.orphaned = up.guarded.is_some();
                search.begin(&up, run, events);
                continue;
            }
            Some(Event::Relinked(link)) => {
                search.under_way = false;
                if let (Some(link), Some(guarded)) = (link, &mut up.guarded) {
                    guarded.link = link;
                    search.orphaned = false;
                }
                continue;
            }
            event => event,
        };
        let Some(event) = turn.take(&mut up, kernel, events, event) else { continue };
        match step(&mut up, kernel, event, &mut lazy) {
            Step::Wait => {}
            Step::TakeDown { held, answer } => {
                let outcome = take_down(up, held, answer.as_ref());
                search.end(inbox);
                return outcome;
            }
            Step::Leave => {
                tracing::info!("another process takes the device over");
                up.kept.hand_on();
                up.device.abandon();
                return Ok(());
            }
        }
    }
}

fn step<K: Kernel>(
    up: &mut Up<K::Device>,
    kernel: &K,
    event: Option<Event>,
    lazy: &mut bool,
) -> Step {
    match event {
        None => Step::TakeDown { held: None, answer: None },
        Some(Event::Stat(answer)) => {
            let _ = answer.send(stat_of(up));
            Step::Wait
        }
        Some(Event::Stop(mode, answer)) => stop_step(up, kernel, mode, answer, lazy),
        Some(Event::Signal(name)) => {
            tracing::info!(signal = name, "asked to end");
            Step::TakeDown { held: None, answer: None }
        }
        Some(Event::Gone) if up.device.is_gone() => {
            tracing::warn!("the device was deleted by somebody else");
            Step::TakeDown { held: None, answer: None }
        }
        Some(Event::Yield) if up.guarded.is_some() => Step::Leave,
        Some(
            Event::Gone
            | Event::Yield
            | Event::Orphaned
            | Event::Relinked(_)
            | Event::Opened
            | Event::Snapshot(_)
            | Event::Snapshotted(_)
            | Event::Resize(_)
            | Event::Resized(_),
        ) => Step::Wait,
    }
}

fn stop_step<K: Kernel>(
    up: &mut Up<K::Device>,
    kernel: &K,
    mode: StopMode,
    answer: Sender<Result<()>>,
    lazy: &mut bool,
) -> Step {
    match kernel.hold(up.slot.id()) {
        Ok(held) => Step::TakeDown { held: Some(held), answer: Some(answer) },
        Err(error) if error.kind() == ErrorKind::Busy && mode != StopMode::Force => {
            let reply = if mode == StopMode::Lazy {
                *lazy = true;
                // A successor is to keep the promise.
                up.state.lazy = true;
                up.state.save(up.slot.path())
            } else {
                Err(error)
            };
            let _ = answer.send(reply);
            Step::Wait
        }
        Err(error) => {
            // Forced; or no node to hold, which is no reason to keep the device.
            tracing::warn!("{error:#}");
            Step::TakeDown { held: None, answer: Some(answer) }
        }
    }
}

/// Finds or starts another supervisor and hands it the parcel.
fn relink(run: &RunDir, id: u32, parcel: &ParcelFiles, events: &Sender<Event>) -> Result<Link> {
    let link = Link::open(run, id)?;
    link.entrust(parcel)?;
    link.say(&Note::Live)?;
    link.listen(events.clone())?;
    Ok(link)
}

fn stat_of<T: Served>(up: &Up<T>) -> DeviceStat {
    DeviceStat {
        id: up.state.id,
        device: up.state.device_path(),
        pid: up.state.server.pid,
        config: up.state.config.clone(),
        size_bytes: up.state.size_bytes.unwrap_or(0),
        read_only: up.state.read_only,
        uptime_ms: u64::try_from(up.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        recoverable: up.state.recoverable,
        recovery_count: up.state.recovery_count,
        last_recovery: up.state.last_recovery,
        counters: up.device.counters(),
        upper: up.kept.usage(),
        remote: up.kept.remote().as_ref().map(RemoteStat::of),
    }
}

/// Stops the device, removes its folder, and only then answers whoever asked for it.
fn take_down<T: Served>(
    mut up: Up<T>,
    held: Option<File>,
    answer: Option<&Sender<Result<()>>>,
) -> Result<()> {
    // Killed from here on, the device is not to come back but to go.
    up.state.phase = Phase::Stopping;
    if let Err(error) = up.state.save(up.slot.path()) {
        tracing::warn!("{error:#}");
    }
    // A folder of a device that the kernel did not let go of stays: `detach` finds it by that.
    let outcome = up.device.stop(held).and_then(|()| {
        let closed = up.kept.close();
        remove_ephemeral(&up.state);
        up.slot.remove().and(closed)
    });
    if let Some(answer) = answer {
        let copy = match &outcome {
            Ok(()) => Ok(()),
            Err(error) => Err(Error::new(error.kind(), format!("{error:#}"))),
        };
        let _ = answer.send(copy);
    }
    up.control.close();
    if let (Ok(()), Some(guarded)) = (&outcome, &up.guarded) {
        guarded.link.end();
    }
    if outcome.is_ok() {
        tracing::info!("device is gone");
    }
    outcome
}
