//! Starting a server: as a process of its own, or in this one.
//!
//! `attach` runs the program again with a hidden command. The new process leaves everything of
//! the caller behind ([`isolate`]) and says one line on its standard output, which is a socket to
//! the caller: ready, or why not. Then that stream and standard error go to the log. A server that
//! dies without a word is described by its last words, and what it left is cleared.

use super::control::Event;
use super::isolate;
use super::kernel::HostKernel;
use super::prepare::{self, Prepared, report};
use super::process::Process;
use super::protocol::{self, Readiness, Refusal};
use super::result_file::ResultFile;
use super::run_dir::{RunDir, Slot};
use super::serve::{Housing, Mailbox, Order, Server, UpperWish};
use super::served_disk::{How, ServedDisk};
use super::state::device_path;
use super::survey::Manner;
use super::systemd::{self, Owner, wait};
use super::{signals, survey, wire};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{HostSettings, is_reference, parse_image_config};
use crate::limits::{
    ATTACH_SECONDS_MAX, DETACH_SECONDS_DEFAULT, LAST_WORDS_BYTES_MAX, READY_LINE_BYTES_MAX,
};
use crate::telemetry;
use crate::units::to_u64;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::cell::Cell;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// The hidden command by which the program runs itself as a server.
pub const SERVE_COMMAND: &str = "serve-device";

/// How long a server that was told to end may take before it is killed.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// What the caller of `attach` may choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// What to serve; its paths may be relative to the working folder.
    pub order: Order,
    /// Whether a writable config is to be served without writes.
    pub read_only: bool,
    /// How many `-v` the server is to be started with.
    pub verbosity: u8,
}

/// A device that came up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
}

/// Starts a server that outlives this process. `announce` is called once its device can be opened
/// and the config's result file says so; if that fails, the device is detached: nobody would know
/// of it.
///
/// # Errors
/// Whatever keeps the device from coming up, also in the result file. Nothing is left then.
pub fn attach(
    options: &AttachOptions,
    announce: impl FnOnce(&Attached) -> Result<()>,
) -> Result<()> {
    let (result_file, order) = prepare_for_another(options)?;
    let run = RunDir::of_host();
    let outcome = start_and_wait(options, &order, &run).and_then(|attached| {
        announce(&attached).inspect_err(|_| {
            let patience = Duration::from_secs(DETACH_SECONDS_DEFAULT);
            let detached = survey::detach(&run, &HostKernel, attached.id, Manner::Polite, patience);
            if let Err(left) = detached {
                tracing::warn!("{left:#}");
            }
        })
    });
    if let Err(error) = &outcome {
        report(result_file.as_ref(), error);
    }
    outcome
}

/// Serves in this process until a signal or a `detach` ends it. `announce` is called once, when
/// the device can be opened and the result file says so.
///
/// # Errors
/// As [`attach`], and whatever keeps the device from going away.
pub fn serve_foreground(
    options: &AttachOptions,
    announce: impl Fn(&Attached) -> Result<()>,
) -> Result<()> {
    signals::block()?;
    let has_own_mounts = own_mounts_early(options)?;
    let (prepared, order) = prepare(options)?;
    // Whoever keeps it in the foreground is its supervisor.
    let order = Order { supervised: false, ..order };
    let (sender, inbox) = channel();
    let housing = Foreground { events: sender.clone(), announce, has_own_mounts };
    serve(prepared, &order, &Mailbox { sender, inbox }, &housing)
}

/// The server's side of [`attach`]: tells how it went on standard output, then serves until it is
/// told to stop.
///
/// # Errors
/// As [`serve_foreground`]; the caller was told.
pub fn serve_started(options: &AttachOptions) -> Result<()> {
    isolate::close_inherited_files()?;
    let announced = Cell::new(false);
    let outcome = serve_isolated(options, &announced);
    if let (Err(error), false) = (&outcome, announced.get()) {
        // Nobody may be there to read it; the result file says the same.
        let _ = tell(&Readiness::Failed(Refusal::of(error)));
    }
    outcome
}

fn serve_isolated(options: &AttachOptions, announced: &Cell<bool>) -> Result<()> {
    signals::block()?;
    isolate::leave_session()?;
    let has_own_mounts = own_mounts_early(options)?;
    let (prepared, order) = prepare(options)?;
    let (sender, inbox) = channel();
    let housing = Started { events: sender.clone(), announced, has_own_mounts };
    serve(prepared, &order, &Mailbox { sender, inbox }, &housing)
}

