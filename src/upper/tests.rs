//! A pair on real files in a folder: what users meet.

use super::*;
use crate::format::lsmt::UuidText;
use crate::source::FileIdentity;
use std::fs::File;
use std::path::Path;

const DISK_BYTES: u64 = 1 << 20;

fn paths(folder: &Path) -> PairPaths {
    PairPaths { data: folder.join("data.lsmt"), index: folder.join("index.lsmt") }
}

fn options(folder: &Path) -> PairOptions {
    PairOptions { journal_folder: folder.join("run"), ..PairOptions::default() }
}

fn fresh() -> (tempfile::TempDir, PairPaths, PairOptions) {
    let folder = tempfile::tempdir().unwrap();
    let paths = paths(folder.path());
    let new = NewPair {
        virtual_bytes: DISK_BYTES,
        uuid: new_uuid().unwrap(),
        parent_uuid: UuidText::NIL,
    };
    create(&paths, &new).unwrap();
    let options = options(folder.path());
    (folder, paths, options)
}

fn sectors(worker: &mut PairWorker, start: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; count * 512];
    worker
        .read(start, &mut bytes, |_, gap| {
            gap.fill(b'.');
            Ok(())
        })
        .unwrap();
    bytes.chunks(512).map(|sector| sector[0]).collect()
}

#[test]
fn what_was_written_is_read_back_and_gaps_come_from_below() {
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(1, &[b'a'; 1024]).unwrap();
    worker.zero(2..4).unwrap();
    assert_eq!(sectors(&mut worker, 0, 6), *b".a\0\0..");
    worker.write(0, &[b'b'; 512]).unwrap();
    pair.flush().unwrap();
    assert_eq!(pair.usage().unflushed_entries, 0);
    assert_eq!(pair.usage().live_bytes, 1024);
    pair.close().unwrap();
    assert_eq!(worker.write(0, &[0; 512]).unwrap_err().kind(), ErrorKind::ReadOnly);
    drop((worker, pair));
    let mut worker = Pair::open(&paths, &options).unwrap().worker();
    assert_eq!(sectors(&mut worker, 0, 6), *b"ba\0\0..");
}

#[test]
fn a_server_that_is_killed_loses_no_acknowledged_write() {
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(0, &[b'a'; 512]).unwrap();
    pair.flush().unwrap();
    worker.write(1, &[b'b'; 512]).unwrap();
    worker.zero(0..1).unwrap();
    // Dropped, not closed: what a kill leaves.
    drop((worker, pair));
    for _ in 0..2 {
        let mut worker = Pair::open(&paths, &options).unwrap().worker();
        assert_eq!(sectors(&mut worker, 0, 3), *b"\0b.");
        assert_eq!(worker.pair().usage().unflushed_entries, 2);
    }
}

