//! What was read first of images, kept between two attaches: small files beside the blobs. What
//! they say is for who writes them; here they are bytes with a name, an age and bounds.
//!
//! Each is written whole under a name of its own and then renamed. Nothing is synced: who reads one
//! looks whether it is whole. No lock is needed: whatever two processes do at a time, one of both
//! files is there in the end, and one that is removed is learned anew.

use super::digest::BlobDigest;
use super::evict::Trimmed;
use super::listing::{disk_bytes, touch};
use super::store::{check_owner, check_root, make_folder};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{
    TOUCH_LOG_BYTES_MAX, TOUCH_LOG_STRAY_MS, TOUCH_LOGS_BYTES_MAX, TOUCH_LOGS_MAX,
};
use crate::source::open_regular;
use crate::units::to_u64;
use std::fs::{File, Metadata};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The logs of all images.
#[derive(Clone, Debug)]
pub struct TouchLogs {
    root: PathBuf,
    folder: PathBuf,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TouchLogEntry {
    /// Its name.
    pub name: BlobDigest,
    /// Bytes that it takes of the disk.
    pub disk_bytes: u64,
    /// When it was written or read last.
    pub last_used: SystemTime,
}

/// What a check of them found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckedLogs {
    /// Logs that are whole.
    pub right: u64,
    /// Logs that are not.
    pub bad: Vec<BlobDigest>,
    /// Files that are no logs, and not about to become one.
    pub strays: u64,
}

/// What is in the folder.
#[derive(Debug, Default)]
struct Found {
    logs: Vec<TouchLogEntry>,
    strays: Vec<PathBuf>,
}

impl TouchLogs {
    /// Those of the cache whose folder is `root`. Nothing is made or looked at yet.
    #[must_use]
    pub fn of(root: &Path) -> Self {
        Self { root: root.to_owned(), folder: root.join("touched") }
    }

    /// Refuses folders in which somebody else could put files.
    fn check_ours(&self) -> Result<()> {
        check_root(&self.root)?;
        check_owner(&self.folder)
    }

    fn path(&self, name: &BlobDigest) -> PathBuf {
        self.folder.join(name.hex())
    }

    /// The bytes of a log, which counts as used now.
    ///
    /// # Errors
    /// `NotFound`; `InvalidConfig` for a folder in which others can write; `Unsupported` for one
    /// of more than [`TOUCH_LOG_BYTES_MAX`] bytes; `Io`.
    pub fn read(&self, name: &BlobDigest) -> Result<Vec<u8>> {
        let file = self.open(name)?;
        touch(&file);
        self.read_file(name, &file)
    }

    fn open(&self, name: &BlobDigest) -> Result<File> {
        self.check_ours()?;
        open_regular(&self.path(name))
    }

    fn read_file(&self, name: &BlobDigest, file: &File) -> Result<Vec<u8>> {
        let path = self.path(name);
        let mut bytes = Vec::new();
        let read = file.take(TOUCH_LOG_BYTES_MAX + 1).read_to_end(&mut bytes);
        read.map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
        if to_u64(bytes.len()) <= TOUCH_LOG_BYTES_MAX {
            return Ok(bytes);
        }
        let path = path.display();
        let message = format!("{path}: found more, expected at most {TOUCH_LOG_BYTES_MAX} bytes");
        Err(Error::new(ErrorKind::Unsupported, message))
    }

    /// Writes a log in place of what is there under its name, and removes the oldest others where
    /// there are too many.
    ///
    /// # Errors
    /// `InvalidConfig` for a folder in which others can write; `NoSpace`, `Io`.
    pub fn write(&self, name: &BlobDigest, bytes: &[u8]) -> Result<()> {
        let path = self.path(name);
        let named = |error: io::Error| Error::io(format!("write {}", path.display()), &error);
        make_folder(&self.folder)?;
        self.check_ours()?;
        let room = TOUCH_LOGS_BYTES_MAX.saturating_sub(to_u64(bytes.len()));
        self.trim_to(TOUCH_LOGS_MAX.saturating_sub(1), room)?;
        // A new state's hash of nothing is random: no two writers meet.
        let lot = RandomState::new().build_hasher().finish();
        let beside = self.folder.join(format!(".{}.{lot:016x}", name.hex()));
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let written = options
            .open(&beside)
            .and_then(|mut file| file.write_all(bytes))
            .and_then(|()| std::fs::rename(&beside, &path));
        written.map_err(|error| {
            let _ = std::fs::remove_file(&beside);
            named(error)
        })
    }

