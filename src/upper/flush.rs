//! Flush: one leader at a time makes durable what was acknowledged before it began.

use super::{Pair, lock, read, write};
use crate::error::{Error, Result};
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
        let (held, live) = {
            let state = read(&self.state);
            let held = self.journal.held();
            let wanted = held.end > held.start
                && log.wants_rewrite(held.end - held.start, state.map.piece_count());
            // Map and journal of one instant: the new log must hold what the old and the batch do.
            (held, wanted.then(|| state.map.pieces().collect::<Vec<_>>()))
        };
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
                log.append(&self.journal.bytes_of(held.clone()), &self.journal, &self.name)
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
