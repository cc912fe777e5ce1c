//! Mounting a device where its caller wants it, and taking that mount away again.
//!
//! The mount is made in the caller's mount namespace, read-only, once the device can be used. The
//! file `mount` in the device's folder names the place, so that `detach --unmount` finds it after
//! any number of successors; it is no promise that the mount is still there, so the kernel's list
//! is asked before anything is unmounted. Which file system it is says its magic number; only where
//! that says nothing is every file system of the kernel tried.

use super::isolate::unescape;
use super::run_dir::RunDir;
use super::state::{device_path, write_durably};
use super::survey::Manner;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The file that names the place where a device was mounted: the bytes of the path, no more.
const FILE_NAME: &str = "mount";

/// Bytes of the device that hold every magic number we know: btrfs's lies highest.
const HEAD_BYTES: u64 = 68 * 1024;

/// One file system that may be on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Attempt {
    kind: String,
    options: &'static str,
    /// Whether this leaves a journal alone that should be replayed: only tried when the kernel
    /// said that it cannot replay it on a read-only device.
    skips_recovery: bool,
}

/// Magic numbers: name, where, bytes. The two bytes of ext4 prove least and are asked last.
const MAGICS: [(&str, usize, &[u8]); 7] = [
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("xfs", 0, b"XFSB"),
    ("squashfs", 0, b"hsqs"),
    ("btrfs", 65536 + 64, b"_BHRfS_M"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("iso9660", 32768 + 1, b"CD001"),
    ("ext4", 1024 + 56, b"\x53\xef"),
];

/// What is tried first where no magic number says anything.
const ORDER: [&str; 5] = ["ext4", "erofs", "xfs", "squashfs", "btrfs"];

/// The folder at `dir` as an absolute path without links, before anything is attached for it.
///
/// # Errors
/// `NotFound` when there is no folder.
pub fn check_mount_point(dir: &Path) -> Result<PathBuf> {
    let told = |error: &std::io::Error| {
        Error::io(format!("use {} as a mount point", dir.display()), error)
    };
    let found = std::fs::canonicalize(dir).map_err(|error| told(&error))?;
    if !std::fs::metadata(&found).map_err(|error| told(&error))?.is_dir() {
        return Err(told(&std::io::Error::from_raw_os_error(libc::ENOTDIR)));
    }
    Ok(found)
}

/// Mounts device `id` at `dir` (see [`check_mount_point`]), read-only if the device is, and notes
/// it in the device's folder.
///
/// # Errors
/// `InvalidFormat` when no file system is recognised, `Unsupported` when the kernel has none of
/// that name, and what else the kernel says. Nothing is mounted then.
pub fn mount_device(run: &RunDir, id: u32, dir: &Path) -> Result<()> {
    let device = device_path(id);
    let what = || format!("mount {} on {}", device.display(), dir.display());
    let head = read_head(&device).context(what)?;
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let attempts = attempts(&head, &known);
    let is_writable = run.state(id)?.is_some_and(|state| !state.read_only);
    let flags = if is_writable { MsFlags::empty() } else { MsFlags::MS_RDONLY };
    let made = mount_first(&attempts, |attempt| {
        let options = Some(attempt.options).filter(|options| !options.is_empty());
        let kind = Some(attempt.kind.as_str());
        mount(Some(&device), dir, kind, flags, options)
    });
    let attempt = made.context(what)?;
    if attempt.skips_recovery {
        tracing::warn!(
            "{}: its {} journal was not replayed, the device is read-only",
            device.display(),
            attempt.kind
        );
    }
    let folder = run.folder(id);
    let noted = write_durably(&folder, &folder.join(FILE_NAME), dir.as_os_str().as_bytes());
    noted.map_err(|error| {
        let _ = umount2(dir, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH);
        Error::io(format!("note the mount in {}", folder.display()), &error)
    })
}

/// Where [`mount_device`] mounted device `id`, if it did.
///
/// # Errors
/// What the operating system says.
pub fn mounted_at(run: &RunDir, id: u32) -> Result<Option<PathBuf>> {
    let path = run.folder(id).join(FILE_NAME);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(PathBuf::from(OsString::from_vec(bytes)))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("read {}", path.display()), &error)),
    }
}

