//! References and OCI layouts: every document is what its digest says, or nothing is believed.

use crate::lab::Lab;
use crate::mock::{Fault, Part};
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::{Digest, Image, Options, Platform, open_layout};
use obd_ublk::source::Fetch;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// The documents of an image, by digest.
struct Documents {
    by_digest: HashMap<String, (String, Vec<u8>)>,
    index: Vec<u8>,
    manifest: String,
    config: String,
}

fn amd64() -> Platform {
    Platform { architecture: "amd64".to_owned(), os: "linux".to_owned() }
}

/// An image of one layer, for two platforms.
fn documents(layer: &str, layer_bytes: usize) -> Documents {
    let mut by_digest = HashMap::new();
    let mut add = |media_type: &str, document: &Value| {
        let bytes = document.to_string().into_bytes();
        let digest = Digest::of(&bytes).to_string();
        let described = json!({
            "mediaType": media_type, "digest": digest.clone(), "size": bytes.len(),
        });
        by_digest.insert(digest, (media_type.to_owned(), bytes));
        described
    };
    let config_json = json!({"rootfs": {"type": "layers", "diff_ids": [layer]}});
    let config = add("application/vnd.oci.image.config.v1+json", &config_json);
    let mut manifest_of = |size: usize| {
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config.clone(),
            "layers": [{
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": layer, "size": size,
                "annotations": {"containerd.io/snapshot/overlaybd/blob-digest": layer},
            }],
        });
        add(MANIFEST, &manifest)
    };
    let mut amd = manifest_of(layer_bytes);
    let mut arm = manifest_of(layer_bytes + 1);
    amd["platform"] = json!({"os": "linux", "architecture": "amd64"});
    arm["platform"] = json!({"os": "linux", "architecture": "arm64"});
    let manifest = amd["digest"].as_str().unwrap().to_owned();
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [arm, amd]});
    let config = config["digest"].as_str().unwrap().to_owned();
    Documents { by_digest, index: index.to_string().into_bytes(), manifest, config }
}

/// A registry with an image called `img:v1`.
fn lab() -> (Lab, Documents) {
    let lab = Lab::new();
    let documents = documents(&lab.digest, lab.content.len());
    {
        let mut state = lab.mock.state();
        for (digest, (media_type, bytes)) in &documents.by_digest {
            let manifest = (media_type.clone(), bytes.clone());
            state.content.manifests.insert(digest.clone(), manifest);
            state.content.blobs.insert(digest.clone(), bytes.clone().into());
        }
        let index = (INDEX.to_owned(), documents.index.clone());
        let digest = Digest::of(&documents.index).to_string();
        state.content.manifests.insert(digest, index.clone());
        state.content.manifests.insert("v1".to_owned(), index);
    }
    (lab, documents)
}

