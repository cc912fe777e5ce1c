//! The sidecar of a blob that is here in part: a header, then one record for each extent. Bytes in,
//! values out; `format-spec/cache.md` has the tables.
//!
//! Nothing here is ordered against the data by a sync, so a record proves nothing by being there:
//! it says which checksum the extent must have, and it carries a checksum of its own over its
//! place, its meaning and the file's salt, so that a torn, stale or foreign one is no record.

use super::digest::BlobDigest;
use super::extent_set::Extents;
use crate::error::{Error, ErrorKind, Result};
use twox_hash::XxHash3_64;

/// Bytes in front of the first record.
pub const HEADER_BYTES: u64 = 4096;

/// Bytes of the header that mean something.
pub const HEADER_USED_BYTES: usize = 72;

/// Bytes of one record.
pub const RECORD_BYTES: usize = 16;

const MAGIC: [u8; 8] = *b"OBDCACHE";
const VERSION: u32 = 1;

const KIND_FILLED: u64 = 1;
const KIND_QUARANTINED: u64 = 2;

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The blob.
    pub digest: BlobDigest,
    /// Its length and how it is cut.
    pub extents: Extents,
    /// A random number of this pair of files, mixed into every checksum in it: what an older pair
    /// left on the same blocks of the disk does not count.
    pub salt: u64,
}

