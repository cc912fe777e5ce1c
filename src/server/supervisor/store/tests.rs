//! The store, with this process as systemd.

use super::*;
use crate::server::supervisor::Path;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

/// systemd's end, and the store that speaks to it.
fn store() -> (tempfile::TempDir, UnixDatagram, DescriptorStore) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    let store = DescriptorStore::at(path.as_os_str().as_bytes()).unwrap();
    (folder, systemd, store)
}

/// The next message to systemd, and what came with it.
fn told(systemd: &UnixDatagram) -> (String, Vec<OwnedFd>) {
    let packet = PacketSocket::from_file(systemd.try_clone().unwrap().into()).receive();
    let packet = packet.unwrap().unwrap();
    (String::from_utf8(packet.bytes).unwrap(), packet.files)
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

fn name_in(message: &str) -> &str {
    message.split_once("FDNAME=").unwrap().1
}

#[test]
fn a_parcel_is_one_descriptor_and_comes_back_in_order() {
    let (_folder, systemd, mut store) = store();
    for count in [0, 1, 200, 201, PARCEL_FILES_MAX] {
        let parcel: ParcelFiles = (0..count).map(|at| file_with(&at.to_string())).collect();
        let program = file_with("program");
        store.keep(7, Some(&program), &parcel);
        drop(parcel);
        let (message, mut files) = told(&systemd);
        let name = message.strip_prefix("FDSTORE=1\nFDPOLL=0\nFDNAME=").unwrap();
        assert_eq!(parse_name(name).unwrap().0, 7);
        assert_eq!(files.len(), 1);
        let socket = PacketSocket::from_file(files.remove(0));
        let stored = receive(7, &socket).unwrap();
        assert_eq!(text_of(stored.program.unwrap()), "program");
        let found: Vec<String> = stored.parcel.into_iter().map(text_of).collect();
        let expected: Vec<String> = (0..count).map(|at| at.to_string()).collect();
        assert_eq!(found, expected);
        store.drop(7);
        assert_eq!(told(&systemd).0, format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }
}

#[test]
fn the_new_parcel_is_stored_before_the_old_one_is_removed() {
    let (_folder, systemd, mut store) = store();
    store.keep(0, None, &Vec::new());
    store.keep(0, None, &Vec::new());
    store.drop(0);
    store.drop(0);
    let messages: Vec<String> = (0..4).map(|_| told(&systemd).0).collect();
    let [first, second, third, fourth] = &messages[..] else { unreachable!() };
    assert!(first.starts_with("FDSTORE=1") && second.starts_with("FDSTORE=1"));
    assert_eq!(*third, format!("FDSTOREREMOVE=1\nFDNAME={}", name_in(first)));
    assert_eq!(*fourth, format!("FDSTOREREMOVE=1\nFDNAME={}", name_in(second)));
    assert_ne!(name_in(first), name_in(second));
    systemd.set_nonblocking(true).unwrap();
    assert!(systemd.recv(&mut [0]).is_err(), "nothing more was said");
}

#[test]
fn what_was_received_is_stored_again_and_the_latest_counts() {
    let (_folder, systemd, mut store) = store();
    let old = Stored { program: None, parcel: vec![file_with("kept")] };
    let received =
        Received { parcels: [(3, (20, old))].into(), names: vec![name_of(3, 10), name_of(3, 20)] };
    assert_eq!((received.latest(3), received.latest(4)), (20, 0));
    let mut parcels = store.renew(received);
    let (message, mut files) = told(&systemd);
    assert!(message.starts_with("FDSTORE=1"));
    for time in [10, 20] {
        assert_eq!(told(&systemd).0, format!("FDSTOREREMOVE=1\nFDNAME={}", name_of(3, time)));
    }
    let again = receive(3, &PacketSocket::from_file(files.remove(0))).unwrap();
    assert_eq!(again.parcel.into_iter().map(text_of).collect::<String>(), "kept");
    assert_eq!(parcels.remove(&3).unwrap().parcel.len(), 1);
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
fn names_say_the_device_and_the_time_and_others_are_let_alone() {
    for (id, time, name) in [(0, 0, "obd-ublk-0-0"), (12, 255, "obd-ublk-12-ff")] {
        assert_eq!(name_of(id, time), name);
        assert_eq!(parse_name(name), Some((id, time)));
    }
    for name in ["", "stored", "obd-ublk-", "obd-ublk-1", "obd-ublk--1-2", "obd-ublk-1-x"] {
        assert_eq!(parse_name(name), None, "{name}");
    }
}

#[test]
fn a_bundle_that_makes_no_sense_is_refused() {
    let file = file_with("x");
    let upgrade = |id| Note::Upgrade { id }.encode();
    let part = Note::Parcel { last: false }.encode();
    for (packets, told) in [
        (vec![], "begins with None"),
        (vec![upgrade(2)], "begins with Some"),
        (vec![upgrade(1)], "ends with None"),
        (vec![upgrade(1), part.clone()], "ends with None"),
        (vec![upgrade(1), part, Note::Live.encode()], "ends with Some"),
        (vec![b"{".to_vec()], ""),
    ] {
        let (ours, theirs) = PacketSocket::pair().unwrap();
        for packet in &packets {
            ours.send(packet, &[file.as_fd()]).unwrap();
        }
        drop(ours);
        let error = receive(1, &theirs).unwrap_err();
        assert!(format!("{error:#}").contains(told), "{error:#}");
    }
    // More files than any image has.
    let (ours, theirs) = PacketSocket::pair().unwrap();
    ours.send(&upgrade(1), &[]).unwrap();
    let many: ParcelFiles = (0..=PARCEL_FILES_MAX).map(|_| file_with("")).collect();
    send_parcel(&ours, &many).unwrap();
    assert!(format!("{:#}", receive(1, &theirs).unwrap_err()).contains("files in a parcel"));
}

/// It used to be a question who closes what: the number is closed, the copy lives.
#[test]
fn a_descriptor_known_by_its_number_becomes_our_own() {
    let file = file_with("mine");
    let copy = own(file.as_raw_fd()).unwrap();
    drop(file);
    assert_eq!(text_of(copy), "mine");
    assert!(own(RawFd::MAX).is_err());
}

/// A host whose systemd hangs must not hold up devices.
#[test]
fn a_systemd_that_does_not_read_is_given_up() {
    let (_folder, systemd, mut store) = store();
    let mut kept = 0;
    while kept < 10_000 && store.names.len() == usize::try_from(kept).unwrap() {
        store.keep(kept, None, &Vec::new());
        kept += 1;
    }
    assert!(store.names.len() < 10_000, "the queue has no end");
    drop(systemd);
    store.keep(0, None, &Vec::new());
    assert!(DescriptorStore::at(Path::new("/nonexistent").as_os_str().as_bytes()).is_err());
}
