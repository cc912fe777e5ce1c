//! The journal: index entries of writes that no flush has made durable yet.
//!
//! ```text
//!   word 0   magic             13 owner's process id        512  entry 0, two words
//!        1   version, capacity 14 index length it stands on 514  entry 1
//!        2   boot id (2)       15 index length it goes to         ...
//!        4   uuid (5)          16 entries cleared                 a ring: entry n lies in
//!        9   device, inode     17 entries published               place n modulo capacity
//!        12  CRC-32C of 0..12  18 why writing failed (1: it did)
//! ```
//!
//! It lies in memory that outlives the process (see [`SharedMemory`]) and not the boot. A write is
//! published by one store of a count after its entry, so that a process killed at any instruction
//! leaves a prefix; a flush clears by one store too. At open the entries are put on top of the log,
//! in order; those that are in the log already change nothing. After a power cut the journal is
//! gone, and with it everything that it spoke of.
//!
//! The length of the index file tells whether somebody else wrote the pair in between: it is one
//! that the journal knows. The failed word outlives a restart on purpose: after a
//! failed sync the kernel forgets what it could not write, so no later sync may be believed.

use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{SegmentMapping, UuidText};
use crate::limits::UPPER_JOURNAL_ENTRIES_MAX;
use crate::source::{FileIdentity, SharedMemory};
use crate::units::{to_u64, to_usize};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// `OBDPAIRJ`, read as a little-endian number.
const MAGIC: u64 = u64::from_le_bytes(*b"OBDPAIRJ");
const VERSION: u32 = 1;

const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_BOOT: usize = 2;
const AT_UUID: usize = 4;
const AT_FILE: usize = 9;
const AT_CRC: usize = 12;
const AT_OWNER: usize = 13;
const AT_BASE: usize = 14;
const AT_NEXT: usize = 15;
const AT_CLEARED: usize = 16;
const AT_PUBLISHED: usize = 17;
const AT_FAILED: usize = 18;
const AT_ENTRIES: usize = 512;

/// What a journal must agree with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalKey {
    /// The boot: after another one, a journal means nothing.
    pub boot_id: u128,
    /// The pair.
    pub uuid: UuidText,
    /// Its data file.
    pub file: FileIdentity,
}

/// The journal of one pair.
#[derive(Debug)]
pub struct Journal {
    memory: SharedMemory,
    capacity: u64,
}

impl Journal {
    /// The path, in `folder`, of the journal of the pair with this data file.
    #[must_use]
    pub fn path_in(folder: &Path, file: FileIdentity) -> PathBuf {
        folder.join(format!("{:x}-{:x}.journal", file.device_number, file.inode))
    }

    /// Maps the journal at `path`, which is made if there is none.
    ///
    /// # Errors
    /// As [`SharedMemory::open`].
    pub fn open(path: &Path) -> Result<Self> {
        let capacity = UPPER_JOURNAL_ENTRIES_MAX;
        Ok(Self::in_memory(SharedMemory::open(path, Self::words(capacity))?, capacity))
    }

    /// A copy of the journal at `path`, if there is one.
    ///
    /// # Errors
    /// `Io`.
    pub fn snapshot(path: &Path) -> Result<Option<Self>> {
        let capacity = UPPER_JOURNAL_ENTRIES_MAX;
        let memory = SharedMemory::snapshot(path, Self::words(capacity))?;
        Ok(memory.map(|memory| Self::in_memory(memory, capacity)))
    }

    /// A journal of `capacity` entries in `memory` of [`Journal::words`].
    ///
    /// # Panics
    /// When the memory has not so many words: a bug of the caller.
    #[must_use]
    pub fn in_memory(memory: SharedMemory, capacity: u32) -> Self {
        assert!(memory.words().len() >= Self::words(capacity), "room for the entries");
        Self { memory, capacity: u64::from(capacity) }
    }

    /// Words of a journal of `capacity` entries.
    #[must_use]
    pub fn words(capacity: u32) -> usize {
        AT_ENTRIES + 2 * to_usize(u64::from(capacity)).unwrap_or(0)
    }

