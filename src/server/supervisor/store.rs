//! What outlives the supervisor, where systemd started it: parcels in the service's descriptor
//! store.
//!
//! A supervisor that dies alone is given every parcel again by the servers. One that dies together
//! with a server finds that server's parcel here, so that its device comes back without its files
//! being opened by name. systemd keeps the descriptors while it starts the service again, and lets
//! go of them when the service ends for good.
//!
//! One descriptor per device is kept, however many layers it has: a socket in which the packets of
//! the parcel wait to be received, its other end closed. systemd compares each new descriptor with
//! all that it has; with one per layer that would be millions of comparisons on a large host.
//!
//! ```text
//!   obd-ublk-N-T   [upgrade N, the server's program] [parcel ...] [parcel, last] end of file
//! ```
//!
//! T is the monotonic clock: of two for one device the later counts. The new one is stored before
//! the old one is removed. All of this is a wish: what cannot be stored is opened anew from the
//! state file. (Formats: sd_notify(3), sd_listen_fds(3); properties: systemd 246 for FDPOLL.)

use super::link::{open_packet, send_parcel};
use super::{Note, PacketSocket, ParcelFiles};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{PARCEL_FILES_MAX, STORED_PARCELS_MAX};
use crate::server::process::monotonic_ns;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// Variables by which systemd speaks to its services; no process of ours inherits them.
pub(super) const SYSTEMD_VARIABLES: [&str; 5] =
    ["NOTIFY_SOCKET", "SYSTEMD_EXEC_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// What the names of our descriptors begin with.
const PREFIX: &str = "obd-ublk-";

/// The first descriptor that systemd hands over (SD_LISTEN_FDS_START).
const FIRST_FILE: RawFd = 3;

/// How long systemd may take to read a message: readers of some device may be waiting for us.
const PATIENCE: Duration = Duration::from_millis(500);

/// What was kept for one device.
#[derive(Debug, Default)]
pub(super) struct Stored {
    /// The program that served it.
    pub(super) program: Option<OwnedFd>,
    /// What its successor needs.
    pub(super) parcel: ParcelFiles,
}

/// The store of this process's service.
#[derive(Debug)]
pub(super) struct DescriptorStore {
    socket: OwnedFd,
    /// The name under which each device's parcel is kept.
    names: BTreeMap<u32, String>,
}

/// What the environment says of descriptors from the store: which they are, and their names.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Given {
    names: Vec<String>,
}

impl Given {
    /// What the environment of this process says.
    pub(super) fn of_environment() -> Self {
        Self::of(std::process::id(), |name| std::env::var_os(name))
    }

    fn of(own_pid: u32, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let text = |name| variable(name).and_then(|value| value.into_string().ok());
        let number = |name| text(name).and_then(|text| text.parse::<u32>().ok());
        // Of somebody else's service, inherited.
        if number("LISTEN_PID") != Some(own_pid) {
            return Self::default();
        }
        let count = number("LISTEN_FDS").and_then(|count| usize::try_from(count).ok());
        let names = text("LISTEN_FDNAMES").unwrap_or_default();
        let names: Vec<String> = names.split(':').map(str::to_owned).collect();
        match count {
            Some(count) if count == names.len() && count <= STORED_PARCELS_MAX => Self { names },
            _ => Self::default(),
        }
    }

    /// The descriptors themselves, which are to be left open until [`Given::receive`].
    pub(super) fn files(&self) -> Range<RawFd> {
        let count = RawFd::try_from(self.names.len()).unwrap_or(0);
        FIRST_FILE..FIRST_FILE.saturating_add(count)
    }

    /// Receives what waits in the descriptors and closes them. What makes no sense is left out.
    pub(super) fn receive(self) -> Received {
        let mut received = Received::default();
        for (raw, name) in self.files().zip(self.names) {
            let file = own(raw);
            let _ = nix::unistd::close(raw);
            let Some((id, time)) = parse_name(&name) else { continue };
            match file.and_then(|file| receive(id, &PacketSocket::from_file(file))) {
                Ok(stored) if received.latest(id) <= time => {
                    received.parcels.insert(id, (time, stored));
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(dev_id = id, "a stored parcel is lost: {error:#}"),
            }
            received.names.push(name);
        }
        received
    }
}

/// What came out of the store.
#[derive(Debug, Default)]
pub(super) struct Received {
    parcels: BTreeMap<u32, (u64, Stored)>,
    /// All names that were in the store: their descriptors are empty now.
    names: Vec<String>,
}

impl Received {
    fn latest(&self, id: u32) -> u64 {
        self.parcels.get(&id).map_or(0, |(time, _)| *time)
    }
}

/// Our own descriptor for what is open under a number.
fn own(raw: RawFd) -> Result<OwnedFd> {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
    pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|this| pidfd_getfd(this, raw, PidfdGetfdFlags::empty()))
        .map_err(|errno| Error::io(format!("take descriptor {raw}"), &errno.into()))
}

fn name_of(id: u32, time_ns: u64) -> String {
    format!("{PREFIX}{id}-{time_ns:x}")
}

