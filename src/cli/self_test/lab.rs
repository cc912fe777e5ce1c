//! Where the self-test is done: a folder of its own, commands with deadlines, and the tidying up.

use super::stack;
use crate::cli::own;
use crate::error::{Error, ErrorKind, Result};
use crate::server::{PERSIST_DIR_VARIABLE, RUN_DIR_VARIABLE, RunDir, device_path};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The pause between two looks at something that is about to change.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// How long what was told to go may take: the supervisor lingers for some seconds.
pub(super) const END_PATIENCE: Duration = Duration::from_secs(20);

/// How long each forced detach may take.
const FORCE_PATIENCE: Duration = Duration::from_secs(60);

/// What was done, how it went, and how long it took.
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) result: Result<String>,
    pub(super) took: Duration,
}

impl Step {
    pub(super) fn facts(&self) -> Value {
        let ms = u64::try_from(self.took.as_millis()).unwrap_or(u64::MAX);
        let (passed, detail) = match &self.result {
            Ok(detail) => (true, detail.clone()),
            Err(error) => (false, format!("{error:#}")),
        };
        json!({"name": self.name, "passed": passed, "ms": ms, "detail": detail})
    }
}

/// The folder and what is in it.
pub(super) struct Lab {
    folder: tempfile::TempDir,
    run: RunDir,
    config: PathBuf,
    service_config: PathBuf,
    told_to_stop: Arc<AtomicBool>,
}

impl Lab {
    /// Makes the folder and the image. From here on, signals that end a program only end the test.
    pub(super) fn new() -> Result<Self> {
        let told = |error: &std::io::Error| Error::io("make a folder for the self-test", error);
        let folder = tempfile::Builder::new().prefix("obd-ublk-self-test-").tempdir();
        let folder = folder.map_err(|error| told(&error))?;
        let run = RunDir::at(folder.path().join("run"));
        run.prepare()?;
        let config = stack::write(folder.path())?;
        // Whatever the host's own settings say is not under test.
        let service_config = folder.path().join("service.json");
        std::fs::write(&service_config, "{}").map_err(|error| told(&error))?;
        let told_to_stop = Arc::new(AtomicBool::new(false));
        watch_signals(Arc::clone(&told_to_stop))?;
        Ok(Self { folder, run, config, service_config, told_to_stop })
    }

    pub(super) fn run(&self) -> &RunDir {
        &self.run
    }

    pub(super) fn config(&self) -> &Path {
        &self.config
    }

    pub(super) fn service_config(&self) -> &Path {
        &self.service_config
    }

    /// Does and times one step.
    pub(super) fn step(
        &self,
        name: &'static str,
        work: &mut dyn FnMut() -> Result<String>,
    ) -> Step {
        let start = Instant::now();
        let result = self.check_not_told_to_stop().and_then(|()| work());
        Step { name, result, took: start.elapsed() }
    }

