//! A registry that does what it is told: for tests in their own process, and as a program.
//!
//! It speaks HTTP/1.1 on a loopback port, one thread for each connection, and plays every part: the
//! registry, the token server and the store that redirects lead to. What goes wrong is either told
//! request by request ([`Mock::fail`]) or drawn by lot from a seed ([`Mock::chaos`]); a log keeps
//! every request. Nothing here is fast or safe: it is a test's counterpart.

// Each user of this module takes a part of it.
#![allow(dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
#![allow(clippy::cast_possible_truncation)]

pub(crate) mod answer;
pub(crate) mod fault;
pub(crate) mod wire;

pub(crate) use answer::{Auth, Content};
pub(crate) use fault::{Fault, Part, Rule};

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

/// One request as it came, and what became of it.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) part: Part,
    pub(crate) target: String,
    pub(crate) authorization: Option<String>,
    pub(crate) range: Option<String>,
    pub(crate) referer: Option<String>,
    pub(crate) status: u16,
    pub(crate) at: Instant,
}

/// What a mock serves and how.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) content: Content,
    pub(crate) auth: Auth,
    /// Where blobs are redirected to (`http://HOST`), and for how many milliseconds that is good.
    pub(crate) redirect: Option<(String, u64)>,
    pub(crate) rules: VecDeque<Rule>,
    pub(crate) chaos: Option<Chaos>,
    pub(crate) log: Vec<Record>,
    pub(crate) tokens: HashMap<String, Instant>,
    pub(crate) requests: u64,
}

/// Faults by lot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chaos {
    pub(crate) percent: u64,
    pub(crate) seed: u64,
}

/// What the threads of one mock share.
#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    stopped: AtomicBool,
    pub(crate) address: SocketAddr,
    pub(crate) started: Instant,
    tls: Option<Arc<rustls::ServerConfig>>,
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A running mock. It ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Mock {
    pub(crate) shared: Arc<Shared>,
}

impl Mock {
    /// A mock on a free port of the loopback.
    pub(crate) fn start() -> Self {
        Self::start_at("127.0.0.1:0", None)
    }

    /// A mock that speaks TLS with that certificate.
    pub(crate) fn start_tls(tls: Arc<rustls::ServerConfig>) -> Self {
        Self::start_at("127.0.0.1:0", Some(tls))
    }

    pub(crate) fn start_at(address: &str, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind(address).expect("listen");
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            stopped: AtomicBool::new(false),
            address: listener.local_addr().unwrap(),
            started: Instant::now(),
            tls,
        });
        let served = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, &served));
        Self { shared }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    /// `http://127.0.0.1:PORT`, or https.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.shared.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.shared.address)
    }

    pub(crate) fn host(&self) -> String {
        self.shared.address.to_string()
    }

    /// The `repoBlobUrl` of a repository.
    pub(crate) fn blobs_of(&self, repository: &str) -> String {
        format!("{}/v2/{repository}/blobs", self.url())
    }

    /// Does `fault` to the next `times` requests for `part`.
    pub(crate) fn fail(&self, part: Part, times: u64, fault: Fault) {
        self.state().rules.push_back(Rule { part, times, fault });
    }

    /// Does something to so many of a hundred requests.
    pub(crate) fn chaos(&self, percent: u64, seed: u64) {
        self.state().chaos = (percent > 0).then_some(Chaos { percent, seed });
    }

    /// Requests for that part since the start.
    pub(crate) fn count(&self, part: Part) -> usize {
        self.state().log.iter().filter(|record| record.part == part).count()
    }

    /// The requests for that part, in their order.
    pub(crate) fn log(&self, part: Part) -> Vec<Record> {
        self.state().log.iter().filter(|record| record.part == part).cloned().collect()
    }

    /// Forgets what was asked so far.
    pub(crate) fn clear(&self) {
        self.state().log.clear();
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // The accepting thread sleeps in `accept`; this is what wakes it.
        let _ = TcpStream::connect(self.shared.address);
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.stopped.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            // A client that goes away is a normal end.
            let _ = wire::serve(stream, &shared, shared.tls.clone());
        });
    }
}
