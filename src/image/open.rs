//! From a config to open layers: the only place that knows where a layer's file may be.

use super::layer::Layer;
use super::single::{is_reference, read_config_or_layer};
use super::together::on_threads;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::{ImageConfig, LowerConfig, ServiceConfig};
use crate::limits::{CONFIG_BYTES_MAX, OPEN_REMOTE_THREADS_MAX};
use crate::source::{Source, is_same_file, open_regular};
use crate::units::to_u64;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where the service config is looked for when the caller names none.
const SERVICE_CONFIG_DEFAULT: &str = "/etc/overlaybd/overlaybd.json";

/// Threads that open layers. Opening is reading a few small pieces of each file: more threads
/// than this only help a cold disk.
const OPEN_THREADS_MAX: usize = 8;

/// How far into a file we look for the brace of a config: more than anybody's indentation.
const JSON_PROBE_BYTES: u64 = 256;

/// Reads and parses a `config.v1.json`. The file of a layer stands for a stack of this one layer.
///
/// # Errors
/// As [`read_config_or_layer`] and [`parse_image_config`].
pub fn load_image_config(path: &Path, service_config: Option<&Path>) -> Result<ImageConfig> {
    load_image_config_with(path, HostSettings { service_config, io_deadline_seconds: None })
}

/// As [`load_image_config`], by the settings of a host and of this call.
///
/// # Errors
/// As there.
pub fn load_image_config_with(path: &Path, host: HostSettings<'_>) -> Result<ImageConfig> {
    parse_image_config(path, &read_config_or_layer(path, host)?)
}

/// Parses a `config.v1.json` that was read from `path`.
///
/// # Errors
/// `InvalidConfig` with the place in the file, `Unsupported` for TurboOCI.
pub fn parse_image_config(path: &Path, bytes: &[u8]) -> Result<ImageConfig> {
    ImageConfig::parse(bytes).context(|| format!("parse {}", path.display()))
}

/// Reads and parses an `overlaybd.json`. Without a path the default place is tried, and its
/// absence means defaults.
///
/// # Errors
/// As [`load_image_config`]; `NotFound` only for a path that the caller named.
pub fn load_service_config(path: Option<&Path>) -> Result<ServiceConfig> {
    let default = Path::new(SERVICE_CONFIG_DEFAULT);
    let bytes = match read_config(path.unwrap_or(default)) {
        Err(error) if path.is_none() && error.kind() == ErrorKind::NotFound => {
            return Ok(ServiceConfig::default());
        }
        other => other?,
    };
    let shown = path.unwrap_or(default).display();
    ServiceConfig::parse(&bytes).context(|| format!("parse {shown}"))
}

/// By which settings images are found and read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostSettings<'a> {
    /// The `overlaybd.json`; without one, that at the default place, which may be absent.
    pub service_config: Option<&'a Path>,
    /// How long a read of a layer in a registry may take, and finding an image there, if not the
    /// default.
    pub io_deadline_seconds: Option<u64>,
}

impl HostSettings<'_> {
    /// Reads the file. The deadline is part of what comes back.
    ///
    /// # Errors
    /// As [`load_service_config`].
    pub fn load(self) -> Result<ServiceConfig> {
        let config = load_service_config(self.service_config)?;
        Ok(ServiceConfig { io_deadline_seconds: self.io_deadline_seconds, ..config })
    }
}

/// The text of a config file.
///
/// # Errors
/// `NotFound`, `InvalidConfig` for more than [`CONFIG_BYTES_MAX`] bytes, `InvalidFormat` for
/// anything but a regular file, `Io`.
pub fn read_config(path: &Path) -> Result<Vec<u8>> {
    read_rest(path, open_regular(path)?, Vec::new())
}

#[cfg(feature = "registry")]
fn config_of(reference: &Path, host: HostSettings<'_>) -> Result<Vec<u8>> {
    super::elsewhere::config_of(reference, &host.load()?)
}

#[cfg(not(feature = "registry"))]
fn config_of(reference: &Path, _host: HostSettings<'_>) -> Result<Vec<u8>> {
    let message = format!("{}: this program was built without registries", reference.display());
    Err(Error::new(ErrorKind::Unsupported, message))
}

