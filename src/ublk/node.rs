//! Waiting for `/dev/ublkbN`.
//!
//! devtmpfs makes the node inside START_DEV, but `/dev` may be udev's or a container's, and a
//! stale node of an earlier device may lie there: only a node with the right number counts.

use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the node may take to appear. udev with a slow rule needs a second or two.
const NODE_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest pause between two looks.
const POLL_PAUSE_MAX: Duration = Duration::from_millis(20);

/// Returns once `/dev/ublkbN` of device `id` can be opened.
pub(super) fn wait_usable(id: u32) -> Result<()> {
    let path = format!("/dev/ublkb{id}");
    let numbers = Path::new("/sys/block").join(format!("ublkb{id}")).join("dev");
    let deadline = Instant::now() + NODE_TIMEOUT;
    let mut pause = Duration::from_micros(200);
    loop {
        let Err(why) = try_open(Path::new(&path), &numbers) else { return Ok(()) };
        if Instant::now() >= deadline {
            let seconds = NODE_TIMEOUT.as_secs();
            let message = format!("{path} could not be opened within {seconds} s: {why}");
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(POLL_PAUSE_MAX);
    }
}

fn try_open(path: &Path, numbers: &Path) -> Result<(), String> {
    let node = File::open(path).map_err(|error| error.to_string())?;
    let metadata = node.metadata().map_err(|error| error.to_string())?;
    let numbers = std::fs::read_to_string(numbers).map_err(|error| error.to_string())?;
    let found = device_text(metadata.rdev());
    if metadata.file_type().is_block_device() && found == numbers.trim() {
        Ok(())
    } else {
        Err(format!("it is device {found}, expected {}", numbers.trim()))
    }
}

/// A device number as sysfs prints it.
fn device_text(number: u64) -> String {
    format!("{}:{}", libc::major(number), libc::minor(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_another_device_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let numbers = folder.path().join("dev");
        std::fs::write(&numbers, "259:4\n").unwrap();
        // A character device whose numbers are 1:3.
        let why = try_open(Path::new("/dev/null"), &numbers).unwrap_err();
        assert_eq!(why, "it is device 1:3, expected 259:4");
        std::fs::write(&numbers, "1:3\n").unwrap();
        assert!(try_open(Path::new("/dev/null"), &numbers).is_err(), "no block device");
        assert!(try_open(&folder.path().join("none"), &numbers).is_err());
    }
}
