//! `/run/obd-ublk`: one folder per device, and who may touch which.
//!
//! ```text
//!   /run/obd-ublk/           0700, root
//!     N/                     locked by the server of device N for as long as it lives
//!       state.json           see `state`
//!       spare                room for the next state when there is no other
//!       control.sock         see `control`
//!       log
//!       trouble              the last requests that failed or were slow, see `telemetry::trouble`
//!       lost                 why no more servers are tried, see `supervisor`
//!     supervisor.sock, supervisor.log
//! ```
//!
//! A folder is claimed by making and locking it, before the kernel is asked for device N: whatever
//! kills a server, the folder of its number is there to find the remains by. The lock is the
//! kernel's (`flock` on the folder) and goes with its holder. Whoever removes a folder holds its
//! lock, so a folder that was locked must still be the one under its name: see [`Slot::try_lock`].

use super::state::State;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::DEVICE_ID_MAX;
use crate::upper::RUN_DIR_DEFAULT;
use nix::fcntl::OFlag;
use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The variable that moves the folder. Uppers have their journals below it.
pub use crate::upper::RUN_DIR_VARIABLE;

/// The ring of troubles in the folder of a device.
pub const TROUBLE_NAME: &str = "trouble";

/// How often the maker of a new folder tries to lock it, a millisecond apart: whoever takes it for
/// remains has the lock only while it removes them, but may lose the processor meanwhile.
const LOCK_TRIES_MAX: u32 = 500;

/// How often a folder is made that others take for remains. Each of them does so once per attach.
const MAKE_TRIES_MAX: u32 = 100;

/// The folder of all devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir {
    path: PathBuf,
}

/// The folder that a variable moves, as an absolute path.
pub(super) fn folder_of_host(variable: &str, default: &str) -> PathBuf {
    let path = std::env::var_os(variable).filter(|path| !path.is_empty());
    let path = PathBuf::from(path.unwrap_or_else(|| default.into()));
    std::path::absolute(&path).unwrap_or(path)
}

impl Default for RunDir {
    fn default() -> Self {
        Self { path: RUN_DIR_DEFAULT.into() }
    }
}

impl RunDir {
    /// The folder of this host, or what [`RUN_DIR_VARIABLE`] says. It need not exist.
    #[must_use]
    pub fn of_host() -> Self {
        Self { path: folder_of_host(RUN_DIR_VARIABLE, RUN_DIR_DEFAULT) }
    }

    /// The folder at `path`.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of the folder of device `id`, whether it exists or not.
    #[must_use]
    pub fn folder(&self, id: u32) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// Makes the folder if needed, and checks it.
    ///
    /// # Errors
    /// As [`RunDir::check`].
    pub fn prepare(&self) -> Result<()> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.path);
        made.map_err(|error| {
            Error::io(format!("make the run folder {}", self.path.display()), &error)
        })?;
        self.check()
    }

    /// Whether the folder can be believed. One that does not exist can: we shall make it.
    ///
    /// # Errors
    /// `Unsupported` when it belongs to somebody else or others may write to it: what it says
    /// about processes and devices may then be anybody's word.
    pub fn check(&self) -> Result<()> {
        let metadata = match std::fs::metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                let told = format!("look at the run folder {}", self.path.display());
                return Err(Error::io(told, &error));
            }
        };
        let me = nix::unistd::geteuid().as_raw();
        if metadata.uid() == me && metadata.mode() & 0o022 == 0 {
            return Ok(());
        }
        let message = format!(
            "run folder {}: found owner {} and mode {:o}, expected owner {me} and nobody else \
             writing",
            self.path.display(),
            metadata.uid(),
            metadata.mode() & 0o7777
        );
        Err(Error::new(ErrorKind::Unsupported, message))
    }

    /// The numbers that have a folder, ascending. Other names are not ours and ignored.
    ///
    /// # Errors
    /// What the operating system says; a missing run folder is an empty one.
    pub fn ids(&self) -> Result<Vec<u32>> {
        let told = |error: &std::io::Error| {
            Error::io(format!("read the run folder {}", self.path.display()), error)
        };
        let entries = match std::fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(told(&error)),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let name = entry.map_err(|error| told(&error))?.file_name();
            let id = name.to_str().and_then(parse_id);
            ids.extend(id);
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Makes and locks the folder of device `id`; `None` when there is one already.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn claim(&self, id: u32) -> Result<Option<Slot>> {
        let path = self.folder(id);
        for _ in 0..MAKE_TRIES_MAX {
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(None),
                Err(error) => return Err(Error::io(format!("make {}", path.display()), &error)),
            }
            if let Some(slot) = lock_new(&path, id)? {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// Locks the existing folder of device `id`; `None` when there is none or somebody holds it.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn lock(&self, id: u32) -> Result<Option<Slot>> {
        Slot::try_lock(self.folder(id), id)
    }

    /// The state of device `id`, if it is written down.
    ///
    /// # Errors
    /// As [`State::load`].
    pub fn state(&self, id: u32) -> Result<Option<State>> {
        State::load(&self.folder(id), id)
    }
}

/// Locks the folder that was just made at `path`. Until then it looks like remains: somebody may be
/// looking at it, which takes a moment, or has removed it, which gives `None` at once.
fn lock_new(path: &Path, id: u32) -> Result<Option<Slot>> {
    for _ in 0..LOCK_TRIES_MAX {
        if let Some(slot) = Slot::try_lock(path.to_owned(), id)? {
            return Ok(Some(slot));
        }
        if !path.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(None)
}

/// A device number without sign, leading zeros or other frills.
#[must_use]
pub fn parse_id(text: &str) -> Option<u32> {
    let id = text.parse().ok().filter(|id| *id <= DEVICE_ID_MAX)?;
    (u32::to_string(&id) == text).then_some(id)
}

/// The folder of one device, locked by this process.
#[derive(Debug)]
pub struct Slot {
    id: u32,
    path: PathBuf,
    // The lock lives as long as this is open.
    _lock: File,
}

impl Slot {
    fn try_lock(path: PathBuf, id: u32) -> Result<Option<Self>> {
        let told = |error: &std::io::Error| Error::io(format!("lock {}", path.display()), error);
        // Whatever lies there under a number: opening it must not wait for somebody.
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let opened = File::options().read(true).custom_flags(flags.bits()).open(&path);
        let folder = match opened {
            Ok(folder) => folder,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(told(&error)),
        };
        match folder.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(told(&error)),
        }
        let held = folder.metadata().map_err(|error| told(&error))?;
        match std::fs::metadata(&path) {
            Ok(named) if (named.dev(), named.ino()) == (held.dev(), held.ino()) => {
                Ok(Some(Self { id, path, _lock: folder }))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(told(&error)),
        }
    }

    /// The number of its device.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The log file of the device's server.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        log_in(&self.path)
    }

    /// The ring of requests that failed or were slow.
    #[must_use]
    pub fn trouble(&self) -> PathBuf {
        self.path.join(TROUBLE_NAME)
    }

    /// The control socket of the device's server.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        socket_in(&self.path)
    }

    /// Removes the folder and lets go of it.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.path)
            .map_err(|error| Error::io(format!("remove {}", self.path.display()), &error))
    }
}

