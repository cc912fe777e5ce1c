//! The trouble ring: the last failed and slow requests of a device, in a file that outlives its
//! server.
//!
//! ```text
//!   | header 512 | record 512 | ... 256 records ... | record 512 |
//! ```
//!
//! The queue threads of `ublk` write, one `pwrite` for each request that failed or was slow, and
//! nothing for the others. `why` reads, whether the server lives or not. The file lies in the
//! device's folder, in memory as a rule: nothing here waits for a disk, and nothing here may make
//! a request fail, so a record that cannot be written is lost without a word.
//!
//! A writer takes a number and with it a slot; records carry their number, so the order is clear
//! whatever was written last. A record that was torn has a checksum that does not match, and is
//! skipped. A successor goes on from the highest number it finds.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::TROUBLE_RECORDS_MAX;
use crate::units::{to_u64, to_usize};
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the header, and of every record: a sector, so that none of them crosses a page.
const RECORD_BYTES: usize = 512;

const MAGIC: [u8; 8] = *b"OBDTRBL1";

/// Goes up with any change of what the bytes mean.
const VERSION: u32 = 1;

/// Bytes of the whole file.
const FILE_BYTES: usize = RECORD_BYTES * (TROUBLE_RECORDS_MAX + 1);

// Where the fields of a record lie; the checksum comes first and covers the rest.
const TEXT_BYTES_AT: usize = 4;
const OPERATION_AT: usize = 6;
const SEQUENCE_AT: usize = 8;
const UNIX_MS_AT: usize = 16;
const START_SECTOR_AT: usize = 24;
const SECTORS_AT: usize = 32;
const ERRNO_AT: usize = 36;
const DURATION_AT: usize = 40;
const QUEUE_AT: usize = 48;
const PID_AT: usize = 52;
const TEXT_AT: usize = 56;

const _: () = assert!(RECORD_BYTES - TEXT_AT == 456);

/// Stands for what was cut out of a text.
const CUT: &str = " ... ";

/// One request that failed or was slow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trouble {
    /// Its number, from 1 on; given by the ring.
    pub sequence: u64,
    /// When it was over, in milliseconds since 1970.
    pub unix_ms: u64,
    /// What was asked for, as the ublk driver numbers operations; 0 is a read.
    pub operation: u8,
    /// First sector of the virtual disk.
    pub start_sector: u64,
    /// Length in sectors.
    pub sectors: u32,
    /// The positive errno that was answered; 0 when it was only slow.
    pub errno: i32,
    /// How long it took, in microseconds, as exactly as its writer measured.
    pub duration_us: u64,
    /// The queue that served it.
    pub queue: u16,
    /// The process that served it; given by the ring.
    pub server_pid: u32,
    /// The whole chain of the error. When it is too long for a record, its middle is missing: the
    /// start says what was asked for, the end what was wrong.
    pub text: String,
}

