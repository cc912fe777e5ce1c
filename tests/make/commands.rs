//! The commands that make layers, as people meet them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::checker::{Sector, check, check_zfile};
use crate::common::golden::{Golden, sha256_of_file};
use crate::common::written_below;
use crate::content::{Fill, layer_of, random_disk, sector};
use crate::names;
use crate::random::Random;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use obd_ublk::error::ErrorKind;
use obd_ublk::format::config::ServiceConfig;
use obd_ublk::format::lsmt::{self, SegmentMapping};
use obd_ublk::image::load_image_config;
use obd_ublk::upper::{Pair, PairOptions, PairPaths};
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_obd-ublk");

fn run_in(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).current_dir(folder).output().unwrap()
}

/// Runs a command that must succeed; what it prints.
pub(crate) fn ok(folder: &Path, arguments: &[&str]) -> String {
    let output = run_in(folder, arguments);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {told}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that must end with this exit code; what it says.
pub(crate) fn refused(folder: &Path, code: i32, arguments: &[&str]) -> String {
    let output = run_in(folder, arguments);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {told}");
    told
}

pub(crate) fn flattened(folder: &Path, image: &str) -> String {
    ok(folder, &["export", image, "-o", "flat.raw"]);
    let digest = sha256_of_file(&folder.join("flat.raw"));
    std::fs::remove_file(folder.join("flat.raw")).unwrap();
    digest
}

#[test]
fn an_upper_of_either_form_becomes_a_layer_and_stays_as_it_is() {
    let golden = Golden::load();
    for name in ["rw-append", "rw-append-groupcommit", "rw-sparse"] {
        let case = golden.case(name);
        let files = golden.materialise(case);
        let folder = files.dir();
        let config = files.config(case).display().to_string();
        let upper = case.upper().unwrap();
        let expected = case.expected_sha256.as_ref().unwrap();
        let before: Vec<_> = [&upper.data, &upper.index]
            .map(|file| {
                (
                    sha256_of_file(&files.path(file)),
                    files.path(file).metadata().unwrap().modified().unwrap(),
                )
            })
            .to_vec();
        for arguments in [
            &["commit", &config, "layer"][..],
            &["commit", &upper.data, &upper.index, "layer"],
            &["commit", "-z", &config, "layer"],
            &["commit", "-z", "-t", "--algorithm", "zstd", "--bs", "64", &config, "layer"],
            &["commit", "-t", "--no-zero-detection", &config, "layer"],
            &["merge", &config, "layer"],
            &["merge", &config, "layer", "--raw", "--zero-detection", "sector", "--threads", "3"],
        ] {
            ok(folder, arguments);
            check(&std::fs::read(folder.join("layer")).unwrap());
            assert_eq!(&flattened(folder, "layer"), expected, "{arguments:?}");
        }
        let after: Vec<_> = [&upper.data, &upper.index]
            .map(|file| {
                (
                    sha256_of_file(&files.path(file)),
                    files.path(file).metadata().unwrap().modified().unwrap(),
                )
            })
            .to_vec();
        assert!(before == after, "the upper was touched");
    }
}

#[test]
fn what_a_layer_says_of_itself_can_be_told() {
    let golden = Golden::load();
    let case = golden.case("rw-append");
    let files = golden.materialise(case);
    let config = files.config(case).display().to_string();
    let made = ok(files.dir(), &["commit", "-z", "--json", &config, "layer"]);
    let made: Value = serde_json::from_str(&made).unwrap();
    let file = std::fs::read(files.path("layer")).unwrap();
    assert_eq!(made["file_bytes"].as_u64(), u64::try_from(file.len()).ok());
    let found = check(&file);
    assert_eq!(found.uuid, "DC41989F-0B38-4F86-8C31-D139E5583409", "the upper's");
    let (uuid, parent) =
        ("11111111-2222-3333-4444-abcdefabcdef", "99999999-2222-3333-4444-ABCDEFABCDEF");
    ok(
        files.dir(),
        &["commit", &config, "layer", "--uuid", uuid, "-p", parent, "-m", "made by a test"],
    );
    let found = check(&std::fs::read(files.path("layer")).unwrap());
    assert_eq!((found.uuid, found.parent_uuid), (uuid.to_uppercase(), parent.to_owned()));
    assert!(found.tag.starts_with(b"made by a test\0"));
    for (arguments, told) in [
        (&["commit", &config, "layer", "--uuid", "1234"][..], "expected a UUID"),
        (&["commit", &config, "layer", "--bs", "16"], "add -z"),
        (&["commit", "-z", &config, "layer", "--bs", "5"], "a power of two from 4096 to 65536"),
        (&["commit", "-z", &config, "layer", "--bs", "128"], "a power of two from 4096 to 65536"),
        (&["commit", "-z", &config, "layer", "--level", "2"], "3 to 12 for lz4"),
        (&["commit", &config], "expected CONFIG OUT or DATA INDEX OUT"),
        (&["commit", "-m", &"x".repeat(257), &config, "layer"], "at most 256"),
        // None of these would be heard.
        (&["commit", "--seal", &config, "-t"], "cannot be used with"),
        (&["commit", "--seal", &config, "--uuid", uuid], "cannot be used with"),
        (&["commit", "--seal", &config, "-p", parent], "cannot be used with"),
        (&["commit", "--seal", &config, "-m", "tag"], "cannot be used with"),
        (&["commit", "--seal", &config, "--threads", "2"], "cannot be used with"),
        (&["commit", "--seal", &config, "--zero-detection", "off"], "cannot be used with"),
        (&["commit", "--seal", &config, "--no-zero-detection"], "cannot be used with"),
        (&["commit", "--seal", &config, "--bs", "16"], "add -z"),
    ] {
        let said = refused(files.dir(), 64, arguments);
        assert!(said.contains(told), "{arguments:?}: {said}");
    }
}

#[test]
fn an_upper_that_is_written_is_not_committed() {
    let folder = tempfile::tempdir().unwrap();
    let paths = PairPaths { data: folder.path().join("data"), index: folder.path().join("index") };
    ok(folder.path(), &["create", "data", "index", "1M"]);
    let options =
        PairOptions { journal_folder: folder.path().join("run"), ..PairOptions::default() };
    let pair = Pair::open(&paths, &options).unwrap();
    let said = refused(folder.path(), 12, &["commit", "data", "index", "layer"]);
    assert!(said.contains("data is being written by another process"), "{said}");
    pair.close().unwrap();
    drop(pair);
    for output in ["data", "index", "./index", "config.json"] {
        let pair = json!({"upper": {"data": "data", "index": "index"}});
        std::fs::write(folder.path().join("config.json"), pair.to_string()).unwrap();
        let said = refused(folder.path(), 2, &["commit", "config.json", output]);
        assert!(said.contains("must not be written"), "{said}");
    }
    ok(folder.path(), &["commit", "data", "index", "layer"]);
}

/// A merge once read an upper that was written at the same time: a state that never was.
#[test]
fn an_image_whose_upper_is_written_is_not_merged() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let disk = random_disk(2048, &mut Random(10));
    std::fs::write(here.join("lower"), layer_of(&disk, false)).unwrap();
    let paths = PairPaths { data: here.join("data"), index: here.join("index") };
    let config = json!({
        "lowers": [{"file": here.join("lower")}],
        "upper": {"data": &paths.data, "index": &paths.index},
    });
    std::fs::write(here.join("config.json"), config.to_string()).unwrap();
    ok(here, &["create", "data", "index", "1M"]);
    let options = PairOptions { journal_folder: here.join("run"), ..PairOptions::default() };
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    worker.write(8, &[7; 4096]).unwrap();
    drop(worker);
    let said = refused(here, 12, &["merge", "config.json", "layer"]);
    assert!(said.contains("data is being written by another process"), "{said}");
    pair.close().unwrap();
    drop(pair);
    ok(here, &["merge", "config.json", "layer"]);
    let content = obd_ublk::make::Content::of_image(
        &load_image_config(&here.join("config.json"), None).unwrap(),
        &ServiceConfig::default(),
    )
    .unwrap();
    let busy = Pair::open(&paths, &options).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "as long as it is read");
    drop(content);
}

