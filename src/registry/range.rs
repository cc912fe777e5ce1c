//! Whether an answer is the bytes that were asked for. Only then is its body data.
//!
//! A 206 must say with its Content-Range that it is exactly the range asked for. A 200 is the whole
//! blob: data for a range that starts at 0, if the rest is little and Content-Length says that it
//! is all of the blob. (A page to log in at is a 200, too.) Everything else is refused, because the
//! reader above has no way to tell bytes of one place from bytes of another.

use crate::limits::REGISTRY_WHOLE_BODY_BYTES_MAX;
use std::fmt;
use std::ops::Range;

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// Bytes of the blob, not empty.
    pub(super) bytes: Range<u64>,
    /// Length of the blob, if it is known.
    pub(super) total_bytes: Option<u64>,
}

/// The head of an answer, as far as it tells what its body is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answer<'a> {
    /// The status.
    pub(super) status: u16,
    /// `Content-Range`, as often as it came.
    pub(super) content_ranges: &'a [&'a str],
    /// `Content-Length`; `None` for a body that ends when it ends.
    pub(super) content_length: Option<u64>,
    /// `Content-Encoding`, as often as it came.
    pub(super) content_encodings: &'a [&'a str],
}

/// A body that is data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Accepted {
    /// Length of the blob, if the answer or the asker knows it.
    pub(super) total_bytes: Option<u64>,
    /// Whether the body must end with the last byte asked for; else what follows is dropped.
    pub(super) ends: bool,
}

/// Why a body is not data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The blob has another length than the config says: asking again will not change that.
    OtherLength {
        /// What the registry says, in bytes.
        found: u64,
        /// What the config says, in bytes.
        expected: u64,
    },
    /// An answer that must not be believed.
    Malformed(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherLength { found, expected } => {
                write!(f, "the blob has {found} bytes, expected {expected}")
            }
            Self::Malformed(text) => f.write_str(text),
        }
    }
}

/// A `Content-Range` of bytes: the range and, unless it is `*`, the whole length. `None` for
/// anything that contradicts itself.
#[must_use]
pub(super) fn parse_content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (unit, rest) = text.trim().split_once(' ')?;
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, end) = (number(first)?, number(last)?.checked_add(1)?);
    let total = match total {
        "*" => None,
        total => Some(number(total)?),
    };
    let sound = first < end && total.is_none_or(|total| end <= total);
    (unit.eq_ignore_ascii_case("bytes") && sound).then_some((first..end, total))
}

/// Digits only: `u64::from_str` would take a sign.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// Whether the body of `answer` is the bytes `asked` for. Statuses other than 200 and 206 are not
/// judged here.
///
/// # Errors
/// Why it is not.
pub(super) fn judge(asked: &Asked, answer: &Answer<'_>) -> Result<Accepted, Refusal> {
    let malformed = |text: String| Err(Refusal::Malformed(text));
    // Each header is a list, and all of them together are one: all were done to the body.
    let mut encodings = answer.content_encodings.iter().flat_map(|header| header.split(','));
    let is_encoded = |encoding: &&str| !encoding.trim().eq_ignore_ascii_case("identity");
    if let Some(encoding) = encodings.find(is_encoded) {
        let encoding = encoding.trim();
        let shown: String = encoding.chars().take(40).flat_map(char::escape_default).collect();
        return malformed(format!("the body is encoded ({shown})"));
    }
    match answer.status {
        206 => judge_partial(asked, answer),
        200 => judge_whole(asked, answer),
        status => malformed(format!("status {status} has no blob")),
    }
}

fn judge_partial(asked: &Asked, answer: &Answer<'_>) -> Result<Accepted, Refusal> {
    let malformed = |text: String| Err(Refusal::Malformed(text));
    let [content_range] = answer.content_ranges else {
        let count = answer.content_ranges.len();
        return malformed(format!("206 with {count} Content-Range headers, expected one"));
    };
    let Some((range, total)) = parse_content_range(content_range) else {
        let shown: String = content_range.chars().take(60).flat_map(char::escape_default).collect();
        return malformed(format!("206 with the Content-Range {shown:?}"));
    };
    if let (Some(found), Some(expected)) = (total, asked.total_bytes)
        && found != expected
    {
        return Err(Refusal::OtherLength { found, expected });
    }
    if range != asked.bytes {
        let told = |range: &Range<u64>| format!("bytes {} to {}", range.start, range.end);
        return malformed(format!("206 of {}, expected {}", told(&range), told(&asked.bytes)));
    }
    let length = range.end - range.start;
    match answer.content_length {
        Some(found) if found != length => {
            malformed(format!("206 with {found} bytes of body, expected {length}"))
        }
        _ => Ok(Accepted { total_bytes: total.or(asked.total_bytes), ends: true }),
    }
}

