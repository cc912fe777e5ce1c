//! The rules, run on small bad (and good) inputs.

use crate::lexer::{paths, tokens};
use crate::{SourceFile, Violation, docs, imports, root, shape};

fn file(path: &str, text: &str) -> SourceFile {
    SourceFile { path: path.to_owned(), text: text.to_owned() }
}

/// The lines on which a rule was broken.
fn lines(found: &[Violation]) -> Vec<usize> {
    found.iter().map(|violation| violation.line).collect()
}

#[test]
fn comments_and_literals_are_not_code() {
    let source = r###"
// use crate::a;
/* crate::b /* nested */ crate::c */
let s = "crate::d \" crate::e"; let r = r#"crate::f " crate::g"#;
let c = '"'; let l: &'static str = b"x"; let q = '\''; let u = '\u{41}'; b'"';
crate::real::path();
"###;
    let found = paths(&tokens(source));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].line, found[0].segments.join("::")), (6, "crate::real::path".to_owned()));
}

#[test]
fn groups_are_written_out() {
    let found = paths(&tokens("use crate::{a, b::{c, self}, d as e, f::*};\nx::y(z::<T>::w());"));
    let told: Vec<_> = found.iter().map(|path| path.segments.join("::")).collect();
    let expected =
        ["crate::a", "crate::b::c", "crate::b::self", "crate::d", "crate::f::*", "x::y", "z"];
    assert_eq!(told, expected);
}

#[test]
fn the_import_table_refuses_wrong_edges() {
    let cases: &[(&str, &str, &[usize])] = &[
        // Allowed.
        ("src/image/open.rs", "use crate::{map::Merged, source};\nuse super::read;", &[]),
        ("src/map/merge.rs", "use crate::format::lsmt::Segment;", &[]),
        ("src/main.rs", "obd_ublk::cli::main()", &[]),
        ("src/format/lsmt/header.rs", "use crate::error::Result;\nuse super::super::tar::T;", &[]),
        ("src/format/tar.rs", "#[cfg(test)]\nmod tests {\nuse std::fs::File;\n}", &[]),
        ("src/format/lsmt/tests.rs", "use std::fs::File;", &[]),
        ("src/format/tar.rs", "#[cfg(test)]\nmod tests {\nfn f() { std::fs::read }}", &[]),
        ("src/format/tar.rs", "use serde_json::Value;\nfn f() { Vec::<u8>::new(); }", &[]),
        ("src/server/device.rs", "use crate::format::config::Config;", &[]),
        // Upward or sideways.
        ("src/format/tar.rs", "\nuse crate::map::Merged;", &[2]),
        ("src/format/tar.rs", "use crate::{error::Result,\n source::File};", &[2]),
        ("src/format/lsmt/header.rs", "use super::super::super::image::Image;", &[1]),
        ("src/map/mod.rs", "mod tests {\n use super::super::image::Image;\n}", &[2]),
        ("src/ublk/queue.rs", "fn f() { crate::image::Image::open(); }", &[1]),
        ("src/source/mod.rs", "use crate::cli;", &[1]),
        ("src/server/device.rs", "use crate::format::lsmt::Index;", &[1]),
        ("src/format/tar.rs", "#[cfg(test)]\nmod tests {\nuse crate::image::Image;\n}", &[3]),
        // Impure.
        ("src/format/tar.rs", "use std::{io::Read, fs::File};", &[1]),
        ("src/map/merge.rs", "fn f() {}\nstatic A: std::sync::Mutex<u8> = x;", &[2]),
        ("src/format/tar.rs", "#[cfg(test)]\nmod tests {}\nuse std::time::Instant;", &[3]),
        // Crates.
        ("src/map/merge.rs", "use libc::c_int;", &[1]),
        ("src/server/device.rs", "use libublk::ctrl::UblkCtrl;", &[1]),
        // A module that the table does not know.
        ("src/magic/mod.rs", "", &[1]),
    ];
    let dependencies = ["libc", "libublk", "serde_json"].map(str::to_owned);
    for (path, text, expected) in cases {
        let found = imports::check(&file(path, text), &dependencies);
        assert_eq!(lines(&found), *expected, "{path}: {text}: {found:?}");
    }
}

