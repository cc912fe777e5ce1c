//! Which extents of an open pair are here: a byte of bits for each.
//!
//! Setting an extent here publishes what was written to the data file before: who sees the bit sees
//! the bytes. Looked at by every hit, so without a lock.

use super::sync::{AtomicU8, AtomicU64, Ordering};
use std::ops::Range;

/// The bytes in the data file are the blob's.
const HERE: u8 = 1;
/// The planner wants to know when this is read.
const MARK: u8 = 2;
/// It cannot be read: the data file is not used for it any more.
const BYPASS: u8 = 4;

/// The states of all extents of a blob.
#[derive(Debug)]
pub(super) struct States {
    states: Box<[AtomicU8]>,
    here: AtomicU64,
}

impl States {
    /// None of so many extents is here.
    pub(super) fn new(count: u64) -> Self {
        let states = (0..count).map(|_| AtomicU8::new(0)).collect();
        Self { states, here: AtomicU64::new(0) }
    }

    /// The bits that all of these have, and those that any has; `None` beyond the end.
    #[inline]
    fn of(&self, extents: &Range<u64>) -> Option<(u8, u8)> {
        let (start, end) = (usize::try_from(extents.start), usize::try_from(extents.end));
        let states = self.states.get(start.ok()?..end.ok()?)?;
        let both = states.iter().fold((u8::MAX, 0), |(every, any), state| {
            let state = state.load(Ordering::Acquire);
            (every & state, any | state)
        });
        Some(both)
    }

    fn get(&self, extent: u64) -> Option<&AtomicU8> {
        self.states.get(usize::try_from(extent).ok()?)
    }

    /// Whether all of these are here and, if so, whether one of them is marked.
    #[inline]
    pub(super) fn are_here_and_marked(&self, extents: &Range<u64>) -> Option<bool> {
        let (every, any) = self.of(extents)?;
        (every & HERE != 0).then_some(any & MARK != 0)
    }

    /// Whether all of these are here.
    pub(super) fn are_here(&self, extents: &Range<u64>) -> bool {
        self.are_here_and_marked(extents).is_some()
    }

    /// Whether there is nothing to find out: it is here, or must not be used.
    pub(super) fn is_settled(&self, extent: u64) -> bool {
        self.of(&(extent..extent + 1)).is_some_and(|(_, any)| any & (HERE | BYPASS) != 0)
    }

    /// Whether one of these must not be used.
    pub(super) fn is_bypassed(&self, extents: &Range<u64>) -> bool {
        self.of(extents).is_none_or(|(_, any)| any & BYPASS != 0)
    }

    /// The front of `extents` that must not be used, or may, as the first of them: what is fetched
    /// without being stored is not fetched together with what is.
    pub(super) fn alike_front(&self, extents: Range<u64>) -> Range<u64> {
        let is_bypassed = |extent: u64| self.is_bypassed(&(extent..extent + 1));
        let first = is_bypassed(extents.start);
        let end = extents.clone().find(|extent| is_bypassed(*extent) != first);
        extents.start..end.unwrap_or(extents.end)
    }

    /// Whether every extent is here.
    pub(super) fn is_complete(&self) -> bool {
        u64::try_from(self.states.len()).is_ok_and(|all| self.here.load(Ordering::Acquire) >= all)
    }

    /// How many are here.
    pub(super) fn here(&self) -> u64 {
        self.here.load(Ordering::Relaxed)
    }

    /// The extent is here; its bytes were written or checked before.
    pub(super) fn set_here(&self, extent: u64) {
        let Some(state) = self.get(extent) else { return };
        if state.fetch_or(HERE, Ordering::AcqRel) & HERE == 0 {
            self.here.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The extent is not here any more: it is to be fetched again.
    pub(super) fn set_missing(&self, extent: u64) {
        if let Some(state) = self.get(extent) {
            self.set_not_here(state);
        }
    }

    fn set_not_here(&self, state: &AtomicU8) {
        if state.fetch_and(!HERE, Ordering::AcqRel) & HERE != 0 {
            self.here.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The data file cannot be read at these extents.
    pub(super) fn distrust(&self, extents: Range<u64>) {
        for extent in extents {
            let Some(state) = self.get(extent) else { continue };
            state.fetch_or(BYPASS, Ordering::AcqRel);
            self.set_not_here(state);
        }
    }

    /// Nothing is here that was: all is checked again at its next use.
    pub(super) fn forget(&self) {
        self.states.iter().for_each(|state| self.set_not_here(state));
    }

    /// Asks to be told when the extent is read.
    pub(super) fn mark(&self, extent: u64) {
        if let Some(state) = self.get(extent) {
            state.fetch_or(MARK, Ordering::AcqRel);
        }
    }

    /// Takes the marks off.
    pub(super) fn unmark(&self, extents: Range<u64>) {
        for extent in extents {
            let Some(state) = self.get(extent) else { continue };
            // Looked at first: a mark is rare, and a store would take the line from readers.
            if state.load(Ordering::Relaxed) & MARK != 0 {
                state.fetch_and(!MARK, Ordering::AcqRel);
            }
        }
    }
}
