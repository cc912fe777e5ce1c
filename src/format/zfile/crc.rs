//! The checksums of the format: CRC-32C without the usual inversions at the ends.

/// Seed of header digests and of the jump table's checksum.
pub const STRUCTURE_SEED: u32 = 0;

/// Seed of every block's checksum; the reference calls it a well-known prime.
pub const BLOCK_SEED: u32 = 100_007;

/// Bytes that a block's checksum takes after the compressed body.
pub const BLOCK_CRC_BYTES: usize = 4;

/// Raw CRC-32C (polynomial 0x82F63B78, reflected) of `bytes`, going on from `seed`.
#[inline]
#[must_use]
pub fn crc32c_raw(seed: u32, bytes: &[u8]) -> u32 {
    // The library inverts before and after; inverting its input and output takes that back.
    !crc32c::crc32c_append(!seed, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_raw_checksum_has_no_inversion_at_its_ends() {
        assert_eq!(crc32c_raw(0, b""), 0);
        assert_eq!(crc32c_raw(0, &[0; 64]), 0, "zeros leave a zero seed alone");
        // The textbook check value of "123456789" is 0xE3069283, with both inversions.
        assert_eq!(!crc32c_raw(!0, b"123456789"), 0xE306_9283);
    }
}
