//! `attach --mount` and `--persist`: what must hold before there is a device, on any host. Mounting
//! and coming back are tested in a VM (`tests/vm/attach.sh`).

// Without the front end every one of these commands says the same: not built with it.
#![cfg(feature = "ublk")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A folder with its own run folder and its own folder of persisted devices.
struct Sandbox {
    folder: tempfile::TempDir,
}

impl Sandbox {
    fn new() -> Self {
        let sandbox = Self { folder: tempfile::tempdir().unwrap() };
        let layers = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
        let layer = layers.join("ext4-3layers/l0/overlaybd.commit");
        let config = json!({"lowers": [{"file": layer}], "resultFile": "result"});
        std::fs::write(sandbox.path("config.json"), config.to_string()).unwrap();
        sandbox
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Exit code, standard output and standard error.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_obd-ublk"))
            .args(arguments)
            .current_dir(self.folder.path())
            .env("OBD_UBLK_RUN_DIR", self.path("run"))
            .env("OBD_UBLK_PERSIST_DIR", self.path("persist"))
            .env_remove("OBD_UBLK_LOG")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }
}

#[test]
fn a_mount_point_that_does_not_exist_is_told_before_anything_is_attached() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.path("file"), "").unwrap();
    for dir in ["none", "file"] {
        let (code, stdout, stderr) = sandbox.run(&["attach", "--mount", dir, "config.json"]);
        assert_eq!((code, stdout.as_str()), (6, ""), "{stderr}");
        assert!(stderr.contains(&format!("use {dir} as a mount point")), "{stderr}");
        // Not even the result file was touched.
        assert!(!sandbox.path("result").exists() && !sandbox.path("run").exists());
    }
    let (code, _, _) = sandbox.run(&["attach", "--foreground", "--mount", ".", "config.json"]);
    assert_eq!(code, 64);
}

/// An entry as `attach --persist` writes it.
fn persist(sandbox: &Sandbox, id: u32, config: &Path) {
    std::fs::create_dir_all(sandbox.path("persist")).unwrap();
    let entry = json!({
        "schema": 1, "id": id, "config": config, "folder": sandbox.folder.path(),
        "service_config": null, "queues": null, "depth": 128, "read_only": false,
        "supervised": false, "mount": null,
    });
    let path = sandbox.path("persist").join(format!("{id}.json"));
    std::fs::write(path, entry.to_string()).unwrap();
}

#[test]
fn what_should_have_come_back_is_listed_and_forgotten_by_detach() {
    let sandbox = Sandbox::new();
    let config = sandbox.path("config.json");
    for id in [1_048_010, 1_048_011] {
        persist(&sandbox, id, &config);
    }
    persist(&sandbox, 1_048_012, Path::new("/other.json"));
    let (code, stdout, _) = sandbox.run(&["list", "--json"]);
    let listed: Value = serde_json::from_str(&stdout).unwrap();
    let absent: Vec<_> = listed["absent"].as_array().unwrap().iter().map(|it| &it["id"]).collect();
    assert_eq!((code, absent), (0, vec![&json!(1_048_010), &json!(1_048_011), &json!(1_048_012)]));
    let (_, stdout, _) = sandbox.run(&["list"]);
    assert!(stdout.contains("absent  -     -     -    yes      /other.json"), "{stdout}");
    // Kept, nothing is there to detach; two have the same config; then each by a name of its own.
    for (arguments, code) in [
        (&["detach", "--keep-persist", "1048010"][..], 6),
        (&["detach", "config.json"], 6),
        (&["detach", "--persisted"], 0),
        (&["detach", "1048010"], 0),
        (&["detach", "config.json"], 0),
        (&["detach", "1048011"], 6),
        (&["detach", "/other.json"], 0),
    ] {
        let (found, _, stderr) = sandbox.run(arguments);
        assert_eq!(found, code, "{arguments:?}: {stderr}");
    }
    assert_eq!(std::fs::read_dir(sandbox.path("persist")).unwrap().count(), 0);
}

#[test]
fn restore_tries_every_entry_and_counts_what_failed() {
    let sandbox = Sandbox::new();
    let (code, stdout, stderr) = sandbox.run(&["restore"]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, "", ""));
    for id in [1_048_020, 1_048_021] {
        persist(&sandbox, id, &sandbox.path("none.json"));
    }
    std::fs::write(sandbox.path("persist/1048022.json"), "{").unwrap();
    let (code, stdout, stderr) = sandbox.run(&["restore"]);
    assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
    assert!(stderr.contains("3 of 3 persisted devices were not attached"), "{stderr}");
    let count = stderr.lines().filter(|line| line.contains("none.json")).count();
    assert_eq!(count, 2, "{stderr}");
    assert!(stderr.contains("1048022.json"), "{stderr}");
    // The only one that was asked for has an exit code of its own.
    let (code, stdout, stderr) = sandbox.run(&["restore", "1048020", "--json"]);
    assert_eq!(code, 6, "{stderr}");
    let told: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(told["devices"][0]["error"]["kind"], "not-found");
    let (code, ..) = sandbox.run(&["restore", "7"]);
    assert_eq!(code, 6);
}

