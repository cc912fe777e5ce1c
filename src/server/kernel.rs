//! What the server needs of a front end, as traits, and the real one behind them.
//!
//! The real one is `ublk`; without that feature every call says so. Tests put a fake here, so that
//! everything above is tested on hosts without the driver.

use crate::disk::Disk;
use crate::error::Result;
use crate::telemetry::trouble::TroubleRing;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

/// A front end: it makes devices of disks and knows all devices of the host.
pub trait Kernel {
    /// A device that this process serves.
    type Device: Served;

    /// Whether this host can have devices at all.
    ///
    /// # Errors
    /// `Unsupported` without the driver, `Kernel` without the right to use it.
    fn check(&self) -> Result<()>;

    /// Makes `disk` the device of exactly this number; returns once it can be opened.
    ///
    /// # Errors
    /// `Busy` when the number is taken; otherwise what the front end says. Nothing is left.
    fn start<D: Disk>(&self, disk: Arc<D>, wish: &Wish, watch: Watch) -> Result<Self::Device>;

    /// Takes over device `id`, which a dead server left. `before` is called ahead of the step that
    /// not every kernel can repeat, see [`Kernel::repeats_takeovers`].
    ///
    /// # Errors
    /// What the front end and `before` say. The device stays as it is, and this process must end.
    fn take_over<D: Disk>(
        &self,
        disk: Arc<D>,
        id: u32,
        before: BeforeTakeover,
        watch: Watch,
    ) -> Result<Self::Device>;

    /// Whether a takeover that died half-way can be tried again.
    fn repeats_takeovers(&self) -> bool;

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

    /// Whether the kernel can make a device larger that is in use.
    ///
    /// # Errors
    /// `Unsupported` when it cannot; when the driver cannot be asked.
    fn check_resize(&self) -> Result<()>;

    /// Tells the kernel that the disk of device `id`, which this process serves, has `sectors` now.
    ///
    /// # Errors
    /// What the front end says. The device has the size of before then.
    fn resize(&self, id: u32, sectors: u64) -> Result<()>;

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

    /// What the kernel made of the wish.
    fn shape(&self) -> DeviceShape;

    /// When what happened while the device came into this process.
    fn milestones(&self) -> Milestones;

    /// Lets go of it without stopping it: this process ends at once, and another takes it over.
    fn abandon(self);

    /// Stops and deletes it. `held` is closed as soon as nobody can open the device any more: the
    /// kernel does not let go of a device that is open.
    ///
    /// # Errors
    /// When the kernel does not let go.
    fn stop(self, held: Option<File>) -> Result<()>;
}

/// Who hears of a device.
pub struct Watch {
    /// Called once, on any thread, when the device is over for whatever reason.
    pub on_gone: Box<dyn Fn() + Send>,
    /// Where failed and slow requests are recorded, if anywhere.
    pub trouble_ring: Option<Arc<TroubleRing>>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Watch({:?})", self.trouble_ring)
    }
}

/// Called ahead of a takeover; its error stops it.
pub type BeforeTakeover = Box<dyn Fn() -> Result<()> + Send>;

/// What the kernel made of a [`Wish`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceShape {
    /// Hardware queues.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
}

/// When what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Milestones {
    /// The kernel had let go of the dead server; none for a new device.
    pub quiesced: Option<Instant>,
    /// Requests began to flow.
    pub flowing: Instant,
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
    /// Whether it is to wait for a new server when its server dies.
    pub recoverable: bool,
}

