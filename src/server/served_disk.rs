//! What a server serves: an image without writes, or one with a writable pair on top.
//!
//! A pair has one writer. So a successor makes everything else ready while the old server still
//! lives ([`Ready`]), and opens the pair when that one has ended: its entries since the last flush
//! are in the pair's journal.

use super::portable::{Kept, unpack};
use super::protocol::UpperUsage;
use super::snapshot::{Settled, settle};
use super::state::{LayerFile, State};
use super::supervisor::ParcelFiles;
use crate::disk::{Disk, Geometry, Space, Worker};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::{ImageConfig, ServiceConfig};
use crate::image::{
    Background, HostSettings, Image, LiveImage, LiveWorker, Reader, SparseImage, SparseImageWorker,
    Stack, UpperChoice, WritableImage, parse_image_config,
};
use crate::source::{Place, RemoteUsage};
use crate::upper::{self, Form, Pair, PairOptions, PairPaths, SparseUpper, Usage};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// In what units a pair gives space back: a page, as most file systems do.
const DISCARD_GRANULARITY_BYTES: u32 = 4096;

/// How long the last writer of a pair may take to let go of it: its descriptors are closed one
/// after the other.
const WRITER_PATIENCE: Duration = Duration::from_secs(10);

/// How long the supervisor may take to forget a device that was detached, and with it the lock of
/// its upper.
const FORGET_PATIENCE: Duration = Duration::from_secs(1);

/// The disk of one device.
#[derive(Debug)]
pub(super) enum ServedDisk {
    /// Nothing of it changes.
    ReadOnly(Image),
    /// It has an upper that takes writes.
    Writable(Box<LiveImage>),
    /// It has one in sparse form.
    Sparse(Box<Sparse>),
}

/// An image with an upper in sparse form, and where that lies.
#[derive(Debug)]
pub(super) struct Sparse {
    image: SparseImage,
    paths: PairPaths,
}

/// An upper that is written, for who must close it.
#[derive(Debug)]
pub(super) enum Upper {
    /// In append form.
    Pair(Arc<Pair>),
    /// In sparse form.
    Sparse(Arc<SparseUpper>),
}

impl Upper {
    /// As [`Pair::close`].
    pub(super) fn close(&self) -> Result<()> {
        match self {
            Self::Pair(pair) => pair.close(),
            Self::Sparse(upper) => upper.close(),
        }
    }

    fn usage(&self) -> Usage {
        match self {
            Self::Pair(pair) => pair.usage(),
            Self::Sparse(upper) => upper.usage(),
        }
    }

    fn failure(&self) -> Option<String> {
        let failure = match self {
            Self::Pair(pair) => pair.failure(),
            Self::Sparse(upper) => upper.failure(),
        };
        failure.map(ToOwned::to_owned)
    }

    fn warning(&self) -> Option<String> {
        match self {
            Self::Pair(pair) => pair.warning(),
            Self::Sparse(upper) => upper.warning(),
        }
    }

    fn data_file(&self) -> Option<&File> {
        match self {
            Self::Pair(pair) => pair.data_file(),
            Self::Sparse(upper) => Some(upper.data_file()),
        }
    }
}

/// One thread's way to a [`ServedDisk`].
#[derive(Debug)]
pub(super) enum ServedWorker {
    /// Of an image without writes.
    ReadOnly(Reader),
    /// Of one with an upper.
    Writable(LiveWorker),
    /// Of one with an upper in sparse form.
    Sparse(SparseImageWorker),
}

/// How a disk is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct How {
    /// Whether an upper is a part of the view that nobody writes to.
    pub(super) read_only: bool,
    /// Whether to make the upper's files if there are none.
    pub(super) make_upper: bool,
    /// Most bytes of the upper's data file.
    pub(super) quota_bytes: Option<u64>,
    /// How long a read of a layer in a registry may take, if not the default.
    pub(super) io_deadline_s: Option<u64>,
}