/// The sparse form has no index but the file's extents: its seal once became sectors of the layer.
#[test]
fn a_sparse_upper_that_was_sealed_is_no_upper_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    ok(here, &["create", "-s", "data", "index", "1M"]);
    let file = std::fs::File::options().write(true).open(here.join("data")).unwrap();
    file.write_all_at(&[7; 8192], 4096 + 64 * 512).unwrap();
    drop(file);
    ok(here, &["commit", "data", "index", "before"]);
    ok(here, &["commit", "--seal", "data", "index"]);
    let config = json!({"upper": {"data": here.join("data"), "index": here.join("index")}});
    std::fs::write(here.join("config.json"), config.to_string()).unwrap();
    for arguments in [
        &["commit", "data", "index", "after"][..],
        &["commit", "config.json", "after"],
        &["merge", "config.json", "after"],
    ] {
        let said = refused(here, 4, arguments);
        assert!(said.contains("--commit_sealed"), "{said}");
    }
    ok(here, &["commit", "--commit_sealed", "data", "after"]);
    let entries = |layer: &str| check(&std::fs::read(here.join(layer)).unwrap()).entries;
    assert_eq!(entries("after"), [(64, 16, 8, false)]);
    assert_eq!(entries("after"), entries("before"));
}

/// A commit once looked at the upper's files only, and took the place of a layer below it.
#[test]
fn an_upper_is_not_committed_over_a_layer_of_its_image() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let disk = random_disk(2048, &mut Random(9));
    std::fs::create_dir(here.join("dir")).unwrap();
    for lower in ["lower", "dir/overlaybd.commit"] {
        std::fs::write(here.join(lower), layer_of(&disk, false)).unwrap();
    }
    std::os::unix::fs::symlink("lower", here.join("link")).unwrap();
    ok(here, &["create", "data", "index", "1M"]);
    let config = json!({
        "lowers": [{"file": here.join("lower")}, {"dir": here.join("dir")}],
        "upper": {"data": here.join("data"), "index": here.join("index")},
    });
    std::fs::write(here.join("config.json"), config.to_string()).unwrap();
    let before = ["lower", "dir/overlaybd.commit"].map(|file| sha256_of_file(&here.join(file)));
    for output in ["lower", "./lower", "link", "dir/overlaybd.commit", "data", "config.json"] {
        let said = refused(here, 2, &["commit", "-z", "config.json", output]);
        assert!(said.contains("must not be written"), "{output}: {said}");
    }
    let after = ["lower", "dir/overlaybd.commit"].map(|file| sha256_of_file(&here.join(file)));
    assert_eq!(before, after);
    ok(here, &["commit", "-z", "config.json", "layer"]);
}

