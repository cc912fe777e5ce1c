//! Commands to `/dev/ublk-control`, each with a deadline.
//!
//! Every command but ADD_DEV goes through here and not through libublk's own handle, for three
//! reasons: libublk waits without a deadline, repeats a refused command with its legacy number
//! (and reports the second refusal), and takes `EBUSY` for success. The driver hands every
//! command to a kernel worker, so that `io_uring_enter` returns at the deadline even when the
//! worker never does.
#![allow(unsafe_code)]

use super::features::kernel_trouble;
use crate::error::{Error, ErrorKind, Result};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// The driver's control node.
pub(super) const CONTROL_PATH: &str = "/dev/ublk-control";

/// Where the driver lists its devices as `ublkcN`.
const DEVICES_PATH: &str = "/sys/class/ublk-char";

/// How long one command may take. START_DEV and STOP_DEV do real work on a busy host; what takes
/// this long will not end.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait for the number of a deleted device. Without openers the kernel needs some
/// milliseconds to let go of our own ring.
pub(super) const NUMBER_PATIENCE: Duration = Duration::from_secs(2);

/// The longest pause between two looks at a device that is going away.
const POLL_PAUSE_MAX: Duration = Duration::from_millis(20);

/// Why a command did not do what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The driver's positive errno.
    Errno(i32),
    /// No answer until the deadline. The command may still be running in the kernel.
    Deadline,
}

impl Refusal {
    /// The error for `what` ("START_DEV of device 3").
    pub(super) fn tell(self, what: &str) -> Error {
        match self {
            Self::Errno(errno) => {
                let cause = std::io::Error::from_raw_os_error(errno);
                Error::new(kind_of(errno), format!("{what}: {cause}{}", hint(errno)))
            }
            Self::Deadline => {
                let seconds = COMMAND_TIMEOUT.as_secs();
                let trouble = kernel_trouble();
                let message = format!("{what} did not end within {seconds} s; {trouble}");
                Error::new(ErrorKind::Timeout, message)
            }
        }
    }
}

/// The kind of a refusal by the driver.
fn kind_of(errno: i32) -> ErrorKind {
    match errno {
        libc::ENODEV | libc::ENOENT => ErrorKind::NotFound,
        libc::EEXIST | libc::EBUSY => ErrorKind::Busy,
        libc::EOPNOTSUPP => ErrorKind::Unsupported,
        _ => ErrorKind::Kernel,
    }
}

/// What the driver means by an errno that says little.
fn hint(errno: i32) -> &'static str {
    match errno {
        libc::EEXIST => " (the device number is in use)",
        libc::EPERM => " (needs CAP_SYS_ADMIN)",
        libc::EACCES => {
            " (no more devices allowed? see /sys/module/ublk_drv/parameters/ublks_max, which \
             kernels before 6.15 may apply to all devices)"
        }
        libc::ENODEV => " (no such device)",
        _ => "",
    }
}

/// A handle on the driver. Owns a ring, so that no other user of the thread meets its answers.
pub(super) struct Control {
    file: File,
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    token: u64,
}

/// A device as the driver describes it.
pub(super) type DeviceInfo = sys::ublksrv_ctrl_dev_info;

impl Control {
    /// Opens the control node.
    pub(super) fn open() -> Result<Self> {
        let opened = OpenOptions::new().read(true).write(true).open(CONTROL_PATH);
        let file = opened.map_err(|error| cannot_open(&error))?;
        Ok(Self { file, ring: new_ring()?, token: 0 })
    }

    /// The driver's feature bits; `None` on kernels before 6.5, which cannot tell.
    pub(super) fn features(&mut self) -> Option<u64> {
        self.exchange(sys::UBLK_U_CMD_GET_FEATURES, 0, Box::new(0_u64)).ok().map(|bits| *bits)
    }

    /// What the driver knows about device `id`.
    pub(super) fn info(&mut self, id: u32) -> Result<DeviceInfo, Refusal> {
        let info = Box::new(DeviceInfo::default());
        self.exchange(sys::UBLK_U_CMD_GET_DEV_INFO, id, info).map(|info| *info)
    }

