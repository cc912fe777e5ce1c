//! Strategy: any bytes as what each end of the control socket and of the supervisor's reads.
//! Invariant: what parses encodes and parses to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::server::protocol::notes::Note;
use obd_ublk::server::protocol::{self, Readiness};

fuzz_target!(|data: &[u8]| {
    if let Ok(op) = protocol::parse_request(data) {
        let again = protocol::parse_request(&protocol::encode_request(&op));
        assert_eq!(again.expect("own bytes parse"), op);
    }
    if let Ok(reply) = protocol::parse_reply(data) {
        let bytes = protocol::encode_reply(&reply);
        let again = protocol::parse_reply(&bytes).expect("own bytes parse");
        // By their bytes: a float may be one that is not equal to itself.
        assert_eq!(protocol::encode_reply(&again), bytes);
        let _ = reply.into_result();
    }
    if let Some(readiness) = protocol::parse_readiness(data) {
        let bytes = protocol::encode_readiness(&readiness);
        assert_eq!(protocol::parse_readiness(&bytes), Some(readiness.clone()));
        if let Readiness::Failed(refusal) = readiness {
            let _ = refusal.to_error();
        }
    }
    if let Ok(note) = Note::parse(data) {
        assert_eq!(Note::parse(&note.encode()).expect("own bytes parse"), note);
    }
});
