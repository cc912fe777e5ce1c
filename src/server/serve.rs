//! The life of one served device, from claim to removal.
//!
//! ```text
//!   claim N -- state "starting" -- open image -- leave mounts -- start device
//!        -- state "live" -- control socket -- resultFile -- announce
//!        -- loop: signals, control requests, the device itself --
//!        -- stop device -- remove folder -- last reply
//! ```
//!
//! Every step leaves something that the next `attach` or a `detach` can find: the folder is there
//! before the kernel's device and goes after it. Nothing here knows the kernel (a [`Kernel`] is
//! given), the process (see [`Housing`]) or signals (they come in as events).

use super::config_view::ConfigView;
use super::control::{ControlSocket, Event};
use super::kernel::{Kernel, Served, Wish};
use super::process::{Process, boot_id};
use super::protocol::DeviceStat;
use super::result_file::ResultFile;
use super::run_dir::{RunDir, Slot};
use super::state::{Phase, SCHEMA, State};
use super::survey;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::{DEVICE_ID_MAX, DEVICE_ID_TRIES_MAX};
use crate::units::sectors_to_bytes;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Free numbers that are tried when others claim at the same time.
const CLAIM_TRIES_MAX: usize = 256;

/// How often the loop looks whether its device was deleted by somebody else.
const GONE_POLL: Duration = Duration::from_secs(2);

/// What is to be served, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Absolute path of the config.
    pub config: PathBuf,
    /// Absolute path of the service config, if one was given.
    pub service_config: Option<PathBuf>,
    /// The number N of `/dev/ublkbN`, or `None` for the lowest free one.
    pub id: Option<u32>,
    /// Hardware queues, or `None` for the default.
    pub queues: Option<u16>,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Largest request in bytes.
    pub request_bytes: u32,
}

/// How the server lives in its process. Tests live in a thread of theirs and do none of this.
pub(super) trait Housing {
    /// The device has its folder. Returns the log that the server's words go to from now on.
    ///
    /// # Errors
    /// What the operating system says.
    fn settle(&self, slot: &Slot) -> Result<Option<PathBuf>>;

    /// Every file that serving needs is open; the caller's mounts are not needed any more.
    ///
    /// # Errors
    /// What the operating system says.
    fn leave_mounts(&self, run: &RunDir) -> Result<()>;

    /// The device can be used.
    ///
    /// # Errors
    /// When nobody is there to be told. The device is then stopped.
    fn announce(&self, id: u32) -> Result<()>;
}

/// A server that has everything it needs.
#[derive(Debug)]
pub(super) struct Server<'a, K, H> {
    /// What to serve.
    pub(super) order: &'a Order,
    /// The config as it was read.
    pub(super) view: &'a ConfigView,
    /// Where to report how it went.
    pub(super) result_file: Option<ResultFile>,
    /// Where devices are written down.
    pub(super) run: &'a RunDir,
    /// Who makes devices.
    pub(super) kernel: &'a K,
    /// How the server lives in its process.
    pub(super) housing: &'a H,
}

/// Where events come from and go to.
#[derive(Debug)]
pub(super) struct Mailbox {
    /// Copied to whoever has something to say.
    pub(super) sender: Sender<Event>,
    /// The loop's end.
    pub(super) inbox: Receiver<Event>,
}

/// A device that is up.
struct Up<T> {
    device: T,
    control: ControlSocket,
    state: State,
    since: Instant,
}

