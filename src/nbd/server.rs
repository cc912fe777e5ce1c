//! The listener, its clients' threads, and how all of them end.
//!
//! One thread takes clients; each gets a thread, a reader and a buffer of its own, so that none
//! waits for another. The list of who is connected is what bounds them and what ends them.

use super::protocol::Export;
use super::session::{self, Shared};
use super::socket::SocketFile;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{NBD_CONNECTIONS_MAX, NBD_STOP_MS_MAX};
use crate::units::sectors_to_bytes;
use nix::sys::socket::{Shutdown, shutdown};
use std::collections::HashMap;
use std::net::Shutdown as StreamShutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a client that was hung up on has to notice: its thread only has to wake up.
const HANG_UP_PATIENCE: Duration = Duration::from_millis(500);

/// A disk that is served to NBD clients.
#[derive(Debug)]
pub struct Server {
    file: SocketFile,
    listener: Arc<UnixListener>,
    clients: Arc<Clients>,
    acceptor: JoinHandle<()>,
    export: Export,
}

impl Server {
    /// Serves `disk` on a new socket at `path`; returns once clients can connect. Start it after
    /// the process has forked, not before: threads do not survive a fork.
    ///
    /// # Errors
    /// `Busy` when somebody listens at `path`; `Io` when something else is there; otherwise what
    /// the operating system says.
    pub fn start<D: Disk>(disk: D, path: &Path) -> Result<Self> {
        let export = export_of(&disk)?;
        let (listener, file) = SocketFile::listen(path)?;
        let listener = Arc::new(listener);
        let clients = Arc::new(Clients::default());
        let shared = Arc::new(Shared { disk, export, errors: AtomicU64::new(0) });
        let (heard, known) = (Arc::clone(&listener), Arc::clone(&clients));
        let acceptor = std::thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || accept(&heard, &known, &shared))
            .map_err(|error| Error::io("start the NBD server", &error))?;
        Ok(Self { file, listener, clients, acceptor, export })
    }

    /// What clients are told of the disk.
    #[must_use]
    pub fn export(&self) -> Export {
        self.export
    }

    /// Takes no more clients, lets the requests in flight finish, and hangs up. After
    /// [`NBD_STOP_MS_MAX`] it hangs up on those that are not done. The socket's file is gone when
    /// this returns; a thread that is stuck in a read of its disk is left to the process's end.
    pub fn stop(self) {
        let Self { file, listener, clients, acceptor, .. } = self;
        clients.ending.store(true, Ordering::SeqCst);
        drop(file);
        // Wakes the acceptor. With it gone, the list of clients only gets shorter.
        let _ = shutdown(listener.as_raw_fd(), Shutdown::Both);
        let _ = acceptor.join();
        // What they have sent is still read and answered; then they look like clients that left.
        clients.shut_down(StreamShutdown::Read);
        if clients.wait_until_gone(Duration::from_millis(NBD_STOP_MS_MAX)) {
            return;
        }
        clients.shut_down(StreamShutdown::Both);
        if !clients.wait_until_gone(HANG_UP_PATIENCE) {
            tracing::warn!("NBD requests are still being read; giving them up");
        }
    }
}

fn export_of<D: Disk>(disk: &D) -> Result<Export> {
    let geometry = disk.geometry();
    let size_bytes = sectors_to_bytes(geometry.sectors).ok_or_else(|| {
        let message = format!("a disk of {} sectors is too large", geometry.sectors);
        Error::new(ErrorKind::Unsupported, message)
    })?;
    let (preferred_bytes, read_only) = (geometry.optimal_io_bytes, geometry.read_only);
    Ok(Export { size_bytes, preferred_bytes, read_only })
}

fn accept<D: Disk>(listener: &UnixListener, clients: &Arc<Clients>, shared: &Arc<Shared<D>>) {
    while !clients.ending.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, _)) => welcome(stream, clients, shared),
            Err(_) if clients.ending.load(Ordering::SeqCst) => return,
            Err(error) => {
                tracing::warn!(%error, "nbd: accept");
                // Out of descriptors, most likely: give somebody time to close one.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Gives a client its thread, or hangs up on it at once: better than a client that waits for
/// somebody else to leave and does not know it.
fn welcome<D: Disk>(stream: UnixStream, clients: &Arc<Clients>, shared: &Arc<Shared<D>>) {
    let Some(seat) = clients.seat(stream) else {
        let refused = clients.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if refused.is_power_of_two() {
            tracing::warn!(refused, "nbd: {NBD_CONNECTIONS_MAX} clients are connected, no more");
        }
        return;
    };
    let shared = Arc::clone(shared);
    let name = format!("nbd-{}", seat.number);
    let spawned = std::thread::Builder::new().name(name).spawn(move || {
        tracing::debug!(client = seat.number, "nbd: connected");
        match session::serve(&seat.stream, &shared) {
            Ok(()) => tracing::debug!(client = seat.number, "nbd: left"),
            Err(error) => tracing::info!(client = seat.number, "nbd: hung up: {error:#}"),
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "nbd: no thread for a client");
    }
}

/// Who is connected.
#[derive(Debug, Default)]
struct Clients {
    ending: AtomicBool,
    /// Clients that found no seat.
    refused: AtomicU64,
    list: Mutex<List>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct List {
    next_number: u64,
    streams: HashMap<u64, Arc<UnixStream>>,
}

impl Clients {
    /// The client's place in the list; `None` when there is no room.
    fn seat(self: &Arc<Self>, stream: UnixStream) -> Option<Seat> {
        let mut list = self.locked();
        if list.streams.len() >= NBD_CONNECTIONS_MAX {
            return None;
        }
        let number = list.next_number;
        list.next_number += 1;
        let stream = Arc::new(stream);
        list.streams.insert(number, Arc::clone(&stream));
        drop(list);
        Some(Seat { number, stream, clients: Arc::clone(self) })
    }

    fn shut_down(&self, how: StreamShutdown) {
        for stream in self.locked().streams.values() {
            // It may have gone by itself.
            let _ = stream.shutdown(how);
        }
    }

    /// Whether all clients have gone within `patience`.
    fn wait_until_gone(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut list = self.locked();
        while !list.streams.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            list = self.left.wait_timeout(list, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn locked(&self) -> MutexGuard<'_, List> {
        // A list is whole between any two of its operations.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place; left when dropped, whatever became of the thread.
#[derive(Debug)]
struct Seat {
    number: u64,
    stream: Arc<UnixStream>,
    clients: Arc<Clients>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        // The list's copy of the socket would keep it open behind a client that was hung up on.
        let _ = self.stream.shutdown(StreamShutdown::Both);
        self.clients.locked().streams.remove(&self.number);
        self.clients.left.notify_all();
    }
}

#[cfg(test)]
mod tests;
