//! One blob, fetched by ranges.

use super::blob_url::{BlobPlace, Origin};
use super::client::{Counters, Host, Registry};
use super::digest::Digest;
use super::fault::Fault;
use super::range::{self, Accepted, Asked, Refusal};
use super::refusals::Refusals;
use super::route::{Ask, Route};
use super::runtime;
use super::transport::Answer;
use super::tries::Tries;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::{
    BLOB_REQUESTS_AT_ONCE_MAX, REGISTRY_PIECE_BYTES_MAX, REGISTRY_PIECES_AT_ONCE_MAX,
};
use crate::source::{Fetch, FetchUsage, too_short};
use crate::units::{to_u64, to_usize};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use reqwest::{Url, header};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time;

/// A blob in a registry: implements [`Fetch`]. Its calls block, and are for threads that are not an
/// executor's, whose other tasks they would stop.
///
/// A fetch is a task beside those of its connections: on the executor's threads, and not on the one
/// that waits for it, which else would be woken for each piece of a body that comes in.
#[derive(Debug)]
pub struct Blob {
    parts: Arc<Parts>,
}

/// What its fetches share.
#[derive(Debug)]
struct Parts {
    registry: Arc<Registry>,
    name: String,
    /// Its length, once it is known.
    bytes: OnceLock<u64>,
    host: Arc<Host>,
    /// That of the host.
    executor: Handle,
    /// The registry itself is the last.
    routes: Vec<Route>,
    /// Requests under way, so that one slow blob does not take all those of its host.
    line: Semaphore,
    refusals: Refusals,
    /// Whether nobody waits any more.
    canceled: watch::Sender<bool>,
    counters: Counters,
}

/// Which ways may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ways {
    /// All: peers and mirrors first.
    All,
    /// That to the registry itself: what another one gave was wrong.
    Own,
}

/// A part of the blob on its way into memory.
struct Piece<'a> {
    offset_bytes: u64,
    dst: &'a mut [u8],
    /// Bytes of `dst` that have come.
    done: usize,
    total_bytes: Option<u64>,
}

impl Piece<'_> {
    /// What is still missing.
    fn missing(&self) -> Range<u64> {
        self.offset_bytes + to_u64(self.done)..self.offset_bytes + to_u64(self.dst.len())
    }
}

impl Registry {
    /// The blob `digest` of the repository at `repo_blob_url`. `bytes` is its length as a config or
    /// manifest says it (a config's 0 means that it does not know); without, the registry is asked,
    /// which blocks until `deadline` at most.
    ///
    /// # Errors
    /// `InvalidConfig` for an unusable URL or digest; `Io` when threads cannot be started; why the
    /// length could not be had.
    pub fn blob(
        self: &Arc<Self>,
        repo_blob_url: &str,
        digest: &str,
        bytes: Option<u64>,
        deadline: Instant,
    ) -> Result<Blob> {
        let place = BlobPlace::parse(repo_blob_url)?;
        let digest = Digest::parse(digest)?;
        let host = self.host(&place.origin().host);
        let parts = Parts {
            registry: Arc::clone(self),
            name: format!("{} {digest}", place.origin().host),
            bytes: bytes.map_or_else(OnceLock::new, OnceLock::from),
            executor: host.executor()?,
            host,
            routes: self.routes(&place, &digest)?,
            line: Semaphore::new(BLOB_REQUESTS_AT_ONCE_MAX),
            refusals: Refusals::default(),
            canceled: watch::Sender::new(false),
            counters: Counters::default(),
        };
        let parts = Arc::new(parts);
        if bytes.is_none() {
            let what = format!("ask for the length of {}", parts.name);
            let asking = Arc::clone(&parts);
            let asking = async move { asking.length(deadline).await };
            let asked = runtime::run(&parts.executor, deadline, || true, asking);
            let length = asked.map_err(|lost| lost.error(&what))?.context(|| what)?;
            parts.bytes.get_or_init(|| length);
        }
        Ok(Blob { parts })
    }

