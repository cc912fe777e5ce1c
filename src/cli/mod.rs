//! The command line: arguments, printing, exit codes.
//!
//! Each command is one file with an `Args` struct and `pub(crate) fn run(&Args) -> Result<()>`;
//! what it does is done by the library. Standard output carries data and nothing else. An error is
//! one line on standard error, `obd-ublk: ...`, or one JSON object there when the command was
//! given `--json`; its kind decides the exit code (see [`ErrorKind::exit_code`]), and wrong
//! arguments end with 64. A reader that closes standard output early is no error.

mod alias;
mod args;
mod attach;
mod behind;
mod bundle;
#[cfg(feature = "registry")]
mod cache;
mod commit;
mod compact;
mod create;
mod detach;
mod diff;
mod doctor;
mod explain;
mod export;
mod facts;
mod freeze;
mod generate;
mod host;
mod inspect;
mod list;
mod making;
mod merge;
mod mkfs;
mod output;
mod own;
#[cfg(feature = "registry")]
mod prefetch;
mod recover;
mod redact;
mod report;
mod resize;
mod restore;
mod self_test;
mod serve;
mod snapshot;
mod stat;
mod table;
mod upgrade;
mod verify;
mod version;
mod why;
mod zfile;

use crate::error::{Error, ErrorKind, Result};
use crate::server::{self, SERVE_COMMAND, SUCCESSOR_COMMAND, SUPERVISE_COMMAND};
use crate::telemetry::{self, Verbosity};
use behind::COMPRESS_COMMAND;
use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use freeze::FREEZE_COMMAND;
use nix::sys::signal::{SigSet, Signal};
use std::path::PathBuf;
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
   7  a registry refuses the credentials
   8  a deadline passed, or a registry cannot be reached
   9  no space
  11  the kernel's ublk driver refused
  12  the device is in use
  64  wrong arguments";

#[derive(Debug, Subcommand)]
enum Command {
    Attach(attach::Args),
    Create(create::Args),
    Commit(commit::Args),
    Merge(merge::Args),
    Diff(diff::Args),
    Compact(compact::Args),
    Resize(resize::Args),
    Detach(detach::Args),
    Serve(serve::Args),
    List(list::Args),
    Recover(recover::Args),
    Restore(restore::Args),
    Upgrade(upgrade::Args),
    Snapshot(snapshot::Args),
    Stat(stat::Args),
    Inspect(inspect::Args),
    Verify(verify::Args),
    Export(export::Args),
    Explain(explain::Args),
    #[cfg(feature = "registry")]
    Prefetch(prefetch::Args),
    #[cfg(feature = "registry")]
    Cache(cache::Args),
    Why(why::Args),
    Zfile(zfile::Args),
    Doctor(doctor::Args),
    Version(version::Args),
    Generate(generate::Args),
}

/// The commands by which this program runs itself. Apart, so that no help, no completion and no
/// manual page offers them to people.
#[derive(Debug, Parser)]
struct OwnCli {
    #[command(subcommand)]
    command: OwnCommand,

    #[arg(short, action = ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum OwnCommand {
    /// The server of one device, started by `attach`.
    #[command(name = SERVE_COMMAND)]
    Serve(attach::ServeArgs),
    /// A server that takes over from a dead one, started by the supervisor.
    #[command(name = SUCCESSOR_COMMAND)]
    Succeed {
        #[arg(long)]
        id: u32,
    },
    /// The supervisor, started by the first server.
    #[command(name = SUPERVISE_COMMAND)]
    Supervise,
    /// The process that thaws a file system, started by `snapshot`.
    #[command(name = FREEZE_COMMAND)]
    Freeze {
        #[arg()]
        mount: PathBuf,
    },
    /// The process that compresses a layer, started by `snapshot`.
    #[command(name = COMPRESS_COMMAND)]
    Compress(behind::Args),
}

const OWN_COMMANDS: [&str; 5] =
    [SERVE_COMMAND, SUCCESSOR_COMMAND, SUPERVISE_COMMAND, FREEZE_COMMAND, COMPRESS_COMMAND];

