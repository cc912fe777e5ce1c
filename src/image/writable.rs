//! An image that takes writes: a pair on top, and the layers below that are read through its gaps.

use super::open::{load_image_config, load_service_config, open_each};
use super::{Image, Layer, Reader, Stack};
use crate::disk::{Disk, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::source::FileIdentity;
use crate::units::{SECTOR_SIZE, to_u64, to_usize, whole_sectors};
use crate::upper::{Pair, PairFiles, PairOptions, PairPaths, PairWorker, Usage};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the opener of a [`WritableImage`] decides.
#[derive(Debug, Default)]
pub struct UpperChoice {
    /// The data file, open for reading and writing, of a server that died: its lock goes with it.
    pub data: Option<File>,
    /// What the pair must be; the layers below are filled in from the config.
    pub options: PairOptions,
}

/// Tells an upper what lies below it: the files that it must not be one of, and their size.
pub(super) fn describe_lowers(options: &mut PairOptions, lowers: Option<&Image>) {
    let files = lowers.into_iter().flat_map(Image::layer_identities);
    options
        .lowers
        .extend(files.map(|layer| FileIdentity { device_number: layer.dev, inode: layer.ino }));
    options.lower_bytes = lowers.map_or(0, Image::virtual_bytes);
}

/// An open image with a writable pair on top. Its size is the pair's.
#[derive(Debug)]
pub struct WritableImage {
    lowers: Option<Image>,
    paths: PairPaths,
    pair: Arc<Pair>,
}

impl WritableImage {
    /// Opens the image that a `config.v1.json` describes, to be written. Blocks on the disk.
    ///
    /// # Errors
    /// `InvalidConfig` when it names no upper; as [`Image::open_config`] and [`Pair::open`].
    pub fn open_config(
        config: &Path,
        service_config: Option<&Path>,
        choice: UpperChoice,
    ) -> Result<Self> {
        let service = load_service_config(service_config)?;
        let mut config = load_image_config(config, service_config)?;
        let Some(upper) = config.upper.take() else {
            let message = "the config names no upper, so the image cannot be written";
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        };
        let paths = PairPaths {
            data: PathBuf::from(upper.data.as_str()),
            index: PathBuf::from(upper.index.as_str()),
        };
        let layers: Result<Vec<Layer>> = open_each(&config, &service).into_iter().collect();
        Self::compose(layers?, &paths, choice)
    }

    /// Puts the pair at `paths` on top of `lowers`, lowest first, which may be none.
    ///
    /// # Errors
    /// As [`WritableImage::open_config`].
    pub fn compose(lowers: Vec<Layer>, paths: &PairPaths, choice: UpperChoice) -> Result<Self> {
        let lowers =
            if lowers.is_empty() { None } else { Some(Stack::from_layers(lowers)?.into_image()?) };
        Self::on_top_of(lowers, paths, choice)
    }

    /// Puts the pair at `paths` on top of an image, if there is one below it.
    ///
    /// # Errors
    /// As [`Pair::open`].
    pub fn on_top_of(
        lowers: Option<Image>,
        paths: &PairPaths,
        choice: UpperChoice,
    ) -> Result<Self> {
        let UpperChoice { data, mut options } = choice;
        describe_lowers(&mut options, lowers.as_ref());
        let pair = match data {
            Some(data) => Pair::open_with(data, paths, &options)?,
            None => Pair::open(paths, &options)?,
        };
        Ok(Self { lowers, paths: paths.clone(), pair })
    }

    /// Puts an open pair on top of an image, if there is one below it. `paths` is where its files
    /// are.
    #[must_use]
    pub fn with_pair(lowers: Option<Image>, paths: PairPaths, pair: Arc<Pair>) -> Self {
        Self { lowers, paths, pair }
    }

    /// Opens an empty pair that is to take the place of this one, over the same layers and within
    /// the same quota.
    ///
    /// # Errors
    /// As [`Pair::open`].
    pub fn open_next(&self, files: PairFiles) -> Result<Arc<Pair>> {
        let quota_bytes = self.usage().quota_bytes;
        let mut options = PairOptions { quota_bytes, ..PairOptions::default() };
        describe_lowers(&mut options, self.lowers());
        Pair::open_files(files, &options)
    }

    /// Where the files of the pair are.
    #[must_use]
    pub fn paths(&self) -> &PairPaths {
        &self.paths
    }

    /// What lies below the pair.
    #[must_use]
    pub fn lowers(&self) -> Option<&Image> {
        self.lowers.as_ref()
    }

    /// Size of the virtual disk in sectors.
    #[must_use]
    pub fn virtual_sectors(&self) -> u64 {
        self.pair.virtual_sectors()
    }

    /// The read size in bytes that costs least per byte, as [`crate::disk::Geometry`] tells it.
    #[must_use]
    pub fn optimal_io_bytes(&self) -> u32 {
        self.lowers.as_ref().map_or(4096, |lowers| lowers.geometry().optimal_io_bytes)
    }

    /// The pair on top.
    #[must_use]
    pub fn pair(&self) -> &Arc<Pair> {
        &self.pair
    }

    /// A reader and writer for the calling thread. Takes all memory that reads will need.
    ///
    /// # Errors
    /// When memory or a codec context cannot be had.
    pub fn worker(&self) -> Result<WritableWorker> {
        let below = self.lowers.as_ref().map(Disk::worker).transpose()?;
        let below_sectors =
            self.lowers.as_ref().map_or(0, |lowers| whole_sectors(lowers.virtual_bytes()));
        Ok(WritableWorker { above: self.pair.worker(), below, below_sectors })
    }

    /// Makes durable what was acknowledged.
    ///
    /// # Errors
    /// As [`Pair::flush`].
    pub fn flush(&self) -> Result<()> {
        self.pair.flush()
    }

    /// What the pair holds.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.pair.usage()
    }

    /// As [`Pair::close`].
    ///
    /// # Errors
    /// As there.
    pub fn close(&self) -> Result<()> {
        self.pair.close()
    }
}

