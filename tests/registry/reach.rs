//! Row 10: what is slow or cannot be reached, and the ways around: mirrors, peers, proxies.

use crate::lab::{LATE, Lab, REPOSITORY};
use crate::mock::answer::Bearer;
use crate::mock::{Auth, Fault, Mock, Part};
use obd_ublk::error::ErrorKind;
use obd_ublk::registry::{CredentialSource, Mirror, Options, Pace, Secret};
use obd_ublk::source::Fetch;
use rcgen::{BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

const ENOUGH: Duration = Duration::from_secs(5);

/// A pace at which tests need not wait.
fn brisk() -> Pace {
    Pace {
        connect: Duration::from_millis(300),
        head: Duration::from_millis(400),
        mirror_head: Duration::from_millis(200),
        window: Duration::from_millis(400),
        window_bytes_min: 4000,
    }
}

fn brisk_options() -> Options {
    Options { pace: brisk(), ..Options::default() }
}

/// An address where nobody listens.
fn dead_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[test]
fn row_10_a_body_that_trickles_is_given_up_and_resumed() {
    let lab = Lab::new();
    lab.mock.fail(Part::Blob, 2, Fault::Slow(1000));
    let registry = lab.registry(brisk_options());
    let blob = lab.blob(&registry);
    let started = Instant::now();
    let found = lab.read(&blob, 0..50_000, ENOUGH).unwrap();
    assert!(found == lab.content[..50_000]);
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    let ranges = lab.mock.log(Part::Blob).into_iter().filter_map(|record| record.range);
    let starts: Vec<u64> = ranges
        .map(|range| range["bytes=".len()..].split('-').next().unwrap().parse().unwrap())
        .collect();
    assert!(starts.len() == 3 && starts.is_sorted() && starts[2] > 200, "{starts:?}");
}

#[test]
fn row_10_a_server_that_is_slow_for_ever_costs_its_deadline_and_no_more() {
    for (name, fault) in [("body", Fault::Slow(100)), ("head", Fault::Delay(3000))] {
        let lab = Lab::new();
        lab.mock.fail(Part::Blob, u64::MAX, fault);
        let registry = lab.registry(brisk_options());
        let blob = lab.blob(&registry);
        let started = Instant::now();
        let error = lab.read(&blob, 0..50_000, Duration::from_secs(2)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{name}: {error:?}");
        assert!(started.elapsed() < Duration::from_secs(2) + LATE, "{name}");
        assert!(lab.mock.count(Part::Blob) <= 6, "{name}: {}", lab.mock.count(Part::Blob));
    }
}

#[test]
fn row_10_a_slow_server_delays_nobody_elses_reads() {
    let (slow, quick) = (Lab::new(), Lab::new());
    slow.mock.fail(Part::Blob, u64::MAX, Fault::Delay(3000));
    let registry = slow.registry(Options::default());
    let blobs = (slow.blob(&registry), quick.blob(&registry));
    std::thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| slow.read(&blobs.0, 0..1000, Duration::from_secs(2)).unwrap_err());
        }
        std::thread::sleep(Duration::from_millis(200));
        let started = Instant::now();
        for _ in 0..20 {
            assert!(quick.read(&blobs.1, 0..1000, ENOUGH).is_ok());
        }
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    });
}

#[test]
fn row_10_a_slow_blob_delays_no_other_blob_of_its_registry() {
    let lab = Lab::new();
    let second: Arc<[u8]> = crate::lab::content(5000, 9).into();
    let digest = obd_ublk::registry::Digest::of(&second).to_string();
    lab.mock.state().content.blobs.insert(digest.clone(), Arc::clone(&second));
    // As many as one blob may have under way, and they are all slow.
    lab.mock.fail(Part::Blob, 16, Fault::Delay(2000));
    let registry = lab.registry(Options::default());
    let slow = lab.blob(&registry);
    let place = lab.mock.blobs_of(REPOSITORY);
    let quick = registry.blob(&place, &digest, Some(5000), Instant::now()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| lab.read(&slow, 0..1000, ENOUGH).unwrap());
        }
        std::thread::sleep(Duration::from_millis(500));
        let started = Instant::now();
        assert_eq!(lab.read(&quick, 0..5000, ENOUGH).unwrap(), second[..]);
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    });
}

