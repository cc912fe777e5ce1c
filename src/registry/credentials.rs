//! Where credentials come from: files, helpers, and services that are asked.
//!
//! Nothing is kept: a credential is looked for when a token or a header is made of it, so that a
//! changed file counts at once.

use super::blob_url::Origin;
use super::credential_file::{self, Credential, CredentialFile, Lead};
use super::fault::Fault;
use super::retry::Remedy;
use super::secret::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{CREDENTIAL_BYTES_MAX, CREDENTIAL_HELPER_MS_MAX, CREDENTIAL_THREADS_MAX};
use reqwest::{Certificate, Client, Identity, Url};
use rustix::fs::{Mode, OFlags};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::sync::Semaphore;
use tokio::{task, time};

/// One place to look for credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file in the form of docker's `config.json`, with its helpers. Also overlaybd's `file`.
    File(PathBuf),
    /// overlaybd's `http` and `https`: `GET URL?remote_url=BLOB`.
    Http {
        /// The URL; some have a key in it.
        url: Secret,
        /// How long it may take.
        timeout: Duration,
        /// The only authority to trust (PEM).
        ca_file: Option<PathBuf>,
        /// Certificate and key to show (PEM).
        client_certificate: Option<(PathBuf, PathBuf)>,
    },
    /// overlaybd's `uds`: the same through a Unix socket.
    Socket {
        /// The socket.
        path: PathBuf,
        /// How long it may take.
        timeout: Duration,
    },
}

/// The sources, ready to be asked.
#[derive(Debug)]
pub(super) struct Credentials {
    sources: Vec<Ready>,
    pub(super) disk: Disk,
}

/// Where files and programs are: on disks that may hang for ever, and a few threads with them.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) threads: Arc<Semaphore>,
}

impl Disk {
    fn new() -> Self {
        Self { threads: Arc::new(Semaphore::new(CREDENTIAL_THREADS_MAX)) }
    }

    /// Does what blocks. Whoever waits may give that up; the thread cannot.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let permit = Arc::clone(&self.threads).acquire_owned().await.map_err(io::Error::other)?;
        let work = move || {
            let _as_long_as_it_blocks = permit;
            work()
        };
        task::spawn_blocking(work).await.map_err(io::Error::other)
    }
}

#[derive(Debug)]
enum Ready {
    File(PathBuf),
    Service(Service),
}

struct Service {
    client: Client,
    url: Url,
    timeout: Duration,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Service")
    }
}

/// What the sources have for a repository.
#[derive(Debug)]
pub(super) struct Found {
    /// `None` when no source has one.
    pub(super) credential: Option<Credential>,
    /// Why the first one that cannot be used cannot, of those that were asked.
    pub(super) unusable: Option<Fault>,
}

/// What a credential file looked like: another stamp, another content.
pub(super) type Stamp = Vec<Option<(SystemTime, u64, u64)>>;

impl Credentials {
    pub(super) fn new(sources: &[Source]) -> Result<Self> {
        let ready = sources.iter().map(Ready::new).collect::<Result<_>>()?;
        Ok(Self { sources: ready, disk: Disk::new() })
    }

    /// The credential for `repository` at `origin`, of the first source that has one. A source that
    /// cannot be used is passed over, and told: the next ones, or nobody's name, may open it, too.
    ///
    /// # Errors
    /// What may pass, like a service that does not answer: it may have the right one.
    pub(super) async fn find(
        &self,
        origin: &Origin,
        repository: &str,
        blob_url: &str,
    ) -> Result<Found, Fault> {
        let mut unusable = None;
        for source in &self.sources {
            match self.look(source, origin, repository, blob_url).await {
                Ok(None) => {}
                Ok(credential) => return Ok(Found { credential, unusable }),
                Err(fault) if fault.remedy == Remedy::Credentials => {
                    tracing::warn!(
                        "credentials for {blob_url}: source passed over: {}",
                        fault.text
                    );
                    unusable.get_or_insert(fault);
                }
                Err(fault) => return Err(fault),
            }
        }
        Ok(Found { credential: None, unusable })
    }

    /// What one source has for `repository` at `origin`.
    async fn look(
        &self,
        source: &Ready,
        origin: &Origin,
        repository: &str,
        blob_url: &str,
    ) -> Result<Option<Credential>, Fault> {
        let file = match source {
            Ready::File(path) => match read_file(&self.disk, path.clone()).await? {
                Some(file) => file,
                None => return Ok(None),
            },
            Ready::Service(service) => ask(service, blob_url).await?,
        };
        match file.lead(&origin.host, repository) {
            Some(Lead::Here(credential)) => Ok(Some(credential)),
            Some(Lead::Helper { name, server }) => run_helper(&self.disk, &name, &server).await,
            None => Ok(None),
        }
    }

