//! What makes a server independent of whoever started it.
//!
//! Descriptors of the caller are closed (a captured pipe would otherwise never end), the session
//! is its own (no terminal's signals), and so is the mount namespace. A server must not be the
//! last one to hold a mount of its own device: when it dies, the kernel would write to a device
//! that nobody serves. Nor may it keep other mounts from going away for the host. So the new
//! namespace is private, and everything that the server does not need is taken out of it at once;
//! what it needs of those file systems is open by then.

use crate::error::{Error, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

fn told(action: &'static str) -> impl Fn(nix::Error) -> Error {
    move |errno| Error::io(action, &errno.into())
}

/// Closes every descriptor but the standard streams. To be called before this process opens
/// anything of its own.
///
/// # Errors
/// When `/proc/self/fd` cannot be read: a caller could then wait for us for ever.
pub(super) fn close_inherited_files() -> Result<()> {
    let inherited = open_files().map_err(|error| Error::io("read /proc/self/fd", &error))?;
    for file in inherited.into_iter().filter(|file| *file > 2) {
        // The listing's own descriptor is among them and closed already: EBADF is fine.
        let _ = nix::unistd::close(file);
    }
    Ok(())
}

fn open_files() -> std::io::Result<Vec<RawFd>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        files.extend(entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    Ok(files)
}

/// Leaves the caller's session and its file mode mask.
///
/// # Errors
/// When this process already leads a process group.
pub(super) fn leave_session() -> Result<()> {
    nix::unistd::setsid().map_err(told("start a session"))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    Ok(())
}

/// Opens the log and makes it this process's standard error.
///
/// # Errors
/// What the operating system says.
pub(super) fn log_to(path: &Path) -> Result<()> {
    let log = open_log(path)?;
    nix::unistd::dup2_stderr(log).map_err(told("move standard error to the log"))
}

/// Lets go of the caller's standard output: what is written there goes to the log from now on.
///
/// # Errors
/// What the operating system says.
pub(super) fn let_go_of_stdout() -> Result<()> {
    nix::unistd::dup2_stdout(std::io::stderr()).map_err(told("move standard output to the log"))
}

fn open_log(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let opened = options.append(true).create(true).mode(0o600).open(path);
    opened.map_err(|error| Error::io(format!("open log {}", path.display()), &error))
}

/// Puts the calling thread, and the threads it will start, into a mount namespace of their own,
/// with only the mounts in it that serving needs: the root, `/dev`, `/proc`, `/sys` and what
/// `needed` lies on. Everything else must be open, and the working folder is `/` afterwards.
///
/// # Errors
/// Without CAP_SYS_ADMIN, and what else the operating system says.
pub(super) fn leave_mounts(needed: &[&Path]) -> Result<()> {
    std::env::set_current_dir("/").map_err(|error| Error::io("go to /", &error))?;
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(told("make a mount namespace (needs CAP_SYS_ADMIN)"))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .map_err(told("make the mount namespace private"))?;
    let mounts = std::fs::read("/proc/thread-self/mountinfo")
        .map_err(|error| Error::io("read /proc/thread-self/mountinfo", &error))?;
    // Later mounts may lie on earlier ones.
    for point in mount_points(&mounts).iter().rev().filter(|point| !is_needed(point, needed)) {
        // Gone with a mount that it lay on, or hidden below another one: nobody can reach it.
        let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    Ok(())
}

fn is_needed(point: &Path, needed: &[&Path]) -> bool {
    let system = ["/dev", "/proc", "/sys"].map(Path::new);
    // A container's `/dev` may be a patchwork of mounts, one per node.
    point.starts_with("/dev") || system.iter().chain(needed).any(|path| path.starts_with(point))
}

/// The mount points in the text of a `mountinfo` file, in its order.
fn mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|&byte| byte == b'\n');
    lines
        .filter_map(|line| line.split(|&byte| byte == b' ').nth(4))
        .map(|point| PathBuf::from(OsString::from_vec(unescape(point))))
        .collect()
}

/// Undoes the kernel's `\ooo` for blanks, tabs, newlines and backslashes.
pub(super) fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, behind)) = rest.split_first() {
        let escaped = behind.first_chunk::<3>().filter(|_| byte == b'\\').and_then(octal);
        match escaped {
            Some(value) => {
                plain.push(value);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                plain.push(byte);
                rest = behind;
            }
        }
    }
    plain
}

fn octal(digits: &[u8; 3]) -> Option<u8> {
    let text = std::str::from_utf8(digits).ok()?;
    u8::from_str_radix(text, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_odd_names_are_found() {
        let text = b"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            22 21 0:5 / /dev rw shared:1 - devtmpfs dev rw\n\
            23 21 0:9 / /mnt/a\\040b\\134c rw - tmpfs t rw\n\n";
        let points = mount_points(text);
        assert_eq!(points, ["/", "/dev", "/mnt/a b\\c"].map(PathBuf::from));
        assert_eq!(unescape(b"\\9zz\\04"), b"\\9zz\\04");
    }

    #[test]
    fn only_what_serving_needs_stays_mounted() {
        let run = Path::new("/run/obd-ublk");
        for (point, needed) in [
            ("/", true),
            ("/dev", true),
            ("/dev/ublk-control", true),
            ("/sys", true),
            ("/sys/fs/cgroup", false),
            ("/run", true),
            ("/run/obd-ublk", true),
            ("/run/obd-ublk/3", false),
            ("/run/user/0", false),
            ("/mnt", false),
            ("/device", false),
        ] {
            assert_eq!(is_needed(Path::new(point), &[run]), needed, "{point}");
        }
    }
}