    /// Removes a log, if it is there.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self, name: &BlobDigest) -> Result<()> {
        remove(&self.path(name))
    }

    /// Every log, the longest unused first.
    ///
    /// # Errors
    /// `InvalidConfig` for a folder in which others can write; `Io`.
    pub fn list(&self) -> Result<Vec<TouchLogEntry>> {
        Ok(self.look()?.logs)
    }

    /// Removes those that were not used longest until there are no more of them than may be, and
    /// until they take no more than `target_bytes`; and what a killed writer left.
    ///
    /// # Errors
    /// `InvalidConfig` for a folder in which others can write; `Io`.
    pub fn trim(&self, target_bytes: Option<u64>) -> Result<Trimmed> {
        let most = target_bytes.unwrap_or(TOUCH_LOGS_BYTES_MAX).min(TOUCH_LOGS_BYTES_MAX);
        self.trim_to(TOUCH_LOGS_MAX, most)
    }

    fn trim_to(&self, count_max: usize, bytes_max: u64) -> Result<Trimmed> {
        let Found { logs, strays } = self.look()?;
        strays.iter().try_for_each(|stray| remove(stray))?;
        let bytes = logs.iter().map(|log| log.disk_bytes).fold(0, u64::saturating_add);
        let mut trimmed = Trimmed { bytes, ..Trimmed::default() };
        let mut left = logs.len();
        for log in logs {
            if left <= count_max && trimmed.bytes <= bytes_max {
                break;
            }
            self.remove(&log.name)?;
            left -= 1;
            trimmed.bytes = trimmed.bytes.saturating_sub(log.disk_bytes);
            trimmed.removed_bytes += log.disk_bytes;
            trimmed.removed += 1;
        }
        Ok(trimmed)
    }

    /// Reads all of them. `is_right` judges the bytes of one. With `repair` what is bad goes.
    ///
    /// # Errors
    /// `InvalidConfig` for a folder in which others can write; `Io`.
    pub fn check(&self, repair: bool, is_right: impl Fn(&[u8]) -> bool) -> Result<CheckedLogs> {
        let Found { logs, strays } = self.look()?;
        let mut checked = CheckedLogs { strays: to_u64(strays.len()), ..CheckedLogs::default() };
        for log in logs {
            // Not used by that: the order of age stays.
            let read = self.open(&log.name).and_then(|file| self.read_file(&log.name, &file));
            match read {
                Ok(bytes) if is_right(&bytes) => checked.right += 1,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Ok(_) | Err(_) => checked.bad.push(log.name),
            }
        }
        if repair {
            checked.bad.iter().try_for_each(|name| self.remove(name))?;
            strays.iter().try_for_each(|stray| remove(stray))?;
        }
        Ok(checked)
    }

    fn look(&self) -> Result<Found> {
        let mut found = Found::default();
        match self.check_ours() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
            other => other?,
        }
        let named = |error| Error::io(format!("list {}", self.folder.display()), &error);
        let listed = std::fs::read_dir(&self.folder).map_err(named)?;
        for entry in listed.take(8 * TOUCH_LOGS_MAX) {
            let entry = entry.map_err(named)?;
            // One that has just been renamed or removed; nor is a folder anything of ours.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                continue;
            }
            let name = entry.file_name().into_string().ok();
            match name.and_then(|name| BlobDigest::from_hex(&name)) {
                Some(name) => found.logs.push(TouchLogEntry {
                    name,
                    disk_bytes: disk_bytes(&metadata),
                    last_used: changed(&metadata),
                }),
                None if is_left_behind(&metadata) => found.strays.push(entry.path()),
                None => {}
            }
        }
        found.logs.sort_by_key(|log| (log.last_used, log.name));
        Ok(found)
    }
}