impl Trouble {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        let text = shortened(&self.text, RECORD_BYTES - TEXT_AT);
        let text_bytes = u16::try_from(text.len()).unwrap_or(0);
        let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
        put(TEXT_BYTES_AT, &text_bytes.to_le_bytes());
        put(OPERATION_AT, &[self.operation]);
        put(SEQUENCE_AT, &self.sequence.to_le_bytes());
        put(UNIX_MS_AT, &self.unix_ms.to_le_bytes());
        put(START_SECTOR_AT, &self.start_sector.to_le_bytes());
        put(SECTORS_AT, &self.sectors.to_le_bytes());
        put(ERRNO_AT, &self.errno.to_le_bytes());
        put(DURATION_AT, &self.duration_us.to_le_bytes());
        put(QUEUE_AT, &self.queue.to_le_bytes());
        put(PID_AT, &self.server_pid.to_le_bytes());
        put(TEXT_AT, text.as_bytes());
        let crc = crc32c::crc32c(&record[TEXT_BYTES_AT..]);
        record[..TEXT_BYTES_AT].copy_from_slice(&crc.to_le_bytes());
        record
    }

    /// The record in a slot; `None` for one that is blank, torn or foreign.
    fn decode(record: &[u8; RECORD_BYTES]) -> Option<Self> {
        let crc = crc32c::crc32c(&record[TEXT_BYTES_AT..]);
        if crc != u32::from_le_bytes(take(record, 0)) {
            return None;
        }
        let text_bytes = usize::from(u16::from_le_bytes(take(record, TEXT_BYTES_AT)));
        let text = record.get(TEXT_AT..)?.get(..text_bytes)?;
        let trouble = Self {
            sequence: u64::from_le_bytes(take(record, SEQUENCE_AT)),
            unix_ms: u64::from_le_bytes(take(record, UNIX_MS_AT)),
            operation: record[OPERATION_AT],
            start_sector: u64::from_le_bytes(take(record, START_SECTOR_AT)),
            sectors: u32::from_le_bytes(take(record, SECTORS_AT)),
            errno: i32::from_le_bytes(take(record, ERRNO_AT)),
            duration_us: u64::from_le_bytes(take(record, DURATION_AT)),
            queue: u16::from_le_bytes(take(record, QUEUE_AT)),
            server_pid: u32::from_le_bytes(take(record, PID_AT)),
            text: String::from_utf8_lossy(text).into_owned(),
        };
        (trouble.sequence > 0).then_some(trouble)
    }
}

fn take<const N: usize>(record: &[u8; RECORD_BYTES], at: usize) -> [u8; N] {
    record.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

/// `text`, or its start and its end with a mark between them, in at most `bytes_max` bytes.
fn shortened(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let room = bytes_max.saturating_sub(CUT.len());
    let start = text.floor_char_boundary(room / 3);
    let end = text.ceil_char_boundary(text.len() - (room - start));
    format!("{}{CUT}{}", &text[..start], &text[end..])
}

fn header() -> [u8; RECORD_BYTES] {
    let mut header = [0; RECORD_BYTES];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(8, &VERSION.to_le_bytes());
    let number = |value: usize| u32::try_from(value).unwrap_or(0).to_le_bytes();
    put(12, &number(RECORD_BYTES));
    put(16, &number(TROUBLE_RECORDS_MAX));
    let crc = crc32c::crc32c(&header);
    header[RECORD_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    header
}

/// The ring of one device, open for writing. Shared by its queue threads.
#[derive(Debug)]
pub struct TroubleRing {
    file: File,
    last_sequence: AtomicU64,
    server_pid: u32,
}

impl TroubleRing {
    /// Opens the ring at `path` and goes on from its last record, or makes a new one. Whatever
    /// else lies there (a ring of another version, a link, half a file) is replaced, not written
    /// to. Owner only.
    ///
    /// # Errors
    /// What the operating system says when there can be no file.
    pub fn open(path: &Path) -> Result<Self> {
        let told = |error: &io::Error| Error::io(format!("open {}", path.display()), error);
        let existing = open_file(path, true).and_then(|file| {
            let records = records_of(&file)?;
            file.set_permissions(Permissions::from_mode(0o600))?;
            Ok((file, records.iter().map(|record| record.sequence).max().unwrap_or(0)))
        });
        let (file, last) = match existing {
            Ok(good) => good,
            Err(_) => (create(path).map_err(|error| told(&error))?, 0),
        };
        Ok(Self { file, last_sequence: AtomicU64::new(last), server_pid: std::process::id() })
    }

    /// Writes one record, over the oldest. Never blocks on anything but the file, never fails:
    /// what cannot be written is lost. Sequence and process are the ring's.
    pub fn record(&self, trouble: &Trouble) {
        let sequence = self.last_sequence.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let record = Trouble { sequence, server_pid: self.server_pid, ..trouble.clone() }.encode();
        let slot = sequence.wrapping_sub(1) % to_u64(TROUBLE_RECORDS_MAX);
        let at_byte = (slot + 1) * to_u64(RECORD_BYTES);
        // Half a record is as good as none: its checksum does not match.
        let _ = self.file.write_at(&record, at_byte);
    }
}

/// The records of the ring at `path`, oldest first.
///
/// # Errors
/// `NotFound`, `InvalidFormat` for what is no ring of this version, `Io`.
pub fn read(path: &Path) -> Result<Vec<Trouble>> {
    let told = |error: &io::Error| {
        let action = format!("read {}", path.display());
        if error.kind() == io::ErrorKind::InvalidData {
            return Error::new(ErrorKind::InvalidFormat, format!("{action}: {error}"));
        }
        Error::io(action, error)
    };
    let file = open_file(path, false).map_err(|error| told(&error))?;
    let mut records = records_of(&file).map_err(|error| told(&error))?;
    records.sort_by_key(|record| record.sequence);
    Ok(records)
}

/// A regular file that is there; links are not followed, and a FIFO is not waited for.
fn open_file(path: &Path, write: bool) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(invalid("not a regular file")) }
}

