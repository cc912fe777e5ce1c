//! The few blocks that a reader decoded last, for requests that want only part of one.
//!
//! A request that covers a whole compression block is decoded straight into its buffer and never
//! comes here. Parts do: a 4 KiB read of a 64 KiB block, or the two halves of a block that a
//! request's edges cut. Direct-mapped: a block has one place, a collision costs one decode.

use crate::units::{to_u64, to_usize};

/// Blocks kept per reader: 512 KiB at the largest block size, so that eight sequential streams on
/// one queue each find the block they stopped in.
const SLOT_COUNT: usize = 8;

/// A decoded block, or the front of one.
#[derive(Debug)]
struct Slot {
    layer: u16,
    block: u64,
    // How many bytes from the front are decoded; 0 is an empty slot.
    valid_bytes: usize,
}

/// See the module text.
#[derive(Debug)]
pub(super) struct BlockCache {
    slots: [Slot; SLOT_COUNT],
    memory: Box<[u8]>,
    block_bytes_max: usize,
}

/// What the cache knows of a block.
pub(super) enum Found<'a> {
    /// The wanted bytes.
    Hit(&'a [u8]),
    /// Room for the block; whether its front was wanted before.
    Miss { room: &'a mut [u8], seen_before: bool },
}

impl BlockCache {
    /// Memory for blocks of up to `block_bytes_max`, touched only when used.
    pub(super) fn new(block_bytes_max: usize) -> Self {
        let slots = [const { Slot { layer: 0, block: 0, valid_bytes: 0 } }; SLOT_COUNT];
        let memory = vec![0; block_bytes_max.saturating_mul(SLOT_COUNT)].into_boxed_slice();
        Self { slots, memory, block_bytes_max }
    }

    fn index_of(layer: u16, block: u64) -> usize {
        let mixed = block.wrapping_add(u64::from(layer).wrapping_mul(3));
        to_usize(mixed % to_u64(SLOT_COUNT)).unwrap_or(0)
    }

    /// Looks for the first `wanted` bytes of a block. On a miss the slot is emptied and its memory
    /// handed out; [`BlockCache::filled`] makes it valid.
    pub(super) fn find(&mut self, layer: u16, block: u64, wanted: usize) -> Found<'_> {
        let index = Self::index_of(layer, block);
        let start = index * self.block_bytes_max;
        let room = &mut self.memory[start..start + self.block_bytes_max];
        let slot = &mut self.slots[index];
        let seen_before = slot.valid_bytes > 0 && slot.layer == layer && slot.block == block;
        if seen_before && slot.valid_bytes >= wanted {
            return Found::Hit(&room[..wanted]);
        }
        *slot = Slot { layer, block, valid_bytes: 0 };
        Found::Miss { room, seen_before }
    }

    /// Declares the first `valid_bytes` of the block decoded, after a miss.
    pub(super) fn filled(&mut self, layer: u16, block: u64, valid_bytes: usize) {
        let slot = &mut self.slots[Self::index_of(layer, block)];
        debug_assert!(slot.layer == layer && slot.block == block, "find came first");
        slot.valid_bytes = valid_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(cache: &mut BlockCache, layer: u16, block: u64, byte: u8, valid: usize) -> bool {
        let Found::Miss { room, seen_before } = cache.find(layer, block, valid) else {
            panic!("a hit where a miss was expected");
        };
        room[..valid].fill(byte);
        cache.filled(layer, block, valid);
        seen_before
    }

    #[test]
    fn a_block_is_found_until_another_takes_its_place() {
        let mut cache = BlockCache::new(64);
        assert!(!fill(&mut cache, 1, 5, 0xaa, 64));
        assert!(matches!(cache.find(1, 5, 64), Found::Hit(bytes) if bytes == [0xaa; 64]));
        assert!(!fill(&mut cache, 1, 5 + 8, 0xbb, 64), "same place, other block");
        assert!(!fill(&mut cache, 1, 5, 0xcc, 64), "gone");
        assert!(!fill(&mut cache, 2, 5, 0xdd, 64), "another layer's block of the same number");
        assert!(matches!(cache.find(2, 5, 64), Found::Hit(bytes) if bytes == [0xdd; 64]));
    }

    #[test]
    fn more_than_the_decoded_front_is_a_miss_that_says_it_was_seen() {
        let mut cache = BlockCache::new(64);
        assert!(!fill(&mut cache, 0, 0, 1, 16));
        assert!(matches!(cache.find(0, 0, 16), Found::Hit(_)));
        assert!(fill(&mut cache, 0, 0, 2, 64), "seen before");
        assert!(matches!(cache.find(0, 0, 60), Found::Hit(bytes) if bytes == [2; 60]));
    }

    #[test]
    fn a_block_whose_decoding_failed_is_not_found() {
        let mut cache = BlockCache::new(64);
        assert!(matches!(cache.find(0, 3, 8), Found::Miss { .. }));
        assert!(matches!(cache.find(0, 3, 8), Found::Miss { seen_before: false, .. }));
    }
}
