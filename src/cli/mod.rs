//! The command line: arguments, printing, exit codes. (under work)
//!
//! Each command is one file with an `Args` struct (clap) and `pub(crate) fn run(args) -> Result<()>`.
pub mod explain;
pub mod export;
pub mod inspect;
mod output;
pub mod verify;
pub mod zfile;