fn parse_name(name: &str) -> Option<(u32, u64)> {
    let (id, time) = name.strip_prefix(PREFIX)?.split_once('-')?;
    Some((id.parse().ok()?, u64::from_str_radix(time, 16).ok()?))
}

/// A socket in which everything that is known of device `id` waits.
fn bundle(id: u32, program: Option<&OwnedFd>, parcel: &ParcelFiles) -> Result<OwnedFd> {
    let (ours, theirs) = PacketSocket::pair()?;
    // The sender has no room any more, or the kernel does not let more files wait.
    ours.set_patience(Some(PATIENCE))?;
    let program: Vec<BorrowedFd<'_>> = program.iter().map(|file| file.as_fd()).collect();
    ours.send(&Note::Upgrade { id }.encode(), &program)?;
    send_parcel(&ours, parcel)?;
    Ok(theirs.into_file())
}

/// What waits in a bundle for device `id`.
fn receive(id: u32, socket: &PacketSocket) -> Result<Stored> {
    let odd = |message: String| Error::new(ErrorKind::Corrupt, message);
    socket.set_patience(Some(PATIENCE))?;
    let next = || socket.receive()?.map(open_packet).transpose();
    let program = match next()? {
        Some((Note::Upgrade { id: of }, files)) if of == id => files.into_iter().next(),
        found => return Err(odd(format!("device {id}: the parcel begins with {found:?}"))),
    };
    let mut parcel = ParcelFiles::new();
    loop {
        match next()? {
            Some((Note::Parcel { last }, files)) => {
                parcel.extend(files);
                if parcel.len() > PARCEL_FILES_MAX {
                    let count = parcel.len();
                    return Err(odd(format!("device {id}: {count} files in a parcel")));
                }
                if last {
                    return Ok(Stored { program, parcel });
                }
            }
            found => return Err(odd(format!("device {id}: the parcel ends with {found:?}"))),
        }
    }
}

impl DescriptorStore {
    /// The store of the service that this process is the main process of; `None` when it is none.
    pub(super) fn of_environment() -> Option<Self> {
        let pid = std::env::var("SYSTEMD_EXEC_PID").ok()?;
        let path = std::env::var_os("NOTIFY_SOCKET")?;
        if pid != std::process::id().to_string() {
            return None;
        }
        match Self::at(path.as_bytes()) {
            Ok(store) => Some(store),
            Err(error) => {
                tracing::warn!("no descriptor store: {error:#}");
                None
            }
        }
    }

    fn at(path: &[u8]) -> Result<Self> {
        let told = |errno: rustix::io::Errno| Error::io("reach systemd", &errno.into());
        let address = match path.strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name),
            None => SocketAddrUnix::new(path),
        };
        let (kind, flags) = (SocketType::DGRAM, SocketFlags::CLOEXEC);
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).map_err(told)?;
        rustix::net::connect(&socket, &address.map_err(told)?).map_err(told)?;
        let which = rustix::net::sockopt::Timeout::Send;
        rustix::net::sockopt::set_socket_timeout(&socket, which, Some(PATIENCE)).map_err(told)?;
        Ok(Self { socket, names: BTreeMap::new() })
    }

    fn tell(&self, message: &str, file: Option<BorrowedFd<'_>>) -> Result<()> {
        const SPACE: usize = rustix::cmsg_space!(ScmRights(1));
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(Error::new(ErrorKind::OutOfRange, "no room for a descriptor"));
        }
        let bytes = [IoSlice::new(message.as_bytes())];
        rustix::net::sendmsg(&self.socket, &bytes, &mut control, SendFlags::NOSIGNAL)
            .map(drop)
            .map_err(|errno| Error::io("tell systemd", &errno.into()))
    }

    /// Keeps what is known of device `id`, in the place of what was kept before.
    pub(super) fn keep(&mut self, id: u32, program: Option<&OwnedFd>, parcel: &ParcelFiles) {
        let name = name_of(id, monotonic_ns());
        let message = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        let kept =
            bundle(id, program, parcel).and_then(|file| self.tell(&message, Some(file.as_fd())));
        self.drop(id);
        match kept {
            Ok(()) => {
                self.names.insert(id, name);
            }
            Err(error) => tracing::warn!(dev_id = id, "the parcel is not stored: {error:#}"),
        }
    }

    /// Keeps nothing of device `id` any more.
    pub(super) fn drop(&mut self, id: u32) {
        if let Some(name) = self.names.remove(&id) {
            self.remove(&name);
        }
    }

    fn remove(&self, name: &str) {
        if let Err(error) = self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None) {
            tracing::warn!("{name} stays in the descriptor store: {error:#}");
        }
    }

    /// Stores again what was received: to read it was to empty it.
    pub(super) fn renew(&mut self, received: Received) -> BTreeMap<u32, Stored> {
        let mut parcels = BTreeMap::new();
        for (id, (_, stored)) in received.parcels {
            self.keep(id, stored.program.as_ref(), &stored.parcel);
            parcels.insert(id, stored);
        }
        for name in &received.names {
            self.remove(name);
        }
        tracing::debug!(parcels = parcels.len(), "from the descriptor store");
        parcels
    }
}

#[cfg(test)]
mod tests;
