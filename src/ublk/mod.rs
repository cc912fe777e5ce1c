//! The kernel front end: one [`Disk`] as `/dev/ublkbN`.
//!
//! ```text
//!   Device::start -- device.rs -- control.rs    commands to /dev/ublk-control, with deadlines
//!                       |
//!                       +-- queue.rs -- answer.rs -- request.rs
//!                           one thread  a request    descriptor in,
//!                           per queue   is served    answer out
//! ```
//!
//! The server starts and stops devices here; the command line lists and deletes them. A read
//! comes in on the queue thread that the kernel chose for the reader's processor, is served there
//! by that thread's [`Worker`](crate::disk::Worker) straight into the request's buffer, and its
//! answer leaves with those of the whole batch in one system call. Critical path: `queue::run`. A
//! write is served the same way; flushes go to one thread per device, see `flush.rs`.
//!
//! libublk is hidden behind this module; no type of it appears in a signature. It gives us
//! ADD_DEV, the queue's descriptors and the fetch/commit commands. Its other control commands are
//! not used, see `control.rs`, and neither is its `run_target`, which writes `/run/ublksrvd`: that
//! folder never sees a file of ours.
//!
//! This module never reads a layer, never decides whether a device may be stopped (it does not
//! look at mounts), and never retries an I/O. Start devices after the process has forked, not
//! before: threads do not survive a fork.

mod answer;
mod control;
mod device;
mod features;
mod flush;
mod host_lock;
mod miss;
mod node;
mod outbox;
mod params;
mod queue;
mod request;
mod stats;
mod takeover;
mod thread;

pub use features::{Facts, LIBUBLK_VERSION, features};
pub use stats::{DeviceStats, QueueStats};

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::REQUEST_BYTES_MAX;
use crate::telemetry::trouble::TroubleRing;
use control::{COMMAND_TIMEOUT, Control, Refusal};
use device::{Birth, Event, Plan, Progress, Started};
use flush::Flusher;
use host_lock::HostLock;
use libublk::sys;
use miss::Misses;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// What the caller may choose about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// The number N of `/dev/ublkbN`; `None` lets the kernel choose.
    pub id: Option<u32>,
    /// Hardware queues, or `None` for the measured default. Never more than processors.
    pub queues: Option<u16>,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Largest request in bytes, a multiple of 4096.
    pub request_bytes: u32,
    /// Whether the device outlives this process, for another to [take over](Device::take_over).
    /// Readers wait for that one, for ever if nobody comes.
    pub recoverable: bool,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        let depth = params::QUEUE_DEPTH_DEFAULT;
        let request_bytes = REQUEST_BYTES_MAX;
        Self { id: None, queues: None, depth, request_bytes, recoverable: false }
    }
}

/// Who hears of a device: of its end, and of each request that failed or was slow.
pub struct Watch {
    /// Called, on another thread, when the device is over for whatever reason.
    pub on_gone: Box<dyn Fn() + Send>,
    /// Where failed and slow requests are recorded, if anywhere.
    pub trouble_ring: Option<Arc<TroubleRing>>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Watch({:?})", self.trouble_ring)
    }
}

impl Watch {
    /// Nobody.
    #[must_use]
    pub fn nobody() -> Self {
        Self { on_gone: Box::new(|| {}), trouble_ring: None }
    }
}

/// A device that this process serves. Dropping it stops it, without a word about the outcome.
#[derive(Debug)]
pub struct Device {
    started: Started,
    counters: Arc<stats::DeviceCounters>,
    events: Sender<Event>,
    progress: Receiver<Progress>,
    /// How the device thread ended, once it has.
    gone: Option<Result<()>>,
}

impl Device {
    /// Adds the device, starts its queue threads and returns once `/dev/ublkbN` can be opened.
    /// Blocks for a few milliseconds, or up to a deadline when the kernel does not answer.
    ///
    /// # Errors
    /// `Usage` for an option outside its limits, `Busy` for a number in use, `Unsupported` for a
    /// host without the driver or a disk it cannot have, `Timeout` when the kernel does not answer,
    /// `Kernel` for its other refusals, and what [`Disk::worker`] says. Nothing is left in the
    /// kernel, unless the error says that it could not be cleaned up.
    pub fn start<D: Disk>(disk: Arc<D>, options: &DeviceOptions, watch: Watch) -> Result<Self> {
        let started = Self::try_start(disk, options, watch);
        started.map_err(|error| error.context("start a ublk device"))
    }

