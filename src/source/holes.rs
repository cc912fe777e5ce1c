//! Where a sparse file has data: the index of a writable layer in sparse form.

use super::mmap::MappedFile;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::INDEX_ENTRIES_MAX;
use crate::units::to_u64;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::ops::Range;

/// The byte ranges from `start_bytes` on that the file system says hold data, in order. On a file
/// system without holes it is one range.
///
/// # Errors
/// `Io` when the file system cannot tell, `Corrupt` beyond [`INDEX_ENTRIES_MAX`] ranges.
pub fn data_extents(file: &MappedFile, start_bytes: u64) -> Result<Vec<Range<u64>>> {
    let name = file.path().display().to_string();
    data_extents_of(file.file(), &name, start_bytes..file.bytes())
}

/// As [`data_extents`], of a part of an open file, which messages call `name`. Where the file has
/// nothing, or ends, is a hole.
///
/// # Errors
/// As there.
pub fn data_extents_of(file: &File, name: &str, bytes: Range<u64>) -> Result<Vec<Range<u64>>> {
    let mut extents = Vec::new();
    let mut here = bytes.start;
    while here < bytes.end {
        let Some(start) = seek(file, name, here, Whence::SeekData)? else { break };
        // A hole follows every data range: the end of the file counts as one.
        let end = seek(file, name, start, Whence::SeekHole)?.unwrap_or(bytes.end).min(bytes.end);
        if end <= start {
            // Behind the part, or the file shrinks while we look.
            break;
        }
        if to_u64(extents.len()) >= INDEX_ENTRIES_MAX {
            let message = format!("{name}: more than {INDEX_ENTRIES_MAX} extents");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        extents.push(start..end);
        here = end;
    }
    Ok(extents)
}

/// The next place of the wanted kind, or `None` beyond the last data.
fn seek(file: &File, name: &str, from_bytes: u64, whence: Whence) -> Result<Option<u64>> {
    let failed = |errno: Errno| {
        let action = format!("find the holes of {name} at byte {from_bytes}");
        Error::io(action, &std::io::Error::from(errno))
    };
    let from = i64::try_from(from_bytes).map_err(|_| failed(Errno::EOVERFLOW))?;
    match lseek(file, from, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(failed(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn data_between_holes_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        file.as_file().write_all_at(&[1; 4096], 65536).unwrap();
        file.as_file().write_all_at(&[2; 8192], 262_144).unwrap();
        let mapped = MappedFile::open(file.path()).unwrap();
        let extents = data_extents(&mapped, 4096).unwrap();
        assert_eq!(extents, [65536..69632, 262_144..270_336]);
    }

    #[test]
    fn of_a_part_only_what_lies_in_it_is_told() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 8192], 65536).unwrap();
        for (part, expected) in [
            (0..65536, None),
            (0..69632, Some(65536..69632)),
            (69632..1 << 20, Some(69632..73728)),
            (73728..1 << 20, None),
        ] {
            let found = data_extents_of(&file, "file", part.clone()).unwrap();
            assert_eq!(found.first().cloned(), expected, "{part:?}");
            assert!(found.len() < 2);
        }
    }

    #[test]
    fn a_file_without_data_has_no_extents() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        assert_eq!(data_extents(&MappedFile::open(file.path()).unwrap(), 0).unwrap(), []);
    }
}