fn judge_whole(asked: &Asked, answer: &Answer<'_>) -> Result<Accepted, Refusal> {
    let malformed = |text: String| Err(Refusal::Malformed(text));
    let Range { start, end } = asked.bytes;
    if start != 0 {
        return malformed(format!("200 instead of 206 for a range that starts at byte {start}"));
    }
    // What the blob's length should be does not say what this body is: that of a page in chunks
    // would be taken for the beginning of the blob.
    let Some(total) = answer.content_length else {
        return malformed("200 without a Content-Length".to_owned());
    };
    if let Some(expected) = asked.total_bytes
        && total != expected
    {
        return Err(Refusal::OtherLength { found: total, expected });
    }
    if total < end {
        return malformed(format!("200 with {total} bytes, expected at least {end}"));
    }
    if total > end && total > REGISTRY_WHOLE_BODY_BYTES_MAX {
        return malformed(format!("200 instead of 206: all {total} bytes instead of {end}"));
    }
    Ok(Accepted { total_bytes: Some(total), ends: total == end })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asked(bytes: Range<u64>) -> Asked {
        Asked { bytes, total_bytes: Some(1000) }
    }

    fn accepted(ends: bool) -> Result<Accepted, Refusal> {
        Ok(Accepted { total_bytes: Some(1000), ends })
    }

    fn refused(text: &str) -> Result<Accepted, Refusal> {
        Err(Refusal::Malformed(text.to_owned()))
    }

    #[test]
    fn content_ranges_are_read_to_the_letter() {
        for (text, expected) in [
            ("bytes 0-0/1", Some((0..1, Some(1)))),
            ("bytes 10-19/1000", Some((10..20, Some(1000)))),
            ("Bytes 10-19/*", Some((10..20, None))),
            (" bytes  10-19/1000 ", Some((10..20, Some(1000)))),
            ("bytes 10-9/1000", None),
            ("bytes 10-1000/1000", None),
            ("bytes */1000", None),
            ("bytes 10-19", None),
            ("bytes 10-19/", None),
            ("bytes +1-19/1000", None),
            ("bytes -19/1000", None),
            ("bytes=10-19/1000", None),
            ("lines 10-19/1000", None),
            ("bytes 0-18446744073709551615/*", None),
            ("bytes 0-99999999999999999999/*", None),
            ("", None),
        ] {
            assert_eq!(parse_content_range(text), expected, "{text}");
        }
    }

    #[test]
    fn a_206_is_data_only_for_the_range_asked_for() {
        let judged = |ranges: &[&str], content_length| {
            let content_ranges = ranges;
            let answer =
                Answer { status: 206, content_ranges, content_length, ..Answer::default() };
            judge(&asked(10..20), &answer)
        };
        assert_eq!(judged(&["bytes 10-19/1000"], Some(10)), accepted(true));
        assert_eq!(judged(&["bytes 10-19/1000"], None), accepted(true));
        assert_eq!(judged(&["bytes 10-19/*"], Some(10)), accepted(true));
        let no_header = "206 with 0 Content-Range headers, expected one";
        assert_eq!(judged(&[], Some(10)), refused(no_header));
        let twice = ["bytes 10-19/1000", "bytes 10-19/1000"];
        let told = "206 with 2 Content-Range headers, expected one";
        assert_eq!(judged(&twice, Some(10)), refused(told));
        for (range, told) in [
            ("bytes 0-9/1000", "206 of bytes 0 to 10, expected bytes 10 to 20"),
            ("bytes 10-18/1000", "206 of bytes 10 to 19, expected bytes 10 to 20"),
            ("bytes 10-20/1000", "206 of bytes 10 to 21, expected bytes 10 to 20"),
        ] {
            assert_eq!(judged(&[range], None), refused(told), "{range}");
        }
        let short = "206 with 9 bytes of body, expected 10";
        assert_eq!(judged(&["bytes 10-19/1000"], Some(9)), refused(short));
        let other = Refusal::OtherLength { found: 999, expected: 1000 };
        assert_eq!(judged(&["bytes 10-19/999"], Some(10)), Err(other));
    }

    #[test]
    fn a_200_is_data_only_from_the_start_and_with_little_excess() {
        let judged = |bytes, content_length| {
            judge(&asked(bytes), &Answer { status: 200, content_length, ..Answer::default() })
        };
        assert_eq!(judged(0..1000, Some(1000)), accepted(true));
        assert_eq!(judged(0..10, Some(1000)), accepted(false));
        for bytes in [0..10, 0..1000] {
            assert_eq!(judged(bytes, None), refused("200 without a Content-Length"));
        }
        let shifted = "200 instead of 206 for a range that starts at byte 1";
        assert_eq!(judged(1..1000, Some(1000)), refused(shifted));
        let other = Refusal::OtherLength { found: 10, expected: 1000 };
        assert_eq!(judged(0..10, Some(10)), Err(other));

        let large = REGISTRY_WHOLE_BODY_BYTES_MAX + 1;
        let mut want = Asked { bytes: 0..10, total_bytes: Some(large) };
        let answer = Answer { status: 200, content_length: Some(large), ..Answer::default() };
        let told = format!("200 instead of 206: all {large} bytes instead of 10");
        assert_eq!(judge(&want, &answer), refused(&told));
        want.bytes.end = large;
        let whole = Accepted { total_bytes: Some(large), ends: true };
        assert_eq!(judge(&want, &answer), Ok(whole));
        let unknown = Asked { bytes: 0..1, total_bytes: None };
        let open = Answer { status: 200, ..Answer::default() };
        assert_eq!(judge(&unknown, &open), refused("200 without a Content-Length"));
        let known = Answer { content_length: Some(9), ..open };
        let whole = Accepted { total_bytes: Some(9), ends: false };
        assert_eq!(judge(&unknown, &known), Ok(whole), "it is the only one who knows");
    }

    #[test]
    fn an_encoded_body_is_not_data() {
        let judged = |encodings: &[&str]| {
            let ranges = ["bytes 10-19/1000"];
            let answer = Answer {
                status: 206,
                content_ranges: &ranges,
                content_encodings: encodings,
                content_length: Some(10),
            };
            judge(&asked(10..20), &answer)
        };
        for plain in [["identity"].as_slice(), &["Identity", "identity , identity"], &[]] {
            assert_eq!(judged(plain), accepted(true), "{plain:?}");
        }
        let gzip = refused("the body is encoded (gzip)");
        for encoded in [
            ["gzip"].as_slice(),
            &["identity", "gzip"],
            &["gzip", "identity"],
            &["identity, gzip"],
            &["identity", "identity,gzip ,identity"],
        ] {
            assert_eq!(judged(encoded), gzip, "{encoded:?}");
        }
        assert_eq!(judged(&["\u{1b}[m"]), refused("the body is encoded (\\u{1b}[m)"));
        assert_eq!(judged(&[""]), refused("the body is encoded ()"));
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_what_was_asked_for(
            start in 0_u64..50, length in 1_u64..50, found in 0_u64..60, last in 0_u64..120,
            total in 1_u64..120, status in prop::sample::select(vec![200_u16, 206]),
            content_length in prop::option::of(0_u64..120),
        ) {
            let known = 100;
            let want = Asked { bytes: start..start + length, total_bytes: Some(known) };
            let range = format!("bytes {found}-{last}/{total}");
            let ranges = [range.as_str()];
            let content_ranges: &[&str] = if status == 206 { &ranges } else { &[] };
            let answer = Answer { status, content_ranges, content_length, ..Answer::default() };
            if judge(&want, &answer).is_ok() {
                let right = match status {
                    206 => {
                        (found, last + 1) == (start, start + length)
                            && total == known
                            && content_length.is_none_or(|sent| sent == length)
                    }
                    _ => start == 0 && content_length == Some(known),
                };
                prop_assert!(right);
            }
        }
    }
}
