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
use obd_ublk::registry::{Options, Pace};
use std::time::{Duration, Instant};

/// Reads of the flooding server at the same time: as many as one blob may have under way.
const FLOODED: usize = 16;

const DEADLINE: Duration = Duration::from_secs(3);

/// How long a read whose executor does not get on is waited for beyond that.
const GRACE: Duration = Duration::from_millis(500);

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
        flooding.mock.state().rules.clear();
        let read = flooding.read(&blob, 0..1000, Duration::from_secs(20));
        assert_eq!(read.unwrap(), flooding.content[..1000], "{name}: it has come to its senses");
    }
}
