//! Row 5: who is refused waits, and delays nobody who is not.

use crate::access::{PASSWORD, basic, with_file, write_credentials};
use crate::lab::{LATE, Lab, REPOSITORY, content};
use crate::mock::answer::Bearer;
use crate::mock::{Auth, Fault, Part};
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::{Digest, Options};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One refused blob once made all others of its repository wait in its line, and fail with it.
#[test]
fn row_5_a_blob_that_is_kept_from_us_delays_no_other_of_its_repository() {
    for name in ["open to everybody", "with tokens"] {
        let lab = Lab::new();
        if name == "with tokens" {
            lab.mock.state().auth = Auth::Bearer(Bearer::at(&format!("{}/token", lab.mock.url())));
        }
        let bytes: Arc<[u8]> = content(5000, 9).into();
        let digest = Digest::of(&bytes).to_string();
        lab.mock.state().content.blobs.insert(digest.clone(), Arc::clone(&bytes));
        lab.mock.state().content.forbidden.push(lab.digest.clone());
        let registry = lab.registry(Options::default());
        let refused = lab.blob(&registry);
        let place = lab.mock.blobs_of(REPOSITORY);
        let other = registry.blob(&place, &digest, Some(5000), Instant::now()).unwrap();
        let time = Duration::from_secs(4);
        let started = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let error = lab.read(&refused, 0..1000, time).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{name}: {error:?}");
                    assert!(format!("{error:#}").contains(&lab.digest), "{name}: {error:?}");
                });
            }
            while started.elapsed() < time {
                let began = Instant::now();
                assert_eq!(lab.read(&other, 0..5000, time).unwrap(), bytes[..], "{name}");
                assert!(began.elapsed() < LATE, "{name}: {:?}", began.elapsed());
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let asked = lab.mock.log(Part::Blob);
        let asked = asked.iter().filter(|record| record.target.contains(&lab.digest)).count();
        // With nothing, with a token that was good, and with a new one, each reader once, and then
        // one of them after two seconds.
        assert!(asked <= 3 * 5, "{name}: {asked}");
    }
}

/// They once waited until the one who asked for them had read all that it wanted.
#[test]
fn row_5_all_go_on_as_soon_as_one_is_let_in() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let lab = Lab::new();
    lab.mock.state().auth = Auth::Basic(basic());
    let registry = lab.registry(with_file(&path));
    let (first, others) = (lab.blob(&registry), lab.blob(&registry));
    let time = Duration::from_secs(20);
    std::thread::scope(|scope| {
        scope.spawn(|| lab.read(&first, 0..50_000, time));
        std::thread::sleep(Duration::from_millis(200));
        let waiting = [0, 1, 2].map(|_| scope.spawn(|| lab.read(&others, 0..1000, time)));
        std::thread::sleep(Duration::from_millis(200));
        // Whoever asks first is served so slowly that it is given up after five seconds.
        lab.mock.fail(Part::Blob, 1, Fault::Slow(2000));
        write_credentials(&path, &lab.mock.host(), PASSWORD);
        let written = Instant::now();
        for reader in waiting {
            assert_eq!(reader.join().unwrap().unwrap(), lab.content[..1000]);
        }
        assert!(written.elapsed() < Duration::from_secs(3), "{:?}", written.elapsed());
    });
}

/// Each read once asked for a successor again, at once: 2000 times a second.
#[test]
fn row_5_a_token_that_cannot_be_renewed_ahead_is_asked_for_once_a_second() {
    let lab = Lab::new();
    let bearer = Bearer::at(&format!("{}/token", lab.mock.url()));
    lab.mock.state().auth = Auth::Bearer(Bearer { told_seconds: Some(6), ..bearer });
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    let started = Instant::now();
    assert!(lab.read(&blob, 0..1000, LATE).is_ok());
    lab.mock.fail(Part::Token, u64::MAX, Fault::status(500));
    // It is renewed from 4.05 s on, and ends at 5.4 s.
    while started.elapsed() < Duration::from_millis(5300) {
        assert!(lab.read(&blob, 0..1000, LATE).is_ok());
    }
    let asked = lab.mock.count(Part::Token);
    assert!((2..=3).contains(&asked), "{asked}");
}
