//! What makes a server independent of whoever started it.
//!
//! Descriptors of the caller are closed (a captured pipe would otherwise never end), the session
//! is its own (no terminal's signals), and so is the mount namespace. A server must not be the
//! last one to hold a mount of its own device: when it dies, the kernel would write to a device
//! that nobody serves. Nor may it keep other mounts from going away for the host. So the new
//! namespace is private, and everything that the server does not need is taken out of it at once;
//! what it needs of those file systems is open by then.

use super::run_dir::RunDir;
use super::systemd::{DEVICE_PREFIX, SUPERVISOR_PREFIX};
use crate::error::{Error, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::ffi::OsString;
use std::fs::File;
use std::ops::Range;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

fn told(action: &'static str) -> impl Fn(nix::Error) -> Error {
    move |errno| Error::io(action, &errno.into())
}

/// Closes every descriptor but the standard streams. To be called before this process opens
/// anything of its own.
///
/// # Errors
/// When `/proc/self/fd` cannot be read: a caller could then wait for us for ever.
pub(super) fn close_inherited_files() -> Result<()> {
    close_inherited_files_but(0..0)
}

/// As [`close_inherited_files`], but for those in `kept`.
///
/// # Errors
/// As there.
pub(super) fn close_inherited_files_but(kept: Range<RawFd>) -> Result<()> {
    let inherited = open_files().map_err(|error| Error::io("read /proc/self/fd", &error))?;
    for file in inherited.into_iter().filter(|file| *file > 2 && !kept.contains(file)) {
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

/// Leaves the caller's session and its file mode mask. A service of systemd has a session of its
/// own already.
///
/// # Errors
/// When this process already leads a process group of somebody else's session.
pub(super) fn leave_session() -> Result<()> {
    if nix::unistd::getsid(None) != Ok(nix::unistd::getpid()) {
        nix::unistd::setsid().map_err(told("start a session"))?;
    }
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    Ok(())
}

/// Lets go of the caller's standard output: what is written there goes to the log from now on.
///
/// # Errors
/// What the operating system says.
pub(super) fn let_go_of_stdout() -> Result<()> {
    nix::unistd::dup2_stdout(std::io::stderr()).map_err(told("move standard output to the log"))
}

/// Puts the calling thread, and the threads it will start, into a mount namespace of their own, for
/// now with the same mounts as before. The working folder is `/` afterwards.
///
/// # Errors
/// Without CAP_SYS_ADMIN, and what else the operating system says.
pub(super) fn own_mounts() -> Result<()> {
    leave_folder()?;
    own_mounts_in_folder()
}

/// Goes to `/`: a folder that a process is in cannot be unmounted.
///
/// # Errors
/// What the operating system says.
pub(super) fn leave_folder() -> Result<()> {
    std::env::set_current_dir("/").map_err(|error| Error::io("go to /", &error))
}

/// As [`own_mounts`], but the working folder stays: for who starts threads before its paths are
/// read. Followed by [`leave_folder`].
///
/// # Errors
/// As there.
pub(super) fn own_mounts_in_folder() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(told("make a mount namespace (needs CAP_SYS_ADMIN)"))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .map_err(told("make the mount namespace private"))
}

/// Takes out of the process's own mount namespace (see [`own_mounts`]) what serving does not need:
/// all but the root, `/dev`, `/proc`, `/sys`, the way to systemd, and what `needed` and the links
/// on the way there lie on. Everything else must be open.
///
/// # Errors
/// When the mounts cannot be listed.
pub(super) fn drop_mounts(needed: &[&Path]) -> Result<()> {
    let mounts = std::fs::read("/proc/thread-self/mountinfo")
        .map_err(|error| Error::io("read /proc/thread-self/mountinfo", &error))?;
    let needed: Vec<PathBuf> = needed.iter().flat_map(|path| way_to(path)).collect();
    // Later mounts may lie on earlier ones.
    for point in mount_points(&mounts).iter().rev().filter(|point| !is_needed(point, &needed)) {
        // Gone with a mount that it lay on, or hidden below another one: nobody can reach it.
        let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    Ok(())
}

/// What has to be reachable for `path` to be: each link on the way, and where they lead in the end.
/// What does not exist yet leads to where it may come to be.
fn way_to(path: &Path) -> Vec<PathBuf> {
    let mut way = Vec::new();
    let mut wanted = path.to_owned();
    while way.len() < LINKS_MAX {
        let mut front = PathBuf::new();
        let mut parts = wanted.components();
        let link = loop {
            match parts.next() {
                None => break None,
                Some(Component::ParentDir) => {
                    front.pop();
                }
                Some(part) => front.push(part),
            }
            if let Ok(target) = std::fs::read_link(&front) {
                break Some(target);
            }
        };
        way.push(front.clone());
        let Some(target) = link else { break };
        front.pop();
        front.push(target);
        front.push(parts.as_path());
        wanted = front;
    }
    way
}

/// As [`drop_mounts`] for a server that needs its run folder and `folders`.
///
/// # Errors
/// As there.
pub(super) fn drop_mounts_but(run: &RunDir, folders: &[PathBuf]) -> Result<()> {
    let needed: Vec<&Path> =
        std::iter::once(run.path()).chain(folders.iter().map(PathBuf::as_path)).collect();
    drop_mounts(&needed)
}

/// Goes to the mounts of the first process: whoever started this one may have had mounts of its
/// own. A wish: without the right to, or when the run folder is another one there, it stays where
/// it is. Only before there are threads.
pub(super) fn join_first_mounts(run: &Path) {
    let there = Path::new("/proc/1/root").join(run.strip_prefix("/").unwrap_or(run));
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    if identity(run).is_none() || identity(run) != identity(&there) {
        return;
    }
    let joined = File::open("/proc/1/ns/mnt")
        .map_err(nix::Error::try_from)
        .map(|namespace| nix::sched::setns(namespace, CloneFlags::CLONE_NEWNS));
    if !matches!(joined, Ok(Ok(()))) {
        tracing::debug!(?joined, "stays in the mounts of its starter");
    }
    let _ = std::env::set_current_dir("/");
}

/// Links that are followed to one name, as the kernel does.
const LINKS_MAX: usize = 40;

/// Tells the kernel how little to think of killing this process when memory runs out, from -1000
/// (never) to 1000. A wish: it needs CAP_SYS_RESOURCE to go below what was inherited.
pub(super) fn protect_from_oom(score: i32) {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        tracing::debug!(%error, "keeps the inherited OOM score");
    }
}

/// How little the kernel is to think of killing a server: a container's disk is worth more than the
/// container's processes, but less than the host's own services.
pub(super) const SERVER_OOM_SCORE: i32 = -900;

/// Open files that are wanted: 256 devices of 255 layers are 65,536 in the supervisor. The kernel's
/// own ceiling, `fs.nr_open`, is higher everywhere.
const OPEN_FILES: u64 = 1 << 18;

/// Allows as many open files as this process may have: a layer takes one, and the supervisor keeps
/// those of all devices.
pub(super) fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let set = |limit| setrlimit(Resource::RLIMIT_NOFILE, limit, limit);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    // Root may go beyond the hard limit, which is 4096 where nobody has raised it.
    if set(hard.max(OPEN_FILES)).is_err()
        && let Err(errno) = set(hard)
    {
        tracing::debug!(%errno, "keeps the inherited limit of open files");
    }
}

/// The control group of this program's processes, below the root of the hierarchy.
const CGROUP: &str = "obd-ublk";

/// Whose process it is that leaves a control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inmate {
    Server,
    Supervisor,
}

