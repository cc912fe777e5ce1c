//! `doctor --self-test`: does it work here, with this kernel, on this host?
//!
//! A small image ([`stack`]) is attached by this very program, with a run folder of its own, and
//! everything that people rely on is done to it once: reads, the death of the server, an upgrade,
//! detach. Every step has a deadline and is told with its time. Devices of others are not touched.
//! Whatever happens (a failure, a deadline, Ctrl-C), the device is detached by force, processes
//! that still carry our run folder's name are killed, and the folder is removed.

mod disk;
mod lab;
mod stack;

use super::output;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::image::Image;
use crate::server::{Phase, RunDir, State, device_path};
use crate::units::{SECTOR_SIZE, to_u64};
use disk::{Access, Reader};
use lab::{Lab, Step};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Reads that a reader must have done before its device is interfered with, and after.
const READS_MIN: u64 = 8;

/// Deadlines, for a host that is emulated and busy.
const COMMAND_PATIENCE: Duration = Duration::from_secs(90);
const READ_PATIENCE: Duration = Duration::from_secs(90);

/// Runs every step. `missing` is what keeps `attach` from working on this host at all.
///
/// # Errors
/// The first step's that failed, `Unsupported` when something is missing.
pub(super) fn run(missing: &[String], json: bool) -> Result<()> {
    let mut lab = Lab::new()?;
    let mut steps = Vec::new();
    let done = run_steps(&lab, missing, &mut steps);
    steps.push(lab.clean_up(lab::END_PATIENCE));
    let passed = steps.iter().all(|step| step.result.is_ok()) && missing.is_empty();
    if json {
        let rows: Vec<Value> = steps.iter().map(Step::facts).collect();
        let facts = json!({"passed": passed, "missing": missing, "steps": rows});
        output::print_facts(facts, true)?;
    } else {
        output::print(&text(&steps, missing))?;
    }
    done.context(|| "self-test".to_owned())?;
    let failed = steps.into_iter().find_map(|step| step.result.err());
    match failed {
        Some(error) => Err(error.context("self-test")),
        None if missing.is_empty() => Ok(()),
        None => {
            let message = format!("attach does not work on this host: {}", missing.join(", "));
            Err(Error::new(ErrorKind::Unsupported, message))
        }
    }
}

/// Does one step after the other until one fails, which is the last entry of `steps` then.
fn run_steps(lab: &Lab, missing: &[String], steps: &mut Vec<Step>) -> Result<()> {
    let mut step = |name: &'static str, work: &mut dyn FnMut() -> Result<String>| {
        let done = lab.step(name, work);
        let result = match &done.result {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::new(error.kind(), format!("{name}: {error:#}"))),
        };
        steps.push(done);
        result
    };
    let mut image = Vec::new();
    step("export", &mut || {
        image = export(lab)?;
        Ok("by the library, four layers".to_owned())
    })?;
    if !missing.is_empty() {
        return Ok(());
    }
    let image = Arc::new(image);
    let mut id = 0;
    step("attach", &mut || {
        id = attach(lab)?;
        Ok(device_path(id).display().to_string())
    })?;
    let device = device_path(id);
    step("size", &mut || check_size(id))?;
    for (name, access) in [("buffered read", Access::Buffered), ("direct read", Access::Direct)] {
        step(name, &mut || read_whole(lab, &device, access, &image))?;
    }
    let mut reader = None;
    step("recovery", &mut || {
        let reader = reader.insert(Reader::start(&device, Arc::clone(&image))?);
        recover(lab, id, reader)
    })?;
    // Without a reader there was no recovery.
    if let Some(reader) = &reader {
        step("upgrade", &mut || upgrade(lab, id, reader))?;
        step("reader", &mut || reader.finish(READ_PATIENCE))?;
    }
    step("direct read after", &mut || read_whole(lab, &device, Access::Direct, &image))?;
    step("detach", &mut || {
        lab.command(&["detach", &id.to_string(), "--json"], COMMAND_PATIENCE).map(|_| String::new())
    })?;
    step("nothing left", &mut || lab.check_nothing_left(id))
}

/// The disk by way of the library, checked against the digest that is written in this program.
fn export(lab: &Lab) -> Result<Vec<u8>> {
    let image = Image::open_config(lab.config(), Some(lab.service_config()))?;
    let mut bytes = Vec::with_capacity(stack::disk_bytes());
    image.export_to_stream(&mut bytes, &AtomicU64::new(0))?;
    check_bytes(&bytes, None)?;
    Ok(bytes)
}

/// Compares with the digest; `expected` tells where the first difference is.
fn check_bytes(bytes: &[u8], expected: Option<&[u8]>) -> Result<()> {
    if sha256(bytes) == stack::SHA256 {
        return Ok(());
    }
    let differs = |expected: &[u8]| bytes.iter().zip(expected).position(|(a, b)| a != b);
    let place = match expected.and_then(differs) {
        Some(byte) => format!(", first in sector {}", to_u64(byte) / SECTOR_SIZE),
        None => format!(", {} bytes in all", bytes.len()),
    };
    let message =
        format!("WRONG BYTES{place}: found {}, expected {}", sha256(bytes), stack::SHA256);
    Err(Error::new(ErrorKind::Integrity, message))
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn attach(lab: &Lab) -> Result<u32> {
    let service = lab.service_config().display().to_string();
    let config = lab.config().display().to_string();
    let arguments = ["attach", "--json", "--service-config", &service, &config];
    let said = lab.command(&arguments, COMMAND_PATIENCE)?;
    let facts: Value = serde_json::from_str(&said).unwrap_or_default();
    let id = facts["id"].as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("attach said {said:?}")))
}