    /// What to call it in a message.
    pub(super) fn name(&self) -> String {
        self.memory
            .path()
            .map_or_else(|| "the journal".to_owned(), |path| path.display().to_string())
    }

    /// Its file.
    pub(super) fn path(&self) -> Option<&Path> {
        self.memory.path()
    }

    fn get(&self, word: usize) -> u64 {
        self.memory.words().get(word).map_or(0, |word| u64::from_le(word.load(Ordering::Acquire)))
    }

    fn set(&self, word: usize, value: u64) {
        if let Some(word) = self.memory.words().get(word) {
            word.store(value.to_le(), Ordering::Release);
        }
    }

    /// The words that say whose journal it is.
    fn fixed(key: &JournalKey, capacity: u64) -> [u64; AT_CRC] {
        let mut fixed = [0; AT_CRC];
        fixed[AT_MAGIC] = MAGIC;
        fixed[AT_VERSION] = u64::from(VERSION) | capacity << 32;
        let boot = key.boot_id.to_le_bytes();
        let uuid = key.uuid.as_bytes();
        let words = |bytes: &[u8], into: &mut [u64]| {
            for (word, part) in into.iter_mut().zip(bytes.chunks(8)) {
                let mut whole = [0; 8];
                whole.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
                *word = u64::from_le_bytes(whole);
            }
        };
        words(&boot, &mut fixed[AT_BOOT..AT_UUID]);
        words(uuid, &mut fixed[AT_UUID..AT_FILE]);
        fixed[AT_FILE] = key.file.device_number;
        fixed[AT_FILE + 1] = key.file.inode;
        fixed
    }

    fn crc_of(fixed: &[u64; AT_CRC]) -> u64 {
        let crc = fixed.iter().fold(0, |crc, word| crc32c::crc32c_append(crc, &word.to_le_bytes()));
        u64::from(crc)
    }

    /// Whether it is the journal of `key`, written since this boot.
    ///
    /// # Errors
    /// `Corrupt` when it is damaged: what it spoke of would be lost without a word.
    pub(super) fn belongs_to(&self, key: &JournalKey) -> Result<bool> {
        if self.get(AT_MAGIC) != MAGIC {
            // Never written, or killed before the last word of its making.
            return Ok(false);
        }
        let mut found = [0; AT_CRC];
        found.iter_mut().zip(0..).for_each(|(word, at)| *word = self.get(at));
        if self.get(AT_CRC) != Self::crc_of(&found) {
            return Err(self.damaged("the checksum of its header does not match"));
        }
        if found != Self::fixed(key, self.capacity) {
            return Ok(false);
        }
        let (cleared, published) = (self.get(AT_CLEARED), self.get(AT_PUBLISHED));
        let held = published.checked_sub(cleared);
        if held.is_none_or(|held| held > self.capacity) {
            return Err(self.damaged(&format!("entries {cleared}..{published}")));
        }
        Ok(true)
    }

    fn damaged(&self, what: &str) -> Error {
        Error::new(ErrorKind::Corrupt, format!("{}: {what}", self.name()))
    }

    /// Refuses an index file that is not as this journal left it.
    ///
    /// # Errors
    /// `Corrupt` naming the journal.
    pub(super) fn check_index_length(&self, index_bytes: u64) -> Result<()> {
        let (base, next) = (self.get(AT_BASE), self.get(AT_NEXT));
        if (base.min(next)..=base.max(next)).contains(&index_bytes) {
            return Ok(());
        }
        let message = format!(
            "found an index file of {index_bytes} bytes, expected {base} to {next}: another \
             program wrote the pair after its server was killed. The writes in {} belong to the \
             pair as it was; remove that file to go on without them",
            self.name()
        );
        Err(Error::new(ErrorKind::Corrupt, message))
    }

