//! The layers of an image, lowest first, and their merge.

use super::layer::{Layer, LayerKind};
use super::open;
use super::payload::Payload;
use super::{Image, Parts};
use crate::error::{Error, ErrorKind, Result};
use crate::format::config::{ImageConfig, ServiceConfig};
use crate::format::lsmt::SegmentMapping;
use crate::limits::{LAYER_COUNT_MAX, MERGE_ENTRIES_MAX};
use crate::map::{FlatMap, Run, Stroke, Target, paint, paint_with_seams};
use crate::units::SECTOR_SIZE;
use std::sync::Arc;

/// A way to paint.
type Paint = fn(Vec<Stroke>) -> Vec<Run>;

/// Open layers, lowest first; an upper is the last.
#[derive(Debug)]
pub struct Stack {
    layers: Vec<Layer>,
}

/// Why a sector reads as it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provenance {
    /// A layer's entry holds its data.
    Data {
        /// Position of the layer in the stack.
        layer: usize,
        /// The sector's place in the layer's LSMT file.
        sector: u64,
        /// The index entry.
        segment: SegmentMapping,
    },
    /// A layer's entry says zeros.
    Zeroed {
        /// Position of the layer in the stack.
        layer: usize,
        /// The index entry.
        segment: SegmentMapping,
    },
    /// No layer has an entry for it: it reads as zeros.
    Hole,
}

impl Stack {
    /// Opens all layers of a config, several at a time.
    ///
    /// # Errors
    /// That of the lowest layer that fails, with its number and path.
    pub fn open(config: &ImageConfig, service: &ServiceConfig) -> Result<Self> {
        let layers: Result<Vec<Layer>> = open::open_each(config, service).into_iter().collect();
        Self::from_layers(layers?)
    }

