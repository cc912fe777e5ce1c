//! The command line: arguments, printing, exit codes.
//!
//! Each command is one file with an `Args` struct and `pub(crate) fn run(&Args) -> Result<()>`;
//! what it does is done by the library. Standard output carries data and nothing else. An error is
//! one line on standard error, `obd-ublk: ...`, or one JSON object there when the command was
//! given `--json`; its kind decides the exit code (see [`ErrorKind::exit_code`]), and wrong
//! arguments end with 64. A reader that closes standard output early is no error.

mod args;
mod attach;
mod detach;
mod doctor;
mod explain;
mod export;
mod generate;
mod host;
mod inspect;
mod list;
mod output;
mod report;
mod stat;
mod table;
mod verify;
mod version;
mod zfile;

use crate::error::{ErrorKind, Result};
use crate::server::SERVE_COMMAND;
use crate::telemetry::{self, Verbosity};
use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// Serve overlaybd container images as Linux block devices through ublk.
#[derive(Debug, Parser)]
#[command(name = "obd-ublk", version, max_term_width = 100, after_long_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Tell more on standard error (-vv and -vvv: still more); OBD_UBLK_LOG overrides it
    #[arg(short, long, action = ArgAction::Count, global = true)]
    verbose: u8,
}

const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  an operation failed in the operating system
   2  a config file is wrong
   3  a file is not of the expected format
   4  not supported: a version, a flag, this kernel, this host
   5  a file is damaged
   6  a file or a device does not exist
   8  a deadline passed
   9  no space
  11  the kernel's ublk driver refused
  12  the device is in use
  64  wrong arguments";

#[derive(Debug, Subcommand)]
enum Command {
    Attach(attach::Args),
    Detach(detach::Args),
    List(list::Args),
    Stat(stat::Args),
    Inspect(inspect::Args),
    Verify(verify::Args),
    Export(export::Args),
    Explain(explain::Args),
    Zfile(zfile::Args),
    Doctor(doctor::Args),
    Version(version::Args),
    Generate(generate::Args),
}

/// The command line by which `attach` runs this program as a server. Apart, so that no help, no
/// completion and no manual page offers it to people.
#[derive(Debug, Parser)]
#[command(name = SERVE_COMMAND)]
struct ServeCli {
    #[command(flatten)]
    args: attach::ServeArgs,

    #[arg(short, action = ArgAction::Count)]
    verbose: u8,
}

impl Command {
    fn run(&self, verbosity: u8) -> Result<()> {
        match self {
            Self::Attach(args) => attach::run(args, verbosity),
            Self::Detach(args) => detach::run(args),
            Self::List(args) => list::run(args),
            Self::Stat(args) => stat::run(args),
            Self::Inspect(args) => inspect::run(args),
            Self::Verify(args) => verify::run(args),
            Self::Export(args) => export::run(args),
            Self::Explain(args) => explain::run(args),
            Self::Zfile(args) => zfile::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::Version(args) => version::run(args),
            Self::Generate(args) => generate::run(args),
        }
    }

    /// What is told without `-v`.
    fn verbosity(&self) -> Verbosity {
        match self {
            Self::Attach(args) if args.foreground => Verbosity::Events,
            _ => Verbosity::Warnings,
        }
    }
}

/// The whole program: reads the arguments of this process, returns its exit code.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    let outcome = if arguments.peek().is_some_and(|first| first == SERVE_COMMAND) {
        ServeCli::try_parse_from(arguments).map(|cli| {
            // A server's log is for its operator, who was not there.
            telemetry::init(Verbosity::Events.raised(cli.verbose));
            attach::run_server(&cli.args, cli.verbose)
        })
    } else {
        Cli::try_parse().map(|cli| {
            telemetry::init(cli.command.verbosity().raised(cli.verbose));
            cli.command.run(cli.verbose)
        })
    };
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            report::print_error(&error, wants_json());
            ExitCode::from(error.exit_code())
        }
        Err(error) => {
            // Standard output may be closed already; there is nobody left to tell.
            let _ = error.print();
            let code = if error.use_stderr() { ErrorKind::Usage.exit_code() } else { 0 };
            ExitCode::from(code)
        }
    }
}

/// Whether errors are told in JSON: every command that has `--json` spells it so.
fn wants_json() -> bool {
    let options = std::env::args_os().take_while(|argument| argument != "--");
    options.into_iter().any(|argument| argument == "--json")
}

/// The definition of the command line, for completions and manual pages.
pub(crate) fn definition() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        definition().debug_assert();
        ServeCli::command().debug_assert();
    }

    #[test]
    fn every_exit_code_is_in_the_help() {
        for kind in [
            ErrorKind::Usage,
            ErrorKind::InvalidConfig,
            ErrorKind::InvalidFormat,
            ErrorKind::Unsupported,
            ErrorKind::Corrupt,
            ErrorKind::NotFound,
            ErrorKind::NoSpace,
            ErrorKind::Busy,
            ErrorKind::Io,
            ErrorKind::Kernel,
            ErrorKind::Timeout,
        ] {
            let line = format!("\n{:>4}  ", kind.exit_code());
            assert!(EXIT_CODES.contains(&line), "{kind:?}");
        }
    }
}
