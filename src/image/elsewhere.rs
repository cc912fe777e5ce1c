//! Layers that lie in a registry: fetched by `registry`, kept by `cache`, put together here.
//!
//! ```text
//!   config: repoBlobUrl, digest --> registry::Blob --> cache::CachedBlob --> Source::Remote
//!   docker://REFERENCE, oci-layout:FOLDER --> manifest --> the text of such a config
//! ```

use super::layer::Layer;
use super::single::{DOCKER, LAYOUT};
use crate::cache::{BlobDigest, Cache, CachedBlob, Settings};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::{CredentialConfig, ImageConfig, LowerConfig, ServiceConfig};
use crate::limits::{OPEN_HEAD_BYTES, OPEN_REFETCHES_MAX, OPEN_TAIL_BYTES, RESOLVE_SECONDS_MAX};
use crate::registry::{CredentialSource, Mirror, Options, Platform, Registry, Secret, open_layout};
use crate::source::{RemoteBlob, Source};
use crate::units::to_u64;
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Moves the cache; an absolute path.
const CACHE_DIR_VARIABLE: &str = "OBD_UBLK_CACHE_DIR";

/// `HOST` or `HOST:PORT`, several separated by commas, to which `docker://` means plain http.
const PLAIN_HTTP_VARIABLE: &str = "OBD_UBLK_PLAIN_HTTP";

/// The text of a config for the image that `reference` names. Blocks on the network, as long as a
/// read of a layer may and for [`RESOLVE_SECONDS_MAX`] at most.
///
/// # Errors
/// `NotFound`, `Unauthorized`, `Unavailable` or `Timeout` when it cannot be had, `Integrity` when
/// it is not what its digest says.
pub(super) fn config_of(reference: &Path, service: &ServiceConfig) -> Result<Vec<u8>> {
    let text = reference.to_str().unwrap_or_default();
    let found = if let Some(layout) = text.strip_prefix(LAYOUT) {
        open_layout(layout, &Platform::ours())
    } else {
        let deadline = Instant::now() + patience(&cache_settings(service));
        let name = text.strip_prefix(DOCKER).unwrap_or(text);
        Registry::new(options(service))
            .and_then(|registry| registry.image(name, &Platform::ours(), deadline))
    };
    let image = found.context(|| format!("find {}", shown(text)))?;
    let lowers: Vec<_> = image
        .layers
        .iter()
        .map(|layer| {
            let file = layer.file.as_deref().map(std::path::absolute).and_then(|it| it.ok());
            json!({"file": file, "digest": layer.digest.as_str(), "size": layer.size_bytes})
        })
        .collect();
    let config = json!({
        "repoBlobUrl": image.repo_blob_url.unwrap_or_default(),
        "lowers": lowers,
        "upper": {},
        "resultFile": "",
        "accelerationLayer": image.has_acceleration_layer,
    });
    Ok(config.to_string().into_bytes())
}

/// A reference as it may be shown: what stands where a user and a password would is left out.
fn shown(text: &str) -> String {
    let Some(name) = text.strip_prefix(DOCKER) else { return text.to_owned() };
    // A password may look like a digest; what follows its `@` then has a slash, which none has.
    let is_digest = |last: &str| {
        (last.starts_with("sha256:") || last.starts_with("sha512:")) && !last.contains('/')
    };
    match name.rsplit_once('@') {
        None => text.to_owned(),
        Some((named, digest)) if is_digest(digest) => {
            let place = named.rsplit_once('@').map_or(named, |(_, place)| place);
            format!("{DOCKER}{place}@{digest}")
        }
        Some((_, place)) => format!("{DOCKER}{place}"),
    }
}

/// Where the cache is and how large it may be, as the host's config says.
#[must_use]
pub fn cache_settings(service: &ServiceConfig) -> Settings {
    let quota_bytes = service.cache_config.cache_size_gb.saturating_mul(1 << 30);
    let defaults = Settings::default();
    let deadline = service.io_deadline_seconds.map_or(defaults.deadline, Duration::from_secs);
    Settings {
        folder: cache_folder(|name| std::env::var_os(name)),
        quota_bytes,
        deadline,
        ..defaults
    }
}

/// How long one step of finding and opening an image may take.
fn patience(settings: &Settings) -> Duration {
    settings.deadline.min(Duration::from_secs(RESOLVE_SECONDS_MAX))
}

