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
//! answer leaves with those of the whole batch in one system call. Critical path: `queue::run`.
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
mod node;
mod params;
mod queue;
mod request;
mod stats;
mod thread;

pub use features::{Facts, LIBUBLK_VERSION, features};
pub use stats::{DeviceStats, QueueStats};

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::REQUEST_BYTES_MAX;
use control::{COMMAND_TIMEOUT, Control, Refusal};
use device::{Event, Plan, Progress, Started};
use libublk::sys;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

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
}

impl Default for DeviceOptions {
    fn default() -> Self {
        let depth = params::QUEUE_DEPTH_DEFAULT;
        Self { id: None, queues: None, depth, request_bytes: REQUEST_BYTES_MAX }
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
    /// host without the driver or a writable disk, `Timeout` when the kernel does not answer,
    /// `Kernel` for its other refusals, and what [`Disk::worker`] says. Nothing is left in the
    /// kernel, unless the error says that it could not be cleaned up.
    pub fn start<D: Disk>(disk: Arc<D>, options: &DeviceOptions) -> Result<Self> {
        Self::try_start(disk, options).map_err(|error| error.context("start a ublk device"))
    }

    fn try_start<D: Disk>(disk: Arc<D>, options: &DeviceOptions) -> Result<Self> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let shape = params::shape(options, cpus)?;
        let params = params::kernel_params(&disk.geometry(), shape.request_bytes)?;
        let counters = Arc::new(stats::DeviceCounters::new(shape.queues));
        let (tell, progress) = channel();
        let (events, inbox) = channel();
        let plan = Plan {
            disk,
            shape,
            params,
            counters: Arc::clone(&counters),
            events: (events.clone(), inbox),
            progress: tell,
        };
        let thread = std::thread::Builder::new().name("ublk-device".to_owned());
        thread
            .spawn(move || device::run(&plan))
            .map_err(|error| Error::io("start the device thread", &error))?;
        let started = wait_started(&progress)?;
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
fn wait_started(progress: &Receiver<Progress>) -> Result<Started> {
    let mut patience = COMMAND_TIMEOUT;
    loop {
        match progress.recv_timeout(patience) {
            Ok(Progress::Added) => patience = COMMAND_TIMEOUT * 10,
            Ok(Progress::Usable(started)) => return Ok(started),
            Ok(Progress::Gone(Err(error))) => return Err(error),
            Ok(Progress::Gone(Ok(()))) => {
                return Err(Error::new(ErrorKind::Canceled, "the device was deleted at once"));
            }
            // The thread stays behind; should ADD_DEV end after all, it cleans up.
            Err(RecvTimeoutError::Timeout) => return Err(Refusal::Deadline.tell("ADD_DEV")),
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

/// All ublk devices of this host, by id. None when the driver is not loaded.
///
/// # Errors
/// `Kernel` when the driver cannot be asked.
pub fn list() -> Result<Vec<KernelDevice>> {
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
    try_delete(id).map_err(|error| error.context(format!("delete ublk device {id}")))
}

fn try_delete(id: u32) -> Result<()> {
    let mut control = Control::open()?;
    control.info(id).map_err(|refusal| refusal.tell(&format!("GET_DEV_INFO of device {id}")))?;
    for (step, outcome) in [("STOP_DEV", control.stop(id)), ("DEL_DEV", control.delete(id))] {
        match outcome {
            // Somebody else having finished the job first is success.
            Ok(()) | Err(Refusal::Errno(libc::ENODEV)) => {}
            Err(refusal) => return Err(refusal.tell(&format!("{step} of device {id}"))),
        }
    }
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
