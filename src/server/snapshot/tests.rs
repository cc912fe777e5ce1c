//! Snapshots of a disk without a kernel: killed at every step, and against a flat array.

use super::intent::Intent;
use super::take::take_probed;
use super::*;
use crate::disk::{Disk, Space, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::server::portable::Kept;
use crate::server::served_disk::{How, ServedDisk, make_pair};
use crate::server::state::sample;
use crate::source::Place;
use crate::upper::{Form, PairPaths};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

const SECTORS: u64 = 2048;
const BYTES: usize = 512 * 2048;

/// A disk of one layer and an upper, in a folder of its own.
struct World {
    folder: tempfile::TempDir,
    state: State,
    model: Vec<u8>,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let upper = PairPaths { data: at("first/data"), index: at("first/index") };
        make_pair(&upper, 512 * SECTORS, Form::Append).unwrap();
        let config_content = serde_json::json!({
            "lowers": [],
            "upper": {"data": upper.data, "index": upper.index},
        });
        let config = at("config.json");
        fs::write(&config, config_content.to_string()).unwrap();
        let state = State { config: config.clone(), config_content, ..sample(0) };
        let mut world = Self { folder, state, model: vec![0; BYTES] };
        let disk = world.open().unwrap();
        world.state.upper = disk.upper_file();
        for sector in 16..1016 {
            let byte = u8::try_from(sector % 251).unwrap() | 1;
            world.write(&disk, sector, 1, byte);
        }
        // The layer below is a snapshot, too.
        let order = SnapshotOrder { layer: world.path("base"), upper: world.path("u0"), config };
        let (_, after, leftovers) = take(live(&disk), &world.state, &order, me()).unwrap();
        after.enter(&mut world.state);
        leftovers.remove();
        fs::remove_dir(world.path("first")).unwrap();
        disk.close().unwrap();
        world
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn order(&self, number: u32) -> SnapshotOrder {
        SnapshotOrder {
            layer: self.path(&format!("layer{number}")),
            upper: self.path(&format!("u{number}")),
            config: self.path(&format!("config{number}.json")),
        }
    }

    /// The disk as whoever attaches or takes over opens it.
    fn open(&self) -> Result<ServedDisk> {
        let text = serde_json::to_vec(&self.state.config_content).unwrap();
        let how =
            How { read_only: false, make_upper: false, quota_bytes: None, io_deadline_s: None };
        ServedDisk::open(&self.state.config, &text, None, how)
    }

    fn write(&mut self, disk: &ServedDisk, sector: u64, sectors: usize, byte: u8) {
        let bytes = vec![byte; 512 * sectors];
        disk.worker().unwrap().write(sector, &bytes).unwrap();
        let at = usize::try_from(sector).unwrap() * 512;
        self.model[at..at + bytes.len()].copy_from_slice(&bytes);
    }

    fn zero(&mut self, disk: &ServedDisk, sector: u64, sectors: u64) {
        disk.worker().unwrap().write_zeroes(sector..sector + sectors, Space::Free).unwrap();
        let at = usize::try_from(sector).unwrap() * 512;
        self.model[at..at + usize::try_from(sectors).unwrap() * 512].fill(0);
    }

    fn check(&self, disk: &ServedDisk, what: &str) {
        let mut found = vec![0; BYTES];
        disk.worker().unwrap().read(0, &mut found).unwrap();
        let wrong = found.iter().zip(&self.model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{what}: first wrong byte");
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for folder in ["", "u0", "u1"] {
            for entry in fs::read_dir(self.path(folder)).into_iter().flatten() {
                let entry = entry.unwrap();
                if entry.file_type().unwrap().is_file() {
                    names.push(format!("{folder}/{}", entry.file_name().to_str().unwrap()));
                }
            }
        }
        names.sort();
        names
    }
}

fn me() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

fn live(disk: &ServedDisk) -> &crate::image::LiveImage {
    disk.live().unwrap()
}

#[test]
fn a_snapshot_is_a_layer_and_the_disk_goes_on() {
    let mut world = World::new();
    let disk = world.open().unwrap();
    world.write(&disk, 0, 40, 0xa1);
    world.zero(&disk, 100, 50);
    let mut early = disk.worker().unwrap();
    let before = world.model.clone();
    let (report, after, leftovers) =
        take(live(&disk), &world.state, &world.order(1), me()).unwrap();
    after.enter(&mut world.state);
    leftovers.remove();
    let layer = fs::metadata(world.path("layer1")).unwrap();
    assert_eq!(report.layer_bytes, layer.len());
    // A worker from before goes on with the new upper, as does a new one.
    early.write(8, &[0xb2; 512]).unwrap();
    world.model[8 * 512..9 * 512].fill(0xb2);
    world.write(&disk, 1000, 100, 0xb3);
    world.check(&disk, "after the snapshot");
    assert_eq!(disk.layer_files(), world.state.layers);
    assert_eq!(
        world.names(),
        [
            "/base",
            "/config.json",
            "/config1.json",
            "/layer1",
            "u1/writable_data",
            "u1/writable_index",
        ]
    );
    disk.close().unwrap();
    drop((early, disk));
    world.check(&world.open().unwrap(), "opened anew");
    // What was written since is not in the layer.
    let config = world.path("config-of-layer.json");
    let lowers = serde_json::json!({"lowers": [
        {"file": world.path("base")}, {"file": world.path("layer1")},
    ]});
    fs::write(&config, lowers.to_string()).unwrap();
    let image = crate::image::Image::open_config(&config, None).unwrap();
    let mut found = vec![0; BYTES];
    image.worker().unwrap().read(0, &mut found).unwrap();
    assert!(found == before, "the layer is the disk of the moment");
    // The config of before leads nowhere any more.
    let gone = crate::image::Image::open_config(&world.path("config.json"), None);
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn snapshots_pile_up_and_may_replace_the_config() {
    let mut world = World::new();
    let disk = world.open().unwrap();
    for round in 1..20_u32 {
        let byte = u8::try_from(round).unwrap();
        world.write(&disk, u64::from(round) * 37, 50, byte);
        world.zero(&disk, u64::from(round) * 61, 9);
        let order = SnapshotOrder { config: world.state.config.clone(), ..world.order(round) };
        let (_, after, leftovers) = take(live(&disk), &world.state, &order, me()).unwrap();
        after.enter(&mut world.state);
        leftovers.remove();
        world.check(&disk, "in a row");
    }
    assert_eq!(world.state.layers.len(), 20);
    drop(disk);
    world.check(&world.open().unwrap(), "opened anew");
}

/// Killed before each step: the device comes back as before, or, with the config there, as after.
#[test]
fn killed_at_any_step_the_disk_comes_back_as_before_or_after() {
    for (fatal, is_after) in [
        ("suspend", false),
        ("intent", false),
        ("seal", false),
        ("link", false),
        ("commit", false),
        ("committed", true),
    ] {
        let mut world = World::new();
        let disk = world.open().unwrap();
        world.write(&disk, 30, 500, 0xc1);
        world.zero(&disk, 700, 33);
        disk.flush().unwrap();
        // Acknowledged and not flushed.
        world.write(&disk, 35, 9, 0xc2);
        let length = fs::metadata(world.path("u0/writable_data")).unwrap().len();
        let seen = AtomicBool::new(false);
        let probe = |step: &'static str| {
            if step != fatal {
                return Ok(());
            }
            seen.store(true, Ordering::Relaxed);
            Err(Error::new(ErrorKind::Canceled, "killed"))
        };
        let order = world.order(1);
        take_probed(live(&disk), &world.state, &order, me(), &probe).unwrap_err();
        assert!(seen.load(Ordering::Relaxed), "{fatal} is a step");
        drop(disk);
        let state = settle_state(world.state.clone(), world.folder.path()).unwrap();
        assert_eq!(state.config == order.config, is_after, "{fatal}");
        world.state = state;
        let disk = world.open().unwrap();
        world.check(&disk, fatal);
        world.write(&disk, 1900, 9, 0xc3);
        disk.close().unwrap();
        drop(disk);
        world.check(&world.open().unwrap(), fatal);
        if is_after {
            assert!(!world.path("u0/writable_data").exists() && world.path("layer1").exists());
        } else {
            assert!(!world.path("layer1").exists(), "{fatal}");
            assert!(fs::metadata(world.path("u0/writable_data")).unwrap().len() >= length);
            assert!(!world.path("u1").exists(), "{fatal}: nothing is left");
            // It can be done again, in the same places.
            let disk = world.open().unwrap();
            take(live(&disk), &world.state, &order, me()).unwrap();
            world.check(&disk, "done again");
        }
    }
}

/// A step that fails is taken back, and the disk goes on; the next snapshot works.
#[test]
fn a_step_that_fails_is_taken_back() {
    for fatal in ["suspend", "intent", "seal", "link", "commit"] {
        let mut world = World::new();
        let disk = world.open().unwrap();
        world.write(&disk, 30, 500, 0xd1);
        let names = world.names();
        let probe = |step: &'static str| {
            if step == fatal {
                return Err(Error::new(ErrorKind::NoSpace, "no space left"));
            }
            Ok(())
        };
        let order = world.order(1);
        let error = take_probed(live(&disk), &world.state, &order, me(), &probe).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{fatal}");
        assert_eq!(world.names(), names, "{fatal}: nothing is left");
        assert!(!world.path("u1").exists(), "{fatal}");
        world.write(&disk, 40, 5, 0xd2);
        world.check(&disk, fatal);
        take(live(&disk), &world.state, &order, me()).unwrap();
        world.write(&disk, 41, 5, 0xd3);
        world.check(&disk, fatal);
    }
}

#[test]
fn what_is_in_the_way_is_told_before_anything_is_made() {
    let world = World::new();
    let disk = world.open().unwrap();
    fs::write(world.path("there"), "mine").unwrap();
    let names = world.names();
    let order = world.order(1);
    // On another file system, where a run in which the two are one may have left one.
    let elsewhere = format!("/dev/shm/obd-ublk-test-layer-{}", std::process::id());
    for (order, kind, told) in [
        (
            SnapshotOrder { layer: world.path("there"), ..order.clone() },
            ErrorKind::Usage,
            "there already",
        ),
        (
            SnapshotOrder { config: world.path("there"), ..order.clone() },
            ErrorKind::Usage,
            "not what is attached",
        ),
        (
            SnapshotOrder { layer: world.path("none/x"), ..order.clone() },
            ErrorKind::NotFound,
            "none",
        ),
        (SnapshotOrder { upper: world.path("u0"), ..order.clone() }, ErrorKind::Usage, "new upper"),
        (
            SnapshotOrder { upper: world.path("a/b"), ..order.clone() },
            ErrorKind::NotFound,
            "/a: No such",
        ),
        (
            SnapshotOrder { layer: elsewhere.into(), ..order.clone() },
            ErrorKind::Io,
            "same file system",
        ),
    ] {
        let error = take(live(&disk), &world.state, &order, me()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error:#}");
        assert!(format!("{error:#}").contains(told), "{error:#}");
        assert_eq!(world.names(), names);
    }
    world.check(&disk, "still whole");
    assert_eq!(fs::read(world.path("there")).unwrap(), b"mine");
}

/// Whoever attaches the old config while its snapshot is half done gets the old disk or is told.
#[test]
fn attaching_the_old_config_ends_an_interrupted_snapshot() {
    let mut world = World::new();
    for (fatal, is_after) in [("commit", false), ("committed", true)] {
        let disk = world.open().unwrap();
        world.write(&disk, 3, 4, 0xe1);
        let probe = |step: &'static str| match step == fatal {
            true => Err(Error::new(ErrorKind::Canceled, "killed")),
            false => Ok(()),
        };
        take_probed(live(&disk), &world.state, &world.order(1), me(), &probe).unwrap_err();
        drop(disk);
        match world.open() {
            Ok(disk) if !is_after => world.check(&disk, fatal),
            Err(error) if is_after => {
                assert!(error.to_string().contains("config1.json"), "{error}");
            }
            other => panic!("{fatal}: {other:?}"),
        }
    }
}

#[test]
fn an_intent_that_cannot_be_believed_stops_everything() {
    let world = World::new();
    let index = world.path("u0/writable_index");
    let intent = world.path("u0/writable_index.snapshot");
    let paths = PairPaths { data: world.path("u0/writable_data"), index };
    for (text, kind) in [
        ("", ErrorKind::Corrupt),
        ("{", ErrorKind::Corrupt),
        ("[1,2]", ErrorKind::Corrupt),
        ("{\"schema\":1}", ErrorKind::Corrupt),
    ] {
        fs::write(&intent, text).unwrap();
        let error = settle(&paths).unwrap_err();
        assert_eq!(error.kind(), kind, "{text}");
        assert!(error.to_string().contains("writable_index.snapshot"), "{error}");
        assert!(world.open().is_err(), "nothing is opened");
    }
    // That of a pair that was copied here: the file it speaks of is another one.
    let disk = {
        fs::remove_file(&intent).unwrap();
        world.open().unwrap()
    };
    let probe = |step: &'static str| match step {
        "commit" => Err(Error::new(ErrorKind::Canceled, "killed")),
        _ => Ok(()),
    };
    take_probed(live(&disk), &world.state, &world.order(1), me(), &probe).unwrap_err();
    drop(disk);
    let bytes = fs::read(&paths.data).unwrap();
    fs::remove_file(&paths.data).unwrap();
    fs::write(&paths.data, &bytes).unwrap();
    assert_eq!(settle(&paths).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(fs::read(&paths.data).unwrap(), bytes, "not touched");
    assert!(Intent::read(&Place::of(&paths.index).unwrap()).unwrap().is_some());
}

/// Writers and readers that never stop, over snapshots that do not either.
#[test]
fn nobody_who_reads_or_writes_notices_a_snapshot() {
    let mut world = World::new();
    let disk = std::sync::Arc::new(world.open().unwrap());
    let over = AtomicBool::new(false);
    let over = &over;
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let disk = std::sync::Arc::clone(&disk);
            scope.spawn(move || {
                let mut worker = disk.worker().unwrap();
                let own = thread * 512..(thread + 1) * 512;
                let mut byte = 1_u8;
                let mut found = vec![0; 512 * 16];
                while !over.load(Ordering::Relaxed) {
                    for start in own.clone().step_by(16) {
                        worker.write(start, &[byte; 512 * 16]).unwrap();
                        worker.read(start, &mut found).unwrap();
                        assert!(found.iter().all(|found| *found == byte), "own writes are read");
                    }
                    disk.flush().unwrap();
                    byte = byte.wrapping_add(1).max(1);
                }
            });
        }
        for round in 1..30 {
            let (_, after, leftovers) =
                take(live(&disk), &world.state, &world.order(round), me()).unwrap();
            after.enter(&mut world.state);
            leftovers.remove();
        }
        over.store(true, Ordering::Relaxed);
    });
    let mut found = vec![0; BYTES];
    disk.worker().unwrap().read(0, &mut found).unwrap();
    world.model = found;
    drop(disk);
    world.check(&world.open().unwrap(), "opened anew");
    assert!(Path::new(&world.state.config).ends_with("config29.json"));
}

