//! Many clients, stalled clients, and the end, against a disk that blocks when it is told to.

use super::*;
use crate::disk::{Geometry, Worker};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Sector 0 reads at once; sector 1 waits for a word first.
struct Fake {
    arrived: Sender<()>,
    released: Arc<Mutex<Receiver<()>>>,
}

struct FakeWorker {
    arrived: Sender<()>,
    released: Arc<Mutex<Receiver<()>>>,
}

impl Disk for Fake {
    type Worker = FakeWorker;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: 8,
            read_only: true,
            optimal_io_bytes: 4096,
            discard_granularity_bytes: None,
        }
    }

    fn worker(&self) -> Result<FakeWorker> {
        let released = Arc::clone(&self.released);
        Ok(FakeWorker { arrived: self.arrived.clone(), released })
    }
}

impl Worker for FakeWorker {
    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        if start_sector == 1 {
            self.arrived.send(()).unwrap();
            let _ = self.released.lock().unwrap().recv_timeout(Duration::from_secs(20));
        }
        dst.fill(u8::try_from(start_sector).unwrap() + 1);
        Ok(())
    }
}

struct World {
    _folder: tempfile::TempDir,
    path: PathBuf,
    arrived: Receiver<()>,
    release: Sender<()>,
    server: Server,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (arrived_sender, arrived) = channel();
        let (release, released) = channel();
        let released = Arc::new(Mutex::new(released));
        let server = Server::start(Fake { arrived: arrived_sender, released }, &path).unwrap();
        Self { _folder: folder, path, arrived, release, server }
    }

    /// A client after its handshake; `None` when it was hung up on.
    fn try_client(&self) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut answer = [0; 28];
        let said = b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00";
        let sent = stream.write_all(said);
        sent.and_then(|()| stream.read_exact(&mut answer)).ok()?;
        assert_eq!(answer[18..], *b"\x00\x00\x00\x00\x00\x00\x10\x00\x01\x07");
        Some(stream)
    }

    fn client(&self) -> UnixStream {
        self.try_client().expect("hung up on")
    }
}

fn ask(mut stream: &UnixStream, sector: u8) {
    let mut bytes = b"\x25\x60\x95\x13\0\0\0\0cookie!!\0\0\0\0\0\0\0\0\0\0\x02\0".to_vec();
    bytes[22] = sector * 2;
    stream.write_all(&bytes).unwrap();
}

fn answered(mut stream: &UnixStream, sector: u8) -> bool {
    let mut reply = [0; 528];
    stream.read_exact(&mut reply).is_ok() && reply[16..] == [sector + 1; 512]
}

#[test]
fn a_client_that_stalls_delays_nobody() {
    let world = World::new();
    let _mute = UnixStream::connect(&world.path).unwrap();
    let slow = world.client();
    ask(&slow, 1);
    world.arrived.recv().unwrap();
    let quick = world.client();
    ask(&quick, 0);
    assert!(answered(&quick, 0));
    world.release.send(()).unwrap();
    assert!(answered(&slow, 1));
    drop((slow, quick));
    world.server.stop();
    assert!(!world.path.exists());
}

#[test]
fn clients_beyond_the_bound_are_hung_up_on_until_one_leaves() {
    let world = World::new();
    let mut clients: Vec<_> = (0..NBD_CONNECTIONS_MAX).map(|_| world.client()).collect();
    assert!(world.try_client().is_none());
    for client in &clients {
        ask(client, 0);
        assert!(answered(client, 0));
    }
    clients.pop();
    let deadline = Instant::now() + Duration::from_secs(20);
    while world.try_client().is_none() {
        assert!(Instant::now() < deadline, "the seat stays taken");
    }
    let start = Instant::now();
    world.server.stop();
    assert!(start.elapsed() < Duration::from_secs(4), "nobody had anything in flight");
    assert!(clients.iter().all(|client| !answered(client, 0)));
}

#[test]
fn what_is_in_flight_at_the_end_is_finished() {
    let world = World::new();
    let client = world.client();
    ask(&client, 1);
    world.arrived.recv().unwrap();
    // Sent, but not looked at yet: it is in flight as well.
    ask(&client, 0);
    let release = world.release;
    let released = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        release.send(()).unwrap();
    });
    world.server.stop();
    assert!(answered(&client, 1));
    assert!(answered(&client, 0));
    released.join().unwrap();
    assert!(UnixStream::connect(&world.path).is_err());
}

#[test]
fn a_client_that_takes_no_answer_is_hung_up_on_at_the_end() {
    let world = World::new();
    let client = world.client();
    // More answers than the socket holds, and nobody reads them.
    client.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let request = b"\x25\x60\x95\x13\0\0\0\0cookie!!\0\0\0\0\0\0\0\0\0\0\x10\0";
    while (&client).write_all(request).is_ok() {}
    let start = Instant::now();
    world.server.stop();
    let patience = Duration::from_millis(NBD_STOP_MS_MAX);
    assert!(start.elapsed() >= patience && start.elapsed() < patience * 2);
}
