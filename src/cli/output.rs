//! What commands print: facts on stdout, progress on a terminal's stderr.

use super::facts::Facts;
use crate::error::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{BufWriter, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How often a progress bar looks at its counter: often enough to look alive.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);

/// Bytes of output gathered before they are written: a list of a million items takes a few
/// thousand system calls.
const STDOUT_BUFFER_BYTES: usize = 64 * 1024;

/// Prints facts: as JSON, or for people as an indented list of the same fields.
pub(super) fn print_facts(facts: impl Into<Facts>, json: bool) -> Result<()> {
    let facts = facts.into();
    print_with(|out| if json { facts.write_json(out) } else { facts.write_outline(out) })
}

/// Prints `text`.
pub(super) fn print(text: &str) -> Result<()> {
    print_with(|out| out.write_all(text.as_bytes()))
}

/// Prints lines.
pub(super) fn print_lines(mut lines: impl Iterator<Item = String>) -> Result<()> {
    print_with(|out| lines.try_for_each(|line| writeln!(out, "{line}")))
}

/// Prints `text` to somebody who has to have it: a reader that went away is an error.
pub(super) fn print_or_fail(text: &str) -> Result<()> {
    let told = |error| Error::io("write to stdout", &error);
    to_stdout(|out| out.write_all(text.as_bytes())).map_err(told)
}

/// Prints what `write` writes. A reader that went away (`| head`) is not an error.
fn print_with(write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    match to_stdout(write) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("write to stdout", &error))
        }
        _ => Ok(()),
    }
}

fn to_stdout(write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(STDOUT_BUFFER_BYTES, std::io::stdout().lock());
    write(&mut out)?;
    out.flush()
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
        let watch = || {
            while !done.load(Ordering::Acquire) {
                bar.set_position(counter.load(Ordering::Relaxed));
                std::thread::park_timeout(PROGRESS_PERIOD);
            }
        };
        // Where there can be no more threads, the work is done without a bar.
        let Ok(watcher) = std::thread::Builder::new().spawn_scoped(scope, watch) else {
            bar.finish_and_clear();
            return work(&counter);
        };
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
