//! `list`: which devices there are and how they are doing.

use super::args::trusted_run_dir;
use super::output;
use super::table::{format_bytes, format_table};
use crate::error::Result;
use crate::server::kernel::HostKernel;
use crate::server::{self, Entry, PersistDir, Persisted, RunDir, Status, device_path};
use serde_json::{Value, json};
use std::path::Path;

/// List the devices that obd-ublk serves
///
/// A device whose state is `recovering` lost its server and gets another one; one that is `lost`
/// waits for `recover` or `detach`, with its readers. One that is `dead` cannot come back;
/// `detach`, or the next `attach`, clears it. One that is `absent` should have been attached at
/// boot (see `restore`). PERSIST tells what comes back after a reboot.
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
    let run = trusted_run_dir()?;
    let mut entries = server::survey(&run, &HostKernel)?;
    entries.retain(|entry| args.all || entry.status != Status::Foreign);
    // A list must not fail for what it says besides.
    let persist = PersistDir::of_host();
    let persisted = persist.ids().unwrap_or_else(|error| {
        tracing::warn!("{error:#}");
        Vec::new()
    });
    let absent: Vec<Absent> = persisted
        .iter()
        .filter(|id| entries.iter().all(|entry| entry.id != **id))
        .map(|id| Absent { id: *id, entry: persist.load(*id) })
        .collect();
    if args.json {
        let devices: Vec<Value> = entries
            .iter()
            .map(|entry| entry_json(&run, entry, persisted.contains(&entry.id)))
            .collect();
        let absent: Vec<Value> = absent.iter().map(Absent::facts).collect();
        return output::print_facts(json!({"devices": devices, "absent": absent}), true);
    }
    for entry in &entries {
        if let Some(problem) = &entry.problem {
            let name = device_path(entry.id);
            tracing::warn!("{} is {}: {problem:#}", name.display(), entry.status.name());
        }
    }
    output::print(&text(&entries, &absent, &persisted))
}

/// Nothing for no devices: a script counts lines.
fn text(entries: &[Entry], absent: &[Absent], persisted: &[u32]) -> String {
    if entries.is_empty() && absent.is_empty() {
        return String::new();
    }
    let header = ["ID", "DEVICE", "STATE", "MODE", "SIZE", "PID", "PERSIST", "CONFIG"];
    let mut rows = vec![header.map(ToOwned::to_owned).to_vec()];
    rows.extend(entries.iter().map(|entry| row(entry, persisted.contains(&entry.id))));
    rows.extend(absent.iter().map(Absent::row));
    format_table(&rows)
}

fn row(entry: &Entry, persists: bool) -> Vec<String> {
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
        if persists { "yes".to_owned() } else { none() },
        config.unwrap_or_else(none),
    ]
}

/// A device that should have been attached at boot.
struct Absent {
    id: u32,
    entry: Result<Option<Persisted>>,
}

impl Absent {
    fn config(&self) -> Option<&Path> {
        self.entry.as_ref().ok()?.as_ref().map(|entry| entry.config.as_path())
    }

    fn row(&self) -> Vec<String> {
        let config = match &self.entry {
            Err(error) => format!("({error:#})"),
            Ok(_) => self.config().map_or("-".to_owned(), |path| path.display().to_string()),
        };
        let device = device_path(self.id).display().to_string();
        let dash = || "-".to_owned();
        let yes = "yes".to_owned();
        vec![self.id.to_string(), device, "absent".to_owned(), dash(), dash(), dash(), yes, config]
    }

    fn facts(&self) -> Value {
        json!({
            "id": self.id,
            "device": device_path(self.id),
            "config": self.config(),
            "problem": self.entry.as_ref().err().map(|error| format!("{error:#}")),
        })
    }
}

fn pid(entry: &Entry) -> Option<u32> {
    let ours = entry.state.as_ref().map(|state| state.server.pid);
    ours.or_else(|| entry.kernel.map(|device| device.server_pid).filter(|pid| *pid > 0))
}

pub(super) fn entry_json(run: &RunDir, entry: &Entry, persists: bool) -> Value {
    let state = entry.state.as_ref();
    let mount = server::mounted_at(run, entry.id).ok().flatten();
    json!({
        "id": entry.id,
        "device": device_path(entry.id),
        "state": entry.status.name(),
        "read_only": state.map(|state| state.read_only),
        "size_bytes": state.and_then(|state| state.size_bytes),
        "pid": pid(entry),
        "config": state.map(|state| &state.config),
        "persists": persists,
        "mount": mount.map(|dir| dir.to_string_lossy().into_owned()),
        "log": state.and_then(|state| state.log.as_ref()),
        "recoverable": state.map(|state| state.recoverable),
        "recovery_count": state.map(|state| state.recovery_count),
        "last_recovery": state.and_then(|state| state.last_recovery),
        "attached_unix_ms": state.map(|state| state.attached_unix_ms),
        "in_kernel": entry.kernel.is_some(),
        "problem": entry.problem.as_ref().map(|problem| format!("{problem:#}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::server::kernel::KernelDevice;

    #[test]
    fn a_foreign_device_has_a_number_and_a_process_and_no_config() {
        let kernel = KernelDevice { id: 7, live: true, quiesced: false, server_pid: 42 };
        let entry = Entry {
            id: 7,
            status: Status::Foreign,
            state: None,
            kernel: Some(kernel),
            problem: None,
        };
        let expected = "ID  DEVICE       STATE    MODE  SIZE  PID  PERSIST  CONFIG\n\
                        7   /dev/ublkb7  foreign  -     -     42   -        -\n";
        assert_eq!(text(&[entry], &[], &[]), expected);
        assert_eq!(text(&[], &[], &[]), "");
    }

    #[test]
    fn a_device_that_did_not_come_back_is_listed() {
        let broken = Error::new(ErrorKind::Corrupt, "EOF");
        let absent = [Absent { id: 3, entry: Ok(None) }, Absent { id: 4, entry: Err(broken) }];
        let expected = "ID  DEVICE       STATE   MODE  SIZE  PID  PERSIST  CONFIG\n\
                        3   /dev/ublkb3  absent  -     -     -    yes      -\n\
                        4   /dev/ublkb4  absent  -     -     -    yes      (EOF)\n";
        assert_eq!(text(&[], &absent, &[3, 4]), expected);
    }
}
