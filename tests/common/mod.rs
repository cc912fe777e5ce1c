//! What several integration tests share. Each test file says `mod common;` and uses a part of it.

// Every test file is its own crate and none uses everything.
#![allow(dead_code)]
// Helpers are outside `#[test]` functions, where clippy.toml allows these; failing loudly is
// their job all the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub(crate) mod golden;
pub(crate) mod oci_layout;
pub(crate) mod vectors;

/// How many bytes on the disk the files have that a process has open somewhere below `folder`.
pub(crate) fn written_below(process_id: u32, folder: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(format!("/proc/{process_id}/fd")).into_iter().flatten().flatten();
    let below = files.filter(|file| {
        std::fs::read_link(file.path()).is_ok_and(|target| target.starts_with(folder))
    });
    below
        .filter_map(|file| std::fs::metadata(file.path()).ok())
        .map(|file| file.blocks() * 512)
        .sum()
}