    fn try_start<D: Disk>(disk: Arc<D>, options: &DeviceOptions, watch: Watch) -> Result<Self> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let shape = params::shape(options, cpus)?;
        let params = params::kernel_params(&disk.geometry(), shape.request_bytes)?;
        Self::spawn(disk, shape, params, Birth::New, watch)
    }

    /// Takes device `id` over from a server that died or is about to: waits until the kernel has
    /// let go of that one, calls `before`, and returns once requests flow again. Blocks for some
    /// milliseconds, or up to a deadline.
    ///
    /// # Errors
    /// `NotFound`, `Kernel` for a device that cannot be taken over, `Corrupt` when `disk` is not of
    /// the announced size, `Timeout`, what `before` and [`Disk::worker`] say. The device stays as
    /// it is then, and **this process must end** before another can try.
    pub fn take_over<D: Disk>(
        disk: Arc<D>,
        id: u32,
        before: impl Fn() -> Result<()> + Send + 'static,
        watch: Watch,
    ) -> Result<Self> {
        let taken = || {
            let (info, params) = apart(move || {
                let mut control = Control::open()?;
                let told = |what| move |refusal: Refusal| refusal.tell(&format!("{what} of {id}"));
                let info = control.info(id).map_err(told("GET_DEV_INFO"))?;
                Ok((info, control.params(id).map_err(told("GET_PARAMS"))?))
            })?;
            params::check_same_disk(&disk.geometry(), &params)?;
            let shape = params::shape_of(&info)?;
            Self::spawn(disk, shape, params, Birth::TakenOver(Box::new(before)), watch)
        };
        taken().map_err(|error| error.context(format!("take over ublk device {id}")))
    }

    fn spawn<D: Disk>(
        disk: Arc<D>,
        shape: params::Shape,
        params: sys::ublk_params,
        birth: Birth,
        watch: Watch,
    ) -> Result<Self> {
        let first_step = match birth {
            Birth::New => (COMMAND_TIMEOUT, "ADD_DEV"),
            Birth::TakenOver(_) => (takeover::PATIENCE * 2, "the takeover"),
        };
        let counters =
            stats::DeviceCounters::new(shape.queues).with_trouble_ring(watch.trouble_ring);
        let counters = Arc::new(counters);
        let flusher = match params.basic.attrs & sys::UBLK_ATTR_READ_ONLY {
            0 => Some(Arc::new(Flusher::start(Arc::clone(&disk), shape.queues, shape.depth)?)),
            _ => None,
        };
        let misses = match disk.may_wait() {
            true => Some(Arc::new(Misses::new(Arc::clone(&disk), shape.queues, shape.depth)?)),
            false => None,
        };
        let (tell, progress) = channel();
        let (events, inbox) = channel();
        let plan = Plan {
            disk,
            shape,
            params,
            birth,
            flusher,
            misses,
            counters: Arc::clone(&counters),
            events: (events.clone(), inbox),
            progress: tell,
            on_gone: watch.on_gone,
        };
        let thread = std::thread::Builder::new().name("ublk-start".to_owned());
        thread
            .spawn(move || device::run(plan))
            .map_err(|error| Error::io("start the device thread", &error))?;
        let (patience, step) = first_step;
        let started = wait_started(&progress, patience, step)?;
        Ok(Self { started, counters, events, progress, gone: None })
    }

    /// The number N of `/dev/ublkbN`.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.started.id
    }

    /// `/dev/ublkbN`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.started.id))
    }

    /// Hardware queues the kernel gave.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.started.queues
    }

    /// Requests in flight per queue the kernel gave.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.started.depth
    }

    /// When the kernel had let go of the dead server, if the device was taken over.
    #[must_use]
    pub fn quiesced(&self) -> Option<Instant> {
        self.started.quiesced
    }

    /// When requests began to flow to this process.
    #[must_use]
    pub fn flowing(&self) -> Instant {
        self.started.flowing
    }

    /// Leaves the device as it is, for another process to take over: nothing is stopped, and this
    /// process goes on serving until it ends, which should be at once.
    pub fn abandon(self) {
        // Dropping would stop it.
        std::mem::forget(self);
    }

    /// What the device has done so far. Costs the queues nothing.
    #[must_use]
    pub fn stats(&self) -> DeviceStats {
        self.counters.snapshot()
    }

    /// Waits up to `patience` for the device to be stopped from outside (another process deleted
    /// it, or every queue failed). True once it is gone; then [`Device::stop`] only tells how it
    /// went. A zero patience asks without waiting.
    pub fn wait_gone(&mut self, patience: Duration) -> bool {
        while self.gone.is_none() {
            match self.progress.recv_timeout(patience) {
                Ok(Progress::Gone(outcome)) => self.gone = Some(outcome),
                Ok(Progress::Added | Progress::Usable(_)) => {}
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => self.gone = Some(Err(thread_died())),
            }
        }
        true
    }

    /// Stops and deletes the device: in-flight requests finish, later ones fail, nothing is left
    /// in the kernel. Blocks until the queue threads are gone. Works while others hold the device
    /// open (they only keep its number taken); a mounted file system loses its disk, so look first.
    ///
    /// # Errors
    /// `Timeout` or `Kernel` when the kernel does not let go.
    pub fn stop(mut self) -> Result<()> {
        self.take_down().map_err(|error| error.context(format!("stop {}", self.path().display())))
    }

    fn take_down(&mut self) -> Result<()> {
        let _ = self.events.send(Event::Stop);
        // STOP_DEV, the end of the queues, DEL_DEV twice and the wait for the number each have
        // their own deadline; this one is for a device thread that hangs all the same.
        if self.wait_gone(COMMAND_TIMEOUT * 6) {
            return self.gone.replace(Ok(())).unwrap_or(Ok(()));
        }
        self.gone = Some(Ok(()));
        Err(Refusal::Deadline.tell("taking the device down"))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.gone.is_none()
            && let Err(error) = self.take_down()
        {
            tracing::error!(dev_id = self.started.id, error = format!("{error:#}"), "stop failed");
        }
    }
}