    /// Tells the driver the parameters of device `id`.
    pub(super) fn set_params(&mut self, id: u32, params: &sys::ublk_params) -> Result<(), Refusal> {
        let mut params = Box::new(*params);
        params.len = params_bytes();
        self.exchange(sys::UBLK_U_CMD_SET_PARAMS, id, params).map(drop)
    }

    /// Starts device `id`, served by this process: `/dev/ublkbN` comes into being.
    pub(super) fn start(&mut self, id: u32) -> Result<(), Refusal> {
        let pid = u64::from(std::process::id());
        self.command(sys::UBLK_U_CMD_START_DEV, id, pid).map(drop)
    }

    /// The parameters of device `id`, as they were set.
    pub(super) fn params(&mut self, id: u32) -> Result<sys::ublk_params, Refusal> {
        let mut params = Box::new(sys::ublk_params::default());
        params.len = params_bytes();
        self.exchange(sys::UBLK_U_CMD_GET_PARAMS, id, params).map(|params| *params)
    }

    /// Begins to take device `id` over from a dead server: its queues are made ready for new
    /// fetches. `EBUSY` until the kernel has noticed the death.
    pub(super) fn start_recovery(&mut self, id: u32) -> Result<(), Refusal> {
        self.command(sys::UBLK_U_CMD_START_USER_RECOVERY, id, 0).map(drop)
    }

    /// Ends the taking over: this process serves device `id`, and what waited comes to its queues.
    /// Every tag must have been handed in.
    pub(super) fn end_recovery(&mut self, id: u32) -> Result<(), Refusal> {
        let pid = u64::from(std::process::id());
        self.command(sys::UBLK_U_CMD_END_USER_RECOVERY, id, pid).map(drop)
    }

    /// Gives device `id`, which must have been started, another size. Only where the driver has
    /// `UBLK_F_UPDATE_SIZE`.
    pub(super) fn update_size(&mut self, id: u32, sectors: u64) -> Result<(), Refusal> {
        self.command(sys::UBLK_U_CMD_UPDATE_SIZE, id, sectors).map(drop)
    }

    /// Stops device `id`. Returns after requests in flight are answered and every queue thread was
    /// told to leave. A device that was never started is only told so.
    pub(super) fn stop(&mut self, id: u32) -> Result<(), Refusal> {
        self.command(sys::UBLK_U_CMD_STOP_DEV, id, 0).map(drop)
    }

    /// Deletes device `id` without waiting for those who hold it open. Falls back to the waiting
    /// command on kernels that do not know better (before 6.7).
    pub(super) fn delete(&mut self, id: u32) -> Result<(), Refusal> {
        match self.command(sys::UBLK_U_CMD_DEL_DEV_ASYNC, id, 0) {
            Err(Refusal::Errno(libc::EOPNOTSUPP | libc::EINVAL)) => {
                self.command(sys::UBLK_U_CMD_DEL_DEV, id, 0).map(drop)
            }
            outcome => outcome.map(drop),
        }
    }

