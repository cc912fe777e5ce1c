//! What people ask of the supervisor.

use super::protocol::notes::Note;
use super::run_dir::RunDir;
use super::supervisor::{request, wait_for_another};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// A hand-over that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upgraded {
    /// How long the device's readers may have waited, from the old server's end to the new one's
    /// first request, in microseconds.
    pub pause_us: u64,
}

/// Brings device `id` back, or waits until it is: starts a supervisor if there is none, and lets
/// one that has given up try again.
///
/// # Errors
/// `NotFound` when there is no such device of ours, `Timeout`, and why it cannot come back.
pub fn recover(run: &RunDir, id: u32, patience: Duration) -> Result<()> {
    request(run, &Note::Recover { id }, &[], patience)
        .map(drop)
        .context(|| format!("recover device {id}"))
}

/// Lets `program` serve device `id` from now on. Its readers wait for a moment and see no error.
///
/// # Errors
/// `NotFound` when the device is not served under supervision, `Busy` when it is being handed over
/// already; otherwise why the new program cannot serve it: then the old one goes on, or was
/// brought back.
pub fn upgrade(run: &RunDir, id: u32, program: &Path, patience: Duration) -> Result<Upgraded> {
    let upgraded = || {
        let told = |error| Error::io(format!("open {}", program.display()), &error);
        let file = File::open(program).map_err(told)?;
        if !file.metadata().map_err(told)?.is_file() {
            let message = format!("{} is not a program", program.display());
            return Err(Error::new(ErrorKind::InvalidFormat, message));
        }
        match request(run, &Note::Upgrade { id }, &[file.as_fd()], patience)? {
            Note::Done { pause_us } => Ok(Upgraded { pause_us: pause_us.unwrap_or(0) }),
            note => {
                Err(Error::new(ErrorKind::Corrupt, format!("the supervisor answered {note:?}")))
            }
        }
    };
    upgraded().map_err(|error| error.context(format!("upgrade device {id}")))
}

/// Has another supervisor take the place of the one of `run`: the servers start it, of the program
/// that they are. Devices are served meanwhile; one whose server dies in that moment is brought
/// back by the new supervisor. Nothing is done where nothing is attached.
///
/// # Errors
/// `Busy` when a device is being brought up or back, `Timeout` when none comes.
pub fn renew_supervisor(run: &RunDir, patience: Duration) -> Result<()> {
    if run.ids()?.is_empty() {
        return Ok(());
    }
    request(run, &Note::Retire, &[], patience)
        .and_then(|_| wait_for_another(run, patience))
        .context(|| "renew the supervisor".to_owned())
}
