//! `doctor`: what works on this host, what does not, and how to get it.
//!
//! Facts are gathered in `host`; judging them is pure, so that every verdict can be tested on any
//! host. A `fail` means that `attach` cannot work here, a `warn` that something may surprise.

use super::host::{HostFacts, UblkFacts};
use super::table::format_bytes;
use super::{bundle, output, self_test};
use crate::error::{Error, ErrorKind, Result};
use crate::telemetry::printable;
use serde::Serialize;
use serde_json::json;
use std::fmt::Write;

/// Check whether devices can be attached on this host, and say how to mend what is missing
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Attach a small image that is part of this program, read it in every way, kill its server,
    /// upgrade and detach it; what this host lacks is told with exit code 4
    #[arg(long)]
    self_test: bool,

    /// Print everything that a bug report should have: versions, checks, devices, the ends of logs.
    /// What looks like a credential is left out, as is the content of configs
    #[arg(long, conflicts_with = "self_test")]
    report: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// One verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    level: Level,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, detail: detail.into(), mend: None }
    }

    fn warn(name: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { level: Level::Warn, mend: Some(mend.into()), ..Self::ok(name, detail) }
    }

    fn fail(name: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { level: Level::Fail, mend: Some(mend.into()), ..Self::ok(name, detail) }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let checks = judge(&HostFacts::gather());
    let failed: Vec<_> = checks.iter().filter(|check| check.level == Level::Fail).collect();
    if args.report {
        return bundle::run(&json!(checks), args.json);
    }
    if args.self_test {
        let missing: Vec<String> = failed.iter().map(|check| check.name.to_owned()).collect();
        return self_test::run(&missing, args.json);
    }
    if args.json {
        output::print_facts(json!({"usable": failed.is_empty(), "checks": checks}), true)?;
    } else {
        output::print(&text(&checks))?;
    }
    if failed.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = failed.iter().map(|check| check.name).collect();
    let message = format!("attach does not work on this host: {}", names.join(", "));
    Err(Error::new(ErrorKind::Unsupported, message))
}

fn text(checks: &[Check]) -> String {
    let mut text = String::new();
    for check in checks {
        let level = match check.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let _ = writeln!(text, "{level:<4}  {}: {}", check.name, printable(&check.detail));
        if let Some(mend) = &check.mend {
            let _ = writeln!(text, "      -> {}", printable(mend));
        }
    }
    text
}

fn judge(facts: &HostFacts) -> Vec<Check> {
    let mut checks = vec![judge_kernel(facts), judge_driver(facts)];
    if let Some(ublk) = &facts.ublk {
        checks.extend(judge_control(facts, ublk));
        checks.extend(judge_features(ublk));
        checks.extend(judge_device_count(ublk));
        checks.extend(ublk.known_bugs.iter().map(|bug| {
            Check::warn("known kernel bug", bug, "boot a kernel that has the bug fixed")
        }));
    }
    checks.extend([
        judge_privileges(facts),
        judge_io_uring(facts),
        judge_run_dir(facts),
        judge_open_files(facts),
        judge_locked_memory(facts),
        judge_udev(facts),
    ]);
    checks.extend(facts.waiting.iter().map(judge_waiting));
    checks
}

/// A device whose readers wait. It is loud because nothing else on the host will say why a process
/// does not get on.
fn judge_waiting((path, is_tried): &(String, bool)) -> Check {
    const NAME: &str = "device without a server";
    if *is_tried {
        let detail = format!("{path}: its server died, and a successor is to take it over");
        return Check::warn(NAME, detail, "wait a moment; then `obd-ublk recover --all`");
    }
    let detail = format!("{path}: its servers keep dying; its readers wait for ever");
    Check::warn(
        NAME,
        detail,
        "see `obd-ublk list` for the reason; then `obd-ublk recover`, or `obd-ublk detach --force`",
    )
}

