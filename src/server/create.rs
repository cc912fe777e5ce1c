//! A new writable disk: a folder with the two files of an upper and a config that names them.

use super::config_view;
use super::served_disk::{make_pair, pair_paths};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::ImageConfig;
use crate::image::{HostSettings, Image, read_config_or_layer};
use crate::upper::{self, Form};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The name of the config in the folder: as snapshotters call it.
const CONFIG_NAME: &str = "config.v1.json";

/// Makes a writable disk in `folder`, which is made if it is not there: empty, or on top of the
/// image that `base` describes. Its size is `size_bytes`, or that of the image. Returns the path of
/// the config to attach.
///
/// # Errors
/// `Usage` without a size of either kind, or one below the image's; `Io` when one of the files is
/// there already; `Unsupported` where the file system is not fit for the sparse form; what is wrong
/// with the image. Nothing of what was made is left then, but for the folder. A power cut leaves a
/// whole disk or what the next attempt takes away.
pub fn create_disk(
    folder: &Path,
    size_bytes: Option<u64>,
    base: Option<&Path>,
    sparse: bool,
) -> Result<PathBuf> {
    let current =
        std::env::current_dir().map_err(|error| Error::io("find out where I am", &error))?;
    let folder = current.join(folder);
    let (text, base_bytes) = match base {
        None => (br#"{"repoBlobUrl":"","lowers":[]}"#.to_vec(), 0),
        Some(base) => {
            let base = current.join(base);
            let text = read_config_or_layer(&base, HostSettings::default())?;
            let bytes = Image::open_bytes(&base, &text, None)?.virtual_bytes();
            (text, bytes)
        }
    };
    let usage = |message: String| Error::new(ErrorKind::Usage, message);
    let size_bytes = size_bytes.unwrap_or(base_bytes);
    if size_bytes == 0 {
        return Err(usage("a disk without an image below needs a size".to_owned()));
    }
    if size_bytes < base_bytes {
        let message = format!("{size_bytes} bytes: the image has {base_bytes}, and is not cut off");
        return Err(usage(message));
    }
    let mut view = config_view::parse(&text, &current)?.with_upper(&folder)?;
    if let Some(top) = view.content.as_object_mut() {
        // Whoever attaches the image itself is told there, not here.
        top.remove("resultFile");
    }
    let text = format!("{:#}\n", view.content);
    let paths = pair_paths(&ImageConfig::parse(text.as_bytes())?);
    let paths = paths.ok_or_else(|| usage("the config got no upper".to_owned()))?;
    let config = folder.join(CONFIG_NAME);
    if config.symlink_metadata().is_ok() {
        let error = std::io::Error::from(std::io::ErrorKind::AlreadyExists);
        return Err(Error::io(format!("make {}", config.display()), &error));
    }
    if upper::remove_unused(&paths)? {
        tracing::info!("{} was left by an attempt that was cut off", paths.data.display());
    }
    let form = if sparse { Form::Sparse { over_lowers: base_bytes > 0 } } else { Form::Append };
    let mode = config_mode(base.map(|base| current.join(base)).as_deref())?;
    make_pair(&paths, size_bytes, form)?;
    let written = write_new(&config, text.as_bytes(), mode);
    written.context(|| "write the config".to_owned()).inspect_err(|_| {
        for path in [&paths.data, &paths.index] {
            let _ = std::fs::remove_file(path);
        }
    })?;
    Ok(config)
}

/// The mode of a config that repeats what `base` says: its owner's, and no more to others than they
/// may read there, as an address in it may hold a password.
fn config_mode(base: Option<&Path>) -> Result<u32> {
    let Some(base) = base else { return Ok(0o666) };
    let told = |error| Error::io(format!("look at {}", base.display()), &error);
    let mode = base.metadata().map_err(told)?.permissions().mode();
    Ok(0o666 & (mode | 0o600))
}

/// Writes a file that must not be there yet: whole, or not at all.
fn write_new(path: &Path, text: &[u8], mode: u32) -> Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    let mut options = std::fs::File::options();
    let made = options.write(true).create(true).truncate(true).mode(mode).open(&draft);
    let written = made.and_then(|mut file| {
        file.write_all(text)?;
        file.sync_all()?;
        // Fails when somebody else has that name, which a rename would not.
        match std::fs::hard_link(&draft, path) {
            // A file system without hard links; the look before has to do.
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                std::fs::rename(&draft, path)?;
            }
            linked => linked?,
        }
        std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    });
    let _ = std::fs::remove_file(&draft);
    written.map_err(|error| Error::io(format!("write {}", path.display()), &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_new_disk_is_a_config_that_opens_with_its_size() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        let config = create_disk(&disk, Some(1 << 20), None, false).unwrap();
        assert_eq!(config, disk.join("config.v1.json"));
        assert_eq!(Image::open_config(&config, None).unwrap().virtual_bytes(), 1 << 20);
        let again = create_disk(&disk, Some(1 << 20), None, false).unwrap_err();
        assert!(again.to_string().contains("make"), "{again}");
        assert!(config.exists(), "what was there stays");
    }

    #[test]
    fn a_disk_needs_a_size_and_no_second_upper() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        let kind =
            |size, base: Option<&Path>| create_disk(&disk, size, base, false).unwrap_err().kind();
        assert_eq!(kind(None, None), ErrorKind::Usage);
        assert_eq!(kind(Some(1000), None), ErrorKind::InvalidConfig);
        let first = create_disk(&folder.path().join("first"), Some(4096), None, false).unwrap();
        assert_eq!(kind(None, Some(&first)), ErrorKind::Usage);
        assert!(!disk.join("config.v1.json").exists());
    }

    /// A power cut between two steps left files that the next attempt took for somebody's disk.
    #[test]
    fn what_an_attempt_left_that_was_cut_off_is_not_in_the_way_of_the_next() {
        for sparse in [false, true] {
            let whole = tempfile::tempdir().unwrap();
            create_disk(whole.path(), Some(1 << 20), None, sparse).unwrap();
            for left in [
                &["writable_data.new"][..],
                &["writable_data.new", "writable_index.new"],
                &["writable_index", "writable_data.new"],
                &["writable_index", "writable_data"],
                &["writable_index", "writable_data", "config.v1.json.new"],
            ] {
                let folder = tempfile::tempdir().unwrap();
                for name in left {
                    let target = folder.path().join(name);
                    if name.ends_with(".new") {
                        std::fs::write(target, b"torn").unwrap();
                    } else if sparse && *name == "writable_data" {
                        let file = std::fs::File::create(&target).unwrap();
                        let header = std::fs::read(whole.path().join(name)).unwrap();
                        file.write_all_at(&header[..4096], 0).unwrap();
                        file.set_len(4096 + (1 << 20)).unwrap();
                    } else {
                        std::fs::copy(whole.path().join(name), target).unwrap();
                    }
                }
                let config = create_disk(folder.path(), Some(2 << 20), None, sparse).unwrap();
                assert_eq!(Image::open_config(&config, None).unwrap().virtual_bytes(), 2 << 20);
                let mut names: Vec<_> = std::fs::read_dir(folder.path())
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                    .collect();
                names.sort();
                assert_eq!(
                    names,
                    ["config.v1.json", "writable_data", "writable_index"],
                    "{left:?}"
                );
            }
        }
    }

    #[test]
    fn a_pair_that_was_used_is_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let config = create_disk(folder.path(), Some(1 << 20), None, false).unwrap();
        std::fs::remove_file(&config).unwrap();
        let paths = upper::PairPaths {
            data: folder.path().join("writable_data"),
            index: folder.path().join("writable_index"),
        };
        let options = upper::PairOptions {
            journal_folder: folder.path().join("run"),
            ..upper::PairOptions::default()
        };
        let pair = upper::Pair::open(&paths, &options).unwrap();
        let refused = || create_disk(folder.path(), Some(1 << 20), None, false).unwrap_err();
        assert!(refused().to_string().contains("make"));
        pair.close().unwrap();
        drop(pair);
        assert!(refused().to_string().contains("make"));
        assert!(paths.data.exists() && paths.index.exists());
    }
}
