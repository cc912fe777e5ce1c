//! Conversations that change a disk.

use super::*;
use std::collections::HashMap;
use std::sync::Mutex;

/// What was done to the disk, and what became of its sectors.
#[derive(Default)]
struct Book {
    sectors: HashMap<u64, u8>,
    zeroed: Vec<(Range<u64>, Space)>,
    flushes: u32,
    /// Flushes fail with this errno.
    flush_errno: i32,
}

/// A disk whose sectors each repeat one byte. Sector 90 has no room, sector 95 panics.
#[derive(Clone, Default)]
struct Slate(Arc<Mutex<Book>>);

impl Disk for Slate {
    type Worker = Slate;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: SECTORS,
            read_only: false,
            optimal_io_bytes: 4096,
            discard_granularity_bytes: Some(512),
        }
    }

    fn worker(&self) -> Result<Slate> {
        Ok(self.clone())
    }

    fn flush(&self) -> Result<()> {
        let mut book = self.0.lock().unwrap();
        book.flushes += 1;
        match book.flush_errno {
            0 => Ok(()),
            errno => Err(Error::io("sync", &io::Error::from_raw_os_error(errno))),
        }
    }
}

impl Worker for Slate {
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        let book = self.0.lock().unwrap();
        for (sector, bytes) in (start_sector..).zip(dst.chunks_mut(512)) {
            bytes.fill(book.sectors.get(&sector).copied().unwrap_or(0));
        }
        Ok(())
    }

    fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        assert!(src.len().is_multiple_of(512) && !src.is_empty(), "whole sectors");
        assert!(start_sector != 95, "sector 95 is cursed");
        if start_sector == 90 {
            return Err(Error::io("write", &io::Error::from_raw_os_error(libc::EDQUOT)));
        }
        let mut book = self.0.lock().unwrap();
        for (sector, bytes) in (start_sector..).zip(src.chunks(512)) {
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "sector {sector} is mixed");
            book.sectors.insert(sector, bytes[0]);
        }
        Ok(())
    }

    fn write_zeroes(&mut self, sectors: Range<u64>, space: Space) -> Result<()> {
        let mut book = self.0.lock().unwrap();
        book.sectors.retain(|sector, _| !sectors.contains(sector));
        book.zeroed.push((sectors, space));
        Ok(())
    }
}

impl Peer<Slate> {
    /// Writes sectors that each repeat `byte`; the error of the reply.
    fn write(&mut self, flags: u16, offset_bytes: u64, byte: u8, len_bytes: usize) -> u8 {
        self.ask_flagged(flags, 1, offset_bytes, u32::try_from(len_bytes).unwrap());
        self.send(&vec![byte; len_bytes]);
        self.errno()
    }

    /// The first byte of each sector.
    fn firsts(&mut self, start_sector: u64, count: usize) -> Vec<u8> {
        self.ask(0, start_sector * 512, u32::try_from(count * 512).unwrap());
        assert_eq!(self.errno(), 0);
        self.receive(count * 512).chunks(512).map(|bytes| bytes[0]).collect()
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.shared.disk.0.lock().unwrap()
    }
}

#[test]
fn what_is_written_is_read_and_what_is_trimmed_or_zeroed_reads_as_zeros() {
    let mut peer = Peer::new(Slate::default());
    for (offset, byte, len) in [(0, 1, 512), (512, 2, 4096), (100_352, 3, 600_064)] {
        assert_eq!(peer.write(0, offset, byte, len), 0, "{len} bytes at {offset}");
    }
    assert_eq!(peer.firsts(0, 10), [1, 2, 2, 2, 2, 2, 2, 2, 2, 0]);
    assert_eq!(peer.firsts(195, 1174), [vec![0], vec![3; 1172], vec![0]].concat());
    peer.ask(4, 512, 1024);
    assert_eq!(peer.errno(), 0);
    peer.ask_flagged(2, 6, 2048, 512);
    assert_eq!(peer.errno(), 0);
    assert_eq!(peer.firsts(0, 10), [1, 0, 0, 2, 0, 2, 2, 2, 2, 0]);
    let zeroed = [(1..3, Space::Free), (4..5, Space::Keep)];
    let book = peer.book();
    assert_eq!((&book.zeroed[..], book.flushes), (&zeroed[..], 0));
    drop(book);
    peer.end().1.unwrap();
}

