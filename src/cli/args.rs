//! Arguments that several commands share.

use crate::error::{Error, ErrorKind, Result};
use crate::format::config::{ImageConfig, ServiceConfig};
use crate::image::{HostSettings, load_image_config, load_image_config_with};
use crate::limits::IO_DEADLINE_SECONDS_MAX;
use crate::server::kernel::HostKernel;
use crate::server::{RunDir, Status, devices_of_config, parse_id, survey};
use crate::upper::PairPaths;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// How people name a device: its number, its path, or the config it was attached from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceName {
    /// `3`, `ublkb3` or `/dev/ublkb3`.
    Id(u32),
    /// Anything else.
    Config(PathBuf),
}

impl DeviceName {
    /// Reads a name; every text is one.
    pub(crate) fn parse(text: &OsStr) -> Self {
        let id = text.to_str().and_then(|text| {
            let text = text.strip_prefix("/dev/").unwrap_or(text);
            parse_id(text.strip_prefix("ublkb").unwrap_or(text))
        });
        id.map_or_else(|| Self::Config(PathBuf::from(text)), Self::Id)
    }

    /// The number of the device that is meant.
    ///
    /// # Errors
    /// `NotFound` when no device was attached from the config, `Usage` when several were.
    pub(crate) fn resolve(&self, run: &RunDir) -> Result<u32> {
        match self {
            Self::Id(id) => Ok(*id),
            Self::Config(path) => resolve_config(run, path),
        }
    }
}

/// A pair that is not attached: the config that names it, or its two files.
#[derive(Debug, clap::Args)]
pub(crate) struct PairArgs {
    /// The config that names the pair as its upper; or, in front of INDEX, the pair's data file
    #[arg(value_name = "CONFIG|DATA")]
    first: PathBuf,

    /// The pair's index file
    #[arg(value_name = "INDEX")]
    index: Option<PathBuf>,
}

impl PairArgs {
    /// The two files.
    ///
    /// # Errors
    /// `InvalidConfig` for a config that names no pair; what is wrong with the config.
    pub(crate) fn paths(&self) -> Result<PairPaths> {
        match &self.index {
            Some(index) => Ok(PairPaths { data: self.first.clone(), index: index.clone() }),
            None => pair_of_config(&self.first),
        }
    }
}

/// The pair that the config at `path` names as its upper.
///
/// # Errors
/// `InvalidConfig` when it names none; what is wrong with the config.
pub(crate) fn pair_of_config(path: &Path) -> Result<PairPaths> {
    pair_in_config(path, &load_image_config(path, None)?)
}

/// As [`pair_of_config`], with the config that was read from `path`.
///
/// # Errors
/// `InvalidConfig` when it names none.
pub(crate) fn pair_in_config(path: &Path, config: &ImageConfig) -> Result<PairPaths> {
    let Some(upper) = &config.upper else {
        let message = format!("{} names no upper with a data and an index file", path.display());
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    };
    let path = |text: &str| PathBuf::from(text);
    Ok(PairPaths { data: path(upper.data.as_str()), index: path(upper.index.as_str()) })
}

/// How long a read of a layer in a registry may take.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct DeadlineArgs {
    /// How long a read may take that has to be fetched from a registry, and finding an image there;
    /// then it fails, with the errno that says why [default: 60]
    #[arg(long = "io-deadline", value_name = "SECONDS")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=IO_DEADLINE_SECONDS_MAX))]
    pub(crate) io_deadline: Option<u64>,
}

/// The settings of the host by which a command reads an image.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct HostArgs {
    /// Host-wide settings [default: /etc/overlaybd/overlaybd.json, which may be absent]
    #[arg(long, value_name = "FILE")]
    pub(crate) service_config: Option<PathBuf>,

    #[command(flatten)]
    deadline: DeadlineArgs,
}

impl HostArgs {
    /// The settings.
    ///
    /// # Errors
    /// What is wrong with their file.
    pub(crate) fn service(&self) -> Result<ServiceConfig> {
        self.settings().load()
    }

    /// The image that `config` names, and the settings.
    ///
    /// # Errors
    /// What is wrong with either.
    pub(crate) fn image(&self, config: &Path) -> Result<(ImageConfig, ServiceConfig)> {
        // What is wrong with the settings would keep a reference from being found.
        let service = self.service()?;
        Ok((load_image_config_with(config, self.settings())?, service))
    }

    /// What the command line says of them.
    pub(crate) fn settings(&self) -> HostSettings<'_> {
        HostSettings {
            service_config: self.service_config.as_deref(),
            io_deadline_seconds: self.deadline.io_deadline,
        }
    }
}

/// The run folder of this host, once it can be believed: commands act on what it says about devices
/// and processes.
///
/// # Errors
/// As [`RunDir::check`].
pub(crate) fn trusted_run_dir() -> Result<RunDir> {
    let run = RunDir::of_host();
    run.check()?;
    Ok(run)
}

/// The device that was named, or all of this host in such a state.
///
/// # Errors
/// As [`DeviceName::resolve`] and [`survey`].
pub(crate) fn named_or_all(
    device: Option<&OsStr>,
    run: &RunDir,
    is_wanted: impl Fn(Status) -> bool,
) -> Result<Vec<u32>> {
    if let Some(device) = device {
        return Ok(vec![DeviceName::parse(device).resolve(run)?]);
    }
    let entries = survey(run, &HostKernel)?;
    Ok(entries.iter().filter(|entry| is_wanted(entry.status)).map(|entry| entry.id).collect())
}

/// A number of bytes: `512`, `64M`, `1G`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let shift = match text.as_bytes().last() {
        Some(b'K' | b'k') => 10,
        Some(b'M' | b'm') => 20,
        Some(b'G' | b'g') => 30,
        Some(b'T' | b't') => 40,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { text.get(..text.len() - 1).unwrap_or_default() };
    let count: u64 = digits.parse().map_err(|_| "expected a number of bytes".to_owned())?;
    count.checked_mul(1 << shift).ok_or_else(|| "too large".to_owned())
}

fn resolve_config(run: &RunDir, path: &Path) -> Result<u32> {
    let found = devices_of_config(run, path)?;
    match found.as_slice() {
        [id] => Ok(*id),
        [] => {
            let message = format!("no device was attached from config {}", path.display());
            Err(Error::new(ErrorKind::NotFound, message))
        }
        several => {
            let names: Vec<_> = several.iter().map(|id| format!("/dev/ublkb{id}")).collect();
            let message = format!(
                "config {} is attached {} times; say which: {}",
                path.display(),
                several.len(),
                names.join(", ")
            );
            Err(Error::new(ErrorKind::Usage, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_three_names_and_everything_else_is_a_config() {
        for (text, expected) in [
            ("3", Some(3)),
            ("ublkb3", Some(3)),
            ("/dev/ublkb1048575", Some(1_048_575)),
            ("1048576", None),
            ("03", None),
            ("/dev/ublkc3", None),
            ("/dev/ublkb3p1", None),
            ("./3", None),
            ("config.v1.json", None),
        ] {
            let expected = expected.map_or_else(|| DeviceName::Config(text.into()), DeviceName::Id);
            assert_eq!(DeviceName::parse(OsStr::new(text)), expected);
        }
    }

    #[test]
    fn a_size_has_a_unit_or_is_in_bytes() {
        for (text, bytes) in [("512", 512), ("64M", 64 << 20), ("1g", 1 << 30), ("2K", 2048)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1GB", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
