//! Row 5: tokens, passwords and redirects, that come to an end while they are used.

use crate::lab::{self, LATE, Lab, REPOSITORY};
use crate::mock::answer::Bearer;
use crate::mock::{Auth, Fault, Mock, Part};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::{CredentialSource, Mirror, Options, Registry, Secret};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) const PASSWORD: &str = "correct-horse";

pub(crate) fn basic() -> String {
    STANDARD.encode(format!("user:{PASSWORD}"))
}

fn lab_with(change: impl FnOnce(&mut Bearer)) -> Lab {
    let lab = Lab::new();
    let mut bearer = Bearer::at(&format!("{}/token", lab.mock.url()));
    change(&mut bearer);
    lab.mock.state().auth = Auth::Bearer(bearer);
    lab
}

pub(crate) fn write_credentials(path: &Path, host: &str, password: &str) {
    let auth = STANDARD.encode(format!("user:{password}"));
    let text = format!("{{\"auths\":{{\"{host}\":{{\"auth\":\"{auth}\"}}}}}}");
    // As programs do that mean it: a new file under the old name.
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

pub(crate) fn with_file(path: &Path) -> Options {
    let credentials = vec![CredentialSource::File(path.to_owned())];
    Options { credentials, ..Options::default() }
}

fn counts(lab: &Lab) -> (usize, usize) {
    (lab.mock.count(Part::Blob), lab.mock.count(Part::Token))
}

const ENOUGH: Duration = Duration::from_secs(5);

#[test]
fn row_5_a_401_gets_a_token_once_and_for_all_reads() {
    let lab = lab_with(|_| ());
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    assert_eq!(lab.read(&blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    assert_eq!(counts(&lab), (2, 1), "the refusal, the token, the bytes");
    let target = &lab.mock.log(Part::Token)[0].target;
    assert_eq!(target, "/token?service=mock&scope=repository%3Aa%2Fb%3Apull");
    for _ in 0..5 {
        assert!(lab.read(&blob, 1000..2000, ENOUGH).is_ok());
    }
    assert_eq!(counts(&lab), (7, 1));
}

#[test]
fn row_5_many_reads_at_a_time_ask_for_one_token() {
    let lab = lab_with(|_| ());
    lab.mock.fail(Part::Token, u64::MAX, Fault::Delay(300));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| lab.read(&blob, 0..1000, ENOUGH).unwrap());
        }
    });
    assert_eq!(lab.mock.count(Part::Token), 1);
}

#[test]
fn row_5_a_token_that_ends_is_renewed_before_or_after() {
    for (name, told_seconds, good_ms) in [
        ("ends as told", Some(1), 1000),
        ("ends earlier than told", Some(300), 400),
        ("does not say when it ends", None, 400),
    ] {
        let lab =
            lab_with(|bearer| (bearer.told_seconds, bearer.good_ms) = (told_seconds, good_ms));
        let registry = lab.registry(Options::default());
        let blob = lab.blob(&registry);
        let started = Instant::now();
        let mut reads = 0;
        while started.elapsed() < Duration::from_millis(2500) {
            let found =
                lab.read(&blob, 0..1000, ENOUGH).unwrap_or_else(|e| panic!("{name}: {e:?}"));
            assert_eq!(found, lab.content[..1000], "{name}");
            reads += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
        let (blobs, tokens) = counts(&lab);
        assert!((2..=9).contains(&tokens), "{name}: {tokens} tokens");
        assert!(blobs <= reads + tokens + 1, "{name}: {blobs} requests for {reads} reads");
        if told_seconds == Some(1) {
            let log = lab.mock.log(Part::Blob);
            let refused = log.iter().filter(|record| record.status == 401).count();
            assert_eq!(refused, 1, "{name}: what ends as told is renewed ahead");
        }
    }
}

#[test]
fn row_5_a_token_is_renewed_while_the_old_one_still_serves() {
    let lab = lab_with(|bearer| bearer.told_seconds = Some(4));
    lab.mock.fail(Part::Token, u64::MAX, Fault::Delay(600));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok());
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(4) {
        let began = Instant::now();
        assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok());
        assert!(began.elapsed() < Duration::from_millis(500), "a read waited for the token server");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(lab.mock.count(Part::Token), 2);
}