#[test]
fn a_sealed_upper_is_a_layer_and_is_committed_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    ok(here, &["create", "data", "index", "4M"]);
    let options = PairOptions { journal_folder: here.join("run"), ..PairOptions::default() };
    let paths = PairPaths { data: here.join("data"), index: here.join("index") };
    let pair = Pair::open(&paths, &options).unwrap();
    let mut worker = pair.worker();
    for at in 0..40 {
        worker.write(at * 64, &vec![u8::try_from(at % 3).unwrap(); 4096]).unwrap();
        worker.write(64, &[9; 512]).unwrap();
    }
    drop(worker);
    pair.flush().unwrap();
    pair.close().unwrap();
    drop(pair);
    ok(here, &["commit", "data", "index", "before"]);
    let before = flattened(here, "before");
    ok(here, &["commit", "--seal", "data", "index"]);
    assert_eq!(flattened(here, "data"), before);
    ok(here, &["verify", "data"]);
    let sealed = sha256_of_file(&here.join("data"));
    ok(here, &["commit", "--commit_sealed", "data", "after", "-z", "-t"]);
    assert_eq!(flattened(here, "after"), before);
    assert_eq!(sha256_of_file(&here.join("data")), sealed, "only read");
    assert!(
        here.join("after").metadata().unwrap().len() < here.join("data").metadata().unwrap().len()
    );
}

