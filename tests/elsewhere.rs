//! Images whose layers lie in a registry: read by the program through the cache, compared with what
//! the reference says that they hold.

#![cfg(feature = "registry")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "nbd/client.rs"]
#[allow(dead_code)]
mod client;
mod common;
#[path = "../tools/mock-registry/mod.rs"]
mod mock;
#[path = "elsewhere/wrong_bytes.rs"]
mod wrong_bytes;

use common::golden::{Case, Golden};
use common::oci_layout::{self, MANIFEST};
use mock::{Fault, Mock, Part};
use obd_ublk::format::lsmt::{SegmentMapping, write_sealed};
use obd_ublk::format::zfile::{self, Algorithm, WriteOptions};
use obd_ublk::registry::Digest;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A registry and an empty cache.
struct World {
    mock: Mock,
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { mock: Mock::start(), folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts the layers of a case into the registry; how a config names them.
    fn push(&self, golden: &Golden, case: &Case) -> Vec<Value> {
        let files = golden.materialise(case);
        let layers = case.layers();
        let push = |layer: &String| {
            let bytes = fs::read(files.path(layer)).unwrap();
            let digest = Digest::of(&bytes).to_string();
            let size = bytes.len();
            self.mock.state().content.blobs.insert(digest.clone(), bytes.into());
            json!({"digest": digest, "size": size})
        };
        layers.iter().map(push).collect()
    }

    /// Puts a blob into the registry; how a config names it.
    fn push_blob(&self, bytes: Vec<u8>) -> Value {
        let (digest, size) = (Digest::of(&bytes).to_string(), bytes.len());
        self.mock.state().content.blobs.insert(digest.clone(), bytes.into());
        json!({"digest": digest, "size": size})
    }

    fn config(&self, lowers: &[Value]) -> PathBuf {
        let path = self.path("config.json");
        let config = json!({"repoBlobUrl": self.mock.blobs_of("img"), "lowers": lowers});
        fs::write(&path, config.to_string()).unwrap();
        path
    }

    /// Runs the program as somebody with this cache and no credentials.
    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_obd-ublk"));
        command
            .args(arguments)
            .env("OBD_UBLK_CACHE_DIR", self.path("cache"))
            .env("OBD_UBLK_PLAIN_HTTP", self.mock.host())
            .env("DOCKER_CONFIG", self.path("no-docker"))
            .stdin(Stdio::null());
        command
    }

