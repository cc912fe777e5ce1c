//! One queue's answers: a request in, an `i32` out, whatever the reader does.
//!
//! Knows nothing of rings and devices, so that all of it is tested without a kernel.
//!
//! Every request is timed when there is a trouble ring to tell of slow ones. The clock is the
//! kernel's coarse one: it moves once a tick (some milliseconds), which is enough to tell a second,
//! costs a quarter of the exact one, and is never a system call, whatever drives the exact one.

use super::request::{self, Bounds, Descriptor, Request};
use super::stats::{DeviceCounters, QueueCounters};
use crate::disk::{Disk, Guarded, Space};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SLOW_IO_MS;
use crate::telemetry::trouble::{Trouble, TroubleRing};
use crate::units::{to_u64, whole_sectors};
use nix::time::{ClockId, clock_gettime};
use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// See [`SLOW_IO_MS`].
const SLOW_IO: Duration = Duration::from_millis(SLOW_IO_MS);

/// Serves one queue.
pub(super) struct Server<'a, D: Disk> {
    worker: Guarded<'a, D>,
    bounds: Bounds,
    counters: &'a QueueCounters,
    device_counters: &'a DeviceCounters,
    /// Where failed and slow requests are recorded, if anywhere.
    trouble_ring: Option<&'a TroubleRing>,
    /// Time since some moment in the past.
    clock: fn() -> Duration,
    device_id: u32,
    queue_index: u16,
    /// Whether reads may have to wait.
    may_wait: bool,
}

/// What becomes of a request.
#[derive(Debug)]
pub(super) enum Answer {
    /// It is over.
    Now(i32),
    /// It is over once a flush that begins now is: see [`Server::flushed`].
    AfterFlush(Waiting),
    /// A read that another thread is to do, because it has to wait: see [`Server::missed`].
    Elsewhere {
        /// What came.
        waiting: Waiting,
        /// First sector.
        start_sector: u64,
        /// Whole sectors, no more than the buffer.
        len_bytes: usize,
    },
}

/// A request that waits for a flush, or for bytes from elsewhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    descriptor: Descriptor,
    /// When it came.
    since: Duration,
    /// The answer if that succeeds.
    answer: i32,
}

/// A request that was served.
struct Served {
    answer: i32,
    /// Whether the answer has to wait for a flush.
    durable: bool,
}

/// A request that was not served: the answer, and why.
struct Failure {
    errno: i32,
    error: Error,
}

impl<'a, D: Disk> Server<'a, D> {
    /// The server for one queue of one device, with all memory that reads will need.
    pub(super) fn new(
        disk: &'a D,
        bounds: Bounds,
        device_counters: &'a DeviceCounters,
        (device_id, queue_index): (u32, u16),
    ) -> Result<Self> {
        let Some(counters) = device_counters.queue(queue_index) else {
            let message = format!("queue {queue_index} was not asked for");
            return Err(Error::new(ErrorKind::Kernel, message));
        };
        Ok(Self {
            worker: Guarded::new(disk)?,
            bounds,
            counters,
            device_counters,
            trouble_ring: device_counters.trouble_ring(),
            clock: coarse_clock,
            device_id,
            queue_index,
            may_wait: disk.may_wait(),
        })
    }

    /// Counts one `io_uring_enter`.
    pub(super) fn entered(&self) {
        self.counters.enters.add(1);
    }

    /// Serves one request. The data of a read is in `buffer` when this returns its answer; that of
    /// a write is there already: the driver copies it before it hands the request out, since we
    /// never ask for it to wait until we want the data (`NEED_GET_DATA`), nor for other ways
    /// (`USER_COPY`, zero copy).
    pub(super) fn answer(&mut self, descriptor: Descriptor, buffer: &mut [u8]) -> Answer {
        self.counters.requests.add(1);
        let since = self.now();
        if self.may_wait
            && let Some((start_sector, len_bytes)) = self.is_miss(descriptor)
        {
            let answer = request::done(len_bytes);
            let waiting = Waiting { descriptor, since, answer };
            return Answer::Elsewhere { waiting, start_sector, len_bytes };
        }
        match self.serve(descriptor, buffer) {
            Ok(Served { answer, durable: true }) => {
                Answer::AfterFlush(Waiting { descriptor, since, answer })
            }
            Ok(Served { answer, durable: false }) => {
                Answer::Now(self.finish(descriptor, since, Ok(answer)))
            }
            Err(Failure { errno, error }) => {
                Answer::Now(self.finish(descriptor, since, Err((errno, &error))))
            }
        }
    }

    /// The answer to a request that had to wait for a flush, which is over. A write that is in
    /// place but not durable failed: its writer was promised both.
    pub(super) fn flushed(&self, waiting: Waiting, failure: Option<&Error>) -> i32 {
        let Waiting { descriptor, since, answer } = waiting;
        let outcome = match failure {
            None => {
                self.counters.flushes.add(1);
                Ok(answer)
            }
            Some(error) => Err((-request::failed(error), error)),
        };
        self.finish(descriptor, since, outcome)
    }

    /// The read in `descriptor` if it would have to wait.
    fn is_miss(&mut self, descriptor: Descriptor) -> Option<(u64, usize)> {
        let request = request::decode(descriptor, self.bounds);
        let Ok(Request::Read { start_sector, len_bytes }) = request else { return None };
        let sectors = start_sector..start_sector + whole_sectors(to_u64(len_bytes));
        self.worker.would_wait(sectors).then_some((start_sector, len_bytes))
    }

