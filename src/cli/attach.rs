//! `attach`: a config becomes a device.

use super::report;
use crate::error::Result;
use crate::limits::{DEVICE_ID_MAX, QUEUE_COUNT_MAX, QUEUE_DEPTH_MAX, REQUEST_BYTES_MAX};
use crate::server::{self, AttachOptions, Attached, Order};
use serde_json::json;
use std::path::PathBuf;

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

    /// Print what was attached as JSON instead of the bare path
    #[arg(long)]
    json: bool,
}

/// What to serve, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// The image's config.v1.json
    #[arg(value_name = "CONFIG")]
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

    /// The settings of the host [default: /etc/overlaybd/overlaybd.json if it exists]
    #[arg(long, value_name = "FILE")]
    service_config: Option<PathBuf>,
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
            },
            read_only: self.read_only,
            verbosity,
        }
    }
}

pub(crate) fn run(args: &Args, verbosity: u8) -> Result<()> {
    let options = args.serve.options(verbosity);
    if args.foreground {
        return server::serve_foreground(&options, |attached| print_attached(args, attached));
    }
    server::attach(&options, |attached| print_attached(args, attached))
}

/// The hidden command that `attach` starts.
pub(crate) fn run_server(args: &ServeArgs, verbosity: u8) -> Result<()> {
    server::serve_started(&args.options(verbosity))
}

fn print_attached(args: &Args, attached: &Attached) -> Result<()> {
    let device = attached.device.display().to_string();
    if args.json {
        let facts = json!({"id": attached.id, "device": device});
        return report::print_or_fail(&format!("{facts}\n"));
    }
    report::print_or_fail(&format!("{device}\n"))
}
