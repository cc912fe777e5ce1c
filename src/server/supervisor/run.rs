//! The supervisor's process: one thread, one wait for everything that can happen.

use super::link::{open_packet, send_parcel};
use super::policy::{Remains, Verdict, verdict};
use super::store::{DescriptorStore, Given, Stored};
use super::ward::{Aim, Entering, LinkId, Upgrade, Ward};
use super::{LOST_NAME, socket_path};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{PARCEL_FILES_MAX, RECOVERY_SECONDS_MAX, SUPERVISOR_LINKS_MAX};
use crate::server::kernel::{HostKernel, Kernel};
use crate::server::packet::{PacketListener, PacketSocket};
use crate::server::process::{Process, monotonic_ns};
use crate::server::protocol::Refusal;
use crate::server::protocol::notes::Note;
use crate::server::run_dir::{RUN_DIR_VARIABLE, RunDir};
use crate::server::state::{Phase, State};
use crate::server::systemd::{self, Owner};
use crate::server::{SUCCESSOR_COMMAND, isolate, survey};
use crate::telemetry;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a supervisor without anything to guard waits before it ends: an attach that follows a
/// detach finds it still there.
const LINGER: Duration = Duration::from_secs(2);

/// How long one note may take to be sent. The other end has room for it, or is stuck.
const SEND_PATIENCE: Duration = Duration::from_secs(2);

/// How long a process whose link has ended may take to be gone.
const CLEAR_PATIENCE: Duration = Duration::from_secs(10);

/// When a new supervisor looks again for devices without a server: one may have died before it
/// could tell the new supervisor of itself.
const LATER_LOOKS: [Duration; 3] =
    [Duration::from_secs(3), Duration::from_secs(15), Duration::from_secs(60)];

/// How long no scope is asked for after one did not come in time: readers wait meanwhile.
const SCOPE_PAUSE: Duration = Duration::from_secs(60);

/// How little the kernel is to think of killing us for memory: we hold a few pages.
const OOM_SCORE: i32 = -999;

/// Whom a connection belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Nothing was said yet.
    Unknown,
    /// The server of a device.
    Server(u32),
    /// The process that is to take a device over.
    Successor(u32),
}

#[derive(Debug)]
struct LinkEnd {
    socket: PacketSocket,
    role: Role,
}

/// The supervisor.
struct Supervisor {
    run: RunDir,
    listener: PacketListener,
    signals: SignalFd,
    links: BTreeMap<LinkId, LinkEnd>,
    wards: BTreeMap<u32, Ward>,
    children: Vec<Child>,
    clearing: Vec<JoinHandle<()>>,
    next_link: LinkId,
    repeats_takeovers: bool,
    idle_since: Instant,
    later_looks: Vec<Instant>,
    /// Where what is known of devices outlives this process.
    store: Option<DescriptorStore>,
    /// What the supervisor before this one knew of devices that nobody has spoken for yet.
    stored: BTreeMap<u32, Stored>,
    /// Until when no scopes are asked for.
    unscoped_until: Option<Instant>,
    /// Whether a supervisor of another version is to take this one's place.
    retired: bool,
}

/// The hidden command: guards devices until there are none.
///
/// # Errors
/// What keeps a supervisor from working at all.
pub fn supervise() -> Result<()> {
    let given = Given::of_environment();
    isolate::close_inherited_files_but(given.files())?;
    isolate::leave_session()?;
    let run = RunDir::of_host();
    run.prepare()?;
    let Some(_lock) = lock(&run)? else {
        tracing::debug!("another supervisor guards this run folder");
        return Ok(());
    };
    telemetry::log_to(&run.path().join("supervisor.log"))?;
    isolate::join_first_mounts(run.path());
    isolate::leave_cgroup(isolate::Inmate::Supervisor);
    isolate::protect_from_oom(OOM_SCORE);
    isolate::raise_file_limit();
    let socket = socket_path(&run);
    // Left by a supervisor that was killed: we hold the lock.
    let _ = std::fs::remove_file(&socket);
    let mut supervisor = Supervisor {
        listener: PacketListener::bind(&socket)?,
        signals: signals()?,
        links: BTreeMap::new(),
        wards: BTreeMap::new(),
        children: Vec::new(),
        clearing: Vec::new(),
        next_link: 0,
        repeats_takeovers: HostKernel.repeats_takeovers(),
        idle_since: Instant::now(),
        later_looks: LATER_LOOKS.iter().rev().map(|delay| Instant::now() + *delay).collect(),
        store: DescriptorStore::of_environment(),
        stored: BTreeMap::new(),
        unscoped_until: None,
        retired: false,
        run,
    };
    supervisor.take_on(given);
    supervisor.adopt_orphans();
    let outcome = supervisor.work();
    let _ = std::fs::remove_file(&socket);
    outcome
}

