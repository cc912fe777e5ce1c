//! Names of images: `HOST/REPOSITORY:TAG@DIGEST`, with docker's defaults.
//!
//! `redis` is `docker.io/library/redis:latest`. What is before the first slash is a host only if it
//! looks like one: it has a dot or a port, or is `localhost`. Docker Hub answers under another name
//! than it is called by.

use super::blob_url::{BlobPlace, Origin};
use super::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::REFERENCE_BYTES_MAX;
use std::fmt;

/// What Docker Hub is called in names of images and in credential files.
pub(super) const DOCKER_HUB: &str = "docker.io";

/// Where Docker Hub answers.
pub(super) const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// The name of an image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The image called `text`.
    ///
    /// # Errors
    /// `InvalidConfig`. It repeats nothing of a name with a user in it.
    pub fn parse(text: &str) -> Result<Self> {
        if names_a_user(text) {
            let message = "image reference: it names a user, who belongs with the password into \
                           docker's config.json";
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        let invalid = |why: &str| {
            let shown: String = text.chars().take(200).flat_map(char::escape_default).collect();
            Error::new(ErrorKind::InvalidConfig, format!("image reference {shown:?}: {why}"))
        };
        if text.len() > REFERENCE_BYTES_MAX {
            return Err(invalid("too long"));
        }
        let (name, digest) = match text.rsplit_once('@') {
            Some((name, digest)) => (name, Some(Digest::parse(digest)?)),
            None => (text, None),
        };
        let (host, path) = match name.split_once('/') {
            Some((host, path)) if looks_like_a_host(host) => {
                // One that only its capitals tell from a part of a repository keeps them.
                let lower = host.to_ascii_lowercase();
                (if looks_like_a_host(&lower) { lower } else { host.to_owned() }, path)
            }
            _ => (DOCKER_HUB.to_owned(), name),
        };
        if !is_host(&host) {
            return Err(invalid("the host is none"));
        }
        let (path, tag) = match path.rsplit_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (path, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(invalid("the tag has characters that none may have"));
        }
        if !path.split('/').all(is_component) {
            return Err(invalid("the repository has a part that is empty or not lower-case"));
        }
        let host = if is_docker_hub(&host) { DOCKER_HUB.to_owned() } else { host };
        let is_official = host == DOCKER_HUB && !path.contains('/');
        let repository = if is_official { format!("library/{path}") } else { path.to_owned() };
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self { host, repository, tag, digest })
    }

    /// The host by which the registry is called.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository in that registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The digest that the image must have, if the name says so.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What to ask the registry for: the digest, else the tag.
    #[must_use]
    pub fn target(&self) -> &str {
        let digest = self.digest.as_ref().map(Digest::as_str);
        digest.or(self.tag.as_deref()).unwrap_or("latest")
    }

    /// Who answers for this image; over plain http only if `is_plain`.
    #[must_use]
    pub fn origin(&self, is_plain: bool) -> Origin {
        let host = if self.host == DOCKER_HUB { DOCKER_HUB_HOST } else { &self.host };
        let own_port = if is_plain { ":80" } else { ":443" };
        let host = host.strip_suffix(own_port).unwrap_or(host).to_ascii_lowercase();
        Origin { is_https: !is_plain, host }
    }

    /// Where the blobs of this image are.
    #[must_use]
    pub fn blob_place(&self, is_plain: bool) -> BlobPlace {
        BlobPlace::of_repository(self.origin(is_plain), &self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Whether somebody is named in front of the host. There is one `@` at most, before a digest, which
/// has no slash: a password may have both.
fn names_a_user(text: &str) -> bool {
    text.rsplit_once('@').is_some_and(|(name, rest)| name.contains('@') || rest.contains('/'))
}

/// Whether `host` is one of the names of Docker Hub.
#[must_use]
pub(super) fn is_docker_hub(host: &str) -> bool {
    [DOCKER_HUB, DOCKER_HUB_HOST, "index.docker.io"].contains(&host)
}

fn looks_like_a_host(text: &str) -> bool {
    text.contains(['.', ':']) || text == "localhost" || text.bytes().any(|b| b.is_ascii_uppercase())
}

/// A name or an address, perhaps with a port.
fn is_host(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        Some((address, rest)) => {
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            ("", rest)
        }
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let good_port = match port.strip_prefix(':') {
        Some(digits) => {
            digits.bytes().all(|byte| byte.is_ascii_digit()) && digits.parse::<u16>().is_ok()
        }
        None => port.is_empty(),
    };
    let is_label = |label: &str| {
        let inside = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        !label.is_empty() && label.bytes().all(inside) && !label.starts_with('-')
    };
    good_port
        && (name.is_empty() == text.starts_with('['))
        && name.split('.').all(|label| is_label(label) || text.starts_with('['))
}

fn is_tag(tag: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    (1..=128).contains(&tag.len()) && tag.bytes().all(inside) && !tag.starts_with(['.', '-'])
}

/// One part of a repository: runs of letters and digits, held together by one dot, one or two
/// underscores, or dashes.
fn is_component(text: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends = bytes.first().copied().is_some_and(is_letter)
        && bytes.last().copied().is_some_and(is_letter);
    let joint = |run: &[u8]| {
        matches!(run, b"" | b"." | b"_" | b"__") || run.iter().all(|byte| *byte == b'-')
    };
    ends && bytes.split(|byte| is_letter(*byte)).all(joint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_get_dockers_defaults() {
        let digest = Digest::of(b"");
        for (text, full, origin, target) in [
            ("redis", "docker.io/library/redis:latest", "https://registry-1.docker.io", "latest"),
            ("Host/a", "Host/a:latest", "https://host", "latest"),
            ("a/redis:7", "docker.io/a/redis:7", "https://registry-1.docker.io", "7"),
            (
                "docker.io/redis",
                "docker.io/library/redis:latest",
                "https://registry-1.docker.io",
                "latest",
            ),
            (
                "index.docker.io/a/b",
                "docker.io/a/b:latest",
                "https://registry-1.docker.io",
                "latest",
            ),
            ("localhost/a", "localhost/a:latest", "https://localhost", "latest"),
            ("localhost:5000/a/b:x.y", "localhost:5000/a/b:x.y", "https://localhost:5000", "x.y"),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest", "https://127.0.0.1:5000", "latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest", "https://[::1]:5000", "latest"),
            (
                "Reg.example.com/a__b/c-d.e",
                "reg.example.com/a__b/c-d.e:latest",
                "https://reg.example.com",
                "latest",
            ),
            (
                "reg.example.com:443/a",
                "reg.example.com:443/a:latest",
                "https://reg.example.com",
                "latest",
            ),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!(reference.to_string(), full, "{text}");
            assert_eq!(reference.origin(false).to_string(), origin, "{text}");
            assert_eq!(reference.target(), target, "{text}");
        }
        let pinned = Reference::parse(&format!("reg.example.com/a:b@{digest}")).unwrap();
        assert_eq!(pinned.target(), digest.as_str());
        assert_eq!(pinned.to_string(), format!("reg.example.com/a:b@{digest}"));
        let place = Reference::parse("localhost:5000/a/b").unwrap().blob_place(true);
        assert_eq!(place.to_string(), "http://localhost:5000/v2/a/b/blobs");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let too_long = format!("a/{}", "b".repeat(REFERENCE_BYTES_MAX));
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "a:",
            "a:-b",
            "a@",
            "a@sha256:00",
            "A",
            "a/B",
            "a b",
            "a/../b",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "host.x:70000/a",
            "host.x:/a",
            "host..x/a",
            "-h.x/a",
            "[::1/a",
            "[zz]:1/a",
            "a:b:c",
            "host.x:+80/a",
            &too_long,
        ] {
            let found = Reference::parse(bad);
            assert_eq!(found.map_err(|e| e.kind()), Err(ErrorKind::InvalidConfig), "{bad}");
        }
    }

    #[test]
    fn a_user_is_refused_and_nothing_of_the_name_is_repeated() {
        let too_long = format!("user:hunter2@host.x/{}", "b".repeat(REFERENCE_BYTES_MAX));
        let pinned = format!("u:hunter2@host.x/a@{}", Digest::of(b""));
        for text in [
            "u:hunter2@host.x/a",
            "hunter2@host.x/a:b",
            "u:hunter2@hunter2@127.0.0.1:18080/test:x",
            "u:hunter2@hunter2@hunter2",
            "u:hunter2/hunter2@127.0.0.1:18080/test",
            "u:hunter2@sha256:hunter2@host.x/a",
            "u:hunter2@host.x/a@sha256:00",
            "https://u:hunter2@host.x/a",
            "@host.x/a",
            &pinned,
            &too_long,
        ] {
            let error = Reference::parse(text).unwrap_err();
            let told = "image reference: it names a user, who belongs with the password into \
                        docker's config.json";
            assert_eq!((error.kind(), &*error.to_string()), (ErrorKind::InvalidConfig, told));
        }
        // One `@` before what may be meant for a digest.
        let error = Reference::parse("host.x/a@sha256:00").unwrap_err();
        assert!(error.to_string().starts_with("digest: found \"sha256:00\""), "{error}");
    }

    proptest! {
        #[test]
        fn the_full_name_means_the_same(text in "[a-zA-D0-9.:/@_-]{1,40}") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
            }
        }

        #[test]
        fn no_name_is_too_strange(text in "\\PC{0,80}") {
            let _ = Reference::parse(&text);
        }
    }
}
