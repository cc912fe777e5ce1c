//! The two files of a blob that is here in part, open: data where the blob has it, and the sidecar.
//!
//! ```text
//!   record on disk  --read at the first miss-->  checksum of the data right?  -->  HERE, in memory
//!   fetched bytes   --data, then record------------------------------------->  HERE, in memory
//! ```
//!
//! A hit looks at the states in memory alone: a byte for each extent, set once this process has
//! written the extent or found its checksum right through this very open file. Nothing that an
//! earlier process, another one or an earlier boot left is believed before that, so the order in
//! which the disk got it does not matter. The data file has the blob's length from the start and is
//! never cut or punched, so that its mapping holds for as long as somebody has it.

use super::claim::{self, Claim};
use super::extent_set::Extents;
use super::faults::{DiskFaults, DiskStep, allow};
use super::sidecar::{Header, RECORD_BYTES, Record};
use super::states::States;
use crate::error::{Error, Result};
use crate::source::MappedFile;
use crate::units::{to_u64, to_usize};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Records that are read or written at a time, when those of all extents are: 1 MiB.
pub(super) const RECORDS_AT_ONCE: u64 = 1 << 16;

/// A blob that is here in part.
#[derive(Debug)]
pub(super) struct Pair {
    header: Header,
    data: MappedFile,
    map: File,
    states: States,
    has_failed_to_sync: AtomicBool,
    faults: Option<Arc<dyn DiskFaults>>,
}

/// What a look at the records found.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// Extents that others had stored, found right and now here.
    pub(super) verified: u64,
    /// Extents whose bytes are not what their record says.
    pub(super) bad: Vec<u64>,
    /// Whether somebody had thrown one of them away.
    pub(super) has_quarantined: bool,
}

impl Pair {
    /// Takes two open files whose header was read and whose lengths were checked.
    pub(super) fn new(
        header: Header,
        data: MappedFile,
        map: File,
        faults: Option<Arc<dyn DiskFaults>>,
    ) -> Self {
        let states = States::new(header.extents.count());
        let has_failed_to_sync = AtomicBool::new(false);
        Self { header, data, map, states, has_failed_to_sync, faults }
    }

    pub(super) fn extents(&self) -> Extents {
        self.header.extents
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    pub(super) fn data(&self) -> &MappedFile {
        &self.data
    }

    pub(super) fn states(&self) -> &States {
        &self.states
    }

    pub(super) fn map(&self) -> &File {
        &self.map
    }

    pub(super) fn allow(&self, step: DiskStep) -> io::Result<()> {
        allow(self.faults.as_deref(), step)
    }

    /// Copies bytes that are all here; `None` when one is not, or when the file fails. Otherwise
    /// whether the planner wants to know.
    #[inline]
    pub(super) fn read_if_here(&self, offset_bytes: u64, dst: &mut [u8]) -> Option<bool> {
        let bytes = offset_bytes..offset_bytes.checked_add(to_u64(dst.len()))?;
        let touched = self.header.extents.touched_by(&bytes);
        let is_marked = self.states.are_here_and_marked(&touched)?;
        // Vouched for by the extent's checksum, which was right when the state was set.
        self.data.read_vouched(offset_bytes, dst).ok()?;
        Some(is_marked)
    }

    /// Waits until what was stored has reached the disk; where that fails, all is forgotten.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn sync(&self) -> io::Result<()> {
        let synced = self.allow(DiskStep::Sync).and_then(|()| self.data.file().sync_all());
        synced.inspect_err(|_| {
            self.has_failed_to_sync.store(true, Ordering::Relaxed);
            self.states.forget();
        })
    }

    /// Whether some of what was stored may never have reached the disk, whatever a read shows.
    pub(super) fn has_failed_to_sync(&self) -> bool {
        self.has_failed_to_sync.load(Ordering::Relaxed)
    }

    /// Whether the files were evicted, removed, or became a plain file: nothing may be stored.
    pub(super) fn is_retired(&self) -> io::Result<bool> {
        Ok(self.map.metadata()?.nlink() == 0)
    }

    /// The records of some extents.
    pub(super) fn records(&self, extents: &Range<u64>) -> io::Result<Vec<Record>> {
        self.allow(DiskStep::ReadRecords)?;
        let count = to_usize(extents.end.saturating_sub(extents.start)).unwrap_or(0);
        let mut bytes = vec![0; count.saturating_mul(RECORD_BYTES)];
        self.map.read_exact_at(&mut bytes, Header::record_at(extents.start))?;
        let (records, _) = bytes.as_chunks::<RECORD_BYTES>();
        let each = extents.clone().zip(records);
        Ok(each.map(|(extent, bytes)| self.header.decode_record(extent, bytes)).collect())
    }

