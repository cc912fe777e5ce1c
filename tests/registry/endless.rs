//! Row 10, at full speed: a server whose answer never comes to its point.

use crate::lab::{LATE, Lab};
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::Options;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A server that answers every request by `head`, and `rest` without end.
fn flood(head: &'static str, rest: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("http://{}/v2/a/b/blobs", listener.local_addr().unwrap());
    let rest: Arc<[u8]> = rest.repeat((64 << 10) / rest.len()).into_bytes().into();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let rest = Arc::clone(&rest);
            std::thread::spawn(move || {
                let mut stream: TcpStream = stream.unwrap();
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).unwrap();
                let _ = stream.write_all(head.as_bytes());
                while stream.write_all(&rest).is_ok() {}
            });
        }
    });
    place
}

/// Its connection is busy all the time. That it cannot keep the clocks of others from being looked
/// at is a test of the executor.
#[test]
fn row_10_an_answer_without_end_costs_its_deadline_and_leaves_nothing_behind() {
    let chunked = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-999/5000\r\n\
                   Transfer-Encoding: chunked\r\n\r\n";
    for (head, rest) in [
        ("", "HTTP/1.1 100 Continue\r\n\r\n"),
        ("", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"),
        (chunked, "0"),
    ] {
        let place = flood(head, rest);
        let quick = Lab::new();
        let registry = quick.registry(Options::default());
        let flooded = registry.blob(&place, &quick.digest, Some(5000), Instant::now()).unwrap();
        let started = Instant::now();
        let error = quick.read(&flooded, 0..1000, Duration::from_secs(2)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{rest:?}: {error:#}");
        // The grace of the executor, and what a busy machine adds to it.
        assert!(started.elapsed() < Duration::from_secs(5) + LATE, "{rest:?}");
        let blob = quick.blob(&registry);
        assert!(quick.read(&blob, 0..1000, Duration::from_secs(30)).is_ok(), "{rest:?}");
    }
}
