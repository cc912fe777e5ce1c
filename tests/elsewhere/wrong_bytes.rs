//! Row 9 as a user meets it: bytes that are wrong, from the registry or from the others that the
//! host's config names.

use crate::mock::{self, Fault, Mock, Part};
use crate::{World, bytes_asked_for, disk_of, layer_of};
use obd_ublk::format::lsmt::{SegmentMapping, write_sealed};
use obd_ublk::registry::Digest;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

/// Row 9: what was damaged on its way, before the cache's own checksum was taken, is noticed by the
/// codec, thrown away and fetched once more, whichever answer it was; nobody sees an error.
#[test]
fn row_9_an_answer_that_was_damaged_on_its_way_is_fetched_once_more() {
    let disk = disk_of(6 << 20, 1);
    let layer = layer_of(&disk);
    let mut noticed = 0;
    for damaged in [0, 1, 2, 4, 6, 8] {
        let world = World::new();
        let config = world.config(&[world.push_blob(layer.clone())]);
        let config = config.to_str().unwrap();
        world.mock.fail(Part::Blob, damaged, Fault::Delay(0));
        world.mock.fail(Part::Blob, 1, Fault::Corrupt);
        let output = world.run(&["export", config]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{damaged}: {said}");
        assert!(output.stdout == disk, "{damaged}");
        noticed += usize::from(said.contains("wrong in content: fetched once more"));
        // The next process finds right bytes.
        assert!(world.run(&["export", config]).stdout == disk, "{damaged}");
    }
    assert!(noticed >= 4, "{noticed} of 6 damaged answers were noticed");
}

/// Row 9: what is wrong at its origin is an error, and asked for twice, however often it is read.
#[test]
fn row_9_what_is_wrong_at_its_origin_is_an_error_and_not_asked_for_without_end() {
    let disk = disk_of(6 << 20, 2);
    let layer = layer_of(&disk);
    let good = Digest::of(&layer).to_string();
    let mut wrong = layer.clone();
    // In the middle of the third MiB, where the data of some block is.
    wrong[5 << 19] ^= 1;
    let world = World::new();
    let lower = world.push_blob(layer);
    world.mock.state().content.blobs.insert(good.clone(), wrong.into());
    let config = world.config(&[lower]);
    let output = world.run(&["export", config.to_str().unwrap(), "-o", "/dev/null"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.lines().last().unwrap().contains("zfile block"), "{said}");
    let touching = |record: &mock::Record| {
        let range = record.range.as_deref().and_then(|range| range.strip_prefix("bytes="));
        let (first, last) = range.unwrap().split_once('-').unwrap();
        let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
        (first..=last).contains(&(5 << 19))
    };
    let asked = world.mock.log(Part::Blob).iter().filter(|record| touching(record)).count();
    // Again with everything, where all of it was here and found to have another digest meanwhile.
    assert!((2..=3).contains(&asked), "{asked}, once, and once more: {said}");
}

/// The settings of a host whose blobs a peer fetches, and that peer; it gives these bytes.
fn with_peer(world: &World, lower: &Value, bytes: Vec<u8>) -> (Mock, PathBuf) {
    let peer = Mock::start();
    let digest = lower["digest"].as_str().unwrap().to_owned();
    peer.state().content.blobs.insert(digest, bytes.into());
    let settings = world.path("overlaybd.json");
    let address = format!("{}/p2p", peer.url());
    let p2p = json!({"p2pConfig": {"enable": true, "address": address}});
    fs::write(&settings, p2p.to_string()).unwrap();
    (peer, settings)
}

/// Row 9: wrong bytes of a peer were fetched again from the same peer, and the layer could not be
/// read though the registry was right.
#[test]
fn row_9_what_a_peer_got_wrong_is_fetched_from_the_registry() {
    let disk = disk_of(6 << 20, 11);
    let layer = layer_of(&disk);
    for (name, wrong) in [
        ("everything", 0..layer.len()),
        ("the data", 1 << 20..5 << 20),
        ("the end", layer.len() - 50_000..layer.len()),
    ] {
        let world = World::new();
        let lower = world.push_blob(layer.clone());
        let mut lie = layer.clone();
        lie[wrong].iter_mut().for_each(|byte| *byte = !*byte);
        let (peer, settings) = with_peer(&world, &lower, lie);
        let config = world.config(&[lower]);
        let arguments = ["export", "--service-config", settings.to_str().unwrap()];
        let arguments = [&arguments[..], &[config.to_str().unwrap()]].concat();
        let output = world.run(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && output.stdout == disk, "{name}: {said}");
        assert!(peer.count(Part::Blob) > 0, "{name}");
        // Each extent once, and once more when all that is here has another digest, because of what
        // the peer gave and nobody has read.
        let asked = bytes_asked_for(&world);
        assert!(asked <= 2 * u64::try_from(layer.len()).unwrap(), "{name}: {asked}");
        assert!(world.run(&arguments).stdout == disk, "{name}: the next process");
    }
}

/// A mirror with a certificate that no authority of this host has signed.
fn mirror_with_own_certificate() -> (Mock, String) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder().with_no_client_auth();
    let config = config.with_single_cert(vec![own.cert.der().clone()], key).unwrap();
    (Mock::start_tls(Arc::new(config)), own.cert.pem())
}

/// No setting led to what the library could do: only peers were reachable.
#[test]
fn mirrors_and_whom_to_trust_are_named_in_the_hosts_config() {
    let disk = disk_of(3 << 20, 13);
    let layer = layer_of(&disk);
    for (trusted_by, is_used) in [("caFiles", true), ("insecureHosts", true), ("nothing", false)] {
        let world = World::new();
        let lower = world.push_blob(layer.clone());
        let (mirror, certificate) = mirror_with_own_certificate();
        let digest = lower["digest"].as_str().unwrap().to_owned();
        mirror.state().content.blobs.insert(digest, layer.clone().into());
        let ca = world.path("ca.pem");
        fs::write(&ca, certificate).unwrap();
        let trusted = if trusted_by == "caFiles" { json!(ca) } else { json!(mirror.host()) };
        let mirrors = json!([{"host": world.mock.host(), "url": mirror.url()}]);
        let settings = world.path("overlaybd.json");
        let told = json!({"registries": {"mirrors": mirrors, trusted_by: [trusted]}});
        fs::write(&settings, told.to_string()).unwrap();
        let config = world.config(&[lower]);
        let (settings, config) = (settings.to_str().unwrap(), config.to_str().unwrap());
        let output = world.run(&["export", "--service-config", settings, config]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && output.stdout == disk, "{trusted_by}: {said}");
        assert_eq!(mirror.count(Part::Blob) > 0, is_used, "{trusted_by}: {said}");
        assert_eq!(world.mock.count(Part::Blob) == 0, is_used, "{trusted_by}: {said}");
    }
    let world = World::new();
    let settings = world.path("overlaybd.json");
    let config = world.config(&[world.push_blob(layer)]);
    let many = vec![json!({"host": "a", "url": "https://b"}); 9];
    for (wrong, told) in [
        (json!({"mirrors": many}), "registries: found 9 mirrors, expected 8 at most"),
        (
            json!({"mirrors": [{"host": "a", "url": "https://user@b"}]}),
            "mirror: expected https://HOST, without a user",
        ),
        (json!({"mirrors": [{"host": "a"}]}), "missing field `url`"),
        (json!({"caFiles": [world.path("none.pem")]}), "none.pem"),
        (json!([]), "expected an object in registries"),
    ] {
        fs::write(&settings, json!({"registries": wrong}).to_string()).unwrap();
        let (settings, config) = (settings.to_str().unwrap(), config.to_str().unwrap());
        let output = world.run(&["export", "--service-config", settings, config]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(told), "{told}: {said}");
    }
}

/// A raw layer of `disk`, and one with a wrong byte in its place.
fn raw_layer_and_lie(disk: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let bytes = u64::try_from(disk.len()).unwrap();
    let segment = SegmentMapping {
        start_sector: 0,
        sectors: bytes / 512,
        mapped_sector: 8,
        zeroed: false,
        tag: 0,
    };
    let layer = write_sealed(&[segment], disk, bytes);
    let mut lie = layer.clone();
    lie[2 << 20] ^= 1;
    (layer, lie)
}

/// Row 9: it once ended with 0, and the byte in its output.
#[test]
fn row_9_an_export_that_has_read_a_wrong_byte_fails_and_leaves_no_file() {
    let disk = disk_of(3 << 20, 12);
    let world = World::new();
    let (layer, lie) = raw_layer_and_lie(&disk);
    let lower = world.push_blob(layer);
    let (_peer, settings) = with_peer(&world, &lower, lie);
    let (config, output) = (world.config(&[lower]), world.path("disk"));
    let (settings, config) = (settings.to_str().unwrap(), config.to_str().unwrap());
    let export = ["export", "--service-config", settings, config, "-o", output.to_str().unwrap()];
    let failed = world.run(&export);
    let said = String::from_utf8_lossy(&failed.stderr);
    assert_eq!(failed.status.code(), Some(5), "{said}");
    assert!(said.contains("what was fetched has another digest"), "{said}");
    assert!(!output.exists());
    let again = world.run(&export);
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert!(fs::read(&output).unwrap() == disk, "from the registry itself");
}

/// Row 9: nothing but the digest tells of a raw layer that it is wrong.
#[test]
fn row_9_a_raw_layer_that_a_peer_got_wrong_is_pulled_again_from_the_registry() {
    let disk = disk_of(3 << 20, 12);
    let world = World::new();
    let (layer, lie) = raw_layer_and_lie(&disk);
    let lower = world.push_blob(layer.clone());
    let (peer, settings) = with_peer(&world, &lower, lie);
    let config = world.config(&[lower]);
    let (settings, config) = (settings.to_str().unwrap(), config.to_str().unwrap());
    let pulled = world.run(&["prefetch", "--service-config", settings, config]);
    let said = String::from_utf8_lossy(&pulled.stderr);
    assert!(pulled.status.success(), "{said}");
    assert!(said.contains("have another digest: thrown away"), "{said}");
    assert!(peer.count(Part::Blob) > 0);
    assert_eq!(bytes_asked_for(&world), u64::try_from(layer.len()).unwrap());
    let requests = (peer.count(Part::Blob), world.mock.count(Part::Blob));
    assert!(world.run(&["export", "--service-config", settings, config]).stdout == disk);
    assert_eq!((peer.count(Part::Blob), world.mock.count(Part::Blob)), requests);
}
