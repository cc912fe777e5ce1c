//! A name in a folder that is held open: it stays the same place whatever happens to the path that
//! led there, in whatever mount namespace the next call is made.

use super::file::{FileIdentity, open_regular, open_regular_for_writing};
use crate::error::{Error, ErrorKind, Result};
use rustix::fs::{
    AtFlags, Mode, OFlags, RenameFlags, linkat, openat, renameat, renameat_with, statat, unlinkat,
};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Where a file is, or may come to be.
#[derive(Debug)]
pub struct Place {
    folder: File,
    name: OsString,
    path: PathBuf,
}

impl Place {
    /// The place that `path` names. Links are followed up to the folder, not beyond it.
    ///
    /// # Errors
    /// `InvalidConfig` for a path without a name at its end, `NotFound` without its folder, `Io`.
    pub fn of(path: &Path) -> Result<Self> {
        let Some(name) = path.file_name() else {
            let message = format!("{}: expected the name of a file", path.display());
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        };
        let parent = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let folder = File::open(parent)
            .map_err(|error| Error::io(format!("open the folder {}", parent.display()), &error))?;
        Ok(Self { folder, name: name.to_owned(), path: path.to_owned() })
    }

    /// As [`Place::of`] where the file is in the end: links are followed to it.
    ///
    /// # Errors
    /// As there; `NotFound` without the file.
    pub fn of_file(path: &Path) -> Result<Self> {
        let found = std::fs::canonicalize(path)
            .map_err(|error| Error::io(format!("resolve {}", path.display()), &error))?;
        Self::of(&found)
    }

    /// The same place again.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn try_clone(&self) -> Result<Self> {
        self.beside("")
    }

    /// The place beside this one whose name has `suffix` at its end.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn beside(&self, suffix: &str) -> Result<Self> {
        let mut name = self.name.clone();
        name.push(suffix);
        let folder = self.folder.try_clone().map_err(|error| self.told("hold", &error))?;
        Ok(Self { folder, path: self.path.with_file_name(&name), name })
    }

    /// For messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn told(&self, what: &str, error: &io::Error) -> Error {
        Error::io(format!("{what} {}", self.path.display()), error)
    }

    /// The file that is there, for reading and writing; as [`open_regular_for_writing`].
    ///
    /// # Errors
    /// As there.
    pub fn open_for_writing(&self) -> Result<File> {
        open_regular_for_writing(&self.in_this_process())
    }

    /// The file that is there; as [`open_regular`].
    ///
    /// # Errors
    /// As there.
    pub fn open(&self) -> Result<File> {
        open_regular(&self.in_this_process())
    }

    /// A path that leads here from this process, whatever its mounts.
    fn in_this_process(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        let folder = format!("/proc/self/fd/{}", self.folder.as_raw_fd());
        Path::new(&folder).join(&self.name)
    }

    /// Makes an empty file with these permissions. Nothing may be there.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn create_new(&self, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        Ok(openat(&self.folder, &self.name, flags, Mode::from_raw_mode(mode))?.into())
    }

    /// What is there, a link not followed; `None` for nothing.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn identity(&self) -> io::Result<Option<FileIdentity>> {
        match statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => {
                Ok(Some(FileIdentity { device_number: found.st_dev, inode: found.st_ino }))
            }
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Gives the file here a second name, which must be free.
    ///
    /// # Errors
    /// What the operating system says; `CrossesDevices` on another file system or mount.
    pub fn link_to(&self, other: &Self) -> io::Result<()> {
        Ok(linkat(&self.folder, &self.name, &other.folder, &other.name, AtFlags::empty())?)
    }

    /// Gives the file here the name of `other`, over what is there.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn rename_over(&self, other: &Self) -> io::Result<()> {
        Ok(renameat(&self.folder, &self.name, &other.folder, &other.name)?)
    }

    /// As [`Place::rename_over`] where nothing may be there.
    ///
    /// # Errors
    /// As there; `AlreadyExists`.
    pub fn rename_to_free(&self, other: &Self) -> io::Result<()> {
        let flags = RenameFlags::NOREPLACE;
        Ok(renameat_with(&self.folder, &self.name, &other.folder, &other.name, flags)?)
    }

    /// Whether the other is this very place, by whatever path it was found.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn is_same_as(&self, other: &Self) -> io::Result<bool> {
        let folders = (FileIdentity::of(&self.folder)?, FileIdentity::of(&other.folder)?);
        Ok(self.name == other.name && folders.0 == folders.1)
    }

    /// The device that the folder lies on.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn device_number(&self) -> io::Result<u64> {
        Ok(FileIdentity::of(&self.folder)?.device_number)
    }

    /// Removes the file here, if there is one.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn remove(&self) -> io::Result<()> {
        match unlinkat(&self.folder, &self.name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes the empty folder here, if there is one.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn remove_folder(&self) -> io::Result<()> {
        match unlinkat(&self.folder, &self.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes the names in the folder durable.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn sync(&self) -> io::Result<()> {
        self.folder.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_place_stays_where_it_was_when_its_folder_is_renamed() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        fs::create_dir(&old).unwrap();
        let place = Place::of(&old.join("file")).unwrap();
        assert_eq!(place.identity().unwrap(), None);
        fs::rename(&old, &new).unwrap();
        let file = place.create_new(0o600).unwrap();
        assert_eq!(place.identity().unwrap(), Some(FileIdentity::of(&file).unwrap()));
        assert!(place.create_new(0o600).is_err(), "it is taken");
        let beside = place.beside(".two").unwrap();
        place.link_to(&beside).unwrap();
        assert_eq!(beside.identity().unwrap(), place.identity().unwrap());
        assert_eq!(beside.path(), old.join("file.two"));
        place.remove().unwrap();
        place.remove().unwrap();
        beside.rename_over(&place).unwrap();
        place.sync().unwrap();
        assert!(place.open_for_writing().is_ok() && place.open().is_ok());
        assert_eq!(fs::read_dir(&new).unwrap().count(), 1);
    }

    #[test]
    fn a_place_needs_a_folder_and_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |path: &Path| Place::of(path).unwrap_err().kind();
        assert_eq!(kind(Path::new("/")), ErrorKind::InvalidConfig);
        assert_eq!(kind(&folder.path().join("none/file")), ErrorKind::NotFound);
        fs::write(folder.path().join("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", folder.path().join("link")).unwrap();
        let link = folder.path().join("link");
        assert_eq!(Place::of(&link).unwrap().path(), link);
        let real = fs::canonicalize(folder.path()).unwrap().join("file");
        assert_eq!(Place::of_file(&link).unwrap().path(), real);
    }
}
