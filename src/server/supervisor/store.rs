//! What outlives the supervisor, where systemd started it: parcels in the service's descriptor
//! store.
//!
//! A supervisor that dies alone is given every parcel again by the servers. One that dies together
//! with a server finds that server's parcel here, so that its device comes back without its files
//! being opened by name. systemd keeps the descriptors while it starts the service again, and lets
//! go of them when the service ends for good.
//!
//! ```text
//!   N.A.G.I.C    file I of C of device N, attached at A, stored for the G-th time
//!                file 0 is the server's program, the others are the parcel
//! ```
//!
//! A set counts when it is whole; of two the later. The new one is stored before the old one is
//! removed. What is stored are the files opened anew: a lock that a server holds must not live on
//! in systemd, and systemd takes each open file once only. (All of a parcel in one socket would be
//! one descriptor, but files that wait in sockets count against every process of root.)
//!
//! Nobody waits for systemd: what it does not take at once is tried again. All of this is a wish;
//! what cannot be stored is opened anew from the state file. (Formats: sd_notify(3),
//! sd_listen_fds(3).)

use super::ParcelFiles;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{PARCEL_FILES_MAX, STORED_FILES_MAX};
use rustix::fs::OFlags;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

/// Variables by which systemd speaks to its services; no process of ours inherits them.
pub(super) const SYSTEMD_VARIABLES: [&str; 5] =
    ["NOTIFY_SOCKET", "SYSTEMD_EXEC_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The first descriptor that systemd hands over (SD_LISTEN_FDS_START).
const FIRST_FILE: RawFd = 3;

/// The pause before systemd is told again what it did not take.
const PAUSE: Duration = Duration::from_secs(1);

/// What was kept for one device.
#[derive(Debug, Default)]
pub(super) struct Stored {
    /// The program that served it.
    pub(super) program: Option<OwnedFd>,
    /// What its successor needs.
    pub(super) parcel: ParcelFiles,
}

/// The name of one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    id: u32,
    /// In milliseconds since 1970: the number may be another device's now.
    attached_unix_ms: u64,
    generation: u32,
    index: usize,
    count: usize,
}

impl Name {
    fn text(self) -> String {
        let Self { id, attached_unix_ms, generation, index, count } = self;
        format!("{id}.{attached_unix_ms:x}.{generation}.{index}.{count}")
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let name = Self {
            id: parts.next()?.parse().ok()?,
            attached_unix_ms: u64::from_str_radix(parts.next()?, 16).ok()?,
            generation: parts.next()?.parse().ok()?,
            index: parts.next()?.parse().ok()?,
            count: parts.next()?.parse().ok()?,
        };
        let is_sound = name.index < name.count && name.count <= PARCEL_FILES_MAX + 1;
        (is_sound && parts.next().is_none()).then_some(name)
    }
}

/// What the environment says of descriptors from the store: their names, in order.
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
            Some(count) if count == names.len() && count <= STORED_FILES_MAX => Self { names },
            _ => Self::default(),
        }
    }

    /// The descriptors themselves, which are to be left open until [`Given::take`].
    pub(super) fn files(&self) -> Range<RawFd> {
        let count = RawFd::try_from(self.names.len()).unwrap_or(0);
        FIRST_FILE..FIRST_FILE.saturating_add(count)
    }

    /// The descriptors, as our own.
    pub(super) fn take(self) -> Vec<(String, OwnedFd)> {
        let own = |(raw, name): (RawFd, String)| {
            let file = own(raw);
            let _ = nix::unistd::close(raw);
            file.inspect_err(|error| tracing::warn!("{error:#}")).ok().map(|file| (name, file))
        };
        self.files().zip(self.names).filter_map(own).collect()
    }
}

/// Our own descriptor for what is open under a number.
fn own(raw: RawFd) -> Result<OwnedFd> {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
    pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|this| pidfd_getfd(this, raw, PidfdGetfdFlags::empty()))
        .map_err(|errno| Error::io(format!("take descriptor {raw}"), &errno.into()))
}

/// The same file, opened once more in the same way: without the locks of who opened it first.
fn open_anew(file: &OwnedFd) -> Result<OwnedFd> {
    let told = |errno: rustix::io::Errno| Error::io("open a file of a parcel anew", &errno.into());
    let how = rustix::fs::fcntl_getfl(file).map_err(told)?;
    let how = how & (OFlags::RWMODE | OFlags::PATH) | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, how, rustix::fs::Mode::empty()).map_err(told)
}

/// What a file is: device and inode.
type Identity = (u64, u64);

fn identity(file: &OwnedFd) -> Option<Identity> {
    rustix::fs::fstat(file).ok().map(|found| (found.st_dev, found.st_ino))
}

/// What is kept of one device.
#[derive(Debug)]
struct Set {
    names: Vec<Name>,
    /// Of the program and the layers. The map, which is made anew each time, follows from those.
    /// Empty for what an earlier supervisor stored.
    files: Vec<Option<Identity>>,
}

/// What systemd is to be told.
#[derive(Debug)]
enum Message {
    Store(Name, OwnedFd),
    Remove(String),
}

/// The store of the service that this process is the main process of.
#[derive(Debug)]
pub(super) struct DescriptorStore {
    socket: OwnedFd,
    sets: BTreeMap<u32, Set>,
    generation: u32,
    queue: VecDeque<Message>,
    retry_at: Option<Instant>,
}

