//! The name of a blob: the sha256 of all its bytes.

use crate::error::{Error, ErrorKind, Result};
use std::fmt;

/// A sha256, which is told as `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobDigest([u8; 32]);

impl BlobDigest {
    /// The digest of these 32 bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads `sha256:HEX`. Capital digits are refused, as in the registry's own grammar: a blob has
    /// one name.
    ///
    /// # Errors
    /// `InvalidConfig` for another algorithm, length or character.
    pub fn parse(text: &str) -> Result<Self> {
        text.strip_prefix("sha256:").and_then(Self::from_hex).ok_or_else(|| {
            // What is told again is bounded: it may come from a hostile manifest.
            let told: String = text.chars().take(80).collect();
            let message = format!("digest: found {told:?}, expected sha256: and 64 of 0-9a-f");
            Error::new(ErrorKind::InvalidConfig, message)
        })
    }

    /// Reads the digits alone, as they are in file names.
    #[must_use]
    pub fn from_hex(digits: &str) -> Option<Self> {
        let digits = digits.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut bytes = [0; 32];
        let (pairs, _) = digits.as_chunks::<2>();
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = nibble(*high)? << 4 | nibble(*low)?;
        }
        Some(Self(bytes))
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The digits alone.
    #[must_use]
    pub fn hex(&self) -> String {
        let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
        self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
    }
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

impl fmt::Display for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_told_as_it_was_read() {
        let text = format!("sha256:{}", "0123456789abcdef".repeat(4));
        let digest = BlobDigest::parse(&text).unwrap();
        assert_eq!(digest.to_string(), text);
        assert_eq!(digest.as_bytes()[..3], [0x01, 0x23, 0x45]);
        assert_eq!(BlobDigest::from_hex(&digest.hex()), Some(digest));
    }

    #[test]
    fn nothing_but_a_sha256_in_small_digits_is_a_name_of_a_file() {
        let good = "0123456789abcdef".repeat(4);
        for bad in [
            String::new(),
            good.clone(),
            format!("sha512:{good}"),
            format!("sha256:{}", &good[1..]),
            format!("sha256:{good}0"),
            format!("sha256:{}", good.to_uppercase()),
            format!("sha256:../../{}", &good[6..]),
            format!("sha256:\u{e9}{}", &good[2..]),
        ] {
            let error = BlobDigest::parse(&bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{bad}");
        }
    }
}
