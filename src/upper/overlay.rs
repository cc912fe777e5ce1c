//! The journal in a read-only view of a pair: what a killed or a running server has not flushed.

use super::journal::{Journal, JournalKey, boot_id};
use super::open::journal_folder;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::lsmt::{self, SegmentMapping, UuidText};
use crate::source::FileIdentity;

/// How often a log is read anew because the pair's server flushed meanwhile.
const TRIES_MAX: u32 = 8;

/// The entries of a journal, checked against a data file that ends before `data_end_sector`.
///
/// # Errors
/// `Corrupt`, with the entry's number.
pub(super) fn entries_of(journal: &Journal, data_end_sector: u64) -> Result<Vec<SegmentMapping>> {
    let held = journal.held();
    let bytes = journal.bytes_of(held.clone());
    let (entries, _) = bytes.as_chunks::<{ SegmentMapping::BYTES }>();
    let mut segments = Vec::with_capacity(entries.len());
    for (number, entry) in held.zip(entries) {
        let place = || format!("read entry {number} of {}", journal.name());
        let segment = SegmentMapping::decode(entry)
            .ok_or_else(|| Error::corrupt("journal entry", number, "no entry", "one"))
            .context(place)?;
        lsmt::check_segment(&segment, number, data_end_sector).context(place)?;
        segments.push(segment);
    }
    Ok(segments)
}

/// A read-only view of a pair and the entries of the journal of this boot that go on top of it.
/// `view` opens it anew; it tells the length of the index file and where the data file ends. The
/// view of a pair that is being written is that of some moment during the call, and what it points
/// at may be overwritten later.
///
/// # Errors
/// What `view` says; `Corrupt` for a journal that does not fit the index, naming it; `Busy`.
pub fn overlay_journal<T>(
    data: FileIdentity,
    uuid: UuidText,
    mut view: impl FnMut() -> Result<(T, u64, u64)>,
) -> Result<(T, Vec<SegmentMapping>)> {
    let path = Journal::path_in(&journal_folder(), data);
    for _ in 0..TRIES_MAX {
        let key = JournalKey { boot_id: boot_id()?, uuid, file: data };
        let ours = |journal: &Journal| journal.belongs_to(&key);
        let Some(journal) = Journal::snapshot(&path)? else { return Ok((view()?.0, Vec::new())) };
        if !ours(&journal)? {
            return Ok((view()?.0, Vec::new()));
        }
        // After the journal, so that the data it points at is there.
        let (found, index_bytes, data_end_sector) = view()?;
        let after = Journal::snapshot(&path)?;
        let Some(after) = after.filter(|after| after.held().start == journal.held().start) else {
            continue;
        };
        after.check_index_length(index_bytes)?;
        return Ok((found, entries_of(&journal, data_end_sector)?));
    }
    let message = format!("{}: its server flushes faster than it can be read", path.display());
    Err(Error::new(ErrorKind::Busy, message))
}
