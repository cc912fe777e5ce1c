//! Changes of a device that is served: one at a time, each on a thread of its own, and nothing ends
//! the device meanwhile.

use super::control::{Event, ResizeWish, SnapshotWish};
use super::kernel::Kernel;
use super::resize;
use super::served::Up;
use super::snapshot;
use crate::error::{Error, ErrorKind, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// Whether a change is under way, and what waits for its end.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// What the change is called.
    under_way: Option<&'static str>,
    deferred: Vec<Event>,
}

impl Turn {
    /// Whether the device is being changed: it is not to go away now.
    pub(super) fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Takes what concerns changes, or has to wait for one; gives everything else back.
    pub(super) fn take<K: Kernel>(
        &mut self,
        up: &mut Up<K::Device>,
        kernel: &K,
        events: &Sender<Event>,
        event: Option<Event>,
    ) -> Option<Option<Event>> {
        match (event, self.under_way) {
            (Some(Event::Snapshot(wish)), Some(name)) => refuse(&wish.answer, name),
            (Some(Event::Resize(wish)), Some(name)) => refuse(&wish.answer, name),
            (Some(Event::Stop(_, answer)), Some(name)) => refuse(&answer, name),
            (Some(event @ (Event::Signal(_) | Event::Yield | Event::Gone)), Some(_)) => {
                self.deferred.push(event);
            }
            (Some(Event::Snapshot(wish)), None) => self.begin_snapshot(up, events, wish),
            (Some(Event::Resize(wish)), None) => self.begin_resize(up, kernel, events, wish),
            (Some(Event::Snapshotted(done)), _) => {
                snapshot::finish(up, events, *done);
                self.end(events);
            }
            (Some(Event::Resized(done)), _) => {
                let outcome = resize::finish(up, kernel, done.bytes, done.grown);
                let _ = done.answer.send(outcome);
                self.end(events);
            }
            (event, _) => return Some(event),
        }
        None
    }

    fn end(&mut self, events: &Sender<Event>) {
        self.under_way = None;
        for event in self.deferred.drain(..) {
            // It is this loop's own.
            let _ = events.send(event);
        }
    }

    fn begin_snapshot<T>(&mut self, up: &Up<T>, events: &Sender<Event>, wish: SnapshotWish) {
        let (kept, state) = (Arc::clone(&up.kept), up.state.clone());
        let answer = wish.answer.clone();
        self.begin("snapshot", &answer, events, move || snapshot::work(&*kept, &state, wish));
    }

    fn begin_resize<K: Kernel>(
        &mut self,
        up: &Up<K::Device>,
        kernel: &K,
        events: &Sender<Event>,
        wish: ResizeWish,
    ) {
        let kept = Arc::clone(&up.kept);
        if let Err(error) = resize::check(kernel, &*kept, up.state.upper.is_some()) {
            let _ = wish.answer.send(Err(error));
            return;
        }
        let answer = wish.answer.clone();
        self.begin("resize", &answer, events, move || resize::work(&kept, wish));
    }

    fn begin<T: Send + 'static>(
        &mut self,
        name: &'static str,
        answer: &Sender<Result<T>>,
        events: &Sender<Event>,
        work: impl FnOnce() -> Event + Send + 'static,
    ) {
        let sender = events.clone();
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _ = sender.send(work());
        });
        match spawned {
            Ok(_) => self.under_way = Some(name),
            Err(error) => {
                let _ =
                    answer.send(Err(Error::io(format!("start the thread of a {name}"), &error)));
            }
        }
    }
}

fn refuse<T>(answer: &Sender<Result<T>>, name: &str) {
    let message = format!("a {name} of the device is under way");
    let _ = answer.send(Err(Error::new(ErrorKind::Busy, message)));
}

/// What `work` returns, or the error of its panic: whoever waits is to hear of it.
pub(super) fn caught<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, format!("bug: the {what} panicked"))))
}
