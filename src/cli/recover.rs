//! `recover`: a device whose server died comes back.

use super::args::{named_or_all, trusted_run_dir};
use super::output;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{ATTACH_SECONDS_MAX, DETACH_SECONDS_MAX};
use crate::server::{self, Status};
use serde_json::json;
use std::ffi::OsString;
use std::time::Duration;

/// Bring a device back whose server died, or wait until it is back
///
/// The supervisor does this by itself, at once. By hand it is needed after a supervisor was killed
/// together with its servers, and for a device that `list` shows as lost.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device: N, /dev/ublkbN, or the config it was attached from
    #[arg(value_name = "DEVICE", required_unless_present = "all")]
    device: Option<OsString>,

    /// Every device that has no server
    #[arg(long, conflicts_with = "device")]
    all: bool,

    /// How long to wait for each device
    #[arg(long, value_name = "SECONDS", default_value_t = ATTACH_SECONDS_MAX)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=DETACH_SECONDS_MAX))]
    timeout: u64,

    /// Print what was recovered as JSON, and errors too
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let run = trusted_run_dir()?;
    let is_without_server = |status| matches!(status, Status::Recovering | Status::Lost);
    let ids = named_or_all(args.device.as_deref(), &run, is_without_server)?;
    let patience = Duration::from_secs(args.timeout);
    let mut failed = Vec::new();
    for id in &ids {
        if let Err(error) = server::recover(&run, *id, patience) {
            if args.device.is_some() {
                return Err(error);
            }
            tracing::error!("{error:#}");
            failed.push(*id);
        }
    }
    if args.json {
        output::print_facts(json!({"recovered": ids, "failed": failed}), true)?;
    }
    if failed.is_empty() {
        return Ok(());
    }
    let message = format!("{} of {} devices did not come back", failed.len(), ids.len());
    Err(Error::new(ErrorKind::Canceled, message))
}