fn options(lab: &Lab) -> Options {
    Options { plain_hosts: vec![lab.mock.host()], ..Options::default() }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[test]
fn a_reference_leads_to_layers_that_can_be_read() {
    let (lab, documents) = lab();
    let registry = lab.registry(options(&lab));
    let index_digest = Digest::of(&documents.index);
    for reference in [
        format!("{}/img:v1", lab.mock.host()),
        format!("{}/img@{index_digest}", lab.mock.host()),
        format!("{}/img:whatever@{index_digest}", lab.mock.host()),
        format!("{}/img@{}", lab.mock.host(), documents.manifest),
    ] {
        let Image { digest, repo_blob_url, layers, has_acceleration_layer } =
            registry.image(&reference, &amd64(), soon()).unwrap();
        assert_eq!(digest.as_str(), documents.manifest, "{reference}");
        assert!(!has_acceleration_layer && layers.len() == 1);
        let place = repo_blob_url.unwrap();
        assert_eq!(place, lab.mock.blobs_of("img"), "{reference}");
        assert_eq!(layers[0].size_bytes, 100_000);
        let bytes = Some(layers[0].size_bytes);
        let blob = registry.blob(&place, layers[0].digest.as_str(), bytes, soon()).unwrap();
        let mut tail = [0; 512];
        blob.fetch(99_488, &mut tail, soon()).unwrap();
        assert_eq!(tail, lab.content[99_488..]);
    }
    let s390x = Platform { architecture: "s390x".to_owned(), ..amd64() };
    let reference = format!("{}/img:v1", lab.mock.host());
    let error = registry.image(&reference, &s390x, soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let told = "no image for linux/s390x; there are: linux/arm64, linux/amd64";
    assert_eq!(format!("{error:#}"), format!("find the image {reference}: {told}"));
}

#[test]
fn a_document_that_is_not_what_its_digest_says_is_refused_at_once() {
    let index_digest = |documents: &Documents| Digest::of(&documents.index).to_string();
    for name in ["index", "manifest", "config"] {
        let (lab, documents) = lab();
        let digest = match name {
            "index" => index_digest(&documents),
            "manifest" => documents.manifest.clone(),
            _ => documents.config.clone(),
        };
        {
            let mut state = lab.mock.state();
            // White space at the end: the same to any reader, and another digest.
            let media_type = documents.by_digest.get(&digest).map_or(INDEX, |(kind, _)| kind);
            let found = state.content.manifests.get(&digest).unwrap().1.clone();
            let other = [&found[..], b" "].concat();
            state.content.blobs.insert(digest.clone(), other.clone().into());
            state.content.manifests.insert(digest.clone(), (media_type.to_owned(), other));
        }
        let registry = lab.registry(options(&lab));
        let reference = format!("{}/img@{}", lab.mock.host(), index_digest(&documents));
        let error = registry.image(&reference, &amd64(), soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Integrity, "{name}: {error:?}");
        assert!(format!("{error:#}").contains(&digest), "{name}: {error:?}");
        let asked = lab.mock.state().log.iter().filter(|r| r.target.contains(&digest)).count();
        assert_eq!(asked, 1, "{name}");
    }
}

#[test]
fn a_registry_that_contradicts_its_own_header_is_not_believed() {
    let (lab, _) = lab();
    let other = Digest::of(b"other").to_string();
    let headers = vec![("Docker-Content-Digest".to_owned(), other)];
    lab.mock.fail(Part::Manifest, 1, Fault::Status(200, headers));
    let registry = lab.registry(options(&lab));
    let reference = format!("{}/img:v1", lab.mock.host());
    let error = registry.image(&reference, &amd64(), soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Integrity, "{error:?}");
}

#[test]
fn documents_are_fetched_through_trouble_and_not_through_nonsense() {
    for (name, fault, times, kind) in [
        ("503 twice", Fault::status(503), 2, None),
        ("cut twice", Fault::CutBody(10), 2, None),
        ("gzip for ever", Fault::Encoded, u64::MAX, Some(ErrorKind::Corrupt)),
        ("404", Fault::status(404), u64::MAX, Some(ErrorKind::NotFound)),
        ("206", Fault::status(206), u64::MAX, Some(ErrorKind::Corrupt)),
    ] {
        let (lab, _) = lab();
        lab.mock.fail(Part::Manifest, times, fault);
        let registry = lab.registry(options(&lab));
        let reference = format!("{}/img:v1", lab.mock.host());
        let found = registry.image(&reference, &amd64(), soon());
        assert_eq!(
            found.as_ref().err().map(obd_ublk::error::Error::kind),
            kind,
            "{name}: {found:?}"
        );
    }
}

/// The same image as a folder.
fn write_layout(folder: &Path, documents: &Documents) {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let write = |digest: &str, bytes: &[u8]| {
        std::fs::write(blobs.join(digest.strip_prefix("sha256:").unwrap()), bytes).unwrap();
    };
    for (digest, (_, bytes)) in &documents.by_digest {
        write(digest, bytes);
    }
    let digest = Digest::of(&documents.index).to_string();
    write(&digest, &documents.index);
    let entry = |name: &str| {
        json!({
            "mediaType": INDEX, "digest": digest, "size": documents.index.len(),
            "annotations": {"org.opencontainers.image.ref.name": name},
        })
    };
    let index = json!({"schemaVersion": 2, "manifests": [entry("v1")]});
    std::fs::write(folder.join("index.json"), index.to_string()).unwrap();
}

#[test]
fn an_oci_layout_leads_to_files() {
    let folder = tempfile::tempdir().unwrap();
    let documents = documents(&Digest::of(b"layer").to_string(), 5);
    write_layout(folder.path(), &documents);
    let text = folder.path().to_str().unwrap();
    let index = Digest::of(&documents.index);
    for name in [
        text.to_owned(),
        format!("{text}:v1"),
        format!("{text}@{index}"),
        format!("{text}@{}", documents.manifest),
    ] {
        let image = open_layout(&name, &amd64()).unwrap();
        assert_eq!(image.digest.as_str(), documents.manifest, "{name}");
        let (_, digits) = image.layers[0].digest.parts();
        let file = folder.path().join("blobs/sha256").join(digits);
        assert_eq!(image.layers[0].file.as_deref(), Some(&*file), "{name}");
        assert_eq!(image.repo_blob_url, None);
    }
    for (name, kind) in [
        (format!("{text}:v2"), ErrorKind::NotFound),
        (format!("{text}@{}", Digest::of(b"?")), ErrorKind::NotFound),
        (format!("{text}@sha256:00"), ErrorKind::InvalidConfig),
        (format!("{text}/nowhere"), ErrorKind::NotFound),
    ] {
        assert_eq!(open_layout(&name, &amd64()).unwrap_err().kind(), kind, "{name}");
    }
    let (_, digits) = documents.config.split_once(':').unwrap();
    std::fs::write(folder.path().join("blobs/sha256").join(digits), "{}").unwrap();
    let error = open_layout(text, &amd64()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Integrity, "{error:?}");
}