    fn check_not_told_to_stop(&self) -> Result<()> {
        if self.told_to_stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Canceled, "a signal ended the test"));
        }
        Ok(())
    }

    /// Waits until something is so.
    pub(super) fn wait(
        &self,
        what: &str,
        patience: Duration,
        is_so: impl FnMut() -> bool,
    ) -> Result<()> {
        wait_until(patience, is_so, || self.check_not_told_to_stop())?.then_some(()).ok_or_else(
            || {
                let message = format!("not within {} s: {what}", patience.as_secs());
                Error::new(ErrorKind::Timeout, message)
            },
        )
    }

    fn start(&self, arguments: &[&str]) -> Result<Child> {
        own::program()
            .args(arguments)
            .env(RUN_DIR_VARIABLE, self.run.path())
            .env(PERSIST_DIR_VARIABLE, self.folder.path().join("persist"))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| Error::io(format!("start obd-ublk {}", arguments.join(" ")), &error))
    }

    /// Runs this program with these arguments; returns what it printed.
    pub(super) fn command(&self, arguments: &[&str], patience: Duration) -> Result<String> {
        self.command_until(arguments, patience, || self.check_not_told_to_stop())
    }

    /// What it prints fits a pipe: one line, or one error.
    fn command_until(
        &self,
        arguments: &[&str],
        patience: Duration,
        check: impl Fn() -> Result<()>,
    ) -> Result<String> {
        let mut child = self.start(arguments)?;
        let ended = wait_until(patience, || !matches!(child.try_wait(), Ok(None)), check);
        if !matches!(ended, Ok(true)) {
            let _ = child.kill();
            let _ = child.wait();
            ended?;
            let message = format!("`{}` took over {} s", arguments.join(" "), patience.as_secs());
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        let output = child.wait_with_output();
        own::outcome(&output.map_err(|error| Error::io("hear what it said", &error))?)
    }

    /// After a detach: no device, no folder, no process.
    pub(super) fn check_nothing_left(&self, id: u32) -> Result<String> {
        let node = device_path(id);
        let sys = Path::new("/sys/block").join(format!("ublkb{id}"));
        for path in [&node, &sys, &self.run.folder(id)] {
            if path.exists() {
                let message = format!("{} is still there", path.display());
                return Err(Error::new(ErrorKind::Busy, message));
            }
        }
        self.wait("every process has ended", END_PATIENCE, || self.processes().is_empty())?;
        Ok("no device, no folder, no process".to_owned())
    }

    /// Takes away what a failed step left; nothing, mostly. Not stopped by signals. The folder of a
    /// device that does not go stays: `detach` needs it.
    pub(super) fn clean_up(&mut self, patience: Duration) -> Step {
        let start = Instant::now();
        let mut left = Vec::new();
        for id in self.run.ids().unwrap_or_default() {
            let arguments = ["detach", "--force", "--timeout", "10", "--json", &id.to_string()];
            if let Err(error) = self.command_until(&arguments, FORCE_PATIENCE, || Ok(())) {
                left.push(format!("{}: {error:#}", device_path(id).display()));
            }
        }
        let gone = wait_until(patience, || self.processes().is_empty(), || Ok(()));
        if !matches!(gone, Ok(true)) {
            for pid in self.processes() {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
            }
        }
        let result = match left.as_slice() {
            [] => Ok(String::new()),
            left => {
                self.folder.disable_cleanup(true);
                let message = format!(
                    "{}; what is left is in {}, for {RUN_DIR_VARIABLE}={} obd-ublk detach --force",
                    left.join("; "),
                    self.folder.path().display(),
                    self.run.path().display()
                );
                Err(Error::new(ErrorKind::Busy, message))
            }
        };
        Step { name: "clean up", result, took: start.elapsed() }
    }

    /// The processes that have our run folder in their environment: servers, successors and the
    /// supervisor, whoever started them.
    fn processes(&self) -> Vec<i32> {
        let mut wanted = format!("{RUN_DIR_VARIABLE}=").into_bytes();
        wanted.extend_from_slice(self.run.path().as_os_str().as_bytes());
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|variable| variable == wanted)
        })
        .collect()
    }
}

/// Looks again and again; false at the deadline.
///
/// # Errors
/// What `check` says.
fn wait_until(
    patience: Duration,
    mut is_so: impl FnMut() -> bool,
    check: impl Fn() -> Result<()>,
) -> Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        if is_so() {
            return Ok(true);
        }
        check()?;
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(LOOK_PAUSE);
    }
}

/// Makes signals a flag for the rest of this process's life. Programs that it starts have theirs.
fn watch_signals(flag: Arc<AtomicBool>) -> Result<()> {
    let told = |errno: nix::Error| Error::io("block signals", &errno.into());
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().map_err(told)?;
    let wait = move || {
        if signals.wait().is_ok() {
            flag.store(true, Ordering::Relaxed);
        }
    };
    let spawned = std::thread::Builder::new().name("signals".to_owned()).spawn(wait);
    spawned.map(drop).map_err(|error| Error::io("start a thread", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_run_folder_and_killed_when_it_stays() {
        let mut lab = Lab::new().unwrap();
        assert!(lab.processes().is_empty());
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .env(RUN_DIR_VARIABLE, lab.run.path())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let found = wait_until(END_PATIENCE, || lab.processes() == [pid], || Ok(()));
        assert!(found.unwrap());
        // A run folder whose name ours starts with is another one.
        let longer = Path::new("/").join(format!("{}x", lab.run.path().display()));
        assert_ne!(longer, lab.run.path());
        assert!(lab.clean_up(Duration::from_millis(100)).result.is_ok());
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    }

    #[test]
    fn waiting_ends_at_the_deadline_or_at_a_signal() {
        let lab = Lab::new().unwrap();
        let error = lab.wait("x", Duration::from_millis(30), || false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        lab.told_to_stop.store(true, Ordering::Relaxed);
        let error = lab.wait("x", Duration::from_secs(60), || false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Canceled);
        let step = lab.step("never", &mut || panic!("a step after a signal"));
        assert_eq!(step.result.unwrap_err().kind(), ErrorKind::Canceled);
    }
}
