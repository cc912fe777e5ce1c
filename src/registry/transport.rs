//! One request, one answer: connections, TLS, proxies, and how slow is too slow.
//!
//! No redirect is followed here and nothing is tried again; that is decided above. Who asked to be
//! left alone is not asked, whoever wants to.

use super::blob_url::Origin;
use super::fault::Fault;
use super::holds::Holds;
use super::options::{Options, Pace};
use super::redirect;
use super::resolver::Resolver;
use super::retry::{self, Remedy};
use super::secret::Secret;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::{CONFIG_BYTES_MAX, REGISTRY_PIECES_AT_ONCE_MAX};
use crate::units::to_u64;
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Certificate, Client, ClientBuilder, Identity, Method, Proxy, Url};
use std::error::Error as _;
use std::io::Read as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time;

/// How long an idle connection is kept: shorter than the 60 s after which servers and the networks
/// on the way begin to forget it, so that few requests are sent into the void.
const IDLE_CONNECTION: Duration = Duration::from_secs(30);

/// Bytes of a redirect's or refusal's text that are read to keep a connection: less than a new
/// connection with TLS costs.
const DRAIN_BYTES_MAX: u64 = 16 * 1024;

/// How long that may take: a round trip.
const DRAIN_MAX: Duration = Duration::from_millis(300);

/// What is sent.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub(super) method: Method,
    pub(super) url: &'a Url,
    pub(super) headers: Vec<(HeaderName, String)>,
    pub(super) authorization: Option<&'a Secret>,
    pub(super) body: Option<Secret>,
    /// How long the answer's head may take; `None` for as long as usual.
    pub(super) head_max: Option<Duration>,
    /// Who counts it, if it is sent.
    pub(super) counted_by: [Option<&'a AtomicU64>; 2],
}

impl<'a> Request<'a> {
    pub(super) const fn get(url: &'a Url) -> Self {
        Self {
            method: Method::GET,
            url,
            headers: Vec::new(),
            authorization: None,
            body: None,
            head_max: None,
            counted_by: [None; 2],
        }
    }

