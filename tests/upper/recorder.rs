//! Files in memory that record every operation, and what a power cut leaves of them.
//!
//! The persistence model. What was written before a file's last sync is there. Of later writes each
//! sector is there, is not, or is torn: its front new and its rest as before, or garbage where the
//! file had no durable bytes. The size is that of any moment since the last sync, whatever became
//! of the bytes; what was never written reads as zeros, or as garbage in a data file, whose
//! file system may order data behind sizes. A rename is there or is not until its folder is synced.

// Each test uses a part of it.
#![allow(dead_code)]

#[path = "../common/random.rs"]
mod random;

use obd_ublk::upper::{Folder, Storage};
pub(crate) use random::Random;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// One operation on the storage.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write { file: usize, at: usize, bytes: Arc<[u8]> },
    SetLen { file: usize, len: usize },
    Sync { file: usize },
    Create,
    Rename { file: usize },
    SyncFolder,
}

/// What a test lets fail: from the `after`-th operation of the kind on, so many times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    DataWrite,
    DataSync,
    IndexWrite,
    IndexSync,
    Create,
    Rename,
}

/// Files, names and what was done to them. File 0 is the data file, file 1 the first index.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) files: Vec<Vec<u8>>,
    pub(crate) index: usize,
    pub(crate) beside: Option<usize>,
    pub(crate) ops: Vec<Op>,
    pub(crate) fault: Option<(Fault, i32)>,
    /// Runs in front of every operation.
    pub(crate) journals: Vec<Vec<u64>>,
    pub(crate) journal: Option<obd_ublk::source::SharedMemory>,
    pub(crate) meanwhile: Option<Meanwhile>,
}

/// What somebody else does while the first sync of the data file, or of an index, runs.
pub(crate) struct Meanwhile {
    pub(crate) of_data: bool,
    pub(crate) act: Box<dyn FnOnce() + Send>,
}

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Meanwhile(of_data: {})", self.of_data)
    }
}

pub(crate) type Shared = Arc<Mutex<World>>;

pub(crate) fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap()
}

impl World {
    /// A pair of files with this content, all of it durable.
    pub(crate) fn of(data: Vec<u8>, index: Vec<u8>) -> Shared {
        let world = Self { files: vec![data, index], index: 1, ..Self::default() };
        Arc::new(Mutex::new(world))
    }

