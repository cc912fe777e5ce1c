//! Flush: one leader at a time makes durable what was acknowledged before it began.

use super::journal::Journal;
use super::log::split;
use super::{Pair, content_of, lock, read, write};
use crate::error::{Error, Result};
use crate::format::lsmt::SegmentMapping;
use crate::map::UpperMap;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Whose turn it is to flush.
#[derive(Debug, Default)]
pub(super) struct Turns {
    started: u64,
    ended: u64,
    running: bool,
}

/// The leader's turn; ends when dropped, so that a panic leaves nobody waiting for ever.
struct Turn<'a>(&'a Pair);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut turns = lock(&self.0.turns);
        turns.running = false;
        turns.ended = turns.started;
        if std::thread::panicking() {
            let _ = self.0.failed.set("bug: a flush panicked".to_owned());
        }
        drop(turns);
        self.0.turned.notify_all();
    }
}

/// What the entries `numbers` of a journal come to, as entries that cover no other: the space of
/// what they cover among themselves may have been written again, so none of them may name it, not
/// even in a batch of which a power cut leaves a part and the reference reads that.
fn what_is_left_of(journal: &Journal, numbers: Range<u64>) -> Vec<u8> {
    let bytes = journal.bytes_of(numbers);
    let (entries, _) = bytes.as_chunks::<{ SegmentMapping::BYTES }>();
    let mut map = UpperMap::new();
    let mut covered = Vec::new();
    for segment in entries.iter().filter_map(SegmentMapping::decode) {
        map.insert(segment.start_sector..segment.end_sector(), content_of(&segment), &mut covered);
        covered.clear();
    }
    let left = map.pieces().flat_map(|(range, content)| split(range, content));
    left.flat_map(|segment| segment.encode()).collect()
}

impl Pair {
    /// Makes every write that was acknowledged before the call durable: it survives a power cut.
    /// Who calls while another's flush runs waits for it and for the next, which all who wait
    /// share. Reads and writes go on meanwhile.
    ///
    /// # Errors
    /// When a sync fails or the index cannot be written, now or ever before: nothing is written
    /// to this pair any more.
    pub fn flush(&self) -> Result<()> {
        let mut turns = lock(&self.turns);
        // One that runs may have looked at the journal before the caller's last write.
        let mine = turns.started + 1;
        while turns.running && turns.ended < mine {
            turns = self.turned.wait(turns).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        if turns.ended >= mine {
            return self.check_not_failed();
        }
        turns.running = true;
        turns.started += 1;
        drop(turns);
        let _turn = Turn(self);
        self.flush_once()
    }

    fn flush_once(&self) -> Result<()> {
        self.check_not_failed()?;
        let mut log = lock(&self.log);
        write(&self.state).space.flush_begins();
        let (held, end_sector, live) = {
            let state = read(&self.state);
            let held = self.journal.held();
            let wanted = held.end > held.start
                && log.wants_rewrite(held.end - held.start, state.map.piece_count());
            // Map and journal of one instant: the new log must hold what the old and the batch do.
            let live = wanted.then(|| state.map.pieces().collect::<Vec<_>>());
            (held, state.space.end_sector(), live)
        };
        write(&self.state).space.flush_taken(end_sector);
        if held.start == held.end {
            return Ok(());
        }
        self.data.sync_data().map_err(|error| {
            self.lost(Error::io(format!("sync the data of {}", self.name), &error))
        })?;
        let replaced = match live {
            Some(live) => log.rewrite(&live, &self.journal, &self.name),
            None => Ok(false),
        };
        replaced
            .and_then(|replaced| {
                if replaced {
                    return Ok(());
                }
                log.append(&what_is_left_of(&self.journal, held.clone()), &self.journal, &self.name)
            })
            .map_err(|failure| {
                if failure.may_be_lost {
                    self.lost(failure.error)
                } else {
                    self.fail(failure.error)
                }
            })?;
        self.journal.clear_to(held.end);
        drop(log);
        let mut state = write(&self.state);
        let epoch = state.epoch;
        state.space.flushed(held.end, epoch);
        state.epoch += 1;
        state.settle();
        drop(state);
        self.watch_room();
        Ok(())
    }

    /// As [`Pair::fail`] where the kernel may have forgotten what it could not write: not even a
    /// restarted process may believe the next sync.
    pub(super) fn lost(&self, error: Error) -> Error {
        self.journal.set_failed();
        self.fail(error)
    }

    /// Flushes, and marks the log as closed: the reference may append to it. Later writes fail,
    /// reads go on.
    ///
    /// # Errors
    /// As [`Pair::flush`].
    pub fn close(&self) -> Result<()> {
        {
            // Under the lock of those who publish: no entry follows the last flush.
            let _state = write(&self.state);
            if self.closed.swap(true, Ordering::AcqRel) {
                return self.check_not_failed();
            }
        }
        self.flush()?;
        let closed = lock(&self.log).close(&self.journal, &self.name);
        closed.map_err(|failure| self.fail(failure.error))?;
        if let Some(path) = self.journal.path() {
            // One that stays is empty and agrees with the index: the next open takes it.
            let _ = std::fs::remove_file(path);
        }
        // The lock belongs to the open file, of which a supervisor may hold a descriptor for a
        // moment longer: whoever attaches the pair next need not wait for that.
        if let Some(data) = self.data_file() {
            let _ = data.unlock();
        }
        Ok(())
    }
}