fn judge_kernel(facts: &HostFacts) -> Check {
    const NAME: &str = "kernel";
    let release = &facts.kernel_release;
    match version(release) {
        Some(version) if version < (6, 0) => {
            let detail = format!("{release}; ublk came with 6.0");
            Check::fail(NAME, detail, "boot a kernel of 6.0 or later")
        }
        Some(_) => Check::ok(NAME, release),
        None => Check::warn(NAME, format!("{release:?} is no version"), "none is known"),
    }
}

/// Major and minor of a kernel release.
fn version(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.split_once('.')?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    Some((major.parse().ok()?, rest.get(..end)?.parse().ok()?))
}

fn judge_driver(facts: &HostFacts) -> Check {
    const NAME: &str = "ublk driver";
    match &facts.ublk {
        None => {
            let detail = "this program was built without the `ublk` feature";
            Check::fail(NAME, detail, "build it with `cargo build --release`")
        }
        Some(ublk) if ublk.driver_present => Check::ok(NAME, "loaded"),
        Some(_) if facts.module_installed => Check::fail(
            NAME,
            "not loaded",
            "run `modprobe ublk_drv`; to have it at each boot: \
                                             `echo ublk_drv > /etc/modules-load.d/ublk.conf`",
        ),
        Some(_) => Check::fail(NAME, "the running kernel has none", driver_source(facts)),
    }
}

fn driver_source(facts: &HostFacts) -> String {
    let (id, version) = (facts.distribution.0.as_str(), facts.distribution.1.as_str());
    match (id, version) {
        ("debian", "12") => "install `linux-image-6.12-cloud-amd64` (or `-amd64`) from Debian \
                             12's security suite and boot it; its 6.1 kernel is built without ublk"
            .to_owned(),
        ("ubuntu", _) => format!(
            "install `linux-modules-extra-{}`, then run `modprobe ublk_drv`",
            facts.kernel_release
        ),
        _ => "boot a kernel with CONFIG_BLK_DEV_UBLK (y or m); 6.12 or later is recommended"
            .to_owned(),
    }
}

fn judge_control(facts: &HostFacts, ublk: &UblkFacts) -> Option<Check> {
    const NAME: &str = "/dev/ublk-control";
    if !ublk.driver_present {
        return None;
    }
    Some(match &ublk.control {
        Ok(()) => Check::ok(NAME, "can be used"),
        Err(why) if facts.capabilities & CAP_SYS_ADMIN == 0 => {
            Check::fail(NAME, why, "run as root")
        }
        Err(why) => {
            Check::fail(NAME, why, "in a container: pass /dev/ublk-control in, and allow io_uring")
        }
    })
}

fn judge_features(ublk: &UblkFacts) -> Option<Check> {
    if !ublk.driver_present || ublk.control.is_err() {
        return None;
    }
    Some(match &ublk.feature_names {
        Some(names) => Check::ok("driver features", names.join(" ")),
        None => Check::ok("driver features", "not told; kernels before 6.5 cannot"),
    })
}

fn judge_device_count(ublk: &UblkFacts) -> Option<Check> {
    const NAME: &str = "ublk devices";
    if !ublk.driver_present {
        return None;
    }
    let count = ublk.device_count;
    Some(match ublk.devices_max {
        Some(max) if u64::try_from(count).unwrap_or(u64::MAX) >= max => Check::warn(
            NAME,
            format!("{count} of {max} (ublks_max)"),
            "kernels before 6.15 may refuse more: `options ublk_drv ublks_max=N` in \
             /etc/modprobe.d, then load the driver anew",
        ),
        Some(max) => Check::ok(NAME, format!("{count} (ublks_max is {max})")),
        None => Check::ok(NAME, count.to_string()),
    })
}

/// Bits of a capability set, as in the kernel's header.
const CAP_IPC_LOCK: u64 = 1 << 14;
const CAP_SYS_ADMIN: u64 = 1 << 21;