impl ServedDisk {
    /// Opens the image that `config` describes; `text` is its content with absolute paths.
    ///
    /// # Errors
    /// Located: which layer, which file, what is wrong with it.
    pub(super) fn open(
        config: &Path,
        text: &[u8],
        service_config: Option<&Path>,
        how: How,
    ) -> Result<Self> {
        let mut parsed =
            ImageConfig::parse(text).context(|| format!("parse {}", config.display()))?;
        let host = HostSettings { service_config, io_deadline_seconds: how.io_deadline_s };
        let Some(paths) = pair_paths(&parsed).filter(|_| !how.read_only) else {
            if how.quota_bytes.is_some() {
                let message = "a quota is for an upper that is written, and there is none";
                return Err(Error::new(ErrorKind::Usage, message));
            }
            let service = host.load()?;
            let image = Image::open_text(config, text, &service)?;
            image.begin_background(&parsed, &service);
            return Ok(Self::ReadOnly(image));
        };
        parsed.upper = None;
        let begin = Image::begin_background;
        let lowers = open_lowers(&parsed, host, begin)?;
        if !paths.data.exists() {
            // Of a snapshot that was interrupted: not to be met by a new pair.
            check_still_a_pair(&paths)?;
        }
        if how.make_upper && upper::is_vacant(&paths) {
            let bytes = lowers.as_ref().map_or(0, Image::virtual_bytes);
            make_pair(&paths, bytes, Form::Append)?;
        }
        let locked = lock_free_pair(&paths);
        if locked.is_some() {
            check_still_a_pair(&paths)?;
        }
        Self::on_top_of(lowers, paths, locked, how.quota_bytes)
    }

    fn on_top_of(
        lowers: Option<Image>,
        paths: PairPaths,
        data: Option<File>,
        quota_bytes: Option<u64>,
    ) -> Result<Self> {
        let options = PairOptions { quota_bytes, ..PairOptions::default() };
        let data = match data {
            Some(data) => data,
            None => upper::open_data(&paths)?,
        };
        if upper::is_sparse(&data).context(|| format!("open {}", paths.data.display()))? {
            let image = SparseImage::on_top_of(lowers, &paths, Some(data), options)?;
            return Ok(Self::Sparse(Box::new(Sparse { image, paths })));
        }
        let data = Some(data);
        let choice = UpperChoice { data, options };
        let image = WritableImage::on_top_of(lowers, &paths, choice)?;
        Ok(Self::Writable(Box::new(LiveImage::new(image))))
    }

    /// What goes on beside its reads.
    pub(super) fn background(&self) -> Option<Arc<Background>> {
        self.in_lowers(|lowers| lowers.and_then(Image::background))
    }

    /// The upper that is written.
    pub(super) fn upper(&self) -> Option<Upper> {
        match self {
            Self::ReadOnly(_) => None,
            Self::Writable(live) => Some(Upper::Pair(Arc::clone(live.current().pair()))),
            Self::Sparse(sparse) => Some(Upper::Sparse(Arc::clone(sparse.image.upper()))),
        }
    }

    fn upper_paths(&self) -> Option<PairPaths> {
        match self {
            Self::ReadOnly(_) => None,
            Self::Writable(live) => Some(live.current().paths().clone()),
            Self::Sparse(sparse) => Some(sparse.paths.clone()),
        }
    }

    /// What `look` sees in the image without its upper, if it has anything else.
    fn in_lowers<T>(&self, look: impl FnOnce(Option<&Image>) -> T) -> T {
        match self {
            Self::ReadOnly(image) => look(Some(image)),
            Self::Writable(live) => look(live.current().lowers()),
            Self::Sparse(sparse) => look(sparse.image.lowers()),
        }
    }
}

/// Ends a snapshot of the pair that was interrupted, which nobody serves.
///
/// # Errors
/// `InvalidConfig` when the pair is a layer now; as [`settle`].
fn check_still_a_pair(paths: &PairPaths) -> Result<()> {
    let Settled::Done(after) = settle(paths)? else { return Ok(()) };
    let message = format!(
        "the upper {} has become a layer by a snapshot: attach {}",
        paths.data.display(),
        after.config.display()
    );
    Err(Error::new(ErrorKind::InvalidConfig, message))
}

