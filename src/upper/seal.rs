//! Sealing: the data file of a pair becomes a read-only layer where it lies, as the reference's
//! `close_seal` makes one.
//!
//! ```text
//!   suspend (no entry follows the last flush) --> plan --> index, trailer behind the data, synced
//! ```
//!
//! Nothing that the pair consists of is touched: cut off again where it ended before, the data file
//! is that of the pair. Who decides which of the two it is, is the caller's business.

use super::log::split;
use super::{Pair, read, write};
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{Flags, Header, SegmentMapping, encode_sealed_index};
use crate::limits::SEALED_INDEX_ENTRIES_MAX;
use crate::units::{SECTOR_SIZE, to_u64};
use std::sync::atomic::Ordering;

/// What sealing puts behind the data of a pair.
#[derive(Debug)]
pub struct Seal {
    /// Length of the data file without it, in bytes.
    pub data_bytes: u64,
    /// Length of the data file with it, in bytes.
    pub sealed_bytes: u64,
    at_byte: u64,
    bytes: Vec<u8>,
}

impl Pair {
    /// Ends writing, for now, and makes durable what was written. The caller sees to it that no
    /// write is in flight.
    ///
    /// # Errors
    /// As [`Pair::flush`]; writing goes on where that can be.
    pub fn suspend(&self) -> Result<()> {
        {
            // Under the lock of those who publish: no entry follows the flush.
            let _state = write(&self.state);
            self.check_writable()?;
            self.closed.store(true, Ordering::Release);
        }
        self.flush().inspect_err(|_| self.resume())
    }

    /// Writing goes on after [`Pair::suspend`].
    pub fn resume(&self) {
        self.closed.store(false, Ordering::Release);
    }

    /// What sealing would put behind the data of this pair, which is suspended.
    ///
    /// # Errors
    /// `Unsupported` when its map has more pieces than a layer may have entries.
    pub fn plan_seal(&self) -> Result<Seal> {
        let segments: Vec<SegmentMapping> = {
            let state = read(&self.state);
            state.map.pieces().flat_map(|(range, content)| split(range, content)).collect()
        };
        let entries = to_u64(segments.len());
        if entries > SEALED_INDEX_ENTRIES_MAX {
            let message = format!(
                "{}: as a layer: {entries} entries, at most {SEALED_INDEX_ENTRIES_MAX}",
                self.name
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let told = |error| Error::io(format!("ask for the length of {}", self.name), &error);
        let data_bytes = self.data.len_bytes().map_err(told)?;
        let at_byte = data_bytes.next_multiple_of(SECTOR_SIZE);
        let virtual_bytes = self.virtual_sectors().saturating_mul(SECTOR_SIZE);
        let flags = Flags::DATA_FILE.with(Flags::SEALED);
        let trailer = Header {
            index_offset_bytes: at_byte,
            index_entries: entries,
            ..Header::new(flags, virtual_bytes, self.head.uuid, self.head.parent_uuid)
        };
        let mut bytes = encode_sealed_index(&segments);
        bytes.extend_from_slice(&trailer.encode());
        let sealed_bytes = at_byte.saturating_add(to_u64(bytes.len()));
        Ok(Seal { data_bytes, sealed_bytes, at_byte, bytes })
    }

    /// Puts the seal behind the data, durably.
    ///
    /// # Errors
    /// What the operating system says; [`Pair::unseal`] takes back what was written.
    pub fn seal(&self, seal: &Seal) -> Result<()> {
        let told = |error| Error::io(format!("seal {}", self.name), &error);
        self.data.write_at(seal.at_byte, &seal.bytes).map_err(told)?;
        self.data.sync_data().map_err(told)
    }

    /// Takes the seal off again, durably. Writing goes on after [`Pair::resume`].
    ///
    /// # Errors
    /// What the operating system says; nothing is written any more then.
    pub fn unseal(&self, seal: &Seal) -> Result<()> {
        let cut = self.data.set_len(seal.data_bytes).and_then(|()| self.data.sync_data());
        cut.map_err(|error| self.fail(Error::io(format!("unseal {}", self.name), &error)))
    }

    /// The pair is one no more: its journal goes, and its lock.
    pub fn retire(&self) {
        if let Some(path) = self.journal.path() {
            // One that stays is empty, and of a pair that nobody opens.
            let _ = std::fs::remove_file(path);
        }
        if let Some(data) = self.data_file() {
            let _ = data.unlock();
        }
    }
}
