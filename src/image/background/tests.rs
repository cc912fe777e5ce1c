//! The background of an image whose layers lie elsewhere, with blobs that note what is wanted.

use super::*;
use crate::disk::{Disk, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{SegmentMapping, write_sealed};
use crate::format::trace::{self, Op, Record, Trace};
use crate::image::{Layer, Stack};
use serde_json::json;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SECTORS: u64 = 8192;

/// A blob of which nothing is here before it is fetched ahead.
#[derive(Debug)]
struct Far {
    bytes: Vec<u8>,
    /// Held by a test that lets fetches hang.
    door: Mutex<()>,
    /// How many fetches there were, those that hang included.
    asked: AtomicU64,
    ahead: Mutex<Vec<Range<u64>>>,
    failures: AtomicU64,
    busy: AtomicBool,
}

impl RemoteBlob for Far {
    fn name(&self) -> &str {
        "far away"
    }

    fn bytes(&self) -> u64 {
        u64::try_from(self.bytes.len()).unwrap()
    }

    fn read(&self, offset_bytes: u64, dst: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset_bytes).unwrap();
        dst.copy_from_slice(&self.bytes[start..start + dst.len()]);
        Ok(())
    }

    fn is_here(&self, offset_bytes: u64, bytes: u64) -> bool {
        let ahead = self.ahead.lock().unwrap();
        let mut at = offset_bytes;
        while let Some(range) = ahead.iter().find(|range| range.contains(&at)) {
            at = range.end;
        }
        at >= offset_bytes + bytes
    }

    fn fetch_ahead(&self, bytes: Range<u64>) -> Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        drop(self.door.lock().unwrap());
        let less = |left: u64| left.checked_sub(1);
        if self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
            return Err(Error::new(ErrorKind::Unavailable, "not now"));
        }
        self.ahead.lock().unwrap().push(bytes);
        Ok(())
    }

    fn here_bytes(&self) -> u64 {
        self.ahead.lock().unwrap().iter().map(|range| range.end - range.start).sum()
    }

    fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    fn cancel(&self) {}
}

/// An image of one layer far away: sector N of the disk is sector N + 8 of the layer.
fn far_image() -> (Image, Arc<Far>) {
    let data: Vec<u8> = (0..512 * SECTORS).map(|n| u8::try_from(n / 512 % 251).unwrap()).collect();
    let segment = SegmentMapping {
        start_sector: 0,
        sectors: SECTORS,
        mapped_sector: 8,
        zeroed: false,
        tag: 0,
    };
    let far = Arc::new(Far {
        door: Mutex::default(),
        asked: AtomicU64::new(0),
        bytes: write_sealed(&[segment], &data, SECTORS * 512),
        ahead: Mutex::default(),
        failures: AtomicU64::new(0),
        busy: AtomicBool::new(false),
    });
    let source = Source::Remote(Arc::clone(&far) as Arc<dyn RemoteBlob>);
    let layer = Layer::open_sealed("far".to_owned(), source).unwrap();
    (Stack::from_layers(vec![layer]).unwrap().into_image().unwrap(), far)
}

fn config(more: serde_json::Value) -> ImageConfig {
    let mut config = json!({"lowers": [{"digest": "sha256:a"}]});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    ImageConfig::parse(config.to_string().as_bytes()).unwrap()
}

fn begin(image: &Image, config: &ImageConfig, root: Option<&Path>) {
    begin_as(Turn::Attach, image, config, root);
}

fn begin_as(turn: Turn, image: &Image, config: &ImageConfig, root: Option<&Path>) {
    let logs = root.map(TouchLogs::of);
    image.begin_background_in(config, &ServiceConfig::default(), logs, turn);
}