#[test]
fn a_second_server_is_refused_with_the_process_of_the_first() {
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    let error = Pair::open(&paths, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(format!("{error:#}").contains(&std::process::id().to_string()), "{error:#}");
    drop(pair);
    Pair::open(&paths, &options).unwrap();
}

#[test]
fn a_successor_with_the_open_data_file_is_not_locked_out() {
    let (_folder, paths, options) = fresh();
    let file = File::options().read(true).write(true).open(&paths.data).unwrap();
    let pair = Pair::open_with(file.try_clone().unwrap(), &paths, &options).unwrap();
    pair.worker().write(0, &[b'a'; 512]).unwrap();
    drop(pair);
    assert_eq!(Pair::open(&paths, &options).unwrap_err().kind(), ErrorKind::Busy);
    let mut worker = Pair::open_with(file, &paths, &options).unwrap().worker();
    assert_eq!(sectors(&mut worker, 0, 1), *b"a");
}

#[test]
fn an_index_that_another_program_wrote_meanwhile_is_refused_naming_the_journal() {
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    pair.worker().write(0, &[b'a'; 512]).unwrap();
    drop(pair);
    let index = File::options().write(true).open(&paths.index).unwrap();
    index.set_len(index.metadata().unwrap().len() + 16).unwrap();
    let error = Pair::open(&paths, &options).unwrap_err();
    assert!(format!("{error:#}").contains(".journal"), "{error:#}");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn what_is_no_pair_of_ours_is_refused_and_nothing_is_written() {
    let (folder, good, options) = fresh();
    let (data, index) = (std::fs::read(&good.data).unwrap(), std::fs::read(&good.index).unwrap());
    let refused = |what: &str, data: &[u8], index: &[u8], options: &PairOptions| {
        std::fs::write(&good.data, data).unwrap();
        std::fs::write(&good.index, index).unwrap();
        let error = Pair::open(&good, options).unwrap_err();
        assert_eq!(std::fs::read(&good.data).unwrap(), data, "{what}");
        assert_eq!(std::fs::read(&good.index).unwrap(), index, "{what}");
        let journals = std::fs::read_dir(folder.path().join("run")).map_or(0, Iterator::count);
        assert_eq!(journals, 0, "{what}");
        error.kind()
    };
    let with_flags = |flags: u8| [&data[..28], &[flags], &data[29..]].concat();
    // Another digit: one UUID in sixteen begins with a zero.
    let digit = if index[56] == b'0' { b"1" } else { b"0" };
    let foreign = [&index[..56], digit, &index[57..]].concat();
    let sealed = [&data[..], &with_flags(6)].concat();
    let parent = PairOptions { parent_uuid: Some(new_uuid().unwrap()), ..options.clone() };
    let size = PairOptions { virtual_bytes: Some(DISK_BYTES + 512), ..options.clone() };
    for (what, data, index, options, kind) in [
        ("magic", &b"LSMT"[..], &index[..], &options, ErrorKind::Corrupt),
        ("no data", &b""[..], &index, &options, ErrorKind::Corrupt),
        ("no index", &data, b"", &options, ErrorKind::Corrupt),
        ("swapped", &index, &data, &options, ErrorKind::Corrupt),
        ("not lsmt", &[7; 4096], &index, &options, ErrorKind::InvalidFormat),
        ("sealed", &with_flags(7), &index, &options, ErrorKind::Corrupt),
        ("sealed in place", &sealed, &index, &options, ErrorKind::Unsupported),
        ("sparse", &with_flags(0x13), &index, &options, ErrorKind::Unsupported),
        ("uuids", &data, &foreign, &options, ErrorKind::Corrupt),
        ("parent", &data, &index, &parent, ErrorKind::InvalidConfig),
        ("size", &data, &index, &size, ErrorKind::InvalidConfig),
    ] {
        assert_eq!(refused(what, data, index, options), kind, "{what}");
    }
    let half = PairPaths { index: folder.path().join("missing"), ..good.clone() };
    assert_eq!(Pair::open(&half, &options).unwrap_err().kind(), ErrorKind::NotFound);
    let one = PairPaths { index: good.data.clone(), ..good.clone() };
    assert_eq!(Pair::open(&one, &options).unwrap_err().kind(), ErrorKind::InvalidConfig);
    let lower = crate::source::FileIdentity::of(&File::open(&good.data).unwrap()).unwrap();
    let lowers = PairOptions { lowers: vec![lower], ..options };
    assert_eq!(Pair::open(&good, &lowers).unwrap_err().kind(), ErrorKind::InvalidConfig);
}

#[test]
fn a_full_quota_fails_the_write_alone_and_overwritten_space_is_used_again() {
    let (_folder, paths, options) = fresh();
    let options = PairOptions { quota_bytes: Some(4096 + 8 * 512), ..options };
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(0, &[b'a'; 8 * 512]).unwrap();
    pair.flush().unwrap();
    let error = worker.write(8, &[b'b'; 512]).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, libc::ENOSPC));
    worker.zero(0..4).unwrap();
    assert!(worker.write(8, &[b'b'; 5 * 512]).is_err(), "one sector too many");
    assert_eq!(pair.usage().unflushed_entries, 0, "it flushed, since the zeros may not last yet");
    worker.write(8, &[b'b'; 4 * 512]).unwrap();
    assert_eq!(sectors(&mut worker, 0, 13), *b"\0\0\0\0aaaabbbb.");
    assert_eq!(pair.usage().file_bytes, 8192);
    assert_eq!(pair.warning(), None, "half of it was free at the last flush");
    pair.flush().unwrap();
    assert_eq!(pair.usage().quota_percent(), Some(100));
    let warning = pair.warning().unwrap();
    assert!(warning.contains("100 % of the quota are used: 8192 of 8192 bytes"), "{warning}");
    worker.zero(0..DISK_BYTES / 512).unwrap();
    pair.flush().unwrap();
    assert_eq!(pair.warning(), None);
}

