//! What a layer is made of, cut into pieces of work.

use super::layout::{RelaxedEntries, relaxed_entries};
use super::zeros::{self, Stretch};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::{ImageConfig, ServiceConfig};
use crate::format::lsmt::{SegmentMapping, USER_TAG_BYTES, UuidText};
use crate::image::{Layer, Payload, Scratch, Stack};
use crate::limits::MAKE_PIECE_BYTES;
use crate::map::{Run, Target};
use crate::source::{Source, open_regular};
use crate::units::{SECTOR_SIZE, to_u64, to_usize, whole_sectors};
use crate::upper::{PairPaths, is_sealed_sparse};
use std::fs::{File, TryLockError};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Parts of the disk in one piece at most: runs of zeros take no room in it.
const PIECE_PARTS_MAX: usize = 4096;

/// Data is copied in units of so many sectors from the start of its run, as the reference does:
/// where its index entries end when a run is longer than one may be follows from it.
pub(super) const UNIT_SECTORS: u64 = 64;

/// A run longer than this may take another entry: the longest, less what a unit may lack.
const ENTRY_SECTORS_SURE: u64 = SegmentMapping::SECTORS_MAX - 2 * UNIT_SECTORS;

/// What the header and the trailer of a layer say beside where things are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Size of the virtual disk; 0 for "ask the layer below".
    pub virtual_bytes: u64,
    /// Its UUID.
    pub uuid: UuidText,
    /// That of the layer below.
    pub parent_uuid: UuidText,
    /// Free text.
    pub user_tag: [u8; USER_TAG_BYTES],
}

impl Identity {
    /// The same with another user tag.
    ///
    /// # Errors
    /// `Usage` for one that is longer than the field.
    pub fn with_user_tag(mut self, text: &str) -> Result<Self> {
        self.user_tag = [0; USER_TAG_BYTES];
        let Some(field) = self.user_tag.get_mut(..text.len()) else {
            let message = format!("a tag of {} bytes: at most {USER_TAG_BYTES}", text.len());
            return Err(Error::new(ErrorKind::Usage, message));
        };
        field.copy_from_slice(text.as_bytes());
        Ok(self)
    }
}

/// What a layer is made of: open layers, and which sector of which of them is seen where.
#[derive(Debug)]
pub struct Content {
    payloads: Vec<Payload>,
    runs: Vec<Run>,
    identity: Identity,
    /// Files that are read and that no output may replace.
    inputs: Vec<PathBuf>,
    /// Keeps whoever writes the pair away, as long as it is read.
    _still: Option<File>,
}

impl Content {
    /// What was written to a pair, of either form. Nobody can open it for writing until this is
    /// gone.
    ///
    /// # Errors
    /// `Busy` while somebody writes it; as [`Layer::open_writable`].
    pub fn of_pair(paths: &PairPaths) -> Result<Self> {
        let file = hold_still(&paths.data)?;
        let layer = Layer::open_writable(&paths.data, &paths.index)
            .context(|| format!("open the pair of {}", paths.data.display()))?;
        check_not_sealed(&paths.data, &file)?;
        let this = Self { _still: Some(file), ..Self::of_layer(layer)? };
        Ok(this.with_input(&paths.data).with_input(&paths.index))
    }

    /// All layers of an image as one, its upper included, as [`Content::of_stack`]. Nobody can open
    /// the upper for writing until this is gone.
    ///
    /// # Errors
    /// `Busy` while somebody writes the upper; as [`Stack::open`] and [`Stack::runs`].
    pub fn of_image(config: &ImageConfig, service: &ServiceConfig) -> Result<Self> {
        let Some(upper) = &config.upper else {
            return Self::of_stack(Stack::open(config, service)?);
        };
        let data = Path::new(&upper.data);
        // Before the stack is opened: what was seen of the upper until then may be gone.
        let file = hold_still(data)?;
        let stack = Stack::open(config, service)?;
        check_not_sealed(data, &file)?;
        Ok(Self { _still: Some(file), ..Self::of_stack(stack)? })
    }

    /// One layer, without what is below it.
    ///
    /// # Errors
    /// As [`Stack::runs`].
    pub fn of_layer(layer: Layer) -> Result<Self> {
        Self::of_stack(Stack::from_layers(vec![layer])?)
    }

