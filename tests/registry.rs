//! Registries and what can go wrong with them: right bytes or a clear error, within the deadline,
//! with a bounded number of requests, and no secret told.
//!
//! The faults are rows 5 to 10 of our fault matrix, and the tests are named by them: 5 credentials
//! and redirects (`access`, `refusals`, `stores`, `sources`), 6 what is not there, 7 trouble that
//! passes (`faults`, and `holds` for those who ask to be left alone), 8 answers that lie (`faults`,
//! and `heads` for what the mock does not say), 10 what is slow or cannot be reached (`reach`).
//! Row 9, bytes that are wrong in content, is the codec's checksums' to notice, and the cache's to
//! fetch again; where a mirror is to blame for them, past it (`liars`).

#![cfg(feature = "registry")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "registry/access.rs"]
mod access;
#[path = "registry/chaos.rs"]
mod chaos;
#[path = "registry/faults.rs"]
mod faults;
#[path = "registry/heads.rs"]
mod heads;
#[path = "registry/holds.rs"]
mod holds;
#[path = "registry/images.rs"]
mod images;
#[path = "registry/lab.rs"]
mod lab;
#[path = "registry/liars.rs"]
mod liars;
#[path = "../tools/mock-registry/mod.rs"]
mod mock;
#[path = "registry/reach.rs"]
mod reach;
#[path = "registry/refusals.rs"]
mod refusals;
#[path = "registry/sources.rs"]
mod sources;
#[path = "registry/stores.rs"]
mod stores;
