//! Serves the files of a folder as blobs, as badly as it is told to.
//!
//! `obd-ublk-mock-registry ADDRESS FOLDER [OPTION VALUE]...` prints one line for each blob, its
//! `repoBlobUrl` and digest, then one line with its own URL, and serves until it is killed.
//!
//! ```text
//! --faults PERCENT        so many of a hundred requests go wrong
//! --seed NUMBER           which ones, and how
//! --delay-ms NUMBER       each blob's answer comes so late
//! --rate BYTES            so many bytes of a blob a second, for each connection
//! --tokens MILLISECONDS   blobs are for those with a token, which is good for so long
//! --basic USER:PASSWORD   blobs are for those with a password; with --tokens, tokens are
//! --redirect MILLISECONDS blobs are redirected, and each redirect is good for so long
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "mock-registry/mod.rs"]
mod mock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mock::answer::Bearer;
use mock::{Auth, Fault, Mock, Part};
use obd_ublk::registry::Digest;
use std::path::Path;

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(address), Some(folder)) = (args.next(), args.next()) else {
        eprintln!("usage: obd-ublk-mock-registry ADDRESS FOLDER [OPTION VALUE]...");
        std::process::exit(64);
    };
    let mock = Mock::start_at(&address, None);
    let rest: Vec<String> = args.collect();
    let value = |name: &str| {
        let at = rest.iter().position(|word| word == name)?;
        Some(rest.get(at + 1).unwrap_or_else(|| panic!("{name} needs a value")).clone())
    };
    let number = |name: &str| {
        value(name).map(|text| text.parse::<u64>().unwrap_or_else(|e| panic!("{name}: {e}")))
    };
    load(&mock, Path::new(&folder));
    for part in [Part::Blob, Part::Store] {
        for (name, fault) in [("--delay-ms", Fault::Delay as fn(u64) -> _), ("--rate", Fault::Slow)]
        {
            if let Some(number) = number(name) {
                mock.fail(part, u64::MAX, fault(number));
            }
        }
    }
    if let Some(percent) = number("--faults") {
        mock.chaos(percent, number("--seed").unwrap_or(0));
    }
    let basic = value("--basic").map(|pair| STANDARD.encode(pair));
    let bearer = number("--tokens").map(|good_ms| {
        let realm = format!("{}/token", mock.url());
        let told_seconds = Some((good_ms / 1000).max(1));
        Bearer { good_ms, told_seconds, basic: basic.clone(), ..Bearer::at(&realm) }
    });
    mock.state().auth = match (bearer, basic) {
        (Some(bearer), _) => Auth::Bearer(bearer),
        (None, Some(basic)) => Auth::Basic(basic),
        (None, None) => Auth::Open,
    };
    mock.state().redirect = number("--redirect").map(|good_ms| (mock.url(), good_ms));
    println!("{}", mock.url());
    loop {
        std::thread::park();
    }
}

fn load(mock: &Mock, folder: &Path) {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths.iter().filter(|path| path.is_file()) {
        let content = std::fs::read(path).unwrap();
        let digest = Digest::of(&content).to_string();
        println!("{} {digest} {}", mock.blobs_of("test"), path.display());
        mock.state().content.blobs.insert(digest, content.into());
    }
}