impl<K: Kernel, H: Housing> Server<'_, K, H> {
    /// Serves the disk that `open` opens until it is told to stop. Returns when nothing is left.
    ///
    /// # Errors
    /// Whatever keeps the device from coming up or from going away; in the first case nothing is
    /// left, in the second the folder stays for `detach`.
    pub(super) fn serve<D: Disk>(
        mut self,
        mailbox: &Mailbox,
        open: impl FnOnce() -> Result<D>,
    ) -> Result<()> {
        match self.bring_up(mailbox, open) {
            Ok((up, slot)) => {
                // Kept open, it would keep its file system from being unmounted.
                self.result_file = None;
                self.serve_until_stopped(up, slot, &mailbox.inbox)
            }
            Err(error) => {
                // The caller reports failures too, but it may be gone.
                if let Some(Err(left)) = self.result_file.map(|file| file.failed(&error)) {
                    tracing::warn!("{left:#}");
                }
                Err(error)
            }
        }
    }

    fn bring_up<D: Disk>(
        &self,
        mailbox: &Mailbox,
        open: impl FnOnce() -> Result<D>,
    ) -> Result<(Up<K::Device>, Slot)> {
        self.run.prepare()?;
        survey::collect_dead(self.run, self.kernel);
        let mut claimed = self.claim(&[])?;
        let disk = match open() {
            Ok(disk) => Arc::new(disk),
            Err(error) => return Err(claimed.give_up(error)),
        };
        if let Err(error) = self.housing.leave_mounts(self.run) {
            return Err(claimed.give_up(error));
        }
        let mut taken = Vec::new();
        loop {
            let id = claimed.slot.id();
            match self.start(&mut claimed, mailbox, &disk) {
                Ok(up) => return Ok((up, claimed.slot)),
                // Another program has the number, or holds the dead device of that number open.
                Err(Failed { error, clean: true })
                    if error.kind() == ErrorKind::Busy
                        && self.order.id.is_none()
                        && taken.len() < DEVICE_ID_TRIES_MAX =>
                {
                    tracing::info!(dev_id = id, "the number is taken: {error:#}");
                    taken.push(id);
                    let next = self.claim(&taken)?;
                    remove(std::mem::replace(&mut claimed, next).slot);
                }
                Err(Failed { error, clean: true }) => return Err(claimed.give_up(error)),
                Err(Failed { error, clean: false }) => return Err(error),
            }
        }
    }

    /// Takes a number, and with it the folder that says so, and writes the first state there.
    fn claim(&self, taken: &[u32]) -> Result<Claimed> {
        let slot = self.claim_slot(taken)?;
        let mut state = self.first_state(&slot);
        let settled = self.housing.settle(&slot).and_then(|log| {
            state.log = log;
            state.save(slot.path())
        });
        let claimed = Claimed { slot, state };
        match settled {
            Ok(()) => Ok(claimed),
            Err(error) => Err(claimed.give_up(error)),
        }
    }

    fn claim_slot(&self, taken: &[u32]) -> Result<Slot> {
        if let Some(id) = self.order.id {
            let taken = || {
                let message = format!("device {id} is attached already; see `obd-ublk list`");
                Error::new(ErrorKind::Busy, message)
            };
            return self.run.claim(id)?.ok_or_else(taken);
        }
        let in_kernel: Vec<u32> = self.kernel.list()?.iter().map(|device| device.id).collect();
        let in_run = self.run.ids()?;
        let is_free = |id: &u32| ![&in_kernel, &in_run].iter().any(|ids| ids.contains(id));
        let free = (0..=DEVICE_ID_MAX).filter(is_free).filter(|id| !taken.contains(id));
        // Each number lost to somebody else means that somebody else got on.
        for id in free.take(CLAIM_TRIES_MAX) {
            if let Some(slot) = self.run.claim(id)? {
                return Ok(slot);
            }
        }
        Err(Error::new(ErrorKind::Busy, "no free device number was found"))
    }

    /// Brings the device up under the number that was claimed.
    fn start<D: Disk>(
        &self,
        claimed: &mut Claimed,
        mailbox: &Mailbox,
        disk: &Arc<D>,
    ) -> std::result::Result<Up<K::Device>, Failed> {
        let Claimed { slot, state } = claimed;
        let geometry = disk.geometry();
        state.size_bytes = sectors_to_bytes(geometry.sectors);
        state.read_only = geometry.read_only;
        let wish = Wish {
            id: slot.id(),
            queues: self.order.queues,
            depth: self.order.depth,
            request_bytes: self.order.request_bytes,
        };
        let device = self.kernel.start(Arc::clone(disk), &wish)?;
        tracing::info!(dev_id = slot.id(), config = %state.config.display(), "device is up");
        match self.go_public(slot, mailbox, state) {
            Ok(control) => Ok(Up { device, control, state: state.clone(), since: Instant::now() }),
            Err(error) => Err(match device.stop(None) {
                Ok(()) => error.into(),
                Err(left) => Failed { error: error.context(format!("{left:#}")), clean: false },
            }),
        }
    }

    fn first_state(&self, slot: &Slot) -> State {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        State {
            schema: SCHEMA,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            phase: Phase::Starting,
            id: slot.id(),
            boot_id: boot_id(),
            server: Process::current(),
            config: self.order.config.clone(),
            config_content: self.view.content.clone(),
            service_config: self.order.service_config.clone(),
            queues: self.order.queues,
            depth: self.order.depth,
            request_bytes: self.order.request_bytes,
            read_only: true,
            size_bytes: None,
            log: None,
            attached_unix_ms: u64::try_from(now.as_millis()).unwrap_or(0),
        }
    }

    /// Tells everybody, in the order of their trust: the successor, clients, the snapshotter, the
    /// caller.
    fn go_public(
        &self,
        slot: &Slot,
        mailbox: &Mailbox,
        state: &mut State,
    ) -> Result<ControlSocket> {
        state.phase = Phase::Live;
        state.save(slot.path())?;
        let control = ControlSocket::listen(&slot.socket(), mailbox.sender.clone())?;
        let reported = self.result_file.as_ref().map_or(Ok(()), ResultFile::succeeded);
        let announced = reported.and_then(|()| {
            check_not_told_to_stop(&mailbox.inbox)?;
            self.housing.announce(slot.id()).context(|| "tell the caller of the device".to_owned())
        });
        match announced {
            Ok(()) => Ok(control),
            Err(error) => {
                control.close();
                Err(error)
            }
        }
    }

    fn serve_until_stopped(
        &self,
        mut up: Up<K::Device>,
        slot: Slot,
        inbox: &Receiver<Event>,
    ) -> Result<()> {
        loop {
            if up.device.is_gone() {
                tracing::warn!("the device was deleted by somebody else");
                return take_down(up, slot, None, None);
            }
            match inbox.recv_timeout(GONE_POLL) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Event::Stat(answer)) => {
                    let _ = answer.send(stat_of(&up));
                }
                Ok(Event::Stop(answer)) => match self.kernel.hold(slot.id()) {
                    Ok(held) => return take_down(up, slot, Some(held), Some(&answer)),
                    Err(error) if error.kind() == ErrorKind::Busy => {
                        let _ = answer.send(Err(error));
                    }
                    Err(error) => {
                        // No node to hold is no reason to keep the device.
                        tracing::warn!("{error:#}");
                        return take_down(up, slot, None, Some(&answer));
                    }
                },
                Ok(Event::Signal(name)) => {
                    tracing::info!(signal = name, "asked to end");
                    return take_down(up, slot, None, None);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return take_down(up, slot, None, None);
                }
            }
        }
    }
}

