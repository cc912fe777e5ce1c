//! New pairs: made so that a power cut at any moment leaves all of one, or nothing that is in the
//! way of the next attempt.
//!
//! ```text
//!   data.new, index.new written, synced -- index.new -> index -- folder synced
//!        -- data.new -> data -- folder synced
//! ```
//!
//! A data file under its name has its index. What an attempt that was cut off leaves are files
//! called `.new`, which the next one writes over, and perhaps an index that has no data file beside
//! it: without a single entry, or with the UUID of `data.new`. Whoever makes a pair holds the lock
//! of its `data.new`.

use super::open::read_header;
use super::sparse::check_blocks;
use super::storage::{Storage, sync_folder_of};
use super::{PairPaths, sparse};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::lsmt::{Flags, HEADER_BYTES, Header, UuidText};
use crate::limits::VIRTUAL_SECTORS_MAX;
use crate::source::{FileIdentity, data_extents_of, open_regular_for_writing};
use crate::units::bytes_to_sectors;
use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, renameat2};
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What a new pair is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewPair {
    /// Size of the virtual disk: whole sectors.
    pub virtual_bytes: u64,
    /// Its UUID.
    pub uuid: UuidText,
    /// That of the layer below.
    pub parent_uuid: UuidText,
}

/// In which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Data and log.
    Append,
    /// The disk behind a header; over layers or over nothing.
    Sparse {
        /// Whether layers lie below.
        over_lowers: bool,
    },
}

/// A UUID that nobody has.
///
/// # Errors
/// `Io` where the kernel gives none.
pub fn new_uuid() -> Result<UuidText> {
    const PATH: &str = "/proc/sys/kernel/random/uuid";
    let text =
        std::fs::read_to_string(PATH).map_err(|error| Error::io(format!("read {PATH}"), &error))?;
    UuidText::from_text(text.trim()).ok_or_else(|| Error::corrupt(PATH, 0, text, "a UUID"))
}

/// Makes the two files of an empty pair in append form, durably. Neither may exist, but for an
/// index that an attempt left that was cut off.
///
/// # Errors
/// `InvalidConfig` for an impossible size, `Busy` while somebody else makes it, `Io`. What was made
/// is removed then.
pub fn create(paths: &PairPaths, new: &NewPair) -> Result<()> {
    check_not_empty(new.virtual_bytes)?;
    create_as(paths, new, Form::Append)
}

/// As [`create`], in either form and with a UUID of its own and no parent.
///
/// # Errors
/// As [`create`]; `Unsupported` where the file system is not fit for the sparse form.
pub fn create_fresh(paths: &PairPaths, virtual_bytes: u64, form: Form) -> Result<()> {
    check_not_empty(virtual_bytes)?;
    let (uuid, parent_uuid) = (new_uuid()?, UuidText::NIL);
    create_as(paths, &NewPair { virtual_bytes, uuid, parent_uuid }, form)
}

fn check_not_empty(virtual_bytes: u64) -> Result<()> {
    if virtual_bytes > 0 {
        return Ok(());
    }
    let message = "a disk of 0 bytes: expected whole sectors";
    Err(Error::new(ErrorKind::InvalidConfig, message))
}

/// Whether a pair can be made there: neither file is, but perhaps what a cut attempt left.
#[must_use]
pub fn is_vacant(paths: &PairPaths) -> bool {
    let is_there = |path: &Path| path.symlink_metadata().is_ok();
    let is_left = |index: &Path| is_blank_index(index) || is_of_draft(index, &paths.data);
    !is_there(&paths.data) && (!is_there(&paths.index) || is_left(&paths.index))
}

/// Whether the index belongs to a data file that never got its name.
fn is_of_draft(index: &Path, data: &Path) -> bool {
    let draft = open_regular_for_writing(&draft_of(data)).ok();
    let header = draft.and_then(|draft| read_header(&draft, 0).ok().flatten());
    header.is_some_and(|header| is_of_pair(index, &header.uuid.to_string()))
}

/// Removes the index that a cut attempt left, if it holds anything: that it is one can be seen only
/// as long as the draft beside it is not written over.
fn remove_filled_index(index: &Path) -> Result<()> {
    if index.symlink_metadata().is_err() || is_blank_index(index) {
        return Ok(());
    }
    std::fs::remove_file(index).map_err(named(index))
}

/// The name that a file has until it is whole.
fn draft_of(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    target.with_file_name(name)
}

