//! What can be told about registries: who we are, whom to trust, which ways to go.

use super::credentials::Source;
use super::reference::{DOCKER_HUB_HOST, is_docker_hub};
use super::secret::Secret;
use crate::limits::{
    MIRROR_HEAD_MS_MAX, REGISTRY_CONNECT_MS_MAX, REGISTRY_HEAD_MS_MAX, REGISTRY_PACE_BYTES_MIN,
    REGISTRY_PACE_MS,
};
use std::path::PathBuf;
use std::time::Duration;

/// How to deal with registries. The default is: no credentials, the system's certificates, the
/// proxy of the environment.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What we call ourselves; empty for our name and version.
    pub user_agent: String,
    /// Where credentials come from; the first source that has one for a place is taken.
    pub credentials: Vec<Source>,
    /// Other places to try first.
    pub mirrors: Vec<Mirror>,
    /// URL that is put before the URL of a blob, so that a peer-to-peer network fetches it. Who
    /// sets it trusts that address with the registry's credentials, which it needs; where it
    /// redirects to does not get them.
    pub p2p_prefix: Option<String>,
    /// URL of a proxy for everything, with its password if it has one; `None` for what
    /// `HTTPS_PROXY` and the like say.
    pub proxy: Option<Secret>,
    /// Certificates (PEM) to trust besides the system's.
    pub ca_files: Vec<PathBuf>,
    /// Certificate and key (PEM) to show to registries.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// `HOST` or `HOST:PORT` whose certificates are not verified.
    pub insecure_hosts: Vec<String>,
    /// `HOST` or `HOST:PORT` to which a reference means plain http. (Configs say it themselves, by
    /// the scheme of their URLs.)
    pub plain_hosts: Vec<String>,
    /// When a server is too slow.
    pub pace: Pace,
}

/// A place that has the same repositories as a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The registry's host, as blobs' URLs name it.
    pub of_host: String,
    /// `https://HOST` of the mirror; it is asked with `?ns=` and the registry's host, by which a
    /// mirror of several tells them apart.
    pub url: String,
}

impl Mirror {
    /// The mirror at `url` of the registry `host`, by any of its names.
    #[must_use]
    pub fn new(host: &str, url: &str) -> Self {
        let host = host.to_ascii_lowercase();
        let of_host = if is_docker_hub(&host) { DOCKER_HUB_HOST.to_owned() } else { host };
        Self { of_host, url: url.trim_end_matches('/').to_owned() }
    }
}

/// When a server is too slow for one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Until a connection stands.
    pub connect: Duration,
    /// Until the answer's head is there.
    pub head: Duration,
    /// The same for a mirror or a peer, if that is less.
    pub mirror_head: Duration,
    /// How often the speed of the body is judged.
    pub window: Duration,
    /// Bytes that must come within a window.
    pub window_bytes_min: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            connect: Duration::from_millis(REGISTRY_CONNECT_MS_MAX),
            head: Duration::from_millis(REGISTRY_HEAD_MS_MAX),
            mirror_head: Duration::from_millis(MIRROR_HEAD_MS_MAX),
            window: Duration::from_millis(REGISTRY_PACE_MS),
            window_bytes_min: REGISTRY_PACE_BYTES_MIN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_of_docker_hub_may_name_it_as_people_do() {
        for (host, url, expected) in [
            ("docker.io", "https://m", ("registry-1.docker.io", "https://m")),
            ("index.docker.io", "https://m/", ("registry-1.docker.io", "https://m")),
            ("Reg.Example.com:5000", "http://m/a/", ("reg.example.com:5000", "http://m/a")),
        ] {
            let mirror = Mirror::new(host, url);
            assert_eq!((mirror.of_host.as_str(), mirror.url.as_str()), expected, "{host}");
        }
    }
}
