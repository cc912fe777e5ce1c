//! `attach`: a config becomes a device.

use super::args::{DeadlineArgs, parse_size, trusted_run_dir};
use super::output;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{
    DEVICE_ID_MAX, DEVICE_ID_TRIES_MAX, QUEUE_COUNT_MAX, QUEUE_DEPTH_MAX, REQUEST_BYTES_MAX,
};
use crate::server::kernel::HostKernel;
use crate::server::{
    self, AttachOptions, Attached, Manner, Order, PersistDir, Persisted, RunDir, UpperWish,
};
use serde_json::json;
use std::cell::Cell;
use std::path::{Path, PathBuf};

/// Make an image a block device and print the device's path
///
/// The device is served by a process of its own that outlives this command; its state, log and
/// control socket are in /run/obd-ublk/N (OBD_UBLK_RUN_DIR moves /run/obd-ublk). SIGTERM stops it
/// even if it is mounted; `detach` asks first.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    serve: ServeArgs,

    /// Serve in this process until SIGTERM or SIGINT
    #[arg(long)]
    pub(super) foreground: bool,

    /// Mount the device there, read-only if it is, in the mounts of this command; `detach
    /// --unmount` takes both away
    #[arg(long, value_name = "DIR", conflicts_with = "foreground")]
    mount: Option<PathBuf>,

    /// Attach it again after a reboot, under the same number (see `restore`); without --id, the
    /// lowest number that neither a device nor such a wish has
    #[arg(long, conflicts_with_all = ["foreground", "upper"])]
    persist: bool,

    /// Print what was attached as JSON instead of the bare path
    #[arg(long)]
    json: bool,
}

/// What to serve, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// The image's config.v1.json, or the file of one layer, which is served by itself
    #[arg(value_name = "CONFIG|LAYER")]
    config: PathBuf,

    /// The number N of /dev/ublkbN [default: the lowest free one]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(..=i64::from(DEVICE_ID_MAX)))]
    id: Option<u32>,

    /// Hardware queues, each with a thread of its own [default: chosen by the number of CPUs]
    #[arg(long, value_name = "COUNT")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUE_COUNT_MAX)))]
    queues: Option<u16>,

    /// Requests in flight per queue
    #[arg(long, value_name = "COUNT", default_value_t = 128)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUE_DEPTH_MAX)))]
    depth: u16,

    /// Serve an image that has a writable upper without writes
    #[arg(long)]
    read_only: bool,

    /// The folder of an upper that takes the writes, made if it is not there; the config must name
    /// none
    #[arg(long, value_name = "DIR", conflicts_with = "read_only")]
    upper: Option<PathBuf>,

    /// Remove the upper's files when the device is detached
    #[arg(long, requires = "upper")]
    ephemeral: bool,

    /// Most bytes that the upper's data file may take, or with K, M, G or T for powers of 1024;
    /// then writes fail with ENOSPC
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "read_only")]
    quota: Option<u64>,

    /// Do without the supervisor that brings the device back when its server dies
    #[arg(long)]
    unsupervised: bool,

    /// The settings of the host [default: /etc/overlaybd/overlaybd.json if it exists]
    #[arg(long, value_name = "FILE")]
    service_config: Option<PathBuf>,

    #[command(flatten)]
    deadline: DeadlineArgs,
}

impl ServeArgs {
    fn options(&self, verbosity: u8) -> AttachOptions {
        AttachOptions {
            order: Order {
                config: self.config.clone(),
                service_config: self.service_config.clone(),
                id: self.id,
                queues: self.queues,
                depth: self.depth,
                request_bytes: REQUEST_BYTES_MAX,
                supervised: !self.unsupervised,
                upper: self
                    .upper
                    .clone()
                    .map(|folder| UpperWish { folder, ephemeral: self.ephemeral }),
                quota_bytes: self.quota,
                io_deadline_s: self.deadline.io_deadline,
            },
            read_only: self.read_only,
            verbosity,
        }
    }
}

pub(crate) fn run(args: &Args, verbosity: u8) -> Result<()> {
    let options = args.serve.options(verbosity);
    if args.foreground {
        return server::serve_foreground(&options, |attached| print_attached(args, attached, None));
    }
    // Before anything is attached for it.
    let mount_point = args.mount.as_deref().map(server::check_mount_point).transpose()?;
    let run = trusted_run_dir()?;
    if args.persist {
        return attach_persistently(args, options, run, mount_point);
    }
    let wanted = Wanted { run, mount_point, persist: None };
    server::attach(&options, |attached| wanted.fulfil(args, attached))
}

