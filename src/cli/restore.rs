//! `restore`: what was asked to persist is attached again, after a reboot.
//!
//! Each device is attached by a process of its own, in the folder in which it was attached first:
//! relative paths in its config start there; with the cache, the credentials and the proxies of
//! then. A failure of one does not keep the others.

use super::args::{DeviceName, trusted_run_dir};
use super::{output, own};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::RESTORE_AT_ONCE_MAX;
use crate::server::kernel::HostKernel;
use crate::server::{self, Entry, PersistDir, Persisted, RunDir, Status, device_path};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Attach again what `attach --persist` attached, after a reboot
///
/// Several at a time; what is attached already is left as it is. Each failure is told, and the
/// others are attached all the same. The entries are in /etc/obd-ublk/persist.d
/// (OBD_UBLK_PERSIST_DIR moves it); `detach` removes the one of its device.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this one: N, /dev/ublkbN, or its config, which is attached with defaults if it was not
    /// asked to persist [default: all]
    #[arg(value_name = "DEVICE")]
    device: Option<OsString>,

    /// Print the outcome as JSON, and errors too
    #[arg(long)]
    json: bool,
}

/// What became of one persisted device.
struct Outcome {
    id: u32,
    /// Whether there was nothing to do.
    was_there: bool,
    result: Result<()>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let run = trusted_run_dir()?;
    let persist = PersistDir::of_host();
    let ids = match &args.device {
        None => persist.ids()?,
        Some(name) => match find(&persist, &DeviceName::parse(name))? {
            Some(ids) => ids,
            None => return attach_plainly(args, name, &run),
        },
    };
    let entries = server::survey(&run, &HostKernel)?;
    let outcomes = restore_all(&ids, |id| restore(&run, &persist, &entries, id));
    if args.json {
        let rows: Vec<Value> = outcomes.iter().map(outcome_json).collect();
        output::print_facts(json!({"devices": rows}), true)?;
    } else {
        let restored = outcomes.iter().filter(|outcome| outcome.result.is_ok());
        let lines: Vec<String> =
            restored.map(|outcome| format!("{}\n", device_path(outcome.id).display())).collect();
        output::print(&lines.concat())?;
    }
    conclude(outcomes)
}

/// The entries that are meant; `None` for a config that was not asked to persist.
fn find(persist: &PersistDir, name: &DeviceName) -> Result<Option<Vec<u32>>> {
    match name {
        DeviceName::Id(id) if persist.load(*id)?.is_some() => Ok(Some(vec![*id])),
        DeviceName::Id(id) => {
            let message = format!("device {id} was not asked to persist");
            Err(Error::new(ErrorKind::NotFound, message))
        }
        DeviceName::Config(path) => {
            let ids = persist.ids_of_config(path)?;
            Ok(Some(ids).filter(|ids| !ids.is_empty()))
        }
    }
}

/// Attaches a config that was not asked to persist, unless it is attached.
fn attach_plainly(args: &Args, config: &OsString, run: &RunDir) -> Result<()> {
    if let [id, ..] = server::devices_of_config(run, config.as_ref())?.as_slice() {
        let state = run.state(*id)?;
        if state.is_some_and(|state| state.server_is_alive()) {
            tracing::info!("{} is attached already", device_path(*id).display());
            return Ok(());
        }
    }
    let mut command = own::program();
    command.arg("attach").args(args.json.then_some("--json")).arg("--").arg(config);
    let status = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::inherit())
        .output()
        .map_err(|error| Error::io("start obd-ublk attach", &error))?;
    own::outcome(&status).map(drop)
}

/// Works on several devices at a time; the outcomes are in the order of `ids`.
fn restore_all(ids: &[u32], work: impl Fn(u32) -> Outcome + Sync) -> Vec<Outcome> {
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    let take_turns = || {
        while let Some(id) = ids.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = work(*id);
            if let Err(error) = &outcome.result {
                tracing::error!("{error:#}");
            }
            outcomes.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(outcome);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..ids.len().min(RESTORE_AT_ONCE_MAX) {
            // This thread does all of it alone if there can be no other.
            if std::thread::Builder::new().spawn_scoped(scope, take_turns).is_err() {
                break;
            }
        }
        take_turns();
    });
    let mut outcomes = outcomes.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    outcomes.sort_by_key(|outcome| outcome.id);
    outcomes
}

fn restore(run: &RunDir, persist: &PersistDir, entries: &[Entry], id: u32) -> Outcome {
    let done = persist.load(id).and_then(|found| match found {
        None => {
            let message = "its entry went away";
            Err(Error::new(ErrorKind::NotFound, message))
        }
        Some(wanted) if is_there(&wanted, entries) => mount_if_wanted(run, &wanted).map(|()| true),
        Some(wanted) => attach(&wanted).map(|()| false),
    });
    let done = done.context(|| format!("restore {}", device_path(id).display()));
    Outcome { id, was_there: matches!(done, Ok(true)), result: done.map(drop) }
}