/// The log in the folder of a device.
#[must_use]
pub(super) fn log_in(folder: &Path) -> PathBuf {
    folder.join("log")
}

/// The control socket in the folder of a device.
#[must_use]
pub(super) fn socket_in(folder: &Path) -> PathBuf {
    folder.join("control.sock")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::Instant;

    fn run_dir() -> (tempfile::TempDir, RunDir) {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::at(folder.path().join("run"));
        run.prepare().unwrap();
        (folder, run)
    }

    #[test]
    fn a_number_is_claimed_once_and_free_again_when_its_folder_is_removed() {
        let (_folder, run) = run_dir();
        let slot = run.claim(3).unwrap().unwrap();
        assert!(run.claim(3).unwrap().is_none());
        assert!(run.lock(3).unwrap().is_none(), "its holder lives");
        assert_eq!(run.ids().unwrap(), [3]);
        slot.remove().unwrap();
        assert!(run.lock(3).unwrap().is_none(), "there is no folder");
        assert!(run.claim(3).unwrap().is_some());
    }

    #[test]
    fn a_folder_whose_holder_died_can_be_locked_but_not_claimed() {
        let (_folder, run) = run_dir();
        drop(run.claim(0).unwrap().unwrap());
        assert!(run.claim(0).unwrap().is_none());
        let slot = run.lock(0).unwrap().unwrap();
        assert_eq!((slot.id(), slot.path()), (0, run.folder(0).as_path()));
    }

    #[test]
    fn a_new_folder_that_others_take_for_remains_is_made_again() {
        let (_folder, run) = run_dir();
        let (removed, done) = (AtomicU32::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    if let Some(slot) = run.lock(3).unwrap() {
                        slot.remove().unwrap();
                        removed.fetch_add(1, Ordering::AcqRel);
                        // As it is: an attach looks for remains once, not a hundred times in a row.
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            let deadline = Instant::now() + Duration::from_secs(60);
            let mut claimed = Ok(Some(()));
            while matches!(claimed, Ok(Some(())))
                && removed.load(Ordering::Acquire) < 20
                && Instant::now() < deadline
            {
                claimed = run.claim(3).and_then(|slot| slot.map(Slot::remove).transpose());
            }
            done.store(true, Ordering::Release);
            assert!(matches!(claimed, Ok(Some(()))), "{claimed:?}");
        });
        assert!(removed.into_inner() >= 20, "nobody took a new folder for remains");
    }

    #[test]
    fn only_numbers_are_devices() {
        let (_folder, run) = run_dir();
        for name in ["10", "9", "control.sock", "007", "+1", "-1", "4294967296", "1048576", ""] {
            std::fs::create_dir_all(run.path().join(name)).unwrap();
        }
        assert_eq!(run.ids().unwrap(), [9, 10]);
    }

    #[test]
    fn a_run_folder_that_others_can_write_to_is_refused() {
        let (_folder, run) = run_dir();
        let set_mode = |mode| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(run.path(), permissions).unwrap();
            run.prepare()
        };
        assert!(set_mode(0o755).is_ok());
        for mode in [0o777, 0o770, 0o702] {
            let error = set_mode(mode).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(&format!("mode {mode:o}")), "{error}");
        }
    }

    #[test]
    fn a_missing_run_folder_has_no_devices() {
        assert!(RunDir::at("/nonexistent/run".into()).ids().unwrap().is_empty());
    }
}