    fn routes(&self, place: &BlobPlace, digest: &Digest) -> Result<Vec<Route>> {
        let aside = |url: Url, place: &BlobPlace| {
            let host = Origin::of(&url).map(|origin| self.host(&origin.host));
            Route::aside(url, self.access(place), host, self.options.pace.mirror_head)
        };
        let parse = |text: String| {
            let invalid = |error| {
                let message = format!("URL of a blob below {place}: {error}");
                Error::new(ErrorKind::InvalidConfig, message)
            };
            Url::parse(&text).map_err(invalid)
        };
        let own = place.url_of(digest);
        let mut routes = Vec::new();
        if let Some(prefix) = &self.options.p2p_prefix {
            let url = parse(format!("{}/{own}", prefix.trim_end_matches('/')))?;
            routes.push(aside(url, place));
        }
        let host = &place.origin().host;
        for mirror in self.options.mirrors.iter().filter(|mirror| &mirror.of_host == host) {
            let mut url = parse(place.url_at(&mirror.url, digest))?;
            let mirrored = BlobPlace::parse(&place.repository_at(&mirror.url))?;
            url.query_pairs_mut().append_pair("ns", host);
            routes.push(aside(url, &mirrored));
        }
        routes.push(Route::new(parse(own)?, self.access(place)));
        Ok(routes)
    }
}

impl Parts {
    fn bytes(&self) -> u64 {
        self.bytes.get().copied().unwrap_or(0)
    }

    async fn length(&self, deadline: Instant) -> Result<u64> {
        let half = deadline.saturating_duration_since(Instant::now()) / 2;
        // A mirror's word is not checked by anything yet, and is asked for where there is no other.
        let until = if self.routes.len() > 1 { deadline - half } else { deadline };
        let own = self.total(Ways::Own, until).await;
        let total = match own {
            Err(_) if self.routes.len() > 1 => self.total(Ways::All, deadline).await?,
            own => own?,
        };
        let none = "the registry does not say how long the blob is";
        total.ok_or_else(|| Error::new(ErrorKind::Corrupt, none))
    }

    async fn total(&self, ways: Ways, deadline: Instant) -> Result<Option<u64>> {
        let mut first = [0];
        let piece = Piece { offset_bytes: 0, dst: &mut first, done: 0, total_bytes: None };
        self.piece(piece, ways, deadline).await
    }

    async fn pieces(
        &self,
        offset_bytes: u64,
        dst: &mut [u8],
        ways: Ways,
        deadline: Instant,
    ) -> Result<()> {
        let piece_bytes = to_usize(REGISTRY_PIECE_BYTES_MAX).unwrap_or(usize::MAX);
        let starts = (offset_bytes..).step_by(piece_bytes);
        // All of them before the first: that they are futures of one lifetime must be seen.
        let mut pieces = Vec::with_capacity(dst.len().div_ceil(piece_bytes));
        for (offset_bytes, dst) in starts.zip(dst.chunks_mut(piece_bytes)) {
            let piece = Piece { offset_bytes, dst, done: 0, total_bytes: Some(self.bytes()) };
            pieces.push(self.piece(piece, ways, deadline));
        }
        let all = stream::iter(pieces).buffer_unordered(REGISTRY_PIECES_AT_ONCE_MAX);
        all.try_for_each(|_| std::future::ready(Ok(()))).await
    }

    /// Fetches one piece, with all attempts that it takes. Returns the blob's length.
    async fn piece(
        &self,
        mut piece: Piece<'_>,
        ways: Ways,
        deadline: Instant,
    ) -> Result<Option<u64>> {
        let Some(own) = self.routes.last() else {
            return Err(Error::new(ErrorKind::InvalidConfig, "there is no way to the blob"));
        };
        let (host, leave) = (Arc::clone(&self.host), (Arc::clone(own.access()), &self.refusals));
        let mut tries = Tries::new((&self.registry, &self.counters), host, leave, deadline);
        if ways == Ways::All && self.routes.len() > 1 {
            tries = tries.by_several_ways();
        }
        loop {
            let told = piece.missing();
            let told = || format!("fetch bytes {} to {} of {}", told.start, told.end, self.name);
            let trying = async {
                tries.before(own.access(), !self.has_another_way(own, ways)).await?;
                Ok(self.attempt(&mut piece, ways).await)
            };
            let outcome = match time::timeout_at(deadline.into(), trying).await {
                Ok(outcome) => outcome.context(told)?,
                Err(_) => return Err(tries.too_late().context(told())),
            };
            match outcome {
                Ok(accepted) => {
                    tries.succeeded();
                    return Ok(accepted.total_bytes);
                }
                Err(fault) => tries.failed(fault).await.context(told)?,
            }
        }
    }