#[test]
fn bad_text_is_found_where_it_is() {
    let long = format!("x\n{}\n", "y".repeat(101));
    let tall = "\n".repeat(801);
    let unfinished = format!("a\n// {}: later\n", concat!("FIX", "ME"));
    let cases: &[(&str, &[usize])] = &[
        ("fn main() {}\n", &[]),
        (&long, &[2]),
        (&tall, &[801]),
        ("a\nb \u{2192} c\n", &[2]),
        (&unfinished, &[2]),
        ("a \nb\n", &[1]),
        ("a\nb", &[2]),
    ];
    for (text, expected) in cases {
        let found = shape::check_text(&file("src/x.rs", text));
        assert_eq!(lines(&found), *expected, "{text:?}: {found:?}");
    }
}

#[test]
fn long_functions_and_banned_macros_are_found() {
    let body =
        |count: usize| format!("fn long(a: [u8; 4]) -> u8\n{{\n{}}}\n", "x;\n".repeat(count));
    let (fits, too_long) = (body(67), body(68));
    let unfinished = format!("fn f() {{\n {}!()\n}}", concat!("to", "do"));
    let cases: &[(&str, &[usize])] = &[
        (&fits, &[]),
        (&too_long, &[1]),
        ("trait T {\n fn f(&self);\n}\ntype F = fn(u8);\n", &[]),
        (&unfinished, &[2]),
    ];
    for (text, expected) in cases {
        let found = shape::check_code(&file("src/x.rs", text));
        assert_eq!(lines(&found), *expected, "{text:?}: {found:?}");
    }
}

#[test]
fn unsafe_is_found_outside_its_rooms_and_without_its_reason() {
    let told = "// SAFETY: the range was checked.\nunsafe { f() }";
    let cases: &[(&[&str], &str, usize)] = &[
        (&["src/ublk/queue.rs", "src/source/mmap.rs", "src/map/vector.rs"], told, 0),
        (&["src/ublk/queue.rs"], "unsafe { f() }", 1),
        (&["src/source/file.rs"], told, 1),
        (&["src/map/a.rs", "src/map/b.rs"], told, 1),
        (&["tests/x.rs"], told, 1),
        (&["src/image/x.rs"], "// unsafe\nlet unsafely = \"unsafe\";", 0),
    ];
    for (paths, text, expected) in cases {
        let files: Vec<_> = paths.iter().map(|path| file(path, text)).collect();
        let found = shape::check_unsafe(&files);
        assert_eq!(found.len(), *expected, "{paths:?}: {text}: {found:?}");
    }
}

#[test]
fn a_limit_without_a_reason_is_found() {
    let text = "/// Why.\npub const A: u8 = 1;\npub const B: u8 = 2;\n";
    assert_eq!(lines(&shape::check_limits(&file("src/limits.rs", text))), [3]);
}

#[test]
fn private_paths_and_unknown_hosts_are_found() {
    let private = format!("a\ncd {}x", concat!("/wo", "rk/"));
    let mirror = format!("https:{}", "//mirror.corp.net/x");
    let known = format!("https{0}docs.rs/x http{0}$HOST/y https{0}a.example.com", "://");
    let cases: &[(&str, &[usize])] = &[(&private, &[2]), (&mirror, &[1]), (&known, &[])];
    for (text, expected) in cases {
        assert_eq!(lines(&docs::check_hosts(&file("x.md", text))), *expected, "{text}");
    }
}

#[test]
fn dead_links_and_tests_that_do_not_exist_are_found() {
    let links = "[a](Cargo.toml) [b](#here) [c](src/lib.rs#x)\n[d](no-such-file.md)";
    assert_eq!(lines(&docs::check_links(root(), &file("README.md", links))), [2]);
    let tests = "`tests/tidy.rs::every_limit_has_a_reason`\n`tests/tidy.rs::no_such`\n\
                 `no/such.rs::x` `plain.rs`";
    assert_eq!(lines(&docs::check_test_names(root(), &file("README.md", tests))), [2, 3]);
}

#[test]
fn a_vector_that_no_test_reads_is_found() {
    let document = file("format-spec/lsmt.md", "| v-a | `tests/t.rs::reads_a` |\n| v-b | |\n");
    let vectors = ["v-a", "v-b", "v-c"].map(|name| format!("format-spec/vectors/{name}.hex"));
    let found = docs::check_vectors(&vectors, &[document]);
    let told: Vec<_> = found.iter().map(|violation| violation.path.as_str()).collect();
    assert_eq!(told, ["format-spec/vectors/v-b.hex", "format-spec/vectors/v-c.hex"]);
}
