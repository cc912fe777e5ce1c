//! The right answer to a request.

use super::fault::Part;
use super::wire::Request;
use super::{Shared, State};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What there is to be had.
#[derive(Debug, Default)]
pub(crate) struct Content {
    /// By digest.
    pub(crate) blobs: HashMap<String, Arc<[u8]>>,
    /// Digests of those that nobody may have.
    pub(crate) forbidden: Vec<String>,
    /// By tag and by digest: media type and bytes.
    pub(crate) manifests: HashMap<String, (String, Vec<u8>)>,
}

/// Who may have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Auth {
    /// Everybody.
    #[default]
    Open,
    /// Who has this name and password (`NAME:PASSWORD` in base64).
    Basic(String),
    /// Who has a token.
    Bearer(Bearer),
}

/// How tokens are given out and what is said to those without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bearer {
    /// URL of the token server.
    pub(crate) realm: String,
    /// Name and password in base64 that the token server wants; `None` for everybody.
    pub(crate) basic: Option<String>,
    /// How long a token is good for.
    pub(crate) good_ms: u64,
    /// `expires_in` in seconds as it is told; `None` to leave it out.
    pub(crate) told_seconds: Option<u64>,
    /// The key of the token in the token server's answer.
    pub(crate) key: &'static str,
    /// The status for those whose token is not good.
    pub(crate) refusal: u16,
    /// The challenge for those whose token is not good; `None` for the same as without one.
    pub(crate) stale_challenge: Option<String>,
}

impl Bearer {
    pub(crate) fn at(realm: &str) -> Self {
        Self {
            realm: realm.to_owned(),
            basic: None,
            good_ms: 300_000,
            told_seconds: Some(300),
            key: "token",
            refusal: 401,
            stale_challenge: None,
        }
    }
}

/// An answer before anything is done to it.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The whole blob, if the body is of one.
    pub(crate) whole: Option<Arc<[u8]>>,
}

impl Answer {
    fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn set_content_range(&mut self, text: Option<&str>) {
        self.headers.retain(|(name, _)| name != "Content-Range");
        if let Some(text) = text {
            self.headers.push(("Content-Range".to_owned(), text.to_owned()));
        }
    }

    /// Makes it the answer to a range `by` bytes later.
    pub(crate) fn shift(&mut self, request: &Request, by: u64) {
        let (Some(whole), Some((start, end))) = (self.whole.clone(), range_of(request)) else {
            return;
        };
        let total = whole.len() as u64;
        let start = (start + by).min(total - 1);
        let end = (end + by).min(total).max(start + 1);
        self.set_content_range(Some(&format!("bytes {start}-{}/{total}", end - 1)));
        self.body = whole[start as usize..end as usize].to_vec();
    }
}

pub(crate) fn part_of(request: &Request) -> Part {
    let path = request.path();
    match () {
        () if path.contains("/blobs/") => Part::Blob,
        () if path.contains("/manifests/") => Part::Manifest,
        () if path.starts_with("/token") => Part::Token,
        () if path.starts_with("/store/") => Part::Store,
        () => Part::Other,
    }
}

pub(crate) fn answer(state: &mut State, shared: &Shared, request: &Request) -> Answer {
    match part_of(request) {
        Part::Token => token(state, request),
        Part::Store => store(state, shared, request),
        Part::Blob => guarded(state, request).unwrap_or_else(|| blob(state, shared, request)),
        Part::Manifest => guarded(state, request).unwrap_or_else(|| manifest(state, request)),
        Part::Other => guarded(state, request).unwrap_or_else(|| Answer::status(200)),
    }
}

