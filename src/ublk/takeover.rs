//! Taking a device over from a server that died.
//!
//! ```text
//!   server dies -- the kernel takes back what it had in flight, the device is "quiesced"
//!      START_USER_RECOVERY -- queues forget the dead server
//!      /dev/ublkcN opened, every tag handed in
//!      END_USER_RECOVERY -- what waited comes to our queues
//! ```
//!
//! Readers wait meanwhile; they see no error. libublk's own commands for this sleep in steps of
//! 100 ms and more, so the steps are taken here, with short looks. Up to START_USER_RECOVERY the
//! takeover can be given up and repeated at will. From there to the last tag handed in it cannot
//! on kernels before 6.16: a second START_USER_RECOVERY is refused for ever when no queue was
//! complete, and crashes the kernel when some were (`ublk_queue_reinit` in 6.12.117). So all that
//! takes time is done before, and the caller is told when the step comes.

use super::control::{COMMAND_TIMEOUT, Control, DeviceInfo, Refusal};
use super::device::{self, Live, Plan, Progress, Started};
use super::queue::told;
use super::{DeviceState, features, thread};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use libublk::UblkFlags;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::sys;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Told to the caller before the step that cannot be repeated on every kernel.
pub(super) type BeforeTakeover = Box<dyn Fn() -> Result<()> + Send>;

/// How long the kernel may take to let go of the dead server. Kernels before 6.15 notice a death by
/// the fetches that it cancels; when every tag of a queue was being served there is none, and they
/// notice by their timeout of 30 s for a request.
pub(super) const PATIENCE: Duration = Duration::from_secs(75);

/// The longest pause between two looks at a device whose server is dying.
const LOOK_PAUSE_MAX: Duration = Duration::from_millis(5);

/// Whether a takeover that died half-way can be tried again, on this kernel. The code that makes
/// it so came with this feature (6.16).
pub(super) fn is_repeatable(features: u64) -> bool {
    features & u64::from(sys::UBLK_F_QUIESCE) != 0
}

/// Takes the device over. An error leaves it as it is, and queue threads that wait in vain: the
/// process must end.
pub(super) fn take<D: Disk>(
    plan: &Plan<D>,
    control: &mut Control,
    before: &BeforeTakeover,
) -> Result<Live> {
    let id = plan.shape.id.and_then(|id| u32::try_from(id).ok()).unwrap_or(u32::MAX);
    let info = wait_quiesced(control, id)?;
    let quiesced = Instant::now();
    let buffers = device::buffers_of(&info)?;
    let handle = handle_of(id)?;
    before()?;
    start_recovery(control, id)?;
    if plan.progress.send(Progress::Added).is_err() {
        return Err(Error::new(ErrorKind::Canceled, "nobody waits for the takeover"));
    }
    let device = Arc::new(device::open(&handle)?);
    let mut threads = Vec::new();
    device::start_queues(plan, &handle, &device, buffers, &mut threads)?;
    drop(handle);
    control
        .end_recovery(id)
        .map_err(|refusal| refusal.tell(&format!("END_USER_RECOVERY of device {id}")))?;
    let (queues, depth) = (info.nr_hw_queues, info.queue_depth);
    let flowing = Instant::now();
    let started = Started { id, queues, depth, quiesced: Some(quiesced), flowing };
    Ok(Live { started, threads, device })
}

/// Waits until the kernel has let go of the dead server.
fn wait_quiesced(control: &mut Control, id: u32) -> Result<DeviceInfo> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(200);
    loop {
        let info = control
            .info(id)
            .map_err(|refusal| refusal.tell(&format!("GET_DEV_INFO of device {id}")))?;
        match DeviceState::from_driver(info.state) {
            DeviceState::Quiesced => return Ok(info),
            DeviceState::Live if Instant::now() < deadline => {}
            state => {
                let pid = info.ublksrv_pid;
                let message = format!(
                    "device {id} cannot be taken over: found it {state:?}, served by process \
                     {pid}, expected Quiesced"
                );
                return Err(Error::new(ErrorKind::Kernel, message));
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LOOK_PAUSE_MAX);
    }
}

/// START_USER_RECOVERY, again while the dead server's last descriptor is not closed yet.
fn start_recovery(control: &mut Control, id: u32) -> Result<()> {
    let deadline = Instant::now() + COMMAND_TIMEOUT;
    loop {
        match control.start_recovery(id) {
            Ok(()) => return Ok(()),
            Err(Refusal::Errno(libc::EBUSY)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(refusal) => {
                return Err(refusal.tell(&format!("START_USER_RECOVERY of device {id}")));
            }
        }
    }
}

/// libublk's handle for a device that exists; its queue code wants one. It looks for a file of
/// libublk's own below /run/ublksrvd, complains on standard error that there is none, and goes on.
fn handle_of(id: u32) -> Result<UblkCtrl> {
    let number = i32::try_from(id)
        .map_err(|_| Error::new(ErrorKind::OutOfRange, format!("no device can be {id}")))?;
    UblkCtrlBuilder::default()
        .name("obd")
        .id(number)
        .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        .build()
        .map_err(|error| told(&error, "look at the device"))
}

/// Whether this host's kernel can repeat a takeover that died half-way; false when it cannot be
/// asked.
pub(super) fn host_repeats() -> bool {
    thread::apart(|| features().feature_bits).flatten().is_some_and(is_repeatable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kernels_that_reset_a_device_when_its_server_goes_repeat_a_takeover() {
        // What 6.12.117 and 7.2.13 answer to GET_FEATURES.
        assert!(!is_repeatable(0x1fe));
        assert!(is_repeatable(0xf_ffff));
    }
}
