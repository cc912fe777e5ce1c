//! A file mapped read-only, and what happens when its bytes are gone.
//!
//! Reading a mapping costs no system call, a third of a `pread` of 4 KiB. The price: when the file
//! was truncated behind us or its disk fails, the kernel answers with SIGBUS instead of an errno.
//! A process-wide handler finds the mapping in a lock-free table, puts a page of zeros under the
//! faulting address, marks the mapping poisoned and returns. The reader looks at the mark after
//! every copy: a poisoned mapping is never believed again, every read of it goes through `pread`,
//! which returns what is still there and a real errno for what is not. A SIGBUS at an address
//! that is nobody's mapping gets the default action, as if there were no handler.
//!
//! This is one of the rooms where `unsafe` is allowed: mapping, copying out of it, and the signal
//! handler. No slice of the mapping ever leaves this file.
#![allow(unsafe_code)]

use super::file::{FileIdentity, adopt_regular, open_regular};
use crate::error::{Error, ErrorKind, Result};
use crate::units::to_usize;
use memmap2::{Mmap, MmapOptions};
use nix::sys::stat::fstat;
use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

/// Mappings at one time in one process: 255 layers of 16 devices in one server. When the table is
/// full a file is simply not mapped, and read with `pread`.
const SLOT_COUNT: usize = 4096;

/// One mapping as the signal handler sees it. `start` is 0 while the slot is free, 1 while it is
/// being filled.
struct Slot {
    start: AtomicUsize,
    bytes: AtomicUsize,
    poisoned: AtomicBool,
}

const FREE: usize = 0;
const CLAIMED: usize = 1;

static SLOTS: [Slot; SLOT_COUNT] = [const {
    Slot {
        start: AtomicUsize::new(FREE),
        bytes: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
    }
}; SLOT_COUNT];

/// Size of a memory page; set before the handler is installed.
static PAGE_BYTES: AtomicUsize = AtomicUsize::new(4096);

/// A regular file, opened for reading and mapped where possible.
pub struct MappedFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    // `None`: empty, shorter than it was, or the table or the address space is full. Then every
    // read is a `pread`.
    mapping: Option<Mapping>,
}

struct Mapping {
    map: Mmap,
    slot: &'static Slot,
}

impl Mapping {
    fn new(file: &File, bytes: u64) -> Option<Self> {
        let bytes = to_usize(bytes).filter(|&bytes| bytes > 0)?;
        install_handler();
        let slot = SLOTS.iter().find(|slot| {
            slot.start.compare_exchange(FREE, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })?;
        // SAFETY: the mapping is read-only and never becomes a slice: `MappedFile::copy_out` reads
        // it through raw pointers, so a file that changes underneath cannot break a Rust reference,
        // and one that shrinks ends in the handler below.
        let Ok(map) = (unsafe { MmapOptions::new().len(bytes).map(file) }) else {
            slot.start.store(FREE, Ordering::Release);
            return None;
        };
        slot.poisoned.store(false, Ordering::Relaxed);
        slot.bytes.store(map.len(), Ordering::Relaxed);
        slot.start.store(map.as_ptr().addr(), Ordering::Release);
        Some(Self { map, slot })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Before the memory goes, so that no later mapping at this address is taken for this one.
        self.slot.start.store(FREE, Ordering::Release);
    }
}

impl MappedFile {
    /// Opens and maps `path`.
    ///
    /// # Errors
    /// `NotFound`, `InvalidFormat` for anything but a regular file, `Io`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        let bytes = file
            .metadata()
            .map_err(|error| Error::io(format!("stat {}", path.display()), &error))?
            .len();
        let mapping = Mapping::new(&file, bytes);
        Ok(Self { path: path.to_owned(), file, bytes, mapping })
    }

    /// Takes over the file that another process opened by `path` when it had `bytes` bytes. One
    /// that has become shorter since is no error here: what is left of it is served, and the reads
    /// of what is missing fail, as they did in that process.
    ///
    /// # Errors
    /// `InvalidFormat` for anything but a regular file that can be read, `Corrupt` for another
    /// file than `expected`, `Io`.
    pub fn adopt(path: PathBuf, fd: OwnedFd, expected: FileIdentity, bytes: u64) -> Result<Self> {
        let file = adopt_regular(&path, fd, expected)?;
        let left = file
            .metadata()
            .map_err(|error| Error::io(format!("stat {}", path.display()), &error))?
            .len();
        // A mapping of what is not there could only fault and be retired.
        let mapping = if left < bytes { None } else { Mapping::new(&file, bytes) };
        Ok(Self { path, file, bytes, mapping })
    }

