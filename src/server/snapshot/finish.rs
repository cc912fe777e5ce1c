//! The server's part of a snapshot: the work, which has a thread of its own, and what the device is
//! afterwards.

use super::{After, Leftovers, SnapshotReport, remember, take};
use crate::error::{Error, ErrorKind, Result};
use crate::server::control::{Event, SnapshotWish, Snapshotted};
use crate::server::portable::Kept;
use crate::server::served::Up;
use crate::server::state::State;
use crate::server::turn::caught;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// Takes the snapshot, and the event that tells of its end.
pub(in crate::server) fn work(kept: &dyn Kept, state: &State, wish: SnapshotWish) -> Event {
    let outcome = caught("snapshot", || run(kept, state, &wish));
    Event::Snapshotted(Box::new(Snapshotted { outcome, answer: wish.answer }))
}

/// Takes note of a snapshot that was taken, or not, and tells whoever waits for it.
pub(in crate::server) fn finish<T>(up: &mut Up<T>, events: &Sender<Event>, done: Snapshotted) {
    let Snapshotted { outcome, answer } = done;
    let _ = answer.send(outcome.map(|(report, after, leftovers)| {
        go_on(up, events, after, leftovers);
        report
    }));
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
fn go_on<T>(up: &mut Up<T>, events: &Sender<Event>, after: After, leftovers: Leftovers) {
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
