//! The socket's file: who may connect, and whose file it is.
//!
//! It is only its owner's (mode 0600) from the moment it exists: the mode is set on the socket
//! before it is bound, which Linux takes over to the file. Whoever sees its name can connect: it
//! is bound under another name and gets its own when it listens. A file of somebody else is never
//! removed: what is there is replaced only if it is a socket on which nobody listens, and at the
//! end only our own file goes. Programs that do this at the same time would take each other's
//! sockets for dead ones, so all of it happens under a lock of the folder.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::{SOCKET_LOCK_MS_MAX, SOCKET_PATH_BYTES_MAX};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use std::fs::{File, Metadata, TryLockError};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The file of a socket that we listen on. It disappears with this value, if it is still ours.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    // Device and inode: another file may have our name by now.
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens on a new socket at `path`.
    ///
    /// # Errors
    /// `Busy` when somebody listens there; `Io` with EEXIST when something else is there;
    /// `Usage` for a path that is too long for a socket; otherwise what the system says.
    pub(super) fn listen(path: &Path) -> Result<(UnixListener, Self)> {
        let len = path.as_os_str().as_bytes().len();
        if len > SOCKET_PATH_BYTES_MAX {
            let message = format!(
                "socket path {}: has {len} bytes, at most {SOCKET_PATH_BYTES_MAX}",
                path.display()
            );
            return Err(Error::new(ErrorKind::Usage, message));
        }
        let _lock = lock_folder(path)?;
        let told = |error: &std::io::Error| Error::io(format!("listen on {}", shown(path)), error);
        let unnamed = before_it_listens(path);
        let bound = match bind_new(&unnamed) {
            Err(Errno::EADDRINUSE) => {
                // Of a server that was killed right here.
                remove_if_dead(&unnamed)?;
                bind_new(&unnamed)
            }
            other => other,
        };
        let listener = bound.map_err(|errno| told(&errno.into()))?;
        let named = name(&unnamed, path);
        // It was made a moment ago, under the lock.
        if let Err(error) = std::fs::remove_file(&unnamed) {
            tracing::warn!(%error, "cannot remove {}", shown(&unnamed));
        }
        Ok((listener, Self { path: path.to_owned(), identity: named? }))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Without the lock a socket that was just made there could be taken for ours.
        let _lock = lock_folder(&self.path).inspect_err(|error| tracing::warn!("{error:#}"));
        let found = self.path.symlink_metadata();
        if found.is_ok_and(|metadata| identity(&metadata) == self.identity)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(%error, "cannot remove {}", shown(&self.path));
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn shown(path: &Path) -> String {
    format!("socket {}", path.display())
}

fn new_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

/// The name of a socket that does not listen yet.
fn before_it_listens(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// Gives the socket at `unnamed` the name `path` as well, which a dead socket may have; returns
/// its identity.
fn name(unnamed: &Path, path: &Path) -> Result<(u64, u64)> {
    // Not renamed: that would replace a file that somebody makes right now without our lock.
    let mut linked = std::fs::hard_link(unnamed, path);
    if linked.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::AlreadyExists) {
        remove_if_dead(path)?;
        linked = std::fs::hard_link(unnamed, path);
    }
    let identified = linked.and_then(|()| unnamed.symlink_metadata());
    let told = |error: &std::io::Error| Error::io(format!("listen on {}", shown(path)), error);
    Ok(identity(&identified.map_err(|error| told(&error))?))
}

fn bind_new(path: &Path) -> nix::Result<UnixListener> {
    let socket = new_socket()?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let listening = Backlog::new(128).and_then(|backlog| listen(&socket, backlog));
    if let Err(errno) = listening {
        // It was made a moment ago, under the lock.
        let _ = std::fs::remove_file(path);
        return Err(errno);
    }
    Ok(UnixListener::from(socket))
}

/// Removes a socket on which nobody listens; refuses to touch anything else.
fn remove_if_dead(path: &Path) -> Result<()> {
    let told = |error: &std::io::Error| Error::io(format!("replace {}", shown(path)), error);
    let metadata = path.symlink_metadata().map_err(|error| told(&error))?;
    if !metadata.file_type().is_socket() {
        let error = std::io::Error::from_raw_os_error(libc::EEXIST);
        return Err(Error::io(format!("{} is no socket", path.display()), &error));
    }
    let busy = || Error::new(ErrorKind::Busy, format!("somebody listens on {}", shown(path)));
    match try_connect(path) {
        Err(Errno::ECONNREFUSED) => std::fs::remove_file(path).map_err(|error| told(&error)),
        // Queued, or its queue is full, or it is a socket of another type.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Err(busy()),
        Err(errno) => Err(told(&errno.into())),
    }
}

/// Connects without waiting for room in the listener's queue.
fn try_connect(path: &Path) -> nix::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
}

