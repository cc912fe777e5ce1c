//! What devices there are, whose they are, and what to do with those that nobody serves.
//!
//! Our word for a device is its state file, the kernel's word is its list. Only devices that a
//! state file of this boot names are ever touched, and only when the server it names is dead and
//! the kernel does not say that somebody else serves that number.

use super::client;
use super::kernel::{Kernel, KernelDevice};
use super::process::Process;
use super::protocol::Op;
use super::run_dir::{RunDir, Slot, socket_in};
use super::served_disk::remove_ephemeral;
use super::state::{Phase, State};
use super::supervisor;
use crate::error::{Error, ErrorKind, Result};
use crate::image::is_reference;
use std::path::Path;
use std::time::{Duration, Instant};

/// The pause between two looks at something that is about to change.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// How long an attach clears what others left before it gets on with its own work.
const COLLECT_BUDGET: Duration = Duration::from_secs(30);

/// How long a server that was killed by force may take to be gone.
const FORCE_PATIENCE: Duration = Duration::from_secs(10);

/// How a device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its server opens the image or starts the device.
    Starting,
    /// It can be used.
    Live,
    /// Its server died, and a successor is to take it over: readers wait.
    Recovering,
    /// Its servers keep dying and no more successors are tried: readers wait until somebody
    /// recovers or detaches it.
    Lost,
    /// Its server takes it down.
    Stopping,
    /// Its server is dead and it cannot come back. `detach`, or the next `attach`, clears it.
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
            Self::Recovering => "recovering",
            Self::Lost => "lost",
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
    /// Why the folder cannot be understood, or the device was given up.
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
        Ok(Some(state)) => {
            let lost = supervisor::lost(&run.folder(id));
            let status = status_of(&state, kernel, lost.is_some());
            let why = lost.filter(|_| status == Status::Lost);
            let problem = why.map(|why| Error::new(ErrorKind::Canceled, why.trim_end()));
            (status, Some(state), problem)
        }
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

fn status_of(state: &State, kernel: Option<KernelDevice>, is_lost: bool) -> Status {
    let in_kernel = kernel.is_some_and(|device| device.live || device.quiesced);
    match (state.server_is_alive(), state.phase, kernel) {
        (false, _, _) if !is_guarded(state, kernel) => Status::Dead,
        (false, _, _) if is_lost => Status::Lost,
        (true, Phase::Taking, Some(device))
            if device.live && device.server_pid == state.server.pid =>
        {
            Status::Live
        }
        (false, _, _) | (true, Phase::Taking, _) => Status::Recovering,
        (true, Phase::Starting, _) => Status::Starting,
        (true, Phase::Live, Some(_)) if in_kernel => Status::Live,
        (true, Phase::Live | Phase::Stopping, _) => Status::Stopping,
    }
}

/// Whether a device without a server is the supervisor's to bring back.
fn is_guarded(state: &State, kernel: Option<KernelDevice>) -> bool {
    let in_kernel = kernel.is_some_and(|device| {
        device.quiesced || device.live && device.server_pid == state.server.pid
    });
    state.recoverable
        && state.is_of_this_boot()
        && matches!(state.phase, Phase::Live | Phase::Taking)
        && in_kernel
}

/// Clears all our devices whose servers are dead, and that no supervisor brings back. What cannot
/// be cleared is left, with a warning: it must not keep a new device from coming up. Nor may the
/// kernel's slowness: after [`COLLECT_BUDGET`] the rest is left to the next attach.
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

/// Clears device `id` if its server is dead and no supervisor is to bring it back. False if it is
/// not, or if somebody else is at it.
///
/// # Errors
/// When the folder cannot be understood or the kernel does not let go of the device.
pub(super) fn collect<K: Kernel>(run: &RunDir, kernel: &K, id: u32) -> Result<bool> {
    let kernel_device = || Ok(kernel.list()?.into_iter().find(|device| device.id == id));
    clear(run, kernel, id, |state| Ok(!is_guarded(state, kernel_device()?)))
}

