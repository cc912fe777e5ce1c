//! Leave to read one repository: what to show, when to renew it, and how to wait for it.
//!
//! The state is small and locked for moments only. Whatever takes time, a token server or a
//! credential helper, is one task for all who wait ([`Flight`]). Who is refused what we have waits
//! in one line with the others ([`Refusals`]); the first of them looks at the credentials and asks
//! the registry again from time to time, and all go on when that succeeds.

use super::blob_url::BlobPlace;
use super::challenge::{self, Wanted};
use super::credential_file::Credential;
use super::credentials::{Credentials, Found, Stamp};
use super::fault::{self, Fault};
use super::flight::Flight;
use super::refusals::Refusals;
use super::retry::Remedy;
use super::secret::Secret;
use super::token::{self, Wish};
use super::transport::{Answer, Transport};
use crate::limits::CREDENTIAL_LOOK_MS;
use reqwest::header;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::SemaphorePermit;
use tokio::time;

/// How long it may take to get what is wanted: longer than a credential helper and a token server
/// together, so that it ends only what would never end, like a file on a disk that hangs.
const OBTAIN_MAX: Duration = Duration::from_secs(60);

/// The pause after a renewal ahead of time that failed. The old one still serves: no read waits.
const RENEWAL_PAUSE: Duration = Duration::from_secs(1);

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
    /// Of all that is in the repository.
    pub(super) refusals: Refusals,
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
    /// What the credential files looked like before they were read last; `None` before anybody
    /// looked, because the registry asked for none.
    stamp: Option<Stamp>,
    /// Until when no successor is looked for, because there was none to be had.
    no_renewal_before: Option<Instant>,
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
        let (refusals, obtain_max) = (Refusals::default(), OBTAIN_MAX);
        Self { place, transport, credentials, state, flight, refusals, obtain_max }
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
                let may_renew = state.no_renewal_before.is_none_or(|until| now >= until);
                drop(state);
                if may_renew && granted.renew_at.is_some_and(|at| now >= at) {
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
        if let Err(fault) = &granted {
            let pause = fault.retry_after.unwrap_or_default().max(RENEWAL_PAUSE);
            self.state().no_renewal_before = Instant::now().checked_add(pause);
        }
        Obtained { wanted, granted }
    }

    async fn obtain(&self, wanted: &Wanted) -> Result<Arc<Granted>, Fault> {
        let (origin, repository) = (self.place.origin(), self.place.repository());
        let url = self.place.to_string();
        let stamp = self.credentials.stamp().await;
        self.state().stamp = Some(stamp);
        let Found { credential, unusable } =
            self.credentials.find(origin, repository, &url).await?;
        let now = Instant::now();
        let granted = match wanted {
            Wanted::Basic => {
                let header = credential.as_ref().and_then(Credential::basic);
                let wants = || Fault::unauthorized(format!("{} wants a password", self.place));
                let header = header.ok_or_else(|| unusable.unwrap_or_else(wants))?;
                Granted { header, end: None, renew_at: None }
            }
            Wanted::Bearer { realm, service, scope } => {
                let wish = Wish {
                    realm,
                    service: service.as_deref(),
                    scope: scope.as_deref(),
                    repository,
                };
                let got = token::get(&self.transport, origin, &wish, credential.as_ref()).await;
                // A stranger who is refused could have been somebody.
                let token = got.map_err(|fault| match unusable {
                    Some(why) if credential.is_none() && fault.remedy == Remedy::Credentials => why,
                    _ => fault,
                })?;
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
        if is_fresh {
            // Where only this blob is kept from us, it is good for the others.
            if !fault::is_of_one(answer.status()) {
                state.granted = None;
            }
            return Turn::Denied;
        }
        state.granted = None;
        match wanted {
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

    /// Takes note that a request was refused for good: for all of the repository, or for the blob
    /// whose `own` refusals these are.
    pub(super) fn deny(&self, own: &Refusals, why: Fault) {
        let mut state = self.state();
        let stamp = state.stamp.clone();
        if why.is_of_one {
            drop(state);
            return own.deny(why, stamp);
        }
        state.granted = None;
        drop(state);
        self.refusals.deny(why, stamp);
    }

    /// Waits among those who met these `refusals` until it makes sense to ask again, for as long as
    /// the caller lets it. Whoever gets a permit asks for all others, and keeps it meanwhile.
    pub(super) async fn wait<'a>(&self, refusals: &'a Refusals) -> Option<SemaphorePermit<'a>> {
        // A disk that hangs tells nothing, and keeps nobody from asking.
        let longest = Duration::from_millis(CREDENTIAL_LOOK_MS);
        let look = async || time::timeout(longest, self.credentials.stamp()).await.ok();
        let seen = |now: &Stamp, is_changed: bool| {
            let mut state = self.state();
            if is_changed || state.stamp.is_none() {
                state.stamp = Some(now.clone());
            }
        };
        refusals.wait(look, seen).await
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
        access.deny(&Refusals::default(), Fault::unauthorized("refused"));
        let started = Instant::now();
        let limit = Duration::from_secs(30);
        let permit =
            runtime().block_on(async { time::timeout(limit, access.wait(&access.refusals)).await });
        assert!(matches!(permit, Ok(Some(_))), "{permit:?}");
        assert!(started.elapsed() >= super::super::refusals::ASK_AGAIN, "{:?}", started.elapsed());
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
