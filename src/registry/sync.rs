//! The lock, channel and tasks of what `tests/registry_interleavings.rs` runs in every order: it
//! takes that file with a model checker's in place of these.

pub(super) use std::sync::Mutex;
pub(super) use tokio::spawn;
pub(super) use tokio::sync::watch;