#[test]
fn the_largest_write_arrives_whole_and_one_beyond_the_end_not_at_all() {
    let mut peer = Peer::new(Slate::default());
    assert_eq!(peer.write(0, 512, 9, 32 << 20), 0);
    assert_eq!(peer.firsts(65_536, 2), [9, 0]);
    assert_eq!(peer.write(0, (SECTORS - 1) * 512, 7, 1024), 28);
    assert_eq!(peer.firsts(SECTORS - 1, 1), [0]);
    peer.end().1.unwrap();
}

#[test]
fn zeros_of_any_length_reach_the_disk_in_steps() {
    let mut peer = Peer::new(Slate::default());
    let step = u64::from(ZEROES_SECTORS_MAX);
    assert!(SECTORS < step, "or the steps below must be looked for in the disk itself");
    let slate = peer.shared.disk.clone();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let shared = Shared { disk: slate, export: peer.shared.export, errors: AtomicU64::new(0) };
    let mut session = Session::new(Wire::new(&ours, Duration::ZERO), &shared).unwrap();
    session.zero(7..7 + 2 * step + 1, Space::Free, true).unwrap();
    let zeroed = [7..7 + step, 7 + step..7 + 2 * step, 7 + 2 * step..8 + 2 * step];
    assert_eq!(peer.book().zeroed, zeroed.map(|sectors| (sectors, Space::Free)));
    assert_eq!(peer.book().flushes, 1);
    peer.ask(2, 0, 0);
    peer.end().1.unwrap();
}

#[test]
fn flushes_and_durable_changes_flush_and_fail_with_their_flush() {
    let mut peer = Peer::new(Slate::default());
    assert_eq!(peer.write(1, 0, 5, 512), 0);
    assert_eq!(peer.book().flushes, 1);
    for (flags, command, len, flushes) in [(1, 4, 512, 2), (1, 6, 512, 3), (0, 3, 0, 4)] {
        peer.ask_flagged(flags, command, 1024, len);
        assert_eq!((peer.errno(), peer.book().flushes), (0, flushes), "command {command}");
    }
    peer.book().flush_errno = libc::ENOSPC;
    assert_eq!(peer.write(1, 0, 6, 512), 28);
    peer.ask(3, 0, 0);
    assert_eq!(peer.errno(), 28);
    assert_eq!(peer.write(0, 512, 6, 512), 0, "nobody asked for a flush");
    assert_eq!(peer.firsts(0, 2), [6, 6]);
    assert_eq!(peer.shared.errors.load(Ordering::Relaxed), 2);
    peer.end().1.unwrap();
}

#[test]
fn a_write_that_fails_or_is_refused_takes_its_payload_with_it() {
    let mut peer = Peer::new(Slate::default());
    for (flags, offset, len, errno) in [
        (0, 1, 512, 22),
        (0, 0, 513, 22),
        (4, 0, 512, 22),
        (0, SECTORS * 512, 4096, 28),
        (0, 90 * 512, 4096, 28),
        (0, 95 * 512, 4096, 5),
    ] {
        assert_eq!(peer.write(flags, offset, 0x25, len), errno, "{len} bytes at {offset}");
        assert_eq!(peer.write(0, 0, 8, 512), 0, "and the next is served");
    }
    assert_eq!(peer.book().sectors.len(), 1);
    peer.end().1.unwrap();
}

#[test]
fn a_payload_that_is_cut_off_writes_nothing() {
    for sent in [0, 1, 511, 100_000, 199_999] {
        let mut peer = Peer::new(Slate::default());
        peer.ask(1, 0, 200_192);
        peer.send(&vec![1; sent]);
        let slate = peer.shared.disk.clone();
        let (rest, outcome) = peer.end();
        assert_eq!(rest, b"");
        assert!(format!("{:#}", outcome.unwrap_err()).starts_with("nbd transmission: "));
        assert!(slate.0.lock().unwrap().sectors.is_empty(), "{sent} bytes");
    }
}
