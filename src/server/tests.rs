//! The life of a device, its crashes and its end, against a fake front end.

use super::config_view;
use super::control::Event;
use super::fake::{FakeDisk, FakeKernel, Thread};
use super::kernel::Kernel;
use super::packet::{PacketListener, PacketSocket};
use super::process::Process;
use super::protocol::notes::Note;
use super::result_file::ResultFile;
use super::run_dir::RunDir;
use super::serve::{Mailbox, Order, Server};
use super::state::{Phase, State, sample};
use super::survey::{Manner, Status, collect, collect_dead, detach, devices_of_config, survey};
use crate::error::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

/// A run folder, a fake kernel and a result file.
struct World {
    folder: tempfile::TempDir,
    run: RunDir,
    kernel: FakeKernel,
}

/// A server in a thread.
struct Running {
    announced: Receiver<u32>,
    events: Sender<Event>,
    thread: JoinHandle<Result<()>>,
}

impl Running {
    /// The number that was announced, once it was.
    fn id(&self) -> u32 {
        self.announced.recv_timeout(PATIENCE).expect("no device came up")
    }

    fn end(self) -> Result<()> {
        self.thread.join().unwrap()
    }
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::at(folder.path().join("run"));
        run.prepare().unwrap();
        Self { folder, run, kernel: FakeKernel::default() }
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("config.v1.json")
    }

    fn result(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("result")).unwrap()
    }

    fn serve_with(
        &self,
        id: Option<u32>,
        open: impl FnOnce() -> Result<FakeDisk> + Send + 'static,
    ) -> Running {
        self.start(id, false, open)
    }

    fn serve_supervised(&self, id: Option<u32>) -> Running {
        let told = Some(self.kernel.clone());
        self.start(id, true, || Ok(FakeDisk { told }))
    }

    /// Starts a server; `open` opens its disk.
    fn start(
        &self,
        id: Option<u32>,
        supervised: bool,
        open: impl FnOnce() -> Result<FakeDisk> + Send + 'static,
    ) -> Running {
        let (run, kernel) = (self.run.clone(), self.kernel.clone());
        let order = Order {
            config: self.config(),
            service_config: None,
            id,
            queues: None,
            depth: 128,
            request_bytes: 4096,
            supervised,
            upper: None,
            quota_bytes: None,
            io_deadline_s: None,
        };
        let result_file = ResultFile::open(&self.folder.path().join("result")).unwrap();
        let (announce, announced) = channel();
        let (sender, inbox) = channel();
        let events = sender.clone();
        let thread = std::thread::spawn(move || {
            let view = config_view::parse(b"{\"lowers\":[]}", Path::new("/")).unwrap();
            let server = Server {
                order: &order,
                view: &view,
                result_file: Some(result_file),
                run: &run,
                kernel: &kernel,
                housing: &Thread { announced: announce },
            };
            server.serve(&Mailbox { sender, inbox }, open)
        });
        Running { announced, events, thread }
    }

    fn serve(&self, id: Option<u32>) -> Running {
        self.serve_with(id, || Ok(FakeDisk::default()))
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.run.ids().unwrap(), [0; 0]);
        assert_eq!(self.kernel.list().unwrap(), []);
    }

    /// Leaves what a server of device `id` leaves that is killed in `phase`; the kernel's device
    /// is there if it has a pid (0: dead).
    fn crash(&self, id: u32, phase: Option<Phase>, kernel_pid: Option<u32>) -> State {
        let slot = self.run.claim(id).unwrap().unwrap();
        // This process's number with another start: recycled.
        let gone = Process { start_ticks: 1, ..Process::current() };
        let state = State { server: gone, ..sample(id) };
        if let Some(phase) = phase {
            State { phase, ..state.clone() }.save(slot.path()).unwrap();
        }
        if let Some(pid) = kernel_pid {
            self.kernel.host().devices.insert(id, pid);
        }
        state
    }
}

fn detach_politely(world: &World, id: u32) -> Result<()> {
    detach(&world.run, &world.kernel, id, Manner::Polite, PATIENCE).map(|gone| assert!(gone))
}

