//! The server loop's part of a snapshot: one at a time, on a thread of its own, and nothing ends
//! the device meanwhile.

use super::{After, Leftovers, SnapshotReport, remember, take};
use crate::error::{Error, ErrorKind, Result};
use crate::server::control::{Event, SnapshotWish, Snapshotted};
use crate::server::portable::Kept;
use crate::server::served::Up;
use crate::server::state::State;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// Whether a snapshot is under way, and what waits for its end.
#[derive(Debug, Default)]
pub(in crate::server) struct Turn {
    under_way: bool,
    deferred: Vec<Event>,
}

impl Turn {
    /// Whether a snapshot is being taken: the device is not to go away now.
    pub(in crate::server) fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// Takes what concerns snapshots, or has to wait for one; gives everything else back.
    pub(in crate::server) fn take<T>(
        &mut self,
        up: &mut Up<T>,
        events: &Sender<Event>,
        event: Option<Event>,
    ) -> Option<Option<Event>> {
        match event {
            Some(Event::Snapshot(wish)) => self.begin(up, events, wish),
            Some(Event::Snapshotted(done)) => {
                self.under_way = false;
                let Snapshotted { outcome, answer } = *done;
                let _ = answer.send(outcome.map(|(report, after, leftovers)| {
                    finish(up, events, after, leftovers);
                    report
                }));
                for event in self.deferred.drain(..) {
                    // It is this loop's own.
                    let _ = events.send(event);
                }
            }
            Some(Event::Stop(_, answer)) if self.under_way => {
                let message = "a snapshot of the device is under way";
                let _ = answer.send(Err(Error::new(ErrorKind::Busy, message)));
            }
            Some(event @ (Event::Signal(_) | Event::Yield | Event::Gone)) if self.under_way => {
                self.deferred.push(event);
            }
            event => return Some(event),
        }
        None
    }

    fn begin<T>(&mut self, up: &Up<T>, events: &Sender<Event>, wish: SnapshotWish) {
        if self.under_way {
            let message = "another snapshot of the device is under way";
            let _ = wish.answer.send(Err(Error::new(ErrorKind::Busy, message)));
            return;
        }
        let (kept, state) = (Arc::clone(&up.kept), up.state.clone());
        let (sender, refused) = (events.clone(), wish.answer.clone());
        let work = move || {
            let outcome = catch_unwind(AssertUnwindSafe(|| run(&*kept, &state, &wish)));
            let bug = || Err(Error::new(ErrorKind::Io, "bug: the snapshot panicked"));
            let outcome = outcome.unwrap_or_else(|_| bug());
            let done = Snapshotted { outcome, answer: wish.answer };
            let _ = sender.send(Event::Snapshotted(Box::new(done)));
        };
        match std::thread::Builder::new().name("snapshot".to_owned()).spawn(work) {
            Ok(_) => self.under_way = true,
            Err(error) => {
                let _ = refused.send(Err(Error::io("start the snapshot's thread", &error)));
            }
        }
    }
}

fn run(
    kept: &dyn Kept,
    state: &State,
    wish: &SnapshotWish,
) -> Result<(SnapshotReport, After, Leftovers)> {
    let Some(live) = kept.live() else {
        if state.upper.is_some() {
            let message = "an upper in sparse form cannot become a layer while it is written";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let message = "the device takes no writes: there is nothing to make a layer of";
        return Err(Error::new(ErrorKind::ReadOnly, message));
    };
    take(live, state, &wish.order, wish.pid)
}

/// Writes down what the device is now, and hands it on; then nothing is needed of the old pair.
fn finish<T>(up: &mut Up<T>, events: &Sender<Event>, after: After, leftovers: Leftovers) {
    remember(up.state.id, &after.config);
    after.enter(&mut up.state);
    if let Err(error) = up.state.save(up.slot.path()) {
        // The intent stays, and leads a successor from the old state to the new one.
        tracing::error!("after a snapshot: {error:#}");
        return;
    }
    if let Some(guarded) = &mut up.guarded {
        let parcel = up.kept.pack().unwrap_or_else(|error| {
            // A successor will open the image anew.
            tracing::warn!("no parcel: {error:#}");
            Vec::new()
        });
        if let Err(error) = guarded.link.entrust(&parcel) {
            tracing::warn!("the supervisor is gone: {error:#}");
            let _ = events.send(Event::Orphaned);
        }
        guarded.parcel = Arc::new(parcel);
    }
    leftovers.remove();
    up.state.unsettled = None;
    if let Err(error) = up.state.save(up.slot.path()) {
        tracing::warn!("after a snapshot: {error:#}");
    }
    tracing::info!(config = %up.state.config.display(), "a snapshot was taken");
}
