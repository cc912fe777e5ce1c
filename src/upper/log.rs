//! The index file while it is written: only the leader of a flush touches it.

use super::journal::Journal;
use super::storage::{Folder, Storage};
use crate::error::{Error, Result};
use crate::format::lsmt::{
    self, HEADER_BYTES, LOG_SECTOR_ENTRIES, LogOwner, LogScan, LogScanner, MarkKind,
    SegmentMapping, batch_bytes, encode_batch,
};
use crate::limits::{INDEX_PIECE_BYTES, LOG_BATCH_SECTORS_MAX, LOG_REWRITE_FACTOR};
use crate::map::Content;
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use std::ops::Range;

/// Most entries of one batch.
const BATCH_ENTRIES_MAX: u64 = LOG_BATCH_SECTORS_MAX * to_u64(LOG_SECTOR_ENTRIES) - 1;

/// An index file, its folder, and how far it is written.
#[derive(Debug)]
pub(super) struct Log {
    index: Box<dyn Storage>,
    folder: Box<dyn Folder>,
    end_byte: u64,
    rewrite_entries_min: u64,
}

/// An append that failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    /// Whether the kernel took what then may be lost: a sync failed, not a write.
    pub(super) may_be_lost: bool,
}

/// Reads the log of `index`, of `index_bytes`.
///
/// # Errors
/// As [`LogScanner::push`]; `Io`.
pub(super) fn scan(index: &dyn Storage, index_bytes: u64, data_end_sector: u64) -> Result<LogScan> {
    let mut scanner = LogScanner::new(data_end_sector);
    let mut buffer = Vec::new();
    let mut here = HEADER_BYTES;
    while here < index_bytes {
        let piece_bytes = (index_bytes - here).min(INDEX_PIECE_BYTES);
        buffer.resize(to_usize(piece_bytes).unwrap_or(0), 0);
        index.read_at(here, &mut buffer).map_err(|error| {
            Error::io(format!("read {piece_bytes} bytes at byte {here} of the index"), &error)
        })?;
        scanner.push(&buffer, here)?;
        here += piece_bytes;
    }
    Ok(scanner.finish())
}

impl Log {
    /// The log that `scan` found in `index`. To be mended before anything is appended.
    pub(super) fn resume(
        index: Box<dyn Storage>,
        folder: Box<dyn Folder>,
        scan: &LogScan,
        rewrite_entries_min: u64,
    ) -> Self {
        // Blanks are padding to us and an error to the reference: the first flush rewrites them.
        let rewrite_entries_min = if scan.has_blanks { 0 } else { rewrite_entries_min };
        Self { index, folder, end_byte: scan.end_byte, rewrite_entries_min }
    }

    /// Makes the index file ready to be appended to: cuts off what does not count of its
    /// `index_bytes`, and marks that what follows is ours.
    ///
    /// # Errors
    /// What the operating system says. A second attempt begins where this one ended.
    pub(super) fn mend(
        &mut self,
        owner: LogOwner,
        index_bytes: u64,
        journal: &Journal,
    ) -> Result<()> {
        let mended = |error: std::io::Error| Error::io("make the index ready", &error);
        if index_bytes > self.end_byte {
            self.index.set_len(self.end_byte).map_err(mended)?;
            self.index.sync_data().map_err(mended)?;
        }
        if owner == LogOwner::Reference {
            let mark_at = self.end_byte.next_multiple_of(SECTOR_SIZE);
            let end_byte = mark_at + SECTOR_SIZE;
            journal.stand_on(self.end_byte, end_byte);
            // First as zeros, which are no entries: a torn write cannot leave anything else that
            // would be taken for one of the reference's.
            self.index.set_len(end_byte).map_err(mended)?;
            self.index.sync_data().map_err(mended)?;
            let slots = (mark_at - self.end_byte) / to_u64(SegmentMapping::BYTES);
            let mut bytes = SegmentMapping::PADDING.repeat(to_usize(slots).unwrap_or(0));
            bytes.extend_from_slice(&encode_batch(&[], mark_at, MarkKind::Open));
            self.index.write_at(self.end_byte, &bytes).map_err(mended)?;
            self.index.sync_data().map_err(mended)?;
            self.end_byte = end_byte;
        }
        journal.stand_on(self.end_byte, self.end_byte);
        Ok(())
    }

    /// Whether the log would be much longer, with `entries` more, than `pieces` need.
    pub(super) fn wants_rewrite(&self, entries: u64, pieces: usize) -> bool {
        let slots = (self.end_byte - HEADER_BYTES) / to_u64(SegmentMapping::BYTES);
        let needed = to_u64(pieces).saturating_mul(LOG_REWRITE_FACTOR);
        slots.saturating_add(entries) > needed.max(self.rewrite_entries_min)
    }

    /// Appends `entries`, none of which covers another, and syncs them: one batch, or more where
    /// one cannot hold them. Each is synced before the next is written, because the scan takes a
    /// torn tail for what it is only when it is no longer than a batch.
    pub(super) fn append(
        &mut self,
        entries: &[u8],
        journal: &Journal,
        name: &str,
    ) -> Result<(), Failure> {
        let most = to_usize(BATCH_ENTRIES_MAX).unwrap_or(0) * SegmentMapping::BYTES;
        for part in entries.chunks(most) {
            let bytes = encode_batch(part, self.end_byte, MarkKind::Batch);
            self.append_bytes(&bytes, journal, name)?;
        }
        Ok(())
    }