    /// What the files look like now.
    pub(super) async fn stamp(&self) -> Stamp {
        let files = self.sources.iter().filter_map(|source| match source {
            Ready::File(path) => Some(path.clone()),
            Ready::Service(_) => None,
        });
        let paths: Vec<PathBuf> = files.collect();
        let looked = self.disk.run(move || {
            let stamp = |path: &PathBuf| {
                let found = path.metadata().ok()?;
                Some((found.modified().ok()?, found.len(), found.ino()))
            };
            paths.iter().map(stamp).collect()
        });
        // A lost task looks like no file at all: the next look tells.
        looked.await.unwrap_or_default()
    }
}

impl Ready {
    fn new(source: &Source) -> Result<Self> {
        let invalid = |what: String| Error::new(ErrorKind::InvalidConfig, what);
        let base = || Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
        match source {
            Source::File(path) => Ok(Self::File(path.clone())),
            Source::Http { url, timeout, ca_file, client_certificate } => {
                let wrong = |_| invalid("credential service: expected a URL".to_owned());
                let url = Url::parse(url.reveal()).map_err(wrong)?;
                let mut builder = base();
                if let Some(path) = ca_file {
                    let found = Certificate::from_pem_bundle(&read_pem(path)?);
                    let none = |_| invalid(format!("{}: no certificates in PEM", path.display()));
                    builder = builder.tls_certs_only(found.map_err(none)?);
                }
                if let Some((certificate, key)) = client_certificate {
                    let mut pem = read_pem(certificate)?;
                    pem.push(b'\n');
                    pem.extend(read_pem(key)?);
                    let none = |_| invalid(format!("{}: no key in PEM", key.display()));
                    builder = builder.identity(Identity::from_pem(&pem).map_err(none)?);
                }
                let built = builder.build();
                let client = built.map_err(|e| invalid(format!("credential service: {e}")))?;
                Ok(Self::Service(Service { client, url, timeout: *timeout }))
            }
            Source::Socket { path, timeout } => {
                let built = base().unix_socket(path.as_path()).build();
                let client = built.map_err(|e| invalid(format!("credential socket: {e}")))?;
                let url = Url::parse("http://localhost/auth");
                let url = url.map_err(|e| invalid(format!("credential socket: {e}")))?;
                Ok(Self::Service(Service { client, url, timeout: *timeout }))
            }
        }
    }
}

fn read_pem(path: &Path) -> Result<Vec<u8>> {
    read_bounded(path).map_err(|error| Error::io(format!("read {}", path.display()), &error))
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a FIFO waits for whoever writes to it, which may be nobody for ever.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(CREDENTIAL_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The file; `None` when there is none, which is no trouble: it may come.
async fn read_file(disk: &Disk, path: PathBuf) -> Result<Option<CredentialFile>, Fault> {
    let shown = path.display().to_string();
    let read = disk.run(move || read_bounded(&path)).await;
    let unusable = |why: String| Fault::unauthorized(format!("credential file {shown}: {why}"));
    match read.flatten() {
        Ok(bytes) => credential_file::parse(&bytes).map(Some).map_err(unusable),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unusable(error.to_string())),
    }
}

/// Asks a service for its credentials for a blob.
async fn ask(service: &Service, blob_url: &str) -> Result<CredentialFile, Fault> {
    let Service { client, url, timeout } = service;
    let failed = |why: String| Fault::unavailable(format!("credential service: {why}"));
    let mut url = url.clone();
    url.query_pairs_mut().append_pair("remote_url", blob_url);
    let asked = async {
        let answer = client.get(url).send().await.map_err(|e| e.without_url().to_string())?;
        let status = answer.status();
        if !status.is_success() {
            return Err(format!("HTTP status {}", status.as_u16()));
        }
        let mut answer = answer;
        let mut bytes = Vec::new();
        while let Some(piece) =
            answer.chunk().await.map_err(|error| error.without_url().to_string())?
        {
            bytes.extend_from_slice(&piece);
            if crate::units::to_u64(bytes.len()) > CREDENTIAL_BYTES_MAX {
                return Err("its answer is too long".to_owned());
            }
        }
        credential_file::parse_answer(&bytes)
    };
    match time::timeout(*timeout, asked).await {
        Ok(answer) => answer.map_err(failed),
        Err(_) => Err(failed(format!("no answer within {timeout:?}"))),
    }
}

/// Runs `docker-credential-NAME get`. What it says besides an answer is not repeated.
async fn run_helper(disk: &Disk, name: &str, server: &str) -> Result<Option<Credential>, Fault> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || !name.bytes().all(is_plain) {
        return Err(Fault::unauthorized("the name of a credential helper is none"));
    }
    let program = format!("docker-credential-{name}");
    let limit = Duration::from_millis(CREDENTIAL_HELPER_MS_MAX);
    run_program(disk, &program, server, limit).await
}

