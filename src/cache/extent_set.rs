//! A blob cut into extents, and which of them are missing: numbers only.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::{CACHE_EXTENT_BYTES_MAX, CACHE_EXTENT_BYTES_MIN, CACHE_EXTENTS_MAX};
use std::ops::Range;

/// The extents of one blob: all of one size but the last, which ends with the blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extents {
    blob_bytes: u64,
    extent_bytes: u64,
}

impl Extents {
    /// Cuts a blob.
    ///
    /// # Errors
    /// `Unsupported` for an extent size that is no power of two within the limits, or for more than
    /// [`CACHE_EXTENTS_MAX`] extents.
    pub fn new(blob_bytes: u64, extent_bytes: u64) -> Result<Self> {
        let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, message));
        let sizes = CACHE_EXTENT_BYTES_MIN..=CACHE_EXTENT_BYTES_MAX;
        if !extent_bytes.is_power_of_two() || !sizes.contains(&extent_bytes) {
            return refuse(format!("extents of {extent_bytes} bytes, expected {sizes:?}"));
        }
        let this = Self { blob_bytes, extent_bytes };
        if this.count() > CACHE_EXTENTS_MAX {
            let count = this.count();
            return refuse(format!("a blob of {count} extents, at most {CACHE_EXTENTS_MAX}"));
        }
        Ok(this)
    }

    /// Bytes of the blob.
    #[must_use]
    pub const fn blob_bytes(&self) -> u64 {
        self.blob_bytes
    }

    /// Bytes of every extent but the last.
    #[must_use]
    pub const fn extent_bytes(&self) -> u64 {
        self.extent_bytes
    }

    /// How many extents there are.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.blob_bytes.div_ceil(self.extent_bytes)
    }

    /// The extents that a range of bytes inside the blob touches.
    #[inline]
    #[must_use]
    pub const fn touched_by(&self, bytes: &Range<u64>) -> Range<u64> {
        let shift = self.extent_bytes.trailing_zeros();
        if bytes.start >= bytes.end {
            return bytes.start >> shift..bytes.start >> shift;
        }
        bytes.start >> shift..((bytes.end - 1) >> shift) + 1
    }

    /// The bytes of the blob that these extents hold.
    #[must_use]
    pub fn bytes_of(&self, extents: &Range<u64>) -> Range<u64> {
        let at = |extent: u64| extent.saturating_mul(self.extent_bytes).min(self.blob_bytes);
        at(extents.start)..at(extents.end)
    }

    /// How many whole extents so many bytes are, one at least.
    #[must_use]
    pub fn in_bytes(&self, bytes: u64) -> u64 {
        (bytes / self.extent_bytes).max(1)
    }
}

/// The first run of neighbours in `within` that are not here, cut to `count_max`.
pub fn next_missing(
    within: Range<u64>,
    count_max: u64,
    is_here: impl Fn(u64) -> bool,
) -> Option<Range<u64>> {
    let start = within.clone().find(|extent| !is_here(*extent))?;
    let most = within.end.min(start.saturating_add(count_max.max(1)));
    let end = (start..most).find(|extent| is_here(*extent)).unwrap_or(most);
    Some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_and_extents_convert_at_every_edge() {
        let extents = Extents::new(10_000, 4096).unwrap();
        assert_eq!(extents.count(), 3);
        for (bytes, touched, whole) in [
            (0..1, 0..1, 0..4096),
            (4095..4096, 0..1, 0..4096),
            (4095..4097, 0..2, 0..8192),
            (8192..10_000, 2..3, 8192..10_000),
            (0..10_000, 0..3, 0..10_000),
            (4096..4096, 1..1, 4096..4096),
        ] {
            assert_eq!(extents.touched_by(&bytes), touched, "{bytes:?}");
            assert_eq!(extents.bytes_of(&touched), whole, "{touched:?}");
        }
        assert_eq!(Extents::new(0, 4096).unwrap().count(), 0);
    }

    #[test]
    fn sizes_that_nobody_writes_are_refused() {
        for (blob, extent) in [(1, 0), (1, 2048), (1, 4097), (1, 1 << 22), (u64::MAX, 4096)] {
            let error = Extents::new(blob, extent).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{blob} {extent}");
        }
    }

    proptest! {
        #[test]
        fn missing_runs_are_what_a_bitmap_says(
            here in prop::collection::vec(any::<bool>(), 0..40),
            from in 0_usize..40,
            count_max in 0_u64..9,
        ) {
            let end = u64::try_from(here.len()).unwrap();
            let from = u64::try_from(from).unwrap().min(end);
            let is_here = |extent: u64| here[usize::try_from(extent).unwrap()];
            let mut at = from;
            let mut missing = Vec::new();
            while let Some(run) = next_missing(at..end, count_max, is_here) {
                prop_assert!(run.start < run.end && run.end - run.start <= count_max.max(1));
                missing.extend(run.clone());
                at = run.end;
            }
            let naive: Vec<u64> = (from..end).filter(|extent| !is_here(*extent)).collect();
            prop_assert_eq!(missing, naive);
        }
    }
}
