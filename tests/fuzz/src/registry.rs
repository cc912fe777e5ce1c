//! The registry's pure parsers, compiled here once more: as a feature of the crate they would bring
//! an executor and a TLS stack into every target.

#![allow(dead_code)]

#[path = "../../../src/registry/blob_url.rs"]
mod blob_url;
#[path = "../../../src/registry/challenge.rs"]
mod challenge;
#[path = "../../../src/registry/digest.rs"]
mod digest;
#[path = "../../../src/registry/manifest.rs"]
mod manifest;
#[path = "../../../src/registry/range.rs"]
mod range;
#[path = "../../../src/registry/reference.rs"]
mod reference;

use manifest::{Document, Platform};
use obd_ublk::limits::{LAYER_COUNT_MAX, REFERENCE_BYTES_MAX};
use range::{Answer, Asked};
use reference::Reference;

/// A `WWW-Authenticate` header. What is found in it is no longer than the header, and a token is
/// only wanted of somebody who is named.
pub fn www_authenticate(header: &str) {
    let challenges = challenge::parse(header);
    let bytes = |found: &challenge::Challenge| {
        let pairs = found.parameters.iter().map(|(name, value)| name.len() + value.len());
        found.scheme.len() + pairs.sum::<usize>()
    };
    assert!(challenges.iter().map(bytes).sum::<usize>() <= header.len());
    for challenge in &challenges {
        assert_eq!(challenge.scheme, challenge.scheme.to_ascii_lowercase());
    }
    if let Some(challenge::Wanted::Bearer { realm, .. }) = challenge::wanted([header]) {
        assert!(!realm.is_empty());
    }
}

/// A `Content-Range` as the answer to a request for `start..start + bytes`. What is accepted is
/// what was asked for; what is printed again parses to the same.
pub fn content_range(header: &str, start: u64, bytes: u64) {
    let parsed = range::parse_content_range(header);
    if let Some((range, total)) = &parsed {
        assert!(range.start < range.end && total.is_none_or(|total| range.end <= total));
        let total = total.map_or("*".to_owned(), |total| total.to_string());
        let printed = format!("bytes {}-{}/{total}", range.start, range.end - 1);
        assert_eq!(range::parse_content_range(&printed), parsed);
    }
    let end = start.saturating_add(bytes.max(1));
    if start == end {
        return;
    }
    for total_bytes in [None, Some(end), Some(u64::MAX)] {
        let asked = Asked { bytes: start..end, total_bytes };
        let answer = Answer { status: 206, content_ranges: &[header], ..Answer::default() };
        if let Ok(accepted) = range::judge(&asked, &answer) {
            let (range, total) = parsed.clone().expect("what is accepted parses");
            assert_eq!(range, start..end);
            assert!(accepted.ends && accepted.total_bytes == total.or(total_bytes));
        }
    }
}

/// An index or a manifest. Its layers are few, and each has a digest that is one.
pub fn manifest(bytes: &[u8]) {
    match manifest::parse(bytes) {
        Ok(Document::Index(index)) => {
            if let Ok(picked) = manifest::pick(&index, &Platform::ours()) {
                assert!(digest::Digest::parse(picked.digest.as_str()).is_ok());
                let _ = picked.ref_name();
            }
        }
        Ok(Document::Manifest(found)) => {
            assert!(!found.layers.is_empty() && found.layers.len() <= LAYER_COUNT_MAX);
            for layer in &found.layers {
                assert!(digest::Digest::parse(layer.digest.as_str()).is_ok());
            }
            let _ = manifest::check_config(bytes, &found);
        }
        Err(_) => {}
    }
}

/// The name of an image, which parses to itself when it is printed in full; and the place of its
/// blobs, which is one.
pub fn reference(text: &str) {
    let Ok(parsed) = Reference::parse(text) else { return };
    let printed = parsed.to_string();
    if printed.len() <= REFERENCE_BYTES_MAX {
        assert_eq!(Reference::parse(&printed).expect("the full name parses"), parsed);
    }
    for is_plain in [false, true] {
        let place = parsed.blob_place(is_plain);
        assert_eq!(place.repository(), parsed.repository());
        let _ = blob_url::BlobPlace::parse(&place.to_string());
    }
    let _ = blob_url::BlobPlace::parse(text);
}
