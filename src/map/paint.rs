//! Merging by painting: strokes of different heights over one line, the highest is seen.
//!
//! One algorithm serves two callers: a stack of layers (height = position in the stack) and the
//! log of a writable pair (height = position in the log; later wins). Strokes of one height may
//! not overlap; where they do, either may win, which is why indexes are checked before.
//!
//! A sweep over the strokes in order of their start keeps the open ones in a heap by height.
//! Closed strokes leave the heap only when they surface, so a stroke costs one push and one pop:
//! O(n log n), at most `2 n` runs. Sorting is stable on purpose: indexes arrive sorted, and the
//! standard stable sort merges existing runs instead of sorting anew.

use super::Target;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// One index entry on its way into the map.
#[derive(Clone, Copy, Debug)]
pub struct Stroke {
    /// First sector of the virtual disk that it covers.
    pub start_sector: u64,
    /// One past the last sector that it covers.
    pub end_sector: u64,
    /// The higher one wins.
    pub height: u32,
    /// Content of the first sector; the following sectors follow.
    pub target: Target,
}

/// A stretch of the virtual disk with one source. Runs are disjoint, sorted and joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First sector of the virtual disk.
    pub start_sector: u64,
    /// One past the last sector.
    pub end_sector: u64,
    /// Content of the first sector.
    pub target: Target,
}

/// An open stroke: ordered by height, then by order of arrival so that the order is total.
struct Open {
    height: u32,
    position: usize,
}

impl Ord for Open {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.height, self.position).cmp(&(other.height, other.position))
    }
}
impl PartialOrd for Open {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Open {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Open {}

/// What is seen from above: disjoint runs in order, neighbours that continue each other joined.
/// Sectors that no stroke covers are in no run. Empty strokes are ignored.
#[must_use]
pub fn paint(strokes: Vec<Stroke>) -> Vec<Run> {
    let mut runs = Vec::with_capacity(strokes.len());
    sweep(strokes, |_, run| append(&mut runs, run));
    runs
}

/// As [`paint`], but what is seen of different strokes stays different runs: where a writer's
/// entries ended is part of the bytes of the layer that is made of them.
#[must_use]
pub fn paint_with_seams(strokes: Vec<Stroke>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(strokes.len());
    let mut of_last = None;
    sweep(strokes, |stroke, run| {
        let is_seam = of_last != Some(stroke);
        of_last = Some(stroke);
        if is_seam { runs.push(run) } else { append(&mut runs, run) }
    });
    runs
}

/// Hands over what is seen from above, in order, with the number of the stroke that it is of.
fn sweep(mut strokes: Vec<Stroke>, mut see: impl FnMut(usize, Run)) {
    strokes.retain(|stroke| stroke.start_sector < stroke.end_sector);
    strokes.sort_by_key(|stroke| stroke.start_sector);
    let mut open: BinaryHeap<Open> = BinaryHeap::new();
    let mut arriving = strokes.iter().enumerate().peekable();
    let mut here = 0;
    loop {
        while let Some((position, stroke)) =
            arriving.next_if(|(_, stroke)| open.is_empty() || stroke.start_sector <= here)
        {
            here = here.max(stroke.start_sector);
            open.push(Open { height: stroke.height, position });
        }
        let Some(position) = open.peek().map(|top| top.position) else { return };
        let Some(seen) = strokes.get(position) else { return };
        if seen.end_sector <= here {
            open.pop();
            continue;
        }
        let until = match arriving.peek() {
            Some((_, next)) => seen.end_sector.min(next.start_sector),
            None => seen.end_sector,
        };
        let target = seen.target.advanced(here - seen.start_sector);
        see(position, Run { start_sector: here, end_sector: until, target });
        here = until;
    }
}

/// Appends `run`, joined to the last run where that one continues into it.
pub(super) fn append(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut()
        && last.end_sector == run.start_sector
        && last.target.continues_at(last.end_sector - last.start_sector, run.target)
    {
        last.end_sector = run.end_sector;
        return;
    }
    runs.push(run);
}
