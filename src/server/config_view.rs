//! What the server itself needs of a `config.v1.json`: the result file, whether the image is
//! writable, and a copy for the state file. What the layers mean is the image's business.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::CONFIG_BYTES_MAX;
use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use std::cell::RefCell;
use std::fmt;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A config as the server sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ConfigView {
    /// Whether the config names a writable upper: both of its files.
    pub(super) writable: bool,
    /// The whole config with every path made absolute.
    pub(super) content: Value,
}

/// Reads the config file `path`, at most [`CONFIG_BYTES_MAX`] bytes of it.
///
/// # Errors
/// `NotFound` or `Io` when it cannot be read, `InvalidConfig` when it is too large or no file.
pub(super) fn load_bytes(path: &Path) -> Result<Vec<u8>> {
    let told = |error: &std::io::Error| Error::io(format!("read config {}", path.display()), error);
    // Without O_NONBLOCK a FIFO would be waited for until somebody writes.
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(|error| told(&error))?;
    if !file.metadata().map_err(|error| told(&error))?.is_file() {
        let message = format!("config {}: not a regular file", path.display());
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    let mut bytes = Vec::new();
    file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| told(&error))?;
    if crate::units::to_u64(bytes.len()) > CONFIG_BYTES_MAX {
        let message =
            format!("config {}: more than {CONFIG_BYTES_MAX} bytes, the limit", path.display());
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    }
    Ok(bytes)
}

/// The `resultFile` of a config, made absolute from `folder`, as far as it can be found: the rest
/// of the config may be nonsense or cut off.
#[must_use]
pub(super) fn result_file(bytes: &[u8], folder: &Path) -> Option<PathBuf> {
    let found = RefCell::new(None);
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    // The outcome does not matter: what was seen before the first error is in `found`.
    let _ = reader.deserialize_map(ResultFileVisitor { found: &found });
    let name: String = found.into_inner()?;
    if name.is_empty() { None } else { Some(folder.join(name)) }
}

struct ResultFileVisitor<'a> {
    found: &'a RefCell<Option<String>>,
}

impl<'de> Visitor<'de> for ResultFileVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "resultFile" {
                *self.found.borrow_mut() = Some(map.next_value::<String>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// Parses a config; relative paths are taken from `folder`.
///
/// # Errors
/// `InvalidConfig` when it is not a JSON object.
pub(super) fn parse(bytes: &[u8], folder: &Path) -> Result<ConfigView> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidConfig, message);
    let mut content: Value = serde_json::from_slice(bytes)
        .map_err(|error| invalid(format!("not valid JSON: {error}")))?;
    let Some(top) = content.as_object_mut() else {
        return Err(invalid("expected a JSON object".to_owned()));
    };
    for key in ["resultFile", "recordTracePath"] {
        absolute(top.get_mut(key), folder);
    }
    for lower in top.get_mut("lowers").and_then(Value::as_array_mut).into_iter().flatten() {
        for key in ["file", "dir", "targetFile", "gzipIndex"] {
            absolute(lower.get_mut(key), folder);
        }
    }
    let mut writable = false;
    if let Some(upper) = top.get_mut("upper") {
        for key in ["index", "data", "target", "gzipIndex"] {
            absolute(upper.get_mut(key), folder);
        }
        let named = |key| upper.get(key).and_then(Value::as_str).is_some_and(|s| !s.is_empty());
        writable = named("index") && named("data");
    }
    Ok(ConfigView { writable, content })
}

fn absolute(value: Option<&mut Value>, folder: &Path) {
    if let Some(Value::String(path)) = value
        && !path.is_empty()
        // A folder that is no UTF-8 cannot be told in JSON; the path stays as it was.
        && let Some(joined) = folder.join(&*path).to_str()
    {
        *path = joined.to_owned();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_result_file_is_found_in_a_config_that_is_otherwise_bad() {
        for (config, expected) in [
            (r#"{"resultFile":"/r/log","lowers":["#, Some("/r/log")),
            (r#"{"lowers":7,"resultFile":"log"}"#, Some("/work/log")),
            (r#"{"resultFile":"/a","upper":nonsense"#, Some("/a")),
            (r#"{"resultFile":""}"#, None),
            (r#"{"resultFile":7}"#, None),
            (r#"{"lowers":[{"resultFile":"/no"}]}"#, None),
            (r#"{"lowers":[nonsense],"resultFile":"/late"}"#, None),
            ("[]", None),
            ("", None),
        ] {
            let found = result_file(config.as_bytes(), Path::new("/work"));
            assert_eq!(found.as_deref(), expected.map(Path::new), "{config}");
        }
    }

    #[test]
    fn relative_paths_become_absolute_and_empty_ones_stay_empty() {
        let config = br#"{"repoBlobUrl":"u","resultFile":"r","recordTracePath":"",
            "lowers":[{"file":"a/b"},{"dir":"/d","digest":"sha256:1","targetFile":"t"}],
            "upper":{"index":"i","data":"../d","vsize":64}}"#;
        let view = parse(config, Path::new("/w")).unwrap();
        assert!(view.writable);
        let expected = json!({"repoBlobUrl":"u","resultFile":"/w/r","recordTracePath":"",
            "lowers":[{"file":"/w/a/b"},{"dir":"/d","digest":"sha256:1","targetFile":"/w/t"}],
            "upper":{"index":"/w/i","data":"/w/../d","vsize":64}});
        assert_eq!(view.content, expected);
    }

    #[test]
    fn an_upper_counts_only_with_both_of_its_files() {
        for (upper, writable) in [
            (json!({}), false),
            (json!({"index":"","data":""}), false),
            (json!({"index":"/i","data":""}), false),
            (json!({"data":"/d"}), false),
            (json!({"index":"/i","data":"/d"}), true),
        ] {
            let config = json!({"lowers":[],"upper":upper}).to_string();
            let view = parse(config.as_bytes(), Path::new("/")).unwrap();
            assert_eq!(view.writable, writable, "{config}");
        }
    }

    #[test]
    fn what_is_no_object_is_no_config() {
        for config in ["", "[]", "7", "{", r#"{"a":1}}"#] {
            let error = parse(config.as_bytes(), Path::new("/")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{config}");
        }
    }

    #[test]
    fn only_a_file_of_reasonable_size_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |name: &str| load_bytes(&folder.path().join(name)).unwrap_err().kind();
        assert_eq!(kind("missing"), ErrorKind::NotFound);
        assert_eq!(kind("."), ErrorKind::InvalidConfig);
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(kind("fifo"), ErrorKind::InvalidConfig);
        let large = std::fs::File::create(folder.path().join("large")).unwrap();
        large.set_len(CONFIG_BYTES_MAX + 1).unwrap();
        assert_eq!(kind("large"), ErrorKind::InvalidConfig);
        large.set_len(CONFIG_BYTES_MAX).unwrap();
        assert!(load_bytes(&folder.path().join("large")).is_ok());
    }
}