    pub(super) fn header(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(super) const fn authorization(mut self, secret: Option<&'a Secret>) -> Self {
        self.authorization = secret;
        self
    }

    pub(super) const fn head_within(mut self, head_max: Option<Duration>) -> Self {
        self.head_max = head_max;
        self
    }

    pub(super) const fn counted_by(mut self, counters: [&'a AtomicU64; 2]) -> Self {
        let [one, other] = counters;
        self.counted_by = [Some(one), Some(other)];
        self
    }
}

/// The clients: one that verifies certificates, and one for hosts that were named insecure.
#[derive(Debug)]
pub(super) struct Transport {
    strict: Client,
    lax: Option<Client>,
    insecure_hosts: Vec<String>,
    plain_hosts: Vec<String>,
    holds: Holds,
    pub(super) pace: Pace,
}

impl Transport {
    pub(super) fn new(options: &Options) -> Result<Self> {
        // Two crates choose a provider; whoever is first is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let strict = build(builder(options)?)?;
        let lax = match options.insecure_hosts.is_empty() {
            true => None,
            false => Some(build(builder(options)?.tls_danger_accept_invalid_certs(true))?),
        };
        let insecure_hosts = options.insecure_hosts.clone();
        let plain_hosts = options.plain_hosts.clone();
        let (holds, pace) = (Holds::default(), options.pace);
        Ok(Self { strict, lax, insecure_hosts, plain_hosts, holds, pace })
    }

    /// Whether that host was named insecure.
    pub(super) fn is_insecure(&self, host: &str) -> bool {
        self.insecure_hosts.iter().any(|insecure| insecure == host)
    }

    /// Whether a reference to that host means plain http: it was named so.
    pub(super) fn is_plain(&self, host: &str) -> bool {
        self.plain_hosts.iter().any(|plain| plain == host)
    }

    /// Sends `request` and waits for the head of the answer.
    pub(super) async fn send(&self, request: Request<'_>) -> Result<Answer, Fault> {
        let place = redirect::shown(request.url);
        let host = Origin::of(request.url).map(|origin| origin.host).unwrap_or_default();
        let held = self.holds.left(&host, Instant::now());
        if !held.is_zero() {
            return Err(Fault::on_hold(&place, held));
        }
        let client = match &self.lax {
            Some(lax) if self.is_insecure(&host) => lax,
            _ => &self.strict,
        };
        let mut builder = client.request(request.method.clone(), request.url.clone());
        for (name, value) in &request.headers {
            builder = builder.header(name, value);
        }
        if let Some(secret) = request.authorization {
            let mut value = HeaderValue::from_str(secret.reveal())
                .map_err(|_| Fault::unauthorized(format!("unusable credentials for {place}")))?;
            value.set_sensitive(true);
            builder = builder.header(header::AUTHORIZATION, value);
        }
        if let Some(body) = &request.body {
            builder = builder.body(body.reveal().to_owned());
        }
        let head = request.head_max.map_or(self.pace.head, |most| most.min(self.pace.head));
        for counter in request.counted_by.into_iter().flatten() {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        let sent = time::timeout(head, builder.send()).await;
        let response = sent
            .map_err(|_| Fault::slow(format!("no answer within {head:?} from {place}")))?
            .map_err(|error| failed(error, &place))?;
        let (pace, is_by_memory, turn) = (self.pace, false, None);
        let answer = Answer { response, place, pace, is_by_memory, turn };
        let is_trouble = retry::classify(answer.status()).0 == Remedy::Wait;
        if let Some(pause) = answer.retry_after().filter(|_| is_trouble) {
            self.holds.add(&host, pause, Instant::now());
        }
        Ok(answer)
    }
}

/// An answer whose head is there.
#[derive(Debug)]
pub(super) struct Answer {
    response: reqwest::Response,
    pub(super) place: String,
    pace: Pace,
    /// Whether it comes from where a redirect led before, which may be news no more.
    pub(super) is_by_memory: bool,
    /// In the line of its host, until all of it is here.
    turn: Option<OwnedSemaphorePermit>,
}

impl Answer {
    /// Keeps `turn` as long as this or its body lives.
    pub(super) fn with_turn(self, turn: OwnedSemaphorePermit) -> Self {
        Self { turn: Some(turn), ..self }
    }

    pub(super) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// The first value of a header; `None` for one that is not text.
    pub(super) fn header(&self, name: HeaderName) -> Option<&str> {
        self.headers().get(name)?.to_str().ok()
    }

    /// All values of a header that are text.
    pub(super) fn all(&self, name: HeaderName) -> Vec<&str> {
        let values = self.headers().get_all(name);
        values.iter().filter_map(|value| value.to_str().ok()).collect()
    }

    /// `Content-Length` as the server sent it.
    pub(super) fn content_length(&self) -> Option<u64> {
        self.header(header::CONTENT_LENGTH)?.parse().ok()
    }

    /// How long the server asks to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        retry::retry_after(self.header(header::RETRY_AFTER)?, SystemTime::now())
    }

    /// What this status means if it is not what was hoped for.
    pub(super) fn fault(&self) -> Fault {
        Fault::status(self.status(), &self.place, self.retry_after())
    }

    /// Reads what is left of a short body that nobody wants, because a connection can only be used
    /// again when its answer is over.
    pub(super) async fn drain(self) {
        let is_short = self.content_length().is_some_and(|bytes| bytes <= DRAIN_BYTES_MAX);
        let drain = async {
            let mut body = self.body();
            while let Ok(Some(_)) = body.next().await {}
        };
        if is_short {
            // What does not come at once is not worth it.
            let _ = time::timeout(DRAIN_MAX, drain).await;
        }
    }

    pub(super) fn body(self) -> Body {
        let window = Box::pin(time::sleep(self.pace.window));
        let Self { response, place, pace, turn, .. } = self;
        Body { response, place, pace, window, bytes: 0, _turn: turn }
    }

    /// The whole body, if it has at most `bytes_max`.
    pub(super) async fn whole(self, bytes_max: u64) -> Result<Vec<u8>, Fault> {
        let place = self.place.clone();
        let expected = self.content_length();
        let too_long = || Fault::malformed(format!("more than {bytes_max} bytes from {place}"));
        if expected.is_some_and(|length| length > bytes_max) {
            return Err(too_long());
        }
        let mut body = self.body();
        let mut whole = Vec::new();
        while let Some(piece) = body.next().await? {
            if to_u64(whole.len() + piece.as_ref().len()) > bytes_max {
                return Err(too_long());
            }
            whole.extend_from_slice(piece.as_ref());
        }
        Ok(whole)
    }
}

/// A body that is being received, at a pace that is watched.
#[derive(Debug)]
pub(super) struct Body {
    response: reqwest::Response,
    place: String,
    pace: Pace,
    /// The end of the window. One clock for all of them: setting it costs more than a piece.
    window: Pin<Box<time::Sleep>>,
    /// Bytes that came within it.
    bytes: u64,
    _turn: Option<OwnedSemaphorePermit>,
}

impl Body {
    /// The next bytes; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<impl AsRef<[u8]> + use<>>, Fault> {
        loop {
            tokio::select! {
                biased;
                next = self.response.chunk() => {
                    let next = next.map_err(|error| failed(error, &self.place))?;
                    self.bytes += next.as_ref().map_or(0, |piece| to_u64(piece.len()));
                    return Ok(next);
                }
                () = self.window.as_mut() => self.end_window()?,
            }
        }
    }

    fn end_window(&mut self) -> Result<(), Fault> {
        if self.bytes < self.pace.window_bytes_min {
            let told = format!("{} bytes within {:?}", self.bytes, self.pace.window);
            return Err(Fault::slow(format!("{told} from {}", self.place)));
        }
        self.bytes = 0;
        self.window.as_mut().reset(time::Instant::now() + self.pace.window);
        Ok(())
    }
}

fn builder(options: &Options) -> Result<ClientBuilder> {
    let user_agent = match options.user_agent.as_str() {
        "" => concat!("obd-ublk/", env!("CARGO_PKG_VERSION")),
        name => name,
    };
    let mut headers = HeaderMap::new();
    // A body must be the blob's own bytes.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let mut builder = Client::builder()
        .user_agent(user_agent)
        .default_headers(headers)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .http1_only()
        .tcp_nodelay(true)
        .connect_timeout(options.pace.connect)
        .pool_idle_timeout(IDLE_CONNECTION)
        .pool_max_idle_per_host(2 * REGISTRY_PIECES_AT_ONCE_MAX)
        .dns_resolver(Resolver::default());
    if let Some(proxy) = &options.proxy {
        // Not the URL: there may be a password in it.
        let invalid = |_| Error::new(ErrorKind::InvalidConfig, "proxy: expected a URL");
        builder = builder.proxy(Proxy::all(proxy.reveal()).map_err(invalid)?);
    }
    let mut authorities = Vec::new();
    for path in &options.ca_files {
        let pem = read_small(path)?;
        let found = Certificate::from_pem_bundle(&pem).ok().filter(|found| !found.is_empty());
        authorities.extend(found.ok_or_else(|| no_pem(path, "certificates"))?);
    }
    builder = builder.tls_certs_merge(authorities);
    if let Some((certificate, key)) = &options.client_certificate {
        let mut pem = read_small(certificate)?;
        pem.push(b'\n');
        pem.extend(read_small(key)?);
        let identity = Identity::from_pem(&pem);
        builder = builder.identity(identity.map_err(|_| no_pem(key, "certificate and key"))?);
    }
    Ok(builder)
}

fn build(builder: ClientBuilder) -> Result<Client> {
    builder.build().map_err(|error| {
        let message = format!("set up HTTP: {}", told(error));
        Error::new(ErrorKind::InvalidConfig, message)
    })
}

fn no_pem(path: &Path, what: &str) -> Error {
    Error::new(ErrorKind::InvalidConfig, format!("{}: no {what} in PEM", path.display()))
}

fn read_small(path: &Path) -> Result<Vec<u8>> {
    let action = || format!("read {}", path.display());
    let failed = |error: std::io::Error| Error::io(action(), &error);
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(CONFIG_BYTES_MAX).read_to_end(&mut bytes).map_err(failed).context(action)?;
    Ok(bytes)
}

/// What a request failed with, and what may help.
fn failed(error: reqwest::Error, place: &str) -> Fault {
    let is_certificate = certificate_is_wrong(&error);
    let (is_timeout, is_connect) = (error.is_timeout(), error.is_connect());
    let text = format!("{place}: {}", told(error));
    match () {
        // Another try would show the same certificate.
        () if is_certificate => Fault::unavailable(text).hopeless(),
        () if is_timeout && !is_connect => Fault::slow(text),
        () => Fault::unavailable(text),
    }
}

/// The chain of causes, without the URL, which may be signed.
fn told(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let next = inner.to_string();
        // Some say their cause themselves.
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = inner.source();
    }
    text
}

/// Whether the server's certificate is the cause: of this error, or of one that it wraps.
fn certificate_is_wrong(error: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return matches!(tls, rustls::Error::InvalidCertificate(_));
    }
    // The source of an `io::Error` is not what it wraps, but the source of that.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    match wrapped {
        Some(wrapped) => certificate_is_wrong(wrapped),
        None => error.source().is_some_and(certificate_is_wrong),
    }
}