#[test]
fn what_is_written_again_before_a_flush_takes_no_more_space() {
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(0, b"s".repeat(512).as_slice()).unwrap();
    pair.flush().unwrap();
    for round in 0_u64..100 {
        let byte = b'a' + u8::try_from(round % 26).unwrap();
        worker.write(round % 3, &[byte; 512]).unwrap();
    }
    // What the flush made durable, three sectors that are seen, and one that was being written.
    assert_eq!(pair.usage().file_bytes, 4096 + 5 * 512);
    pair.flush().unwrap();
    assert_eq!(sectors(&mut worker, 0, 4), *b"vtu.");
    assert_eq!(pair.usage().index_bytes, 4096 + 3 * 512, "batches of one and of one entry");
    assert_eq!(as_the_reference_reads(&paths)[..4], [Some(b'v'), Some(b't'), Some(b'u'), None]);
}

/// Each is written over while a read that found it waits for another layer.
#[test]
fn space_that_a_read_is_about_to_look_at_is_not_written_again() {
    for (what, flushes) in [("before a flush", false), ("after a flush", true)] {
        let (_folder, paths, options) = fresh();
        let pair = Pair::open(&paths, &options).unwrap();
        let (mut reader, mut writer) = (pair.worker(), pair.worker());
        writer.write(1, &[b'a'; 7 * 512]).unwrap();
        let mut seen = [0; 8 * 512];
        reader
            .read(0, &mut seen, |_, gap| {
                gap.fill(b'.');
                for byte in *b"bcdefg" {
                    writer.write(1, &[byte; 7 * 512])?;
                    writer.write(64, &[b'x'; 7 * 512])?;
                    if flushes {
                        pair.flush()?;
                    }
                }
                Ok(())
            })
            .unwrap();
        let seen: Vec<u8> = seen.iter().step_by(512).copied().collect();
        assert_eq!(seen, *b".aaaaaaa", "{what}");
        assert_eq!(sectors(&mut reader, 0, 8), *b".ggggggg", "{what}");
        let before = pair.usage().file_bytes;
        writer.write(128, &[b'y'; 7 * 512]).unwrap();
        assert_eq!(pair.usage().file_bytes, before, "{what}: and then it is");
    }
}

/// The file system is full for everybody: told of a real one by what it says itself.
#[test]
fn the_room_of_a_file_system_is_what_statvfs_says() {
    let (_folder, paths, _options) = fresh();
    let data = File::open(&paths.data).unwrap();
    let room = Storage::room(&data).unwrap().unwrap();
    assert!(room.total_bytes >= room.available_bytes && room.total_bytes > 1 << 20, "{room:?}");
}

#[test]
fn a_log_that_is_much_too_long_is_rewritten_and_stays_readable() {
    let (_folder, paths, options) = fresh();
    let options = PairOptions { rewrite_entries_min: 64, ..options };
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    for round in 0_u64..100 {
        let byte = b'a' + u8::try_from(round % 26).unwrap();
        worker.write(round % 3, &[byte; 512]).unwrap();
        pair.flush().unwrap();
        assert!(pair.usage().index_bytes <= 4096 + 4 * 1024, "{:?}", pair.usage());
        assert!(pair.usage().file_bytes <= 4096 + 5 * 512, "{:?}", pair.usage());
    }
    let seen = sectors(&mut worker, 0, 4);
    drop((worker, pair));
    let mut worker = Pair::open(&paths, &options).unwrap().worker();
    assert_eq!(sectors(&mut worker, 0, 4), seen);
    let beside = paths.index.with_file_name("index.lsmt.rewrite");
    assert!(!beside.exists());
}