/// Found in a review: killed between `resume` and the removal of the intent.
#[test]
fn a_kill_after_a_failed_snapshot_costs_no_write_since() {
    let mut world = World::new();
    let disk = world.open().unwrap();
    world.write(&disk, 30, 500, 0xd1);
    disk.flush().unwrap();
    let intent = world.path("u0/writable_index.snapshot");
    let saved = std::cell::RefCell::new(Vec::new());
    let probe = |step: &'static str| {
        match step {
            "commit" => return Err(Error::new(ErrorKind::NoSpace, "no space left")),
            "resumed" => *saved.borrow_mut() = fs::read(&intent).unwrap(),
            _ => {}
        }
        Ok(())
    };
    let order = world.order(1);
    take_probed(live(&disk), &world.state, &order, me(), &probe).unwrap_err();
    // As if the removal had not come yet, or failed.
    fs::write(&intent, &*saved.borrow()).unwrap();
    world.write(&disk, 1100, 300, 0xd2);
    disk.flush().unwrap();
    drop(disk);
    let disk = settle_state(world.state.clone(), world.folder.path()).and_then(|_| world.open());
    world.check(&disk.unwrap(), "flushed writes after the failed snapshot");
}

/// Found in a review: a kill when the state was saved and nothing removed; a second snapshot onto
/// the same config; then somebody attaches the first one.
#[test]
fn a_snapshot_that_was_done_stays_done_though_its_config_was_replaced() {
    let mut world = World::new();
    let first = world.state.clone();
    let disk = world.open().unwrap();
    world.write(&disk, 30, 500, 0xd1);
    let order = world.order(1);
    let (_, after, leftovers) = take(live(&disk), &world.state, &order, me()).unwrap();
    after.enter(&mut world.state);
    // Killed here: the state is saved, nothing is removed, and nobody was told of that.
    world.state.unsettled = None;
    drop((leftovers, disk));
    let state = settle_state(world.state.clone(), world.folder.path()).unwrap();
    assert_eq!(state, world.state);
    // The lock went with the process that was killed.
    let disk = world.open().unwrap();
    world.write(&disk, 700, 50, 0xd2);
    let second = SnapshotOrder { config: world.state.config.clone(), ..world.order(2) };
    let (_, after, leftovers) = take(live(&disk), &world.state, &second, me()).unwrap();
    after.enter(&mut world.state);
    leftovers.remove();
    let text = serde_json::to_vec(&first.config_content).unwrap();
    let how = How { read_only: false, make_upper: false, quota_bytes: None, io_deadline_s: None };
    let other = ServedDisk::open(&first.config, &text, None, how);
    assert!(other.unwrap_err().to_string().contains("has become a layer"));
    assert!(world.path("layer1").exists());
    world.check(&disk, "the served disk");
}