/// Makes the files of a new pair, and their folder.
pub(super) fn make_pair(paths: &PairPaths, virtual_bytes: u64, form: Form) -> Result<()> {
    if let Some(folder) = paths.data.parent().filter(|folder| !folder.exists()) {
        // Durable, or all that is flushed into it may be gone with it.
        std::fs::create_dir(folder)
            .and_then(|()| Place::of(folder).map_err(std::io::Error::other)?.sync())
            .map_err(|error| Error::io(format!("make {}", folder.display()), &error))?;
    }
    upper::create_fresh(paths, virtual_bytes, form)
        .map_err(|error| error.context(format!("make the upper {}", paths.data.display())))
}

fn folders_of(paths: &PairPaths) -> Vec<PathBuf> {
    [&paths.data, &paths.index].iter().filter_map(|path| path.parent()).map(Into::into).collect()
}

/// The files of the upper that a config names, if it names one.
pub(super) fn pair_paths(config: &ImageConfig) -> Option<PairPaths> {
    config.upper.as_ref().map(|upper| PairPaths {
        data: PathBuf::from(upper.data.as_str()),
        index: PathBuf::from(upper.index.as_str()),
    })
}

/// The layers of a config without an upper, merged; `None` when there are none.
fn open_lowers(
    config: &ImageConfig,
    host: HostSettings<'_>,
    begin: fn(&Image, &ImageConfig, &ServiceConfig),
) -> Result<Option<Image>> {
    if config.stack_lowers().is_empty() {
        return Ok(None);
    }
    let service = host.load()?;
    let image = Stack::open(config, &service)?.into_image()?;
    begin(&image, config, &service);
    Ok(Some(image))
}

impl Disk for ServedDisk {
    type Worker = ServedWorker;

    fn geometry(&self) -> Geometry {
        match self {
            Self::ReadOnly(image) => image.geometry(),
            Self::Writable(live) => {
                let image = live.current();
                Geometry {
                    sectors: image.virtual_sectors(),
                    read_only: false,
                    optimal_io_bytes: image.optimal_io_bytes(),
                    discard_granularity_bytes: Some(DISCARD_GRANULARITY_BYTES),
                }
            }
            Self::Sparse(sparse) => sparse.image.geometry(),
        }
    }

    fn worker(&self) -> Result<ServedWorker> {
        match self {
            Self::ReadOnly(image) => image.worker().map(ServedWorker::ReadOnly),
            Self::Writable(live) => live.worker().map(ServedWorker::Writable),
            Self::Sparse(sparse) => sparse.image.worker().map(ServedWorker::Sparse),
        }
    }

    fn flush(&self) -> Result<()> {
        match self {
            Self::ReadOnly(_) => Ok(()),
            Self::Writable(live) => live.current().flush(),
            Self::Sparse(sparse) => sparse.image.flush(),
        }
    }

    fn may_wait(&self) -> bool {
        self.in_lowers(|lowers| lowers.is_some_and(Disk::may_wait))
    }

    fn cancel(&self) {
        self.in_lowers(|lowers| lowers.into_iter().for_each(Disk::cancel));
    }
}

impl Worker for ServedWorker {
    fn would_wait(&mut self, sectors: Range<u64>) -> bool {
        match self {
            Self::ReadOnly(reader) => reader.would_wait(sectors),
            Self::Writable(worker) => worker.would_wait(sectors),
            Self::Sparse(worker) => worker.would_wait(sectors),
        }
    }

    fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        match self {
            Self::ReadOnly(reader) => reader.read(start_sector, dst),
            Self::Writable(worker) => worker.read(start_sector, dst),
            Self::Sparse(worker) => worker.read(start_sector, dst),
        }
    }

    fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        match self {
            Self::ReadOnly(reader) => reader.write(start_sector, src),
            Self::Writable(worker) => worker.write(start_sector, src),
            Self::Sparse(worker) => worker.write(start_sector, src),
        }
    }

    fn write_zeroes(&mut self, sectors: Range<u64>, space: Space) -> Result<()> {
        match self {
            Self::ReadOnly(reader) => reader.write_zeroes(sectors, space),
            // A pair never writes in place, so there is no space that could be kept for later.
            Self::Writable(worker) => worker.zero(sectors),
            Self::Sparse(worker) => worker.write_zeroes(sectors, space),
        }
    }
}

