//! Which process is meant: a pid alone may be somebody else's tomorrow.
//!
//! A process is named by its pid and by when it started (clock ticks since boot, from
//! `/proc/PID/stat`); the boot is named by the kernel's own random id. All three are in the state
//! file, so nothing is ever done to a stranger that inherited a number.

use serde::{Deserialize, Serialize};
use std::path::Path;

/// One process of this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its process id, as seen from the namespace of whoever wrote this.
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    pub start_ticks: u64,
}

impl Process {
    /// The running process `pid`; its start is 0 when there is none.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        Self { pid, start_ticks: start_ticks(pid).unwrap_or(0) }
    }

    /// The process that started this one.
    #[must_use]
    pub fn parent() -> Self {
        Self::of(u32::try_from(nix::unistd::getppid().as_raw()).unwrap_or(0))
    }

    /// The calling process. The start is 0 when `/proc` cannot be read; such a process then
    /// never looks alive to others.
    #[must_use]
    pub fn current() -> Self {
        Self::of(std::process::id())
    }

    /// Kills exactly this process, and nobody who has its number by now.
    pub fn kill(self) {
        use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        // The handle first: from then on the number means this process or nobody.
        if let Some(Ok(process)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()))
            && self.pid > 1
            && self.is_alive()
        {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }

    /// Whether its program is called as this one is.
    #[must_use]
    pub fn is_of_ours(&self) -> bool {
        let name = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        name(&self.pid.to_string()).is_some_and(|name| name.trim_end() == "obd-ublk")
    }

    /// Whether exactly this process still runs. A zombie does not: it holds nothing any more.
    #[must_use]
    pub fn is_alive(self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }
}

/// When the running process `pid` started; `None` when there is none.
fn start_ticks(pid: u32) -> Option<u64> {
    let text = std::fs::read(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    parse_stat(&text)
}

/// The start in ticks from the content of `/proc/PID/stat`, unless the process is a zombie.
///
/// The name in parentheses is the process's own choice and may contain anything, more parentheses
/// included: fields are counted from the last one.
fn parse_stat(text: &[u8]) -> Option<u64> {
    let name_end = text.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(text.get(name_end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    // Field 3 of the line is the state, field 22 the start.
    if matches!(fields.next()?, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The monotonic clock in nanoseconds: the same for all processes of a boot.
#[must_use]
pub(super) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanos.unwrap_or(0))
}

/// The kernel's name for this boot; empty when it does not tell.
#[must_use]
pub(super) fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_is_found_behind_any_name() {
        let rest = "S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 99 98";
        for (name, state, expected) in [
            ("obd-ublk", "S", Some(4711)),
            ("a) Z 1 (b", "S", Some(4711)),
            ("obd-ublk", "Z", None),
            ("obd-ublk", "X", None),
        ] {
            let line = format!("12 ({name}) {}\n", rest.replacen('S', state, 1));
            assert_eq!(parse_stat(line.as_bytes()), expected, "{line}");
        }
        for broken in ["", "12 (x", "12 (x) S 1 2", "12 (x) S 1 1 1 0 -1 a b c d e"] {
            assert_eq!(parse_stat(broken.as_bytes()), None, "{broken}");
        }
    }

    #[test]
    fn a_recycled_pid_is_another_process() {
        let me = Process::current();
        assert!(me.start_ticks > 0);
        assert!(me.is_alive());
        assert!(!Process { start_ticks: me.start_ticks + 1, ..me }.is_alive());
    }

    #[test]
    fn a_killed_process_that_nobody_waited_for_is_dead() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        let process = Process { pid, start_ticks: start_ticks(pid).unwrap() };
        assert!(process.is_alive());
        child.kill().unwrap();
        let died = (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            !process.is_alive()
        });
        child.wait().unwrap();
        assert!(died, "a zombie counted as alive");
    }

    #[test]
    fn this_boot_has_a_name() {
        assert_eq!(boot_id().len(), 36);
    }

    /// A number that another process has by now used to be killed.
    #[test]
    fn only_the_very_process_that_is_meant_is_killed() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let meant = Process::of(child.id());
        Process { start_ticks: meant.start_ticks + 1, ..meant }.kill();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(child.try_wait().unwrap().is_none(), "a stranger was killed");
        meant.kill();
        assert!(!child.wait().unwrap().success());
    }
}