#[test]
fn entries_that_are_in_the_log_already_are_replayed_without_freeing_what_they_point_at() {
    // A server killed between its append to the index and the clearing of the journal: replayed
    // over themselves, an entry once covered what the next pointed at, and its space was given
    // away while it was in use.
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(0, &[b'a'; 512]).unwrap();
    worker.write(0, &[b'b'; 512]).unwrap();
    pair.flush().unwrap();
    let held = pair.journal.held();
    assert_eq!(held, 2..2);
    pair.journal.clear_to(0);
    drop((worker, pair));
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    pair.flush().unwrap();
    for sector in 1_u64..8 {
        worker.write(sector, &[b'c'; 512]).unwrap();
        pair.flush().unwrap();
    }
    assert_eq!(sectors(&mut worker, 0, 9), *b"bccccccc.");
    assert_eq!(pair.usage().file_bytes, 4096 + 8 * 512, "and the space of `a` is used again");
}

/// A supervisor keeps a descriptor of the data file, and with it the lock: a pair could not be
/// attached again right after its detach.
#[test]
fn a_closed_pair_is_free_though_somebody_has_its_file_open() {
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    let _kept = pair.data_file().unwrap().try_clone().unwrap();
    pair.close().unwrap();
    drop(pair);
    assert!(Pair::open(&paths, &options).is_ok());
}

/// What the reference sees: every entry that is no padding, later ones on top.
fn as_the_reference_reads(paths: &PairPaths) -> Vec<Option<u8>> {
    let (data, index) = (std::fs::read(&paths.data).unwrap(), std::fs::read(&paths.index).unwrap());
    let end_sector = to_u64(data.len()) / SECTOR_SIZE;
    let log = crate::format::lsmt::parse_writable_log(&index[4096..], 4096, end_sector).unwrap();
    let mut seen = vec![None; usize::try_from(DISK_BYTES / 512).unwrap()];
    for segment in log {
        for at in 0..segment.sectors {
            let place = usize::try_from((segment.mapped_sector + at) * 512).unwrap();
            let sector = usize::try_from(segment.start_sector + at).unwrap();
            seen[sector] = Some(if segment.zeroed { 0 } else { data[place] });
        }
    }
    seen
}

#[test]
fn a_compacted_pair_is_what_is_seen_of_it_and_the_reference_reads_it() {
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(0, &[b'a'; 512 * 100]).unwrap();
    worker.write(200, &[b'b'; 512 * 10]).unwrap();
    pair.flush().unwrap();
    worker.zero(0..90).unwrap();
    worker.write(205, &[b'c'; 512]).unwrap();
    let busy = Arc::clone(&pair).compact().unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    drop(worker);
    // Unflushed entries are in the journal of a pair that was killed.
    let inode = FileIdentity::of(&File::open(&paths.data).unwrap()).unwrap();
    drop(pair);
    let done = compact(&paths, &options).unwrap();
    assert_eq!(done.after.file_bytes, 4096 + 20 * 512);
    assert_eq!((done.before.live_bytes, done.after.dead_bytes), (20 * 512, 0));
    assert_eq!(std::fs::metadata(&paths.data).unwrap().len(), done.after.file_bytes);
    assert_eq!(std::fs::metadata(&paths.index).unwrap().len(), done.after.index_bytes);
    assert_eq!(FileIdentity::of(&File::open(&paths.data).unwrap()).unwrap(), inode);
    let seen = as_the_reference_reads(&paths);
    for (sectors, byte) in [
        (0..90, Some(0)),
        (90..100, Some(b'a')),
        (100..200, None),
        (200..205, Some(b'b')),
        (205..206, Some(b'c')),
        (206..210, Some(b'b')),
        (210..2048, None),
    ] {
        assert!(seen[sectors.clone()].iter().all(|found| *found == byte), "{sectors:?}");
    }
    let again = compact(&paths, &options).unwrap();
    assert_eq!((again.moved_bytes, again.after.file_bytes), (0, done.after.file_bytes));
    let mut worker = Pair::open(&paths, &options).unwrap().worker();
    worker.write(0, &[b'd'; 512]).unwrap();
    assert_eq!(sectors(&mut worker, 0, 2), *b"d\0");
    assert_eq!(sectors(&mut worker, 199, 13), *b".bbbbbcbbbb..");
}

