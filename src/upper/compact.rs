//! Compaction: a pair of nothing but what is seen.
//!
//! ```text
//!   before   | live | dead | live | dead | live C |          log of everything ever written
//!   copy     | live | C    | live | dead | live C |          synced; the log still names the old C
//!   commit   the new log takes the old one's name            one rename, folder synced
//!   cut      | live | C    | live |                          of what no durable entry names
//! ```
//!
//! Why in place, and not two new files: two renames have a moment between them in which the index
//! of one pair stands beside the data of another, and whoever opens them then must be able to
//! tell. Here only the index is renamed. Until that is durable the old log is the truth and
//! nothing that it names has changed, for copies go to places that nothing names; from then on the
//! new one is, and all that it names was synced before. A cut at any moment leaves one or the
//! other, and nothing to recover: at worst the file is longer than it needs to be. It takes
//! no room but for the new index, and the data file stays the same file, with its lock.
//! Holes punched into dead space would leave the file as long as before, to which quotas, copies
//! and some file systems hold.

use super::{Compacted, Pair, PairOptions, PairPaths, lock, read};
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::DATA_START_SECTOR;
use crate::limits::UPPER_COPY_BYTES;
use crate::map::{Content, UpperMap};
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use std::ops::Range;
use std::sync::Arc;

/// Data that is to be moved towards the start of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    /// First sector of the virtual disk.
    disk_sector: u64,
    from_sector: u64,
    to_sector: u64,
    sectors: u64,
}

/// What is moved, and where the data file ends then.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    moves: Vec<Move>,
    end_sector: u64,
}

impl Plan {
    /// The plan for what `map` shows: as much as is live behind the place where all of it would end
    /// fits the gaps in front of that place. Where two segments share sectors, which no writer we
    /// know leaves, nothing is moved.
    fn of(map: &UpperMap) -> Self {
        let mut used: Vec<(Range<u64>, u64)> = map
            .pieces()
            .filter_map(|(range, content)| {
                let Content::Data { sector } = content else { return None };
                Some((sector..sector + (range.end - range.start), range.start))
            })
            .collect();
        used.sort_unstable_by_key(|(place, _)| place.start);
        let last = used.iter().map(|(place, _)| place.end).max().unwrap_or(0);
        let shared =
            used.windows(2).any(|two| matches!(two, [(one, _), (next, _)] if next.start < one.end));
        if shared {
            return Self { moves: Vec::new(), end_sector: last.max(DATA_START_SECTOR) };
        }
        let end_sector = DATA_START_SECTOR.saturating_add(map.data_sectors());
        let (mut gaps, mut movers) = (Vec::new(), Vec::new());
        let mut here = DATA_START_SECTOR;
        for (place, disk_sector) in used {
            let gap = here.min(end_sector)..place.start.min(end_sector);
            gaps.extend((gap.start < gap.end).then_some(gap));
            here = place.end;
            let from = place.start.max(end_sector);
            movers.extend((from < place.end).then(|| Move {
                disk_sector: disk_sector + (from - place.start),
                from_sector: from,
                to_sector: 0,
                sectors: place.end - from,
            }));
        }
        // What is read in order lies in order.
        movers.sort_unstable_by_key(|mover| mover.disk_sector);
        Self { moves: fill(&gaps, &movers), end_sector }
    }

    fn moved_sectors(&self) -> u64 {
        self.moves.iter().map(|part| part.sectors).sum()
    }
}

/// The movers, cut where a gap ends.
fn fill(gaps: &[Range<u64>], movers: &[Move]) -> Vec<Move> {
    let mut moves = Vec::new();
    let mut gaps = gaps.iter().cloned();
    let mut gap = 0..0;
    for mover in movers {
        let mut rest = *mover;
        while rest.sectors > 0 {
            if gap.start >= gap.end {
                let Some(next) = gaps.next() else { return moves };
                gap = next;
            }
            let sectors = rest.sectors.min(gap.end - gap.start);
            moves.push(Move { to_sector: gap.start, sectors, ..rest });
            gap.start += sectors;
            rest.disk_sector += sectors;
            rest.from_sector += sectors;
            rest.sectors -= sectors;
        }
    }
    moves
}