    /// All layers of a stack as one. It has the UUID of the topmost and nothing below.
    ///
    /// # Errors
    /// As [`Stack::runs`].
    pub fn of_stack(stack: Stack) -> Result<Self> {
        let mut runs = stack.runs()?;
        let virtual_bytes = stack.virtual_bytes();
        let layers = stack.into_layers();
        let single = layers.len() == 1;
        if !single && virtual_bytes > 0 {
            // What lies behind the end of the disk is not seen. Of one layer it may be, with one on
            // top that is larger.
            cut(&mut runs, whole_sectors(virtual_bytes));
        }
        let top = layers.last().map(|layer| layer.header.clone());
        let identity = Identity {
            virtual_bytes,
            uuid: top.as_ref().map_or(UuidText::NIL, |top| top.uuid),
            parent_uuid: top
                .as_ref()
                .filter(|_| single)
                .map_or(UuidText::NIL, |top| top.parent_uuid),
            user_tag: top
                .as_ref()
                .filter(|_| single)
                .map_or([0; USER_TAG_BYTES], |top| top.user_tag),
        };
        let payloads: Vec<Payload> = layers.into_iter().map(|layer| layer.payload).collect();
        let path = |payload: &Payload| match payload.source() {
            Source::Mapped(mapped) => Some(mapped.path().to_owned()),
            Source::Memory(_) | Source::Remote(_) => None,
        };
        let inputs = payloads.iter().filter_map(path).collect();
        Ok(Self { payloads, runs, identity, inputs, _still: None })
    }

    /// The same with one more file that no output may replace.
    fn with_input(mut self, path: &Path) -> Self {
        self.inputs.push(path.to_owned());
        self
    }

    /// What the new layer says of itself unless told otherwise.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Bytes of data that will be read.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        let is_data = |run: &&Run| run.target != Target::Zero;
        let sectors: u64 =
            self.runs.iter().filter(is_data).map(|run| run.end_sector - run.start_sector).sum();
        sectors.saturating_mul(SECTOR_SIZE)
    }

    /// What is known of it as a relaxed layer, see `layout`.
    pub(super) fn relaxed_entries(&self) -> RelaxedEntries {
        foresee_relaxed(&self.runs)
    }

    /// Refuses an output that is one of the files read.
    ///
    /// # Errors
    /// `InvalidConfig`.
    pub fn check_output(&self, output: &Path) -> Result<()> {
        self.inputs.iter().try_for_each(|input| super::refuse_same(input, output))
    }
}

/// The data file of a pair, locked so that nobody opens the pair for writing.
fn hold_still(data: &Path) -> Result<File> {
    let file = open_regular(data)?;
    let name = data.display();
    match file.try_lock_shared() {
        Ok(()) => Ok(file),
        Err(TryLockError::Error(error)) => Err(Error::io(format!("lock {name}"), &error)),
        Err(TryLockError::WouldBlock) => {
            let message = format!("{name} is being written by another process");
            Err(Error::new(ErrorKind::Busy, message))
        }
    }
}

/// Refuses a sparse data file that was sealed where it is: its index and its trailer would become
/// sectors of the disk. The append form has its own index still, which does not name them.
fn check_not_sealed(name: &Path, data: &File) -> Result<()> {
    if !is_sealed_sparse(data)? {
        return Ok(());
    }
    let message =
        format!("{} was sealed: it is a layer, see commit --commit_sealed", name.display());
    Err(Error::new(ErrorKind::Unsupported, message))
}

/// Cuts off what lies at and behind `end_sector`.
fn cut(runs: &mut Vec<Run>, end_sector: u64) {
    runs.retain(|run| run.start_sector < end_sector);
    if let Some(last) = runs.last_mut() {
        last.end_sector = last.end_sector.min(end_sector);
    }
}

/// Consecutive sectors of the disk with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) start_sector: u64,
    pub(super) sectors: u64,
    pub(super) target: Target,
}

