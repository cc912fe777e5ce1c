//! What the fuzz targets share.
//!
//! Contract of every target: errors are fine. A panic, an overflow, a hang or memory beyond the
//! caps that `run` sets is a bug.

// Under the name by which the registry's sources know it.
extern crate url as reqwest;

mod error {
    pub use obd_ublk::error::*;
}

mod limits {
    pub use obd_ublk::limits::*;
}

mod units {
    pub use obd_ublk::units::*;
}

pub mod registry;

/// Raw CRC-32C of the zfile format: no inversion at the ends.
fn crc_raw(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap()))
}

/// Makes the checksums of a zfile right again after a mutation, so that the fuzzer gets past
/// them: the jump table's, and the digests of header and trailer. Leaves other files alone.
pub fn repair_zfile(bytes: &mut [u8]) {
    if bytes.len() < 1024 || !bytes.starts_with(b"ZFile\0\x01\0") {
        return;
    }
    let trailer_at = bytes.len() - 512;
    for at in [0, trailer_at] {
        let start = u64_at(bytes, at + 40) as usize;
        let len = (u64_at(bytes, at + 48) as usize).saturating_mul(4);
        if let Some(table) = start.checked_add(len).and_then(|end| bytes.get(start..end)) {
            let crc = crc_raw(0, table);
            bytes[at + 64..at + 68].copy_from_slice(&crc.to_le_bytes());
        }
        bytes[at + 28..at + 32].fill(0);
        let digest = crc_raw(0, &bytes[at..at + 512]);
        bytes[at + 28..at + 32].copy_from_slice(&digest.to_le_bytes());
    }
}
