//! `doctor --report`: one text for a bug report, without secrets.
//!
//! Everything is gathered as facts, and all of them go through [`redact_facts`] before anything is
//! printed, as text or as JSON: there is no other way out. Of configs only the paths are told,
//! never what is in them. Nothing here changes anything, and what cannot be read is told as such.

use super::redact::redact_facts;
use super::{list, output, version, why};
use crate::error::Result;
use crate::limits::{REPORT_LINES_MAX, REPORT_TAIL_BYTES};
use crate::server::kernel::HostKernel;
use crate::server::{self, Entry, PersistDir, RunDir, TROUBLE_NAME};
use crate::telemetry::trouble;
use nix::fcntl::OFlag;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes of one record of the kernel's log; the kernel refuses to read into less.
const KMSG_RECORD_BYTES: usize = 8192;

/// Records of the kernel's log that are looked at: its buffer holds some ten thousand.
const KMSG_RECORDS_MAX: usize = 200_000;

/// Prints the report. `checks` are what `doctor` found.
///
/// # Errors
/// When it cannot be printed.
pub(super) fn run(checks: &Value, json: bool) -> Result<()> {
    output::print_facts(redact_facts(gather(&RunDir::of_host(), checks)), json)
}

fn gather(run: &RunDir, checks: &Value) -> Value {
    let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
    // A folder that others can write to may lie, but a report is there to show that, too.
    let trusted = run.check().err().map(|error| format!("{error:#}"));
    let persist = PersistDir::of_host();
    let persisted_ids = persist.ids().unwrap_or_default();
    let devices = match server::survey(run, &HostKernel) {
        Ok(entries) => entries
            .iter()
            .map(|entry| device(run, entry, persisted_ids.contains(&entry.id)))
            .collect(),
        Err(error) => json!(format!("{error:#}")),
    };
    json!({
        "program": version::facts(),
        "kernel": read("/proc/version"),
        "os_release": tail(Path::new("/etc/os-release")),
        "checks": checks,
        "module_parameters": module_parameters(Path::new("/sys/module/ublk_drv/parameters")),
        "run_folder": run.path().display().to_string(),
        "run_folder_problem": trusted,
        "devices": devices,
        "persisted": persisted(&persist),
        "supervisor_log": tail(&run.path().join("supervisor.log")),
        "kernel_log": kernel_log(Path::new("/dev/kmsg")),
    })
}

/// What is known of one device: its state without the config's content, its last words, and its
/// last troubles.
fn device(run: &RunDir, entry: &Entry, persists: bool) -> Value {
    let mut facts = list::entry_json(run, entry, persists);
    let folder = run.folder(entry.id);
    if let Some(state) = &entry.state {
        let layers: Vec<String> =
            state.layers.iter().map(|layer| layer.path.display().to_string()).collect();
        facts["program"] = json!(state.program);
        facts["phase"] = json!(state.phase);
        facts["queues"] = json!(state.queues);
        facts["depth"] = json!(state.depth);
        facts["service_config"] = json!(state.service_config);
        facts["layers"] = json!(layers);
        facts["last_words"] = state.log.as_deref().map_or(Value::Null, tail);
    }
    facts["troubles"] = match trouble::read(&folder.join(TROUBLE_NAME)) {
        Ok(records) => {
            let last = records.iter().rev().take(REPORT_LINES_MAX).rev();
            last.map(why::record_facts).collect()
        }
        Err(_) if !folder.join(TROUBLE_NAME).exists() => Value::Null,
        Err(error) => json!(format!("{error:#}")),
    };
    facts
}

fn persisted(persist: &PersistDir) -> Value {
    match persist.ids() {
        Err(error) => json!(format!("{error:#}")),
        Ok(ids) => ids
            .into_iter()
            .map(|id| match persist.load(id) {
                Ok(entry) => json!({"id": id, "config": entry.map(|entry| entry.config)}),
                Err(error) => json!({"id": id, "problem": format!("{error:#}")}),
            })
            .collect(),
    }
}

