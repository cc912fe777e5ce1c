//! The loop of one queue thread: take every request that is there, serve it, answer all at once.
//!
//! The thread has its own ring, tags' buffers and [`Worker`](crate::disk::Worker). A request
//! is served to its end in the callback (a read fills the tag's buffer in place) and its answer is
//! only queued; the next `io_uring_enter` hands in the answers of the whole batch and waits for
//! more. So a batch of N requests costs one system call, and a read that hits allocates nothing
//! and takes no lock. A read that blocks on a local disk, blocks its queue. One that waits for
//! bytes from elsewhere does not, and neither does a flush: they go to [other](super::miss)
//! [threads](super::flush), and come back by eventfds that this ring polls.
//!
//! libublk's own loop is not used: it ends at any failed wait, an interrupted one included. Its
//! wait is, while there is work; it has a timer of 20 s, and once that has gone off the queue is
//! idle and waits without one: an idle device wakes nobody.
#![allow(unsafe_code)]

use super::answer::{Answer, Server, Waiting};
use super::control::Refusal;
use super::flush::{self, Flushed};
use super::miss::{self, Miss, Missed};
use super::request::{Bounds, Descriptor};
use super::stats::DeviceCounters;
use super::thread;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::helpers::IoBuf;
use libublk::io::{UblkDev, UblkIOCtx, UblkQueue};
use libublk::{BufDesc, BufDescList, UblkError, UblkIORes};
use nix::sys::mman::{MmapAdvise, madvise};
use std::cell::RefCell;
use std::os::fd::RawFd;
use std::ptr::NonNull;

/// What a queue thread is given.
pub(super) struct Setup<'a, D: Disk> {
    pub(super) disk: &'a D,
    pub(super) device: &'a UblkDev,
    pub(super) queue_index: u16,
    /// Processors to stay on; empty for anywhere.
    pub(super) cpus: &'a [usize],
    pub(super) counters: &'a DeviceCounters,
    pub(super) bounds: Bounds,
    /// Where flushes go; `None` for a read-only disk.
    pub(super) flushes: Option<flush::Desk<'a>>,
    /// Where reads go that have to wait; `None` for a disk on which none do.
    pub(super) misses: Option<miss::Desk<'a, D>>,
}

/// Serves one queue until the device is stopped. `ready` is called once, when every tag has been
/// handed in, so that the device can be started.
///
/// # Errors
/// Before `ready` was called: what could not be set up. After: the wait failed for good; the
/// kernel fails what is in flight when the thread ends.
pub(super) fn serve<D: Disk>(
    setup: Setup<'_, D>,
    buffers: &mut TagBuffers,
    ready: impl FnOnce(),
) -> Result<()> {
    prepare_thread(setup.cpus)?;
    let device_id = setup.device.dev_info.dev_id;
    let mut server =
        Server::new(setup.disk, setup.bounds, setup.counters, (device_id, setup.queue_index))?;
    let depth = setup.device.dev_info.queue_depth;
    init_ring(u32::from(depth))?;
    let queue = UblkQueue::new(setup.queue_index, setup.device)
        .map_err(|error| told(&error, "set up the queue"))?;
    let queue = queue
        .submit_fetch_commands_unified(BufDescList::Slices(Some(buffers)))
        .map_err(|error| told(&error, "hand in the tags"))?;
    check_fetches(depth)?;
    let mut away = Away::new(setup.flushes, setup.misses, depth);
    away.arm()?;
    ready();

    run(&queue, buffers, &mut server, &mut away)
}

fn prepare_thread(cpus: &[usize]) -> Result<()> {
    thread::block_signals()?;
    // Also marks the thread as one that memory reclaim waits for (PR_SET_IO_FLUSHER).
    libublk::ctrl::UblkCtrl::init_queue_thread();
    thread::drop_sys_admin()?;
    if !cpus.is_empty() {
        thread::bind_to(cpus);
    }
    Ok(())
}

/// Creates the ring before libublk would. One submitter and deferred task work: completions are
/// handled when we ask for them, without interrupting a read. The completion queue cannot
/// overflow, and the submission queue is never full (libublk panics on that).
fn init_ring(depth: u32) -> Result<()> {
    libublk::ublk_init_task_ring(|cell| {
        let ring = IoUring::<squeue::Entry, cqueue::Entry>::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize((depth * 4).max(8))
            .build((depth * 2).max(4))
            .map_err(UblkError::IOError)?;
        cell.set(RefCell::new(ring)).map_err(|_| UblkError::OtherError(-libc::EEXIST))
    })
    .map_err(|error| told(&error, "set up the queue's io_uring"))
}