/// What finding the addresses of hosts goes on to need. In a container each of these may be a mount
/// of its own.
const RESOLVER_FILES: [&str; 3] = ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"];

/// Variables that name what certificates are checked with.
const AUTHORITY_VARIABLES: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// Variables that name where a credential helper finds what is its own.
const HELPER_VARIABLES: [&str; 2] = ["HOME", "XDG_RUNTIME_DIR"];

/// How the names of credential helpers begin.
const HELPER_PREFIX: &[u8] = b"docker-credential-";

/// Folders and files that reading the layers of an image from registries goes on to need, by the
/// names that they will be asked for. Not all of them need exist.
pub(super) fn needed(config: &ImageConfig, service: &ServiceConfig) -> Vec<PathBuf> {
    needed_with(config, service, |name| std::env::var_os(name))
}

fn needed_with(
    config: &ImageConfig,
    service: &ServiceConfig,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Vec<PathBuf> {
    let named = |name: &&str| variable(name).filter(|it| !it.is_empty()).map(PathBuf::from);
    let mut needed = vec![cache_folder(&variable)];
    // A layer's folder gets the layer's file when all of it is here.
    let far = config.stack_lowers().iter().filter(|lower| !lower.digest.is_empty());
    needed.extend(far.filter_map(|lower| path(&lower.dir)));
    for source in credentials(service).into_iter().chain(docker_file(&variable)) {
        match source {
            CredentialSource::File(path) | CredentialSource::Socket { path, .. } => {
                needed.push(path);
            }
            CredentialSource::Http { ca_file, client_certificate, .. } => {
                let pair = client_certificate.into_iter().flat_map(|(one, two)| [one, two]);
                needed.extend(ca_file.into_iter().chain(pair));
            }
        }
    }
    let cert = &service.cert_config;
    needed.extend([&cert.cert_file, &cert.key_file].into_iter().filter_map(|it| path(it)));
    needed.extend(service.registries.ca_files.iter().filter_map(|it| path(it)));
    needed.extend(AUTHORITY_VARIABLES.iter().filter_map(named));
    let helpers = helper_folders(&variable("PATH").unwrap_or_default());
    if !helpers.is_empty() {
        needed.extend(HELPER_VARIABLES.iter().filter_map(named));
    }
    needed.extend(helpers);
    needed.extend(RESOLVER_FILES.map(PathBuf::from));
    needed
}

/// The folders of the search path that hold credential helpers.
fn helper_folders(search_path: &OsStr) -> Vec<PathBuf> {
    let is_helper = |name: OsString| name.as_bytes().starts_with(HELPER_PREFIX);
    let has_helper = |folder: &PathBuf| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name()).any(is_helper)
    };
    std::env::split_paths(search_path).filter(|it| it.is_absolute()).filter(has_helper).collect()
}

fn cache_folder(variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let moved = variable(CACHE_DIR_VARIABLE).filter(|path| !path.is_empty());
    moved.map_or_else(|| Settings::default().folder, PathBuf::from)
}