/// To find what a reference names takes threads, which would stay in the caller's mounts; a config
/// is read without. Whether that was done.
fn own_mounts_early(options: &AttachOptions) -> Result<bool> {
    let is_early = is_reference(&options.order.config);
    if is_early {
        isolate::own_mounts_in_folder()?;
    }
    Ok(is_early)
}

fn move_to_own_mounts(has_own_mounts: bool) -> Result<()> {
    if has_own_mounts { isolate::leave_folder() } else { isolate::own_mounts() }
}

fn serve<H: Housing>(
    prepared: Prepared,
    order: &Order,
    mailbox: &Mailbox,
    housing: &H,
) -> Result<()> {
    let run = RunDir::of_host();
    let server = Server {
        order,
        view: &prepared.view,
        result_file: prepared.result_file,
        run: &run,
        kernel: &HostKernel,
        housing,
    };
    let (config, service_config) = (order.config.clone(), order.service_config.clone());
    // What is wrong is told by its place in the text as it was read. But the server has left its
    // caller's folder when it opens the image: only the view has every path made absolute.
    let parsed = parse_image_config(&config, &prepared.text).map(drop);
    let absolute = prepared.view.content.to_string().into_bytes();
    let how = How {
        read_only: prepared.read_only,
        make_upper: order.upper.is_some(),
        quota_bytes: order.quota_bytes,
        io_deadline_s: order.io_deadline_s,
    };
    server.serve(mailbox, move || {
        parsed.and_then(|()| ServedDisk::open(&config, &absolute, service_config.as_deref(), how))
    })
}

/// The config and the order with absolute paths, for a server that may have another folder.
fn prepare(options: &AttachOptions) -> Result<(Prepared, Order)> {
    let order = &options.order;
    let host = HostSettings {
        service_config: order.service_config.as_deref(),
        io_deadline_seconds: order.io_deadline_s,
    };
    let upper = order.upper.as_ref().map(|upper| upper.folder.as_path());
    let prepared = prepare::prepare(&order.config, host, options.read_only, upper)?;
    let (config, service_config) = (prepared.config.clone(), prepared.service_config.clone());
    let upper = order.upper.as_ref().zip(prepared.upper.clone());
    let upper = upper.map(|(wish, folder)| UpperWish { folder, ..wish.clone() });
    Ok((prepared, Order { config, service_config, upper, ..order.clone() }))
}

/// The same for a server in another process, which prepares for itself: where its failures are to
/// be told, and the order.
fn prepare_for_another(options: &AttachOptions) -> Result<(Option<ResultFile>, Order)> {
    if !is_reference(&options.order.config) {
        let (prepared, order) = prepare(options)?;
        return Ok((prepared.result_file, order));
    }
    // What a reference names is asked of its registry once, by the server: a config that is made of
    // a manifest names no result file, and nothing else in it matters here.
    let folder =
        std::env::current_dir().map_err(|error| Error::io("find out where I am", &error))?;
    let order = options.order.clone();
    let service_config = order.service_config.map(|path| folder.join(path));
    let upper = order.upper.map(|wish| UpperWish { folder: folder.join(wish.folder), ..wish });
    Ok((None, Order { service_config, upper, ..order }))
}

fn tell(readiness: &Readiness) -> Result<()> {
    let mut stdout = std::io::stdout();
    let line = protocol::encode_readiness(readiness);
    let written = stdout.write_all(&line).and_then(|()| stdout.flush());
    written.map_err(|error| Error::io("tell the process that started me", &error))
}

/// A server in a process of its own.
struct Started<'a> {
    events: Sender<Event>,
    announced: &'a Cell<bool>,
    has_own_mounts: bool,
}

impl Housing for Started<'_> {
    fn settle(&self, slot: &Slot) -> Result<Option<PathBuf>> {
        let log = slot.log();
        telemetry::log_to(&log)?;
        Ok(Some(log))
    }

    fn move_in(&self) -> Result<()> {
        isolate::leave_cgroup(isolate::Inmate::Server);
        isolate::protect_from_oom(isolate::SERVER_OOM_SCORE);
        isolate::raise_file_limit();
        move_to_own_mounts(self.has_own_mounts)?;
        signals::forward(self.events.clone())
    }

    fn leave_mounts(&self, run: &RunDir, folders: &[PathBuf]) -> Result<()> {
        isolate::drop_mounts_but(run, folders)
    }

    fn announce(&self, id: u32) -> Result<()> {
        tell(&Readiness::Ready { id })?;
        self.announced.set(true);
        isolate::let_go_of_stdout()
    }
}