    fn begin(&mut self, op: Op) -> io::Result<()> {
        if let Some((fault, errno)) = self.fault
            && self.is_hit(fault, &op)
        {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if let Some(journal) = &self.journal {
            let words = journal.words().iter();
            let words = words.map(|word| word.load(std::sync::atomic::Ordering::Acquire));
            self.journals.push(words.collect());
        }
        self.ops.push(op);
        Ok(())
    }

    fn is_hit(&self, fault: Fault, op: &Op) -> bool {
        matches!(
            (fault, op),
            (Fault::DataWrite, Op::Write { file: 0, .. })
                | (Fault::DataSync, Op::Sync { file: 0 })
                | (Fault::IndexWrite, Op::Write { file: 1.., .. })
                | (Fault::IndexSync, Op::Sync { file: 1.. })
                | (Fault::Create, Op::Create)
                | (Fault::Rename, Op::Rename { .. })
        )
    }
}

/// One file of a [`World`].
#[derive(Debug)]
pub(crate) struct RecordedFile {
    pub(crate) world: Shared,
    pub(crate) file: usize,
}

impl Storage for RecordedFile {
    fn read_at(&self, at_byte: u64, dst: &mut [u8]) -> io::Result<()> {
        let world = lock(&self.world);
        let at = usize::try_from(at_byte).unwrap();
        let found = world.files[self.file].get(at..).and_then(|rest| rest.get(..dst.len()));
        found
            .map(|found| dst.copy_from_slice(found))
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn write_at(&self, at_byte: u64, src: &[u8]) -> io::Result<()> {
        let at = usize::try_from(at_byte).unwrap();
        let mut world = lock(&self.world);
        world.begin(Op::Write { file: self.file, at, bytes: src.into() })?;
        put(&mut world.files[self.file], at, src);
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let len = usize::try_from(bytes).unwrap();
        let mut world = lock(&self.world);
        world.begin(Op::SetLen { file: self.file, len })?;
        world.files[self.file].resize(len, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let is_meant = |meanwhile: &mut Meanwhile| meanwhile.of_data == (self.file == 0);
        let meanwhile = lock(&self.world).meanwhile.take_if(is_meant);
        if let Some(meanwhile) = meanwhile {
            (meanwhile.act)();
        }
        lock(&self.world).begin(Op::Sync { file: self.file })
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(u64::try_from(lock(&self.world).files[self.file].len()).unwrap())
    }
}

/// The folder of the index of a [`World`].
#[derive(Debug)]
pub(crate) struct RecordedFolder(pub(crate) Shared);

impl Folder for RecordedFolder {
    fn create_beside(&self) -> io::Result<Box<dyn Storage>> {
        let mut world = lock(&self.0);
        world.begin(Op::Create)?;
        let file = world.files.len();
        world.files.push(Vec::new());
        world.beside = Some(file);
        Ok(Box::new(RecordedFile { world: Arc::clone(&self.0), file }))
    }

    fn replace_index(&self) -> io::Result<()> {
        let mut world = lock(&self.0);
        let file = world.beside.unwrap();
        world.begin(Op::Rename { file })?;
        world.index = file;
        world.beside = None;
        Ok(())
    }

    fn remove_beside(&self) -> io::Result<()> {
        lock(&self.0).beside = None;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        lock(&self.0).begin(Op::SyncFolder)
    }
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    if file.len() < end {
        file.resize(end, 0);
    }
    file[at..end].copy_from_slice(bytes);
}

/// What is durable after some operations, and what may be.
#[derive(Debug)]
pub(crate) struct Disk {
    durable: Vec<Vec<u8>>,
    pending: Vec<Vec<Op>>,
    index: usize,
    renamed: Vec<usize>,
}

impl Disk {
    pub(crate) fn of(data: Vec<u8>, index: Vec<u8>) -> Self {
        Self {
            durable: vec![data, index],
            pending: vec![Vec::new(), Vec::new()],
            index: 1,
            renamed: Vec::new(),
        }
    }

    /// The next operation is done.
    pub(crate) fn apply(&mut self, op: &Op) {
        match op {
            Op::Write { file, .. } | Op::SetLen { file, .. } => {
                self.pending[*file].push(op.clone());
            }
            Op::Sync { file } => {
                for op in std::mem::take(&mut self.pending[*file]) {
                    match op {
                        Op::Write { at, bytes, .. } => put(&mut self.durable[*file], at, &bytes),
                        Op::SetLen { len, .. } => self.durable[*file].resize(len, 0),
                        _ => {}
                    }
                }
            }
            Op::Create => {
                self.durable.push(Vec::new());
                self.pending.push(Vec::new());
            }
            Op::Rename { file } => self.renamed.push(*file),
            Op::SyncFolder => {
                if let Some(file) = self.renamed.pop() {
                    self.index = file;
                }
                self.renamed.clear();
            }
        }
    }

    /// The data and the index file as a power cut now may leave them.
    pub(crate) fn cut(&self, random: &mut Random) -> (Vec<u8>, Vec<u8>) {
        let mut index = self.index;
        for file in &self.renamed {
            if random.one_in(2) {
                index = *file;
            }
        }
        (self.cut_file(0, random), self.cut_file(index, random))
    }

    fn cut_file(&self, file: usize, random: &mut Random) -> Vec<u8> {
        let durable = &self.durable[file];
        let pending = &self.pending[file];
        if pending.is_empty() {
            return durable.clone();
        }
        let mut sizes = vec![durable.len()];
        let mut len = durable.len();
        for op in pending {
            match op {
                Op::Write { at, bytes, .. } => len = len.max(at + bytes.len()),
                Op::SetLen { len: cut, .. } => len = *cut,
                _ => {}
            }
            sizes.push(len);
        }
        let most = sizes.iter().copied().max().unwrap_or(0);
        let mut left = durable.clone();
        left.resize(most, 0);
        if file == 0 && random.one_in(2) {
            left[durable.len()..].fill(0xa5);
        }
        // Either nearly all of it reached the disk, or half of it, or little.
        let (kept, of) = [(9, 10), (1, 2), (1, 10)][random.index(3)];
        let mut pieces = sectors_of(pending);
        if random.one_in(2) {
            shuffle(&mut pieces, random);
        }
        for (at, bytes) in pieces {
            if random.below(of) >= kept {
                continue;
            }
            if !random.one_in(8) {
                left[at..at + bytes.len()].copy_from_slice(bytes);
                continue;
            }
            let torn = random.index(bytes.len() + 1);
            left[at..at + torn].copy_from_slice(&bytes[..torn]);
            let fresh = (at + torn).max(durable.len());
            if fresh < at + bytes.len() && random.one_in(2) {
                for byte in &mut left[fresh..at + bytes.len()] {
                    *byte = random.next().to_le_bytes()[0];
                }
            }
        }
        left.truncate(sizes[random.index(sizes.len())]);
        left
    }

    /// The data and the index file as a killed process leaves them: all that was done.
    pub(crate) fn kept(&self) -> (Vec<u8>, Vec<u8>) {
        let whole = |file: usize| {
            let mut content = self.durable[file].clone();
            for op in &self.pending[file] {
                match op {
                    Op::Write { at, bytes, .. } => put(&mut content, *at, bytes),
                    Op::SetLen { len, .. } => content.resize(*len, 0),
                    _ => {}
                }
            }
            content
        };
        (whole(0), whole(*self.renamed.last().unwrap_or(&self.index)))
    }
}

/// The pending writes, sector by sector.
fn sectors_of(pending: &[Op]) -> Vec<(usize, &[u8])> {
    let mut pieces = Vec::new();
    for op in pending {
        let Op::Write { at, bytes, .. } = op else { continue };
        let mut here = 0;
        while here < bytes.len() {
            let end = ((at + here) / 512 + 1) * 512 - at;
            let end = end.min(bytes.len());
            pieces.push((at + here, &bytes[here..end]));
            here = end;
        }
    }
    pieces
}

fn shuffle<T>(items: &mut [T], random: &mut Random) {
    for last in (1..items.len()).rev() {
        items.swap(last, random.index(last + 1));
    }
}
