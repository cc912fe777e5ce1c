//! Sealing: the data file of a pair becomes a read-only layer where it lies, as the reference's
//! `close_seal` makes one.
//!
//! ```text
//!   suspend (no entry follows the last flush) --> plan
//!       --> index behind the data, synced --> trailer behind the index, synced
//! ```
//!
//! A trailer is there only when its index is: a power cut in between leaves the pair, with bytes
//! behind its data that nothing names. Nothing that the pair consists of is touched: cut off again
//! where it ended before, the data file is that of the pair. Who decides which of the two it is, is
//! the caller's business.

use super::log::split;
use super::open::{check_not_sealed, lock_data, read_header, too_short};
use super::sparse::open_journal;
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
use std::fs::File;
use std::sync::atomic::Ordering;

/// What sealing puts behind the data of a pair.
#[derive(Debug)]
pub struct Seal {
    /// Length of the data file without it, in bytes.
    pub data_bytes: u64,
    /// Length of the data file with it, in bytes.
    pub sealed_bytes: u64,
    at_byte: u64,
    index: Vec<u8>,
    trailer: Vec<u8>,
}

impl Seal {
    /// Writes it: the index is durable before the first byte of the trailer.
    fn put(&self, data: &dyn Storage) -> std::io::Result<()> {
        data.write_at(self.at_byte, &self.index)?;
        data.sync_data()?;
        data.write_at(self.at_byte.saturating_add(to_u64(self.index.len())), &self.trailer)?;
        data.sync_data()
    }
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
    let index = encode_sealed_index(segments);
    let trailer =
        Header { index_offset_bytes: at_byte, index_entries: entries, ..trailer }.encode();
    let sealed_bytes = at_byte.saturating_add(to_u64(index.len())) + to_u64(trailer.len());
    Ok(Seal { data_bytes, sealed_bytes, at_byte, index, trailer })
}

/// Seals the pair at `paths`, of either form, which nobody writes. Returns the length of the data
/// file, which is a layer now; the index file stays. Blocks on the disk.
///
/// # Errors
/// As [`Pair::open`], [`Pair::plan_seal`] and [`Pair::seal`]; `Unsupported` for one in sparse form
/// without a size of its own. The pair is as it was then, if that can be.
pub fn seal(paths: &PairPaths) -> Result<u64> {
    seal_as(paths, &PairOptions::default())
}

