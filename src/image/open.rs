//! From a config to open layers: the only place that knows where a layer's file may be.

use super::layer::Layer;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::{ImageConfig, LowerConfig, ServiceConfig};
use crate::limits::CONFIG_BYTES_MAX;
use crate::source::{Source, is_same_file, open_regular};
use crate::units::to_u64;
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

/// Reads and parses a `config.v1.json`; also returns its text as read.
///
/// # Errors
/// `NotFound`, `InvalidConfig` with the place in the file, `Unsupported` for TurboOCI.
pub fn load_image_config(path: &Path) -> Result<(ImageConfig, Vec<u8>)> {
    let bytes = read_config(path)?;
    let config = ImageConfig::parse(&bytes).context(|| format!("parse {}", path.display()))?;
    Ok((config, bytes))
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

/// The text of a config file.
///
/// # Errors
/// `NotFound`, `InvalidConfig` for more than [`CONFIG_BYTES_MAX`] bytes, `InvalidFormat` for
/// anything but a regular file, `Io`.
pub fn read_config(path: &Path) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(CONFIG_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
    if to_u64(bytes.len()) > CONFIG_BYTES_MAX {
        let message =
            format!("read {}: more than {CONFIG_BYTES_MAX} bytes, the limit", path.display());
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    Ok(bytes)
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

/// Whether a file is a config rather than a layer: its first character that is no space is `{`.
///
/// # Errors
/// As [`load_image_config`] when it cannot be read.
pub fn looks_like_json(path: &Path) -> Result<bool> {
    let mut head = Vec::new();
    open_regular(path)?
        .take(JSON_PROBE_BYTES)
        .read_to_end(&mut head)
        .map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
    Ok(head.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{'))
}

/// Opens every layer of a config, several at a time: the lowers, lowest first, and the upper. What
/// cannot be opened does not stop the others.
#[must_use]
pub fn open_each(config: &ImageConfig, _service: &ServiceConfig) -> Vec<Result<Layer>> {
    let mut layers = open_lowers(config.stack_lowers());
    if let Some(upper) = &config.upper {
        let (data, index) = (Path::new(&upper.data), Path::new(&upper.index));
        let opened = Layer::open_writable(data, index);
        layers.push(opened.context(|| format!("open the upper ({})", data.display())));
    }
    layers
}

fn open_lowers(lowers: &[LowerConfig]) -> Vec<Result<Layer>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(OPEN_THREADS_MAX).min(lowers.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut opened = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(lower) = lowers.get(number) else { return opened };
            opened.push((number, open_lower(number, lower)));
        }
    };
    let mut results = std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut results = work();
        for helper in helpers {
            // A panic in a helper is a bug; let it surface as one.
            results.extend(helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        results
    });
    results.sort_by_key(|(number, _)| *number);
    results.into_iter().map(|(_, result)| result).collect::<Vec<_>>()
}

fn open_lower(number: usize, lower: &LowerConfig) -> Result<Layer> {
    let path = find_lower(lower).context(|| format!("open layer {number}"))?;
    Source::open(&path)
        .and_then(|source| Layer::open_sealed(path.display().to_string(), source))
        .context(|| format!("open layer {number} ({})", path.display()))
}

/// The first candidate that exists, in the reference's order.
fn find_lower(lower: &LowerConfig) -> Result<PathBuf> {
    let candidates = lower.local_candidates();
    for path in &candidates {
        match path.try_exists() {
            Ok(true) => return Ok(path.clone()),
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
    let message = format!(
        "no local file (looked at {looked}), and pulling {} from a registry is not supported yet",
        lower.digest
    );
    Err(Error::new(ErrorKind::Unsupported, message))
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
}
