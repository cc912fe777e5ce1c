//! Packets between our own processes: some bytes and some open files each.
//!
//! A Unix socket of the SEQPACKET kind: a packet arrives whole or not at all, with its files, and
//! the other end's death is an end of file. Both ends are ours and run as root; the sizes are
//! limited all the same.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::{PACKET_BYTES_MAX, PACKET_FILES_MAX};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// One packet as it was received.
#[derive(Debug, Default)]
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    pub(super) files: Vec<OwnedFd>,
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct PacketSocket(OwnedFd);

fn failed(action: &'static str) -> impl Fn(rustix::io::Errno) -> Error {
    move |errno| Error::io(action, &errno.into())
}

fn new_socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(failed("make a socket"))
}

fn address(path: &Path) -> Result<SocketAddrUnix> {
    let told = |errno: rustix::io::Errno| {
        Error::io(format!("use {} as a socket", path.display()), &errno.into())
    };
    SocketAddrUnix::new(path).map_err(told)
}

impl PacketSocket {
    /// Two connected ends.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn pair() -> Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map(|(one, other)| (Self(one), Self(other)))
            .map_err(failed("make a pair of sockets"))
    }

    /// Connects to whoever listens at `path`.
    ///
    /// # Errors
    /// `NotFound` when nobody does.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let socket = new_socket()?;
        rustix::net::connect(&socket, &address(path)?).map_err(|errno| {
            let message = format!("nobody listens at {}: {errno}", path.display());
            Error::new(ErrorKind::NotFound, message)
        })?;
        Ok(Self(socket))
    }

    /// The connection that another process left in this descriptor.
    pub(super) fn from_file(file: OwnedFd) -> Self {
        Self(file)
    }

    /// The descriptor, to leave it to another process.
    pub(super) fn into_file(self) -> OwnedFd {
        self.0
    }

    /// A second handle on the same connection.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn try_clone(&self) -> Result<Self> {
        self.0.try_clone().map(Self).map_err(|error| Error::io("duplicate a socket", &error))
    }

    /// Limits how long one send or receive may take; for ever without.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn set_patience(&self, patience: Option<Duration>) -> Result<()> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        let set = |which| set_socket_timeout(&self.0, which, patience);
        set(Timeout::Recv)
            .and_then(|()| set(Timeout::Send))
            .map_err(failed("set the patience of a socket"))
    }

    /// Ends the connection for every handle on it, here and there.
    pub(super) fn end(&self) {
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }

    /// The user at the other end.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn peer_uid(&self) -> Result<u32> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.0);
        credentials.map(|it| it.uid.as_raw()).map_err(failed("ask for the peer's credentials"))
    }

    /// Sends one packet.
    ///
    /// # Errors
    /// `Canceled` when the other end is gone, `Timeout` when it does not take it.
    pub(super) fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> Result<()> {
        debug_assert!(bytes.len() <= PACKET_BYTES_MAX && files.len() <= PACKET_FILES_MAX);
        let mut space = [MaybeUninit::uninit(); SPACE_BYTES];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            let message = format!("{} files in one packet", files.len());
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        let flags = SendFlags::NOSIGNAL;
        loop {
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(gone("send a packet", errno)),
            }
        }
    }

    /// Waits for the next packet; `None` when the other end is gone.
    ///
    /// # Errors
    /// `Timeout` after the patience, `Corrupt` for a packet beyond the limits.
    pub(super) fn receive(&self) -> Result<Option<Packet>> {
        let mut bytes = vec![0; PACKET_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); SPACE_BYTES];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut into = [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(&self.0, &mut into, &mut control, flags) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(gone("receive a packet", errno)),
            }
        };
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                files.extend(received);
            }
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            let message = format!("a packet of more than {PACKET_BYTES_MAX} bytes");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            // No descriptors were left. Some of a parcel's files are of no use; the connection, by
            // which deaths are seen, is.
            tracing::warn!("a packet's files were lost: too many are open");
            files.clear();
        }
        // Nobody sends empty packets: an empty one is the end of file.
        bytes.truncate(received.bytes);
        Ok((received.bytes > 0).then_some(Packet { bytes, files }))
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Room for the files of one packet.
const SPACE_BYTES: usize = rustix::cmsg_space!(ScmRights(PACKET_FILES_MAX));

