//! Where the first touches of an image are kept between two attaches: a trace by the name of the
//! image's layers, beside the cache.

use super::touches::join;
use super::trace_file;
use crate::error::{Error, ErrorKind, Result};
use crate::format::config::ImageConfig;
use crate::format::trace::{self, Record, Trace};
use crate::limits::{RECORD_BYTES_MAX, TOUCH_LOG_BYTES_MAX, TOUCH_LOGS_MAX};
use sha2::{Digest, Sha256};
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The log of one image.
#[derive(Debug)]
pub(super) struct TouchLog {
    folder: PathBuf,
    path: PathBuf,
}

impl TouchLog {
    /// That of the image of a config. Images of the same layers in the same order share it.
    pub(super) fn of(folder: &Path, config: &ImageConfig) -> Self {
        let mut hash = Sha256::new();
        for lower in config.stack_lowers() {
            let name =
                [&lower.digest, &lower.file, &lower.dir].into_iter().find(|it| !it.is_empty());
            hash.update(name.map(String::as_bytes).unwrap_or_default());
            hash.update(b"\n");
        }
        let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { folder: folder.to_owned(), path: folder.join(name) }
    }

    /// What was learned last time.
    pub(super) fn load(&self) -> Option<Trace> {
        match trace_file::load(&self.path, TOUCH_LOG_BYTES_MAX) {
            Ok(trace) => Some(trace),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "what was touched first is forgotten");
                let _ = std::fs::remove_file(&self.path);
                None
            }
        }
    }

    /// Keeps what was learned now, unless much more is known already: a device that was hardly used
    /// teaches little.
    pub(super) fn save(&self, records: Vec<Record>) {
        let records = join(&records, RECORD_BYTES_MAX);
        let known = self.load().map_or(0, |trace| bytes_of(&trace.records));
        if records.is_empty() || bytes_of(&records) < known / 2 {
            return;
        }
        if let Err(error) = self.write(&trace::encode(&Trace { records })) {
            let error = format!("{error:#}");
            tracing::warn!(error, "what was touched first is not kept");
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<()> {
        let named = |error: io::Error| Error::io(format!("write {}", self.path.display()), &error);
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder).map_err(named)?;
        self.make_room().map_err(named)?;
        let beside = self.path.with_extension(std::process::id().to_string());
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let written = options
            .open(&beside)
            .and_then(|mut file| file.write_all(bytes))
            .and_then(|()| std::fs::rename(&beside, &self.path));
        // Not synced: a torn one has a wrong checksum and is forgotten.
        written.map_err(|error| {
            let _ = std::fs::remove_file(&beside);
            named(error)
        })
    }

    /// Removes the oldest logs when there are too many.
    fn make_room(&self) -> io::Result<()> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.folder)?.take(8 * TOUCH_LOGS_MAX) {
            let entry = entry?;
            let changed = entry.metadata().and_then(|metadata| metadata.modified());
            found.push((changed.unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
        }
        found.sort();
        let excess = (found.len() + 1).saturating_sub(TOUCH_LOGS_MAX);
        for (_, path) in found.into_iter().take(excess) {
            // Another process may have done so.
            let _ = std::fs::remove_file(path);
        }
        Ok(())
    }
}

fn bytes_of(records: &[Record]) -> u64 {
    records.iter().map(|record| record.bytes).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::trace::Op;

    fn config(digests: &[&str]) -> ImageConfig {
        let lowers: Vec<_> =
            digests.iter().map(|digest| serde_json::json!({"digest": digest})).collect();
        let config = serde_json::json!({"repoBlobUrl": "https://r/v2/x/blobs", "lowers": lowers});
        ImageConfig::parse(config.to_string().as_bytes()).unwrap()
    }

    fn records(count: u64) -> Vec<Record> {
        let record = |n| Record { op: Op::Read, layer_index: 0, bytes: 8, offset_bytes: n * 100 };
        (0..count).map(record).collect()
    }

    #[test]
    fn what_was_learned_is_found_by_the_layers_and_not_replaced_by_little() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("touched");
        let log = TouchLog::of(&folder, &config(&["sha256:a", "sha256:b"]));
        assert_eq!(log.load(), None);
        log.save(Vec::new());
        assert!(!folder.exists(), "nothing learned, nothing made");
        log.save(records(10));
        let found = |digests: &[&str]| TouchLog::of(&folder, &config(digests)).load();
        assert_eq!(found(&["sha256:a", "sha256:b"]).unwrap().records, records(10));
        assert_eq!(found(&["sha256:b", "sha256:a"]), None);
        log.save(records(4));
        assert_eq!(log.load().unwrap().records.len(), 10, "less than half");
        log.save(records(5));
        assert_eq!(log.load().unwrap().records.len(), 5);
        std::fs::write(&log.path, "damaged").unwrap();
        assert_eq!(log.load(), None);
        assert!(!log.path.exists());
    }

    #[test]
    fn the_longest_log_that_we_write_is_read_and_none_that_is_longer() {
        let folder = tempfile::tempdir().unwrap();
        let log = TouchLog::of(folder.path(), &config(&["sha256:a"]));
        let longest = crate::units::to_u64(crate::limits::TOUCH_RECORDS_MAX);
        log.save(records(longest));
        assert_eq!(log.load().unwrap().records, records(longest));
        let records = records(TOUCH_LOG_BYTES_MAX / 24);
        std::fs::write(&log.path, trace::encode(&Trace { records })).unwrap();
        assert_eq!(log.load(), None);
        assert!(!log.path.exists());
    }

    #[test]
    fn the_oldest_logs_make_room() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..TOUCH_LOGS_MAX + 5 {
            std::fs::write(folder.path().join(number.to_string()), "").unwrap();
        }
        TouchLog::of(folder.path(), &config(&["sha256:a"])).save(records(1));
        let left = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, TOUCH_LOGS_MAX);
    }
}