#[test]
fn row_10_a_registry_that_cannot_be_reached_is_unavailable_in_time() {
    let dead = format!("http://{}/v2/a/b/blobs", dead_address());
    let (full, _held) = black_hole();
    let hole = format!("http://{full}/v2/a/b/blobs");
    let unknown = "http://nowhere.example.com/v2/a/b/blobs".to_owned();
    for (name, place) in [("refused", dead), ("a black hole", hole), ("no such name", unknown)] {
        let lab = Lab::new();
        let registry = lab.registry(brisk_options());
        let blob = registry.blob(&place, &lab.digest, Some(100_000), Instant::now()).unwrap();
        let started = Instant::now();
        let error = lab.read(&blob, 0..1000, Duration::from_secs(2)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{name}: {error:?}");
        assert!(started.elapsed() < Duration::from_secs(2) + LATE, "{name}");
        assert!(registry.counts().requests <= 8, "{name}: {:?}", registry.counts());
    }
}

/// A listener whose queue is full: further connections get no answer at all.
fn black_hole() -> (std::net::SocketAddr, impl Sized) {
    use rustix::net::{self, AddressFamily, SocketType, ipproto};
    let socket = net::socket(AddressFamily::INET, SocketType::STREAM, Some(ipproto::TCP)).unwrap();
    net::bind(&socket, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    net::listen(&socket, 0).unwrap();
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().unwrap();
    let timeout = Duration::from_millis(100);
    let held: Vec<_> =
        (0..4).map(|_| std::net::TcpStream::connect_timeout(&address, timeout)).collect();
    assert!(held.iter().any(Result::is_err), "the queue is full");
    (address, (listener, held))
}

/// An authority and what it signs.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self { issuer: CertifiedIssuer::self_signed(params, key).unwrap() }
    }

    /// What a server needs to show a certificate for `name`, that ended in `until`.
    fn server(&self, name: &str, until: i32) -> Arc<rustls::ServerConfig> {
        let (certificate, key) = self.sign(name, until);
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        Arc::new(with_certificate(config, &certificate, &key))
    }

    /// The same, and it lets in only clients that this authority has signed.
    fn server_for_signed_clients(&self, name: &str) -> Arc<rustls::ServerConfig> {
        let (certificate, key) = self.sign(name, 2100);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let clients = rustls::server::WebPkiClientVerifier::builder(Arc::new(roots));
        let config = rustls::ServerConfig::builder();
        let config = config.with_client_cert_verifier(clients.build().unwrap());
        Arc::new(with_certificate(config, &certificate, &key))
    }

    fn sign(&self, name: &str, until: i32) -> (Certificate, KeyPair) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }
}

fn with_certificate(
    config: rustls::ConfigBuilder<rustls::ServerConfig, rustls::server::WantsServerCert>,
    certificate: &Certificate,
    key: &KeyPair,
) -> rustls::ServerConfig {
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    config.with_single_cert(vec![certificate.der().clone()], key).unwrap()
}

