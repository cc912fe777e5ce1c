//! Starting a server: as a process of its own, or in this one.
//!
//! `attach` runs the program again with a hidden command. The new process leaves everything of
//! the caller behind ([`isolate`]) and says one line on its standard output, which is a socket to
//! the caller: ready, or why not. Then that stream and standard error go to the log. A server that
//! dies without a word is described by its last words, and what it left is cleared.

use super::config_view::{self, ConfigView};
use super::control::Event;
use super::isolate;
use super::kernel::HostKernel;
use super::protocol::{self, Readiness, Refusal};
use super::result_file::ResultFile;
use super::run_dir::{RunDir, Slot};
use super::serve::{Housing, Mailbox, Order, Server, check_writable};
use super::state::device_path;
use super::{signals, survey, wire};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::ImageConfig;
use crate::image::{Image, check_output, read_config};
use crate::limits::{
    ATTACH_SECONDS_MAX, DETACH_SECONDS_DEFAULT, LAST_WORDS_BYTES_MAX, READY_LINE_BYTES_MAX,
};
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
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

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

/// A config that can be served as asked.
struct Prepared {
    view: ConfigView,
    result_file: Option<ResultFile>,
    order: Order,
    run: RunDir,
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
    let prepared = prepare(options)?;
    let outcome = start_and_wait(options, &prepared).and_then(|attached| {
        announce(&attached).inspect_err(|_| {
            let patience = Duration::from_secs(DETACH_SECONDS_DEFAULT);
            let detached = survey::detach(&prepared.run, &HostKernel, attached.id, patience);
            if let Err(left) = detached {
                tracing::warn!("{left:#}");
            }
        })
    });
    if let Err(error) = &outcome {
        report(prepared.result_file.as_ref(), error);
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
    let prepared = prepare(options)?;
    let (sender, inbox) = channel();
    let housing = Foreground { events: sender.clone(), announce };
    serve(prepared, &Mailbox { sender, inbox }, &housing)
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
    let prepared = prepare(options)?;
    let (sender, inbox) = channel();
    let housing = Started { events: sender.clone(), announced };
    serve(prepared, &Mailbox { sender, inbox }, &housing)
}

fn serve<H: Housing>(prepared: Prepared, mailbox: &Mailbox, housing: &H) -> Result<()> {
    let order = &prepared.order;
    let server = Server {
        order,
        view: &prepared.view,
        result_file: prepared.result_file,
        run: &prepared.run,
        kernel: &HostKernel,
        housing,
    };
    server.serve(mailbox, || Image::open_config(&order.config, order.service_config.as_deref()))
}

/// Reads the config and opens its result file, which hears of everything that fails after that.
fn prepare(options: &AttachOptions) -> Result<Prepared> {
    let folder =
        std::env::current_dir().map_err(|error| Error::io("find out where I am", &error))?;
    let mut order = options.order.clone();
    order.config = folder.join(order.config);
    order.service_config = order.service_config.map(|path| folder.join(path));
    let bytes = read_config(&order.config)?;
    let result_file = config_view::result_file(&bytes, &folder);
    // A config that is wrong otherwise still gets its result file.
    if let (Some(path), Ok(config)) = (&result_file, ImageConfig::parse(&bytes)) {
        check_output(&order.config, &config, path).context(|| "use the resultFile".to_owned())?;
    }
    let result_file = result_file.as_deref().map(ResultFile::open).transpose()?;
    let checked = check(&bytes, &folder, &order, options.read_only);
    if let Err(error) = &checked {
        report(result_file.as_ref(), error);
    }
    Ok(Prepared { view: checked?, result_file, order, run: RunDir::of_host() })
}

fn check(bytes: &[u8], folder: &Path, order: &Order, read_only: bool) -> Result<ConfigView> {
    let view = config_view::parse(bytes, folder)
        .context(|| format!("config {}", order.config.display()))?;
    check_writable(&view, read_only, &order.config)?;
    Ok(view)
}

fn report(result_file: Option<&ResultFile>, error: &Error) {
    if let Some(Err(left)) = result_file.map(|file| file.failed(error)) {
        tracing::warn!("{left:#}");
    }
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
}

impl Housing for Started<'_> {
    fn settle(&self, slot: &Slot) -> Result<Option<PathBuf>> {
        let log = slot.log();
        isolate::log_to(&log)?;
        Ok(Some(log))
    }

    fn leave_mounts(&self, run: &RunDir) -> Result<()> {
        isolate::leave_mounts(&[run.path()])?;
        signals::forward(self.events.clone())
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
}

impl<F: Fn(&Attached) -> Result<()>> Housing for Foreground<F> {
    fn settle(&self, _slot: &Slot) -> Result<Option<PathBuf>> {
        Ok(None)
    }

    fn leave_mounts(&self, run: &RunDir) -> Result<()> {
        isolate::leave_mounts(&[run.path()])?;
        signals::forward(self.events.clone())
    }

    fn announce(&self, id: u32) -> Result<()> {
        (self.announce)(&Attached { id, device: device_path(id) })
    }
}

fn start_and_wait(options: &AttachOptions, prepared: &Prepared) -> Result<Attached> {
    let (mut child, socket) = spawn(options, &prepared.order)?;
    let words = child.stderr.take().map(listen);
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
    let logged = clear_remains(&prepared.run, child.id());
    let said = last_words(&[said.unwrap_or_default(), logged]);
    Err(if late {
        let message = format!("the server was not ready within {ATTACH_SECONDS_MAX} s{said}");
        Error::new(ErrorKind::Timeout, message)
    } else {
        Error::new(ErrorKind::Io, format!("the server died early ({}){said}", how(status)))
    })
}

fn spawn(options: &AttachOptions, order: &Order) -> Result<(Child, UnixStream)> {
    let told = |error: &std::io::Error| Error::io("start a server process", error);
    let (ours, theirs) = UnixStream::pair().map_err(|error| told(&error))?;
    // The path names the process for people; without it (the file was replaced) any name will do.
    let program = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(program.unwrap_or_else(|| "/proc/self/exe".into()));
    command
        .args(arguments(options, order))
        .stdin(Stdio::null())
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::piped());
    let child = command.spawn().map_err(|error| told(&error))?;
    Ok((child, ours))
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
    if options.read_only {
        arguments.push("--read-only".into());
    }
    arguments.extend((0..options.verbosity).map(|_| "-v".into()));
    arguments.extend(["--".into(), order.config.clone().into()]);
    arguments
}

/// Collects what the server says until it closes its standard error; keeps the end of it.
fn listen(mut stderr: ChildStderr) -> std::sync::mpsc::Receiver<Vec<u8>> {
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

fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
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
        };
        let options = AttachOptions { order: order.clone(), read_only: true, verbosity: 2 };
        let line = "serve-device --id 3 --queues 2 --depth 64 --service-config /s --read-only \
                    -v -v -- /c/-v.json";
        let expected: Vec<OsString> = line.split(' ').map(Into::into).collect();
        assert_eq!(arguments(&options, &order), expected);
    }
}
