//! `detach`: a device goes away.

use super::args::DeviceName;
use super::{host, output};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{DETACH_SECONDS_DEFAULT, DETACH_SECONDS_MAX};
use crate::server::kernel::HostKernel;
use crate::server::{self, RunDir};
use serde_json::json;
use std::ffi::OsString;
use std::time::Duration;

/// Stop and delete a device, or clear what a dead server left of it
///
/// Refused while the device is mounted or held by another driver. Programs that merely have it
/// open get errors.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device: N, /dev/ublkbN, or the config it was attached from
    #[arg(value_name = "DEVICE")]
    device: OsString,

    /// How long to wait for the device to be gone
    #[arg(long, value_name = "SECONDS", default_value_t = DETACH_SECONDS_DEFAULT)]
    #[arg(value_parser = clap::value_parser!(u64).range(..=DETACH_SECONDS_MAX))]
    timeout: u64,

    /// Print what was detached as JSON, and errors too
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let run = RunDir::of_host();
    let id = DeviceName::parse(&args.device).resolve(&run)?;
    let detached = server::detach(&run, &HostKernel, id, Duration::from_secs(args.timeout));
    detached.map_err(|error| match error.kind() {
        ErrorKind::Busy => name_users(error, id),
        _ => error,
    })?;
    if args.json {
        output::print_facts(&json!({"id": id, "detached": true}), true)?;
    }
    Ok(())
}

/// Adds who uses device `id`. The server cannot see it: it has left the host's mounts.
fn name_users(error: Error, id: u32) -> Error {
    let users = host::users_of(&format!("ublkb{id}"));
    if users.is_empty() { error } else { error.context(format!("in use by {}", users.join(", "))) }
}