#[test]
fn row_5_a_stale_token_may_be_refused_in_any_way() {
    for (name, refusal, challenge) in [
        ("401 and the same realm", 401, None),
        ("401 and Basic, as some registries do", 401, Some("Basic realm=\"x\"")),
        ("401 and nothing", 401, Some("")),
        ("403 and nothing", 403, Some("")),
        ("403 and the same realm", 403, None),
    ] {
        let lab = lab_with(|bearer| {
            (bearer.refusal, bearer.good_ms) = (refusal, 200);
            bearer.stale_challenge = challenge.map(str::to_owned);
        });
        let registry = lab.registry(Options::default());
        let blob = lab.blob(&registry);
        assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok(), "{name}");
        std::thread::sleep(Duration::from_millis(250));
        let found = lab.read(&blob, 0..1000, ENOUGH).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!(found, lab.content[..1000], "{name}");
        assert!(lab.mock.count(Part::Blob) <= 5, "{name}");
        assert_eq!(lab.mock.count(Part::Token), 2, "{name}");
    }
}

#[test]
fn row_5_a_realm_may_change_and_the_old_one_lead_nowhere() {
    let lab = lab_with(|bearer| bearer.good_ms = 200);
    let other = Mock::start();
    let elsewhere = format!("{}/token", other.url());
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok());
    // From now on the refusal of a stale token names a realm that gives nothing out.
    let dead_end = format!("Bearer realm=\"{elsewhere}\",service=\"x\"");
    if let Auth::Bearer(bearer) = &mut lab.mock.state().auth {
        bearer.stale_challenge = Some(dead_end);
        bearer.good_ms = 300_000;
    }
    other.fail(Part::Token, u64::MAX, Fault::status(401));
    std::thread::sleep(Duration::from_millis(250));
    assert_eq!(lab.read(&blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    assert_eq!(other.count(Part::Token), 1, "asked once, and given up for what strangers get");
}

#[test]
fn row_5_passwords_are_taken_from_dockers_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    for name in ["a registry with passwords", "a token server with passwords"] {
        let lab = Lab::new();
        lab.mock.state().auth = match name {
            "a registry with passwords" => Auth::Basic(basic()),
            _ => {
                let realm = format!("{}/token", lab.mock.url());
                Auth::Bearer(Bearer { basic: Some(basic()), ..Bearer::at(&realm) })
            }
        };
        write_credentials(&path, &format!("{}/{REPOSITORY}", lab.mock.host()), PASSWORD);
        let registry = lab.registry(with_file(&path));
        let blob = lab.blob(&registry);
        assert_eq!(lab.read(&blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000], "{name}");
    }
}

#[test]
fn row_5_a_credential_file_that_would_hang_is_refused_until_it_is_a_right_one() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let lab = Lab::new();
    lab.mock.state().auth = Auth::Basic(basic());
    let registry = lab.registry(with_file(&path));
    let blob = lab.blob(&registry);
    let error = lab.read(&blob, 0..1000, Duration::from_secs(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error:?}");
    assert!(format!("{error:#}").contains("it is no regular file"), "{error:?}");
    write_credentials(&path, &lab.mock.host(), PASSWORD);
    assert_eq!(lab.read(&blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
}

#[test]
fn row_5_a_refusal_waits_for_the_credential_that_works() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    for (name, before) in [("no file", None), ("another password", Some("wrong"))] {
        let _ = std::fs::remove_file(&path);
        let lab = Lab::new();
        lab.mock.state().auth = Auth::Basic(basic());
        if let Some(password) = before {
            write_credentials(&path, &lab.mock.host(), password);
        }
        let registry = lab.registry(with_file(&path));
        let blob = lab.blob(&registry);
        let arrival = Duration::from_millis(1500);
        let started = Instant::now();
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| lab.read(&blob, 0..1000, Duration::from_secs(10))))
                .collect();
            std::thread::sleep(arrival);
            let early = lab.mock.count(Part::Blob);
            // One each that learns what is wanted, and one that shows it. (Readers that had the
            // same refused password read again for each other used to show it up to four times.)
            assert!(early <= 16, "{name}: {early} requests while there was nothing new to say");
            write_credentials(&path, &lab.mock.host(), PASSWORD);
            for reader in readers {
                assert_eq!(reader.join().unwrap().unwrap(), lab.content[..1000], "{name}");
            }
        });
        let woken = started.elapsed() - arrival;
        assert!(woken < Duration::from_millis(1500), "{name}: woken after {woken:?}");
    }
}

