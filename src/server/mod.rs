//! One process per device: how a disk becomes a device that outlives its caller.
//!
//! ```text
//!   attach -- launch --spawn--> serve -- kernel (ublk)       the device
//!     ^          ^                | |
//!     |          +--readiness-----+ +-- control <-- client   detach, stat
//!     + prints /dev/ublkbN          state, run_dir <-- survey   list, detach, next attach
//!                                   supervisor --> successor    when the server dies
//! ```
//!
//! A crash, a leak or a kill takes one server, not the host's, and not its device: the kernel keeps
//! that, and the `supervisor` starts a `successor`, which takes it over. What a successor needs is
//! on disk before the device can be used (`state`), and with the supervisor as open files
//! (`portable`). A device that cannot come back leaves at most a folder and a dead kernel device,
//! and `survey` clears both. No device is ever touched that no state file of ours names. The read
//! path does not come through here: once the device is up, this module sleeps.
//!
//! `nbd` is the other way to serve: in the foreground, on a socket, without any of this.
//!
//! A SIGTERM to a server stops its device even if it is mounted; `detach` asks first and is
//! refused while somebody has the device mounted.

mod client;
mod config_view;
mod control;
mod create;
mod environment;
#[cfg(test)]
mod fake;
mod isolate;
pub mod kernel;
mod launch;
mod mount;
mod nbd;
mod packet;
mod persist;
mod portable;
mod prepare;
mod process;
pub mod protocol;
mod resize;
mod result_file;
mod run_dir;
mod serve;
mod served;
mod served_disk;
mod signals;
mod snapshot;
mod state;
mod successor;
mod supervise;
mod supervisor;
mod survey;
mod systemd;
#[cfg(test)]
mod tests;
mod turn;
mod wire;

pub use create::create_disk;
pub use isolate::unescape;
pub use launch::{AttachOptions, Attached, SERVE_COMMAND, attach, serve_foreground, serve_started};
pub use mount::{check_mount_point, mount_device, mounted_at, unmount_device};
pub use nbd::{NbdOptions, NbdServing, serve_nbd};
pub use persist::{PERSIST_DIR_VARIABLE, PersistDir, Persisted};
pub use process::Process;
pub use run_dir::{RUN_DIR_VARIABLE, RunDir, TROUBLE_NAME, parse_id};
pub use serve::{Order, UpperWish};
pub use snapshot::{SnapshotOrder, SnapshotReport};
pub use state::{LayerFile, Phase, Recovery, State, device_path};
pub use successor::{SUCCESSOR_COMMAND, serve_successor};
pub use supervise::{Upgraded, recover, renew_supervisor, upgrade};
pub use supervisor::{SUPERVISE_COMMAND, supervise};
pub use survey::{Entry, Manner, Status, devices_of_config, survey};

use crate::error::{Error, ErrorKind, Result};
use crate::limits::CONTROL_CLIENT_MS_MAX;
use protocol::{DeviceStat, Op};
use std::time::Duration;

/// Stops and deletes device `id`, or clears what is left of it, within `patience`. True when it is
/// gone, false when it will go once nobody uses it.
///
/// # Errors
/// `NotFound` when it is not ours, `Busy` when it is in use, `Timeout` at the deadline.
pub fn detach<K: kernel::Kernel>(
    run: &RunDir,
    kernel: &K,
    id: u32,
    manner: Manner,
    patience: Duration,
) -> Result<bool> {
    let gone = survey::detach(run, kernel, id, manner, patience)?;
    supervisor::nudge(run, id);
    supervisor::sweep(run);
    Ok(gone)
}

/// Asks the server of device `id` what the device has done.
///
/// # Errors
/// `NotFound` when nobody serves it, `Timeout` when its server does not answer.
pub fn stat(run: &RunDir, id: u32) -> Result<DeviceStat> {
    // Clients are served in turn, each with a deadline; wait for a slow one before us.
    let patience = Duration::from_millis(CONTROL_CLIENT_MS_MAX * 2);
    let reply = client::request(&run_dir::socket_in(&run.folder(id)), Op::Stat, patience)?;
    reply.stat.ok_or_else(|| Error::new(ErrorKind::Corrupt, "control reply: no stat in it"))
}

/// How long a snapshot may take: a flush of gigabytes to a slow disk.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(600);

/// Makes the upper of device `id` a layer and puts a new one in its place, while the device is
/// read and written. Blocks until that is done.
///
/// # Errors
/// `NotFound` when nobody serves the device, `ReadOnly` without an upper, `Busy` while another
/// snapshot is under way, `Usage` for a file that is there already; what else is in the way. The
/// device then goes on as before.
pub fn snapshot(run: &RunDir, id: u32, order: SnapshotOrder) -> Result<SnapshotReport> {
    let socket = run_dir::socket_in(&run.folder(id));
    let reply = client::request(&socket, Op::Snapshot(Box::new(order)), SNAPSHOT_PATIENCE)?;
    let missing = || Error::new(ErrorKind::Corrupt, "control reply: no snapshot in it");
    reply.snapshot.ok_or_else(missing)
}

/// How long a resize may take: a flush, as with a snapshot.
const RESIZE_PATIENCE: Duration = SNAPSHOT_PATIENCE;

/// Grows the disk of device `id` to `bytes` while it is attached; the size that it had. Blocks
/// until the kernel knows.
///
/// # Errors
/// `NotFound`, `Unsupported` when this kernel or the upper cannot, `ReadOnly`, `Busy` while another
/// change is under way, `Usage` for a size that is no disk's or too small, `NoSpace`. When the pair
/// has grown and the kernel does not, the error is the kernel's: the same resize ends it.
pub fn resize(run: &RunDir, id: u32, bytes: u64) -> Result<u64> {
    let socket = run_dir::socket_in(&run.folder(id));
    let reply = client::request(&socket, Op::Resize(bytes), RESIZE_PATIENCE)?;
    let missing = || Error::new(ErrorKind::Corrupt, "control reply: no size in it");
    reply.resized.ok_or_else(missing)
}

/// How far work behind somebody's back gives way to others, as nice(2) counts: those who read
/// devices come first.
const NICENESS: i32 = 10;

/// Makes this process independent of who started it, who may end at once: its files, its session
/// and its control group; and gives way to others. For work that is done behind its back.
///
/// # Errors
/// As the operating system says.
pub fn leave_caller() -> Result<()> {
    isolate::close_inherited_files()?;
    // The files that it makes are the caller's.
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    isolate::leave_session()?;
    nix::sys::stat::umask(mask);
    isolate::leave_cgroup(isolate::Inmate::Supervisor);
    if let Err(error) = rustix::process::nice(NICENESS) {
        tracing::debug!(%error, "does not give way to others");
    }
    Ok(())
}