/// Takes away what [`mount_device`] mounted, if that is still there. A manner that is not polite
/// takes it out of the tree at once, also while files in it are open. Returns the place.
///
/// # Errors
/// `Busy` when it is in use, or when something else is mounted over it.
pub fn unmount_device(run: &RunDir, id: u32, manner: Manner) -> Result<Option<PathBuf>> {
    let Some(dir) = mounted_at(run, id)? else { return Ok(None) };
    let what = || format!("unmount {}", dir.display());
    let mounts = std::fs::read("/proc/thread-self/mountinfo")
        .map_err(|error| Error::io("read /proc/thread-self/mountinfo", &error))?;
    let device = device_path(id);
    let number = std::fs::metadata(&device).map(|metadata| number_text(metadata.rdev())).ok();
    match find(&mounts, &dir, number.as_deref(), &device) {
        Found::Absent => {}
        Found::Covered => {
            let message = format!("{}: something else is mounted over it", what());
            return Err(Error::new(ErrorKind::Busy, message));
        }
        Found::Topmost => {
            let flags = match manner {
                Manner::Polite => MntFlags::empty(),
                Manner::Lazy | Manner::Force => MntFlags::MNT_DETACH,
            };
            umount2(&dir, flags | MntFlags::UMOUNT_NOFOLLOW)
                .map_err(|errno| Error::io(what(), &errno.into()))?;
        }
    }
    let path = run.folder(id).join(FILE_NAME);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", path.display()), &error))
        }
        Ok(()) | Err(_) => Ok(Some(dir)),
    }
}

fn number_text(number: u64) -> String {
    format!("{}:{}", nix::sys::stat::major(number), nix::sys::stat::minor(number))
}

fn read_head(device: &Path) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(device)
        .and_then(|file| file.take(HEAD_BYTES).read_to_end(&mut head))
        .map_err(|error| Error::io("look for a file system", &error))?;
    Ok(head)
}

/// What to try for a device that starts with `head`, where `/proc/filesystems` says `known`.
fn attempts(head: &[u8], known: &str) -> Vec<Attempt> {
    let has = |(_, at, magic): &&(&str, usize, &[u8])| {
        head.get(*at..).is_some_and(|rest| rest.starts_with(magic))
    };
    if let Some((kind, ..)) = MAGICS.iter().find(has) {
        return attempts_for(kind);
    }
    // Those on a device have nothing ahead of their name, the others `nodev`.
    let listed: Vec<&str> = known.lines().filter_map(|line| line.strip_prefix('\t')).collect();
    let first = ORDER.into_iter().filter(|kind| listed.contains(kind));
    let rest = listed.iter().copied().filter(|kind| !ORDER.contains(kind));
    first.chain(rest).flat_map(attempts_for).collect()
}

fn attempts_for(kind: &str) -> Vec<Attempt> {
    // Several devices of one image are mounted side by side, which xfs needs to be told.
    let (plain, without_recovery) = match kind {
        "ext4" | "ext3" => ("", Some("noload")),
        "xfs" => ("nouuid", Some("nouuid,norecovery")),
        "btrfs" => ("", Some("rescue=nologreplay")),
        "f2fs" | "nilfs2" => ("", Some("norecovery")),
        _ => ("", None),
    };
    let attempt =
        |options, skips_recovery| Attempt { kind: kind.to_owned(), options, skips_recovery };
    let second = without_recovery.map(|options| attempt(options, true));
    std::iter::once(attempt(plain, false)).chain(second).collect()
}

/// Tries one after the other; returns the one that succeeded.
fn mount_first(
    attempts: &[Attempt],
    mut mount: impl FnMut(&Attempt) -> nix::Result<()>,
) -> Result<&Attempt> {
    let mut last = None;
    for attempt in attempts {
        // The one before was of the same kind, see `attempts_for`.
        let is_due = !attempt.skips_recovery || last == Some(Errno::EROFS);
        if !is_due {
            continue;
        }
        match mount(attempt) {
            Ok(()) => return Ok(attempt),
            Err(errno @ (Errno::EINVAL | Errno::ENODEV | Errno::EROFS | Errno::EUCLEAN)) => {
                last = Some(errno);
            }
            Err(errno) => {
                return Err(Error::io(format!("as {}", attempt.kind), &errno.into()));
            }
        }
    }
    let is_one = attempts.iter().all(|attempt| Some(&attempt.kind) == first_kind(attempts));
    Err(match (first_kind(attempts).filter(|_| is_one), last) {
        (Some(kind), Some(Errno::ENODEV)) => {
            let message = format!("it holds {kind}, which this kernel does not know");
            Error::new(ErrorKind::Unsupported, message)
        }
        (Some(kind), Some(errno)) => {
            let said = "the kernel refuses it, its log says why";
            Error::io(format!("as {kind}: {said}"), &errno.into())
        }
        _ => {
            let message = "no file system is recognised on it";
            Error::new(ErrorKind::InvalidFormat, message)
        }
    })
}

