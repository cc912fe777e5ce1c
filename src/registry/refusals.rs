//! Those who were refused: they wait in one line, and the first of them asks again for all.
//!
//! A repository has one, for credentials that do not work, and so has each of its blobs: who may
//! not have that one (403, as a scanner of images says it) may well have the others.

use super::credentials::Stamp;
use super::fault::Fault;
use crate::limits::{CREDENTIAL_LOOK_MS, UNAUTHORIZED_PAUSE_MS_MAX};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time;

/// The first pause before a registry is asked again that refused; each next one is twice as long.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(2);

/// The last refusal, as long as it stands, and the line of those who wait.
#[derive(Debug)]
pub(super) struct Refusals {
    denied: watch::Sender<Option<Denied>>,
    line: Semaphore,
}

#[derive(Clone, Debug)]
struct Denied {
    why: Fault,
    /// What the credential files looked like when they were read; `None` before anybody looked,
    /// because the registry asked for none.
    stamp: Option<Stamp>,
    asked_at: Instant,
    /// How often it was asked again since the credentials changed, by all who wait.
    asks: u32,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { denied: watch::Sender::new(None), line: Semaphore::new(1) }
    }
}

impl Refusals {
    /// The last refusal, if it still stands.
    pub(super) fn last(&self) -> Option<Fault> {
        self.denied.borrow().as_ref().map(|denied| denied.why.clone())
    }

    /// Takes note of a refusal, with files that looked like `stamp`.
    pub(super) fn deny(&self, why: Fault, stamp: Option<Stamp>) {
        self.denied.send_modify(|denied| {
            // Those who come later do not begin anew with what was refused.
            let before = denied.take().filter(|denied| denied.stamp == stamp);
            let asks = before.map_or(0, |denied| denied.asks);
            *denied = Some(Denied { why, stamp, asked_at: Instant::now(), asks });
        });
    }

    /// The registry lets us in: nobody needs to wait any more.
    pub(super) fn allow(&self) {
        self.denied.send_if_modified(|denied| denied.take().is_some());
    }

    /// Waits for one's turn to ask again, or until nobody needs to any more (`None`). `look` tells
    /// what the credential files look like now, or nothing; `seen` is told that, and whether they
    /// have changed since the refusal.
    pub(super) async fn wait<F: Future<Output = Option<Stamp>>>(
        &self,
        look: impl Fn() -> F,
        seen: impl Fn(&Stamp, bool),
    ) -> Option<SemaphorePermit<'_>> {
        let mut told = self.denied.subscribe();
        tokio::select! {
            turn = self.turn(look, seen) => turn,
            _ = told.wait_for(Option::is_none) => None,
        }
    }

    async fn turn<F: Future<Output = Option<Stamp>>>(
        &self,
        look: impl Fn() -> F,
        seen: impl Fn(&Stamp, bool),
    ) -> Option<SemaphorePermit<'_>> {
        let permit = self.line.acquire().await.ok();
        loop {
            let denied = self.denied.borrow().clone()?;
            let longest = Duration::from_millis(UNAUTHORIZED_PAUSE_MS_MAX);
            let pause = ASK_AGAIN.saturating_mul(1 << denied.asks.min(16)).min(longest);
            if denied.asked_at.elapsed() >= pause {
                self.change(|denied| denied.asks = denied.asks.saturating_add(1));
                return permit;
            }
            if let Some(now) = look().await {
                let is_changed = denied.stamp.is_some_and(|before| before != now);
                seen(&now, is_changed);
                if is_changed {
                    return permit;
                }
                self.change(|denied| denied.stamp = denied.stamp.take().or(Some(now)));
            }
            time::sleep(Duration::from_millis(CREDENTIAL_LOOK_MS)).await;
        }
    }

    fn change(&self, change: impl FnOnce(&mut Denied)) {
        self.denied.send_if_modified(|denied| {
            if let Some(denied) = denied {
                change(denied);
            }
            // Who waits for the end of it need not look.
            false
        });
    }
}