/// Whether the kernel says that the process which wrote `state` serves device `id`, or did last.
fn has_taken_over(id: u32, state: &State) -> bool {
    let devices = HostKernel.list().unwrap_or_default();
    devices.iter().any(|device| device.id == id && device.server_pid == state.server.pid)
}

/// The lock of the run folder itself; `None` when another supervisor holds it.
pub(super) fn lock(run: &RunDir) -> Result<Option<File>> {
    let told = |error: &std::io::Error| Error::io(format!("lock {}", run.path().display()), error);
    let folder = File::open(run.path()).map_err(|error| told(&error))?;
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(told(&error)),
    }
}

fn signals() -> Result<SignalFd> {
    let wanted: SigSet =
        [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    let told = |errno: nix::Error| Error::io("take signals", &errno.into());
    wanted.thread_block().map_err(told)?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    SignalFd::with_flags(&wanted, flags).map_err(told)
}

/// What one wait brought.
#[derive(Default)]
struct Ready {
    listener: bool,
    signals: bool,
    links: Vec<LinkId>,
}

impl Supervisor {
    /// Takes on what no supervisor guards: everything died at once, or this is a `recover`.
    fn adopt_orphans(&mut self) {
        for id in self.run.ids().unwrap_or_default() {
            let is_known = self.wards.contains_key(&id);
            if !is_known && self.remains(id, None).is_some_and(|remains| !remains.server_lives) {
                tracing::info!(dev_id = id, "found without a server");
                self.find_ward(id);
                self.server_is_gone(id);
            }
        }
    }

    fn work(&mut self) -> Result<()> {
        loop {
            self.start_due();
            if self.is_over() {
                return Ok(());
            }
            let ready = self.wait()?;
            if ready.signals && self.was_told_to_end() {
                tracing::info!("told to end; servers will start another supervisor");
                return Ok(());
            }
            for id in ready.links {
                self.hear(id);
            }
            if self.retired {
                tracing::info!("retired; servers will start another supervisor");
                return Ok(());
            }
            if ready.listener {
                self.accept();
            }
        }
    }

    fn is_over(&mut self) -> bool {
        self.clearing.retain(|thread| !thread.is_finished());
        let busy = !self.wards.is_empty() || !self.links.is_empty() || !self.clearing.is_empty();
        if busy {
            self.idle_since = Instant::now();
        }
        self.idle_since.elapsed() >= LINGER
    }

    /// Waits for the next event, or until something is due.
    fn wait(&self) -> Result<Ready> {
        let mut polled = vec![
            PollFd::new(&self.listener, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        polled.extend(self.links.values().map(|link| PollFd::new(&link.socket, PollFlags::IN)));
        let timeout = self.next_due().map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = timeout.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            // Rounded up: waking early would only mean to wait again.
            tv_nsec: i64::from(left.subsec_nanos().saturating_add(100_000).min(999_999_999)),
        });
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::io("wait for events", &errno.into())),
        }
        let mut flags = polled.iter().map(|polled| !polled.revents().is_empty());
        let mut next = || flags.next().unwrap_or(false);
        let (listener, signals) = (next(), next());
        let links = self.links.keys().filter(|_| next()).copied().collect();
        Ok(Ready { listener, signals, links })
    }

    /// When the next thing is due without anybody asking; never while all is well.
    fn next_due(&self) -> Option<Instant> {
        let wards = self.wards.values();
        let entering = |ward: &Ward| ward.entering.as_ref().map(|it| it.deadline);
        let dues = wards.flat_map(|it| [it.retry_at, it.deadline, entering(it)]).flatten();
        let linger = self.wards.is_empty().then(|| self.idle_since + LINGER);
        // A thread that clears ends without a word; look again.
        let clearing = (!self.clearing.is_empty()).then(|| Instant::now() + LINGER);
        let look = self.later_looks.last().copied().filter(|_| !self.wards.is_empty());
        let store = self.store.as_ref().and_then(DescriptorStore::due);
        dues.chain(linger).chain(store).chain(clearing).chain(look).min()
    }

    fn was_told_to_end(&mut self) -> bool {
        let mut ending = false;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            ending |= signal.ssi_signo != u32::try_from(libc::SIGCHLD).unwrap_or(0);
        }
        self.children.retain_mut(|child| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                tracing::info!(pid = child.id(), %status, "a successor ended");
                false
            }
            Err(_) => false,
        });
        ending
    }

    fn accept(&mut self) {
        let socket = match self.listener.accept() {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!("{error:#}");
                // Out of descriptors, most likely.
                std::thread::sleep(Duration::from_millis(50));
                return;
            }
        };
        let me = nix::unistd::geteuid().as_raw();
        let is_trusted = socket.peer_uid().is_ok_and(|uid| uid == 0 || uid == me);
        if !is_trusted || self.links.len() >= SUPERVISOR_LINKS_MAX {
            tracing::warn!(is_trusted, links = self.links.len(), "connection refused");
            return;
        }
        self.add_link(socket, Role::Unknown);
    }

    fn add_link(&mut self, socket: PacketSocket, role: Role) -> LinkId {
        // A deadline for sending only matters when the other end is stuck; receiving is polled.
        let _ = socket.set_patience(Some(SEND_PATIENCE));
        self.next_link += 1;
        self.links.insert(self.next_link, LinkEnd { socket, role });
        self.next_link
    }

    fn say(&mut self, link: LinkId, note: &Note) {
        if let Some(end) = self.links.get(&link)
            && let Err(error) = end.socket.send(&note.encode(), &[])
        {
            tracing::debug!("not said: {error:#}");
        }
    }

    fn answer_and_close(&mut self, link: LinkId, note: &Note) {
        self.say(link, note);
        self.links.remove(&link);
    }

    fn hear(&mut self, link: LinkId) {
        let Some(end) = self.links.get(&link) else { return };
        let packet = match end.socket.receive() {
            Ok(Some(packet)) => packet,
            Ok(None) => return self.link_is_gone(link),
            Err(error) => {
                tracing::warn!("{error:#}");
                return self.link_is_gone(link);
            }
        };
        match open_packet(packet) {
            Ok((note, files)) => self.heard(link, note, files),
            Err(error) => {
                tracing::warn!("{error:#}");
                self.say(link, &Note::refused(&error));
            }
        }
    }

    fn link_is_gone(&mut self, link: LinkId) {
        let Some(end) = self.links.remove(&link) else { return };
        match end.role {
            Role::Unknown => {
                for ward in self.wards.values_mut() {
                    ward.waiting.retain(|waiting| *waiting != link);
                }
            }
            Role::Server(id) => {
                if self.wards.get(&id).is_some_and(|ward| ward.server == Some(link)) {
                    self.server_is_gone(id);
                }
            }
            Role::Successor(id) => {
                if self.wards.get(&id).is_some_and(|ward| ward.successor == Some(link)) {
                    self.successor_is_gone(id);
                }
            }
        }
    }

    fn heard(&mut self, link: LinkId, note: Note, files: Vec<OwnedFd>) {
        let role = self.links.get(&link).map_or(Role::Unknown, |end| end.role);
        if let Role::Successor(id) = role
            && let Some(ward) = self.wards.get_mut(&id)
        {
            ward.entering = None;
        }
        match (role, note) {
            (Role::Unknown, Note::Guard { id, server }) => self.guard(link, id, server),
            (Role::Server(id) | Role::Successor(id), Note::Parcel { last }) => {
                let Some(ward) = self.wards.get_mut(&id) else { return };
                if !ward.take_parcel(files, last, PARCEL_FILES_MAX) {
                    tracing::warn!(dev_id = id, "a parcel of too many files is not kept");
                } else if last && ward.live_since.is_some() {
                    self.store(id);
                }
            }
            (Role::Server(id), Note::Live) => self.is_live(id),
            (Role::Successor(id), Note::Live) => self.has_taken_over(link, id),
            (Role::Successor(id), Note::Prepared) => self.let_take_over(id),
            (Role::Successor(id), Note::Refused { error }) => {
                if let Some(ward) = self.wards.get_mut(&id) {
                    ward.last_error = Some(error);
                }
            }
            (Role::Unknown, Note::Look { id }) => {
                if !self.run.folder(id).exists() {
                    self.forget(id, "it was detached");
                }
                self.links.remove(&link);
            }
            (_, Note::Ping) => self.say(link, &Note::Done { pause_us: None }),
            (Role::Unknown, Note::Recover { id }) => self.recover(link, id),
            (Role::Unknown, Note::Retire) => self.retire(link),
            (Role::Unknown, Note::Upgrade { id }) => self.upgrade(link, id, files),
            (role, note) => {
                let message = format!("{note:?} makes no sense from {role:?}");
                let error = Error::new(ErrorKind::Usage, message);
                self.say(link, &Note::refused(&error));
            }
        }
    }

    fn guard(&mut self, link: LinkId, id: u32, server: Process) {
        let program = PathBuf::from(format!("/proc/{}/exe", server.pid));
        let program = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(program).ok();
        // Whatever was known of the number was of another device, or of another life of this one:
        // its parcel, its deaths and its successor are not this server's.
        self.unstore(id);
        let before = self.wards.remove(&id).unwrap_or_default();
        for stale in [before.server, before.successor].into_iter().flatten() {
            self.links.remove(&stale);
        }
        if let Some(upgrade) = before.upgrade {
            let error = Error::new(ErrorKind::Canceled, format!("device {id} has a new server"));
            self.answer_and_close(upgrade.person, &Note::refused(&error));
        }
        let ward = Ward {
            server: Some(link),
            process: Some(server),
            program: program.map(Into::into),
            waiting: before.waiting,
            ..Ward::default()
        };
        self.wards.insert(id, ward);
        if let Some(end) = self.links.get_mut(&link) {
            end.role = Role::Server(id);
        }
        tracing::info!(dev_id = id, pid = server.pid, "guarded");
        self.say(link, &Note::Guarded);
    }

    fn is_live(&mut self, id: u32) {
        let Some(ward) = self.wards.get_mut(&id) else { return };
        ward.live_since = Some(Instant::now());
        ward.retry_at = None;
        let _ = std::fs::remove_file(self.run.folder(id).join(LOST_NAME));
        for person in std::mem::take(&mut ward.waiting) {
            self.answer_and_close(person, &Note::Done { pause_us: None });
        }
        // Only now is it certain which program serves it. Nobody waits for this.
        self.store(id);
    }

    fn has_taken_over(&mut self, link: LinkId, id: u32) {
        if let Some(end) = self.links.get_mut(&link) {
            end.role = Role::Server(id);
        }
        let Some(ward) = self.wards.get_mut(&id) else { return };
        ward.server = Some(link);
        ward.process = ward.successor_pid.take().map(Process::of);
        ward.unscoped = false;
        ward.successor = None;
        ward.deadline = None;
        let upgrade = ward.upgrade.take();
        if let Some(Upgrade { person, yielded_at, error, program }) = upgrade {
            let note = match error {
                Some(error) => Note::Refused { error },
                None => {
                    ward.program = program.or(ward.program.take());
                    let pause = yielded_at.map(|at| at.elapsed().as_micros());
                    Note::Done { pause_us: pause.and_then(|us| u64::try_from(us).ok()) }
                }
            };
            self.answer_and_close(person, &note);
        }
        tracing::info!(dev_id = id, "a successor serves");
        self.is_live(id);
    }

    /// What is on disk about device `id`; `None` when nothing is. The process `dying` counts as
    /// dead: the kernel closes a process's sockets before it stops showing it as running.
    fn remains(&self, id: u32, dying: Option<Process>) -> Option<Remains> {
        if !self.run.folder(id).exists() {
            return None;
        }
        let state = match self.run.state(id) {
            Ok(Some(state)) => state,
            Ok(None) => {
                return Some(Remains { phase: None, recoverable: false, server_lives: false });
            }
            Err(error) => {
                tracing::warn!(dev_id = id, "{error:#}");
                return None;
            }
        };
        let phase = match state.phase {
            // The kernel knows whether the takeover was through though that was not written down.
            Phase::Taking if has_taken_over(id, &state) => Phase::Live,
            phase => phase,
        };
        Some(Remains {
            phase: Some(phase),
            recoverable: state.recoverable && state.is_of_this_boot(),
            server_lives: state.server_is_alive() && Some(state.server) != dying,
        })
    }

    /// The server of device `id` is gone, for whatever reason.
    fn server_is_gone(&mut self, id: u32) {
        let seen_ns = monotonic_ns();
        let Some(ward) = self.wards.get_mut(&id) else { return };
        ward.server = None;
        let dying = ward.process.take();
        ward.seen_ns = seen_ns;
        let served = ward.live_since.take().map(|since| since.elapsed());
        let yielded = ward.upgrade.as_ref().is_some_and(|upgrade| upgrade.yielded_at.is_some());
        match (ward.successor, yielded) {
            (Some(successor), true) => self.say(successor, &Note::Go { seen_ns }),
            // It died while its successor was getting ready, which will say so and then take over.
            (Some(_), false) => {}
            (None, _) => self.decide(id, served, dying),
        }
    }

    /// A successor has everything: the old server may end, if it has not.
    fn let_take_over(&mut self, id: u32) {
        let Some(ward) = self.wards.get_mut(&id) else { return };
        let (server, successor, seen_ns) = (ward.server, ward.successor, ward.seen_ns);
        // Otherwise it was told to go when it was started.
        let Some(upgrade) = ward.upgrade.as_mut().filter(|it| it.error.is_none()) else { return };
        upgrade.yielded_at = Some(Instant::now());
        match (server, successor) {
            (Some(server), _) => self.say(server, &Note::Yield),
            (None, Some(successor)) => self.say(successor, &Note::Go { seen_ns }),
            (None, None) => {}
        }
    }

    /// A successor ended before it served.
    fn successor_is_gone(&mut self, id: u32) {
        let Some(ward) = self.wards.get_mut(&id) else { return };
        ward.successor = None;
        let dying = ward.successor_pid.take().map(Process::of);
        ward.deadline = None;
        if let Some(entering) = ward.entering.take() {
            // Not its fault, most likely, and the device's readers wait.
            tracing::warn!(dev_id = id, "a successor got no unit of its own; without one, then");
            ward.unscoped = true;
            return self.start_successor(id, entering.aim);
        }
        let error = ward.last_error.clone().unwrap_or_else(|| {
            Refusal::of(&Error::new(ErrorKind::Canceled, "the successor ended without a word"))
        });
        tracing::warn!(dev_id = id, "a successor failed: {}", error.message);
        if let Some(upgrade) = &mut ward.upgrade {
            let person = upgrade.person;
            if ward.server.is_some() {
                // Nothing has changed for the device.
                ward.upgrade = None;
                self.answer_and_close(person, &Note::Refused { error });
                return;
            }
            // The program of before brings it back; then the person hears of it.
            let message = format!("rolled back: {}", error.message);
            upgrade.error = Some(Refusal { kind: error.kind, message });
            upgrade.yielded_at = Some(Instant::now());
        }
        if self.wards.get(&id).is_some_and(|ward| ward.server.is_none()) {
            self.decide(id, None, dying);
        }
    }

    /// Decides about a device without a server; `dying` is the process that has just gone.
    fn decide(&mut self, id: u32, served: Option<Duration>, dying: Option<Process>) {
        let verdict = match self.remains(id, dying) {
            Some(remains) => verdict(remains, self.repeats_takeovers),
            None => Verdict::Forget,
        };
        match verdict {
            Verdict::Forget => self.forget(id, "the device is gone"),
            Verdict::Clear => {
                self.clear(id);
                self.forget(id, "its server died where nobody can go on; it was removed");
            }
            Verdict::Revive => {
                let Some(ward) = self.wards.get_mut(&id) else { return };
                match ward.deaths.add(served) {
                    Some(delay) => ward.retry_at = Some(Instant::now() + delay),
                    None => self.give_up(id),
                }
            }
        }
    }

    fn forget(&mut self, id: u32, why: &str) {
        self.unstore(id);
        let Some(ward) = self.wards.remove(&id) else { return };
        tracing::info!(dev_id = id, "not guarded any more: {why}");
        let error = Error::new(ErrorKind::Canceled, format!("device {id}: {why}"));
        let people = ward.waiting.into_iter().chain(ward.upgrade.map(|it| it.person));
        for person in people {
            self.answer_and_close(person, &Note::refused(&error));
        }
    }

    /// Deletes what is left of a device. On a thread: the kernel may take its time.
    fn clear(&mut self, id: u32) {
        tracing::warn!(dev_id = id, "removing a device that cannot be brought back");
        let run = self.run.clone();
        self.clearing.push(std::thread::spawn(move || {
            // The process may still be dying.
            let deadline = Instant::now() + CLEAR_PATIENCE;
            while run.folder(id).exists() {
                match survey::collect_unguarded(&run, &HostKernel, id) {
                    Ok(true) => return,
                    Ok(false) if Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    Ok(false) => return,
                    Err(error) => {
                        tracing::error!(dev_id = id, "not removed: {error:#}");
                        return;
                    }
                }
            }
        }));
    }

    /// Starts no more successors for device `id`, and says so where `list` finds it.
    fn give_up(&mut self, id: u32) {
        let Some(ward) = self.wards.get_mut(&id) else { return };
        ward.lost = true;
        ward.retry_at = None;
        let last = ward.last_error.as_ref().map_or("it died", |error| error.message.as_str());
        let text = format!("{} servers died early; the last one: {last}\n", ward.deaths.count());
        tracing::error!(dev_id = id, "given up: {}", text.trim_end());
        let path = self.run.folder(id).join(LOST_NAME);
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path);
        if let Err(error) =
            file.and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
        {
            tracing::warn!("write {}: {error}", path.display());
        }
        let error = Error::new(ErrorKind::Canceled, format!("device {id}: {}", text.trim_end()));
        let people: Vec<_> = std::mem::take(&mut ward.waiting)
            .into_iter()
            .chain(ward.upgrade.take().map(|it| it.person))
            .collect();
        for person in people {
            self.answer_and_close(person, &Note::refused(&error));
        }
    }

    /// Somebody asks for device `id` to be brought back now.
    fn recover(&mut self, person: LinkId, id: u32) {
        let Some(remains) = self.remains(id, None) else {
            let error = Error::new(ErrorKind::NotFound, format!("there is no device {id}"));
            return self.answer_and_close(person, &Note::refused(&error));
        };
        let successor = self.wards.get(&id).and_then(|ward| ward.successor);
        if remains.server_lives && successor.is_none() {
            return self.answer_and_close(person, &Note::Done { pause_us: None });
        }
        let ward = self.find_ward(id);
        ward.waiting.push(person);
        if ward.successor.is_none() {
            ward.deaths = super::policy::Deaths::default();
            ward.lost = false;
            ward.seen_ns = monotonic_ns();
            self.decide(id, None, None);
        }
    }

    /// Somebody asks for another supervisor. What only this one knows must not be lost: a device
    /// whose server is dead has nobody else who could hand its parcel on.
    fn retire(&mut self, person: LinkId) {
        let is_settled = |ward: &Ward| ward.live_since.is_some() && ward.successor.is_none();
        if let Some(id) = self.wards.iter().find_map(|(id, it)| (!is_settled(it)).then_some(id)) {
            let message = format!("device {id} is being brought up or back, or was given up");
            let error = Error::new(ErrorKind::Busy, message);
            return self.answer_and_close(person, &Note::refused(&error));
        }
        self.retired = true;
        self.say(person, &Note::Done { pause_us: None });
    }

    /// Somebody asks for another program to serve device `id`.
    fn upgrade(&mut self, person: LinkId, id: u32, files: Vec<OwnedFd>) {
        let refuse = |kind, message: String| Note::refused(&Error::new(kind, message));
        let Some(program) = files.into_iter().next() else {
            let note = refuse(ErrorKind::Usage, "an upgrade needs a program".to_owned());
            return self.answer_and_close(person, &note);
        };
        let Some(ward) = self.wards.get_mut(&id).filter(|ward| ward.live_since.is_some()) else {
            let message = format!("device {id} is not served under supervision");
            return self.answer_and_close(person, &refuse(ErrorKind::NotFound, message));
        };
        if ward.successor.is_some() || ward.upgrade.is_some() {
            let message = format!("device {id} is being handed over already");
            return self.answer_and_close(person, &refuse(ErrorKind::Busy, message));
        }
        let program = Some(program);
        ward.upgrade = Some(Upgrade { person, yielded_at: None, error: None, program });
        tracing::info!(dev_id = id, "upgrade");
        self.start_successor(id, Aim::Upgrade);
    }

    /// Kills the successor `pid`; its end of file does the rest.
    fn end_successor(&self, pid: u32) {
        tracing::warn!(pid, "a successor takes too long");
        // Our own child that nobody has waited for: the number is its own.
        if let Some(child) = self.children.iter().find(|child| child.id() == pid)
            && let Ok(pid) = i32::try_from(child.id())
        {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// Ends successors that wait in vain for a scope.
    fn end_waits_for_scopes(&mut self, now: Instant) {
        let mut late = Vec::new();
        for ward in self.wards.values_mut() {
            let is_due = |entering: &mut Entering| entering.deadline <= now;
            let Some(entering) = ward.entering.take_if(is_due) else { continue };
            let Some(pid) = ward.successor_pid else { continue };
            if !systemd::runs(pid, &entering.program) {
                // Not due again before its end is seen.
                let deadline = now + SCOPE_PAUSE;
                ward.entering = Some(Entering { deadline, ..entering });
                late.push(pid);
            }
        }
        if !late.is_empty() {
            self.unscoped_until = Some(now + SCOPE_PAUSE);
        }
        for pid in late {
            self.end_successor(pid);
        }
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        if self.later_looks.pop_if(|due| *due <= now).is_some() {
            self.adopt_orphans();
            if self.later_looks.is_empty() {
                // Whoever has not come by now does not come.
                for id in std::mem::take(&mut self.stored).into_keys() {
                    self.unstore(id);
                }
            }
        }
        if let Some(store) = self.store.as_mut().filter(|it| it.due().is_some_and(|at| at <= now)) {
            store.work();
        }
        self.end_waits_for_scopes(now);
        let is_due = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let late: Vec<u32> = self
            .wards
            .values()
            .filter(|it| is_due(it.deadline))
            .filter_map(|it| it.successor_pid)
            .collect();
        for pid in late {
            self.end_successor(pid);
        }
        for ward in self.wards.values_mut().filter(|it| is_due(it.deadline)) {
            ward.deadline = None;
        }
        let due: Vec<u32> =
            self.wards.iter().filter(|(_, it)| is_due(it.retry_at)).map(|(id, _)| *id).collect();
        for id in due {
            if let Some(ward) = self.wards.get_mut(&id) {
                ward.retry_at = None;
            }
            self.start_successor(id, Aim::Same);
        }
    }
}

mod keeping;
mod succession;
#[cfg(test)]
mod tests;
