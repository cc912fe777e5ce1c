//! From the name of an image to its layers: `docker://REFERENCE` and `oci-layout:FOLDER`.
//!
//! Index, manifest and config are believed only by their digests: that in the reference where there
//! is one, and each next one as the document before it says. What a tag means is the registry's
//! word, and its `Docker-Content-Digest` is checked against what it sent.

use super::client::{Counters, Registry};
use super::digest::Digest;
use super::fault::Fault;
use super::manifest::{self, Descriptor, Document, Manifest, Platform};
use super::reference::Reference;
use super::refusals::Refusals;
use super::route::{Ask, Route};
use super::runtime;
use super::tries::Tries;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::limits::{INDEX_DEPTH_MAX, MANIFEST_BYTES_MAX};
use crate::units::to_u64;
use reqwest::header::{self, HeaderName};
use reqwest::{Url, header::HeaderValue};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tokio::time;

/// An image, found and verified up to its layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Digest of its manifest.
    pub digest: Digest,
    /// Where its blobs are; `None` for an image in a folder.
    pub repo_blob_url: Option<String>,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
    /// Whether the uppermost layer holds only a trace.
    pub has_acceleration_layer: bool,
}

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// Its file, for an image in a folder.
    pub file: Option<PathBuf>,
}

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// The image of an OCI layout: `FOLDER`, `FOLDER:NAME` or `FOLDER@DIGEST`. Reads its documents and
/// no layer.
///
/// # Errors
/// `NotFound` for what is not there; `Integrity` for what is not what its digest says; `Corrupt`,
/// `InvalidFormat` and `Unsupported` for what is no image of ours.
pub fn open_layout(text: &str, platform: &Platform) -> Result<Image> {
    let (folder, name, digest) = split_layout(text)?;
    let layout = |digest: &Digest| {
        let (algorithm, digits) = digest.parts();
        folder.join("blobs").join(algorithm).join(digits)
    };
    let index = read_document(&folder.join("index.json"), None)?;
    let Document::Index(entries) = manifest::parse(&index)? else {
        let message = format!("{}: index.json is no index", folder.display());
        return Err(Error::new(ErrorKind::Corrupt, message));
    };
    let entries: Vec<Descriptor> = entries
        .into_iter()
        .filter(|entry| name.is_none_or(|name| entry.ref_name() == Some(name)))
        .filter(|entry| digest.as_ref().is_none_or(|digest| &entry.digest == digest))
        .collect();
    let mut found = match (entries.as_slice(), &digest) {
        ([only], _) => only.digest.clone(),
        // A digest may also be that of a document further down.
        ([], Some(digest)) => digest.clone(),
        (entries, _) => manifest::pick(entries, platform)?.digest.clone(),
    };
    for _ in 0..=INDEX_DEPTH_MAX {
        let bytes = read_document(&layout(&found), Some(&found))?;
        match manifest::parse(&bytes)? {
            Document::Index(index) => found = manifest::pick(&index, platform)?.digest.clone(),
            Document::Manifest(manifest) => {
                let config = &manifest.config.digest;
                let bytes = read_document(&layout(config), Some(config))?;
                manifest::check_config(&bytes, &manifest)?;
                let file = |layer: &Descriptor| Some(layout(&layer.digest));
                return Ok(image(found, None, &manifest, file));
            }
        }
    }
    Err(too_deep())
}

/// Folder, name and digest of an OCI layout's name.
fn split_layout(text: &str) -> Result<(&Path, Option<&str>, Option<Digest>)> {
    // The folder wins: its name may have such characters too.
    if Path::new(text).is_dir() {
        return Ok((Path::new(text), None, None));
    }
    if let Some((folder, digest)) = text.rsplit_once('@') {
        return Ok((Path::new(folder), None, Some(Digest::parse(digest)?)));
    }
    Ok(match text.rsplit_once(':') {
        Some((folder, name)) => (Path::new(folder), Some(name), None),
        None => (Path::new(text), None, None),
    })
}