impl Kept for ServedDisk {
    fn usage(&self) -> Option<UpperUsage> {
        let (upper, paths) = self.upper().zip(self.upper_paths())?;
        let usage = upper.usage();
        Some(UpperUsage {
            data: paths.data,
            live_bytes: usage.live_bytes,
            file_bytes: usage.file_bytes,
            dead_bytes: usage.dead_bytes,
            index_bytes: usage.index_bytes,
            unflushed_entries: usage.unflushed_entries,
            failure: upper.failure(),
            used_bytes: usage.used_bytes(),
            quota_bytes: usage.quota_bytes,
            quota_percent: usage.quota_percent(),
            warning: upper.warning(),
        })
    }

    fn remote(&self) -> Option<RemoteUsage> {
        self.in_lowers(|lowers| lowers.and_then(Image::remote_usage))
    }

    fn live(&self) -> Option<&LiveImage> {
        let Self::Writable(live) = self else { return None };
        Some(live)
    }

    fn hand_on(&self) {
        self.in_lowers(|lowers| lowers.into_iter().for_each(Kept::hand_on));
    }

    fn close(&self) -> Result<()> {
        self.in_lowers(|lowers| lowers.map_or(Ok(()), Kept::close))?;
        self.upper().map_or(Ok(()), |upper| upper.close()).context(|| "close the upper".to_owned())
    }

    /// Of an image with an upper, the lowers' parcel and, last, the upper's data file: with it goes
    /// the lock that keeps other writers out.
    fn pack(&self) -> Result<ParcelFiles> {
        let mut files = self.in_lowers(|lowers| lowers.map_or(Ok(Vec::new()), Kept::pack))?;
        if let Some(upper) = self.upper()
            && let Some(data) = upper.data_file()
        {
            let copy = data.as_fd().try_clone_to_owned();
            files.push(copy.map_err(|error| Error::io("hand on the upper", &error))?);
        }
        Ok(files)
    }

    fn layer_files(&self) -> Vec<LayerFile> {
        self.in_lowers(|lowers| lowers.map_or(Vec::new(), Kept::layer_files))
    }

    fn upper_file(&self) -> Option<LayerFile> {
        let (upper, paths) = self.upper().zip(self.upper_paths())?;
        LayerFile::of(&paths.data, upper.data_file()?).ok()
    }

    fn folders(&self) -> Vec<PathBuf> {
        let mut folders = self.in_lowers(|lowers| lowers.map_or(Vec::new(), Kept::folders));
        folders.extend(self.upper_paths().iter().flat_map(folders_of));
        folders
    }
}

/// A disk of which everything is ready that can be while another process serves it.
#[derive(Debug)]
pub(super) enum Ready {
    /// All of it.
    ReadOnly(Image),
    /// All but the pair.
    Writable {
        /// What lies below it.
        lowers: Option<Image>,
        /// Where it is.
        paths: PairPaths,
        /// Its data file, with the old server's lock.
        data: Option<File>,
    },
}

impl Ready {
    /// What was packed into these files, or else what the state file says: the config as it was.
    /// Only the very same files are believed. Also whether it came from the parcel.
    ///
    /// # Errors
    /// When neither leads to the files that were attached.
    pub(super) fn of(mut files: ParcelFiles, state: &State) -> Result<(Self, bool)> {
        let text = serde_json::to_vec(&state.config_content).unwrap_or_default();
        let host = HostSettings {
            service_config: state.service_config.as_deref(),
            io_deadline_seconds: state.io_deadline_s,
        };
        let Some((upper, paths)) = upper_of(state)? else {
            let anew = || {
                let service = host.load()?;
                let config = parse_image_config(&state.config, &text)?;
                let config = as_attached(config, &state.layers);
                let image = Stack::open(&config, &service)?.into_image()?;
                image.continue_background(&config, &service);
                Ok(image)
            };
            let (image, from_parcel) = unpack_or(files, state, anew)?;
            if let Ok(config) = ImageConfig::parse(&text) {
                continue_recording(&image, &config);
            }
            return Ok((Self::ReadOnly(image), from_parcel));
        };
        // Taken whatever the rest is worth: the supervisor holds the same lock.
        let data = files.pop().map(File::from).filter(|data| check_upper(data, &upper).is_ok());
        let config = ImageConfig::parse(&text).context(|| "parse the config".to_owned())?;
        let mut config = as_attached(config, &state.layers);
        config.upper = None;
        if config.stack_lowers().is_empty() {
            let from_parcel = data.is_some();
            return Ok((Self::Writable { lowers: None, paths, data }, from_parcel));
        }
        let anew = || {
            let gone = || Error::new(ErrorKind::NotFound, "the config has no layers any more");
            let begin = Image::continue_background;
            open_lowers(&config, host, begin)?.ok_or_else(gone)
        };
        let (lowers, from_parcel) = unpack_or(files, state, anew)?;
        continue_recording(&lowers, &config);
        Ok((Self::Writable { lowers: Some(lowers), paths, data }, from_parcel))
    }