fn changed(metadata: &Metadata) -> SystemTime {
    metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Whether a file that is no log is older than any writer takes.
fn is_left_behind(metadata: &Metadata) -> bool {
    let age = SystemTime::now().duration_since(changed(metadata));
    age.is_ok_and(|age| age >= Duration::from_millis(TOUCH_LOG_STRAY_MS))
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        // Another process may have done so.
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", path.display()), &error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn name(number: u8) -> BlobDigest {
        BlobDigest::new([number; 32])
    }

    /// As if it had last been used so many seconds ago.
    fn age(path: &Path, seconds: u64) {
        let then = SystemTime::now() - Duration::from_secs(seconds);
        let times = std::fs::FileTimes::new().set_modified(then);
        File::options().write(true).open(path).unwrap().set_times(times).unwrap();
    }

    #[test]
    fn the_longest_unused_make_room_by_number_and_by_bytes() {
        let root = tempfile::tempdir().unwrap();
        let logs = TouchLogs::of(root.path());
        for number in 1..=4 {
            logs.write(&name(number), &[number; 5000]).unwrap();
            age(&logs.path(&name(number)), 100 - u64::from(number));
        }
        // Reading one is a use.
        assert_eq!(logs.read(&name(1)).unwrap(), [1; 5000]);
        let names = || logs.list().unwrap().into_iter().map(|log| log.name).collect::<Vec<_>>();
        assert_eq!(names(), [name(2), name(3), name(4), name(1)]);
        let each = logs.list().unwrap()[0].disk_bytes;
        assert!(each >= 5000);
        assert_eq!(logs.trim_to(3, u64::MAX).unwrap().removed, 1);
        assert_eq!(names(), [name(3), name(4), name(1)]);
        let trimmed = logs.trim(Some(2 * each)).unwrap();
        assert_eq!((trimmed.removed, trimmed.bytes), (1, 2 * each));
        assert_eq!(names(), [name(4), name(1)]);
        assert_eq!(logs.trim(None).unwrap().removed, 0);
        logs.remove(&name(4)).unwrap();
        logs.remove(&name(4)).unwrap();
        assert_eq!(logs.read(&name(4)).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(logs.trim(Some(0)).unwrap().bytes, 0);
        assert_eq!(names(), []);
    }

    #[test]
    fn no_more_are_kept_than_may_be() {
        let root = tempfile::tempdir().unwrap();
        let logs = TouchLogs::of(root.path());
        logs.write(&name(1), b"log").unwrap();
        for number in 0..TOUCH_LOGS_MAX + 5 {
            let mut bytes = [2; 32];
            bytes[..8].copy_from_slice(&to_u64(number).to_le_bytes());
            std::fs::write(logs.path(&BlobDigest::new(bytes)), b"log").unwrap();
        }
        age(&logs.path(&name(1)), 3600);
        logs.write(&name(3), b"log").unwrap();
        let left = logs.list().unwrap();
        assert_eq!(left.len(), TOUCH_LOGS_MAX);
        let is_left = |number| left.iter().any(|log| log.name == name(number));
        assert!(is_left(3) && !is_left(1));
    }

    #[test]
    fn what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays() {
        let root = tempfile::tempdir().unwrap();
        let logs = TouchLogs::of(root.path());
        assert_eq!(logs.trim(None).unwrap(), Trimmed::default(), "no folder, nothing to do");
        logs.write(&name(1), b"log").unwrap();
        let file = |name: &str| logs.folder.join(name);
        for name in [".new", ".old", "HEX.4711"] {
            std::fs::write(file(name), b"half of one").unwrap();
        }
        std::fs::create_dir(file("folder")).unwrap();
        age(&file(".old"), 3600);
        age(&file("HEX.4711"), 3600);
        for repair in [false, true] {
            let checked = logs.check(repair, |bytes| bytes == b"log").unwrap();
            assert_eq!((checked.right, checked.strays), (1, 2), "{repair}");
        }
        assert!(file(".new").exists() && !file(".old").exists() && !file("HEX.4711").exists());
        age(&file(".new"), 3600);
        logs.trim(None).unwrap();
        assert!(!file(".new").exists() && logs.path(&name(1)).exists());
    }

    #[test]
    fn a_check_finds_bad_ones_and_too_long_ones_and_repairs_that() {
        let root = tempfile::tempdir().unwrap();
        let logs = TouchLogs::of(root.path());
        logs.write(&name(1), b"log").unwrap();
        logs.write(&name(2), b"not one").unwrap();
        logs.write(&name(3), b"log").unwrap();
        let long = File::options().write(true).open(logs.path(&name(3))).unwrap();
        long.set_len(TOUCH_LOG_BYTES_MAX + 1).unwrap();
        let is_right = |bytes: &[u8]| bytes == b"log";
        for repair in [false, true] {
            let mut checked = logs.check(repair, is_right).unwrap();
            checked.bad.sort();
            assert_eq!((checked.right, checked.bad), (1, vec![name(2), name(3)]));
        }
        let checked = logs.check(false, is_right).unwrap();
        assert_eq!((checked.right, checked.bad), (1, vec![]));
    }

    #[test]
    fn a_folder_that_others_can_write_is_not_believed() {
        let root = tempfile::tempdir().unwrap();
        let logs = TouchLogs::of(root.path());
        logs.write(&name(1), b"log").unwrap();
        let mode = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(&logs.folder, mode).unwrap();
        let kinds = [
            logs.read(&name(1)).unwrap_err().kind(),
            logs.write(&name(1), b"log").unwrap_err().kind(),
            logs.trim(Some(0)).unwrap_err().kind(),
            logs.check(true, |_| false).unwrap_err().kind(),
        ];
        assert_eq!(kinds, [ErrorKind::InvalidConfig; 4]);
        assert!(logs.path(&name(1)).exists());
        // Nor one that others can exchange for theirs.
        let set = |folder: &Path, mode| {
            std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        set(&logs.folder, 0o700);
        set(root.path(), 0o777);
        assert_eq!(logs.read(&name(1)).unwrap_err().kind(), ErrorKind::InvalidConfig);
        assert_eq!(logs.list().unwrap_err().kind(), ErrorKind::InvalidConfig);
        set(root.path(), 0o700);
        assert_eq!(logs.read(&name(1)).unwrap(), b"log");
    }
}
