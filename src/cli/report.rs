//! What a command says when it fails: one error, on standard error.

use crate::error::Error;
use crate::telemetry::printable;
use serde_json::json;
use std::borrow::Cow;
use std::ffi::OsString;
use std::io::Write;

/// Tells why the command failed, in one line on standard error.
pub(super) fn print_error(error: &Error, as_json: bool) {
    // Without standard error there is nobody to tell; the exit code still says it.
    let _ = writeln!(std::io::stderr().lock(), "{}", error_line(error, as_json));
}

/// Tells what is wrong with the arguments, or the help that was asked for, as clap words it. It
/// repeats arguments, which may be names that somebody else chose: with one that would act on the
/// terminal, everything is told in one plain line.
pub(super) fn print_usage_error(error: &clap::Error) -> std::io::Result<()> {
    let acts = |argument: OsString| matches!(printable(&argument.to_string_lossy()), Cow::Owned(_));
    if !error.use_stderr() || !std::env::args_os().any(acts) {
        return error.print();
    }
    let text = error.render().to_string();
    writeln!(std::io::stderr().lock(), "{}", printable(text.trim_end()))
}

fn error_line(error: &Error, as_json: bool) -> String {
    let message = format!("{error:#}");
    if as_json {
        let (kind, code) = (error.kind().name(), error.exit_code());
        json!({"error": {"kind": kind, "message": message, "exit_code": code}}).to_string()
    } else {
        format!("obd-ublk: {}", printable(&message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn an_error_is_one_line() {
        let error = Error::new(ErrorKind::Busy, "two\nlines").context("detach");
        assert_eq!(error_line(&error, false), r"obd-ublk: detach: two\nlines");
        assert_eq!(
            error_line(&error, true),
            r#"{"error":{"kind":"busy","message":"detach: two\nlines","exit_code":12}}"#
        );
    }
}
