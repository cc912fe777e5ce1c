//! Who fetches what, among processes: locks on ranges of bytes that the kernel frees with the last
//! descriptor of an open file, whatever ended its process.
//!
//! Byte n from [`CLAIMS_AT`] on stands for extent n: nothing is stored there, a lock may lie beyond
//! the end of a file. The locks belong to an open file and not to a thread, so that within one
//! process [`super::flight`] says who fetches. They are only ever tried: who finds one taken looks
//! again a little later, and not for ever.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::File;
use std::io;
use std::ops::Range;

/// The byte that stands for extent 0.
const CLAIMS_AT: u64 = 1 << 40;

/// The byte that everybody who has the blob open holds together.
const USE_AT: u64 = 1 << 41;

/// The byte that is held while a complete blob is checked.
const PROMOTION_AT: u64 = USE_AT + 1;

/// Extents that nobody else will fetch while this lives.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    file: &'a File,
    bytes: Range<u64>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        // Fails for a descriptor that is no file, which it is; what stays goes with the file.
        let _ = set(self.file, libc::F_UNLCK, &self.bytes);
    }
}

/// Claims extents; `None` when somebody else has one of them.
pub(super) fn try_extents<'a>(
    file: &'a File,
    extents: &Range<u64>,
) -> io::Result<Option<Claim<'a>>> {
    let at = |extent: u64| CLAIMS_AT.saturating_add(extent);
    try_bytes(file, at(extents.start)..at(extents.end))
}

/// Claims the checking of a complete blob.
pub(super) fn try_promotion(file: &File) -> io::Result<Option<Claim<'_>>> {
    try_bytes(file, PROMOTION_AT..PROMOTION_AT + 1)
}

/// The first of `extents` that somebody else has claimed.
pub(super) fn first_taken(file: &File, extents: &Range<u64>) -> io::Result<Option<u64>> {
    let at = |extent: u64| CLAIMS_AT.saturating_add(extent);
    let bytes = at(extents.start)..at(extents.end);
    Ok(conflict(file, &bytes)?.map(|start| {
        start.saturating_sub(CLAIMS_AT).clamp(extents.start, extents.end.saturating_sub(1))
    }))
}

/// Says that the blob is open here; ends when the file is closed.
pub(super) fn mark_used(file: &File) -> io::Result<()> {
    set(file, libc::F_RDLCK, &(USE_AT..USE_AT + 1)).map_err(Into::into)
}

/// Whether the blob is open anywhere, this process's other open files included.
pub(super) fn is_used(file: &File) -> io::Result<bool> {
    Ok(conflict(file, &(USE_AT..USE_AT + 1))?.is_some())
}

fn try_bytes(file: &File, bytes: Range<u64>) -> io::Result<Option<Claim<'_>>> {
    match set(file, libc::F_WRLCK, &bytes) {
        Ok(()) => Ok(Some(Claim { file, bytes })),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn set(file: &File, kind: libc::c_int, bytes: &Range<u64>) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock_of(kind, bytes)?)).map(drop)
}

/// Where the first lock begins that keeps us from locking all of `bytes` alone.
fn conflict(file: &File, bytes: &Range<u64>) -> io::Result<Option<u64>> {
    let mut lock = lock_of(libc::F_WRLCK, bytes)?;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    if i32::from(lock.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    Ok(Some(u64::try_from(lock.l_start).unwrap_or(bytes.start)))
}

fn lock_of(kind: libc::c_int, bytes: &Range<u64>) -> nix::Result<libc::flock> {
    let whence = libc::c_short::try_from(libc::SEEK_SET);
    let (kind, whence) = (libc::c_short::try_from(kind), whence);
    // No length means "to the end of all bytes" to the kernel: the claim of no extents is one byte.
    let length = bytes.end.saturating_sub(bytes.start).max(1);
    let (start, length) = (i64::try_from(bytes.start), i64::try_from(length));
    let (Ok(l_type), Ok(l_whence), Ok(l_start), Ok(l_len)) = (kind, whence, start, length) else {
        return Err(Errno::EOVERFLOW);
    };
    Ok(libc::flock { l_type, l_whence, l_start, l_len, l_pid: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_openings() -> (tempfile::NamedTempFile, File, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (one, other) = (open(), open());
        (file, one, other)
    }

    #[test]
    fn an_extent_is_claimed_once_and_again_when_it_is_let_go() {
        let (_file, one, other) = two_openings();
        let claim = try_extents(&one, &(3..6)).unwrap().unwrap();
        assert!(try_extents(&other, &(5..9)).unwrap().is_none());
        assert_eq!(first_taken(&other, &(0..9)).unwrap(), Some(3));
        assert_eq!(first_taken(&other, &(4..9)).unwrap(), Some(4));
        assert_eq!(first_taken(&other, &(6..9)).unwrap(), None);
        let behind = try_extents(&other, &(6..9)).unwrap().unwrap();
        drop(claim);
        assert!(try_extents(&other, &(5..6)).unwrap().is_some());
        drop(behind);
        assert!(try_extents(&one, &(0..9)).unwrap().is_some());
        mark_used(&other).unwrap();
        assert!(try_extents(&one, &(0..0)).unwrap().is_some(), "no extents are not all bytes");
    }

    #[test]
    fn a_claim_goes_with_its_open_file() {
        let (_file, one, other) = two_openings();
        let claim = try_extents(&one, &(0..1)).unwrap().unwrap();
        std::mem::forget(claim);
        assert!(try_extents(&other, &(0..1)).unwrap().is_none());
        drop(one);
        assert!(try_extents(&other, &(0..1)).unwrap().is_some());
    }

    #[test]
    fn uses_are_shared_and_seen_from_outside() {
        let (_file, one, other) = two_openings();
        assert!(!is_used(&other).unwrap());
        mark_used(&one).unwrap();
        mark_used(&other).unwrap();
        drop(one);
        let third = _file.reopen().unwrap();
        assert!(is_used(&third).unwrap());
        drop(other);
        assert!(!is_used(&third).unwrap());
        assert!(try_promotion(&third).unwrap().is_some());
    }
}