/// One thread's reader and writer of a [`WritableImage`].
#[derive(Debug)]
pub struct WritableWorker {
    above: PairWorker,
    below: Option<Reader>,
    below_sectors: u64,
}

impl WritableWorker {
    /// Fills `dst` (whole sectors) from `start_sector` on.
    ///
    /// # Errors
    /// As [`PairWorker::read`] and [`Reader`]'s.
    pub fn read(&mut self, start_sector: u64, dst: &mut [u8]) -> Result<()> {
        let Self { above, below, below_sectors } = self;
        above.read(start_sector, dst, |sector, gap| {
            // The pair may be larger than what lies below it.
            let inside = below_sectors.saturating_sub(sector).saturating_mul(SECTOR_SIZE);
            let len = to_usize(inside.min(to_u64(gap.len()))).unwrap_or(0);
            let (covered, beyond) = gap.split_at_mut(len);
            beyond.fill(0);
            match below {
                Some(below) if !covered.is_empty() => below.read(sector, covered),
                _ => Ok(()),
            }
        })
    }

    /// As [`Worker::would_wait`]: only what lies below the pair can be elsewhere.
    pub fn would_wait(&mut self, sectors: Range<u64>) -> bool {
        let Self { above, below, below_sectors } = self;
        let Some(below) = below else { return false };
        above.gaps(sectors).any(|gap| {
            let gap = gap.start..gap.end.min(*below_sectors);
            !gap.is_empty() && below.would_wait(gap)
        })
    }

    /// As [`PairWorker::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write(&mut self, start_sector: u64, src: &[u8]) -> Result<()> {
        self.above.write(start_sector, src)
    }

    /// As [`PairWorker::zero`].
    ///
    /// # Errors
    /// As there.
    pub fn zero(&mut self, sectors: Range<u64>) -> Result<()> {
        self.above.zero(sectors)
    }

    /// As [`Pair::flush`].
    ///
    /// # Errors
    /// As there.
    pub fn flush(&mut self) -> Result<()> {
        self.above.flush()
    }
}
