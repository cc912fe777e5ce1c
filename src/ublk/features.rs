//! What this host's kernel and driver can do, for `doctor` and for error texts.
//!
//! Abilities are found by asking and trying. The version of the kernel is used for one thing
//! only: to name known bugs of exactly that version when a command hangs.

use super::control::{CONTROL_PATH, Control, device_ids};
use crate::error::Error;
use std::path::Path;

/// The version of libublk this crate is built with; pinned in `Cargo.toml`.
pub const LIBUBLK_VERSION: &str = "0.4.8";

/// The driver's feature bits by name, from bit 0 on.
const FEATURE_NAMES: [&str; 21] = [
    "SUPPORT_ZERO_COPY",
    "URING_CMD_COMP_IN_TASK",
    "NEED_GET_DATA",
    "USER_RECOVERY",
    "USER_RECOVERY_REISSUE",
    "UNPRIVILEGED_DEV",
    "CMD_IOCTL_ENCODE",
    "USER_COPY",
    "ZONED",
    "USER_RECOVERY_FAIL_IO",
    "UPDATE_SIZE",
    "AUTO_BUF_REG",
    "QUIESCE",
    "PER_IO_DAEMON",
    "BUF_REG_OFF_DAEMON",
    "BATCH_IO",
    "INTEGRITY",
    "SAFE_STOP_DEV",
    "NO_AUTO_PART_SCAN",
    "SHMEM_ZC",
    "IO_DESC_SIZE",
];

/// What can be said about ublk on this host without adding a device.
#[derive(Debug)]
pub struct Facts {
    /// The running kernel, as `uname -r` prints it.
    pub kernel_release: String,
    /// Whether the kernel has the driver loaded or built in.
    pub driver_present: bool,
    /// Whether `/dev/ublk-control` can be used by this process; the reason if not.
    pub control: Result<(), Error>,
    /// The driver's feature bits; `None` when it cannot be asked (or before 6.5).
    pub feature_bits: Option<u64>,
    /// Devices the driver has now.
    pub device_count: usize,
    /// The `ublks_max` parameter. Up to 6.14 it may limit all devices, later only unprivileged
    /// ones; a refusal for it shows as `EACCES` when a device is added.
    pub devices_max: Option<u64>,
    /// Bugs known of exactly this kernel version that can hang an attach.
    pub known_bugs: Vec<&'static str>,
    /// The version of libublk this program is built with.
    pub libublk_version: &'static str,
}

impl Facts {
    /// The names of the set feature bits, unknown ones as `bit N`.
    #[must_use]
    pub fn feature_names(&self) -> Vec<String> {
        names_of(self.feature_bits.unwrap_or(0))
    }
}

/// Asks this host.
#[must_use]
pub fn features() -> Facts {
    let kernel_release = kernel_release();
    let control = Control::open();
    let (control, feature_bits) = match control {
        Ok(mut control) => (Ok(()), control.features()),
        Err(error) => (Err(error), None),
    };
    Facts {
        driver_present: Path::new(CONTROL_PATH).exists()
            || Path::new("/sys/class/misc/ublk-control").exists(),
        control,
        feature_bits,
        device_count: device_ids().map_or(0, |ids| ids.len()),
        devices_max: devices_max(),
        known_bugs: known_bugs(&kernel_release),
        kernel_release,
        libublk_version: LIBUBLK_VERSION,
    }
}

fn devices_max() -> Option<u64> {
    let text = std::fs::read_to_string("/sys/module/ublk_drv/parameters/ublks_max").ok()?;
    text.trim().parse().ok()
}

fn names_of(bits: u64) -> Vec<String> {
    let set = (0..u64::BITS).filter(|bit| bits & (1 << bit) != 0);
    let name = |bit: u32| {
        let known = usize::try_from(bit).ok().and_then(|bit| FEATURE_NAMES.get(bit));
        known.map_or_else(|| format!("bit {bit}"), |name| (*name).to_owned())
    };
    set.map(name).collect()
}