/// Refuses where a pair cannot be made because something is there.
///
/// # Errors
/// `Io`, with `EEXIST`.
pub fn check_vacant(paths: &PairPaths) -> Result<()> {
    if is_vacant(paths) {
        return Ok(());
    }
    let is_data = paths.data.symlink_metadata().is_ok();
    let there = if is_data { &paths.data } else { &paths.index };
    Err(named(there)(io::Error::from_raw_os_error(libc::EEXIST)))
}

/// Removes a pair that was never opened: what is left of an attempt that made the pair and was cut
/// off before anything else knew of it. False when it is another one.
///
/// # Errors
/// `Io`.
pub fn remove_unused(paths: &PairPaths) -> Result<bool> {
    let Ok(data) = open_regular_for_writing(&paths.data) else { return Ok(false) };
    if data.try_lock().is_err() || !is_blank_index(&paths.index) || !is_blank_data(&data) {
        return Ok(false);
    }
    for path in [&paths.data, &paths.index] {
        std::fs::remove_file(path)
            .map_err(|error| Error::io(format!("remove {}", path.display()), &error))?;
    }
    Ok(true)
}

/// Whether the file at `path` is one of the pair with this UUID, as a header spells it.
#[must_use]
pub fn is_of_pair(path: &Path, uuid: &str) -> bool {
    let header = open_regular_for_writing(path).ok().and_then(|file| read_header(&file, 0).ok());
    header.flatten().is_some_and(|header| header.uuid.to_string() == uuid)
}

/// An index without entries; that of a sparse upper has not even a header.
fn is_blank_index(path: &Path) -> bool {
    let Ok(file) = open_regular_for_writing(path) else { return false };
    match file.len_bytes() {
        Ok(0) => true,
        Ok(HEADER_BYTES) => {
            let header = read_header(&file, 0).ok().flatten();
            header.is_some_and(|header| !header.flags.is_data_file() && !header.flags.is_sealed())
        }
        _ => false,
    }
}

fn is_blank_data(data: &File) -> bool {
    let Ok(Some(header)) = read_header(data, 0) else { return false };
    if !header.flags.is_data_file() || header.flags.is_sealed() {
        return false;
    }
    let Ok(len) = data.len_bytes() else { return false };
    let extents = data_extents_of(data, "the data file", HEADER_BYTES..len);
    extents.is_ok_and(|extents| extents.is_empty())
}

/// As [`create`], in either form. A size of 0 is that of the layer below, for whoever makes the
/// layers of an image one by one.
///
/// # Errors
/// As [`create_fresh`].
pub fn create_as(paths: &PairPaths, new: &NewPair, form: Form) -> Result<()> {
    create_filled(paths, new, form, |_, _| Ok(()))
}

/// As [`create_as`], of a pair that holds something from the start: `fill` gets its data file and
/// its index, which have their headers and not yet their names, and syncs what it writes.
///
/// # Errors
/// As [`create_as`], and those of `fill`.
pub fn create_filled(
    paths: &PairPaths,
    new: &NewPair,
    form: Form,
    fill: impl FnOnce(&File, &File) -> Result<()>,
) -> Result<()> {
    let sectors = bytes_to_sectors(new.virtual_bytes);
    if sectors.is_none_or(|sectors| sectors > VIRTUAL_SECTORS_MAX) {
        let message = format!("a disk of {} bytes: expected whole sectors", new.virtual_bytes);
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    check_vacant(paths)?;
    if is_same_name(&paths.data, &paths.index) {
        let message = format!(
            "{} and {} are one file, expected the data and the index of a pair",
            paths.data.display(),
            paths.index.display()
        );
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    let data = Draft::open(&paths.data)?;
    let index = Draft::open(&paths.index).inspect_err(|_| data.remove())?;
    let drafts = [data, index];
    // Once more: somebody else may have made it before the lock was ours.
    let made = check_vacant(paths)
        .and_then(|()| remove_filled_index(&paths.index))
        .and_then(|()| write_drafts(&drafts, new, form))
        .and_then(|()| fill(&drafts[0].file, &drafts[1].file))
        .and_then(|()| publish(&drafts));
    made.inspect_err(|_| drafts.iter().for_each(Draft::remove))
}

/// Whether two paths would make the same file.
fn is_same_name(one: &Path, other: &Path) -> bool {
    let folder = |path: &Path| match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.canonicalize(),
        _ => Path::new(".").canonicalize(),
    };
    let is_same_folder =
        || folder(one).is_ok_and(|one| folder(other).is_ok_and(|other| one == other));
    one == other || one.file_name() == other.file_name() && is_same_folder()
}

/// A file under its temporary name, locked.
struct Draft<'a> {
    file: File,
    path: PathBuf,
    target: &'a Path,
}

