//! What every command may have to say: one result that must arrive, or one error.

use crate::error::{Error, Result};
use serde_json::json;
use std::io::Write;

/// Prints `text` to somebody who has to have it: a reader that has gone away is an error.
pub(super) fn print_or_fail(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Error::io("write to stdout", &error))
}

/// Tells why the command failed, in one line on standard error.
pub(super) fn print_error(error: &Error, as_json: bool) {
    // Without standard error there is nobody to tell; the exit code still says it.
    let _ = writeln!(std::io::stderr().lock(), "{}", error_line(error, as_json));
}

fn error_line(error: &Error, as_json: bool) -> String {
    let message = format!("{error:#}");
    if as_json {
        let (kind, code) = (error.kind().name(), error.exit_code());
        json!({"error": {"kind": kind, "message": message, "exit_code": code}}).to_string()
    } else {
        format!("obd-ublk: {}", message.replace(['\n', '\r'], " "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn an_error_is_one_line() {
        let error = Error::new(ErrorKind::Busy, "two\nlines").context("detach");
        assert_eq!(error_line(&error, false), "obd-ublk: detach: two lines");
        assert_eq!(
            error_line(&error, true),
            r#"{"error":{"kind":"busy","message":"detach: two\nlines","exit_code":12}}"#
        );
    }
}
