//! Where the first touches of an image are kept between two attaches: a trace by the name of the
//! image's layers, beside the cache.

use super::touches::join;
use crate::cache::{BlobDigest, TouchLogs};
use crate::error::ErrorKind;
use crate::format::config::ImageConfig;
use crate::format::trace::{self, Record, Trace};
use crate::limits::RECORD_BYTES_MAX;
use sha2::{Digest, Sha256};

/// The log of one image.
#[derive(Debug)]
pub(super) struct TouchLog {
    logs: TouchLogs,
    name: BlobDigest,
}

impl TouchLog {
    /// That of the image of a config. Images of the same layers in the same order share it.
    pub(super) fn of(logs: TouchLogs, config: &ImageConfig) -> Self {
        let mut hash = Sha256::new();
        for lower in config.stack_lowers() {
            let name =
                [&lower.digest, &lower.file, &lower.dir].into_iter().find(|it| !it.is_empty());
            hash.update(name.map(String::as_bytes).unwrap_or_default());
            hash.update(b"\n");
        }
        Self { logs, name: BlobDigest::new(hash.finalize().into()) }
    }

    /// What was learned last time.
    pub(super) fn load(&self) -> Option<Trace> {
        let read = self.logs.read(&self.name);
        let error = match read.and_then(|bytes| trace::parse(&bytes)) {
            Ok(trace) => return Some(trace),
            Err(error) => error,
        };
        match error.kind() {
            ErrorKind::NotFound => {}
            // Not ours to remove.
            ErrorKind::InvalidConfig => tracing::warn!("no log of first touches: {error:#}"),
            _ => {
                let error = format!("{error:#}");
                tracing::warn!(error, "what was touched first is forgotten");
                let _ = self.logs.remove(&self.name);
            }
        }
        None
    }

    /// Keeps what was learned now, unless much more is known already: a device that was hardly used
    /// teaches little.
    pub(super) fn save(&self, records: Vec<Record>) {
        let records = join(&records, RECORD_BYTES_MAX);
        let known = self.load().map_or(0, |trace| bytes_of(&trace.records));
        if records.is_empty() || bytes_of(&records) < known / 2 {
            return;
        }
        // Not synced: a torn one has a wrong checksum and is forgotten.
        if let Err(error) = self.logs.write(&self.name, &trace::encode(&Trace { records })) {
            let error = format!("{error:#}");
            tracing::warn!(error, "what was touched first is not kept");
        }
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
        let root = tempfile::tempdir().unwrap();
        let logs = TouchLogs::of(root.path());
        let log = TouchLog::of(logs.clone(), &config(&["sha256:a", "sha256:b"]));
        assert_eq!(log.load(), None);
        log.save(Vec::new());
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "nothing learned");
        log.save(records(10));
        let found = |digests: &[&str]| TouchLog::of(logs.clone(), &config(digests)).load();
        assert_eq!(found(&["sha256:a", "sha256:b"]).unwrap().records, records(10));
        assert_eq!(found(&["sha256:b", "sha256:a"]), None);
        log.save(records(4));
        assert_eq!(log.load().unwrap().records.len(), 10, "less than half");
        log.save(records(5));
        assert_eq!(log.load().unwrap().records.len(), 5);
        logs.write(&log.name, b"damaged").unwrap();
        assert_eq!(log.load(), None);
        assert_eq!(logs.list().unwrap(), []);
    }

    #[test]
    fn the_longest_log_that_we_write_is_read_and_none_that_is_longer() {
        let root = tempfile::tempdir().unwrap();
        let logs = TouchLogs::of(root.path());
        let log = TouchLog::of(logs.clone(), &config(&["sha256:a"]));
        let longest = crate::units::to_u64(crate::limits::TOUCH_RECORDS_MAX);
        log.save(records(longest));
        assert_eq!(log.load().unwrap().records, records(longest));
        let records = records(crate::limits::TOUCH_LOG_BYTES_MAX / 24);
        logs.write(&log.name, &trace::encode(&Trace { records })).unwrap();
        assert_eq!(log.load(), None);
        assert_eq!(logs.list().unwrap(), []);
    }
}