    /// Length in bytes when the file was opened.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The path that was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for questions that are not reads (where its holes are).
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether the mapping was found broken and reads go through `pread`.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.mapping.as_ref().is_some_and(|mapping| mapping.slot.poisoned.load(Ordering::Acquire))
    }

    /// Fills `dst` from `offset_bytes` on.
    ///
    /// # Errors
    /// `Io` with the path when the file was truncated or its disk fails.
    #[inline]
    pub fn read(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        if let Some(mapping) = &self.mapping
            && mapping.copy_out(offset_bytes, dst)
            && !self.has_shrunk(mapping)
        {
            return Ok(());
        }
        self.read_by_call(offset_bytes, dst)
    }

    /// As [`MappedFile::read`] for bytes that a checksum vouches for: saves a system call, and a
    /// file that was cut inside a page may answer with zeros, which the checksum then refuses.
    ///
    /// # Errors
    /// As [`MappedFile::read`].
    #[inline]
    pub fn read_vouched(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        if let Some(mapping) = &self.mapping
            && mapping.copy_out(offset_bytes, dst)
        {
            return Ok(());
        }
        self.read_by_call(offset_bytes, dst)
    }

    /// Whether the file is shorter than it was. The kernel raises no SIGBUS for what is missing of
    /// the last page that is left: it reads as zeros, so every copy is followed by this question.
    fn has_shrunk(&self, mapping: &Mapping) -> bool {
        let bytes = fstat(&self.file).ok().and_then(|stat| u64::try_from(stat.st_size).ok());
        let shrunk = bytes.is_none_or(|bytes| bytes < self.bytes);
        if shrunk {
            mapping.slot.poisoned.store(true, Ordering::SeqCst);
        }
        shrunk
    }

    #[cold]
    fn read_by_call(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(dst, offset_bytes).map_err(|error| {
            let len = dst.len();
            let action =
                format!("read {len} bytes at byte {offset_bytes} of {}", self.path.display());
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                let message =
                    format!("{action}: the file was truncated, it had {} bytes", self.bytes);
                return Error::new(ErrorKind::Io, message);
            }
            // NotFound, NoSpace and their like make no sense for a read: keep the errno, say Io.
            Error::io(action, &error)
        })
    }
}

impl Mapping {
    /// Copies out of the mapping; `false` when the bytes cannot be believed.
    #[inline]
    fn copy_out(&self, offset_bytes: u64, dst: &mut [u8]) -> bool {
        if self.slot.poisoned.load(Ordering::Acquire) {
            return false;
        }
        let Some(start) = to_usize(offset_bytes) else { return false };
        if start.checked_add(dst.len()).is_none_or(|end| end > self.map.len()) {
            return false;
        }
        // SAFETY: `start + dst.len()` lies inside the mapping (checked above), which lives as long
        // as `self`; `dst` is ours alone and cannot overlap a read-only mapping. A page that is
        // gone raises SIGBUS inside this copy; the handler replaces it and sets `poisoned`.
        unsafe {
            let from = self.map.as_ptr().add(start);
            std::ptr::copy_nonoverlapping(from, dst.as_mut_ptr(), dst.len());
        }
        // The handler marks the mapping before it puts the page of zeros there: whoever copied from
        // that page, on this thread or another, sees the mark after the copy.
        fence(Ordering::SeqCst);
        !self.slot.poisoned.load(Ordering::SeqCst)
    }
}

impl fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedFile({}, {} bytes)", self.path.display(), self.bytes)
    }
}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: sysconf has no preconditions.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        if let Ok(page) = usize::try_from(page) {
            PAGE_BYTES.store(page, Ordering::Relaxed);
        }
        // SAFETY: the action is fully initialised (zeroed is a valid empty mask), and the handler
        // only does what a signal handler may: atomics, `mmap`, `sigaction`. SA_ONSTACK uses the
        // alternate stack that the standard library gives every thread it starts.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
        }
    });
}