impl DescriptorStore {
    /// `None` when this process is no service of systemd's.
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
        let kind = SocketType::DGRAM;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).map_err(told)?;
        rustix::net::connect(&socket, &address.map_err(told)?).map_err(told)?;
        let (sets, queue) = (BTreeMap::new(), VecDeque::new());
        Ok(Self { socket, sets, generation: 0, queue, retry_at: None })
    }

    /// When [`DescriptorStore::work`] is to be called, if at all.
    pub(super) fn due(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Tells systemd what it has not been told, until it takes no more.
    pub(super) fn work(&mut self) {
        self.retry_at = None;
        while let Some(message) = self.queue.front() {
            let told = match message {
                Message::Store(name, file) => {
                    // Without FDPOLL=0 a file that polls as broken would be thrown away.
                    let text = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}", name.text());
                    self.tell(&text, Some(file.as_fd()))
                }
                Message::Remove(name) => {
                    self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None)
                }
            };
            if let Err(error) = told {
                tracing::debug!(waiting = self.queue.len(), "{error:#}");
                self.retry_at = Some(Instant::now() + PAUSE);
                return;
            }
            self.queue.pop_front();
        }
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

    /// Files that are kept, or will be.
    fn file_count(&self) -> usize {
        self.sets.values().map(|set| set.names.len()).sum()
    }

    /// Keeps what is known of device `id`, in the place of what was kept before. The same files
    /// are not stored again.
    pub(super) fn keep(
        &mut self,
        (id, attached_unix_ms): (u32, u64),
        program: Option<&OwnedFd>,
        parcel: &ParcelFiles,
    ) {
        let Some(program) = program.filter(|_| !parcel.is_empty()) else {
            return self.drop(id);
        };
        let layers = parcel.get(1..).unwrap_or_default();
        let files: Vec<_> = std::iter::once(program).chain(layers).map(identity).collect();
        if self.sets.get(&id).is_some_and(|set| set.files == files) {
            return;
        }
        let count = parcel.len() + 1;
        // Both sets are there for a moment, and what waits for systemd is held here.
        let is_full = self.file_count().saturating_add(count) > STORED_FILES_MAX
            || self.queue.len().saturating_add(count) > STORED_FILES_MAX;
        let opened: Result<Vec<OwnedFd>> =
            std::iter::once(program).chain(parcel).map(open_anew).collect();
        let opened = match opened {
            Ok(opened) if !is_full => opened,
            outcome => {
                tracing::debug!(dev_id = id, is_full, error = ?outcome.err(), "not stored");
                return self.drop(id);
            }
        };
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let name = |index| Name { id, attached_unix_ms, generation, index, count };
        let names: Vec<Name> = (0..count).map(name).collect();
        self.queue.extend(names.iter().zip(opened).map(|(name, file)| Message::Store(*name, file)));
        if let Some(old) = self.sets.insert(id, Set { names, files }) {
            self.remove(&old);
        }
        self.work();
    }

    /// Keeps nothing of device `id` any more.
    pub(super) fn drop(&mut self, id: u32) {
        if let Some(set) = self.sets.remove(&id) {
            self.remove(&set);
            self.work();
        }
    }

    fn remove(&mut self, set: &Set) {
        // What systemd has not been told of it need not be undone.
        let mut waiting = Vec::new();
        self.queue.retain(|message| match message {
            Message::Store(name, _) if set.names.contains(name) => {
                waiting.push(*name);
                false
            }
            _ => true,
        });
        let told = set.names.iter().filter(|name| !waiting.contains(name));
        self.queue.extend(told.map(|name| Message::Remove(name.text())));
    }

    /// Takes on what an earlier supervisor stored: the latest whole set of each device for which
    /// `is_wanted`. Everything else is removed.
    pub(super) fn take_on(
        &mut self,
        given: Vec<(String, OwnedFd)>,
        is_wanted: impl Fn(u32, u64) -> bool,
    ) -> BTreeMap<u32, Stored> {
        let mut found: BTreeMap<(u32, u64, u32), BTreeMap<Name, OwnedFd>> = BTreeMap::new();
        for (text, file) in given {
            match Name::parse(&text) {
                Some(name) => {
                    self.generation = self.generation.max(name.generation);
                    let set = (name.id, name.attached_unix_ms, name.generation);
                    found.entry(set).or_default().insert(name, file);
                }
                None => self.queue.push_back(Message::Remove(text)),
            }
        }
        let mut parcels = BTreeMap::new();
        // The later sets of a device come later, and take the place of the ones before.
        for ((id, attached_unix_ms, _), files) in found {
            let names: Vec<Name> = files.keys().copied().collect();
            let is_whole = names.iter().all(|name| name.count == names.len());
            let set = Set { names, files: Vec::new() };
            if !is_whole || !is_wanted(id, attached_unix_ms) {
                self.remove(&set);
                continue;
            }
            if let Some(old) = self.sets.insert(id, set) {
                self.remove(&old);
            }
            let mut files = files.into_values();
            let program = files.next();
            let parcel = files.collect();
            parcels.insert(id, Stored { program, parcel });
        }
        self.work();
        parcels
    }
}

#[cfg(test)]
mod tests;
