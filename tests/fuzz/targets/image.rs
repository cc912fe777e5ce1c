//! Strategy: any bytes as a layer, alone and on top of a good one; checksums repaired half of the
//! time. Opens, merges and reads it. Invariant: a read that succeeds twice gives the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::disk::{Disk, Worker};
use obd_ublk::image::{Layer, Stack};
use obd_ublk::source::Source;
use std::sync::Arc;

const GOOD: &[u8] = include_bytes!("../../fixtures/golden/zfile-zstd-4k-random/overlaybd.commit");

/// Sectors read per image: enough to touch several extents, few enough for a high rate.
const SECTORS_READ_MAX: u64 = 4096;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, rest)) = data.split_last() else { return };
    let mut bytes = rest.to_vec();
    if choice & 1 == 0 {
        obd_ublk_fuzz::repair_zfile(&mut bytes);
    }
    let open = |name: &str, bytes: &[u8]| {
        Layer::open_sealed(name.to_owned(), Source::Memory(Arc::from(bytes)))
    };
    let Ok(top) = open("fuzzed", &bytes) else { return };
    let mut layers = vec![top];
    if choice & 2 != 0 {
        layers.insert(0, open("good", GOOD).expect("the good layer opens"));
    }
    // Where the index says something is: reading only the start would find holes.
    let starts: Vec<u64> =
        layers.iter().flat_map(|l| l.segments.iter().step_by(7).map(|s| s.start_sector)).collect();
    let Ok(image) = Stack::from_layers(layers).and_then(Stack::into_image) else { return };
    let sectors = image.geometry().sectors;
    let mut worker = image.worker().expect("memory");
    let mut again = image.worker().expect("memory");
    let (mut first, mut second) = (vec![0; 64 * 512], vec![1; 64 * 512]);
    let mut budget = SECTORS_READ_MAX;
    for start in std::iter::once(0).chain(starts) {
        let count = 64.min(sectors.saturating_sub(start)).min(budget);
        if count == 0 {
            continue;
        }
        budget -= count;
        let len = count as usize * 512;
        let one = worker.read(start, &mut first[..len]);
        let two = again.read(start, &mut second[..len]);
        assert_eq!(one.is_ok(), two.is_ok());
        if one.is_ok() {
            assert!(first[..len] == second[..len]);
        }
    }
});