/// A number that is ours, and what is written down under it.
struct Claimed {
    slot: Slot,
    state: State,
}

impl Claimed {
    /// Leaves nothing of the claim; returns `error`.
    fn give_up(self, error: Error) -> Error {
        remove(self.slot);
        error
    }
}

fn remove(slot: Slot) {
    if let Err(left) = slot.remove() {
        tracing::warn!("{left:#}");
    }
}

/// Why a device did not come up, and whether nothing of it is left in the kernel.
struct Failed {
    error: Error,
    clean: bool,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, clean: true }
    }
}

fn check_not_told_to_stop(inbox: &Receiver<Event>) -> Result<()> {
    match inbox.try_recv() {
        Ok(Event::Signal(name)) => {
            Err(Error::new(ErrorKind::Canceled, format!("{name} came before the device was up")))
        }
        // Nobody can have asked for anything else yet; its sender learns from the silence.
        Ok(Event::Stop(_) | Event::Stat(_)) | Err(_) => Ok(()),
    }
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
        counters: up.device.counters(),
    }
}

/// Stops the device, removes its folder, and only then answers whoever asked for it.
fn take_down<T: Served>(
    up: Up<T>,
    slot: Slot,
    held: Option<std::fs::File>,
    answer: Option<&Sender<Result<()>>>,
) -> Result<()> {
    // A folder of a device that the kernel did not let go of stays: `detach` finds it by that.
    let outcome = up.device.stop(held).and_then(|()| slot.remove());
    if let Some(answer) = answer {
        let copy = match &outcome {
            Ok(()) => Ok(()),
            Err(error) => Err(Error::new(error.kind(), format!("{error:#}"))),
        };
        let _ = answer.send(copy);
    }
    up.control.close();
    if outcome.is_ok() {
        tracing::info!("device is gone");
    }
    outcome
}

/// The order's config, or why it cannot be served as asked.
///
/// # Errors
/// `Unsupported` for a writable config that is not to be served read-only.
pub(super) fn check_writable(view: &ConfigView, read_only: bool, config: &Path) -> Result<()> {
    if view.writable && !read_only {
        let message = format!(
            "config {} has a writable upper, which cannot be served yet; --read-only serves what \
             it holds now, without writes",
            config.display()
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(())
}
