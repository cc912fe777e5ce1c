//! Strategy: any bytes as one compressed record, with and without CRC, both codecs, whole and
//! partial. Invariant: no panic, nothing written outside the destination (the sanitizer of the
//! codecs is their own fuzzing; ours is the lengths that we pass).
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::format::zfile::{Algorithm, Decoder};

fuzz_target!(|data: &[u8]| {
    let Some((&choice, record)) = data.split_first() else { return };
    let algorithm = if choice & 1 == 0 { Algorithm::Lz4 } else { Algorithm::Zstd };
    let mut decoder = Decoder::new(algorithm).expect("a decoder");
    let original = 4096_usize << (usize::from(choice >> 1) % 5);
    let mut dst = vec![0; original];
    let has_crc = choice & 128 != 0;
    let _ = decoder.decode(record, has_crc, &mut dst);
    if decoder.decodes_prefix() {
        let front = usize::from(choice) * 16 + 1;
        let _ = decoder.decode_prefix(record, has_crc, &mut dst[..front.min(original)], original);
    }
});
