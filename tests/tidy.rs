//! Tidy: the rules of this repository that no compiler checks, as tests.
//!
//! Each test reads tracked files, applies one group of rules and fails with one line per
//! violation, `file:line: what`. The rules are in `tests/tidy/`; each is also run on small bad
//! inputs below, so that a rule that stopped working would be seen. Only `std` is used.

// Helpers stand outside `#[test]` functions, where clippy.toml allows these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "tidy/docs.rs"]
mod docs;
#[path = "tidy/imports.rs"]
mod imports;
#[path = "tidy/lexer.rs"]
mod lexer;
#[path = "tidy/self_tests.rs"]
mod self_tests;
#[path = "tidy/shape.rs"]
mod shape;

use std::path::Path;
use std::process::Command;

/// A tracked text file.
#[derive(Debug)]
struct SourceFile {
    /// Relative to the repository, with `/`.
    path: String,
    text: String,
}

impl SourceFile {
    fn violation(&self, line: usize, told: String) -> Violation {
        Violation { path: self.path.clone(), line, told }
    }

    /// A file that holds nothing but tests.
    fn is_test(&self) -> bool {
        self.path.ends_with("tests.rs") || self.path.contains("/tests/")
    }
}

/// One broken rule.
#[derive(Debug)]
struct Violation {
    path: String,
    line: usize,
    told: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What git tracks or would track: a new file counts before it is added.
fn tracked_paths() -> Vec<String> {
    let listed = Command::new("git")
        // The checkout may belong to somebody else (a container's root): reading names is harmless.
        .args([
            "-c",
            "safe.directory=*",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(root())
        .output();
    let listed = listed.unwrap_or_else(|e| panic!("run git ls-files: {e}"));
    let message = String::from_utf8_lossy(&listed.stderr);
    assert!(listed.status.success(), "git ls-files: {message}");
    let names = String::from_utf8_lossy(&listed.stdout);
    let names = names.split('\0').filter(|name| root().join(name).is_file());
    let mut paths: Vec<String> = names.map(ToOwned::to_owned).collect();
    paths.sort();
    assert!(paths.len() > 50, "the repository has files: {}", paths.len());
    paths
}

/// The tracked text files that `wanted` picks.
fn files(wanted: impl Fn(&str) -> bool) -> Vec<SourceFile> {
    let picked = tracked_paths().into_iter().filter(|path| wanted(path));
    picked
        .filter_map(|path| {
            let text = std::fs::read_to_string(root().join(&path)).ok()?;
            Some(SourceFile { path, text })
        })
        .collect()
}

fn is_rust(path: &str) -> bool {
    path.ends_with(".rs")
}

/// Code of ours: Rust and shell in the folders for code. The fixtures are data.
fn is_code(path: &str) -> bool {
    let folders = ["src/", "tests/", "tools/", "benches/", ".ci/"];
    let data = ["tests/fixtures/", "benches/data/", "benches/results/"];
    let text = [".rs", ".sh", ".pl", ".py"].iter().any(|end| path.ends_with(end));
    let script = !path.rsplit('/').next().unwrap_or("").contains('.');
    folders.iter().any(|folder| path.starts_with(folder))
        && !data.iter().any(|folder| path.starts_with(folder))
        && (text || script)
}

/// The crates that Cargo.toml names, as Rust spells them.
fn dependencies() -> Vec<String> {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap_or_default();
    let mut inside = false;
    let mut found = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line == "[dependencies]";
        } else if let (true, Some((name, _))) = (inside, line.split_once(" = ")) {
            found.push(name.replace('-', "_"));
        }
    }
    assert!(found.iter().any(|name| name == "libublk"), "Cargo.toml was read: {found:?}");
    found
}

fn assert_none(violations: &[Violation]) {
    let lines: Vec<_> = violations
        .iter()
        .map(|Violation { path, line, told }| format!("{path}:{line}: {told}"))
        .collect();
    assert!(lines.is_empty(), "{} violations\n{}\n", lines.len(), lines.join("\n"));
}

#[test]
fn modules_import_only_what_the_table_allows() {
    let dependencies = dependencies();
    let sources = files(|path| path.starts_with("src/") && is_rust(path));
    assert!(!sources.is_empty());
    let found: Vec<_> = sources.iter().flat_map(|f| imports::check(f, &dependencies)).collect();
    assert_none(&found);
}

#[test]
fn code_has_short_lines_short_files_ascii_only_and_no_unfinished_words() {
    let found: Vec<_> = files(is_code).iter().flat_map(shape::check_text).collect();
    assert_none(&found);
}

#[test]
fn functions_fit_on_a_screen_and_call_no_banned_macro() {
    let rust = files(|path| is_rust(path) && is_code(path));
    let found: Vec<_> = rust.iter().flat_map(shape::check_code).collect();
    assert_none(&found);
}

#[test]
fn unsafe_code_stays_in_its_rooms_and_says_why_it_is_sound() {
    assert_none(&shape::check_unsafe(&files(is_code)));
}

#[test]
fn every_limit_has_a_reason() {
    let limits = files(|path| path == "src/limits.rs");
    assert_eq!(limits.len(), 1);
    assert_none(&shape::check_limits(&limits[0]));
}

#[test]
fn no_tracked_file_names_a_private_machine_or_an_unknown_host() {
    let found: Vec<_> = files(|_| true).iter().flat_map(docs::check_hosts).collect();
    assert_none(&found);
}

#[test]
fn links_in_documents_lead_somewhere() {
    let documents = files(|path| path.ends_with(".md"));
    assert!(documents.iter().any(|document| document.path == "README.md"));
    let found: Vec<_> = documents.iter().flat_map(|d| docs::check_links(root(), d)).collect();
    assert_none(&found);
}

#[test]
fn tests_named_in_documents_exist_and_every_vector_has_one() {
    let documents = files(|path| path.ends_with(".md"));
    let mut found: Vec<_> =
        documents.iter().flat_map(|d| docs::check_test_names(root(), d)).collect();
    let vectors: Vec<_> = tracked_paths()
        .into_iter()
        .filter(|path| path.starts_with("format-spec/vectors/") && !path.ends_with(".md"))
        .collect();
    found.extend(docs::check_vectors(&vectors, &documents));
    assert_none(&found);
}
