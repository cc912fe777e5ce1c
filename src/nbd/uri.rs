//! The address of a server on a Unix socket, as clients take it.

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The URI of the export with the empty name on the socket at `path`, as the NBD URI
/// specification spells it. Everything that could mean something in a URI is escaped.
#[must_use]
pub fn of_socket(path: &Path) -> String {
    let mut uri = "nbd+unix:///?socket=".to_owned();
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            let _ = write!(uri, "%{byte:02X}");
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn what_means_something_in_a_uri_is_escaped() {
        for (path, query) in [
            (&b"/run/nbd.sock"[..], "/run/nbd.sock"),
            (b"/a b/%41", "/a%20b/%2541"),
            (b"/x&tls=1#y?z+w", "/x%26tls%3D1%23y%3Fz%2Bw"),
            (b"/-._~", "/-._~"),
            (b"/\xff\xc3\xa4\n", "/%FF%C3%A4%0A"),
        ] {
            let uri = of_socket(Path::new(OsStr::from_bytes(path)));
            assert_eq!(uri, format!("nbd+unix:///?socket={query}"));
        }
    }
}
