//! `cache`: what was fetched of layers in registries, and is kept.

use super::output;
use super::table::{format_bytes, format_table, format_utc};
use crate::cache::{
    BlobDigest, Checked, CheckedLogs, Entry, Maintenance, TouchLogEntry, TouchLogs,
};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::trace;
use crate::image::{cache_settings, load_service_config};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Look after the cache of layers in registries
///
/// All processes of the host share it. With it are kept logs of what images are read for first, by
/// which the next attach fetches ahead; they have bounds of their own. Whatever is done here,
/// readers of what they have open go on, and what is missing is fetched again.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,

    /// Host-wide settings [default: /etc/overlaybd/overlaybd.json, which may be absent]
    #[arg(long, value_name = "FILE", global = true)]
    service_config: Option<PathBuf>,

    /// Print JSON, and errors too
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List the blobs that are here, whole or in part, and the logs
    Ls,
    /// Say how much there is
    Stat,
    /// Remove what was not used longest, until blobs take no more than the quota, or than SIZE, and
    /// logs no more than that or their own bounds
    Gc {
        /// In bytes, or with K, M, G or T for powers of 1024
        #[arg(long, value_name = "SIZE", value_parser = super::args::parse_size)]
        to: Option<u64>,
    },
    /// Remove one blob
    Rm {
        /// sha256:HEX
        digest: String,
        /// Though it is open: who has it open goes on with it
        #[arg(long)]
        force: bool,
    },
    /// Read everything and compare it with its checksums
    Fsck {
        /// Throw away what is bad; it is fetched again
        #[arg(long)]
        repair: bool,
    },
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let service = load_service_config(args.service_config.as_deref())?;
    let settings = cache_settings(&service);
    let cache = Maintenance::open(&settings)?;
    let logs = TouchLogs::of(&settings.folder);
    match &args.what {
        What::Ls => list(&cache.list()?, &logs.list()?, args.json),
        What::Stat => {
            let usage = cache.usage()?;
            let logs = logs.list()?;
            let log_bytes = logs.iter().map(|log| log.disk_bytes).fold(0, u64::saturating_add);
            let facts = json!({
                "folder": settings.folder.display().to_string(),
                "quota_bytes": settings.quota_bytes,
                "disk_bytes": usage.disk_bytes,
                "shared_bytes": usage.shared_bytes,
                "whole": usage.whole,
                "partial": usage.partial,
                "in_use": usage.in_use,
                "filled_extents": usage.filled_extents,
                "quarantined_extents": usage.quarantined_extents,
                "logs": logs.len(),
                "log_bytes": log_bytes,
            });
            output::print_facts(facts, args.json)
        }
        What::Gc { to } => {
            let done = cache.collect(*to)?;
            let done_logs = logs.trim(*to)?;
            let facts = json!({
                "removed": done.removed,
                "stuck": done.stuck,
                "removed_bytes": done.removed_bytes,
                "disk_bytes": done.bytes,
                "removed_logs": done_logs.removed,
                "log_bytes": done_logs.bytes,
            });
            output::print_facts(facts, args.json)
        }
        What::Rm { digest, force } => {
            let digest = BlobDigest::parse(digest)?;
            if cache.remove(&digest, *force)? {
                return Ok(());
            }
            Err(Error::new(ErrorKind::NotFound, format!("{digest} is not in the cache")))
        }
        What::Fsck { repair } => {
            let checked = cache.check(*repair)?;
            let checked_logs = logs.check(*repair, |bytes| trace::parse(bytes).is_ok())?;
            output::print_facts(told(&checked, &checked_logs), args.json)?;
            verdict(&checked, &checked_logs, *repair).context(|| "check the cache".to_owned())
        }
    }
}

