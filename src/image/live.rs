//! A writable image that can be exchanged for another one of the same disk while it is read and
//! written: what a snapshot does with its upper.
//!
//! ```text
//!   writer: "I write" -- is writing stopped? -- no: write       yes: "I do not", wait, again
//!   change: "stopped" -- wait until nobody writes -- make the other image -- "go on"
//! ```
//!
//! Both sides say what they do before they look at the other, so one of them sees the other. Reads
//! ask nobody: those that began before the change are of the old image, which holds the same bytes
//! until a write after it is answered. (One that stands behind a write on its front end's thread
//! waits with it.) No lock is held across I/O; a worker takes none unless the image has changed.

use super::{WritableImage, WritableWorker};
use crate::error::{Error, ErrorKind, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};

/// How often a change looks whether writes are still in flight: a write to a page cache takes some
/// microseconds, and one that takes longer makes the pause no longer than twice its time.
const LOOK_PAUSE: Duration = Duration::from_micros(50);

/// An image that is served, for any number of threads.
#[derive(Debug)]
pub struct LiveImage {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    current: RwLock<Current>,
    /// That of `current`, to be looked at without its lock.
    turn: AtomicU64,
    stopped: AtomicBool,
    /// Guards nothing but the wait for `stopped` to end.
    gate: Mutex<()>,
    opened: Condvar,
    writers: Mutex<Vec<Arc<AtomicBool>>>,
    /// Held by who changes the image: one at a time.
    changing: Mutex<()>,
}

#[derive(Clone, Debug)]
struct Current {
    turn: u64,
    image: Arc<WritableImage>,
}

/// One thread's reader and writer of a [`LiveImage`].
#[derive(Debug)]
pub struct LiveWorker {
    shared: Arc<Shared>,
    followed: Followed,
    writing: Arc<AtomicBool>,
}

/// A worker of the image of some turn.
#[derive(Debug)]
struct Followed {
    turn: u64,
    worker: WritableWorker,
}

impl Followed {
    /// The worker, of the image of now.
    #[inline]
    fn now(&mut self, shared: &Shared) -> Result<&mut WritableWorker> {
        if self.turn != shared.turn.load(Ordering::SeqCst) {
            let Current { turn, image } = shared.current();
            *self = Self { turn, worker: image.worker()? };
        }
        Ok(&mut self.worker)
    }
}

/// Until it is dropped its thread writes.
struct Writing<'a>(&'a AtomicBool);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// Until it is dropped nobody begins to write.
struct Stopped<'a>(&'a Shared);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let _gate = lock(&self.0.gate);
        self.0.stopped.store(false, Ordering::SeqCst);
        self.0.opened.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LiveImage {
    /// Serves `image` from now on.
    #[must_use]
    pub fn new(image: WritableImage) -> Self {
        let current = Current { turn: 0, image: Arc::new(image) };
        let shared = Shared {
            current: RwLock::new(current),
            turn: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            gate: Mutex::new(()),
            opened: Condvar::new(),
            writers: Mutex::default(),
            changing: Mutex::new(()),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The image as it is now.
    #[must_use]
    pub fn current(&self) -> Arc<WritableImage> {
        self.shared.current().image
    }

    /// A worker for the calling thread.
    ///
    /// # Errors
    /// As [`WritableImage::worker`].
    pub fn worker(&self) -> Result<LiveWorker> {
        let Current { turn, image } = self.shared.current();
        let worker = image.worker()?;
        let writing = Arc::new(AtomicBool::new(false));
        lock(&self.shared.writers).push(Arc::clone(&writing));
        let followed = Followed { turn, worker };
        Ok(LiveWorker { shared: Arc::clone(&self.shared), followed, writing })
    }

    /// Lets `make` make the image that is served from now on, out of the one that is, while nobody
    /// writes. Waits until `deadline` at most for writes in flight. When `make` fails, everything
    /// goes on as it was.
    ///
    /// # Errors
    /// `Timeout` when a write in flight does not end; `Busy` while another change is under way;
    /// what `make` says.
    pub fn change<T>(
        &self,
        deadline: Instant,
        make: impl FnOnce(&Arc<WritableImage>) -> Result<(WritableImage, T)>,
    ) -> Result<T> {
        self.pause(deadline, |of_before| {
            let (image, outcome) = make(of_before)?;
            let mut current = self.shared.current.write().unwrap_or_else(PoisonError::into_inner);
            *current = Current { turn: current.turn + 1, image: Arc::new(image) };
            self.shared.turn.store(current.turn, Ordering::SeqCst);
            Ok(outcome)
        })
    }

    /// Lets `act` work on the image while nobody writes. Waits until `deadline` at most for writes
    /// in flight.
    ///
    /// # Errors
    /// As [`LiveImage::change`].
    pub fn pause<T>(
        &self,
        deadline: Instant,
        act: impl FnOnce(&Arc<WritableImage>) -> Result<T>,
    ) -> Result<T> {
        let _changing = match self.shared.changing.try_lock() {
            Ok(changing) => changing,
            // A change that panicked: what it guards is nothing but the turn.
            Err(TryLockError::Poisoned(changing)) => changing.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(ErrorKind::Busy, "the image is being exchanged already"));
            }
        };
        self.shared.stopped.store(true, Ordering::SeqCst);
        let stopped = Stopped(&self.shared);
        self.shared.drain(deadline)?;
        let outcome = act(&self.current());
        drop(stopped);
        outcome
    }
}

impl Shared {
    fn current(&self) -> Current {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until nobody writes.
    fn drain(&self, deadline: Instant) -> Result<()> {
        loop {
            let writes = |writer: &Arc<AtomicBool>| writer.load(Ordering::SeqCst);
            if !lock(&self.writers).iter().any(writes) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::Timeout, "a write in flight does not end"));
            }
            std::thread::sleep(LOOK_PAUSE);
        }
    }

    /// Waits until writing may go on.
    fn wait(&self) {
        let mut gate = lock(&self.gate);
        while self.stopped.load(Ordering::SeqCst) {
            gate = self.opened.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl LiveWorker {
    /// Fills `dst` (whole sectors) from `start_sector` on.
    ///
    /// # Errors
    /// As [`WritableWorker::read`].
    pub fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        self.followed.now(&self.shared)?.read(start_sector, dst)
    }

    /// As [`WritableWorker::would_wait`].
    pub fn would_wait(&mut self, sectors: Range<u64>) -> bool {
        self.followed.now(&self.shared).is_ok_and(|worker| worker.would_wait(sectors))
    }

    /// As [`WritableWorker::write`]; waits for a change that is under way.
    ///
    /// # Errors
    /// As there.
    pub fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        self.change(|worker| worker.write(start_sector, src))
    }

    /// As [`WritableWorker::zero`]; waits for a change that is under way.
    ///
    /// # Errors
    /// As there.
    pub fn zero(&mut self, sectors: Range<u64>) -> Result<()> {
        self.change(|worker| worker.zero(sectors))
    }

    fn change(&mut self, act: impl FnOnce(&mut WritableWorker) -> Result<()>) -> Result<()> {
        let _writing = loop {
            self.writing.store(true, Ordering::SeqCst);
            let guard = Writing(&self.writing);
            if !self.shared.stopped.load(Ordering::SeqCst) {
                break guard;
            }
            drop(guard);
            self.shared.wait();
        };
        act(self.followed.now(&self.shared)?)
    }
}

impl Drop for LiveWorker {
    fn drop(&mut self) {
        lock(&self.shared.writers).retain(|writing| !Arc::ptr_eq(writing, &self.writing));
    }
}