#[test]
fn a_pair_in_use_is_not_compacted_and_its_user_is_named() {
    let (_folder, paths, options) = fresh();
    let _pair = Pair::open(&paths, &options).unwrap();
    let error = compact(&paths, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(format!("{error:#}").contains(&std::process::id().to_string()), "{error:#}");
}

#[test]
fn a_disk_that_grew_has_both_headers_say_so_and_its_content() {
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    pair.worker().write(2047, &[b'a'; 512]).unwrap();
    assert_eq!(resize(&paths, &options, 2 * DISK_BYTES).unwrap_err().kind(), ErrorKind::Busy);
    let worker = pair.worker();
    assert_eq!(pair.resize(2 * DISK_BYTES).unwrap_err().kind(), ErrorKind::Busy);
    drop(worker);
    for size in [DISK_BYTES - 512, DISK_BYTES + 1, !511] {
        assert_eq!(resize(&paths, &options, size).unwrap_err().kind(), ErrorKind::Usage, "{size}");
        assert_eq!(Pair::open(&paths, &options).unwrap().virtual_sectors(), 2048);
    }
    assert_eq!(resize(&paths, &options, 2 * DISK_BYTES).unwrap(), DISK_BYTES);
    for path in [&paths.data, &paths.index] {
        let header = std::fs::read(path).unwrap();
        let header = crate::format::lsmt::Header::parse(&header[..4096], 0).unwrap();
        assert_eq!(header.virtual_size_bytes, 2 * DISK_BYTES);
    }
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    assert_eq!(pair.virtual_sectors(), 4096);
    worker.write(4095, &[b'z'; 512]).unwrap();
    assert_eq!(sectors(&mut worker, 2046, 3), *b".a.");
    assert_eq!(sectors(&mut worker, 4094, 2), *b".z");
}

#[test]
fn a_disk_that_is_served_grows_and_its_workers_go_on() {
    let (_folder, paths, options) = fresh();
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(2047, &[b'a'; 512]).unwrap();
    assert_eq!(worker.write(2048, &[b'b'; 512]).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(pair.grow(DISK_BYTES - 512).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(pair.grow(DISK_BYTES).unwrap(), DISK_BYTES);
    assert_eq!(pair.grow(2 * DISK_BYTES).unwrap(), DISK_BYTES);
    assert_eq!(pair.grow(2 * DISK_BYTES).unwrap(), 2 * DISK_BYTES);
    assert_eq!(pair.usage().unflushed_entries, 0);
    worker.write(4095, &[b'z'; 512]).unwrap();
    assert_eq!(sectors(&mut worker, 2046, 3), *b".a.");
    pair.flush().unwrap();
    pair.close().unwrap();
    assert_eq!(pair.grow(4 * DISK_BYTES).unwrap_err().kind(), ErrorKind::ReadOnly);
    drop((worker, pair));
    let pair = Pair::open(&paths, &options).unwrap();
    assert_eq!(pair.virtual_sectors(), 4096);
    assert_eq!(sectors(&mut pair.worker(), 4094, 2), *b".z");
}

#[test]
fn a_pair_with_the_size_of_its_lowers_is_not_resized() {
    let (_folder, paths, options) = fresh();
    for path in [&paths.data, &paths.index] {
        let mut bytes = std::fs::read(path).unwrap();
        crate::format::lsmt::set_virtual_size(&mut bytes, 0);
        std::fs::write(path, bytes).unwrap();
    }
    let error = resize(&paths, &options, DISK_BYTES).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// A file system on a disk with a quota a little above its size met ENOSPC though half of the file
/// was waiting for a flush.
#[test]
fn a_disk_whose_quota_holds_it_and_what_is_in_flight_is_overwritten_for_ever() {
    let (_folder, paths, options) = fresh();
    let options = PairOptions { quota_bytes: Some(4096 + 80 * 512), ..options };
    let pair = Pair::open(&paths, &options).unwrap();
    std::thread::scope(|scope| {
        for thread in 0_u64..2 {
            let mut worker = pair.worker();
            scope.spawn(move || {
                for round in 0_u64..500 {
                    let start = thread * 32 + round % 8 * 4;
                    let byte = b'a' + u8::try_from(round % 26).unwrap();
                    worker.write(start, &[byte; 4 * 512]).unwrap();
                    assert_eq!(sectors(&mut worker, start, 4), [byte; 4]);
                }
            });
        }
    });
    assert!(pair.usage().file_bytes <= 4096 + 80 * 512);
}
