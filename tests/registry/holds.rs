//! Row 7: who asks to be left alone (`Retry-After`) is, by everybody; and nobody else is.

use crate::lab::{Lab, REPOSITORY};
use crate::mock::answer::Bearer;
use crate::mock::{Auth, Fault, Mock, Part};
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::{Blob, Mirror, Options, Registry};
use obd_ublk::source::Fetch;
use std::sync::Arc;
use std::time::{Duration, Instant};

const ENOUGH: Duration = Duration::from_secs(8);

/// A refusal for longer than any of these tests takes.
fn busy() -> Fault {
    Fault::status_with(503, "Retry-After", "25")
}

/// A refusal for a second.
fn briefly_busy() -> Fault {
    Fault::status_with(429, "Retry-After", "1")
}

/// Has the registry itself ask for a pause, which `registry` hears.
fn put_on_hold(lab: &Lab, registry: &Arc<Registry>) {
    lab.mock.fail(Part::Blob, 1, busy());
    let deadline = Instant::now() + Duration::from_millis(500);
    let asked = lab.blob(registry).fetch_from_origin(0, &mut [0], deadline);
    assert_eq!(asked.unwrap_err().kind(), ErrorKind::Unavailable);
    lab.mock.clear();
}

/// Requests for `part` within the first second.
fn early(mock: &Mock, part: Part, started: Instant) -> usize {
    let is_early = |at: Instant| at < started + Duration::from_secs(1);
    mock.log(part).iter().filter(|record| is_early(record.at)).count()
}

/// Reads by eight at once, of whom one comes before the others.
fn read_by_eight(lab: &Lab, registry: &Arc<Registry>) {
    let blob = lab.blob(registry);
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (lab, blob) = (&lab, &blob);
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(if number == 0 { 0 } else { 200 }));
                assert_eq!(lab.read(blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
            });
        }
    });
}

/// Five reads, of which none waits for a pause that somebody else has asked for.
fn read_at_once(lab: &Lab, blob: &Blob) {
    let started = Instant::now();
    for _ in 0..5 {
        assert_eq!(lab.read(blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    }
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}

#[test]
fn row_7_a_registry_that_asks_for_a_pause_gets_it_from_everybody() {
    let lab = Lab::new();
    lab.mock.fail(Part::Blob, 1, briefly_busy());
    let registry = lab.registry(Options::default());
    let started = Instant::now();
    read_by_eight(&lab, &registry);
    assert_eq!(early(&lab.mock, Part::Blob, started), 1, "only the one that was refused");
    assert_eq!(lab.mock.count(Part::Blob), 9);
    assert_eq!(registry.counts().requests, 9, "what was not sent is not counted");
}

#[test]
fn row_7_a_mirror_serves_while_the_registry_is_left_alone() {
    let (lab, mirror) = (Lab::new(), Lab::new());
    let told = Mirror { of_host: lab.mock.host(), url: mirror.mock.url() };
    let registry = lab.registry(Options { mirrors: vec![told], ..Options::default() });
    put_on_hold(&lab, &registry);
    let blob = lab.blob(&registry);
    read_at_once(&lab, &blob);
    // One that fails sends nobody to the registry before its time.
    mirror.mock.fail(Part::Blob, u64::MAX, Fault::status(500));
    let error = lab.read(&blob, 0..1000, Duration::from_secs(2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(format!("{error:#}").contains("to be left alone for 2"), "{error:?}");
    assert_eq!((mirror.mock.count(Part::Blob), lab.mock.count(Part::Blob)), (6, 0));
}

#[test]
fn row_7_a_known_store_serves_while_the_registry_is_left_alone() {
    let (lab, store) = (Lab::new(), Lab::new());
    lab.mock.state().redirect = Some((store.mock.url(), 60_000));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok(), "the way to the store is known");
    put_on_hold(&lab, &registry);
    read_at_once(&lab, &blob);
    assert_eq!((lab.mock.count(Part::Blob), store.mock.count(Part::Store)), (0, 6));
}

#[test]
fn row_7_a_store_that_asks_for_a_pause_gets_it_and_its_registry_does_not() {
    let (lab, store) = (Lab::new(), Lab::new());
    lab.mock.state().redirect = Some((store.mock.url(), 60_000));
    let registry = lab.registry(Options::default());
    // One that is asked by what is remembered, and one that a redirect has just named.
    for is_known in [true, false] {
        let another = lab.registry(Options::default());
        let registry = if is_known { &registry } else { &another };
        if is_known {
            assert!(lab.read(&lab.blob(registry), 0..1000, ENOUGH).is_ok());
        }
        store.mock.clear();
        store.mock.fail(Part::Store, 1, briefly_busy());
        let started = Instant::now();
        read_by_eight(&lab, registry);
        assert_eq!(early(&store.mock, Part::Store, started), 1, "known: {is_known}");
        assert_eq!(store.mock.count(Part::Store), 9, "known: {is_known}");
    }
    store.mock.fail(Part::Store, 1, busy());
    let deadline = Duration::from_millis(500);
    assert!(lab.read(&lab.blob(&registry), 0..1000, deadline).is_err());
    lab.mock.state().redirect = None;
    let started = Instant::now();
    assert!(lab.read(&lab.blob(&registry), 0..1000, ENOUGH).is_ok(), "without the store");
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}

#[test]
fn row_7_a_token_server_that_asks_for_a_pause_gets_it_and_its_registry_does_not() {
    let (lab, tokens) = (Lab::new(), Mock::start());
    let bearer = Auth::Bearer(Bearer::at(&format!("{}/token", tokens.url())));
    (lab.mock.state().auth, tokens.state().auth) = (bearer.clone(), bearer);
    tokens.fail(Part::Token, 1, briefly_busy());
    let registry = lab.registry(Options::default());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for (number, repository) in [REPOSITORY, "c/d", "e/f", "g/h"].into_iter().enumerate() {
            let (lab, registry) = (&lab, &registry);
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(if number == 0 { 0 } else { 200 }));
                let place = lab.mock.blobs_of(repository);
                let blob = registry.blob(&place, &lab.digest, Some(100_000), Instant::now());
                // The tokens are not this mock's: whether they are asked for is what counts here.
                lab.read(&blob.unwrap(), 0..1000, Duration::from_secs(3)).unwrap_err();
            });
        }
    });
    assert_eq!(early(&tokens, Part::Token, started), 1, "who was refused");
    assert!(early(&lab.mock, Part::Blob, started) >= 4, "all ask what is wanted");
    assert!(tokens.count(Part::Token) >= 5, "all come after the pause");
}