/// A kill when the state was saved and nothing removed: who takes over, or takes it away, ends it.
#[test]
fn names_that_a_killed_server_left_are_removed_by_the_next() {
    for takes_over in [true, false] {
        let mut world = World::new();
        let disk = world.open().unwrap();
        world.write(&disk, 30, 500, 0xd1);
        let (_, after, leftovers) = take(live(&disk), &world.state, &world.order(1), me()).unwrap();
        after.enter(&mut world.state);
        drop((leftovers, disk));
        assert!(world.path("u0/writable_data").exists());
        if takes_over {
            let state = settle_state(world.state.clone(), world.folder.path()).unwrap();
            assert_eq!(state.unsettled, None);
            world.state = state;
        } else {
            crate::server::served_disk::remove_ephemeral(&world.state);
        }
        assert_eq!(fs::read_dir(world.path("u0")).unwrap().count(), 0);
        world.check(&world.open().unwrap(), "as after");
    }
}

/// Found in a review: the config was put over the layer's only name.
#[test]
fn two_files_of_one_place_are_refused() {
    let mut world = World::new();
    let disk = world.open().unwrap();
    world.write(&disk, 30, 500, 0xd1);
    let order = SnapshotOrder { config: world.path("x"), layer: world.path("x"), ..world.order(1) };
    let into_upper = SnapshotOrder { config: world.path("u0/writable_data"), ..world.order(1) };
    for order in [order, into_upper] {
        let error = take(live(&disk), &world.state, &order, me()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error:#}");
    }
    world.check(&disk, "still whole");
}

/// Found in a review: config moved before settle.
#[test]
fn a_snapshot_that_was_done_stays_done_though_its_config_was_moved() {
    let mut world = World::new();
    let first = world.state.clone();
    let disk = world.open().unwrap();
    world.write(&disk, 30, 500, 0xd1);
    let probe = |step: &'static str| match step {
        "committed" => Err(Error::new(ErrorKind::Canceled, "killed")),
        _ => Ok(()),
    };
    take_probed(live(&disk), &world.state, &world.order(1), me(), &probe).unwrap_err();
    drop(disk);
    // After the power cut the user attaches the new config (which settles nothing) and writes.
    let text = fs::read(world.path("config1.json")).unwrap();
    let how = How { read_only: false, make_upper: false, quota_bytes: None, io_deadline_s: None };
    let disk = ServedDisk::open(&world.path("config1.json"), &text, None, how).unwrap();
    world.write(&disk, 1500, 40, 0xd3);
    disk.flush().unwrap();
    disk.close().unwrap();
    drop(disk);
    fs::rename(world.path("config1.json"), world.path("final.json")).unwrap();
    let text = serde_json::to_vec(&first.config_content).unwrap();
    let old = ServedDisk::open(&first.config, &text, None, how);
    assert!(old.unwrap_err().to_string().contains("has become a layer"));
    assert!(world.path("u1/writable_data").exists() && world.path("layer1").exists());
}