    /// Waits a moment for the number of a deleted device to be free again; false when somebody
    /// still has `/dev/ublkbN` or `/dev/ublkcN` open. That one only keeps the number, not a device.
    /// A number that has a new owner was free in between. Newer kernels (7.2, for one) hide a
    /// deleted device at once: there, whoever wants the number tries again until it is free.
    pub(super) fn wait_free(&mut self, id: u32) -> bool {
        let deadline = Instant::now() + NUMBER_PATIENCE;
        let mut pause = Duration::from_micros(500);
        let mut first_pid = None;
        // A refusal other than "no such device" says nothing about the number: not worth a wait.
        while let Ok(info) = self.info(id) {
            let owner_pid = *first_pid.get_or_insert(info.ublksrv_pid);
            if info.ublksrv_pid > 0 && info.ublksrv_pid != owner_pid {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(POLL_PAUSE_MAX);
        }
        true
    }

    fn command(&mut self, op: u32, id: u32, data: u64) -> Result<i32, Refusal> {
        let command = sys::ublksrv_ctrl_cmd { dev_id: id, data: [data], ..base_command() };
        self.run(op, &command)
    }

    /// A command with a buffer that the driver reads or fills.
    fn exchange<T>(&mut self, op: u32, id: u32, buffer: Box<T>) -> Result<Box<T>, Refusal> {
        let buffer = Box::into_raw(buffer);
        let command = sys::ublksrv_ctrl_cmd {
            dev_id: id,
            addr: u64::try_from(buffer.addr()).unwrap_or(0),
            len: u16::try_from(size_of::<T>()).unwrap_or(u16::MAX),
            ..base_command()
        };
        let outcome = self.run(op, &command);
        if outcome == Err(Refusal::Deadline) {
            // The command may still run, and write: the buffer is the kernel's for good.
            return Err(Refusal::Deadline);
        }
        // SAFETY: from `into_raw` above, and the command is over, so the kernel is done with it.
        let buffer = unsafe { Box::from_raw(buffer) };
        outcome.map(|_| buffer)
    }

    fn run(&mut self, op: u32, command: &sys::ublksrv_ctrl_cmd) -> Result<i32, Refusal> {
        self.token += 1;
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), op)
            .cmd(command_bytes(command))
            .build()
            .user_data(self.token);
        // SAFETY: the entry holds no pointer but the buffer's, which `exchange` keeps alive until
        // the command is over. The queue is empty: `run` leaves no entry behind.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err(Refusal::Errno(libc::EBUSY));
        }
        let outcome = self.wait(Instant::now() + COMMAND_TIMEOUT);
        if outcome == Err(Refusal::Deadline)
            && let Ok(ring) = new_ring()
        {
            self.ring = ring;
        }
        outcome
    }

    fn wait(&mut self, deadline: Instant) -> Result<i32, Refusal> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = types::Timespec::from(left);
            let arguments = types::SubmitArgs::new().timespec(&timeout);
            let entered = self.ring.submitter().submit_with_args(1, &arguments);
            while let Some(answer) = self.ring.completion().next() {
                if answer.user_data() == self.token {
                    let result = answer.result();
                    return if result < 0 { Err(Refusal::Errno(-result)) } else { Ok(result) };
                }
            }
            match entered.map_err(|error| error.raw_os_error()) {
                Ok(_) | Err(Some(libc::EINTR)) => {}
                Err(Some(libc::ETIME)) => return Err(Refusal::Deadline),
                Err(errno) => return Err(Refusal::Errno(errno.unwrap_or(libc::EIO))),
            }
            if left.is_zero() {
                return Err(Refusal::Deadline);
            }
        }
    }
}

/// No queue, no path: what all our commands have in common.
fn base_command() -> sys::ublksrv_ctrl_cmd {
    sys::ublksrv_ctrl_cmd { queue_id: u16::MAX, ..Default::default() }
}

/// The command as the 80 bytes at the end of a submission entry.
fn command_bytes(command: &sys::ublksrv_ctrl_cmd) -> [u8; 80] {
    const { assert!(size_of::<sys::ublksrv_ctrl_cmd>() == 32) };
    let mut bytes = [0_u8; 80];
    // SAFETY: the source is 32 bytes of plain integers without padding, the destination has 80.
    unsafe {
        bytes.as_mut_ptr().cast::<sys::ublksrv_ctrl_cmd>().write_unaligned(*command);
    }
    bytes
}

/// The length of the driver's parameters as this program knows them.
fn params_bytes() -> u32 {
    u32::try_from(size_of::<sys::ublk_params>()).unwrap_or(u32::MAX)
}

fn new_ring() -> Result<IoUring<squeue::Entry128, cqueue::Entry>> {
    let built = IoUring::<squeue::Entry128, cqueue::Entry>::builder().build(4);
    built.map_err(|error| {
        let why = match error.raw_os_error() {
            Some(libc::EPERM) => " (see /proc/sys/kernel/io_uring_disabled)",
            Some(libc::ENOSYS) => " (this kernel or sandbox has no io_uring)",
            _ => "",
        };
        Error::new(ErrorKind::Kernel, format!("set up an io_uring: {error}{why}"))
    })
}

