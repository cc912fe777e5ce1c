//! The life of one served device, on a thread of its own.
//!
//! ```text
//!   caller --start--> first thread:  ADD_DEV, params, queue threads, START_DEV, node
//!          <-ready---                |   (or START_USER_RECOVERY, queue threads,
//!                                    |    END_USER_RECOVERY: see `takeover`)
//!          --stop---> second thread: wait for "stop" or for the last queue to end
//!          <-gone----                STOP_DEV, queues end, DEL_DEV, number free
//! ```
//!
//! The thread exists because ADD_DEV has no deadline in libublk and is known to hang for ever on
//! some kernels: the caller waits with a deadline and leaves the thread behind. Everything that
//! was made is undone in reverse on every path, so that a failed start leaves nothing. A failed
//! takeover undoes nothing: the device belongs to its readers, and another server may try.
//!
//! A device may also be stopped from outside (`delete` by another process): then the queues end
//! by themselves, and this thread deletes at once while it still holds the device open, which is
//! what keeps the number from going to somebody else in between.

use super::control::{COMMAND_TIMEOUT, Control, DeviceInfo, NUMBER_PATIENCE, Refusal};
use super::flush::Flusher;
use super::host_lock::HostLock;
use super::miss::Misses;
use super::params::Shape;
use super::queue::{self, TagBuffers, told};
use super::request::Bounds;
use super::stats::DeviceCounters;
use super::{node, params, takeover, thread};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::VIRTUAL_SECTORS_MAX;
use crate::units::to_usize;
use libublk::UblkFlags;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder, UblkQueueAffinity};
use libublk::io::UblkDev;
use libublk::sys;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long queue threads may take to get ready, and to end once they were told to.
const QUEUE_TIMEOUT: Duration = COMMAND_TIMEOUT;

/// The pause between two attempts at a number that is about to be free.
const POLL_PAUSE: Duration = Duration::from_millis(5);

/// A device that waits for a new server when its server dies.
const RECOVERABLE: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// What the device thread is told.
pub(super) enum Event {
    /// A queue handed in all its tags.
    Ready,
    /// A queue thread is over.
    Ended {
        /// Whether it had been ready before.
        was_ready: bool,
        /// Why, if it failed.
        error: Option<Error>,
    },
    /// Take the device down.
    Stop,
}

/// What the device thread tells the caller, in this order.
pub(super) enum Progress {
    /// The device has a number.
    Added,
    /// `/dev/ublkbN` can be opened.
    Usable(Started),
    /// Nothing is left, as far as the kernel allowed.
    Gone(Result<()>),
}

/// What the kernel made of the wish.
#[derive(Clone, Copy, Debug)]
pub(super) struct Started {
    pub(super) id: u32,
    pub(super) queues: u16,
    pub(super) depth: u16,
    /// When the kernel had let go of the dead server, if the device was taken over from one.
    pub(super) quiesced: Option<Instant>,
    /// When requests began to flow.
    pub(super) flowing: Instant,
}

/// How a device comes into this process.
pub(super) enum Birth {
    /// It is new: ADD_DEV, START_DEV.
    New,
    /// A dead server left it. Called when the kernel has let go of that server, before the first
    /// step that cannot be taken back.
    TakenOver(takeover::BeforeTakeover),
}

/// What the device thread needs.
pub(super) struct Plan<D: Disk> {
    pub(super) disk: Arc<D>,
    pub(super) shape: Shape,
    pub(super) params: sys::ublk_params,
    pub(super) birth: Birth,
    /// `None` for a read-only disk: nobody asks it to flush.
    pub(super) flusher: Option<Arc<Flusher>>,
    /// `None` for a disk that never waits.
    pub(super) misses: Option<Arc<Misses<D>>>,
    pub(super) counters: Arc<DeviceCounters>,
    pub(super) events: (Sender<Event>, Receiver<Event>),
    pub(super) progress: Sender<Progress>,
    pub(super) on_gone: Box<dyn Fn() + Send>,
}

