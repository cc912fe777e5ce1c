//! `stat`: what one device has done.

use super::args::{DeviceName, trusted_run_dir};
use super::output;
use super::table::{format_bytes, format_table};
use crate::error::{Result, ResultExt};
use crate::server;
use crate::server::protocol::{DeviceStat, RemoteStat, UpperUsage};
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
    let run = trusted_run_dir()?;
    let id = DeviceName::parse(&args.device).resolve(&run)?;
    let stat = server::stat(&run, id).context(|| format!("ask the server of device {id}"))?;
    if args.json { output::print_facts(json!(stat), true) } else { output::print(&text(&stat)) }
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
        vec!["recovery".to_owned(), recovery(stat)],
    ];
    rows.extend(stat.upper.iter().flat_map(upper_rows));
    rows.extend(stat.remote.iter().flat_map(remote_rows));
    let Some(counters) = &stat.counters else { return format_table(&rows) };
    let error = counters.last_error.clone().unwrap_or_else(|| "none".to_owned());
    rows.push(vec!["last error".to_owned(), error]);
    let mut text = format_table(&rows);
    let mut header = vec!["QUEUE", "REQUESTS", "READ"];
    if !stat.read_only {
        header.extend(["WRITTEN", "WRITES", "FLUSHES", "DISCARDS"]);
    }
    header.extend(["ERRORS", "PANICS", "SYSCALLS"]);
    let mut rows = vec![header.into_iter().map(ToOwned::to_owned).collect()];
    let numbered =
        (0..).zip(&counters.queues).map(|(queue, done): (u32, _)| (queue.to_string(), done));
    for (name, done) in numbered.chain([("all".to_owned(), &counters.total)]) {
        let mut row = vec![name, done.requests.to_string(), format_bytes(done.read_bytes)];
        if !stat.read_only {
            row.push(format_bytes(done.written_bytes));
            row.extend([done.writes, done.flushes, done.discards].map(|count| count.to_string()));
        }
        row.extend([done.errors, done.panics, done.enters].map(|count| count.to_string()));
        rows.push(row);
    }
    let _ = write!(text, "\n{}", format_table(&rows));
    text
}

/// How much the upper holds.
fn upper_rows(upper: &UpperUsage) -> Vec<Vec<String>> {
    let sizes = format!(
        "{} seen of {} in the data file, {} to be written again; index {}, {} entries unflushed",
        format_bytes(upper.live_bytes),
        format_bytes(upper.file_bytes),
        format_bytes(upper.dead_bytes),
        format_bytes(upper.index_bytes),
        upper.unflushed_entries
    );
    let state = upper.failure.clone().unwrap_or_else(|| "takes writes".to_owned());
    let row = |name: &str, text: String| vec![name.to_owned(), text];
    let mut rows = vec![row("upper", upper.data.display().to_string()), row("usage", sizes)];
    rows.extend(upper.quota_bytes.map(|quota| {
        let (used, percent) = (upper.used_bytes, upper.quota_percent.unwrap_or(0));
        row("quota", format!("{percent} % of {}: {}", format_bytes(quota), format_bytes(used)))
    }));
    rows.extend(upper.warning.iter().map(|warning| row("warning", warning.clone())));
    rows.push(row("writing", state));
    rows
}

/// What layers in a registry cost.
fn remote_rows(remote: &RemoteStat) -> Vec<Vec<String>> {
    let percent = remote.fetched_percent;
    let ratio = percent.map_or_else(String::new, |it| format!(" ({it} %)"));
    let row = |name: &str, text: String| vec![name.to_owned(), text];
    vec![
        row(
            "elsewhere",
            format!(
                "{} layers, {} of them complete here; {}",
                remote.layers,
                remote.whole_layers,
                format_bytes(remote.layer_bytes)
            ),
        ),
        row(
            "cache",
            format!(
                "{} hits, {} misses; {} fetched for {} asked for{ratio}, {} ahead",
                remote.hits,
                remote.misses,
                format_bytes(remote.fetched_bytes),
                format_bytes(remote.needed_bytes),
                format_bytes(remote.ahead_bytes)
            ),
        ),
        row(
            "extents",
            format!(
                "{} thrown away, {} of them for their content; {} not kept",
                remote.quarantined_extents, remote.refetched_extents, remote.degraded_extents
            ),
        ),
        row(
            "registry",
            format!(
                "{} requests, {} made again; {} waits for credentials, {} failures",
                remote.requests, remote.retries, remote.credential_waits, remote.fetch_failures
            ),
        ),
    ]
}

