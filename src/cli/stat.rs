//! `stat`: what one device has done.

use super::args::DeviceName;
use super::output;
use super::table::{format_bytes, format_table};
use crate::error::{Result, ResultExt};
use crate::server::protocol::DeviceStat;
use crate::server::{self, RunDir};
use serde_json::json;
use std::ffi::OsString;
use std::fmt::Write;

/// Show what a device is and what it has done since it was attached
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device: N, /dev/ublkbN, or the config it was attached from
    #[arg(value_name = "DEVICE")]
    device: OsString,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let run = RunDir::of_host();
    let id = DeviceName::parse(&args.device).resolve(&run)?;
    let stat = server::stat(&run, id).context(|| format!("ask the server of device {id}"))?;
    if args.json { output::print_facts(&json!(stat), true) } else { output::print(&text(&stat)) }
}

fn text(stat: &DeviceStat) -> String {
    let size = format!("{} ({} bytes)", format_bytes(stat.size_bytes), stat.size_bytes);
    let mode = if stat.read_only { "read-only" } else { "read-write" };
    let mut rows = vec![
        vec!["device".to_owned(), stat.device.display().to_string()],
        vec!["config".to_owned(), stat.config.display().to_string()],
        vec!["server".to_owned(), format!("process {}", stat.pid)],
        vec!["size".to_owned(), size],
        vec!["mode".to_owned(), mode.to_owned()],
        vec!["up".to_owned(), format!("{} s", stat.uptime_ms / 1000)],
    ];
    let Some(counters) = &stat.counters else { return format_table(&rows) };
    let error = counters.last_error.clone().unwrap_or_else(|| "none".to_owned());
    rows.push(vec!["last error".to_owned(), error]);
    let mut text = format_table(&rows);
    let header = ["QUEUE", "REQUESTS", "READ", "ERRORS", "PANICS", "SYSCALLS"];
    let mut rows = vec![header.map(ToOwned::to_owned).to_vec()];
    let numbered =
        (0..).zip(&counters.queues).map(|(queue, done): (u32, _)| (queue.to_string(), done));
    for (name, done) in numbered.chain([("all".to_owned(), &counters.total)]) {
        rows.push(vec![
            name,
            done.requests.to_string(),
            format_bytes(done.read_bytes),
            done.errors.to_string(),
            done.panics.to_string(),
            done.enters.to_string(),
        ]);
    }
    let _ = write!(text, "\n{}", format_table(&rows));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::kernel::{Counters, QueueCounters};

    #[test]
    fn counters_are_shown_per_queue_and_in_sum() {
        let queue =
            QueueCounters { requests: 3, read_bytes: 1536, errors: 1, panics: 0, enters: 2 };
        let mut stat = DeviceStat {
            id: 0,
            device: "/dev/ublkb0".into(),
            pid: 42,
            config: "/c".into(),
            size_bytes: 1 << 30,
            read_only: true,
            uptime_ms: 61_999,
            counters: None,
        };
        let head = "device  /dev/ublkb0\nconfig  /c\nserver  process 42\n\
                    size    1.00 GiB (1073741824 bytes)\nmode    read-only\nup      61 s\n";
        assert_eq!(text(&stat), head);
        stat.counters = Some(Counters { total: queue, queues: vec![queue], last_error: None });
        let tail = "last error  none\n\n\
                    QUEUE  REQUESTS  READ      ERRORS  PANICS  SYSCALLS\n\
                    0      3         1.50 KiB  1       0       2\n\
                    all    3         1.50 KiB  1       0       2\n";
        assert!(text(&stat).ends_with(tail), "{}", text(&stat));
    }
}