#[test]
fn a_bare_size_is_in_gibibytes_and_zero_asks_the_layer_below() {
    let folder = tempfile::tempdir().unwrap();
    for (number, (size, bytes)) in
        [("2", 2 << 30), ("64", 64 << 30), ("96K", 96 << 10), ("0", 0)].into_iter().enumerate()
    {
        for form in [&[][..], &["-s"]] {
            let (data, index) =
                (format!("d{number}{}", form.len()), format!("i{number}{}", form.len()));
            let parent = ["-u", "00000000-1111-2222-3333-444444444444"];
            ok(folder.path(), &[&["create", &data, &index, size][..], form, &parent].concat());
            let mut header = [0; 4096];
            let file = std::fs::File::open(folder.path().join(&data)).unwrap();
            file.read_exact_at(&mut header, 0).unwrap();
            let header = lsmt::Header::parse(&header, 0).unwrap();
            assert_eq!(header.virtual_size_bytes, bytes);
            assert_eq!(header.parent_uuid.to_string(), parent[1]);
            assert_eq!(header.flags.is_sparse_writable(), !form.is_empty());
            let there = refused(folder.path(), 1, &["create", &data, &index, size]);
            assert!(there.contains("exists"), "{there}");
        }
    }
}

#[test]
fn two_stacks_differ_where_their_bytes_do() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(40);
    let one = random_disk(9000, &mut random);
    let mut other = one.clone();
    for range in [0..1, 100..140, 5000..5001, 8000..9000] {
        for at in range {
            other[at] = Sector::Data(sector(Fill::Text, u64::try_from(at).unwrap(), &mut random));
        }
    }
    // Zeros of another kind are no difference.
    other[4000..4400].fill(Sector::Zeroed);
    let mut one = one;
    one[4000..4400].fill(Sector::Nothing);
    other.extend(vec![Sector::Nothing; 24]);
    std::fs::write(folder.path().join("one"), layer_of(&one, false)).unwrap();
    std::fs::write(folder.path().join("other"), layer_of(&other, true)).unwrap();
    let expected: Vec<usize> = (0..9024)
        .filter(|&at| {
            at >= 9000 || crate::content::bytes(&one[at]) != crate::content::bytes(&other[at])
        })
        .collect();
    let text = ok(folder.path(), &["diff", "one", "other"]);
    let mut found = Vec::new();
    for line in text.lines() {
        let (start, length) = line.split_once(' ').unwrap();
        let (start, length): (usize, usize) = (start.parse().unwrap(), length.parse().unwrap());
        found.extend(start / 512..(start + length) / 512);
    }
    assert_eq!(found, expected);
    let facts: Value =
        serde_json::from_str(&ok(folder.path(), &["diff", "--json", "one", "other"])).unwrap();
    assert_eq!(facts["differing_bytes"], json!(expected.len() * 512));
    assert_eq!(facts["extents"].as_array().unwrap().len(), text.lines().count());
    let same: Value =
        serde_json::from_str(&ok(folder.path(), &["diff", "--json", "one", "one"])).unwrap();
    assert_eq!(same["same"], json!(true));
    assert_eq!(same["compared_bytes"], json!(0), "the same bytes are not compared");
}

