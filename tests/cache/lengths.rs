//! Blobs of which a config tells another length than they have.

use crate::source::{Blob, open};
use crate::{EXTENT, blob_in, check_read, maintenance};
use obd_ublk::cache::Promotion;
use obd_ublk::source::RemoteBlob as _;
use std::sync::Arc;

#[test]
fn a_wrong_length_in_a_config_removes_nothing_that_was_stored() {
    let folder = tempfile::tempdir().unwrap();
    let blob = Blob::new(40, 10 * EXTENT, EXTENT);
    let told = Arc::new(Blob {
        digest: blob.digest,
        ..Arc::into_inner(Blob::new(40, 9 * EXTENT, EXTENT)).unwrap()
    });
    let extents = |length| (0..length).map(|_| 1).collect::<Vec<u64>>();
    for is_whole in [false, true] {
        check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 10 * EXTENT);
        if is_whole {
            assert_eq!(maintenance(folder.path()).promote(&blob.digest).unwrap(), Promotion::Done);
        }
        // Read past the cache.
        let wrong = blob_in(&open(folder.path(), 4096), &told);
        check_read(&wrong, &told, 0, 9 * EXTENT);
        assert!(!wrong.is_here(0, 1));
        drop(wrong);
        check_read(&blob_in(&open(folder.path(), 4096), &blob), &blob, 0, 10 * EXTENT);
        assert_eq!(blob.times(), extents(10), "{is_whole}: all of it was kept");
    }
    // Where nothing was stored, the right length finds room.
    let folder = tempfile::tempdir().unwrap();
    drop(blob_in(&open(folder.path(), 4096), &told));
    let cached = blob_in(&open(folder.path(), 4096), &blob);
    check_read(&cached, &blob, 0, 10 * EXTENT);
    assert!(cached.is_complete());
}
