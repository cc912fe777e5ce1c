//! The kernel front end: one [`Disk`](crate::disk::Disk) as `/dev/ublkbN`.
//!
//! libublk is hidden behind this module; no type of it appears in a signature.

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use std::sync::Arc;

/// What the caller may choose about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// The number N of `/dev/ublkbN`; `None` lets the kernel choose.
    pub id: Option<u32>,
    /// Hardware queues, or `None` for the measured default.
    pub queues: Option<u16>,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Largest request in bytes.
    pub request_bytes: u32,
}

/// A device that this process serves.
#[derive(Debug)]
pub struct Device {
    id: u32,
}

impl Device {
    /// Adds the device, starts its queue threads and returns once `/dev/ublkbN` can be opened.
    ///
    /// # Errors
    /// `Kernel` with the reason; nothing is left in the kernel.
    pub fn start<D: Disk>(_disk: Arc<D>, _options: &DeviceOptions) -> Result<Self> {
        Err(Error::new(ErrorKind::Unsupported, "not built yet"))
    }

    /// The number N of `/dev/ublkbN`.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Stops and deletes the device: in-flight requests finish, later ones fail, nothing is left
    /// in the kernel. Blocks until the queue threads are gone.
    ///
    /// # Errors
    /// `Timeout` or `Kernel` when the kernel does not let go.
    pub fn stop(self) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "not built yet"))
    }
}

/// One device that the kernel knows, ours or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelDevice {
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// Whether START_DEV was done and a server is alive.
    pub live: bool,
    /// Process id of the server as the kernel knows it; 0 when none.
    pub server_pid: i32,
}

/// All ublk devices of this host, by id.
///
/// # Errors
/// `Kernel` when the driver cannot be asked.
pub fn list() -> Result<Vec<KernelDevice>> {
    Err(Error::new(ErrorKind::Unsupported, "not built yet"))
}

/// Deletes a device whose server is dead. A live one is stopped first.
///
/// # Errors
/// `NotFound`, or `Timeout`/`Kernel` when the kernel does not let go within the deadline.
pub fn delete(_id: u32) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, "not built yet"))
}
