//! Who may import whom: the table that Cargo cannot enforce inside one crate.

use crate::lexer::{self, PathUse};
use crate::{SourceFile, Violation};

/// One row: a top-level module, what it may take from this crate, and which other crates it may
/// name. Every module may import itself.
#[derive(Debug)]
struct Row {
    module: &'static str,
    inside: &'static [&'static str],
    outside: &'static [&'static str],
    /// Bytes and numbers in, values out: no file, socket, thread, lock or clock of `std`.
    pure: bool,
}

const EVERYTHING: &[&str] = &["*"];

/// The ground that every module stands on.
const GROUND: &[&str] = &["units", "limits", "error"];

/// The direction of imports, bottom first. Each row says why it is as it is.
const TABLE: &[Row] = &[
    // The ground: one word for each unit, bound and failure. libc for the errno constants.
    Row { module: "units", inside: GROUND, outside: &[], pure: true },
    Row { module: "limits", inside: GROUND, outside: &[], pure: true },
    Row { module: "error", inside: GROUND, outside: &["libc", "thiserror"], pure: false },
    // Since when a thread's request waits: known to front ends, asked by who waits.
    Row { module: "waiting", inside: &[], outside: &[], pure: false },
    // The seam between front ends and images: neither side may leak through it.
    Row {
        module: "disk",
        inside: &["units", "limits", "error", "waiting"],
        outside: &[],
        pure: true,
    },
    // Parsers of hostile bytes. Codecs and checksums are bytes in, bytes out.
    Row {
        module: "format",
        inside: GROUND,
        outside: &["crc32c", "lzzzz", "serde", "serde_json", "thiserror", "zstd"],
        pure: true,
    },
    // Address arithmetic. `format` only for the decoded segment mapping.
    Row {
        module: "map",
        inside: &["units", "limits", "error", "format"],
        outside: &[],
        pure: true,
    },
    // Where bytes come from. It must not know what they mean to an image.
    Row {
        module: "source",
        inside: &["units", "limits", "error", "format", "telemetry"],
        outside: &["io_uring", "libc", "memmap2", "nix", "rustix", "tracing"],
        pure: false,
    },
    // Blobs that lie elsewhere, kept here. It fetches by the seam in `source` and knows no
    // registry and no image. arc_swap so that files are exchanged under readers without a lock;
    // twox_hash for the checksums of extents, sha2 for that of the whole, rustix for marking its
    // threads.
    Row {
        module: "cache",
        inside: &["units", "limits", "error", "source", "telemetry", "waiting"],
        outside: &["arc_swap", "libc", "nix", "rustix", "sha2", "tracing", "twox_hash"],
        pure: false,
    },
    // Blobs that lie in a registry: it implements a trait of `source`, and knows neither who keeps
    // the bytes nor what they mean. The only module with an executor, the network and TLS.
    Row {
        module: "registry",
        inside: &["units", "limits", "error", "source", "telemetry"],
        outside: &[
            "base64",
            "fastrand",
            "futures_util",
            "httpdate",
            "reqwest",
            "rustix",
            "rustls",
            "serde",
            "serde_json",
            "sha2",
            "tokio",
            "tracing",
        ],
        pure: false,
    },
    // The writable pair: files, journal and map of one upper. It knows no stack and no image.
    // crc32c for the header of its journal.
    Row {
        module: "upper",
        inside: &["units", "limits", "error", "format", "map", "source", "telemetry"],
        outside: &["crc32c", "libc", "nix", "tracing"],
        pure: false,
    },
    // One open disk: composes format, map, source and upper behind the seam.
    Row {
        module: "image",
        inside: &[
            "units",
            "limits",
            "error",
            "disk",
            "format",
            "map",
            "source",
            "telemetry",
            "upper",
            // Put together here and nowhere else.
            "cache",
            "registry",
        ],
        outside: &["libc", "nix", "serde_json", "sha2", "tracing"],
        pure: false,
    },
    // New layers out of open ones. Below the commands and the server, which both make layers; it
    // reads what `image` opened and knows no device. tempfile for outputs that get their name when
    // they are whole; nix for the same without a name, and for the locks of pairs.
    Row {
        module: "make",
        inside: &["units", "limits", "error", "disk", "format", "map", "source", "image", "upper"],
        outside: &["libc", "nix", "tempfile"],
        pure: false,
    },
    // The kernel front end serves any disk and knows no image; libublk stays in this room.
    Row {
        module: "ublk",
        inside: &["units", "limits", "error", "disk", "telemetry", "waiting"],
        outside: &["io_uring", "libc", "libublk", "nix", "serde_json", "tracing"],
        pure: false,
    },
    // The socket front end, the same way: any disk, no image.
    Row {
        module: "nbd",
        inside: &["units", "limits", "error", "disk", "telemetry"],
        outside: &["libc", "nix", "tracing"],
        pure: false,
    },
    // One served device: an image behind a front end. `format` for the config only; `upper`
    // because a pair has one writer, and who that is changes when a device is taken over; `source`
    // for the places that a snapshot holds open. sha2 for the config that a snapshot commits.
    Row {
        module: "server",
        inside: &[
            "units",
            "limits",
            "error",
            "disk",
            "image",
            "source",
            "upper",
            // A snapshot compresses what it sealed.
            "make",
            "ublk",
            "nbd",
            "telemetry",
            "format",
        ],
        outside: &["libc", "nix", "rustix", "serde", "serde_json", "sha2", "tracing"],
        pure: false,
    },
    // A leaf that everything with I/O may use. crc32c for the records of the trouble ring.
    Row {
        module: "telemetry",
        inside: GROUND,
        outside: &["crc32c", "libc", "nix", "serde", "serde_json", "tracing", "tracing_subscriber"],
        pure: false,
    },
    // The outermost layer takes what it needs, but drives kernel and maps through the library.
    Row {
        module: "cli",
        inside: EVERYTHING,
        outside: &[
            "clap",
            "clap_complete",
            "clap_mangen",
            "indicatif",
            "libc",
            "nix",
            "serde",
            "serde_json",
            // The self-test's bundled image has a digest.
            "sha2",
            "tempfile",
            "tracing",
        ],
        pure: false,
    },
    Row { module: "main", inside: EVERYTHING, outside: &["clap", "libc", "tracing"], pure: false },
    Row { module: "lib", inside: EVERYTHING, outside: &[], pure: false },
];

