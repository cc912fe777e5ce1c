//! The documents of an image: index, manifest, config. Bytes in, values out.
//!
//! What a digest vouched for may still be nonsense, or two documents in one: a manifest that could
//! also be read as an index means different images to different readers, and is refused.

use super::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{LAYER_COUNT_MAX, MANIFEST_BYTES_MAX};
use crate::units::to_u64;
use serde::Deserialize;
use std::collections::BTreeMap;

/// The media types that we ask for and understand.
pub(super) const MEDIA_TYPES: [&str; 4] = [INDEX_OCI, INDEX_DOCKER, MANIFEST_OCI, MANIFEST_DOCKER];

const INDEX_OCI: &str = "application/vnd.oci.image.index.v1+json";
const INDEX_DOCKER: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const MANIFEST_OCI: &str = "application/vnd.oci.image.manifest.v1+json";
const MANIFEST_DOCKER: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// What overlaybd's annotations begin with.
const PREFIX: &str = "containerd.io/snapshot/overlaybd/";

/// Names one document or blob by its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// What the content is.
    pub(super) media_type: String,
    /// The digest of the content.
    pub(super) digest: Digest,
    /// Its length in bytes.
    pub(super) size_bytes: u64,
    annotations: BTreeMap<String, String>,
    platform: Option<Platform>,
}

/// What an image runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// `amd64`, `arm64`.
    pub architecture: String,
    /// `linux`.
    pub os: String,
}

impl Platform {
    /// What this program runs on, in the OCI's words.
    #[must_use]
    pub fn ours() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self { architecture: architecture.to_owned(), os: "linux".to_owned() }
    }
}

/// An index or a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Document {
    /// Images for several platforms.
    Index(Vec<Descriptor>),
    /// One image.
    Manifest(Manifest),
}

/// One image: its config and its layers, lowest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    /// The image's config.
    pub(super) config: Descriptor,
    /// The layers, all of them overlaybd's.
    pub(super) layers: Vec<Descriptor>,
    /// Whether the uppermost layer holds only a trace.
    pub(super) has_acceleration_layer: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    media_type: String,
    manifests: Option<Vec<RawDescriptor>>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    platform: Option<Platform>,
}

impl RawDescriptor {
    fn checked(self) -> Result<Descriptor> {
        Ok(Descriptor {
            media_type: self.media_type,
            digest: Digest::parse(&self.digest).map_err(|e| corrupt(format!("{e:#}")))?,
            size_bytes: self.size,
            annotations: self.annotations.unwrap_or_default(),
            platform: self.platform,
        })
    }
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

/// The index or manifest in `bytes`, whose digest has been checked.
///
/// # Errors
/// `Corrupt`; `InvalidFormat` for an image without overlaybd layers; `Unsupported` for TurboOCI.
pub(super) fn parse(bytes: &[u8]) -> Result<Document> {
    if to_u64(bytes.len()) > MANIFEST_BYTES_MAX {
        return Err(corrupt(format!("manifest: more than {MANIFEST_BYTES_MAX} bytes")));
    }
    let raw: RawDocument =
        serde_json::from_slice(bytes).map_err(|error| corrupt(format!("manifest: {error}")))?;
    let says_index = [INDEX_OCI, INDEX_DOCKER].contains(&raw.media_type.as_str());
    let says_manifest = [MANIFEST_OCI, MANIFEST_DOCKER].contains(&raw.media_type.as_str());
    match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), None, None) if !says_manifest => {
            let checked = manifests.into_iter().map(RawDescriptor::checked);
            Ok(Document::Index(checked.collect::<Result<_>>()?))
        }
        (None, Some(config), Some(layers)) if !says_index => {
            let checked = layers.into_iter().map(RawDescriptor::checked);
            let layers: Vec<Descriptor> = checked.collect::<Result<_>>()?;
            Ok(Document::Manifest(manifest(config.checked()?, layers)?))
        }
        _ => Err(corrupt("manifest: it is neither an index nor a manifest, or it is both")),
    }
}

