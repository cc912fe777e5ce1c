//! Memory that fetched bytes come into, used again: a fresh buffer costs a page fault for each of
//! its pages, a third of the processor time of a miss.
//!
//! A few are kept while there are fetches, and none when there was none for a tick.

use super::flight::lock;
use crate::limits::{CACHE_BUFFERS_MAX, CACHE_JOIN_BYTES_MAX};
use crate::units::{to_u64, to_usize};
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// The buffers that are kept.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    idle: Vec<Vec<u8>>,
    was_used: bool,
}

/// Some bytes of memory, with whatever was in it before; goes back when it is dropped.
#[derive(Debug)]
pub(super) struct Buffer<'a> {
    home: &'a Buffers,
    memory: Vec<u8>,
    length: usize,
}

impl Buffers {
    /// So many bytes. More than one request may bring are not kept later.
    pub(super) fn take(&self, length: usize) -> Buffer<'_> {
        let most = to_usize(CACHE_JOIN_BYTES_MAX).unwrap_or(usize::MAX);
        let kept = (length <= most).then(|| {
            let mut kept = lock(&self.0);
            kept.was_used = true;
            kept.idle.pop()
        });
        // All of one size, so that each fits; pages that nobody touches cost nothing.
        let memory = kept.flatten().unwrap_or_else(|| vec![0; length.max(most)]);
        Buffer { home: self, memory, length }
    }

    /// Lets go of all, if none was taken since the last call.
    pub(super) fn tick(&self) {
        let mut kept = lock(&self.0);
        if !std::mem::take(&mut kept.was_used) {
            kept.idle = Vec::new();
        }
    }
}

impl Buffer<'_> {
    /// Hands the memory and how much of it is wanted to `fill`, which gives it back.
    pub(super) fn lend<T>(&mut self, fill: impl FnOnce(Vec<u8>, usize) -> (Vec<u8>, T)) -> T {
        let (memory, filled) = fill(std::mem::take(&mut self.memory), self.length);
        self.memory = memory;
        filled
    }
}

impl Deref for Buffer<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.get(..self.length).unwrap_or_default()
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.get_mut(..self.length).unwrap_or_default()
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if to_u64(self.memory.len()) != CACHE_JOIN_BYTES_MAX {
            return;
        }
        let mut kept = lock(&self.home.0);
        if kept.idle.len() < CACHE_BUFFERS_MAX {
            kept.idle.push(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_buffers_are_used_again_and_none_is_kept_when_nobody_fetches() {
        let buffers = Buffers::default();
        let idle = |buffers: &Buffers| lock(&buffers.0).idle.len();
        let mut first = buffers.take(3);
        first.copy_from_slice(b"abc");
        drop(first);
        let again = buffers.take(2);
        assert_eq!(*again, *b"ab", "the same memory");
        assert_eq!(buffers.take(5)[..], [0; 5], "another one");
        drop(again);
        assert_eq!(idle(&buffers), 2);
        let many: Vec<_> = (0..2 * CACHE_BUFFERS_MAX).map(|_| buffers.take(1)).collect();
        drop(many);
        assert_eq!(idle(&buffers), CACHE_BUFFERS_MAX);
        buffers.tick();
        assert_eq!(idle(&buffers), CACHE_BUFFERS_MAX, "used since the last tick");
        buffers.tick();
        assert_eq!(idle(&buffers), 0);
    }

    #[test]
    fn a_longer_one_than_a_request_brings_is_not_kept() {
        let buffers = Buffers::default();
        let long = usize::try_from(CACHE_JOIN_BYTES_MAX).unwrap() + 1;
        assert_eq!(buffers.take(long).len(), long);
        assert_eq!(lock(&buffers.0).idle.len(), 0);
        assert!(buffers.take(0).is_empty());
    }
}