/// A device that can be used.
pub(super) struct Live {
    pub(super) started: Started,
    pub(super) threads: Vec<JoinHandle<TagBuffers>>,
    pub(super) device: Arc<UblkDev>,
}

/// The first of the device's two threads: brings it up, and leaves it to the second. The kernel
/// carries commands out on worker threads that stay with the thread that gave them and wake every
/// five seconds: with two threads, an idle device has none.
pub(super) fn run<D: Disk>(plan: Plan<D>) {
    match thread::block_signals().and_then(|()| bring_to_life(&plan)) {
        Err(error) => end(&plan, Err(error)),
        Ok(live) => {
            let name = "ublk-device".to_owned();
            // Should there be no thread, the plan and with it the caller's hope are dropped, the
            // queues go with the process, and the supervisor or the next attach clears the rest.
            let spawned = std::thread::Builder::new().name(name).spawn(move || {
                let outcome = serve_to_the_end(&plan, live);
                end(&plan, outcome);
            });
            if let Err(error) = spawned {
                tracing::error!(%error, "no thread for the device");
            }
        }
    }
}

fn end<D: Disk>(plan: &Plan<D>, outcome: Result<()>) {
    // Nobody listens when the caller gave up; there is nobody left to tell.
    let _ = plan.progress.send(Progress::Gone(outcome));
    (plan.on_gone)();
}

fn bring_to_life<D: Disk>(plan: &Plan<D>) -> Result<Live> {
    let mut control = Control::open()?;
    if let Birth::TakenOver(before) = &plan.birth {
        return takeover::take(plan, &mut control, before);
    }
    let handle = add(&plan.shape, &mut control)?;
    let id = handle.dev_info().dev_id;
    if plan.progress.send(Progress::Added).is_err() {
        let nobody = Error::new(ErrorKind::Canceled, "nobody waits for the device");
        return Err(failed(nobody, undo(plan, &mut control, id, Vec::new(), None)));
    }
    let device = match open(&handle) {
        Ok(device) => Arc::new(device),
        Err(error) => return Err(failed(error, undo(plan, &mut control, id, Vec::new(), None))),
    };
    let mut threads = Vec::new();
    let brought_up = bring_up(plan, &mut control, &handle, &device, &mut threads);
    drop(handle);
    match brought_up {
        Err(error) => Err(failed(error, undo(plan, &mut control, id, threads, Some(device)))),
        Ok(started) => Ok(Live { started, threads, device }),
    }
}

/// The life of a device that can be used, and its end.
fn serve_to_the_end<D: Disk>(plan: &Plan<D>, live: Live) -> Result<()> {
    let Live { started, threads, device } = live;
    // A caller that is gone wants no device.
    if plan.progress.send(Progress::Usable(started)).is_ok() {
        wait_for_the_end(plan, threads.len());
    }
    undo(plan, &mut Control::open()?, started.id, threads, Some(device))
}

/// The error of a start that failed, with what could not be undone.
fn failed(error: Error, undone: Result<()>) -> Error {
    match undone {
        Ok(()) => error,
        Err(left) => error.context(format!("could not clean up ({left:#}) after a failed start")),
    }
}

/// ADD_DEV through libublk, whose queue code wants its own handle. The handle is told at once not
/// to delete the device when it goes: it would wait for us who hold the device open.
fn add(shape: &Shape, control: &mut Control) -> Result<UblkCtrl> {
    if let Some(id) = shape.id.and_then(|id| u32::try_from(id).ok())
        && control.info(id).is_ok()
    {
        let message = format!(
            "ublk device {id} exists already, or somebody still has a deleted one of that number \
             open"
        );
        return Err(Error::new(ErrorKind::Busy, message));
    }
    let deadline = Instant::now() + NUMBER_PATIENCE;
    let handle = loop {
        match try_add(shape) {
            // Nobody is to be seen under the number: a device that was just deleted may not have
            // let go of it (newer kernels hide it at once).
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                std::thread::sleep(POLL_PAUSE);
            }
            outcome => break outcome?,
        }
    };
    handle.disown();
    // libublk takes EBUSY for success and leaves the number at -1.
    if i32::try_from(handle.dev_info().dev_id).is_err() {
        return Err(Refusal::Errno(libc::EBUSY).tell("ADD_DEV"));
    }
    Ok(handle)
}

