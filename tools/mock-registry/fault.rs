//! What can go wrong with an answer.

/// The part that a mock plays for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    Blob,
    Manifest,
    Token,
    Store,
    Other,
}

/// Does `fault` to the next `times` requests for `part`.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub(crate) part: Part,
    pub(crate) times: u64,
    pub(crate) fault: Fault,
}

/// One thing that goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// This status with these headers, and no content.
    Status(u16, Vec<(String, String)>),
    /// The answer comes after so many milliseconds.
    Delay(u64),
    /// The connection closes before the head.
    CutBeforeHead,
    /// The connection closes after so many bytes of the body.
    CutBody(usize),
    /// The body lacks its last byte, and `Content-Length` says so.
    Short,
    /// The body has a byte too many, and `Content-Length` says so.
    Long,
    /// The body is that of a range so many bytes later, and `Content-Range` says so.
    Shifted(u64),
    /// 206 without `Content-Range`.
    NoContentRange,
    /// 206 with this `Content-Range` and the right body.
    ContentRange(String),
    /// 206 of several parts.
    Multipart,
    /// 200 with the whole blob.
    Whole,
    /// The body says that it is gzip.
    Encoded,
    /// The right body in chunks, without a length.
    Chunked,
    /// A body in chunks that breaks off before its time.
    ChunkedShort,
    /// A body in chunks that ends well, and before its time.
    ChunkedEarly,
    /// A body in chunks with a byte too many.
    ChunkedLong,
    /// One byte of the body is another, and nothing says so.
    Corrupt,
    /// So many bytes of the body a second.
    Slow(u64),
    /// No answer, and for ever, as fast as they are read, answers before it (1xx).
    Informational,
    /// The head of an answer in chunks, and for ever the zeros before the first chunk's length.
    Zeros,
}

impl Fault {
    pub(crate) fn status(status: u16) -> Self {
        Self::Status(status, Vec::new())
    }

    pub(crate) fn status_with(status: u16, name: &str, value: &str) -> Self {
        Self::Status(status, vec![(name.to_owned(), value.to_owned())])
    }

    /// A fault by lot, of those that a reader can notice.
    pub(crate) fn drawn(lot: u64) -> Self {
        match lot % 20 {
            0 => Self::status(500),
            1 => Self::status(502),
            2 => Self::status(503),
            3 => Self::status_with(503, "Retry-After", "0"),
            4 => Self::status_with(429, "Retry-After", "0"),
            5 => Self::CutBeforeHead,
            6 => Self::CutBody(0),
            7 => Self::CutBody((lot / 20 % 5000) as usize),
            8 => Self::Short,
            9 => Self::Long,
            10 => Self::Shifted(1 + lot / 20 % 600),
            11 => Self::NoContentRange,
            12 => Self::Multipart,
            13 => Self::Whole,
            14 => Self::Encoded,
            15 => Self::Chunked,
            16 => Self::ChunkedShort,
            17 => Self::ChunkedEarly,
            18 => Self::ChunkedLong,
            _ => Self::Delay(lot / 20 % 30),
        }
    }
}

/// A number that looks random and is the same for the same arguments (SplitMix64).
pub(crate) fn mix(seed: u64, number: u64) -> u64 {
    let mut x = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