/// One buffer per tag.
pub(super) type TagBuffers = Vec<IoBuf<u8>>;

/// The buffers of one queue. Memory is taken when it is touched: a device that only ever sees
/// small reads has only the front of its buffers.
///
/// Made and freed by the device thread while no queue runs: a hundred mappings each way by several
/// threads at once interrupt each other's processors every time (attach and detach of two queues
/// took 3.5 times as long as of one in an emulated guest).
pub(super) fn tag_buffers(depth: u16, buffer_bytes: usize) -> Result<TagBuffers> {
    let buffers: TagBuffers = (0..depth).map(|_| IoBuf::new(buffer_bytes)).collect();
    for buffer in &buffers {
        if buffer.as_ptr().is_null() {
            let message = format!("no memory for {depth} buffers of {buffer_bytes} bytes");
            return Err(Error::new(ErrorKind::Kernel, message));
        }
        keep_pages_small(buffer);
    }
    Ok(buffers)
}

/// Asks for small pages: with huge ones the first small read of every tag would take 2 MiB. Only
/// a wish, so its outcome does not matter.
fn keep_pages_small(buffer: &IoBuf<u8>) {
    if let Some(start) = NonNull::new(buffer.as_mut_ptr()) {
        // SAFETY: the range is the buffer's own, whole pages of it, and the advice changes
        // nothing about its content.
        let _ = unsafe { madvise(start.cast(), buffer.len(), MmapAdvise::MADV_NOHUGEPAGE) };
    }
}

/// Submits the fetches and makes sure that the driver took every one: a refused fetch would make
/// START_DEV wait for ever.
fn check_fetches(depth: u16) -> Result<()> {
    let outcome = libublk::with_task_io_ring_mut(|ring| {
        let submitted = ring.submit()?;
        // Before the start no request can come: whatever is complete was refused.
        Ok((submitted, ring.completion().next().map(|answer| answer.result())))
    });
    match outcome.map_err(|error: std::io::Error| Error::io("hand in the tags", &error))? {
        (submitted, None) if submitted == usize::from(depth) => Ok(()),
        (submitted, refused) => Err(Error::new(
            ErrorKind::Kernel,
            format!(
                "the driver took {submitted} of {depth} tags, first answer {}",
                refused.unwrap_or(0)
            ),
        )),
    }
}

/// The error for a failure inside libublk, whose own text does not say what failed.
pub(super) fn told(error: &UblkError, action: &str) -> Error {
    let errno = match error {
        UblkError::IOError(error) => return Error::io(action, error).context("talk to the driver"),
        UblkError::UringIOError(result) | UblkError::OtherError(result) => -*result,
        other => return Error::new(ErrorKind::Kernel, format!("{action}: {other}")),
    };
    Refusal::Errno(errno).tell(action)
}

/// Polls on this ring: `user_data` that libublk's bit for what is no fetch keeps out of the count
/// of fetches. Nothing else of that kind is on it.
fn wake_user_data(source: u16) -> u64 {
    UblkIOCtx::build_user_data(source, 0, 0, true)
}

/// The poll on the flusher's eventfd.
const FLUSHED: u16 = 0;

/// The poll on the eventfd of reads that waited.
const MISSED: u16 = 1;

/// Has the ring say once when something came back to an outbox with the eventfd `fd`; submitted
/// with the next wait. It is said at once when something is there already, so nothing is missed
/// between a look and this.
fn arm(fd: RawFd, source: u16) -> Result<()> {
    let events = u32::from(libc::POLLIN.unsigned_abs());
    let poll = opcode::PollAdd::new(types::Fd(fd), events).build();
    let poll = poll.user_data(wake_user_data(source));
    // SAFETY: a poll touches no memory of ours, and the ring holds the eventfd once it is
    // submitted. Its outbox outlives the queue's thread.
    let pushed = libublk::with_task_io_ring_mut(|ring| unsafe { ring.submission().push(&poll) });
    // There is room: a queue of 2 x depth entries, for one answer per tag and two of these.
    pushed.map_err(|_| Error::new(ErrorKind::Kernel, "bug: the submission queue is full"))
}

