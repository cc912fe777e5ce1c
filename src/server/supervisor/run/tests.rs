//! What the supervisor makes of links that come and end, without a successor being started.

use super::*;
use crate::server::state::sample;

/// A supervisor in a folder of its own, and the folder.
fn supervisor() -> (tempfile::TempDir, Supervisor) {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::at(folder.path().join("run"));
    run.prepare().unwrap();
    let supervisor = Supervisor {
        listener: PacketListener::bind(&socket_path(&run)).unwrap(),
        signals: SignalFd::with_flags(&SigSet::empty(), SfdFlags::SFD_NONBLOCK).unwrap(),
        links: BTreeMap::new(),
        wards: BTreeMap::new(),
        children: Vec::new(),
        clearing: Vec::new(),
        next_link: 0,
        repeats_takeovers: false,
        idle_since: Instant::now(),
        later_looks: Vec::new(),
        store: None,
        stored: BTreeMap::new(),
        unscoped_until: None,
        retired: false,
        run,
    };
    (folder, supervisor)
}

/// A device that this process serves, as its state file says.
fn write_down(supervisor: &Supervisor, id: u32, phase: Phase) {
    std::fs::create_dir_all(supervisor.run.folder(id)).unwrap();
    let state = State { phase, recoverable: true, ..sample(id) };
    state.save(&supervisor.run.folder(id)).unwrap();
}

/// Connects a server of device `id`; the other end is the server's.
fn guard(supervisor: &mut Supervisor, id: u32, process: Process) -> PacketSocket {
    let (ours, theirs) = PacketSocket::pair().unwrap();
    let link = supervisor.add_link(ours, Role::Unknown);
    supervisor.heard(link, Note::Guard { id, server: process }, Vec::new());
    assert_eq!(Note::parse(&theirs.receive().unwrap().unwrap().bytes).unwrap(), Note::Guarded);
    theirs
}

fn some_file() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

/// The kernel closes a process's sockets before it stops showing the process as running: such a
/// server used to be taken for alive, and its device was never brought back.
#[test]
fn a_server_whose_link_has_ended_is_replaced_though_it_still_shows_as_running() {
    let (_folder, mut supervisor) = supervisor();
    write_down(&supervisor, 0, Phase::Live);
    let server = guard(&mut supervisor, 0, Process::current());
    let link = supervisor.wards[&0].server.unwrap();
    supervisor.heard(link, Note::Live, Vec::new());
    drop(server);
    supervisor.hear(link);
    assert!(supervisor.wards[&0].retry_at.is_some());
}

#[test]
fn a_device_that_another_server_has_taken_on_is_forgotten() {
    let (_folder, mut supervisor) = supervisor();
    // Written down is this process; another one was guarded.
    write_down(&supervisor, 0, Phase::Live);
    let server = guard(&mut supervisor, 0, Process { pid: 2, start_ticks: 3 });
    let link = supervisor.wards[&0].server.unwrap();
    drop(server);
    supervisor.hear(link);
    assert!(supervisor.wards.is_empty());
}

/// The parcel, the deaths and the successor of a number used to be inherited by the next device
/// of that number: it could be served with the wrong image, or given up at its first death.
#[test]
fn a_new_server_of_a_number_starts_from_nothing() {
    let (_folder, mut supervisor) = supervisor();
    write_down(&supervisor, 0, Phase::Live);
    let _first = guard(&mut supervisor, 0, Process::current());
    let (successor, _its_end) = PacketSocket::pair().unwrap();
    let successor = supervisor.add_link(successor, Role::Successor(0));
    let ward = supervisor.wards.get_mut(&0).unwrap();
    ward.parcel.push(some_file());
    ward.successor = Some(successor);
    ward.lost = true;
    while ward.deaths.add(None).is_some() {}
    let _second = guard(&mut supervisor, 0, Process::current());
    let ward = &supervisor.wards[&0];
    assert_eq!((ward.parcel.len(), ward.deaths.count(), ward.lost), (0, 0, false));
    assert_eq!((ward.successor, supervisor.links.contains_key(&successor)), (None, false));
}

/// A device that was given up and then detached used to be kept for ever, with its open layers.
#[test]
fn a_device_that_was_detached_without_its_server_is_forgotten_when_somebody_says_so() {
    let (_folder, mut supervisor) = supervisor();
    write_down(&supervisor, 0, Phase::Live);
    let _server = guard(&mut supervisor, 0, Process::current());
    let look = |supervisor: &mut Supervisor| {
        let (ours, _theirs) = PacketSocket::pair().unwrap();
        let link = supervisor.add_link(ours, Role::Unknown);
        supervisor.heard(link, Note::Look { id: 0 }, Vec::new());
        assert!(!supervisor.links.contains_key(&link));
    };
    look(&mut supervisor);
    assert!(supervisor.wards.contains_key(&0), "it is still there");
    std::fs::remove_dir_all(supervisor.run.folder(0)).unwrap();
    look(&mut supervisor);
    assert!(supervisor.wards.is_empty());
}