/// Compacts the pair at `paths`, which nobody writes, and leaves it closed. Blocks on the disk:
/// as long as it takes to copy what lies behind the gaps.
///
/// # Errors
/// As [`Pair::open`], `Busy` with the process that writes it among them, and [`Pair::compact`].
pub fn compact(paths: &PairPaths, options: &PairOptions) -> Result<Compacted> {
    Pair::open(paths, options)?.compact()
}

impl Pair {
    /// Compacts the pair and closes it. Nobody else may have it.
    ///
    /// # Errors
    /// `Busy` when somebody has, `NoSpace` when there is no room for a new index, `Io`. The pair is
    /// whole then, compacted or as it was.
    pub fn compact(self: Arc<Self>) -> Result<Compacted> {
        let name = self.name.clone();
        let pair = Arc::into_inner(self).ok_or_else(|| {
            Error::new(ErrorKind::Busy, format!("{name}: somebody still reads or writes it"))
        })?;
        pair.flush()?;
        let before = pair.usage();
        let packed = pair.pack();
        let closed = pair.close();
        let plan = packed?;
        closed?;
        let after = super::Usage {
            file_bytes: plan.end_sector.saturating_mul(SECTOR_SIZE),
            dead_bytes: plan
                .end_sector
                .saturating_sub(DATA_START_SECTOR)
                .saturating_mul(SECTOR_SIZE)
                .saturating_sub(before.live_bytes),
            free_bytes: 0,
            index_bytes: pair.journal.base(),
            ..before
        };
        let moved_bytes = plan.moved_sectors().saturating_mul(SECTOR_SIZE);
        Ok(Compacted { before, after, moved_bytes })
    }

    /// Moves, commits and cuts. What the pair remembers of its space is wrong afterwards.
    fn pack(&self) -> Result<Plan> {
        let mut log = lock(&self.log);
        let mut map = read(&self.state).map.clone();
        let told = |what: &str, error: &std::io::Error| {
            Error::io(format!("{what} {} to compact it", self.name), error)
        };
        // Whoever wrote the pair before may not have synced it: what is written over below must not
        // be what a durable entry still names.
        self.data.sync_data().map_err(|error| self.lost(told("sync", &error)))?;
        log.sync().map_err(|error| self.lost(told("sync the index of", &error)))?;
        let plan = Plan::of(&map);
        self.copy(&plan.moves)?;
        self.data.sync_data().map_err(|error| self.lost(told("sync", &error)))?;
        let mut freed = Vec::new();
        for part in &plan.moves {
            let range = part.disk_sector..part.disk_sector + part.sectors;
            map.insert(range, Content::Data { sector: part.to_sector }, &mut freed);
            freed.clear();
        }
        let live: Vec<_> = map.pieces().collect();
        log.replace(&live, None, &self.journal, &self.name).map_err(|failure| {
            if failure.may_be_lost { self.lost(failure.error) } else { failure.error }
        })?;
        // Not before: the old log names what lies there.
        let end_byte = plan.end_sector.saturating_mul(SECTOR_SIZE);
        self.data
            .set_len(end_byte)
            .and_then(|()| self.data.sync_data())
            .map_err(|error| told("cut", &error))?;
        Ok(plan)
    }

    fn copy(&self, moves: &[Move]) -> Result<()> {
        let mut buffer = vec![0; UPPER_COPY_BYTES];
        for part in moves {
            let (mut from, mut to) = (part.from_sector, part.to_sector);
            let mut rest = part.sectors.saturating_mul(SECTOR_SIZE);
            while rest > 0 {
                let len = to_usize(rest.min(to_u64(buffer.len()))).unwrap_or(0);
                let piece = buffer.get_mut(..len).unwrap_or_default();
                let (from_byte, to_byte) = (from * SECTOR_SIZE, to * SECTOR_SIZE);
                self.data
                    .read_at(from_byte, piece)
                    .and_then(|()| self.data.write_at(to_byte, piece))
                    .map_err(|error| {
                        let name = &self.name;
                        let what = format!("move byte {from_byte} of {name} to byte {to_byte}");
                        Error::io(what, &error)
                    })?;
                let sectors = to_u64(len) / SECTOR_SIZE;
                from += sectors;
                to += sectors;
                rest -= to_u64(len);
            }
        }
        Ok(())
    }
}