/// One piece of work, and what becomes of it on the way. Each thread has one and uses it again.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) parts: Vec<Part>,
    /// Entries that what follows this piece needs at most.
    pub(super) entries_left: u64,
    /// What was read: the first `len` bytes.
    pub(super) data: Vec<u8>,
    pub(super) len: usize,
    pub(super) stretches: Vec<Stretch>,
    /// The block that began in an earlier piece, and whole blocks behind it in `data`.
    pub(super) head: Vec<u8>,
    pub(super) body: Range<usize>,
    /// Where `head` lies in what is compressed.
    pub(super) at_byte: u64,
}

/// What is read: the parts of a layer, or a file as it is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Feed<'a> {
    Layer(&'a Content),
    File(&'a Payload),
}

impl<'a> Feed<'a> {
    pub(super) fn scratch(&self) -> Result<Scratch> {
        match self {
            Self::Layer(content) => Scratch::new(content.payloads.iter()),
            Self::File(payload) => Scratch::new(std::iter::once(*payload)),
        }
    }

    /// A cursor at the front, for a layer that is laid out relaxed or not.
    pub(super) fn cursor(&self, is_relaxed: bool) -> Cursor<'a> {
        let runs = match self {
            Self::Layer(content) => content.runs.as_slice(),
            Self::File(_) => &[],
        };
        let mut cursor = Cursor {
            feed: *self,
            run: 0,
            done: 0,
            is_relaxed,
            entries_left: groups(runs, is_relaxed, 0).map(|group| group.entries).sum(),
            data_sectors: 0,
            group_end: 0,
            group_entries: 0,
        };
        cursor.enter_group(runs);
        cursor
    }

    /// Reads the data of a piece, and looks for zeros in it.
    pub(super) fn read(
        &self,
        scratch: &mut Scratch,
        piece: &mut Piece,
        granule_sectors: Option<u64>,
    ) -> Result<()> {
        piece.stretches.clear();
        let Piece { parts, data, stretches, .. } = piece;
        data.resize(MAKE_PIECE_BYTES.max(data.len()), 0);
        let mut at: usize = 0;
        for part in parts.iter() {
            let Target::Data { layer, sector } = part.target else { continue };
            let len = to_usize(part.sectors.saturating_mul(SECTOR_SIZE)).unwrap_or(usize::MAX);
            let Some(room) = data.get_mut(at..at.saturating_add(len)) else {
                return Err(Error::new(ErrorKind::OutOfRange, "a piece larger than its room"));
            };
            let Self::Layer(content) = self else { continue };
            let payload = content.payloads.get(usize::from(layer)).ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, format!("no layer {layer} in the stack"))
            })?;
            scratch
                .read(payload, layer, sector.saturating_mul(SECTOR_SIZE), room)
                .context(|| format!("read layer {layer} ({:?})", payload.source()))?;
            zeros::find(room, part.start_sector, granule_sectors, stretches);
            at += len;
        }
        if let Self::File(payload) = self {
            at = piece.len;
            let room = data.get_mut(..at).unwrap_or_default();
            let from = piece.at_byte;
            scratch.read(payload, 0, from, room).context(|| format!("read {payload:?}"))?;
        }
        piece.len = at;
        Ok(())
    }
}

/// Runs that make one entry after the other.
struct Group {
    runs: usize,
    /// Entries that they make at most.
    entries: u64,
    /// Sectors that are stored for them, if none turn out to be zeros.
    data_sectors: u64,
}

/// The groups of `runs`, behind so many sectors of data of other runs.
fn groups(runs: &[Run], is_relaxed: bool, mut before: u64) -> impl Iterator<Item = Group> {
    let joined = |one: &Run, next: &Run| {
        let is_zero = |run: &Run| run.target == Target::Zero;
        one.end_sector == next.start_sector && is_zero(one) == is_zero(next)
    };
    runs.chunk_by(joined).map(move |group| {
        let lengths = group.iter().map(|run| run.end_sector - run.start_sector);
        let runs = group.len();
        if group.first().is_some_and(|run| run.target == Target::Zero) {
            return Group { runs, entries: zeroed_entries(lengths), data_sectors: 0 };
        }
        let data_sectors: u64 = lengths.sum();
        let entries = if is_relaxed {
            relaxed_entries(before, data_sectors)
        } else {
            data_sectors.div_ceil(ENTRY_SECTORS_SURE)
        };
        before += data_sectors;
        Group { runs, entries, data_sectors }
    })
}

