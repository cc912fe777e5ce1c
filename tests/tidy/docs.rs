//! The documents and everything tracked: links lead somewhere, nothing names a private machine.

use crate::{SourceFile, Violation};
use std::path::Path;

/// Hosts that a tracked file may name. Anything else is a mirror, a private machine or a typo.
const HOSTS: &[&str] = &[
    "127.0.0.1",
    "auth.docker.io",
    "crates.io",
    "deb.debian.org",
    "docs.kernel.org",
    "docs.rs",
    "example.com",
    "github.com",
    "index.docker.io",
    "keepachangelog.com",
    "localhost",
    "registry-1.docker.io",
    "rustup.rs",
    "semver.org",
    "www.apache.org",
    "www.kernel.org",
    "www.rust-lang.org",
];

/// Beginnings of paths that exist on one machine only. Halved, so that this file may name them.
const PRIVATE_PATHS: &[&str] = &[
    concat!("/wo", "rk/"),
    concat!("/tmp/", "wt-"),
    concat!("/ro", "ot/."),
    concat!("/ho", "me/"),
];

/// Hosts and private paths, in every tracked text.
pub(crate) fn check_hosts(file: &SourceFile) -> Vec<Violation> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(file.text.lines()) {
        for rest in line.split("://").skip(1) {
            let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
            let host = rest.split(|c| !name(c)).next().unwrap_or("").trim_end_matches('.');
            let placeholder = host.is_empty() || !host.contains('.') && host != "localhost";
            if !placeholder && !HOSTS.contains(&host) && !host.ends_with(".example.com") {
                found.push(file.violation(number, format!("unknown host {host}")));
            }
        }
        let private = PRIVATE_PATHS.iter().find(|path| line.contains(**path));
        found.extend(private.map(|path| file.violation(number, format!("the path {path}"))));
    }
    found
}

/// Relative links of a Markdown file must exist below `root`.
pub(crate) fn check_links(root: &Path, file: &SourceFile) -> Vec<Violation> {
    let folder = Path::new(&file.path).parent().unwrap_or(Path::new(""));
    let mut found = Vec::new();
    for (number, line) in (1..).zip(file.text.lines()) {
        for rest in line.split("](").skip(1) {
            let target = rest.split(')').next().unwrap_or("");
            let path = target.split('#').next().unwrap_or("");
            let elsewhere = path.is_empty() || path.contains("://");
            if !elsewhere && !root.join(folder).join(path).exists() {
                found.push(file.violation(number, format!("the link {target} leads nowhere")));
            }
        }
    }
    found
}

/// A test named in a document as `` `path/to/file.rs::name` `` must exist.
pub(crate) fn check_test_names(root: &Path, file: &SourceFile) -> Vec<Violation> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(file.text.lines()) {
        for quoted in line.split('`').skip(1).step_by(2) {
            let Some((path, name)) = quoted.split_once(".rs::") else { continue };
            let source = std::fs::read_to_string(root.join(format!("{path}.rs")));
            let function = format!("fn {}(", name.rsplit("::").next().unwrap_or(name));
            if !source.is_ok_and(|source| source.contains(&function)) {
                found.push(file.violation(number, format!("no test {quoted}")));
            }
        }
    }
    found
}

/// Every vector is shown in a document that, on the same line, names the test that reads it.
pub(crate) fn check_vectors(vectors: &[String], documents: &[SourceFile]) -> Vec<Violation> {
    let mut found = Vec::new();
    for vector in vectors {
        // `a.hex` and `a.json` are one vector: its bytes and its decoded fields.
        let file = vector.rsplit('/').next().unwrap_or(vector);
        let name = file.split('.').next().unwrap_or(file);
        let linked = |line: &str| line.contains(name) && line.contains(".rs::");
        if !documents.iter().any(|document| document.text.lines().any(linked)) {
            let told = "no document names the test that reads this vector".to_owned();
            found.push(Violation { path: vector.clone(), line: 1, told });
        }
    }
    found
}
