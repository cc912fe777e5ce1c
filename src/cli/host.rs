//! What this host is like, for `doctor`, and who uses a device, for `detach`. Only reads.

use crate::error::Error;
use crate::server::kernel::HostKernel;
use crate::server::{self, RunDir, Status, unescape};
use nix::sys::resource::{Resource, getrlimit};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// What `doctor` judges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostFacts {
    /// As `uname -r` prints it.
    pub(super) kernel_release: String,
    /// What the front end found; `None` in a program without it.
    pub(super) ublk: Option<UblkFacts>,
    /// Whether the running kernel has the driver as a module that could be loaded.
    pub(super) module_installed: bool,
    /// `ID` and `VERSION_ID` of `/etc/os-release`.
    pub(super) distribution: (String, String),
    /// The effective capabilities of this process.
    pub(super) capabilities: u64,
    /// `/proc/sys/kernel/io_uring_disabled`; `None` in kernels without it.
    pub(super) io_uring_disabled: Option<u32>,
    /// Whether the run folder can be used, and its path.
    pub(super) run_dir: (String, Result<(), String>),
    /// The soft and hard limit of open files.
    pub(super) open_files_max: (u64, u64),
    /// The soft limit of locked memory in bytes.
    pub(super) locked_bytes_max: u64,
    /// Whether udev runs.
    pub(super) udev: bool,
    /// Our devices whose readers wait for a server, by path, and whether more servers are tried.
    pub(super) waiting: Vec<(String, bool)>,
}

/// What the front end found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UblkFacts {
    /// Whether the driver is loaded or built in.
    pub(super) driver_present: bool,
    /// Whether its control device can be used.
    pub(super) control: Result<(), String>,
    /// The names of its feature bits; `None` if it cannot be asked.
    pub(super) feature_names: Option<Vec<String>>,
    /// Devices it has now.
    pub(super) device_count: usize,
    /// Its parameter `ublks_max`.
    pub(super) devices_max: Option<u64>,
    /// Bugs known of exactly this kernel.
    pub(super) known_bugs: Vec<String>,
}

impl HostFacts {
    /// Looks at this host.
    pub(super) fn gather() -> Self {
        let kernel_release = read_line("/proc/sys/kernel/osrelease").unwrap_or_default();
        let run = RunDir::of_host();
        Self {
            ublk: ublk_facts(),
            module_installed: is_module_installed(Path::new("/lib/modules"), &kernel_release),
            distribution: distribution(&read("/etc/os-release")),
            capabilities: effective_capabilities(&read("/proc/self/status")),
            io_uring_disabled: read_line("/proc/sys/kernel/io_uring_disabled")
                .and_then(|text| text.parse().ok()),
            run_dir: (run.path().display().to_string(), run.check().map_err(|e| told(&e))),
            open_files_max: getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((0, 0)),
            locked_bytes_max: getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft),
            udev: Path::new("/run/udev/control").exists(),
            waiting: waiting(&run),
            kernel_release,
        }
    }
}

/// The devices of this host that have no server at the moment; none where that cannot be asked,
/// which other checks tell.
fn waiting(run: &RunDir) -> Vec<(String, bool)> {
    let entries = run.check().and_then(|()| server::survey(run, &HostKernel)).unwrap_or_default();
    let entries = entries.iter();
    entries
        .filter(|entry| matches!(entry.status, Status::Recovering | Status::Lost))
        .map(|entry| {
            let path = server::device_path(entry.id).display().to_string();
            (path, entry.status == Status::Recovering)
        })
        .collect()
}

fn told(error: &Error) -> String {
    format!("{error:#}")
}

#[cfg(feature = "ublk")]
fn ublk_facts() -> Option<UblkFacts> {
    let facts = crate::ublk::features();
    Some(UblkFacts {
        driver_present: facts.driver_present,
        feature_names: facts.feature_bits.is_some().then(|| facts.feature_names()),
        control: facts.control.map_err(|error| told(&error)),
        device_count: facts.device_count,
        devices_max: facts.devices_max,
        known_bugs: facts.known_bugs.into_iter().map(ToOwned::to_owned).collect(),
    })
}