#[test]
fn row_10_a_registry_that_wants_a_certificate_gets_the_configured_one() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let authority = Authority::new();
    let ca_files = vec![write("ca.pem", authority.issuer.pem())];
    let (certificate, key) = authority.sign("client", 2100);
    let pair = (write("c.pem", certificate.pem()), write("k.pem", key.serialize_pem()));
    let lab = Lab::at(Mock::start_tls(authority.server_for_signed_clients("127.0.0.1")), 5000);
    let with = |client_certificate| Options {
        ca_files: ca_files.clone(),
        client_certificate,
        ..Options::default()
    };
    let registry = lab.registry(with(Some(pair)));
    assert_eq!(lab.read(&lab.blob(&registry), 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    let stranger = lab.registry(with(None));
    let error = lab.read(&lab.blob(&stranger), 0..1000, Duration::from_secs(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
}

#[test]
fn row_10_tls_is_verified_and_never_done_without() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    let authority = Authority::new();
    std::fs::write(&path, authority.issuer.pem()).unwrap();
    let trusting = Options { ca_files: vec![path], ..Options::default() };
    let host = "127.0.0.1";
    for (name, signer, server, until, options, told) in [
        ("good", &authority, host, 2100, trusting.clone(), None),
        ("expired", &authority, host, 2001, trusting.clone(), Some("certificate expired")),
        ("another host", &authority, "localhost", 2100, trusting.clone(), Some("not valid for")),
        ("unknown authority", &authority, host, 2100, Options::default(), Some("certificate")),
        ("another authority", &Authority::new(), host, 2100, trusting, Some("certificate")),
    ] {
        let lab = Lab::at(Mock::start_tls(signer.server(server, until)), 100_000);
        let registry = lab.registry(options);
        let blob = lab.blob(&registry);
        let found = lab.read(&blob, 0..1000, ENOUGH);
        match told {
            None => assert_eq!(found.unwrap(), lab.content[..1000], "{name}"),
            Some(told) => {
                let error = found.expect_err(name);
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{name}");
                assert!(format!("{error:#}").contains(told), "{name}: {error:?}");
                assert_eq!(registry.counts().requests, 1, "{name}: no retry helps");
                assert_eq!(lab.mock.count(Part::Blob), 0, "{name}: nothing was said");
            }
        }
    }
}

#[test]
fn row_10_who_was_named_insecure_is_not_verified_and_nobody_else() {
    let authority = Authority::new();
    let start = || Lab::at(Mock::start_tls(authority.server("other", 2001)), 5000);
    let (named, other) = (start(), start());
    let insecure_hosts = vec![named.mock.host()];
    let registry = named.registry(Options { insecure_hosts, ..Options::default() });
    assert!(named.read(&named.blob(&registry), 0..1000, ENOUGH).is_ok());
    assert!(other.read(&other.blob(&registry), 0..1000, ENOUGH).is_err());
}

#[test]
fn row_10_a_proxy_carries_everything_or_nothing() {
    let proxy = Lab::new();
    let place = "http://nowhere.example.com/v2/a/b/blobs";
    let through = |url: String| {
        let registry = proxy.registry(Options { proxy: Some(Secret::new(url)), ..brisk_options() });
        let blob = registry.blob(place, &proxy.digest, Some(100_000), Instant::now()).unwrap();
        proxy.read(&blob, 0..1000, Duration::from_secs(2))
    };
    assert_eq!(through(proxy.mock.url()).unwrap(), proxy.content[..1000]);
    let target = &proxy.mock.log(Part::Blob)[0].target;
    assert_eq!(target, &format!("{place}/{}", proxy.digest));
    let error = through(format!("http://{}", dead_address())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
}

#[test]
fn a_mirror_is_asked_first_and_left_when_it_fails() {
    for (name, fault) in [
        ("a good mirror", None),
        ("one without the blob", Some(Fault::status(404))),
        ("one that fails", Some(Fault::status(500))),
        ("one that lies", Some(Fault::Shifted(1))),
        ("one that wants a password", Some(Fault::status(401))),
        ("one that breaks off", Some(Fault::CutBody(400))),
    ] {
        let lab = Lab::new();
        lab.mock.state().auth = Auth::Bearer(Bearer::at(&format!("{}/token", lab.mock.url())));
        let mirror = Lab::new();
        if let Some(fault) = fault.clone() {
            mirror.mock.fail(Part::Blob, u64::MAX, fault);
        }
        let told = Mirror { of_host: lab.mock.host(), url: mirror.mock.url() };
        let registry = lab.registry(Options { mirrors: vec![told], ..Options::default() });
        let blob = lab.blob(&registry);
        for _ in 0..3 {
            let found =
                lab.read(&blob, 0..1000, ENOUGH).unwrap_or_else(|e| panic!("{name}: {e:?}"));
            assert_eq!(found, lab.content[..1000], "{name}");
        }
        let asked = mirror.mock.log(Part::Blob);
        assert!(asked.iter().all(|record| record.authorization.is_none()), "{name}");
        let namespace = format!("?ns={}", lab.mock.host().replace(':', "%3A"));
        assert!(asked[0].target.ends_with(&namespace), "{name}: {}", asked[0].target);
        match fault {
            None => assert_eq!((asked.len(), lab.mock.count(Part::Blob)), (3, 0), "{name}"),
            Some(_) => assert_eq!((asked.len(), lab.mock.count(Part::Blob)), (1, 4), "{name}"),
        }
    }
    let lab = Lab::new();
    let told = Mirror { of_host: lab.mock.host(), url: format!("http://{}", dead_address()) };
    let registry = lab.registry(Options { mirrors: vec![told], ..Options::default() });
    assert!(lab.read(&lab.blob(&registry), 0..1000, ENOUGH).is_ok(), "a dead mirror");
}

/// A mirror's length was once believed, and then the registry blamed for another one.
#[test]
fn the_length_of_a_blob_is_the_registrys_word_and_a_mirrors_only_without_it() {
    let (lab, mirror) = (Lab::new(), Lab::new());
    let half: Arc<[u8]> = lab.content[..50_000].into();
    mirror.mock.state().content.blobs.insert(lab.digest.clone(), half);
    let told = Mirror { of_host: lab.mock.host(), url: mirror.mock.url() };
    let registry = lab.registry(Options { mirrors: vec![told], ..brisk_options() });
    let length = |time| {
        let deadline = Instant::now() + time;
        registry.blob(&lab.mock.blobs_of(REPOSITORY), &lab.digest, None, deadline)
    };
    assert_eq!(length(ENOUGH).unwrap().bytes(), 100_000);
    assert_eq!(mirror.mock.count(Part::Blob), 0);
    lab.mock.fail(Part::Blob, u64::MAX, Fault::status(500));
    assert_eq!(length(Duration::from_secs(2)).unwrap().bytes(), 50_000, "all that there is");
}

/// A mirror that accepts and never answers once delayed a read of each cycle by the time that a
/// registry has for its head.
#[test]
fn row_10_a_mirror_that_hangs_is_asked_by_those_who_did_not_know_and_then_by_nobody() {
    for (name, fault) in [("head", Fault::Delay(20_000)), ("body", Fault::Slow(100))] {
        let (lab, mirror) = (Lab::new(), Lab::new());
        mirror.mock.fail(Part::Blob, u64::MAX, fault);
        let told = Mirror { of_host: lab.mock.host(), url: mirror.mock.url() };
        let registry = lab.registry(Options { mirrors: vec![told], ..brisk_options() });
        let (blob, other) = (lab.blob(&registry), lab.blob(&registry));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| lab.read(&blob, 0..5000, ENOUGH).unwrap());
            }
        });
        assert!(mirror.mock.count(Part::Blob) <= 8, "{name}: {}", mirror.mock.count(Part::Blob));
        mirror.mock.clear();
        for _ in 0..20 {
            let found = lab.read(&other, 0..5000, ENOUGH).unwrap();
            assert!(found == lab.content[..5000], "{name}");
        }
        assert_eq!(mirror.mock.count(Part::Blob), 0, "{name}: nor for another blob");
    }
    let pace = Pace::default();
    assert!(2 * pace.mirror_head < pace.head, "there is another way");
}

