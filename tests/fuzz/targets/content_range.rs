//! Strategy: the first 16 bytes choose what was asked for, the rest is the `Content-Range` that
//! came. Invariants: those of `obd_ublk_fuzz::registry`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk_fuzz::registry;

fuzz_target!(|data: &[u8]| {
    let Some((start, rest)) = data.split_first_chunk::<8>() else { return };
    let Some((bytes, header)) = rest.split_first_chunk::<8>() else { return };
    let Ok(header) = std::str::from_utf8(header) else { return };
    registry::content_range(header, u64::from_le_bytes(*start), u64::from_le_bytes(*bytes));
});
