//! From a config's path to what can be served: the same steps for every front end.
//!
//! The order matters: the result file hears of everything that fails once it is open, so it is
//! opened as soon as it is known, but never before it is known not to be a part of the image.

use super::config_view::{self, ConfigView};
use super::result_file::ResultFile;
use crate::error::{Error, Result, ResultExt};
use crate::format::config::ImageConfig;
use crate::image::{HostSettings, check_output, is_reference, read_config_or_layer};
use std::path::{Path, PathBuf};

/// A config that can be served as asked.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The config as it was read: the image is opened from this very text.
    pub(super) text: Vec<u8>,
    /// What the server needs of it.
    pub(super) view: ConfigView,
    /// Where to report how it went.
    pub(super) result_file: Option<ResultFile>,
    /// Absolute path of the config.
    pub(super) config: PathBuf,
    /// Absolute path of the service config, if one was given.
    pub(super) service_config: Option<PathBuf>,
    /// Absolute path of the folder of the upper that was put on top, if one was.
    pub(super) upper: Option<PathBuf>,
    /// Whether nothing is written.
    pub(super) read_only: bool,
}

/// Reads the config (of a single layer, makes one) and opens its result file, which hears of
/// everything that fails after that. With `upper` the config is that of an image with the upper in
/// this folder on top.
///
/// # Errors
/// As [`read_config_or_layer`]; `InvalidConfig`; `Usage` for an upper on top of another.
pub(super) fn prepare(
    config: &Path,
    host: HostSettings<'_>,
    read_only: bool,
    upper: Option<&Path>,
) -> Result<Prepared> {
    let folder =
        std::env::current_dir().map_err(|error| Error::io("find out where I am", &error))?;
    // A reference is no path, though it is told like one.
    let config = if is_reference(config) { config.to_owned() } else { folder.join(config) };
    let service_config = host.service_config.map(|path| folder.join(path));
    let upper = upper.map(|path| folder.join(path));
    let host = HostSettings { service_config: service_config.as_deref(), ..host };
    let bytes = read_config_or_layer(&config, host)?;
    let result_file = config_view::result_file(&bytes, &folder);
    // A config that is wrong otherwise still gets its result file.
    if let (Some(path), Ok(parsed)) = (&result_file, ImageConfig::parse(&bytes)) {
        check_output(&config, &parsed, path).context(|| "use the resultFile".to_owned())?;
    }
    let result_file = result_file.as_deref().map(ResultFile::open).transpose()?;
    let view = config_view::parse(&bytes, &folder)
        .and_then(|view| match &upper {
            None => Ok(view),
            Some(upper) => view.with_upper(upper),
        })
        .context(|| format!("config {}", config.display()));
    if let Err(error) = &view {
        report(result_file.as_ref(), error);
    }
    Ok(Prepared { text: bytes, view: view?, result_file, config, service_config, upper, read_only })
}

/// Tells the result file, if there is one, why nothing is served.
pub(super) fn report(result_file: Option<&ResultFile>, error: &Error) {
    if let Some(Err(left)) = result_file.map(|file| file.failed(error)) {
        tracing::warn!("{left:#}");
    }
}
