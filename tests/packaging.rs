//! The files in `tools/packaging` say what they must: units that systemd reads, commands and
//! options that the program has, and a README that names every file.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;

const UNITS: [&str; 2] = ["obd-ublk@.service", "obd-ublk-persist.service"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/packaging")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(folder().join(name)).unwrap()
}

/// The settings of a unit in order: section, key, value.
fn settings(unit: &str) -> Vec<(String, String, String)> {
    let mut section = String::new();
    let mut found = Vec::new();
    for line in read(unit).lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            name.clone_into(&mut section);
            continue;
        }
        let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("{unit}: {line}"));
        assert!(!key.ends_with(' ') && !value.starts_with(' '), "{unit}: {line}");
        assert!(!line.ends_with('\\'), "{unit}: no continued lines: {line}");
        found.push((section.clone(), key.to_owned(), value.to_owned()));
    }
    found
}

fn values(unit: &str, section: &str, key: &str) -> Vec<String> {
    let wanted = |(s, k, _): &&(String, String, String)| s == section && k == key;
    settings(unit).iter().filter(wanted).map(|(_, _, value)| value.clone()).collect()
}

#[test]
fn units_have_every_key_that_keeps_devices_alive_and_in_order() {
    for unit in UNITS {
        let sections: Vec<_> = settings(unit).into_iter().map(|(section, ..)| section).collect();
        for section in &sections {
            assert!(
                ["Unit", "Service", "Install"].contains(&section.as_str()),
                "{unit}: {section}"
            );
        }
        for (section, key, expected) in [
            ("Unit", "DefaultDependencies", "no"),
            ("Unit", "Conflicts", "shutdown.target"),
            ("Unit", "Wants", "remote-fs-pre.target"),
            ("Unit", "Before", "remote-fs-pre.target"),
            ("Unit", "Before", "shutdown.target"),
            ("Service", "Type", "oneshot"),
            ("Service", "RemainAfterExit", "yes"),
            ("Service", "KillMode", "process"),
            ("Service", "SendSIGKILL", "no"),
            ("Service", "PrivateMounts", "no"),
            ("Install", "WantedBy", "multi-user.target"),
        ] {
            let found = values(unit, section, key);
            assert!(found.iter().any(|value| value == expected), "{unit}: {key}: {found:?}");
        }
        let after = values(unit, "Unit", "After").join(" ");
        let before_it = ["systemd-modules-load.service", "local-fs.target"];
        for wanted in before_it.into_iter().chain(["network.target", "network-online.target"]) {
            assert!(after.split(' ').any(|name| name == wanted), "{unit}: After: {after}");
        }
        assert_eq!(values(unit, "Unit", "Description").len(), 1, "{unit}");
        // With default dependencies it would come after the mounts that need it.
        assert!(!after.contains("basic.target") && !after.contains("remote-fs"), "{unit}");
    }
}

#[test]
fn units_run_commands_and_options_that_the_program_has() {
    for unit in UNITS {
        for key in ["ExecStart", "ExecStop"] {
            let [line] = &values(unit, "Service", key)[..] else { panic!("{unit}: one {key}") };
            let words: Vec<&str> = line.split(' ').collect();
            let ["/usr/bin/obd-ublk", command, options @ ..] = &words[..] else {
                panic!("{unit}: {line}")
            };
            let output = Command::new(env!("CARGO_BIN_EXE_obd-ublk"))
                .args([command, "--help"])
                .output()
                .unwrap();
            assert!(output.status.success(), "{unit}: {line}");
            let help = String::from_utf8(output.stdout).unwrap();
            for option in options.iter().filter(|option| option.len() > 2) {
                assert!(help.contains(*option) || *option == "%I", "{unit}: {option}");
            }
        }
        // What stops a device must neither forget it nor leave its mount behind.
        let stop = values(unit, "Service", "ExecStop").concat();
        assert!(stop.contains("--unmount"), "{unit}: {stop}");
        assert!(stop.contains("--keep-persist") || stop.contains("--persisted"), "{unit}: {stop}");
    }
}

#[test]
fn the_instance_is_unescaped_and_cannot_be_taken_for_an_option() {
    for key in ["ExecStart", "ExecStop"] {
        let line = values("obd-ublk@.service", "Service", key).concat();
        assert!(line.ends_with(" -- %I"), "{line}");
    }
}

#[test]
fn time_limits_of_units_are_above_those_of_the_commands() {
    use obd_ublk::limits::{ATTACH_SECONDS_MAX, DETACH_SECONDS_DEFAULT};
    for unit in UNITS {
        for (key, least) in
            [("TimeoutStartSec", ATTACH_SECONDS_MAX), ("TimeoutStopSec", DETACH_SECONDS_DEFAULT)]
        {
            let seconds: u64 = values(unit, "Service", key).concat().parse().unwrap();
            assert!(seconds > least, "{unit}: {key}={seconds}, expected more than {least}");
        }
    }
}

#[test]
fn the_driver_is_loaded_with_a_parameter_that_it_has() {
    let lines = |name: &str| -> Vec<String> {
        let text = read(name);
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(ToOwned::to_owned).collect()
    };
    assert_eq!(lines("obd-ublk.modules-load.conf"), ["ublk_drv"]);
    let [line] = &lines("obd-ublk.modprobe.conf")[..] else { panic!("one line") };
    let max = line.strip_prefix("options ublk_drv ublks_max=").unwrap();
    let max: u32 = max.parse().unwrap();
    assert!((65..=obd_ublk::limits::DEVICE_ID_MAX + 1).contains(&max), "{max}");
}

#[test]
fn the_readme_names_every_file_and_no_other() {
    let readme = read("README.md");
    for entry in std::fs::read_dir(folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == "README.md" || readme.contains(&format!("| `{name}` |")), "{name}");
    }
    let named = readme.split(['`', ' ', '\n']).filter_map(|word| {
        word.strip_prefix("tools/packaging/").or_else(|| word.strip_prefix("tools/packaging\\"))
    });
    for name in named {
        assert!(folder().join(name).is_file(), "{name}");
    }
}
