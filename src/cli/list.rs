//! `list`: which devices there are and how they are doing.

use super::output;
use super::table::{format_bytes, format_table};
use crate::error::Result;
use crate::server::kernel::HostKernel;
use crate::server::{self, Entry, RunDir, Status, device_path};
use serde_json::{Value, json};

/// List the devices that obd-ublk serves
///
/// A device whose state is `dead` lost its server; `detach`, or the next `attach`, clears it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also list ublk devices of other programs
    #[arg(long)]
    all: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut entries = server::survey(&RunDir::of_host(), &HostKernel)?;
    entries.retain(|entry| args.all || entry.status != Status::Foreign);
    if args.json {
        let devices: Vec<Value> = entries.iter().map(entry_json).collect();
        return output::print_facts(&json!({"devices": devices}), true);
    }
    for entry in &entries {
        if let Some(problem) = &entry.problem {
            tracing::warn!("{problem:#}");
        }
    }
    output::print(&text(&entries))
}

/// Nothing for no devices: a script counts lines.
fn text(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return String::new();
    }
    let header = ["ID", "DEVICE", "STATE", "MODE", "SIZE", "PID", "CONFIG"];
    let mut rows = vec![header.map(ToOwned::to_owned).to_vec()];
    rows.extend(entries.iter().map(row));
    format_table(&rows)
}

fn row(entry: &Entry) -> Vec<String> {
    let none = || "-".to_owned();
    let state = entry.state.as_ref();
    let mode = state.map(|state| if state.read_only { "ro" } else { "rw" }.to_owned());
    let size = state.and_then(|state| state.size_bytes).map(format_bytes);
    let config = state.map(|state| state.config.display().to_string());
    vec![
        entry.id.to_string(),
        device_path(entry.id).display().to_string(),
        entry.status.name().to_owned(),
        mode.unwrap_or_else(none),
        size.unwrap_or_else(none),
        pid(entry).map_or_else(none, |pid| pid.to_string()),
        config.unwrap_or_else(none),
    ]
}

fn pid(entry: &Entry) -> Option<u32> {
    let ours = entry.state.as_ref().map(|state| state.server.pid);
    ours.or_else(|| entry.kernel.map(|device| device.server_pid).filter(|pid| *pid > 0))
}

fn entry_json(entry: &Entry) -> Value {
    let state = entry.state.as_ref();
    json!({
        "id": entry.id,
        "device": device_path(entry.id),
        "state": entry.status.name(),
        "read_only": state.map(|state| state.read_only),
        "size_bytes": state.and_then(|state| state.size_bytes),
        "pid": pid(entry),
        "config": state.map(|state| &state.config),
        "log": state.and_then(|state| state.log.as_ref()),
        "attached_unix_ms": state.map(|state| state.attached_unix_ms),
        "in_kernel": entry.kernel.is_some(),
        "problem": entry.problem.as_ref().map(|problem| format!("{problem:#}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::kernel::KernelDevice;

    #[test]
    fn a_foreign_device_has_a_number_and_a_process_and_no_config() {
        let kernel = KernelDevice { id: 7, live: true, server_pid: 42 };
        let entry = Entry {
            id: 7,
            status: Status::Foreign,
            state: None,
            kernel: Some(kernel),
            problem: None,
        };
        let expected = "ID  DEVICE       STATE    MODE  SIZE  PID  CONFIG\n\
                        7   /dev/ublkb7  foreign  -     -     42   -\n";
        assert_eq!(text(&[entry]), expected);
        assert_eq!(text(&[]), "");
    }
}
