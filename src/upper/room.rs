//! How much room a pair has left: the warning before writes fail with ENOSPC.
//!
//! Looked at with each flush, never with a write: the quota by two numbers that are at hand, the
//! file system below at most once a second, because it may have to ask another host. What is said
//! is said once; it is taken back only when there is clearly more room again, so that a pair at
//! the edge does not fill the log.

use super::storage::{FileSystemRoom, Storage};
use super::{Pair, Usage, lock};
use crate::limits::{
    UPPER_QUOTA_CALM_PERCENT, UPPER_QUOTA_WARN_PERCENT, UPPER_ROOM_BYTES_MIN, UPPER_ROOM_CHECK_MS,
};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What was found out about the room, and said.
#[derive(Debug, Default)]
pub(super) struct Room {
    looked: Option<Instant>,
    below: Option<FileSystemRoom>,
    warning: Option<String>,
}

impl Room {
    /// What was said and still holds.
    pub(super) fn warning(&self) -> Option<String> {
        self.warning.clone()
    }

    /// Whether the file system is to be asked at `now`; the next time is reckoned from there.
    fn is_due(&mut self, now: Instant) -> bool {
        let pause = Duration::from_millis(UPPER_ROOM_CHECK_MS);
        let due = self.looked.is_none_or(|looked| now.duration_since(looked) >= pause);
        if due {
            self.looked = Some(now);
        }
        due
    }

    /// Weighs what is known: the warning, if it is a new one, or an empty text when one is over.
    fn judge(&mut self, usage: &Usage) -> Option<String> {
        let warned = self.warning.is_some();
        let percent = if warned { UPPER_QUOTA_CALM_PERCENT } else { UPPER_QUOTA_WARN_PERCENT };
        let by_quota = usage.quota_percent().filter(|used| *used >= percent).map(|used| {
            let (bytes, quota) = (usage.used_bytes(), usage.quota_bytes.unwrap_or(0));
            format!("{used} % of the quota are used: {bytes} of {quota} bytes")
        });
        let by_file_system = self.below.and_then(|below| {
            let least = least_room(below.total_bytes);
            let least = if warned { least.saturating_mul(2) } else { least };
            let left = below.available_bytes;
            let told = || format!("the file system below has {left} bytes left");
            (left < least).then(told)
        });
        let found = match (by_quota, by_file_system) {
            (Some(one), Some(other)) => Some(format!("{one}; {other}")),
            (one, other) => one.or(other),
        };
        self.warning = found;
        match (warned, &self.warning) {
            (false, Some(warning)) => Some(warning.clone()),
            (true, None) => Some(String::new()),
            _ => None,
        }
    }
}

/// From how many bytes down a file system of `total_bytes` is nearly full.
fn least_room(total_bytes: u64) -> u64 {
    UPPER_ROOM_BYTES_MIN.min(total_bytes / 20)
}

impl Usage {
    /// Bytes of the data file that cannot be written again: what counts against the quota.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.file_bytes.saturating_sub(self.free_bytes)
    }

    /// How much of the quota that is, in percent, if there is one.
    #[must_use]
    pub fn quota_percent(&self) -> Option<u64> {
        let quota = u128::from(self.quota_bytes?.max(1));
        u64::try_from(u128::from(self.used_bytes()) * 100 / quota).ok()
    }
}

impl Pair {
    /// What there is to say about the room that is left, as of the last flush.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        lock(&self.room).warning()
    }

    /// Looks how much room is left, and says so once when it is little.
    pub(super) fn watch_room(&self) {
        watch(&self.room, self.data.as_ref(), &self.name, &self.usage());
    }
}

/// Looks how much room is left for the upper that is called `name`, and says so once when it is
/// little.
pub(super) fn watch(room: &Mutex<Room>, data: &dyn Storage, name: &str, usage: &Usage) {
    let is_due = lock(room).is_due(Instant::now());
    // A file system that cannot tell is not one that is full.
    let below = is_due.then(|| data.room().ok().flatten());
    let mut room = lock(room);
    if let Some(below) = below {
        room.below = below;
    }
    let news = room.judge(usage);
    drop(room);
    match news.as_deref() {
        None => {}
        Some("") => tracing::info!("{name}: there is room again"),
        Some(warning) => tracing::warn!("{name}: {warning}; writes may soon fail"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(file_bytes: u64, free_bytes: u64) -> Usage {
        Usage {
            live_bytes: 0,
            file_bytes,
            dead_bytes: 0,
            free_bytes,
            index_bytes: 4096,
            unflushed_entries: 0,
            quota_bytes: Some(1000),
        }
    }

    #[test]
    fn a_warning_is_said_once_and_taken_back_when_there_is_clearly_more_room() {
        let mut room = Room::default();
        let warning = "90 % of the quota are used: 900 of 1000 bytes";
        for (file_bytes, free_bytes, said) in [
            (899, 0, None),
            (1000, 100, Some(warning)),
            (1000, 0, None),
            (900, 50, None),
            (799, 0, Some("")),
            (899, 0, None),
            (900, 0, Some(warning)),
        ] {
            let found = room.judge(&usage(file_bytes, free_bytes));
            assert_eq!(found.as_deref(), said, "{file_bytes} with {free_bytes} free");
        }
        assert_eq!(room.warning.as_deref(), Some(warning));
    }

    #[test]
    fn a_file_system_that_is_nearly_full_is_told_by_its_own_size() {
        for (available_bytes, total_bytes, is_low) in [
            (UPPER_ROOM_BYTES_MIN - 1, 1 << 40, true),
            (UPPER_ROOM_BYTES_MIN, 1 << 40, false),
            (99, 2000, true),
            (100, 2000, false),
        ] {
            let below = Some(FileSystemRoom { available_bytes, total_bytes });
            let mut room = Room { below, ..Room::default() };
            let expected =
                is_low.then(|| format!("the file system below has {available_bytes} bytes left"));
            assert_eq!(room.judge(&usage(0, 0)), expected, "{available_bytes} of {total_bytes}");
        }
    }

    #[test]
    fn a_file_system_is_asked_once_a_second() {
        let mut room = Room::default();
        let start = Instant::now();
        let due = [0, 1, 999, 1000, 1500, 2000]
            .map(|ms: u64| room.is_due(start + Duration::from_millis(ms)));
        assert_eq!(due, [true, false, false, true, false, true]);
    }
}
