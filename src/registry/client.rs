//! What all blobs share: clients, credentials, and what is known of hosts and repositories.

use super::access::Access;
use super::blob_url::{BlobPlace, Origin};
use super::credentials::Credentials;
use super::options::Options;
use super::rest::Rest;
use super::retry::Budget;
use super::runtime::Lane;
use super::transport::Transport;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{REGISTRY_HOSTS_MAX, REGISTRY_REQUESTS_AT_ONCE_MAX, TOKENS_MAX};
use reqwest::Url;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tokio::time;

/// The way to registries. One for a process is enough: it keeps connections, tokens and budgets.
#[derive(Debug)]
pub struct Registry {
    pub(super) transport: Arc<Transport>,
    credentials: Arc<Credentials>,
    pub(super) options: Options,
    hosts: Mutex<HashMap<String, Arc<Host>>>,
    repositories: Mutex<HashMap<BlobPlace, Arc<Access>>>,
    pub(super) counters: Counters,
}

/// What was done so far, for those who want to know what a read cost.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) credential_waits: AtomicU64,
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests for blobs and documents, redirects counted; without those for tokens.
    pub requests: u64,
    /// Requests that were made again.
    pub retries: u64,
    /// Bytes of blobs that were received and taken.
    pub bytes: u64,
}

/// What is known of one registry, mirror or store.
#[derive(Debug)]
pub(super) struct Host {
    /// Requests under way.
    pub(super) line: Arc<Semaphore>,
    /// Where those of its blobs run, chosen when there is one.
    lane: OnceLock<Lane>,
    /// Told to those who wait for their turn to try again.
    recovered: Notify,
    state: Mutex<HostState>,
}

#[derive(Debug)]
struct HostState {
    budget: Budget,
    as_mirror: Rest,
}

impl Registry {
    /// The way to registries that `options` describe. Reads certificates; opens no connection.
    ///
    /// # Errors
    /// `InvalidConfig` naming the option; `Io` when files cannot be read.
    pub fn new(mut options: Options) -> Result<Arc<Self>> {
        let is_plain = |url: Url| url.username().is_empty() && url.password().is_none();
        // What follows the mirror's URL is a path: a query would swallow it.
        let is_base = |url: Url| {
            let ends_with_path = url.query().is_none() && url.fragment().is_none();
            ends_with_path && Origin::of(&url).is_some() && is_plain(url)
        };
        if !options.mirrors.iter().all(|mirror| Url::parse(&mirror.url).is_ok_and(is_base)) {
            let message = "mirror: expected https://HOST, without a user, query or fragment";
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        if let Some(prefix) = &mut options.p2p_prefix {
            // The reference's documents have it without, and it is on this host.
            if !prefix.contains("://") {
                prefix.insert_str(0, "http://");
            }
            if !Url::parse(prefix).is_ok_and(is_plain) {
                let message = "p2pConfig: address: expected a URL without a user";
                return Err(Error::new(ErrorKind::InvalidConfig, message));
            }
        }
        let transport = Arc::new(Transport::new(&options)?);
        Ok(Arc::new(Self {
            transport,
            credentials: Arc::new(Credentials::new(&options.credentials)?),
            options,
            hosts: Mutex::default(),
            repositories: Mutex::default(),
            counters: Counters::default(),
        }))
    }

    /// What was done so far, by all blobs together.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let Counters { requests, retries, bytes, .. } = &self.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts { requests: load(requests), retries: load(retries), bytes: load(bytes) }
    }

    pub(super) fn host(&self, name: &str) -> Arc<Host> {
        shared(&self.hosts, REGISTRY_HOSTS_MAX, &name.to_owned(), Host::new)
    }

    pub(super) fn access(&self, place: &BlobPlace) -> Arc<Access> {
        shared(&self.repositories, TOKENS_MAX, place, || {
            let transport = Arc::clone(&self.transport);
            Access::new(place.clone(), transport, Arc::clone(&self.credentials))
        })
    }
}

/// The entry of `key`, made if there is none. A full map is emptied: those in use live on with
/// their users, and the rest is learned again.
fn shared<K: Clone + Eq + Hash, V>(
    map: &Mutex<HashMap<K, Arc<V>>>,
    count_max: usize,
    key: &K,
    make: impl FnOnce() -> V,
) -> Arc<V> {
    let mut map = map.lock().unwrap_or_else(PoisonError::into_inner);
    if map.len() >= count_max && !map.contains_key(key) {
        map.clear();
    }
    Arc::clone(map.entry(key.clone()).or_insert_with(|| Arc::new(make())))
}

impl Host {
    fn new() -> Self {
        let now = Instant::now();
        let budget = Budget::new(now);
        let state = HostState { budget, as_mirror: Rest::new(now) };
        let line = Arc::new(Semaphore::new(REGISTRY_REQUESTS_AT_ONCE_MAX));
        let (lane, recovered) = (OnceLock::new(), Notify::new());
        Self { line, lane, recovered, state: Mutex::new(state) }
    }

    /// The executor for what this registry has.
    ///
    /// # Errors
    /// `Io` when its threads cannot be started.
    pub(super) fn executor(&self) -> Result<Handle> {
        self.lane.get_or_init(Lane::next).executor()
    }

    fn with<T>(&self, act: impl FnOnce(&mut HostState) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What to know and to note of this host as a mirror or peer.
    pub(super) fn as_mirror<T>(&self, act: impl FnOnce(&mut Rest, Instant) -> T) -> T {
        self.with(|state| act(&mut state.as_mirror, Instant::now()))
    }

    pub(super) fn take_retry(&self) -> Duration {
        self.with(|state| state.budget.take(Instant::now()))
    }

    pub(super) fn put_retry_back(&self) {
        self.with(|state| state.budget.put_back());
    }

    pub(super) fn succeeded(&self) {
        self.with(|state| state.budget.succeeded());
        // Two for each: a host that is back is soon asked by all, one that often fails is not.
        self.recovered.notify_one();
        self.recovered.notify_one();
    }

    /// Waits for so long, the turn that [`Host::take_retry`] promised, or until the host answers
    /// somebody else.
    pub(super) async fn turn_comes(&self, pause: Duration) {
        tokio::select! {
            () = time::sleep(pause) => {}
            () = self.recovered.notified() => self.put_retry_back(),
        }
    }
}