fn status_of(world: &World, id: u32) -> Option<Status> {
    let entries = survey(&world.run, &world.kernel).unwrap();
    entries.iter().find(|entry| entry.id == id).map(|entry| entry.status)
}

#[test]
fn a_device_is_written_down_reported_served_and_gone_after_detach() {
    let world = World::new();
    let server = world.serve(None);
    assert_eq!(server.id(), 0);
    assert_eq!(world.result(), "success");
    let state = world.run.state(0).unwrap().unwrap();
    assert_eq!((state.phase, state.size_bytes), (Phase::Live, Some(512)));
    assert_eq!(state.server, Process::current());
    assert_eq!(status_of(&world, 0), Some(Status::Live));
    let stat = super::stat(&world.run, 0).unwrap();
    assert_eq!((stat.id, stat.size_bytes, stat.read_only), (0, 512, true));
    assert_eq!(stat.counters.unwrap().last_error.as_deref(), Some("none yet"));
    detach_politely(&world, 0).unwrap();
    world.assert_nothing_left();
    server.end().unwrap();
    assert_eq!(world.kernel.host().events, ["start 0", "stop held 0"]);
    assert_eq!(world.result(), "success");
}

#[test]
fn an_image_that_cannot_be_opened_leaves_nothing_but_its_reason() {
    let world = World::new();
    let broken = || Err(Error::new(ErrorKind::Corrupt, "bad index").context("open layer 2"));
    let server = world.serve_with(None, broken);
    let announced = server.announced.recv_timeout(PATIENCE);
    assert_eq!(announced, Err(RecvTimeoutError::Disconnected));
    assert_eq!(server.end().unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(world.result(), "failed:open layer 2: bad index");
    world.assert_nothing_left();
    assert!(world.kernel.host().events.is_empty());
}

#[test]
fn a_caller_that_is_gone_gets_no_device() {
    let world = World::new();
    let (opening, opened) = channel();
    let server = world.serve_with(None, move || {
        let () = opened.recv().unwrap();
        Ok(FakeDisk::default())
    });
    drop(server.announced);
    opening.send(()).unwrap();
    let error = server.thread.join().unwrap().unwrap_err();
    assert_eq!(format!("{error:#}"), "tell the caller of the device: nobody listens");
    assert_eq!(world.result(), "failed:tell the caller of the device: nobody listens");
    world.assert_nothing_left();
    assert_eq!(world.kernel.host().events, ["start 0", "stop 0"]);
}

#[test]
fn a_signal_before_readiness_cancels_the_attach() {
    let world = World::new();
    let (opening, opened) = channel();
    let server = world.serve_with(None, move || {
        let () = opened.recv().unwrap();
        Ok(FakeDisk::default())
    });
    server.events.send(Event::Signal("SIGTERM")).unwrap();
    opening.send(()).unwrap();
    assert_eq!(server.end().unwrap_err().kind(), ErrorKind::Canceled);
    assert_eq!(world.result(), "failed:SIGTERM came before anything was served");
    world.assert_nothing_left();
}

#[test]
fn a_mounted_device_is_not_detached_but_a_signal_stops_it() {
    let world = World::new();
    let server = world.serve(Some(3));
    assert_eq!(server.id(), 3);
    world.kernel.host().mounted.push(3);
    let error = detach_politely(&world, 3).unwrap_err();
    assert_eq!((error.kind(), error.exit_code()), (ErrorKind::Busy, 12));
    assert_eq!(status_of(&world, 3), Some(Status::Live));
    server.events.send(Event::Signal("SIGTERM")).unwrap();
    server.end().unwrap();
    world.assert_nothing_left();
}

#[test]
fn a_device_that_the_kernel_keeps_stays_written_down_until_it_lets_go() {
    let world = World::new();
    let server = world.serve(None);
    server.id();
    world.kernel.host().stuck.push(0);
    let error = detach_politely(&world, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(server.end().unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(world.run.ids().unwrap(), [0]);
    // The thread is over, but its process (this one) lives: now as if it did not.
    let state = world.run.state(0).unwrap().unwrap();
    let gone = Process { start_ticks: 1, ..state.server };
    State { server: gone, ..state }.save(&world.run.folder(0)).unwrap();
    assert!(collect(&world.run, &world.kernel, 0).is_err());
    world.kernel.host().stuck.clear();
    detach_politely(&world, 0).unwrap();
    world.assert_nothing_left();
}

#[test]
fn a_device_deleted_by_somebody_else_ends_its_server() {
    let world = World::new();
    let server = world.serve(None);
    server.id();
    world.kernel.vanish(0);
    server.end().unwrap();
    world.assert_nothing_left();
}

#[test]
fn the_lowest_number_that_nobody_has_is_taken() {
    let world = World::new();
    world.kernel.host().devices.insert(0, 4711);
    // Another program's, or dead but held open: only the attempt tells.
    world.kernel.host().taken.push(1);
    let first = world.serve(None);
    assert_eq!(first.id(), 2);
    let second = world.serve(None);
    assert_eq!(second.id(), 3);
    assert_eq!(world.run.ids().unwrap(), [2, 3]);
    for id in [0, 1, 2] {
        let error = world.serve(Some(id)).end().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{id}");
    }
    assert_eq!(world.run.ids().unwrap(), [2, 3]);
    for (server, id) in [(first, 2), (second, 3)] {
        detach_politely(&world, id).unwrap();
        server.end().unwrap();
    }
    assert_eq!(world.kernel.host().devices.len(), 1, "the foreign one");
}

#[test]
fn whatever_point_a_server_is_killed_at_the_next_attach_clears_what_is_left() {
    for (phase, kernel_pid) in [
        (None, None),
        (Some(Phase::Starting), None),
        (Some(Phase::Starting), Some(0)),
        (Some(Phase::Live), Some(0)),
        (Some(Phase::Live), None),
        // The kernel has not noticed yet.
        (Some(Phase::Live), Some(Process::current().pid)),
    ] {
        let world = World::new();
        world.crash(4, phase, kernel_pid);
        assert_eq!(status_of(&world, 4), Some(Status::Dead), "{phase:?} {kernel_pid:?}");
        let server = world.serve(Some(4));
        assert_eq!(server.id(), 4, "{phase:?} {kernel_pid:?}");
        detach_politely(&world, 4).unwrap();
        server.end().unwrap();
        world.assert_nothing_left();
        world.crash(4, phase, kernel_pid);
        detach_politely(&world, 4).unwrap();
        world.assert_nothing_left();
    }
}

#[test]
fn a_device_that_is_not_ours_is_never_deleted() {
    let world = World::new();
    // Nobody wrote it down.
    world.kernel.host().devices.insert(0, 0);
    let error = detach_politely(&world, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("not attached by obd-ublk"), "{error}");
    assert_eq!(status_of(&world, 0), Some(Status::Foreign));
    // Our server died and another program took the number.
    world.crash(1, Some(Phase::Live), Some(4711));
    // The machine was restarted and another program's server died.
    let state = world.crash(2, Some(Phase::Live), Some(0));
    let earlier = State { boot_id: "another".to_owned(), ..state };
    earlier.save(&world.run.folder(2)).unwrap();
    collect_dead(&world.run, &world.kernel);
    assert_eq!(world.run.ids().unwrap(), [0; 0]);
    assert_eq!(world.kernel.host().devices.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert!(world.kernel.host().events.is_empty());
}

#[test]
fn what_cannot_be_understood_or_cleared_does_not_keep_others_from_being_cleared() {
    let world = World::new();
    world.crash(0, Some(Phase::Live), Some(0));
    std::fs::write(world.run.folder(0).join("state.json"), "{\"schema\":9}").unwrap();
    world.crash(1, Some(Phase::Live), Some(0));
    world.kernel.host().stuck.push(1);
    world.crash(2, Some(Phase::Live), Some(0));
    collect_dead(&world.run, &world.kernel);
    assert_eq!(world.run.ids().unwrap(), [0, 1]);
    let error = detach_politely(&world, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let path = world.run.folder(0).join("state.json");
    assert!(format!("{error:#}").contains(path.to_str().unwrap()), "{error:#}");
    assert_eq!(status_of(&world, 0), Some(Status::Broken));
}

#[test]
fn a_server_that_does_not_get_on_is_not_waited_for_beyond_the_deadline() {
    let world = World::new();
    let slot = world.run.claim(0).unwrap().unwrap();
    State { phase: Phase::Starting, ..sample(0) }.save(slot.path()).unwrap();
    assert_eq!(status_of(&world, 0), Some(Status::Starting));
    for phase in [Phase::Starting, Phase::Live] {
        State { phase, ..sample(0) }.save(slot.path()).unwrap();
        let start = Instant::now();
        let patience = Duration::from_millis(200);
        let error = detach(&world.run, &world.kernel, 0, Manner::Polite, patience).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        let pid = format!("process {}", std::process::id());
        assert!(error.to_string().contains(&pid), "{error}");
        assert!(start.elapsed() < PATIENCE);
    }
}

#[test]
fn a_config_names_its_devices_by_any_of_its_paths() {
    let world = World::new();
    std::fs::write(world.config(), "{}").unwrap();
    let link = world.folder.path().join("link.json");
    std::os::unix::fs::symlink(world.config(), &link).unwrap();
    // A reference was taken for a path below the working folder: nothing was found by it.
    let reference = PathBuf::from("docker://reg.example.com/img:v1");
    let configs = [world.config(), link.clone(), "/other".into(), reference.clone()];
    for (id, config) in (0..).zip(configs) {
        let slot = world.run.claim(id).unwrap().unwrap();
        State { config, ..sample(id) }.save(slot.path()).unwrap();
    }
    let dotted = world.folder.path().join("run/../config.v1.json");
    for (path, ids) in [
        (world.config(), vec![0, 1]),
        (link, vec![0, 1]),
        (dotted, vec![0, 1]),
        ("/other".into(), vec![2]),
        (reference, vec![3]),
        ("docker://reg.example.com/img:v2".into(), vec![]),
        ("/none".into(), vec![]),
    ] {
        assert_eq!(devices_of_config(&world.run, &path).unwrap(), ids, "{}", path.display());
    }
}

#[test]
fn an_upper_is_put_on_top_of_a_config_that_names_none() {
    let view = |config: &str| config_view::parse(config.as_bytes(), Path::new("/w")).unwrap();
    let topped = view(r#"{"lowers":[{"file":"l"}]}"#).with_upper(Path::new("/u")).unwrap();
    assert!(topped.writable);
    let expected = serde_json::json!({
        "lowers": [{"file": "/w/l"}],
        "upper": {"data": "/u/writable_data", "index": "/u/writable_index"},
    });
    assert_eq!(topped.content, expected);
    let two = view(r#"{"lowers":[],"upper":{"index":"/i","data":"/d"}}"#);
    assert_eq!(two.with_upper(Path::new("/u")).unwrap_err().kind(), ErrorKind::Usage);
}

/// Leaves a recoverable device whose server was killed; the kernel keeps it for a successor.
fn crash_recoverable(world: &World, id: u32, phase: Phase) {
    let pid = Process::current().pid;
    let state = world.crash(id, Some(phase), Some(pid));
    let state = State { phase, recoverable: true, ..state };
    state.save(&world.run.folder(id)).unwrap();
    world.kernel.host().quiesced.push(id);
}

#[test]
fn a_device_that_waits_for_its_successor_is_not_cleared_by_the_next_attach() {
    let world = World::new();
    crash_recoverable(&world, 0, Phase::Live);
    crash_recoverable(&world, 1, Phase::Taking);
    // These cannot come back: never usable, being stopped, not in the kernel any more.
    crash_recoverable(&world, 2, Phase::Starting);
    crash_recoverable(&world, 3, Phase::Stopping);
    crash_recoverable(&world, 4, Phase::Live);
    world.kernel.host().devices.remove(&4);
    collect_dead(&world.run, &world.kernel);
    assert_eq!(world.run.ids().unwrap(), [0, 1]);
    for id in [0, 1] {
        assert_eq!(status_of(&world, id), Some(Status::Recovering), "{id}");
    }
    std::fs::write(world.run.folder(1).join("lost"), "6 servers died early\n").unwrap();
    let entries = survey(&world.run, &world.kernel).unwrap();
    assert_eq!(entries[1].status, Status::Lost);
    let problem = entries[1].problem.as_ref().unwrap();
    assert_eq!(problem.to_string(), "6 servers died early");
}

#[test]
fn a_device_without_a_server_is_detached_unless_it_is_mounted_or_by_force() {
    let world = World::new();
    for id in [0, 1, 2] {
        crash_recoverable(&world, id, Phase::Live);
    }
    detach_politely(&world, 0).unwrap();
    world.kernel.host().mounted.extend([1, 2]);
    let error = detach_politely(&world, 1).unwrap_err();
    assert_eq!((error.kind(), error.exit_code()), (ErrorKind::Busy, 12));
    assert_eq!(world.run.ids().unwrap(), [1, 2]);
    for id in [1, 2] {
        let forced = detach(&world.run, &world.kernel, id, Manner::Force, PATIENCE);
        assert!(forced.unwrap(), "{id}");
    }
    world.assert_nothing_left();
}

#[test]
fn a_mounted_device_goes_lazily_when_it_is_not_mounted_any_more_or_at_once_by_force() {
    let world = World::new();
    let servers: Vec<_> = [0, 1].map(|id| world.serve(Some(id))).into_iter().collect();
    for (server, id) in servers.iter().zip([0, 1]) {
        assert_eq!(server.id(), id);
        world.kernel.host().mounted.push(id);
    }
    let gone = detach(&world.run, &world.kernel, 0, Manner::Lazy, PATIENCE).unwrap();
    assert!(!gone);
    assert_eq!(status_of(&world, 0), Some(Status::Live));
    assert!(detach(&world.run, &world.kernel, 1, Manner::Force, PATIENCE).unwrap());
    assert_eq!(world.run.ids().unwrap(), [0]);
    world.kernel.host().mounted.clear();
    for server in servers {
        server.end().unwrap();
    }
    world.assert_nothing_left();
}

#[test]
fn what_cannot_be_understood_is_removed_by_force() {
    let world = World::new();
    world.crash(0, Some(Phase::Live), Some(0));
    std::fs::write(world.run.folder(0).join("state.json"), "{\"schema\":9}").unwrap();
    let refused = detach_politely(&world, 0).unwrap_err();
    assert!(format!("{refused:#}").contains("detach --force 0"), "{refused:#}");
    assert!(detach(&world.run, &world.kernel, 0, Manner::Force, PATIENCE).unwrap());
    world.assert_nothing_left();
}

/// The other end of a link: plays the supervisor for one device.
struct Played {
    listener: PacketListener,
}

impl Played {
    fn of(world: &World) -> Self {
        let path = world.run.path().join("supervisor.sock");
        Self { listener: PacketListener::bind(&path).unwrap() }
    }

    /// Takes a server's connection and what it says until it is live.
    fn guard(&self, id: u32) -> (PacketSocket, usize) {
        let socket = self.listener.accept().unwrap();
        socket.set_patience(Some(PATIENCE)).unwrap();
        let mut files = 0;
        loop {
            let packet = socket.receive().unwrap().expect("the server went away");
            files += packet.files.len();
            match Note::parse(&packet.bytes).unwrap() {
                Note::Guard { id: guarded, server } => {
                    assert_eq!((guarded, server), (id, Process::current()));
                    socket.send(&Note::Guarded.encode(), &[]).unwrap();
                }
                Note::Parcel { last } => assert!(last),
                Note::Live => return (socket, files),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn a_server_entrusts_its_device_and_finds_a_new_supervisor_when_the_old_one_dies() {
    let world = World::new();
    let played = Played::of(&world);
    let server = world.serve_supervised(Some(3));
    let (link, files) = played.guard(3);
    assert_eq!(files, 1);
    assert_eq!(server.id(), 3);
    assert!(world.run.state(3).unwrap().unwrap().recoverable);
    // Death of the supervisor: the same parcel goes to the next one.
    drop(link);
    let (link, files) = played.guard(3);
    assert_eq!(files, 1);
    detach_politely(&world, 3).unwrap();
    server.end().unwrap();
    assert!(link.receive().unwrap().is_none(), "the link ends with the server");
    world.assert_nothing_left();
}

#[test]
fn a_server_that_is_told_to_yield_leaves_its_device_to_the_successor() {
    let world = World::new();
    let played = Played::of(&world);
    let server = world.serve_supervised(Some(0));
    let (link, _) = played.guard(0);
    server.id();
    link.send(&Note::Yield.encode(), &[]).unwrap();
    server.end().unwrap();
    assert_eq!(world.kernel.host().events, ["start 0", "hand on", "abandon 0"]);
    assert_eq!(world.run.ids().unwrap(), [0], "the folder is the successor's");
    assert!(world.run.lock(0).unwrap().is_some(), "and so is its lock");
}

#[test]
fn an_attach_that_no_supervisor_guards_leaves_nothing() {
    let world = World::new();
    let played = Played::of(&world);
    let server = world.serve_supervised(Some(0));
    let socket = played.listener.accept().unwrap();
    assert!(socket.receive().unwrap().is_some());
    let error = Error::new(ErrorKind::NoSpace, "no room for one more");
    socket.send(&Note::refused(&error).encode(), &[]).unwrap();
    let error = server.end().unwrap_err();
    assert_eq!(format!("{error:#}"), "reach the supervisor: no room for one more");
    world.assert_nothing_left();
    assert!(world.kernel.host().events.is_empty());
}

#[test]
fn a_detach_that_finds_another_device_under_the_number_leaves_it_alone() {
    let world = World::new();
    let slot = world.run.claim(0).unwrap().unwrap();
    // A server that does not get on; then the number is somebody else's.
    let state = State { phase: Phase::Starting, ..sample(0) };
    state.save(slot.path()).unwrap();
    let (run, kernel) = (world.run.clone(), world.kernel.clone());
    let detaching = std::thread::spawn(move || detach(&run, &kernel, 0, Manner::Polite, PATIENCE));
    std::thread::sleep(Duration::from_millis(200));
    let other = State { attached_unix_ms: state.attached_unix_ms + 1, ..state };
    State { phase: Phase::Live, ..other }.save(slot.path()).unwrap();
    assert!(detaching.join().unwrap().unwrap(), "what was meant is gone");
    assert_eq!(world.run.ids().unwrap(), [0]);
}

/// On a kernel that forgets dead servers, `detach` took our device for somebody else's: it left it
/// alone, and its readers hung for ever.
#[test]
fn a_device_whose_dead_server_the_kernel_has_forgotten_is_ours() {
    let world = World::new();
    world.crash(0, Some(Phase::Live), Some(0));
    world.kernel.host().quiesced.push(0);
    collect_dead(&world.run, &world.kernel);
    assert_eq!(world.run.ids().unwrap(), [0; 0]);
    assert_eq!(world.kernel.host().events, ["delete 0"]);
}

#[test]
fn a_device_of_somebody_else_is_not_deleted_because_it_waits_for_a_server() {
    let world = World::new();
    // Our server died, and another program's quiesced device has the number now.
    world.crash(0, Some(Phase::Live), Some(4711));
    world.kernel.host().quiesced.push(0);
    collect_dead(&world.run, &world.kernel);
    assert_eq!(world.run.ids().unwrap(), [0; 0]);
    assert!(world.kernel.host().events.is_empty());
}
