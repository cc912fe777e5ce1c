//! What devices there are, whose they are, and what to do with those that nobody serves.
//!
//! Our word for a device is its state file, the kernel's word is its list. Only devices that a
//! state file of this boot names are ever touched, and only when the server it names is dead and
//! the kernel does not say that somebody else serves that number.

use super::client;
use super::kernel::{Kernel, KernelDevice};
use super::protocol::Op;
use super::run_dir::{RunDir, Slot, socket_in};
use super::state::{Phase, State};
use crate::error::{Error, ErrorKind, Result};
use std::path::Path;
use std::time::{Duration, Instant};

/// The pause between two looks at something that is about to change.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// How long an attach clears what others left before it gets on with its own work.
const COLLECT_BUDGET: Duration = Duration::from_secs(30);

/// How a device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its server opens the image or starts the device.
    Starting,
    /// It can be used.
    Live,
    /// Its server takes it down.
    Stopping,
    /// Its server is dead. `detach`, or the next `attach`, clears it.
    Dead,
    /// Its folder cannot be understood.
    Broken,
    /// Not attached by this program.
    Foreign,
}

impl Status {
    /// The stable name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Live => "live",
            Self::Stopping => "stopping",
            Self::Dead => "dead",
            Self::Broken => "broken",
            Self::Foreign => "foreign",
        }
    }
}

/// One device of the host.
#[derive(Debug)]
pub struct Entry {
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// How it is doing.
    pub status: Status,
    /// What its server wrote down, if it is ours.
    pub state: Option<State>,
    /// What the kernel says, if it knows it.
    pub kernel: Option<KernelDevice>,
    /// Why the folder cannot be understood.
    pub problem: Option<Error>,
}

/// All devices of the host, by number.
///
/// # Errors
/// When the run folder cannot be read or the kernel cannot be asked.
pub fn survey<K: Kernel>(run: &RunDir, kernel: &K) -> Result<Vec<Entry>> {
    let ids = run.ids()?;
    let known = kernel.list()?;
    let in_kernel = |id: u32| known.iter().copied().find(|device| device.id == id);
    let mut entries: Vec<Entry> =
        ids.iter().filter_map(|&id| entry_of(run, id, in_kernel(id))).collect();
    let foreign = known.iter().filter(|device| !ids.contains(&device.id));
    entries.extend(foreign.map(|device| Entry {
        id: device.id,
        status: Status::Foreign,
        state: None,
        kernel: Some(*device),
        problem: None,
    }));
    entries.sort_by_key(|entry| entry.id);
    Ok(entries)
}

/// `None` when the folder went away under our eyes.
fn entry_of(run: &RunDir, id: u32, kernel: Option<KernelDevice>) -> Option<Entry> {
    let (status, state, problem) = match run.state(id) {
        Ok(Some(state)) => (status_of(&state, kernel), Some(state), None),
        // Just claimed, just removed, or killed between the two: a lock tells.
        Ok(None) if !run.folder(id).exists() => return None,
        Ok(None) => match run.lock(id) {
            Ok(Some(_)) => (Status::Dead, None, None),
            Ok(None) => (Status::Starting, None, None),
            Err(error) => (Status::Broken, None, Some(error)),
        },
        Err(error) => (Status::Broken, None, Some(error)),
    };
    Some(Entry { id, status, state, kernel, problem })
}

fn status_of(state: &State, kernel: Option<KernelDevice>) -> Status {
    match (state.server_is_alive(), state.phase, kernel) {
        (false, _, _) => Status::Dead,
        (true, Phase::Starting, _) => Status::Starting,
        (true, Phase::Live, Some(KernelDevice { live: true, .. })) => Status::Live,
        (true, Phase::Live, _) => Status::Stopping,
    }
}

/// Clears all our devices whose servers are dead. What cannot be cleared is left, with a warning:
/// it must not keep a new device from coming up. Nor may the kernel's slowness: after
/// [`COLLECT_BUDGET`] the rest is left to the next attach.
pub(super) fn collect_dead<K: Kernel>(run: &RunDir, kernel: &K) {
    let ids = run.ids().unwrap_or_else(|error| {
        tracing::warn!("{error:#}");
        Vec::new()
    });
    let deadline = Instant::now() + COLLECT_BUDGET;
    for id in ids {
        if Instant::now() >= deadline {
            tracing::warn!("clearing dead devices takes too long; some are left");
            return;
        }
        match collect(run, kernel, id) {
            Ok(true) => tracing::info!(dev_id = id, "cleared a device whose server died"),
            Ok(false) => {}
            Err(error) => tracing::warn!(dev_id = id, "not cleared: {error:#}"),
        }
    }
}

