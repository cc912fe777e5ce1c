//! The life of one served device, from claim to removal.
//!
//! ```text
//!   claim N -- state "starting" -- open image -- leave mounts -- supervisor guards N
//!        -- start device -- state "live" -- control socket -- parcel to the supervisor
//!        -- resultFile -- announce -- `served`: loop, stop device, remove folder, last reply
//! ```
//!
//! Every step leaves something that the next `attach` or a `detach` can find: the folder is there
//! before the kernel's device and goes after it. Nothing here knows the kernel (a [`Kernel`] is
//! given), the process (see [`Housing`]) or signals (they come in as events). How a device goes
//! on after its server's death is told in `successor`.

use super::config_view::ConfigView;
use super::control::{ControlSocket, Event};
use super::environment;
use super::kernel::{Kernel, Served, Watch, Wish};
use super::portable::{Kept, Portable};
use super::process::{Process, boot_id};
use super::protocol::notes::Note;
use super::result_file::ResultFile;
use super::run_dir::{RunDir, Slot};
use super::served::{self, Guarded, Up};
use super::state::{Phase, SCHEMA, State};
use super::supervisor::Link;
use super::survey;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::{DEVICE_ID_MAX, DEVICE_ID_TRIES_MAX};
use crate::telemetry::trouble::TroubleRing;
use crate::units::sectors_to_bytes;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Free numbers that are tried when others claim at the same time.
const CLAIM_TRIES_MAX: usize = 256;

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
    /// Whether a supervisor is to bring the device back when its server dies.
    pub supervised: bool,
    /// The upper that takes the writes, if the config names none.
    pub upper: Option<UpperWish>,
    /// Most bytes of the data file of the upper that is written.
    pub quota_bytes: Option<u64>,
    /// How long a read of a layer in a registry may take, in seconds, if not the default.
    pub io_deadline_s: Option<u64>,
}

/// A writable upper in a folder of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpperWish {
    /// Absolute path of the folder.
    pub folder: PathBuf,
    /// Whether its files are to go with the device.
    pub ephemeral: bool,
}

/// How the server lives in its process. Tests live in a thread of theirs and do none of this.
pub(super) trait Housing {
    /// The device has its folder. Returns the log that the server's words go to from now on.
    ///
    /// # Errors
    /// What the operating system says.
    fn settle(&self, slot: &Slot) -> Result<Option<PathBuf>>;

    /// Threads may start now: the process gets mounts of its own, and signals become events.
    ///
    /// # Errors
    /// What the operating system says.
    fn move_in(&self) -> Result<()>;

