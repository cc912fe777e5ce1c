//! A layer's file in place of a config: the config that has just this layer.
//!
//! People who look at one layer should not have to write a config for it. Everything behind this
//! (recovery, the state file, `check_output`) sees a config as any other, with an absolute path.

use super::open::{HostSettings, read_if_config};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{lsmt, tar, zfile};
use crate::source::Source;
use crate::units::{to_u64, to_usize};
use serde_json::json;
use std::path::Path;

/// How the reference of an image in a registry begins.
pub(super) const DOCKER: &str = "docker://";

/// How the name of an image in a folder begins.
pub(super) const LAYOUT: &str = "oci-layout:";

/// Whether `path` names an image by reference instead of by its config's file.
#[must_use]
pub fn is_reference(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.starts_with(DOCKER) || text.starts_with(LAYOUT))
}

/// The text of the config at `path`. For the file of a layer (raw, zfile, in a tar wrapper), the
/// text of the config of a stack of this one layer.
///
/// # Errors
/// As [`read_if_config`]; `InvalidFormat` for what is neither; `InvalidConfig` for a layer whose
/// path is no UTF-8: no config can name it.
pub fn read_config_or_layer(path: &Path, host: HostSettings<'_>) -> Result<Vec<u8>> {
    if let Some(text) = read_if_config(path, host)? {
        return Ok(text);
    }
    if !looks_like_layer(path)? {
        let message = format!(
            "{} is neither a config (a JSON object) nor a layer (LSMT, zfile or tar)",
            path.display()
        );
        return Err(Error::new(ErrorKind::InvalidFormat, message));
    }
    let absolute = std::path::absolute(path)
        .map_err(|error| Error::io(format!("find {}", path.display()), &error))?;
    let Some(file) = absolute.to_str() else {
        let message = format!(
            "layer {}: its path is no UTF-8, so that no config can name it",
            absolute.display()
        );
        return Err(Error::new(ErrorKind::InvalidConfig, message));
    };
    let config =
        json!({"repoBlobUrl": "", "lowers": [{"file": file}], "upper": {}, "resultFile": ""});
    Ok(config.to_string().into_bytes())
}

/// Whether the file starts like something that a layer may be wrapped in, or like a layer. What is
/// wrong further on is told when it is opened.
fn looks_like_layer(path: &Path) -> Result<bool> {
    let source = Source::open(path)?;
    let bytes = source.bytes().min(to_u64(tar::HEAD_BYTES));
    let mut head = vec![0; to_usize(bytes).unwrap_or(0)];
    source.read(0, &mut head)?;
    // A wrapper that is broken is one all the same.
    let wrapped = !matches!(tar::parse_wrapper(&head, source.bytes()), Ok(None));
    Ok(wrapped || zfile::has_magic(&head) || lsmt::has_magic(&head))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::config::ImageConfig;

    const HOST: HostSettings<'_> = HostSettings { service_config: None, io_deadline_seconds: None };

    fn ustar() -> Vec<u8> {
        let mut block = vec![0_u8; 512];
        block[..1].copy_from_slice(b"a");
        block[124..135].copy_from_slice(b"00000001000");
        block[156] = b'0';
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block.resize(1024, 0);
        block
    }

    #[test]
    fn what_is_no_config_is_a_stack_of_one_layer_or_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let layer = lsmt::write_sealed(&[], &[], 4096);
        let zfile = zfile::write(&layer, &zfile::WriteOptions::default()).unwrap();
        for (name, content, kind) in [
            ("raw", layer, None),
            ("zfile", zfile, None),
            ("tar", ustar(), None),
            ("a \"b\"\\\u{e9}", lsmt::write_sealed(&[], &[], 512), None),
            ("text", b"lowers:\n".to_vec(), Some(ErrorKind::InvalidFormat)),
            ("array", b"[]".to_vec(), Some(ErrorKind::InvalidFormat)),
            ("empty", Vec::new(), Some(ErrorKind::InvalidFormat)),
            ("short", b"LSM".to_vec(), Some(ErrorKind::InvalidFormat)),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            match (read_config_or_layer(&path, HOST), kind) {
                (Ok(text), None) => {
                    let config = ImageConfig::parse(&text).unwrap();
                    assert_eq!(config.lowers.len(), 1, "{name}");
                    assert_eq!(Path::new(&config.lowers[0].file), path);
                    assert_eq!((config.upper, config.result_file.as_str()), (None, ""));
                }
                (Err(error), Some(kind)) => {
                    assert_eq!(error.kind(), kind, "{name}");
                    assert!(error.to_string().contains("neither a config"), "{error}");
                }
                (found, _) => panic!("{name}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_config_is_read_as_it_is_and_a_missing_file_is_not_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c");
        std::fs::write(&path, " \n{\"lowers\":7").unwrap();
        assert_eq!(read_config_or_layer(&path, HOST).unwrap(), b" \n{\"lowers\":7");
        let error = read_config_or_layer(&folder.path().join("none"), HOST).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let error = read_config_or_layer(folder.path(), HOST).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFormat);
    }

    #[test]
    fn a_layer_that_json_cannot_name_is_refused() {
        use std::os::unix::ffi::OsStrExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(std::ffi::OsStr::from_bytes(b"\xff"));
        std::fs::write(&path, lsmt::write_sealed(&[], &[], 4096)).unwrap();
        let error = read_config_or_layer(&path, HOST).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    }
}
