//! One way to one document or blob: the registry itself, a mirror of it, or a peer.
//!
//! Opening it means to show what is wanted, to renew that when it is refused, and to follow
//! redirects, of which the last is remembered until it ends. What comes back is an answer of status
//! 200 or 206, which still has to be judged.

use super::access::{Access, Granted, Turn};
use super::blob_url::Origin;
use super::client::{Counters, Host, Registry};
use super::fault::Fault;
use super::redirect;
use super::refusals::Refusals;
use super::rest::Rest;
use super::retry::Remedy;
use super::transport::{Answer, Request};
use crate::error::ErrorKind;
use crate::limits::{MIRROR_REST_MS, REDIRECT_RECENT_MS, REDIRECTS_MAX};
use reqwest::Url;
use reqwest::header::{self, HeaderName};
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::time;

/// Requests to a registry for one answer: with something stale, with nothing, with something new,
/// and one more for when others renewed it meanwhile.
const TURNS_MAX: usize = 4;

/// Headers of a request.
pub(super) type Headers = Vec<(HeaderName, String)>;

/// What is wanted of a way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask<'a> {
    pub(super) registry: &'a Registry,
    /// The counters of who asks.
    pub(super) own: &'a Counters,
    pub(super) refusals: &'a Refusals,
    pub(super) headers: &'a Headers,
    /// Whether what came this way before was wrong.
    pub(super) is_suspect: bool,
}

/// One way to one document or blob.
#[derive(Debug)]
pub(super) struct Route {
    url: Url,
    access: Arc<Access>,
    /// Who may see the credentials.
    origin: Option<Origin>,
    followed: Mutex<Option<Followed>>,
    rests_until: Mutex<Instant>,
    /// Whoever is behind this way, for all blobs.
    host: Option<Arc<Host>>,
    /// How long the head of an answer may take; `None` for as long as usual.
    head_max: Option<Duration>,
}

/// Where redirects led.
struct Followed {
    url: Url,
    since: Instant,
    /// Whether the registry was asked because of wrong bytes.
    is_after_wrong_bytes: bool,
    until: Instant,
    /// Whether who is there had trouble of its own before.
    is_doubted: bool,
}

impl std::fmt::Debug for Followed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&redirect::shown(&self.url))
    }
}

impl Route {
    /// The way to the registry itself.
    pub(super) fn new(url: Url, access: Arc<Access>) -> Self {
        let origin = Origin::of(&url);
        let rests_until = Mutex::new(Instant::now());
        let (followed, host, head_max) = (Mutex::default(), None, None);
        Self { url, access, origin, followed, rests_until, host, head_max }
    }

    /// The way by a mirror or a peer at `host`, whose answers begin within `head_max`.
    pub(super) fn aside(
        url: Url,
        access: Arc<Access>,
        host: Option<Arc<Host>>,
        head_max: Duration,
    ) -> Self {
        Self { host, head_max: Some(head_max), ..Self::new(url, access) }
    }

    pub(super) const fn access(&self) -> &Arc<Access> {
        &self.access
    }

    /// Whether this way failed a moment ago.
    pub(super) fn rests(&self) -> bool {
        let rests = |host: &Arc<Host>| host.as_mirror(|rest, now| rest.is_resting(now));
        self.is_left_alone() || self.host.as_ref().is_some_and(rests)
    }

    /// Whether the caller may go this way now; it tells what came of it.
    pub(super) fn begin(&self) -> bool {
        let may = |host: &Arc<Host>| host.as_mirror(Rest::begin);
        !self.is_left_alone() && self.host.as_ref().is_none_or(may)
    }

    /// This way led to the bytes.
    pub(super) fn succeeded(&self) {
        if let Some(host) = &self.host {
            host.as_mirror(Rest::answered);
        }
    }

    /// Leaves this way alone for a while. One that cannot serve this blob may well serve others;
    /// one that cannot be reached serves none.
    pub(super) fn failed(&self, fault: &Fault) {
        if let Some(host) = &self.host {
            if fault.remedy == Remedy::Wait {
                return host.as_mirror(Rest::failed);
            }
            host.as_mirror(Rest::answered);
        }
        let until = Instant::now() + Duration::from_millis(MIRROR_REST_MS);
        *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    fn is_left_alone(&self) -> bool {
        *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner) > Instant::now()
    }

