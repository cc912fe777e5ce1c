//! An image as a folder in OCI's layout, made of overlaybd layers.

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::path::Path;

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// The digest of `bytes`, as registries write it.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", super::golden::hex(&Sha256::digest(bytes)))
}

/// Writes an image of these layers, lowest first, tagged `v1`; its manifest's digest.
pub(crate) fn write(folder: &Path, layers: &[Vec<u8>]) -> String {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = digest_of(bytes);
        fs::write(blobs.join(digest.strip_prefix("sha256:").unwrap()), bytes).unwrap();
        digest
    };
    let described: Vec<Value> = layers
        .iter()
        .map(|layer| {
            let digest = put(layer);
            json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": digest, "size": layer.len(),
                "annotations": {"containerd.io/snapshot/overlaybd/blob-digest": digest},
            })
        })
        .collect();
    let ids: Vec<&Value> = described.iter().map(|layer| &layer["digest"]).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": ids},
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "layers": described,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": put(&config), "size": config.len(),
        },
    });
    let manifest = manifest.to_string().into_bytes();
    let digest = put(&manifest);
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": MANIFEST, "digest": digest, "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": "v1"},
    }]});
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
    fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    digest
}
