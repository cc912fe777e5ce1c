//! `version`: what this program is and what it was built with.

use super::output;
use crate::error::Result;
use crate::make::{CODECS, CONSISTENCY};
use serde_json::{Value, json};

/// Print the version and what this program was built with
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The library behind the kernel front end, if there is one.
const LIBUBLK: Option<&str> = libublk();

#[cfg(feature = "ublk")]
const fn libublk() -> Option<&'static str> {
    Some(crate::ublk::LIBUBLK_VERSION)
}

#[cfg(not(feature = "ublk"))]
const fn libublk() -> Option<&'static str> {
    None
}

pub(super) fn facts() -> Value {
    let codecs: serde_json::Map<String, Value> =
        CODECS.iter().map(|(codec, library)| ((*codec).to_owned(), json!(library))).collect();
    json!({
        "name": "obd-ublk",
        "version": VERSION,
        "architecture": std::env::consts::ARCH,
        "features": {"ublk": LIBUBLK.is_some()},
        "libublk": LIBUBLK,
        "consistency": CONSISTENCY,
        "codecs": codecs,
    })
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.json {
        return output::print_facts(facts(), true);
    }
    let ublk = LIBUBLK.map_or("without ublk".to_owned(), |version| format!("libublk {version}"));
    output::print(&format!("obd-ublk {VERSION} ({ublk})\n"))
}
