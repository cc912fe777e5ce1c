//! Strategy: any text as a `WWW-Authenticate` header.
//! Invariants: those of `obd_ublk_fuzz::registry`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk_fuzz::registry;

fuzz_target!(|text: &str| {
    registry::www_authenticate(text);
});