/// Leaves the caller's control group: its end (a login that closes, a service that restarts) must
/// not be a device's. A wish. Where systemd rules, this process was started in a unit of its own
/// and stays there; if not, this is the way out.
pub(super) fn leave_cgroup(inmate: Inmate) {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let Some(root) = cgroup2_root(&mounts) else { return };
    if !is_in_foreign_cgroup(&own, inmate) {
        return;
    }
    let group = root.join(CGROUP);
    let moved = std::fs::create_dir(&group)
        .or_else(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        })
        .and_then(|()| std::fs::write(group.join("cgroup.procs"), std::process::id().to_string()));
    if let Err(error) = moved {
        tracing::warn!(%error, "stays in the control group of its caller");
    }
}

/// Whether the text of `/proc/self/cgroup` names a group of version 2 that is the caller's: neither
/// the root nor one that is meant for such a process. The scope of a device is foreign to the
/// supervisor, which outlives it, and the units that attach devices are foreign to all.
fn is_in_foreign_cgroup(text: &str, inmate: Inmate) -> bool {
    let Some(group) = text.lines().find_map(|line| line.strip_prefix("0::")) else { return false };
    let unit = group.rsplit('/').next().unwrap_or_default();
    let (prefix, suffix) = match inmate {
        Inmate::Server => (DEVICE_PREFIX, ".scope"),
        Inmate::Supervisor => (SUPERVISOR_PREFIX, ".service"),
    };
    let is_own = unit.starts_with(prefix) && unit.ends_with(suffix);
    group != "/" && unit != CGROUP && !is_own
}