/// Whether the device is attached, and is what is wanted. Any other device under that number makes
/// the attach fail, which tells why.
fn is_there(wanted: &Persisted, entries: &[Entry]) -> bool {
    entries.iter().any(|entry| {
        let is_served = matches!(
            entry.status,
            Status::Starting | Status::Live | Status::Recovering | Status::Lost
        );
        let config = entry.state.as_ref().map(|state| &state.config);
        entry.id == wanted.id && is_served && config == Some(&wanted.config)
    })
}

fn mount_if_wanted(run: &RunDir, wanted: &Persisted) -> Result<()> {
    match &wanted.mount {
        Some(dir) if server::mounted_at(run, wanted.id)?.is_none() => {
            server::mount_device(run, wanted.id, &server::check_mount_point(dir)?)
        }
        Some(_) | None => Ok(()),
    }
}

fn attach(wanted: &Persisted) -> Result<()> {
    let output = attach_command(wanted).output().map_err(|error| {
        let folder = wanted.folder.display();
        Error::io(format!("start obd-ublk attach in {folder}"), &error)
    })?;
    own::outcome(&output).map(drop)
}

fn attach_command(wanted: &Persisted) -> Command {
    let mut command = own::program();
    command.args(wanted.attach_arguments()).current_dir(&wanted.folder).stdin(Stdio::null());
    wanted.give_environment(&mut command);
    command
}

fn outcome_json(outcome: &Outcome) -> Value {
    let (id, device) = (outcome.id, device_path(outcome.id));
    match &outcome.result {
        Ok(()) => json!({"id": id, "device": device, "was_attached": outcome.was_there}),
        Err(error) => json!({
            "id": id,
            "device": device,
            "error": {"kind": error.kind().name(), "message": format!("{error:#}")},
        }),
    }
}

/// The error of the only device that was asked for, or how many failed.
fn conclude(mut outcomes: Vec<Outcome>) -> Result<()> {
    if outcomes.len() == 1 {
        return outcomes.remove(0).result;
    }
    let failed: Vec<String> = outcomes
        .iter()
        .filter(|outcome| outcome.result.is_err())
        .map(|outcome| outcome.id.to_string())
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    let message = format!(
        "{} of {} persisted devices were not attached: {}",
        failed.len(),
        outcomes.len(),
        failed.join(", ")
    );
    Err(Error::new(ErrorKind::Canceled, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Order;
    use std::ffi::OsStr;
    use std::path::Path;
    use std::time::Duration;

    fn outcome(id: u32, kind: Option<ErrorKind>) -> Outcome {
        let result = kind.map_or(Ok(()), |kind| Err(Error::new(kind, "m")));
        Outcome { id, was_there: false, result }
    }

    #[test]
    fn one_failure_is_its_own_and_several_are_counted() {
        assert!(conclude(vec![]).is_ok());
        assert!(conclude(vec![outcome(1, None), outcome(2, None)]).is_ok());
        let one = conclude(vec![outcome(1, Some(ErrorKind::Busy))]).unwrap_err();
        assert_eq!(one.kind(), ErrorKind::Busy);
        let kinds = [None, Some(ErrorKind::Busy), Some(ErrorKind::NotFound)];
        let all = (1..).zip(kinds).map(|(id, kind)| outcome(id, kind)).collect();
        let error = conclude(all).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Canceled);
        assert_eq!(error.to_string(), "2 of 3 persisted devices were not attached: 2, 3");
    }

    #[test]
    fn a_device_is_attached_in_the_folder_and_the_environment_of_its_first_attach() {
        let order = Order {
            config: "c.json".into(),
            service_config: None,
            id: None,
            queues: None,
            depth: 128,
            request_bytes: 4096,
            supervised: true,
            upper: None,
            quota_bytes: None,
            io_deadline_s: None,
        };
        let entry = Persisted::new(3, &order, true, "/w".into(), None);
        let command = attach_command(&entry);
        assert_eq!(command.get_current_dir(), Some(Path::new("/w")));
        let given: Vec<_> = command.get_envs().collect();
        // This test was started with one.
        let path = std::env::var_os("PATH");
        assert!(given.contains(&(OsStr::new("PATH"), path.as_deref())), "{given:?}");
    }

    #[test]
    fn no_more_than_the_bound_are_attached_at_a_time_and_none_is_left_out() {
        let ids: Vec<u32> = (0..50).collect();
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let outcomes = restore_all(&ids, |id| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2));
            now.fetch_sub(1, Ordering::SeqCst);
            outcome(id, None)
        });
        let done: Vec<u32> = outcomes.iter().map(|outcome| outcome.id).collect();
        assert_eq!(done, ids);
        let most = most.into_inner();
        assert!((2..=RESTORE_AT_ONCE_MAX).contains(&most), "{most} at a time");
        assert!(restore_all(&[], |id| outcome(id, None)).is_empty());
    }
}