fn manifest(config: Descriptor, layers: Vec<Descriptor>) -> Result<Manifest> {
    if layers.is_empty() || layers.len() > LAYER_COUNT_MAX {
        let found = layers.len();
        return Err(corrupt(format!("manifest: {found} layers, expected 1 to {LAYER_COUNT_MAX}")));
    }
    let last = layers.len() - 1;
    let mut has_acceleration_layer = false;
    for (number, layer) in layers.iter().enumerate() {
        let get = |name: &str| layer.annotations.get(&format!("{PREFIX}{name}"));
        if let Some(name) = ["turbo-oci/target-digest", "fastoci/target-digest"]
            .iter()
            .find(|name| get(name).is_some())
        {
            let message = format!("layer {number} has {name}: TurboOCI images are not supported");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let Some(digest) = get("blob-digest") else {
            let message =
                format!("layer {number} is not an overlaybd layer: it has no {PREFIX}blob-digest");
            return Err(Error::new(ErrorKind::InvalidFormat, message));
        };
        if digest != layer.digest.as_str() {
            let found = digest.chars().take(80).flat_map(char::escape_default).collect::<String>();
            let message =
                format!("layer {number}: blob-digest: found {found}, expected {}", layer.digest);
            return Err(corrupt(message));
        }
        if get("acceleration-layer").is_some_and(|value| value == "yes") {
            if number != last {
                return Err(corrupt(format!("layer {number} is a trace below other layers")));
            }
            has_acceleration_layer = true;
        }
    }
    Ok(Manifest { config, layers, has_acceleration_layer })
}

/// The image for `platform`. Attestations and other things that do not run are passed over.
///
/// # Errors
/// `NotFound`, with the platforms that there are.
pub(super) fn pick<'a>(index: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor> {
    let is_image = |found: &&Descriptor| {
        let understood = MEDIA_TYPES.contains(&found.media_type.as_str());
        let attests = found.annotations.contains_key("vnd.docker.reference.type");
        (understood || found.media_type.is_empty()) && !attests
    };
    let images: Vec<&Descriptor> = index.iter().filter(is_image).collect();
    let fits = |found: &&&Descriptor| found.platform.as_ref() == Some(platform);
    if let Some(found) = images.iter().find(fits) {
        return Ok(found);
    }
    // An index of one image that does not say what it is for is for whoever asks.
    match images.as_slice() {
        [only] if only.platform.is_none() => Ok(only),
        _ => {
            let names = images.iter().filter_map(|found| found.platform.as_ref());
            let names: Vec<String> = names.map(Platform::told).collect();
            let message =
                format!("no image for {}; there are: {}", platform.told(), names.join(", "));
            Err(Error::new(ErrorKind::NotFound, message))
        }
    }
}

impl Platform {
    fn told(&self) -> String {
        let told = format!("{}/{}", self.os, self.architecture);
        told.chars().take(60).flat_map(char::escape_default).collect()
    }
}

impl Descriptor {
    /// The name that an index of an OCI layout gives its image.
    #[must_use]
    pub(super) fn ref_name(&self) -> Option<&str> {
        self.annotations.get("org.opencontainers.image.ref.name").map(String::as_str)
    }
}