#[test]
fn row_5_new_requests_do_not_begin_anew_with_what_was_refused() {
    let lab = Lab::new();
    lab.mock.fail(Part::Blob, u64::MAX, Fault::status(403));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    for _ in 0..4 {
        let error = lab.read(&blob, 0..1000, Duration::from_millis(2500)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error:?}");
    }
    // At once, two seconds and then four seconds later: the next one is due after ten seconds.
    let requests = lab.mock.count(Part::Blob);
    assert!((2..=3).contains(&requests), "{requests}");
}

#[test]
fn row_5_a_refusal_that_stays_is_told_at_the_deadline_and_not_asked_in_a_loop() {
    for status in [401, 403] {
        let lab = Lab::new();
        lab.mock.fail(Part::Blob, u64::MAX, Fault::status(status));
        let registry = lab.registry(Options::default());
        let blob = lab.blob(&registry);
        let started = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let error = lab.read(&blob, 0..1000, Duration::from_secs(4)).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error:?}");
                    let told = format!("HTTP status {status} from {}", lab.mock.url());
                    assert!(format!("{error:#}").contains(&told), "{error:?}");
                });
            }
        });
        let took = started.elapsed();
        assert!(took > Duration::from_secs(3), "{took:?}");
        assert!(took < Duration::from_secs(4) + LATE, "{took:?}");
        // At most one each, and more every two seconds for all of them.
        let requests = lab.mock.count(Part::Blob);
        assert!((2..=12).contains(&requests), "{requests}");
    }
}

#[test]
fn row_5_an_access_that_is_granted_later_is_noticed_without_new_credentials() {
    let lab = Lab::new();
    lab.mock.fail(Part::Blob, 1, Fault::status(403));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    let found = lab.read(&blob, 0..1000, Duration::from_secs(6)).unwrap();
    assert_eq!(found, lab.content[..1000]);
    assert_eq!(lab.mock.count(Part::Blob), 2);
}

/// A registry that redirects to a store of another origin.
fn with_store(good_ms: u64) -> (Lab, Mock) {
    let store = Mock::start();
    let lab = Lab::new();
    let blob = Arc::clone(&lab.content);
    store.state().content.blobs.insert(lab.digest.clone(), blob);
    lab.mock.state().redirect = Some((store.url(), good_ms));
    (lab, store)
}

/// Not only one that refuses: one that has nothing more to say, has trouble, or is not there.
#[test]
fn row_5_a_realm_that_is_gone_is_asked_for_anew() {
    for gone in [Some(404), Some(500), None] {
        let old = Mock::start();
        let lab = lab_with(|bearer| bearer.realm = format!("{}/token", old.url()));
        let mut bearer = Bearer::at(&format!("{}/token", old.url()));
        bearer.told_seconds = Some(1);
        old.state().auth = Auth::Bearer(bearer);
        // The registry takes the first one that the old realm gives out.
        for token in ["token-0", "token-1"] {
            lab.mock.state().tokens.insert(token.to_owned(), Instant::now() + ENOUGH);
        }
        let blob = lab.blob(&lab.registry(Options::default()));
        assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok(), "{gone:?}");
        assert_eq!(old.count(Part::Token), 1);
        match gone {
            Some(status) => old.fail(Part::Token, u64::MAX, Fault::status(status)),
            None => drop(old),
        }
        if let Auth::Bearer(bearer) = &mut lab.mock.state().auth {
            bearer.realm = format!("{}/token", lab.mock.url());
        }
        std::thread::sleep(Duration::from_millis(1100));
        let read = lab.read(&blob, 0..1000, ENOUGH);
        assert_eq!(read.unwrap(), lab.content[..1000], "{gone:?}");
        assert_eq!(lab.mock.count(Part::Token), 1, "{gone:?}");
    }
}