/// The parts of `std` that a pure module may not name outside its tests.
const IMPURE: &[&str] = &["env", "fs", "net", "os", "process", "sync", "thread", "time"];

/// Edges narrower than the table: `server` may take from `format` what reads configs, no more.
const NARROW: &[(&str, &str, &[&str])] = &[("server", "format", &["config"])];

/// Checks one file of `src/`; `dependencies` are the crates that Cargo.toml names.
pub(crate) fn check(file: &SourceFile, dependencies: &[String]) -> Vec<Violation> {
    let module = module_of(&file.path);
    let Some(row) = TABLE.iter().find(|row| row.module == module) else {
        let told = format!("module `{module}` has no row in tests/tidy/imports.rs");
        return vec![file.violation(1, told)];
    };
    let mut found = Vec::new();
    for path in lexer::paths(&lexer::tokens(&file.text)) {
        let told = judge(row, file, &path, dependencies);
        found.extend(told.map(|told| file.violation(path.line, told)));
    }
    found
}

fn judge(row: &Row, file: &SourceFile, path: &PathUse, dependencies: &[String]) -> Option<String> {
    let module = row.module;
    let name = path.segments.join("::");
    if let Some([target, rest @ ..]) = inside_target(file, path) {
        if target == module || row.inside == EVERYTHING || !is_module(target) {
            return None;
        }
        if !row.inside.contains(&target.as_str()) {
            return Some(format!("`{module}` may not import `{target}` ({name})"));
        }
        let narrow = NARROW.iter().find(|(from, to, _)| *from == module && to == target);
        return narrow.and_then(|(_, _, parts)| {
            let allowed = rest.first().is_some_and(|part| parts.contains(&part.as_str()));
            let told = || format!("`{module}` may import only {parts:?} of `{target}` ({name})");
            (!allowed).then(told)
        });
    }
    // Tests may use temporary files, threads and helper crates: only directions bind them.
    if path.in_test || file.is_test() {
        return None;
    }
    let [first, rest @ ..] = path.segments.as_slice() else { return None };
    let second = rest.first().map_or("", String::as_str);
    if row.pure && matches!(first.as_str(), "std" | "core") && IMPURE.contains(&second) {
        return Some(format!("`{module}` is pure and may not name {name}"));
    }
    let foreign = dependencies.iter().any(|dependency| dependency == first);
    (foreign && !row.outside.contains(&first.as_str()))
        .then(|| format!("`{module}` may not use the crate `{first}` ({name})"))
}

/// What follows the crate's root in `crate::a::b` or in a chain of `super`s that reaches it.
fn inside_target<'a>(file: &SourceFile, path: &'a PathUse) -> Option<&'a [String]> {
    let supers = path.segments.iter().take_while(|segment| *segment == "super").count();
    match path.segments[0].as_str() {
        "crate" | "obd_ublk" => Some(&path.segments[1..]),
        "super" if supers == depth_of(&file.path) + path.inline_modules => {
            Some(&path.segments[supers..])
        }
        _ => None,
    }
    .filter(|rest| !rest.is_empty())
}

fn is_module(name: &str) -> bool {
    TABLE.iter().any(|row| row.module == name)
}

/// `src/map/merge.rs` and `src/map.rs` belong to `map`.
fn module_of(path: &str) -> &str {
    let inner = path.strip_prefix("src/").unwrap_or(path);
    let first = inner.split('/').next().unwrap_or(inner);
    first.strip_suffix(".rs").unwrap_or(first)
}

/// How many `super`s lead from this file's module to the crate's root.
fn depth_of(path: &str) -> usize {
    let inner = path.strip_prefix("src/").unwrap_or(path);
    let slashes = inner.matches('/').count();
    match inner {
        "lib.rs" | "main.rs" => 0,
        _ if inner.ends_with("/mod.rs") => slashes,
        _ => slashes + 1,
    }
}
