//! What the supervisor knows of one device.

use super::link::ParcelFiles;
use super::policy::Deaths;
use crate::server::process::Process;
use crate::server::protocol::Refusal;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

/// The number of a connection, never used twice.
pub(super) type LinkId = u64;

/// One guarded device.
#[derive(Debug, Default)]
pub(super) struct Ward {
    /// What a successor needs; empty if its server could not pack it.
    pub(super) parcel: ParcelFiles,
    /// A parcel of which not every packet has come.
    pub(super) incoming: ParcelFiles,
    /// The program that serves it, so that a successor is of the same version even when the file
    /// was replaced.
    pub(super) program: Option<OwnedFd>,
    /// Its server.
    pub(super) server: Option<LinkId>,
    /// The server's process: when its link ends it is dying, whatever `/proc` still says of it.
    pub(super) process: Option<Process>,
    /// The process that is to be its server.
    pub(super) successor: Option<LinkId>,
    /// The successor's process id.
    pub(super) successor_pid: Option<u32>,
    /// Set while the successor is on its way into a scope and has said nothing yet.
    pub(super) entering: Option<Entering>,
    /// Whether its next successor is to be started without a scope: with one it came to nothing.
    pub(super) unscoped: bool,
    /// Until when the successor must have taken over.
    pub(super) deadline: Option<Instant>,
    /// Since when it can be used.
    pub(super) live_since: Option<Instant>,
    /// When to start the next successor.
    pub(super) retry_at: Option<Instant>,
    /// When its server was seen dead, in nanoseconds of the monotonic clock.
    pub(super) seen_ns: u64,
    /// Servers that died early.
    pub(super) deaths: Deaths,
    /// Whether no further successor is started unless somebody asks.
    pub(super) lost: bool,
    /// What the last successor said of its failure.
    pub(super) last_error: Option<Refusal>,
    /// People who wait for it to come back.
    pub(super) waiting: Vec<LinkId>,
    /// The hand-over to another program that is under way.
    pub(super) upgrade: Option<Upgrade>,
}

/// A successor that systemd is asked to make a scope for.
#[derive(Debug)]
pub(super) struct Entering {
    /// What it is going to be.
    pub(super) program: PathBuf,
    /// Until when it must be that.
    pub(super) deadline: Instant,
    /// For whom it was started.
    pub(super) aim: Aim,
}

/// Which program a successor is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aim {
    /// The one that served the device.
    Same,
    /// The one of the upgrade that is under way.
    Upgrade,
}

/// A hand-over to another program.
#[derive(Debug)]
pub(super) struct Upgrade {
    /// Who asked for it.
    pub(super) person: LinkId,
    /// When the old server was told to end.
    pub(super) yielded_at: Option<Instant>,
    /// Why it failed, if it did: the old program is being brought back.
    pub(super) error: Option<Refusal>,
    /// The program that is to serve.
    pub(super) program: Option<OwnedFd>,
}

impl Ward {
    /// Takes some files of a parcel; the whole parcel counts once the last ones are here. False
    /// when there are more than any image has.
    pub(super) fn take_parcel(
        &mut self,
        files: Vec<OwnedFd>,
        last: bool,
        files_max: usize,
    ) -> bool {
        self.incoming.extend(files);
        if self.incoming.len() > files_max {
            self.incoming = Vec::new();
            return false;
        }
        if last {
            self.parcel = std::mem::take(&mut self.incoming);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn a_parcel_counts_when_it_is_whole_and_replaces_the_one_before() {
        let mut ward = Ward::default();
        assert!(ward.take_parcel(files(2), false, 5));
        assert_eq!(ward.parcel.len(), 0);
        assert!(ward.take_parcel(files(1), true, 5));
        assert_eq!(ward.parcel.len(), 3);
        assert!(ward.take_parcel(files(1), true, 5));
        assert_eq!(ward.parcel.len(), 1);
        assert!(!ward.take_parcel(files(6), true, 5));
        assert_eq!((ward.parcel.len(), ward.incoming.len()), (1, 0));
    }
}