/// Where docker keeps its credentials.
fn docker_file(variable: impl Fn(&str) -> Option<OsString>) -> Option<CredentialSource> {
    let named = |name| variable(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let folder = named("DOCKER_CONFIG").or_else(|| named("HOME").map(|home| home.join(".docker")));
    folder.map(|folder| CredentialSource::File(folder.join("config.json")))
}

/// The way to registries, and what is kept of them.
#[derive(Debug)]
pub(super) struct Elsewhere {
    registry: Arc<Registry>,
    cache: Cache,
    /// How long one step of opening may take.
    patience: Duration,
}

impl Elsewhere {
    /// As the host's config says.
    ///
    /// # Errors
    /// `InvalidConfig` naming the option.
    pub(super) fn new(service: &ServiceConfig) -> Result<Self> {
        let registry = Registry::new(options(service))?;
        let settings = cache_settings(service);
        let patience = patience(&settings);
        Ok(Self { registry, cache: Cache::open_or_bypass(settings), patience })
    }

    /// Opens a layer. Its head and its tail are fetched at once, if they are not here: opening it
    /// needs little more.
    ///
    /// # Errors
    /// `InvalidConfig` for a digest or a URL that cannot be; why the blob cannot be had; as
    /// [`Layer::open_sealed`].
    pub(super) fn open(&self, lower: &LowerConfig, repo_blob_url: &str) -> Result<Layer> {
        let blob = self.blob(lower, repo_blob_url)?;
        let bytes = blob.bytes();
        let error = match open_ends(&lower.digest, blob) {
            Err(error) if is_wrong(&error) && lower.size == 0 => error,
            opened => return opened,
        };
        // A plain file in the cache that was cut since it was checked has told a wrong length.
        match self.blob_of(lower, repo_blob_url, None) {
            Ok(blob) if blob.bytes() != bytes => open_ends(&lower.digest, blob),
            Ok(_) | Err(_) => Err(error),
        }
    }

    /// The blob of a layer, of which nothing is fetched yet. Its length is the config's, else that
    /// of what is here already (so that nobody need be asked for a layer that is all here), else
    /// the registry's.
    ///
    /// # Errors
    /// As [`Elsewhere::open`], but for the layer.
    pub(super) fn blob(&self, lower: &LowerConfig, repo_blob_url: &str) -> Result<CachedBlob> {
        let told = Some(lower.size).filter(|size| *size > 0);
        let kept = || self.cache.known_bytes(&BlobDigest::parse(&lower.digest).ok()?);
        self.blob_of(lower, repo_blob_url, told.or_else(kept))
    }

    /// As [`Elsewhere::blob`] for a blob of so many bytes; without, the registry is asked.
    fn blob_of(
        &self,
        lower: &LowerConfig,
        repo_blob_url: &str,
        bytes: Option<u64>,
    ) -> Result<CachedBlob> {
        let url = Some(lower.repo_blob_url.as_str()).filter(|url| !url.is_empty());
        let deadline = Instant::now() + self.patience;
        let url = url.unwrap_or(repo_blob_url);
        let blob = self.registry.blob(url, &lower.digest, bytes, deadline)?;
        let digest = BlobDigest::parse(&lower.digest)?;
        let blob = self.cache.blob(&digest, Arc::new(blob))?;
        if !lower.dir.is_empty() {
            // As many as are asked for in one open fit; one that does not is no loss.
            let _ = blob.commit_when_complete(PathBuf::from(&lower.dir));
        }
        Ok(blob)
    }
}

/// Fetches both ends of a blob and opens the layer that it is.
fn open_ends(name: &str, blob: CachedBlob) -> Result<Layer> {
    fill_ends(&blob)?;
    open_layer(name, Arc::new(blob))
}

/// Whether the bytes came, and their structure is not that of a layer.
fn is_wrong(error: &Error) -> bool {
    [ErrorKind::Corrupt, ErrorKind::Integrity, ErrorKind::InvalidFormat].contains(&error.kind())
}

/// Opens a layer. One whose structure is wrong, though its bytes came, is fetched once more where
/// it was looked at: with a right head it may be looked at elsewhere, which may be wrong, too.
///
/// # Errors
/// As [`Layer::open_sealed`].
fn open_layer(name: &str, blob: Arc<dyn RemoteBlob>) -> Result<Layer> {
    let open = |blob| Layer::open_sealed(name.to_owned(), Source::Remote(blob));
    let mut opened = open(Arc::clone(&blob));
    for _ in 0..OPEN_REFETCHES_MAX {
        if !opened.as_ref().is_err_and(is_wrong) {
            break;
        }
        // Once more, of the same bytes, to learn which ones they are.
        let (ranges, failed) = (Mutex::default(), AtomicBool::new(false));
        let seen = Arc::new(Seen { blob: Arc::clone(&blob), ranges, failed });
        let _ = open(Arc::clone(&seen) as Arc<dyn RemoteBlob>);
        if !seen.discard_all() {
            break;
        }
        opened = open(Arc::clone(&blob));
    }
    opened
}

/// A blob that notes what is read of it.
#[derive(Debug)]
struct Seen {
    blob: Arc<dyn RemoteBlob>,
    ranges: Mutex<Vec<Range<u64>>>,
    failed: AtomicBool,
}

impl Seen {
    /// Throws away what was read. Whether it may be another next time.
    fn discard_all(&self) -> bool {
        // What could not even be read is not wrong in content.
        if self.failed.load(Ordering::Relaxed) {
            return false;
        }
        let ranges = std::mem::take(&mut *self.ranges());
        let discard = |range: &&Range<u64>| self.blob.discard(range.start, range.end - range.start);
        ranges.iter().filter(discard).count() > 0
    }

    fn ranges(&self) -> std::sync::MutexGuard<'_, Vec<Range<u64>>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RemoteBlob for Seen {
    fn name(&self) -> &str {
        self.blob.name()
    }

    fn bytes(&self) -> u64 {
        self.blob.bytes()
    }

    fn read(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        let read = self.blob.read(offset_bytes, dst);
        self.failed.fetch_or(read.is_err(), Ordering::Relaxed);
        // A few pieces: the head, the tail, and an index that is read by the MiB.
        self.ranges().push(offset_bytes..offset_bytes.saturating_add(to_u64(dst.len())));
        read
    }

    fn is_here(&self, offset_bytes: u64, bytes: u64) -> bool {
        self.blob.is_here(offset_bytes, bytes)
    }

    fn kept_as(&self) -> Option<usize> {
        self.blob.kept_as()
    }

    fn cancel(&self) {
        self.blob.cancel();
    }
}

/// Brings both ends of a blob here, at the same time.
///
/// # Errors
/// Why they cannot be had. What only cannot be kept is fetched by who reads it.
fn fill_ends(blob: &CachedBlob) -> Result<()> {
    let bytes = blob.bytes();
    let tail = bytes.saturating_sub(OPEN_TAIL_BYTES)..bytes;
    let (head, tail) = std::thread::scope(|scope| {
        let spawned = std::thread::Builder::new()
            .name("open-tail".to_owned())
            .spawn_scoped(scope, || blob.fill(tail));
        let head = blob.fill(0..bytes.min(OPEN_HEAD_BYTES));
        // Without a thread for it, who opens the layer fetches it.
        let tail = spawned.ok().and_then(|tail| tail.join().ok()).unwrap_or(Ok(()));
        (head, tail)
    });
    let is_kept = |error: &Error| error.kind() != ErrorKind::NoSpace;
    match head.and(tail) {
        Err(error) if is_kept(&error) => Err(error),
        _ => Ok(()),
    }
}

fn options(service: &ServiceConfig) -> Options {
    let plain = std::env::var(PLAIN_HTTP_VARIABLE).unwrap_or_default();
    let plain = plain.split(',').map(str::trim).filter(|host| !host.is_empty());
    let ours = &service.registries;
    let mirrors = ours.mirrors.iter().map(|mirror| Mirror::new(&mirror.host, &mirror.url));
    let docker = docker_file(|name| std::env::var_os(name));
    let p2p = &service.p2p_config;
    Options {
        user_agent: service.user_agent.clone(),
        credentials: credentials(service).into_iter().chain(docker).collect(),
        p2p_prefix: Some(p2p.address.clone()).filter(|_| p2p.enable),
        client_certificate: pair(&service.cert_config.cert_file, &service.cert_config.key_file),
        plain_hosts: plain.map(ToOwned::to_owned).chain(ours.plain_hosts.clone()).collect(),
        insecure_hosts: ours.insecure_hosts.clone(),
        ca_files: ours.ca_files.iter().filter_map(|file| path(file)).collect(),
        mirrors: mirrors.collect(),
        ..Options::default()
    }
}

fn path(text: &str) -> Option<PathBuf> {
    Some(PathBuf::from(text)).filter(|_| !text.is_empty())
}

fn pair(one: &str, two: &str) -> Option<(PathBuf, PathBuf)> {
    path(one).zip(path(two))
}

/// Where the host's config says that credentials come from.
fn credentials(service: &ServiceConfig) -> Option<CredentialSource> {
    let CredentialConfig { mode, path: at, timeout, .. } = &service.credential_config;
    let timeout = Duration::from_secs(*timeout);
    match mode.as_str() {
        "" => path(&service.credential_file_path).map(CredentialSource::File),
        "file" => path(at).map(CredentialSource::File),
        "http" | "https" => Some(CredentialSource::Http {
            url: Secret::new(at.clone()),
            timeout,
            ca_file: path(&service.credential_config.server_ca_path),
            client_certificate: pair(
                &service.credential_config.client_cert_path,
                &service.credential_config.client_key_path,
            ),
        }),
        "uds" => path(at).map(|path| CredentialSource::Socket { path, timeout }),
        // The reference, too, goes on without.
        other => {
            tracing::warn!(mode = other, "credentialConfig: an unknown mode is ignored");
            None
        }
    }
}

/// The error for a layer that is neither here nor anywhere else.
pub(super) fn nowhere(looked: &str) -> Error {
    let message =
        format!("no local file (looked at {looked}), and no repoBlobUrl to fetch it from");
    Error::new(ErrorKind::NotFound, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_shown_without_the_user_that_none_has() {
        for (text, expected) in [
            ("docker://h:1/a/b:c", "docker://h:1/a/b:c"),
            ("docker://h/a@sha256:12", "docker://h/a@sha256:12"),
            ("docker://u:secret@h/a:c", "docker://h/a:c"),
            ("docker://h/a@sha512:12", "docker://h/a@sha512:12"),
            ("docker://u:se@cret@h/a@sha256:12", "docker://h/a@sha256:12"),
            ("docker://u:se@cret@h/a@sha512:12", "docker://h/a@sha512:12"),
            ("docker://u:secret@secret@127.0.0.1:1/a:c", "docker://127.0.0.1:1/a:c"),
            ("docker://u:secret@sha256:secret@h/a", "docker://h/a"),
            ("docker://u:sec/ret@h/a", "docker://h/a"),
            ("docker://u:secret@redis", "docker://redis"),
            ("oci-layout:/a@b/c", "oci-layout:/a@b/c"),
        ] {
            assert_eq!(shown(text), expected);
        }
    }

    /// A server keeps only the mounts that it needs. A credential that came later, or the file of a
    /// layer that was complete, used to be lost where its folder was a mount of its own.
    #[test]
    fn everything_that_is_looked_for_later_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let (helpers, others) = (folder.path().join("helpers"), folder.path().join("others"));
        for (folder, name) in [(&helpers, "docker-credential-x"), (&others, "docker-compose")] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(folder.join(name), "").unwrap();
        }
        let config = br#"{"lowers": [{"digest": "sha256:1", "dir": "/layers/1"},
            {"file": "/here", "dir": "/layers/2"}, {"digest": "sha256:3"}]}"#;
        let config = ImageConfig::parse(config).unwrap();
        let needed_of = |service: &str, variables: &[(&str, &str)]| {
            let service = ServiceConfig::parse(service.as_bytes()).unwrap();
            needed_with(&config, &service, |name| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| value.into())
            })
        };
        let search = format!("{}:relative:{}", others.display(), helpers.display());
        let helpers = helpers.to_str().unwrap();
        let https = r#"{"credentialConfig": {"mode": "https", "path": "https://c/",
            "server_ca_path": "/ca", "client_cert_path": "/cert", "client_key_path": "/key"},
            "certConfig": {"certFile": "/own-cert", "keyFile": "/own-key"},
            "registries": {"caFiles": ["/own-ca", ""]}}"#;
        for (service, variables, expected) in [
            (
                "{}",
                vec![("HOME", "/h"), ("PATH", "/none:relative")],
                vec![
                    crate::cache::FOLDER_DEFAULT,
                    "/layers/1",
                    "/opt/overlaybd/cred.json",
                    "/h/.docker/config.json",
                ],
            ),
            (
                r#"{"credentialFilePath": "/c/cred"}"#,
                vec![("HOME", "/h"), ("DOCKER_CONFIG", "/d"), ("SSL_CERT_FILE", "/ca.pem")],
                vec![
                    crate::cache::FOLDER_DEFAULT,
                    "/layers/1",
                    "/c/cred",
                    "/d/config.json",
                    "/ca.pem",
                ],
            ),
            (
                r#"{"credentialConfig": {"mode": "uds", "path": "/run/c.sock"}}"#,
                vec![("OBD_UBLK_CACHE_DIR", "/cache"), ("HOME", "/h"), ("PATH", &search)],
                vec!["/cache", "/layers/1", "/run/c.sock", "/h/.docker/config.json", "/h", helpers],
            ),
            (
                https,
                vec![("OBD_UBLK_CACHE_DIR", "/cache")],
                vec![
                    "/cache",
                    "/layers/1",
                    "/ca",
                    "/cert",
                    "/key",
                    "/own-cert",
                    "/own-key",
                    "/own-ca",
                ],
            ),
        ] {
            let expected = expected.into_iter().chain(RESOLVER_FILES).map(PathBuf::from);
            let expected: Vec<PathBuf> = expected.collect();
            assert_eq!(needed_of(service, &variables), expected, "{service}");
        }
    }
}
