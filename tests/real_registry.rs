//! Golden images in Debian's own registry, filled by skopeo, with a password, and behind an nginx
//! that redirects blobs to a store elsewhere. What mocks are told to do, these do by themselves.
//!
//! Needs `docker-registry`, `nginx` and `skopeo` on PATH; without them the tests fail.

#![cfg(feature = "registry")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use base64::Engine as _;
use common::golden::{Case, Golden};
use common::oci_layout;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const USER: &str = "somebody";
const PASSWORD: &str = "secret";

/// bcrypt of the password, by `htpasswd -nbB`: the registry takes no other kind.
const HTPASSWD: &str = "somebody:$2y$05$GHs6M.Ym.Yk.s7kbwTj9fOGvd60aee1dCkW.hLJQKXjk2BgAr9jTa\n";

/// How long a server may take from its start to its first connection.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// A server that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port that nobody had a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn serve(command: &mut Command, ports: &[u16]) -> Server {
    let name = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut server = Server(command.spawn().unwrap_or_else(|error| panic!("{name}: {error}")));
    let deadline = Instant::now() + START_PATIENCE;
    for port in ports {
        while TcpStream::connect(("127.0.0.1", *port)).is_err() {
            assert_eq!(server.0.try_wait().unwrap(), None, "{name} ended");
            assert!(Instant::now() < deadline, "{name} does not listen at {port}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    server
}

/// A registry with a password, an image in it, and an nginx in front of it.
struct World {
    folder: tempfile::TempDir,
    registry: String,
    front: String,
    _servers: [Server; 2],
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("htpasswd"), HTPASSWD).unwrap();
        let [port, front, store] = [free_port(), free_port(), free_port()];
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\n\
             storage: {{filesystem: {{rootdirectory: {root}}}}}\n\
             auth: {{htpasswd: {{realm: here, path: {passwords}}}}}\n\
             http: {{addr: '127.0.0.1:{port}'}}\n",
            root = path("store").display(),
            passwords = path("htpasswd").display(),
        );
        fs::write(path("registry.yml"), config).unwrap();
        let registry =
            serve(Command::new("docker-registry").arg("serve").arg(path("registry.yml")), &[port]);
        fs::write(path("nginx.conf"), nginx_config(&path("store"), port, front, store)).unwrap();
        let nginx = serve(
            Command::new("nginx")
                .arg("-e")
                .arg(path("nginx.log"))
                .arg("-p")
                .arg(folder.path())
                .arg("-c")
                .arg(path("nginx.conf")),
            &[front, store],
        );
        let docker = path("docker");
        fs::create_dir(&docker).unwrap();
        let auth = base64::prelude::BASE64_STANDARD.encode(format!("{USER}:{PASSWORD}"));
        let hosts = [port, front].map(|port| format!("127.0.0.1:{port}"));
        let auths = json!({"auths": {&hosts[0]: {"auth": auth}, &hosts[1]: {"auth": auth}}});
        fs::write(docker.join("config.json"), auths.to_string()).unwrap();
        let [registry_host, front] = hosts;
        Self { folder, registry: registry_host, front, _servers: [registry, nginx] }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts a case into the registry as `NAME:v1`; its manifest's digest.
    fn push(&self, golden: &Golden, case: &Case) -> String {
        let files = golden.materialise(case);
        let layers: Vec<Vec<u8>> =
            case.layers().iter().map(|layer| fs::read(files.path(layer)).unwrap()).collect();
        let layout = self.path(&format!("layout-{}", case.name));
        let digest = oci_layout::write(&layout, &layers);
        let output = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--preserve-digests"])
            .args(["--dest-tls-verify=false", "--dest-creds", &format!("{USER}:{PASSWORD}")])
            .arg(format!("oci:{}:v1", layout.display()))
            .arg(format!("docker://{}/{}:v1", self.registry, case.name))
            .output()
            .expect("skopeo");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        digest
    }

    fn run(&self, docker: &Path, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_obd-ublk"))
            .args(arguments)
            .env("OBD_UBLK_CACHE_DIR", self.path("cache"))
            .env("OBD_UBLK_PLAIN_HTTP", format!("{},{}", self.registry, self.front))
            .env("DOCKER_CONFIG", docker)
            .output()
            .unwrap()
    }

    fn sha256_of(&self, image: &str) -> String {
        let output = self.run(&self.path("docker"), &["export", image]);
        assert!(output.status.success(), "{image}: {}", String::from_utf8_lossy(&output.stderr));
        common::golden::hex(&Sha256::digest(&output.stdout))
    }

    fn forget(&self) {
        let _ = fs::remove_dir_all(self.path("cache"));
    }

    /// The lines of nginx's access log of what it gave out or redirected: `WHERE STATUS RANGE`.
    fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("access.log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

/// A front that hands everything to the registry but redirects blobs to a store of another origin,
/// which takes no credentials, as stores with signed addresses do not.
fn nginx_config(root: &Path, registry: u16, front: u16, store: u16) -> String {
    let root = root.display();
    format!(
        "daemon off;\nmaster_process off;\npid nginx.pid;\nevents {{}}\n\
         http {{\n\
         log_format short '$server_port $status $http_range';\n\
         access_log access.log short;\n\
         client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;\n\
         uwsgi_temp_path uwsgi; scgi_temp_path scgi;\n\
         server {{ listen 127.0.0.1:{front};\n\
           location ~ ^/v2/.*/blobs/sha256:(..)(.*)$ {{\n\
             if ($http_authorization = '') {{\n\
               add_header WWW-Authenticate 'Basic realm=\"here\"' always; return 401; }}\n\
             return 307 http://127.0.0.1:{store}/$1/$1$2?signature=x; }}\n\
           location / {{ proxy_pass http://127.0.0.1:{registry};\n\
             proxy_set_header Host $http_host; }} }}\n\
         server {{ listen 127.0.0.1:{store};\n\
           location ~ ^/(..)/(.*)$ {{\n\
             if ($http_authorization != '') {{ return 400; }}\n\
             alias {root}/docker/registry/v2/blobs/sha256/$1/$2/data; }} }}\n\
         }}\n"
    )
}

fn cases(golden: &Golden) -> Vec<&Case> {
    let wanted = ["stack8", "zfile-lz4-4k-random", "ext4-stack3"];
    let found: Vec<&Case> =
        golden.cases().iter().filter(|case| wanted.contains(&case.name.as_str())).collect();
    assert!(found.len() >= 2, "{} golden cases", found.len());
    found
}

#[test]
fn golden_images_come_out_of_a_real_registry_and_through_its_redirects() {
    let golden = Golden::load();
    let world = World::new();
    for case in cases(&golden) {
        let digest = world.push(&golden, case);
        let expected = case.expected_sha256.clone().unwrap();
        let name = &case.name;
        for image in [format!("{name}:v1"), format!("{name}@{digest}")] {
            world.forget();
            let found = world.sha256_of(&format!("docker://{}/{image}", world.registry));
            assert_eq!(found, expected, "{image}");
        }
        // Through the front every blob is redirected, and its store sees no password.
        world.forget();
        let before = world.log().len();
        let image = format!("docker://{}/{name}:v1", world.front);
        assert_eq!(world.sha256_of(&image), expected, "{name}");
        let lines = world.log().split_off(before);
        let count = |part: &str| lines.iter().filter(|line| line.contains(part)).count();
        assert!(count(" 307 ") > 0 && count(" 206 bytes=") > 0, "{lines:?}");
        assert_eq!(count(" 400 "), 0, "{lines:?}");
        // One for each layer and one for the image's own config.
        assert!(count(" 307 ") <= case.layers().len() + 1, "not remembered: {lines:?}");
        // It is in the cache now, whatever the registry is called.
        assert_eq!(world.sha256_of(&image), expected, "{name}");
        let checked = world.run(&world.path("docker"), &["verify", &image]);
        assert!(checked.status.success(), "{checked:?}");
    }
}

#[test]
fn a_real_registry_is_not_read_without_its_password() {
    let golden = Golden::load();
    let world = World::new();
    let case = cases(&golden)[0];
    world.push(&golden, case);
    let image = format!("docker://{}/{}:v1", world.registry, case.name);
    for (what, auth) in [("none", None), ("a wrong one", Some("somebody:wrong"))] {
        let docker = world.path(what);
        fs::create_dir(&docker).unwrap();
        if let Some(auth) = auth {
            let auth = base64::prelude::BASE64_STANDARD.encode(auth);
            let auths = json!({"auths": {&world.registry: {"auth": auth}}});
            fs::write(docker.join("config.json"), auths.to_string()).unwrap();
        }
        let begun = Instant::now();
        let output = world.run(&docker, &["export", &image, "--io-deadline", "4"]);
        // That is for finding the image, too, which used to wait for a minute.
        assert!(begun.elapsed() < Duration::from_secs(40), "{what}: {:?}", begun.elapsed());
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(7), "{what}: {said}");
        assert!(said.contains(&world.registry), "{what}: {said}");
        assert!(!said.contains("wrong"), "{what}: {said}");
    }
}