fn try_add(shape: &Shape) -> Result<UblkCtrl> {
    let _turn = HostLock::take()?;
    UblkCtrlBuilder::default()
        .name("obd")
        .id(shape.id.unwrap_or(-1))
        .nr_queues(shape.queues)
        .depth(shape.depth)
        .io_buf_bytes(shape.request_bytes)
        // Only with a supervisor: without one, a dead server would leave readers in an
        // uninterruptible wait for ever. What was in flight is handed out again: reading twice
        // harms nobody.
        .ctrl_flags(if shape.recoverable { RECOVERABLE } else { 0 })
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(|error| told(&error, "ADD_DEV"))
}

/// Opens `/dev/ublkcN`; libublk waits 3 s for udev to allow it.
pub(super) fn open(handle: &UblkCtrl) -> Result<UblkDev> {
    let path = handle.get_cdev_path();
    UblkDev::new("obd".to_owned(), |_| Ok(()), handle)
        .map_err(|_| Error::new(ErrorKind::Kernel, format!("{path} did not appear within 3 s")))
}

fn bring_up<D: Disk>(
    plan: &Plan<D>,
    control: &mut Control,
    handle: &UblkCtrl,
    device: &Arc<UblkDev>,
    threads: &mut Vec<JoinHandle<TagBuffers>>,
) -> Result<Started> {
    let info = device.dev_info;
    let id = info.dev_id;
    control
        .set_params(id, &plan.params)
        .map_err(|refusal| refusal.tell(&format!("SET_PARAMS of device {id}")))?;
    let buffers = buffers_of(&info)?;
    start_queues(plan, handle, device, buffers, threads)?;
    let turn = HostLock::take()?;
    control.start(id).map_err(|refusal| refusal.tell(&format!("START_DEV of device {id}")))?;
    drop(turn);
    node::wait_usable(id)?;
    let (queues, depth) = (info.nr_hw_queues, info.queue_depth);
    Ok(Started { id, queues, depth, quiesced: None, flowing: Instant::now() })
}

/// The tag buffers of every queue of a device.
pub(super) fn buffers_of(info: &DeviceInfo) -> Result<Vec<TagBuffers>> {
    let buffer_bytes = to_usize(u64::from(info.max_io_buf_bytes)).unwrap_or(0);
    let buffers =
        (0..info.nr_hw_queues).map(|_| queue::tag_buffers(info.queue_depth, buffer_bytes));
    buffers.collect()
}

/// Starts the queue threads and returns once each has handed in its tags.
pub(super) fn start_queues<D: Disk>(
    plan: &Plan<D>,
    handle: &UblkCtrl,
    device: &Arc<UblkDev>,
    buffers: Vec<TagBuffers>,
    threads: &mut Vec<JoinHandle<TagBuffers>>,
) -> Result<()> {
    let masks = queue_masks(handle, device.dev_info.nr_hw_queues);
    let spawned = (0_u16..).zip(masks.into_iter().zip(buffers)).try_for_each(|(index, given)| {
        threads.push(spawn_queue(plan, device, index, given)?);
        Ok(())
    });
    // Also after a failure: STOP_DEV only reaches tags that have been handed in.
    wait_settled(plan, threads.len()).and(spawned)
}

