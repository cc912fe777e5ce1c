//! The device commands as people and the snapshotter meet them: the real program, its streams,
//! its exit codes and the result file. Whether devices come up is tested in a VM; here is all that
//! must hold on any host, whether it has the driver or not.

// Without the front end every one of these commands says the same: not built with it.
#![cfg(feature = "ublk")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use obd_ublk::telemetry::trouble::{Trouble, TroubleRing};
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A folder with a run folder and a config in it.
struct Sandbox {
    folder: tempfile::TempDir,
}

impl Sandbox {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        std::fs::create_dir(&run).unwrap();
        std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o700)).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run_path(&self) -> PathBuf {
        self.path("run")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_obd-ublk"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("OBD_UBLK_RUN_DIR", self.run_path())
            .env_remove("OBD_UBLK_LOG")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(&self.command(arguments).output().unwrap())
    }

    fn write_config(&self, content: &str) {
        std::fs::write(self.path("config.v1.json"), content).unwrap();
    }

    fn result(&self) -> String {
        std::fs::read_to_string(self.path("result")).unwrap()
    }

    fn assert_nothing_left(&self) {
        assert_eq!(std::fs::read_dir(self.run_path()).unwrap().count(), 0);
    }

    /// What a server leaves that was killed: a state file that names a dead process.
    fn leave_remains(&self, id: u32, config: &Path) -> PathBuf {
        let folder = self.run_path().join(id.to_string());
        std::fs::create_dir(&folder).unwrap();
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let state = json!({
            "schema": 2, "program": "0.1.0", "phase": "live", "id": id,
            "boot_id": boot_id.trim(), "server": {"pid": std::process::id(), "start_ticks": 1},
            "config": config, "config_content": {}, "service_config": null, "queues": null,
            "depth": 128, "request_bytes": 4096, "read_only": true, "size_bytes": 4096,
            "log": null, "attached_unix_ms": 0, "recoverable": false, "layers": [],
            "launcher": {"pid": 1, "start_ticks": 1}, "lazy": false, "recovery_count": 0,
            "last_recovery": null,
        });
        std::fs::write(folder.join("state.json"), state.to_string()).unwrap();
        folder
    }
}

struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(output: &Output) -> Self {
        Self {
            code: output.status.code().expect("ended by a signal"),
            stdout: String::from_utf8(output.stdout.clone()).unwrap(),
            stderr: String::from_utf8(output.stderr.clone()).unwrap(),
        }
    }

    /// Asserts a failure that is told in one line, which is returned without its start.
    fn failed(&self, code: i32) -> &str {
        assert_eq!((self.code, self.stdout.as_str()), (code, ""), "{}", self.stderr);
        let line = self.stderr.strip_suffix('\n').unwrap();
        assert!(!line.contains('\n'), "{line}");
        line.strip_prefix("obd-ublk: ").unwrap()
    }
}

/// A config over layers of the golden set.
fn good_config() -> String {
    let layers = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/ext4-3layers");
    let layer = |name: &str| json!({"file": layers.join(name).join("overlaybd.commit")});
    let config = json!({
        "repoBlobUrl": "",
        "lowers": [layer("l0"), layer("l1"), layer("l2")],
        "upper": {},
        "resultFile": "result",
    });
    config.to_string()
}

#[test]
fn a_result_file_that_is_a_part_of_the_image_is_refused_and_left_alone() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.path("layer"), "precious").unwrap();
    for target in ["layer", "config.v1.json", "./layer"] {
        let config = format!(r#"{{"lowers":[{{"file":"layer"}}],"resultFile":"{target}"}}"#);
        sandbox.write_config(&config);
        let ran = sandbox.run(&["attach", "config.v1.json"]);
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        assert_eq!(std::fs::read(sandbox.path("layer")).unwrap(), b"precious");
        assert_eq!(std::fs::read_to_string(sandbox.path("config.v1.json")).unwrap(), config);
    }
}

#[test]
fn a_config_that_is_cut_off_is_reported_where_its_result_file_says() {
    let sandbox = Sandbox::new();
    sandbox.write_config("{\"resultFile\":\"result\",\"lowers\":[");
    let ran = sandbox.run(&["attach", "config.v1.json"]);
    let line = ran.failed(2);
    assert!(line.contains("config.v1.json: not valid JSON"), "{line}");
    assert_eq!(sandbox.result(), format!("failed:{line}"));
    sandbox.assert_nothing_left();
}

