//! Faults of registries, row by row: right bytes or a clear error, within the deadline, with a
//! bounded number of requests.
//!
//! Here are rows 6 (what is not there), 7 (trouble that passes) and 8 (answers that lie).

use crate::lab::{LATE, Lab, REPOSITORY};
use crate::mock::{Fault, Mock, Part};
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::Options;
use obd_ublk::source::Fetch;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What must come of a fault.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// The right bytes, and so many requests for the blob.
    Bytes(usize),
    /// An error of that kind that says this, after so many requests for the blob.
    Fails(ErrorKind, &'static str, usize),
}

use Outcome::{Bytes, Fails};

/// A row: its name, what is done to how many requests, and what must come of it.
type Row = (&'static str, u64, Fault, Outcome);

/// Reads 1000 bytes in the middle of a blob while one thing goes wrong.
fn check((name, times, fault, outcome): Row) {
    let lab = Lab::new();
    lab.mock.fail(Part::Blob, times, fault);
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    lab.mock.clear();
    let started = Instant::now();
    let found = lab.read(&blob, 5000..6000, Duration::from_secs(5));
    let requests = lab.mock.count(Part::Blob);
    assert!(started.elapsed() < Duration::from_secs(5) + LATE, "{name}: {:?}", started.elapsed());
    match outcome {
        Bytes(count) => {
            assert_eq!(found.unwrap_or_else(|e| panic!("{name}: {e:?}")), lab.content[5000..6000]);
            assert_eq!(requests, count, "{name}");
        }
        Fails(kind, told, count) => {
            let error = found.expect_err(name);
            let text = format!("{error:#}");
            assert_eq!(error.kind(), kind, "{name}: {text}");
            assert!(text.contains(told), "{name}: {text}");
            assert!(text.starts_with("fetch bytes 5000 to 6000 of 127.0.0.1:"), "{name}: {text}");
            assert_eq!(requests, count, "{name}: {text}");
        }
    }
}

const FOREVER: u64 = u64::MAX;

#[test]
fn row_6_what_is_not_there_fails_at_once_and_says_so() {
    let status = Fault::status;
    let other = Fault::ContentRange("bytes 5000-5999/99999".to_owned());
    let length = "the blob has 99999 bytes, expected 100000";
    for row in [
        ("404", FOREVER, status(404), Fails(ErrorKind::NotFound, "HTTP status 404 from", 1)),
        ("410", FOREVER, status(410), Fails(ErrorKind::NotFound, "HTTP status 410 from", 1)),
        ("416", FOREVER, status(416), Fails(ErrorKind::Corrupt, "HTTP status 416 from", 1)),
        ("400", FOREVER, status(400), Fails(ErrorKind::Corrupt, "HTTP status 400 from", 1)),
        ("another length", FOREVER, other, Fails(ErrorKind::Corrupt, length, 1)),
    ] {
        check(row);
    }
}

#[test]
fn row_7_trouble_that_passes_is_sat_out() {
    let after = |status, value: &str| Fault::status_with(status, "Retry-After", value);
    let past = "Sun, 06 Nov 1994 08:49:37 GMT";
    for row in [
        ("500 twice", 2, Fault::status(500), Bytes(3)),
        ("502 once", 1, Fault::status(502), Bytes(2)),
        ("503 three times", 3, Fault::status(503), Bytes(4)),
        ("504 once", 1, Fault::status(504), Bytes(2)),
        ("429 with a pause in seconds", 1, after(429, "1"), Bytes(2)),
        ("503 with a date that is past", 1, after(503, past), Bytes(2)),
        ("reset before the head", 2, Fault::CutBeforeHead, Bytes(3)),
        ("reset after the head", 2, Fault::CutBody(0), Bytes(3)),
        ("reset within the body", 2, Fault::CutBody(100), Bytes(3)),
    ] {
        check(row);
    }
}

#[test]
fn row_7_trouble_that_stays_is_given_up_in_time() {
    let long = Fault::status_with(503, "Retry-After", "600");
    let lab = Lab::new();
    for (name, fault, told) in [
        ("503 for ever", Fault::status(503), "HTTP status 503 from"),
        ("resets for ever", Fault::CutBeforeHead, "given up after"),
        ("a pause longer than the deadline", long, "HTTP status 503 from"),
    ] {
        lab.mock.state().rules.clear();
        lab.mock.clear();
        lab.mock.fail(Part::Blob, FOREVER, fault);
        // What one registry was told is forgotten with it.
        let registry = lab.registry(Options::default());
        let blob = lab.blob(&registry);
        let started = Instant::now();
        let error = lab.read(&blob, 0..1000, Duration::from_secs(2)).expect_err(name);
        let took = started.elapsed();
        assert!(took < Duration::from_secs(2) + LATE, "{name}: {took:?}");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{name}: {error:?}");
        assert!(format!("{error:#}").contains(told), "{name}: {error:?}");
        let requests = lab.mock.count(Part::Blob);
        assert!((1..=8).contains(&requests), "{name}: {requests}");
    }
}

#[test]
fn row_7_many_reads_of_a_failing_registry_are_few_requests() {
    let lab = Lab::new();
    lab.mock.fail(Part::Blob, FOREVER, Fault::status(503));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let error = lab.read(&blob, 0..1000, Duration::from_secs(4)).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
            });
        }
    });
    // One each, the burst of retries, and ten a second. Without a budget there would be 600.
    let requests = lab.mock.count(Part::Blob);
    assert!((100..=100 + 64 + 50).contains(&requests), "{requests}");
}