fn check_size(id: u32) -> Result<String> {
    let block = Path::new("/sys/block").join(format!("ublkb{id}"));
    for (name, expected) in [("size", stack::SECTORS.to_string()), ("ro", "1".to_owned())] {
        let path = block.join(name);
        let found = std::fs::read_to_string(&path)
            .map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
        if found.trim() != expected {
            let message = format!("{}: found {found:?}, expected {expected}", path.display());
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
    }
    Ok(format!("{} sectors, read-only", stack::SECTORS))
}

fn read_whole(lab: &Lab, device: &Path, access: Access, expected: &[u8]) -> Result<String> {
    let bytes = disk::read_all(lab, device, access, READ_PATIENCE)?;
    check_bytes(&bytes, Some(expected))?;
    Ok(format!("{} bytes", bytes.len()))
}

/// Kills the server under the reader; another one must take over, and no read may fail.
fn recover(lab: &Lab, id: u32, reader: &Reader) -> Result<String> {
    reader.wait_for_reads(lab, READS_MIN, READ_PATIENCE)?;
    let before = live_state(lab.run(), id)?;
    let pid = i32::try_from(before.server.pid).unwrap_or(0);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .map_err(|errno| Error::io(format!("kill server {pid}"), &errno.into()))?;
    let what = "another server has taken over";
    lab.wait(what, COMMAND_PATIENCE, || {
        let state = live_state(lab.run(), id).ok();
        state.is_some_and(|state| {
            state.server != before.server
                && state.server_is_alive()
                && state.recovery_count > before.recovery_count
        })
    })?;
    reader.wait_for_reads(lab, READS_MIN, READ_PATIENCE)?;
    let after = live_state(lab.run(), id)?;
    let flowing = after.last_recovery.map_or(0.0, |recovery| recovery.flowing_ms);
    Ok(format!("server {pid} killed, requests flowed again after {flowing:.1} ms"))
}

/// Hands the device to another process of the same program; no read may fail.
fn upgrade(lab: &Lab, id: u32, reader: &Reader) -> Result<String> {
    let said = lab.command(&["upgrade", &id.to_string(), "--json"], COMMAND_PATIENCE)?;
    reader.wait_for_reads(lab, READS_MIN, READ_PATIENCE)?;
    let facts: Value = serde_json::from_str(&said).unwrap_or_default();
    let pause_us = facts["devices"][0]["pause_us"].as_u64();
    let pause_us =
        pause_us.ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("upgrade said {said:?}")))?;
    Ok(format!("to this program, a pause of {}.{:03} ms", pause_us / 1000, pause_us % 1000))
}

fn live_state(run: &RunDir, id: u32) -> Result<State> {
    let state = run.state(id).context(|| "look at the device".to_owned())?;
    state
        .filter(|state| state.phase == Phase::Live)
        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("device {id} is not live")))
}

fn text(steps: &[Step], missing: &[String]) -> String {
    let mut text = String::new();
    for step in steps {
        let (outcome, detail) = match &step.result {
            Ok(detail) => ("ok", detail.clone()),
            Err(error) => ("FAIL", format!("{error:#}")),
        };
        let ms = step.took.as_millis();
        let line = format!("{outcome:<4}  {:<18} {ms:>6} ms  {detail}", step.name);
        let _ = writeln!(text, "{}", line.trim_end());
    }
    for name in missing {
        let _ = writeln!(text, "miss  {name}: `obd-ublk doctor` says how to get it");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_reads_the_bundled_image_right() {
        let lab = Lab::new().unwrap();
        let bytes = export(&lab).unwrap();
        assert_eq!(bytes.len(), stack::disk_bytes());
    }

    #[test]
    fn one_wrong_bit_fails_the_test_and_names_its_sector() {
        let lab = Lab::new().unwrap();
        let expected = export(&lab).unwrap();
        for at in [0, 512, 5000 * 512 + 17, expected.len() - 1] {
            let mut bytes = expected.clone();
            bytes[at] ^= 1;
            let error = check_bytes(&bytes, Some(&expected)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Integrity);
            assert!(error.to_string().contains(&format!("sector {}:", at / 512)), "{error}");
        }
        let short = check_bytes(&expected[..1 << 20], Some(&expected)).unwrap_err();
        assert!(short.to_string().contains("1048576 bytes in all"), "{short}");
    }

    #[test]
    fn a_host_that_lacks_something_is_told_so_after_what_can_be_done_without() {
        let lab = Lab::new().unwrap();
        let mut steps = Vec::new();
        run_steps(&lab, &["ublk driver".to_owned()], &mut steps).unwrap();
        let names: Vec<_> = steps.iter().map(|step| step.name).collect();
        assert_eq!(names, ["export"]);
        let told = text(&steps, &["ublk driver".to_owned()]);
        assert!(told.starts_with("ok    export "), "{told}");
        assert!(told.ends_with("miss  ublk driver: `obd-ublk doctor` says how to get it\n"));
    }
}