    /// Makes it the empty journal of `key`.
    pub(super) fn begin(&self, key: &JournalKey, base_bytes: u64, next_bytes: u64) {
        self.set(AT_MAGIC, 0);
        let fixed = Self::fixed(key, self.capacity);
        for (at, word) in fixed.iter().enumerate().skip(1) {
            self.set(at, *word);
        }
        self.set(AT_CRC, Self::crc_of(&fixed));
        for at in [AT_CLEARED, AT_PUBLISHED, AT_FAILED] {
            self.set(at, 0);
        }
        self.stand_on(base_bytes, next_bytes);
        // Last: a half-made journal is none.
        self.set(AT_MAGIC, MAGIC);
    }

    /// Notes the length of the index file, and the one that it is about to get.
    pub(super) fn stand_on(&self, base_bytes: u64, next_bytes: u64) {
        self.set(AT_NEXT, next_bytes);
        self.set(AT_BASE, base_bytes);
    }

    /// The length of the index file that it stands on.
    pub(super) fn base(&self) -> u64 {
        self.get(AT_BASE)
    }

    /// Notes whose it is.
    pub(super) fn set_owner(&self, pid: u32) {
        self.set(AT_OWNER, u64::from(pid));
    }

    /// Whose it is.
    pub(super) fn owner(&self) -> Option<u32> {
        (self.get(AT_MAGIC) == MAGIC).then(|| u32::try_from(self.get(AT_OWNER)).ok())?
    }

    /// Notes that the pair must not be written any more.
    pub(super) fn set_failed(&self) {
        self.set(AT_FAILED, 1);
    }

    /// Whether that was noted.
    pub(super) fn has_failed(&self) -> bool {
        self.get(AT_FAILED) != 0
    }

    /// The entries that it holds, by number.
    pub(super) fn held(&self) -> std::ops::Range<u64> {
        let cleared = self.get(AT_CLEARED);
        cleared..self.get(AT_PUBLISHED)
    }

    /// How many more it can hold.
    pub(super) fn room(&self) -> u64 {
        let held = self.held();
        self.capacity.saturating_sub(held.end.saturating_sub(held.start))
    }

    fn place(&self, number: u64) -> usize {
        AT_ENTRIES + 2 * to_usize(number % self.capacity).unwrap_or(0)
    }

    /// Publishes an entry; its number. Only one thread at a time, and only with room.
    #[inline]
    pub(super) fn publish(&self, segment: &SegmentMapping) -> u64 {
        let number = self.get(AT_PUBLISHED);
        let [a0, a1, a2, a3, a4, a5, a6, a7, b @ ..] = segment.encode();
        let at = self.place(number);
        self.set(at, u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]));
        self.set(at + 1, u64::from_le_bytes(b));
        self.set(AT_PUBLISHED, number + 1);
        number
    }

    /// Forgets the entries in front of `number`.
    pub(super) fn clear_to(&self, number: u64) {
        self.set(AT_CLEARED, number);
    }

    /// The bytes of `numbers`, as they go into the log.
    pub(super) fn bytes_of(&self, numbers: std::ops::Range<u64>) -> Vec<u8> {
        let count = numbers.end.saturating_sub(numbers.start);
        let mut bytes = Vec::with_capacity(to_usize(count).unwrap_or(0) * SegmentMapping::BYTES);
        for number in numbers {
            let at = self.place(number);
            bytes.extend_from_slice(&self.get(at).to_le_bytes());
            bytes.extend_from_slice(&self.get(at + 1).to_le_bytes());
        }
        bytes
    }
}

/// A handle on the same memory: what a test keeps while the owner dies.
impl Clone for Journal {
    fn clone(&self) -> Self {
        Self { memory: self.memory.clone(), capacity: self.capacity }
    }
}

/// The identity of this boot.
///
/// # Errors
/// `Io` where the kernel does not tell.
pub fn boot_id() -> Result<u128> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text =
        std::fs::read_to_string(PATH).map_err(|error| Error::io(format!("read {PATH}"), &error))?;
    let digits: String = text.trim().chars().filter(|digit| *digit != '-').collect();
    u128::from_str_radix(&digits, 16).map_err(|_| Error::corrupt(PATH, 0, text.trim(), "a UUID"))
}

const _: () = assert!(to_u64(SegmentMapping::BYTES) == 16);