/// A server in the process that was asked for it.
struct Foreground<F> {
    events: Sender<Event>,
    announce: F,
    has_own_mounts: bool,
}

impl<F: Fn(&Attached) -> Result<()>> Housing for Foreground<F> {
    fn settle(&self, _slot: &Slot) -> Result<Option<PathBuf>> {
        Ok(None)
    }

    fn move_in(&self) -> Result<()> {
        isolate::raise_file_limit();
        move_to_own_mounts(self.has_own_mounts)?;
        signals::forward(self.events.clone())
    }

    fn leave_mounts(&self, run: &RunDir, folders: &[PathBuf]) -> Result<()> {
        isolate::drop_mounts_but(run, folders)
    }

    fn announce(&self, id: u32) -> Result<()> {
        (self.announce)(&Attached { id, device: device_path(id) })
    }
}

fn start_and_wait(options: &AttachOptions, order: &Order, run: &RunDir) -> Result<Attached> {
    let Spawned { mut child, socket, words } = start(&arguments(options, order), order.id)?;
    let patience = Duration::from_secs(ATTACH_SECONDS_MAX);
    let line = wire::read_line(&socket, READY_LINE_BYTES_MAX, patience);
    let told = line.as_deref().ok().and_then(protocol::parse_readiness);
    match told {
        Some(Readiness::Ready { id }) => return Ok(Attached { id, device: device_path(id) }),
        Some(Readiness::Failed(refusal)) => {
            let _ = wait(&mut child, END_PATIENCE);
            return Err(refusal.to_error());
        }
        None => {}
    }
    let late = matches!(line, Err(wire::LineError::Deadline));
    if late {
        end(&child, Signal::SIGTERM);
    }
    let mut status = wait(&mut child, END_PATIENCE);
    if status.is_none() {
        end(&child, Signal::SIGKILL);
        status = wait(&mut child, END_PATIENCE);
    }
    let said = words.map(|words| words.recv_timeout(END_PATIENCE).unwrap_or_default());
    let logged = clear_remains(run, child.id());
    let said = last_words(&[said.unwrap_or_default(), logged]);
    Err(if late {
        let message = format!("the server was not ready within {ATTACH_SECONDS_MAX} s{said}");
        Error::new(ErrorKind::Timeout, message)
    } else {
        Error::new(ErrorKind::Io, format!("the server died early ({}){said}", how(status)))
    })
}

/// A process that is, or will be, a server.
struct Spawned {
    child: Child,
    /// Where it says that it is ready.
    socket: UnixStream,
    words: Option<Receiver<Vec<u8>>>,
}

/// Starts a server with these arguments: in a scope where systemd rules and can be had.
fn start(arguments: &[OsString], id: Option<u32>) -> Result<Spawned> {
    // The path names the process for people; without it (the file was replaced) any name will do.
    let own = std::env::current_exe().ok().filter(|path| path.exists());
    let program = own.unwrap_or_else(|| format!("/proc/{}/exe", std::process::id()).into());
    let owner = id.map_or(Owner::StartedBy(std::process::id()), Owner::Device);
    if let Some(command) = systemd::in_scope(owner, &program, arguments) {
        match start_in_scope(command, &program, systemd::UNIT_PATIENCE) {
            Ok(spawned) => return Ok(spawned),
            Err(why) => tracing::warn!("the server gets no unit of its own: {why}"),
        }
    }
    let mut command = Command::new(program);
    command.args(arguments);
    spawn(command).map_err(|error| Error::io("start a server process", &error))
}

/// Runs `command`, which registers itself and then becomes `program`, until it has become that or
/// its first word is there.
fn start_in_scope(
    command: Command,
    program: &Path,
    patience: Duration,
) -> std::result::Result<Spawned, String> {
    let mut spawned = spawn(command).map_err(|error| error.to_string())?;
    let child = &mut spawned.child;
    if !wire::is_readable_within(&spawned.socket, patience) {
        if systemd::runs(child.id(), program) {
            return Ok(spawned);
        }
        end(child, Signal::SIGKILL);
        let _ = wait(child, END_PATIENCE);
        return Err(format!("systemd took more than {} s", patience.as_secs()));
    }
    if !wire::is_at_end(&spawned.socket) {
        return Ok(spawned);
    }
    // A server says something before it ends, unless it is killed.
    let status = wait(child, END_PATIENCE);
    if status.is_none_or(|status| status.code().is_none()) {
        return Ok(spawned);
    }
    let words = spawned.words.map(|words| words.recv_timeout(END_PATIENCE).unwrap_or_default());
    Err(format!("{}{}", how(status), last_words(&[words.unwrap_or_default()])))
}