    /// A stack of layers that are open already, lowest first.
    ///
    /// # Errors
    /// `InvalidConfig` when there are none or too many.
    pub fn from_layers(layers: Vec<Layer>) -> Result<Self> {
        if layers.is_empty() || layers.len() > LAYER_COUNT_MAX {
            let message = format!("found {} layers, expected 1 to {LAYER_COUNT_MAX}", layers.len());
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        Ok(Self { layers })
    }

    /// The layers, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Size of the virtual disk in bytes: that of the topmost layer that states one.
    #[must_use]
    pub fn virtual_bytes(&self) -> u64 {
        self.layers
            .iter()
            .rev()
            .map(|layer| layer.virtual_bytes)
            .find(|&size| size > 0)
            .unwrap_or(0)
    }

    /// The merged map of all layers.
    ///
    /// # Errors
    /// `Corrupt` when together they are larger than the map can address.
    pub fn merge(&self) -> Result<FlatMap> {
        FlatMap::build(&paint(self.strokes(paint)?), self.virtual_bytes() / SECTOR_SIZE)
    }

    /// What the layers together say, as disjoint runs in order: unlike the map, this tells sectors
    /// that an entry zeroes from those that no entry covers.
    ///
    /// # Errors
    /// `Unsupported` for more entries than we merge.
    pub fn runs(&self) -> Result<Vec<Run>> {
        Ok(paint_with_seams(self.strokes(paint_with_seams)?))
    }

    /// Everything that is to be painted; the logs of writable layers are, already.
    fn strokes(&self, paint_log: Paint) -> Result<Vec<Stroke>> {
        let count: usize = self.layers.iter().map(|layer| layer.segments.len()).sum();
        if count > MERGE_ENTRIES_MAX {
            let message =
                format!("{count} index entries in all layers, at most {MERGE_ENTRIES_MAX}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let mut strokes = Vec::with_capacity(count);
        for (layer, height) in self.layers.iter().zip(0_u16..) {
            match layer.kind {
                LayerKind::Sealed | LayerKind::WritableSparse => {
                    let segments = layer.segments.iter();
                    strokes.extend(segments.map(|segment| stroke(segment, height)));
                }
                LayerKind::WritableAppend => {
                    strokes.extend(replay(layer, height, paint_log)?.into_iter().map(|run| {
                        Stroke {
                            start_sector: run.start_sector,
                            end_sector: run.end_sector,
                            height: u32::from(height),
                            target: run.target,
                        }
                    }));
                }
            }
        }
        Ok(strokes)
    }

    /// The layers, lowest first, when nothing else of the stack is needed any more.
    #[must_use]
    pub fn into_layers(self) -> Vec<Layer> {
        self.layers
    }

    /// Merges, and lets go of the indexes: what serving needs.
    ///
    /// # Errors
    /// As [`Stack::merge`].
    pub fn into_image(self) -> Result<Image> {
        let map = self.merge()?;
        let payloads: Vec<Payload> = self.layers.into_iter().map(|layer| layer.payload).collect();
        Ok(Image { parts: Arc::new(Parts::new(payloads.into_boxed_slice(), map)) })
    }

    /// Why `sector` reads as it does: asked of the layers one by one from the top, not of the
    /// merged map. Costs a walk over every index; for tools.
    #[must_use]
    pub fn provenance(&self, sector: u64) -> Provenance {
        for (layer, open) in self.layers.iter().enumerate().rev() {
            let covers = |segment: &&SegmentMapping| {
                segment.start_sector <= sector && sector < segment.end_sector()
            };
            // From the back: in a log the later entry wins.
            let Some(&segment) = open.segments.iter().rev().find(covers) else { continue };
            if segment.zeroed {
                return Provenance::Zeroed { layer, segment };
            }
            let sector = segment.mapped_sector + (sector - segment.start_sector);
            return Provenance::Data { layer, sector, segment };
        }
        Provenance::Hole
    }
}

impl Image {
    /// The image `below`, if there is one, with one more layer on top. The files below stay open as
    /// they are: none is looked for again.
    ///
    /// # Errors
    /// `Unsupported` for more layers than a stack may have; as [`Stack::merge`].
    pub fn with_layer(below: Option<&Self>, layer: Layer) -> Result<Self> {
        let Some(Self { parts }) = below else {
            return Stack::from_layers(vec![layer])?.into_image();
        };
        let count = parts.payloads.len();
        let top = u16::try_from(count).ok().filter(|_| count < LAYER_COUNT_MAX);
        let Some(top) = top else {
            let message = format!("{count} layers are there already, the most that a stack has");
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        let map = &parts.map;
        let mut strokes: Vec<Stroke> = map
            .extents(0, map.virtual_sectors())
            .map(|extent| Stroke {
                start_sector: extent.start_sector,
                end_sector: extent.start_sector + extent.sectors,
                height: 0,
                target: extent.target,
            })
            .collect();
        let above =
            layer.segments.iter().map(|segment| Stroke { height: 1, ..stroke(segment, top) });
        strokes.extend(above);
        let bytes = if layer.virtual_bytes > 0 {
            layer.virtual_bytes
        } else {
            map.virtual_sectors() * SECTOR_SIZE
        };
        let map = FlatMap::build(&paint(strokes), bytes / SECTOR_SIZE)?;
        let payloads = parts.payloads.iter().cloned().chain([layer.payload]).collect();
        let background = parts.background.clone();
        Ok(Self { parts: Arc::new(Parts { background, ..Parts::new(payloads, map) }) })
    }
}

fn stroke(segment: &SegmentMapping, layer: u16) -> Stroke {
    let target = if segment.zeroed {
        Target::Zero
    } else {
        Target::Data { layer, sector: segment.mapped_sector }
    };
    Stroke {
        start_sector: segment.start_sector,
        end_sector: segment.end_sector(),
        height: u32::from(layer),
        target,
    }
}

/// The log of a writable pair as disjoint runs: later entries win.
fn replay(layer: &Layer, number: u16, paint_log: Paint) -> Result<Vec<Run>> {
    let heights = 0_u32..;
    let strokes: Vec<Stroke> = layer
        .segments
        .iter()
        .zip(heights)
        .map(|(segment, height)| Stroke { height, ..stroke(segment, number) })
        .collect();
    if strokes.len() != layer.segments.len() {
        let message = format!("{} entries in the log of layer {number}", layer.segments.len());
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    Ok(paint_log(strokes))
}