/// Found in a review: a copy of the folder, made in a snapshot that then failed, is attached.
#[test]
fn a_copied_folder_leads_nobody_to_the_original() {
    let mut world = World::new();
    let disk = world.open().unwrap();
    world.write(&disk, 30, 500, 0xd1);
    let probe = |step: &'static str| {
        if step == "commit" {
            fs::create_dir(world.path("copy")).unwrap();
            for entry in fs::read_dir(world.path("u0")).unwrap().flatten() {
                fs::copy(entry.path(), world.path("copy").join(entry.file_name())).unwrap();
            }
            return Err(Error::new(ErrorKind::NoSpace, "no space left"));
        }
        Ok(())
    };
    take_probed(live(&disk), &world.state, &world.order(1), me(), &probe).unwrap_err();
    world.write(&disk, 1100, 300, 0xd2);
    disk.flush().unwrap();
    let mut content = world.state.config_content.clone();
    content["upper"] = serde_json::json!({
        "data": world.path("copy/writable_data"),
        "index": world.path("copy/writable_index"),
    });
    let how = How { read_only: false, make_upper: false, quota_bytes: None, io_deadline_s: None };
    let len = || fs::metadata(world.path("u0/writable_data")).unwrap().len();
    let before = len();
    let other =
        ServedDisk::open(&world.path("copy.json"), content.to_string().as_bytes(), None, how);
    assert_eq!(other.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(len(), before);
    world.check(&disk, "E: the served original");
}

