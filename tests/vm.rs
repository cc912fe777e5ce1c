//! The device in a real kernel: prepares images on the host, boots a guest, runs `vm/suite.sh`.
//!
//! Needs `tools/vm` to work, so it is ignored by a plain `cargo test`; `tools/test` runs it:
//! `OBD_UBLK_VM_KERNEL=6.12 cargo test --test vm -- --ignored`. `OBD_UBLK_VM_CHECKS` names single
//! checks, or `smoke`; `OBD_UBLK_BIN_DIR` is where the binaries of the crate are, built in release
//! and with the feature `tools`.

// The helpers of a test may panic as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::golden::{Case, Golden};
use obd_ublk::image::Image;
use serde_json::json;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicU64;

/// Cases whose virtual disk is read in the guest: every stack, and of the single layers one of each
/// way of storing. (`tests/golden.rs` reads them all, natively.)
fn is_disk(case: &Case) -> bool {
    let single = [
        "lsmt-seal-edges",
        "lsmt-commit-random",
        "zfile-lz4-4k-random",
        "zfile-zstd-32k-tar-text",
        "zfile-lz4-64k-incompressible",
        "zfilelib-lz4-4k-crc0-ow1",
        "tar-raw",
        "rw-append",
        "rw-sparse",
        "merge3-cli",
    ];
    case.kind.contains("stack") || single.contains(&case.name.as_str())
}

/// Copies a case's files into `folder` and writes its config and pack.
fn prepare(golden: &Golden, case: &Case, folder: &Path) {
    let files = golden.materialise(case);
    fs::create_dir_all(folder).unwrap();
    let keep = |file: &String| {
        let target = folder.join(file.replace('/', "-"));
        // Keeps holes: they carry meaning in a sparse upper.
        let status = Command::new("cp")
            .arg("--sparse=always")
            .args([files.path(file), target.clone()])
            .status()
            .unwrap();
        assert!(status.success());
        target
    };
    let layers: Vec<PathBuf> = case.layers().iter().map(keep).collect();
    if let [only] = &layers[..] {
        fs::hard_link(only, folder.join("layer")).unwrap();
    }
    let lowers: Vec<_> = layers.iter().map(|path| json!({ "file": path })).collect();
    let upper = case.upper().map_or_else(
        || json!({}),
        |upper| json!({ "data": keep(&upper.data), "index": keep(&upper.index) }),
    );
    let config = json!({ "repoBlobUrl": "", "lowers": lowers, "upper": upper, "resultFile": "" });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    pack(&files.config(case), folder);
}

/// What the device must hold, from our own `export` on the host (which the golden tests compare
/// with the reference's digest).
fn pack(config: &Path, folder: &Path) {
    let image = Image::open_config(config, None).unwrap();
    let raw = folder.join("raw");
    let file = File::options().create(true).truncate(true).write(true).open(&raw).unwrap();
    file.set_len(image.virtual_bytes()).unwrap();
    image.export_to_file(&file, true, &AtomicU64::new(0)).unwrap();
    let status = Command::new(binaries().join("obd-ublk-device-check"))
        .arg("pack")
        .args([&raw, &folder.join("pack")])
        .status()
        .unwrap();
    assert!(status.success());
    fs::remove_file(raw).unwrap();
}

/// The files of an ext4 stack, for `sha256sum -c`, and what must not be there.
fn prepare_ext4(golden: &Golden, case: &Case, folder: &Path) {
    prepare(golden, case, folder);
    let list = |name: &str| case.rest.get(name).cloned().unwrap_or_default();
    let sums: String = list("file_contents_sha256")
        .as_object()
        .into_iter()
        .flatten()
        .map(|(path, sum)| format!("{}  .{path}\n", sum.as_str().unwrap()))
        .collect();
    let gone: String = list("whiteouts")
        .as_array()
        .into_iter()
        .flatten()
        .map(|path| format!("{}\n", path.as_str().unwrap()))
        .collect();
    fs::write(folder.join("sums"), sums).unwrap();
    fs::write(folder.join("gone"), gone).unwrap();
}

/// An image whose blocks fio verifies by themselves: it wrote them.
fn prepare_fio(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let raw = folder.join("raw");
    let status = Command::new("fio")
        .args(["--name=fill", "--rw=write", "--bs=4k", "--size=8m", "--ioengine=psync"])
        .args(["--verify=crc32c", "--do_verify=0", "--verify_state_save=0", "--output=/dev/null"])
        .arg(format!("--filename={}", raw.display()))
        .status()
        .unwrap();
    assert!(status.success());
    let status = Command::new(binaries().join("obd-ublk-make-image")).arg(folder).status().unwrap();
    assert!(status.success());
    let config = json!({ "lowers": [{ "file": folder.join("layer.lz4") }] });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// The program that exercises files, which tools/lib/setup.sh installs. Copied, because the guest
/// need not see the cache.
fn prepare_fsx(folder: &Path) {
    let mut search = std::env::var_os("PATH").unwrap_or_default();
    if let Some(home) = std::env::var_os("HOME") {
        search.push(":");
        search.push(Path::new(&home).join(".cache/obd-ublk/tools/bin"));
    }
    let found = std::env::split_paths(&search).map(|dir| dir.join("fsx")).find(|it| it.is_file());
    let found = found.expect("fsx on PATH: tools/test installs it, or `cargo install fsx`");
    fs::create_dir_all(folder).unwrap();
    fs::copy(found, folder.join("fsx")).unwrap();
}

/// Where the release binaries are, or what cargo built for this test, with the helpers beside it.
fn binaries() -> PathBuf {
    let own = || Path::new(env!("CARGO_BIN_EXE_obd-ublk")).parent().unwrap().to_owned();
    std::env::var_os("OBD_UBLK_BIN_DIR").map_or_else(own, PathBuf::from)
}

#[test]
#[ignore = "boots a virtual machine; tools/test runs it"]
fn the_device_is_right_in_a_real_kernel() {
    let kernel = std::env::var("OBD_UBLK_VM_KERNEL").unwrap_or_else(|_| "6.12".to_owned());
    let checks = std::env::var("OBD_UBLK_VM_CHECKS").unwrap_or_default();
    let golden = Golden::load();
    // Not in /tmp: the guest has its own there.
    let shared = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for case in golden.cases().iter().filter(|case| is_disk(case)) {
        prepare(&golden, case, &shared.path().join("cases").join(&case.name));
        if case.kind == "ext4-stack" {
            prepare_ext4(&golden, case, &shared.path().join("ext4").join(&case.name));
        }
    }
    prepare_fio(&shared.path().join("fio"));
    prepare_fsx(&shared.path().join("bin"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let suite = root.join("tests/vm/suite.sh");
    let status = Command::new(root.join("tools/vm"))
        .env("OBD_UBLK_BIN_DIR", binaries())
        .args(["--env", "OBD_UBLK_KILLS", "--env", "OBD_UBLK_FEW"])
        .args(["--env", "OBD_UBLK_ELSEWHERE"])
        .args(["--kernel", &kernel, "--timeout", "2400"])
        .arg("--share")
        .arg(shared.path())
        .arg("--share")
        .arg(suite.parent().unwrap())
        .args(["--", "bash"])
        .arg(&suite)
        .arg(shared.path())
        .args(checks.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "on kernel {kernel}: {status}");
}
