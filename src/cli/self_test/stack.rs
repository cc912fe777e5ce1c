//! The bundled image: a disk of 16 MiB in four layers, one of each way of storing, made anew each
//! time from nothing but arithmetic. What it must read as is a digest in this file, which a naive
//! model in the tests arrives at without any of the code that is tested here.

use crate::error::{Error, Result};
use crate::format::lsmt::{SegmentMapping, write_sealed};
use crate::format::zfile::{self, Algorithm, WriteOptions};
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Sectors of the disk.
pub(super) const SECTORS: u64 = 32 * 1024;

/// SHA-256 of the whole disk.
pub(super) const SHA256: &str = "e682a35acedc7bfaf000214b46a2e9225741458308892f5170b0bb8123b9d2ca";

/// What one layer does to the disk: writes, and ranges that it makes zeros, each from its first
/// sector to the one behind its last. Ascending, disjoint.
struct Plan {
    name: &'static str,
    writes: &'static [(u64, u64)],
    zeros: &'static [(u64, u64)],
    /// How it is compressed, if it is, and whether a tar is around it.
    zfile: Option<(Algorithm, u32)>,
    tar: bool,
}

/// Lowest first. Edges lie within blocks, at their borders and at the ends of the disk.
const PLANS: [Plan; 4] = [
    Plan {
        name: "raw",
        writes: &[(0, 2048), (30_000, 30_008)],
        zeros: &[],
        zfile: None,
        tar: false,
    },
    Plan {
        name: "lz4",
        writes: &[(100, 1001), (29_999, 30_001)],
        zeros: &[(1500, 1600)],
        zfile: Some((Algorithm::Lz4, 4096)),
        tar: false,
    },
    Plan {
        name: "zstd",
        writes: &[(900, 1200), (5000, 5128)],
        zeros: &[(0, 8)],
        zfile: Some((Algorithm::Zstd, 65536)),
        tar: false,
    },
    Plan {
        name: "tar",
        writes: &[(7, 9), (1999, 2001), (32_767, 32_768)],
        zeros: &[(5001, 5004)],
        zfile: Some((Algorithm::Lz4, 16384)),
        tar: true,
    },
];

/// The bytes that a layer writes to a sector: half of it compresses, half does not, and no two
/// sectors of any layers are alike.
fn content(layer: usize, sector: u64) -> Vec<u8> {
    let mut word = ((to_u64(layer) + 1) << 40) | (sector + 1);
    let mut bytes = Vec::with_capacity(512);
    for index in 0..32_u64 {
        bytes.extend_from_slice(&(word ^ (index & 3)).to_le_bytes());
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.extend_from_slice(&sector.to_le_bytes());
    }
    bytes
}

/// Writes the layers and their config into `folder`; returns the config's path.
pub(super) fn write(folder: &Path) -> Result<PathBuf> {
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        let written = std::fs::write(&path, bytes);
        written.map_err(|error| Error::io(format!("write {}", path.display()), &error))?;
        Ok(path)
    };
    let mut lowers = Vec::new();
    for (number, plan) in PLANS.iter().enumerate() {
        lowers.push(json!({"file": put(plan.name, &layer(number, plan)?)?}));
    }
    let config = json!({"repoBlobUrl": "", "lowers": lowers, "upper": {}, "resultFile": ""});
    put("config.v1.json", config.to_string().as_bytes())
}

/// The file of one layer.
fn layer(number: usize, plan: &Plan) -> Result<Vec<u8>> {
    let mut segments = Vec::new();
    let mut data = Vec::new();
    for &(start, end) in plan.writes {
        segments.push(SegmentMapping {
            start_sector: start,
            sectors: end - start,
            mapped_sector: 8 + to_u64(data.len()) / SECTOR_SIZE,
            zeroed: false,
            tag: 0,
        });
        (start..end).for_each(|sector| data.extend_from_slice(&content(number, sector)));
    }
    for &(start, end) in plan.zeros {
        segments.push(SegmentMapping {
            start_sector: start,
            sectors: end - start,
            // Unused, but within the data, as the reference writes it.
            mapped_sector: 8,
            zeroed: true,
            tag: 0,
        });
    }
    segments.sort_by_key(|segment| segment.start_sector);
    let mut file = write_sealed(&segments, &data, SECTORS * SECTOR_SIZE);
    if let Some((algorithm, block_bytes)) = plan.zfile {
        file = zfile::write(
            &file,
            &WriteOptions { algorithm, block_bytes, ..WriteOptions::default() },
        )?;
    }
    Ok(if plan.tar { in_tar(&file) } else { file })
}

/// The payload as the one member of a tar.
fn in_tar(payload: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 512;
    let mut header = [0_u8; BLOCK];
    let mut put = |at: usize, text: &[u8]| {
        if let Some(field) = header.get_mut(at..at + text.len()) {
            field.copy_from_slice(text);
        }
    };
    put(0, b"overlaybd.commit");
    put(100, b"0000444\0");
    put(124, format!("{:011o}\0", payload.len()).as_bytes());
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    if let Some(field) = header.get_mut(148..156) {
        field.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    let mut tar = header.to_vec();
    tar.extend_from_slice(payload);
    // Padding, and the two blocks that end an archive.
    tar.resize(tar.len().next_multiple_of(BLOCK) + 2 * BLOCK, 0);
    tar
}

/// Bytes of the disk.
pub(super) fn disk_bytes() -> usize {
    to_usize(SECTORS * SECTOR_SIZE).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::sha256;
    use super::*;

    #[test]
    fn the_digest_is_that_of_the_disk_painted_sector_by_sector() {
        let mut disk = vec![0; disk_bytes()];
        let at = |sector: u64| {
            let start = usize::try_from(sector).unwrap() * 512;
            start..start + 512
        };
        for (number, plan) in PLANS.iter().enumerate() {
            for sector in plan.writes.iter().flat_map(|&(start, end)| start..end) {
                disk[at(sector)].copy_from_slice(&content(number, sector));
            }
            for sector in plan.zeros.iter().flat_map(|&(start, end)| start..end) {
                disk[at(sector)].fill(0);
            }
        }
        assert_eq!(sha256(&disk), SHA256);
    }

    #[test]
    fn every_layer_is_stored_as_its_plan_says() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        for plan in &PLANS {
            let source = crate::source::Source::open(&folder.path().join(plan.name)).unwrap();
            let payload = crate::image::Payload::open(source).unwrap();
            assert_eq!(payload.wrapping().tar, plan.tar, "{}", plan.name);
            let found =
                payload.zfile().map(|part| (part.header.algorithm, part.header.block_bytes));
            assert_eq!(found, plan.zfile, "{}", plan.name);
        }
    }
}
