//! The vectors of `format-spec/vectors/`.
//!
//! A vector is a `.hex` file for eyes (offset, bytes, what they are; `x256` repeats a line's bytes)
//! and a `.json` file for tools. Offsets are checked while reading, so the annotation cannot rot.

use serde_json::Value;

/// The bytes of `format-spec/vectors/<name>.hex`.
pub(crate) fn hex(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in read(name, "hex").lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some((offset, rest)) = line.split_once(':') else {
            assert_eq!(line, "", "a line without an offset in {name}");
            continue;
        };
        let offset = usize::from_str_radix(offset, 16).expect("a hexadecimal offset");
        assert_eq!(offset, bytes.len(), "an offset in {name}");
        let mut run = Vec::new();
        let mut times = 1;
        for word in rest.split_whitespace() {
            match word.strip_prefix('x') {
                Some(count) => times = count.parse().expect("a count"),
                None => run.push(u8::from_str_radix(word, 16).expect("a byte")),
            }
        }
        bytes.extend(run.repeat(times));
    }
    bytes
}

/// The decoded fields of `format-spec/vectors/<name>.json`.
pub(crate) fn fields(name: &str) -> Value {
    serde_json::from_str(&read(name, "json")).expect("a JSON file")
}

fn read(name: &str, extension: &str) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/format-spec/vectors");
    std::fs::read_to_string(format!("{folder}/{name}.{extension}")).expect("a vector")
}

/// A field that is a count or a position.
pub(crate) fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

/// How many bytes these are.
pub(crate) fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("64 bits")
}

/// `length` bytes from `start` on.
pub(crate) fn part(bytes: &[u8], start: u64, length: u64) -> &[u8] {
    let start = usize::try_from(start).expect("an offset in memory");
    &bytes[start..][..usize::try_from(length).expect("a length in memory")]
}
