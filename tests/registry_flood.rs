//! Row 10 at its worst: a server that floods us with what is no data, as fast as we read. It may
//! cost its own reads their deadline, and no other registry's anything. By itself, because such a
//! server takes the processor from whatever runs beside it.

#![cfg(feature = "registry")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "registry/lab.rs"]
mod lab;
#[path = "../tools/mock-registry/mod.rs"]
mod mock;

use lab::{LATE, Lab};
use mock::{Fault, Part};
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::{Options, Pace, Registry};
use obd_ublk::source::Fetch;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Reads of the flooding server at the same time: half of what one blob may have under way. Each
/// takes in 50 MB before it sees that it is not wanted any more.
const FLOODED: usize = 8;

const DEADLINE: Duration = Duration::from_secs(3);

/// How long a read whose executor does not get on is waited for beyond that.
const GRACE: Duration = Duration::from_millis(500);

/// What else waits for the executor that does not get on: reads that nobody wants any more, and
/// the questions that come before any read.
fn ends_when_it_must(name: &str, flooding: &Lab, registry: &Arc<Registry>) {
    let blob = flooding.blob(registry);
    let long = Duration::from_secs(60);
    std::thread::scope(|scope| {
        let readers = [0; FLOODED / 2].map(|_| scope.spawn(|| flooding.read(&blob, 0..1000, long)));
        std::thread::sleep(Duration::from_secs(1));
        blob.cancel();
        let canceled = Instant::now();
        for reader in readers {
            let error = reader.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Canceled, "{name}: {error:?}");
        }
        assert!(canceled.elapsed() < GRACE + LATE, "{name}: {:?}", canceled.elapsed());
    });
    let place = flooding.mock.blobs_of(lab::REPOSITORY);
    let started = Instant::now();
    let asked = registry.blob(&place, &flooding.digest, None, started + Duration::from_secs(1));
    assert!(asked.is_err(), "{name}");
    let took = started.elapsed();
    assert!(took < Duration::from_secs(1) + GRACE + LATE, "{name}: {took:?}");
}

#[test]
fn row_10_a_server_that_floods_us_with_no_data_delays_no_other_registrys_reads() {
    for (name, fault) in [
        ("answers before the answer", Fault::Informational),
        ("zeros before the length of a chunk", Fault::Zeros),
    ] {
        let (flooding, quiet) = (Lab::new(), Lab::new());
        flooding.mock.fail(Part::Blob, u64::MAX, fault);
        let window = Duration::from_secs(1);
        let pace = Pace { window, head: window, ..Pace::default() };
        let registry = flooding.registry(Options { pace, ..Options::default() });
        let (blob, other) = (flooding.blob(&registry), quiet.blob(&registry));
        let started = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..FLOODED {
                scope.spawn(|| {
                    let error = flooding.read(&blob, 0..1000, DEADLINE).unwrap_err();
                    let took = started.elapsed();
                    assert_eq!(error.kind(), ErrorKind::Timeout, "{name}: {error:?}");
                    assert!(took < DEADLINE + GRACE + LATE, "{name}: {took:?}");
                });
            }
            while started.elapsed() < DEADLINE {
                let began = Instant::now();
                let read = quiet.read(&other, 0..50_000, Duration::from_secs(20));
                assert!(read.unwrap() == quiet.content[..50_000], "{name}");
                assert!(began.elapsed() < LATE, "{name}: {:?}", began.elapsed());
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        ends_when_it_must(name, &flooding, &registry);
        flooding.mock.state().rules.clear();
        let read = flooding.read(&blob, 0..1000, Duration::from_secs(60));
        assert_eq!(read.unwrap(), flooding.content[..1000], "{name}: it has come to its senses");
    }
}
