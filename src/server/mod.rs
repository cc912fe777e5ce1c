//! One process per device: how a disk becomes a device that outlives its caller.
//!
//! ```text
//!   attach -- launch --spawn--> serve -- kernel (ublk)       the device
//!     ^          ^                | |
//!     |          +--readiness-----+ +-- control <-- client   detach, stat
//!     + prints /dev/ublkbN          state, run_dir <-- survey   list, detach, next attach
//! ```
//!
//! A crash, a leak or a kill takes one device, not the host's. What a successor needs is on disk
//! before the device can be used (`state`); whatever kills a server, at most a folder and a dead
//! kernel device are left, and `survey` clears both. The server never signals a process and
//! never touches a device that no state file of ours names. The read path does not come through
//! here: once the device is up, this module sleeps.
//!
//! A SIGTERM to a server stops its device even if it is mounted; `detach` asks first and is
//! refused while somebody has the device mounted.

mod client;
mod config_view;
mod control;
#[cfg(test)]
mod fake;
mod isolate;
pub mod kernel;
mod launch;
mod process;
pub mod protocol;
mod result_file;
mod run_dir;
mod serve;
mod signals;
mod state;
mod survey;
#[cfg(test)]
mod tests;
mod wire;

pub use launch::{AttachOptions, Attached, SERVE_COMMAND, attach, serve_foreground, serve_started};
pub use process::Process;
pub use run_dir::{RUN_DIR_VARIABLE, RunDir, parse_id};
pub use serve::Order;
pub use state::{Phase, State, device_path};
pub use survey::{Entry, Status, detach, devices_of_config, survey};

use crate::error::{Error, ErrorKind, Result};
use crate::limits::CONTROL_CLIENT_MS_MAX;
use protocol::{DeviceStat, Op};
use std::time::Duration;

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