fn module_parameters(folder: &Path) -> Value {
    let mut facts = serde_json::Map::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let value = std::fs::read_to_string(entry.path()).unwrap_or_default();
        facts.insert(entry.file_name().to_string_lossy().into_owned(), json!(value.trim()));
    }
    Value::Object(facts)
}

/// The last lines of a file, whole ones only: half a line may hide what a secret is.
fn tail(path: &Path) -> Value {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file =
            File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
        let start = file.metadata()?.len().saturating_sub(REPORT_TAIL_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(REPORT_TAIL_BYTES).read_to_end(&mut bytes)?;
        if start > 0 {
            let end = bytes.iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |at| at + 1);
            bytes.drain(..end);
        }
        Ok(bytes)
    };
    match read() {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().collect();
            let start = lines.len().saturating_sub(REPORT_LINES_MAX);
            json!(lines.get(start..).unwrap_or_default())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Value::Null,
        Err(error) => json!(error.to_string()),
    }
}

/// The last lines of the kernel's log that are about ublk.
fn kernel_log(device: &Path) -> Value {
    let flags = OFlag::O_NONBLOCK.bits();
    let mut log = match File::options().read(true).custom_flags(flags).open(device) {
        Ok(log) => log,
        Err(error) => return json!(error.to_string()),
    };
    let mut lines = VecDeque::new();
    let mut record = vec![0; KMSG_RECORD_BYTES];
    for _ in 0..KMSG_RECORDS_MAX {
        let count = match log.read(&mut record) {
            Ok(0) => break,
            Ok(count) => count,
            // Overwritten while it was read: the next one is there.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => continue,
            Err(_) => break,
        };
        let text = String::from_utf8_lossy(record.get(..count).unwrap_or_default());
        lines.extend(text.lines().filter_map(kernel_line));
        while lines.len() > REPORT_LINES_MAX {
            lines.pop_front();
        }
    }
    json!(lines)
}

/// The time in seconds and the message of a record (`6,339,5140900,-;message`) if it is about ublk.
fn kernel_line(record: &str) -> Option<String> {
    let (head, message) = record.split_once(';')?;
    if !message.contains("ublk") {
        return None;
    }
    let micros: u64 = head.split(',').nth(2)?.parse().ok()?;
    Some(format!("[{}.{:06}] {message}", micros / 1_000_000, micros % 1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_whole_lines_of_a_log_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        assert_eq!(tail(&path), Value::Null);
        std::fs::write(&path, "a\nb").unwrap();
        assert_eq!(tail(&path), json!(["a", "b"]));
        let many: String = (0..REPORT_LINES_MAX + 7).map(|n| format!("line {n}\n")).collect();
        std::fs::write(&path, many).unwrap();
        let told = tail(&path);
        let told = told.as_array().unwrap();
        assert_eq!((told.len(), &told[0]), (REPORT_LINES_MAX, &json!("line 7")));
        // The end of a line whose start, with the key in it, is cut off.
        let bytes = usize::try_from(REPORT_TAIL_BYTES).unwrap();
        let long = format!("password=x{} hunter2\nend\n", "y".repeat(bytes));
        std::fs::write(&path, long).unwrap();
        assert_eq!(tail(&path), json!(["end"]));
        assert!(tail(folder.path()).is_string());
    }

    #[test]
    fn lines_of_the_kernel_about_ublk_are_told_with_their_time() {
        for (record, expected) in [
            ("6,339,5140900,-;ublk: x;y", Some("[5.140900] ublk: x;y")),
            (
                "3,1,2000001,-,caller=T1;I/O error, dev ublkb0",
                Some("[2.000001] I/O error, dev ublkb0"),
            ),
            ("6,339,5140900,-;nvme0", None),
            (" SUBSYSTEM=ublk", None),
            ("6,339,x,-;ublk", None),
            ("", None),
        ] {
            assert_eq!(kernel_line(record).as_deref(), expected, "{record}");
        }
    }
}