/// What is known of a relaxed layer of these runs before anything is read.
fn foresee_relaxed(runs: &[Run]) -> RelaxedEntries {
    let none = RelaxedEntries { data_sectors: 0, at_most: 0 };
    groups(runs, true, 0).fold(none, |sum, group| RelaxedEntries {
        data_sectors: sum.data_sectors + group.data_sectors,
        at_most: sum.at_most + group.entries,
    })
}

/// Entries of runs of zeros of these lengths, one behind the other: as `layout` makes them, cut
/// where they are longer than one may be, and joined while they stay below that.
fn zeroed_entries(lengths: impl Iterator<Item = u64>) -> u64 {
    let (mut entries, mut last): (u64, u64) = (0, 0);
    for sectors in lengths {
        let (whole, rest) =
            (sectors / SegmentMapping::SECTORS_MAX, sectors % SegmentMapping::SECTORS_MAX);
        if whole > 0 {
            (entries, last) = (entries + whole, SegmentMapping::SECTORS_MAX);
        }
        if last > 0 && last + rest < SegmentMapping::SECTORS_MAX {
            last += rest;
        } else if rest > 0 {
            (entries, last) = (entries + 1, rest);
        }
    }
    entries
}

/// Where in the input the next piece begins.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    feed: Feed<'a>,
    /// The run, and the sectors of it that are taken; or, of a file, the bytes.
    run: usize,
    done: u64,
    is_relaxed: bool,
    /// Entries that the rest takes at most, the group of runs at the cursor included.
    pub(super) entries_left: u64,
    /// Sectors of data up to the end of that group.
    data_sectors: u64,
    /// Where that group ends, and its part of the entries.
    group_end: usize,
    group_entries: u64,
}

