//! Strategy: any bytes as `config.v1.json`. Invariant: no panic, at most 255 layers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::config::{ImageConfig, result_file_of};

fuzz_target!(|data: &[u8]| {
    let _ = result_file_of(data);
    if let Ok(config) = ImageConfig::parse(data) {
        assert!(config.lowers.len() <= 255);
        for lower in config.stack_lowers() {
            let _ = lower.local_candidates();
        }
    }
});