/// The lock of the folder that `path` is in, until the file is closed.
fn lock_folder(path: &Path) -> Result<File> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let told = |error: &std::io::Error| Error::io(format!("lock {}", folder.display()), error);
    let file = File::open(folder).map_err(|error| told(&error))?;
    let deadline = Instant::now() + Duration::from_millis(SOCKET_LOCK_MS_MAX);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(TryLockError::WouldBlock) => {
                let message = format!("folder {} is locked by another program", folder.display());
                return Err(Error::new(ErrorKind::Busy, message));
            }
            Err(TryLockError::Error(error)) => return Err(told(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    #[test]
    fn the_socket_is_only_its_owners_and_goes_with_its_server() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (listener, file) = SocketFile::listen(&path).unwrap();
        let mode = path.symlink_metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        drop(file);
        assert!(!path.exists());
    }

    /// Scripts wait for the file and connect at once.
    #[test]
    fn whoever_sees_the_socket_can_connect() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        for _ in 0..500 {
            std::thread::scope(|scope| {
                let client = scope.spawn(|| {
                    while path.symlink_metadata().is_err() {}
                    UnixStream::connect(&path)
                });
                let _listening = SocketFile::listen(&path).unwrap();
                client.join().unwrap().unwrap();
            });
        }
    }

    #[test]
    fn a_server_that_was_killed_before_it_listened_is_in_nobodys_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(folder.path().join("s.new")).unwrap());
        let (_listener, _file) = SocketFile::listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        let names: Vec<_> = folder.path().read_dir().unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
        std::fs::write(folder.path().join("t.new"), "precious").unwrap();
        let error = SocketFile::listen(&folder.path().join("t")).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, libc::EEXIST), "{error:#}");
        assert_eq!(std::fs::read(folder.path().join("t.new")).unwrap(), b"precious");
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left by a server that was killed");
        let (_listener, _file) = SocketFile::listen(&path).unwrap();
        let error = SocketFile::listen(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error:#}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_listener_whose_queue_is_full_is_alive() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = new_socket().unwrap();
        bind(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&socket, Backlog::new(0).unwrap()).unwrap();
        let _queued = UnixStream::connect(&path).unwrap();
        assert_eq!(try_connect(&path), Err(Errno::EAGAIN));
        assert_eq!(SocketFile::listen(&path).unwrap_err().kind(), ErrorKind::Busy);
    }

    #[test]
    fn what_is_no_socket_of_ours_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), "precious").unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        std::os::unix::fs::symlink(at("nowhere"), at("dangling")).unwrap();
        drop(UnixListener::bind(at("dead")).unwrap());
        std::os::unix::fs::symlink(at("dead"), at("link")).unwrap();
        for name in ["file", "folder", "dangling", "link"] {
            let error = SocketFile::listen(&at(name)).unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, libc::EEXIST), "{name}");
            assert!(at(name).symlink_metadata().is_ok(), "{name}");
        }
        assert_eq!(std::fs::read(at("file")).unwrap(), b"precious");
        assert!(at("dead").symlink_metadata().is_ok());
        let _other = UnixDatagram::bind(at("datagram")).unwrap();
        let error = SocketFile::listen(&at("datagram")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error:#}");
    }

    #[test]
    fn a_socket_that_replaced_ours_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (_listener, file) = SocketFile::listen(&path).unwrap();
        // Made before ours is removed: the file system would reuse the inode's number.
        let other = UnixListener::bind(folder.path().join("t")).unwrap();
        std::fs::rename(folder.path().join("t"), &path).unwrap();
        drop(file);
        UnixStream::connect(&path).unwrap();
        drop(other);
    }

    #[test]
    fn of_many_servers_that_start_at_once_one_wins() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> =
                (0..8).map(|_| scope.spawn(|| SocketFile::listen(&path))).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        assert_eq!((won.len(), lost.len()), (1, 7));
        for error in lost.into_iter().filter_map(Result::err) {
            assert_eq!(error.kind(), ErrorKind::Busy, "{error:#}");
        }
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_told_with_its_bound() {
        let path = Path::new("/tmp").join("x".repeat(SOCKET_PATH_BYTES_MAX));
        let error = SocketFile::listen(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().ends_with("has 108 bytes, at most 103"), "{error:#}");
        let error = SocketFile::listen(Path::new("/nonexistent-folder/s")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error:#}");
    }
}