fn spawn(mut command: Command) -> std::io::Result<Spawned> {
    let (ours, theirs) = UnixStream::pair()?;
    command.stdin(Stdio::null()).stdout(Stdio::from(OwnedFd::from(theirs))).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let words = child.stderr.take().map(listen);
    Ok(Spawned { child, socket: ours, words })
}

/// The command line by which a server is started, after the program's name.
fn arguments(options: &AttachOptions, order: &Order) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec![SERVE_COMMAND.into()];
    let mut option = |name: &str, value: Option<OsString>| {
        if let Some(value) = value {
            arguments.extend([name.into(), value]);
        }
    };
    option("--id", order.id.map(|id| id.to_string().into()));
    option("--queues", order.queues.map(|queues| queues.to_string().into()));
    option("--depth", Some(order.depth.to_string().into()));
    option("--service-config", order.service_config.clone().map(Into::into));
    option("--quota", order.quota_bytes.map(|bytes| bytes.to_string().into()));
    option("--io-deadline", order.io_deadline_s.map(|seconds| seconds.to_string().into()));
    option("--upper", order.upper.as_ref().map(|upper| upper.folder.clone().into()));
    if order.upper.as_ref().is_some_and(|upper| upper.ephemeral) {
        arguments.push("--ephemeral".into());
    }
    if options.read_only {
        arguments.push("--read-only".into());
    }
    if !order.supervised {
        arguments.push("--unsupervised".into());
    }
    arguments.extend((0..options.verbosity).map(|_| "-v".into()));
    arguments.extend(["--".into(), order.config.clone().into()]);
    arguments
}

/// Collects what the server says until it closes its standard error; keeps the end of it.
fn listen(mut stderr: ChildStderr) -> Receiver<Vec<u8>> {
    let (done, words) = channel();
    std::thread::spawn(move || {
        let mut tail = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stderr.read(&mut buffer) {
            tail.extend_from_slice(buffer.get(..count).unwrap_or_default());
            let excess = tail.len().saturating_sub(LAST_WORDS_BYTES_MAX);
            tail.drain(..excess);
        }
        let _ = done.send(tail);
    });
    words
}

