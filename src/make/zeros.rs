//! Finding zeros in data that was read. Pure.

use crate::units::{SECTOR_SIZE, to_usize};

/// Consecutive sectors of one part of a piece, all zeros or to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) sectors: u64,
    pub(super) is_zero: bool,
}

static ZEROS: [u8; 4096] = [0; 4096];

/// Appends the stretches of `data`, whole sectors from `start_sector` of the disk on. A granule (a
/// run of so many sectors of the disk, on a boundary of them, cut off where `data` begins or ends)
/// is zero when all of it is.
pub(super) fn find(
    data: &[u8],
    start_sector: u64,
    granule_sectors: Option<u64>,
    stretches: &mut Vec<Stretch>,
) {
    let sector_bytes = to_usize(SECTOR_SIZE).unwrap_or(1);
    let Some(granule) = granule_sectors.and_then(to_usize) else {
        let sectors = crate::units::to_u64(data.len() / sector_bytes);
        stretches.push(Stretch { sectors, is_zero: false });
        return;
    };
    let first = stretches.len();
    let into = to_usize(start_sector).unwrap_or(0) % granule;
    let (mut rest, mut len) = (data, (granule - into) * sector_bytes);
    while !rest.is_empty() {
        let (block, after) = rest.split_at(len.min(rest.len()));
        let sectors = crate::units::to_u64(block.len() / sector_bytes);
        let is_zero = ZEROS.get(..block.len()).is_some_and(|zeros| block == zeros);
        match stretches.get_mut(first..).and_then(<[Stretch]>::last_mut) {
            Some(last) if last.is_zero == is_zero => last.sectors += sectors,
            _ => stretches.push(Stretch { sectors, is_zero }),
        }
        (rest, len) = (after, granule * sector_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(sectors: &[u8], start_sector: u64, granule: Option<u64>) -> Vec<(u64, bool)> {
        let data: Vec<u8> = sectors.iter().flat_map(|&byte| [byte; 512]).collect();
        let mut stretches = Vec::new();
        find(&data, start_sector, granule, &mut stretches);
        stretches.iter().map(|stretch| (stretch.sectors, stretch.is_zero)).collect()
    }

    #[test]
    fn whole_granules_of_the_disk_are_zero_or_kept() {
        let none: Vec<(u64, bool)> = Vec::new();
        assert_eq!(found(&[], 0, Some(8)), none);
        assert_eq!(found(&[0; 20], 0, None), [(20, false)]);
        assert_eq!(found(&[0; 20], 3, Some(8)), [(20, true)]);
        // Sectors 6 and 7 end a granule, 8 to 15 are the next, 16 begins a third.
        assert_eq!(
            found(&[0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], 6, Some(8)),
            [(2, true), (8, false), (1, true)]
        );
        assert_eq!(
            found(&[0, 1, 1, 0, 0, 1], 7, Some(1)),
            [(1, true), (2, false), (2, true), (1, false)]
        );
        assert_eq!(found(&[1, 0, 0, 0, 0, 0, 0, 0], 8, Some(8)), [(8, false)]);
    }
}