#[test]
fn row_7_a_registry_that_is_restarted_costs_no_read() {
    let lab = Lab::new();
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    assert!(lab.read(&blob, 0..1000, Duration::from_secs(5)).is_ok());
    let Lab { mock, content, digest } = lab;
    let address = mock.host();
    // Open connections end with their next answer, and nobody listens any more.
    mock.fail(Part::Blob, FOREVER, Fault::CutBeforeHead);
    drop(mock);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..20)
            .map(|_| {
                scope.spawn(|| {
                    let mut bytes = vec![0; 1000];
                    let deadline = Instant::now() + Duration::from_secs(20);
                    blob.fetch(5000, &mut bytes, deadline).map(|()| bytes)
                })
            })
            .collect();
        std::thread::sleep(Duration::from_secs(3));
        let before = registry.counts().requests;
        assert!(before <= 200, "{before} requests to a registry that is down");
        let back = Mock::start_at(&address, None);
        back.state().content.blobs.insert(digest, Arc::clone(&content));
        for reader in readers {
            assert_eq!(reader.join().unwrap().unwrap(), content[5000..6000]);
        }
    });
}

/// They once waited for the turns that were promised while it was down: 10 s for 200 of them.
#[test]
fn row_7_a_registry_that_is_back_is_soon_asked_by_all_who_wait_for_it() {
    let lab = Lab::new();
    lab.mock.fail(Part::Blob, FOREVER, Fault::status(503));
    let registry = lab.registry(Options::default());
    let blobs: Vec<_> = (0..20).map(|_| lab.blob(&registry)).collect();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..200)
            .map(|number| {
                let (lab, blob) = (&lab, &blobs[number % blobs.len()]);
                scope.spawn(move || lab.read(blob, 0..1000, Duration::from_secs(30)))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(700));
        lab.mock.state().rules.clear();
        let back = Instant::now();
        for reader in readers {
            assert_eq!(reader.join().unwrap().unwrap(), lab.content[..1000]);
        }
        assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
    });
}

