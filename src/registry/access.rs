//! Leave to read one repository: what to show, when to renew it, and how to wait for it.
//!
//! The state is small and locked for moments only. Whatever takes time, a token server or a
//! credential helper, is one task for all who wait ([`Flight`]). A repository that refuses what we
//! have is *denied*: those who want to read it wait in one line, and the first of them looks at the
//! credentials and asks the registry again from time to time; when that succeeds, all go on.

use super::blob_url::BlobPlace;
use super::challenge::{self, Wanted};
use super::credential_file::Credential;
use super::credentials::{Credentials, Stamp};
use super::fault::Fault;
use super::flight::Flight;
use super::secret::Secret;
use super::token::{self, Wish};
use super::transport::{Answer, Transport};
use crate::limits::{CREDENTIAL_LOOK_MS, UNAUTHORIZED_PAUSE_MS_MAX};
use reqwest::header;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time;

/// The first pause before a registry is asked again that refused; each next one is twice as long.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// How long it may take to get what is wanted: longer than a credential helper and a token server
/// together, so that it ends only what would never end, like a file on a disk that hangs.
const OBTAIN_MAX: Duration = Duration::from_secs(60);

/// What is shown to a registry.
#[derive(Debug)]
pub(super) struct Granted {
    pub(super) header: Secret,
    /// Passwords have no end.
    end: Option<Instant>,
    /// From when on a successor is got, while this one still serves.
    renew_at: Option<Instant>,
}

impl Granted {
    fn is_good(&self, now: Instant) -> bool {
        self.end.is_none_or(|end| now < end)
    }
}

/// Leave to read one repository.
#[derive(Debug)]
pub(super) struct Access {
    place: BlobPlace,
    transport: Arc<Transport>,
    credentials: Arc<Credentials>,
    state: Mutex<State>,
    flight: Flight<Obtained>,
    line: Semaphore,
    /// How long a flight may take.
    obtain_max: Duration,
}

/// What came of getting what was wanted, which may be something else by now.
#[derive(Clone, Debug)]
struct Obtained {
    wanted: Wanted,
    granted: Result<Arc<Granted>, Fault>,
}

#[derive(Debug, Default)]
struct State {
    wanted: Option<Wanted>,
    granted: Option<Arc<Granted>>,
    denied: Option<Denied>,
    /// What the credential files looked like before they were read last; `None` before anybody
    /// looked, because the registry asked for none.
    stamp: Option<Stamp>,
}

#[derive(Clone, Debug)]
struct Denied {
    why: Fault,
    stamp: Option<Stamp>,
    asked_at: Instant,
    /// How often it was asked again since the credentials changed, by all who wait.
    asks: u32,
}

/// What may be tried against a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Something else can be shown now.
    Again,
    /// What was refused is the newest that we can get.
    Denied,
}