#[test]
fn a_missing_layer_is_reported_and_leaves_nothing() {
    let sandbox = Sandbox::new();
    sandbox.write_config(r#"{"lowers":[{"file":"none"}],"upper":{},"resultFile":"result"}"#);
    for foreground in [&["--foreground"][..], &[]] {
        std::fs::write(sandbox.path("result"), "").unwrap();
        let arguments = [&["attach", "config.v1.json"], foreground].concat();
        let ran = sandbox.run(&arguments);
        let line = ran.failed(6);
        assert!(line.contains("layer 0"), "{line}");
        assert_eq!(sandbox.result(), format!("failed:{line}"));
        sandbox.assert_nothing_left();
    }
}

#[test]
fn an_upper_that_is_not_there_is_told_whether_it_is_to_be_written_or_not() {
    let sandbox = Sandbox::new();
    let upper = r#"{"lowers":[],"upper":{"index":"i","data":"d"},"resultFile":"result"}"#;
    sandbox.write_config(upper);
    let ran = sandbox.run(&["attach", "config.v1.json"]);
    let line = ran.failed(6);
    assert!(line.contains("/d"), "{line}");
    assert_eq!(sandbox.result(), format!("failed:{line}"));
    sandbox.run(&["attach", "--read-only", "config.v1.json"]).failed(6);
    // An upper on top of an upper, and one for a view without writes.
    sandbox.run(&["attach", "--upper", "u", "config.v1.json"]).failed(64);
    sandbox.run(&["attach", "--upper", "u", "--ephemeral", "--read-only", "config.v1.json"]);
    sandbox.run(&["attach", "--quota", "1M", "--read-only", "config.v1.json"]);
    assert!(!sandbox.path("u").exists());
    sandbox.assert_nothing_left();
}

#[test]
fn a_quota_without_an_upper_bounds_nothing_and_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.write_config(&good_config());
    let ran = sandbox.run(&["attach", "--quota", "1M", "config.v1.json"]);
    assert!(ran.failed(64).contains("quota"), "{}", ran.stderr);
    sandbox.assert_nothing_left();
}

#[test]
fn a_service_config_that_was_named_must_exist() {
    let sandbox = Sandbox::new();
    sandbox.write_config(&good_config());
    let ran = sandbox.run(&["attach", "--service-config", "none.json", "config.v1.json"]);
    assert!(ran.failed(6).contains("none.json"), "{}", ran.stderr);
    sandbox.assert_nothing_left();
}

#[test]
fn a_good_config_becomes_a_device_or_says_what_the_host_lacks() {
    let sandbox = Sandbox::new();
    sandbox.write_config(&good_config());
    let ran = sandbox.run(&["attach", "config.v1.json"]);
    if Path::new("/dev/ublk-control").exists() && ran.code == 0 {
        let device = ran.stdout.strip_suffix('\n').unwrap();
        assert_eq!(sandbox.result(), "success");
        assert!(Path::new(device).exists());
        assert_eq!(sandbox.run(&["detach", device]).code, 0);
    } else if nix::unistd::geteuid().is_root() {
        let line = ran.failed(4);
        assert!(line.contains("modprobe ublk_drv"), "{line}");
        assert_eq!(sandbox.result(), format!("failed:{line}"));
    } else {
        let line = ran.failed(1);
        assert!(line.contains("CAP_SYS_ADMIN"), "{line}");
    }
    sandbox.assert_nothing_left();
}

#[test]
fn a_captured_attach_does_not_hang_on_descriptors_of_its_caller() {
    let sandbox = Sandbox::new();
    sandbox.write_config(&good_config());
    // The shell gives descriptor 7 to the program and waits for its last holder.
    let script = "out=$( \"$0\" attach config.v1.json 7>&1 2>&1 ); echo \"$?:$out\"";
    let mut command = Command::new("sh");
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_obd-ublk")])
        .current_dir(sandbox.folder.path())
        .env("OBD_UBLK_RUN_DIR", sandbox.run_path());
    let ran = Ran::of(&command.output().unwrap());
    if let Some(device) = ran.stdout.trim_end().strip_prefix("0:") {
        assert_eq!(sandbox.run(&["detach", device]).code, 0);
    } else {
        assert!(ran.stdout.contains(":obd-ublk: "), "{}", ran.stdout);
    }
    sandbox.assert_nothing_left();
}

#[test]
fn wrong_arguments_end_with_64_and_help_with_0() {
    let sandbox = Sandbox::new();
    for arguments in [
        &["bogus"][..],
        &[],
        &["attach"],
        &["attach", "c", "--depth", "0"],
        &["attach", "c", "--depth", "4097"],
        &["attach", "c", "--queues", "33"],
        &["attach", "c", "--id", "1048576"],
        &["detach", "0", "--timeout", "-1"],
    ] {
        let ran = sandbox.run(arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (64, ""), "{arguments:?}");
    }
    for arguments in [&["--help"][..], &["--version"], &["attach", "--help"]] {
        let ran = sandbox.run(arguments);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{arguments:?}");
        assert!(!ran.stdout.is_empty());
    }
}

