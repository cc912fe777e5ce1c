//! Strategy: any text as the name of an image, and as a `repoBlobUrl`.
//! Invariants: those of `obd_ublk_fuzz::registry`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk_fuzz::registry;

fuzz_target!(|text: &str| {
    registry::reference(text);
});