#[test]
fn a_file_is_compressed_checked_recompressed_and_extracted() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let mut random = Random(6);
    let mut plain: Vec<u8> =
        (0..900).flat_map(|at| sector(Fill::Alternating, at, &mut random)).collect();
    plain.push(7);
    for len in [0, 1, 4096, 4097, plain.len()] {
        std::fs::write(here.join("plain"), &plain[..len]).unwrap();
        ok(here, &["zfile", "plain", "z", "--threads", "2"]);
        let (content, zfile) = check_zfile(&std::fs::read(here.join("z")).unwrap());
        assert!(content == plain[..len]);
        assert_eq!((zfile.algorithm, zfile.block_bytes, zfile.has_crc), (1, 4096, true));
        ok(
            here,
            &[
                "zfile",
                "--recompress",
                "z",
                "again",
                "--algorithm",
                "zstd",
                "--bs",
                "16",
                "--no-crc",
                "--level",
                "9",
            ],
        );
        let (content, zfile) = check_zfile(&std::fs::read(here.join("again")).unwrap());
        assert!(content == plain[..len]);
        assert_eq!((zfile.algorithm, zfile.level, zfile.block_bytes), (2, 9, 16384));
        ok(here, &["zfile", "--check", "again"]);
        ok(here, &["zfile", "-x", "again", "back"]);
        assert!(std::fs::read(here.join("back")).unwrap() == plain[..len]);
    }
    let mut damaged = std::fs::read(here.join("z")).unwrap();
    damaged[700] ^= 1;
    std::fs::write(here.join("damaged"), damaged).unwrap();
    refused(here, 5, &["zfile", "--check", "damaged"]);
    refused(here, 5, &["zfile", "--recompress", "damaged", "out"]);
    refused(here, 3, &["zfile", "--check", "plain"]);
    let noise: Vec<u8> =
        (0..400).flat_map(|at| sector(Fill::Incompressible, at, &mut random)).collect();
    std::fs::write(here.join("noise"), noise).unwrap();
    let said = refused(here, 4, &["zfile", "noise", "out", "--bs", "64"]);
    assert!(said.contains("choose blocks of 32 KiB or less"), "{said}");
    refused(here, 2, &["zfile", "plain", "plain"]);
    assert!(!here.join("out").exists());
    ok(here, &["zfile", "noise", "out", "--bs", "32", "-t"]);
}

#[test]
fn the_bytes_do_not_depend_on_time_zone_language_folder_or_name() {
    let folder = tempfile::tempdir().unwrap();
    let disk = random_disk(5000, &mut Random(8));
    std::fs::write(folder.path().join("layer"), layer_of(&disk, true)).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let input = folder.path().join("layer").display().to_string();
    let mut digests = Vec::new();
    for (number, (zone, language, user, here)) in [
        ("UTC", "C", "root", folder.path()),
        ("Asia/Shanghai", "de_DE.UTF-8", "nobody", elsewhere.path()),
        ("America/St_Johns", "ar_EG.UTF-8", "somebody", Path::new("/")),
    ]
    .into_iter()
    .enumerate()
    {
        let output = folder.path().join(format!("out{number}"));
        let status = Command::new(PROGRAM)
            .args(["commit", "-z", "-t", "--commit_sealed", &input])
            .arg(&output)
            .env("TZ", zone)
            .env("LANG", language)
            .env("LC_ALL", language)
            .env("USER", user)
            .env("HOME", here)
            .env("TMPDIR", elsewhere.path())
            .current_dir(here)
            .stdout(Stdio::null())
            .status();
        assert!(status.unwrap().success());
        digests.push(sha256_of_file(&output));
    }
    digests.dedup();
    assert_eq!(digests.len(), 1);
    let version: Value = serde_json::from_str(&ok(folder.path(), &["version", "--json"])).unwrap();
    assert_eq!(version["consistency"], json!(obd_ublk::make::CONSISTENCY));
    let lock = include_str!("../../Cargo.lock");
    for (codec, library) in obd_ublk::make::CODECS {
        assert_eq!(version["codecs"][codec], json!(library));
        let mut words = library.split(' ');
        let (name, number) = (words.next().unwrap(), words.next().unwrap());
        let pinned = format!("name = \"{name}\"\nversion = \"{number}");
        assert!(lock.contains(&pinned), "{library} is not what Cargo.lock has");
    }
}