/// Where the control groups of version 2 are mounted whole, in the text of a `mountinfo` file.
fn cgroup2_root(mountinfo: &[u8]) -> Option<PathBuf> {
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let kind = fields.iter().position(|field| *field == b"-")? + 1;
        let is_whole = fields.get(3) == Some(&&b"/"[..]);
        (fields.get(kind) == Some(&&b"cgroup2"[..]) && is_whole).then(|| {
            fields.get(4).map(|point| PathBuf::from(OsString::from_vec(unescape(point))))
        })?
    })
}

fn is_needed(point: &Path, needed: &[PathBuf]) -> bool {
    // The last two: to have a supervisor started where systemd rules.
    let mut system =
        ["/dev", "/proc", "/sys", "/run/systemd/private", "/usr/bin"].into_iter().map(Path::new);
    // A container's `/dev` may be a patchwork of mounts, one per node.
    point.starts_with("/dev")
        || system.any(|path| path.starts_with(point))
        || needed.iter().any(|path| path.starts_with(point))
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
#[must_use]
pub fn unescape(text: &[u8]) -> Vec<u8> {
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
            ("/run/systemd", true),
            ("/run/systemd/inhibit", false),
            ("/usr", true),
            ("/usr/local", false),
            ("/mnt", false),
            ("/device", false),
        ] {
            assert_eq!(is_needed(Path::new(point), &[run.into()]), needed, "{point}");
        }
    }

    /// `/etc/resolv.conf` is a link into `/run` on many hosts, and a file of credentials one out of
    /// and into folders that may each be a mount.
    #[test]
    fn the_mounts_of_all_links_on_the_way_stay() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let at = |name: &str| root.join(name);
        for name in ["a", "b", "c"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let link = |name: &str, target: &Path| {
            std::os::unix::fs::symlink(target, at(name)).unwrap();
        };
        link("a/one", Path::new("../b/./two"));
        link("b/two", &at("c"));
        link("loop", Path::new("loop"));
        assert_eq!(way_to(&at("a/one/later.json")), [at("a/one"), at("b/two"), at("c/later.json")]);
        assert_eq!(way_to(&at("d/x/../y")), [at("d/y")]);
        assert_eq!(way_to(Path::new("/..")), [Path::new("/")]);
        assert_eq!(way_to(&at("loop")).len(), LINKS_MAX);
    }

    #[test]
    fn only_a_group_of_somebody_else_is_left() {
        for (text, server, supervisor) in [
            ("0::/\n", false, false),
            ("0::/user.slice/session-3.scope\n", true, true),
            ("0::/obd-ublk\n", false, false),
            ("0::/system.slice/obd-ublk-device-3-ab.scope\n", false, true),
            ("0::/system.slice/obd-ublk-device-pid3-ab.scope\n", false, true),
            ("0::/system.slice/obd-ublk-supervisor.service\n", true, false),
            ("0::/system.slice/obd-ublk-supervisor-0a.service\n", true, false),
            ("0::/system.slice/obd-ublk-persist.service\n", true, true),
            ("0::/system.slice/system-obd\\x2dublk.slice/obd-ublk@3.service\n", true, true),
            ("0::/obd-ublk/guest\n", true, true),
            ("12:cpu:/a\n0::/system.slice/containerd.service\n", true, true),
            ("1:name=systemd:/x\n", false, false),
            ("", false, false),
        ] {
            assert_eq!(is_in_foreign_cgroup(text, Inmate::Server), server, "{text}");
            assert_eq!(is_in_foreign_cgroup(text, Inmate::Supervisor), supervisor, "{text}");
        }
    }

    #[test]
    fn the_root_of_the_control_groups_is_found_where_it_is_mounted() {
        let text = b"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            30 21 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_root(text), Some(PathBuf::from("/sys/fs/cgroup")));
        let part = b"30 21 0:27 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(cgroup2_root(part), None);
        assert_eq!(cgroup2_root(b""), None);
    }
}
