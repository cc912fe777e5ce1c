//! Trying again: one request, with all its attempts, until it succeeds or there is no point.

use super::access::Access;
use super::client::{Counters, Host, Registry};
use super::fault::Fault;
use super::refusals::Refusals;
use super::retry::{Backoff, Remedy};
use crate::error::Error;
use crate::limits::{REGISTRY_ATTEMPTS_MAX, REGISTRY_MALFORMED_MAX};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::SemaphorePermit;
use tokio::time;

/// The attempts of one request.
#[derive(Debug)]
pub(super) struct Tries<'a> {
    registry: &'a Registry,
    /// Those of who asks.
    own: &'a Counters,
    host: Arc<Host>,
    access: Arc<Access>,
    /// Of what is asked for.
    refusals: &'a Refusals,
    deadline: Instant,
    backoff: Backoff,
    attempts: u32,
    malformed: u32,
    last: Option<Fault>,
    /// Whether mirrors or peers may serve what the registry does not.
    has_others: bool,
    /// Our turn to ask for all who were refused.
    turn: Option<SemaphorePermit<'a>>,
}

impl<'a> Tries<'a> {
    pub(super) fn new(
        (registry, own): (&'a Registry, &'a Counters),
        host: Arc<Host>,
        (access, refusals): (Arc<Access>, &'a Refusals),
        deadline: Instant,
    ) -> Self {
        let backoff = Backoff::new(fastrand::Rng::new());
        Self {
            registry,
            own,
            host,
            access,
            refusals,
            deadline,
            backoff,
            attempts: 0,
            malformed: 0,
            last: None,
            has_others: false,
            turn: None,
        }
    }

    /// A registry that wants to be left alone is no reason to wait as long as that: mirrors or
    /// peers may be well again before.
    pub(super) const fn by_several_ways(mut self) -> Self {
        self.has_others = true;
        self
    }

    /// The time that is left.
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Waits until an attempt makes sense. Call it before each. `needs_leave` unless there is a way
    /// to the bytes that the registry need not open.
    ///
    /// # Errors
    /// When none does.
    pub(super) async fn before(
        &mut self,
        access: &'a Access,
        needs_leave: bool,
    ) -> Result<(), Error> {
        let lines = [&access.refusals, self.refusals];
        let denied = || lines.iter().find_map(|line| line.last().map(|why| (*line, why)));
        while let Some((line, why)) = denied().filter(|_| needs_leave) {
            if self.turn.is_some() {
                return Ok(());
            }
            self.wait_in_line(access, line, why).await?;
        }
        // Nobody is refused any more: the next who is need not wait for the end of this read.
        self.turn = None;
        Ok(())
    }

    async fn wait_in_line(
        &mut self,
        access: &'a Access,
        line: &'a Refusals,
        why: Fault,
    ) -> Result<(), Error> {
        self.own.credential_waits.fetch_add(1, Ordering::Relaxed);
        let waited = time::timeout_at(self.deadline.into(), access.wait(line)).await;
        match waited {
            Ok(turn) => {
                self.turn = turn;
                Ok(())
            }
            Err(_) => Err(self.given_up(&why)),
        }
    }

    /// Takes note of a success.
    pub(super) fn succeeded(&mut self) {
        self.turn = None;
        self.host.succeeded();
    }

    /// Takes note of a failure and waits as long as that advises.
    ///
    /// # Errors
    /// When there is no point in another attempt.
    pub(super) async fn failed(&mut self, fault: Fault) -> Result<(), Error> {
        self.attempts += u32::from(fault.remedy != Remedy::Hold);
        let mut pause = self.backoff.next_pause();
        match fault.remedy {
            Remedy::Hold => return self.sit_out(fault, pause).await,
            Remedy::Nothing => return Err(self.given_up(&fault)),
            Remedy::Credentials => {
                self.turn = None;
                self.access.deny(self.refusals, fault.clone());
                if self.attempts >= REGISTRY_ATTEMPTS_MAX {
                    return Err(self.given_up(&fault));
                }
                self.last = Some(fault);
                return Ok(());
            }
            Remedy::Few => {
                self.malformed += 1;
                if self.malformed >= REGISTRY_MALFORMED_MAX {
                    return Err(self.given_up(&fault));
                }
            }
            Remedy::Wait => {
                if let Some(asked_for) = fault.retry_after.filter(|_| !self.has_others) {
                    // The jitter comes on top: all who were told so must not come at once.
                    pause = pause.saturating_add(asked_for);
                }
            }
        }
        if self.attempts >= REGISTRY_ATTEMPTS_MAX {
            return Err(self.given_up(&fault));
        }
        let for_others = self.host.take_retry().saturating_sub(pause);
        if pause.saturating_add(for_others) >= self.left() {
            self.host.put_retry_back();
            return Err(self.given_up(&fault));
        }
        tracing::debug!("again in {pause:?} and {for_others:?}: {}", fault.text);
        self.registry.counters.retries.fetch_add(1, Ordering::Relaxed);
        self.own.retries.fetch_add(1, Ordering::Relaxed);
        self.last = Some(fault);
        time::sleep(pause).await;
        if !for_others.is_zero() {
            self.host.turn_comes(for_others).await;
        }
        Ok(())
    }

    /// Waits until who must be asked may be, or for as long as another way may need to be there
    /// again.
    async fn sit_out(&mut self, fault: Fault, another_way: Duration) -> Result<(), Error> {
        let left = fault.retry_after.unwrap_or_default();
        // Those who were told to wait must not come together afterwards.
        let mut pause = left.saturating_add(self.backoff.spread());
        if self.has_others {
            pause = pause.min(another_way);
        }
        let is_too_long = pause >= self.left();
        let why = self.last.get_or_insert(fault).clone();
        if is_too_long {
            return Err(self.given_up(&why));
        }
        time::sleep(pause).await;
        Ok(())
    }

    /// The error of a request that was under way when its deadline passed.
    pub(super) fn too_late(&self) -> Error {
        let slow = Fault::slow("no answer within the deadline");
        match &self.last {
            // What went wrong before is likely to be why there is no answer now.
            Some(last) => self.given_up(last),
            None => self.given_up(&slow),
        }
    }

    fn given_up(&self, fault: &Fault) -> Error {
        let error = fault.error();
        match self.attempts {
            0 | 1 => error,
            count => {
                Error::new(error.kind(), format!("given up after {count} attempts: {}", fault.text))
            }
        }
    }
}