/// The text of a config file; `None` for a layer or anything else. What tells the two apart is the
/// first character that is no space: a brace.
///
/// # Errors
/// As [`read_config`].
pub fn read_if_config(path: &Path, host: HostSettings<'_>) -> Result<Option<Vec<u8>>> {
    if is_reference(path) {
        return config_of(path, host).map(Some);
    }
    let file = open_regular(path)?;
    let mut head = Vec::new();
    (&file)
        .take(JSON_PROBE_BYTES)
        .read_to_end(&mut head)
        .map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
    if head.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Ok(None);
    }
    read_rest(path, file, head).map(Some)
}

/// The whole text of a config whose front is `text` already.
fn read_rest(path: &Path, file: File, mut text: Vec<u8>) -> Result<Vec<u8>> {
    let room = (CONFIG_BYTES_MAX + 1).saturating_sub(to_u64(text.len()));
    file.take(room)
        .read_to_end(&mut text)
        .map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
    if to_u64(text.len()) > CONFIG_BYTES_MAX {
        let message =
            format!("read {}: more than {CONFIG_BYTES_MAX} bytes, the limit", path.display());
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    Ok(text)
}

/// Refuses to write `output` where the image is read from: its config, a layer, its upper.
///
/// # Errors
/// `InvalidConfig` naming both.
pub fn check_output(config_path: &Path, config: &ImageConfig, output: &Path) -> Result<()> {
    let inputs = config.input_paths();
    let is_input = |input: &&Path| is_same_file(input, output);
    let Some(input) =
        std::iter::once(config_path).chain(inputs.iter().map(PathBuf::as_path)).find(is_input)
    else {
        return Ok(());
    };
    let message = format!(
        "{} is a part of the image itself ({}) and must not be written",
        output.display(),
        input.display()
    );
    Err(Error::new(ErrorKind::InvalidConfig, message))
}

/// Opens every layer of a config, several at a time: the lowers, lowest first, and the upper. What
/// cannot be opened does not stop the others.
#[must_use]
pub fn open_each(config: &ImageConfig, service: &ServiceConfig) -> Vec<Result<Layer>> {
    let mut layers = open_lowers(config, service);
    if let Some(upper) = &config.upper {
        let (data, index) = (Path::new(&upper.data), Path::new(&upper.index));
        let opened = Layer::open_writable(data, index);
        layers.push(opened.context(|| format!("open the upper ({})", data.display())));
    }
    layers
}

fn open_lowers(config: &ImageConfig, service: &ServiceConfig) -> Vec<Result<Layer>> {
    let lowers = config.stack_lowers();
    let finder = Finder::new(config, service);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if lowers.iter().any(|lower| !lower.digest.is_empty()) {
        OPEN_REMOTE_THREADS_MAX
    } else {
        threads.min(OPEN_THREADS_MAX)
    };
    let threads = threads.min(lowers.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut opened = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(lower) = lowers.get(number) else { return opened };
            opened.push((number, finder.open(number, lower)));
        }
    };
    let mut results: Vec<_> = on_threads(threads, work).into_iter().flatten().collect();
    results.sort_by_key(|(number, _)| *number);
    results.into_iter().map(|(_, result)| result).collect::<Vec<_>>()
}

/// Finds layers: in local files, else in a registry.
struct Finder<'a> {
    #[cfg(feature = "registry")]
    config: &'a ImageConfig,
    #[cfg(feature = "registry")]
    service: &'a ServiceConfig,
    /// Made when the first layer needs it.
    #[cfg(feature = "registry")]
    elsewhere: std::sync::OnceLock<Result<super::elsewhere::Elsewhere>>,
    #[cfg(not(feature = "registry"))]
    nothing: std::marker::PhantomData<&'a ()>,
}

impl<'a> Finder<'a> {
    #[cfg(feature = "registry")]
    fn new(config: &'a ImageConfig, service: &'a ServiceConfig) -> Self {
        Self { config, service, elsewhere: std::sync::OnceLock::new() }
    }