impl Cursor<'_> {
    /// Fills in what the next piece is of. False when there is none.
    pub(super) fn next(&mut self, piece: &mut Piece) -> bool {
        piece.parts.clear();
        match self.feed {
            Feed::File(payload) => {
                let rest = payload.bytes().saturating_sub(self.done);
                piece.at_byte = self.done;
                piece.len = to_usize(rest.min(to_u64(MAKE_PIECE_BYTES))).unwrap_or(0);
                self.done += to_u64(piece.len);
                piece.len > 0
            }
            Feed::Layer(content) => {
                self.take_runs(&content.runs, &mut piece.parts);
                piece.entries_left = self.entries_left;
                !piece.parts.is_empty()
            }
        }
    }

    fn take_runs(&mut self, runs: &[Run], parts: &mut Vec<Part>) {
        let mut room = whole_sectors(to_u64(MAKE_PIECE_BYTES));
        while let Some(run) = runs.get(self.run)
            && room >= UNIT_SECTORS
            && parts.len() < PIECE_PARTS_MAX
        {
            let rest = run.end_sector - run.start_sector - self.done;
            let is_zero = run.target == Target::Zero;
            // Whole units, so that the rest of the run begins with one.
            let most = if is_zero { rest } else { room - room % UNIT_SECTORS };
            let sectors = rest.min(most);
            parts.push(Part {
                start_sector: run.start_sector + self.done,
                sectors,
                target: run.target.advanced(self.done),
            });
            self.done += sectors;
            if !is_zero {
                room -= sectors;
            }
            if sectors == rest {
                (self.run, self.done) = (self.run + 1, 0);
                if self.run >= self.group_end {
                    self.entries_left = self.entries_left.saturating_sub(self.group_entries);
                    self.enter_group(runs);
                }
            }
        }
    }

    /// Looks at the group that begins at the cursor.
    fn enter_group(&mut self, runs: &[Run]) {
        let rest = runs.get(self.run..).unwrap_or_default();
        let Some(group) = groups(rest, self.is_relaxed, self.data_sectors).next() else { return };
        self.data_sectors += group.data_sectors;
        (self.group_end, self.group_entries) = (self.run + group.runs, group.entries);
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::Layout;
    use super::*;
    use proptest::prelude::*;

    fn zeros(lengths: &[u64]) -> Vec<Run> {
        let mut here = 0;
        let run = |&sectors: &u64| {
            let start_sector = here;
            here += sectors;
            Run { start_sector, end_sector: here, target: Target::Zero }
        };
        lengths.iter().map(run).collect()
    }

    /// Entries that are foreseen, and those that the layout makes.
    fn entries(lengths: &[u64]) -> (u64, u64) {
        let runs = zeros(lengths);
        let foreseen = groups(&runs, false, 0).map(|group| group.entries).sum();
        let part = |run: &Run| Part {
            start_sector: run.start_sector,
            sectors: run.end_sector - run.start_sector,
            target: run.target,
        };
        let mut piece = Piece { parts: runs.iter().map(part).collect(), ..Piece::default() };
        let mut layout = Layout::new(foreseen).unwrap();
        layout.place(&mut piece).unwrap();
        (foreseen, to_u64(layout.entries().len()))
    }

    /// A layer of the longest zeroed entries, as many as there may be, once needed more of them to
    /// be read than it had, and was refused.
    #[test]
    fn zeros_need_the_entries_that_they_have() {
        const MAX: u64 = SegmentMapping::SECTORS_MAX;
        for (lengths, expected) in [
            (&[][..], 0),
            (&[1], 1),
            (&[MAX], 1),
            (&[MAX + 1], 2),
            (&[MAX, MAX], 2),
            (&[MAX - 1, 1], 2),
            (&[MAX - 2, 1, 1], 2),
            (&[8192, 8192, 8192], 3),
            (&[8, 8, 8, 8], 1),
        ] {
            assert_eq!(entries(lengths), (expected, expected), "{lengths:?}");
        }
        assert_eq!(entries(&vec![MAX; 20_000]), (20_000, 20_000));
    }

    /// Sectors of the disk and of them that are found to be zeros in the end, run by run, with a
    /// gap in front or not.
    fn relaxed(lengths: &[(u64, u64, bool)]) -> (RelaxedEntries, u64) {
        let (mut here, mut runs, mut layout) = (0, Vec::new(), Layout::relaxed());
        for &(data, zeros, gap) in lengths {
            here += u64::from(gap);
            let target = Target::Data { layer: 0, sector: here };
            runs.push(Run { start_sector: here, end_sector: here + data + zeros, target });
            let mut stretches = vec![Stretch { sectors: data, is_zero: false }];
            if zeros > 0 {
                stretches.push(Stretch { sectors: zeros, is_zero: true });
            }
            let mut piece = Piece {
                parts: vec![Part { start_sector: here, sectors: data + zeros, target }],
                data: vec![1; to_usize((data + zeros) * SECTOR_SIZE).unwrap()],
                stretches,
                entries_left: u64::MAX / 2,
                ..Piece::default()
            };
            layout.place(&mut piece).unwrap();
            here += data + zeros;
        }
        (foresee_relaxed(&runs), to_u64(layout.entries().len()))
    }

    #[test]
    fn a_relaxed_layer_has_an_entry_for_each_block_of_each_run() {
        for (lengths, expected, at_most) in [
            (&[][..], 0, 0),
            (&[(1, 0, false)], 1, 1),
            (&[(112, 0, false)], 1, 2),
            (&[(113, 0, false)], 2, 2),
            (&[(100, 0, true), (100, 0, true)], 3, 3),
            (&[(100, 0, true), (100, 0, false)], 2, 2),
            (&[(512, 0, false), (512, 0, false)], 9, 9),
            (&[(256, 256, false), (512, 0, false)], 9, 9),
        ] {
            let (foreseen, found) = relaxed(lengths);
            assert_eq!((found, foreseen.at_most), (expected, at_most), "{lengths:?}");
        }
    }

    proptest! {
        #[test]
        fn a_relaxed_layer_never_needs_more_entries_than_foreseen(
            lengths in prop::collection::vec(
                (1..256_u64, prop_oneof![Just(0_u64), 1..600_u64], any::<bool>()), 1..60)
        ) {
            let (foreseen, found) = relaxed(&lengths);
            prop_assert!(found <= foreseen.at_most, "{} of {:?}", found, foreseen);
        }

        #[test]
        fn zeros_of_any_lengths_need_the_entries_that_they_have(
            lengths in prop::collection::vec(prop_oneof![1..64_u64, 1..40_000_u64], 1..40)
        ) {
            let (foreseen, found) = entries(&lengths);
            prop_assert_eq!(foreseen, found);
        }
    }
}
