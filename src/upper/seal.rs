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
use super::open::{check_not_sealed, lock_data, read_header, too_short};
use super::storage::Storage;
use super::{Journal, Pair, PairOptions, PairPaths, read, write};
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{
    Flags, HEADER_BYTES, Header, SegmentMapping, check_writable_pair, encode_sealed_index,
    segments_of_sparse_file,
};
use crate::limits::SEALED_INDEX_ENTRIES_MAX;
use crate::source::{FileIdentity, data_extents_of, open_regular_for_writing};
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

/// The index of `segments` and `trailer` behind `data_bytes` of data.
fn plan(name: &str, segments: &[SegmentMapping], data_bytes: u64, trailer: Header) -> Result<Seal> {
    let entries = to_u64(segments.len());
    if entries > SEALED_INDEX_ENTRIES_MAX {
        let message =
            format!("{name}: as a layer: {entries} entries, at most {SEALED_INDEX_ENTRIES_MAX}");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let at_byte = data_bytes.next_multiple_of(SECTOR_SIZE);
    let mut bytes = encode_sealed_index(segments);
    let trailer = Header { index_offset_bytes: at_byte, index_entries: entries, ..trailer };
    bytes.extend_from_slice(&trailer.encode());
    let sealed_bytes = at_byte.saturating_add(to_u64(bytes.len()));
    Ok(Seal { data_bytes, sealed_bytes, at_byte, bytes })
}

/// Seals the pair at `paths`, of either form, which nobody writes. Returns the length of the data
/// file, which is a layer now; the index file stays. Blocks on the disk.
///
/// # Errors
/// As [`Pair::open`], [`Pair::plan_seal`] and [`Pair::seal`]. The pair is as it was then, if that
/// can be.
pub fn seal(paths: &PairPaths) -> Result<u64> {
    let data = open_regular_for_writing(&paths.data)?;
    let header = read_header(&data, 0)?.ok_or_else(|| too_short("data"))?;
    if header.flags.is_sparse_writable() && !header.flags.is_sealed() {
        return seal_sparse(&data, &header, &paths.data.display().to_string());
    }
    drop(data);
    let pair = Pair::open(paths, &PairOptions::default())?;
    pair.suspend()?;
    let seal = pair.plan_seal()?;
    if let Err(error) = pair.seal(&seal) {
        // The first error is the one to tell.
        let _ = pair.unseal(&seal);
        return Err(error);
    }
    pair.retire();
    Ok(seal.sealed_bytes)
}

fn seal_sparse(data: &std::fs::File, header: &Header, name: &str) -> Result<u64> {
    let told = |error| Error::io(format!("seal {name}"), &error);
    let journals = PairOptions::default().journal_folder;
    lock_data(data, name, &Journal::path_in(&journals, FileIdentity::of(data).map_err(told)?))?;
    let pair = check_writable_pair(header, None)?;
    check_not_sealed(data, &pair)?;
    data.sync_all().map_err(told)?;
    let data_bytes = data.metadata().map_err(told)?.len();
    let extents = data_extents_of(data, name, HEADER_BYTES..data_bytes)?;
    let disk_bytes = match pair.virtual_size_bytes {
        0 => data_bytes.saturating_sub(HEADER_BYTES).next_multiple_of(SECTOR_SIZE),
        bytes => bytes,
    };
    let segments = segments_of_sparse_file(&extents, disk_bytes)?;
    let flags = Flags::DATA_FILE.with(Flags::SEALED);
    let trailer = Header::new(flags, pair.virtual_size_bytes, pair.uuid, pair.parent_uuid);
    let seal = plan(name, &segments, data_bytes, trailer)?;
    let written = Storage::write_at(data, seal.at_byte, &seal.bytes);
    if let Err(error) = written.and_then(|()| data.sync_all()) {
        let _ = data.set_len(data_bytes).and_then(|()| data.sync_all());
        return Err(told(error));
    }
    Ok(seal.sealed_bytes)
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
        let told = |error| Error::io(format!("ask for the length of {}", self.name), &error);
        let data_bytes = self.data.len_bytes().map_err(told)?;
        let virtual_bytes = self.virtual_sectors().saturating_mul(SECTOR_SIZE);
        let flags = Flags::DATA_FILE.with(Flags::SEALED);
        let trailer = Header::new(flags, virtual_bytes, self.head.uuid, self.head.parent_uuid);
        plan(&self.name, &segments, data_bytes, trailer)
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
