//! What several integration tests share. Each test file says `mod common;` and uses a part of it.

// Every test file is its own crate and none uses everything.
#![allow(dead_code)]
// Helpers are outside `#[test]` functions, where clippy.toml allows these; failing loudly is
// their job all the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub(crate) mod golden;
pub(crate) mod oci_layout;
pub(crate) mod vectors;
