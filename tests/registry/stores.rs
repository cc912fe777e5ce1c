//! Row 5: the stores that a registry redirects to, and how they are left.

use crate::lab::{LATE, Lab, REPOSITORY, content};
use crate::mock::answer::Bearer;
use crate::mock::{Auth, Fault, Mock, Part};
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::{Digest, Options, Pace};
use obd_ublk::source::Fetch;
use std::sync::Arc;
use std::time::{Duration, Instant};

const ENOUGH: Duration = Duration::from_secs(10);

/// A registry that redirects to a store, for an hour.
fn with_store() -> (Lab, Mock) {
    let (lab, store) = (Lab::new(), Mock::start());
    store.state().content.blobs.insert(lab.digest.clone(), Arc::clone(&lab.content));
    lab.mock.state().redirect = Some((store.url(), 3_600_000));
    (lab, store)
}

/// The registry knows of another store from now on.
fn moved(lab: &Lab) -> Mock {
    let other = Mock::start();
    other.state().content.blobs.insert(lab.digest.clone(), Arc::clone(&lab.content));
    lab.mock.state().redirect = Some((other.url(), 3_600_000));
    other
}

#[test]
fn row_5_a_store_that_fails_in_any_way_is_asked_for_anew() {
    let after = |status| Fault::status_with(status, "Retry-After", "1");
    for (name, fault) in [
        ("an error", Fault::status(503)),
        ("an error with a pause", after(503)),
        ("too many requests", after(429)),
        ("a head and no body", Fault::CutBody(0)),
        ("a head and a body that trickles", Fault::Slow(100)),
        ("no answer", Fault::Delay(3000)),
        ("a page of its own", Fault::status_with(200, "Content-Type", "text/html")),
        ("a part of the range", Fault::Short),
        ("a blob of another length", Fault::ContentRange("bytes 0-999/1001".to_owned())),
    ] {
        let (lab, store) = with_store();
        let (window, head) = (Duration::from_millis(500), Duration::from_millis(800));
        let pace = Pace { window, window_bytes_min: 4000, head, ..Pace::default() };
        let blob = lab.blob(&lab.registry(Options { pace, ..Options::default() }));
        assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok(), "{name}");
        store.fail(Part::Store, u64::MAX, fault);
        let _other = moved(&lab);
        let read = lab.read(&blob, 0..1000, ENOUGH);
        assert_eq!(read.unwrap_or_else(|e| panic!("{name}: {e:?}")), lab.content[..1000], "{name}");
        assert_eq!(lab.mock.count(Part::Blob), 2, "{name}");
        assert!(store.count(Part::Store) <= 3, "{name}: {}", store.count(Part::Store));
    }
}

#[test]
fn row_9_wrong_bytes_of_a_store_are_fetched_again_from_where_the_registry_says() {
    let (lab, store) = with_store();
    let blob = lab.blob(&lab.registry(Options::default()));
    store.fail(Part::Store, u64::MAX, Fault::Corrupt);
    assert_ne!(lab.read(&blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    let other = moved(&lab);
    let mut bytes = vec![0; 1000];
    for (start, expected) in (0..5000).step_by(1000).zip(lab.content.chunks(1000)) {
        blob.fetch_from_origin(start, &mut bytes, Instant::now() + ENOUGH).unwrap();
        assert_eq!(bytes, expected);
    }
    assert_eq!((lab.mock.count(Part::Blob), other.count(Part::Store)), (2, 5), "asked once");
}

#[test]
fn row_7_a_store_that_asks_for_pauses_costs_its_registry_few_requests() {
    let (lab, store) = with_store();
    store.fail(Part::Store, u64::MAX, Fault::status_with(503, "Retry-After", "1"));
    let blob = lab.blob(&lab.registry(Options::default()));
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| lab.read(&blob, 0..1000, Duration::from_secs(5)).unwrap_err());
        }
    });
    // In each of five seconds the few that come before the first has met the hold. There were 100.
    let asked = (lab.mock.count(Part::Blob), store.count(Part::Store));
    assert!(asked.0 <= 150 && asked.1 <= 150, "{asked:?}");
}

/// A redirect within the registry was asked without leave first, each time.
#[test]
fn row_5_a_redirect_within_the_registry_costs_one_request_once_it_is_known() {
    let lab = Lab::new();
    lab.mock.state().auth = Auth::Bearer(Bearer::at(&format!("{}/token", lab.mock.url())));
    lab.mock.state().redirect = Some((lab.mock.url(), 3_600_000));
    let blob = lab.blob(&lab.registry(Options::default()));
    for _ in 0..5 {
        assert_eq!(lab.read(&blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    }
    let shown = lab.mock.log(Part::Store).into_iter().filter_map(|record| record.authorization);
    assert_eq!((shown.count(), lab.mock.count(Part::Blob)), (5, 2));
}

/// Those who waited for a store once held all requests that may be under way to its registry.
#[test]
fn row_10_a_store_that_hangs_delays_no_blob_that_is_elsewhere() {
    let (lab, dead) = with_store();
    dead.fail(Part::Store, u64::MAX, Fault::Delay(20_000));
    let bytes: Arc<[u8]> = content(5000, 9).into();
    let digest = Digest::of(&bytes).to_string();
    lab.mock.state().content.blobs.insert(digest.clone(), Arc::clone(&bytes));
    let registry = lab.registry(Options::default());
    let hanging: Vec<_> = (0..8).map(|_| lab.blob(&registry)).collect();
    let place = lab.mock.blobs_of(REPOSITORY);
    let other = registry.blob(&place, &digest, Some(5000), Instant::now()).unwrap();
    let time = Duration::from_secs(4);
    std::thread::scope(|scope| {
        for reader in 0..16 * hanging.len() {
            let (lab, blob) = (&lab, &hanging[reader % hanging.len()]);
            scope.spawn(move || {
                let error = lab.read(blob, 0..1000, time).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Timeout, "{error:?}");
            });
        }
        std::thread::sleep(Duration::from_millis(1500));
        lab.mock.state().redirect = None;
        let began = Instant::now();
        assert_eq!(lab.read(&other, 0..5000, time).unwrap(), bytes[..]);
        assert!(began.elapsed() < LATE, "{:?}", began.elapsed());
    });
}