    /// Every file that serving needs is open; the caller's mounts are not needed any more, but for
    /// those of `folders`.
    ///
    /// # Errors
    /// What the operating system says.
    fn leave_mounts(&self, run: &RunDir, folders: &[PathBuf]) -> Result<()>;

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

impl<K: Kernel, H: Housing> Server<'_, K, H> {
    /// Serves the disk that `open` opens until it is told to stop. Returns when nothing is left.
    ///
    /// # Errors
    /// Whatever keeps the device from coming up or from going away; in the first case nothing is
    /// left, in the second the folder stays for `detach`.
    pub(super) fn serve<D: Portable>(
        mut self,
        mailbox: &Mailbox,
        open: impl FnOnce() -> Result<D> + Send + 'static,
    ) -> Result<()> {
        match self.bring_up(mailbox, open) {
            Ok(up) => {
                // Kept open, it would keep its file system from being unmounted.
                self.result_file = None;
                served::serve(up, self.kernel, self.run, &mailbox.sender, &mailbox.inbox)
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

    fn bring_up<D: Portable>(
        &self,
        mailbox: &Mailbox,
        open: impl FnOnce() -> Result<D> + Send + 'static,
    ) -> Result<Up<K::Device>> {
        self.run.prepare()?;
        survey::collect_dead(self.run, self.kernel);
        let mut claimed = self.claim(&[])?;
        if let Err(error) = self.housing.move_in() {
            return Err(claimed.give_up(error));
        }
        let disk = match open_interruptibly(mailbox, open) {
            Ok(disk) => Arc::new(disk),
            Err(error) => return Err(claimed.give_up(error)),
        };
        if let Err(error) = self.housing.leave_mounts(self.run, &disk.folders()) {
            return Err(claimed.give_up(error));
        }
        let mut taken = Vec::new();
        loop {
            let id = claimed.slot.id();
            match self.start(claimed, mailbox, &disk) {
                Ok(up) => return Ok(up),
                // Another program has the number, or holds the dead device of that number open.
                Err(Failed { error, left: Some(left) })
                    if error.kind() == ErrorKind::Busy
                        && self.order.id.is_none()
                        && taken.len() < DEVICE_ID_TRIES_MAX =>
                {
                    tracing::info!(dev_id = id, "the number is taken: {error:#}");
                    taken.push(id);
                    claimed = self.claim(&taken)?;
                    remove(left.slot);
                }
                Err(Failed { error, left: Some(left) }) => return Err(left.give_up(error)),
                Err(Failed { error, left: None }) => return Err(error),
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
        let claimed = Claimed { slot, state, link: None };
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
    fn start<D: Portable>(
        &self,
        mut claimed: Claimed,
        mailbox: &Mailbox,
        disk: &Arc<D>,
    ) -> std::result::Result<Up<K::Device>, Failed> {
        let geometry = disk.geometry();
        claimed.state.size_bytes = sectors_to_bytes(geometry.sectors);
        claimed.state.read_only = geometry.read_only;
        claimed.state.layers = disk.layer_files();
        claimed.state.upper = disk.upper_file();
        claimed.state.recoverable = self.order.supervised;
        let id = claimed.slot.id();
        // Guarded before the kernel has the device: whatever kills this process then, somebody
        // sees to what is left. Not earlier: a host without ublk needs no supervisor.
        let guarded = self
            .kernel
            .check()
            .and_then(|()| self.order.supervised.then(|| Link::open(self.run, id)).transpose());
        match guarded {
            Ok(link) => claimed.link = link,
            Err(error) => return Err(Failed { error, left: Some(Box::new(claimed)) }),
        }
        let wish = Wish {
            id,
            queues: self.order.queues,
            depth: self.order.depth,
            request_bytes: self.order.request_bytes,
            recoverable: claimed.state.recoverable,
        };
        let watch = watch(&claimed.slot, &mailbox.sender);
        let device = match self.kernel.start(Arc::clone(disk), &wish, watch) {
            Ok(device) => device,
            Err(error) => return Err(Failed { error, left: Some(Box::new(claimed)) }),
        };
        tracing::info!(dev_id = id, config = %claimed.state.config.display(), "device is up");
        let shape = device.shape();
        (claimed.state.queues, claimed.state.depth) = (Some(shape.queues), shape.depth);
        match self.go_public(&mut claimed, mailbox, &**disk) {
            Ok((control, guarded)) => {
                let Claimed { slot, state, .. } = claimed;
                let kept = Arc::clone(disk) as Arc<dyn Kept>;
                Ok(Up { device, kept, control, state, slot, since: Instant::now(), guarded })
            }
            Err(error) => Err(match device.stop(None) {
                Ok(()) => Failed { error, left: Some(Box::new(claimed)) },
                Err(left) => Failed { error: error.context(format!("{left:#}")), left: None },
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
            recoverable: false,
            layers: Vec::new(),
            launcher: Process::parent(),
            lazy: false,
            recovery_count: 0,
            last_recovery: None,
            upper: None,
            unsettled: None,
            ephemeral: self.order.upper.as_ref().is_some_and(|upper| upper.ephemeral),
            quota_bytes: self.order.quota_bytes,
            io_deadline_s: self.order.io_deadline_s,
            environment: environment::of_this_process(),
        }
    }

    /// Tells everybody, in the order of their trust: the successor, clients, the supervisor, the
    /// snapshotter, the caller.
    fn go_public<D: Portable>(
        &self,
        claimed: &mut Claimed,
        mailbox: &Mailbox,
        disk: &D,
    ) -> Result<(ControlSocket, Option<Guarded>)> {
        claimed.state.phase = Phase::Live;
        claimed.state.save(claimed.slot.path())?;
        let control = ControlSocket::listen(&claimed.slot.socket(), mailbox.sender.clone())?;
        let guarded = claimed.link.take().map(|link| entrust(link, disk, &mailbox.sender));
        let reported = self.result_file.as_ref().map_or(Ok(()), ResultFile::succeeded);
        let announced = reported.and_then(|()| {
            check_not_told_to_stop(&mailbox.inbox, |event| {
                let _ = mailbox.sender.send(event);
            })?;
            let id = claimed.slot.id();
            self.housing.announce(id).context(|| "tell the caller of the device".to_owned())?;
            Ok(guarded)
        });
        match announced {
            Ok(guarded) => Ok((control, guarded)),
            Err(error) => {
                control.close();
                Err(error)
            }
        }
    }
}

/// Hands the supervisor what a successor will need, and listens to it from now on. When it is gone,
/// the server's loop hears of that first and finds another one.
pub(super) fn entrust<D: Portable>(link: Link, disk: &D, events: &Sender<Event>) -> Guarded {
    let parcel = disk.pack().unwrap_or_else(|error| {
        // A successor will open the image anew.
        tracing::warn!("no parcel: {error:#}");
        Vec::new()
    });
    let told = link
        .entrust(&parcel)
        .and_then(|()| link.say(&Note::Live))
        .and_then(|()| link.listen(events.clone()));
    if let Err(error) = told {
        tracing::warn!("the supervisor is gone: {error:#}");
        let _ = events.send(Event::Orphaned);
    }
    Guarded { link, parcel: Arc::new(parcel) }
}

/// Who hears of the device in `slot`: its server's loop, and its ring of troubles.
pub(super) fn watch(slot: &Slot, events: &Sender<Event>) -> Watch {
    let events = events.clone();
    let on_gone = Box::new(move || {
        let _ = events.send(Event::Gone);
    });
    // Only a record: a device without one is better than no device.
    let trouble_ring = TroubleRing::open(&slot.trouble())
        .inspect_err(|error| tracing::warn!("{error:#}"))
        .ok()
        .map(Arc::new);
    Watch { on_gone, trouble_ring }
}

/// Opens the disk on a thread of its own, so that a signal ends the attach though a file system
/// below does not answer: the process can then end, and takes the thread with it.
pub(super) fn open_interruptibly<D: Send + 'static>(
    mailbox: &Mailbox,
    open: impl FnOnce() -> Result<D> + Send + 'static,
) -> Result<D> {
    let (opened, result) = channel();
    let events = mailbox.sender.clone();
    let work = move || {
        let _ = opened.send(open());
        let _ = events.send(Event::Opened);
    };
    let spawned = std::thread::Builder::new().name("open".to_owned()).spawn(work);
    spawned.map_err(|error| Error::io("start a thread", &error))?;
    loop {
        match mailbox.inbox.recv() {
            Ok(Event::Signal(name)) => return Err(told_to_stop(name)),
            // The thread ends without a result only by a panic, which is a bug of ours.
            Ok(Event::Opened) | Err(_) => {
                let bug = || Error::new(ErrorKind::Io, "bug: opening the image panicked");
                return result.recv().unwrap_or_else(|_| Err(bug()));
            }
            Ok(_) => {}
        }
    }
}

fn told_to_stop(signal: &str) -> Error {
    Error::new(ErrorKind::Canceled, format!("{signal} came before anything was served"))
}

/// A number that is ours, and what is written down under it.
struct Claimed {
    slot: Slot,
    state: State,
    link: Option<Link>,
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

/// Why a device did not come up, and what is left of the claim: nothing when the kernel did not let
/// go of the device; its folder stays then.
struct Failed {
    error: Error,
    left: Option<Box<Claimed>>,
}

/// Whether no signal came yet. Another event that came first goes to `keep`.
///
/// # Errors
/// `Canceled`, naming the signal.
pub(super) fn check_not_told_to_stop(
    inbox: &Receiver<Event>,
    keep: impl FnOnce(Event),
) -> Result<()> {
    match inbox.try_recv() {
        Ok(Event::Signal(name)) => Err(told_to_stop(name)),
        // Between us: the loop will hear of it.
        Ok(event @ (Event::Orphaned | Event::Relinked(_) | Event::Yield | Event::Gone)) => {
            keep(event);
            Ok(())
        }
        // Nobody can have asked for anything else yet; its sender learns from the silence.
        Ok(_) | Err(_) => Ok(()),
    }
}