/// Clears device `id` if its server is dead, whether it could come back or not.
///
/// # Errors
/// As [`collect`].
pub(super) fn collect_unguarded<K: Kernel>(run: &RunDir, kernel: &K, id: u32) -> Result<bool> {
    clear(run, kernel, id, |_| Ok(true))
}

fn clear<K: Kernel>(
    run: &RunDir,
    kernel: &K,
    id: u32,
    may_go: impl Fn(&State) -> Result<bool>,
) -> Result<bool> {
    // Holding the lock, nobody else can clear the number or serve under it.
    let Some(slot) = run.lock(id)? else { return Ok(false) };
    let state = run.state(id)?;
    if let Some(state) = &state {
        if state.server_is_alive() || !may_go(state)? {
            return Ok(false);
        }
        delete_if_ours(kernel, state)?;
        remove_ephemeral(state);
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
    // While a successor takes over, the kernel still names its predecessor. Newer kernels (7.2, for
    // one) forget a server when it dies, before the device is quiesced: nobody else's then.
    let is_named = device.server_pid == state.server.pid
        || state.phase == Phase::Taking
        || device.server_pid == 0;
    if (device.live || device.quiesced) && !is_named {
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

/// How a device is to be detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Not while it is mounted or held by another driver.
    Polite,
    /// Now, or as soon as it is neither mounted nor held; does not wait for that.
    Lazy,
    /// Now, whatever is in the way: a mount, a server that does not answer, a state file that
    /// cannot be read.
    Force,
}

/// Stops and deletes device `id`, or clears what is left of it, within `patience`. True when it is
/// gone, false when it will go once nobody uses it.
///
/// # Errors
/// `NotFound` when it is not ours, `Busy` when it is in use, `Timeout` at the deadline.
pub(super) fn detach<K: Kernel>(
    run: &RunDir,
    kernel: &K,
    id: u32,
    manner: Manner,
    patience: Duration,
) -> Result<bool> {
    let deadline = Instant::now() + patience;
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut seen = false;
    let mut first: Option<State> = None;
    let mut last = None;
    loop {
        if !run.folder(id).exists() {
            return if seen { Ok(true) } else { Err(not_ours(kernel, id)) };
        }
        seen = true;
        // What was meant may be gone, and the number somebody else's.
        match (&first, run.state(id).ok().flatten()) {
            (Some(first), Some(now)) if !now.is_same_attach(first) => return Ok(true),
            (None, now) => first = now,
            _ => {}
        }
        match detach_dead(run, kernel, id, manner) {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(error) if manner == Manner::Force => return force(run, kernel, id, &error),
            Err(error) => return Err(error),
        }
        if left().is_zero() {
            let error = gave_up(run, id, patience, last);
            return if manner == Manner::Force {
                force(run, kernel, id, &error)
            } else {
                Err(error)
            };
        }
        let live =
            run.state(id)?.is_some_and(|state| matches!(state.phase, Phase::Live | Phase::Taking));
        if live {
            match stop(&run.folder(id), manner, left()) {
                Ok(()) if manner == Manner::Lazy => return Ok(!run.folder(id).exists()),
                Ok(()) => return Ok(true),
                Err(error) if is_passing(error.kind()) => last = Some(error),
                Err(error) if manner == Manner::Force => return force(run, kernel, id, &error),
                Err(error) => return Err(error.context(format!("stop device {id}"))),
            }
        }
        std::thread::sleep(LOOK_PAUSE.min(left()));
    }
}

/// Clears device `id` if its server is dead; false if it is not, or if it is in use and will be
/// there again for a lazy detach.
fn detach_dead<K: Kernel>(run: &RunDir, kernel: &K, id: u32, manner: Manner) -> Result<bool> {
    let server_lives = run.state(id)?.is_some_and(|state| state.server_is_alive());
    if !server_lives && manner != Manner::Force {
        // The kernel keeps a recoverable device with its mounts when the server dies.
        match kernel.hold(id) {
            Err(error) if error.kind() == ErrorKind::Busy && manner == Manner::Lazy => {
                return Ok(false);
            }
            Err(error) if error.kind() == ErrorKind::Busy => return Err(error),
            // No node: nobody can have it mounted. The hold itself must not be in the way.
            Ok(_) | Err(_) => {}
        }
    }
    collect_unguarded(run, kernel, id)
}

/// Takes device `id` away though its server does not answer or its state cannot be read; `why` is
/// what was in the way. Only what has a folder of ours is touched.
fn force<K: Kernel>(run: &RunDir, kernel: &K, id: u32, why: &Error) -> Result<bool> {
    tracing::warn!(dev_id = id, "by force: {why:#}");
    let device = kernel.list()?.into_iter().find(|device| device.id == id);
    let state = run.state(id).ok().flatten();
    if let Some(state) = state.clone() {
        // So that nobody brings it back.
        let stopping = State { phase: Phase::Stopping, ..state };
        if let Err(error) = stopping.save(&run.folder(id)) {
            tracing::warn!("{error:#}");
        }
    }
    if run.lock(id)?.is_none() {
        // Somebody of ours holds it: the server that is written down, or else the one that the
        // kernel names.
        let server = state
            .as_ref()
            .map(|state| state.server)
            .or(device.map(|device| Process::of(device.server_pid)).filter(Process::is_of_ours));
        if let Some(server) = server {
            server.kill();
        }
    } else if device.is_some_and(|device| device.live) {
        // Nobody of ours serves the number, but somebody does: it is theirs now.
        let message =
            format!("device {id} is served by another program; only our folder is removed");
        tracing::warn!("{message}");
        return match run.lock(id)? {
            Some(slot) => Slot::remove(slot).map(|()| true),
            None => Err(Error::new(ErrorKind::Busy, message)),
        };
    }
    let deadline = Instant::now() + FORCE_PATIENCE;
    let slot = loop {
        if let Some(slot) = run.lock(id)? {
            break slot;
        }
        if !run.folder(id).exists() {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            let message = format!("the server of device {id} cannot be killed; it was: {why:#}");
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        std::thread::sleep(LOOK_PAUSE);
    };
    match device.map_or(Ok(()), |_| kernel.delete(id)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => {
            state.iter().for_each(remove_ephemeral);
            Slot::remove(slot).map(|()| true)
        }
    }
}

fn stop(folder: &Path, manner: Manner, patience: Duration) -> Result<()> {
    let op = match manner {
        Manner::Polite => Op::Stop,
        Manner::Lazy => Op::StopLazy,
        Manner::Force => Op::StopForce,
    };
    client::request(&socket_in(folder), op, patience).map(drop)
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

/// Whether a config is the one that somebody means by `path`, which may be relative, or lead there
/// by links. A reference means itself.
pub(super) fn is_config_at(path: &Path) -> impl Fn(&Path) -> bool {
    let wanted = if is_reference(path) {
        [Some(path.to_owned()), None]
    } else {
        [std::path::absolute(path).ok(), std::fs::canonicalize(path).ok()]
    };
    move |config| {
        let real = std::fs::canonicalize(config).ok();
        wanted.iter().flatten().any(|path| path == config || Some(path) == real.as_ref())
    }
}

/// The numbers of our devices that were attached from the config at `path`.
///
/// # Errors
/// When the run folder cannot be read.
pub fn devices_of_config(run: &RunDir, path: &Path) -> Result<Vec<u32>> {
    let is_wanted = is_config_at(path);
    let mut found = Vec::new();
    for id in run.ids()? {
        // What cannot be understood cannot be what is meant.
        if run.state(id).ok().flatten().is_some_and(|state| is_wanted(&state.config)) {
            found.push(id);
        }
    }
    Ok(found)
}
