//! Layers that lie elsewhere: what is read, and what is known to wait.

use crate::disk::{Disk, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{SegmentMapping, write_sealed};
use crate::image::{Layer, Stack};
use crate::source::{RemoteBlob, Source};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SECTORS: u64 = 400;

/// A blob of which the bytes up to some place are here. What is read is here from then on.
#[derive(Debug)]
struct Far {
    bytes: Vec<u8>,
    here_bytes: AtomicU64,
    canceled: AtomicBool,
}

impl RemoteBlob for Far {
    fn name(&self) -> &str {
        "far away"
    }

    fn bytes(&self) -> u64 {
        u64::try_from(self.bytes.len()).unwrap()
    }

    fn read(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        if self.canceled.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Canceled, "over"));
        }
        let start = usize::try_from(offset_bytes).unwrap();
        dst.copy_from_slice(&self.bytes[start..start + dst.len()]);
        let end = offset_bytes + u64::try_from(dst.len()).unwrap();
        self.here_bytes.fetch_max(end, Ordering::Relaxed);
        Ok(())
    }

    fn is_here(&self, offset_bytes: u64, bytes: u64) -> bool {
        offset_bytes + bytes <= self.here_bytes.load(Ordering::Relaxed)
    }

    fn cancel(&self) {
        self.canceled.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_layer_elsewhere_is_read_as_one_here_and_says_what_waits() {
    let data: Vec<u8> = (0..512 * SECTORS).map(|i| (i / 512 % 250) as u8 + 1).collect();
    let segment = |start_sector, sectors, mapped_sector, zeroed| SegmentMapping {
        start_sector,
        sectors,
        mapped_sector,
        zeroed,
        tag: 0,
    };
    // Sector N of the disk from 100 on is sector N - 92 of the file.
    let index = [segment(0, 50, 8, true), segment(100, SECTORS, 8, false)];
    let bytes = write_sealed(&index, &data, 512 * 1000);
    let far = Arc::new(Far { bytes, here_bytes: AtomicU64::new(0), canceled: false.into() });
    let source = Source::Remote(Arc::clone(&far) as Arc<dyn RemoteBlob>);
    let layer = Layer::open_sealed("far".to_owned(), source).unwrap();
    let image = Stack::from_layers(vec![layer]).unwrap().into_image().unwrap();
    assert!(image.may_wait());
    let mut reader = image.worker().unwrap();
    // As far as the file's bytes up to the disk's sector 200 are here.
    far.here_bytes.store(512 * (200 - 92), Ordering::Relaxed);
    for (sectors, waits) in [
        (0..100, false),
        (60..61, false),
        (100..200, false),
        (199..201, true),
        (200..201, true),
        (0..1000, true),
        (500..1000, false),
        (990..2000, false),
    ] {
        assert_eq!(reader.would_wait(sectors.clone()), waits, "{sectors:?}");
    }
    let mut found = vec![0xee; 512 * 1000];
    reader.read(0, &mut found).unwrap();
    let mut expected = vec![0; 512 * 1000];
    expected[512 * 100..512 * 500].copy_from_slice(&data);
    assert!(found == expected);
    assert!(!reader.would_wait(0..1000), "all of it is here now");
    image.cancel();
    assert_eq!(reader.read(200, &mut [0; 512]).unwrap_err().kind(), ErrorKind::Canceled);
    assert!(reader.read(0, &mut [0; 512]).is_ok(), "zeros are nowhere else");
}
