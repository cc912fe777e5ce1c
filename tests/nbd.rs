//! `obd-ublk serve --nbd` as its users meet it: the real program, read by nbdcopy, qemu-img and
//! fio, and by a client that does what none of them would. What the golden set says is on a disk
//! must come out of every one of them.
//!
//! The tools are Debian's `libnbd-bin`, `qemu-utils` and `fio`; without them the tests fail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "nbd/client.rs"]
mod client;
mod common;
#[path = "../benches/common/mod.rs"]
mod data;
#[allow(dead_code)]
#[path = "../tools/ram_disk.rs"]
mod ram_disk;
#[path = "nbd/writing.rs"]
mod writing;

use client::{Client, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES};
use common::golden::{Case, Golden, Materialised, sha256_of_file};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use obd_ublk::format::zfile::{self, Algorithm, WriteOptions};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_obd-ublk"));
    command.args(arguments).env_remove("OBD_UBLK_LOG").stdin(Stdio::null());
    command
}

/// A server, its socket and what it printed.
struct Served {
    folder: tempfile::TempDir,
    child: Child,
    socket: PathBuf,
    line: String,
}

impl Served {
    fn new(config: &Path) -> Self {
        Self::with(config, &[])
    }

    fn with(config: &Path, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd.sock");
        Self::at(folder, socket, config, arguments)
    }

