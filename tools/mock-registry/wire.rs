//! HTTP/1.1 on a connection: requests read, answers written, each as broken as it should be.

use super::answer::{self, Answer};
use super::fault::{self, Fault};
use super::{Record, Shared};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// A request's head.
#[derive(Debug, Default)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// The path, without the query.
    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or("")
    }

    /// The value of one key of the query, as it stands there.
    pub(crate) fn query(&self, name: &str) -> Option<&str> {
        let (_, query) = self.target.split_once('?')?;
        query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

pub(crate) fn serve(
    tcp: TcpStream,
    shared: &Arc<Shared>,
    tls: Option<Arc<rustls::ServerConfig>>,
) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut stream: Box<dyn Stream> = match tls {
        None => Box::new(tcp),
        Some(config) => {
            let connection = rustls::ServerConnection::new(config).map_err(io::Error::other)?;
            Box::new(rustls::StreamOwned::new(connection, tcp))
        }
    };
    let mut read = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut read)? {
        if !answer_one(&mut stream, shared, &request)? {
            break;
        }
    }
    stream.flush()
}

fn read_request(stream: &mut dyn Stream, read: &mut Vec<u8>) -> io::Result<Option<Request>> {
    let head_end = loop {
        if let Some(at) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        if fill(stream, read)? == 0 || read.len() > 65_536 {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&read[..head_end]).into_owned();
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or("").split(' ');
    let mut request = Request {
        method: words.next().unwrap_or("").to_owned(),
        target: words.next().unwrap_or("").to_owned(),
        ..Request::default()
    };
    let pairs = lines.filter_map(|line| line.split_once(':'));
    request.headers = pairs.map(|(k, v)| (k.to_owned(), v.trim().to_owned())).collect();
    let length = request.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    while read.len() < head_end + length {
        if fill(stream, read)? == 0 {
            return Ok(None);
        }
    }
    request.body = read[head_end..head_end + length].to_vec();
    read.drain(..head_end + length);
    Ok(Some(request))
}

fn fill(stream: &mut dyn Stream, read: &mut Vec<u8>) -> io::Result<usize> {
    let mut piece = [0; 4096];
    let count = stream.read(&mut piece)?;
    read.extend_from_slice(&piece[..count]);
    Ok(count)
}

/// Answers one request; false when the connection ends with it.
fn answer_one(
    stream: &mut dyn Stream,
    shared: &Arc<Shared>,
    request: &Request,
) -> io::Result<bool> {
    let part = answer::part_of(request);
    let (mut answer, fault) = {
        let mut state = shared.state();
        state.requests += 1;
        let number = state.requests;
        let rule = state.rules.iter_mut().find(|rule| rule.part == part && rule.times > 0);
        let told = rule.map(|rule| {
            rule.times -= 1;
            rule.fault.clone()
        });
        let drawn = state.chaos.and_then(|chaos| {
            let lot = fault::mix(chaos.seed, number);
            (lot % 100 < chaos.percent).then(|| Fault::drawn(lot / 100))
        });
        (answer::answer(&mut state, shared, request), told.or(drawn))
    };
    let mut way = Way::default();
    if let Some(fault) = fault {
        spoil(&mut answer, &mut way, request, fault);
    }
    shared.state().log.push(Record {
        part,
        target: request.target.clone(),
        authorization: request.header("authorization").map(str::to_owned),
        range: request.header("range").map(str::to_owned),
        referer: request.header("referer").map(str::to_owned),
        status: answer.status,
        at: Instant::now(),
    });
    write_answer(stream, &answer, &way, request.method == "HEAD")
}

/// How an answer is written.
#[derive(Debug, Default)]
struct Way {
    delay_ms: u64,
    cut_head: bool,
    cut_after: Option<usize>,
    bytes_per_second: Option<u64>,
    chunked: bool,
    chunks_break_off: bool,
    /// What comes for ever before the answer.
    endless_before: Option<&'static [u8]>,
    /// What comes for ever before the first chunk.
    endless_in_chunk: Option<&'static [u8]>,
}

fn spoil(answer: &mut Answer, way: &mut Way, request: &Request, fault: Fault) {
    match fault {
        Fault::Status(status, headers) => *answer = Answer { status, headers, ..Answer::default() },
        Fault::Delay(ms) => way.delay_ms = ms,
        Fault::CutBeforeHead => way.cut_head = true,
        Fault::CutBody(after) => way.cut_after = Some(after),
        Fault::Slow(rate) => way.bytes_per_second = Some(rate),
        Fault::Chunked => way.chunked = true,
        Fault::Informational => way.endless_before = Some(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        Fault::Zeros => (way.chunked, way.endless_in_chunk) = (true, Some(b"0".as_slice())),
        Fault::ChunkedShort => (way.chunked, way.chunks_break_off) = (true, true),
        Fault::ChunkedEarly => {
            way.chunked = true;
            answer.body.truncate(answer.body.len() / 2);
        }
        Fault::ChunkedLong => {
            way.chunked = true;
            answer.body.push(0x55);
        }
        Fault::Encoded => answer.headers.push(("Content-Encoding".to_owned(), "gzip".to_owned())),
        // The rest is about bodies of blobs.
        _ if answer.whole.is_none() => {}
        Fault::Short => {
            answer.body.pop();
        }
        Fault::Long => answer.body.push(0x55),
        Fault::Corrupt => {
            if let Some(byte) = answer.body.last_mut() {
                *byte ^= 1;
            }
        }
        Fault::Shifted(by) => answer.shift(request, by),
        Fault::NoContentRange => answer.set_content_range(None),
        Fault::ContentRange(text) => answer.set_content_range(Some(&text)),
        Fault::Multipart => {
            answer.set_content_range(None);
            let kind = "multipart/byteranges; boundary=x".to_owned();
            answer.headers.push(("Content-Type".to_owned(), kind));
        }
        Fault::Whole => {
            answer.status = 200;
            answer.set_content_range(None);
            answer.body = answer.whole.as_ref().map(|whole| whole.to_vec()).unwrap_or_default();
        }
    }
}

/// Writes `piece` for as long as somebody reads it.
fn flood(stream: &mut dyn Stream, piece: &[u8]) -> io::Result<bool> {
    let block = piece.repeat(256 * 1024 / piece.len());
    loop {
        stream.write_all(&block)?;
    }
}

fn write_answer(
    stream: &mut dyn Stream,
    answer: &Answer,
    way: &Way,
    head_only: bool,
) -> io::Result<bool> {
    thread::sleep(Duration::from_millis(way.delay_ms));
    if way.cut_head {
        return Ok(false);
    }
    if let Some(piece) = way.endless_before {
        return flood(stream, piece);
    }
    let mut head = format!("HTTP/1.1 {} X\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if way.chunked {
        head.push_str("Transfer-Encoding: chunked\r\n\r\n");
    } else {
        head.push_str(&format!("Content-Length: {}\r\n\r\n", answer.body.len()));
    }
    stream.write_all(head.as_bytes())?;
    if head_only {
        return Ok(true);
    }
    if let Some(piece) = way.endless_in_chunk {
        return flood(stream, piece);
    }
    if way.chunked {
        for chunk in answer.body.chunks(300) {
            stream.write_all(format!("{:x}\r\n", chunk.len()).as_bytes())?;
            stream.write_all(chunk)?;
            stream.write_all(b"\r\n")?;
            if way.chunks_break_off {
                return Ok(false);
            }
        }
        stream.write_all(b"0\r\n\r\n")?;
        return Ok(true);
    }
    let sent = way.cut_after.map_or(answer.body.len(), |after| after.min(answer.body.len()));
    match way.bytes_per_second {
        None => stream.write_all(&answer.body[..sent])?,
        Some(rate) => {
            for piece in answer.body[..sent].chunks((rate as usize / 50).max(1)) {
                let pause = Duration::from_secs(1) * piece.len() as u32 / rate.max(1) as u32;
                thread::sleep(pause);
                stream.write_all(piece)?;
                stream.flush()?;
            }
        }
    }
    stream.flush()?;
    Ok(way.cut_after.is_none())
}