/// Nobody had looked at the credentials then, so that they seemed to have changed: it was asked 24
/// times within 10 ms, and given up.
#[test]
fn row_5_a_refusal_that_asks_for_nothing_is_waited_out_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    for status in [401, 403] {
        let lab = Lab::new();
        lab.mock.fail(Part::Blob, 1, Fault::status(status));
        let blob = lab.blob(&lab.registry(with_file(&path)));
        let started = Instant::now();
        let read = lab.read(&blob, 0..1000, Duration::from_secs(20));
        assert_eq!(read.unwrap(), lab.content[..1000], "{status}");
        assert!(started.elapsed() >= Duration::from_millis(1900), "{:?}", started.elapsed());
        assert_eq!(lab.mock.count(Part::Blob), 2, "{status}");
    }
    // A file that comes is noticed, once.
    let lab = Lab::new();
    lab.mock.fail(Part::Blob, u64::MAX, Fault::status(403));
    let blob = lab.blob(&lab.registry(with_file(&path)));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(700));
            write_credentials(&path, &lab.mock.host(), PASSWORD);
        });
        let error = lab.read(&blob, 0..1000, Duration::from_millis(2500)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error:?}");
    });
    // At once, at the file, and two seconds after the first or the second.
    let requests = lab.mock.count(Part::Blob);
    assert!((2..=3).contains(&requests), "{requests}");
}

/// What is remembered of a redirect may be good for hours.

#[test]
fn row_5_redirects_are_used_until_they_end_and_then_resolved_again() {
    let (lab, store) = with_store(800);
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    for _ in 0..5 {
        assert_eq!(lab.read(&blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    }
    assert_eq!((lab.mock.count(Part::Blob), store.count(Part::Store)), (1, 5));
    std::thread::sleep(Duration::from_millis(900));
    assert_eq!(lab.read(&blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    assert_eq!((lab.mock.count(Part::Blob), store.count(Part::Store)), (2, 7));
    let refused: Vec<u16> = store.log(Part::Store).iter().map(|record| record.status).collect();
    assert_eq!(refused, [206, 206, 206, 206, 206, 403, 206]);
}

#[test]
fn row_5_no_credentials_follow_a_redirect() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    for name in ["a token", "a password"] {
        let (lab, store) = with_store(60_000);
        lab.mock.state().auth = match name {
            "a token" => Auth::Bearer(Bearer::at(&format!("{}/token", lab.mock.url()))),
            _ => Auth::Basic(basic()),
        };
        write_credentials(&path, &lab.mock.host(), PASSWORD);
        let registry = lab.registry(with_file(&path));
        let blob = lab.blob(&registry);
        assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok());
        assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok());
        let seen = store.log(Part::Store);
        assert_eq!(seen.len(), 2, "{name}");
        assert!(seen.iter().all(|record| record.authorization.is_none()), "{name}: {seen:?}");
        let referer = format!("{}/{}", lab.mock.blobs_of(REPOSITORY), lab.digest);
        assert!(seen.iter().all(|record| record.referer.as_ref() == Some(&referer)), "{name}");
        let last = lab.mock.log(Part::Blob).pop().unwrap();
        assert!(last.authorization.is_some(), "{name}");
    }
}

#[test]
fn row_5_a_store_that_refuses_for_ever_is_asked_a_few_times() {
    let (lab, store) = with_store(60_000);
    store.fail(Part::Store, u64::MAX, Fault::status(403));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    let error = lab.read(&blob, 0..1000, ENOUGH).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert_eq!((lab.mock.count(Part::Blob), store.count(Part::Store)), (4, 4));
}

#[test]
fn row_5_a_loop_of_redirects_is_left() {
    let lab = Lab::new();
    let place = format!("{}/{}", lab.mock.blobs_of(REPOSITORY), lab.digest);
    lab.mock.fail(Part::Blob, u64::MAX, Fault::status_with(307, "Location", &place));
    let registry = lab.registry(Options::default());
    let blob = lab.blob(&registry);
    let error = lab.read(&blob, 0..1000, ENOUGH).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
    assert!(format!("{error:#}").contains("more than 5 redirects"), "{error:?}");
    // Four times the first and the five it led to.
    assert_eq!(lab.mock.count(Part::Blob), 24);
}

#[test]
fn row_5_no_secret_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let (lab, store) = with_store(60_000);
    let realm = format!("{}/token", lab.mock.url());
    let bearer = Bearer { basic: Some(basic()), ..Bearer::at(&realm) };
    lab.mock.state().auth = Auth::Bearer(bearer);
    write_credentials(&path, &lab.mock.host(), PASSWORD);
    let (log, guard) = lab::captured_log();
    let registry = lab.registry(with_file(&path));
    let blob = lab.blob(&registry);
    assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok());
    let mut told = vec![format!("{blob:?} {registry:?} {:?}", with_file(&path))];
    for (part, fault) in [
        (Part::Store, Fault::status(404)),
        (Part::Store, Fault::status(500)),
        (Part::Store, Fault::CutBeforeHead),
        (Part::Store, Fault::status_with(307, "Location", "ftp://x/?X-Amz-Signature=signed")),
        (Part::Store, Fault::Shifted(1)),
        (Part::Blob, Fault::status(403)),
        (Part::Token, Fault::status(500)),
    ] {
        lab.mock.state().rules.clear();
        store.state().rules.clear();
        let place = if part == Part::Store { &store } else { &lab.mock };
        place.fail(part, u64::MAX, fault);
        let registry = lab.registry(with_file(&path));
        let blob = lab.blob(&registry);
        let error = lab.read(&blob, 0..1000, Duration::from_secs(1)).unwrap_err();
        told.push(format!("{error:#} {error:?} {registry:?} {blob:?}"));
    }
    drop(guard);
    told.push(log.text());
    let tokens: Vec<String> = lab.mock.state().tokens.keys().cloned().collect();
    assert!(!tokens.is_empty());
    let secrets = [PASSWORD.to_owned(), basic(), "signed".to_owned(), "X-Amz".to_owned()];
    for text in told {
        for secret in secrets.iter().chain(&tokens) {
            assert!(!text.contains(secret.as_str()), "{secret} in {text}");
        }
    }
}

