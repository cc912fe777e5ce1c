//! Keeping the quota: whole files are unlinked, those that were not used longest first.
//!
//! Blobs that nobody has open go first. Of the others only those that were not read for a while:
//! their readers go on with the unlinked files and let go of them at their next miss or tick, which
//! is when the space comes back. Nothing is ever cut or punched.

use super::listing::{Entry, is_recent, list};
use super::store::Folder;
use crate::error::Result;
use crate::limits::CACHE_IDLE_MS;
use std::time::{Duration, SystemTime};

/// What a look at the quota came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trimmed {
    /// Bytes that are taken now.
    pub bytes: u64,
    /// Bytes that the removed files took.
    pub removed_bytes: u64,
    /// Blobs whose files were removed.
    pub removed: u64,
    /// Blobs whose files should have been removed and could not be.
    pub stuck: u64,
}

/// Makes sure that no more than the quota is taken; once it is exceeded, a sixteenth less, so that
/// not every fill evicts. With `make_room` an eighth of what is taken goes in any case.
pub(super) fn keep_quota(folder: &Folder, quota_bytes: u64, make_room: bool) -> Result<Trimmed> {
    let taken = taken_bytes(&list(folder)?);
    if make_room {
        return trim(folder, (taken - taken / 8).min(quota_bytes), SystemTime::now());
    }
    if taken <= quota_bytes {
        return Ok(Trimmed { bytes: taken, ..Trimmed::default() });
    }
    trim(folder, quota_bytes - quota_bytes / 16, SystemTime::now())
}

/// Evicts until no more than `target_bytes` are taken, or nothing more may go. What cannot be
/// removed is passed over: it would be the first each time, and nothing behind it would ever go.
pub(super) fn trim(folder: &Folder, target_bytes: u64, now: SystemTime) -> Result<Trimmed> {
    let lock = folder.lock()?;
    // Listed under the lock: nobody opens one of them meanwhile.
    let entries = list(folder)?;
    let mut trimmed = Trimmed { bytes: taken_bytes(&entries), ..Trimmed::default() };
    for entry in victims(entries, now) {
        if trimmed.bytes <= target_bytes {
            break;
        }
        let removed = if entry.is_whole {
            folder.remove_whole(&entry.digest, &lock)
        } else {
            folder.remove_pair(&entry.digest, &lock)
        };
        if let Err(error) = removed {
            let (digest, error) = (entry.digest, format!("{error:#}"));
            // A disk that cannot be written refuses all of them: told once.
            if trimmed.stuck == 0 {
                tracing::warn!(%digest, error, "cannot be evicted");
            } else {
                tracing::debug!(%digest, error, "cannot be evicted");
            }
            trimmed.stuck += 1;
            continue;
        }
        tracing::debug!(digest = %entry.digest, bytes = entry.disk_bytes, "evicted");
        trimmed.bytes = trimmed.bytes.saturating_sub(entry.disk_bytes);
        trimmed.removed_bytes += entry.disk_bytes;
        trimmed.removed += 1;
    }
    Ok(trimmed)
}

fn taken_bytes(entries: &[Entry]) -> u64 {
    let counted = entries.iter().filter(|entry| !entry.is_linked_elsewhere);
    counted.map(|entry| entry.disk_bytes).sum()
}

/// What may be evicted, in order.
fn victims(mut entries: Vec<Entry>, now: SystemTime) -> Vec<Entry> {
    let idle = Duration::from_millis(CACHE_IDLE_MS);
    entries.retain(|entry| {
        let busy = entry.in_use && is_recent(entry, now, idle);
        !entry.is_linked_elsewhere && !busy
    });
    entries.sort_by_key(|entry| (entry.in_use, entry.last_used));
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::BlobDigest;

    #[test]
    fn the_longest_unused_goes_first_and_open_ones_last_if_at_all() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10_000);
        let entry = |name: u8, age_seconds: u64, in_use: bool, linked: bool| Entry {
            digest: BlobDigest::new([name; 32]),
            is_whole: false,
            blob_bytes: 1,
            disk_bytes: 1,
            last_used: now - Duration::from_secs(age_seconds),
            in_use,
            is_linked_elsewhere: linked,
        };
        let entries = vec![
            entry(1, 10, false, false),
            entry(2, 500, true, false),
            entry(3, 5, true, false),
            entry(4, 900, false, true),
            entry(5, 300, false, false),
            entry(6, 70, true, false),
        ];
        assert_eq!(taken_bytes(&entries), 5);
        let order = victims(entries, now).into_iter().map(|entry| entry.digest.as_bytes()[0]);
        assert_eq!(order.collect::<Vec<_>>(), [5, 1, 2, 6]);
    }
}
