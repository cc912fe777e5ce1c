//! The commands that read images, as people meet them: the real program, its streams, its exit
//! codes and what it leaves behind.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::golden::Golden;
use common::written_below;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use obd_ublk::format::lsmt::{self, SegmentMapping};
use serde_json::json;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_obd-ublk"));
    command.env_remove("OBD_UBLK_LOG").stdin(Stdio::null());
    command
}

/// A config of one layer: 4 MiB of data that the index repeats over a disk of 512 GiB, more than
/// any test waits for.
fn endless_image(folder: &Path) -> PathBuf {
    let entry = |number: u64| SegmentMapping {
        start_sector: number * 8192,
        sectors: 8192,
        mapped_sector: 8,
        zeroed: false,
        tag: 0,
    };
    let entries: Vec<_> = (0..131_072).map(entry).collect();
    let layer = lsmt::write_sealed(&entries, &vec![0xa5; 4 << 20], 512 << 30);
    std::fs::write(folder.join("layer"), layer).unwrap();
    let config = folder.join("config.v1.json");
    let content = json!({ "lowers": [{ "file": folder.join("layer") }] });
    std::fs::write(&config, content.to_string()).unwrap();
    config
}

/// SIGXFSZ ended the program without a word; a server, too, whose cache had reached the limit.
#[test]
fn a_limit_on_the_size_of_files_is_an_error_that_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let config = endless_image(folder.path());
    let script = r#"ulimit -f 1000; exec "$0" export "$1" -o "$2""#;
    let ended = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_obd-ublk")])
        .args([config, folder.path().join("disk")])
        .env_remove("OBD_UBLK_LOG")
        .output()
        .unwrap();
    let told = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{:?}: {told}", ended.status);
    assert!(told.contains("File too large"), "{told}");
    assert!(!folder.path().join("disk").exists());
}

/// Exports and zfile extractions used to leave a hidden file of any size when they were stopped.
#[test]
fn an_export_that_is_stopped_leaves_nothing_behind() {
    let inputs = tempfile::tempdir().unwrap();
    let config = endless_image(inputs.path());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let outputs = tempfile::tempdir().unwrap();
        let mut export = program()
            .args(["export".as_ref(), config.as_os_str(), "-o".as_ref()])
            .arg(outputs.path().join("disk"))
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while written_below(export.id(), outputs.path()) < 8 << 20 {
            assert!(export.try_wait().unwrap().is_none(), "the export ended by itself");
            assert!(Instant::now() < deadline, "nothing was written");
            std::thread::sleep(Duration::from_millis(2));
        }
        kill(Pid::from_raw(export.id().try_into().unwrap()), signal).unwrap();
        let status = export.wait().unwrap();
        assert_eq!(status.signal(), Some(signal as i32));
        let left: Vec<_> = std::fs::read_dir(outputs.path()).unwrap().collect();
        assert!(left.is_empty(), "{signal}: {left:?}");
    }
}

/// Clears the screen, forges a line, returns to its start and turns the reading direction.
const EVIL: &str = "\u{1b}[2J\nlayers: none\r\u{202e}x";
const EVIL_SHOWN: &str = "\\u{1b}[2J\\nlayers: none\\r\\u{202e}x";

fn assert_plain(text: &str, arguments: &[&str]) {
    let acts = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!text.contains(acts), "{arguments:?}: {text:?}");
    assert!(!text.contains("\nlayers: none"), "{arguments:?}: {text:?}");
}

/// Both streams of a run in `folder`, and whether it succeeded.
fn run_in(folder: &Path, arguments: &[&str]) -> (bool, String, String) {
    let output = program().args(arguments).current_dir(folder).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn what_a_file_name_says_to_a_terminal_is_not_said() {
    let golden = Golden::load();
    let folder = tempfile::tempdir().unwrap();
    let layer = golden.root().join(&golden.case("zfile-lz4-4k-random").files[0]);
    for name in ["plain", EVIL] {
        std::fs::copy(&layer, folder.path().join(name)).unwrap();
        std::fs::write(folder.path().join(format!("{name}.bad")), vec![1; 9000]).unwrap();
        let config = json!({ "lowers": [{ "file": name, "digest": name }] });
        std::fs::write(folder.path().join(format!("{name}.json")), config.to_string()).unwrap();
    }
    let commands: [&[&str]; 9] = [
        &["inspect", "NAME.json"],
        &["verify", "NAME"],
        &["verify", "NAME.json"],
        &["explain", "NAME.json", "1718"],
        &["verify", "NAME.bad"],
        &["inspect", "NAME.missing"],
        &["zfile", "-x", "NAME.bad", "out"],
        &["export", "NAME.json", "-o", "NAME"],
        &["version", "NAME"],
    ];
    for command in commands {
        let ran = |name: &str| {
            let arguments: Vec<_> = command.iter().map(|a| a.replace("NAME", name)).collect();
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            run_in(folder.path(), &arguments)
        };
        let (plain, evil) = (ran("plain"), ran(EVIL));
        assert_eq!(evil.0, plain.0, "{command:?}: {}", evil.2);
        for (evil, plain) in [(&evil.1, &plain.1), (&evil.2, &plain.2)] {
            assert_plain(evil, command);
            assert_eq!(
                evil.lines().count() > 1,
                command[0] != "version" && plain.lines().count() > 1
            );
            // An argument that clap repeats loses its sequences altogether.
            if command[0] != "version" {
                let expected = plain.replace("plain", EVIL_SHOWN);
                assert_eq!(evil, &expected, "{command:?}");
            }
        }
        let told = format!("{}{}", plain.1, plain.2);
        assert!(told.contains("plain"), "{command:?} repeats the name: {told}");
    }
}
