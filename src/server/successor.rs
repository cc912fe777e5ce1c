//! A server that takes a device over from one that died, or that ends for its sake.
//!
//! ```text
//!   parcel from the supervisor (or the state file) -- image -- "prepared" -- wait for "go"
//!        -- lock N -- kernel: old server gone -- state "taking" -- kernel: take over
//!        -- state "live" -- control socket -- parcel back to the supervisor -- `served`
//! ```
//!
//! Everything that takes time is done before the old server is gone, or beside the kernel's own
//! work. With the parcel no config and no layer is opened by its path: they may be gone. Without
//! it the state file says what was attached, and only the very same files are believed.

use super::control::ControlSocket;
use super::isolate;
use super::kernel::{HostKernel, Kernel, Served};
use super::packet::PacketSocket;
use super::process::{Process, monotonic_ns};
use super::protocol::notes::Note;
use super::run_dir::{self, RunDir, Slot};
use super::serve::{Mailbox, entrust, open_interruptibly, watch};
use super::served::{self, Up};
use super::served_disk::{Ready, ServedDisk};
use super::signals;
use super::snapshot::settle_state;
use super::state::{Phase, Recovery, State};
use super::supervisor::{Link, ParcelFiles};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::PARCEL_FILES_MAX;
use crate::telemetry;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// The hidden command by which the supervisor runs this program as a successor.
pub const SUCCESSOR_COMMAND: &str = "serve-successor";

/// How long the dead server's lock may stay: its descriptors are closed one after the other.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// What the supervisor has given.
#[derive(Default)]
struct Given {
    parcel: ParcelFiles,
    parcel_is_whole: bool,
    seen_ns: Option<u64>,
}

/// The hidden command: takes over device `id` and serves it until it is stopped.
///
/// # Errors
/// Whatever keeps it from taking over; the supervisor is told. The device is as it was, unless the
/// takeover had begun.
pub fn serve_successor(id: u32) -> Result<()> {
    isolate::close_inherited_files()?;
    let link = Link::given(PacketSocket::from_file(take_stdin()?));
    let teller = link.try_clone()?;
    take_over_and_serve(id, link).inspect_err(|error| {
        // If it is gone, too, the state file tells the next one.
        let _ = teller.say(&Note::refused(error));
    })
}

/// The supervisor's socket, which this process was started with as its standard input.
fn take_stdin() -> Result<OwnedFd> {
    let told = |error: &std::io::Error| Error::io("take the supervisor's socket", error);
    let socket = rustix::stdio::stdin().try_clone_to_owned().map_err(|error| told(&error))?;
    let null = File::open("/dev/null").map_err(|error| told(&error))?;
    rustix::stdio::dup2_stdin(&null).map_err(|errno| told(&errno.into()))?;
    Ok(socket)
}

fn take_over_and_serve(id: u32, link: Link) -> Result<()> {
    let started_ns = monotonic_ns();
    signals::block()?;
    isolate::leave_session()?;
    isolate::leave_cgroup(isolate::Inmate::Server);
    isolate::protect_from_oom(isolate::SERVER_OOM_SCORE);
    let run = RunDir::of_host();
    run.check()?;
    let folder = run.folder(id);
    telemetry::log_to(&run_dir::log_in(&folder))?;
    let state = run.state(id)?.ok_or_else(|| {
        let message = format!("{} has no state of a device", folder.display());
        Error::new(ErrorKind::NotFound, message)
    })?;
    // A live one, which is to be upgraded, ends its snapshots itself.
    let state = if state.server_is_alive() { state } else { settle_state(state, &folder)? };
    let mut given = Given::default();
    while !given.parcel_is_whole {
        hear(&link, &mut given)?;
    }
    isolate::own_mounts()?;
    let (sender, inbox) = channel();
    let mailbox = Mailbox { sender, inbox };
    signals::forward(mailbox.sender.clone())?;
    let parcel = std::mem::take(&mut given.parcel);
    let opened_state = state.clone();
    let (ready, from_parcel) =
        open_interruptibly(&mailbox, move || Ready::of(parcel, &opened_state))?;
    let image_ns = monotonic_ns();
    isolate::drop_mounts_but(&run, &ready.folders())?;
    link.say(&Note::Prepared)?;
    while given.seen_ns.is_none() {
        match hear(&link, &mut given) {
            Ok(()) => {}
            // The supervisor died, too; the device needs nobody but us. A server that was to yield
            // has not been told and goes on.
            Err(error) if error.kind() == ErrorKind::Canceled && !state.server_is_alive() => {
                tracing::warn!("{error:#}; going on without it");
                break;
            }
            Err(error) => return Err(error),
        }
    }
    let seen_ns = given.seen_ns.unwrap_or(started_ns);
    let slot = lock(&run, id)?;
    // Its writer is gone with the lock.
    let disk = Arc::new(ready.complete(&state)?);
    let taken = Taken { state, slot, link, from_parcel, seen_ns, started_ns, image_ns };
    let up = take_over(taken, disk, &mailbox)?;
    served::serve(up, &HostKernel, &run, &mailbox.sender, &mailbox.inbox)
}

