//! README.md does not lie: the commands, flags and exit codes it names are the program's.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use obd_ublk::error::ErrorKind;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

fn readme() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap()
}

/// Each command that a line names, with the long and short flags on the same line.
fn commands(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '-');
    for line in text.lines() {
        for rest in line.split("obd-ublk ").skip(1) {
            let name = rest.split(word).next().unwrap_or("");
            let code = line.contains("`obd-ublk") || line.starts_with("obd-ublk");
            if name.is_empty() || !(code || line.contains("$(obd-ublk")) {
                continue;
            }
            let flags = line.split(word).filter(|flag| flag.starts_with('-') && flag.len() > 1);
            let flags = flags.filter(|flag| !flag.starts_with("---"));
            found.entry(name.to_owned()).or_default().extend(flags.map(str::to_owned));
        }
    }
    found
}

#[test]
fn every_command_and_flag_of_the_readme_exists() {
    let commands = commands(&readme());
    assert!(commands.len() >= 11, "{commands:?}");
    assert!(commands["attach"].contains("--foreground"), "flags are found: {commands:?}");
    for (command, flags) in commands {
        let output = Command::new(env!("CARGO_BIN_EXE_obd-ublk"))
            .args([command.as_str(), "--help"])
            .output()
            .unwrap();
        assert!(output.status.success(), "obd-ublk {command} --help: {output:?}");
        let help = String::from_utf8(output.stdout).unwrap();
        for flag in flags {
            let told = help.split(|c: char| c.is_whitespace() || ",[=<".contains(c));
            assert!(told.into_iter().any(|word| word == flag), "{command} {flag}:\n{help}");
        }
    }
}

#[test]
fn the_exit_codes_of_the_readme_are_those_of_the_error_kinds() {
    use ErrorKind::{
        Busy, Canceled, Corrupt, Integrity, InvalidConfig, InvalidFormat, Io, Kernel, NoSpace,
        NotFound, OutOfRange, ReadOnly, Timeout, Unauthorized, Unavailable, Unsupported, Usage,
    };
    let kinds = [
        Busy,
        Canceled,
        Corrupt,
        Integrity,
        InvalidConfig,
        InvalidFormat,
        Io,
        Kernel,
        NoSpace,
        NotFound,
        OutOfRange,
        ReadOnly,
        Timeout,
        Unauthorized,
        Unavailable,
        Unsupported,
        Usage,
    ];
    let mut expected: BTreeSet<u8> = kinds.iter().map(|kind| kind.exit_code()).collect();
    expected.insert(0);
    let text = readme();
    let table = text.split("## Exit codes").nth(1).unwrap().split("\n## ").next().unwrap();
    let code = |line: &str| line.split('|').nth(1)?.trim().parse().ok();
    assert_eq!(table.lines().filter_map(code).collect::<BTreeSet<u8>>(), expected);
}