/// A config of one layer: 4 MiB that the index repeats over 512 GiB, more than any test waits for.
fn endless_layer(folder: &Path) {
    let mut random = Random(1);
    let data: Vec<u8> =
        (0..8192).flat_map(|at| sector(Fill::Incompressible, at, &mut random)).collect();
    let entries: Vec<_> = (0..131_072)
        .map(|number: u64| SegmentMapping {
            start_sector: number * 8192,
            sectors: 8192,
            mapped_sector: 8,
            zeroed: false,
            tag: 0,
        })
        .collect();
    std::fs::write(folder.join("endless"), lsmt::write_sealed(&entries, &data, 512 << 30)).unwrap();
}

#[test]
fn a_layer_whose_making_is_killed_leaves_nothing_and_what_was_there_stays() {
    let inputs = tempfile::tempdir().unwrap();
    endless_layer(inputs.path());
    let input = inputs.path().join("endless");
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let outputs = tempfile::tempdir().unwrap();
        std::fs::write(outputs.path().join("layer"), "precious").unwrap();
        let mut child = Command::new(PROGRAM)
            .args(["merge", "--algorithm", "lz4"])
            .arg(&input)
            .arg(outputs.path().join("layer"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while written_below(child.id(), outputs.path()) < 16 << 20 {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            assert!(Instant::now() < deadline, "nothing was written");
            std::thread::sleep(Duration::from_millis(2));
        }
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        child.wait().unwrap();
        assert_eq!(names(outputs.path()), ["layer"], "{signal}");
        assert_eq!(std::fs::read(outputs.path().join("layer")).unwrap(), b"precious");
    }
}

/// Blocks of 64 KiB that do not compress take an index entry each: 57 GiB were written first.
#[test]
fn what_a_relaxed_layer_cannot_hold_is_refused_before_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    endless_layer(folder.path());
    let arguments = ["merge", "endless", "layer", "--bs", "64", "--no-zero-detection"];
    let said = refused(folder.path(), 4, &arguments);
    assert!(said.contains("a layer may have 999936"), "{said}");
    assert!(said.contains("choose blocks of 32 KiB or less"), "{said}");
    assert_eq!(names(folder.path()), ["endless"]);
}

#[test]
fn a_full_device_and_an_input_as_output_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let disk = random_disk(3000, &mut Random(8));
    std::fs::write(folder.path().join("layer"), layer_of(&disk, true)).unwrap();
    let said = refused(folder.path(), 9, &["merge", "layer", "/dev/full"]);
    assert!(said.contains("write /dev/full at byte"), "{said}");
    let before = sha256_of_file(&folder.path().join("layer"));
    std::os::unix::fs::symlink("layer", folder.path().join("link")).unwrap();
    for output in ["layer", "link", "./layer"] {
        refused(folder.path(), 2, &["merge", "layer", output]);
        refused(folder.path(), 2, &["commit", "--commit_sealed", "layer", output]);
    }
    refused(folder.path(), 1, &["merge", "layer", "."]);
    refused(folder.path(), 6, &["merge", "layer", "none/out"]);
    assert_eq!(sha256_of_file(&folder.path().join("layer")), before);
    assert_eq!(names(folder.path()), ["layer", "link"]);
}

/// An extraction once wrote its output over the zfile that it was reading.
#[test]
fn a_zfile_is_not_extracted_over_itself() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    std::fs::write(here.join("plain"), vec![5; 9000]).unwrap();
    ok(here, &["zfile", "plain", "z"]);
    std::os::unix::fs::symlink("z", here.join("link")).unwrap();
    let before = sha256_of_file(&here.join("z"));
    for (input, output) in [("z", "z"), ("z", "./z"), ("z", "link"), ("link", "z")] {
        let said = refused(here, 2, &["zfile", "-x", input, output]);
        assert!(said.contains("must not be written"), "{said}");
    }
    let words = ["overlaybd-zfile", "-f", "-x", "z", "link"];
    assert_eq!(tool(here, &words).status.code(), Some(1));
    assert_eq!(sha256_of_file(&here.join("z")), before);
    assert!(here.join("link").is_symlink());
}