/// What is known of one extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// It was never filled.
    Empty,
    /// Not a record: torn, or of another place or file. Counts as empty.
    Torn,
    /// It was written; its bytes have this checksum, or are not believed.
    Filled(u64),
    /// Its bytes were found bad so many times since it was last filled.
    Quarantined(u64),
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_USED_BYTES] {
        let mut bytes = [0; HEADER_USED_BYTES];
        let extent_bytes = u32::try_from(self.extents.extent_bytes()).unwrap_or(0);
        let parts: [&[u8]; 6] = [
            &MAGIC,
            &VERSION.to_le_bytes(),
            &extent_bytes.to_le_bytes(),
            &self.extents.blob_bytes().to_le_bytes(),
            self.digest.as_bytes(),
            &self.salt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        let (covered, check) = bytes.split_at_mut(HEADER_USED_BYTES - 8);
        check.copy_from_slice(&XxHash3_64::oneshot(covered).to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `InvalidFormat` for another magic, `Unsupported` for another version or size of extents,
    /// `Integrity` for a checksum that does not match.
    pub fn decode(bytes: &[u8; HEADER_USED_BYTES]) -> Result<Self> {
        let mut rest: &[u8] = bytes;
        let magic = take::<8>(&mut rest);
        if magic != MAGIC {
            let found = format!("{magic:02x?}");
            let kind = ErrorKind::InvalidFormat;
            return Err(Error::field(kind, "sidecar magic", 0, found, "OBDCACHE"));
        }
        let (covered, check) = bytes.split_at(HEADER_USED_BYTES - 8);
        let expected = XxHash3_64::oneshot(covered).to_le_bytes();
        if check != expected {
            let found = format!("{check:02x?}");
            let expected = format!("{expected:02x?}");
            let kind = ErrorKind::Integrity;
            return Err(Error::field(kind, "sidecar header checksum", 64, found, expected));
        }
        let version = u32::from_le_bytes(take(&mut rest));
        if version != VERSION {
            let kind = ErrorKind::Unsupported;
            return Err(Error::field(kind, "sidecar version", 8, version, VERSION));
        }
        let extent_bytes = u64::from(u32::from_le_bytes(take(&mut rest)));
        let blob_bytes = u64::from_le_bytes(take(&mut rest));
        let digest = BlobDigest::new(take(&mut rest));
        let salt = u64::from_le_bytes(take(&mut rest));
        Ok(Self { digest, extents: Extents::new(blob_bytes, extent_bytes)?, salt })
    }

    /// Where the record of an extent lies in the file, in bytes.
    #[must_use]
    pub const fn record_at(extent: u64) -> u64 {
        // No overflow: a blob has at most `CACHE_EXTENTS_MAX` extents.
        HEADER_BYTES + extent.saturating_mul(16)
    }

    /// Length of the whole file in bytes.
    #[must_use]
    pub const fn file_bytes(&self) -> u64 {
        Self::record_at(self.extents.count())
    }

    /// The checksum of an extent's bytes.
    #[must_use]
    pub fn checksum(&self, extent: u64, bytes: &[u8]) -> u64 {
        XxHash3_64::oneshot_with_seed(self.salt.wrapping_add(extent), bytes)
    }

    /// The bytes of a record.
    #[must_use]
    pub fn encode_record(&self, extent: u64, record: Record) -> [u8; RECORD_BYTES] {
        let (kind, value) = match record {
            Record::Empty | Record::Torn => return [0; RECORD_BYTES],
            Record::Filled(checksum) => (KIND_FILLED, checksum),
            Record::Quarantined(times) => (KIND_QUARANTINED, times),
        };
        let mut bytes = [0; RECORD_BYTES];
        let (first, second) = bytes.split_at_mut(8);
        first.copy_from_slice(&value.to_le_bytes());
        second.copy_from_slice(&self.record_check(extent, kind, value).to_le_bytes());
        bytes
    }

    /// Reads a record. Never fails: what is none is [`Record::Torn`].
    #[must_use]
    pub fn decode_record(&self, extent: u64, bytes: &[u8; RECORD_BYTES]) -> Record {
        if *bytes == [0; RECORD_BYTES] {
            return Record::Empty;
        }
        let mut rest: &[u8] = bytes;
        let value = u64::from_le_bytes(take(&mut rest));
        let check = u64::from_le_bytes(take(&mut rest));
        if check == self.record_check(extent, KIND_FILLED, value) {
            return Record::Filled(value);
        }
        if check == self.record_check(extent, KIND_QUARANTINED, value) {
            return Record::Quarantined(value);
        }
        Record::Torn
    }

    fn record_check(&self, extent: u64, kind: u64, value: u64) -> u64 {
        let mut covered = [0; 24];
        let words = [value, extent, kind].map(u64::to_le_bytes);
        for (to, from) in covered.iter_mut().zip(words.as_flattened()) {
            *to = *from;
        }
        XxHash3_64::oneshot_with_seed(self.salt, &covered)
    }
}

/// The next `N` bytes; zeros where there are none left, which no caller meets: all have counted.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((first, more)) = rest.split_first_chunk::<N>() else { return [0; N] };
    *rest = more;
    *first
}

const _: () = assert!(HEADER_USED_BYTES == 8 + 4 + 4 + 8 + 32 + 8 + 8);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        let bytes = std::array::from_fn(|at| u8::try_from(at).unwrap());
        let extents = Extents::new(300_000, 128 << 10).unwrap();
        Header { digest: BlobDigest::new(bytes), extents, salt: 0x0807_0605_0403_0201 }
    }

    fn hex(bytes: &[u8]) -> String {
        let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        digits.join("")
    }

    #[test]
    fn the_bytes_of_a_header_and_a_record_are_those_of_the_specification() {
        let header = header();
        let bytes = header.encode();
        assert_eq!(hex(&bytes[..16]), "4f424443414348450100000000000200");
        assert_eq!(hex(&bytes[16..24]), "e093040000000000");
        assert_eq!(hex(&bytes[56..64]), "0102030405060708");
        assert_eq!(hex(&bytes[64..]), "df733b6887b260ca");
        assert_eq!(Header::decode(&bytes).unwrap(), header);
        assert_eq!(header.file_bytes(), 4096 + 3 * 16);
        let record = header.encode_record(1, Record::Filled(header.checksum(1, b"extent")));
        assert_eq!(hex(&record), "004332a2f10898320306fd151eac33c1");
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_refused() {
        let good = header().encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            let kind = Header::decode(&bad).unwrap_err().kind();
            let magic = bit < 64;
            let expected = if magic { ErrorKind::InvalidFormat } else { ErrorKind::Integrity };
            assert_eq!(kind, expected, "bit {bit}");
        }
    }

    #[test]
    fn a_well_made_header_of_a_hostile_size_is_refused() {
        let sizes = [(0_u32, 1_u64), (4097, 1), (1 << 31, 1), (4096, u64::MAX), (4096, 1 << 50)];
        for (extent_bytes, blob_bytes) in sizes {
            let mut bytes = header().encode();
            bytes[12..16].copy_from_slice(&extent_bytes.to_le_bytes());
            bytes[16..24].copy_from_slice(&blob_bytes.to_le_bytes());
            let check = XxHash3_64::oneshot(&bytes[..64]);
            bytes[64..].copy_from_slice(&check.to_le_bytes());
            let error = Header::decode(&bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{extent_bytes} {blob_bytes}");
        }
    }

    #[test]
    fn a_record_counts_in_its_place_and_its_file_only() {
        let header = header();
        for record in [Record::Filled(7), Record::Filled(0), Record::Quarantined(1)] {
            let bytes = header.encode_record(2, record);
            assert_eq!(header.decode_record(2, &bytes), record);
            assert_eq!(header.decode_record(1, &bytes), Record::Torn);
            let other = Header { salt: header.salt + 1, ..header };
            assert_eq!(other.decode_record(2, &bytes), Record::Torn);
            for cut in 1..RECORD_BYTES {
                let mut torn = [0; RECORD_BYTES];
                torn[..cut].copy_from_slice(&bytes[..cut]);
                if torn != bytes {
                    let found = header.decode_record(2, &torn);
                    assert!(matches!(found, Record::Torn | Record::Empty), "{cut}: {found:?}");
                }
            }
        }
        assert_eq!(header.decode_record(0, &[0; RECORD_BYTES]), Record::Empty);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoders_panic(
            bytes in prop::array::uniform32(any::<u8>()),
            extent in any::<u64>(),
        ) {
            let mut long = [0; HEADER_USED_BYTES];
            long[..32].copy_from_slice(&bytes);
            prop_assert!(Header::decode(&long).is_err());
            let (first, _) = bytes.as_chunks::<RECORD_BYTES>();
            let found = header().decode_record(extent, &first[0]);
            let nothing = matches!(found, Record::Torn | Record::Empty);
            prop_assert!(nothing, "{:?}", found);
        }
    }
}
