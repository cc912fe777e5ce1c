//! Row 5, several places to look for credentials: one that cannot be used spoils no other.

use crate::access::{PASSWORD, basic, write_credentials};
use crate::lab::Lab;
use crate::mock::answer::Bearer;
use crate::mock::{Auth, Fault, Part};
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::{CredentialSource, Options, Secret};
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

const ENOUGH: Duration = Duration::from_secs(5);

/// Three files in `folder` that cannot be used, each in a way of its own, and what is told of them.
fn unusable_in(folder: &Path) -> Vec<(CredentialSource, &'static str)> {
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        CredentialSource::File(path)
    };
    let broken = file("broken", "{\"auths\":");
    let no_folder = CredentialSource::File(folder.join("broken/config.json"));
    let no_helper = file("no-helper", "{\"credsStore\":\"there-is-none-of-this-name\"}");
    let no_name = file("no-name", "{\"credsStore\":\"a/b\"}");
    vec![
        (broken, "broken: not what is expected at line 1 column 9"),
        (no_folder, "broken/config.json: Not a directory"),
        (no_helper, "docker-credential-there-is-none-of-this-name: No such file"),
        (no_name, "the name of a credential helper is none"),
    ]
}

/// A registry with passwords, one whose token server wants them, and one that strangers may read.
fn labs() -> [(&'static str, Lab); 3] {
    let [passwords, tokens, strangers] = [Lab::new(), Lab::new(), Lab::new()];
    passwords.mock.state().auth = Auth::Basic(basic());
    let bearer = |lab: &Lab| Bearer::at(&format!("{}/token", lab.mock.url()));
    let with_password = Bearer { basic: Some(basic()), ..bearer(&tokens) };
    tokens.mock.state().auth = Auth::Bearer(with_password);
    strangers.mock.state().auth = Auth::Bearer(bearer(&strangers));
    [("passwords", passwords), ("tokens", tokens), ("strangers", strangers)]
}

fn with_sources(credentials: Vec<CredentialSource>) -> Options {
    Options { credentials, ..Options::default() }
}

#[test]
fn row_5_the_sources_after_one_that_cannot_be_used_are_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("right.json");
    for (source, told) in unusable_in(folder.path()) {
        for (name, lab) in labs() {
            write_credentials(&path, &lab.mock.host(), PASSWORD);
            let sources = vec![source.clone(), CredentialSource::File(path.clone())];
            let blob = lab.blob(&lab.registry(with_sources(sources)));
            let found = lab.read(&blob, 0..1000, ENOUGH);
            let found = found.unwrap_or_else(|error| panic!("{name}, {told}: {error:?}"));
            assert_eq!(found, lab.content[..1000], "{name}, {told}");
        }
    }
}

#[test]
fn row_5_who_cannot_be_somebody_is_a_stranger_and_else_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let unusable = unusable_in(folder.path());
    for at in 0..unusable.len() {
        // The first one is told, and none that is only not there.
        let (first, second) = (&unusable[at], &unusable[(at + 1) % unusable.len()]);
        let absent = CredentialSource::File(folder.path().join("absent"));
        let sources = vec![absent, first.0.clone(), second.0.clone()];
        for (name, lab) in labs() {
            let blob = lab.blob(&lab.registry(with_sources(sources.clone())));
            let read = lab.read(&blob, 0..1000, Duration::from_millis(500));
            if name == "strangers" {
                let found = read.unwrap_or_else(|error| panic!("{}: {error:?}", first.1));
                assert_eq!(found, lab.content[..1000], "{}", first.1);
                continue;
            }
            let error = read.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unauthorized, "{name}: {error:?}");
            let text = format!("{error:#}");
            assert!(text.contains(first.1), "{name}, {}: {text}", first.1);
            assert!(!text.contains(second.1), "{name}, {}: {text}", second.1);
        }
    }
}

/// What is wrong with the token server is not the file's fault.
#[test]
fn row_5_trouble_of_a_token_server_is_told_and_not_a_source_that_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let [_, _, (_, lab)] = labs();
    lab.mock.fail(Part::Token, u64::MAX, Fault::status(503));
    let sources = unusable_in(folder.path()).into_iter().map(|(source, _)| source);
    let blob = lab.blob(&lab.registry(with_sources(sources.collect())));
    let error = lab.read(&blob, 0..1000, Duration::from_secs(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(format!("{error:#}").contains("HTTP status 503 from"), "{error:?}");
}

/// It may have the right credential: nobody is made a stranger, or somebody else, meanwhile.
#[test]
fn row_5_a_credential_service_that_does_not_answer_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("right.json");
    // It lets connect, and says nothing.
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = CredentialSource::Http {
        url: Secret::new(format!("http://{}/auth", service.local_addr().unwrap())),
        timeout: Duration::from_millis(100),
        ca_file: None,
        client_certificate: None,
    };
    let (broken, _) = unusable_in(folder.path()).remove(0);
    for (name, lab) in labs() {
        write_credentials(&path, &lab.mock.host(), PASSWORD);
        let sources = vec![broken.clone(), source.clone(), CredentialSource::File(path.clone())];
        let blob = lab.blob(&lab.registry(with_sources(sources)));
        let started = Instant::now();
        let error = lab.read(&blob, 0..1000, Duration::from_secs(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{name}: {error:?}");
        let told = "credential service: no answer within 100ms";
        assert!(format!("{error:#}").contains(told), "{name}: {error:?}");
        assert!(started.elapsed() < Duration::from_secs(2), "{name}: {:?}", started.elapsed());
        assert_eq!(lab.mock.count(Part::Token), 0, "{name}");
    }
}
