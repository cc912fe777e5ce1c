//! A client's end of the control socket.

use super::protocol::{self, Op, Reply};
use super::wire;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::CONTROL_REPLY_BYTES_MAX;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Asks the server that listens at `socket`; the reply must come within `patience`.
///
/// # Errors
/// The server's own error. `NotFound` when nobody listens, `Canceled` when the server went away
/// without a reply, `Timeout` when it does not answer.
pub(super) fn request(socket: &Path, op: Op, patience: Duration) -> Result<Reply> {
    let nobody = |error: &std::io::Error| {
        let message = format!("nobody listens on control socket {}: {error}", socket.display());
        Error::new(ErrorKind::NotFound, message)
    };
    let stream = UnixStream::connect(socket).map_err(|error| nobody(&error))?;
    let canceled = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Canceled, format!("the server went away: {error}"))
    };
    wire::write_line(&stream, &protocol::encode_request(&op), patience)
        .map_err(|error| canceled(&error))?;
    let line = wire::read_line(&stream, CONTROL_REPLY_BYTES_MAX, patience);
    let line = line.map_err(|error| match error {
        wire::LineError::Deadline => {
            let seconds = patience.as_secs_f32();
            Error::new(ErrorKind::Timeout, format!("the server did not reply in {seconds:.1} s"))
        }
        wire::LineError::TooLong => error.tell("control reply"),
        wire::LineError::CutOff(_) => canceled(&"it closed the connection"),
        wire::LineError::Io(error) => canceled(&error),
    })?;
    protocol::parse_reply(&line)?.into_result()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    /// A server that answers one request with these bytes.
    fn asked(answer: &'static [u8]) -> Result<Reply> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 64];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(answer).unwrap();
        });
        let reply = request(&path, Op::Ping, Duration::from_secs(20));
        server.join().unwrap();
        reply
    }

    #[test]
    fn every_way_a_server_can_fail_to_answer_has_its_kind() {
        for (answer, kind) in [
            (&b""[..], ErrorKind::Canceled),
            (b"{\"v\":1,\"ok\":tr", ErrorKind::Canceled),
            (b"{}\n", ErrorKind::Corrupt),
            (b"{\"v\":1}\n", ErrorKind::Corrupt),
            (b"{\"v\":2,\"ok\":true}\n", ErrorKind::Unsupported),
        ] {
            assert_eq!(asked(answer).unwrap_err().kind(), kind, "{answer:?}");
        }
        assert!(asked(b"{\"v\":1,\"ok\":true,\"new\":1}\n").unwrap().ok);
        let nobody = request(Path::new("/nonexistent"), Op::Ping, Duration::from_secs(1));
        assert_eq!(nobody.unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_server_that_does_not_reply_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = request(&path, Op::Ping, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
    }
}