impl<'a> Draft<'a> {
    fn open(target: &'a Path) -> Result<Self> {
        let path = draft_of(target);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o666)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits())
            .open(&path)
            .map_err(named(&path))?;
        // Locked, and still the file of that name: nobody else is at it, nor has it become a pair.
        let is_ours = file.try_lock().is_ok()
            && FileIdentity::of(&file).ok().is_some_and(|opened| {
                let there = File::open(&path).and_then(|there| FileIdentity::of(&there));
                there.is_ok_and(|there| there == opened)
            });
        if !is_ours {
            let message = format!("{}: another process makes it", target.display());
            return Err(Error::new(ErrorKind::Busy, message));
        }
        Ok(Self { file, path, target })
    }

    fn write(&self, header: Option<&Header>, bytes: u64) -> Result<()> {
        let written = Storage::set_len(&self.file, 0)
            .and_then(|()| Storage::set_len(&self.file, bytes))
            .and_then(|()| header.map_or(Ok(()), |header| self.file.write_at(0, &header.encode())))
            .and_then(|()| self.file.sync_all());
        written.map_err(named(self.target))
    }

    /// Removes it, if it has not become anything else.
    fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn write_drafts([data, index]: &[Draft<'_>; 2], new: &NewPair, form: Form) -> Result<()> {
    let flags = Flags::HEADER.with(Flags::DATA_FILE);
    let header = |flags| Header::new(flags, new.virtual_bytes, new.uuid, new.parent_uuid);
    let Form::Sparse { over_lowers } = form else {
        let data_header = header(flags);
        let index_header = Header {
            flags: Flags::HEADER,
            index_offset_bytes: HEADER_BYTES,
            ..data_header.clone()
        };
        index.write(Some(&index_header), HEADER_BYTES)?;
        return data.write(Some(&data_header), HEADER_BYTES);
    };
    let bytes = HEADER_BYTES.saturating_add(new.virtual_bytes);
    index.write(None, 0)?;
    data.write(Some(&header(flags.with(Flags::SPARSE_WRITABLE))), bytes)?;
    let told = || format!("make {}", data.target.display());
    if over_lowers {
        check_blocks(&data.file).context(told)?;
    }
    let name = data.target.display().to_string();
    if !data_extents_of(&data.file, &name, HEADER_BYTES..bytes).context(told)?.is_empty() {
        let message = format!(
            "{name}: the file system does not tell holes from data, which the sparse form needs"
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    debug_assert!(sparse::is_sparse(&data.file).is_ok_and(|it_is| it_is), "as it was written");
    Ok(())
}

/// Gives both their names, the index first.
fn publish([data, index]: &[Draft<'_>; 2]) -> Result<()> {
    if index.target.symlink_metadata().is_ok() {
        // Only what a cut attempt left comes here, see `is_vacant`; and `data.new` is locked.
        std::fs::rename(&index.path, index.target).map_err(named(index.target))?;
    } else {
        rename_new(index)?;
    }
    let published = sync_folder_of(index.target)
        .map_err(named(index.target))
        .and_then(|()| rename_new(data))
        .inspect_err(|_| _ = std::fs::remove_file(index.target));
    published?;
    sync_folder_of(data.target).map_err(|error| {
        let _ = std::fs::remove_file(data.target);
        let _ = std::fs::remove_file(index.target);
        Error::io(format!("sync the folder of {}", data.target.display()), &error)
    })
}

/// Renames, unless somebody was quicker.
fn rename_new(draft: &Draft<'_>) -> Result<()> {
    let flags = RenameFlags::RENAME_NOREPLACE;
    let renamed = renameat2(AT_FDCWD, &draft.path, AT_FDCWD, draft.target, flags);
    match renamed {
        // Not every file system can; then the look before has to do.
        Err(nix::errno::Errno::EINVAL) if draft.target.symlink_metadata().is_err() => {
            std::fs::rename(&draft.path, draft.target).map_err(named(draft.target))
        }
        outcome => outcome.map_err(|errno| named(draft.target)(errno.into())),
    }
}

fn named(path: &Path) -> impl Fn(io::Error) -> Error {
    let action = format!("make {}", path.display());
    move |error| Error::io(action.clone(), &error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_pair() -> NewPair {
        let (uuid, parent_uuid) = (new_uuid().unwrap(), UuidText::NIL);
        NewPair { virtual_bytes: 1 << 20, uuid, parent_uuid }
    }

    fn names(folder: &Path) -> Vec<std::ffi::OsString> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_cannot_be_filled_leaves_nothing_and_what_is_filled_is_whole_when_it_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        let paths = PairPaths { data: here.join("data"), index: here.join("index") };
        for form in [Form::Append, Form::Sparse { over_lowers: true }] {
            let full = create_filled(&paths, &new_pair(), form, |data, _| {
                assert_eq!(names(here), ["data.new", "index.new"]);
                data.write_at(HEADER_BYTES, &[1; 4096]).unwrap();
                Err(Error::io("write", &io::ErrorKind::StorageFull.into()))
            });
            assert_eq!(full.unwrap_err().kind(), ErrorKind::NoSpace);
            assert!(names(here).is_empty());
            create_filled(&paths, &new_pair(), form, |data, _| {
                data.write_at(HEADER_BYTES, &[1; 4096]).unwrap();
                Ok(())
            })
            .unwrap();
            assert_eq!(names(here), ["data", "index"]);
            let mut seen = [0; 4096];
            let data = File::open(&paths.data).unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&data, &mut seen, HEADER_BYTES).unwrap();
            assert_eq!(seen, [1; 4096]);
            std::fs::remove_file(&paths.data).unwrap();
            std::fs::remove_file(&paths.index).unwrap();
        }
    }

    /// What is left when the process is killed between the two renamings.
    #[test]
    fn a_filled_index_is_in_the_way_unless_its_data_file_is_still_a_draft() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        let paths = PairPaths { data: here.join("data"), index: here.join("index") };
        let fill = |_: &File, index: &File| {
            index.write_at(HEADER_BYTES, &[0xff; 16]).unwrap();
            Ok(())
        };
        create_filled(&paths, &new_pair(), Form::Append, fill).unwrap();
        assert!(!is_vacant(&paths));
        std::fs::rename(&paths.data, here.join("data.new")).unwrap();
        assert!(is_vacant(&paths));
        let cut_again = create_filled(&paths, &new_pair(), Form::Append, |_, _| {
            assert_eq!(names(here), ["data.new", "index.new"], "nobody would know whose it is");
            Err(Error::new(ErrorKind::Canceled, "cut again"))
        });
        assert_eq!(cut_again.unwrap_err().kind(), ErrorKind::Canceled);
        create(&paths, &new_pair()).unwrap();
        assert_eq!(paths.index.metadata().unwrap().len(), HEADER_BYTES);
        // The index of another pair is somebody's.
        let other = PairPaths { data: here.join("other"), index: here.join("other.index") };
        create_filled(&other, &new_pair(), Form::Append, fill).unwrap();
        std::fs::rename(&paths.data, here.join("other.new")).unwrap();
        std::fs::remove_file(&other.data).unwrap();
        let error = create(&other, &new_pair()).unwrap_err();
        assert_eq!(error.errno(), libc::EEXIST);
        assert_eq!(other.index.metadata().unwrap().len(), HEADER_BYTES + 16);
    }

    /// Whoever looked before another one had made the pair once took its index away.
    #[test]
    fn two_that_make_the_same_pair_leave_one_that_is_whole() {
        for _ in 0..200 {
            let folder = tempfile::tempdir().unwrap();
            let here = folder.path();
            let paths = PairPaths { data: here.join("data"), index: here.join("index") };
            let start = std::sync::Barrier::new(3);
            let made: Vec<_> = std::thread::scope(|scope| {
                let make = || {
                    start.wait();
                    create(&paths, &new_pair())
                };
                let threads: Vec<_> = (0..3).map(|_| scope.spawn(make)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1, "{made:?}");
            assert_eq!(names(here), ["data", "index"], "{made:?}");
            let data = open_regular_for_writing(&paths.data).unwrap();
            let uuid = read_header(&data, 0).unwrap().unwrap().uuid.to_string();
            assert!(is_of_pair(&paths.index, &uuid), "one of each");
        }
    }

    #[test]
    fn a_pair_that_cannot_be_made_leaves_no_draft() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        let data = here.join("data");
        let missing = here.join("none/index");
        let itself = here.join(".").join("data");
        for (index, kind) in [
            (missing, ErrorKind::NotFound),
            (data.clone(), ErrorKind::InvalidConfig),
            (itself, ErrorKind::InvalidConfig),
        ] {
            for form in [Form::Append, Form::Sparse { over_lowers: false }] {
                let paths = PairPaths { data: data.clone(), index: index.clone() };
                let error = create_fresh(&paths, 1 << 20, form).unwrap_err();
                assert_eq!(error.kind(), kind, "{error:#}");
                assert_eq!(std::fs::read_dir(here).unwrap().count(), 0, "{error:#}");
            }
        }
    }
}
