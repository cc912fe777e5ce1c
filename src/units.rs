//! Sectors and bytes: the one place where the two meet.
//!
//! Numbers are plain `u64`; the unit is the last word of the name (`start_sector`, `offset_bytes`).
//! Ranges are always half-open. Conversions are checked here, so no other module multiplies by 512.

use std::ops::Range;

/// Bytes in one sector: the unit of LSMT offsets and of ublk requests.
pub const SECTOR_SIZE: u64 = 512;

/// `SECTOR_SIZE` as a shift.
pub const SECTOR_SHIFT: u32 = 9;

/// Bytes in `sectors`, or `None` on overflow.
#[inline]
#[must_use]
pub const fn sectors_to_bytes(sectors: u64) -> Option<u64> {
    sectors.checked_mul(SECTOR_SIZE)
}

/// Whole sectors in `bytes`, or `None` when `bytes` is not a multiple of the sector size.
#[inline]
#[must_use]
pub const fn bytes_to_sectors(bytes: u64) -> Option<u64> {
    if bytes.is_multiple_of(SECTOR_SIZE) { Some(bytes >> SECTOR_SHIFT) } else { None }
}

/// Sectors that lie wholly inside the first `bytes` bytes.
#[inline]
#[must_use]
pub const fn whole_sectors(bytes: u64) -> u64 {
    bytes >> SECTOR_SHIFT
}

/// A slice index from a 64-bit length, or `None` when it does not fit this machine.
#[inline]
#[must_use]
pub fn to_usize(value: u64) -> Option<usize> {
    usize::try_from(value).ok()
}

/// A 64-bit number from a length in memory. Lossless on every target Rust supports.
#[inline]
#[must_use]
pub const fn to_u64(value: usize) -> u64 {
    // A `usize` is never wider than 64 bits on a target with Linux and io_uring.
    value as u64
}

/// `start..start + len`, or `None` on overflow.
#[inline]
#[must_use]
pub const fn range_from(start: u64, len: u64) -> Option<Range<u64>> {
    match start.checked_add(len) {
        Some(end) => Some(start..end),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_whole_sectors_do_not_convert() {
        for (bytes, sectors) in [(0, Some(0)), (512, Some(1)), (513, None), (1, None)] {
            assert_eq!(bytes_to_sectors(bytes), sectors, "{bytes} bytes");
        }
    }

    #[test]
    fn conversions_refuse_to_overflow() {
        assert_eq!(sectors_to_bytes(u64::MAX / 512 + 1), None);
        assert_eq!(range_from(u64::MAX, 1), None);
        assert_eq!(range_from(u64::MAX - 1, 1), Some(u64::MAX - 1..u64::MAX));
    }
}