/// Answers every request on `stream`s with `body`, and keeps the first lines.
fn answer_each<S: std::io::Read + std::io::Write>(
    streams: impl Iterator<Item = std::io::Result<S>>,
    body: &str,
    lines: &std::sync::Mutex<Vec<String>>,
) {
    for stream in streams {
        let mut stream = stream.unwrap();
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read > 0) {
            head.push(byte[0]);
        }
        let line = String::from_utf8_lossy(&head).lines().next().unwrap_or("").to_owned();
        lines.lock().unwrap().push(line);
        let length = body.len();
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        let _ = stream.write_all(answer.as_bytes());
    }
}

#[test]
fn row_5_overlaybds_credential_services_are_asked_with_the_place_of_the_blobs() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["http", "uds"] {
        let lab = Lab::new();
        lab.mock.state().auth = Auth::Basic(basic());
        let body = serde_json::json!({"traceId": "t", "success": true, "data": {"auths": {
            lab.mock.host(): {"username": "user", "password": PASSWORD},
        }}});
        let lines: &'static std::sync::Mutex<Vec<String>> = Box::leak(Box::default());
        let body = body.to_string();
        let timeout = Duration::from_secs(1);
        let source = if name == "http" {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("http://{}/auth", listener.local_addr().unwrap());
            std::thread::spawn(move || answer_each(listener.incoming(), &body, lines));
            let (ca_file, client_certificate) = (None, None);
            CredentialSource::Http { url: Secret::new(url), timeout, ca_file, client_certificate }
        } else {
            let path = folder.path().join("socket");
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            std::thread::spawn(move || answer_each(listener.incoming(), &body, lines));
            CredentialSource::Socket { path, timeout }
        };
        // A file without an entry for this place comes first, and is passed over.
        let other = folder.path().join("other.json");
        write_credentials(&other, "other.example.com", "x");
        let credentials = vec![CredentialSource::File(other), source];
        let registry = lab.registry(Options { credentials, ..Options::default() });
        let blob = lab.blob(&registry);
        let found = lab.read(&blob, 0..1000, ENOUGH).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!(found, lab.content[..1000], "{name}");
        let asked = lines.lock().unwrap().clone();
        let place = lab.mock.blobs_of(REPOSITORY).replace(':', "%3A").replace('/', "%2F");
        assert_eq!(asked, [format!("GET /auth?remote_url={place} HTTP/1.1")], "{name}");
    }
}

