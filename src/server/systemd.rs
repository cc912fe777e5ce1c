//! Units of their own for our processes, where systemd is the host's first process.
//!
//! A device must not end with whoever attached it. systemd ends a service, a login or a container
//! by killing its control group, and whatever it had started is in there. So each server asks for a
//! scope, and the supervisor for a service, in `system.slice`. Elsewhere, or if systemd does not
//! answer in time, processes leave the control group by themselves ([`super::isolate`]): no attach
//! ever fails for the lack of a unit.
//!
//! ```text
//!   attach -------- systemd-run --scope --- exec --> serve-device     obd-ublk-device-*.scope
//!   supervisor ---- systemd-run --scope --- exec --> serve-successor  obd-ublk-device-*.scope
//!   first server -- systemd-run ... PID 1 starts --> supervise        obd-ublk-supervisor*.service
//! ```
//!
//! `systemd-run --scope` has its own process put into the scope and then becomes the server: pid,
//! standard streams and mounts are those that the starter gave it. Root speaks with systemd over a
//! private socket, so this works before there is a message bus.
//!
//! To stop a scope is to kill what is in it, and a server that gets SIGTERM takes its device down
//! even if it is mounted: readers get errors. Nobody shall do that by accident. `systemctl stop` is
//! refused (`RefuseManualStop`), and the shutdown stops no scope (`DefaultDependencies=no`): mounts
//! go first, then systemd ends the processes that are left. `detach` is the way to stop a device;
//! the empty scope goes away by itself. `systemctl kill` is a `kill`: its SIGTERM takes the device
//! down, its SIGKILL brings a successor. There is one process in a scope, so the kernel's choice of
//! it takes nobody along, whatever `OOMPolicy` says (which scopes have from version 253 on only).
//! systemd's own killer for lack of memory is told to keep off.
//!
//! The supervisor's service may be stopped: only its main process ends, and the servers have it
//! started again. If it is killed, systemd starts it again and gives it what it had stored of the
//! devices ([`super::supervisor`]).
//!
//! The properties are those of systemd 248; an older one refuses them, and processes are started
//! without it, with a warning.

use super::process::monotonic_ns;
use super::run_dir::{RUN_DIR_VARIABLE, RunDir};
use crate::limits::STORED_FILES_MAX;
use crate::telemetry::LOG_VARIABLE;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long systemd may take to make a unit. It takes some 20 ms; a reload of a host with thousands
/// of units takes seconds.
pub(super) const UNIT_PATIENCE: Duration = Duration::from_secs(10);

/// How long a supervisor that was killed may take to be there again before a server sees to it.
pub(super) const RESTART_PATIENCE: Duration = Duration::from_millis(1500);

/// What the names of the servers' units begin with.
pub(super) const DEVICE_PREFIX: &str = "obd-ublk-device-";

/// What the names of the supervisors' units begin with.
pub(super) const SUPERVISOR_PREFIX: &str = "obd-ublk-supervisor";

const RUN: &str = "systemd-run";

/// Whose scope it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// The server of a device whose number is known.
    Device(u32),
    /// A server that this process starts for a number that the kernel will choose.
    StartedBy(u32),
}

/// Whether systemd rules here: it is the first process of this very PID namespace. A container may
/// see the host's folder and socket, but its process ids mean others to the host.
pub(super) fn is_booted() -> bool {
    let first = std::fs::read("/proc/1/comm").unwrap_or_default();
    rules(Path::new("/run/systemd/system").is_dir(), &first)
}

fn rules(has_folder: bool, first_process: &[u8]) -> bool {
    has_folder && first_process == b"systemd\n"
}

/// The command that runs `program` in a scope of its own; `None` where it is to be run directly.
pub(super) fn in_scope(owner: Owner, program: &Path, arguments: &[OsString]) -> Option<Command> {
    let unit = scope_name(owner, monotonic_ns());
    let line = scope_line(&unit, program.as_os_str(), arguments).filter(|_| is_booted())?;
    let mut command = Command::new(RUN);
    command.args(line);
    Some(command)
}

/// Unique within a boot: a starter asks for one at a time.
fn scope_name(owner: Owner, now_ns: u64) -> String {
    match owner {
        Owner::Device(id) => format!("{DEVICE_PREFIX}{id}-{now_ns:x}.scope"),
        Owner::StartedBy(pid) => format!("{DEVICE_PREFIX}pid{pid}-{now_ns:x}.scope"),
    }
}

/// What `systemd-run` is told for a scope. `None` if some argument has a dollar sign: versions
/// differ in whether they put variables there.
fn scope_line(unit: &str, program: &OsStr, arguments: &[OsString]) -> Option<Vec<OsString>> {
    if program.as_bytes().contains(&b'$')
        || arguments.iter().any(|it| it.as_bytes().contains(&b'$'))
    {
        return None;
    }
    let mut line: Vec<OsString> = [
        "--quiet",
        "--scope",
        "--collect",
        "--slice=system.slice",
        "--description=obd-ublk device",
        "--property=DefaultDependencies=no",
        "--property=RefuseManualStop=yes",
        "--property=ManagedOOMPreference=omit",
    ]
    .map(OsString::from)
    .into();
    line.push(format!("--unit={unit}").into());
    line.extend(["--".into(), program.to_owned()]);
    line.extend_from_slice(arguments);
    Some(line)
}