/// Who configures a prefix trusts it with the registry's credentials, in its name only: where it
/// redirects to gets none, and a mirror, of which nobody said so, neither.
#[test]
fn only_the_prefix_that_was_configured_sees_the_registrys_credentials() {
    use base64::Engine as _;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    let secret = base64::engine::general_purpose::STANDARD.encode("user:secret");
    let (lab, peer, store, mirror) = (Lab::new(), Lab::new(), Lab::new(), Lab::new());
    let text = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{secret}\"}}}}}}", lab.mock.host());
    std::fs::write(&file, text).unwrap();
    for mock in [&lab.mock, &peer.mock] {
        mock.state().auth = Auth::Basic(secret.clone());
    }
    peer.mock.state().redirect = Some((store.mock.url(), 60_000));
    let registry = lab.registry(Options {
        p2p_prefix: Some(peer.mock.url()),
        mirrors: vec![Mirror { of_host: lab.mock.host(), url: mirror.mock.url() }],
        credentials: vec![CredentialSource::File(file)],
        ..brisk_options()
    });
    let blob = lab.blob(&registry);
    for _ in 0..3 {
        assert_eq!(lab.read(&blob, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    }
    let shown = |mock: &Mock, part| -> Vec<Option<String>> {
        mock.log(part).into_iter().map(|record| record.authorization).collect()
    };
    let basic = format!("Basic {secret}");
    assert_eq!(shown(&peer.mock, Part::Blob), [None, Some(basic)], "once it asked for them");
    assert_eq!(shown(&store.mock, Part::Store), [None, None, None]);
    assert_eq!((lab.mock.count(Part::Blob), mirror.mock.count(Part::Blob)), (0, 0));
    // Without the peer it is the mirror's turn, which asks for nothing and is shown nothing.
    peer.mock.fail(Part::Blob, u64::MAX, Fault::status(500));
    store.mock.fail(Part::Store, u64::MAX, Fault::status(500));
    assert!(lab.read(&blob, 0..1000, ENOUGH).is_ok());
    assert_eq!(shown(&mirror.mock, Part::Blob), [None]);
}

#[test]
fn a_peer_gets_the_whole_url_behind_its_prefix_and_what_it_needs_to_fetch_it() {
    let lab = Lab::new();
    let peer = Lab::new();
    let bearer = Auth::Bearer(Bearer::at(&format!("{}/token", lab.mock.url())));
    (lab.mock.state().auth, peer.mock.state().auth) = (bearer.clone(), bearer);
    let options = |prefix| Options { p2p_prefix: Some(prefix), ..brisk_options() };
    // Without a scheme, as the reference's documents have it.
    let registry = lab.registry(options(format!("{}/dadip2p", peer.mock.host())));
    let blob = lab.blob(&registry);
    // The peer refuses as the registry does, and the tokens are the registry's.
    let pass_on = |lab: &Lab, peer: &Lab| {
        let tokens = lab.mock.state().tokens.clone();
        peer.mock.state().tokens = tokens;
    };
    let _ = lab.read(&blob, 0..1000, ENOUGH).unwrap();
    pass_on(&lab, &peer);
    peer.mock.clear();
    lab.mock.clear();
    let fresh = lab.blob(&registry);
    assert_eq!(lab.read(&fresh, 0..1000, ENOUGH).unwrap(), lab.content[..1000]);
    let seen = peer.mock.log(Part::Blob);
    let target = format!("/dadip2p/{}/{}", lab.mock.blobs_of(REPOSITORY), lab.digest);
    assert_eq!(seen[0].target, target);
    assert_eq!(seen[0].status, 206);
    assert_eq!(lab.mock.count(Part::Blob), 0);

    let registry = lab.registry(options(format!("http://{}/dadip2p", dead_address())));
    assert!(lab.read(&lab.blob(&registry), 0..1000, ENOUGH).is_ok(), "without its peer");
    assert_eq!(lab.blob(&registry).name(), format!("{} {}", lab.mock.host(), lab.digest));
}
