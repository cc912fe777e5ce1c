//! Strategy: any bytes as an index or a manifest. Invariants: those of `obd_ublk_fuzz::registry`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk_fuzz::registry;

fuzz_target!(|data: &[u8]| {
    registry::manifest(data);
});
