//! The commands that work on the files of a pair while it is not attached: the real program.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use obd_ublk::upper::{Pair, PairOptions, PairPaths};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One test at a time: a program that one starts has, until it runs, the open files of the other,
/// and with them the lock of its pair.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_obd-ublk"));
    command.env_remove("OBD_UBLK_LOG").stdin(Stdio::null());
    command
}

/// A disk of 1 MiB with data that is seen no more; the paths of its config, data and index.
fn written_disk(folder: &Path, run: &Path) -> [PathBuf; 3] {
    let created = program()
        .args(["create".as_ref(), folder.as_os_str(), "--size".as_ref(), "1M".as_ref()])
        .output()
        .unwrap();
    assert!(created.status.success(), "{created:?}");
    let names = ["config.v1.json", "writable_data", "writable_index"];
    let [config, data, index] = names.map(|name| folder.join(name));
    let options = PairOptions { journal_folder: run.join("upper"), ..PairOptions::default() };
    let pair =
        Pair::open(&PairPaths { data: data.clone(), index: index.clone() }, &options).unwrap();
    let mut worker = pair.worker();
    for byte in 1_u8..9 {
        worker.write(8 + 128 * u64::from(8 - byte), &[byte; 65536]).unwrap();
    }
    worker.zero(16..24).unwrap();
    worker.zero(136..1032).unwrap();
    [config, data, index]
}

fn run_in(run: &Path, arguments: &[&std::ffi::OsStr]) -> (i32, Vec<u8>, String) {
    let output = program().args(arguments).env("OBD_UBLK_RUN_DIR", run).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), output.stdout, told)
}

#[test]
fn a_compacted_disk_is_small_and_what_it_was() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let [config, data, index] = written_disk(&folder.path().join("disk"), &run);
    let export = || {
        let (code, disk, told) = run_in(&run, &["export".as_ref(), config.as_ref()]);
        assert_eq!(code, 0, "{told}");
        disk
    };
    let before = export();
    assert_eq!(before[4096..8192], [8; 4096]);
    let (code, told, _) = run_in(&run, &["compact".as_ref(), "--json".as_ref(), config.as_ref()]);
    assert_eq!(code, 0);
    let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
    let live = 65536 - 4096;
    assert_eq!(told["data_bytes_before"], 4096 + 8 * 65536);
    assert_eq!((&told["data_bytes"], &told["moved_bytes"]), (&json!(4096 + live), &json!(live)));
    assert_eq!(std::fs::metadata(&data).unwrap().len(), 4096 + live);
    assert_eq!(export(), before);
    let arguments = ["compact".as_ref(), data.as_ref(), index.as_ref()];
    let (code, told, _) = run_in(&run, &arguments);
    assert_eq!((code, &told[..5]), (0, &b"data "[..]));
    assert_eq!(export(), before);
}

#[test]
fn what_cannot_be_compacted_is_told_by_its_exit_code() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let [config, data, index] = written_disk(&folder.path().join("disk"), &run);
    let options = PairOptions { journal_folder: run.join("upper"), ..PairOptions::default() };
    let paths = PairPaths { data: data.clone(), index };
    let pair = Pair::open(&paths, &options).unwrap();
    let (code, _, told) = run_in(&run, &["compact".as_ref(), config.as_ref()]);
    assert_eq!(code, 12, "{told}");
    let pid = std::process::id();
    assert!(told.contains(&format!("the process with id {pid}")), "{told}");
    drop(pair);
    let image = folder.path().join("image.json");
    std::fs::write(&image, r#"{"repoBlobUrl":"","lowers":[]}"#).unwrap();
    let (code, _, told) = run_in(&run, &["compact".as_ref(), image.as_ref()]);
    assert_eq!(code, 2, "{told}");
    // Swapped: nothing is written.
    let bytes = std::fs::read(&data).unwrap();
    let (code, ..) = run_in(&run, &["compact".as_ref(), paths.index.as_ref(), data.as_ref()]);
    assert_eq!(code, 5);
    assert!(std::fs::read(&data).unwrap() == bytes);
}

#[test]
fn a_disk_grows_while_it_is_not_attached() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let [config, data, index] = written_disk(&folder.path().join("disk"), &run);
    let export = || run_in(&run, &["export".as_ref(), config.as_ref()]).1;
    let resize = |disk: &std::ffi::OsStr, size: &str| {
        run_in(&run, &["resize".as_ref(), "--json".as_ref(), disk, size.as_ref()])
    };
    let mut expected = export();
    let (code, told, _) = resize(config.as_ref(), "2M");
    assert_eq!(code, 0);
    let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
    assert_eq!(told, json!({"size_bytes_before": 1 << 20, "size_bytes": 2 << 20}));
    expected.resize(2 << 20, 0);
    assert!(export() == expected);
    assert_eq!(resize(config.as_ref(), "1M").0, 64);
    let (code, _, told) = resize("/dev/ublkb3".as_ref(), "4M");
    assert_eq!(code, 6);
    assert!(told.contains("/dev/ublkb3"), "{told}");
    let options = PairOptions { journal_folder: run.join("upper"), ..PairOptions::default() };
    let _pair = Pair::open(&PairPaths { data, index }, &options).unwrap();
    assert_eq!(resize(config.as_ref(), "4M").0, 12);
}

#[test]
fn a_sparse_disk_is_made_and_neither_compacted_nor_resized() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let disk = folder.path().join("disk");
    assert_eq!(run_in(&run, &arguments_of(&disk)).0, 0);
    let config = disk.join("config.v1.json");
    let [data, index] = ["writable_data", "writable_index"].map(|name| disk.join(name));
    assert_eq!(std::fs::metadata(&data).unwrap().len(), 4096 + (1 << 20));
    assert_eq!(std::fs::metadata(&index).unwrap().len(), 0);
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options().write(true).open(&data).unwrap(),
        &[7; 4096],
        4096 + 8192,
    )
    .unwrap();
    let (code, seen, _) = run_in(&run, &["export".as_ref(), config.as_ref()]);
    assert_eq!((code, seen.len()), (0, 1 << 20));
    assert!(seen[..8192].iter().all(|byte| *byte == 0) && seen[8192..12288] == [7; 4096]);
    for arguments in [
        &["compact".as_ref(), config.as_ref()][..],
        &["resize".as_ref(), config.as_ref(), "2M".as_ref()],
    ] {
        let (code, _, told) = run_in(&run, arguments);
        assert_eq!(code, 4, "{told}");
        assert!(told.contains("sparse form"), "{told}");
    }
    let again = run_in(&run, &arguments_of(&disk));
    assert_eq!(again.0, 1, "{}", again.2);
}

fn arguments_of(disk: &Path) -> [&std::ffi::OsStr; 4] {
    ["create".as_ref(), "--sparse".as_ref(), disk.as_ref(), "--size=1M".as_ref()]
}