impl Access {
    pub(super) fn new(
        place: BlobPlace,
        transport: Arc<Transport>,
        credentials: Arc<Credentials>,
    ) -> Self {
        let (state, flight) = (Mutex::default(), Flight::default());
        let (line, obtain_max) = (Semaphore::new(1), OBTAIN_MAX);
        Self { place, transport, credentials, state, flight, line, obtain_max }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to show now: nothing, as long as nobody asked for anything.
    pub(super) async fn granted(self: &Arc<Self>) -> Result<Option<Arc<Granted>>, Fault> {
        let now = Instant::now();
        {
            let state = self.state();
            let Some(wanted) = state.wanted.clone() else { return Ok(None) };
            if let Some(granted) = state.granted.as_ref().filter(|granted| granted.is_good(now)) {
                let granted = Arc::clone(granted);
                drop(state);
                if granted.renew_at.is_some_and(|at| now >= at) {
                    let access = Arc::clone(self);
                    self.flight.begin(move || access.obtained(wanted));
                }
                return Ok(Some(granted));
            }
        }
        self.renewed().await.map(Some)
    }

    async fn renewed(self: &Arc<Self>) -> Result<Arc<Granted>, Fault> {
        let wanted = self.state().wanted.clone();
        let lost = || Fault::unavailable("the request for a token was lost");
        let wanted = wanted.ok_or_else(lost)?;
        // A flight that is under way may be for what was wanted before; the next one is not.
        for _ in 0..2 {
            let (access, wish) = (Arc::clone(self), wanted.clone());
            let obtained = self.flight.join(move || access.obtained(wish)).await;
            let obtained = obtained.ok_or_else(lost)?;
            if obtained.wanted == wanted {
                return obtained.granted;
            }
        }
        Err(lost())
    }

    /// What is wanted, in bounded time: all join a flight that is under way, and one that never
    /// lands would be the last.
    async fn obtained(self: Arc<Self>, wanted: Wanted) -> Obtained {
        let granted = time::timeout(self.obtain_max, self.obtain(&wanted)).await;
        let granted = granted.unwrap_or_else(|_| {
            let (place, longest) = (&self.place, self.obtain_max);
            Err(Fault::slow(format!("no credentials for {place} within {longest:?}")))
        });
        Obtained { wanted, granted }
    }

    async fn obtain(&self, wanted: &Wanted) -> Result<Arc<Granted>, Fault> {
        let (origin, repository) = (self.place.origin(), self.place.repository());
        let url = self.place.to_string();
        let stamp = self.credentials.stamp().await;
        self.state().stamp = Some(stamp);
        let credential = self.credentials.find(origin, repository, &url).await?;
        let now = Instant::now();
        let granted = match wanted {
            Wanted::Basic => {
                let header = credential.as_ref().and_then(Credential::basic);
                let none = || Fault::unauthorized(format!("{} wants a password", self.place));
                Granted { header: header.ok_or_else(none)?, end: None, renew_at: None }
            }
            Wanted::Bearer { realm, service, scope } => {
                let wish = Wish {
                    realm,
                    service: service.as_deref(),
                    scope: scope.as_deref(),
                    repository,
                };
                let token = token::get(&self.transport, origin, &wish, credential.as_ref()).await?;
                let end = Some(now + token.good_for);
                // The last quarter is time enough for a few tries.
                let renew_at = Some(now + token.good_for.mul_f64(0.75));
                Granted { header: token.header, end, renew_at }
            }
        };
        let granted = Arc::new(granted);
        let mut state = self.state();
        if state.wanted.as_ref() == Some(wanted) {
            state.granted = Some(Arc::clone(&granted));
        }
        drop(state);
        Ok(granted)
    }

    /// Deals with a 401 or 403 that `sent` met. `is_fresh` when it was got only now, so that a
    /// refusal of it is meant.
    pub(super) fn refused(
        &self,
        sent: Option<&Arc<Granted>>,
        is_fresh: bool,
        answer: &Answer,
    ) -> Turn {
        let wanted = challenge::wanted(answer.all(header::WWW_AUTHENTICATE));
        let mut state = self.state();
        let Some(sent) = sent else {
            if state.granted.is_some() {
                // Somebody has learned meanwhile what is wanted, and got it.
                return Turn::Again;
            }
            let turn = if wanted.is_some() { Turn::Again } else { Turn::Denied };
            (state.wanted, state.granted) = (wanted, None);
            return turn;
        };
        if state.granted.as_ref().is_some_and(|newest| newest.header != sent.header) {
            // Somebody has renewed it meanwhile. (A password that was read again is the same.)
            return Turn::Again;
        }
        let was_basic = state.wanted == Some(Wanted::Basic);
        state.granted = None;
        match wanted {
            _ if is_fresh => Turn::Denied,
            Some(Wanted::Bearer { .. }) => {
                state.wanted = wanted;
                Turn::Again
            }
            // A password that was good may have been changed: it is read again.
            _ if was_basic => Turn::Again,
            // Some answer a stale token by asking for a password, some not at all. What they want
            // of those who show nothing is what they really want.
            _ => {
                state.wanted = None;
                Turn::Again
            }
        }
    }

    /// Forgets what was asked for, which led nowhere; what that was. `None` when others have got it
    /// meanwhile, or something else.
    pub(super) fn forget(&self) -> Option<Wanted> {
        let mut state = self.state();
        if state.granted.as_ref().is_some_and(|granted| granted.is_good(Instant::now())) {
            return None;
        }
        state.granted = None;
        state.wanted.take()
    }

    /// Whether just that is asked for now.
    pub(super) fn still_wants(&self, before: &Wanted) -> bool {
        self.state().wanted.as_ref() == Some(before)
    }

    /// The last refusal, if it still stands.
    pub(super) fn denied(&self) -> Option<Fault> {
        self.state().denied.as_ref().map(|denied| denied.why.clone())
    }

    /// Takes note that a request was refused for good.
    pub(super) fn deny(&self, why: Fault) {
        let mut state = self.state();
        state.granted = None;
        let stamp = state.stamp.clone();
        // Those who come later do not begin anew with what was refused.
        let before = state.denied.take().filter(|denied| denied.stamp == stamp);
        let asks = before.map_or(0, |denied| denied.asks);
        state.denied = Some(Denied { why, stamp, asked_at: Instant::now(), asks });
    }

    /// Takes note that a request was answered.
    pub(super) fn allow(&self) {
        self.state().denied = None;
    }

    /// Takes note of what the credential files look like now; whether that is not what they looked
    /// like `before`.
    fn note(&self, now: Stamp, before: Option<Stamp>) -> bool {
        let is_changed = before.is_some_and(|before| before != now);
        let mut state = self.state();
        if is_changed || state.stamp.is_none() {
            state.stamp = Some(now.clone());
        }
        if let Some(denied) = &mut state.denied {
            denied.stamp.get_or_insert(now);
        }
        is_changed
    }

    /// Waits until it makes sense to ask again, for as long as the caller lets it. Whoever gets a
    /// permit asks for all others, and keeps it meanwhile.
    pub(super) async fn wait(&self) -> Option<SemaphorePermit<'_>> {
        let permit = self.line.acquire().await.ok();
        loop {
            // Those before us got in: nobody needs to wait any more.
            let denied = self.state().denied.clone()?;
            let longest = Duration::from_millis(UNAUTHORIZED_PAUSE_MS_MAX);
            let pause = ASK_AGAIN.saturating_mul(1 << denied.asks.min(16)).min(longest);
            if denied.asked_at.elapsed() >= pause {
                if let Some(denied) = &mut self.state().denied {
                    denied.asks = denied.asks.saturating_add(1);
                }
                return permit;
            }
            let look_every = Duration::from_millis(CREDENTIAL_LOOK_MS);
            // A disk that hangs tells nothing, and keeps nobody from asking.
            let looked = time::timeout(look_every, self.credentials.stamp()).await;
            if looked.is_ok_and(|now| self.note(now, denied.stamp)) {
                return permit;
            }
            time::sleep(look_every).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::credentials::Source;
    use crate::registry::options::Options;
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    fn access_with(sources: &[Source]) -> Access {
        let transport = Arc::new(Transport::new(&Options::default()).unwrap());
        let credentials = Arc::new(Credentials::new(sources).unwrap());
        let place = BlobPlace::parse("http://reg.example.com/v2/a/b/blobs").unwrap();
        Access::new(place, transport, credentials)
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn files_on_a_disk_that_hangs_keep_nobody_from_asking_again() {
        let access = access_with(&[Source::File("/proc/self/status".into())]);
        let _hanging = Arc::clone(&access.credentials.disk.threads).try_acquire_many_owned(2);
        access.deny(Fault::unauthorized("refused"));
        let started = Instant::now();
        let limit = Duration::from_secs(30);
        let permit = runtime().block_on(async { time::timeout(limit, access.wait()).await });
        assert!(matches!(permit, Ok(Some(_))), "{permit:?}");
        assert!(started.elapsed() >= ASK_AGAIN, "{:?}", started.elapsed());
    }

    /// A token server that takes its time and gives out `token`.
    fn token_server(token: &'static str, delay: Duration) -> Wanted {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let realm = format!("http://{}/token", server.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in server.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 4096]).unwrap();
                std::thread::sleep(delay);
                let body = format!("{{\"token\":\"{token}\"}}");
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                stream.write_all((head + &body).as_bytes()).unwrap();
            }
        });
        Wanted::Bearer { realm, service: None, scope: None }
    }