/// Clears device `id` if its server is dead. False if it is not, or if somebody else is at it.
///
/// # Errors
/// When the folder cannot be understood or the kernel does not let go of the device.
pub(super) fn collect<K: Kernel>(run: &RunDir, kernel: &K, id: u32) -> Result<bool> {
    // Holding the lock, nobody else can clear the number or serve under it.
    let Some(slot) = run.lock(id)? else { return Ok(false) };
    let state = run.state(id)?;
    if let Some(state) = &state {
        if state.server_is_alive() {
            return Ok(false);
        }
        delete_if_ours(kernel, state)?;
    }
    Slot::remove(slot)?;
    Ok(true)
}

fn delete_if_ours<K: Kernel>(kernel: &K, state: &State) -> Result<()> {
    if !state.is_of_this_boot() {
        return Ok(());
    }
    let Some(device) = kernel.list()?.into_iter().find(|device| device.id == state.id) else {
        return Ok(());
    };
    if device.live && device.server_pid != state.server.pid {
        tracing::warn!(
            dev_id = state.id,
            pid = device.server_pid,
            "the number was taken by another program; its device is left alone"
        );
        return Ok(());
    }
    match kernel.delete(state.id) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Stops and deletes device `id`, or clears what is left of it, within `patience`.
///
/// # Errors
/// `NotFound` when it is not ours, `Busy` when it is in use, `Timeout` at the deadline.
pub fn detach<K: Kernel>(run: &RunDir, kernel: &K, id: u32, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut seen = false;
    let mut last = None;
    loop {
        if !run.folder(id).exists() {
            return if seen { Ok(()) } else { Err(not_ours(kernel, id)) };
        }
        seen = true;
        if collect(run, kernel, id)? {
            return Ok(());
        }
        if left().is_zero() {
            return Err(gave_up(run, id, patience, last));
        }
        let live = run.state(id)?.is_some_and(|state| state.phase == Phase::Live);
        if live {
            match stop(&run.folder(id), left()) {
                Ok(()) => return Ok(()),
                Err(error) if is_passing(error.kind()) => last = Some(error),
                Err(error) => return Err(error.context(format!("stop device {id}"))),
            }
        }
        std::thread::sleep(LOOK_PAUSE.min(left()));
    }
}

fn stop(folder: &Path, patience: Duration) -> Result<()> {
    client::request(&socket_in(folder), Op::Stop, patience).map(drop)
}

/// Whether a server that says this may be gone, or there, a moment later.
fn is_passing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::Canceled)
}

fn not_ours<K: Kernel>(kernel: &K, id: u32) -> Error {
    let known = kernel.list().unwrap_or_default().into_iter().find(|device| device.id == id);
    let message = match known {
        Some(device) => format!(
            "device {id} was not attached by obd-ublk (its server is process {}); it is left \
             alone",
            device.server_pid
        ),
        None => format!("there is no device {id}"),
    };
    Error::new(ErrorKind::NotFound, message)
}

fn gave_up(run: &RunDir, id: u32, patience: Duration, last: Option<Error>) -> Error {
    let seconds = patience.as_secs();
    let server = match run.state(id) {
        Ok(Some(state)) => format!("its server is process {}", state.server.pid),
        Ok(None) | Err(_) => "its server has not written its state".to_owned(),
    };
    let last = last.map(|error| format!("; last answer: {error:#}")).unwrap_or_default();
    let message = format!("device {id} was not gone within {seconds} s; {server}{last}");
    Error::new(ErrorKind::Timeout, message)
}

/// The numbers of our devices that were attached from the config at `path`.
///
/// # Errors
/// When the run folder cannot be read.
pub fn devices_of_config(run: &RunDir, path: &Path) -> Result<Vec<u32>> {
    let wanted = [std::path::absolute(path).ok(), std::fs::canonicalize(path).ok()];
    let is_wanted = |config: &Path| {
        let real = std::fs::canonicalize(config).ok();
        wanted.iter().flatten().any(|path| path == config || Some(path) == real.as_ref())
    };
    let mut found = Vec::new();
    for id in run.ids()? {
        // What cannot be understood cannot be what is meant.
        if run.state(id).ok().flatten().is_some_and(|state| is_wanted(&state.config)) {
            found.push(id);
        }
    }
    Ok(found)
}