fn read_document(path: &Path, digest: Option<&Digest>) -> Result<Vec<u8>> {
    let action = || format!("read {}", path.display());
    let failed = |error: std::io::Error| Error::io(action(), &error);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MANIFEST_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if to_u64(bytes.len()) > MANIFEST_BYTES_MAX {
        let message = format!("{}: more than {MANIFEST_BYTES_MAX} bytes", path.display());
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    if let Some(digest) = digest {
        digest.check(&path.display().to_string(), &bytes)?;
    }
    Ok(bytes)
}

fn image(
    digest: Digest,
    repo_blob_url: Option<String>,
    manifest: &Manifest,
    file: impl Fn(&Descriptor) -> Option<PathBuf>,
) -> Image {
    let layers = manifest.layers.iter().map(|layer| Layer {
        digest: layer.digest.clone(),
        size_bytes: layer.size_bytes,
        file: file(layer),
    });
    let layers = layers.collect();
    let has_acceleration_layer = manifest.has_acceleration_layer;
    Image { digest, repo_blob_url, layers, has_acceleration_layer }
}

fn too_deep() -> Error {
    let message = format!("more than {INDEX_DEPTH_MAX} indexes on the way to a manifest");
    Error::new(ErrorKind::Corrupt, message)
}

impl Registry {
    /// The image `reference` (what follows `docker://`) for `platform`. Asks the registry for
    /// index, manifest and config, which blocks until `deadline` at most; reads no layer.
    ///
    /// # Errors
    /// As [`open_layout`], `Io` when threads cannot be started, and why the registry could not be
    /// read.
    pub fn image(
        self: &Arc<Self>,
        reference: &str,
        platform: &Platform,
        deadline: Instant,
    ) -> Result<Image> {
        let reference = Reference::parse(reference)?;
        let executor = self.host(reference.host()).executor()?;
        let what = format!("find the image {reference}");
        let (registry, platform) = (Arc::clone(self), platform.clone());
        let finding = async move { registry.find(&reference, &platform, deadline).await };
        let found = runtime::run(&executor, deadline, || true, finding);
        found.map_err(|lost| lost.error(&what))?.context(|| what)
    }

    async fn find(
        &self,
        reference: &Reference,
        platform: &Platform,
        deadline: Instant,
    ) -> Result<Image> {
        let is_plain = self.transport.is_plain(reference.host());
        let place = reference.blob_place(is_plain);
        let base = format!("{}/v2/{}", place.origin(), reference.repository());
        let manifest_url = |name: &str| format!("{base}/manifests/{name}");
        let url = manifest_url(reference.target());
        let mut bytes = self.document(&url, reference.digest(), reference, deadline).await?;
        let mut found = reference.digest().cloned().unwrap_or_else(|| Digest::of(&bytes));
        for _ in 0..=INDEX_DEPTH_MAX {
            match manifest::parse(&bytes)? {
                Document::Index(index) => {
                    found = manifest::pick(&index, platform)?.digest.clone();
                    let url = manifest_url(found.as_str());
                    bytes = self.document(&url, Some(&found), reference, deadline).await?;
                }
                Document::Manifest(manifest) => {
                    let config = &manifest.config.digest;
                    let url = place.url_of(config);
                    let bytes = self.document(&url, Some(config), reference, deadline).await?;
                    manifest::check_config(&bytes, &manifest)?;
                    return Ok(image(found, Some(place.to_string()), &manifest, |_| None));
                }
            }
        }
        Err(too_deep())
    }

    /// A document of at most [`MANIFEST_BYTES_MAX`], with its digest checked.
    async fn document(
        &self,
        url: &str,
        digest: Option<&Digest>,
        reference: &Reference,
        deadline: Instant,
    ) -> Result<Vec<u8>> {
        let place = reference.blob_place(self.transport.is_plain(reference.host()));
        let access = self.access(&place);
        let host = self.host(&place.origin().host);
        let invalid = |e| Error::new(ErrorKind::InvalidConfig, format!("URL of {reference}: {e}"));
        let route = Route::new(Url::parse(url).map_err(invalid)?, Arc::clone(&access));
        let (own, refusals) = (Counters::default(), Refusals::default());
        let leave = (Arc::clone(&access), &refusals);
        let mut tries = Tries::new((self, &own), host, leave, deadline);
        loop {
            let trying = async {
                tries.before(&access, true).await?;
                Ok(self.attempt_document(&route, digest, (&own, &refusals)).await)
            };
            let outcome = match time::timeout_at(deadline.into(), trying).await {
                Ok(outcome) => outcome?,
                Err(_) => return Err(tries.too_late()),
            };
            match outcome {
                Ok(bytes) => {
                    tries.succeeded();
                    return Ok(bytes);
                }
                Err(fault) => tries.failed(fault).await?,
            }
        }
    }

    async fn attempt_document(
        &self,
        route: &Route,
        digest: Option<&Digest>,
        (own, refusals): (&Counters, &Refusals),
    ) -> Result<Vec<u8>, Fault> {
        let headers = vec![(header::ACCEPT, manifest::MEDIA_TYPES.join(", "))];
        let answer = route
            .open(Ask { registry: self, own, refusals, headers: &headers, is_suspect: false })
            .await?;
        let place = answer.place.clone();
        if answer.status() != 200 {
            let status = answer.status();
            return Err(Fault::malformed(format!("HTTP status {status} for all of {place}")));
        }
        let is_plain = |value: &HeaderValue| value.to_str().is_ok_and(|text| text == "identity");
        if answer.headers().get(header::CONTENT_ENCODING).is_some_and(|value| !is_plain(value)) {
            return Err(Fault::malformed(format!("an encoded body from {place}")));
        }
        let stated = answer.header(CONTENT_DIGEST).and_then(|text| Digest::parse(text).ok());
        let bytes = answer.whole(MANIFEST_BYTES_MAX).await?;
        for digest in digest.iter().copied().chain(&stated) {
            if let Err(error) = digest.check(&place, &bytes) {
                // Another try gives the same bytes, or ones that are no better.
                let fault = Fault::malformed(format!("{error:#}")).hopeless();
                return Err(Fault { kind: ErrorKind::Integrity, ..fault });
            }
        }
        Ok(bytes)
    }
}
