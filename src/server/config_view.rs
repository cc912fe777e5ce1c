//! What the server itself needs of a `config.v1.json`: the result file, whether the image is
//! writable, and a copy for the state file. What the layers mean is the image's business.

use crate::error::{Error, ErrorKind, Result};
use crate::format::config::result_file_of;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A config as the server sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ConfigView {
    /// Whether the config names a writable upper: both of its files.
    pub(super) writable: bool,
    /// The whole config with every path made absolute.
    pub(super) content: Value,
}

/// The names of an upper's files in a folder of its own: as the reference calls them.
const UPPER_FILES: [(&str, &str); 2] = [("data", "writable_data"), ("index", "writable_index")];

impl ConfigView {
    /// The same image with the upper in `folder` (an absolute path) on top.
    ///
    /// # Errors
    /// `Usage` when the config names an upper already, `InvalidConfig` for a folder whose name is
    /// no UTF-8.
    pub(super) fn with_upper(mut self, folder: &Path) -> Result<Self> {
        if self.writable {
            let message = "the config names an upper of its own already";
            return Err(Error::new(ErrorKind::Usage, message));
        }
        let mut upper = serde_json::Map::new();
        for (key, name) in UPPER_FILES {
            let path = folder.join(name);
            let path = path.to_str().ok_or_else(|| {
                let message = format!("{} cannot be told in JSON", path.display());
                Error::new(ErrorKind::InvalidConfig, message)
            })?;
            upper.insert(key.to_owned(), path.into());
        }
        if let Some(top) = self.content.as_object_mut() {
            top.insert("upper".to_owned(), upper.into());
        }
        self.writable = true;
        Ok(self)
    }
}

/// The `resultFile` of a config, made absolute from `folder`, as far as it can be found.
#[must_use]
pub(super) fn result_file(bytes: &[u8], folder: &Path) -> Option<PathBuf> {
    result_file_of(bytes).map(|name| folder.join(name))
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
            (r#"{"lowers":7,"resultFile":"log"}"#, Some("/w/log")),
            (r#"{"resultFile":"/a","upper":nonsense"#, Some("/a")),
            (r#"{"resultFile":""}"#, None),
            (r#"{"resultFile":7}"#, None),
            (r#"{"lowers":[{"resultFile":"/no"}]}"#, None),
            (r#"{"lowers":[nonsense],"resultFile":"/late"}"#, None),
            ("[]", None),
            ("", None),
        ] {
            let found = result_file(config.as_bytes(), Path::new("/w"));
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
}