    /// Whether a redirect is known, so that the registry need not be asked.
    pub(super) fn is_resolved(&self) -> bool {
        self.remembered(false).is_some()
    }

    /// An answer of status 200 or 206.
    pub(super) async fn open(&self, to: Ask<'_>) -> Result<Answer, Fault> {
        if let Some(url) = self.remembered(to.is_suspect) {
            let is_ours = self.origin.as_ref().is_some_and(|own| redirect::may_carry(own, &url));
            let granted = if is_ours { self.access.granted().await.ok().flatten() } else { None };
            match self.send(to, &url, granted.as_ref()).await {
                Ok(mut answer) if matches!(answer.status(), 200 | 206) => {
                    answer.is_by_memory = true;
                    return Ok(answer);
                }
                Ok(answer) if is_trouble(answer.status()) => {
                    self.doubt();
                    return Err(answer.fault());
                }
                // What is remembered is as good as before, and the registry knows no better.
                Err(fault) if fault.remedy == Remedy::Hold => return Err(fault),
                // It has ended before its time, or leads nowhere any more: ask for a new one.
                Ok(_) | Err(_) => self.remember(None),
            }
        }
        let mut may_forget = true;
        // What was wanted before it was forgotten, and what became of getting it.
        let mut before = None;
        let mut is_fresh = false;
        let mut refusal = Fault::unauthorized("the registry refuses whatever we show");
        for _ in 0..TURNS_MAX {
            if let Some((wanted, fault)) = &before
                && self.access.still_wants(wanted)
            {
                // Whoever gives it out has trouble, and is not asked twice at once.
                return Err(Fault::clone(fault));
            }
            let granted = match self.access.granted().await {
                Ok(granted) => granted,
                // What was wanted once is not to be had; ask what is wanted now.
                Err(fault) if may_forget && fault.remedy != Remedy::Hold => {
                    may_forget = false;
                    let wanted = self.access.forget();
                    before = wanted
                        .filter(|_| fault.remedy != Remedy::Credentials)
                        .map(|it| (it, fault));
                    continue;
                }
                Err(fault) => return Err(fault),
            };
            may_forget &= granted.is_some();
            let answer = self.send(to, &self.url, granted.as_ref()).await?;
            match answer.status() {
                200 | 206 => {
                    self.let_in(to);
                    return Ok(answer);
                }
                401 | 403 => {
                    refusal = answer.fault();
                    let turn = self.access.refused(granted.as_ref(), is_fresh, &answer);
                    answer.drain().await;
                    if turn == Turn::Denied {
                        return Err(refusal);
                    }
                    is_fresh = true;
                }
                status if redirect::is_redirect(status) => {
                    self.let_in(to);
                    return self.follow(to, answer, granted.as_ref()).await;
                }
                _ => return Err(answer.fault()),
            }
        }
        Err(refusal)
    }

    /// Takes note that who is asked lets us in, whatever the answer.
    fn let_in(&self, to: Ask<'_>) {
        self.access.refusals.allow();
        // A mirror speaks for itself.
        if self.host.is_none() {
            to.refusals.allow();
        }
    }

    async fn send(
        &self,
        to: Ask<'_>,
        url: &Url,
        granted: Option<&Arc<Granted>>,
    ) -> Result<Answer, Fault> {
        let may_carry = self.origin.as_ref().is_some_and(|own| redirect::may_carry(own, url));
        let secret = granted.filter(|_| may_carry).map(|granted| &granted.header);
        let counters = [&to.registry.counters.requests, &to.own.requests];
        let mut request =
            Request::get(url).authorization(secret).head_within(self.head_max).counted_by(counters);
        for (name, value) in to.headers {
            request = request.header(name.clone(), value.as_str());
        }
        if url != &self.url {
            // Some stores let in only who was sent by the registry.
            request = request.header(header::REFERER, redirect::shown(&self.url));
        }
        // Of whoever is asked: those who wait for a store or a token server keep nobody from the
        // registry, nor from another store.
        let host = Origin::of(url).map(|origin| to.registry.host(&origin.host));
        let host = host.ok_or_else(|| Fault::unavailable("no host to ask"))?;
        let turn = Arc::clone(&host.line).acquire_owned();
        let turn = match self.head_max {
            // There is another way than to wait for those who wait for it.
            Some(longest) => time::timeout(longest, turn).await,
            None => Ok(turn.await),
        };
        let lost = || Fault::slow(format!("no turn to ask {}", redirect::shown(url)));
        let turn = turn.ok().and_then(Result::ok).ok_or_else(lost)?;
        Ok(to.registry.transport.send(request).await?.with_turn(turn))
    }