/// It once was opened first, which waits until somebody opens it for reading.
#[test]
fn a_pipe_as_output_is_refused_without_a_reader() {
    let folder = tempfile::tempdir().unwrap();
    let disk = random_disk(300, &mut Random(8));
    std::fs::write(folder.path().join("layer"), layer_of(&disk, true)).unwrap();
    nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for arguments in [&["merge", "layer", "pipe"], &["zfile", "layer", "pipe"]] {
        let output = Command::new("timeout")
            .args(["60", PROGRAM])
            .args(arguments)
            .current_dir(folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains("not written from front to back"), "{said}");
    }
}

/// This program under the name of one of the reference's tools.
fn tool(folder: &Path, words: &[&str]) -> Output {
    let name = folder.join(words[0]);
    if !name.exists() {
        std::os::unix::fs::symlink(PROGRAM, &name).unwrap();
    }
    Command::new(name).args(&words[1..]).current_dir(folder).output().unwrap()
}

#[test]
fn the_tools_of_the_reference_answer_to_their_names_with_0_and_1() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let uuid = "01bb4fce-3eb1-b56b-05ad-f99504dafd31";
    let parent = "5735e196-8e9f-443f-b595-87c6fdaee43a";
    std::fs::write(here.join("plain"), vec![5; 9000]).unwrap();
    for (words, code) in [
        (&["overlaybd-create", "data", "index", "1", "-s", "--mkfs"][..], 0),
        (&["overlaybd-create", "data", "index", "1", "-s"], 1),
        (&["overlaybd-create", "x", "y"], 1),
        (&["overlaybd-create", "x", "y", "1", "--turboOCI"], 1),
        (&["overlaybd-create", "--help"], 0),
        (&["overlaybd-create", "append.data", "append.index", "1", "--mkfs"], 0),
        (&["overlaybd-commit", "data", "index", "overlaybd.commit", "-z", "-t", "--uuid", uuid], 0),
        (&["overlaybd-commit", "data", "index", "overlaybd.commit", "-z", "-t", "--uuid", uuid], 1),
        (
            &[
                "overlaybd-commit",
                "append.data",
                "append.index",
                "append.commit",
                "-z",
                "-t",
                "--uuid",
                uuid,
                "--parent-uuid",
                parent,
                "-f",
            ],
            0,
        ),
        (&["overlaybd-commit", "data", "missing", "out"], 1),
        (&["overlaybd-commit", "--seal", "data", "index", "-z", "-t", "--uuid", uuid], 0),
        (&["overlaybd-commit", "--seal", "data", "index"], 1),
        (&["overlaybd-commit", "--commit_sealed", "data", "sealed.commit", "-z", "-t"], 0),
        (&["overlaybd-merge", "overlaybd.commit", "merged"], 0),
        (&["overlaybd-merge", "plain", "merged"], 1),
        (&["overlaybd-zfile", "plain", "plain.z"], 0),
        (&["overlaybd-zfile", "plain", "plain.z"], 1),
        (&["overlaybd-zfile", "-x", "plain.z", "plain.back"], 0),
        (&["overlaybd-zfile", "-x", "plain", "plain.back", "-f"], 1),
        (&["overlaybd-attacher", "attach", "--id", "x", "--config", "c"], 1),
        (&["overlaybd-ublk", "add", "--config", "missing"], 1),
        (&["overlaybd-ublk", "fly"], 1),
    ] {
        let output = tool(here, words);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {told}");
        assert_eq!(told.is_empty(), code == 0, "{words:?}: {told}");
    }
    let disk = flattened(here, "overlaybd.commit");
    for layer in ["append.commit", "sealed.commit", "merged", "data"] {
        assert_eq!(flattened(here, layer), disk, "{layer}");
    }
    assert_eq!(std::fs::read(here.join("plain.back")).unwrap(), vec![5; 9000]);
    let found = check(&std::fs::read(here.join("append.commit")).unwrap());
    assert_eq!((found.uuid, found.parent_uuid), (uuid.to_uppercase(), parent.to_uppercase()));
    assert_eq!(found.virtual_bytes, 1 << 30);
    // What the converter's library writes into the superblock: no UUID, no time but the first
    // second, and no journal.
    ok(here, &["export", "overlaybd.commit", "-o", "disk"]);
    let mut superblock = [0; 1024];
    std::fs::File::open(here.join("disk")).unwrap().read_exact_at(&mut superblock, 1024).unwrap();
    assert_eq!(superblock[56..58], [0x53, 0xef]);
    assert_eq!(superblock[104..120], [0; 16], "UUID");
    let word = |at: usize| u32::from_le_bytes(superblock[at..at + 4].try_into().unwrap());
    assert_eq!((word(92), word(96), word(100)), (0x238, 0x2c2, 0x6b), "features");
    let checked = Command::new("/sbin/e2fsck").args(["-fn"]).arg(here.join("disk")).output();
    assert!(checked.unwrap().status.success());
}