/// An empty ring in place of whatever lies at `path`.
fn create(path: &Path) -> io::Result<File> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.custom_flags(libc::O_NOFOLLOW).open(path)?;
    file.set_len(to_u64(FILE_BYTES))?;
    file.write_all_at(&header(), 0)?;
    Ok(file)
}

/// All records that can be believed, in the order of their slots.
fn records_of(file: &File) -> io::Result<Vec<Trouble>> {
    let bytes = to_usize(file.metadata()?.len());
    if bytes != Some(FILE_BYTES) {
        return Err(invalid("not the length of a trouble ring"));
    }
    let mut whole = vec![0; FILE_BYTES];
    file.read_exact_at(&mut whole, 0)?;
    let (blocks, _) = whole.as_chunks::<RECORD_BYTES>();
    match blocks.split_first() {
        Some((first, records)) if *first == header() => {
            Ok(records.iter().filter_map(Trouble::decode).collect())
        }
        _ => Err(invalid("not the header of a trouble ring of this version")),
    }
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn trouble(start_sector: u64) -> Trouble {
        Trouble {
            unix_ms: 1_700_000_000_123,
            operation: 3,
            start_sector,
            sectors: 8,
            errno: libc::EILSEQ,
            duration_us: 1_500_000,
            queue: 31,
            text: format!("read 8 sectors from sector {start_sector}: checksum"),
            ..Trouble::default()
        }
    }

    fn new_ring() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trouble");
        (folder, path)
    }

    fn starts(path: &Path) -> Vec<u64> {
        read(path).unwrap().iter().map(|record| record.start_sector).collect()
    }

    #[test]
    fn a_record_comes_back_with_its_number_and_its_process() {
        let (_folder, path) = new_ring();
        let ring = TroubleRing::open(&path).unwrap();
        assert_eq!(read(&path).unwrap(), []);
        ring.record(&trouble(u64::MAX));
        let expected = Trouble { sequence: 1, server_pid: std::process::id(), ..trouble(u64::MAX) };
        assert_eq!(read(&path).unwrap(), [expected]);
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.permissions().mode() & 0o7777), (131_584, 0o600));
    }

    #[test]
    fn the_oldest_records_go_and_a_successor_goes_on() {
        let (_folder, path) = new_ring();
        let ring = TroubleRing::open(&path).unwrap();
        (0..300).for_each(|sector| ring.record(&trouble(sector)));
        assert_eq!(starts(&path), (44..300).collect::<Vec<_>>());
        drop(ring);
        let ring = TroubleRing::open(&path).unwrap();
        ring.record(&trouble(300));
        let records = read(&path).unwrap();
        assert_eq!((records.len(), records[0].start_sector), (256, 45));
        assert_eq!((records[255].sequence, records[255].start_sector), (301, 300));
    }

    #[test]
    fn threads_that_write_at_once_lose_nothing() {
        let (_folder, path) = new_ring();
        let ring = TroubleRing::open(&path).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let ring = &ring;
                scope.spawn(move || {
                    (0..32).for_each(|i| ring.record(&trouble(thread * 32 + i)));
                });
            }
        });
        let mut found = starts(&path);
        found.sort_unstable();
        assert_eq!(found, (0..256).collect::<Vec<_>>());
    }

    #[test]
    fn torn_and_blank_records_are_skipped_and_overwritten() {
        let (_folder, path) = new_ring();
        let ring = TroubleRing::open(&path).unwrap();
        (0..5).for_each(|sector| ring.record(&trouble(sector)));
        let file = File::options().write(true).open(&path).unwrap();
        // Half of the third record is another one's, the last is blank again.
        file.write_all_at(&[7; 256], 3 * 512 + 256).unwrap();
        file.write_all_at(&[0; 512], 5 * 512).unwrap();
        assert_eq!(starts(&path), [0, 1, 3]);
        drop(ring);
        TroubleRing::open(&path).unwrap().record(&trouble(9));
        assert_eq!(starts(&path), [0, 1, 3, 9], "goes on behind the highest that is whole");
    }

    #[test]
    fn every_flipped_bit_of_a_record_is_noticed() {
        let good = Trouble { sequence: 1, ..trouble(7) }.encode();
        assert!(Trouble::decode(&good).is_some());
        for at in 0..RECORD_BYTES {
            for bit in 0..8 {
                let mut bad = good;
                bad[at] ^= 1 << bit;
                assert_eq!(Trouble::decode(&bad), None, "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn what_is_no_ring_is_replaced_and_what_a_link_leads_to_is_not_touched() {
        let (folder, path) = new_ring();
        drop(TroubleRing::open(&path).unwrap());
        let good = std::fs::read(&path).unwrap();
        let mut newer = good.clone();
        newer[8] = 2;
        for bytes in [&b""[..], b"garbage", &good[..good.len() - 1], &newer] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::InvalidFormat);
            TroubleRing::open(&path).unwrap().record(&trouble(1));
            assert_eq!(starts(&path), [1]);
        }
        let victim = folder.path().join("victim");
        std::fs::write(&victim, b"precious").unwrap();
        std::fs::remove_file(&path).unwrap();
        symlink(&victim, &path).unwrap();
        assert!(read(&path).is_err(), "a link is not followed");
        TroubleRing::open(&path).unwrap().record(&trouble(2));
        assert_eq!(starts(&path), [2]);
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&path).is_err(), "a FIFO is not waited for");
        TroubleRing::open(&path).unwrap().record(&trouble(3));
        assert_eq!(starts(&path), [3]);
    }

    #[test]
    fn where_no_file_can_be_there_is_an_error_and_a_missing_ring_is_not_found() {
        let (folder, path) = new_ring();
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(TroubleRing::open(&folder.path().join("missing/trouble")).is_err());
        std::fs::create_dir(&path).unwrap();
        assert!(TroubleRing::open(&path).is_err());
    }

    #[test]
    fn a_record_that_cannot_be_written_is_lost_without_a_word() {
        let file = File::options().read(true).open("/dev/null").unwrap();
        let ring = TroubleRing { file, last_sequence: AtomicU64::new(u64::MAX), server_pid: 1 };
        ring.record(&trouble(1));
        ring.record(&trouble(2));
    }

    #[test]
    fn a_long_text_loses_its_middle_at_a_char_boundary() {
        assert_eq!(shortened("abc", 3), "abc");
        assert_eq!(shortened("abcdefghijklmnopqrst", 14), "abc ... opqrst");
        for shift in 0..4 {
            let text = format!("{}{}", "a".repeat(shift), "\u{20ac}".repeat(400));
            let short = Trouble { sequence: 1, text, ..Trouble::default() }.encode();
            let text = Trouble::decode(&short).unwrap().text;
            assert!((450..=456).contains(&text.len()), "{}", text.len());
            assert!(!text.contains('\u{fffd}') && text.contains(CUT), "{text}");
        }
    }
}