/// Whether the device outlives its server, and how it did.
fn recovery(stat: &DeviceStat) -> String {
    if !stat.recoverable {
        return "none: the device ends with its server".to_owned();
    }
    let Some(last) = &stat.last_recovery else { return "supervised; none was needed".to_owned() };
    format!(
        "{} times; the last after {:.1} ms: process {:.1}, image {:.1}{}, kernel {:.1}",
        stat.recovery_count,
        last.flowing_ms,
        last.started_ms,
        last.image_ms,
        if last.from_parcel { " (parcel)" } else { " (opened anew)" },
        last.quiesced_ms
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::kernel::{Counters, QueueCounters};
    use crate::source::RemoteUsage;

    #[test]
    fn a_quota_is_shown_with_its_used_share_and_the_warning() {
        let upper = UpperUsage {
            data: "/u/data".into(),
            live_bytes: 1024,
            file_bytes: 8192,
            dead_bytes: 512,
            index_bytes: 4096,
            unflushed_entries: 3,
            failure: None,
            used_bytes: 8192,
            quota_bytes: Some(9000),
            quota_percent: Some(91),
            warning: Some("91 % of the quota".to_owned()),
        };
        let rows: Vec<_> = upper_rows(&upper).into_iter().map(|row| row.join("|")).collect();
        let quota = format!("quota|91 % of {}: {}", format_bytes(9000), format_bytes(8192));
        assert_eq!(
            rows[2..],
            [quota.as_str(), "warning|91 % of the quota", "writing|takes writes"]
        );
        // What an older server says.
        let older = json!({
            "data": "/u/data", "live_bytes": 1024, "file_bytes": 8192, "dead_bytes": 512,
            "index_bytes": 4096, "unflushed_entries": 3, "failure": null,
        });
        let older: UpperUsage = serde_json::from_value(older).unwrap();
        assert_eq!((older.quota_bytes, upper_rows(&older).len()), (None, 3));
    }

    #[test]
    fn layers_in_a_registry_are_shown_with_what_they_cost() {
        let usage = RemoteUsage {
            blobs: 3,
            whole_blobs: 1,
            blob_bytes: 4096,
            hits: 10,
            misses: 2,
            needed_bytes: 1024,
            fetched_bytes: 2048,
            ahead_bytes: 512,
            fetch_failures: 7,
            quarantined_extents: 6,
            refetched_extents: 5,
            degraded_extents: 4,
            requests: 9,
            retries: 8,
            credential_waits: 1,
        };
        let stat = RemoteStat::of(&usage);
        assert_eq!(stat.fetched_percent, Some(200));
        assert_eq!(RemoteStat::of(&RemoteUsage::default()).fetched_percent, None);
        let rows: Vec<_> = remote_rows(&stat).into_iter().map(|row| row.join("|")).collect();
        assert_eq!(
            rows,
            [
                "elsewhere|3 layers, 1 of them complete here; 4.00 KiB",
                "cache|10 hits, 2 misses; 2.00 KiB fetched for 1.00 KiB asked for (200 %), 512 B \
                 ahead",
                "extents|6 thrown away, 5 of them for their content; 4 not kept",
                "registry|9 requests, 8 made again; 1 waits for credentials, 7 failures",
            ]
        );
        // What an older server says.
        let older: RemoteStat = serde_json::from_value(json!({"hits": 1})).unwrap();
        assert_eq!((older.hits, older.retries), (1, 0));
    }

    #[test]
    fn counters_are_shown_per_queue_and_in_sum() {
        let queue = QueueCounters {
            requests: 3,
            read_bytes: 1536,
            errors: 1,
            enters: 2,
            ..Default::default()
        };
        let mut stat = DeviceStat {
            id: 0,
            device: "/dev/ublkb0".into(),
            pid: 42,
            config: "/c".into(),
            size_bytes: 1 << 30,
            read_only: true,
            uptime_ms: 61_999,
            recoverable: true,
            recovery_count: 0,
            last_recovery: None,
            counters: None,
            upper: None,
            remote: None,
        };
        let head = "device    /dev/ublkb0\nconfig    /c\nserver    process 42\n\
                    size      1.00 GiB (1073741824 bytes)\nmode      read-only\nup        61 s\n\
                    recovery  supervised; none was needed\n";
        assert_eq!(text(&stat), head);
        stat.counters = Some(Counters { total: queue, queues: vec![queue], last_error: None });
        let tail = "last error  none\n\n\
                    QUEUE  REQUESTS  READ      ERRORS  PANICS  SYSCALLS\n\
                    0      3         1.50 KiB  1       0       2\n\
                    all    3         1.50 KiB  1       0       2\n";
        assert!(text(&stat).ends_with(tail), "{}", text(&stat));
        stat.read_only = false;
        let total =
            QueueCounters { writes: 5, written_bytes: 2560, flushes: 4, discards: 6, ..queue };
        stat.counters = Some(Counters { total, queues: Vec::new(), last_error: None });
        let tail = "QUEUE  REQUESTS  READ      WRITTEN   WRITES  FLUSHES  DISCARDS  \
                    ERRORS  PANICS  SYSCALLS\n\
                    all    3         1.50 KiB  2.50 KiB  5       4        6         \
                    1       0       2\n";
        assert!(text(&stat).ends_with(tail), "{}", text(&stat));
    }
}
