//! Files that are written as a whole: they appear under their name only when they are complete and
//! synced.

use crate::error::{Error, ErrorKind, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Error as IoError, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Names tried for a file that is to replace another: each is this process's own, so that a second
/// one is only needed beside what a namesake of an earlier boot left.
const NAME_TRIES_MAX: u32 = 100;

/// Links that are followed one after the other, as the kernel does.
const LINKS_MAX: u32 = 40;

/// A file that a command writes. A regular file appears under its name only with
/// [`OutputFile::commit`]. Until then it has no name at all where the file system can do that:
/// whatever ends the process, SIGKILL included, nothing is left. Elsewhere (NFS, FAT) it is a
/// hidden neighbour that goes when it is dropped, but stays when the process is killed.
#[derive(Debug)]
pub struct OutputFile {
    target: PathBuf,
    kind: Kind,
    /// Whether it takes the place of a file that is there.
    replaces: bool,
}

#[derive(Debug)]
enum Kind {
    Unnamed(Unnamed),
    Hidden(tempfile::NamedTempFile),
    // A device or a pipe: written as it is.
    InPlace(File),
}

impl OutputFile {
    /// Prepares to write `target`. An existing regular file is replaced as a whole.
    ///
    /// # Errors
    /// What the operating system says; a folder is refused before anything is written.
    pub fn create(target: &Path) -> Result<Self> {
        Self::create_as(target, Unnamed::create)
    }

    /// As [`OutputFile::create`], but what is there, now or at the end, is never replaced.
    ///
    /// # Errors
    /// As there, and when something is there.
    pub fn create_new(target: &Path) -> Result<Self> {
        Self::create_new_as(target, Unnamed::create)
    }

    fn create_new_as(
        target: &Path,
        unnamed: impl FnOnce(&Path, &OsStr) -> Option<Unnamed>,
    ) -> Result<Self> {
        if target.symlink_metadata().is_ok() {
            let taken = Errno::EEXIST.into();
            return Err(Error::io(format!("write {}", target.display()), &taken));
        }
        Ok(Self { replaces: false, ..Self::create_as(target, unnamed)? })
    }

    fn create_as(
        target: &Path,
        unnamed: impl FnOnce(&Path, &OsStr) -> Option<Unnamed>,
    ) -> Result<Self> {
        let failed = |error: &IoError| Error::io(format!("write {}", target.display()), error);
        if target.as_os_str() == "-" {
            let message = "-: standard output cannot be replaced as a whole: name a file, or ./-";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if is_open_file(target) {
            let message = format!(
                "{} is an open file and cannot be replaced: tell the name of the file itself",
                target.display()
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let is_special = match std::fs::metadata(target) {
            Ok(found) if found.is_dir() => return Err(failed(&Errno::EISDIR.into())),
            Ok(found) => {
                let kind = found.file_type();
                kind.is_block_device() || kind.is_char_device() || kind.is_fifo()
            }
            Err(_) => false,
        };
        if is_special {
            let file = File::options().write(true).open(target).map_err(|error| failed(&error))?;
            return Ok(Self {
                target: target.to_owned(),
                kind: Kind::InPlace(file),
                replaces: true,
            });
        }
        let folder = folder_of(target);
        let name = target.file_name().ok_or_else(|| failed(&Errno::EISDIR.into()))?;
        if let Some(file) = unnamed(folder, name) {
            return Ok(Self {
                target: target.to_owned(),
                kind: Kind::Unnamed(file),
                replaces: true,
            });
        }
        let hidden = tempfile::Builder::new()
            .prefix(".obd-ublk-")
            .suffix(".partial")
            // As any new file: what the umask leaves of it.
            .permissions(std::fs::Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .map_err(|error| failed(&error))?;
        Ok(Self { target: target.to_owned(), kind: Kind::Hidden(hidden), replaces: true })
    }

    /// The name that it will have.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        match &self.kind {
            Kind::Unnamed(unnamed) => &unnamed.file,
            Kind::Hidden(hidden) => hidden.as_file(),
            Kind::InPlace(file) => file,
        }
    }

    /// Whether it can only be written from front to back.
    #[must_use]
    pub fn is_stream(&self) -> bool {
        (&mut self.file()).stream_position().is_err()
    }

    /// Whether the file is new and can have holes.
    #[must_use]
    pub fn is_new(&self) -> bool {
        !matches!(self.kind, Kind::InPlace(_))
    }

    /// Syncs the content and gives the file its name.
    ///
    /// # Errors
    /// What the operating system says; what was under the name is still there then.
    pub fn commit(self) -> Result<()> {
        let target = self.target.display().to_string();
        let failed = |error: &IoError| Error::io(format!("write {target}"), error);
        match self.kind {
            Kind::Unnamed(unnamed) => unnamed.commit(self.replaces).map_err(|error| failed(&error)),
            Kind::Hidden(hidden) => {
                hidden.as_file().sync_all().map_err(|error| failed(&error))?;
                let named = if self.replaces {
                    hidden.persist(&self.target)
                } else {
                    hidden.persist_noclobber(&self.target)
                };
                named.map_err(|error| failed(&error.error))?;
                sync_folder(folder_of(&self.target)).map_err(|error| failed(&error))
            }
            // A pipe cannot be synced; a device should be.
            Kind::InPlace(file) => match file.sync_all() {
                Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(failed(&error)),
                _ => Ok(()),
            },
        }
    }
}

/// Whether the name leads to a regular file that a process has open, as `/dev/stdout` does behind
/// `> FILE`: what was replaced would be the name, for all programs of the host.
fn is_open_file(target: &Path) -> bool {
    if !std::fs::metadata(target).is_ok_and(|found| found.is_file()) {
        return false;
    }
    let mut here = target.to_owned();
    for _ in 0..LINKS_MAX {
        if folder_of(&here).canonicalize().is_ok_and(|folder| folder.starts_with("/proc")) {
            return true;
        }
        let Ok(next) = here.read_link() else { return false };
        here = folder_of(&here).join(next);
    }
    false
}

pub(super) fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a new name durable. A folder that may be written but not read cannot be synced; the name
/// is there all the same.
fn sync_folder(folder: &Path) -> Result<(), IoError> {
    match File::open(folder) {
        Ok(folder) => folder.sync_all(),
        Err(_) => Ok(()),
    }
}

/// A file without a name, and where it is to get one. The folder is held open: it may be renamed or
/// mounted over meanwhile.
#[derive(Debug)]
struct Unnamed {
    file: File,
    folder: OwnedFd,
    name: OsString,
}

impl Unnamed {
    /// `None` where it cannot be done, or could not be given a name later: that takes `/proc`.
    fn create(folder: &Path, name: &OsStr) -> Option<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let folder = open(folder, flags, Mode::empty()).ok()?;
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        // As any new file: what the umask leaves of it.
        let file = openat(&folder, ".", flags, Mode::from_bits_truncate(0o666)).ok()?;
        let this = Self { file: File::from(file), folder, name: name.to_owned() };
        this.path_of_file().exists().then_some(this)
    }

    fn path_of_file(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    fn commit(self, replaces: bool) -> Result<(), IoError> {
        self.file.sync_all()?;
        match self.link(&self.name) {
            Err(Errno::EEXIST) if replaces => self.replace()?,
            other => other?,
        }
        sync_folder(Path::new(&format!("/proc/self/fd/{}", self.folder.as_raw_fd())))
    }

    fn link(&self, name: &OsStr) -> nix::Result<()> {
        let flags = AtFlags::AT_SYMLINK_FOLLOW;
        linkat(AT_FDCWD, &self.path_of_file(), &self.folder, name, flags)
    }

    /// A link cannot take a name that is taken, a renaming can: for the moment between the two the
    /// file, whole already, has a hidden name.
    fn replace(&self) -> nix::Result<()> {
        let process = std::process::id();
        let names = (0..NAME_TRIES_MAX).map(|i| format!(".obd-ublk-{process}-{i}.partial"));
        for hidden in names {
            match self.link(OsStr::new(&hidden)) {
                Err(Errno::EEXIST) => continue,
                other => other?,
            }
            let renamed =
                renameat(&self.folder, hidden.as_str(), &self.folder, self.name.as_os_str());
            return renamed.inspect_err(|_| {
                let _ = unlinkat(&self.folder, hidden.as_str(), UnlinkatFlags::NoRemoveDir);
            });
        }
        Err(Errno::EEXIST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(folder: &Path) -> Vec<OsString> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    }

    /// The two ways to make a new file: without a name, and where that cannot be done.
    const BOTH: [fn(&Path) -> OutputFile; 2] = [
        |target| OutputFile::create(target).unwrap(),
        |target| OutputFile::create_as(target, |_, _| None).unwrap(),
    ];

    #[test]
    fn an_output_file_that_is_not_committed_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        for create in BOTH {
            let output = create(&target);
            assert!(output.is_new() && !output.is_stream());
            output.file().set_len(1 << 20).unwrap();
            drop(output);
            assert!(names(folder.path()).is_empty());
        }
    }

    #[test]
    fn a_file_without_a_name_is_not_even_there_while_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let output = OutputFile::create(&folder.path().join("out")).unwrap();
        output.file().set_len(4096).unwrap();
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_committed_file_has_its_content_its_name_and_the_mode_of_a_new_file() {
        let folder = tempfile::tempdir().unwrap();
        let usual = File::create(folder.path().join("usual")).unwrap().metadata().unwrap();
        std::fs::remove_file(folder.path().join("usual")).unwrap();
        let target = folder.path().join("out");
        for create in BOTH {
            let output = create(&target);
            output.file().write_all(b"whole").unwrap();
            output.commit().unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), b"whole");
            let mode = target.metadata().unwrap().permissions().mode();
            assert_eq!(mode, usual.permissions().mode());
            assert_eq!(names(folder.path()), ["out"]);
            std::fs::remove_file(&target).unwrap();
        }
    }

    #[test]
    fn an_existing_file_or_link_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (target, other) = (folder.path().join("out"), folder.path().join("other"));
        std::fs::write(&other, "precious").unwrap();
        // What a process of the same number left in an earlier life.
        let taken = format!(".obd-ublk-{}-0.partial", std::process::id());
        std::fs::write(folder.path().join(&taken), "").unwrap();
        for is_link in [false, true] {
            for create in BOTH {
                let _ = std::fs::remove_file(&target);
                if is_link {
                    std::os::unix::fs::symlink(&other, &target).unwrap();
                } else {
                    std::fs::write(&target, "something much longer").unwrap();
                }
                let output = create(&target);
                output.file().write_all(b"new").unwrap();
                output.commit().unwrap();
                assert_eq!(std::fs::read(&target).unwrap(), b"new");
                assert!(target.symlink_metadata().unwrap().is_file());
            }
        }
        assert_eq!(std::fs::read(&other).unwrap(), b"precious");
        let mut left = names(folder.path());
        left.sort();
        assert_eq!(left, [OsString::from(taken), "other".into(), "out".into()]);
    }

    /// As root, `merge IMAGE /dev/stdout > layer` once put the layer in the place of `/dev/stdout`.
    #[test]
    fn a_name_of_an_open_file_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let there = File::create(folder.path().join("there")).unwrap();
        let (link, chain) = (folder.path().join("link"), folder.path().join("chain"));
        let name = PathBuf::from(format!("/proc/self/fd/{}", there.as_raw_fd()));
        std::os::unix::fs::symlink(&name, &link).unwrap();
        std::os::unix::fs::symlink("link", &chain).unwrap();
        for target in [name, link.clone(), chain] {
            let error = OutputFile::create(&target).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains("an open file"), "{error}");
        }
        assert!(link.is_symlink());
        let error = OutputFile::create(Path::new("-")).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(!Path::new("-").exists());
        // A pipe or a device behind such a name is written as it is.
        let null = File::options().write(true).open("/dev/null").unwrap();
        let target = PathBuf::from(format!("/proc/self/fd/{}", null.as_raw_fd()));
        assert!(!OutputFile::create(&target).unwrap().is_new());
    }

    #[test]
    fn a_new_file_takes_the_place_of_nothing_however_late_that_comes() {
        let folder = tempfile::tempdir().unwrap();
        let (target, other) = (folder.path().join("out"), folder.path().join("other"));
        std::fs::write(&other, "precious").unwrap();
        let both: [fn(&Path) -> Result<OutputFile>; 2] =
            [OutputFile::create_new, |target| OutputFile::create_new_as(target, |_, _| None)];
        for create in both {
            let error = create(&other).map(drop).unwrap_err();
            assert_eq!(error.errno(), libc::EEXIST, "{error}");
            let output = create(&target).unwrap();
            output.file().write_all(b"new").unwrap();
            output.commit().unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), b"new");
            std::fs::remove_file(&target).unwrap();
            let output = create(&target).unwrap();
            std::os::unix::fs::symlink(&other, &target).unwrap();
            assert_eq!(output.commit().unwrap_err().errno(), libc::EEXIST);
            assert_eq!(std::fs::read(&other).unwrap(), b"precious");
            std::fs::remove_file(&target).unwrap();
            assert_eq!(names(folder.path()), ["other"]);
        }
    }

    #[test]
    fn a_folder_is_refused_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        for target in [folder.path(), Path::new("/"), Path::new("..")] {
            let error = OutputFile::create(target).map(drop).unwrap_err();
            assert_eq!(error.errno(), libc::EISDIR, "{error}");
        }
        assert!(OutputFile::create(&folder.path().join("none/out")).is_err());
    }

    #[test]
    fn a_file_whose_name_became_a_folder_leaves_nothing_but_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        for create in BOTH {
            let output = create(&target);
            std::fs::create_dir(&target).unwrap();
            assert!(output.commit().is_err());
            assert_eq!(names(folder.path()), ["out"]);
            std::fs::remove_dir(&target).unwrap();
        }
    }
}