const _: () = assert!(to_u64(UPPER_COPY_BYTES).is_multiple_of(SECTOR_SIZE));

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map_of(writes: &[(u64, u64, u64)]) -> UpperMap {
        let mut map = UpperMap::new();
        for &(start, sectors, sector) in writes {
            let content = if sector == 0 { Content::Zero } else { Content::Data { sector } };
            map.insert(start..start + sectors, content, &mut Vec::new());
        }
        map
    }

    fn parts(plan: &Plan) -> Vec<(u64, u64, u64, u64)> {
        let part = |part: &Move| (part.disk_sector, part.from_sector, part.to_sector, part.sectors);
        plan.moves.iter().map(part).collect()
    }

    #[test]
    fn what_lies_behind_the_end_of_all_moves_into_the_gaps_in_front_of_it() {
        for (writes, end_sector, moves) in [
            (&[][..], 8, &[][..]),
            (&[(0, 4, 0)], 8, &[]),
            (&[(0, 4, 8)], 12, &[]),
            (&[(0, 4, 100)], 12, &[(0, 100, 8, 4)]),
            // 8..12 and 20..28 are used: 4 of the 8 stay behind sector 12, in 12..16 and 16..20.
            (&[(0, 4, 8), (10, 8, 20)], 20, &[(10, 20, 12, 8)]),
            // A piece that straddles the end is cut there.
            (&[(0, 2, 8), (10, 4, 12)], 14, &[(12, 14, 10, 2)]),
            // In the order of the disk, not of the file.
            (&[(5, 2, 30), (0, 2, 40)], 12, &[(0, 40, 8, 2), (5, 30, 10, 2)]),
            // Shared sectors stay where they are.
            (&[(0, 4, 30), (9, 4, 32)], 36, &[]),
        ] {
            let plan = Plan::of(&map_of(writes));
            assert_eq!(
                (plan.end_sector, parts(&plan).as_slice()),
                (end_sector, moves),
                "{writes:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn every_sector_keeps_its_content_and_the_file_has_no_gap(
            writes in proptest::collection::vec((0..200_u64, 1..20_u64, any::<bool>()), 0..40),
        ) {
            let mut map = UpperMap::new();
            let mut next = DATA_START_SECTOR;
            for (start, sectors, zero) in writes {
                let content = if zero { Content::Zero } else { Content::Data { sector: next } };
                next += sectors + start % 3;
                map.insert(start..start + sectors, content, &mut Vec::new());
            }
            // The file as numbers: each sector holds its own place.
            let mut file: Vec<u64> = (0..next + 200).collect();
            let seen = |map: &UpperMap, file: &[u64]| -> Vec<Option<u64>> {
                let mut found = Vec::new();
                map.look_up(0..256, &mut found);
                found.iter().flat_map(|stretch| {
                    (0..stretch.end_sector - stretch.start_sector).map(|at| {
                        match stretch.content?.advanced(at) {
                            Content::Zero => Some(0),
                            Content::Data { sector } => Some(file[to_usize(sector).unwrap()]),
                        }
                    }).collect::<Vec<_>>()
                }).collect()
            };
            let before = seen(&map, &file);
            let plan = Plan::of(&map);
            for part in &plan.moves {
                for at in 0..part.sectors {
                    let to = part.to_sector + at;
                    prop_assert!(before.iter().all(|sector| *sector != Some(to)), "{to} is live");
                    file[to_usize(to).unwrap()] = file[to_usize(part.from_sector + at).unwrap()];
                }
                let range = part.disk_sector..part.disk_sector + part.sectors;
                map.insert(range, Content::Data { sector: part.to_sector }, &mut Vec::new());
            }
            prop_assert_eq!(seen(&map, &file), before);
            prop_assert_eq!(plan.end_sector, DATA_START_SECTOR + map.data_sectors());
            for (_, content) in map.pieces() {
                let behind = |sector| sector >= plan.end_sector;
                let left = matches!(content, Content::Data { sector } if behind(sector));
                prop_assert!(!left);
            }
        }
    }
}
