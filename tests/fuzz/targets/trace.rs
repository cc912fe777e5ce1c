//! Strategy: any bytes as a trace. Invariant: what parses encodes and parses to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::trace;

fuzz_target!(|data: &[u8]| {
    if let Ok(parsed) = trace::parse(data) {
        let again = trace::parse(&trace::encode(&parsed)).expect("own bytes parse");
        assert_eq!(again.records.len(), parsed.records.len());
    }
});
