//! Docker's `config.json`, and what credential helpers answer: which name and password are for
//! which place. Text in, values out.
//!
//! Keys are hosts, or hosts with the beginning of a repository; the longest that fits is taken.
//! (The reference takes the first.) Old keys are URLs, `https://index.docker.io/v1/` for one.

use super::reference::{self, DOCKER_HUB};
use super::secret::Secret;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;

/// What to show to a registry or its token server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Credential {
    /// A name and a password.
    Password {
        /// The name, no secret.
        user: String,
        /// The password.
        password: Secret,
    },
    /// A token that the token server changes for another.
    Identity(Secret),
}

impl Credential {
    /// The header of the basic scheme; `None` for what is no password.
    #[must_use]
    pub(super) fn basic(&self) -> Option<Secret> {
        match self {
            Self::Password { user, password } => {
                let pair = format!("{user}:{}", password.reveal());
                Some(Secret::new(format!("Basic {}", STANDARD.encode(pair))))
            }
            Self::Identity(_) => None,
        }
    }
}

/// Where a credential is to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lead {
    /// In the file itself.
    Here(Credential),
    /// From `docker-credential-NAME`, for that server.
    Helper {
        /// NAME.
        name: String,
        /// What the helper knows the server by.
        server: String,
    },
}

/// A parsed `config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct CredentialFile {
    auths: BTreeMap<String, Option<Auth>>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: String,
    username: String,
    password: String,
    #[serde(rename = "identitytoken")]
    identity_token: String,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

#[derive(Deserialize)]
struct HelperFile {
    #[serde(default)]
    success: Option<bool>,
    data: Option<CredentialFile>,
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username", default)]
    user: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// The file in `bytes`.
///
/// # Errors
/// Where it is wrong: line and column only, because what stands there may be a password.
pub(super) fn parse(bytes: &[u8]) -> Result<CredentialFile, String> {
    serde_json::from_slice(bytes).map_err(|error| place_of(&error))
}

/// The answer of overlaybd's helper (`{"success":true,"data":{"auths":{...}}}`).
///
/// # Errors
/// As [`parse`]; and when the helper says that it failed.
pub(super) fn parse_answer(bytes: &[u8]) -> Result<CredentialFile, String> {
    let answer: HelperFile = serde_json::from_slice(bytes).map_err(|error| place_of(&error))?;
    match (answer.success, answer.data) {
        (Some(false), _) => Err("it says that it did not succeed".to_owned()),
        (_, Some(data)) => Ok(data),
        (_, None) => Err("it has no data".to_owned()),
    }
}

/// The answer of a docker credential helper.
///
/// # Errors
/// As [`parse`].
pub(super) fn parse_helper(bytes: &[u8]) -> Result<Credential, String> {
    let HelperAnswer { user, secret } =
        serde_json::from_slice(bytes).map_err(|error| place_of(&error))?;
    Ok(match user.as_str() {
        "<token>" => Credential::Identity(Secret::new(secret)),
        _ => Credential::Password { user, password: Secret::new(secret) },
    })
}

fn place_of(error: &serde_json::Error) -> String {
    format!("not what is expected at line {} column {}", error.line(), error.column())
}

impl CredentialFile {
    /// Where the credential for `repository` at `host` is to be had.
    #[must_use]
    pub(super) fn lead(&self, host: &str, repository: &str) -> Option<Lead> {
        let helper = |name: &str| Lead::Helper { name: name.to_owned(), server: server_of(host) };
        if let Some(name) = longest(&self.helpers, host, repository, |name| !name.is_empty()) {
            return Some(helper(name));
        }
        let usable = |auth: &Option<Auth>| auth.as_ref().is_some_and(|auth| auth.read().is_some());
        let auth = longest(&self.auths, host, repository, usable);
        if let Some(credential) = auth.and_then(|auth| auth.as_ref()?.read()) {
            return Some(Lead::Here(credential));
        }
        (!self.store.is_empty()).then(|| helper(&self.store))
    }
}

impl Auth {
    fn read(&self) -> Option<Credential> {
        if !self.identity_token.is_empty() {
            return Some(Credential::Identity(Secret::new(self.identity_token.as_str())));
        }
        if !self.auth.is_empty() {
            let pair = STANDARD.decode(self.auth.trim()).ok()?;
            let pair = String::from_utf8(pair).ok()?;
            let (user, password) = pair.split_once(':')?;
            // Docker pads passwords with zeros in some versions.
            let password = Secret::new(password.trim_end_matches('\0'));
            return Some(Credential::Password { user: user.to_owned(), password });
        }
        (!self.username.is_empty()).then(|| Credential::Password {
            user: self.username.clone(),
            password: Secret::new(self.password.as_str()),
        })
    }
}

/// The usable value whose key is the longest beginning of `host/repository`, in whole parts.
fn longest<'a, T>(
    map: &'a BTreeMap<String, T>,
    host: &str,
    repository: &str,
    is_usable: impl Fn(&T) -> bool,
) -> Option<&'a T> {
    let wanted = format!("{}/{repository}", canonical_host(host));
    let fitting = map.iter().filter_map(|(key, value)| {
        let key = canonical(key);
        let rest = wanted.strip_prefix(&key)?;
        let fits = !key.is_empty() && (rest.is_empty() || rest.starts_with('/'));
        (fits && is_usable(value)).then_some((key.len(), value))
    });
    fitting.max_by_key(|(length, _)| *length).map(|(_, value)| value)
}