/// Waits for the device thread to bring the device up. Only ADD_DEV needs this deadline: all
/// later steps have their own and always report.
fn wait_started(
    progress: &Receiver<Progress>,
    mut patience: Duration,
    first: &str,
) -> Result<Started> {
    loop {
        match progress.recv_timeout(patience) {
            Ok(Progress::Added) => patience = COMMAND_TIMEOUT * 10,
            Ok(Progress::Usable(started)) => return Ok(started),
            Ok(Progress::Gone(Err(error))) => return Err(error),
            Ok(Progress::Gone(Ok(()))) => {
                return Err(Error::new(ErrorKind::Canceled, "the device was deleted at once"));
            }
            // The thread stays behind; should ADD_DEV end after all, it cleans up.
            Err(RecvTimeoutError::Timeout) => return Err(Refusal::Deadline.tell(first)),
            Err(RecvTimeoutError::Disconnected) => return Err(thread_died()),
        }
    }
}

fn thread_died() -> Error {
    Error::new(ErrorKind::Kernel, "bug: the device thread panicked")
}

/// The driver's word for what a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Not started, stopped, or its server died: there is no `/dev/ublkbN`.
    Dead,
    /// Started and served.
    Live,
    /// Its server died and a new one may take over; readers wait.
    Quiesced,
    /// Its server died and a new one may take over; readers get errors.
    FailIo,
    /// A state of a newer driver.
    Unknown(u16),
}

impl DeviceState {
    fn from_driver(state: u16) -> Self {
        match u32::from(state) {
            sys::UBLK_S_DEV_DEAD => Self::Dead,
            sys::UBLK_S_DEV_LIVE => Self::Live,
            sys::UBLK_S_DEV_QUIESCED => Self::Quiesced,
            sys::UBLK_S_DEV_FAIL_IO => Self::FailIo,
            _ => Self::Unknown(state),
        }
    }
}

/// One device that the kernel knows, ours or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelDevice {
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// Whether START_DEV was done and a server is alive.
    pub live: bool,
    /// The driver's own word for it.
    pub state: DeviceState,
    /// Process id of the server as the kernel knows it; 0 when none.
    pub server_pid: i32,
    /// Hardware queues.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
}

impl KernelDevice {
    fn from_driver(info: &control::DeviceInfo) -> Self {
        let state = DeviceState::from_driver(info.state);
        Self {
            id: info.dev_id,
            live: state == DeviceState::Live,
            state,
            server_pid: info.ublksrv_pid.max(0),
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
        }
    }
}

/// Whether this process can make devices on this host.
///
/// # Errors
/// `Unsupported` when the driver is not loaded, saying how to get it; `Kernel` when it, or
/// io_uring, cannot be used by this process.
pub fn check() -> Result<()> {
    Control::open().map(drop)
}