    /// Folders and files that the disk goes on to need by their paths.
    pub(super) fn folders(&self) -> Vec<PathBuf> {
        match self {
            Self::ReadOnly(image) => image.folders(),
            Self::Writable { lowers, paths, .. } => {
                let mut folders = lowers.as_ref().map_or(Vec::new(), Kept::folders);
                folders.extend(folders_of(paths));
                folders
            }
        }
    }

    /// Opens the pair, now that nobody else writes it.
    ///
    /// # Errors
    /// What is wrong with the pair; `Busy` when its writer does not let go of it.
    pub(super) fn complete(self, state: &State) -> Result<ServedDisk> {
        let (lowers, paths, data) = match self {
            Self::ReadOnly(image) => return Ok(ServedDisk::ReadOnly(image)),
            Self::Writable { lowers, paths, data } => (lowers, paths, data),
        };
        let data = match data {
            Some(data) => data,
            None => reopen(&paths, state)?,
        };
        ServedDisk::on_top_of(lowers, paths, Some(data), state.quota_bytes)
    }
}

/// Goes on with the recording of an image from a parcel, all of whose layers are files: there is
/// nothing to download, and no setting of the host matters.
fn continue_recording(image: &Image, config: &ImageConfig) {
    image.continue_background(config, &ServiceConfig::default());
}

/// The data file of a pair, locked, if that takes no longer than it takes a supervisor to forget a
/// device whose server is dead. Without it, the pair's own opening tells what is wrong.
fn lock_free_pair(paths: &PairPaths) -> Option<File> {
    let data = upper::open_data(paths).ok()?;
    let deadline = Instant::now() + FORGET_PATIENCE;
    while Instant::now() < deadline {
        if data.try_lock().is_ok() {
            return Some(data);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// Opens and locks the data file of a pair whose writer is ending.
fn reopen(paths: &PairPaths, state: &State) -> Result<File> {
    let data = upper::open_data(paths)?;
    if let Some(upper) = &state.upper {
        check_upper(&data, upper)?;
    }
    let deadline = Instant::now() + WRITER_PATIENCE;
    while data.try_lock().is_err() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Whoever has it still is named by the pair's own lock.
    Ok(data)
}

/// The upper that the device was attached with for writing, and where its files are.
fn upper_of(state: &State) -> Result<Option<(LayerFile, PairPaths)>> {
    let Some(upper) = state.upper.clone() else { return Ok(None) };
    let text = serde_json::to_vec(&state.config_content).unwrap_or_default();
    let config = ImageConfig::parse(&text).context(|| "parse the config".to_owned())?;
    let paths = pair_paths(&config).ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, "the state file has an upper and its config none")
    })?;
    Ok(Some((upper, paths)))
}

fn check_upper(data: &File, expected: &LayerFile) -> Result<()> {
    let found = data.metadata().map_err(|error| Error::io("stat the upper", &error))?;
    let found = (found.dev(), found.ino());
    if found == (expected.dev, expected.ino) {
        return Ok(());
    }
    let message = format!(
        "{} is not the file that was attached: found {found:?}, expected {expected:?}",
        expected.path.display()
    );
    Err(Error::new(ErrorKind::Corrupt, message))
}