/// The unit of the supervisor of a run folder.
fn supervisor_name(run: &RunDir) -> String {
    if *run == RunDir::default() {
        return format!("{SUPERVISOR_PREFIX}.service");
    }
    format!("{SUPERVISOR_PREFIX}-{:016x}.service", hash(run.path().as_os_str().as_bytes()))
}

/// FNV-1a of 64 bits: the same in every version of this program.
fn hash(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// What `systemd-run` is told for the supervisor of `run`.
fn supervisor_line(
    run: &RunDir,
    log_filter: Option<&OsStr>,
    program: &Path,
    command: &str,
) -> Vec<OsString> {
    let mut line: Vec<OsString> = [
        "--quiet",
        "--collect",
        "--service-type=exec",
        "--description=obd-ublk supervisor",
        // At boot it must not wait for what waits for a device, and stay until the end.
        "--property=DefaultDependencies=no",
        "--property=Restart=on-failure",
        "--property=KillMode=process",
        "--property=OOMScoreAdjust=-999",
        "--property=OOMPolicy=continue",
        "--property=ManagedOOMPreference=omit",
        // As much as a kernel allows by default: it keeps the open layers of all devices.
        "--property=LimitNOFILE=1048576",
        // What it keeps outlives it: `supervisor::store`.
        "--property=NotifyAccess=main",
    ]
    .map(OsString::from)
    .into();
    line.push(format!("--property=FileDescriptorStoreMax={STORED_FILES_MAX}").into());
    line.push(format!("--unit={}", supervisor_name(run)).into());
    let mut set = |name: &str, value: &OsStr| {
        let mut option = OsString::from(format!("--setenv={name}="));
        option.push(value);
        line.push(option);
    };
    set(RUN_DIR_VARIABLE, run.path().as_os_str());
    if let Some(filter) = log_filter {
        set(LOG_VARIABLE, filter);
    }
    line.extend(["--".into(), program.into(), command.into()]);
    line
}

/// Has systemd start the supervisor of `run`; fine if its unit is there already.
///
/// # Errors
/// Why not, in words.
pub(super) fn start_supervisor(run: &RunDir, command: &str) -> Result<(), String> {
    let program = own_path().ok_or("systemd would start another program than this one")?;
    let filter = std::env::var_os(LOG_VARIABLE);
    let line = supervisor_line(run, filter.as_deref(), &program, command);
    let mut child = Command::new(RUN)
        .args(line)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{RUN}: {error}"))?;
    let Some(status) = wait(&mut child, UNIT_PATIENCE) else {
        let _ = child.kill();
        let _ = child.wait();
        return Err(format!("{RUN} took more than {} s", UNIT_PATIENCE.as_secs()));
    };
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.by_ref().take(4096).read_to_string(&mut said);
    }
    judge(status.success(), &said)
}

fn judge(succeeded: bool, said: &str) -> Result<(), String> {
    if succeeded || said.contains("already loaded") || said.contains("already exists") {
        return Ok(());
    }
    Err(format!("{RUN}: {}", said.trim()))
}

/// Waits for the end of a process; `None` when it does not come in time.
pub(super) fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The path under which systemd finds this very program; `None` if another one lies there by now,
/// or none.
fn own_path() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?;
    let seen = Path::new("/proc/1/root").join(path.strip_prefix("/").ok()?);
    is_same_file(Path::new("/proc/self/exe"), &seen).then_some(path)
}

/// Whether process `pid` runs `program`. `systemd-run` does not yet.
pub(super) fn runs(pid: u32, program: &Path) -> bool {
    is_same_file(&PathBuf::from(format!("/proc/{pid}/exe")), program)
}

