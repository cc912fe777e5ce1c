//! Content to make layers of, and the layers that hold it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::checker::Sector;
use crate::random::Random;
use obd_ublk::format::lsmt::{self, SegmentMapping};
use obd_ublk::image::Layer;
use obd_ublk::make::Content;
use obd_ublk::source::Source;
use std::sync::Arc;

/// How the sectors of a run are filled.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fill {
    Zeros,
    Incompressible,
    Alternating,
    Text,
}

const FILLS: [Fill; 4] = [Fill::Zeros, Fill::Incompressible, Fill::Alternating, Fill::Text];

/// One sector.
pub(crate) fn sector(fill: Fill, at: u64, random: &mut Random) -> Vec<u8> {
    match fill {
        Fill::Zeros => vec![0; 512],
        Fill::Alternating if at.is_multiple_of(2) => vec![0; 512],
        Fill::Incompressible | Fill::Alternating => {
            (0..64).flat_map(|_| random.next().to_le_bytes()).collect()
        }
        Fill::Text => {
            let line = format!("line {at} of a text that says much the same all the time\n");
            line.bytes().cycle().take(512).collect()
        }
    }
}

/// A disk of so many sectors with runs of every length and content.
pub(crate) fn random_disk(sectors: usize, random: &mut Random) -> Vec<Sector> {
    let mut disk = vec![Sector::Nothing; sectors];
    for _ in 0..random.below(24) + 1 {
        let length = match random.below(6) {
            0 => 1,
            1 => 16_384,
            2 => 8,
            _ => random.below(700) + 1,
        };
        let start = random.below(u64::try_from(sectors).unwrap());
        let end = (start + length).min(u64::try_from(sectors).unwrap());
        let discards = random.one_in(6);
        let fill = FILLS[random.index(4)];
        for at in start..end {
            disk[usize::try_from(at).unwrap()] = match discards {
                true => Sector::Zeroed,
                false => Sector::Data(sector(fill, at, random)),
            };
        }
    }
    disk
}

/// The sealed layer that says this, as bytes; its data lies in the order of the disk or backwards.
pub(crate) fn layer_of(disk: &[Sector], backwards: bool) -> Vec<u8> {
    let mut runs: Vec<(u64, Vec<&Sector>)> = Vec::new();
    let mut open = false;
    for (at, sector) in (0..).zip(disk) {
        if *sector == Sector::Nothing {
            open = false;
            continue;
        }
        let fits = |(_, run): &&mut (u64, Vec<&Sector>)| {
            std::mem::discriminant(run[0]) == std::mem::discriminant(sector) && run.len() < 16_383
        };
        match runs.last_mut().filter(|_| open).filter(fits) {
            Some((_, run)) => run.push(sector),
            None => runs.push((at, vec![sector])),
        }
        open = true;
    }
    let mut order: Vec<usize> = (0..runs.len()).collect();
    if backwards {
        order.reverse();
    }
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for number in order {
        let (start_sector, run) = &runs[number];
        let mapped_sector = 8 + u64::try_from(data.len() / 512).unwrap();
        for sector in run {
            if let Sector::Data(bytes) = sector {
                data.extend_from_slice(bytes);
            }
        }
        entries.push(SegmentMapping {
            start_sector: *start_sector,
            sectors: u64::try_from(run.len()).unwrap(),
            mapped_sector,
            zeroed: *run[0] == Sector::Zeroed,
            tag: 0,
        });
    }
    entries.sort_by_key(|entry| entry.start_sector);
    lsmt::write_sealed(&entries, &data, u64::try_from(disk.len()).unwrap() * 512)
}

/// An open layer of these bytes.
pub(crate) fn open(bytes: Vec<u8>) -> Layer {
    Layer::open_sealed("memory".to_owned(), Source::Memory(Arc::from(bytes))).unwrap()
}

/// The content of such a layer.
pub(crate) fn content(disk: &[Sector], backwards: bool) -> Content {
    Content::of_layer(open(layer_of(disk, backwards))).unwrap()
}

/// What reading a sector of it gives, with nothing below.
pub(crate) fn bytes(sector: &Sector) -> Vec<u8> {
    match sector {
        Sector::Data(bytes) => bytes.clone(),
        Sector::Nothing | Sector::Zeroed => vec![0; 512],
    }
}
