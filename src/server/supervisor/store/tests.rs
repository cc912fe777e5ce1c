//! The store, with this process as systemd.

use super::*;
use crate::server::packet::PacketSocket;
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::net::UnixDatagram;

/// systemd's end, and the store that speaks to it.
fn store() -> (tempfile::TempDir, UnixDatagram, DescriptorStore) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    systemd.set_nonblocking(true).unwrap();
    let store = DescriptorStore::at(path.as_os_str().as_bytes()).unwrap();
    (folder, systemd, store)
}

/// What systemd does with all that it was told: its descriptors by their names.
fn take(systemd: &UnixDatagram, kept: &mut BTreeMap<String, OwnedFd>) -> usize {
    let socket = PacketSocket::from_file(systemd.try_clone().unwrap().into());
    let mut messages = 0;
    while let Ok(Some(packet)) = socket.receive() {
        messages += 1;
        let text = String::from_utf8(packet.bytes).unwrap();
        if let Some(name) = text.strip_prefix("FDSTORE=1\nFDPOLL=0\nFDNAME=") {
            assert_eq!(packet.files.len(), 1, "{text}");
            kept.extend(packet.files.into_iter().map(|file| (name.to_owned(), file)));
        } else {
            let name = text.strip_prefix("FDSTOREREMOVE=1\nFDNAME=").unwrap();
            assert!(kept.remove(name).is_some(), "{name} was never stored");
        }
    }
    messages
}

fn file_with(text: &str) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.into()
}