fn read(image: &Image, start_sector: u64, sectors: usize) {
    let mut buffer = vec![0; sectors * 512];
    image.worker().unwrap().read(start_sector, &mut buffer).unwrap();
    assert_eq!(u64::from(buffer[0]), start_sector % 251);
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_was_touched_first_is_fetched_ahead_at_the_next_attach_in_that_order() {
    let logs = tempfile::tempdir().unwrap();
    let (image, far) = far_image();
    begin(&image, &config(json!({})), Some(logs.path()));
    for sector in [5000, 100, 5001, 100] {
        read(&image, sector, 8);
    }
    image.end_background();
    assert_eq!(*far.ahead.lock().unwrap(), [], "nothing was known");
    drop(image);
    let (image, far) = far_image();
    begin(&image, &config(json!({})), Some(logs.path()));
    eventually("two pieces", || far.ahead.lock().unwrap().len() == 2);
    let mut found = far.ahead.lock().unwrap().clone();
    found.sort_by_key(|range| range.start);
    let chunk = |sector: u64| {
        let start = (sector + 8) * 512 / 65_536 * 65_536;
        start..start + 65_536
    };
    assert_eq!(found, [chunk(100), chunk(5000)]);
    // Another image has another log.
    let other = ImageConfig::parse(br#"{"lowers": [{"digest": "sha256:b"}]}"#).unwrap();
    let (image, far) = far_image();
    begin(&image, &other, Some(logs.path()));
    read(&image, 0, 1);
    assert_eq!(*far.ahead.lock().unwrap(), []);
}

#[test]
fn a_trace_is_recorded_until_its_lock_is_removed_and_replayed_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let wish = config(json!({"recordTracePath": path("t")}));
    let (image, _far) = far_image();
    begin(&image, &wish, None);
    assert!(!path("t.lock").exists(), "only a file that is there is a wish");
    drop(image);
    std::fs::write(path("t"), "").unwrap();
    let (image, _far) = far_image();
    begin(&image, &wish, None);
    assert!(path("t.lock").exists() && !path("t.ok").exists());
    assert_eq!(image.needed_paths()[0], folder.path().canonicalize().unwrap());
    read(&image, 1000, 8);
    read(&image, 0, 4096);
    std::fs::remove_file(path("t.lock")).unwrap();
    eventually("the recording is over", || path("t.ok").exists());
    read(&image, 3000, 8);
    image.end_background();
    let record = |offset_bytes, bytes| Record { op: Op::Read, layer_index: 0, bytes, offset_bytes };
    let expected =
        [record(1008 * 512, 4096), record(4096, 1 << 20), record(4096 + (1 << 20), 1 << 20)];
    let recorded = trace::parse(&std::fs::read(path("t")).unwrap()).unwrap();
    assert_eq!(recorded.records, expected);
    let (image, far) = far_image();
    begin(&image, &wish, None);
    eventually("all is fetched ahead", || far.here_bytes() == 4096 + (2 << 20));
    drop(image);
    assert_eq!(std::fs::read(path("t")).unwrap(), trace::encode(&recorded), "left as it was");
}

#[test]
fn a_recording_ends_with_the_device_and_goes_on_with_its_successor() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("t"), "").unwrap();
    // That of a server that was killed, and an old mark.
    std::fs::write(path("t.lock"), "").unwrap();
    std::fs::write(path("t.ok"), "old").unwrap();
    let (image, _far) = far_image();
    begin(&image, &config(json!({"recordTracePath": path("t")})), None);
    read(&image, 5, 1);
    image.end_background();
    drop(image);
    assert!(!path("t.lock").exists());
    assert_eq!(std::fs::read(path("t.ok")).unwrap(), b"");
    let recorded = trace::parse(&std::fs::read(path("t")).unwrap()).unwrap();
    assert_eq!(recorded.records.len(), 1);
}

/// The recording and the lesson were looked after by the thread that downloads, between two layers:
/// whoever removed the lock waited for a layer, or for a registry.
#[test]
fn a_download_that_hangs_delays_neither_the_end_of_a_recording_nor_that_of_a_lesson() {
    let (folder, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("t"), "").unwrap();
    let (image, far) = far_image();
    let door = far.door.lock().unwrap();
    let download = json!({"enable": true, "delay": 0, "delayExtra": 0, "maxMBps": 0});
    let wish = config(json!({"recordTracePath": path("t"), "download": download}));
    begin(&image, &wish, Some(root.path()));
    read(&image, 5, 1);
    eventually("it hangs", || far.asked.load(Ordering::Relaxed) > 0);
    std::fs::remove_file(path("t.lock")).unwrap();
    eventually("the recording is over", || path("t.ok").exists());
    // As after the time of a lesson.
    let shared = &image.background().unwrap().shared;
    shared.begin_looking(Duration::ZERO);
    eventually("what was learned is kept", || {
        TouchLogs::of(root.path()).list().unwrap().len() == 1
    });
    // Nor does a detach wait.
    image.end_background();
    image.cancel();
    assert_eq!(*far.ahead.lock().unwrap(), []);
    drop(door);
}