fn judge_privileges(facts: &HostFacts) -> Check {
    const NAME: &str = "privileges";
    if facts.capabilities & CAP_SYS_ADMIN == 0 {
        let detail = "this process has no CAP_SYS_ADMIN: it cannot add devices or leave mounts";
        return Check::fail(NAME, detail, "run as root; in a container with `--privileged`");
    }
    Check::ok(NAME, "CAP_SYS_ADMIN")
}

fn judge_io_uring(facts: &HostFacts) -> Check {
    const NAME: &str = "io_uring";
    let mend = "run `sysctl kernel.io_uring_disabled=0`";
    match facts.io_uring_disabled {
        None | Some(0) => Check::ok(NAME, "allowed"),
        // 1 leaves it to processes with CAP_SYS_ADMIN (or in a group), which we must be anyway.
        Some(1) if facts.capabilities & CAP_SYS_ADMIN != 0 => {
            Check::ok(NAME, "allowed for privileged processes")
        }
        Some(value) => Check::fail(NAME, format!("kernel.io_uring_disabled is {value}"), mend),
    }
}

fn judge_run_dir(facts: &HostFacts) -> Check {
    let (path, usable) = &facts.run_dir;
    match usable {
        Ok(()) => Check::ok("run folder", path),
        Err(why) => Check::fail("run folder", why, "see OBD_UBLK_RUN_DIR for another place"),
    }
}

/// 255 layers, their mappings' helpers, queues and rings.
const OPEN_FILES_WANTED: u64 = 1024;

fn judge_open_files(facts: &HostFacts) -> Check {
    const NAME: &str = "open files";
    let (soft, hard) = facts.open_files_max;
    if soft < OPEN_FILES_WANTED {
        let detail = format!("at most {soft}; an image of 255 layers needs more");
        return Check::warn(NAME, detail, format!("run `ulimit -n {}`", hard.max(1024)));
    }
    Check::ok(NAME, format!("at most {soft}"))
}

/// What the rings and buffers of one device may lock where locking is counted.
const LOCKED_BYTES_WANTED: u64 = 64 << 20;

fn judge_locked_memory(facts: &HostFacts) -> Check {
    const NAME: &str = "locked memory";
    if facts.capabilities & CAP_IPC_LOCK != 0 {
        return Check::ok(NAME, "not limited (CAP_IPC_LOCK)");
    }
    let limit = format_bytes(facts.locked_bytes_max);
    if facts.locked_bytes_max < LOCKED_BYTES_WANTED {
        let detail = format!("at most {limit}, and no CAP_IPC_LOCK");
        return Check::warn(NAME, detail, "run `ulimit -l unlimited`");
    }
    Check::ok(NAME, format!("at most {limit}"))
}