    /// The digest of the image's whole disk.
    fn sha256_of(&self, image: &str) -> String {
        let output = self.run(&["export", image]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{image}: {said}");
        Sha256::digest(&output.stdout).iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A disk of so many bytes that cannot be compressed.
fn disk_of(bytes: usize, seed: u64) -> Vec<u8> {
    let words = (0..).flat_map(|number| mock::fault::mix(seed, number).to_le_bytes());
    words.take(bytes).collect()
}

/// A compressed layer that holds all of `disk`.
fn layer_of(disk: &[u8]) -> Vec<u8> {
    const SECTORS_MAX: u64 = 16_000;
    let sectors = u64::try_from(disk.len()).unwrap() / 512;
    let segments: Vec<_> = (0..sectors)
        .step_by(16_000)
        .map(|start_sector| SegmentMapping {
            start_sector,
            sectors: SECTORS_MAX.min(sectors - start_sector),
            // The header takes the first eight.
            mapped_sector: start_sector + 8,
            zeroed: false,
            tag: 0,
        })
        .collect();
    let lsmt = write_sealed(&segments, disk, sectors * 512);
    let options =
        WriteOptions { algorithm: Algorithm::Lz4, block_bytes: 4096, ..WriteOptions::default() };
    zfile::write(&lsmt, &options).unwrap()
}

fn is_read_only_disk(case: &&Case) -> bool {
    let kinds = ["lsmt-sealed", "zfile(lsmt)", "zfile(lsmt)+tar", "stack", "ext4-stack"];
    kinds.contains(&case.kind.as_str())
        && case.upper().is_none()
        && case.virtual_size.is_some_and(|size| size < 64 << 20)
}

#[test]
fn golden_images_in_a_registry_are_read_once_and_then_from_the_cache() {
    let golden = Golden::load();
    let mut read = 0;
    for case in golden.cases().iter().filter(is_read_only_disk) {
        let world = World::new();
        let lowers = world.push(&golden, case);
        let config = world.config(&lowers);
        let config = config.to_str().unwrap();
        let expected = case.expected_sha256.clone().unwrap();
        assert_eq!(world.sha256_of(config), expected, "{}", case.name);
        let requests = world.mock.count(Part::Blob);
        assert!(requests > 0, "{}", case.name);
        // Another process, and nobody is asked again. The registry may be gone.
        world.mock.fail(Part::Blob, u64::MAX, Fault::status(500));
        assert_eq!(world.sha256_of(config), expected, "{}", case.name);
        assert_eq!(world.mock.count(Part::Blob), requests, "{}", case.name);
        read += 1;
    }
    assert!(read >= 10, "{read} images");
}

#[test]
fn an_image_is_named_by_its_reference_or_by_its_layout() {
    let golden = Golden::load();
    let case = golden.cases().iter().find(|case| case.name == "stack8").unwrap();
    let world = World::new();
    let lowers = world.push(&golden, case);
    let expected = case.expected_sha256.clone().unwrap();
    let blob = |layer: &Value| {
        world.mock.state().content.blobs[layer["digest"].as_str().unwrap()].to_vec()
    };
    let layers: Vec<Vec<u8>> = lowers.iter().map(blob).collect();
    let layout = world.path("layout");
    let digest = oci_layout::write(&layout, &layers);
    let blobs = layout.join("blobs/sha256");
    for file in fs::read_dir(&blobs).unwrap() {
        let file = file.unwrap();
        let name = format!("sha256:{}", file.file_name().to_str().unwrap());
        world.mock.state().content.blobs.insert(name, fs::read(file.path()).unwrap().into());
    }
    let manifest = fs::read(blobs.join(digest.strip_prefix("sha256:").unwrap())).unwrap();
    let tag = |name: &str| {
        let tagged = (MANIFEST.to_owned(), manifest.clone());
        world.mock.state().content.manifests.insert(name.to_owned(), tagged);
    };
    tag("v1");
    let reference = format!("docker://{}/img:v1", world.mock.host());
    assert_eq!(world.sha256_of(&reference), expected);
    // By its digest, too, and not by another one.
    tag(&digest);
    let reference = format!("docker://{}/img@{digest}", world.mock.host());
    assert_eq!(world.sha256_of(&reference), expected);
    let verified = world.run(&["verify", &reference]);
    assert!(verified.status.success(), "{verified:?}");
    let layout = format!("oci-layout:{}", layout.display());
    let requests = world.mock.count(Part::Blob);
    assert_eq!(world.sha256_of(&layout), expected);
    assert_eq!(world.mock.count(Part::Blob), requests, "a folder needs no registry");
}

#[test]
fn a_layer_that_cannot_be_had_is_told_in_one_line_with_its_place() {
    let golden = Golden::load();
    let case = golden.cases().iter().find(|case| case.name == "stack8").unwrap();
    let world = World::new();
    let mut lowers = world.push(&golden, case);
    let absent = format!("sha256:{}", "0".repeat(64));
    lowers[3]["digest"] = absent.clone().into();
    let config = world.config(&lowers);
    let output = world.run(&["export", config.to_str().unwrap(), "-o", "/dev/null"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{said}");
    let line = said.lines().last().unwrap();
    for part in ["open layer 3", &absent, &world.mock.host(), "404"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    // Nowhere to look for it.
    let path = world.path("nowhere.json");
    fs::write(&path, json!({"lowers": [{"digest": absent}]}).to_string()).unwrap();
    let output = world.run(&["export", path.to_str().unwrap()]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{said}");
    assert!(said.contains("no repoBlobUrl"), "{said}");
}

#[test]
fn the_cache_is_listed_checked_and_emptied() {
    let golden = Golden::load();
    let case = golden.cases().iter().find(|case| case.name == "stack8").unwrap();
    let world = World::new();
    let lowers = world.push(&golden, case);
    let config = world.config(&lowers);
    world.sha256_of(config.to_str().unwrap());
    let facts = |arguments: &[&str], code: i32| -> Value {
        let output = world.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    };
    // A process that ends may leave a promotion half done; this one finishes all of them.
    facts(&["prefetch", "--json", config.to_str().unwrap()], 0);
    let blobs = facts(&["cache", "ls", "--json"], 0)["blobs"].as_array().unwrap().clone();
    assert_eq!(blobs.len(), lowers.len());
    let names: Vec<&Value> = lowers.iter().map(|lower| &lower["digest"]).collect();
    assert!(blobs.iter().all(|blob| names.contains(&&blob["digest"])), "{blobs:?}");
    let stat = facts(&["cache", "stat", "--json"], 0);
    assert_eq!(stat["whole"].as_u64().unwrap() + stat["partial"].as_u64().unwrap(), 8);
    assert_eq!(facts(&["cache", "fsck", "--json"], 0)["whole_bad"], json!([]));
    let digest = names[0].as_str().unwrap();
    facts(&["cache", "rm", digest], 0);
    facts(&["cache", "rm", digest], 6);
    facts(&["cache", "rm", "sha256:no"], 2);
    assert_eq!(facts(&["cache", "gc", "--to", "0", "--json"], 0)["removed"], 7);
    assert_eq!(facts(&["cache", "ls", "--json"], 0)["blobs"], json!([]));
    // All of it is there to be had again.
    world.sha256_of(config.to_str().unwrap());
}

#[test]
fn the_logs_of_first_touches_are_listed_checked_and_emptied_with_the_cache() {
    use std::os::unix::fs::DirBuilderExt;
    let world = World::new();
    let facts = |arguments: &[&str], code: i32| -> Value {
        let output = world.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    };
    assert_eq!(facts(&["cache", "ls", "--json"], 0), json!({"blobs": [], "logs": []}));
    let folder = world.path("cache/touched");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).unwrap();
    let name = |digit: &str| digit.repeat(64);
    let trace = obd_ublk::format::trace::Trace { records: Vec::new() };
    fs::write(folder.join(name("a")), obd_ublk::format::trace::encode(&trace)).unwrap();
    fs::write(folder.join(name("b")), "torn").unwrap();
    let listed = facts(&["cache", "ls", "--json"], 0);
    assert_eq!(listed["logs"].as_array().unwrap().len(), 2);
    let table = String::from_utf8(world.run(&["cache", "ls"]).stdout).unwrap();
    assert!(table.contains(&name("a")), "{table}");
    let stat = facts(&["cache", "stat", "--json"], 0);
    assert_eq!((&stat["logs"], &stat["disk_bytes"]), (&json!(2), &json!(0)));
    assert!(stat["log_bytes"].as_u64().unwrap() > 0);
    assert_eq!(facts(&["cache", "fsck", "--json"], 5)["logs_bad"], json!([name("b")]));
    assert_eq!(facts(&["cache", "fsck", "--repair", "--json"], 0)["logs_right"], 1);
    assert_eq!(facts(&["cache", "fsck", "--json"], 0)["logs_bad"], json!([]));
    assert_eq!(facts(&["cache", "gc", "--json"], 0)["removed_logs"], 0);
    let gone = facts(&["cache", "gc", "--to", "0", "--json"], 0);
    assert_eq!((&gone["removed_logs"], &gone["log_bytes"]), (&json!(1), &json!(0)));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

/// The same layer twice in an image was counted twice: by the bar, which then stood at half, and in
/// what was fetched.
#[test]
fn a_layer_that_is_in_an_image_twice_is_pulled_and_counted_once() {
    let (twice, once) = (layer_of(&disk_of(3 << 20, 8)), layer_of(&disk_of(2 << 20, 9)));
    let bytes = twice.len() + once.len();
    let world = World::new();
    let (twice, once) = (world.push_blob(twice), world.push_blob(once));
    let dir = world.path("dir");
    fs::create_dir(&dir).unwrap();
    let mut wanted = twice.clone();
    wanted["dir"] = json!(dir);
    let config = world.config(&[twice, once, wanted]);
    let output = world.run(&["prefetch", "--json", config.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let done: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&done["layers"], &done["bytes"]), (&json!(2), &json!(bytes)));
    assert_eq!(done["fetched_bytes"], json!(bytes));
    assert!(dir.join("overlaybd.commit").exists(), "though it is the second one that wants it");
}

/// A whole pull, its second run, and what is left of one that was interrupted.
#[test]
fn prefetch_makes_plain_files_of_all_layers_and_goes_on_where_it_was_stopped() {
    let disks = [disk_of(5 << 20, 3), disk_of(3 << 20, 4)];
    let layers: Vec<_> = disks.iter().map(|disk| layer_of(disk)).collect();
    let bytes: usize = layers.iter().map(Vec::len).sum();
    let world = World::new();
    let lowers: Vec<_> = layers.iter().map(|layer| world.push_blob(layer.clone())).collect();
    let config = world.config(&lowers);
    let config = config.to_str().unwrap();
    // Interrupted in the middle.
    world.mock.fail(Part::Blob, 5, Fault::Delay(0));
    world.mock.fail(Part::Blob, 3, Fault::Delay(60_000));
    let mut child = world.command(&["prefetch", config]).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < end, "it never came so far");
        let stat = world.run(&["cache", "stat", "--json"]);
        let stat: Value = serde_json::from_slice(&stat.stdout).unwrap_or_default();
        if stat["filled_extents"].as_u64().is_some_and(|filled| filled > 0) {
            break;
        }
    }
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(!child.wait().unwrap().success());
    world.mock.state().rules.clear();
    let facts = |arguments: &[&str]| -> Value {
        let output = world.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let done = facts(&["prefetch", "--json", config]);
    assert_eq!((&done["layers"], &done["local_layers"]), (&json!(2), &json!(0)));
    assert_eq!(done["bytes"], json!(bytes));
    let fetched = done["fetched_bytes"].as_u64().unwrap();
    assert!(0 < fetched && fetched < u64::try_from(bytes).unwrap(), "{fetched} of {bytes}");
    assert_eq!(facts(&["cache", "stat", "--json"])["whole"], json!(2));
    // Everything is here: nobody is asked, by another pull or by who reads.
    world.mock.fail(Part::Blob, u64::MAX, Fault::status(500));
    let requests = world.mock.count(Part::Blob);
    assert_eq!(facts(&["prefetch", "--json", config])["fetched_bytes"], json!(0));
    // The top layer hides the other, and tells the size.
    assert!(world.run(&["export", config]).stdout == disks[1]);
    assert_eq!(world.mock.count(Part::Blob), requests);
}

#[test]
fn prefetch_shares_every_extent_with_a_pull_beside_it_and_fills_the_folder_that_is_named() {
    let disk = disk_of(6 << 20, 5);
    let layer = layer_of(&disk);
    let world = World::new();
    let dir = world.path("layer-folder");
    fs::create_dir(&dir).unwrap();
    let mut lower = world.push_blob(layer.clone());
    lower["dir"] = json!(dir);
    let config = world.config(&[lower]);
    let config = config.to_str().unwrap();
    world.mock.fail(Part::Blob, u64::MAX, Fault::Delay(20));
    let pulls: Vec<_> =
        (0..4).map(|_| world.command(&["prefetch", config]).spawn().unwrap()).collect();
    for mut pull in pulls {
        assert!(pull.wait().unwrap().success());
    }
    let mut bytes = 0;
    for record in world.mock.log(Part::Blob) {
        let range = record.range.unwrap();
        let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        bytes += last.parse::<usize>().unwrap() + 1 - first.parse::<usize>().unwrap();
    }
    assert_eq!(bytes, layer.len(), "each byte once, for four processes");
    assert!(fs::read(dir.join("overlaybd.commit")).unwrap() == layer);
}

#[test]
fn prefetch_fails_with_the_reason_and_its_exit_code() {
    let world = World::new();
    let lower = world.push_blob(layer_of(&disk_of(1 << 20, 6)));
    let config = world.config(std::slice::from_ref(&lower));
    let config = config.to_str().unwrap();
    let fails = |arguments: &[&str], code: i32, told: &str| {
        let output = world.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(told), "{told}: {said}");
    };
    world.mock.fail(Part::Blob, u64::MAX, Fault::status(404));
    fails(&["prefetch", config], 6, "pull layer 0");
    world.mock.state().rules.clear();
    world.mock.fail(Part::Blob, u64::MAX, Fault::status(401));
    fails(&["prefetch", "--io-deadline", "1", config], 7, "401");
    world.mock.state().rules.clear();
    // Its bytes are those of another blob.
    let digest = lower["digest"].as_str().unwrap().to_owned();
    world.mock.state().content.blobs.insert(digest, layer_of(&disk_of(1 << 20, 7)).into());
    fails(&["prefetch", config], 5, "another digest");
}

/// Nobody answers: the reason is told, within the time that was given for a read.
#[test]
fn a_read_fails_within_the_deadline_that_was_asked_for() {
    let world = World::new();
    let config = world.config(&[world.push_blob(layer_of(&disk_of(1 << 20, 8)))]);
    let config = config.to_str().unwrap();
    for (fault, code) in
        [(Fault::Delay(30_000), 8), (Fault::status(503), 8), (Fault::status(403), 7)]
    {
        world.mock.state().rules.clear();
        world.mock.fail(Part::Blob, u64::MAX, fault.clone());
        let begun = Instant::now();
        let output = world.run(&["export", "--io-deadline", "2", config]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{fault:?}: {said}");
        let took = begun.elapsed();
        // Twice the time that one takes, and what a busy machine needs to start a program.
        assert!(took < Duration::from_secs(10), "{fault:?}: {took:?}");
    }
    let usage = world.run(&["export", "--io-deadline", "0", config]);
    assert_eq!(usage.status.code(), Some(64));
}

/// Attached again, or by a successor, an image whose config has no sizes used to ask the registry
/// for the length of each layer, though all of it was here: it could not come back while the
/// registry was down.
#[test]
fn a_layer_that_is_here_is_read_without_its_size_though_the_registry_is_gone() {
    let disk = disk_of(3 << 20, 30);
    for is_whole in [false, true] {
        let world = World::new();
        let mut lower = world.push_blob(layer_of(&disk));
        lower.as_object_mut().unwrap().remove("size").unwrap();
        let config = world.config(&[lower]);
        let config = config.to_str().unwrap();
        assert!(world.run(&["export", config]).stdout == disk, "{is_whole}");
        if is_whole {
            assert!(world.run(&["prefetch", config]).status.success());
        }
        world.mock.fail(Part::Blob, u64::MAX, Fault::status(500));
        let requests = world.mock.count(Part::Blob);
        for command in ["export", "prefetch", "export"] {
            let output = world.run(&[command, "--io-deadline", "2", config]);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{command} {is_whole}: {said}");
            assert!(command != "export" || output.stdout == disk, "{is_whole}");
        }
        assert_eq!(world.mock.count(Part::Blob), requests, "{is_whole}");
    }
}

/// The length that the cache tells is that of the file, and a file may have been cut.
#[test]
fn a_layer_without_a_size_whose_file_was_cut_is_fetched_instead() {
    let disk = disk_of(3 << 20, 31);
    let layer = layer_of(&disk);
    for left in [0, 512, 1 << 20, layer.len() - 1] {
        let world = World::new();
        let mut lower = world.push_blob(layer.clone());
        lower.as_object_mut().unwrap().remove("size").unwrap();
        let config = world.config(std::slice::from_ref(&lower));
        let config = config.to_str().unwrap();
        assert!(world.run(&["prefetch", config]).status.success());
        let hex = lower["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
        let whole = world.path("cache").join("whole").join(hex);
        fs::set_permissions(&whole, fs::Permissions::from_mode(0o600)).unwrap();
        let file = fs::File::options().write(true).open(&whole).unwrap();
        file.set_len(u64::try_from(left).unwrap()).unwrap();
        let output = world.run(&["export", config]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{left}: {said}");
        assert!(output.stdout == disk, "{left}");
        // When nobody can be asked, what is left is no other disk. (The very last byte is padding,
        // and in the place of an empty file all that was fetched is kept.)
        world.mock.fail(Part::Blob, u64::MAX, Fault::status(404));
        let output = world.run(&["export", config]);
        let is_whole = output.stdout == disk;
        assert_eq!(output.status.success(), is_whole, "{left}");
        assert_eq!(is_whole, left == 0 || left == layer.len() - 1, "{left}");
    }
}

/// A server that ends when this is dropped.
struct Serving {
    child: Child,
    socket: PathBuf,
}

impl Serving {
    fn begin(world: &World, config: &str) -> Self {
        let socket = world.path("socket");
        let address = format!("unix:{}", socket.display());
        let mut command = world.command(&["serve", "--nbd", &address, config]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        eventually("it serves", || socket.exists());
        Self { child, socket }
    }

    fn read(&self, offset: u64, len: u32) -> Vec<u8> {
        client::Client::new(&self.socket).read(offset, len).unwrap()
    }

    fn end(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Nothing to do after `end`; a test that failed must not leave it behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The bytes of blobs that were asked for, counted once for each request.
fn bytes_asked_for(world: &World) -> u64 {
    let asked = |record: mock::Record| {
        let range = record.range.unwrap();
        let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        last.parse::<u64>().unwrap() + 1 - first.parse::<u64>().unwrap()
    };
    world.mock.log(Part::Blob).into_iter().map(asked).sum()
}

/// What one run touched first is fetched by the next one before anybody asks for it, though the
/// cache was emptied meanwhile; what it did not touch is not.
#[test]
fn the_first_touches_of_an_image_are_learned_and_fetched_ahead_at_its_next_attach() {
    let disk = disk_of(16 << 20, 9);
    let world = World::new();
    let lower = world.push_blob(layer_of(&disk));
    let digest = lower["digest"].as_str().unwrap().to_owned();
    let config = world.config(&[lower]);
    let config = config.to_str().unwrap();
    let places = [9_u64 << 20, 3 << 20, 13 << 20];
    let serving = Serving::begin(&world, config);
    for place in places {
        let at = usize::try_from(place).unwrap();
        assert!(serving.read(place, 4096) == disk[at..at + 4096]);
    }
    serving.end();
    let removed = world.run(&["cache", "rm", &digest]);
    assert!(removed.status.success(), "{removed:?}");
    world.mock.clear();
    let serving = Serving::begin(&world, config);
    // Both ends of the layer, which opening it takes, and the three places.
    let least = (128 << 10) + (256 << 10) + 3 * (128 << 10);
    eventually("all three are fetched", || bytes_asked_for(&world) >= least);
    eventually("they are the last", || {
        let before = bytes_asked_for(&world);
        std::thread::sleep(Duration::from_millis(500));
        bytes_asked_for(&world) == before
    });
    let requests = world.mock.count(Part::Blob);
    for place in places {
        let at = usize::try_from(place).unwrap();
        assert!(serving.read(place, 4096) == disk[at..at + 4096]);
    }
    assert_eq!(world.mock.count(Part::Blob), requests, "they were here already");
    assert!(bytes_asked_for(&world) < 3 << 20, "{} bytes", bytes_asked_for(&world));
    serving.end();
}

/// The background download of overlaybd's settings: the whole layer becomes `overlaybd.commit` in
/// its folder while it is served.
#[test]
fn a_background_download_makes_the_file_that_the_next_attach_takes() {
    let disk = disk_of(5 << 20, 10);
    let layer = layer_of(&disk);
    let world = World::new();
    let dir = world.path("layer-folder");
    fs::create_dir(&dir).unwrap();
    let mut lower = world.push_blob(layer.clone());
    lower["dir"] = json!(dir);
    let config = world.path("config.json");
    let text = json!({
        "repoBlobUrl": world.mock.blobs_of("img"), "lowers": [lower],
        "download": {"enable": true, "delay": 0, "delayExtra": 0, "maxMBps": 0},
    });
    fs::write(&config, text.to_string()).unwrap();
    let config = config.to_str().unwrap();
    let serving = Serving::begin(&world, config);
    let commit = dir.join("overlaybd.commit");
    eventually("the layer's file", || commit.exists());
    assert!(fs::read(&commit).unwrap() == layer);
    assert!(serving.read(1 << 20, 4096) == disk[1 << 20..(1 << 20) + 4096]);
    assert_eq!(bytes_asked_for(&world), u64::try_from(layer.len()).unwrap(), "each byte once");
    serving.end();
    // No registry and no cache are needed any more.
    world.mock.fail(Part::Blob, u64::MAX, Fault::status(500));
    let requests = world.mock.count(Part::Blob);
    assert!(world.run(&["export", config]).stdout == disk);
    assert_eq!(world.mock.count(Part::Blob), requests);
}

/// Requests of a cold open, in rounds: a request of one round waits for an answer of the round
/// before. Every answer takes so long that requests of one round cannot be taken for two.
#[test]
fn a_cold_open_takes_two_rounds_of_requests_and_five_from_nothing() {
    const ANSWER_MS: u64 = 700;
    let layers: Vec<_> = (0..3).map(|seed| layer_of(&disk_of(8 << 20, 20 + seed))).collect();
    let rounds_of = |is_from_nothing: bool| {
        let world = World::new();
        let lowers: Vec<_> = layers.iter().map(|layer| world.push_blob(layer.clone())).collect();
        let config = world.config(&lowers);
        for part in [Part::Blob, Part::Token, Part::Store] {
            world.mock.fail(part, u64::MAX, Fault::Delay(ANSWER_MS));
        }
        if is_from_nothing {
            let realm = format!("{}/token", world.mock.url());
            let mut state = world.mock.state();
            state.auth = mock::Auth::Bearer(mock::answer::Bearer::at(&realm));
            state.redirect = Some((world.mock.url(), 60_000));
        }
        let output = world.run(&["explain", config.to_str().unwrap(), "0"]);
        assert!(output.status.success(), "{output:?}");
        let log = world.mock.state().log.clone();
        let mut times: Vec<Instant> = log.iter().map(|record| record.at).collect();
        times.sort();
        let mut rounds = 0;
        let mut begun: Option<Instant> = None;
        for at in times {
            let round = Duration::from_millis(ANSWER_MS * 9 / 10);
            if begun.is_none_or(|begun| at.saturating_duration_since(begun) >= round) {
                (rounds, begun) = (rounds + 1, Some(at));
            }
        }
        let of = |part| log.iter().filter(|record| record.part == part).count();
        println!(
            "cold open of 3 layers, from nothing: {is_from_nothing}: {rounds} rounds, {} requests \
             to the registry, {} to its store, {} for tokens",
            of(Part::Blob),
            of(Part::Store),
            of(Part::Token)
        );
        (rounds, of(Part::Token))
    };
    let (rounds, _) = rounds_of(false);
    assert!(rounds <= 2, "{rounds} rounds");
    let (rounds, tokens) = rounds_of(true);
    assert!(rounds <= 5, "{rounds} rounds from nothing");
    assert_eq!(tokens, 1, "one token for all layers");
}