fn list(entries: &[Entry], logs: &[TouchLogEntry], json: bool) -> Result<()> {
    if json {
        let rows: Vec<Value> = entries.iter().map(row).collect();
        let logs: Vec<Value> = logs.iter().map(log_row).collect();
        return output::print_facts(json!({"blobs": rows, "logs": logs}), true);
    }
    let log_rows = logs.iter().map(|log| {
        vec![
            // The hash of an image's layers, and no digest of a blob.
            log.name.hex(),
            "log".to_owned(),
            format_bytes(log.disk_bytes),
            String::new(),
            format_utc(unix_ms(log.last_used)),
            String::new(),
        ]
    });
    let rows = entries.iter().map(|entry| {
        let kept = if entry.is_whole { "whole" } else { "in part" };
        let use_of = if entry.in_use { "open" } else { "" };
        vec![
            entry.digest.to_string(),
            kept.to_owned(),
            format_bytes(entry.disk_bytes),
            format!("of {}", format_bytes(entry.blob_bytes)),
            format_utc(unix_ms(entry.last_used)),
            use_of.to_owned(),
        ]
    });
    let rows: Vec<Vec<String>> = rows.chain(log_rows).collect();
    if rows.is_empty() { Ok(()) } else { output::print(&format_table(&rows)) }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn row(entry: &Entry) -> Value {
    json!({
        "digest": entry.digest.to_string(),
        "whole": entry.is_whole,
        "blob_bytes": entry.blob_bytes,
        "disk_bytes": entry.disk_bytes,
        "last_used_unix_ms": unix_ms(entry.last_used),
        "in_use": entry.in_use,
        "linked_elsewhere": entry.is_linked_elsewhere,
    })
}

fn log_row(log: &TouchLogEntry) -> Value {
    json!({
        "name": log.name.hex(),
        "disk_bytes": log.disk_bytes,
        "last_used_unix_ms": unix_ms(log.last_used),
    })
}

fn told(checked: &Checked, logs: &CheckedLogs) -> Value {
    let names = |digests: &[BlobDigest]| -> Vec<String> {
        digests.iter().map(ToString::to_string).collect()
    };
    let extents = checked.extents_bad.iter();
    let extents: Vec<Value> = extents
        .map(|(digest, count)| json!({"digest": digest.to_string(), "count": count}))
        .collect();
    let unreadable = checked.unreadable.iter();
    let unreadable: Vec<Value> =
        unreadable.map(|(digest, why)| json!({"digest": digest.to_string(), "why": why})).collect();
    json!({
        "whole_right": checked.whole_right,
        "whole_bad": names(&checked.whole_bad),
        "extents_right": checked.extents_right,
        "extents_bad": extents,
        "strays": names(&checked.strays),
        "busy": names(&checked.busy),
        "unreadable": unreadable,
        "logs_right": logs.right,
        "logs_bad": logs.bad.iter().map(BlobDigest::hex).collect::<Vec<String>>(),
        "log_strays": logs.strays,
    })
}

/// An error for a cache that is damaged, unless what was is gone.
fn verdict(checked: &Checked, logs: &CheckedLogs, repair: bool) -> Result<()> {
    let is_clean = checked.is_clean() && logs.bad.is_empty() && logs.strays == 0;
    let is_all = checked.unreadable.is_empty() && checked.busy.is_empty();
    if is_clean || repair && is_all {
        return Ok(());
    }
    let others = Checked { busy: Vec::new(), ..checked.clone() };
    if !checked.busy.is_empty() && verdict(&others, logs, repair).is_ok() {
        let count = checked.busy.len();
        let message = format!("{count} blobs were busy and were left as they are: try again");
        return Err(Error::new(ErrorKind::Busy, message));
    }
    let hint = if repair { "" } else { "; `--repair` throws away what is bad" };
    let message = format!("not everything is as its checksums say{hint}");
    Err(Error::new(ErrorKind::Integrity, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_cache_is_an_error_until_what_is_bad_is_gone() {
        let clean = Checked { whole_right: 3, ..Checked::default() };
        let digest = BlobDigest::new([1; 32]);
        let bad = Checked { whole_bad: vec![digest], ..Checked::default() };
        let unreadable =
            Checked { unreadable: vec![(digest, "EIO".to_owned())], ..Checked::default() };
        for (checked, repair, good) in [
            (&clean, false, true),
            (&bad, false, false),
            (&bad, true, true),
            (&unreadable, false, false),
            (&unreadable, true, false),
        ] {
            let logs = CheckedLogs::default();
            let found = verdict(checked, &logs, repair).map_err(|error| error.kind());
            let expected = if good { Ok(()) } else { Err(ErrorKind::Integrity) };
            assert_eq!(found, expected, "{checked:?} {repair}");
        }
        let busy = Checked { busy: vec![digest], ..bad.clone() };
        let kind_of = |checked, repair| verdict(checked, &CheckedLogs::default(), repair);
        assert_eq!(kind_of(&busy, false).unwrap_err().kind(), ErrorKind::Integrity);
        assert_eq!(kind_of(&busy, true).unwrap_err().kind(), ErrorKind::Busy);
        let logs = CheckedLogs { bad: vec![digest], ..CheckedLogs::default() };
        assert!(verdict(&clean, &logs, false).is_err() && verdict(&clean, &logs, true).is_ok());
        let bad = Checked { extents_bad: vec![(digest, 4)], ..bad };
        let told = told(&bad, &logs);
        assert_eq!(told["whole_bad"][0], digest.to_string());
        // Once "extent", as if it were the number of one.
        assert_eq!(told["extents_bad"][0], json!({"digest": digest.to_string(), "count": 4}));
        assert_eq!(told["logs_bad"][0], digest.hex());
    }
}
