//! Tokens: what to ask a token server, and what its answer means.

use super::blob_url::Origin;
use super::credential_file::Credential;
use super::fault::Fault;
use super::retry::Remedy;
use super::secret::Secret;
use super::transport::{Request, Transport};
use crate::error::ErrorKind;
use crate::limits::{TOKEN_BYTES_MAX, TOKEN_SECONDS_DEFAULT};
use reqwest::{Method, Url, header};
use serde::Deserialize;
use std::time::Duration;

/// What a token server is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish<'a> {
    pub(super) realm: &'a str,
    pub(super) service: Option<&'a str>,
    pub(super) scope: Option<&'a str>,
    /// What the token is for, if the challenge does not say.
    pub(super) repository: &'a str,
}

/// A token and how long it is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) header: Secret,
    pub(super) good_for: Duration,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
}

/// The token in an answer. The tenth part of its time is left unused: clocks differ, and a request
/// takes time.
fn parse(bytes: &[u8]) -> Option<Token> {
    let answer: Answer = serde_json::from_slice(bytes).ok()?;
    let is_text = |text: &String| !text.is_empty();
    let token = answer.token.filter(is_text).or(answer.access_token.filter(is_text))?;
    // 0 is what some say who do not know; longer than a day is as good as for ever.
    let seconds = answer.expires_in.filter(|seconds| *seconds > 0);
    let seconds = seconds.unwrap_or(TOKEN_SECONDS_DEFAULT).min(86_400);
    let good_for = Duration::from_secs(seconds).mul_f64(0.9);
    Some(Token { header: Secret::new(format!("Bearer {token}")), good_for })
}

/// Gets a token for `origin`.
pub(super) async fn get(
    transport: &Transport,
    origin: &Origin,
    wish: &Wish<'_>,
    credential: Option<&Credential>,
) -> Result<Token, Fault> {
    let realm = realm(transport, origin, wish.realm)?;
    let fallback = format!("repository:{}:pull", wish.repository);
    let scope = wish.scope.unwrap_or(&fallback);
    let basic = credential.and_then(Credential::basic);
    let answer = match credential {
        Some(Credential::Identity(identity)) => {
            let body = exchange(wish.service, scope, identity);
            let mut request = Request::get(&realm)
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
            (request.method, request.body) = (Method::POST, Some(body));
            transport.send(request).await?
        }
        _ => {
            let mut url = realm.clone();
            {
                let mut query = url.query_pairs_mut();
                if let Some(service) = wish.service {
                    query.append_pair("service", service);
                }
                query.append_pair("scope", scope);
            }
            transport.send(Request::get(&url).authorization(basic.as_ref())).await?
        }
    };
    let (status, place) = (answer.status(), answer.place.clone());
    match status {
        200 => {
            let bytes = answer.whole(TOKEN_BYTES_MAX).await?;
            parse(&bytes).ok_or_else(|| Fault::malformed(format!("no token from {place}")))
        }
        400 | 401 | 403 => {
            let who = if credential.is_some() { "the credentials" } else { "a stranger" };
            let text = format!("HTTP status {status} from {place}: it gives {who} no token");
            Err(Fault::unauthorized(text))
        }
        _ => {
            let mut fault = answer.fault();
            if fault.remedy == Remedy::Nothing {
                // Not the blob is missing, but the way to a token.
                (fault.remedy, fault.kind) = (Remedy::Few, ErrorKind::Unauthorized);
            }
            Err(fault)
        }
    }
}

/// The realm, if it is a place where a password may go.
fn realm(transport: &Transport, origin: &Origin, realm: &str) -> Result<Url, Fault> {
    let wrong = |why: &str| Fault::unauthorized(format!("the realm that {origin} names {why}"));
    let url = Url::parse(realm).map_err(|_| wrong("is no URL"))?;
    let target = Origin::of(&url).ok_or_else(|| wrong("is neither https nor http"))?;
    if origin.is_https && !target.is_https && !transport.is_insecure(&target.host) {
        return Err(wrong("is not encrypted"));
    }
    Ok(url)
}

/// The form by which an identity token is changed for one that opens a repository.
fn exchange(service: Option<&str>, scope: &str, identity: &Secret) -> Secret {
    let mut form = reqwest::Url::parse("http://localhost/").ok();
    if let Some(form) = form.as_mut() {
        form.query_pairs_mut()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", service.unwrap_or(""))
            .append_pair("scope", scope)
            .append_pair("client_id", "obd-ublk")
            .append_pair("refresh_token", identity.reveal());
    }
    Secret::new(form.as_ref().and_then(Url::query).unwrap_or(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_token_servers_are_understood() {
        let token = |text: &str, seconds: u64| {
            let good_for = Duration::from_secs(seconds).mul_f64(0.9);
            Some(Token { header: Secret::new(format!("Bearer {text}")), good_for })
        };
        for (answer, expected) in [
            (r#"{"token":"t","expires_in":300}"#, token("t", 300)),
            (r#"{"access_token":"t","expires_in":300}"#, token("t", 300)),
            (r#"{"token":"t","access_token":"u"}"#, token("t", TOKEN_SECONDS_DEFAULT)),
            (r#"{"token":"","access_token":"u"}"#, token("u", TOKEN_SECONDS_DEFAULT)),
            (r#"{"token":"t","expires_in":0}"#, token("t", TOKEN_SECONDS_DEFAULT)),
            (r#"{"token":"t","expires_in":18446744073709551615}"#, token("t", 86_400)),
            (r#"{"token":"t","expires_in":null,"issued_at":"x"}"#, token("t", 60)),
            (r#"{"token":7}"#, None),
            (r#"{"expires_in":300}"#, None),
            ("{}", None),
            ("", None),
        ] {
            assert_eq!(parse(answer.as_bytes()), expected, "{answer}");
        }
        let shown = format!("{:?}", parse(br#"{"token":"hunter2"}"#));
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn an_identity_token_is_exchanged_by_a_form() {
        let form = exchange(Some("a b"), "repository:x:pull", &Secret::new("s/e&t"));
        assert_eq!(
            form.reveal(),
            "grant_type=refresh_token&service=a+b&scope=repository%3Ax%3Apull&client_id=obd-ublk\
             &refresh_token=s%2Fe%26t"
        );
    }
}
