//! A registry that does what it is told, with one blob in it, and reads of that blob.

// Each test file uses a part of it.
#![allow(dead_code)]

use crate::mock::Mock;
use obd_ublk::error::Result;
use obd_ublk::registry::{Blob, Digest, Options, Registry};
use obd_ublk::source::Fetch;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(crate) const REPOSITORY: &str = "a/b";

/// How late a read may be on a machine that has more to do than processors.
pub(crate) const LATE: Duration = Duration::from_secs(1);

/// A mock with one blob.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) mock: Mock,
    pub(crate) content: Arc<[u8]>,
    pub(crate) digest: String,
}

impl Lab {
    /// With a blob of 100,000 bytes.
    pub(crate) fn new() -> Self {
        Self::with_content(100_000)
    }

    pub(crate) fn with_content(bytes: usize) -> Self {
        Self::at(Mock::start(), bytes)
    }

    pub(crate) fn at(mock: Mock, bytes: usize) -> Self {
        Self::of(mock, content(bytes, 7))
    }

    pub(crate) fn of(mock: Mock, content: Vec<u8>) -> Self {
        let content: Arc<[u8]> = content.into();
        let digest = Digest::of(&content).to_string();
        mock.state().content.blobs.insert(digest.clone(), Arc::clone(&content));
        Self { mock, content, digest }
    }

    pub(crate) fn registry(&self, options: Options) -> Arc<Registry> {
        Registry::new(options).unwrap()
    }

    pub(crate) fn blob(&self, registry: &Arc<Registry>) -> Blob {
        let bytes = u64::try_from(self.content.len()).ok();
        let place = self.mock.blobs_of(REPOSITORY);
        registry.blob(&place, &self.digest, bytes, Instant::now()).unwrap()
    }

    pub(crate) fn read(&self, blob: &Blob, range: Range<u64>, time: Duration) -> Result<Vec<u8>> {
        let length = usize::try_from(range.end - range.start).unwrap();
        let mut bytes = vec![0; length];
        blob.fetch(range.start, &mut bytes, Instant::now() + time)?;
        Ok(bytes)
    }
}

/// Bytes of which no two places look alike.
pub(crate) fn content(bytes: usize, seed: u64) -> Vec<u8> {
    let words = (0..).flat_map(|number| crate::mock::fault::mix(seed, number).to_le_bytes());
    words.take(bytes).collect()
}

/// What this thread logs, at every level.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn captured_log() -> (Log, tracing::subscriber::DefaultGuard) {
    let log = Log::default();
    let written = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || written.clone())
        .finish();
    (log, tracing::subscriber::set_default(subscriber))
}
