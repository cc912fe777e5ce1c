//! What the server needs of a front end, as traits, and the real one behind them.
//!
//! The real one is `ublk`; without that feature every call says so. Tests put a fake here, so that
//! everything above is tested on hosts without the driver.

use crate::disk::Disk;
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::sync::Arc;

/// A front end: it makes devices of disks and knows all devices of the host.
pub trait Kernel {
    /// A device that this process serves.
    type Device: Served;

    /// Makes `disk` the device of exactly this number; returns once it can be opened.
    ///
    /// # Errors
    /// `Busy` when the number is taken; otherwise what the front end says. Nothing is left.
    fn start<D: Disk>(&self, disk: Arc<D>, wish: &Wish) -> Result<Self::Device>;

    /// All devices of the host, ours or not.
    ///
    /// # Errors
    /// When the driver cannot be asked. A host without the driver has no devices.
    fn list(&self) -> Result<Vec<KernelDevice>>;

    /// Deletes a device whose server is dead.
    ///
    /// # Errors
    /// `NotFound`, or what the front end says.
    fn delete(&self, id: u32) -> Result<()>;

    /// Opens the device so that nobody can mount it, or take it in any other exclusive way.
    ///
    /// # Errors
    /// `Busy` when somebody has it already.
    fn hold(&self, id: u32) -> Result<File>;
}

/// A device that this process serves.
pub trait Served {
    /// What it has done so far.
    fn counters(&self) -> Option<Counters>;

    /// Whether it was taken away from outside. Then [`Served::stop`] tells how that went.
    fn is_gone(&mut self) -> bool;

    /// Stops and deletes it. `held` is closed as soon as nobody can open the device any more: the
    /// kernel does not let go of a device that is open.
    ///
    /// # Errors
    /// When the kernel does not let go.
    fn stop(self, held: Option<File>) -> Result<()>;
}

/// The device that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// Hardware queues, or `None` for the default.
    pub queues: Option<u16>,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Largest request in bytes.
    pub request_bytes: u32,
}

/// One device that the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelDevice {
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// Whether it was started and its server is alive.
    pub live: bool,
    /// Process id of its server as the kernel knows it; 0 when none.
    pub server_pid: u32,
}

/// What one queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueCounters {
    /// Requests answered, failed ones included.
    pub requests: u64,
    /// Bytes of reads that succeeded.
    pub read_bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Reads that failed because the reader panicked; also counted in `errors`.
    pub panics: u64,
    /// System calls that the queue made.
    pub enters: u64,
}

/// What a device has done since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// The sum over all queues.
    pub total: QueueCounters,
    /// One entry per queue.
    pub queues: Vec<QueueCounters>,
    /// The text of the last request that failed.
    pub last_error: Option<String>,
}

/// The front end of this program.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostKernel;

#[cfg(feature = "ublk")]
mod real {
    use super::{
        Counters, Disk, File, HostKernel, Kernel, KernelDevice, QueueCounters, Result, Served, Wish,
    };
    use crate::error::{Error, ErrorKind};
    use crate::server::state::device_path;
    use crate::ublk::{self, Device, DeviceOptions, QueueStats};
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::Duration;

    impl Kernel for HostKernel {
        type Device = Device;

        fn start<D: Disk>(&self, disk: Arc<D>, wish: &Wish) -> Result<Device> {
            let options = DeviceOptions {
                id: Some(wish.id),
                queues: wish.queues,
                depth: wish.depth,
                request_bytes: wish.request_bytes,
            };
            Device::start(disk, &options)
        }

        fn list(&self) -> Result<Vec<KernelDevice>> {
            let devices = ublk::list()?.into_iter();
            Ok(devices
                .map(|device| KernelDevice {
                    id: device.id,
                    live: device.live,
                    server_pid: u32::try_from(device.server_pid).unwrap_or(0),
                })
                .collect())
        }

        fn delete(&self, id: u32) -> Result<()> {
            ublk::delete(id)
        }

        fn hold(&self, id: u32) -> Result<File> {
            open_exclusive(&device_path(id))
        }
    }

    impl Served for Device {
        fn counters(&self) -> Option<Counters> {
            let stats = self.stats();
            Some(Counters {
                total: counters_of(&stats.total()),
                queues: stats.queues.iter().map(counters_of).collect(),
                last_error: stats.last_error,
            })
        }

        fn is_gone(&mut self) -> bool {
            self.wait_gone(Duration::ZERO)
        }

        fn stop(self, held: Option<File>) -> Result<()> {
            let id = self.id();
            if let Some(held) = held {
                // Not joined: it ends by itself, at the latest with the process.
                std::thread::spawn(move || release_once_closed_to_all(id, held));
            }
            Device::stop(self)
        }
    }

    fn counters_of(stats: &QueueStats) -> QueueCounters {
        QueueCounters {
            requests: stats.requests,
            read_bytes: stats.read_bytes,
            errors: stats.errors,
            panics: stats.panics,
            enters: stats.enters,
        }
    }

    /// Keeps the exclusive open of device `id` until STOP_DEV took its node away: from then on
    /// nobody can mount it, and DEL_DEV waits for this very descriptor.
    fn release_once_closed_to_all(id: u32, held: File) {
        while sys_block(id).exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(held);
    }

    /// Opens a block device exclusively, read-only.
    fn open_exclusive(path: &Path) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK);
        options.open(path).map_err(|error| {
            if error.raw_os_error() == Some(libc::EBUSY) {
                let message = format!("{} is mounted or held by another driver", path.display());
                return Error::new(ErrorKind::Busy, message);
            }
            Error::io(format!("open {} exclusively", path.display()), &error)
        })
    }

    /// Where sysfs shows block device `id` for as long as it can be opened.
    fn sys_block(id: u32) -> PathBuf {
        PathBuf::from(format!("/sys/block/ublkb{id}"))
    }
}

#[cfg(not(feature = "ublk"))]
mod absent {
    use super::{Counters, Disk, File, HostKernel, Kernel, KernelDevice, Result, Served, Wish};
    use crate::error::{Error, ErrorKind};
    use std::sync::Arc;

    fn absent() -> Error {
        let message = "this obd-ublk was built without the `ublk` feature: it serves no devices";
        Error::new(ErrorKind::Unsupported, message)
    }

    impl Kernel for HostKernel {
        type Device = Never;

        fn start<D: Disk>(&self, _disk: Arc<D>, _wish: &Wish) -> Result<Never> {
            Err(absent())
        }

        fn list(&self) -> Result<Vec<KernelDevice>> {
            Err(absent())
        }

        fn delete(&self, _id: u32) -> Result<()> {
            Err(absent())
        }

        fn hold(&self, _id: u32) -> Result<File> {
            Err(absent())
        }
    }

    /// The device of a front end that has none.
    #[derive(Clone, Copy, Debug)]
    pub enum Never {}

    impl Served for Never {
        fn counters(&self) -> Option<Counters> {
            match *self {}
        }

        fn is_gone(&mut self) -> bool {
            match *self {}
        }

        fn stop(self, _held: Option<File>) -> Result<()> {
            match self {}
        }
    }
}
