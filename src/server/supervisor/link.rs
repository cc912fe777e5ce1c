//! A server's end of its connection to the supervisor.
//!
//! The connection is the server's life line: the kernel closes it with the process, whatever ends
//! that, and the supervisor reads an end of file. The other way round it tells the server that the
//! supervisor died; then the server starts another one and hands it the same parcel.

use super::policy::{Way, way};
use super::socket_path;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::PACKET_FILES_MAX;
use crate::server::control::Event;
use crate::server::packet::{Packet, PacketSocket};
use crate::server::process::Process;
use crate::server::protocol::notes::Note;
use crate::server::run_dir::{RUN_DIR_VARIABLE, RunDir};
use crate::server::systemd;
use std::fs::{File, OpenOptions, TryLockError};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// The hidden command by which the program runs itself as the supervisor.
pub const SUPERVISE_COMMAND: &str = "supervise";

/// How long a supervisor may take from its start to its first answer: an exec, on a host where
/// hundreds of attaches are at it as well.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// How long one note may take to be sent, or answered: in a storm of attaches the supervisor gets
/// its turn late (ten seconds were too short for 64 at once in an emulated guest).
const NOTE_PATIENCE: Duration = Duration::from_secs(60);

/// The pause between two starts of a supervisor.
const START_PAUSE: Duration = Duration::from_secs(1);

/// The pause between two attempts at a supervisor that is starting.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// Everything that a successor needs of an image, as open files. Opaque here.
pub(in crate::server) type ParcelFiles = Vec<OwnedFd>;

/// The connection of the server of one device.
#[derive(Debug)]
pub(in crate::server) struct Link {
    socket: PacketSocket,
}

impl Link {
    /// Tells the supervisor of `run` that this process is about to serve device `id`; starts a
    /// supervisor if there is none.
    ///
    /// # Errors
    /// `Timeout` when no supervisor answers, and what keeps one from being started.
    pub(in crate::server) fn open(run: &RunDir, id: u32) -> Result<Self> {
        let note = Note::Guard { id, server: Process::current() };
        let socket = converse(run, |socket| match ask(socket, &note, &[])? {
            Note::Guarded => Ok(()),
            other => Err(unexpected(&other)),
        });
        let (socket, ()) = socket.context(|| "reach the supervisor".to_owned())?;
        Ok(Self { socket })
    }

    /// The connection that a supervisor gave its successor process.
    pub(in crate::server) fn given(socket: PacketSocket) -> Self {
        Self { socket }
    }

    /// A second handle on the same connection.
    ///
    /// # Errors
    /// What the operating system says.
    pub(in crate::server) fn try_clone(&self) -> Result<Self> {
        Ok(Self { socket: self.socket.try_clone()? })
    }

    /// Says one thing; no answer is waited for.
    ///
    /// # Errors
    /// `Canceled` when the supervisor is gone.
    pub(in crate::server) fn say(&self, note: &Note) -> Result<()> {
        self.socket.send(&note.encode(), &[])
    }

    /// Hands over what a successor will need.
    ///
    /// # Errors
    /// As [`Link::say`].
    pub(in crate::server) fn entrust(&self, parcel: &ParcelFiles) -> Result<()> {
        send_parcel(&self.socket, parcel)
    }

    /// Waits for what the supervisor says; `None` when it is gone.
    ///
    /// # Errors
    /// As [`PacketSocket::receive`].
    pub(in crate::server) fn hear(&self) -> Result<Option<(Note, Vec<OwnedFd>)>> {
        self.socket.receive()?.map(open_packet).transpose()
    }

    /// Lets go of the supervisor: nothing is left to guard.
    pub(in crate::server) fn end(&self) {
        self.socket.end();
    }

    /// Starts the thread that turns what the supervisor says into events.
    ///
    /// # Errors
    /// When no thread can be had.
    pub(in crate::server) fn listen(&self, events: Sender<Event>) -> Result<()> {
        let link = self.try_clone()?;
        link.socket.set_patience(None)?;
        let wait = move || {
            while let Ok(Some((note, _))) = link.hear() {
                if note == Note::Yield && events.send(Event::Yield).is_err() {
                    return;
                }
            }
            let _ = events.send(Event::Orphaned);
        };
        let spawned = std::thread::Builder::new().name("supervision".to_owned()).spawn(wait);
        spawned.map(drop).map_err(|error| Error::io("start the supervision thread", &error))
    }
}

/// Sends a parcel in as many packets as it takes: one for an empty parcel, too.
pub(super) fn send_parcel(socket: &PacketSocket, parcel: &ParcelFiles) -> Result<()> {
    if parcel.is_empty() {
        return socket.send(&Note::Parcel { last: true }.encode(), &[]);
    }
    let packets = parcel.len().div_ceil(PACKET_FILES_MAX);
    for (index, files) in (1..).zip(parcel.chunks(PACKET_FILES_MAX)) {
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        socket.send(&Note::Parcel { last: index == packets }.encode(), &files)?;
    }
    Ok(())
}

pub(super) fn open_packet(packet: Packet) -> Result<(Note, Vec<OwnedFd>)> {
    Ok((Note::parse(&packet.bytes)?, packet.files))
}

