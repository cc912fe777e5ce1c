//! The loop of one queue thread: take every request that is there, serve it, answer all at once.
//!
//! The thread has its own ring, tags' buffers and [`Worker`](crate::disk::Worker). A request
//! is served to its end in the callback (a read fills the tag's buffer in place) and its answer is
//! only queued; the next `io_uring_enter` hands in the answers of the whole batch and waits for
//! more. So a batch of N requests costs one system call, and a read that hits allocates nothing
//! and takes no lock. A read that blocks, blocks its queue.
//!
//! libublk's own loop is not used: it ends at any failed wait, an interrupted one included. Its
//! wait is: it has a timer of 20 s, so an idle queue wakes three times a minute and does nothing.
#![allow(unsafe_code)]

use super::answer::Server;
use super::control::Refusal;
use super::request::{Bounds, Descriptor};
use super::stats::DeviceCounters;
use super::thread;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use io_uring::{IoUring, cqueue, squeue};
use libublk::helpers::IoBuf;
use libublk::io::{UblkDev, UblkIOCtx, UblkQueue};
use libublk::{BufDesc, BufDescList, UblkError, UblkIORes};
use nix::sys::mman::{MmapAdvise, madvise};
use std::cell::RefCell;
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
}

/// Serves one queue until the device is stopped. `ready` is called once, when every tag has been
/// handed in, so that the device can be started.
///
/// # Errors
/// Before `ready` was called: what could not be set up. After: the wait failed for good; the
/// kernel fails what is in flight when the thread ends.
pub(super) fn serve<D: Disk>(
    setup: &Setup<'_, D>,
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
    ready();

    run(&queue, buffers, &mut server)
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
            .setup_cqsize(depth * 4)
            .build(depth * 2)
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

/// Handles batches until the queue is down.
fn run<D: Disk>(
    queue: &UblkQueue<'_>,
    buffers: &mut [IoBuf<u8>],
    server: &mut Server<'_, D>,
) -> Result<()> {
    loop {
        server.entered();
        let waited = queue.flush_and_wake_io_tasks(
            |user_data, answer, _| {
                if answer.result() == OK {
                    let tag = UblkIOCtx::user_data_to_tag(user_data);
                    serve_tag(queue, tag, buffers, server);
                }
            },
            1,
        );
        match waited {
            Ok(_) => {}
            Err(UblkError::QueueIsDown) => return Ok(()),
            Err(UblkError::IOError(error))
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) => {}
            Err(error) => return Err(told(&error, "wait for requests")),
        }
    }
}

/// The answer of a fetch that brings a request.
const OK: i32 = 0;

fn serve_tag<D: Disk>(
    queue: &UblkQueue<'_>,
    tag: u32,
    buffers: &mut [IoBuf<u8>],
    server: &mut Server<'_, D>,
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
    let answer = server.answer(descriptor, buffer.as_mut_slice());
    let description = BufDesc::Slice(buffer.as_slice());
    let queued = queue.complete_io_cmd_unified(tag, description, Ok(UblkIORes::Result(answer)));
    if let Err(error) = queued {
        server.complain(&told(&error, "answer a request"));
    }
}