    fn at(folder: tempfile::TempDir, socket: PathBuf, config: &Path, arguments: &[&str]) -> Self {
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let mut child = program(&["serve"])
            .arg(config)
            .arg("--nbd")
            .arg(format!("unix:{}", socket.display()))
            .args(arguments)
            // Where the journal of an upper goes.
            .env("OBD_UBLK_RUN_DIR", folder.path().join("run"))
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let this = Self { folder, child, socket, line };
        assert!(!this.line.is_empty(), "{}", this.log());
        this
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    fn uri(&self) -> &str {
        self.line.strip_suffix('\n').unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    /// The exit code, within the patience of this file.
    fn code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the server does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it as a service manager would.
    fn end(mut self) {
        self.signal(Signal::SIGTERM);
        assert_eq!(self.code(), Some(0), "{}", self.log());
        assert!(!self.socket.exists());
        assert!(!self.log().contains("panicked"), "{}", self.log());
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a tool that must succeed; returns what it printed.
fn tool(name: &str, arguments: &[&str]) -> String {
    tool_in(Path::new("/"), name, arguments)
}

fn tool_in(folder: &Path, name: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(name).args(arguments).current_dir(folder).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{name}, which this test needs: {error}"));
    assert!(output.status.success(), "{name} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn export(config: &Path, output: &Path) {
    let ran = program(&["export"]).arg(config).arg("-o").arg(output).output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
}

/// A golden case, and its disk as the library's own export has it.
struct Stack {
    files: Materialised,
    config: PathBuf,
    whole: Vec<u8>,
}

impl Stack {
    fn new(name: &str) -> Self {
        let golden = Golden::load();
        let case = golden.case(name);
        let files = golden.materialise(case);
        let config = files.config(case);
        let raw = files.path("whole.raw");
        export(&config, &raw);
        assert_eq!(Some(sha256_of_file(&raw)), case.expected_sha256, "{name}");
        Self { config, whole: std::fs::read(raw).unwrap(), files }
    }

    fn serve(&self) -> Served {
        Served::with(&self.config, &["--read-only"])
    }

    fn expected(&self, offset: u64, len: u32) -> &[u8] {
        let start = usize::try_from(offset).unwrap();
        &self.whole[start..start + usize::try_from(len).unwrap()]
    }
}

fn is_disk(case: &Case) -> bool {
    let other = ["zfile(plain)", "corrupt", "turboOCI", "prefetch-trace"];
    !other.contains(&case.kind.as_str())
}

#[test]
fn every_golden_disk_is_copied_as_the_reference_wrote_it() {
    let golden = Golden::load();
    let mut copied = 0;
    for case in golden.cases().iter().filter(|case| is_disk(case)) {
        let files = golden.materialise(case);
        let served = Served::with(&files.config(case), &["--read-only"]);
        let copy = served.path("copy");
        tool("nbdcopy", &[served.uri(), text(&copy)]);
        assert_eq!(Some(sha256_of_file(&copy)), case.expected_sha256, "{}", case.name);
        served.end();
        copied += 1;
    }
    assert_eq!(copied, 48, "every case of a disk kind");
}

#[test]
fn nbdinfo_is_told_what_is_served() {
    let stack = Stack::new("zfile-zstd-64k-mt-random4k");
    let served = stack.serve();
    let told: Value = serde_json::from_str(&tool("nbdinfo", &["--json", served.uri()])).unwrap();
    assert_eq!(told["protocol"], "newstyle-fixed");
    assert_eq!(told["structured"], false);
    let export = &told["exports"][0];
    for (key, value) in [
        ("export-size", json!(stack.whole.len())),
        ("is_read_only", json!(true)),
        ("can_flush", json!(true)),
        ("can_multi_conn", json!(true)),
        ("can_trim", json!(false)),
        ("can_zero", json!(false)),
        ("can_fua", json!(false)),
        ("can_cache", json!(false)),
        ("block_size_minimum", json!(512)),
        ("block_size_preferred", json!(65536)),
        ("block_size_maximum", json!(32 << 20)),
    ] {
        assert_eq!(export[key], value, "{key}");
    }
    let listed: Value =
        serde_json::from_str(&tool("nbdinfo", &["--json", "--list", served.uri()])).unwrap();
    assert_eq!(listed["exports"].as_array().unwrap().len(), 1);
    assert_eq!(listed["exports"][0]["export-name"], "");
    served.end();
}

#[test]
fn qemu_img_sees_no_difference_from_an_export_and_sees_one_that_is_there() {
    for name in ["stack8", "ext4-3layers-3", "stack3-rw"] {
        let stack = Stack::new(name);
        let served = stack.serve();
        let raw = stack.files.path("whole.raw");
        let compare = ["compare", "-f", "raw", "-F", "raw", served.uri(), text(&raw)];
        assert_eq!(tool("qemu-img", &compare), "Images are identical.\n", "{name}");
        let copy = served.path("copy");
        tool("qemu-img", &["convert", "-f", "raw", "-O", "raw", served.uri(), text(&copy)]);
        assert_eq!(sha256_of_file(&copy), sha256_of_file(&raw), "{name}");
        // The comparison must be able to fail.
        let file = std::fs::File::options().write(true).open(&raw).unwrap();
        let at = stack.whole.len() / 2;
        file.write_all_at(&[stack.whole[at] ^ 1], u64::try_from(at).unwrap()).unwrap();
        let output = Command::new("qemu-img").args(compare).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        served.end();
    }
}

/// A folder with a disk of `megabytes` that fio filled with blocks it can check, as a raw file and
/// as configs over a raw and an lz4 layer of it.
fn fio_disk(megabytes: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let (filename, size) = (format!("--filename={}", text(&raw)), format!("--size={megabytes}m"));
    // It leaves a file about the verification where it runs.
    tool_in(
        folder.path(),
        "fio",
        &[
            "--name=fill",
            "--rw=write",
            "--bs=4k",
            "--verify=crc32c",
            "--do_verify=0",
            "--buffer_compress_percentage=50",
            &filename,
            &size,
        ],
    );
    let layer = data::layer_of(&std::fs::read(&raw).unwrap());
    let options =
        WriteOptions { algorithm: Algorithm::Lz4, block_bytes: 16384, ..WriteOptions::default() };
    for (name, bytes) in [("lz4", zfile::write(&layer, &options).unwrap()), ("plain", layer)] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let config = json!({"lowers": [{"file": path}], "upper": {}, "resultFile": ""});
        std::fs::write(folder.path().join(format!("{name}.json")), config.to_string()).unwrap();
    }
    folder
}

fn fio_verify(folder: &Path, uri: &str, megabytes: usize, rw: &str, depth: u32) -> Output {
    let (uri, size) = (format!("--uri={uri}"), format!("--size={megabytes}m"));
    let (rw, depth) = (format!("--rw={rw}"), format!("--iodepth={depth}"));
    let fixed = ["--name=check", "--ioengine=nbd", "--bs=4k", "--verify=crc32c", "--numjobs=3"];
    let output = Command::new("fio")
        .args(fixed)
        .args(["--thread", "--group_reporting", "--output-format=json", "--verify_fatal=1"])
        .args([uri, size, rw, depth])
        .current_dir(folder)
        .stdin(Stdio::null())
        .output();
    output.unwrap_or_else(|error| panic!("fio, which this test needs: {error}"))
}

#[test]
fn fio_verifies_every_block_from_several_jobs_at_once() {
    const MEGABYTES: usize = 16;
    let folder = fio_disk(MEGABYTES);
    for layer in ["plain", "lz4"] {
        let served = Served::new(&folder.path().join(format!("{layer}.json")));
        for (rw, depth) in [("read", 16), ("randread", 32), ("randread", 1)] {
            let output = fio_verify(folder.path(), served.uri(), MEGABYTES, rw, depth);
            assert!(output.status.success(), "{layer} {rw}: {output:?}");
            // The engine's own words come first.
            let start = output.stdout.iter().position(|&byte| byte == b'{').unwrap();
            let told: Value = serde_json::from_slice(&output.stdout[start..]).unwrap();
            let read = &told["jobs"][0]["read"];
            assert_eq!(read["io_bytes"], 3 * (MEGABYTES << 20), "{layer} {rw}");
            assert_eq!(told["jobs"][0]["error"], 0, "{layer} {rw}");
        }
        served.end();
    }
    // And it would have seen a wrong byte.
    let mut raw = std::fs::read(folder.path().join("raw")).unwrap();
    raw[(5 << 20) + 77] ^= 0x10;
    std::fs::write(folder.path().join("plain"), data::layer_of(&raw)).unwrap();
    let served = Served::new(&folder.path().join("plain.json"));
    let output = fio_verify(folder.path(), served.uri(), MEGABYTES, "randread", 32);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && told.contains("verify failed"), "{output:?}");
    served.end();
}

#[test]
fn reads_of_any_byte_and_length_equal_the_export() {
    for name in ["stack3-rw", "zfile-lz4-64k-text"] {
        let stack = Stack::new(name);
        let served = stack.serve();
        let mut client = Client::new(&served.socket);
        assert_eq!(client.size_bytes, u64::try_from(stack.whole.len()).unwrap());
        let mut random = data::Random(0x2545_f491_4f6c_dd1d);
        for _ in 0..2000 {
            let offset = random.below(client.size_bytes);
            let len = (1 + random.below(200_000) / (1 + random.below(200)))
                .min(client.size_bytes - offset);
            let len = u32::try_from(len).unwrap();
            let found = client.read(offset, len).unwrap();
            assert!(found == stack.expected(offset, len), "{name}: {len} bytes at {offset}");
        }
        served.end();
    }
}

#[test]
fn what_cannot_be_done_is_refused_and_the_connection_goes_on() {
    let stack = Stack::new("stack8");
    let served = stack.serve();
    let mut client = Client::new(&served.socket);
    let size = client.size_bytes;
    for (command, offset, len, payload, errno) in [
        (READ, size, 1, 0, 22),
        (READ, size - 1, 2, 0, 22),
        (READ, u64::MAX - 10, 100, 0, 22),
        (READ, 0, (32 << 20) + 1, 0, 22),
        (WRITE, 0, 1, 1, 1),
        (WRITE, 0, 300_001, 300_001, 1),
        (WRITE, u64::MAX, 512, 512, 1),
        (TRIM, 0, 4096, 0, 1),
        (WRITE_ZEROES, 0, 4096, 0, 1),
        (0x4242, 0, 0, 0, 22),
    ] {
        let cookie = client.ask(command, offset, len, &vec![0x25; payload]);
        let told = client.answer(cookie, 0);
        assert_eq!(told, Err(errno), "command {command}, {len} bytes at {offset}");
        assert_eq!(client.read(513, 700).unwrap(), stack.expected(513, 700));
    }
    let cookie = client.ask(FLUSH, 0, 0, &[]);
    assert_eq!(client.answer(cookie, 0), Ok(Vec::new()));
    // Many at once, good and bad: answered one by one, in order.
    let cookies: Vec<_> = (0..100)
        .map(|i| client.ask(READ, if i % 3 == 0 { size } else { i * 100 }, 64, &[]))
        .collect();
    for (i, cookie) in (0..).zip(cookies) {
        let expected = if i % 3 == 0 { Err(22) } else { Ok(stack.expected(i * 100, 64).to_vec()) };
        assert_eq!(client.answer(cookie, 64), expected, "request {i}");
    }
    served.end();
}

#[test]
fn a_damaged_block_fails_its_reads_and_no_others() {
    let golden = Golden::load();
    let case = golden.case("bad-zfile-midblock");
    let files = golden.materialise(case);
    let good = Stack::new("zfile-zstd-4k-random");
    let served = Served::new(&files.config(case));
    let mut client = Client::new(&served.socket);
    let mut damaged = 0;
    for offset in (0..client.size_bytes).step_by(512) {
        match client.read(offset, 512) {
            Ok(found) => assert_eq!(found, good.expected(offset, 512), "byte {offset}"),
            Err(errno) => {
                assert_eq!(errno, 5);
                damaged += 1;
            }
        }
    }
    assert!((1..=8).contains(&damaged), "{damaged} sectors of one 4 KiB block");
    assert!(served.log().contains("request failed"), "{}", served.log());
    served.end();
}

#[test]
fn clients_that_talk_nonsense_or_leave_disturb_nobody() {
    let stack = Stack::new("stack8");
    let served = stack.serve();
    let mut witness = Client::new(&served.socket);
    let mut check = || assert_eq!(witness.read(1000, 100).unwrap(), stack.expected(1000, 100));
    for said in [&b""[..], b"\0", b"\0\0\0\x03IHAVEOPT", b"GET / HTTP/1.1\r\n\r\n", &[0xff; 4096]] {
        let mut stream = Client::connect(&served.socket);
        stream.write_all(said).unwrap();
        drop(stream);
        check();
    }
    // A request cut anywhere, and one that is none.
    for len in 1..28 {
        Client::new(&served.socket)
            .send(&b"\x25\x60\x95\x13\0\0\0\0cookie!!\0\0\0\0\0\0\0\0\0\0\x02"[..len]);
    }
    let mut client = Client::new(&served.socket);
    client.send(&[0x26; 28]);
    assert!(client.is_hung_up_on());
    // Half of a write's payload; a write that nobody would skip; a read nobody waits for.
    Client::new(&served.socket).ask(WRITE, 0, 1000, &[1; 500]);
    let mut client = Client::new(&served.socket);
    client.ask(WRITE, 0, u32::MAX, &[]);
    assert!(client.is_hung_up_on());
    for _ in 0..20 {
        Client::new(&served.socket).ask(READ, 0, 4 << 20, &[]);
    }
    check();
    served.end();
}

#[test]
fn options_that_are_too_long_or_unknown_are_refused_and_the_next_is_heard() {
    let stack = Stack::new("stack8");
    let served = stack.serve();
    let mut stream = Client::connect(&served.socket);
    assert_eq!(client::receive(&mut stream, 18), b"NBDMAGICIHAVEOPT\0\x03");
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    for (code, len, reply) in [
        (7, 9000, 0x8000_0009_u32),
        (7, 4 << 20, 0x8000_0009),
        (8, 0, 0x8000_0001),
        (10, 100, 0x8000_0001),
        (5, 0, 0x8000_0001),
        (0xffff_ffff, 8192, 0x8000_0001),
        (6, 3, 0x8000_0003),
        (3, 1, 0x8000_0003),
    ] {
        client::send_option(&mut stream, code, &vec![0x49; len]);
        assert_eq!(client::option_reply(&mut stream, code).0, reply, "option {code}, {len} bytes");
    }
    client::send_option(&mut stream, 7, b"\0\0\0\x04name\0\0");
    assert_eq!(client::option_reply(&mut stream, 7).0, 0x8000_0006, "no export of that name");
    client::send_option(&mut stream, 2, b"");
    assert_eq!(client::option_reply(&mut stream, 2).0, 1);
    let mut rest = Vec::new();
    assert_eq!(stream.read_to_end(&mut rest).unwrap(), 0, "an abort ends it");
    served.end();
}

#[test]
fn a_hundred_connections_read_at_once() {
    let stack = Stack::new("zfile-lz4-4k-random");
    let served = stack.serve();
    let mut clients: Vec<_> = (0..100).map(|_| Client::new(&served.socket)).collect();
    std::thread::scope(|scope| {
        for (number, client) in (1_u64..).zip(&mut clients) {
            let stack = &stack;
            scope.spawn(move || {
                let mut random = data::Random(number);
                for _ in 0..50 {
                    let offset = random.below(client.size_bytes - 10_000);
                    let found = client.read(offset, 10_000).unwrap();
                    assert!(found == stack.expected(offset, 10_000), "client {number}");
                }
            });
        }
    });
    // All of them are still there when the server is told to end.
    served.end();
    assert!(clients.iter_mut().all(Client::is_hung_up_on));
}

#[test]
fn what_was_asked_before_the_end_is_answered() {
    let stack = Stack::new("zfile-lz4-64k-text");
    let mut served = stack.serve();
    let mut client = Client::new(&served.socket);
    assert_eq!(client.read(0, 1).unwrap(), stack.expected(0, 1));
    let cookies: Vec<_> = (0..64).map(|i| client.ask(READ, i * 1000, 100_000, &[])).collect();
    served.signal(Signal::SIGTERM);
    for (i, cookie) in (0..).zip(cookies) {
        let found = client.answer(cookie, 100_000).unwrap();
        assert!(found == stack.expected(i * 1000, 100_000), "request {i}");
    }
    assert!(client.is_hung_up_on());
    assert_eq!(served.code(), Some(0));
    assert!(!served.socket.exists());
}

/// What `serve` says when it does not get to serve: its exit code and its error.
fn refused(config: &Path, arguments: &[&str]) -> (i32, String) {
    let output = program(&["serve"]).arg(config).args(arguments).output().unwrap();
    assert_eq!(output.stdout, b"");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// A config over golden layers whose result file is `result` beside it.
fn config_with_result(folder: &Path, lower: &Path, upper: &Value) -> PathBuf {
    let config = folder.join("config.v1.json");
    let content = json!({
        "lowers": [{"file": lower}], "upper": upper, "resultFile": folder.join("result"),
    });
    std::fs::write(&config, content.to_string()).unwrap();
    config
}

#[test]
fn the_result_file_says_how_it_went() {
    let stack = Stack::new("stack3-rw");
    let folder = tempfile::tempdir().unwrap();
    let result = || std::fs::read_to_string(folder.path().join("result")).unwrap();
    let lower = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/golden/ext4-3layers/l0/overlaybd.commit");
    let socket = folder.path().join("s");
    let address = format!("unix:{}", socket.display());
    let config = config_with_result(folder.path(), &lower, &json!({}));
    let served = Served::new(&config);
    assert_eq!(result(), "success");
    served.end();
    let config = config_with_result(folder.path(), Path::new("/nonexistent/layer"), &json!({}));
    let (code, told) = refused(&config, &["--nbd", &address]);
    assert_eq!(code, 6, "{told}");
    assert_eq!(result(), format!("failed:{}", told.trim_start_matches("obd-ublk: ").trim_end()));
    let upper = serde_json::from_slice::<Value>(&std::fs::read(&stack.config).unwrap()).unwrap();
    let half = json!({"data": upper["upper"]["data"], "index": "/nonexistent/index"});
    let config = config_with_result(folder.path(), &lower, &half);
    let (code, told) = refused(&config, &["--nbd", &address]);
    assert_eq!(code, 6, "{told}");
    assert!(told.contains("/nonexistent/index"), "{told}");
    assert_eq!(result(), format!("failed:{}", told.trim_start_matches("obd-ublk: ").trim_end()));
    assert!(!socket.exists());
    // Somebody else's file is in the way: that is told there as well.
    std::fs::write(&socket, "precious").unwrap();
    let config = config_with_result(folder.path(), &lower, &json!({}));
    let (code, told) = refused(&config, &["--nbd", &address]);
    assert_eq!((code, told.contains("is no socket")), (1, true), "{told}");
    assert!(result().starts_with("failed:"), "{}", result());
    assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
}

#[test]
fn a_new_disk_is_written_by_nbd_clients_and_has_one_writer() {
    let stack = Stack::new("stack8");
    for form in [&[][..], &["--sparse"], &["--sparse", "--on", text(&stack.config)]] {
        write_a_new_disk(form);
    }
}

fn write_a_new_disk(form: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    // Larger than the image, if there is one below.
    let made = program(&["create", text(&disk), "--size", "24M"]).args(form).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let config = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim_end());
    let bytes: Vec<u8> = (0_u32..24 << 20).map(|at| (at / 977).to_le_bytes()[0]).collect();
    let (source, raw) = (folder.path().join("source"), folder.path().join("raw"));
    std::fs::write(&source, &bytes).unwrap();
    let served = Served::new(&config);
    let (code, told) = refused(&config, &["--nbd", &format!("unix:{}", text(&served.path("t")))]);
    assert_eq!(code, 12, "{told}");
    assert!(told.contains("is being written by"), "{told}");
    tool("nbdcopy", &["--flush", text(&source), served.uri()]);
    served.end();
    export(&config, &raw);
    assert!(std::fs::read(&raw).unwrap() == bytes, "{form:?}: not what was written is exported");
}

#[test]
fn a_socket_in_use_is_busy_and_one_of_a_killed_server_is_replaced() {
    let stack = Stack::new("stack8");
    let mut served = stack.serve();
    let address = format!("unix:{}", served.socket.display());
    let (code, told) = refused(&stack.config, &["--nbd", &address, "--json"]);
    let told: Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    assert_eq!((code, &told["error"]["kind"]), (12, &json!("busy")));
    let mut client = Client::new(&served.socket);
    assert_eq!(client.read(0, 512).unwrap(), stack.expected(0, 512));
    served.signal(Signal::SIGKILL);
    assert_eq!(served.code(), None);
    assert!(served.socket.exists(), "nobody was there to remove it");
    let again = Served::at(
        tempfile::tempdir().unwrap(),
        served.socket.clone(),
        &stack.config,
        &["--read-only"],
    );
    assert_eq!(Client::new(&again.socket).read(0, 512).unwrap(), stack.expected(0, 512));
    again.end();
}

#[test]
fn the_address_can_be_used_as_it_is_printed_whatever_the_path() {
    let stack = Stack::new("stack8");
    let folder = tempfile::tempdir().unwrap();
    let odd = folder.path().join("a b&c=%41#?+");
    std::fs::create_dir(&odd).unwrap();
    let served = Served::at(folder, odd.join("s"), &stack.config, &["--read-only", "--json"]);
    let told: Value = serde_json::from_str(&served.line).unwrap();
    assert_eq!(told["size_bytes"], stack.whole.len());
    assert_eq!(told["read_only"], true);
    assert_eq!(told["socket"], text(&served.socket));
    let uri = told["uri"].as_str().unwrap();
    assert!(uri.ends_with("/a%20b%26c%3D%2541%23%3F%2B/s"), "{uri}");
    let copy = served.path("copy");
    tool("nbdcopy", &[uri, text(&copy)]);
    assert!(std::fs::read(copy).unwrap() == stack.whole);
    let mode = served.socket.symlink_metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    served.end();
}

#[test]
fn the_socket_may_be_given_from_the_callers_folder_and_the_umask_does_not_matter() {
    let stack = Stack::new("stack8");
    let folder = tempfile::tempdir().unwrap();
    let script = "umask 0; exec \"$0\" serve \"$1\" --nbd unix:s --read-only";
    let mut child = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_obd-ublk"), text(&stack.config)])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let folder = folder.path().canonicalize().unwrap();
    let served =
        Served { folder: tempfile::tempdir().unwrap(), child, socket: folder.join("s"), line };
    std::fs::write(served.path("log"), "").unwrap();
    assert_eq!(served.uri(), format!("nbd+unix:///?socket={}", text(&served.socket)));
    let mode = served.socket.symlink_metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    served.end();
}

#[test]
fn a_server_whose_address_nobody_takes_does_not_stay() {
    let stack = Stack::new("stack8");
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let (reader, writer) = UnixStream::pair().unwrap();
    drop(reader);
    let output = program(&["serve", "--read-only", "--nbd", &format!("unix:{}", text(&socket))])
        .arg(&stack.config)
        .stdout(std::os::fd::OwnedFd::from(writer))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!socket.exists());
}

#[test]
fn wrong_arguments_end_with_64() {
    let stack = Stack::new("stack8");
    for arguments in [
        &[][..],
        &["--nbd", "/run/s"],
        &["--nbd", "tcp:10809"],
        &["--nbd", "unix:"],
        &["--nbd", "unix:s", "--depth", "1"],
        &["--nbd", &format!("unix:/tmp/{}", "x".repeat(103))],
    ] {
        let (code, told) = refused(&stack.config, arguments);
        assert_eq!(code, 64, "{arguments:?}: {told}");
    }
    // A live listener of another kind is nobody's to remove.
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let _other = UnixListener::bind(&socket).unwrap();
    let address = format!("unix:{}", socket.display());
    assert_eq!(refused(&stack.config, &["--nbd", &address]).0, 12);
    assert!(socket.exists());
}