fn judge_udev(facts: &HostFacts) -> Check {
    let detail = if facts.udev {
        "runs; it opens each new device for a moment"
    } else {
        "does not run; the kernel makes the device nodes"
    };
    Check::ok("udev", detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> HostFacts {
        HostFacts {
            kernel_release: "6.12.95".to_owned(),
            ublk: Some(UblkFacts {
                driver_present: true,
                control: Ok(()),
                feature_names: Some(vec!["USER_COPY".to_owned()]),
                device_count: 2,
                devices_max: Some(64),
                known_bugs: Vec::new(),
            }),
            module_installed: true,
            distribution: ("debian".to_owned(), "12".to_owned()),
            capabilities: u64::MAX,
            io_uring_disabled: Some(0),
            run_dir: ("/run/obd-ublk".to_owned(), Ok(())),
            open_files_max: (1024, 1 << 20),
            locked_bytes_max: 8 << 20,
            udev: true,
            waiting: Vec::new(),
        }
    }

    #[test]
    fn a_device_whose_readers_wait_is_told_of() {
        let told = complaints(|host| {
            host.waiting =
                vec![("/dev/ublkb0".to_owned(), true), ("/dev/ublkb1".to_owned(), false)];
        });
        let mends: Vec<_> =
            told.iter().map(|(name, level, mend)| (*name, *level, &**mend)).collect();
        let name = "device without a server";
        let mend = "see `obd-ublk list` for the reason; then `obd-ublk recover`, or `obd-ublk \
                    detach --force`";
        assert_eq!(
            mends,
            [
                (name, Level::Warn, "wait a moment; then `obd-ublk recover --all`"),
                (name, Level::Warn, mend),
            ]
        );
    }

    /// The checks that are not ok when `spoil` was done to a good host.
    fn complaints(spoil: impl Fn(&mut HostFacts)) -> Vec<(&'static str, Level, String)> {
        let mut facts = good();
        spoil(&mut facts);
        let complaints = judge(&facts).into_iter().filter(|check| check.level != Level::Ok);
        complaints.map(|check| (check.name, check.level, check.mend.unwrap())).collect()
    }

    fn ublk(facts: &mut HostFacts) -> &mut UblkFacts {
        facts.ublk.as_mut().unwrap()
    }

    #[test]
    fn a_good_host_has_nothing_to_mend() {
        assert_eq!(complaints(|_| {}), []);
        assert_eq!(complaints(|facts| facts.io_uring_disabled = None), []);
        assert_eq!(complaints(|facts| facts.io_uring_disabled = Some(1)), []);
        assert_eq!(complaints(|facts| ublk(facts).feature_names = None), []);
    }

    #[test]
    fn each_missing_thing_is_named_with_its_remedy() {
        type Spoil = fn(&mut HostFacts);
        let cases: [(Spoil, &str, Level, &str); 11] = [
            (|f| f.kernel_release = "5.15.0-100".into(), "kernel", Level::Fail, "6.0 or later"),
            (|f| f.ublk = None, "ublk driver", Level::Fail, "cargo build"),
            (|f| ublk(f).driver_present = false, "ublk driver", Level::Fail, "modprobe ublk_drv"),
            (
                |f| ublk(f).control = Err("refused".into()),
                "/dev/ublk-control",
                Level::Fail,
                "in a container",
            ),
            (|f| ublk(f).device_count = 64, "ublk devices", Level::Warn, "ublks_max=N"),
            (|f| ublk(f).known_bugs = vec!["x".into()], "known kernel bug", Level::Warn, "boot"),
            (|f| f.io_uring_disabled = Some(2), "io_uring", Level::Fail, "io_uring_disabled=0"),
            (|f| f.run_dir.1 = Err("no".into()), "run folder", Level::Fail, "OBD_UBLK_RUN_DIR"),
            (|f| f.open_files_max.0 = 256, "open files", Level::Warn, "ulimit -n 1048576"),
            (|f| f.capabilities &= !CAP_IPC_LOCK, "locked memory", Level::Warn, "ulimit -l"),
            (|f| f.capabilities &= !CAP_SYS_ADMIN, "privileges", Level::Fail, "run as root"),
        ];
        for (spoil, name, level, mend) in cases {
            let found = complaints(spoil);
            assert_eq!(found.len(), 1, "{name}: {found:?}");
            assert_eq!((found[0].0, found[0].1), (name, level));
            assert!(found[0].2.contains(mend), "{found:?}");
        }
    }

    #[test]
    fn a_kernel_without_the_driver_is_replaced_in_the_distributions_way() {
        for (id, version, told) in [
            ("debian", "12", "linux-image-6.12-cloud-amd64"),
            ("debian", "13", "CONFIG_BLK_DEV_UBLK"),
            ("ubuntu", "24.04", "linux-modules-extra-6.12.95"),
            ("", "", "CONFIG_BLK_DEV_UBLK"),
        ] {
            let found = complaints(|facts| {
                ublk(facts).driver_present = false;
                facts.module_installed = false;
                facts.distribution = (id.to_owned(), version.to_owned());
            });
            assert!(found[0].2.contains(told), "{id}: {found:?}");
        }
    }

    #[test]
    fn a_verdict_is_a_line_and_its_remedy_another() {
        let checks = [Check::ok("a", "fine"), Check::fail("b", "bad", "do this")];
        assert_eq!(text(&checks), "ok    a: fine\nFAIL  b: bad\n      -> do this\n");
    }
}