fn gone(action: &'static str, errno: rustix::io::Errno) -> Error {
    use rustix::io::Errno;
    match errno {
        Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => {
            Error::new(ErrorKind::Canceled, format!("{action}: the other end is gone"))
        }
        Errno::AGAIN => Error::new(ErrorKind::Timeout, format!("{action}: none in time")),
        errno => Error::io(action, &errno.into()),
    }
}

/// A socket that others connect to.
#[derive(Debug)]
pub(super) struct PacketListener(OwnedFd);

impl PacketListener {
    /// Listens at `path`, which must not exist.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn bind(path: &Path) -> Result<Self> {
        /// Servers that may come at the same time: after the death of a supervisor, all of them.
        const BACKLOG: i32 = 1024;
        let told = |errno: rustix::io::Errno| {
            Error::io(format!("listen at {}", path.display()), &errno.into())
        };
        let socket = new_socket()?;
        rustix::net::bind(&socket, &address(path)?).map_err(told)?;
        rustix::net::listen(&socket, BACKLOG).map_err(told)?;
        Ok(Self(socket))
    }

    /// The next connection. Blocks until there is one.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn accept(&self) -> Result<PacketSocket> {
        rustix::net::accept_with(&self.0, SocketFlags::CLOEXEC)
            .map(PacketSocket)
            .map_err(failed("accept a connection"))
    }
}

impl AsFd for PacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    #[test]
    fn bytes_and_open_files_arrive_together() {
        let (one, other) = PacketSocket::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        one.send(b"first", &[file.as_fd(), one.as_fd()]).unwrap();
        one.send(b"second", &[]).unwrap();
        let packet = other.receive().unwrap().unwrap();
        assert_eq!((packet.bytes.as_slice(), packet.files.len()), (&b"first"[..], 2));
        let mut received = File::from(packet.files.into_iter().next().unwrap());
        received.rewind().unwrap();
        let mut text = String::new();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        assert_eq!(other.receive().unwrap().unwrap().bytes, b"second");
        drop(one);
        assert!(other.receive().unwrap().is_none(), "the file held the other end open");
        assert_eq!(other.send(b"x", &[]).unwrap_err().kind(), ErrorKind::Canceled);
    }

    #[test]
    fn as_many_files_as_allowed_fit_and_no_more() {
        let (one, other) = PacketSocket::pair().unwrap();
        let files = vec![one.as_fd(); PACKET_FILES_MAX];
        one.send(b"many", &files).unwrap();
        assert_eq!(other.receive().unwrap().unwrap().files.len(), PACKET_FILES_MAX);
    }

    #[test]
    fn silence_ends_at_the_patience() {
        let (_one, other) = PacketSocket::pair().unwrap();
        other.set_patience(Some(Duration::from_millis(20))).unwrap();
        assert_eq!(other.receive().unwrap_err().kind(), ErrorKind::Timeout);
    }

    #[test]
    fn nobody_listens_where_nobody_listens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        assert_eq!(PacketSocket::connect(&path).unwrap_err().kind(), ErrorKind::NotFound);
        let listener = PacketListener::bind(&path).unwrap();
        let client = PacketSocket::connect(&path).unwrap();
        let server = listener.accept().unwrap();
        assert_eq!(server.peer_uid().unwrap(), nix::unistd::geteuid().as_raw());
        client.send(b"hello", &[]).unwrap();
        assert_eq!(server.receive().unwrap().unwrap().bytes, b"hello");
        drop((listener, server));
        // Its socket is still there.
        assert_eq!(PacketSocket::connect(&path).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