fn hear(link: &Link, given: &mut Given) -> Result<()> {
    match link.hear()? {
        None => Err(Error::new(ErrorKind::Canceled, "the supervisor went away")),
        Some((Note::Parcel { last }, files)) => {
            given.parcel.extend(files);
            given.parcel_is_whole = last;
            if given.parcel.len() > PARCEL_FILES_MAX {
                let message = format!("a parcel of more than {PARCEL_FILES_MAX} files");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            Ok(())
        }
        Some((Note::Go { seen_ns }, _)) => {
            given.seen_ns = Some(seen_ns);
            Ok(())
        }
        Some((note, _)) => {
            Err(Error::new(ErrorKind::Corrupt, format!("the supervisor said {note:?}")))
        }
    }
}

/// The folder of device `id`, once the old server has let go of it.
fn lock(run: &RunDir, id: u32) -> Result<Slot> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        if let Some(slot) = run.lock(id)? {
            return Ok(slot);
        }
        if Instant::now() >= deadline || !run.folder(id).exists() {
            let message = format!("somebody holds {}, or it is gone", run.folder(id).display());
            return Err(Error::new(ErrorKind::Busy, message));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a takeover needs besides the image.
struct Taken {
    state: State,
    slot: Slot,
    link: Link,
    from_parcel: bool,
    seen_ns: u64,
    started_ns: u64,
    image_ns: u64,
}

fn take_over(
    taken: Taken,
    disk: Arc<ServedDisk>,
    mailbox: &Mailbox,
) -> Result<Up<<HostKernel as Kernel>::Device>> {
    let Taken { state: attached, slot, link, .. } = taken;
    let id = slot.id();
    // Somebody may have stopped it, taken it over, or attached another one since it was read.
    let now = RunDir::of_host().state(id)?.filter(|now| {
        now.is_same_attach(&attached)
            && matches!(now.phase, Phase::Live | Phase::Taking)
            // A snapshot has changed what it is made of.
            && (&now.layers, &now.upper) == (&attached.layers, &attached.upper)
    });
    let Some(mut of_before) = now else {
        let message = format!("device {id} is not to be taken over any more");
        return Err(Error::new(ErrorKind::Canceled, message));
    };
    // Whatever can fail is done before the takeover: nothing may end the server after it.
    let _ = std::fs::remove_file(slot.socket());
    let control = ControlSocket::listen(&slot.socket(), mailbox.sender.clone())?;
    of_before.server = Process::current();
    of_before.program = env!("CARGO_PKG_VERSION").to_owned();
    let taking = State { phase: Phase::Taking, ..of_before.clone() };
    let folder = slot.path().to_owned();
    let before = Box::new(move || taking.save(&folder));
    let watch = watch(&slot, &mailbox.sender);
    let device = HostKernel.take_over(Arc::clone(&disk), id, before, watch)?;
    let milestones = device.milestones();
    let at = |moment: Instant| monotonic_ns().saturating_sub(nanos(moment.elapsed()));
    let recovery = Recovery {
        started_ms: ms_between(taken.seen_ns, taken.started_ns),
        image_ms: ms_between(taken.seen_ns, taken.image_ns),
        from_parcel: taken.from_parcel,
        quiesced_ms: ms_between(taken.seen_ns, milestones.quiesced.map_or(0, at)),
        flowing_ms: ms_between(taken.seen_ns, at(milestones.flowing)),
    };
    tracing::info!(dev_id = id, ?recovery, "took over");
    let state = State {
        phase: Phase::Live,
        recovery_count: of_before.recovery_count + 1,
        last_recovery: Some(recovery),
        ..of_before
    };
    if let Err(error) = state.save(slot.path()) {
        // The supervisor asks the kernel in such a case.
        tracing::error!("{error:#}");
    }
    let guarded = Some(entrust(link, &*disk, &mailbox.sender));
    let since = Instant::now();
    Ok(Up { device, kept: disk, control, state, slot, since, guarded })
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Milliseconds from one moment to another of the monotonic clock, to a microsecond; 0 when the
/// second came first (an upgrade prepares before the old server ends).
fn ms_between(from_ns: u64, to_ns: u64) -> f64 {
    let micros = u32::try_from(to_ns.saturating_sub(from_ns) / 1000).unwrap_or(u32::MAX);
    f64::from(micros) / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milestones_are_milliseconds_and_never_negative() {
        for (from, to, expected) in
            [(0, 1_500_000, 1.5), (10, 10, 0.0), (10, 5, 0.0), (0, 1_234_567, 1.234)]
        {
            assert!((ms_between(from, to) - expected).abs() < 1e-9, "{from} {to}");
        }
    }
}