#[test]
fn an_error_of_a_json_command_is_json() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["attach", "--json", "none.json"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (6, ""));
    let error: Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "not-found");
    assert_eq!(error["error"]["exit_code"], 6);
    assert!(error["error"]["message"].as_str().unwrap().contains("none.json"));
}

#[test]
fn a_device_that_does_not_exist_is_not_found() {
    let sandbox = Sandbox::new();
    for device in ["1048000", "/dev/ublkb1048000", "./none.json"] {
        for command in ["detach", "stat"] {
            sandbox.run(&[command, device]).failed(6);
        }
    }
}

#[test]
fn the_remains_of_a_killed_server_are_listed_and_cleared() {
    let sandbox = Sandbox::new();
    sandbox.write_config("{}");
    // No kernel has this many devices: the tests of a host with the driver are left alone.
    let config = sandbox.path("config.v1.json");
    let folder = sandbox.leave_remains(1_048_001, &config);
    let ran = sandbox.run(&["list"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("/dev/ublkb1048001  dead   ro"), "{}", ran.stdout);
    let listed: Value = serde_json::from_str(&sandbox.run(&["list", "--json"]).stdout).unwrap();
    assert_eq!(listed["devices"][0]["state"], "dead");
    assert_eq!(listed["devices"][0]["config"], config.to_str().unwrap());
    let ran = sandbox.run(&["detach", "config.v1.json"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "", ""));
    assert!(!folder.exists());
    assert_eq!(sandbox.run(&["list"]).stdout, "");
}

#[test]
fn a_config_that_is_attached_twice_has_to_be_said_which() {
    let sandbox = Sandbox::new();
    sandbox.write_config("{}");
    for id in [1_048_002, 1_048_003] {
        sandbox.leave_remains(id, &sandbox.path("config.v1.json"));
    }
    let ran = sandbox.run(&["detach", "config.v1.json"]);
    let line = ran.failed(64);
    assert!(line.ends_with("say which: /dev/ublkb1048002, /dev/ublkb1048003"), "{line}");
    for id in ["1048002", "1048003"] {
        assert_eq!(sandbox.run(&["detach", id]).code, 0);
    }
    sandbox.assert_nothing_left();
}

#[test]
fn a_state_file_of_a_newer_version_is_shown_and_left_alone() {
    let sandbox = Sandbox::new();
    let folder = sandbox.run_path().join("1048004");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("state.json"), "{\"schema\":3}").unwrap();
    let ran = sandbox.run(&["list"]);
    assert_eq!(ran.code, 0);
    assert!(ran.stdout.contains("broken"), "{}", ran.stdout);
    assert!(ran.stderr.contains("schema: found 3, expected 2"), "{}", ran.stderr);
    let ran = sandbox.run(&["detach", "1048004"]);
    let line = ran.failed(4);
    assert!(line.contains(folder.join("state.json").to_str().unwrap()), "{line}");
    assert!(folder.exists());
}

#[test]
fn a_line_of_the_log_stays_one_line_whatever_a_path_holds() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run\n2026 ERROR forged\u{1b}[2J");
    std::fs::create_dir_all(run.join("1048005")).unwrap();
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::write(run.join("1048005/state.json"), "{\"schema\":3}").unwrap();
    let output = sandbox.command(&["list"]).env("OBD_UBLK_RUN_DIR", &run).output().unwrap();
    let ran = Ran::of(&output);
    assert_eq!((ran.code, ran.stderr.lines().count()), (0, 1), "{}", ran.stderr);
    assert!(ran.stderr.contains("run\\n2026 ERROR forged\\"), "{}", ran.stderr);
    assert!(!ran.stderr.contains('\u{1b}'), "{}", ran.stderr);
}

#[test]
fn a_run_folder_that_others_can_write_to_is_not_used() {
    let sandbox = Sandbox::new();
    sandbox.write_config(&good_config());
    let remains = sandbox.leave_remains(1_048_006, &sandbox.path("config.v1.json"));
    let open_to_all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(sandbox.run_path(), open_to_all).unwrap();
    for arguments in [
        &["attach", "config.v1.json"][..],
        &["list"],
        &["list", "--all"],
        &["stat", "1048006"],
        &["stat", "config.v1.json"],
        &["detach", "1048006"],
        &["detach", "config.v1.json"],
    ] {
        let ran = sandbox.run(arguments);
        assert!(ran.failed(4).contains("mode 777"), "{arguments:?}: {}", ran.stderr);
    }
    assert!(remains.exists());
}