/// The SIGBUS handler; see the module text. Only async-signal-safe work.
extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO.
    let code = unsafe { (*info).si_code };
    if code <= 0 {
        // Somebody sent it (`kill -BUS`): no memory is missing, and the next real one still counts.
        return;
    }
    // SAFETY: as above; a SIGBUS that the kernel raised carries an address.
    let address = unsafe { (*info).si_addr() }.addr();
    let page = PAGE_BYTES.load(Ordering::Relaxed);
    for slot in &SLOTS {
        let start = slot.start.load(Ordering::Acquire);
        if start <= CLAIMED || address < start {
            continue;
        }
        if address - start >= slot.bytes.load(Ordering::Relaxed).next_multiple_of(page) {
            continue;
        }
        let at = address - address % page;
        // Before the page is there: another thread may read it the moment it is.
        slot.poisoned.store(true, Ordering::SeqCst);
        // SAFETY: the page lies inside a mapping that this process owns and is reading right now
        // (its reader holds a reference to it), so replacing it takes nothing from anybody else.
        // Unmapping the whole later removes this page with it.
        let replaced = unsafe {
            libc::mmap(
                std::ptr::without_provenance_mut(at),
                page,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if replaced != libc::MAP_FAILED {
            return;
        }
    }
    // Not ours: the default action, by letting the instruction fault again.
    // SAFETY: as in `install_handler`.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::to_u64;
    use std::io::Write;

    fn file_of(bytes: usize) -> (tempfile::NamedTempFile, Vec<u8>) {
        let content: Vec<u8> = (0..bytes).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&content).unwrap();
        (file, content)
    }

    #[test]
    fn bytes_are_read_at_any_offset() {
        let (file, content) = file_of(20_000);
        let mapped = MappedFile::open(file.path()).unwrap();
        for (offset, len) in [(0, 20_000), (1, 4096), (19_999, 1), (20_000, 0), (4095, 2)] {
            let mut found = vec![0; len];
            mapped.read(to_u64(offset), &mut found).unwrap();
            assert_eq!(found, content[offset..offset + len], "{len} bytes at {offset}");
        }
    }

    #[test]
    fn a_truncated_file_fails_the_reads_it_lost_and_serves_the_rest() {
        let (file, content) = file_of(64 * 1024);
        let mapped = MappedFile::open(file.path()).unwrap();
        file.as_file().set_len(8192).unwrap();
        let mut page = [0; 4096];
        let error = mapped.read(32 * 1024, &mut page).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, libc::EIO));
        assert!(error.to_string().contains("truncated"), "{error}");
        assert!(mapped.is_retired());
        mapped.read(4096, &mut page).unwrap();
        assert_eq!(page[..], content[4096..8192]);
        mapped.read(6000, &mut page).unwrap_err();
    }

    #[test]
    fn a_file_cut_inside_a_page_does_not_read_as_zeros() {
        let (file, content) = file_of(64 * 1024);
        let mapped = MappedFile::open(file.path()).unwrap();
        let mut sector = [0; 512];
        mapped.read(8192, &mut sector).unwrap();
        file.as_file().set_len(8192 + 512).unwrap();
        mapped.read(8192 + 512, &mut sector).unwrap_err();
        mapped.read(8192, &mut sector).unwrap();
        assert_eq!(sector[..], content[8192..8192 + 512]);
    }

    #[test]
    fn many_threads_that_meet_a_truncation_all_get_errors_and_none_dies() {
        let (file, content) = file_of(1 << 20);
        let mapped = MappedFile::open(file.path()).unwrap();
        file.as_file().set_len(4096).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                let (mapped, content) = (&mapped, &content);
                scope.spawn(move || {
                    let mut page = [0; 4096];
                    for i in 1..32 {
                        mapped.read((thread * 31 + i) * 4096, &mut page).unwrap_err();
                    }
                    mapped.read(0, &mut page).unwrap();
                    assert_eq!(page[..], content[..4096]);
                });
            }
        });
    }

    #[test]
    fn an_empty_file_has_nothing_to_read() {
        let (file, _) = file_of(0);
        let mapped = MappedFile::open(file.path()).unwrap();
        assert_eq!(mapped.bytes(), 0);
        mapped.read(0, &mut []).unwrap();
    }

    #[test]
    fn a_slot_is_given_back_when_its_file_is_closed() {
        let (file, _) = file_of(4096);
        for _ in 0..SLOT_COUNT + 10 {
            let mapped = MappedFile::open(file.path()).unwrap();
            assert!(mapped.mapping.is_some());
        }
    }
}