fn first_kind(attempts: &[Attempt]) -> Option<&String> {
    attempts.first().map(|attempt| &attempt.kind)
}

/// How a device is mounted at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Absent,
    /// Below something else.
    Covered,
    Topmost,
}

/// Looks in the text of a `mountinfo` file for a mount of `device` (with this number) at `dir`.
fn find(mountinfo: &[u8], dir: &Path, number: Option<&str>, device: &Path) -> Found {
    let mut found = Found::Absent;
    for line in mountinfo.split(|&byte| byte == b'\n') {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let Some(point) = fields.get(4) else { continue };
        if OsStr::from_bytes(&unescape(point)) != dir.as_os_str() {
            continue;
        }
        // A btrfs has a number of its own there, and says its device in the second field behind
        // the dash.
        let dash = fields.iter().position(|field| *field == b"-").unwrap_or(fields.len());
        let source = fields.get(dash + 2).map(|source| unescape(source));
        let is_ours = number.is_some_and(|number| fields.get(2) == Some(&number.as_bytes()))
            || source.is_some_and(|source| source == device.as_os_str().as_bytes());
        // Later lines lie on earlier ones.
        found = match (is_ours, found) {
            (true, _) => Found::Topmost,
            (false, Found::Absent) => Found::Absent,
            (false, _) => Found::Covered,
        };
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(at: usize, magic: &[u8]) -> Vec<u8> {
        let mut head = vec![0; usize::try_from(HEAD_BYTES).unwrap()];
        head[at..at + magic.len()].copy_from_slice(magic);
        head
    }

    fn kinds(attempts: &[Attempt]) -> Vec<(&str, &str)> {
        attempts.iter().map(|attempt| (attempt.kind.as_str(), attempt.options)).collect()
    }

    #[test]
    fn a_magic_number_decides_and_nothing_else_is_tried() {
        for (at, magic, expected) in [
            (1080, &b"\x53\xef"[..], vec![("ext4", ""), ("ext4", "noload")]),
            (1024, b"\xe2\xe1\xf5\xe0", vec![("erofs", "")]),
            (0, b"XFSB", vec![("xfs", "nouuid"), ("xfs", "nouuid,norecovery")]),
            (0, b"hsqs", vec![("squashfs", "")]),
            (65600, b"_BHRfS_M", vec![("btrfs", ""), ("btrfs", "rescue=nologreplay")]),
            (1024, b"\x10\x20\xf5\xf2", vec![("f2fs", ""), ("f2fs", "norecovery")]),
            (32769, b"CD001", vec![("iso9660", "")]),
        ] {
            assert_eq!(kinds(&attempts(&head(at, magic), "\tvfat\n")), expected);
        }
        // The strong one wins.
        let mut both = head(1080, b"\x53\xef");
        both[..4].copy_from_slice(b"XFSB");
        assert_eq!(kinds(&attempts(&both, ""))[0].0, "xfs");
    }

    #[test]
    fn without_a_magic_number_the_kernels_own_list_is_tried_in_a_sane_order() {
        let known = "nodev\tsysfs\n\tvfat\n\tbtrfs\nnodev\ttmpfs\n\text4\n\text2\n";
        for head in [vec![], vec![0; 512], head(1081, b"\x53\xef")] {
            let found = attempts(&head, known);
            let expected = [
                ("ext4", ""),
                ("ext4", "noload"),
                ("btrfs", ""),
                ("btrfs", "rescue=nologreplay"),
                ("vfat", ""),
                ("ext2", ""),
            ];
            assert_eq!(kinds(&found), expected);
        }
        assert!(attempts(&[], "nodev\tproc\n").is_empty());
    }

    #[test]
    fn a_journal_is_skipped_only_when_it_cannot_be_replayed() {
        let ext4 = attempts_for("ext4");
        for (answers, tried, outcome) in [
            (vec![Ok(())], 1, Ok(0)),
            (vec![Err(Errno::EROFS), Ok(())], 2, Ok(1)),
            (vec![Err(Errno::EROFS), Err(Errno::EROFS)], 2, Err(ErrorKind::ReadOnly)),
            (vec![Err(Errno::EINVAL)], 1, Err(ErrorKind::Io)),
            (vec![Err(Errno::ENODEV)], 1, Err(ErrorKind::Unsupported)),
            (vec![Err(Errno::EBUSY)], 1, Err(ErrorKind::Busy)),
            (vec![Err(Errno::ENOENT)], 1, Err(ErrorKind::NotFound)),
        ] {
            let mut left = answers.clone().into_iter();
            let found = mount_first(&ext4, |_| left.next().unwrap());
            match outcome {
                Ok(index) => assert_eq!(found.unwrap(), &ext4[index], "{answers:?}"),
                Err(kind) => assert_eq!(found.unwrap_err().kind(), kind, "{answers:?}"),
            }
            assert_eq!((answers.len(), left.len()), (tried, 0), "{answers:?}");
        }
    }

    #[test]
    fn a_device_without_any_file_system_is_told_so() {
        let all = attempts(&[], "\text4\n\txfs\n\tvfat\n");
        let mut count = 0;
        let found = mount_first(&all, |_| {
            count += 1;
            Err(Errno::EINVAL)
        });
        assert_eq!((found.unwrap_err().kind(), count), (ErrorKind::InvalidFormat, 3));
        let none = mount_first(&[], |_| Ok(()));
        assert_eq!(none.unwrap_err().kind(), ErrorKind::InvalidFormat);
    }

    #[test]
    fn a_mount_is_found_by_number_or_by_device_and_only_at_its_place() {
        let ext4 = "40 21 259:3 / /mnt/a\\040b ro - ext4 /dev/ublkb0 ro\n";
        let other = "41 40 8:1 / /mnt/a\\040b rw - ext4 /dev/sda1 rw\n";
        let elsewhere = "42 21 259:3 / /mnt/c ro - ext4 /dev/ublkb0 ro\n";
        let btrfs = "43 21 0:44 /sub /mnt/a\\040b ro shared:3 - btrfs /dev/ublkb0 ro\n";
        let root = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n";
        for (lines, expected) in [
            (vec![root], Found::Absent),
            (vec![root, elsewhere], Found::Absent),
            (vec![root, other], Found::Absent),
            (vec![root, ext4], Found::Topmost),
            (vec![root, btrfs], Found::Topmost),
            (vec![root, other, ext4], Found::Topmost),
            (vec![root, ext4, other], Found::Covered),
            (vec![root, ext4, elsewhere], Found::Topmost),
        ] {
            let device = Path::new("/dev/ublkb0");
            let text = lines.concat();
            let found = find(text.as_bytes(), Path::new("/mnt/a b"), Some("259:3"), device);
            assert_eq!(found, expected, "{lines:?}");
        }
    }

    #[test]
    fn a_mount_point_is_a_folder_that_exists() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink(".", folder.path().join("link")).unwrap();
        for name in ["none", "file", "file/x"] {
            let error = check_mount_point(&folder.path().join(name)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound, "{name}: {error}");
            assert!(error.to_string().contains(name), "{error}");
        }
        let real = std::fs::canonicalize(folder.path()).unwrap();
        assert_eq!(check_mount_point(&folder.path().join("link")).unwrap(), real);
    }

    #[test]
    fn a_note_of_a_mount_that_is_gone_is_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::at(folder.path().to_owned());
        assert_eq!(unmount_device(&run, 1_048_000, Manner::Polite).unwrap(), None);
        let device = run.folder(1_048_000);
        std::fs::create_dir(&device).unwrap();
        std::fs::write(device.join(FILE_NAME), b"/mnt/\xff").unwrap();
        let dir = PathBuf::from(OsString::from_vec(b"/mnt/\xff".to_vec()));
        assert_eq!(mounted_at(&run, 1_048_000).unwrap(), Some(dir.clone()));
        assert_eq!(unmount_device(&run, 1_048_000, Manner::Polite).unwrap(), Some(dir));
        assert_eq!(mounted_at(&run, 1_048_000).unwrap(), None);
    }
}