/// The config with its layers where they were at the attach. One that was elsewhere then stays
/// there, though its file has come to be in its folder since, as it does when all of it has been
/// fetched.
fn as_attached(mut config: ImageConfig, layers: &[LayerFile]) -> ImageConfig {
    let count = config.stack_lowers().len();
    for lower in config.lowers.iter_mut().take(count).filter(|lower| !lower.digest.is_empty()) {
        let candidates = lower.local_candidates();
        let was_here = layers.iter().any(|layer| candidates.contains(&layer.path));
        if !was_here && candidates.iter().any(|path| path.exists()) {
            lower.file.clear();
            lower.dir.clear();
        }
    }
    config
}

/// The image in a parcel, or else the one that `anew` opens; and whether it was the first.
fn unpack_or(
    files: ParcelFiles,
    state: &State,
    anew: impl FnOnce() -> Result<Image>,
) -> Result<(Image, bool)> {
    if !files.is_empty() {
        let unpacked = unpack(files).and_then(|image| check_files(&image, state).map(|()| image));
        match unpacked {
            Ok(image) => return Ok((image, true)),
            // Of another version, for one.
            Err(error) => tracing::warn!("the parcel is of no use: {error:#}"),
        }
    }
    let image = anew().context(|| "open the image anew".to_owned())?;
    check_files(&image, state)?;
    Ok((image, false))
}

/// Whether the image is made of the very files that were attached.
fn check_files(image: &Image, state: &State) -> Result<()> {
    let found = image.layer_files();
    for (layer, (found, expected)) in found.iter().zip(&state.layers).enumerate() {
        if found != expected {
            let message = format!(
                "layer {layer} is not the file that was attached: found {found:?}, expected \
                 {expected:?}"
            );
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
    }
    if found.len() != state.layers.len() {
        let message = format!("found {} layers, expected {}", found.len(), state.layers.len());
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    Ok(())
}

/// Removes the files of an upper that was to last as long as its device, and what a snapshot that
/// was taken has left of an earlier one.
pub(super) fn remove_ephemeral(state: &State) {
    if let Some((data, index)) = state.unsettled.clone()
        && let Err(error) = settle(&PairPaths { data, index })
    {
        tracing::warn!("left of a snapshot: {error:#}");
    }
    if !state.ephemeral {
        return;
    }
    let Ok(Some((_, paths))) = upper_of(state) else { return };
    if !matches!(settle(&paths), Ok(Settled::None | Settled::Undone)) {
        // It is a layer now, or nobody knows: not to be lost.
        return;
    }
    if let Err(error) = upper::remove(&paths, &upper::journal_folder()) {
        tracing::warn!("{error:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer in a registry gets its file once all of it has been fetched. The successor of a
    /// server that died after that found a layer that nobody had attached, and refused.
    #[test]
    fn a_layer_that_was_elsewhere_stays_there_though_its_file_has_come() {
        let folder = tempfile::tempdir().unwrap();
        let dir = |name: &str| {
            let dir = folder.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            dir
        };
        let (came, here, absent, trace) = (dir("came"), dir("here"), dir("absent"), dir("trace"));
        for dir in [&came, &here, &trace] {
            std::fs::write(dir.join("overlaybd.commit"), "layer").unwrap();
        }
        let path = here.join("overlaybd.commit");
        let layers = [LayerFile::of(&path, &File::open(&path).unwrap()).unwrap()];
        let config = serde_json::json!({
            "lowers": [
                {"digest": "sha256:1", "dir": came},
                {"digest": "sha256:2", "dir": here},
                {"digest": "sha256:3", "dir": absent},
                {"dir": came},
                {"digest": "sha256:4", "dir": trace},
            ],
            "accelerationLayer": true,
        });
        let config = ImageConfig::parse(config.to_string().as_bytes()).unwrap();
        let found = as_attached(config, &layers);
        let dirs: Vec<&Path> = found.lowers.iter().map(|lower| Path::new(&lower.dir)).collect();
        assert_eq!(dirs, [Path::new(""), &here, &absent, &came, &trace]);
    }
}
