//! Where a test makes the cache's disk fail.

use std::fmt;
use std::io;

/// An operation on the cache's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskStep {
    /// The files of a blob are opened, or made.
    Open,
    /// Records are read.
    ReadRecords,
    /// An extent is read to be checked.
    ReadData,
    /// An extent is written.
    WriteData,
    /// Records are written.
    WriteRecords,
    /// A complete blob is made durable.
    Sync,
    /// A complete blob gets its name as a plain file.
    Link,
}

/// Asked in front of every operation on the cache's disk but those of hits, which are none. Nobody
/// has one but tests.
pub trait DiskFaults: Send + Sync + fmt::Debug {
    /// What the operation answers instead of being done.
    ///
    /// # Errors
    /// What the disk is to say.
    fn before(&self, step: DiskStep) -> io::Result<()>;
}

/// Asks `faults`, if there are any.
pub(super) fn allow(faults: Option<&dyn DiskFaults>, step: DiskStep) -> io::Result<()> {
    faults.map_or(Ok(()), |faults| faults.before(step))
}