#[cfg(not(feature = "ublk"))]
fn ublk_facts() -> Option<UblkFacts> {
    None
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn read_line(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// Whether the kernel `release` has `ublk_drv` below `modules`, compressed or not.
fn is_module_installed(modules: &Path, release: &str) -> bool {
    let folder = modules.join(release).join("kernel/drivers/block");
    ["ublk_drv.ko", "ublk_drv.ko.xz", "ublk_drv.ko.zst", "ublk_drv.ko.gz"]
        .iter()
        .any(|name| folder.join(name).exists())
}

/// `ID` and `VERSION_ID` of the text of an `os-release` file.
fn distribution(text: &str) -> (String, String) {
    let value = |key: &str| {
        let lines = text.lines().filter_map(|line| line.split_once('='));
        let found = lines.into_iter().find(|(name, _)| *name == key);
        found.map_or("", |(_, value)| value).trim_matches('"').to_owned()
    };
    (value("ID"), value("VERSION_ID"))
}

/// The effective capabilities in the text of a `/proc/PID/status` file.
fn effective_capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

/// Who uses the block device `name` or one of its partitions: mount points that this process can
/// see, and drivers on top of it.
pub(super) fn users_of(name: &str) -> Vec<String> {
    let block = Path::new("/sys/block").join(name);
    let mut folders = vec![block.clone()];
    for entry in std::fs::read_dir(&block).into_iter().flatten().flatten() {
        let is_partition = entry.path().join("partition").exists();
        folders.extend(is_partition.then(|| entry.path()));
    }
    let mut numbers = Vec::new();
    let mut users = Vec::new();
    for folder in &folders {
        numbers.extend(folder.join("dev").to_str().and_then(read_line));
        for holder in std::fs::read_dir(folder.join("holders")).into_iter().flatten().flatten() {
            users.push(format!("/dev/{}", holder.file_name().to_string_lossy()));
        }
    }
    users.extend(mounts_of(&read("/proc/self/mountinfo"), &numbers));
    users
}

/// Where the block device `name` is mounted, as this process sees it.
pub(super) fn mounts_of_device(name: &str) -> Vec<PathBuf> {
    let number = Path::new("/sys/block").join(name).join("dev").to_str().and_then(read_line);
    let mounts = mounts_of(&read("/proc/self/mountinfo"), &Vec::from_iter(number));
    let plain = |point: &String| OsString::from_vec(unescape(point.as_bytes())).into();
    mounts.iter().map(plain).collect()
}

/// The mount points of the devices with these numbers, in the text of a `mountinfo` file.
fn mounts_of(mountinfo: &str, numbers: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        if let (Some(number), Some(point)) = (fields.get(2), fields.get(4))
            && numbers.iter().any(|wanted| wanted == number)
        {
            found.push((*point).to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mounted_device_is_found_by_its_number() {
        let mountinfo = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            40 21 259:3 / /mnt/a\\040b rw - ext4 /dev/ublkb0 rw\n\
            41 21 259:4 / /mnt/c ro - ext4 /dev/ublkb0p1 ro\n\n";
        let numbers = ["259:3", "259:4", "259:5"].map(ToOwned::to_owned);
        assert_eq!(mounts_of(mountinfo, &numbers), ["/mnt/a\\040b", "/mnt/c"]);
        assert!(mounts_of(mountinfo, &["8:2".to_owned()]).is_empty());
    }

    #[test]
    fn the_distribution_is_read_with_and_without_quotes() {
        let text = "PRETTY_NAME=\"Debian GNU/Linux 12\"\nVERSION_ID=\"12\"\nID=debian\n";
        assert_eq!(distribution(text), ("debian".to_owned(), "12".to_owned()));
        assert_eq!(distribution(""), (String::new(), String::new()));
    }

    #[test]
    fn capabilities_are_hexadecimal() {
        let status = "Name:\tx\nCapPrm:\t0\nCapEff:\t000001ffffffffff\n";
        assert_eq!(effective_capabilities(status), 0x1ff_ffff_ffff);
        assert_eq!(effective_capabilities("CapEff: zz"), 0);
    }

    #[test]
    fn a_module_may_be_compressed() {
        let folder = tempfile::tempdir().unwrap();
        let block = folder.path().join("6.12/kernel/drivers/block");
        std::fs::create_dir_all(&block).unwrap();
        assert!(!is_module_installed(folder.path(), "6.12"));
        std::fs::write(block.join("ublk_drv.ko.xz"), "").unwrap();
        assert!(is_module_installed(folder.path(), "6.12"));
        assert!(!is_module_installed(folder.path(), "6.13"));
    }
}
