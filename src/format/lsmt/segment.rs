//! One index entry: a run of sectors of the virtual disk and where it lies in the layer's file.
//!
//! Sixteen bytes on disk, two little-endian words of bit fields. The index parser decodes them by
//! the million at attach, the writable upper encodes one per write. This file knows the bits of
//! one entry; what a list of entries must obey is [`super::index`].

/// Bits of the first word that hold the start sector.
const START_BITS: u32 = 50;

/// Bits of the second word that hold the mapped sector.
const MAPPED_BITS: u32 = 55;

/// The bit of the second word that says "reads as zeros".
const ZEROED_BIT: u64 = 1 << MAPPED_BITS;

/// The start sector that marks an entry as padding: all 50 bits set.
const PADDING_START_SECTOR: u64 = (1 << START_BITS) - 1;

/// A segment of the virtual disk and its place in the layer's file.
///
/// Ranges are half-open: `[start_sector, start_sector + sectors)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentMapping {
    /// First sector of the virtual disk. Below 2^50 - 1.
    pub start_sector: u64,
    /// Sectors covered: 1 to [`SegmentMapping::SECTORS_MAX`].
    pub sectors: u64,
    /// First sector in the layer's file, header included (data begins at sector 8). Meaningless
    /// but bounded when `zeroed`.
    pub mapped_sector: u64,
    /// The segment reads as zeros and hides what lies below.
    pub zeroed: bool,
    /// On disk: garbage of the writer in ordinary layers. The index parsers set it to 0.
    pub tag: u8,
}

impl SegmentMapping {
    /// Bytes of one entry on disk.
    pub const BYTES: usize = 16;

    /// Longest segment: 14 bits, 8 MiB less one sector.
    pub const SECTORS_MAX: u64 = (1 << 14) - 1;

    /// Highest number that fits the mapped sector.
    pub const MAPPED_SECTOR_MAX: u64 = (1 << MAPPED_BITS) - 1;

    /// The entry that fills up an index and maps nothing.
    pub const PADDING: [u8; Self::BYTES] =
        [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    /// The entry in `bytes`, or `None` when it maps nothing: padding, or a length of zero.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let entry = Self::decode_any(bytes);
        if entry.is_padding() || entry.sectors == 0 { None } else { Some(entry) }
    }

    /// The fields in `bytes`, whatever they say.
    pub(super) fn decode_any(bytes: &[u8; Self::BYTES]) -> Self {
        let [a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, tag] = *bytes;
        let place = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let mapped = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, tag]);
        Self {
            start_sector: place & PADDING_START_SECTOR,
            sectors: place >> START_BITS,
            mapped_sector: mapped & Self::MAPPED_SECTOR_MAX,
            zeroed: mapped & ZEROED_BIT != 0,
            tag,
        }
    }

    /// Whether the start sector marks padding. The other fields do not matter then.
    pub(super) fn is_padding(&self) -> bool {
        self.start_sector == PADDING_START_SECTOR
    }

    /// The entry as it lies on disk.
    ///
    /// # Panics
    /// When a field does not fit its bits. That is a bug of the caller: written out, the excess
    /// would change the neighbouring field and with it somebody's data.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        assert!(self.start_sector < PADDING_START_SECTOR, "start sector fits its 50 bits");
        assert!((1..=Self::SECTORS_MAX).contains(&self.sectors), "length fits its 14 bits");
        assert!(self.mapped_sector <= Self::MAPPED_SECTOR_MAX, "mapped sector fits its 55 bits");
        let place = self.start_sector | self.sectors << START_BITS;
        let mapped = self.mapped_sector
            | u64::from(self.zeroed) << MAPPED_BITS
            | u64::from(self.tag) << (MAPPED_BITS + 1);
        let mut bytes = [0; Self::BYTES];
        let (first, second) = bytes.split_at_mut(Self::BYTES / 2);
        first.copy_from_slice(&place.to_le_bytes());
        second.copy_from_slice(&mapped.to_le_bytes());
        bytes
    }

    /// First sector of the virtual disk behind the segment.
    #[inline]
    #[must_use]
    pub const fn end_sector(&self) -> u64 {
        self.start_sector + self.sectors
    }

    /// First sector of the file behind the mapped data. A zeroed segment has no data, so that is
    /// its mapped sector.
    #[inline]
    #[must_use]
    pub const fn mapped_end_sector(&self) -> u64 {
        if self.zeroed { self.mapped_sector } else { self.mapped_sector + self.sectors }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An entry the reference wrote: sector 0x4afc, 124 sectors, zeroed, mapped to sector 73.
    const DISCARD: [u8; 16] = [0xfc, 0x4a, 0, 0, 0, 0, 0xf0, 0x01, 0x49, 0, 0, 0, 0, 0, 0x80, 0];

    #[test]
    fn an_entry_of_the_reference_decodes_field_by_field() {
        let segment = SegmentMapping {
            start_sector: 0x4afc,
            sectors: 124,
            mapped_sector: 73,
            zeroed: true,
            tag: 0,
        };
        assert_eq!(SegmentMapping::decode(&DISCARD), Some(segment));
        assert_eq!(segment.encode(), DISCARD);
        assert_eq!((segment.end_sector(), segment.mapped_end_sector()), (0x4afc + 124, 73));
    }

    #[test]
    fn every_field_ends_where_the_next_begins() {
        let full = SegmentMapping {
            start_sector: (1 << 50) - 2,
            sectors: SegmentMapping::SECTORS_MAX,
            mapped_sector: SegmentMapping::MAPPED_SECTOR_MAX,
            zeroed: false,
            tag: 0xa5,
        };
        let bytes = full.encode();
        assert_eq!(bytes[..8], [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(bytes[8..], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0xa5]);
        assert_eq!(SegmentMapping { zeroed: true, ..full }.encode()[14], 0xff);
    }

    #[test]
    fn padding_and_zero_length_map_nothing() {
        assert_eq!(SegmentMapping::decode(&SegmentMapping::PADDING), None);
        assert_eq!(SegmentMapping::decode(&[0; 16]), None, "a blank slot");
        assert_eq!(SegmentMapping::decode(&[0xff; 16]), None, "any length and place");
    }

    #[test]
    #[should_panic(expected = "length fits its 14 bits")]
    fn a_length_beyond_its_bits_is_never_written() {
        let _ = SegmentMapping {
            start_sector: 0,
            sectors: 1 << 14,
            mapped_sector: 8,
            zeroed: false,
            tag: 0,
        }
        .encode();
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(bytes in any::<[u8; 16]>()) {
            if let Some(segment) = SegmentMapping::decode(&bytes) {
                prop_assert_eq!(segment.encode(), bytes);
            }
        }
    }
}