/// Whether a takeover that died half-way can be tried again on this kernel. If not, the device must
/// be deleted.
#[must_use]
pub fn repeats_takeovers() -> bool {
    takeover::host_repeats()
}

/// All ublk devices of this host, by id. None when the driver is not loaded.
///
/// # Errors
/// `Kernel` when the driver cannot be asked.
pub fn list() -> Result<Vec<KernelDevice>> {
    apart(list_here)
}

/// See [`thread::apart`].
fn apart<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let lost = || Error::new(ErrorKind::Kernel, "no thread for a command, or it panicked");
    thread::apart(work).unwrap_or_else(|| Err(lost()))
}

/// Whether this kernel can make a device larger that is in use: from 6.16 on.
///
/// # Errors
/// `Unsupported` when it cannot, `Kernel` when the driver cannot be asked.
pub fn check_resize() -> Result<()> {
    let bits = apart(|| Ok(Control::open()?.features()))?.unwrap_or(0);
    if bits & u64::from(sys::UBLK_F_UPDATE_SIZE) != 0 {
        return Ok(());
    }
    let message = format!(
        "the driver of kernel {} cannot resize a device that is attached (6.16 and later can): \
         detach it, resize its config, and attach that again",
        features::kernel_release()
    );
    Err(Error::new(ErrorKind::Unsupported, message))
}

/// Tells the kernel that device `id`, which is served, has `sectors` now.
///
/// # Errors
/// `NotFound`, or `Timeout`/`Kernel`: it has the size of before.
pub fn resize(id: u32, sectors: u64) -> Result<()> {
    let told = move |refusal: Refusal| refusal.tell(&format!("UPDATE_SIZE of device {id}"));
    apart(move || {
        let mut control = Control::open()?;
        // Drivers before 7.0 fall over a device that is stopped, and a number may have a new owner.
        let info = control.info(id).map_err(told)?;
        let own_pid = i32::try_from(std::process::id()).unwrap_or(0);
        if u32::from(info.state) != sys::UBLK_S_DEV_LIVE || info.ublksrv_pid != own_pid {
            let message = format!("device {id} is not served by this process");
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        control.update_size(id, sectors).map_err(told)
    })
}

fn list_here() -> Result<Vec<KernelDevice>> {
    let ids = control::device_ids()?;
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let mut control = Control::open()?;
    let mut devices = Vec::with_capacity(ids.len());
    for id in ids {
        match control.info(id) {
            Ok(info) => devices.push(KernelDevice::from_driver(&info)),
            // Deleted since the folder was read.
            Err(Refusal::Errno(libc::ENODEV)) => {}
            Err(refusal) => return Err(refusal.tell(&format!("GET_DEV_INFO of device {id}"))),
        }
    }
    Ok(devices)
}

/// Deletes a device whose server is dead. A live one is stopped first: its readers get errors and
/// its server finds it gone. The number is free soon after; [`Device::start`] waits for it.
///
/// # Errors
/// `NotFound`, or `Timeout`/`Kernel` when the kernel does not let go within the deadline.
pub fn delete(id: u32) -> Result<()> {
    apart(move || try_delete(id)).map_err(|error| error.context(format!("delete ublk device {id}")))
}

fn try_delete(id: u32) -> Result<()> {
    let mut control = Control::open()?;
    control.info(id).map_err(|refusal| refusal.tell(&format!("GET_DEV_INFO of device {id}")))?;
    let stopped = control.stop(id);
    let turn = HostLock::take()?;
    for (step, outcome) in [("STOP_DEV", stopped), ("DEL_DEV", control.delete(id))] {
        match outcome {
            // Somebody else having finished the job first is success.
            Ok(()) | Err(Refusal::Errno(libc::ENODEV)) => {}
            Err(refusal) => return Err(refusal.tell(&format!("{step} of device {id}"))),
        }
    }
    drop(turn);
    control.wait_free(id);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_states_have_names() {
        for (number, state) in [
            (0, DeviceState::Dead),
            (1, DeviceState::Live),
            (2, DeviceState::Quiesced),
            (3, DeviceState::FailIo),
            (9, DeviceState::Unknown(9)),
        ] {
            assert_eq!(DeviceState::from_driver(number), state);
        }
    }

    #[test]
    fn a_device_without_a_server_has_no_process_id() {
        let info = control::DeviceInfo { dev_id: 5, ublksrv_pid: -1, ..Default::default() };
        let device = KernelDevice::from_driver(&info);
        assert_eq!((device.id, device.live, device.server_pid), (5, false, 0));
    }
}
