//! A disk that can be written, served in this process and written by the clients of others.

use crate::ram_disk::RamDisk;
use crate::{text, tool};
use obd_ublk::disk::{Disk, Worker};
use obd_ublk::nbd::{self, Server};
use std::time::Duration;

const SECTORS: u64 = 64 * 2048;

/// A server in this process, its socket's folder, and its URI.
fn serve() -> (Server, tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let server = Server::start(RamDisk::new(SECTORS, Duration::ZERO), &socket).unwrap();
    let uri = nbd::of_socket(&socket);
    (server, folder, uri)
}

#[test]
fn what_nbdcopy_writes_it_reads_again() {
    let (server, folder, uri) = serve();
    let (source, copy) = (folder.path().join("source"), folder.path().join("copy"));
    // Data, holes, and a last sector that is not of a whole page.
    let len = usize::try_from(SECTORS).unwrap() * 512;
    let mut bytes = vec![0_u8; len];
    for (index, byte) in bytes.iter_mut().enumerate() {
        if (index / 300_000).is_multiple_of(3) || index >= len - 512 {
            *byte = u8::try_from((index * 7 + index / 511) % 251).unwrap();
        }
    }
    std::fs::write(&source, &bytes).unwrap();
    tool("nbdcopy", &["--flush", text(&source), &uri]);
    tool("nbdcopy", &[&uri, text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == bytes);
    server.stop();
}

#[test]
fn qemu_io_writes_verifies_discards_and_flushes() {
    let (server, _folder, uri) = serve();
    let told = tool(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-t",
            "writeback",
            "-d",
            "unmap",
            "-c",
            "write -P 0x5a 0 1M",
            "-c",
            "write -f -P 0xa5 512k 64k",
            "-c",
            "write -P 0x11 1536 512",
            "-c",
            "flush",
            "-c",
            "read -P 0x5a 0 1536",
            "-c",
            "read -P 0x11 1536 512",
            "-c",
            "read -P 0xa5 512k 64k",
            "-c",
            "discard 0 256k",
            "-c",
            "write -z 512k 32k",
            "-c",
            "read -P 0 0 256k",
            "-c",
            "read -P 0 512k 32k",
            "-c",
            "read -P 0xa5 544k 32k",
            "-c",
            "read -P 0x5a 576k 448k",
            &uri,
        ],
    );
    assert!(!told.contains("failed"), "{told}");
    assert_eq!(told.matches("read ").count(), 7, "{told}");
    server.stop();
}

#[test]
fn the_disk_of_these_tests_keeps_what_it_is_given() {
    let disk = RamDisk::new(300, Duration::ZERO);
    let mut worker = disk.worker().unwrap();
    worker.write(120, &[7; 20 * 512]).unwrap();
    let mut bytes = [1; 24 * 512];
    worker.read(118, &mut bytes).unwrap();
    assert_eq!((bytes[1023], bytes[1024], bytes[22 * 512 - 1], bytes[22 * 512]), (0, 7, 7, 0));
    assert!(worker.write(300, &[0; 512]).is_err() && worker.read(299, &mut [0; 1024]).is_err());
}