    /// Looks for extents that somebody stored and this process has not seen yet, and checks them.
    ///
    /// # Errors
    /// When the sidecar cannot be read. Data that cannot be read is distrusted instead.
    pub(super) fn look(&self, extents: &Range<u64>) -> io::Result<Looked> {
        let mut looked = Looked::default();
        let records = self.records(extents)?;
        let mut scratch = Vec::new();
        for (extent, record) in extents.clone().zip(records) {
            looked.has_quarantined |= matches!(record, Record::Quarantined(_));
            let Record::Filled(expected) = record else { continue };
            if self.states.is_settled(extent) {
                continue;
            }
            match self.checksum_of(extent, &mut scratch) {
                Ok(found) if found == expected => {
                    self.states.set_here(extent);
                    looked.verified += 1;
                }
                Ok(_) => looked.bad.push(extent),
                Err(_) => self.states.distrust(extent..extent + 1),
            }
        }
        Ok(looked)
    }

    /// Takes note of extents that another process threw away since this one found them right: they
    /// are missing here, too, and looked at again at their next use. How many they are.
    ///
    /// # Errors
    /// When the sidecar cannot be read.
    pub(super) fn look_for_lost(&self) -> io::Result<u64> {
        let count = self.header.extents.count();
        let (mut at, mut lost) = (0, 0);
        while at < count {
            let piece = at..at.saturating_add(RECORDS_AT_ONCE).min(count);
            at = piece.end;
            for (extent, record) in piece.clone().zip(self.records(&piece)?) {
                // A record is written before the state is set, so none is missed that is new.
                let is_filled = matches!(record, Record::Filled(_));
                if !is_filled && self.states.are_here(&(extent..extent + 1)) {
                    self.states.set_missing(extent);
                    lost += 1;
                }
            }
        }
        Ok(lost)
    }

    /// The checksum of what the data file holds of an extent.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn checksum_of(&self, extent: u64, scratch: &mut Vec<u8>) -> Result<u64> {
        let bytes = self.header.extents.bytes_of(&(extent..extent + 1));
        scratch.resize(to_usize(bytes.end - bytes.start).unwrap_or(0), 0);
        let failed = |error| Error::io("read an extent of the cache", &error);
        self.allow(DiskStep::ReadData).map_err(failed)?;
        self.data.read_vouched(bytes.start, scratch)?;
        Ok(self.header.checksum(extent, scratch))
    }

    /// Notes on disk that what the data file holds of an extent is bad, so that nobody takes it
    /// while it is written over. The caller has the extent's claim.
    ///
    /// # Errors
    /// When the sidecar cannot be written.
    pub(super) fn quarantine(&self, extent: u64, _claim: &Claim<'_>) -> io::Result<()> {
        self.write_records(extent, &[Record::Quarantined(1)])
    }

    /// As [`Pair::quarantine`] for every extent of a pair that nobody else has open yet.
    ///
    /// # Errors
    /// As there.
    pub(super) fn quarantine_all(&self) -> io::Result<()> {
        let all = 0..self.extents().count();
        for first in all.clone().step_by(to_usize(RECORDS_AT_ONCE).unwrap_or(usize::MAX)) {
            let count = to_usize(RECORDS_AT_ONCE.min(all.end - first)).unwrap_or(0);
            self.write_records(first, &vec![Record::Quarantined(1); count])?;
        }
        Ok(())
    }

    /// Stores extents whose claim the caller has: the data first, then what vouches for it.
    ///
    /// # Errors
    /// What the operating system says; nothing is here then that was not before.
    pub(super) fn store(
        &self,
        extents: &Range<u64>,
        bytes: &[u8],
        _claim: &Claim<'_>,
    ) -> io::Result<()> {
        self.allow(DiskStep::WriteData)?;
        self.data.file().write_all_at(bytes, self.header.extents.bytes_of(extents).start)?;
        let size = to_usize(self.header.extents.extent_bytes()).unwrap_or(usize::MAX);
        let records: Vec<Record> = extents
            .clone()
            .zip(bytes.chunks(size))
            .map(|(extent, bytes)| Record::Filled(self.header.checksum(extent, bytes)))
            .collect();
        self.write_records(extents.start, &records)?;
        extents.clone().for_each(|extent| self.states.set_here(extent));
        Ok(())
    }

    fn write_records(&self, first: u64, records: &[Record]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(records.len().saturating_mul(RECORD_BYTES));
        for (extent, record) in (first..).zip(records) {
            bytes.extend_from_slice(&self.header.encode_record(extent, *record));
        }
        self.allow(DiskStep::WriteRecords)?;
        self.map.write_all_at(&bytes, Header::record_at(first))
    }

    /// Claims the front of `extents` up to what somebody else has; `None` when that is nothing.
    pub(super) fn claim_front(
        &self,
        extents: &Range<u64>,
    ) -> io::Result<Option<(Claim<'_>, Range<u64>)>> {
        if let Some(claim) = claim::try_extents(&self.map, extents)? {
            return Ok(Some((claim, extents.clone())));
        }
        let end = claim::first_taken(&self.map, extents)?.unwrap_or(extents.end);
        let front = extents.start..end;
        if front.is_empty() {
            return Ok(None);
        }
        Ok(claim::try_extents(&self.map, &front)?.map(|claim| (claim, front)))
    }
}
