//! The merged map as bytes, for a process that takes over an image (`format::parcel`).
//!
//! ```text
//!   | start sector u64, target u64 | ... | sectors of the disk u64 |
//! ```
//!
//! An entry ends where the next one starts; the target is the map's own packed word. What comes
//! back is not believed: it is checked entry by entry and built anew.

use super::flat::{FlatMap, Packed};
use super::{Run, Target};
use crate::error::{Error, Result};
use crate::units::to_u64;

const WORD_BYTES: usize = 8;

impl FlatMap {
    /// The map as bytes: 16 for each entry and 8 more.
    #[must_use]
    pub fn to_stored(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity((self.entry_count() * 2 + 1) * WORD_BYTES);
        for extent in self.extents(0, u64::MAX) {
            // Every target came out of a packed word.
            let packed = Packed::pack(extent.target).unwrap_or(Packed::ZERO);
            bytes.extend_from_slice(&extent.start_sector.to_le_bytes());
            bytes.extend_from_slice(&packed.0.to_le_bytes());
        }
        bytes.extend_from_slice(&self.virtual_sectors().to_le_bytes());
        bytes
    }

    /// The map that [`FlatMap::to_stored`] made `bytes` of. `layer_sectors` tells for each layer
    /// how many sectors it has.
    ///
    /// # Errors
    /// `Corrupt` when the entries are out of order or leave a gap, when one names a layer or
    /// sectors that do not exist, and as [`FlatMap::build`].
    pub fn from_stored(bytes: &[u8], layer_sectors: &[u64]) -> Result<Self> {
        let (words, rest) = bytes.as_chunks::<WORD_BYTES>();
        let Some((end, entries)) = words.split_last().filter(|_| rest.is_empty()) else {
            return Err(corrupt(0, format!("{} bytes", bytes.len()), "whole entries and a size"));
        };
        let virtual_sectors = u64::from_le_bytes(*end);
        let (entries, odd) = entries.as_chunks::<2>();
        if !odd.is_empty() || entries.is_empty() != (virtual_sectors == 0) {
            let found = format!("{} bytes for {virtual_sectors} sectors", bytes.len());
            return Err(corrupt(0, found, "whole entries that cover the disk"));
        }
        let mut runs = Vec::with_capacity(entries.len());
        let starts = entries.iter().skip(1).map(|entry| u64::from_le_bytes(entry[0]));
        let ends = starts.chain([virtual_sectors]);
        let mut here = 0;
        for (number, (entry, end_sector)) in entries.iter().zip(ends).enumerate() {
            let start_sector = u64::from_le_bytes(entry[0]);
            if start_sector != here || end_sector <= start_sector {
                let found = format!("{start_sector}..{end_sector}");
                return Err(corrupt(number, found, "sectors that go on from the entry before"));
            }
            let target = Packed(u64::from_le_bytes(entry[1])).unpack_at(0);
            check_target(number, target, end_sector - start_sector, layer_sectors)?;
            runs.push(Run { start_sector, end_sector, target });
            here = end_sector;
        }
        Self::build(&runs, virtual_sectors)
    }
}

fn check_target(number: usize, target: Target, sectors: u64, layer_sectors: &[u64]) -> Result<()> {
    let Target::Data { layer, sector } = target else { return Ok(()) };
    let Some(&have) = layer_sectors.get(usize::from(layer)) else {
        let expected = format!("less than {}", layer_sectors.len());
        return Err(corrupt(number, format!("layer {layer}"), expected));
    };
    if sector.checked_add(sectors).is_none_or(|end| end > have) {
        let found = format!("{sectors} sectors from {sector} of layer {layer}");
        return Err(corrupt(number, found, format!("at most {have}")));
    }
    Ok(())
}

fn corrupt(number: usize, found: String, expected: impl std::fmt::Display) -> Error {
    let at_byte = to_u64(number * 2 * WORD_BYTES);
    Error::corrupt("stored map: entry", at_byte, found, expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(layer: u16, sector: u64) -> Target {
        Target::Data { layer, sector }
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    const ZERO: u64 = u64::MAX;
    const LAYER_1: u64 = 1 << 48;

    #[test]
    fn a_map_is_stored_as_its_entries_and_its_size() {
        let run = Run { start_sector: 8, end_sector: 16, target: data(1, 40) };
        let map = FlatMap::build(&[run], 100).unwrap();
        let expected = words(&[0, ZERO, 8, LAYER_1 | 40, 16, ZERO, 100]);
        assert_eq!(map.to_stored(), expected);
        assert_eq!(FlatMap::build(&[], 0).unwrap().to_stored(), words(&[0]));
        assert_eq!(FlatMap::from_stored(&words(&[0]), &[]).unwrap().virtual_sectors(), 0);
    }

    #[test]
    fn what_no_map_can_be_is_refused() {
        let layers = [0, 48];
        let good = [0, ZERO, 8, LAYER_1 | 40, 16, ZERO, 100];
        assert!(FlatMap::from_stored(&words(&good), &layers).is_ok());
        let cases: [(&str, Vec<u64>); 11] = [
            ("nothing", vec![]),
            ("a size without entries", vec![100]),
            ("entries without a size", vec![0, ZERO, 0]),
            ("half an entry", vec![0, ZERO, 8, 100]),
            ("not from 0 on", vec![1, ZERO, 100]),
            ("out of order", vec![0, ZERO, 16, ZERO, 8, ZERO, 100]),
            ("an empty entry", vec![0, ZERO, 8, ZERO, 8, ZERO, 100]),
            ("beyond the end", vec![0, ZERO, 100, ZERO, 100]),
            ("a layer that is not there", vec![0, 2 << 48 | 8, 100]),
            ("sectors that are not there", vec![0, ZERO, 8, LAYER_1 | 41, 16, ZERO, 100]),
            ("a disk beyond what can be addressed", vec![0, ZERO, 1 << 51]),
        ];
        for (what, bad) in cases {
            assert!(FlatMap::from_stored(&words(&bad), &layers).is_err(), "{what}");
        }
        let mut torn = words(&good);
        torn.pop();
        assert!(FlatMap::from_stored(&torn, &layers).is_err(), "a torn word");
    }

    proptest! {
        #[test]
        fn a_stored_map_comes_back_as_it_was(
            parts in prop::collection::vec((1_u64..50, 0_u16..4, 8_u64..1000), 0..100),
        ) {
            let mut runs = Vec::new();
            let mut here = 0;
            for (sectors, layer, sector) in parts {
                let target = if layer == 3 { Target::Zero } else { data(layer, sector) };
                runs.push(Run { start_sector: here, end_sector: here + sectors, target });
                here += sectors;
            }
            let map = FlatMap::build(&runs, here).unwrap();
            let stored = map.to_stored();
            let again = FlatMap::from_stored(&stored, &[2000; 3]).unwrap();
            prop_assert_eq!(again.to_stored(), stored);
            prop_assert_eq!(
                again.extents(0, here).collect::<Vec<_>>(),
                map.extents(0, here).collect::<Vec<_>>()
            );
            prop_assert_eq!(again.memory_bytes(), map.memory_bytes());
        }

        #[test]
        fn any_words_are_a_map_or_refused(
            words in prop::collection::vec(0_u64..64, 0..16),
        ) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            if let Ok(map) = FlatMap::from_stored(&bytes, &[64]) {
                let covered: u64 = map.extents(0, u64::MAX).map(|extent| extent.sectors).sum();
                prop_assert_eq!(covered, map.virtual_sectors());
            }
        }
    }
}