/// The processors whose requests come to each queue: where its thread is at home. Empty (anywhere)
/// when that is all of them, or only one: a thread that shares its only processor with the reader
/// it serves makes both wait.
fn queue_masks(handle: &UblkCtrl, queues: u16) -> Vec<Vec<usize>> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mask = |queue: u16| {
        let mut mask = UblkQueueAffinity::new();
        let known = handle.get_queue_affinity(u32::from(queue), &mut mask).is_ok();
        let mask = mask.to_bits_vec();
        if known && mask.len() > 1 && mask.len() < cpus { mask } else { Vec::new() }
    };
    (0..queues).map(mask).collect()
}

/// Tells the device thread that a queue is over, however it ends.
struct EndGuard {
    events: Sender<Event>,
    was_ready: bool,
    error: Option<Error>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        let bug = std::thread::panicking()
            .then(|| Error::new(ErrorKind::Kernel, "bug: the queue thread panicked"));
        let (was_ready, error) = (self.was_ready, self.error.take().or(bug));
        let _ = self.events.send(Event::Ended { was_ready, error });
    }
}

fn spawn_queue<D: Disk>(
    plan: &Plan<D>,
    device: &Arc<UblkDev>,
    queue_index: u16,
    (cpus, mut buffers): (Vec<usize>, TagBuffers),
) -> Result<JoinHandle<TagBuffers>> {
    let (disk, device) = (Arc::clone(&plan.disk), Arc::clone(device));
    let (counters, events) = (Arc::clone(&plan.counters), plan.events.0.clone());
    let bounds = Bounds {
        // A disk that is written may grow while it is served, and checks each request itself.
        sectors: if plan.flusher.is_none() {
            plan.params.basic.dev_sectors
        } else {
            VIRTUAL_SECTORS_MAX
        },
        buffer_bytes: buffers.first().map_or(0, |buffer| buffer.len()),
        read_only: plan.flusher.is_none(),
        zeroes_sectors_max: params::zeroes_sectors_max(&plan.params),
    };
    let (flusher, misses) = (plan.flusher.clone(), plan.misses.clone());
    let name = format!("ublk{}q{queue_index}", device.dev_info.dev_id);
    let serve = move || {
        let mut guard = EndGuard { events: events.clone(), was_ready: false, error: None };
        let setup = queue::Setup {
            disk: &*disk,
            device: &device,
            queue_index,
            cpus: &cpus,
            counters: &counters,
            bounds,
            flushes: flusher.as_ref().and_then(|flusher| flusher.desk(queue_index)),
            misses: misses.as_ref().and_then(|misses| misses.desk(queue_index)),
        };
        let served = queue::serve(setup, &mut buffers, || {
            guard.was_ready = true;
            let _ = events.send(Event::Ready);
        });
        guard.error = served.map_err(|e| e.context(format!("serve queue {queue_index}"))).err();
        drop(guard);
        buffers
    };
    let spawned = std::thread::Builder::new().name(name).spawn(serve);
    spawned.map_err(|error| Error::io("start a queue thread", &error))
}

/// Waits until every queue is ready or over. START_DEV would wait for a missing one for ever, so
/// one that is over is an error.
fn wait_settled<D: Disk>(plan: &Plan<D>, queues: usize) -> Result<()> {
    let deadline = Instant::now() + QUEUE_TIMEOUT;
    let mut settled = 0;
    let mut ended = Vec::new();
    while settled < queues {
        match next_event(plan, deadline) {
            Some(Event::Ready) => settled += 1,
            Some(Event::Ended { was_ready, error }) => {
                settled += usize::from(!was_ready);
                ended.push(error);
            }
            // The caller has nothing to stop yet.
            Some(Event::Stop) => {}
            None => {
                let message = format!("{settled} of {queues} queues were ready within 30 s");
                return Err(Error::new(ErrorKind::Timeout, message));
            }
        }
    }
    repeat_ended(plan, ended.len());
    let silent = || Error::new(ErrorKind::Kernel, "a queue ended before the start");
    match ended.into_iter().next() {
        None => Ok(()),
        Some(error) => Err(error.unwrap_or_else(silent)),
    }
}