#[test]
fn servers_that_keep_dying_are_given_up_in_a_file_that_says_why() {
    let (_folder, mut supervisor) = supervisor();
    write_down(&supervisor, 0, Phase::Live);
    let _server = guard(&mut supervisor, 0, Process::current());
    let (person, their_end) = PacketSocket::pair().unwrap();
    let person = supervisor.add_link(person, Role::Unknown);
    let ward = supervisor.wards.get_mut(&0).unwrap();
    ward.waiting.push(person);
    let error = Error::new(ErrorKind::NoSpace, "no room");
    ward.last_error = Some(Refusal::of(&error));
    for _ in 0..6 {
        supervisor.decide(0, None, Some(Process::current()));
    }
    assert!(supervisor.wards[&0].lost && supervisor.wards[&0].retry_at.is_none());
    let told = super::super::lost(&supervisor.run.folder(0)).unwrap();
    assert_eq!(told, "6 servers died early; the last one: no room\n");
    let answer = Note::parse(&their_end.receive().unwrap().unwrap().bytes).unwrap();
    let Note::Refused { error } = answer else { panic!("{answer:?}") };
    assert!(error.message.ends_with(told.trim_end()), "{}", error.message);
}

#[test]
fn what_makes_no_sense_is_refused_and_the_link_stays() {
    let (_folder, mut supervisor) = supervisor();
    let (ours, theirs) = PacketSocket::pair().unwrap();
    let link = supervisor.add_link(ours, Role::Unknown);
    for bytes in [&b"nonsense"[..], br#"{"v":1,"op":"yield"}"#, br#"{"v":1,"op":"live"}"#] {
        theirs.send(bytes, &[]).unwrap();
        supervisor.hear(link);
        let answer = Note::parse(&theirs.receive().unwrap().unwrap().bytes).unwrap();
        assert!(matches!(answer, Note::Refused { .. }), "{answer:?}");
    }
    theirs.send(&Note::Ping.encode(), &[]).unwrap();
    supervisor.hear(link);
    let answer = Note::parse(&theirs.receive().unwrap().unwrap().bytes).unwrap();
    assert_eq!(answer, Note::Done { pause_us: None });
}

#[test]
fn a_supervisor_retires_only_when_nothing_is_lost_with_it() {
    let (_folder, mut supervisor) = supervisor();
    write_down(&supervisor, 0, Phase::Live);
    let ask = |supervisor: &mut Supervisor| {
        let (ours, theirs) = PacketSocket::pair().unwrap();
        let link = supervisor.add_link(ours, Role::Unknown);
        supervisor.heard(link, Note::Retire, Vec::new());
        Note::parse(&theirs.receive().unwrap().unwrap().bytes).unwrap()
    };
    let server = guard(&mut supervisor, 0, Process::current());
    let link = supervisor.wards[&0].server.unwrap();
    assert!(matches!(ask(&mut supervisor), Note::Refused { .. }), "it is not live yet");
    supervisor.heard(link, Note::Live, Vec::new());
    drop(server);
    supervisor.hear(link);
    assert!(matches!(ask(&mut supervisor), Note::Refused { .. }), "its server is dead");
    assert!(!supervisor.retired);
    let _server = guard(&mut supervisor, 0, Process::current());
    let link = supervisor.wards[&0].server.unwrap();
    supervisor.heard(link, Note::Live, Vec::new());
    assert_eq!(ask(&mut supervisor), Note::Done { pause_us: None });
    assert!(supervisor.retired);
}

/// A supervisor that had died together with a server used to leave its successor to open every
/// layer by name.
#[test]
fn what_the_supervisor_before_kept_of_a_dead_server_is_given_to_its_successor() {
    let (_folder, mut supervisor) = supervisor();
    write_down(&supervisor, 0, Phase::Live);
    let dead = Process { pid: u32::MAX, start_ticks: 1 };
    let state = supervisor.run.state(0).unwrap().unwrap();
    State { server: dead, ..state }.save(&supervisor.run.folder(0)).unwrap();
    // Device 1 is served; its server will speak for itself.
    write_down(&supervisor, 1, Phase::Live);
    let stored = |files| Stored {
        program: Some(some_file()),
        parcel: std::iter::repeat_with(some_file).take(files).collect(),
    };
    supervisor.stored = [(0, stored(3)), (1, stored(2))].into();
    supervisor.adopt_orphans();
    let ward = &supervisor.wards[&0];
    assert_eq!((ward.parcel.len(), ward.program.is_some()), (3, true));
    assert!(ward.retry_at.is_some());
    assert!(!supervisor.wards.contains_key(&1));
    let _server = guard(&mut supervisor, 1, Process::current());
    assert!(supervisor.stored.is_empty(), "the server's own parcel comes");
}
