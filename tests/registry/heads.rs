//! Row 8, heads to the letter: what a server says before a body, and whether the body is data then.

use crate::lab::REPOSITORY;
use obd_ublk::error::{ErrorKind, Result};
use obd_ublk::registry::{Digest, Options, Registry};
use obd_ublk::source::Fetch;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::time::{Duration, Instant};

const BLOB_BYTES: u64 = 100_000;

/// The first 100 bytes of a blob whose registry answers every request with `head` and `body`.
fn first_bytes(head: &'static str, body: &'static str) -> Result<String> {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("http://{}/v2/{REPOSITORY}/blobs", server.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in server.incoming() {
            let mut stream = stream.unwrap();
            let mut asked = Vec::new();
            let mut byte = [0];
            while !asked.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n > 0) {
                asked.push(byte[0]);
            }
            let answer = format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n{body}");
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    let registry = Registry::new(Options::default()).unwrap();
    let digest = Digest::of(b"").to_string();
    let blob = registry.blob(&place, &digest, Some(BLOB_BYTES), Instant::now()).unwrap();
    let mut bytes = vec![0; 100];
    blob.fetch(0, &mut bytes, Instant::now() + Duration::from_secs(10))?;
    Ok(String::from_utf8(bytes).unwrap())
}

/// A proxy that wants people to log in once filled a layer with its page.
#[test]
fn row_8_a_page_without_a_length_is_not_the_beginning_of_a_blob() {
    let page = "<html><body><form action=/login><input name=user><input name=password>\
                <input type=submit value='Log in to this network'></form></body></html>";
    assert!(page.len() > 100);
    let in_chunks: &'static str = format!("{:x}\r\n{page}\r\n0\r\n\r\n", page.len()).leak();
    for (head, body) in [
        ("200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked", in_chunks),
        ("200 OK\r\nContent-Type: text/html", page),
    ] {
        let error = first_bytes(head, body).expect_err(head);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{head}: {error:?}");
        assert!(format!("{error:#}").contains("200 without a Content-Length"), "{error:?}");
    }
}

#[test]
fn row_8_all_encodings_that_a_head_names_count() {
    let body: &'static str = "x".repeat(100).leak();
    let head = |encodings: &str| -> &'static str {
        let range = "206 Partial Content\r\nContent-Range: bytes 0-99/100000";
        format!("{range}\r\nContent-Length: 100{encodings}").leak()
    };
    for plain in [
        "",
        "\r\nContent-Encoding: identity",
        "\r\nContent-Encoding: identity\r\nContent-Encoding: identity, identity",
    ] {
        assert_eq!(first_bytes(head(plain), body).expect(plain), body);
    }
    for encoded in [
        "\r\nContent-Encoding: identity\r\nContent-Encoding: gzip",
        "\r\nContent-Encoding: identity, gzip",
    ] {
        let error = first_bytes(head(encoded), body).expect_err(encoded);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{encoded}: {error:?}");
        assert!(format!("{error:#}").contains("the body is encoded (gzip)"), "{error:?}");
    }
}
