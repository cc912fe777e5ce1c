//! Digests of content: `sha256:HEX` and `sha512:HEX`, the two that the OCI registers.

use crate::error::{Error, ErrorKind, Result};
use sha2::{Digest as _, Sha256, Sha512};
use std::fmt::{self, Write as _};

/// The digest of a blob, a manifest or an index, well-formed. Lower case, as the OCI demands.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

impl Digest {
    /// The digest written as `text`.
    ///
    /// # Errors
    /// `InvalidConfig` for anything but an algorithm that we have and its number of digits.
    pub fn parse(text: &str) -> Result<Self> {
        let digits = match text.split_once(':') {
            Some(("sha256", hex)) if hex.len() == 64 => hex,
            Some(("sha512", hex)) if hex.len() == 128 => hex,
            _ => return Err(Self::invalid(text)),
        };
        if !digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(Self::invalid(text));
        }
        Ok(Self(text.to_owned()))
    }

    /// The sha256 of `content`.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        Self(format!("sha256:{}", hex(&Sha256::digest(content))))
    }

    /// The digest as it is written in configs and URLs.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The algorithm and the digits: the folder and file of an OCI layout.
    #[must_use]
    pub fn parts(&self) -> (&str, &str) {
        self.0.split_once(':').unwrap_or(("", ""))
    }

    /// Whether `content` is what this digest names; `what` is called that in the error.
    ///
    /// # Errors
    /// `Integrity`.
    pub fn check(&self, what: &str, content: &[u8]) -> Result<()> {
        let found = match self.parts().0 {
            "sha512" => format!("sha512:{}", hex(&Sha512::digest(content))),
            _ => Self::of(content).0,
        };
        if found == self.0 {
            return Ok(());
        }
        let message = format!("{what}: found the digest {found}, expected {self}");
        Err(Error::new(ErrorKind::Integrity, message))
    }

    fn invalid(text: &str) -> Error {
        let shown: String = text.chars().take(80).flat_map(char::escape_default).collect();
        let expected = "expected sha256: or sha512: and lower-case hexadecimal digits";
        Error::new(ErrorKind::InvalidConfig, format!("digest: found {shown:?}, {expected}"))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_registered_algorithms_with_all_their_digits_are_digests() {
        let good = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(Digest::parse(&good).unwrap().parts(), ("sha256", &*"0a".repeat(32)));
        assert!(Digest::parse(&format!("sha512:{}", "f".repeat(128))).is_ok());
        for bad in [
            String::new(),
            "sha256:".to_owned(),
            "0a".repeat(32),
            format!("sha256:{}", "0A".repeat(32)),
            format!("sha256:{}", "0a".repeat(31)),
            format!("sha256:{}", "0g".repeat(32)),
            format!("md5:{}", "0".repeat(32)),
            format!("sha256:{}/../../../etc/passwd", "0".repeat(47)),
        ] {
            assert_eq!(Digest::parse(&bad).unwrap_err().kind(), ErrorKind::InvalidConfig, "{bad}");
        }
    }

    #[test]
    fn content_is_compared_with_its_digest() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").as_str(), empty);
        let digest = Digest::parse(empty).unwrap();
        assert!(digest.check("manifest", b"").is_ok());
        let error = digest.check("manifest", b"x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Integrity);
        assert!(format!("{error:#}").starts_with("manifest: found the digest sha256:2d71"));
        let long = format!("sha512:{}", hex(&Sha512::digest(b"abc")));
        let long = Digest::parse(&long).unwrap();
        assert!(long.check("x", b"abc").is_ok() && long.check("x", b"abd").is_err());
    }
}
