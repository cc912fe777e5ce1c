//! Running this program again, for what needs a process of its own.

use crate::error::{Error, Result};
use crate::server::protocol::Refusal;
use serde::Deserialize;
use std::path::PathBuf;
use std::process::{Command, Output};

/// This program, to be run again. The path names the process for people; without it (the file was
/// replaced) any name will do.
pub(super) fn program() -> Command {
    let path = std::env::current_exe().ok().filter(|path| path.exists());
    Command::new(path.unwrap_or_else(|| PathBuf::from("/proc/self/exe")))
}

/// What a command of ours said that was given `--json`: its standard output, or its error.
///
/// # Errors
/// The command's own error, of its kind.
pub(super) fn outcome(output: &Output) -> Result<String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(told(&said).unwrap_or_else(|| {
        let last = said.lines().last().unwrap_or("it said nothing").to_owned();
        let error = std::io::Error::other(last);
        Error::io(format!("obd-ublk ended with {}", output.status), &error)
    }))
}

/// The error in the last line of a command's standard error.
fn told(said: &str) -> Option<Error> {
    #[derive(Deserialize)]
    struct Line {
        error: Refusal,
    }
    let line: Line = serde_json::from_str(said.lines().last()?).ok()?;
    Some(line.error.to_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn the_error_of_a_command_keeps_its_kind_behind_warnings() {
        let busy = r#"{"error":{"kind":"busy","message":"m","exit_code":12}}"#;
        for (code, stderr, kind, message) in [
            (12, busy.to_owned(), ErrorKind::Busy, "m"),
            (12, format!("WARN x\n{busy}\n"), ErrorKind::Busy, "m"),
            (64, "error: unexpected".to_owned(), ErrorKind::Io, "error: unexpected"),
            (1, String::new(), ErrorKind::Io, "it said nothing"),
        ] {
            let status = std::process::ExitStatus::from_raw(code << 8);
            let output = Output { status, stdout: Vec::new(), stderr: stderr.into_bytes() };
            let error = outcome(&output).unwrap_err();
            assert_eq!(error.kind(), kind);
            assert!(format!("{error:#}").contains(message), "{error:#}");
        }
        let status = std::process::ExitStatus::from_raw(0);
        let output = Output { status, stdout: b"{}\n".to_vec(), stderr: Vec::new() };
        assert_eq!(outcome(&output).unwrap(), "{}\n");
    }
}
