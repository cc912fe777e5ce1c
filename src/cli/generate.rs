//! `generate`: completions and manual pages out of the definition of the command line.

use super::output;
use crate::error::{Error, ErrorKind, Result};
use std::path::PathBuf;

/// Print shell completions or write manual pages
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Print the completions of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder, one per command
    Man {
        /// The folder; it must exist
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut definition = super::definition();
    match &args.what {
        What::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut definition, "obd-ublk", &mut script);
            let script = String::from_utf8(script)
                .map_err(|error| Error::new(ErrorKind::Corrupt, format!("completions: {error}")))?;
            output::print(&with_one_name(&script))
        }
        What::Man { folder } => clap_mangen::generate_to(definition, folder).map_err(|error| {
            Error::io(format!("write manual pages to {}", folder.display()), &error)
        }),
    }
}

/// The bash script of clap_complete 4.6 sets `obd__ublk__subcmd__attach` and then looks for
/// `obd__subcmd__ublk__subcmd__attach`: it takes the hyphen of our name for a subcommand's, and
/// completes no option. Other shells' scripts do not contain this.
fn with_one_name(script: &str) -> String {
    script.replace("obd__subcmd__ublk", "obd__ublk")
}