fn text_of(file: OwnedFd) -> String {
    let (mut file, mut text) = (File::from(file), String::new());
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

fn parcel_of(texts: &[&str]) -> ParcelFiles {
    texts.iter().map(|text| file_with(text)).collect()
}

#[test]
fn a_parcel_comes_back_in_order_to_the_next_supervisor() {
    for count in [1, 2, PARCEL_FILES_MAX] {
        let (_folder, systemd, mut store) = store();
        let texts: Vec<String> = (0..count).map(|at| at.to_string()).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        store.keep((7, 99), Some(&file_with("program")), &parcel_of(&texts));
        let mut kept = BTreeMap::new();
        while store.due().is_some() || kept.is_empty() {
            take(&systemd, &mut kept);
            store.work();
        }
        take(&systemd, &mut kept);
        assert_eq!(kept.len(), count + 1);
        let (_folder, _systemd, mut next) = self::store();
        // In whatever order systemd hands them over.
        let given = kept.into_iter().rev().collect();
        let mut parcels = next.take_on(given, |id, attached| (id, attached) == (7, 99));
        let Stored { program, parcel } = parcels.remove(&7).unwrap();
        assert_eq!(text_of(program.unwrap()), "program");
        let found: Vec<String> = parcel.into_iter().map(text_of).collect();
        assert_eq!(found, texts);
    }
}

#[test]
fn the_new_parcel_is_stored_before_the_old_one_is_removed_and_the_same_one_not_at_all() {
    let (_folder, systemd, mut store) = store();
    let mut kept = BTreeMap::new();
    let (program, layers) = (file_with("p"), parcel_of(&["map", "layer"]));
    store.keep((0, 1), Some(&program), &layers);
    assert_eq!(take(&systemd, &mut kept), 3);
    // A successor sends the same files, and a map of its own.
    let again = vec![file_with("map"), layers[1].try_clone().unwrap()];
    store.keep((0, 1), Some(&program), &again);
    assert_eq!(take(&systemd, &mut kept), 0);
    // After a snapshot there are others.
    store.keep((0, 1), Some(&program), &parcel_of(&["map", "layer", "new"]));
    let first = PacketSocket::from_file(systemd.try_clone().unwrap().into()).receive();
    assert!(first.unwrap().unwrap().bytes.starts_with(b"FDSTORE=1"));
    store.drop(0);
    store.drop(0);
    // An empty parcel is none.
    store.keep((0, 1), Some(&program), &Vec::new());
    store.keep((0, 1), None, &layers);
    let mut left = kept;
    let socket = PacketSocket::from_file(systemd.try_clone().unwrap().into());
    let mut removed = 0;
    while let Ok(Some(packet)) = socket.receive() {
        let text = String::from_utf8(packet.bytes).unwrap();
        if let Some(name) = text.strip_prefix("FDSTOREREMOVE=1\nFDNAME=") {
            left.remove(name);
            removed += 1;
        }
    }
    assert_eq!((left.len(), removed, store.file_count()), (0, 7, 0));
}

/// A stored descriptor used to keep the lock of an upper that was detached.
#[test]
fn a_lock_of_the_server_does_not_live_on_in_what_is_stored() {
    let (_folder, systemd, mut store) = store();
    let upper = tempfile::NamedTempFile::new().unwrap();
    let held = File::options().read(true).write(true).open(upper.path()).unwrap();
    held.try_lock().unwrap();
    let parcel = vec![file_with("map"), held.into()];
    store.keep((0, 1), Some(&file_with("p")), &parcel);
    let mut kept = BTreeMap::new();
    take(&systemd, &mut kept);
    let other = File::open(upper.path()).unwrap();
    assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
    drop(parcel);
    other.try_lock().unwrap();
    // It can be written through, as the server's own.
    let stored = kept.into_iter().find(|(name, _)| name.ends_with(".2.3")).unwrap().1;
    File::from(stored).write_all(b"x").unwrap();
}

#[test]
fn what_is_not_whole_or_not_wanted_or_older_is_removed() {
    let (_folder, systemd, mut store) = store();
    let name = |id, attached_unix_ms, generation, index, count| {
        Name { id, attached_unix_ms, generation, index, count }.text()
    };
    let given = |name: String| (name.clone(), file_with(&name));
    let parcels = store.take_on(
        vec![
            given(name(1, 5, 3, 0, 2)),
            given(name(1, 5, 3, 1, 2)),
            given(name(1, 5, 4, 0, 2)),
            given(name(1, 5, 4, 1, 2)),
            given(name(1, 5, 9, 1, 3)),
            given(name(2, 5, 1, 0, 1)),
            given("stored".to_owned()),
        ],
        |id, _| id != 2,
    );
    assert_eq!(parcels.keys().copied().collect::<Vec<_>>(), [1]);
    let mut kept: BTreeMap<String, OwnedFd> = [
        (1, 5, 3, 0, 2),
        (1, 5, 3, 1, 2),
        (1, 5, 4, 0, 2),
        (1, 5, 4, 1, 2),
        (1, 5, 9, 1, 3),
        (2, 5, 1, 0, 1),
    ]
    .into_iter()
    .map(|(id, attached, generation, index, count)| {
        (name(id, attached, generation, index, count), file_with(""))
    })
    .chain([("stored".to_owned(), file_with(""))])
    .collect();
    take(&systemd, &mut kept);
    let left: Vec<String> = kept.into_keys().collect();
    assert_eq!(left, [name(1, 5, 4, 0, 2), name(1, 5, 4, 1, 2)]);
    // Names of this life are not those of the one before.
    store.keep((3, 6), Some(&file_with("p")), &parcel_of(&["map"]));
    assert_eq!(store.sets[&3].names[0].generation, 10);
}

#[test]
fn descriptors_are_ours_only_if_the_environment_says_so() {
    let given = |variables: &[(&str, &str)]| {
        let find = |name: &str| variables.iter().find(|it| it.0 == name).map(|it| it.1.into());
        Given::of(12, find).names.join(" ")
    };
    let pid = ("LISTEN_PID", "12");
    let two = [pid, ("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", "a:b")];
    assert_eq!(given(&two), "a b");
    for (variables, why) in [
        (vec![], "nothing is set"),
        (vec![("LISTEN_PID", "13"), two[1], two[2]], "another process's"),
        (vec![pid, ("LISTEN_FDS", "3"), two[2]], "names and descriptors differ in number"),
        (vec![pid, ("LISTEN_FDS", "-1"), two[2]], "no number"),
        (vec![pid, ("LISTEN_FDS", "4294967295"), two[2]], "more than there can be"),
        (vec![pid, two[1]], "no names"),
    ] {
        assert_eq!(given(&variables), "", "{why}");
    }
}

#[test]
fn names_are_short_enough_for_one_variable_and_others_are_let_alone() {
    let longest = Name {
        id: crate::limits::DEVICE_ID_MAX,
        attached_unix_ms: 0xfff_ffff_ffff,
        generation: 999_999,
        index: PARCEL_FILES_MAX,
        count: PARCEL_FILES_MAX + 1,
    };
    assert_eq!(Name::parse(&longest.text()), Some(longest));
    // The kernel's bound for one variable: 32 pages.
    assert!((longest.text().len() + 1) * STORED_FILES_MAX + "LISTEN_FDNAMES=".len() < 32 * 4096);
    for text in ["", "stored", "1.2.3.4", "1.2.3.4.4", "1.2.3.0.258", "1.2.3.0.1.0", "1.x.3.0.1"] {
        assert_eq!(Name::parse(text), None, "{text}");
    }
}

#[test]
fn a_descriptor_known_by_its_number_becomes_our_own() {
    let file = file_with("mine");
    let copy = own(file.as_raw_fd()).unwrap();
    drop(file);
    assert_eq!(text_of(copy), "mine");
    assert!(own(RawFd::MAX).is_err());
}

/// A host whose systemd hangs must not hold up devices, and is told later.
#[test]
fn a_systemd_that_does_not_read_is_not_waited_for_and_told_later() {
    let (_folder, systemd, mut store) = store();
    let program = file_with("p");
    let started = Instant::now();
    let mut devices = 0;
    while store.due().is_none() {
        assert!(devices < 10_000, "the queue has no end");
        store.keep((devices, 1), Some(&program), &parcel_of(&["map"]));
        devices += 1;
    }
    for id in devices..devices + 20 {
        store.keep((id, 1), Some(&program), &parcel_of(&["map"]));
    }
    // One that went meanwhile is never told of.
    store.drop(devices + 3);
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    let mut kept = BTreeMap::new();
    for _ in 0..10_000 {
        take(&systemd, &mut kept);
        store.work();
    }
    assert_eq!(store.due(), None);
    let ids: std::collections::BTreeSet<u32> =
        kept.keys().map(|name| Name::parse(name).unwrap().id).collect();
    let expected = (0..devices + 20).filter(|id| *id != devices + 3).collect();
    assert_eq!(ids, expected);
}

#[test]
fn more_than_systemd_keeps_is_not_stored() {
    let (_folder, systemd, mut store) = store();
    let program = file_with("p");
    let mut kept = BTreeMap::new();
    let files: ParcelFiles = (0..200).map(|_| file_with("")).collect();
    for id in 0..20 {
        store.keep((id, 1), Some(&program), &files);
        for _ in 0..1000 {
            take(&systemd, &mut kept);
            store.work();
        }
        assert!(kept.len() <= STORED_FILES_MAX && store.due().is_none());
    }
    assert!(kept.len() > STORED_FILES_MAX - 201, "{}", kept.len());
    assert_eq!(kept.len(), store.file_count());
}
