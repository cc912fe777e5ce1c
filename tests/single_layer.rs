//! One layer in place of a config: every command takes the file itself.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::golden::{Golden, sha256_of_file};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Raw, compressed either way, and in tar wrappers.
const CASES: [&str; 6] = [
    "lsmt-commit-random",
    "lsmt-seal-edges",
    "zfile-lz4-4k-random",
    "zfile-zstd-4k-random",
    "zfile-zstd-32k-tar-text",
    "tar-raw",
];

/// Runs the program in `folder`, with a run folder of its own there.
fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_obd-ublk"))
        .args(arguments)
        .current_dir(folder)
        .env("OBD_UBLK_RUN_DIR", folder.join("run"))
        .env("OBD_UBLK_PERSIST_DIR", folder.join("persist"))
        .env_remove("OBD_UBLK_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn succeed(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_layer_is_exported_explained_checked_and_shown_without_a_config() {
    let golden = Golden::load();
    for name in CASES {
        let case = golden.case(name);
        let files = golden.materialise(case);
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(files.path(&case.layers()[0]), folder.path().join("layer")).unwrap();
        succeed(folder.path(), &["export", "layer", "-o", "raw"]);
        let digest = sha256_of_file(&folder.path().join("raw"));
        assert_eq!(Some(&digest), case.expected_sha256.as_ref(), "{name}");
        let told = succeed(folder.path(), &["explain", "layer", "0", "--json"]);
        let told: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["sector"], 0, "{name}: {told}");
        for command in ["verify", "inspect"] {
            succeed(folder.path(), &[command, "layer"]);
        }
    }
}

#[test]
fn a_layer_is_not_overwritten_by_its_own_export() {
    let golden = Golden::load();
    let case = golden.case("tar-raw");
    let files = golden.materialise(case);
    let folder = tempfile::tempdir().unwrap();
    let layer = folder.path().join("layer");
    std::fs::copy(files.path(&case.layers()[0]), &layer).unwrap();
    let before = sha256_of_file(&layer);
    let output = run(folder.path(), &["export", "layer", "-o", "./layer"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!(sha256_of_file(&layer), before);
}

#[test]
fn what_is_neither_a_config_nor_a_layer_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("notes.txt"), "lowers:\n- file: a\n").unwrap();
    for command in [&["attach", "notes.txt"][..], &["export", "notes.txt"]] {
        let output = run(folder.path(), command);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains("neither a config (a JSON object) nor a layer"), "{told}");
    }
    assert!(!folder.path().join("run").exists());
}

#[cfg(feature = "ublk")]
#[test]
fn a_layer_is_attached_and_named_as_its_config_would_be() {
    let golden = Golden::load();
    let case = golden.case("zfile-lz4-4k-random");
    let files = golden.materialise(case);
    let folder = tempfile::tempdir().unwrap();
    let layer = folder.path().join("layer");
    std::fs::copy(files.path(&case.layers()[0]), &layer).unwrap();
    let output = run(folder.path(), &["attach", "layer"]);
    let told = String::from_utf8(output.stderr).unwrap();
    if output.status.success() {
        let listed = succeed(folder.path(), &["list", "--json"]);
        let listed: Value = serde_json::from_str(&listed).unwrap();
        assert_eq!(listed["devices"][0]["config"], serde_json::json!(layer));
        succeed(folder.path(), &["why", "layer"]);
        succeed(folder.path(), &["detach", "layer"]);
    } else if nix::unistd::geteuid().is_root() {
        // It gets as far as a config: to the driver that this host lacks.
        assert_eq!(output.status.code(), Some(4), "{told}");
        assert!(told.contains("modprobe ublk_drv"), "{told}");
    } else {
        assert!(told.contains("CAP_SYS_ADMIN"), "{told}");
    }
}
