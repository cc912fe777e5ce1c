//! What commands print and write: facts on stdout, progress on a terminal's stderr, and files that
//! appear under their name only when they are whole.

use crate::error::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::fs::File;
use std::io::{IsTerminal, Seek, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How often a progress bar looks at its counter: often enough to look alive.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);

/// Prints facts: as JSON, or for people as an indented list of the same fields.
pub(super) fn print_facts(facts: &Value, json: bool) -> Result<()> {
    let mut text = String::new();
    if json {
        text = serde_json::to_string_pretty(facts)
            .map_err(|error| Error::io("print", &std::io::Error::other(error)))?;
        text.push('\n');
    } else {
        outline(facts, 0, &mut text);
    }
    print(&text)
}

/// Writes `text` to stdout. A reader that went away (`| head`) is not an error.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("write to stdout", &error))
        }
        _ => Ok(()),
    }
}

fn outline(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                outline_item(&format!("{indent}{name}:"), field, depth, text);
            }
        }
        Value::Array(items) => {
            for item in items {
                outline_item(&format!("{indent}-"), item, depth, text);
            }
        }
        scalar => text.push_str(&format!("{indent}{}\n", plain(scalar))),
    }
}

fn outline_item(label: &str, value: &Value, depth: usize, text: &mut String) {
    let nested = match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if nested {
        text.push_str(&format!("{label}\n"));
        outline(value, depth + 1, text);
    } else {
        text.push_str(&format!("{label} {}\n", plain(value)));
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Array(_) | Value::Object(_) => "none".to_owned(),
        other => other.to_string(),
    }
}

/// Runs `work` while a bar on stderr follows its counter; no bar when stderr is no terminal.
pub(super) fn with_progress<T>(total_bytes: u64, work: impl FnOnce(&AtomicU64) -> T) -> T {
    let counter = AtomicU64::new(0);
    if !std::io::stderr().is_terminal() {
        return work(&counter);
    }
    let template = "{bar:30} {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total_bytes).with_style(style);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                bar.set_position(counter.load(Ordering::Relaxed));
                std::thread::park_timeout(PROGRESS_PERIOD);
            }
        });
        let watcher = watcher.thread().clone();
        let _ending = Ending { done: &done, watcher, bar: &bar };
        work(&counter)
    })
}

/// Ends the watcher of a progress bar, also when the work panics: the scope waits for it.
struct Ending<'a> {
    done: &'a AtomicBool,
    watcher: std::thread::Thread,
    bar: &'a ProgressBar,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        self.watcher.unpark();
        self.bar.finish_and_clear();
    }
}

/// A file that a command writes. A regular file appears under its name only with
/// [`OutputFile::commit`]; until then it is a hidden neighbour that goes when it is dropped.
pub(super) struct OutputFile {
    target: PathBuf,
    kind: Kind,
}

enum Kind {
    Hidden(tempfile::NamedTempFile),
    // A device or a pipe: written as it is.
    InPlace(File),
}

impl OutputFile {
    /// Prepares to write `target`. An existing regular file is replaced as a whole.
    pub(super) fn create(target: &Path) -> Result<Self> {
        let failed =
            |error: &std::io::Error| Error::io(format!("write {}", target.display()), error);
        let special = match std::fs::metadata(target) {
            Ok(found) => {
                found.file_type().is_block_device()
                    || found.file_type().is_char_device()
                    || found.file_type().is_fifo()
            }
            Err(_) => false,
        };
        if special {
            let file = File::options().write(true).open(target).map_err(|error| failed(&error))?;
            return Ok(Self { target: target.to_owned(), kind: Kind::InPlace(file) });
        }
        let folder = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let hidden = tempfile::Builder::new()
            .prefix(".obd-ublk-")
            .suffix(".partial")
            // As any new file: what the umask leaves of it.
            .permissions(std::fs::Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .map_err(|error| failed(&error))?;
        Ok(Self { target: target.to_owned(), kind: Kind::Hidden(hidden) })
    }

    /// The open file.
    pub(super) fn file(&self) -> &File {
        match &self.kind {
            Kind::Hidden(hidden) => hidden.as_file(),
            Kind::InPlace(file) => file,
        }
    }

    /// Whether it can only be written from front to back.
    pub(super) fn is_stream(&self) -> bool {
        (&mut self.file()).stream_position().is_err()
    }

    /// Whether the file is new and can have holes.
    pub(super) fn is_new(&self) -> bool {
        matches!(self.kind, Kind::Hidden(_))
    }

    /// Syncs the content and gives the file its name.
    pub(super) fn commit(self) -> Result<()> {
        let target = self.target.display().to_string();
        let failed = |error: &std::io::Error| Error::io(format!("write {target}"), error);
        match self.kind {
            Kind::Hidden(hidden) => {
                hidden.as_file().sync_all().map_err(|error| failed(&error))?;
                hidden.persist(&self.target).map_err(|error| failed(&error.error))?;
                Ok(())
            }
            // A pipe cannot be synced; a device should be.
            Kind::InPlace(file) => match file.sync_all() {
                Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(failed(&error)),
                _ => Ok(()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn facts_for_people_are_the_same_fields_indented() {
        let facts = json!({"a": 1, "b": {"c": "x", "d": []}, "e": [{"f": null}, 2]});
        let mut text = String::new();
        outline(&facts, 0, &mut text);
        assert_eq!(text, "a: 1\nb:\n  c: x\n  d: none\ne:\n  -\n    f: -\n  - 2\n");
    }

    #[test]
    fn an_output_file_that_is_not_committed_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        drop(OutputFile::create(&target).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let output = OutputFile::create(&target).unwrap();
        output.file().write_all(b"whole").unwrap();
        output.commit().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"whole");
    }
}
