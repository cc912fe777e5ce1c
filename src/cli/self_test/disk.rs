//! Reading the device under test, on threads of their own: a read may hang, and is given up then.

use super::lab::Lab;
use super::stack;
use crate::error::{Error, ErrorKind, Result};
use crate::units::to_u64;
use nix::fcntl::OFlag;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Bytes of one read. A divisor of the disk, and not of its larger compression blocks.
const READ_BYTES: usize = 32 * 1024;

/// What direct reads are aligned to.
const ALIGNMENT: usize = 4096;

/// How the device is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Through the page cache.
    Buffered,
    /// Past it.
    Direct,
}

fn open(device: &Path, access: Access) -> Result<File> {
    let flags = match access {
        Access::Buffered => OFlag::empty(),
        Access::Direct => OFlag::O_DIRECT,
    };
    let opened = File::options().read(true).custom_flags(flags.bits()).open(device);
    opened.map_err(|error| Error::io(format!("open {}", device.display()), &error))
}

/// A buffer of [`READ_BYTES`] at an address that direct reads accept.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new() -> Self {
        let memory = vec![0; READ_BYTES + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start }
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.start..self.start + READ_BYTES).unwrap_or_default()
    }
}

fn read_at(file: &File, offset: usize, buffer: &mut [u8]) -> Result<()> {
    file.read_exact_at(buffer, to_u64(offset))
        .map_err(|error| Error::io(format!("read at byte {offset}"), &error))
}

/// Starts a thread that is not waited for when it hangs.
fn detached<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<Receiver<T>> {
    let (done, result) = channel();
    let spawned = std::thread::Builder::new().name("self-test".to_owned()).spawn(move || {
        let _ = done.send(work());
    });
    spawned.map(|_| result).map_err(|error| Error::io("start a thread", &error))
}

/// The whole device, from front to back.
pub(super) fn read_all(
    lab: &Lab,
    device: &Path,
    access: Access,
    patience: Duration,
) -> Result<Vec<u8>> {
    let file = open(device, access)?;
    let result = detached(move || {
        let mut all = Vec::with_capacity(stack::disk_bytes());
        let mut buffer = Aligned::new();
        while all.len() < stack::disk_bytes() {
            read_at(&file, all.len(), buffer.bytes())?;
            all.extend_from_slice(buffer.bytes());
        }
        Ok(all)
    })?;
    let mut found = None;
    lab.wait("the device is read", patience, || {
        found = result.try_recv().ok();
        found.is_some()
    })?;
    found.unwrap_or_else(|| Err(Error::new(ErrorKind::Canceled, "the reader went away")))
}

/// A thread that reads the device again and again, past the cache, and compares every byte.
pub(super) struct Reader {
    shared: Arc<Shared>,
    end: Receiver<()>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    reads: AtomicU64,
    failure: std::sync::Mutex<Option<String>>,
}

impl Reader {
    pub(super) fn start(device: &Path, expected: Arc<Vec<u8>>) -> Result<Self> {
        let file = open(device, Access::Direct)?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let end = detached(move || {
            if let Err(error) = read_for_ever(&file, &expected, &theirs) {
                let told = Some(format!("{error:#}"));
                *theirs.failure.lock().unwrap_or_else(PoisonError::into_inner) = told;
            }
        })?;
        Ok(Self { shared, end })
    }

    fn check(&self) -> Result<()> {
        let failure = self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner);
        match &*failure {
            Some(told) => Err(Error::new(ErrorKind::Integrity, format!("a reader met: {told}"))),
            None => Ok(()),
        }
    }

    /// Waits until so many more reads were right.
    pub(super) fn wait_for_reads(&self, lab: &Lab, count: u64, patience: Duration) -> Result<()> {
        let until = self.shared.reads.load(Ordering::Relaxed) + count;
        lab.wait("the reader goes on", patience, || {
            self.check().is_err() || self.shared.reads.load(Ordering::Relaxed) >= until
        })?;
        self.check()
    }

    /// Ends the reader; every read of its life must have been right.
    pub(super) fn finish(&self, patience: Duration) -> Result<String> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let ended = self.end.recv_timeout(patience);
        ended.map_err(|_| Error::new(ErrorKind::Timeout, "a read does not end"))?;
        self.check()?;
        let reads = self.shared.reads.load(Ordering::Relaxed);
        Ok(format!("{reads} direct reads, every byte right"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn read_for_ever(file: &File, expected: &[u8], shared: &Shared) -> Result<()> {
    let mut buffer = Aligned::new();
    let mut offset = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        read_at(file, offset, buffer.bytes())?;
        if expected.get(offset..offset + READ_BYTES) != Some(&*buffer.bytes()) {
            let message = format!("WRONG BYTES in the {READ_BYTES} bytes at byte {offset}");
            return Err(Error::new(ErrorKind::Integrity, message));
        }
        shared.reads.fetch_add(1, Ordering::Relaxed);
        // In an order that no read-ahead would have.
        offset = (offset + 7 * READ_BYTES) % stack::disk_bytes();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> (tempfile::NamedTempFile, Arc<Vec<u8>>) {
        let bytes: Vec<u8> =
            (0..stack::disk_bytes()).map(|at| u8::try_from(at / 4096 % 251).unwrap()).collect();
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        (file, Arc::new(bytes))
    }

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn both_ways_read_the_whole_disk() {
        let lab = Lab::new().unwrap();
        let (file, expected) = disk();
        for access in [Access::Buffered, Access::Direct] {
            let found = read_all(&lab, file.path(), access, PATIENCE).unwrap();
            assert!(found == *expected, "{access:?}");
        }
        file.as_file().set_len(4096).unwrap();
        assert!(read_all(&lab, file.path(), Access::Buffered, PATIENCE).is_err());
    }

    #[test]
    fn a_reader_sees_a_byte_that_changes_under_it() {
        let lab = Lab::new().unwrap();
        let (file, expected) = disk();
        let reader = Reader::start(file.path(), Arc::clone(&expected)).unwrap();
        reader.wait_for_reads(&lab, 8, PATIENCE).unwrap();
        file.as_file().write_all_at(b"\xff", 77).unwrap();
        let blocks = to_u64(stack::disk_bytes() / READ_BYTES);
        let error = reader.wait_for_reads(&lab, 2 * blocks, PATIENCE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Integrity);
        assert!(error.to_string().contains("at byte 0"), "{error}");
        assert!(reader.finish(PATIENCE).is_err());
    }
}