/// Puts back `count` ends of queues for [`wait_ended`], which counts them all.
fn repeat_ended<D: Disk>(plan: &Plan<D>, count: usize) {
    for _ in 0..count {
        let _ = plan.events.0.send(Event::Ended { was_ready: true, error: None });
    }
}

fn next_event<D: Disk>(plan: &Plan<D>, deadline: Instant) -> Option<Event> {
    let left = deadline.saturating_duration_since(Instant::now());
    // The plan itself holds a sender: never disconnected.
    plan.events.1.recv_timeout(left).ok()
}

/// Returns when the device is to be taken down: told so, or because no queue is left.
fn wait_for_the_end<D: Disk>(plan: &Plan<D>, queues: usize) {
    let mut ended = 0;
    while let Ok(event) = plan.events.1.recv() {
        match event {
            Event::Stop => break,
            Event::Ready => {}
            Event::Ended { error, .. } => {
                if let Some(error) = error {
                    tracing::error!(error = format!("{error:#}"), "queue ended");
                    plan.counters.set_last_error(format!("{error:#}"));
                }
                ended += 1;
                if ended == queues {
                    tracing::info!("device was stopped from outside");
                    break;
                }
            }
        }
    }
    repeat_ended(plan, ended);
}

/// Takes down what exists of device `id`, in the order the kernel needs: STOP_DEV while the queues
/// still serve, then the queues, then DEL_DEV while we still hold the device open, then let go.
fn undo<D: Disk>(
    plan: &Plan<D>,
    control: &mut Control,
    id: u32,
    threads: Vec<JoinHandle<TagBuffers>>,
    device: Option<Arc<UblkDev>>,
) -> Result<()> {
    // The kernel waits for what is in flight, which may wait for a registry.
    plan.disk.cancel();
    let stopped = match control.stop(id) {
        Ok(()) | Err(Refusal::Errno(libc::ENODEV)) => Ok(()),
        Err(refusal) => Err(refusal.tell(&format!("STOP_DEV of device {id}"))),
    };
    let ended = wait_ended(plan, threads.len());
    if ended.is_ok() {
        // All threads first, then all buffers.
        let buffers: Vec<_> = threads.into_iter().map(JoinHandle::join).collect();
        drop(buffers);
    }
    // When the queues are gone, so are those that could be told of a flush.
    let flushed = plan.flusher.as_ref().map_or(Ok(()), |flusher| flusher.end(QUEUE_TIMEOUT));
    let read = plan.misses.as_ref().map_or(Ok(()), |misses| misses.end(QUEUE_TIMEOUT));
    let deleted = match HostLock::take().map(|_turn| control.delete(id))? {
        Ok(()) | Err(Refusal::Errno(libc::ENODEV)) => Ok(()),
        Err(refusal) => Err(refusal.tell(&format!("DEL_DEV of device {id}"))),
    };
    drop(device);
    stopped.and(ended).and(flushed).and(read).and(deleted)?;
    if !control.wait_free(id) {
        tracing::info!(dev_id = id, "the number is taken until the last opener closes the device");
    }
    Ok(())
}

/// Waits until every queue thread is over.
fn wait_ended<D: Disk>(plan: &Plan<D>, queues: usize) -> Result<()> {
    let deadline = Instant::now() + QUEUE_TIMEOUT;
    let mut ended = 0;
    while ended < queues {
        match next_event(plan, deadline) {
            Some(Event::Ended { .. }) => ended += 1,
            Some(Event::Ready | Event::Stop) => {}
            None => {
                let message = format!("{ended} of {queues} queue threads ended within 30 s");
                return Err(Error::new(ErrorKind::Timeout, message));
            }
        }
    }
    Ok(())
}