/// The tags of this queue whose requests are with other threads.
struct Away<'a, D: Disk> {
    flushes: Option<flush::Desk<'a>>,
    misses: Option<miss::Desk<'a, D>>,
    /// By tag.
    waiting: Vec<Option<Waiting>>,
    /// Scratch for what comes back.
    flushed: Vec<Flushed>,
    missed: Vec<Missed>,
}

impl<'a, D: Disk> Away<'a, D> {
    fn new(
        flushes: Option<flush::Desk<'a>>,
        misses: Option<miss::Desk<'a, D>>,
        depth: u16,
    ) -> Self {
        let depth = usize::from(depth);
        let flushed = Vec::with_capacity(if flushes.is_some() { depth } else { 0 });
        let missed = Vec::with_capacity(if misses.is_some() { depth } else { 0 });
        Self { flushes, misses, waiting: vec![None; depth], flushed, missed }
    }

    fn arm(&self) -> Result<()> {
        self.arm_flushes()?;
        self.arm_misses()
    }

    fn arm_flushes(&self) -> Result<()> {
        self.flushes.as_ref().map_or(Ok(()), |desk| arm(desk.outbox().wake_fd(), FLUSHED))
    }

    fn arm_misses(&self) -> Result<()> {
        self.misses.as_ref().map_or(Ok(()), |desk| arm(desk.outbox().wake_fd(), MISSED))
    }

    /// Leaves `tag` to the flusher; false when there is none any more.
    fn ask_flush(&mut self, tag: u16, request: Waiting) -> bool {
        let (Some(waiting), Some(desk)) = (self.waiting.get_mut(usize::from(tag)), &self.flushes)
        else {
            return false;
        };
        // Before the flusher knows: the answer may come at once.
        *waiting = Some(request);
        let asked = desk.ask(tag);
        if !asked {
            *waiting = None;
        }
        asked
    }

    /// Leaves a read to other threads, its buffer with it; false when there are none: the buffer is
    /// in its place then.
    fn ask_read(
        &mut self,
        tag: u16,
        request: Waiting,
        (start_sector, len_bytes): (u64, usize),
        place: &mut IoBuf<u8>,
    ) -> bool {
        let (Some(waiting), Some(desk)) = (self.waiting.get_mut(usize::from(tag)), &self.misses)
        else {
            return false;
        };
        *waiting = Some(request);
        // A stand-in: a tag that is away is not looked at.
        let buffer = std::mem::replace(place, IoBuf::new(STAND_IN_BYTES));
        match desk.ask(Miss { tag, start_sector, len_bytes, buffer }) {
            Ok(()) => true,
            Err(miss) => {
                *place = miss.buffer;
                *waiting = None;
                false
            }
        }
    }

    /// Answers what was flushed, and has the ring say when more is.
    fn answer_flushed(
        &mut self,
        queue: &UblkQueue<'_>,
        buffers: &[IoBuf<u8>],
        server: &Server<'_, D>,
    ) -> Result<()> {
        let Some(desk) = &self.flushes else { return Ok(()) };
        desk.outbox().take(&mut self.flushed);
        for Flushed { tag, failure } in self.flushed.drain(..) {
            let waiting = self.waiting.get_mut(usize::from(tag)).and_then(Option::take);
            let Some(waiting) = waiting else { continue };
            let answer = server.flushed(waiting, failure.as_deref());
            send(queue, tag, buffers, answer, server);
        }
        // A queue that is going down answers nobody any more: libublk drops what is sent. An entry
        // in its submission queue would keep it up.
        if queue.is_stopping() { Ok(()) } else { self.arm_flushes() }
    }

    /// Answers the reads that other threads did, and has the ring say when there are more.
    fn answer_missed(
        &mut self,
        queue: &UblkQueue<'_>,
        buffers: &mut [IoBuf<u8>],
        server: &Server<'_, D>,
    ) -> Result<()> {
        let Some(desk) = &self.misses else { return Ok(()) };
        desk.outbox().take(&mut self.missed);
        for Missed { tag, buffer, outcome } in self.missed.drain(..) {
            let Some(place) = buffers.get_mut(usize::from(tag)) else { continue };
            *place = buffer;
            let waiting = self.waiting.get_mut(usize::from(tag)).and_then(Option::take);
            let Some(waiting) = waiting else { continue };
            let answer = server.missed(waiting, outcome);
            send(queue, tag, buffers, answer, server);
        }
        if queue.is_stopping() { Ok(()) } else { self.arm_misses() }
    }
}

