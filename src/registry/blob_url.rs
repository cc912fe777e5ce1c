//! Where a repository's blobs are: `repoBlobUrl`, as the snapshotter writes it into configs.
//!
//! `https://HOST/v2/REPOSITORY/blobs`, and the blob is at that and `/` and its digest. A missing
//! scheme means https; plain http is only what the config asks for by name.

use super::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use reqwest::Url;
use std::fmt;

/// Who answers: scheme, host and port. Credentials go to the origin they were meant for, and to
/// nobody else.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// Whether the connection is encrypted.
    pub is_https: bool,
    /// `HOST` or `HOST:PORT`, without the scheme's own port, in lower case.
    pub host: String,
}

impl Origin {
    /// Whom a request to `url` goes to; `None` for anything but http and https.
    #[must_use]
    pub fn of(url: &Url) -> Option<Self> {
        let is_https = match url.scheme() {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let host = url.host_str().filter(|host| !host.is_empty())?.to_ascii_lowercase();
        Some(match url.port() {
            Some(port) => Self { is_https, host: format!("{host}:{port}") },
            None => Self { is_https, host },
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_https { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.host)
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The place of a repository's blobs. It has no secret in it: a URL with a user is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlobPlace {
    origin: Origin,
    path: String,
}

impl BlobPlace {
    /// The place that `repo_blob_url` names.
    ///
    /// # Errors
    /// `InvalidConfig`.
    pub fn parse(repo_blob_url: &str) -> Result<Self> {
        let text = repo_blob_url.trim();
        if text.is_empty() {
            let message = "empty repoBlobUrl for remote layer";
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        let invalid = |why: &str| {
            // Not the text itself: there may be a password in it.
            Err(Error::new(ErrorKind::InvalidConfig, format!("repoBlobUrl: {why}")))
        };
        let with_scheme = match text.contains("://") {
            true => text.to_owned(),
            false => format!("https://{text}"),
        };
        let url = match Url::parse(&with_scheme) {
            Ok(url) => url,
            Err(error) => return invalid(&error.to_string()),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return invalid("it names a user, who belongs into a credential file");
        }
        if url.query().is_some() || url.fragment().is_some() {
            return invalid("it has a query or a fragment");
        }
        let Some(origin) = Origin::of(&url) else {
            return invalid("found another scheme, expected https or http");
        };
        Ok(Self { origin, path: url.path().trim_end_matches('/').to_owned() })
    }

    /// The place of `repository` at `origin`.
    #[must_use]
    pub fn of_repository(origin: Origin, repository: &str) -> Self {
        Self { origin, path: format!("/v2/{repository}/blobs") }
    }

    /// Who has the blobs.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The repository, as far as the URL has the form of the distribution protocol; else its path.
    #[must_use]
    pub fn repository(&self) -> &str {
        let path = self.path.trim_start_matches('/');
        let path = path.strip_prefix("v2/").unwrap_or(path);
        path.strip_suffix("/blobs").unwrap_or(path)
    }

    /// URL of the blob `digest`.
    #[must_use]
    pub fn url_of(&self, digest: &Digest) -> String {
        format!("{}{}/{digest}", self.origin, self.path)
    }

    /// The place of the same repository at another origin.
    #[must_use]
    pub fn repository_at(&self, mirror: &str) -> String {
        format!("{}{}", mirror.trim_end_matches('/'), self.path)
    }

    /// URL of the blob `digest` at another origin that has the same repositories: a mirror.
    #[must_use]
    pub fn url_at(&self, mirror: &str, digest: &Digest) -> String {
        format!("{}/{digest}", self.repository_at(mirror))
    }
}

impl fmt::Display for BlobPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.origin, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshotters_urls_are_understood() {
        let digest = Digest::of(b"");
        for (text, url, host, repository) in [
            (
                "https://registry-1.docker.io/v2/overlaybd/redis/blobs",
                "https://registry-1.docker.io/v2/overlaybd/redis/blobs/",
                "registry-1.docker.io",
                "overlaybd/redis",
            ),
            (
                "http://127.0.0.1:5000/v2/a/b/c/blobs/",
                "http://127.0.0.1:5000/v2/a/b/c/blobs/",
                "127.0.0.1:5000",
                "a/b/c",
            ),
            (
                "Reg.Example.com:443/v2/a/blobs",
                "https://reg.example.com:443/v2/a/blobs/",
                "reg.example.com:443",
                "a",
            ),
            (
                "https://reg.example.com:443/v2/a/blobs",
                "https://reg.example.com/v2/a/blobs/",
                "reg.example.com",
                "a",
            ),
            ("http://[::1]:5000/v2/a/blobs", "http://[::1]:5000/v2/a/blobs/", "[::1]:5000", "a"),
            (
                "http://files.example.com/layers",
                "http://files.example.com/layers/",
                "files.example.com",
                "layers",
            ),
        ] {
            let place = BlobPlace::parse(text).unwrap();
            // A port that is the scheme's own is dropped, whoever wrote it.
            let (url, host) = (url.replace(":443", ""), host.replace(":443", ""));
            assert_eq!(place.url_of(&digest), format!("{url}{digest}"), "{text}");
            assert_eq!(place.origin().host, host, "{text}");
            assert_eq!(place.repository(), repository, "{text}");
        }
    }

    #[test]
    fn what_is_no_place_of_blobs_is_refused_without_repeating_it() {
        for bad in [
            "",
            " ",
            "ftp://h/v2/a/blobs",
            "https://",
            "https://user:hunter2@h/v2/a/blobs",
            "https://hunter2@h/v2/a/blobs",
            "https://h/v2/a/blobs?token=hunter2",
            "https://h/v2/a/blobs#hunter2",
        ] {
            let error = BlobPlace::parse(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{bad}");
            assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn a_mirror_has_the_same_path() {
        let place = BlobPlace::parse("https://reg.example.com/v2/a/blobs").unwrap();
        let digest = Digest::of(b"");
        let url = place.url_at("http://127.0.0.1:5000/", &digest);
        assert_eq!(url, format!("http://127.0.0.1:5000/v2/a/blobs/{digest}"));
    }
}
