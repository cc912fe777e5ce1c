//! Strategy: any 512 bytes as header, the next 512 as trailer, digest repaired half of the time.
//! Invariant: a layout that passes lies inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::zfile::{self, Header};

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    if bytes.last().is_some_and(|byte| byte % 2 == 0) {
        obd_ublk_fuzz::repair_zfile(&mut bytes);
    }
    let Some((head, rest)) = bytes.split_at_checked(512) else { return };
    let Ok(header) = Header::parse(head, 0) else { return };
    let trailer = rest.get(..512).and_then(|bytes| Header::parse(bytes, 512).ok());
    for payload_bytes in [1024, bytes.len() as u64, 1 << 30, u64::MAX] {
        if let Ok(layout) = zfile::layout(&header, trailer.as_ref(), payload_bytes) {
            assert!(layout.index.start <= layout.index.end && layout.index.end <= payload_bytes);
        }
    }
});