/// Why the control node cannot be opened, and what to do about it.
fn cannot_open(error: &std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Error::new(
            ErrorKind::Unsupported,
            format!(
                "the kernel's ublk driver is not loaded ({CONTROL_PATH} is missing): run \
                 `modprobe ublk_drv`; it needs a kernel with CONFIG_BLK_DEV_UBLK. Debian 12's own \
                 6.1 kernel has none; its packages linux-image-6.12-amd64 and \
                 linux-image-6.12-cloud-amd64 have, and Ubuntu keeps the module in \
                 linux-modules-extra"
            ),
        ),
        Some(libc::EACCES | libc::EPERM) => {
            let message = format!("open {CONTROL_PATH}: {error} (needs root)");
            Error::new(ErrorKind::Kernel, message)
        }
        _ => Error::new(ErrorKind::Kernel, format!("open {CONTROL_PATH}: {error}")),
    }
}

/// The numbers of all devices the driver has, in order.
pub(super) fn device_ids() -> Result<Vec<u32>> {
    let entries = match std::fs::read_dir(Path::new(DEVICES_PATH)) {
        Ok(entries) => entries,
        // No driver, no devices.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(format!("list {DEVICES_PATH}"), &error)),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut ids: Vec<u32> = names.filter_map(|name| id_of(&name)).collect();
    ids.sort_unstable();
    Ok(ids)
}

/// The device number in the name of a character device.
fn id_of(name: &str) -> Option<u32> {
    name.strip_prefix("ublkc")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_laid_out_as_the_driver_reads_it() {
        let command = sys::ublksrv_ctrl_cmd {
            dev_id: 0x0403_0201,
            addr: 0x1122,
            len: 64,
            data: [0x77],
            ..base_command()
        };
        let bytes = command_bytes(&command);
        assert_eq!(bytes[..8], [1, 2, 3, 4, 0xff, 0xff, 64, 0]);
        assert_eq!((bytes[8], bytes[9], bytes[16]), (0x22, 0x11, 0x77));
        assert_eq!(bytes[24..], [0; 56]);
    }

    #[test]
    fn a_refusal_has_the_kind_that_its_errno_means() {
        for (errno, kind, word) in [
            (libc::ENODEV, ErrorKind::NotFound, "no such device"),
            (libc::EEXIST, ErrorKind::Busy, "in use"),
            (libc::EPERM, ErrorKind::Kernel, "CAP_SYS_ADMIN"),
            (libc::EACCES, ErrorKind::Kernel, "ublks_max"),
            (libc::EOPNOTSUPP, ErrorKind::Unsupported, "START_DEV"),
        ] {
            let error = Refusal::Errno(errno).tell("START_DEV of device 3");
            assert_eq!(error.kind(), kind, "{errno}");
            assert!(error.to_string().contains(word), "{error}");
        }
        let late = Refusal::Deadline.tell("ADD_DEV");
        assert_eq!(late.kind(), ErrorKind::Timeout);
        assert!(late.to_string().contains("ADD_DEV did not end within 30 s"), "{late}");
    }

    #[test]
    fn a_missing_driver_is_unsupported_and_the_error_says_how_to_get_it() {
        let error = cannot_open(&std::io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        for word in ["modprobe ublk_drv", "linux-image-6.12-amd64", "6.1"] {
            assert!(error.to_string().contains(word), "{error}");
        }
        let error = cannot_open(&std::io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(error.kind(), ErrorKind::Kernel);
    }

    #[test]
    fn only_character_devices_of_the_driver_are_listed() {
        for (name, id) in
            [("ublkc0", Some(0)), ("ublkc17", Some(17)), ("ublkb0", None), ("ublkc", None)]
        {
            assert_eq!(id_of(name), id, "{name}");
        }
    }
}