#[test]
fn doctor_ends_as_attach_would() {
    let sandbox = Sandbox::new();
    let plain = sandbox.run(&["doctor"]);
    let ran = sandbox.run(&["doctor", "--json"]);
    assert_eq!(plain.code, ran.code);
    let facts: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(facts["usable"], ran.code == 0);
    assert!([0, 4].contains(&ran.code), "{}", ran.stderr);
    for check in facts["checks"].as_array().unwrap() {
        let mended = check["level"] == "ok" || check["mend"].is_string();
        assert!(mended, "{check}");
        assert!(plain.stdout.contains(check["detail"].as_str().unwrap()), "{check}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let sandbox = Sandbox::new();
    for arguments in [&["version"][..], &["doctor"], &["generate", "completions", "bash"]] {
        let (reader, writer) = UnixStream::pair().unwrap();
        drop(reader);
        let mut command = sandbox.command(arguments);
        let output = command.stdout(OwnedFd::from(writer)).output().unwrap();
        let ran = Ran::of(&output);
        assert!([0, 4].contains(&ran.code), "{arguments:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    }
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["generate", "completions", "bash"]);
    assert_eq!(ran.code, 0);
    std::fs::create_dir(sandbox.path("man")).unwrap();
    assert_eq!(sandbox.run(&["generate", "man", "man"]).code, 0);
    for command in ["attach", "detach", "serve", "list", "stat", "doctor", "version"] {
        // The name that is set for the command, and the place where its options are.
        for text in ["cmd=\"obd__ublk__subcmd__NAME\"\n", "  obd__ublk__subcmd__NAME)\n"] {
            assert!(ran.stdout.contains(&text.replace("NAME", command)), "{command}");
        }
        assert!(sandbox.path(&format!("man/obd-ublk-{command}.1")).exists(), "{command}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let ran = sandbox.run(&["generate", "completions", shell]);
        assert!(ran.stdout.contains("attach") && !ran.stdout.contains("serve-device"), "{shell}");
    }
}

#[test]
fn why_tells_the_trouble_of_a_device_whose_server_is_dead() {
    let sandbox = Sandbox::new();
    let config = sandbox.path("config.v1.json");
    let folder = sandbox.leave_remains(3, &config);
    let ran = sandbox.run(&["why", "3"]);
    assert_eq!((ran.code, &*ran.stdout), (0, "device 3: no request failed or was slow\n"));

    // The state as `attach` writes it: with the config that was attached, which is gone since.
    let state = std::fs::read_to_string(folder.join("state.json")).unwrap();
    let mut state: Value = serde_json::from_str(&state).unwrap();
    state["config_content"] = serde_json::from_str(&good_config()).unwrap();
    std::fs::write(folder.join("state.json"), state.to_string()).unwrap();
    let ring = TroubleRing::open(&folder.join("trouble")).unwrap();
    let trouble = Trouble { start_sector: 2, sectors: 1, errno: 84, ..Trouble::default() };
    ring.record(&Trouble { text: "read: bad\ncrc".to_owned(), ..trouble.clone() });
    ring.record(&Trouble { errno: 0, duration_us: 2_500_000, ..trouble });

    let ran = sandbox.run(&["why", "/dev/ublkb3", "--json"]);
    assert_eq!((ran.code, &*ran.stderr), (0, ""));
    let facts: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(facts["unexplained"], Value::Null);
    let records = facts["records"].as_array().unwrap();
    assert_eq!(records.len(), 2);
    assert_eq!(records[0]["errno_name"], "EILSEQ");
    assert_eq!(records[1]["errno_name"], "slow");
    // The superblock of the ext4 image: what `explain` says of its sector.
    sandbox.write_config(&good_config());
    let explained = sandbox.run(&["explain", "config.v1.json", "2", "--json"]);
    let explained: Value = serde_json::from_str(&explained.stdout).unwrap();
    assert_eq!(explained["reads_as"], "data");
    assert_eq!(records[0]["places"], json!([explained]));

    let other = r#"{"repoBlobUrl":"","lowers":[{"file":"nowhere"}],"upper":{},"resultFile":""}"#;
    std::fs::write(sandbox.path("other.json"), other).unwrap();
    let ran = sandbox.run(&["why", "3", "--config", "other.json"]);
    assert_eq!((ran.code, ran.stdout.lines().count()), (0, 3), "{}", ran.stdout);
    assert!(ran.stdout.contains("read 1 sectors from 2  EILSEQ"), "{}", ran.stdout);
    assert!(ran.stdout.contains("read: bad\\ncrc"), "{}", ran.stdout);
    assert!(ran.stdout.contains("layers are not told: the image cannot be opened: open layer 0"));
    assert!(sandbox.run(&["why", "4"]).failed(6).contains("device 4 was not attached"));
}