#[test]
fn a_cold_open_takes_no_more_requests_than_it_must() {
    let (lab, store) = with_store(60_000);
    lab.mock.state().auth = Auth::Bearer(Bearer::at(&format!("{}/token", lab.mock.url())));
    let registry = lab.registry(Options::default());
    let all = || {
        let (blobs, tokens) = counts(&lab);
        (blobs, tokens, store.count(Part::Store))
    };
    let blob = lab.blob(&registry);
    assert!(lab.read(&blob, 99_000..100_000, ENOUGH).is_ok());
    assert_eq!(all(), (2, 1, 1), "from nothing: refusal, token, redirect, bytes");
    let next = lab.blob(&registry);
    assert!(lab.read(&next, 99_000..100_000, ENOUGH).is_ok());
    assert_eq!(all(), (3, 1, 2), "with a token: redirect, bytes");
    assert!(lab.read(&next, 0..1000, ENOUGH).is_ok());
    assert_eq!(all(), (3, 1, 3), "with a redirect: bytes");
}

#[test]
fn a_cached_redirect_is_read_while_the_registry_refuses() {
    let (lab, _store) = with_store(60_000);
    let registry = lab.registry(Options::default());
    let (known, unknown) = (lab.blob(&registry), lab.blob(&registry));
    assert!(lab.read(&known, 0..1000, ENOUGH).is_ok());
    lab.mock.fail(Part::Blob, u64::MAX, Fault::status(403));
    std::thread::scope(|scope| {
        scope.spawn(|| lab.read(&unknown, 0..1000, Duration::from_secs(2)).unwrap_err());
        std::thread::sleep(Duration::from_millis(500));
        let started = Instant::now();
        assert!(lab.read(&known, 0..1000, Duration::from_secs(1)).is_ok());
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    });
}

#[test]
fn options_that_are_wrong_are_refused_without_repeating_them() {
    let secret = || Secret::new("http://user:hunter2@proxy.example.com:3128");
    let timeout = Duration::from_secs(1);
    let service = |url: &str| CredentialSource::Http {
        url: Secret::new(url),
        timeout,
        ca_file: None,
        client_certificate: None,
    };
    let good = Options {
        proxy: Some(secret()),
        credentials: vec![service("http://localhost/auth?key=hunter2")],
        ..Options::default()
    };
    assert!(!format!("{good:?}").contains("hunter2"), "{good:?}");
    let registry = Registry::new(good).unwrap();
    assert!(!format!("{registry:?}").contains("hunter2"), "{registry:?}");

    let p2p_prefix = Some("http://user:hunter2@localhost/p2p".to_owned());
    let of_host = "reg.example.com".to_owned();
    let mirror = Mirror { of_host, url: "hunter2".to_owned() };
    for bad in [
        Options { proxy: Some(Secret::new("http://hunter2:x:y")), ..Options::default() },
        Options { credentials: vec![service("hunter2")], ..Options::default() },
        Options { p2p_prefix, ..Options::default() },
        Options { mirrors: vec![mirror], ..Options::default() },
    ] {
        let error = Registry::new(bad).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error:?}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
    for url in [
        "https://m.example.com?key=hunter2",
        "https://m.example.com/a?",
        "https://m.example.com/#hunter2",
        "https://user:hunter2@m.example.com",
        "ftp://hunter2.example.com",
        "hunter2:5000",
    ] {
        let mirrors = vec![Mirror::new("reg.example.com", url)];
        let error = Registry::new(Options { mirrors, ..Options::default() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{url}: {error:?}");
        let told = "mirror: expected https://HOST, without a user, query or fragment";
        assert_eq!(error.to_string(), told, "{url}");
    }
    let nowhere = vec![std::path::PathBuf::from("/nowhere/ca.pem")];
    let error = Registry::new(Options { ca_files: nowhere, ..Options::default() }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error:?}");
}