/// A thread that could not be started was a panic. Stacks that no address space holds stand for a
/// host that has no more threads to give.
#[test]
fn a_layer_is_made_with_the_threads_that_there_are() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let disk = random_disk(9000, &mut Random(12));
    std::fs::write(here.join("layer"), layer_of(&disk, true)).unwrap();
    let arguments = |output| ["merge", "layer", output, "--threads", "8"];
    ok(here, &arguments("expected"));
    let alone = Command::new(PROGRAM)
        .args(arguments("found"))
        .env("RUST_MIN_STACK", (1_u64 << 60).to_string())
        .current_dir(here)
        .output()
        .unwrap();
    assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stderr));
    assert_eq!(sha256_of_file(&here.join("found")), sha256_of_file(&here.join("expected")));
}

/// What a converter does for the second layer of an image: a pair without a size of its own.
#[test]
fn a_pair_without_a_size_is_committed_to_a_layer_without_one() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let base = random_disk(4000, &mut Random(31));
    std::fs::write(here.join("base"), layer_of(&base, false)).unwrap();
    for (form, data) in [(&[][..], "append"), (&["-s"][..], "sparse")] {
        let index = format!("{data}.index");
        let create = [&["overlaybd-create", data, &index, "0"][..], form].concat();
        assert_eq!(tool(here, &create).status.code(), Some(0));
        let text = [7_u8; 4096].repeat(3);
        if form.is_empty() {
            let options = PairOptions {
                journal_folder: here.join("run"),
                lower_bytes: 4000 * 512,
                ..PairOptions::default()
            };
            let paths = PairPaths { data: here.join(data), index: here.join(&index) };
            let pair = Pair::open(&paths, &options).unwrap();
            let mut worker = pair.worker();
            worker.write(808, &text).unwrap();
            drop(worker);
            pair.close().unwrap();
        } else {
            let file = std::fs::File::options().write(true).open(here.join(data)).unwrap();
            file.write_all_at(&text, 4096 + 808 * 512).unwrap();
        }
        let layer = format!("{data}.commit");
        let commit = ["overlaybd-commit", data, &index, &layer, "-z", "-t"];
        assert_eq!(tool(here, &commit).status.code(), Some(0));
        let found = check(&std::fs::read(here.join(&layer)).unwrap());
        assert_eq!(found.virtual_bytes, 0);
        assert_eq!(found.entries, [(808, 24, 8, false)], "{data}");
        let config = json!({"lowers": [{"file": here.join("base")}, {"file": here.join(&layer)}]});
        std::fs::write(here.join("config.json"), config.to_string()).unwrap();
        ok(here, &["merge", "config.json", "merged"]);
        let found = check(&std::fs::read(here.join("merged")).unwrap());
        assert_eq!(found.virtual_bytes, 4000 * 512);
        let differing = ok(here, &["diff", "base", "merged"]);
        assert!(differing.lines().all(|line| {
            let start: u64 = line.split(' ').next().unwrap().parse().unwrap();
            (808 * 512..832 * 512).contains(&start)
        }));
    }
}