    /// The answer to a read that another thread did.
    pub(super) fn missed(&self, waiting: Waiting, outcome: Result<()>) -> i32 {
        let Waiting { descriptor, since, answer } = waiting;
        match outcome {
            Ok(()) => {
                self.counters.read_bytes.add(u64::try_from(answer).unwrap_or(0));
                self.finish(descriptor, since, Ok(answer))
            }
            Err(error) => {
                let Descriptor { sector_count, start_sector, .. } = descriptor;
                let place = format!("read {sector_count} sectors from sector {start_sector}");
                let error = error.context(place);
                self.finish(descriptor, since, Err((-request::failed(&error), &error)))
            }
        }
    }

    /// The time; nobody asks for it where nothing is recorded.
    fn now(&self) -> Duration {
        if self.trouble_ring.is_some() { (self.clock)() } else { Duration::ZERO }
    }

    /// The answer, once it has been told to who watches.
    fn finish(
        &self,
        descriptor: Descriptor,
        since: Duration,
        outcome: Result<i32, (i32, &Error)>,
    ) -> i32 {
        let took = self.now().saturating_sub(since);
        match outcome {
            Ok(answer) => {
                if took >= SLOW_IO {
                    self.record(descriptor, took, 0, "slow".to_owned());
                }
                answer
            }
            Err((errno, error)) => {
                let text = self.complain(error);
                self.record(descriptor, took, errno, text);
                -errno
            }
        }
    }

    fn serve(&mut self, descriptor: Descriptor, buffer: &mut [u8]) -> Result<Served, Failure> {
        match request::decode(descriptor, self.bounds) {
            Ok(Request::Read { start_sector, len_bytes }) => match buffer.get_mut(..len_bytes) {
                Some(dst) => self.read(start_sector, dst),
                None => Err(refusal(descriptor, libc::EINVAL)),
            },
            Ok(Request::Write { start_sector, len_bytes, durable }) => {
                match buffer.get(..len_bytes) {
                    Some(src) => self.write(start_sector, src, durable),
                    None => Err(refusal(descriptor, libc::EINVAL)),
                }
            }
            Ok(Request::Zeroes { sectors, space, durable }) => self.zero(sectors, space, durable),
            Ok(Request::Flush) => Ok(Served { answer: 0, durable: !self.bounds.read_only }),
            Err(errno) => Err(refusal(descriptor, errno)),
        }
    }

    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<Served, Failure> {
        let outcome = self.worker.read(start_sector, dst);
        self.served(outcome, "read", (start_sector, whole_sectors(to_u64(dst.len()))))?;
        self.counters.read_bytes.add(to_u64(dst.len()));
        Ok(Served { answer: request::done(dst.len()), durable: false })
    }

    fn write(&mut self, start_sector: u64, src: &[u8], durable: bool) -> Result<Served, Failure> {
        let outcome = self.worker.write(start_sector, src);
        self.served(outcome, "write", (start_sector, whole_sectors(to_u64(src.len()))))?;
        self.counters.writes.add(1);
        self.counters.written_bytes.add(to_u64(src.len()));
        Ok(Served { answer: request::done(src.len()), durable })
    }

    fn zero(
        &mut self,
        sectors: Range<u64>,
        space: Space,
        durable: bool,
    ) -> Result<Served, Failure> {
        let (start_sector, count) = (sectors.start, sectors.end - sectors.start);
        let outcome = self.worker.write_zeroes(sectors, space);
        self.served(outcome, "zero", (start_sector, count))?;
        self.counters.discards.add(1);
        Ok(Served { answer: 0, durable })
    }

    /// What the worker made of a request, with the place that it was about.
    fn served(
        &self,
        outcome: Result<()>,
        what: &str,
        (start_sector, sector_count): (u64, u64),
    ) -> Result<(), Failure> {
        self.counters.panics.set(self.worker.panics());
        outcome.map_err(|error| {
            let place = format!("{what} {sector_count} sectors from sector {start_sector}");
            let error = error.context(place);
            Failure { errno: -request::failed(&error), error }
        })
    }

    #[cold]
    fn record(&self, descriptor: Descriptor, took: Duration, errno: i32, text: String) {
        let Some(ring) = self.trouble_ring else { return };
        let Descriptor { op_flags, sector_count, start_sector } = descriptor;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        ring.record(&Trouble {
            unix_ms: u64::try_from(now.as_millis()).unwrap_or(0),
            operation: operation(op_flags),
            start_sector,
            sectors: sector_count,
            errno,
            duration_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            queue: self.queue_index,
            text,
            ..Trouble::default()
        });
    }

    /// Counts a failure, leaves its text for who asks, and returns it. The log gets the 1st, 2nd,
    /// 4th, 8th...: a bad layer under a busy reader must not fill the disk that the log is on.
    pub(super) fn complain(&self, error: &Error) -> String {
        self.counters.errors.add(1);
        let errors = self.counters.errors.get();
        let text = format!("{error:#}");
        if errors.is_power_of_two() {
            tracing::error!(
                dev_id = self.device_id, queue = self.queue_index, errors, error = %text,
                "request failed"
            );
        }
        self.device_counters.set_last_error(text.clone());
        text
    }
}

/// The operation of a request, without the hints above it.
fn operation(op_flags: u32) -> u8 {
    u8::try_from(op_flags & 0xff).unwrap_or(u8::MAX)
}

fn refusal(descriptor: Descriptor, errno: i32) -> Failure {
    let Descriptor { op_flags, sector_count, start_sector } = descriptor;
    let message = format!(
        "refused request: operation {}, {sector_count} sectors from sector {start_sector}",
        operation(op_flags)
    );
    Failure { errno, error: Error::new(ErrorKind::OutOfRange, message) }
}

/// See the module text.
fn coarse_clock() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests;