    #[cfg(not(feature = "registry"))]
    fn new(_config: &'a ImageConfig, _service: &'a ServiceConfig) -> Self {
        Self { nothing: std::marker::PhantomData }
    }

    fn open(&self, number: usize, lower: &LowerConfig) -> Result<Layer> {
        let (name, layer) = match find_lower(lower).context(|| format!("open layer {number}"))? {
            Found::Here(path) => {
                let name = path.display().to_string();
                let source = Source::open(&path);
                (name.clone(), source.and_then(|source| Layer::open_sealed(name, source)))
            }
            Found::Nowhere(looked) => (lower.digest.clone(), self.fetch(lower, &looked)),
        };
        layer.context(|| format!("open layer {number} ({name})"))
    }

    #[cfg(feature = "registry")]
    fn fetch(&self, lower: &LowerConfig, looked: &str) -> Result<Layer> {
        use super::elsewhere::{Elsewhere, nowhere};
        let url = &self.config.repo_blob_url;
        if url.is_empty() && lower.repo_blob_url.is_empty() {
            return Err(nowhere(looked));
        }
        let elsewhere = self.elsewhere.get_or_init(|| Elsewhere::new(self.service));
        match elsewhere {
            Ok(elsewhere) => elsewhere.open(lower, url),
            Err(error) => Err(Error::new(error.kind(), format!("{error:#}"))),
        }
    }

    #[cfg(not(feature = "registry"))]
    fn fetch(&self, lower: &LowerConfig, looked: &str) -> Result<Layer> {
        let Self { nothing: _ } = self;
        let message = format!(
            "no local file (looked at {looked}), and this program was built without registries to \
             pull {} from",
            lower.digest
        );
        Err(Error::new(ErrorKind::Unsupported, message))
    }
}

/// Where a layer is.
pub(super) enum Found {
    /// In this file.
    Here(PathBuf),
    /// In none of these files; but it has a digest.
    Nowhere(String),
}

/// The first candidate that exists, in the reference's order.
pub(super) fn find_lower(lower: &LowerConfig) -> Result<Found> {
    let candidates = lower.local_candidates();
    for path in &candidates {
        match path.try_exists() {
            Ok(true) => return Ok(Found::Here(path.clone())),
            Ok(false) => {}
            Err(error) => return Err(Error::io(format!("look for {}", path.display()), &error)),
        }
    }
    if candidates.is_empty() && lower.digest.is_empty() {
        let message = "the layer has neither file, dir nor digest";
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    let looked: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
    let looked = if looked.is_empty() { "nowhere".to_owned() } else { looked.join(", ") };
    if lower.digest.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, format!("no such file (looked at {looked})")));
    }
    Ok(Found::Nowhere(looked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_of_reasonable_size_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |name: &str| read_config(&folder.path().join(name)).unwrap_err().kind();
        assert_eq!(kind("missing"), ErrorKind::NotFound);
        assert_eq!(kind("."), ErrorKind::InvalidFormat);
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(kind("fifo"), ErrorKind::InvalidFormat);
        let large = std::fs::File::create(folder.path().join("large")).unwrap();
        large.set_len(CONFIG_BYTES_MAX + 1).unwrap();
        assert_eq!(kind("large"), ErrorKind::InvalidConfig);
        large.set_len(CONFIG_BYTES_MAX).unwrap();
        assert!(read_config(&folder.path().join("large")).is_ok());
    }

    #[test]
    fn a_config_is_told_from_a_layer_and_read_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let read = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            read_if_config(&path, HostSettings::default())
        };
        let long = [b" \n\t{".as_slice(), &[b'x'; 1000]].concat();
        for config in [b"{".as_slice(), b"  {}", &long] {
            assert_eq!(read(config).unwrap().as_deref(), Some(config));
        }
        for other in [b"".as_slice(), b"  ", b"LSMT{", b"[{}]", &[b' '; 1000]] {
            assert_eq!(read(other).unwrap(), None);
        }
        let large = usize::try_from(CONFIG_BYTES_MAX).unwrap() + 1;
        let error = read(&vec![b'{'; large]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(read(&vec![b'{'; large - 1]).unwrap().is_some());
    }
}
