//! `version`: what this program is and what it was built with.

use super::output;
use crate::error::Result;
use serde_json::json;

/// Print the version and what this program was built with
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");
const UBLK: bool = cfg!(feature = "ublk");

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.json {
        let architecture = std::env::consts::ARCH;
        return output::print_facts(
            &json!({
                "name": "obd-ublk",
                "version": VERSION,
                "architecture": architecture,
                "features": {"ublk": UBLK},
            }),
            true,
        );
    }
    let ublk = if UBLK { "with ublk" } else { "without ublk" };
    output::print(&format!("obd-ublk {VERSION} ({ublk})\n"))
}
