//! Strategy: any bytes as `overlaybd.json`. Invariant: no panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::config::ServiceConfig;

fuzz_target!(|data: &[u8]| {
    let _ = ServiceConfig::parse(data);
});
