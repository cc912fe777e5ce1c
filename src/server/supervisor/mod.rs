//! The one process of a host that brings devices back when their servers die.
//!
//! ```text
//!   server of N --link--> supervisor          guard N; here is a parcel: map, tables, open layers
//!       dies    --EOF-->  supervisor          what had it come to? (`policy`, by its state file)
//!                         supervisor --spawn--> successor of N, with the parcel
//!                                               takes over, serves, guards N in its turn
//! ```
//!
//! Where systemd started it, what it keeps is in systemd's hands as well ([`store`]).
//!
//! It is started by the first server that needs it, by a lock there is one per run folder, and it
//! ends when nothing is left to guard. It only ever starts successors and clears what cannot come
//! back: it serves nothing, opens no image and waits for nobody, so little can go wrong with it.
//! Should it die all the same, the servers notice and start another one; should everything die at
//! once, the state files are there for `obd-ublk recover` and for the next `attach`.
//!
//! A device whose servers keep dying early is given up after some tries; the file [`LOST_NAME`] in
//! its folder says so, and readers wait until somebody recovers or detaches it.

mod link;
mod policy;
mod run;
mod store;
mod ward;

pub use link::SUPERVISE_COMMAND;
pub(super) use link::{Link, ParcelFiles, request, wait_for_another};
pub use run::supervise;

use super::packet::PacketSocket;
use super::protocol::notes::Note;
use super::run_dir::RunDir;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The file that says that a device was given up, and why.
const LOST_NAME: &str = "lost";

fn socket_path(run: &RunDir) -> PathBuf {
    run.path().join("supervisor.sock")
}

/// Tells a supervisor, if there is one, that device `id` may be gone.
pub(super) fn nudge(run: &RunDir, id: u32) {
    if let Ok(socket) = PacketSocket::connect(&socket_path(run)) {
        let _ = socket.set_patience(Some(Duration::from_secs(1)));
        let _ = socket.send(&Note::Look { id }.encode(), &[]);
    }
}

/// Removes the socket of a supervisor that was killed, when there is no device left either. One
/// that lives, or starts, holds the lock of the run folder.
pub(super) fn sweep(run: &RunDir) {
    if let Ok(Some(_lock)) = run::lock(run)
        && run.ids().is_ok_and(|ids| ids.is_empty())
    {
        let _ = std::fs::remove_file(socket_path(run));
    }
}

/// Why the device of this folder was given up, if it was.
pub(super) fn lost(folder: &Path) -> Option<String> {
    std::fs::read_to_string(folder.join(LOST_NAME)).ok()
}
