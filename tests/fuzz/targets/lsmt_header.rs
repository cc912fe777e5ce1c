//! Strategy: any bytes as header and as trailer. Invariant: what parses encodes to bytes that
//! parse to the same, and an index that was located lies inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::lsmt::{self, Header};

fuzz_target!(|data: &[u8]| {
    let Ok(header) = Header::parse(data, 0) else { return };
    let again = Header::parse(header.encode().as_ref(), 0).expect("own bytes parse");
    assert_eq!(again.virtual_size_bytes, header.virtual_size_bytes);
    assert_eq!(again.index_entries, header.index_entries);
    let file_bytes = header.user_tag.first().map_or(1 << 20, |&byte| u64::from(byte) << 12);
    if let Ok(index) = lsmt::locate_sealed_index(&header, &header, file_bytes) {
        assert!(index.offset_bytes + index.entries * 16 <= file_bytes);
    }
    let _ = lsmt::check_writable_pair(&header, Some(&header));
});
