//! The locks and atomics of what `tests/cache_interleavings.rs` runs in every order: it takes those
//! files with a model checker's in place of these.

pub(super) use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
pub(super) use std::sync::{Condvar, Mutex, MutexGuard};
