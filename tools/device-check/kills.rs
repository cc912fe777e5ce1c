//! Kills servers and watches their devices come back, without starting a process for it: in an
//! emulated guest every start costs half a second.

use super::{BLOCK, Expected, Page, Result, compare, load_pack, open};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use obd_ublk::server::{Phase, Recovery, RunDir, State};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a device may take to come back before it counts as hung. How fast it was is told, not
/// judged: that is the host's load as much as ours.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server that dies earlier than this is taken for one in a crash loop, see `limits`.
const SETTLED: Duration = Duration::from_millis(obd_ublk::limits::RECOVERY_SETTLED_MS + 500);

/// A device whose server is killed.
struct Target {
    id: u32,
    path: String,
    live_since: Instant,
}

/// Something that is read and compared meanwhile.
enum Watched {
    Device(String, Expected),
    /// A mount, and the path and SHA-256 of files in it.
    Files(PathBuf, Vec<(String, String)>),
}

fn parse(texts: &[&str]) -> Result<(Vec<Target>, Vec<Watched>)> {
    let (mut targets, mut watched) = (Vec::new(), Vec::new());
    for text in texts {
        let (path, reference) = text.split_once('=').unwrap_or((text, ""));
        if let Some(id) = path.strip_prefix("/dev/ublkb") {
            let (id, path) = (id.parse()?, path.to_owned());
            if !reference.is_empty() {
                watched.push(Watched::Device(path.clone(), load_pack(reference)?));
            }
            targets.push(Target { id, path, live_since: Instant::now() });
        } else {
            let sums = std::fs::read_to_string(reference)?;
            let lines = sums.lines().filter_map(|line| line.split_once("  "));
            let files = lines.map(|(sum, name)| (name.to_owned(), sum.to_owned())).collect();
            watched.push(Watched::Files(PathBuf::from(path), files));
        }
    }
    Ok((targets, watched))
}

pub(crate) fn run(count: &str, signal: &str, targets: &[&str]) -> Result<()> {
    let count: u32 = count.parse()?;
    let signal: Signal = signal.parse().map_err(|_| "no such signal")?;
    let (mut targets, watched) = parse(targets)?;
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let recoveries = std::thread::scope(|scope| -> Result<Vec<Recovery>> {
        let readers: Vec<_> = watched
            .iter()
            .map(|watched| {
                scope.spawn(|| match watched {
                    Watched::Device(path, pack) => read_on(path, pack, &stop, &reads),
                    Watched::Files(mount, files) => sum_on(mount, files, &stop, &reads),
                })
            })
            .collect();
        let killed = kill_all(count, signal, &mut targets);
        stop.store(true, Ordering::SeqCst);
        for reader in readers {
            reader.join().expect("no panic")?;
        }
        killed
    })?;
    tell(&recoveries, reads.into_inner())
}

/// Reads packed blocks, one after the other, until told to stop.
fn read_on(path: &str, pack: &Expected, stop: &AtomicBool, reads: &AtomicU64) -> Result<()> {
    let file = open(path, true)?;
    let mut page = Box::new(Page([0; BLOCK]));
    for (offset, block) in pack.blocks.iter().cycle() {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        compare(&file, *offset, pack.size, block, &mut page, true)
            .map_err(|error| format!("{path}: {error}"))?;
        reads.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Sums files, each from the device anew, until told to stop.
fn sum_on(
    mount: &Path,
    files: &[(String, String)],
    stop: &AtomicBool,
    reads: &AtomicU64,
) -> Result<()> {
    for (name, sum) in files.iter().cycle() {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let path = mount.join(name);
        let file = File::open(&path)?;
        let uncached = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        posix_fadvise(&file, 0, 0, uncached)?;
        let content = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let digest = Sha256::digest(&content);
        let found = digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        if found != *sum {
            return Err(format!("{}: found {found}, expected {sum}", path.display()).into());
        }
        reads.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn kill_all(count: u32, signal: Signal, targets: &mut [Target]) -> Result<Vec<Recovery>> {
    let mut recoveries = Vec::new();
    for round in 0..count {
        let index = usize::try_from(round)? % targets.len();
        let target = &mut targets[index];
        std::thread::sleep(SETTLED.saturating_sub(target.live_since.elapsed()));
        let before = state_of(target.id)?;
        kill(Pid::from_raw(i32::try_from(before.server.pid)?), signal)?;
        let deadline = Instant::now() + PATIENCE;
        let after = loop {
            match state_of(target.id) {
                Ok(now)
                    if now.recovery_count > before.recovery_count
                        && now.phase == Phase::Live
                        && now.server_is_alive() =>
                {
                    break now;
                }
                Ok(_) if Instant::now() < deadline => {}
                Ok(now) => {
                    return Err(
                        format!("kill {round}: {} is not back: {now:?}", target.path).into()
                    );
                }
                Err(error) => return Err(format!("kill {round}: {error}").into()),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        target.live_since = Instant::now();
        recoveries.push(after.last_recovery.ok_or("no recovery is written down")?);
    }
    Ok(recoveries)
}

fn state_of(id: u32) -> Result<State> {
    Ok(RunDir::of_host().state(id)?.ok_or_else(|| format!("device {id} is gone"))?)
}

fn tell(recoveries: &[Recovery], reads: u64) -> Result<()> {
    type Part = fn(&Recovery) -> f64;
    let spread = |what: Part| {
        let mut values: Vec<f64> = recoveries.iter().map(what).collect();
        values.sort_by(f64::total_cmp);
        let median = values.get(values.len() / 2).copied().unwrap_or(0.0);
        (median, values.last().copied().unwrap_or(0.0))
    };
    let parts: [(&str, Part); 4] = [
        ("process", |it| it.started_ms),
        ("image", |it| it.image_ms),
        ("kernel quiesced", |it| it.quiesced_ms),
        ("I/O flowing", |it| it.flowing_ms),
    ];
    let told = parts.map(|(name, what)| {
        let (median, most) = spread(what);
        format!("{name} {median:.0} (most {most:.0})")
    });
    println!(
        "{} recoveries, {reads} blocks and files compared; ms after the death, medians: {}",
        recoveries.len(),
        told.join(", ")
    );
    if !recoveries.iter().all(|it| it.from_parcel) {
        return Err("a successor opened its image anew".into());
    }
    Ok(())
}