    /// Whether an attempt may succeed while the registry refuses to let us in.
    fn has_another_way(&self, own: &Route, ways: Ways) -> bool {
        let mut others = self.routes.iter().rev().skip(1);
        own.is_resolved() || ways == Ways::All && others.any(|route| !route.rests())
    }

    async fn attempt(&self, piece: &mut Piece<'_>, ways: Ways) -> Result<Accepted, Fault> {
        let lost = |_| Fault::unavailable("the line of requests is closed");
        let _own_turn = self.line.acquire().await.map_err(lost)?;
        let mut failed = None;
        for (number, route) in (1..).zip(&self.routes) {
            let is_last = number == self.routes.len();
            if !is_last && (ways == Ways::Own || !route.begin()) {
                continue;
            }
            match self.attempt_by(route, ways, piece).await {
                Ok(accepted) => {
                    route.succeeded();
                    return Ok(accepted);
                }
                Err(fault) if is_last => return Err(fault),
                Err(fault) => {
                    tracing::debug!("another way failed, next one: {}", fault.text);
                    route.failed(&fault);
                    failed = Some(fault);
                }
            }
        }
        Err(failed.unwrap_or_else(|| Fault::unavailable("there is no way to the blob")))
    }

    async fn attempt_by(
        &self,
        route: &Route,
        ways: Ways,
        piece: &mut Piece<'_>,
    ) -> Result<Accepted, Fault> {
        let asked = Asked { bytes: piece.missing(), total_bytes: piece.total_bytes };
        let wanted = format!("bytes={}-{}", asked.bytes.start, asked.bytes.end - 1);
        let headers = vec![(header::RANGE, wanted)];
        let (registry, own, refusals) = (&*self.registry, &self.counters, &self.refusals);
        let is_suspect = ways == Ways::Own;
        let ask = Ask { registry, own, refusals, headers: &headers, is_suspect };
        let answer = route.open(ask).await?;
        let is_by_memory = answer.is_by_memory;
        let received = self.receive(&asked, answer, piece).await;
        received.map_err(|fault| route.disappointed(is_by_memory, fault))
    }

