//! `detach`: a device goes away.

use super::args::{DeviceName, trusted_run_dir};
use super::{host, output};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{DETACH_SECONDS_DEFAULT, DETACH_SECONDS_MAX};
use crate::server::kernel::HostKernel;
use crate::server::{self, Manner, PersistDir, RunDir};
use serde_json::json;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

/// Stop and delete a device, or clear what a dead server left of it
///
/// Refused while the device is mounted (see --unmount) or held by another driver. Programs that
/// merely have it open get errors. A device whose server is dead is removed all the same: its
/// readers get errors. A device that `attach --persist` attached does not come back after a reboot.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device: N, /dev/ublkbN, or the config it was attached from
    #[arg(value_name = "DEVICE", required_unless_present = "persisted")]
    device: Option<OsString>,

    /// Every device that `attach --persist` attached; they are still attached after a reboot
    #[arg(long, conflicts_with = "device")]
    persisted: bool,

    /// Detach it now, but attach it again after a reboot if `attach --persist` asked for that
    #[arg(long)]
    keep_persist: bool,

    /// Let a device that is in use go as soon as it is neither mounted nor held; do not wait
    #[arg(long, conflicts_with = "force")]
    lazy: bool,

    /// Take it away whatever is in the way: a mount (whose readers get errors), a server that does
    /// not answer (it is killed), a state file that cannot be read
    #[arg(long)]
    force: bool,

    /// First unmount what `attach --mount` mounted; with --lazy or --force also while it is in use
    #[arg(long)]
    unmount: bool,

    /// How long to wait for the device to be gone
    #[arg(long, value_name = "SECONDS", default_value_t = DETACH_SECONDS_DEFAULT)]
    #[arg(value_parser = clap::value_parser!(u64).range(..=DETACH_SECONDS_MAX))]
    timeout: u64,

    /// Print what was detached as JSON, and errors too
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let run = trusted_run_dir()?;
    let persist = PersistDir::of_host();
    let Some(device) = &args.device else { return detach_persisted(args, &run, &persist) };
    let id = resolve(&DeviceName::parse(device), &run, &persist)?;
    let gone = detach_one(args, &run, id, &persist)?;
    if args.json {
        output::print_facts(json!({"id": id, "detached": gone}), true)?;
    }
    Ok(())
}

/// The device that is meant, attached or only asked to persist.
fn resolve(name: &DeviceName, run: &RunDir, persist: &PersistDir) -> Result<u32> {
    let error = match (name.resolve(run), name) {
        (Err(error), DeviceName::Config(path)) if error.kind() == ErrorKind::NotFound => {
            match persist.ids_of_config(path).unwrap_or_default().as_slice() {
                [id] => return Ok(*id),
                _ => error,
            }
        }
        (outcome, _) => return outcome,
    };
    Err(error)
}

/// Every persisted device that is attached; their entries stay. Each failure is told.
fn detach_persisted(args: &Args, run: &RunDir, persist: &PersistDir) -> Result<()> {
    let mut ids = persist.ids()?;
    ids.retain(|id| run.folder(*id).exists());
    let mut failed = Vec::new();
    for id in &ids {
        if let Err(error) = detach_one(args, run, *id, persist) {
            tracing::error!("{}: {error:#}", server::device_path(*id).display());
            failed.push(*id);
        }
    }
    if args.json {
        output::print_facts(json!({"detached": ids, "failed": failed}), true)?;
    }
    if failed.is_empty() {
        return Ok(());
    }
    let message = format!("{} of {} devices were not detached", failed.len(), ids.len());
    Err(Error::new(ErrorKind::Canceled, message))
}

fn detach_one(args: &Args, run: &RunDir, id: u32, persist: &PersistDir) -> Result<bool> {
    let manner = match (args.lazy, args.force) {
        (true, _) => Manner::Lazy,
        (_, true) => Manner::Force,
        _ => Manner::Polite,
    };
    let keep = args.keep_persist || args.persisted;
    let config = run.state(id).ok().flatten().map(|state| state.config);
    if args.unmount {
        server::unmount_device(run, id, manner)?;
    }
    let patience = Duration::from_secs(args.timeout);
    match server::detach(run, &HostKernel, id, manner, patience) {
        Ok(gone) => {
            if !gone {
                tracing::warn!("device {id} is in use; it goes as soon as it is not");
            }
            if !keep {
                forget(persist, id, config.as_deref())?;
            }
            Ok(gone)
        }
        // It did not come up at the last boot, say: then this is all there is of it.
        Err(error)
            if error.kind() == ErrorKind::NotFound && !keep && forget(persist, id, None)? =>
        {
            Ok(true)
        }
        Err(error) if error.kind() == ErrorKind::Busy => Err(name_users(error, id)),
        Err(error) => Err(error),
    }
}

/// Takes device `id` off the list of those that come back after a reboot, unless that means another
/// one than was attached from `config`. True when it was there.
fn forget(persist: &PersistDir, id: u32, config: Option<&Path>) -> Result<bool> {
    match persist.load(id) {
        Ok(None) => Ok(false),
        Ok(Some(entry)) if config.is_some_and(|config| config != entry.config) => Ok(false),
        Ok(Some(_)) => persist.remove(id),
        Err(error) => {
            tracing::warn!("left as it is: {error:#}");
            Ok(false)
        }
    }
}

/// Adds who uses device `id`. The server cannot see it: it has left the host's mounts.
fn name_users(error: Error, id: u32) -> Error {
    let users = host::users_of(&format!("ublkb{id}"));
    if users.is_empty() { error } else { error.context(format!("in use by {}", users.join(", "))) }
}