/// Whether two paths lead to one file.
pub(super) fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path| std::fs::metadata(path).ok().map(|it| (it.dev(), it.ino()));
    identity(one).is_some_and(|one| identity(other) == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_unit_name(name: &str) -> bool {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.\\".contains(c);
        let suffix = [".scope", ".service"].iter().any(|suffix| name.ends_with(suffix));
        name.len() < 256 && suffix && name.chars().all(is_allowed)
    }

    fn joined(line: &[OsString]) -> String {
        line.join(OsStr::new("|")).into_string().unwrap()
    }

    #[test]
    fn systemd_rules_where_it_is_the_first_process_and_says_so() {
        for (has_folder, first, expected) in [
            (true, &b"systemd\n"[..], true),
            (false, b"systemd\n", false),
            (true, b"containerd-shim\n", false),
            (true, b"systemd-run\n", false),
            (true, b"", false),
        ] {
            assert_eq!(rules(has_folder, first), expected, "{has_folder} {first:?}");
        }
    }

    #[test]
    fn a_server_is_run_in_a_scope_with_exactly_these_words() {
        let arguments = ["serve-device", "--", "/c onfig/%i"].map(OsString::from);
        let unit = scope_name(Owner::StartedBy(812), 0xabc);
        let line = scope_line(&unit, OsStr::new("/usr/bin/obd-ublk"), &arguments).unwrap();
        let expected = "--quiet|--scope|--collect|--slice=system.slice|\
            --description=obd-ublk device|--property=DefaultDependencies=no|\
            --property=RefuseManualStop=yes|--property=ManagedOOMPreference=omit|\
            --unit=obd-ublk-device-pid812-abc.scope|--|/usr/bin/obd-ublk|serve-device|--|\
            /c onfig/%i";
        assert_eq!(joined(&line), expected);
    }

    #[test]
    fn a_line_that_systemd_might_take_variables_in_is_not_given_to_it() {
        let plain = OsStr::new("/p");
        for (program, argument, expected) in
            [("/p", "/c", true), ("/p", "/c/$HOME", false), ("/p$", "/c", false)]
        {
            let line = scope_line("u", OsStr::new(program), &[argument.into()]);
            assert_eq!(line.is_some(), expected, "{program} {argument}");
        }
        assert!(scope_line("u", plain, &[]).is_some());
    }

    #[test]
    fn the_supervisor_is_a_service_with_exactly_these_words() {
        let run = RunDir::at("/srv/r u".into());
        let line = supervisor_line(&run, Some(OsStr::new("debug")), Path::new("/p"), "supervise");
        let expected = "--quiet|--collect|--service-type=exec|--description=obd-ublk supervisor|\
            --property=DefaultDependencies=no|--property=Restart=on-failure|\
            --property=KillMode=process|--property=OOMScoreAdjust=-999|\
            --property=OOMPolicy=continue|--property=ManagedOOMPreference=omit|\
            --property=LimitNOFILE=1048576|--property=NotifyAccess=main|\
            --property=FileDescriptorStoreMax=3500|\
            --unit=obd-ublk-supervisor-a80261b9a8794801.service|\
            --setenv=OBD_UBLK_RUN_DIR=/srv/r u|--setenv=OBD_UBLK_LOG=debug|--|/p|supervise";
        assert_eq!(joined(&line), expected);
        let line = supervisor_line(&RunDir::default(), None, Path::new("/p"), "supervise");
        assert!(!joined(&line).contains(LOG_VARIABLE));
        assert!(joined(&line).contains("|--unit=obd-ublk-supervisor.service|"));
    }

    #[test]
    fn names_are_unit_names_and_differ_where_they_must() {
        let names = [
            scope_name(Owner::Device(0), 1),
            scope_name(Owner::Device(crate::limits::DEVICE_ID_MAX), u64::MAX),
            scope_name(Owner::Device(0), 2),
            scope_name(Owner::StartedBy(0), 1),
            scope_name(Owner::StartedBy(u32::MAX), u64::MAX),
            supervisor_name(&RunDir::default()),
            supervisor_name(&RunDir::at("/run/obd-ublk/".into())),
            supervisor_name(&RunDir::at("/a/../\u{e4} $%\n".into())),
        ];
        for name in &names {
            assert!(is_unit_name(name), "{name}");
            assert!(name.starts_with(DEVICE_PREFIX) || name.starts_with(SUPERVISOR_PREFIX));
        }
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        // A path is the same path with a slash at its end.
        assert_eq!(distinct.len(), names.len() - 1);
    }

    #[test]
    fn the_hash_is_the_one_that_is_known_by_its_name() {
        for (text, expected) in [
            ("", 0xcbf2_9ce4_8422_2325),
            ("a", 0xaf63_dc4c_8601_ec8c),
            ("foobar", 0x8594_4171_f739_67e8),
        ] {
            assert_eq!(hash(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn a_unit_that_is_there_already_is_as_good_as_a_new_one() {
        let loaded = "Failed to start transient service unit: Unit obd-ublk-supervisor.service was \
                      already loaded or has a fragment file.\n";
        assert_eq!(judge(true, ""), Ok(()));
        assert_eq!(judge(false, loaded), Ok(()));
        let told = judge(false, "Failed to connect to bus: No such file\n").unwrap_err();
        assert_eq!(told, "systemd-run: Failed to connect to bus: No such file");
    }

    #[test]
    fn a_process_is_known_by_the_file_that_it_runs() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let own = std::env::current_exe().unwrap();
        assert!(runs(std::process::id(), &own));
        assert!(!runs(child.id(), &own));
        assert!(!runs(std::process::id(), Path::new("/nonexistent")));
        assert!(wait(&mut child, Duration::from_millis(20)).is_none());
        child.kill().unwrap();
        assert!(wait(&mut child, Duration::from_secs(60)).is_some());
        assert!(!runs(child.id(), &own));
    }
}