fn seal_as(paths: &PairPaths, options: &PairOptions) -> Result<u64> {
    let data = open_regular_for_writing(&paths.data)?;
    let header = read_header(&data, 0)?.ok_or_else(|| too_short("data"))?;
    if header.flags.is_sparse_writable() && !header.flags.is_sealed() {
        return seal_sparse(&data, &header, &paths.data.display().to_string(), options);
    }
    drop(data);
    let pair = Pair::open(paths, options)?;
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

fn seal_sparse(data: &File, header: &Header, name: &str, options: &PairOptions) -> Result<u64> {
    let told = |error| Error::io(format!("seal {name}"), &error);
    let file = FileIdentity::of(data).map_err(told)?;
    let journal_path = Journal::path_in(&options.journal_folder, file);
    lock_data(data, name, &journal_path)?;
    let pair = check_writable_pair(header, None)?;
    check_not_sealed(data, &pair)?;
    if pair.virtual_size_bytes == 0 {
        // Its file is as long as its disk: what a power cut leaves of an index would be sectors.
        let message = format!(
            "{name} is in sparse form and has the size of the layer below: commit it to a layer \
             instead of sealing it"
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let (journal, failure) = open_journal(&options.journal_folder, file, pair.uuid, name)?;
    if let Some(why) = failure {
        return Err(Error::new(ErrorKind::Io, why));
    }
    data.sync_all().map_err(told).inspect_err(|_| journal.set_failed())?;
    let data_bytes = data.len_bytes().map_err(told)?;
    let extents = data_extents_of(data, name, HEADER_BYTES..data_bytes)?;
    let segments = segments_of_sparse_file(&extents, pair.virtual_size_bytes)?;
    let flags = Flags::DATA_FILE.with(Flags::SEALED);
    let trailer = Header::new(flags, pair.virtual_size_bytes, pair.uuid, pair.parent_uuid);
    // Behind the disk, also where the file ends before: an index without its trailer is nothing.
    let end_byte = data_bytes.max(HEADER_BYTES.saturating_add(pair.virtual_size_bytes));
    let seal = plan(name, &segments, end_byte, trailer)?;
    if let Err(error) = seal.put(data) {
        let _ = data.set_len(data_bytes).and_then(|()| data.sync_all());
        return Err(told(error));
    }
    // One that stays has no entries, and is of an upper that nobody opens.
    let _ = std::fs::remove_file(&journal_path);
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
        seal.put(self.data.as_ref()).map_err(told)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::lsmt::UuidText;
    use crate::units::to_usize;
    use crate::upper::{Form, NewPair, SparseUpper, create_as, create_fresh};
    use std::io;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::Mutex;

    const DISK_BYTES: u64 = 1 << 20;

    fn sparse(folder: &Path) -> (PairPaths, PairOptions) {
        let paths = PairPaths { data: folder.join("data"), index: folder.join("index") };
        create_fresh(&paths, DISK_BYTES, Form::Sparse { over_lowers: false }).unwrap();
        let data = File::options().write(true).open(&paths.data).unwrap();
        data.write_all_at(&[7; 4096], HEADER_BYTES + 8192).unwrap();
        let journal_folder = folder.join("run");
        let lower_bytes = DISK_BYTES;
        (paths, PairOptions { journal_folder, lower_bytes, ..PairOptions::default() })
    }

    fn sectors(paths: &PairPaths, options: &PairOptions) -> Vec<u8> {
        let upper = SparseUpper::open(paths, options).unwrap();
        let mut disk = vec![0xee; to_usize(DISK_BYTES).unwrap()];
        let below = |_: u64, gap: &mut [u8]| {
            gap.fill(b'.');
            Ok(())
        };
        upper.worker().read(0, &mut disk, below).unwrap();
        upper.close().unwrap();
        disk
    }

    /// Tells what was done to it.
    #[derive(Debug, Default)]
    struct Recorder(Mutex<Vec<(u64, usize)>>);

    impl Recorder {
        fn note(&self, done: (u64, usize)) -> io::Result<()> {
            self.0.lock().unwrap().push(done);
            Ok(())
        }
    }

    impl Storage for Recorder {
        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Err(io::ErrorKind::UnexpectedEof.into())
        }

        fn write_at(&self, at_byte: u64, src: &[u8]) -> io::Result<()> {
            self.note((at_byte, src.len()))
        }

        fn set_len(&self, bytes: u64) -> io::Result<()> {
            self.note((bytes, 0))
        }

        fn sync_data(&self) -> io::Result<()> {
            self.note((0, 0))
        }

        fn len_bytes(&self) -> io::Result<u64> {
            Ok(0)
        }
    }

    /// Written at once, a power cut could leave the trailer and not all of the index in front.
    #[test]
    fn the_index_is_durable_before_the_trailer_is_written() {
        let segment =
            SegmentMapping { start_sector: 0, sectors: 8, mapped_sector: 8, zeroed: false, tag: 0 };
        let header = Header::new(Flags::DATA_FILE, DISK_BYTES, UuidText::NIL, UuidText::NIL);
        let seal = plan("data", &[segment; 300], 8192, header).unwrap();
        let (index, trailer) = (seal.index.len(), seal.trailer.len());
        let recorder = Recorder::default();
        seal.put(&recorder).unwrap();
        let trailer_at = 8192 + to_u64(index);
        let expected = [(8192, index), (0, 0), (trailer_at, trailer), (0, 0)];
        assert_eq!(*recorder.0.lock().unwrap(), expected);
        assert_eq!(trailer_at + to_u64(trailer), seal.sealed_bytes);
    }

    #[test]
    fn a_sparse_upper_whose_seal_was_cut_off_is_what_it_was() {
        for file_bytes in [HEADER_BYTES + DISK_BYTES, HEADER_BYTES + 16384] {
            let folder = tempfile::tempdir().unwrap();
            let (paths, options) = sparse(folder.path());
            let data = File::options().read(true).write(true).open(&paths.data).unwrap();
            Storage::set_len(&data, file_bytes).unwrap();
            let before = sectors(&paths, &options);
            assert_eq!((before[8191], before[8192], before[16384]), (b'.', 7, b'.'));
            Storage::set_len(&data, file_bytes).unwrap();
            let sealed_bytes = seal_as(&paths, &options).unwrap();
            let error = SparseUpper::open(&paths, &options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:#}");
            assert_eq!(std::fs::read_dir(&options.journal_folder).unwrap().count(), 0);
            for cut_bytes in [1, HEADER_BYTES, HEADER_BYTES + 512] {
                Storage::set_len(&data, sealed_bytes - cut_bytes).unwrap();
                assert!(sectors(&paths, &options) == before, "{file_bytes} {cut_bytes}");
            }
        }
    }

    /// A later sync succeeds, whatever the one that failed has lost.
    #[test]
    fn a_sparse_upper_of_which_a_sync_failed_is_not_sealed() {
        let folder = tempfile::tempdir().unwrap();
        let (paths, options) = sparse(folder.path());
        let before = std::fs::read(&paths.data).unwrap();
        drop(SparseUpper::open(&paths, &options).unwrap());
        let data = File::open(&paths.data).unwrap();
        let file = FileIdentity::of(&data).unwrap();
        let journal = Journal::open(&Journal::path_in(&options.journal_folder, file)).unwrap();
        journal.set_failed();
        let error = seal_as(&paths, &options).unwrap_err();
        assert!(error.to_string().contains("a sync of it failed since this boot"), "{error:#}");
        assert!(std::fs::read(&paths.data).unwrap() == before);
    }

    #[test]
    fn a_sparse_upper_without_a_size_is_not_sealed() {
        let folder = tempfile::tempdir().unwrap();
        let paths =
            PairPaths { data: folder.path().join("data"), index: folder.path().join("index") };
        let (uuid, parent_uuid) = (UuidText::NIL, UuidText::NIL);
        let new = NewPair { virtual_bytes: 0, uuid, parent_uuid };
        create_as(&paths, &new, Form::Sparse { over_lowers: true }).unwrap();
        let journal_folder = folder.path().join("run");
        let options = PairOptions { journal_folder, ..PairOptions::default() };
        let error = seal_as(&paths, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("commit it to a layer"), "{error:#}");
        assert_eq!(std::fs::metadata(&paths.data).unwrap().len(), HEADER_BYTES);
    }
}