/// Checks an image's config, whose digest has been checked, against its manifest.
///
/// # Errors
/// `Corrupt`.
pub(super) fn check_config(bytes: &[u8], manifest: &Manifest) -> Result<()> {
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Vec<String>,
    }
    let config: Config =
        serde_json::from_slice(bytes).map_err(|error| corrupt(format!("image config: {error}")))?;
    let (found, expected) = (config.rootfs.diff_ids.len(), manifest.layers.len());
    if found != expected {
        let message =
            format!("image config: {found} diff_ids, expected one for each of {expected} layers");
        return Err(corrupt(message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn digest(name: &str) -> String {
        Digest::of(name.as_bytes()).to_string()
    }

    fn layer(name: &str) -> Value {
        json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": digest(name),
            "size": 512,
            "annotations": {
                "containerd.io/snapshot/overlaybd/blob-digest": digest(name),
                "containerd.io/snapshot/overlaybd/blob-size": "512",
            },
        })
    }

    fn manifest_of(layers: &[Value]) -> Value {
        json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_OCI,
            "config": {"mediaType": "c", "digest": digest("config"), "size": 2},
            "layers": layers,
        })
    }

    fn read(document: &Value) -> Result<Document> {
        parse(document.to_string().as_bytes())
    }

    #[test]
    fn an_overlaybd_manifest_has_its_layers_in_order() {
        let mut trace = layer("b");
        trace["annotations"]["containerd.io/snapshot/overlaybd/acceleration-layer"] = json!("yes");
        let Document::Manifest(found) = read(&manifest_of(&[layer("a"), trace.clone()])).unwrap()
        else {
            panic!("an index");
        };
        let digests: Vec<&str> = found.layers.iter().map(|layer| layer.digest.as_str()).collect();
        assert_eq!(digests, [digest("a"), digest("b")]);
        assert_eq!(found.layers[0].size_bytes, 512);
        assert!(found.has_acceleration_layer);

        assert!(check_config(br#"{"rootfs":{"diff_ids":["x","y"]}}"#, &found).is_ok());
        for bad in [&br#"{"rootfs":{"diff_ids":["x"]}}"#[..], b"{}", b"[]", b""] {
            assert_eq!(check_config(bad, &found).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        let below = read(&manifest_of(&[trace, layer("a")])).unwrap_err();
        assert_eq!(format!("{below:#}"), "layer 0 is a trace below other layers");
    }

    #[test]
    fn what_is_no_overlaybd_image_is_refused_by_layer() {
        let mut plain = layer("b");
        plain["annotations"] = json!({});
        let mut turbo = layer("b");
        turbo["annotations"]["containerd.io/snapshot/overlaybd/turbo-oci/target-digest"] =
            json!("x");
        let mut other = layer("b");
        other["annotations"]["containerd.io/snapshot/overlaybd/blob-digest"] = json!(digest("c"));
        for (bad, kind) in [
            (plain, ErrorKind::InvalidFormat),
            (turbo, ErrorKind::Unsupported),
            (other, ErrorKind::Corrupt),
        ] {
            let error = read(&manifest_of(&[layer("a"), bad])).unwrap_err();
            assert_eq!(error.kind(), kind);
            assert!(format!("{error:#}").starts_with("layer 1"), "{error:#}");
        }
    }

    #[test]
    fn a_document_is_one_thing() {
        let mut both = manifest_of(&[layer("a")]);
        both["manifests"] = json!([]);
        let mut lies = manifest_of(&[layer("a")]);
        lies["mediaType"] = json!(INDEX_OCI);
        let mut path = manifest_of(&[layer("a")]);
        path["layers"][0]["digest"] = json!("sha256:../../etc");
        let mut negative = manifest_of(&[layer("a")]);
        negative["layers"][0]["size"] = json!(-1);
        let too_many: Vec<Value> = (0..=LAYER_COUNT_MAX).map(|_| layer("a")).collect();
        for bad in [
            both,
            lies,
            path,
            negative,
            manifest_of(&[]),
            manifest_of(&too_many),
            json!({"mediaType": MANIFEST_OCI, "manifests": []}),
            json!({}),
            json!([]),
        ] {
            assert_eq!(read(&bad).unwrap_err().kind(), ErrorKind::Corrupt, "{bad}");
        }
        assert_eq!(parse(b"\xff").unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn the_image_for_this_platform_is_picked_and_no_attestation() {
        let entry = |name: &str, os: &str, architecture: &str| {
            json!({
                "mediaType": MANIFEST_OCI, "digest": digest(name), "size": 1,
                "platform": {"os": os, "architecture": architecture},
            })
        };
        let mut attestation = entry("attestation", "linux", "amd64");
        attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
        let unknown = entry("unknown", "unknown", "unknown");
        let arm = entry("arm", "linux", "arm64");
        let amd = entry("amd", "linux", "amd64");
        let index = json!({"manifests": [attestation, unknown, arm, amd]});
        let Document::Index(index) = read(&index).unwrap() else { panic!("a manifest") };
        for (architecture, name) in [("amd64", "amd"), ("arm64", "arm")] {
            let platform =
                Platform { architecture: architecture.to_owned(), os: "linux".to_owned() };
            assert_eq!(pick(&index, &platform).unwrap().digest.as_str(), digest(name));
        }
        let missing = Platform { architecture: "s390x".to_owned(), os: "linux".to_owned() };
        let error = pick(&index, &missing).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "no image for linux/s390x; there are: unknown/unknown, linux/arm64, linux/amd64"
        );
        let single = json!({"manifests": [{"mediaType": "", "digest": digest("x"), "size": 1}]});
        let Document::Index(single) = read(&single).unwrap() else { panic!("a manifest") };
        assert_eq!(pick(&single, &missing).unwrap().digest.as_str(), digest("x"));
    }
}