/// The least that an aligned buffer can have.
const STAND_IN_BYTES: usize = 512;

/// Handles batches until the queue is down.
fn run<D: Disk>(
    queue: &UblkQueue<'_>,
    buffers: &mut [IoBuf<u8>],
    server: &mut Server<'_, D>,
    away: &mut Away<'_, D>,
) -> Result<()> {
    let (flushed, missed) = (wake_user_data(FLUSHED), wake_user_data(MISSED));
    loop {
        server.entered();
        let (mut has_flushed, mut has_missed) = (None, None);
        let waited = queue.flush_and_wake_io_tasks(
            |user_data, answer, _| {
                if user_data == flushed {
                    has_flushed = Some(answer.result());
                } else if user_data == missed {
                    has_missed = Some(answer.result());
                } else if answer.result() == OK {
                    let tag = UblkIOCtx::user_data_to_tag(user_data);
                    serve_tag(queue, tag, buffers, server, away);
                }
            },
            1,
        );
        match waited {
            Ok(0) => wait_idle()?,
            Ok(_) => {}
            Err(UblkError::QueueIsDown) => return Ok(()),
            Err(UblkError::IOError(error))
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) => {}
            Err(error) => return Err(told(&error, "wait for requests")),
        }
        if let Some(result) = has_flushed.into_iter().chain(has_missed).find(|result| *result < 0) {
            let error = std::io::Error::from_raw_os_error(-result);
            return Err(Error::io("wait for other threads", &error));
        }
        if has_flushed.is_some() {
            away.answer_flushed(queue, buffers, server)?;
        }
        if has_missed.is_some() {
            away.answer_missed(queue, buffers, server)?;
        }
    }
}

/// Waits, without a timer, until there is something to handle. Nothing is left to submit: libublk
/// has just waited for 20 s in vain.
fn wait_idle() -> Result<()> {
    let waited = libublk::with_task_io_ring_mut(|ring| ring.submit_and_wait(1));
    match waited {
        Ok(_) => Ok(()),
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) =>
        {
            Ok(())
        }
        Err(error) => Err(Error::io("wait for requests", &error)),
    }
}

/// The answer of a fetch that brings a request.
const OK: i32 = 0;

fn serve_tag<D: Disk>(
    queue: &UblkQueue<'_>,
    tag: u32,
    buffers: &mut [IoBuf<u8>],
    server: &mut Server<'_, D>,
    away: &mut Away<'_, D>,
) {
    // A tag beyond our buffers cannot be answered at all; the driver has no such tag.
    let Ok(tag) = u16::try_from(tag) else { return };
    let Some(buffer) = buffers.get_mut(usize::from(tag)) else { return };
    let descriptor = queue.get_iod(tag);
    let descriptor = Descriptor {
        op_flags: descriptor.op_flags,
        sector_count: descriptor.nr_sectors,
        start_sector: descriptor.start_sector,
    };
    let answer = match server.answer(descriptor, buffer.as_mut_slice()) {
        Answer::Now(answer) => answer,
        Answer::Elsewhere { waiting, start_sector, len_bytes } => {
            if away.ask_read(tag, waiting, (start_sector, len_bytes), buffer) {
                return;
            }
            let error = Error::new(ErrorKind::Canceled, "no thread to wait for the bytes");
            server.missed(waiting, Err(error))
        }
        Answer::AfterFlush(request) => {
            if away.ask_flush(tag, request) {
                return;
            }
            server.flushed(request, Some(&Error::new(ErrorKind::Canceled, "nobody flushes")))
        }
    };
    send(queue, tag, buffers, answer, server);
}

/// Queues the answer to the request of `tag`.
fn send<D: Disk>(
    queue: &UblkQueue<'_>,
    tag: u16,
    buffers: &[IoBuf<u8>],
    answer: i32,
    server: &Server<'_, D>,
) {
    let Some(buffer) = buffers.get(usize::from(tag)) else { return };
    let description = BufDesc::Slice(buffer.as_slice());
    let queued = queue.complete_io_cmd_unified(tag, description, Ok(UblkIORes::Result(answer)));
    if let Err(error) = queued {
        server.complain(&told(&error, "answer a request"));
    }
}