    /// Appends the mark of a pair that is closed.
    pub(super) fn close(&mut self, journal: &Journal, name: &str) -> Result<(), Failure> {
        self.append_bytes(&encode_batch(&[], self.end_byte, MarkKind::Closed), journal, name)
    }

    fn append_bytes(&mut self, bytes: &[u8], journal: &Journal, name: &str) -> Result<(), Failure> {
        let end_byte = self.end_byte + to_u64(bytes.len());
        let failed = |what: &str, error: &std::io::Error, may_be_lost| Failure {
            error: Error::io(format!("{what} the index of {name}"), error),
            may_be_lost,
        };
        journal.stand_on(self.end_byte, end_byte);
        self.index
            .write_at(self.end_byte, bytes)
            .map_err(|error| failed("append to", &error, false))?;
        self.index.sync_data().map_err(|error| failed("sync", &error, true))?;
        self.end_byte = end_byte;
        journal.stand_on(end_byte, end_byte);
        Ok(())
    }

    /// Puts a log of nothing but `live` in the place of this one. `false` when that cannot be done
    /// now, a full disk for instance: then nothing has changed, and the batch is to be appended.
    pub(super) fn rewrite(
        &mut self,
        live: &[(Range<u64>, Content)],
        journal: &Journal,
        name: &str,
    ) -> Result<bool, Failure> {
        let Ok(fresh) = self.write_beside(live, None) else {
            let _ = self.folder.remove_beside();
            // Not again with every flush.
            let slots = (self.end_byte - HEADER_BYTES) / to_u64(SegmentMapping::BYTES);
            self.rewrite_entries_min = slots.saturating_mul(2);
            return Ok(false);
        };
        self.swap_in(fresh, journal, name).map(|()| true)
    }

    /// As [`Log::rewrite`], where nothing else will do, and with the header of a disk of
    /// `virtual_bytes` if that is to change. When it fails without anything that may be lost,
    /// nothing has changed.
    pub(super) fn replace(
        &mut self,
        live: &[(Range<u64>, Content)],
        virtual_bytes: Option<u64>,
        journal: &Journal,
        name: &str,
    ) -> Result<(), Failure> {
        let fresh = self.write_beside(live, virtual_bytes).map_err(|error| {
            let _ = self.folder.remove_beside();
            let error = Error::io(format!("write a new index for {name}"), &error);
            Failure { error, may_be_lost: false }
        })?;
        self.swap_in(fresh, journal, name)
    }

    /// Makes durable what others may have written.
    pub(super) fn sync(&self) -> std::io::Result<()> {
        self.index.sync_data()
    }

    fn swap_in(
        &mut self,
        (fresh, end_byte): (Box<dyn Storage>, u64),
        journal: &Journal,
        name: &str,
    ) -> Result<(), Failure> {
        // A process killed from here on leaves one or the other.
        journal.stand_on(self.end_byte, end_byte);
        let swapped = self.folder.replace_index().and_then(|()| self.folder.sync());
        swapped.map_err(|error| Failure {
            error: Error::io(format!("replace the index of {name}"), &error),
            may_be_lost: true,
        })?;
        self.index = fresh;
        self.end_byte = end_byte;
        journal.stand_on(end_byte, end_byte);
        Ok(())
    }

    fn write_beside(
        &self,
        live: &[(Range<u64>, Content)],
        virtual_bytes: Option<u64>,
    ) -> std::io::Result<(Box<dyn Storage>, u64)> {
        let fresh = self.folder.create_beside()?;
        let mut header = vec![0; to_usize(HEADER_BYTES).unwrap_or(0)];
        self.index.read_at(0, &mut header)?;
        if let Some(bytes) = virtual_bytes {
            lsmt::set_virtual_size(&mut header, bytes);
        }
        fresh.write_at(0, &header)?;
        let mut end_byte = HEADER_BYTES;
        let mut put = |entries: &[u8], kind| {
            let bytes = encode_batch(entries, end_byte, kind);
            fresh.write_at(end_byte, &bytes)?;
            end_byte += batch_bytes(entries.len() / SegmentMapping::BYTES);
            std::io::Result::Ok(())
        };
        put(&[], MarkKind::Open)?;
        let most = to_usize(BATCH_ENTRIES_MAX).unwrap_or(0) * SegmentMapping::BYTES;
        let mut entries = Vec::new();
        for segment in live.iter().flat_map(|(range, content)| split(range.clone(), *content)) {
            entries.extend_from_slice(&segment.encode());
            if entries.len() == most {
                put(&entries, MarkKind::Batch)?;
                entries.clear();
            }
        }
        if !entries.is_empty() {
            put(&entries, MarkKind::Batch)?;
        }
        fresh.sync_data()?;
        Ok((fresh, end_byte))
    }
}

/// A piece of the map as entries of the log.
pub(super) fn split(range: Range<u64>, content: Content) -> impl Iterator<Item = SegmentMapping> {
    let Range { start, end } = range;
    let step = to_usize(SegmentMapping::SECTORS_MAX).unwrap_or(1);
    (start..end).step_by(step).map(move |here| {
        let (mapped_sector, zeroed) = match content.advanced(here - start) {
            Content::Zero => (lsmt::DATA_START_SECTOR, true),
            Content::Data { sector } => (sector, false),
        };
        let sectors = (end - here).min(SegmentMapping::SECTORS_MAX);
        SegmentMapping { start_sector: here, sectors, mapped_sector, zeroed, tag: 0 }
    })
}
