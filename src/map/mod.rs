//! Addresses: which layer holds each sector of the virtual disk.
//!
//! ```text
//!   index of each layer --> paint --> runs (top wins, joined) --> FlatMap --> extents of a request
//! ```
//!
//! [`paint`](paint::paint) runs once, at open; it costs O(n log n) in the index entries of all
//! layers. [`FlatMap`] is what every read asks; a lookup is one table access and a search inside
//! one bucket, whatever the number of layers, and planning a request allocates nothing. Pure: no
//! I/O, no locks, no `unsafe`. [`UpperMap`] is the other kind: the map of a writable upper, which
//! changes with every write.

mod flat;
mod paint;
mod stored;
mod upper_map;

#[cfg(test)]
mod tests;

pub use flat::{Extent, Extents, FlatMap};
pub use paint::{Run, Stroke, paint, paint_with_seams};
pub use upper_map::{Content, Stretch, UpperMap};

/// Where the bytes of a run come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The sectors read as zeros.
    Zero,
    /// The sectors lie in a layer's file, one after the other.
    Data {
        /// Position of the layer in the stack; 0 is the bottom.
        layer: u16,
        /// First sector, counted from the start of the layer's LSMT file.
        sector: u64,
    },
}

impl Target {
    /// The target `sectors` further on.
    #[must_use]
    pub fn advanced(self, sectors: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Data { layer, sector } => Self::Data { layer, sector: sector + sectors },
        }
    }

    /// Whether a run of `sectors` at `self` goes on at `next` without a seam.
    fn continues_at(self, sectors: u64, next: Self) -> bool {
        self.advanced(sectors) == next
    }
}
