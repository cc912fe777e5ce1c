//! Arguments that several commands share.

use crate::error::{Error, ErrorKind, Result};
use crate::server::{RunDir, devices_of_config, parse_id};
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
}