/// Sends a note and waits for the answer. A refusal is an error.
fn ask(socket: &PacketSocket, note: &Note, files: &[BorrowedFd<'_>]) -> Result<Note> {
    socket.send(&note.encode(), files)?;
    let Some(packet) = socket.receive()? else {
        return Err(Error::new(ErrorKind::Canceled, "the supervisor went away"));
    };
    match open_packet(packet)?.0 {
        Note::Refused { error } => Err(error.to_error()),
        answer => Ok(answer),
    }
}

fn unexpected(note: &Note) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the supervisor answered {note:?}"))
}

/// Asks the supervisor of `run`, starting one if there is none.
///
/// # Errors
/// Its refusal; `Timeout` when it does not answer within `patience`.
pub(in crate::server) fn request(
    run: &RunDir,
    note: &Note,
    files: &[BorrowedFd<'_>],
    patience: Duration,
) -> Result<Note> {
    // The greeting may be lost on a supervisor that is ending; the request itself is sent once.
    let (socket, ()) = converse(run, |socket| ask(socket, &Note::Ping, &[]).map(drop))?;
    socket.set_patience(Some(patience))?;
    ask(&socket, note, files)
}

/// Waits, after one has retired, until the servers have started another supervisor: of their own
/// program, which is why none is started here.
///
/// # Errors
/// `Timeout` after `patience`.
pub(in crate::server) fn wait_for_another(run: &RunDir, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let answered = PacketSocket::connect(&socket_path(run)).and_then(|socket| {
            socket.set_patience(Some(NOTE_PATIENCE.min(patience)))?;
            ask(&socket, &Note::Ping, &[])
        });
        match answered {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= deadline => {
                let message = format!("no other supervisor came: {error:#}");
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            Err(_) => std::thread::sleep(LOOK_PAUSE),
        }
    }
}

/// Connects to the supervisor and has `first` speak with it. Whatever says that there is none, or
/// that it just went away, leads to another attempt.
fn converse<T>(
    run: &RunDir,
    first: impl Fn(&PacketSocket) -> Result<T>,
) -> Result<(PacketSocket, T)> {
    let deadline = Instant::now() + START_PATIENCE;
    let systemd_rules = systemd::is_booted();
    // Of one that was killed the socket is left, and systemd starts it again: no need for a
    // thousand servers to do so.
    let was_killed = systemd_rules && socket_path(run).exists();
    let wait = if was_killed { systemd::RESTART_PATIENCE } else { Duration::ZERO };
    let mut start_at = Instant::now() + wait;
    let mut starts = 0;
    let mut turn = None;
    loop {
        let attempt = PacketSocket::connect(&socket_path(run)).and_then(|socket| {
            socket.set_patience(Some(NOTE_PATIENCE))?;
            first(&socket).map(|said| (socket, said))
        });
        let error = match attempt {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Canceled) => {
                error
            }
            outcome => return outcome,
        };
        if Instant::now() >= deadline {
            let seconds = START_PATIENCE.as_secs();
            let message = format!("no supervisor within {seconds} s: {error:#}");
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        // One that is ending may still hold the lock: ours ends at once then, and is started again.
        if Instant::now() >= start_at {
            // Kept until there is one, or the patience is over.
            turn = turn.or(turn_to_start(run)?);
            if turn.is_some() {
                start_supervisor(run, way(systemd_rules, starts))?;
                starts += 1;
            }
            start_at = Instant::now() + START_PAUSE;
        }
        std::thread::sleep(LOOK_PAUSE);
    }
}

/// The right to start a supervisor, if nobody else has it: of many servers that miss one at once,
/// one starts it. (In an emulated guest of two processors, 64 that each did so every second
/// kept all of them from an answer for a minute.) Held as long as the file is open.
fn turn_to_start(run: &RunDir) -> Result<Option<File>> {
    run.prepare()?;
    let log = open_log(run)?;
    match log.try_lock() {
        Ok(()) => Ok(Some(log)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(Error::io("lock the supervisor's log", &error)),
    }
}

/// The file that the words of a supervisor go to.
fn open_log(run: &RunDir) -> Result<File> {
    let path = run.path().join("supervisor.log");
    let mut options = OpenOptions::new();
    options
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(|error| Error::io(format!("open {}", path.display()), &error))
}

/// Starts a supervisor process. Two that are started at the same time settle it by a lock.
fn start_supervisor(run: &RunDir, way: Way) -> Result<()> {
    if way == Way::Service {
        match systemd::start_supervisor(run, SUPERVISE_COMMAND) {
            Ok(()) => return Ok(()),
            Err(why) => tracing::warn!("the supervisor gets no unit of its own: {why}"),
        }
    }
    // Another description than the one that is locked: the child's lives as long as itself.
    let log = open_log(run)?;
    let mut child = Command::new("/proc/self/exe")
        .arg(SUPERVISE_COMMAND)
        .env(RUN_DIR_VARIABLE, run.path())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(|error| Error::io("start a supervisor process", &error))?;
    // Reaped by this thread, or by whoever inherits it from this process.
    std::thread::spawn(move || child.wait());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_who_miss_a_supervisor_one_starts_it() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::at(folder.path().join("run"));
        let turn = turn_to_start(&run).unwrap();
        assert!(turn.is_some());
        assert!(turn_to_start(&run).unwrap().is_none());
        drop(turn);
        assert!(turn_to_start(&run).unwrap().is_some());
    }
}
