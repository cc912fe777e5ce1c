//! What a thread of the front end gives up and takes on before it serves.
//!
//! All of it is per thread and none of it can be undone by what runs on the thread later.
#![allow(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;
use std::sync::{Condvar, MutexGuard, PoisonError};
use std::time::Duration;

/// `CAP_SYS_ADMIN` of `<linux/capability.h>`.
const CAP_SYS_ADMIN: u32 = 21;

/// `_LINUX_CAPABILITY_VERSION_3`: 64 capabilities in two words.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Runs `work` on a thread of its own that ends with it: what the kernel keeps for a thread that
/// has given commands (workers that wake every five seconds) ends, too. `None` without a thread, or
/// when it panicked.
pub(super) fn apart<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let thread = std::thread::Builder::new().name("ublk-command".to_owned()).spawn(work).ok()?;
    thread.join().ok()
}

/// Blocks every signal that another thread can handle. An interrupted `io_uring_enter` would end
/// libublk's command waits with a wrong answer. Signals that a thread raises itself stay: blocked,
/// a fault on a truncated mapped file would kill the process instead of reaching its handler.
pub(super) fn block_signals() -> Result<()> {
    let mut signals = SigSet::all();
    for own in [
        Signal::SIGBUS,
        Signal::SIGSEGV,
        Signal::SIGFPE,
        Signal::SIGILL,
        Signal::SIGTRAP,
        Signal::SIGSYS,
        Signal::SIGABRT,
    ] {
        signals.remove(own);
    }
    signals.thread_block().map_err(|errno| Error::io("block signals", &errno.into()))
}

/// Makes the calling thread one that serves a device beside its queues; `name` is for the log.
pub(super) fn prepare_helper(name: &str) {
    if let Err(error) = block_signals() {
        tracing::warn!("{name} takes signals: {error:#}");
    }
    // Memory reclaim may wait for this thread as it does for the queues'.
    libublk::ctrl::UblkCtrl::init_queue_thread();
}

/// Waits up to `patience` until those who were told to end have; `what` is what they may be at.
///
/// # Errors
/// `Timeout`.
pub(super) fn wait_for_end<T>(
    what: &str,
    changed: &Condvar,
    state: MutexGuard<'_, T>,
    patience: Duration,
    mut has_ended: impl FnMut(&T) -> bool,
) -> Result<()> {
    let waited = changed.wait_timeout_while(state, patience, |state| !has_ended(state));
    if !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
        return Ok(());
    }
    let message = format!("{what} did not end within {} s", patience.as_secs());
    Err(Error::new(ErrorKind::Timeout, message))
}

/// Binds the calling thread to `cpus`. A wish: a container's cpuset may forbid it.
pub(super) fn bind_to(cpus: &[usize]) {
    let mut set = CpuSet::new();
    let wanted = cpus.iter().filter(|cpu| set.set(**cpu).is_ok()).count();
    if wanted > 0
        && let Err(errno) = sched_setaffinity(Pid::from_raw(0), &set)
    {
        tracing::debug!(%errno, "queue thread stays where it is");
    }
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

/// `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Drops `CAP_SYS_ADMIN` from the calling thread.
///
/// The driver looks at the capability when a queue thread hands in its last fetch; without it on
/// any queue it starts the disk with the partition scan suppressed. That is the only way to no
/// scan on kernels before 7.0 (and libublk cannot set the flag of later ones). Serving needs no
/// privilege anyway.
pub(super) fn drop_sys_admin() -> Result<()> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut words = [CapabilityWord::default(); 2];
    // SAFETY: capget writes two words for version 3, which `words` has, and the header is ours.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) };
    if got != 0 {
        return Err(Error::io("read capabilities", &std::io::Error::last_os_error()));
    }
    words[0].effective &= !(1 << CAP_SYS_ADMIN);
    words[0].permitted &= !(1 << CAP_SYS_ADMIN);
    words[0].inheritable &= !(1 << CAP_SYS_ADMIN);
    // SAFETY: capset reads two words for version 3 and changes only the calling thread.
    let set = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, words.as_ptr()) };
    if set != 0 {
        return Err(Error::io("drop CAP_SYS_ADMIN", &std::io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effective_capabilities() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    }

    #[test]
    fn only_the_calling_thread_loses_sys_admin_and_nothing_else() {
        let before = effective_capabilities();
        let after = std::thread::spawn(|| {
            drop_sys_admin().unwrap();
            effective_capabilities()
        });
        assert_eq!(after.join().unwrap(), before & !(1 << CAP_SYS_ADMIN));
        assert_eq!(effective_capabilities(), before);
    }

    #[test]
    fn a_serving_thread_still_takes_its_own_faults() {
        let blocked = std::thread::spawn(|| {
            block_signals().unwrap();
            SigSet::thread_get_mask().unwrap()
        });
        let blocked = blocked.join().unwrap();
        assert!(blocked.contains(Signal::SIGTERM) && blocked.contains(Signal::SIGUSR1));
        assert!(!blocked.contains(Signal::SIGBUS) && !blocked.contains(Signal::SIGSEGV));
    }
}
