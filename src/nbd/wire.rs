//! One client's socket: buffered input, whole writes, and a deadline while there is one.
//!
//! A client that keeps many requests in flight has them read in one system call. The input buffer
//! has a fixed size; whatever is longer is read straight to where it belongs, or forgotten.

use crate::units::{to_u64, to_usize};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Room for 585 requests.
const INPUT_BYTES: usize = 16 * 1024;

/// A client's socket.
#[derive(Debug)]
pub(super) struct Wire<'a> {
    stream: &'a UnixStream,
    input: Box<[u8]>,
    // What is in the input and not yet taken.
    start: usize,
    end: usize,
    deadline: Option<Instant>,
}

impl<'a> Wire<'a> {
    /// All reads and writes together may take `patience`, until [`Wire::without_deadline`].
    pub(super) fn new(stream: &'a UnixStream, patience: Duration) -> Self {
        let input = vec![0; INPUT_BYTES].into_boxed_slice();
        Self { stream, input, start: 0, end: 0, deadline: Some(Instant::now() + patience) }
    }

    /// From now on the client may take its time.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn without_deadline(&mut self) -> io::Result<()> {
        self.deadline = None;
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)
    }

    /// The next `N` bytes; `None` when the client ended before the first of them.
    ///
    /// # Errors
    /// `UnexpectedEof` when it ended in the middle, `TimedOut`, or what the system says.
    pub(super) fn take<const N: usize>(&mut self) -> io::Result<Option<[u8; N]>> {
        while self.end - self.start < N {
            let had = self.end - self.start;
            if self.fill()? == 0 {
                return if had == 0 { Ok(None) } else { Err(cut_off()) };
            }
        }
        let taken = self.input.get(self.start..self.end).and_then(<[u8]>::first_chunk::<N>);
        let taken = *taken.ok_or_else(cut_off)?;
        self.start += N;
        Ok(Some(taken))
    }

    /// The next `len` bytes, which the caller has found not to be too many.
    ///
    /// # Errors
    /// As [`Wire::take`]; the end of the input is always unexpected.
    pub(super) fn take_vec(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let part = self.buffered(len - bytes.len())?;
            let (from, to) = (self.start, self.start + part);
            bytes.extend_from_slice(self.input.get(from..to).unwrap_or_default());
            self.start = to;
        }
        Ok(bytes)
    }

    /// Fills `bytes` with the next ones; what is not in the input yet is read straight to them.
    ///
    /// # Errors
    /// As [`Wire::take_vec`].
    pub(super) fn take_into(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let buffered = self.input.get(self.start..self.end).unwrap_or_default();
        let part = buffered.len().min(bytes.len());
        let (front, mut rest) = bytes.split_at_mut(part);
        front.copy_from_slice(buffered.get(..part).unwrap_or_default());
        self.start += part;
        while !rest.is_empty() {
            if let Some(left) = self.time_left()? {
                self.stream.set_read_timeout(Some(left))?;
            }
            match retry(|| self.stream.read(rest))? {
                0 => return Err(cut_off()),
                count => rest = rest.get_mut(count..).unwrap_or_default(),
            }
        }
        Ok(())
    }

    /// Reads and forgets `len_bytes`.
    ///
    /// # Errors
    /// As [`Wire::take_vec`].
    pub(super) fn skip(&mut self, len_bytes: u64) -> io::Result<()> {
        let mut left = len_bytes;
        while left > 0 {
            let part = self.buffered(to_usize(left).unwrap_or(usize::MAX))?;
            self.start += part;
            left -= to_u64(part);
        }
        Ok(())
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    /// `TimedOut`, or what the system says.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if let Some(left) = self.time_left()? {
                self.stream.set_write_timeout(Some(left))?;
            }
            match retry(|| self.stream.write(rest))? {
                0 => return Err(ErrorKind::WriteZero.into()),
                count => rest = rest.get(count..).unwrap_or_default(),
            }
        }
        Ok(())
    }

    /// How many bytes of the input, 1 to `wanted`, can be taken now; waits for the first.
    fn buffered(&mut self, wanted: usize) -> io::Result<usize> {
        if self.start == self.end && self.fill()? == 0 {
            return Err(cut_off());
        }
        Ok((self.end - self.start).min(wanted))
    }

    /// Reads more into the input, after what is there; 0 when the client has ended.
    fn fill(&mut self) -> io::Result<usize> {
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if let Some(left) = self.time_left()? {
            self.stream.set_read_timeout(Some(left))?;
        }
        let room = self.input.get_mut(self.end..).unwrap_or_default();
        let count = retry(|| self.stream.read(room))?;
        self.end += count;
        Ok(count)
    }

    fn time_left(&self) -> io::Result<Option<Duration>> {
        let Some(deadline) = self.deadline else { return Ok(None) };
        let left = deadline.saturating_duration_since(Instant::now());
        // A timeout of zero would mean "for ever".
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

fn cut_off() -> io::Error {
    ErrorKind::UnexpectedEof.into()
}

/// A socket's timeout looks like a socket that does not block; ours all block.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err(ErrorKind::TimedOut.into());
            }
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENT: Duration = Duration::from_secs(20);

    #[test]
    fn bytes_arrive_in_order_however_they_were_cut() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sent: Vec<u8> = (0..=255_u8).cycle().take(3 * INPUT_BYTES + 41).collect();
        let expected = sent.clone();
        let sender = std::thread::spawn(move || {
            for part in sent.chunks(4099) {
                (&theirs).write_all(part).unwrap();
            }
        });
        let mut wire = Wire::new(&ours, PATIENT);
        assert_eq!(wire.take::<28>().unwrap().unwrap(), expected[..28]);
        assert_eq!(wire.take_vec(INPUT_BYTES + 5).unwrap(), expected[28..INPUT_BYTES + 33]);
        wire.skip(to_u64(INPUT_BYTES)).unwrap();
        let at = 2 * INPUT_BYTES + 33;
        let mut bytes = vec![0; INPUT_BYTES - 30];
        wire.take_into(&mut bytes[..5]).unwrap();
        wire.take_into(&mut bytes[5..]).unwrap();
        assert_eq!(bytes, expected[at..at + INPUT_BYTES - 30]);
        let at = at + INPUT_BYTES - 30;
        assert_eq!(wire.take_vec(10).unwrap(), expected[at..at + 10]);
        assert_eq!(wire.take::<28>().unwrap().unwrap(), expected[3 * INPUT_BYTES + 13..]);
        assert_eq!(wire.take::<28>().unwrap(), None);
        let mut nothing = [0; 1];
        assert_eq!(wire.take_into(&mut nothing).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        wire.take_into(&mut []).unwrap();
        sender.join().unwrap();
    }

    #[test]
    fn an_end_in_the_middle_is_told_from_an_end_between() {
        for (sent, skipped) in [(27, 0), (0, 1), (99, 100)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            (&theirs).write_all(&vec![7; sent]).unwrap();
            drop(theirs);
            let mut wire = Wire::new(&ours, PATIENT);
            let failed = match skipped {
                0 => wire.take::<28>().map(drop),
                len => wire.skip(len),
            };
            assert_eq!(failed.unwrap_err().kind(), ErrorKind::UnexpectedEof, "{sent} bytes");
        }
    }

    #[test]
    fn a_client_that_dawdles_meets_the_deadline_of_the_whole() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let patience = Duration::from_millis(300);
        let start = Instant::now();
        // One byte in good time, again and again: each read is quick, the whole is not.
        let dripping = std::thread::spawn(move || {
            while (&theirs).write_all(&[1]).is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let mut wire = Wire::new(&ours, patience);
        let error = wire.skip(1 << 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(start.elapsed() >= patience && start.elapsed() < PATIENT);
        drop(ours);
        dripping.join().unwrap();
    }

    #[test]
    fn a_client_that_does_not_read_meets_the_deadline_too() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut wire = Wire::new(&ours, Duration::from_millis(200));
        let error = wire.send(&vec![0; 64 << 20]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }
}