/// Found in a review: somebody's file called as the temporary one.
#[test]
fn files_of_others_stay() {
    let world = World::new();
    let disk = world.open().unwrap();
    fs::write(world.path("config1.json.snapshot"), "mine").unwrap();
    take(live(&disk), &world.state, &world.order(1), me()).unwrap();
    assert_eq!(fs::read(world.path("config1.json.snapshot")).unwrap(), b"mine");
}

/// Found in a review: the path of the old data leads nowhere (for a server without its mount).
#[test]
fn nothing_fails_once_the_config_has_its_name() {
    let mut world = World::new();
    let disk = world.open().unwrap();
    world.write(&disk, 30, 500, 0xd1);
    let (u0, away) = (world.path("u0"), world.path("away"));
    let probe = |step: &'static str| {
        if step == "committed" {
            fs::rename(&u0, &away).unwrap();
        }
        Ok(())
    };
    let first = take_probed(live(&disk), &world.state, &world.order(1), me(), &probe);
    let (_, after, leftovers) = first.unwrap();
    after.enter(&mut world.state);
    leftovers.remove();
    world.write(&disk, 5, 5, 0xd2);
    let (_, after, leftovers) = take(live(&disk), &world.state, &world.order(2), me()).unwrap();
    after.enter(&mut world.state);
    leftovers.remove();
    world.check(&disk, "H: live");
    drop(disk);
    world.check(&world.open().unwrap(), "H: opened anew");
}