/// The refusal, for those who may not have it.
fn guarded(state: &State, request: &Request) -> Option<Answer> {
    let sent = request.header("authorization");
    match &state.auth {
        Auth::Open => None,
        Auth::Basic(wanted) => (sent != Some(&format!("Basic {wanted}")))
            .then(|| Answer::status(401).with("WWW-Authenticate", "Basic realm=\"mock\"")),
        Auth::Bearer(bearer) => {
            let token = sent.and_then(|sent| sent.strip_prefix("Bearer "));
            let good_until = token.and_then(|token| state.tokens.get(token));
            if good_until.is_some_and(|until| Instant::now() < *until) {
                return None;
            }
            let usual = format!(
                "Bearer realm=\"{}\",service=\"mock\",scope=\"repository:{}:pull\"",
                bearer.realm,
                repository_of(request.path())
            );
            let (status, challenge) = match (sent, &bearer.stale_challenge) {
                (Some(_), Some(stale)) => (bearer.refusal, stale.clone()),
                (Some(_), None) => (bearer.refusal, usual),
                (None, _) => (401, usual),
            };
            let refusal = Answer::status(status);
            Some(match challenge.is_empty() {
                true => refusal,
                false => refusal.with("WWW-Authenticate", challenge),
            })
        }
    }
}

fn repository_of(path: &str) -> &str {
    let path = path.strip_prefix("/v2/").unwrap_or(path);
    path.split("/blobs/").next().unwrap_or("").split("/manifests/").next().unwrap_or("")
}

fn token(state: &mut State, request: &Request) -> Answer {
    let Auth::Bearer(bearer) = state.auth.clone() else { return Answer::status(404) };
    if let Some(wanted) = &bearer.basic
        && request.header("authorization") != Some(&format!("Basic {wanted}"))
    {
        return Answer::status(401);
    }
    let token = format!("token-{}", state.requests);
    state.tokens.insert(token.clone(), Instant::now() + Duration::from_millis(bearer.good_ms));
    let expires = match bearer.told_seconds {
        Some(seconds) => format!(",\"expires_in\":{seconds}"),
        None => String::new(),
    };
    let body = format!("{{\"{}\":\"{token}\"{expires}}}", bearer.key);
    let mut answer = Answer::status(200).with("Content-Type", "application/json");
    answer.body = body.into_bytes();
    answer
}

fn blob(state: &State, shared: &Shared, request: &Request) -> Answer {
    let digest = request.path().rsplit('/').next().unwrap_or("");
    if state.content.forbidden.iter().any(|forbidden| forbidden == digest) {
        return Answer::status(403);
    }
    let Some(whole) = state.content.blobs.get(digest) else { return Answer::status(404) };
    if let Some((base, good_ms)) = &state.redirect {
        let end = shared.started.elapsed().as_millis() as u64 + good_ms;
        let place = format!("{base}/store/{digest}?end={end}&X-Amz-Signature=signed");
        return Answer::status(307).with("Location", place);
    }
    piece(whole, request)
}

fn store(state: &State, shared: &Shared, request: &Request) -> Answer {
    let end: u64 = request.query("end").and_then(|text| text.parse().ok()).unwrap_or(0);
    // The registry counts from its own start: who wants URLs to end starts both together.
    if shared.started.elapsed().as_millis() as u64 > end {
        return Answer::status(403);
    }
    let digest = request.path().rsplit('/').next().unwrap_or("");
    match state.content.blobs.get(digest) {
        Some(whole) => piece(whole, request),
        None => Answer::status(404),
    }
}

fn manifest(state: &State, request: &Request) -> Answer {
    let name = request.path().rsplit('/').next().unwrap_or("");
    let Some((media_type, bytes)) = state.content.manifests.get(name) else {
        return Answer::status(404);
    };
    let mut answer = Answer::status(200).with("Content-Type", media_type.as_str());
    answer.body.clone_from(bytes);
    answer
}

/// The half-open range that is asked for.
fn range_of(request: &Request) -> Option<(u64, u64)> {
    let (first, last) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1))
}

fn piece(whole: &Arc<[u8]>, request: &Request) -> Answer {
    let total = whole.len() as u64;
    let mut answer = match range_of(request) {
        None => Answer { body: whole.to_vec(), ..Answer::status(200) },
        Some((start, _)) if start >= total => {
            Answer::status(416).with("Content-Range", format!("bytes */{total}"))
        }
        Some((start, end)) => {
            let end = end.min(total);
            let body = whole[start as usize..end as usize].to_vec();
            let content_range = format!("bytes {start}-{}/{total}", end - 1);
            Answer { body, ..Answer::status(206) }.with("Content-Range", content_range)
        }
    };
    answer.whole = Some(Arc::clone(whole));
    answer
}