    async fn follow(
        &self,
        to: Ask<'_>,
        first: Answer,
        granted: Option<&Arc<Granted>>,
    ) -> Result<Answer, Fault> {
        let (mut url, mut answer) = (self.url.clone(), first);
        let mut good_for = Duration::MAX;
        for _ in 0..REDIRECTS_MAX {
            let place = answer.place.clone();
            let wrong = |why: &str| Fault::malformed(format!("{why}, by {place}"));
            let location = answer.header(header::LOCATION);
            let location = location.ok_or_else(|| wrong("a redirect to nowhere"))?;
            let next = redirect::target(&url, location).map_err(wrong)?;
            let cache_control = answer.header(header::CACHE_CONTROL);
            let lifetime = redirect::lifetime(&next, cache_control, SystemTime::now());
            good_for = good_for.min(lifetime);
            url = next;
            answer.drain().await;
            let found = |is_doubted: bool| {
                let since = Instant::now();
                Some(Followed {
                    url: url.clone(),
                    since,
                    is_after_wrong_bytes: to.is_suspect,
                    until: since + good_for,
                    is_doubted,
                })
            };
            answer = match self.send(to, &url, granted).await {
                Err(fault) if fault.remedy == Remedy::Hold => {
                    // Or all who wait for that store would ask the registry where it is.
                    self.remember(found(false));
                    return Err(fault);
                }
                sent => sent?,
            };
            match answer.status() {
                200 | 206 => {
                    self.remember(found(false));
                    return Ok(answer);
                }
                status if is_trouble(status) && answer.retry_after().is_some() => {
                    self.remember(found(true));
                    return Err(answer.fault());
                }
                400 | 401 | 403 => {
                    // The store refuses what the registry signed, not us: a clock is wrong, or the
                    // signature ended on the way.
                    let text = answer.fault().text;
                    return Err(Fault::new(Remedy::Few, ErrorKind::Unavailable, text));
                }
                status if redirect::is_redirect(status) => {}
                _ => return Err(answer.fault()),
            }
        }
        let text =
            format!("more than {REDIRECTS_MAX} redirects from {}", redirect::shown(&self.url));
        Err(Fault::malformed(text))
    }

    /// What came by this way was no data; `fault` as it is if the registry was asked where it is.
    pub(super) fn disappointed(&self, is_by_memory: bool, mut fault: Fault) -> Fault {
        if is_by_memory && fault.remedy == Remedy::Nothing {
            // Not what the registry says today.
            self.remember(None);
            fault.remedy = Remedy::Few;
        } else {
            self.doubt();
        }
        fault
    }

    /// A store that fails twice, or whose answers are no data, is not come back to by what is
    /// remembered: the registry may know of another one by now.
    fn doubt(&self) {
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        let was_doubted =
            followed.as_mut().is_some_and(|it| mem::replace(&mut it.is_doubted, true));
        if was_doubted {
            *followed = None;
        }
    }

    /// Where to go without asking; if what came from there is `suspect`, only if the registry has
    /// said so since, and not long ago.
    fn remembered(&self, is_suspect: bool) -> Option<Url> {
        let followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        let longest = Duration::from_millis(REDIRECT_RECENT_MS);
        let is_good = |followed: &&Followed| {
            let is_news = followed.is_after_wrong_bytes && followed.since.elapsed() < longest;
            Instant::now() < followed.until && (!is_suspect || is_news)
        };
        followed.as_ref().filter(is_good).map(|followed| followed.url.clone())
    }

    fn remember(&self, place: Option<Followed>) {
        *self.followed.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }
}

/// Trouble of a store itself, which one more redirect to it would not end.
const fn is_trouble(status: u16) -> bool {
    status == 429 || status >= 500
}