    /// Takes the answer's body, if it is what was asked for.
    async fn receive(
        &self,
        asked: &Asked,
        answer: Answer,
        piece: &mut Piece<'_>,
    ) -> Result<Accepted, Fault> {
        let refused = |refusal: Refusal| {
            let fault = Fault::malformed(format!("{}: {refusal}", answer.place));
            match refusal {
                Refusal::OtherLength { .. } => fault.hopeless(),
                Refusal::Malformed(_) => fault,
            }
        };
        let encodings = answer.headers().get_all(header::CONTENT_ENCODING);
        let head = range::Answer {
            status: answer.status(),
            content_ranges: &answer.all(header::CONTENT_RANGE),
            content_length: answer.content_length(),
            // What is there and no text is an encoding that we do not know.
            content_encodings: &encodings
                .iter()
                .map(|value| value.to_str().unwrap_or("?"))
                .collect::<Vec<_>>(),
        };
        let accepted = range::judge(asked, &head).map_err(refused)?;
        let place = answer.place.clone();
        let before = piece.done;
        let mut body = answer.body();
        loop {
            let bytes = match body.next().await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => break,
                // Everything that was asked for is here; only the end of the answer is not.
                Err(_) if piece.done == piece.dst.len() => break,
                // What came is the beginning of the right range, and is kept.
                Err(fault) => return Err(fault),
            };
            let bytes = bytes.as_ref();
            let room = piece.dst.get_mut(piece.done..).unwrap_or_default();
            let take = bytes.len().min(room.len());
            if let (Some(to), Some(from)) = (room.get_mut(..take), bytes.get(..take)) {
                to.copy_from_slice(from);
            }
            piece.done += take;
            self.registry.counters.bytes.fetch_add(to_u64(take), Ordering::Relaxed);
            if take < bytes.len() {
                if !accepted.ends {
                    break;
                }
                piece.done = before;
                return Err(Fault::malformed(format!("a body longer than told from {place}")));
            }
        }
        if piece.done < piece.dst.len() {
            piece.done = before;
            return Err(Fault::malformed(format!("a body shorter than told from {place}")));
        }
        Ok(accepted)
    }

    /// Fills `dst`, until `deadline` at most or until nobody waits any more.
    async fn fetch(
        &self,
        ways: Ways,
        offset_bytes: u64,
        dst: &mut [u8],
        deadline: Instant,
    ) -> Result<()> {
        let end = offset_bytes.checked_add(to_u64(dst.len()));
        if end.is_none_or(|end| end > self.bytes()) {
            let (length, have) = (dst.len(), self.bytes());
            let message = format!(
                "fetch {length} bytes at byte {offset_bytes} of {}: it has only {have} bytes",
                self.name
            );
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        let canceled = || Error::new(ErrorKind::Canceled, "the reader is going away");
        let mut told = self.canceled.subscribe();
        tokio::select! {
            // What was told before counts, too.
            _ = told.wait_for(|canceled| *canceled) => Err(canceled()),
            fetched = self.pieces(offset_bytes, dst, ways, deadline) => fetched,
        }
    }
}

impl Blob {
    /// Fetches into memory of its own, for callers that lend none.
    fn fetch_copied(&self, what: (u64, bool), dst: &mut [u8], deadline: Instant) -> Result<()> {
        let (memory, fetched) = self.fetch_lent(what, vec![0; dst.len()], dst.len(), deadline);
        fetched?;
        dst.copy_from_slice(&memory);
        Ok(())
    }
}

impl Fetch for Blob {
    fn name(&self) -> &str {
        &self.parts.name
    }

    fn bytes(&self) -> u64 {
        self.parts.bytes()
    }

    fn fetch(&self, offset_bytes: u64, dst: &mut [u8], deadline: Instant) -> Result<()> {
        self.fetch_copied((offset_bytes, false), dst, deadline)
    }

    fn fetch_from_origin(
        &self,
        offset_bytes: u64,
        dst: &mut [u8],
        deadline: Instant,
    ) -> Result<()> {
        self.fetch_copied((offset_bytes, true), dst, deadline)
    }

    fn fetch_lent(
        &self,
        (offset_bytes, from_origin): (u64, bool),
        mut memory: Vec<u8>,
        length: usize,
        deadline: Instant,
    ) -> (Vec<u8>, Result<()>) {
        let ways = if from_origin { Ways::Own } else { Ways::All };
        let parts = Arc::clone(&self.parts);
        // The memory is the task's as long as it runs.
        let fetch = async move {
            let fetched = match memory.get_mut(..length) {
                Some(dst) => parts.fetch(ways, offset_bytes, dst, deadline).await,
                None => Err(too_short(&parts.name, length)),
            };
            (memory, fetched)
        };
        let is_wanted = || !*self.parts.canceled.borrow();
        let done = runtime::run(&self.parts.executor, deadline, is_wanted, fetch);
        done.unwrap_or_else(|lost| {
            (Vec::new(), Err(lost.error(&format!("fetch {}", self.parts.name))))
        })
    }

    fn usage(&self) -> FetchUsage {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FetchUsage {
            requests: load(&self.parts.counters.requests),
            retries: load(&self.parts.counters.retries),
            credential_waits: load(&self.parts.counters.credential_waits),
        }
    }

    fn cancel(&self) {
        self.parts.canceled.send_replace(true);
    }
}
