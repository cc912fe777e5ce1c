//! Writes whose outcome can be told after a power cut.
//!
//! Step `i` writes the block that `i` says, each of its sectors with a stamp of its own. Every few
//! steps the device is synced, and only then the step is printed as durable. Whoever cuts the
//! power keeps that output; `audit` then knows for each sector the oldest step that it may hold.

use super::{BLOCK, Page, Result};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

const SECTOR: usize = 512;

/// Steps between two syncs: many writes are never durable when the power is cut.
const STEPS_PER_SYNC: u64 = 24;

/// The block that step `i` writes.
fn block_of(step: u64, blocks: u64) -> u64 {
    // The finaliser of splitmix64: neighbours land far apart, and often on the same block again.
    let mut mixed = step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) % blocks
}

/// The content of one sector after `step`.
fn stamp(step: u64, block: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for (at, word) in (0_u64..).zip(bytes.chunks_exact_mut(8)) {
        let value = match at {
            0 => step,
            1 => block,
            _ => step.wrapping_mul(31).wrapping_add(at).wrapping_mul(sector + 3) ^ block,
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn open(device: &str, writable: bool) -> Result<(File, u64)> {
    let mut options = OpenOptions::new();
    let mut file = options.read(true).write(writable).custom_flags(libc::O_DIRECT).open(device)?;
    let blocks = file.seek(SeekFrom::End(0))? / BLOCK as u64;
    Ok((file, blocks))
}

/// Writes from step FIRST on until somebody ends it; prints `durable STEP` after each sync.
pub(super) fn churn(device: &str, first: &str) -> Result<()> {
    let (file, blocks) = open(device, true)?;
    let mut page = Box::new(Page([0; BLOCK]));
    let mut out = std::io::stdout();
    for step in first.parse::<u64>()?.. {
        let block = block_of(step, blocks);
        for (sector, bytes) in (0_u64..).zip(page.0.chunks_exact_mut(SECTOR)) {
            bytes.copy_from_slice(&stamp(step, block, sector));
        }
        file.write_all_at(&page.0, block * BLOCK as u64)?;
        if step % STEPS_PER_SYNC == 0 {
            file.sync_data()?;
            writeln!(out, "durable {step}")?;
            out.flush()?;
        }
    }
    Ok(())
}

/// Looks at every sector; ROUNDS are `FIRST-DURABLE` of each churn so far.
pub(super) fn audit(device: &str, rounds: &[&str]) -> Result<()> {
    let (file, blocks) = open(device, false)?;
    let mut oldest = vec![0; usize::try_from(blocks)?];
    let mut firsts = Vec::new();
    for round in rounds {
        let (first, durable) = round.split_once('-').ok_or("a round is FIRST-DURABLE")?;
        let (first, durable) = (first.parse::<u64>()?, durable.parse::<u64>()?);
        firsts.push(first);
        for step in first..=durable {
            oldest[usize::try_from(block_of(step, blocks))?] = step;
        }
    }
    let (mut seen, mut newer) = (0_u64, 0_u64);
    let mut page = Box::new(Page([0; BLOCK]));
    for (block, oldest) in (0..blocks).zip(oldest) {
        file.read_exact_at(&mut page.0, block * BLOCK as u64)?;
        for (sector, bytes) in (0_u64..).zip(page.0.chunks_exact(SECTOR)) {
            let step = u64::from_le_bytes(bytes[..8].try_into()?);
            let told = |what: &str| {
                format!(
                    "block {block}, sector {sector}: {what}; found step {step}, durable {oldest}"
                )
            };
            if oldest == 0 && bytes.iter().all(|&byte| byte == 0) {
                continue;
            }
            if bytes != stamp(step, block, sector) {
                return Err(told("neither old nor new").into());
            }
            if block_of(step, blocks) != block || !firsts.iter().any(|first| step >= *first) {
                return Err(told("never written").into());
            }
            if step < oldest {
                return Err(told("a flushed write is lost").into());
            }
            seen += 1;
            newer += u64::from(step > oldest);
        }
    }
    println!("{seen} sectors as they must be, {newer} of them newer than their last sync");
    Ok(())
}