async fn run_program(
    disk: &Disk,
    program: &str,
    server: &str,
    limit: Duration,
) -> Result<Option<Credential>, Fault> {
    let failed = |why: String| Fault::unauthorized(format!("{program}: {why}"));
    let run = async {
        let mut command = Command::new(program);
        command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.kill_on_drop(true);
        // Blocks until the program is loaded, from a disk that may hang or be served by us.
        let mut child = disk.run(move || command.spawn()).await.flatten()?;
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that reads nothing has its reasons, which its status tells.
            let _ = stdin.write_all(server.as_bytes()).await;
        }
        let mut answer = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(CREDENTIAL_BYTES_MAX).read_to_end(&mut answer).await?;
        }
        io::Result::Ok((child.wait().await?, answer))
    };
    match time::timeout(limit, run).await {
        Err(_) => Err(failed(format!("no answer within {limit:?}"))),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Ok(Ok((status, answer))) if status.success() => {
            credential_file::parse_helper(&answer).map(Some).map_err(failed)
        }
        Ok(Ok((_, answer))) => {
            let text = String::from_utf8_lossy(&answer);
            match text.contains("credentials not found") {
                true => Ok(None),
                false => Err(failed("it failed".to_owned())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::blob_url::BlobPlace;
    use std::os::unix::fs::PermissionsExt as _;

    fn run(script: &str) -> (Result<Option<Credential>, Fault>, String) {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("docker-credential-test");
        let seen = folder.path().join("seen");
        let text = format!("#!/bin/sh\n(echo \"$@\"; cat) > {}\n{script}\n", seen.display());
        std::fs::write(&program, text).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let limit = Duration::from_secs(2);
        let program = program.to_str().unwrap();
        let found = runtime.block_on(run_program(&Disk::new(), program, "reg.example.com", limit));
        (found, std::fs::read_to_string(seen).unwrap_or_default())
    }

    #[test]
    fn helpers_are_asked_as_docker_asks_them() {
        let (found, seen) = run(r#"echo '{"ServerURL":"s","Username":"u","Secret":"p"}'"#);
        let password = Secret::new("p");
        let expected = Credential::Password { user: "u".to_owned(), password };
        assert_eq!(found.unwrap(), Some(expected));
        assert_eq!(seen, "get\nreg.example.com");
    }

    #[test]
    fn a_helper_may_have_nothing_or_fail_and_its_words_are_not_repeated() {
        let (found, _) = run("echo 'credentials not found in native keychain'; exit 1");
        assert_eq!(found.unwrap(), None);
        for (script, told) in [
            ("echo hunter2; exit 1", "it failed"),
            ("echo hunter2", "not what is expected at line 1 column 1"),
            ("sleep 9", "no answer within 2s"),
        ] {
            let fault = run(script).0.unwrap_err();
            assert!(fault.text.ends_with(told), "{script}: {}", fault.text);
            assert_eq!(fault.kind, ErrorKind::Unauthorized, "{script}");
        }
    }

    #[test]
    fn a_source_that_cannot_be_used_is_passed_over_and_told_without_its_secrets() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            Source::File(path)
        };
        let broken = file("broken", r#"{"auths":{"reg.example.com":{"password":hunter2}}}"#);
        let no_folder = Source::File(folder.path().join("broken/config.json"));
        let no_helper = file("helper", r#"{"credsStore":"there-is-none-of-this-name"}"#);
        let right =
            r#"{"auths":{"reg.example.com":{"username":"user","password":"correct-horse"}}}"#;
        let place = BlobPlace::parse("https://reg.example.com/v2/a/b/blobs").unwrap();
        let find = |sources: &[Source]| {
            let credentials = Credentials::new(sources).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let url = place.to_string();
            let found = credentials.find(place.origin(), place.repository(), &url);
            runtime.unwrap().block_on(found).unwrap()
        };
        let log = tempfile::NamedTempFile::new().unwrap();
        let written = Arc::new(log.reopen().unwrap());
        let subscriber = tracing_subscriber::fmt().with_writer(written).finish();
        let guard = tracing::subscriber::set_default(subscriber);
        let mut sources = vec![no_folder, broken, no_helper];
        let Found { credential, unusable } = find(&sources);
        assert_eq!(credential, None);
        let first = unusable.unwrap().text;
        assert!(first.contains("broken/config.json: Not a directory"), "{first}");
        sources.push(file("right", right));
        let Found { credential, unusable } = find(&sources);
        assert!(credential.is_some());
        assert_eq!(unusable.unwrap().text, first);
        drop(guard);
        let told = std::fs::read_to_string(log.path()).unwrap();
        for why in [
            "broken/config.json: Not a directory",
            "broken: not what is expected at line 1 column 41",
            "docker-credential-there-is-none-of-this-name: No such file or directory",
        ] {
            assert_eq!(told.matches(why).count(), 2, "{why}: {told}");
        }
        assert_eq!(told.matches("WARN").count(), 6, "{told}");
        assert!(!told.contains("hunter2") && !told.contains("correct-horse"), "{told}");
    }

    #[test]
    fn a_helpers_name_is_no_path() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for name in ["", "../x", "a/b", "a b", "a;b"] {
            let fault = runtime.block_on(run_helper(&Disk::new(), name, "s")).unwrap_err();
            assert_eq!(fault.text, "the name of a credential helper is none", "{name}");
        }
        let run = async { run_helper(&Disk::new(), "there-is-none-of-this-name", "s").await };
        let fault = runtime.block_on(run).unwrap_err();
        assert!(fault.text.starts_with("docker-credential-there-is-none-of-this-name: "));
    }
}