#[test]
fn row_8_answers_that_lie_are_not_data() {
    let range = |text: &str| Fault::ContentRange(text.to_owned());
    let kind = ErrorKind::Corrupt;
    let lies = [
        ("short body", Fault::Short, "206 with 999 bytes of body, expected 1000"),
        ("long body", Fault::Long, "206 with 1001 bytes of body, expected 1000"),
        ("200 for 206", Fault::Whole, "200 instead of 206"),
        ("another range", Fault::Shifted(512), "206 of bytes 5512 to 6512"),
        ("no Content-Range", Fault::NoContentRange, "206 with 0 Content-Range headers"),
        ("nonsense", range("bytes 5000-4999/100000"), "206 with the Content-Range"),
        ("too short a range", range("bytes 5000-5998/100000"), "206 of bytes 5000 to 5999"),
        ("several parts", Fault::Multipart, "206 with 0 Content-Range headers"),
        ("gzip", Fault::Encoded, "the body is encoded (gzip)"),
        ("a status of its own", Fault::status(204), "HTTP status 204"),
    ];
    for (name, fault, told) in lies {
        check((name, 1, fault.clone(), Bytes(2)));
        check((name, FOREVER, fault, Fails(kind, told, 4)));
    }
    check(("chunked, without a length", FOREVER, Fault::Chunked, Bytes(1)));
    for (name, fault, told) in [
        ("chunks that end early", Fault::ChunkedEarly, "a body shorter than told"),
        ("a chunk too many", Fault::ChunkedLong, "a body longer than told"),
    ] {
        check((name, 1, fault.clone(), Bytes(2)));
        check((name, FOREVER, fault, Fails(kind, told, 4)));
    }
    check(("chunks that break off", 1, Fault::ChunkedShort, Bytes(2)));
    check(("a connection that ends with the last byte", 1, Fault::CutBody(1000), Bytes(1)));
}

#[test]
fn row_8_a_200_does_not_pull_the_whole_blob() {
    let lab = Lab::with_content(64 << 20);
    lab.mock.fail(Part::Blob, FOREVER, Fault::Whole);
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    let error = lab.read(&blob, 0..1000, Duration::from_secs(5)).unwrap_err();
    assert!(format!("{error:#}").contains("all 67108864 bytes instead of 1000"), "{error:?}");
    assert_eq!(registry.counts().bytes, 0);
}

#[test]
fn row_8_a_small_blob_may_come_whole() {
    let lab = Lab::with_content(5000);
    lab.mock.fail(Part::Blob, FOREVER, Fault::Whole);
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    let read = |range| lab.read(&blob, range, Duration::from_secs(5));
    assert_eq!(read(0..5000).unwrap(), lab.content[..]);
    assert_eq!(read(0..1000).unwrap(), lab.content[..1000]);
    assert_eq!(read(1..1000).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn a_body_that_was_cut_is_resumed_where_it_stopped() {
    let lab = Lab::new();
    lab.mock.fail(Part::Blob, 2, Fault::CutBody(400));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    let found = lab.read(&blob, 5000..6000, Duration::from_secs(5)).unwrap();
    assert_eq!(found, lab.content[5000..6000]);
    let ranges = lab.mock.log(Part::Blob).into_iter().filter_map(|record| record.range);
    let expected = ["bytes=5000-5999", "bytes=5400-5999", "bytes=5800-5999"];
    assert_eq!(ranges.collect::<Vec<_>>(), expected);
}

#[test]
fn a_large_read_comes_by_several_connections_at_a_time() {
    let lab = Lab::with_content(9 << 20);
    lab.mock.fail(Part::Blob, FOREVER, Fault::Delay(200));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    let started = Instant::now();
    let found = lab.read(&blob, 100..(8 << 20) + 100, Duration::from_secs(20)).unwrap();
    assert!(found == lab.content[100..(8 << 20) + 100]);
    // One after the other would take 1.6 s.
    assert!(started.elapsed() < Duration::from_millis(1400), "{:?}", started.elapsed());
    assert_eq!(lab.mock.count(Part::Blob), 8);
}

#[test]
fn the_length_of_a_blob_is_asked_for_where_no_config_says_it() {
    let lab = Lab::new();
    let registry = lab.registry(Options::default());
    let deadline = Instant::now() + Duration::from_secs(5);
    let place = lab.mock.blobs_of(REPOSITORY);
    let blob = registry.blob(&place, &lab.digest, None, deadline).unwrap();
    assert_eq!(blob.bytes(), 100_000);
    let missing = format!("sha256:{}", "0".repeat(64));
    let error = registry.blob(&place, &missing, None, deadline).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error:?}");
}

#[test]
fn reads_beyond_the_end_ask_nobody() {
    let lab = Lab::new();
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    for range in [99_999..100_001, 200_000..200_001] {
        let error = lab.read(&blob, range, Duration::from_secs(5)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
    }
    assert!(lab.read(&blob, 100_000..100_000, Duration::from_secs(5)).unwrap().is_empty());
    assert_eq!(lab.mock.count(Part::Blob), 0);
}
