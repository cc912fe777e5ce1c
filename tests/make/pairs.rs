//! New pairs with a file system, whatever ends their making; and the modes of all that is made.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::commands::{PROGRAM, flattened, ok};
use crate::content::{layer_of, random_disk};
use crate::names;
use crate::random::Random;
use nix::sys::stat::Mode;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A folder with a program of this text in the place of mke2fs.
fn in_place_of_mke2fs(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("mke2fs");
    std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    folder
}

fn create_with_ext4(folder: &Path, tools: Option<&Path>, form: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["create", "data", "index", "64M", "--mkfs"]).args(form).current_dir(folder);
    if let Some(tools) = tools {
        let rest = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{rest}", tools.display()));
    }
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

const FORMS: [&[&str]; 2] = [&[], &["-s"]];

#[test]
fn a_file_system_that_cannot_be_made_leaves_no_pair() {
    let tools = in_place_of_mke2fs("echo 'mke2fs: no luck today' >&2\nexit 7");
    for form in FORMS {
        let folder = tempfile::tempdir().unwrap();
        let output = create_with_ext4(folder.path(), Some(tools.path()), form).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("no luck today"), "{said}");
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
        // What is there is told before minutes of mkfs.
        std::fs::write(folder.path().join("index"), "precious").unwrap();
        let output = create_with_ext4(folder.path(), Some(tools.path()), form).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("exists") && !said.contains("luck"), "{said}");
        assert_eq!(names(folder.path()), ["index"]);
        assert_eq!(std::fs::read(folder.path().join("index")).unwrap(), b"precious");
    }
}

fn kill(mut child: Child) -> Output {
    // It may have ended by itself.
    let _ = child.kill();
    child.wait_with_output().unwrap()
}

/// The pair once had its names, and was empty, as long as mke2fs ran.
#[test]
fn nothing_has_a_name_while_the_file_system_is_made() {
    for form in FORMS {
        let (folder, marks) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (begun, go_on) = (marks.path().join("begun"), marks.path().join("go on"));
        nix::unistd::mkfifo(&go_on, Mode::S_IRWXU).unwrap();
        let text = format!(": >'{}'\nread line <'{}'", begun.display(), go_on.display());
        let tools = in_place_of_mke2fs(&text);
        let child = create_with_ext4(folder.path(), Some(tools.path()), form).spawn().unwrap();
        wait_for(|| begun.exists());
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
        let killed = kill_and_let_go(child, &go_on);
        assert!(!killed.status.success());
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
    }
}

/// The other program holds the pipe of stderr until it ends.
fn kill_and_let_go(mut child: Child, go_on: &Path) -> Output {
    child.kill().unwrap();
    drop(File::options().write(true).open(go_on).unwrap());
    child.wait_with_output().unwrap()
}

fn wait_for(mut is_there: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_there() {
        assert!(Instant::now() < deadline, "it did not come");
        std::thread::yield_now();
    }
}

/// A pair that has its names is whole; one that has not is in nobody's way.
#[test]
fn a_pair_with_a_file_system_is_whole_or_not_there_whenever_its_making_is_killed() {
    for form in FORMS {
        let whole = tempfile::tempdir().unwrap();
        assert!(create_with_ext4(whole.path(), None, form).status().unwrap().success());
        ok(whole.path(), &["commit", "-z", "data", "index", "layer"]);
        let expected = flattened(whole.path(), "layer");
        let folder = tempfile::tempdir().unwrap();
        let (here, data) = (folder.path(), folder.path().join("data"));
        let (mut cut, mut done) = (0, 0);
        while cut + done < 12 {
            let mut child = create_with_ext4(here, None, form).spawn().unwrap();
            let draft = here.join("data.new");
            // What an attempt before left is there from the start: then somewhere in its middle.
            let size = |path: &Path| path.metadata().map_or(0, |found| found.len());
            wait_for(|| {
                let ended = child.try_wait().unwrap().is_some();
                ended || size(&draft) > 4096 << (cut % 8) || data.exists()
            });
            let output = kill(child);
            if output.status.success() {
                done += 1;
            } else {
                cut += 1;
                assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            if !data.exists() {
                continue;
            }
            ok(here, &["commit", "-z", "data", "index", "layer"]);
            assert_eq!(flattened(here, "layer"), expected);
            for name in names(here) {
                std::fs::remove_file(here.join(name)).unwrap();
            }
        }
        let output = create_with_ext4(here, None, form).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(names(here), ["data", "index"]);
        ok(here, &["commit", "-z", "data", "index", "layer"]);
        assert_eq!(flattened(here, "layer"), expected);
    }
}

/// As any tool: what the umask leaves. A config that is made of another shows no more than that.
#[test]
fn what_is_made_has_the_mode_of_a_new_file_and_what_is_read_keeps_its_own() {
    for umask in [0o000, 0o002, 0o022, 0o027, 0o077] {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        let mode = |name: &str| here.join(name).metadata().unwrap().permissions().mode() & 0o7777;
        std::fs::write(here.join("input"), layer_of(&random_disk(300, &mut Random(5)), false))
            .unwrap();
        std::fs::set_permissions(here.join("input"), Permissions::from_mode(0o640)).unwrap();
        for arguments in [
            "create data index 1M",
            "create -s sparse sparse.index 1M",
            "create fs fs.index 8M --mkfs",
            "commit data index layer",
            "commit -z -t data index layer.z",
            "commit --commit_sealed input committed",
            "merge input merged",
            "zfile input zfile",
            "zfile --recompress zfile again",
            "zfile -x zfile plain",
            "create folder --size 1M",
        ] {
            let output = Command::new("sh")
                .args(["-c", "umask $0 && exec \"$@\"", &format!("{umask:o}"), PROGRAM])
                .args(arguments.split(' '))
                .current_dir(here)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{arguments}: {said}");
        }
        for name in names(here).iter().filter(|name| *name != "folder" && *name != "input") {
            assert_eq!(mode(name), 0o666 & !umask, "{name} under {umask:03o}");
        }
        for name in names(&here.join("folder")) {
            let name = format!("folder/{name}");
            assert_eq!(mode(&name), 0o666 & !umask, "{name} under {umask:03o}");
        }
        assert_eq!(mode("input"), 0o640);
        // What becomes a layer where it lies stays as it was.
        std::fs::set_permissions(here.join("data"), Permissions::from_mode(0o604)).unwrap();
        ok(here, &["commit", "--seal", "data", "index"]);
        assert_eq!(mode("data"), 0o604);
        let base = here.join("base.json");
        let config = serde_json::json!({"lowers": [{"file": here.join("input")}]});
        std::fs::write(&base, config.to_string()).unwrap();
        std::fs::set_permissions(&base, Permissions::from_mode(0o600)).unwrap();
        ok(here, &["create", "on", "--on", "base.json"]);
        assert_eq!(mode("on/config.v1.json"), 0o600, "it may hold what its base keeps to itself");
    }
}