/// Attaches under a number that no other persisted device wants.
fn attach_persistently(
    args: &Args,
    options: AttachOptions,
    run: RunDir,
    mount_point: Option<PathBuf>,
) -> Result<()> {
    let folder = std::env::current_dir();
    let folder = folder.map_err(|error| Error::io("find out where I am", &error))?;
    let entries = PersistDir::of_host();
    entries.prepare()?;
    let entry = |id| {
        let order = &options.order;
        Persisted::new(id, order, options.read_only, folder.clone(), mount_point.clone())
    };
    if let Some(id) = options.order.id {
        check_not_wanted(&entries, &entry(id))?;
        let wanted = Wanted { persist: Some((entries, entry(id))), run, mount_point };
        return server::attach(&options, |attached| wanted.fulfil(args, attached));
    }
    let mut tries = 0;
    loop {
        let id = free_id(&run, &entries)?;
        let order = Order { id: Some(id), ..options.order.clone() };
        let options = AttachOptions { order, ..options.clone() };
        let wanted = Wanted {
            persist: Some((entries.clone(), entry(id))),
            run: run.clone(),
            mount_point: mount_point.clone(),
        };
        let came_up = Cell::new(false);
        let attached = server::attach(&options, |attached| {
            came_up.set(true);
            wanted.fulfil(args, attached)
        });
        tries += 1;
        match attached {
            // Somebody else took the number between look and use.
            Err(error)
                if error.kind() == ErrorKind::Busy
                    && !came_up.get()
                    && tries < DEVICE_ID_TRIES_MAX => {}
            outcome => return outcome,
        }
    }
}

/// Refuses a number that another config is to have after a reboot.
fn check_not_wanted(entries: &PersistDir, wanted: &Persisted) -> Result<()> {
    match entries.load(wanted.id)? {
        Some(found) if found.config != wanted.config => {
            let message = format!(
                "device number {0} is to be {1} after a reboot; `obd-ublk detach {0}` forgets that",
                wanted.id,
                found.config.display()
            );
            Err(Error::new(ErrorKind::Busy, message))
        }
        Some(_) | None => Ok(()),
    }
}

/// The lowest number that neither a device has nor an entry wants.
fn free_id(run: &RunDir, entries: &PersistDir) -> Result<u32> {
    let mut taken: Vec<u32> =
        server::survey(run, &HostKernel)?.iter().map(|entry| entry.id).collect();
    taken.extend(entries.ids()?);
    let free = (0..=DEVICE_ID_MAX).find(|id| !taken.contains(id));
    free.ok_or_else(|| Error::new(ErrorKind::Busy, "no free device number was found"))
}

/// What is wanted of a device that is up, besides its name.
struct Wanted {
    run: RunDir,
    mount_point: Option<PathBuf>,
    persist: Option<(PersistDir, Persisted)>,
}

impl Wanted {
    /// Mounts it, writes it down for the next boot, and tells of it. Whatever fails, the device is
    /// not mounted, so that it can be detached, and not written down.
    fn fulfil(&self, args: &Args, attached: &Attached) -> Result<()> {
        let mount_point = self.mount_point.as_deref();
        if let Some(dir) = mount_point {
            server::mount_device(&self.run, attached.id, dir)?;
        }
        let saved = self.persist.as_ref().map_or(Ok(()), |(folder, entry)| folder.save(entry));
        let told = saved.and_then(|()| {
            print_attached(args, attached, mount_point).inspect_err(|_| {
                let removed = self.persist.as_ref().map(|(folder, entry)| folder.remove(entry.id));
                warn_if_failed(removed.unwrap_or(Ok(false)));
            })
        });
        told.inspect_err(|_| {
            warn_if_failed(server::unmount_device(&self.run, attached.id, Manner::Force));
        })
    }
}

fn warn_if_failed<T>(outcome: Result<T>) {
    if let Err(left) = outcome {
        tracing::warn!("{left:#}");
    }
}

/// The hidden command that `attach` starts.
pub(crate) fn run_server(args: &ServeArgs, verbosity: u8) -> Result<()> {
    server::serve_started(&args.options(verbosity))
}

fn print_attached(args: &Args, attached: &Attached, mount: Option<&Path>) -> Result<()> {
    let device = attached.device.display().to_string();
    if args.json {
        let mut facts = json!({"id": attached.id, "device": device});
        if let Some(dir) = mount {
            facts["mount"] = json!(dir.to_string_lossy());
        }
        return output::print_or_fail(&format!("{facts}\n"));
    }
    output::print_or_fail(&format!("{device}\n"))
}
