//! The server's end of the control socket.
//!
//! One thread takes one client after the other. A client has [`CONTROL_CLIENT_MS_MAX`] to send its
//! line and to take its reply, so a slow one delays the others but blocks nobody. The thread
//! decides nothing: requests about the device go to the server's own loop as events, which answers
//! them between its other work.
//!
//! Only root, or whoever runs the server, is listened to.

use super::protocol::{self, DeviceStat, Op, Reply};
use super::served::StopMode;
use super::snapshot::{After, Leftovers, SnapshotOrder, SnapshotReport};
use super::supervisor::Link;
use super::wire;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{CONTROL_CLIENT_MS_MAX, CONTROL_REQUEST_BYTES_MAX};
use nix::sys::socket::{Shutdown, UnixCredentials, getsockopt, shutdown, sockopt::PeerCredentials};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// What the server's loop is told.
#[derive(Debug)]
pub(super) enum Event {
    /// A signal asked for the end; its name.
    Signal(&'static str),
    /// A client asks for the end.
    Stop(StopMode, Sender<Result<()>>),
    /// A client asks for the counters.
    Stat(Sender<DeviceStat>),
    /// The image was opened, or not.
    Opened,
    /// The device is over.
    Gone,
    /// The supervisor has another process ready to take the device over.
    Yield,
    /// The supervisor is gone.
    Orphaned,
    /// Another supervisor was found, or none.
    Relinked(Option<Link>),
    /// A client, this process, asks for a snapshot.
    Snapshot(SnapshotWish),
    /// A snapshot was taken, or not.
    Snapshotted(Box<Snapshotted>),
    /// A client asks for a larger disk.
    Resize(ResizeWish),
    /// The disk is larger, or not.
    Resized(Box<Resized>),
}

/// A resize that somebody waits for.
#[derive(Debug)]
pub(super) struct ResizeWish {
    /// The new size.
    pub(super) bytes: u64,
    /// Gets the size before.
    pub(super) answer: Sender<Result<u64>>,
}

/// How a resize of the upper went.
#[derive(Debug)]
pub(super) struct Resized {
    pub(super) bytes: u64,
    /// The size before.
    pub(super) grown: Result<u64>,
    pub(super) answer: Sender<Result<u64>>,
}

/// A snapshot that somebody waits for.
#[derive(Debug)]
pub(super) struct SnapshotWish {
    pub(super) order: Box<SnapshotOrder>,
    /// In whose mounts its paths are.
    pub(super) pid: i32,
    pub(super) answer: Sender<Result<SnapshotReport>>,
}

/// How a snapshot went.
#[derive(Debug)]
pub(super) struct Snapshotted {
    pub(super) outcome: Result<(SnapshotReport, After, Leftovers)>,
    pub(super) answer: Sender<Result<SnapshotReport>>,
}

const PATIENCE: Duration = Duration::from_millis(CONTROL_CLIENT_MS_MAX);

/// A listening control socket and its thread.
#[derive(Debug)]
pub(super) struct ControlSocket {
    path: PathBuf,
    ending: Arc<AtomicBool>,
    // The socket that the thread waits on: shutting it down ends the wait.
    listener: Arc<UnixListener>,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Listens at `path`, which must not exist. Requests go to `events`.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn listen(path: &Path, events: Sender<Event>) -> Result<Self> {
        let told = |error: &std::io::Error| {
            Error::io(format!("listen on control socket {}", path.display()), error)
        };
        let listener = Arc::new(UnixListener::bind(path).map_err(|error| told(&error))?);
        let heard = Arc::clone(&listener);
        let ending = Arc::new(AtomicBool::new(false));
        let ending_seen = Arc::clone(&ending);
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&heard, &events, &ending_seen))
            .map_err(|error| told(&error))?;
        Ok(Self { path: path.to_owned(), ending, listener, thread: Some(thread) })
    }

    /// Takes no more clients and returns when the last one has its reply.
    pub(super) fn close(mut self) {
        self.ending.store(true, Ordering::SeqCst);
        // Wakes the thread from its wait for clients. Not by calling it: the socket's folder may be
        // gone already, and its path with it.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn accept(listener: &UnixListener, events: &Sender<Event>, ending: &AtomicBool) {
    while !ending.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((client, _)) => serve(client, events),
            Err(_) if ending.load(Ordering::SeqCst) => return,
            Err(error) => {
                tracing::warn!(%error, "control socket: accept");
                // Out of descriptors, most likely: give somebody time to close one.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn serve(client: UnixStream, events: &Sender<Event>) {
    if let Err(error) = check_peer(&client) {
        tracing::warn!("control socket: {error:#}");
        return;
    }
    let op = match wire::read_line(&client, CONTROL_REQUEST_BYTES_MAX, PATIENCE) {
        // Nothing was asked: a port scan, or our own waking call.
        Err(wire::LineError::CutOff(0)) => return,
        Err(error) => Err(error.tell("control request")),
        Ok(line) => protocol::parse_request(&line),
    };
    match op {
        // It may take long, if much is to be flushed: others are not to wait for it. There is never
        // more than one that is not refused at once.
        Ok(op @ (Op::Snapshot(_) | Op::Resize(_))) => {
            let events = events.clone();
            let work = move || reply_to(&client, ask(op, &client, &events));
            let spawned = std::thread::Builder::new().name("control".to_owned()).spawn(work);
            if let Err(error) = spawned {
                tracing::warn!(%error, "control socket: no thread for a request");
            }
        }
        op => reply_to(&client, op.and_then(|op| ask(op, &client, events))),
    }
}

fn reply_to(client: &UnixStream, outcome: Result<Reply>) {
    let reply = outcome.unwrap_or_else(|error| Reply::refused(&error));
    if let Err(error) = wire::write_line(client, &protocol::encode_reply(&reply), PATIENCE) {
        tracing::debug!(%error, "control socket: the client left before its reply");
    }
}

/// Carries a request to the server's loop and its answer back.
fn ask(op: Op, client: &UnixStream, events: &Sender<Event>) -> Result<Reply> {
    let ending = || Error::new(ErrorKind::Canceled, "the server is ending");
    match op {
        Op::Ping => Ok(Reply::done()),
        Op::Stat => {
            let (answer, answered) = channel();
            events.send(Event::Stat(answer)).map_err(|_| ending())?;
            let stat = answered.recv_timeout(PATIENCE).map_err(|_| ending())?;
            Ok(Reply::stat(stat))
        }
        Op::Stop | Op::StopLazy | Op::StopForce => {
            let mode = match op {
                Op::StopLazy => StopMode::Lazy,
                Op::StopForce => StopMode::Force,
                _ => StopMode::Polite,
            };
            let (answer, answered) = channel();
            events.send(Event::Stop(mode, answer)).map_err(|_| ending())?;
            // The loop has its own deadlines for the kernel; it always answers or goes away.
            answered.recv().map_err(|_| ending())??;
            Ok(Reply::done())
        }
        Op::Snapshot(order) => {
            let pid = credentials(client)?.pid();
            let (answer, answered) = channel();
            let wish = SnapshotWish { order, pid, answer };
            events.send(Event::Snapshot(wish)).map_err(|_| ending())?;
            // It ends: writes in flight have a deadline, and files no more than others have.
            answered.recv().map_err(|_| ending())?.map(Reply::snapshot)
        }
        Op::Resize(bytes) => {
            let (answer, answered) = channel();
            events.send(Event::Resize(ResizeWish { bytes, answer })).map_err(|_| ending())?;
            answered.recv().map_err(|_| ending())?.map(Reply::resized)
        }
    }
}

fn credentials(client: &UnixStream) -> Result<UnixCredentials> {
    getsockopt(client, PeerCredentials)
        .map_err(|errno| Error::io("ask for the peer's credentials", &errno.into()))
}

fn check_peer(client: &UnixStream) -> Result<()> {
    let peer = credentials(client)?;
    let me = nix::unistd::geteuid().as_raw();
    if peer.uid() == 0 || peer.uid() == me {
        return Ok(());
    }
    let message = format!("process {} of user {} is not listened to", peer.pid(), peer.uid());
    Err(Error::new(ErrorKind::Usage, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::client;
    use std::io::{Read, Write};
    use std::sync::mpsc::Receiver;
    use std::time::Instant;

    const PATIENT: Duration = Duration::from_secs(20);

    fn listening() -> (tempfile::TempDir, PathBuf, ControlSocket, Receiver<Event>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let (events, inbox) = channel();
        let socket = ControlSocket::listen(&path, events).unwrap();
        (folder, path, socket, inbox)
    }

    /// Sends raw bytes, returns what came back.
    fn raw(path: &Path, bytes: &[u8], close: bool) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        // The server may have closed on us already: an oversized request is not read to its end.
        let _ = stream.write_all(bytes);
        if close {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
        String::from_utf8(reply).unwrap()
    }

    /// A server used to hang here: it removed its folder first, and could not call itself then.
    #[test]
    fn closing_ends_the_thread_though_the_folder_is_gone() {
        let (folder, _path, socket, _inbox) = listening();
        // Until the thread waits for clients.
        std::thread::sleep(Duration::from_millis(50));
        folder.close().unwrap();
        socket.close();
    }

    #[test]
    fn a_client_is_answered_and_garbage_is_refused() {
        let (_folder, path, socket, _inbox) = listening();
        client::request(&path, Op::Ping, PATIENT).unwrap();
        for (bytes, told) in [
            (&b"\n"[..], "EOF while parsing"),
            (b"\xff\xfe\n", "control request: "),
            (b"{\"v\":1,\"op\":\"ping\"", "cut off after 18 bytes"),
            (b"{\"v\":7,\"op\":\"ping\"}\n", "v: found 7, expected 1"),
        ] {
            let reply = raw(&path, bytes, true);
            assert!(reply.contains(told), "{reply}");
            assert!(reply.contains("\"error\""), "{reply}");
        }
        assert_eq!(raw(&path, b"", true), "");
        client::request(&path, Op::Ping, PATIENT).unwrap();
        socket.close();
        assert!(!path.exists());
    }

    #[test]
    fn an_oversized_request_is_refused_without_being_read() {
        let (_folder, path, _socket, _inbox) = listening();
        let reply = raw(&path, &vec![b' '; 1 << 17], false);
        // The kernel may drop the reply when unread bytes are left; the next client counts.
        assert!(reply.is_empty() || reply.contains("too long"), "{reply}");
        client::request(&path, Op::Ping, PATIENT).unwrap();
    }

    #[test]
    fn a_client_that_says_nothing_delays_the_next_but_does_not_stop_it() {
        let (_folder, path, _socket, _inbox) = listening();
        let silent = UnixStream::connect(&path).unwrap();
        let start = Instant::now();
        client::request(&path, Op::Ping, PATIENT).unwrap();
        assert!(start.elapsed() >= PATIENCE / 2, "the clients are served in turn");
        drop(silent);
    }

    #[test]
    fn a_stop_is_answered_by_the_servers_loop() {
        let (_folder, path, socket, inbox) = listening();
        let server = std::thread::spawn(move || {
            for outcome in [Err(Error::new(ErrorKind::Busy, "mounted")), Ok(())] {
                let Event::Stop(StopMode::Polite, answer) = inbox.recv().unwrap() else {
                    panic!("no stop")
                };
                answer.send(outcome).unwrap();
            }
        });
        let error = client::request(&path, Op::Stop, PATIENT).unwrap_err();
        assert_eq!((error.kind(), error.exit_code()), (ErrorKind::Busy, 12));
        client::request(&path, Op::Stop, PATIENT).unwrap();
        server.join().unwrap();
        // With the loop gone there is nobody to ask.
        let error = client::request(&path, Op::Stop, PATIENT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Canceled);
        socket.close();
    }
}