/// A key without scheme, version and case of the host.
fn canonical(key: &str) -> String {
    let key = key.trim();
    let (key, is_url) = match key.split_once("://") {
        Some((_, rest)) => (rest, true),
        None => (key, false),
    };
    let mut key = key.trim_end_matches('/');
    if is_url {
        key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    }
    match key.split_once('/') {
        Some((host, path)) => format!("{}/{path}", canonical_host(host)),
        None => canonical_host(key),
    }
}

fn canonical_host(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    if reference::is_docker_hub(&host) { DOCKER_HUB.to_owned() } else { host }
}

/// What helpers know a registry by: its host, and Docker Hub by the URL it had first.
fn server_of(host: &str) -> String {
    match reference::is_docker_hub(host) {
        true => "https://index.docker.io/v1/".to_owned(),
        false => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn password(user: &str, password: &str) -> Option<Lead> {
        let password = Secret::new(password);
        Some(Lead::Here(Credential::Password { user: user.to_owned(), password }))
    }

    #[test]
    fn the_longest_key_wins() {
        let file = json!({"auths": {
            "reg.example.com": {"username": "host", "password": "1"},
            "reg.example.com/a": {"username": "space", "password": "2"},
            "reg.example.com/a/b": {"auth": STANDARD.encode("repository:3:4")},
            "reg.example.com/a/b/empty": {},
            "reg.example.com:5000": {"username": "port", "password": "5"},
            "https://index.docker.io/v1/": {"username": "hub", "password": "6"},
            "null.example.com": null,
        }});
        let file = parse(file.to_string().as_bytes()).unwrap();
        for (host, repository, expected) in [
            ("reg.example.com", "x", password("host", "1")),
            ("REG.example.com", "x", password("host", "1")),
            ("reg.example.com", "a/x", password("space", "2")),
            ("reg.example.com", "ab", password("host", "1")),
            ("reg.example.com", "a/b", password("repository", "3:4")),
            ("reg.example.com", "a/b/c", password("repository", "3:4")),
            ("reg.example.com", "a/b/empty", password("repository", "3:4")),
            ("reg.example.com:5000", "a", password("port", "5")),
            ("registry-1.docker.io", "library/redis", password("hub", "6")),
            ("docker.io", "library/redis", password("hub", "6")),
            ("null.example.com", "x", None),
            ("example.com", "x", None),
            ("other.example.com", "reg.example.com/a", None),
        ] {
            assert_eq!(file.lead(host, repository), expected, "{host} {repository}");
        }
    }

    #[test]
    fn helpers_come_first_and_the_store_last() {
        let file = json!({
            "auths": {"a.example.com": {"username": "u", "password": "p"}, "b.example.com": {}},
            "credHelpers": {"c.example.com": "cloud", "a.example.com/x": "special"},
            "credsStore": "secretservice",
        });
        let file = parse(file.to_string().as_bytes()).unwrap();
        let helper = |name: &str, server: &str| {
            Some(Lead::Helper { name: name.to_owned(), server: server.to_owned() })
        };
        assert_eq!(file.lead("a.example.com", "y"), password("u", "p"));
        assert_eq!(file.lead("a.example.com", "x"), helper("special", "a.example.com"));
        assert_eq!(file.lead("b.example.com", "y"), helper("secretservice", "b.example.com"));
        assert_eq!(file.lead("c.example.com", "y"), helper("cloud", "c.example.com"));
        let hub = helper("secretservice", "https://index.docker.io/v1/");
        assert_eq!(file.lead("registry-1.docker.io", "y"), hub);
    }

    #[test]
    fn answers_of_helpers_are_understood() {
        let found = parse_helper(br#"{"ServerURL":"s","Username":"u","Secret":"p"}"#).unwrap();
        let password = Secret::new("p");
        assert_eq!(found, Credential::Password { user: "u".to_owned(), password });
        let token = parse_helper(br#"{"Username":"<token>","Secret":"t"}"#).unwrap();
        assert_eq!(token, Credential::Identity(Secret::new("t")));
        let file = br#"{"traceId":"x","success":true,"data":{"auths":{"h.x":{"username":"u"}}}}"#;
        assert!(parse_answer(file).unwrap().lead("h.x", "r").is_some());
        for bad in [&br#"{"success":false,"data":{}}"#[..], br#"{"success":true}"#, b"x", b""] {
            assert!(parse_answer(bad).is_err());
        }
    }

    #[test]
    fn no_error_and_no_debug_repeats_a_secret() {
        let broken = br#"{"auths": {"h.x": {"password": "hunter2", "username": 5}}}"#;
        let told = parse(broken).unwrap_err();
        assert!(told.starts_with("not what is expected at line 1 column"), "{told}");
        let whole = br#"{"auths": {"h.x": {"username": "u", "password": "hunter2"}}}"#;
        let file = parse(whole).unwrap();
        let lead = file.lead("h.x", "r").unwrap();
        let Lead::Here(credential) = &lead else { panic!("{lead:?}") };
        let basic = credential.basic().unwrap();
        assert_eq!(basic.reveal(), "Basic dTpodW50ZXIy");
        for shown in [format!("{file:?}"), format!("{lead:?}"), format!("{basic:?}")] {
            assert!(!shown.contains("hunter2") && !shown.contains("dTpod"), "{shown}");
        }
    }

    #[test]
    fn undecodable_entries_are_no_credentials() {
        for auth in ["!!!", "dQ==", ""] {
            let file = json!({"auths": {"h.x": {"auth": auth}}}).to_string();
            assert_eq!(parse(file.as_bytes()).unwrap().lead("h.x", "r"), None, "{auth}");
        }
    }
}