/// The running kernel's release; empty if the kernel does not say.
pub(super) fn kernel_release() -> String {
    let uname = nix::sys::utsname::uname();
    uname.map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

/// What to say about this kernel when one of its commands hangs.
pub(super) fn kernel_trouble() -> String {
    let release = kernel_release();
    match known_bugs(&release).as_slice() {
        [] => format!("no bug of kernel {release} that does this is known; see the kernel's log"),
        bugs => format!("kernel {release} is known for: {}", bugs.join("; ")),
    }
}

/// Bugs of the ublk driver and of io_uring that leave a command of ours hanging.
fn known_bugs(release: &str) -> Vec<&'static str> {
    let Some((major, minor, patch)) = version_of(release) else {
        return Vec::new();
    };
    let flavour = |name: &str| release.ends_with(name);
    let mut bugs = Vec::new();
    let ubuntu_617 = (major, minor) == (6, 17) && (flavour("-azure") || flavour("-aws"));
    if ((major, minor) == (6, 18) && (4..=5).contains(&patch)) || ubuntu_617 {
        bugs.push(
            "ADD_DEV crashes in ublk_init_queues and never ends (fixed by kernel commit \
             011af85ccd87)",
        );
    }
    if loses_wakeups((major, minor, patch)) {
        bugs.push(
            "a lost wake-up of io_uring's workers hangs ADD_DEV or START_DEV when many devices \
             come and go at once (seen on 6.18.40 and 7.0.0 to 7.0.14)",
        );
    }
    bugs
}

/// Whether commands that overlap may hang on this kernel: then they take turns.
pub(super) fn needs_one_command_at_a_time() -> bool {
    version_of(&kernel_release()).is_some_and(loses_wakeups)
}

fn loses_wakeups(version: (u32, u32, u32)) -> bool {
    let (major, minor, patch) = version;
    version == (6, 18, 40) || ((major, minor) == (7, 0) && patch <= 14)
}

/// Major, minor and patch of a release such as `6.12.117+deb12-cloud-amd64`.
fn version_of(release: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = release.splitn(3, '.');
    let major = leading_number(numbers.next()?)?;
    let minor = leading_number(numbers.next()?)?;
    // Release candidates ("7.1-rc3") have no third number.
    Some((major, minor, numbers.next().and_then(leading_number).unwrap_or(0)))
}

fn leading_number(text: &str) -> Option<u32> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.get(..end)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_real_kernels_are_read() {
        for (release, version) in [
            ("6.12.117+deb12-cloud-amd64", Some((6, 12, 117))),
            ("7.1-rc3", Some((7, 1, 0))),
            ("7.2.13+deb14-amd64", Some((7, 2, 13))),
            ("6.17.0-1015-azure", Some((6, 17, 0))),
            ("", None),
            ("six.one", None),
            ("6", None),
        ] {
            assert_eq!(version_of(release), version, "{release}");
        }
    }

    #[test]
    fn only_kernels_with_a_known_bug_are_accused() {
        for (release, count) in [
            ("6.12.117+deb12-cloud-amd64", 0),
            ("6.18.0", 0),
            ("6.18.4-arch1-1", 1),
            ("6.18.40", 1),
            ("6.18.41", 0),
            ("6.17.0-1015-azure", 1),
            ("6.17.9", 0),
            ("7.0.14", 1),
            ("7.0.15", 0),
            ("7.2.13+deb14-amd64", 0),
        ] {
            assert_eq!(known_bugs(release).len(), count, "{release}");
        }
    }

    #[test]
    fn feature_bits_have_the_names_of_the_kernels_header() {
        use libublk::sys;
        for (bit, name) in [
            (sys::UBLK_F_SUPPORT_ZERO_COPY, "SUPPORT_ZERO_COPY"),
            (sys::UBLK_F_USER_RECOVERY, "USER_RECOVERY"),
            (sys::UBLK_F_ZONED, "ZONED"),
            (sys::UBLK_F_QUIESCE, "QUIESCE"),
            (sys::UBLK_F_BATCH_IO, "BATCH_IO"),
            (sys::UBLK_F_NO_AUTO_PART_SCAN, "NO_AUTO_PART_SCAN"),
            (sys::UBLK_F_SHMEM_ZC, "SHMEM_ZC"),
        ] {
            assert_eq!(names_of(u64::from(bit)), [name]);
        }
        assert_eq!(names_of(1 << 63 | 2), ["URING_CMD_COMP_IN_TASK", "bit 63"]);
    }
}