/// What the old server of an upgrade had recorded and learned was lost, and the trace was that of
/// the new one alone.
#[test]
fn a_server_that_hands_on_leaves_what_it_recorded_and_learned_to_its_successor() {
    let (folder, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("t"), "").unwrap();
    // Of a recording that nobody ended, and that is not ours.
    std::fs::write(path("t.draft"), "old").unwrap();
    let wish = config(json!({"recordTracePath": path("t")}));
    let (old, _far) = far_image();
    begin(&old, &wish, Some(root.path()));
    assert!(!path("t.draft").exists());
    read(&old, 5, 1);
    read(&old, 1000, 8);
    let mut before = old;
    for sector in [2000, 3000] {
        // It is ready before the old one ends.
        let (next, _far) = far_image();
        begin_as(Turn::Successor, &next, &wish, Some(root.path()));
        before.hand_on_background();
        drop(before);
        assert!(path("t.lock").exists() && !path("t.ok").exists());
        assert_eq!(std::fs::read(path("t")).unwrap(), b"");
        read(&next, sector, 8);
        before = next;
    }
    let learned = || {
        let logs = TouchLogs::of(root.path());
        logs.read(&logs.list().unwrap()[0].name).unwrap()
    };
    let of_start = learned();
    assert_eq!(trace::parse(&of_start).unwrap().records.len(), 2);
    before.end_background();
    let recorded = trace::parse(&std::fs::read(path("t")).unwrap()).unwrap();
    let sectors: Vec<_> = recorded.records.iter().map(|it| it.offset_bytes / 512 - 8).collect();
    assert_eq!(sectors, [5, 1000, 2000, 3000]);
    assert!(path("t.ok").exists() && !path("t.lock").exists() && !path("t.draft").exists());
    assert_eq!(learned(), of_start, "a successor's reads are no first touches");
}

#[test]
fn a_trace_that_somebody_wrote_meanwhile_is_not_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("t"), "").unwrap();
    let (image, _far) = far_image();
    begin(&image, &config(json!({"recordTracePath": path("t")})), None);
    read(&image, 5, 1);
    std::fs::write(path("t"), "another").unwrap();
    image.end_background();
    assert_eq!(std::fs::read(path("t")).unwrap(), b"another");
    assert!(!path("t.lock").exists());
}

#[test]
fn a_start_that_fails_leaves_a_recording_as_it_found_it() {
    for had_lock in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("t"), "").unwrap();
        if had_lock {
            std::fs::write(path("t.lock"), "").unwrap();
        }
        let (image, _far) = far_image();
        begin(&image, &config(json!({"recordTracePath": path("t")})), None);
        assert!(path("t.lock").exists());
        read(&image, 5, 1);
        // Never served to its end.
        drop(image);
        assert_eq!(std::fs::read(path("t")).unwrap(), b"");
        assert_eq!((path("t.lock").exists(), path("t.ok").exists()), (had_lock, false));
    }
}

#[test]
fn the_trace_of_an_acceleration_layer_is_replayed_and_a_damaged_one_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let wish = json!({
        "lowers": [{"digest": "sha256:a"}, {"dir": folder.path()}],
        "accelerationLayer": true,
    });
    let wish = ImageConfig::parse(wish.to_string().as_bytes()).unwrap();
    let record = |layer_index, offset_bytes, bytes| Record {
        op: Op::Read,
        layer_index,
        bytes,
        offset_bytes,
    };
    // Beyond the layer's end, of no layer, half inside.
    let end = (SECTORS + 8) * 512;
    let records = vec![
        record(0, 8192, 4096),
        record(0, 1 << 40, 4096),
        record(9, 0, 4096),
        record(0, end, 1 << 20),
    ];
    let bytes = trace::encode(&Trace { records });
    let file = folder.path().join("trace");
    std::fs::write(&file, &bytes).unwrap();
    let (image, far) = far_image();
    begin(&image, &wish, None);
    let last = far.bytes();
    eventually("what there is", || far.here_bytes() == 4096 + (last - end));
    for damaged in [&bytes[..30], b"/etc/passwd\n", b""] {
        std::fs::write(&file, damaged).unwrap();
        let (image, far) = far_image();
        begin(&image, &wish, None);
        read(&image, 0, 1);
        assert_eq!(*far.ahead.lock().unwrap(), []);
    }
    std::fs::remove_file(&file).unwrap();
    let (image, _far) = far_image();
    begin(&image, &wish, None);
    read(&image, 0, 1);
}