fn end(child: &Child, signal: Signal) {
    // Nobody has waited for it, so the number is still its own.
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn how(status: Option<ExitStatus>) -> String {
    status.map_or_else(|| "it cannot be killed".to_owned(), |status| status.to_string())
}

/// Clears what the server `pid` left; returns the end of its log.
fn clear_remains(run: &RunDir, pid: u32) -> Vec<u8> {
    let mut logged = Vec::new();
    for id in run.ids().unwrap_or_default() {
        let Ok(Some(state)) = run.state(id) else { continue };
        if state.server.pid == pid && state.is_of_this_boot() {
            logged = state.log.as_deref().map(tail).unwrap_or_default();
        }
    }
    // One that died between being usable and saying so has a successor, which nobody asked for.
    let launcher = Process::current();
    for id in run.ids().unwrap_or_default() {
        if run.state(id).ok().flatten().is_some_and(|state| state.launcher == launcher) {
            let patience = Duration::from_secs(DETACH_SECONDS_DEFAULT);
            let detached = super::detach(run, &HostKernel, id, Manner::Polite, patience);
            if let Err(left) = detached {
                tracing::warn!("{left:#}");
            }
        }
    }
    // Whatever is dead may go, and a server killed before its first state left but a folder.
    survey::collect_dead(run, &HostKernel);
    logged
}

fn tail(path: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    if let Ok(mut file) = File::open(path) {
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        let start = length.saturating_sub(to_u64(LAST_WORDS_BYTES_MAX));
        let _ = file.seek(SeekFrom::Start(start));
        let _ = file.take(to_u64(LAST_WORDS_BYTES_MAX)).read_to_end(&mut text);
    }
    text
}

/// The last line or two of what a server said, for the end of an error.
fn last_words(texts: &[Vec<u8>]) -> String {
    let text: Vec<_> = texts.iter().map(|text| String::from_utf8_lossy(text)).collect();
    let lines: Vec<&str> = text
        .iter()
        .flat_map(|text| text.lines())
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    match lines.get(lines.len().saturating_sub(3)..) {
        None | Some([]) => String::new(),
        Some(lines) => format!("; its last words: {}", lines.join(" | ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_lines_are_repeated() {
        assert_eq!(last_words(&[]), "");
        assert_eq!(last_words(&[b" \n\n".to_vec()]), "");
        let words = last_words(&[b"one\ntwo\n".to_vec(), b"three\nfour".to_vec()]);
        assert_eq!(words, "; its last words: two | three | four");
    }

    #[test]
    fn a_server_is_started_with_every_choice_of_its_caller() {
        let order = Order {
            config: "/c/-v.json".into(),
            service_config: Some("/s".into()),
            id: Some(3),
            queues: Some(2),
            depth: 64,
            request_bytes: 4096,
            supervised: false,
            upper: None,
            quota_bytes: None,
            io_deadline_s: None,
        };
        let options = AttachOptions { order: order.clone(), read_only: true, verbosity: 2 };
        let line = "serve-device --id 3 --queues 2 --depth 64 --service-config /s --read-only \
                    --unsupervised -v -v -- /c/-v.json";
        let expected: Vec<OsString> = line.split(' ').map(Into::into).collect();
        assert_eq!(arguments(&options, &order), expected);
        let upper = Some(UpperWish { folder: "/u".into(), ephemeral: true });
        let order = Order { upper, quota_bytes: Some(1 << 20), supervised: true, ..order };
        let order = Order { io_deadline_s: Some(7), ..order };
        let options = AttachOptions { order: order.clone(), read_only: false, verbosity: 0 };
        let line = "serve-device --id 3 --queues 2 --depth 64 --service-config /s --quota 1048576 \
                    --io-deadline 7 --upper /u --ephemeral -- /c/-v.json";
        let expected: Vec<OsString> = line.split(' ').map(Into::into).collect();
        assert_eq!(arguments(&options, &order), expected);
    }

    /// The registry was asked twice for everything: here, and by the server.
    #[test]
    fn what_a_reference_names_is_left_to_the_server_to_find() {
        let order = Order {
            // Nobody is there.
            config: "docker://127.0.0.1:1/nobody/there".into(),
            service_config: Some("s.json".into()),
            id: None,
            queues: None,
            depth: 64,
            request_bytes: 4096,
            supervised: true,
            upper: Some(UpperWish { folder: "u".into(), ephemeral: true }),
            quota_bytes: None,
            io_deadline_s: None,
        };
        let options = AttachOptions { order: order.clone(), read_only: false, verbosity: 0 };
        let (result_file, found) = prepare_for_another(&options).unwrap();
        let folder = std::env::current_dir().unwrap();
        let upper = Some(UpperWish { folder: folder.join("u"), ephemeral: true });
        let service_config = Some(folder.join("s.json"));
        assert_eq!(found, Order { service_config, upper, ..order });
        assert!(result_file.is_none());
        let order = Order { config: "nothing/there.json".into(), ..options.order.clone() };
        let error = prepare_for_another(&AttachOptions { order, ..options }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "a config is read here");
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_scope_that_cannot_be_had_in_time_is_done_without() {
        let own = std::env::current_exe().unwrap();
        let patience = Duration::from_millis(300);
        let outcome = |script| start_in_scope(shell(script), &own, patience);
        for (script, expected) in [
            ("echo Failed to connect to bus >&2; exit 1", "exit status: 1; its last words: Failed"),
            // The bus hangs.
            ("exec sleep 1000", "systemd took more than 0 s"),
        ] {
            let why = outcome(script).err().unwrap();
            assert!(why.starts_with(expected), "{why}");
        }
        // What speaks is a server, and so is what is killed.
        let mut spawned = outcome("echo word; exit 1").unwrap();
        let line = wire::read_line(&spawned.socket, 10, Duration::from_secs(60)).unwrap();
        assert_eq!(line, b"word\n");
        assert!(wait(&mut spawned.child, Duration::from_secs(60)).is_some());
        assert!(outcome("kill -9 $$").is_ok());
        // Slow, but our program by then.
        let slow = Path::new("/bin/sleep");
        let mut spawned = start_in_scope(shell("exec sleep 1000"), slow, patience).unwrap();
        spawned.child.kill().unwrap();
        spawned.child.wait().unwrap();
        let missing = start_in_scope(Command::new("/nonexistent/run"), &own, patience);
        assert!(missing.err().unwrap().contains("No such file"));
    }
}
