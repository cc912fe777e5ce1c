//! `upgrade`: another program serves a device from now on.

use super::args::{named_or_all, trusted_run_dir};
use super::output;
use super::table::format_table;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{ATTACH_SECONDS_MAX, DETACH_SECONDS_MAX};
use crate::server::{self, Status};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Hand devices over to another version of this program, while they are in use
///
/// The new program gets everything ready, the old server ends, the new one goes on: readers wait
/// for that moment and see no error. If the new one fails, the old one goes on or is brought back.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device: N, /dev/ublkbN, or the config it was attached from
    #[arg(value_name = "DEVICE", required_unless_present = "all")]
    device: Option<OsString>,

    /// Every device that is served, one after the other, and then the supervisor
    #[arg(long, conflicts_with = "device")]
    all: bool,

    /// The program that is to serve [default: the one that runs this command]
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,

    /// How long to wait for each device
    #[arg(long, value_name = "SECONDS", default_value_t = ATTACH_SECONDS_MAX)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=DETACH_SECONDS_MAX))]
    timeout: u64,

    /// Print the outcome as JSON, and errors too
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let run = trusted_run_dir()?;
    let ids = named_or_all(args.device.as_deref(), &run, |status| status == Status::Live)?;
    let own = PathBuf::from("/proc/self/exe");
    let program = args.program.as_ref().unwrap_or(&own);
    let patience = Duration::from_secs(args.timeout);
    let mut outcomes = Vec::new();
    for id in ids {
        outcomes.push((id, server::upgrade(&run, id, program, patience)));
    }
    if args.json {
        let rows: Vec<Value> =
            outcomes.iter().map(|(id, outcome)| outcome_json(*id, outcome)).collect();
        output::print_facts(json!({"devices": rows}), true)?;
    } else {
        output::print(&text(&outcomes))?;
    }
    match outcomes.into_iter().find_map(|(_, outcome)| outcome.err()) {
        // The servers start the next supervisor: of the new program, when all of them are.
        None if args.all => server::renew_supervisor(&run, patience),
        None => Ok(()),
        Some(error) if args.device.is_some() => Err(error),
        Some(error) => {
            Err(Error::new(ErrorKind::Canceled, format!("the first failure: {error:#}")))
        }
    }
}

type Outcome = (u32, Result<server::Upgraded>);

fn outcome_json(id: u32, outcome: &Result<server::Upgraded>) -> Value {
    match outcome {
        Ok(upgraded) => json!({"id": id, "upgraded": true, "pause_us": upgraded.pause_us}),
        Err(error) => json!({"id": id, "upgraded": false, "error": format!("{error:#}")}),
    }
}

fn text(outcomes: &[Outcome]) -> String {
    let rows = outcomes.iter().filter_map(|(id, outcome)| {
        let upgraded = outcome.as_ref().ok()?;
        let pause = format!("{}.{:03} ms", upgraded.pause_us / 1000, upgraded.pause_us % 1000);
        Some(vec![server::device_path(*id).display().to_string(), pause])
    });
    let rows: Vec<Vec<String>> = rows.collect();
    if rows.is_empty() { String::new() } else { format_table(&rows) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_of_each_device_is_told() {
        let failed = Error::new(ErrorKind::Canceled, "rolled back: x");
        let outcomes = [(3, Ok(server::Upgraded { pause_us: 12_034 })), (4, Err(failed))];
        assert_eq!(text(&outcomes), "/dev/ublkb3  12.034 ms\n");
        assert_eq!(
            outcome_json(4, &outcomes[1].1).to_string(),
            r#"{"id":4,"upgraded":false,"error":"rolled back: x"}"#
        );
    }
}