#[test]
fn a_trace_of_something_else_is_given_up_and_so_is_one_that_cannot_be_fetched() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t");
    // Apart, so that they are not joined; more than are looked at before it is judged.
    let record =
        |n: u64| Record { op: Op::Read, layer_index: 0, bytes: 512, offset_bytes: n * 1024 };
    let records: Vec<_> = (0..4000).map(record).collect();
    std::fs::write(&path, trace::encode(&Trace { records })).unwrap();
    let wish = config(json!({"recordTracePath": path}));
    let (image, far) = far_image();
    far.failures.store(u64::MAX, Ordering::Relaxed);
    begin(&image, &wish, None);
    let tried = || u64::MAX - far.failures.load(Ordering::Relaxed);
    let most = u64::from(crate::limits::REPLAY_FAILURES_MAX) + 8;
    eventually("it tried", || tried() >= u64::from(crate::limits::REPLAY_FAILURES_MAX));
    std::thread::sleep(Duration::from_millis(50));
    assert!(tried() <= most, "{} tries", tried());
    assert_eq!(far.here_bytes(), 0);
}

#[test]
fn a_download_waits_for_its_time_and_for_reads_and_tries_again() {
    let (image, far) = far_image();
    let later = json!({"download": {"enable": true, "delay": 3600}});
    begin(&image, &config(later), None);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(*far.ahead.lock().unwrap(), [], "not yet");
    image.end_background();
    let (image, far) = far_image();
    far.failures.store(2, Ordering::Relaxed);
    let now = json!({"download":
        {"enable": true, "delay": 0, "delayExtra": 0, "tryCnt": 3, "blockSize": 1_000_000}});
    begin(&image, &config(now.clone()), None);
    eventually("all of it", || far.here_bytes() == far.bytes());
    let pieces = far.ahead.lock().unwrap().clone();
    assert!(pieces.iter().all(|piece| piece.end - piece.start <= 1_000_000), "{pieces:?}");
    drop(image);
    // More failures than tries.
    let (image, far) = far_image();
    far.failures.store(1000, Ordering::Relaxed);
    begin(&image, &config(now), None);
    eventually("three tries", || far.failures.load(Ordering::Relaxed) == 997);
    assert_eq!(*far.ahead.lock().unwrap(), []);
}

#[test]
fn a_layer_that_is_mostly_here_is_fetched_whole_unasked() {
    let (image, far) = far_image();
    let three_quarters = far.bytes() / 4 * 3 + 3;
    far.ahead.lock().unwrap().push(0..three_quarters);
    begin(&image, &config(json!({})), None);
    eventually("the rest", || far.is_here(0, far.bytes()));
    drop(image);
    let (image, far) = far_image();
    far.ahead.lock().unwrap().push(0..far.bytes() / 2);
    begin(&image, &config(json!({})), None);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(far.ahead.lock().unwrap().len(), 1, "half is not most");
}

#[test]
fn a_layer_that_failed_and_is_wanted_no_more_wakes_nobody() {
    let (_image, far) = far_image();
    far.ahead.lock().unwrap().push(0..far.bytes() / 4 * 3 + 3);
    far.failures.store(1, Ordering::Relaxed);
    let plan = Plan::of(&ServiceConfig::default().download);
    assert_eq!(plan.delay, None);
    let mut downloads = Downloads::new(vec![Arc::clone(&far) as Arc<dyn RemoteBlob>], plan);
    let (begun, usual) = (Instant::now(), Duration::from_secs(3600));
    let stop = Stop::default();
    assert!(downloads.look(&stop, begun));
    assert_eq!(far.failures.load(Ordering::Relaxed), 0, "it was tried");
    assert!(downloads.next_look(begun, usual) < usual, "to be tried again");
    // Evicted meanwhile.
    far.ahead.lock().unwrap().clear();
    let end = Instant::now() + Duration::from_secs(60);
    while downloads.next_look(begun, usual) < usual {
        assert!(Instant::now() < end, "looked at for ever");
        std::thread::sleep(Duration::from_millis(50));
        assert!(downloads.look(&stop, begun));
    }
    assert_eq!(*far.ahead.lock().unwrap(), []);
}

#[test]
fn an_image_of_files_has_no_background_and_no_log() {
    let (_, far) = far_image();
    let source = Source::Memory(far.bytes.clone().into());
    let layer = Layer::open_sealed("near".to_owned(), source).unwrap();
    let image = Stack::from_layers(vec![layer]).unwrap().into_image().unwrap();
    let logs = tempfile::tempdir().unwrap();
    begin(&image, &config(json!({"download": {"enable": true}})), Some(logs.path()));
    assert!(image.parts.background.get().is_none());
}