impl OwnCommand {
    fn run(&self, verbosity: u8) -> Result<()> {
        match self {
            Self::Serve(args) => attach::run_server(args, verbosity),
            Self::Succeed { id } => server::serve_successor(*id),
            Self::Supervise => server::supervise(),
            Self::Freeze { mount } => freeze::run(mount),
            Self::Compress(args) => behind::run(args),
        }
    }
}

impl Command {
    fn run(&self, verbosity: u8) -> Result<()> {
        match self {
            Self::Attach(args) => attach::run(args, verbosity),
            Self::Create(args) => create::run(args),
            Self::Commit(args) => commit::run(args),
            Self::Merge(args) => merge::run(args),
            Self::Diff(args) => diff::run(args),
            Self::Compact(args) => compact::run(args),
            Self::Resize(args) => resize::run(args),
            Self::Detach(args) => detach::run(args),
            Self::Serve(args) => serve::run(args),
            Self::List(args) => list::run(args),
            Self::Recover(args) => recover::run(args),
            Self::Restore(args) => restore::run(args),
            Self::Upgrade(args) => upgrade::run(args),
            Self::Snapshot(args) => snapshot::run(args),
            Self::Stat(args) => stat::run(args),
            Self::Inspect(args) => inspect::run(args),
            Self::Verify(args) => verify::run(args),
            Self::Export(args) => export::run(args),
            Self::Explain(args) => explain::run(args),
            #[cfg(feature = "registry")]
            Self::Prefetch(args) => prefetch::run(args),
            #[cfg(feature = "registry")]
            Self::Cache(args) => cache::run(args),
            Self::Why(args) => why::run(args),
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
            Self::Serve(_) => Verbosity::Events,
            _ => Verbosity::Warnings,
        }
    }
}

/// The whole program: reads the arguments of this process, returns its exit code.
#[must_use]
pub fn main() -> ExitCode {
    // A file that may not grow any more is to be an error of a write, as a full disk is, and not
    // the end of a server. Blocked, because ignoring takes `unsafe`; here, because all threads
    // inherit that. Programs that we start do not: the standard library unblocks all for them.
    let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
    if let Some(alias) = alias::called_as() {
        return main_as(alias);
    }
    let first = std::env::args_os().nth(1);
    let is_own = first.is_some_and(|first| OWN_COMMANDS.iter().any(|name| first == *name));
    finish(if is_own {
        OwnCli::try_parse().map(|cli| {
            // Started by a path that says little to people who look at processes.
            let _ = nix::sys::prctl::set_name(c"obd-ublk");
            // A server's log is for its operator, who was not there.
            telemetry::init(Verbosity::Events.raised(cli.verbose));
            telemetry::log_panics();
            cli.command.run(cli.verbose)
        })
    } else {
        Cli::try_parse().map(run)
    })
}

/// The program under the name of one of the reference's tools.
fn main_as(alias: &str) -> ExitCode {
    let translated = alias::translate(alias, std::env::args_os().collect());
    let outcome = match translated {
        Ok(line) => Cli::try_parse_from(line).map(run),
        Err(alias::Refusal::Usage(error)) => Err(error),
        Err(alias::Refusal::Told(told)) => Ok(Err(Error::new(ErrorKind::Unsupported, told))),
    };
    let failed = match &outcome {
        Ok(result) => result.is_err(),
        Err(error) => error.use_stderr(),
    };
    let _ = finish(outcome);
    ExitCode::from(if failed { alias::EXIT_FAILED } else { 0 })
}

fn run(cli: Cli) -> Result<()> {
    telemetry::init(cli.command.verbosity().raised(cli.verbose));
    cli.command.run(cli.verbose)
}

/// Tells what went wrong, and its exit code.
fn finish(outcome: Result<Result<()>, clap::Error>) -> ExitCode {
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            report::print_error(&error, wants_json());
            ExitCode::from(error.exit_code())
        }
        Err(error) => {
            // Standard output may be closed already; there is nobody left to tell.
            let _ = report::print_usage_error(&error);
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
        OwnCli::command().debug_assert();
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
            ErrorKind::Unauthorized,
            ErrorKind::Unavailable,
        ] {
            let line = format!("\n{:>4}  ", kind.exit_code());
            assert!(EXIT_CODES.contains(&line), "{kind:?}");
        }
    }
}