#[test]
fn a_failed_attach_is_not_persisted_and_a_number_is_not_taken_from_another() {
    let sandbox = Sandbox::new();
    let (code, ..) = sandbox.run(&["attach", "--persist", "none.json"]);
    assert_eq!(code, 6);
    assert_eq!(std::fs::read_dir(sandbox.path("persist")).unwrap().count(), 0);
    persist(&sandbox, 1_048_030, Path::new("/other.json"));
    let arguments = ["attach", "--persist", "--id", "1048030", "config.json"];
    let (code, _, stderr) = sandbox.run(&arguments);
    assert_eq!(code, 12, "{stderr}");
    assert!(stderr.contains("`obd-ublk detach 1048030` forgets that"), "{stderr}");
}

#[test]
fn a_folder_of_entries_that_others_can_write_to_is_not_believed() {
    use std::os::unix::fs::PermissionsExt;
    let sandbox = Sandbox::new();
    persist(&sandbox, 1_048_040, &sandbox.path("config.json"));
    let open_to_all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(sandbox.path("persist"), open_to_all).unwrap();
    for arguments in [&["restore"][..], &["attach", "--persist", "config.json"]] {
        let (code, _, stderr) = sandbox.run(arguments);
        assert_eq!(code, 4, "{arguments:?}: {stderr}");
        assert!(stderr.contains("mode 777"), "{stderr}");
    }
    assert!(!sandbox.path("result").exists());
}

#[test]
fn the_self_test_does_what_this_host_allows_and_leaves_nothing() {
    let sandbox = Sandbox::new();
    let (code, stdout, stderr) = sandbox.run(&["doctor", "--self-test", "--json"]);
    let told: Value = serde_json::from_str(&stdout).unwrap();
    let steps = told["steps"].as_array().unwrap();
    assert_eq!(steps[0]["name"], "export");
    assert!(steps.iter().all(|step| step["passed"] == true), "{stdout}");
    let missing = told["missing"].as_array().unwrap();
    if missing.is_empty() {
        assert_eq!((code, &told["passed"]), (0, &json!(true)), "{stderr}");
    } else {
        assert_eq!((code, &told["passed"], steps.len()), (4, &json!(false), 2), "{stdout}");
        assert!(stderr.contains("attach does not work on this host"), "{stderr}");
    }
    assert!(!sandbox.path("run").exists(), "the host's own run folder is not touched");
}

#[test]
fn a_report_tells_of_the_devices_and_keeps_secrets() {
    let sandbox = Sandbox::new();
    let folder = sandbox.path("run/1048050");
    std::fs::create_dir_all(&folder).unwrap();
    let state = json!({
        "schema": 2, "program": "0.1.0", "phase": "live", "id": 1_048_050, "boot_id": "b",
        "server": {"pid": 1, "start_ticks": 1}, "config": "/images/c.json",
        "config_content": {"repoBlobUrl": "https://u:hunter2@reg.example.com/v2"},
        "service_config": "/etc/service.json", "queues": 1, "depth": 128, "request_bytes": 4096,
        "read_only": true, "size_bytes": 4096, "log": folder.join("log"), "attached_unix_ms": 0,
        "recoverable": false, "launcher": {"pid": 1, "start_ticks": 1}, "lazy": false,
        "recovery_count": 0, "last_recovery": null,
        "layers": [{"path": "/images/layer0", "dev": 1, "ino": 2, "bytes": 3}],
    });
    std::fs::write(folder.join("state.json"), state.to_string()).unwrap();
    let log = "get https://u:hunter2@reg.example.com/v2/x failed\nAuthorization: Bearer hunter2\n\
               {\"auths\":{\"reg.example.com\":{\"auth\":\"hunter2\"}}}\n";
    std::fs::write(folder.join("log"), log).unwrap();
    std::fs::write(sandbox.path("run/supervisor.log"), "token=hunter2 it began\n").unwrap();
    for arguments in [&["doctor", "--report"][..], &["doctor", "--report", "--json"]] {
        let (code, stdout, stderr) = sandbox.run(arguments);
        assert_eq!(code, 0, "{stderr}");
        assert!(!stdout.contains("hunter2") && !stderr.contains("hunter2"), "{stdout}{stderr}");
        for told in [
            "https://[redacted]@reg.example.com/v2/x failed",
            "token=[redacted] it began",
            "/images/layer0",
            "/images/c.json",
            "/etc/service.json",
            env!("CARGO_PKG_VERSION"),
        ] {
            assert!(stdout.contains(told), "{told}: {stdout}");
        }
    }
}

/// The server of a device left its caller's folder before it opened the image, and so looked for
/// relative layers in `/`: no config with a relative path could be attached.
#[test]
fn layers_with_relative_paths_are_found_from_the_callers_folder() {
    let sandbox = Sandbox::new();
    let layers = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
    let layer = layers.join("ext4-3layers/l0/overlaybd.commit");
    std::fs::create_dir(sandbox.path("layers")).unwrap();
    std::fs::copy(layer, sandbox.path("layers/l0")).unwrap();
    let config = json!({"lowers": [{"file": "layers/l0"}]});
    std::fs::write(sandbox.path("relative.json"), config.to_string()).unwrap();
    let (code, stdout, stderr) = sandbox.run(&["attach", "--unsupervised", "relative.json"]);
    if code == 0 {
        let (code, _, stderr) = sandbox.run(&["detach", stdout.trim_end()]);
        assert_eq!(code, 0, "{stderr}");
    } else {
        // It got past the image: what is missing is the driver, or the right to use it.
        let lacks = stderr.contains("modprobe ublk_drv") || stderr.contains("CAP_SYS_ADMIN");
        assert!(lacks, "{code}: {stderr}");
    }
}