/// One device that the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelDevice {
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// Whether it was started and its server is alive.
    pub live: bool,
    /// Whether its server died and it waits for another.
    pub quiesced: bool,
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
    /// Writes that succeeded.
    #[serde(default)]
    pub writes: u64,
    /// Bytes of those.
    #[serde(default)]
    pub written_bytes: u64,
    /// Flushes that succeeded, those of writes that had to be durable included.
    #[serde(default)]
    pub flushes: u64,
    /// Discards and writes of zeros that succeeded.
    #[serde(default)]
    pub discards: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests that failed because the worker panicked; also counted in `errors`.
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
        BeforeTakeover, Counters, DeviceShape, Disk, File, HostKernel, Kernel, KernelDevice,
        Milestones, QueueCounters, Result, Served, Watch, Wish,
    };
    use crate::error::{Error, ErrorKind};
    use crate::server::state::device_path;
    use crate::ublk::{self, Device, DeviceOptions, DeviceState, QueueStats};
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::Duration;

    impl Kernel for HostKernel {
        type Device = Device;

        fn check(&self) -> Result<()> {
            ublk::check()
        }

        fn start<D: Disk>(&self, disk: Arc<D>, wish: &Wish, watch: Watch) -> Result<Device> {
            let options = DeviceOptions {
                id: Some(wish.id),
                queues: wish.queues,
                depth: wish.depth,
                request_bytes: wish.request_bytes,
                recoverable: wish.recoverable,
            };
            Device::start(disk, &options, watch_of(watch))
        }

        fn take_over<D: Disk>(
            &self,
            disk: Arc<D>,
            id: u32,
            before: BeforeTakeover,
            watch: Watch,
        ) -> Result<Device> {
            Device::take_over(disk, id, before, watch_of(watch))
        }

        fn repeats_takeovers(&self) -> bool {
            ublk::repeats_takeovers()
        }

        fn list(&self) -> Result<Vec<KernelDevice>> {
            let devices = ublk::list()?.into_iter();
            Ok(devices
                .map(|device| KernelDevice {
                    id: device.id,
                    live: device.live,
                    quiesced: device.state == DeviceState::Quiesced,
                    server_pid: u32::try_from(device.server_pid).unwrap_or(0),
                })
                .collect())
        }

        fn delete(&self, id: u32) -> Result<()> {
            ublk::delete(id)
        }

        fn check_resize(&self) -> Result<()> {
            ublk::check_resize()
        }

        fn resize(&self, id: u32, sectors: u64) -> Result<()> {
            ublk::resize(id, sectors)
        }

        fn hold(&self, id: u32) -> Result<File> {
            // On a thread: opening a device may wait for a reader that hangs on it.
            let (opened, outcome) = std::sync::mpsc::channel();
            let path = device_path(id);
            std::thread::spawn(move || opened.send(open_exclusive(&path)));
            outcome.recv_timeout(HOLD_PATIENCE).unwrap_or_else(|_| {
                let message = format!("{} cannot be opened", device_path(id).display());
                Err(Error::new(ErrorKind::Timeout, message))
            })
        }
    }

    /// How long an open that takes no I/O may take.
    const HOLD_PATIENCE: Duration = Duration::from_secs(5);

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

        fn shape(&self) -> DeviceShape {
            DeviceShape { queues: self.queues(), depth: self.depth() }
        }

        fn milestones(&self) -> Milestones {
            Milestones { quiesced: self.quiesced(), flowing: self.flowing() }
        }

        fn abandon(self) {
            Device::abandon(self);
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

    fn watch_of(watch: Watch) -> ublk::Watch {
        ublk::Watch { on_gone: watch.on_gone, trouble_ring: watch.trouble_ring }
    }

    fn counters_of(stats: &QueueStats) -> QueueCounters {
        QueueCounters {
            requests: stats.requests,
            read_bytes: stats.read_bytes,
            writes: stats.writes,
            written_bytes: stats.written_bytes,
            flushes: stats.flushes,
            discards: stats.discards,
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
    use super::{
        BeforeTakeover, Counters, DeviceShape, Disk, File, HostKernel, Kernel, KernelDevice,
        Milestones, Result, Served, Watch, Wish,
    };
    use crate::error::{Error, ErrorKind};
    use std::sync::Arc;

    fn absent() -> Error {
        let message = "this obd-ublk was built without the `ublk` feature: it serves no devices";
        Error::new(ErrorKind::Unsupported, message)
    }

    impl Kernel for HostKernel {
        type Device = Never;

        fn check(&self) -> Result<()> {
            Err(absent())
        }

        fn start<D: Disk>(&self, _: Arc<D>, _: &Wish, _: Watch) -> Result<Never> {
            Err(absent())
        }

        fn take_over<D: Disk>(
            &self,
            _: Arc<D>,
            _: u32,
            _: BeforeTakeover,
            _: Watch,
        ) -> Result<Never> {
            Err(absent())
        }

        fn repeats_takeovers(&self) -> bool {
            false
        }

        fn list(&self) -> Result<Vec<KernelDevice>> {
            Err(absent())
        }

        fn delete(&self, _id: u32) -> Result<()> {
            Err(absent())
        }

        fn check_resize(&self) -> Result<()> {
            Err(absent())
        }

        fn resize(&self, _id: u32, _sectors: u64) -> Result<()> {
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

        fn shape(&self) -> DeviceShape {
            match *self {}
        }

        fn milestones(&self) -> Milestones {
            match *self {}
        }

        fn abandon(self) {
            match self {}
        }

        fn stop(self, _held: Option<File>) -> Result<()> {
            match self {}
        }
    }
}