    #[test]
    fn who_wants_something_new_is_not_given_what_was_wanted_before() {
        let access = Arc::new(access_with(&[]));
        access.state().wanted = Some(token_server("old", Duration::from_millis(500)));
        let new = token_server("new", Duration::ZERO);
        runtime().block_on(async {
            let early = Arc::clone(&access);
            let early = tokio::spawn(async move { early.granted().await });
            time::sleep(Duration::from_millis(100)).await;
            access.state().wanted = Some(new);
            let granted = access.granted().await.unwrap().unwrap();
            assert_eq!(granted.header.reveal(), "Bearer new");
            let before = early.await.unwrap().unwrap().unwrap();
            assert_eq!(before.header.reveal(), "Bearer old", "who asked for that has it");
            let kept = access.granted().await.unwrap().unwrap();
            assert_eq!(kept.header.reveal(), "Bearer new");
        });
    }

    #[test]
    fn what_is_not_to_be_had_in_time_is_tried_again_by_the_next() {
        // It lets connect, and says nothing.
        let service = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = Secret::new(format!("http://{}/auth", service.local_addr().unwrap()));
        let timeout = Duration::from_secs(3600);
        let source = Source::Http { url, timeout, ca_file: None, client_certificate: None };
        let mut access = access_with(&[source]);
        access.obtain_max = Duration::from_millis(100);
        access.state().wanted = Some(Wanted::Basic);
        let access = Arc::new(access);
        let runtime = runtime();
        for _ in 0..2 {
            let started = Instant::now();
            let limit = Duration::from_secs(30);
            let got = runtime.block_on(async { time::timeout(limit, access.granted()).await });
            let fault = got.expect("it ends by itself").unwrap_err();
            assert!(fault.text.ends_with("within 100ms"), "{}", fault.text);
            assert!(started.elapsed() >= Duration::from_millis(100), "asked anew");
        }
    }
}
