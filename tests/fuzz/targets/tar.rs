//! Strategy: any bytes as the head of a file of several lengths. Invariant: a wrapper that is
//! found lies inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::tar;

fuzz_target!(|data: &[u8]| {
    for file_bytes in [data.len() as u64, 1 << 20, u64::MAX] {
        if let Ok(Some(wrapper)) = tar::parse_wrapper(data, file_bytes) {
            let end = wrapper.payload_offset_bytes.checked_add(wrapper.payload_bytes);
            assert!(end.is_some_and(|end| end <= file_bytes));
        }
    }
});
