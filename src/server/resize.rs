//! A larger disk while it is attached: `resize` of a device.
//!
//! ```text
//!   can the kernel? -- writes stop -- flush, headers of the pair -- writes go on
//!                                        -- kernel: UPDATE_SIZE -- state file
//! ```
//!
//! The pair first: a server that dies in between comes back with a disk that is larger than its
//! device, which harms nobody, and the same resize once more ends it. A device is never larger than
//! its disk.

use super::control::{Event, ResizeWish, Resized};
use super::kernel::{Kernel, Served};
use super::portable::Kept;
use super::served::Up;
use super::turn::caught;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{bytes_to_sectors, sectors_to_bytes};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long writes in flight may take to end before a resize is given up.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);

/// Whether the disk can grow at all, before anything is touched.
///
/// # Errors
/// `Unsupported` by this kernel or for this kind of upper, `ReadOnly`.
pub(super) fn check<K: Kernel>(kernel: &K, kept: &dyn Kept, is_written: bool) -> Result<()> {
    if kept.live().is_some() {
        return kernel.check_resize();
    }
    if is_written {
        let message = "an upper in sparse form keeps its size while it is attached";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Err(Error::new(ErrorKind::ReadOnly, "the device takes no writes, and has the image's size"))
}

/// Makes the pair larger; the size that it had. Takes as long as its flush. Not for the server's
/// loop.
///
/// # Errors
/// As `Pair::grow`; `Timeout` when writes in flight do not end.
pub(super) fn grow(kept: &dyn Kept, bytes: u64) -> Result<u64> {
    let gone = || Error::new(ErrorKind::ReadOnly, "the device takes no writes");
    let live = kept.live().ok_or_else(gone)?;
    // Most of what is unflushed goes now, so that the pause is short.
    live.current().flush()?;
    live.pause(Instant::now() + DRAIN_PATIENCE, |image| image.pair().grow(bytes))
}

/// Writes down what the device is now and tells the kernel.
pub(super) fn finish<K: Kernel>(
    up: &mut Up<K::Device>,
    kernel: &K,
    bytes: u64,
    grown: Result<u64>,
) -> Result<u64> {
    let before = grown?;
    let sectors = bytes_to_sectors(bytes).unwrap_or(0);
    if up.device.is_gone() {
        return Err(Error::new(ErrorKind::NotFound, "the device went away meanwhile"));
    }
    kernel.resize(up.state.id, sectors)?;
    up.state.size_bytes = sectors_to_bytes(sectors);
    if let Err(error) = up.state.save(up.slot.path()) {
        // What it says there is told to people and decides nothing.
        tracing::warn!("after a resize: {error:#}");
    }
    tracing::info!(before, bytes, "the disk is larger");
    Ok(before)
}

/// The work of a resize, and the event that tells of its end.
pub(super) fn work(kept: &Arc<dyn Kept>, wish: ResizeWish) -> Event {
    let ResizeWish { bytes, answer } = wish;
    let grown = caught("resize", || grow(&**kept, bytes));
    Event::Resized(Box::new(Resized { bytes, grown, answer }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Disk, Worker};
    use crate::server::fake::FakeKernel;
    use crate::server::served_disk::{How, ServedDisk, make_pair};
    use crate::upper::{Form, PairPaths};

    const BYTES: u64 = 1 << 20;

    fn disk(folder: &std::path::Path, form: Form) -> ServedDisk {
        let upper = PairPaths { data: folder.join("data"), index: folder.join("index") };
        if !upper.data.exists() {
            make_pair(&upper, BYTES, form).unwrap();
        }
        let config = serde_json::json!({
            "lowers": [], "upper": {"data": upper.data, "index": upper.index},
        });
        let how =
            How { read_only: false, make_upper: false, quota_bytes: None, io_deadline_s: None };
        let text = serde_json::to_vec(&config).unwrap();
        ServedDisk::open(&folder.join("config.json"), &text, None, how).unwrap()
    }

    #[test]
    fn a_disk_that_is_written_meanwhile_grows_and_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path(), Form::Append);
        assert!(check(&FakeKernel::default(), &disk, true).is_ok());
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..3_u8 {
                let (disk, stop) = (&disk, &stop);
                scope.spawn(move || {
                    let mut worker = disk.worker().unwrap();
                    let mut byte = 0_u8;
                    while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                        byte = byte.wrapping_add(1);
                        worker.write(u64::from(thread), &[byte; 512]).unwrap();
                        let mut found = vec![0; 512];
                        worker.read(u64::from(thread), &mut found).unwrap();
                        assert!(found == [byte; 512], "thread {thread}");
                    }
                });
            }
            for times in 1..=20 {
                assert_eq!(grow(&disk, (times + 1) * BYTES).unwrap(), times * BYTES);
                assert_eq!(disk.geometry().sectors, (times + 1) * BYTES / 512);
            }
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        let end = 21 * BYTES / 512;
        disk.worker().unwrap().write(end - 1, &[7; 512]).unwrap();
        let error = disk.worker().unwrap().write(end, &[7; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        disk.close().unwrap();
        drop(disk);
        let disk = self::disk(folder.path(), Form::Append);
        assert_eq!(disk.geometry().sectors, end);
        let mut found = vec![0; 512];
        disk.worker().unwrap().read(end - 1, &mut found).unwrap();
        assert_eq!(found, [7; 512]);
    }

    #[test]
    fn what_cannot_grow_is_refused_before_anything_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path(), Form::Sparse { over_lowers: false });
        let kernel = FakeKernel::default();
        let kind = |written| check(&kernel, &disk, written).unwrap_err().kind();
        assert_eq!(kind(true), ErrorKind::Unsupported);
        assert_eq!(kind(false), ErrorKind::ReadOnly);
        assert_eq!(grow(&disk, 2 * BYTES).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(disk.geometry().sectors, BYTES / 512);
    }
}
