//! What the kernel asks and what it is told: pure numbers, no kernel needed to test them.
//!
//! The queue thread copies the descriptor of a tag out of the shared page, [`decode`]s it and
//! answers with one `i32`: the bytes read or written, 0 for what has no data, or a negative errno.
//! A read is never answered with 0 (the driver would make it `EIO`, hiding the reason) and never
//! with more than it asked for (the driver would hand out memory that nobody filled).

use crate::disk::Space;
use crate::error::Error;
use crate::units::{range_from, sectors_to_bytes, to_usize};
use libublk::sys;
use std::ops::Range;

/// The fields of a request descriptor that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Operation in the low 8 bits, hints above.
    pub(super) op_flags: u32,
    /// Length in sectors.
    pub(super) sector_count: u32,
    /// First sector.
    pub(super) start_sector: u64,
}

/// What a queue holds a request against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Size of the disk in sectors.
    pub(super) sectors: u64,
    /// Size of one tag's buffer.
    pub(super) buffer_bytes: usize,
    /// Whether the device was announced read-only.
    pub(super) read_only: bool,
    /// The longest discard or write of zeros that was announced, in sectors.
    pub(super) zeroes_sectors_max: u32,
}

/// A request that can be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the first `len_bytes` of the tag's buffer.
    Read {
        /// First sector.
        start_sector: u64,
        /// Whole sectors, at least one, at most the buffer.
        len_bytes: usize,
    },
    /// Take the first `len_bytes` of the tag's buffer, where the driver has put the data.
    Write {
        /// First sector.
        start_sector: u64,
        /// Whole sectors, at least one, at most the buffer.
        len_bytes: usize,
        /// Whether it must be durable before it is answered.
        durable: bool,
    },
    /// Make sectors read as zeros; the buffer has no part in it.
    Zeroes {
        /// At least one.
        sectors: Range<u64>,
        /// What becomes of their space.
        space: Space,
        /// As of a write.
        durable: bool,
    },
    /// Make durable what was answered before. Nothing is volatile on a read-only disk: done before
    /// it is asked.
    Flush,
}

/// The request in `descriptor`, or the positive errno that refuses it.
pub(super) fn decode(descriptor: Descriptor, bounds: Bounds) -> Result<Request, i32> {
    let operation = descriptor.op_flags & 0xff;
    match operation {
        sys::UBLK_IO_OP_READ => decode_read(descriptor, bounds).ok_or(libc::EINVAL),
        sys::UBLK_IO_OP_FLUSH => Ok(Request::Flush),
        sys::UBLK_IO_OP_WRITE if !bounds.read_only => {
            decode_write(descriptor, bounds).ok_or(libc::EINVAL)
        }
        sys::UBLK_IO_OP_DISCARD | sys::UBLK_IO_OP_WRITE_ZEROES if !bounds.read_only => {
            decode_zeroes(descriptor, bounds).ok_or(libc::EINVAL)
        }
        // Nobody asks for this any more, and nothing said that we know it.
        _ if !bounds.read_only => Err(libc::EOPNOTSUPP),
        // The device is announced read-only, so the kernel itself refuses these; a write that
        // comes all the same must not look like it was done.
        sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_OP_WRITE_SAME => Err(libc::EROFS),
        _ => Err(libc::EOPNOTSUPP),
    }
}

fn decode_read(descriptor: Descriptor, bounds: Bounds) -> Option<Request> {
    let (start_sector, len_bytes) = data_of(descriptor, bounds)?;
    Some(Request::Read { start_sector, len_bytes })
}

fn decode_write(descriptor: Descriptor, bounds: Bounds) -> Option<Request> {
    let (start_sector, len_bytes) = data_of(descriptor, bounds)?;
    Some(Request::Write { start_sector, len_bytes, durable: is_durable(descriptor) })
}

/// Where the data belongs that is, or is to be, in the tag's buffer: first sector and length.
fn data_of(descriptor: Descriptor, bounds: Bounds) -> Option<(u64, usize)> {
    let len_bytes = to_usize(sectors_to_bytes(u64::from(descriptor.sector_count))?)?;
    let sectors = sectors_of(descriptor, bounds)?;
    (len_bytes <= bounds.buffer_bytes).then_some((sectors.start, len_bytes))
}

fn decode_zeroes(descriptor: Descriptor, bounds: Bounds) -> Option<Request> {
    let sectors = sectors_of(descriptor, bounds)?;
    let is_zeroes = descriptor.op_flags & 0xff == sys::UBLK_IO_OP_WRITE_ZEROES;
    let keep = is_zeroes && descriptor.op_flags & sys::UBLK_IO_F_NOUNMAP != 0;
    let space = if keep { Space::Keep } else { Space::Free };
    let request = Request::Zeroes { sectors, space, durable: is_durable(descriptor) };
    (descriptor.sector_count <= bounds.zeroes_sectors_max).then_some(request)
}

/// The sectors of a request, at least one and all on the disk.
fn sectors_of(descriptor: Descriptor, bounds: Bounds) -> Option<Range<u64>> {
    let sectors = range_from(descriptor.start_sector, u64::from(descriptor.sector_count))?;
    (!sectors.is_empty() && sectors.end <= bounds.sectors).then_some(sectors)
}

fn is_durable(descriptor: Descriptor) -> bool {
    descriptor.op_flags & sys::UBLK_IO_F_FUA != 0
}

/// The answer to a read or write of `len_bytes` that succeeded.
pub(super) fn done(len_bytes: usize) -> i32 {
    // A tag's buffer is at most 32 MiB (the driver's own limit), so this never saturates.
    i32::try_from(len_bytes).unwrap_or(-libc::EIO)
}

/// The answer to a request that failed with `error`.
pub(super) fn failed(error: &Error) -> i32 {
    -presentable(error.errno())
}

/// `errno` if a block request may fail with it, else `EIO`.
///
/// `EAGAIN` and `EBUSY` make layers above retry for ever, and whatever is no errno at all would
/// be a success or nonsense.
fn presentable(errno: i32) -> i32 {
    match errno {
        libc::EAGAIN | libc::EBUSY | libc::EINTR | i32::MIN..=0 | 4096.. => libc::EIO,
        // The block layer knows one word for it.
        libc::EDQUOT => libc::ENOSPC,
        errno => errno,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const BOUNDS: Bounds =
        Bounds { sectors: 1000, buffer_bytes: 4096, read_only: true, zeroes_sectors_max: 0 };

    const WRITABLE: Bounds = Bounds { read_only: false, zeroes_sectors_max: 600, ..BOUNDS };

    fn ask(op_flags: u32, start_sector: u64, sector_count: u32) -> Result<Request, i32> {
        decode(Descriptor { op_flags, sector_count, start_sector }, BOUNDS)
    }

    fn ask_writable(op_flags: u32, start_sector: u64, sector_count: u32) -> Result<Request, i32> {
        decode(Descriptor { op_flags, sector_count, start_sector }, WRITABLE)
    }

    #[test]
    fn a_write_inside_the_disk_and_the_buffer_is_served_and_fua_makes_it_durable() {
        for (start_sector, count, len_bytes) in [(0, 1, 512), (992, 8, 4096), (999, 1, 512)] {
            for (flags, durable) in [
                (0, false),
                (sys::UBLK_IO_F_FUA, true),
                (sys::UBLK_IO_F_META | sys::UBLK_IO_F_NOUNMAP, false),
            ] {
                let expected = Request::Write { start_sector, len_bytes, durable };
                let asked = ask_writable(sys::UBLK_IO_OP_WRITE | flags, start_sector, count);
                assert_eq!(asked, Ok(expected));
            }
        }
        assert!(ask_writable(sys::UBLK_IO_OP_READ, 0, 8).is_ok(), "and it can be read");
        assert_eq!(ask_writable(sys::UBLK_IO_OP_FLUSH, 0, 0), Ok(Request::Flush));
    }

    #[test]
    fn zeros_may_be_longer_than_the_buffer_and_say_what_becomes_of_the_space() {
        let (discard, zeroes) = (sys::UBLK_IO_OP_DISCARD, sys::UBLK_IO_OP_WRITE_ZEROES);
        let (fua, keep) = (sys::UBLK_IO_F_FUA, sys::UBLK_IO_F_NOUNMAP);
        for (op_flags, space, durable) in [
            (discard, Space::Free, false),
            (discard | keep, Space::Free, false),
            (zeroes, Space::Free, false),
            (zeroes | keep, Space::Keep, false),
            (zeroes | keep | fua, Space::Keep, true),
        ] {
            for (start_sector, count) in [(0, 1), (400, 600), (999, 1)] {
                let sectors = start_sector..start_sector + u64::from(count);
                let expected = Request::Zeroes { sectors, space, durable };
                assert_eq!(ask_writable(op_flags, start_sector, count), Ok(expected));
            }
        }
    }

    #[test]
    fn a_change_beyond_the_disk_the_buffer_or_the_announced_length_is_invalid() {
        let beyond = [(0, 0), (999, 2), (1000, 1), (u64::MAX, 1), (0, u32::MAX), (u64::MAX - 7, 8)];
        for (op, longer) in [
            (sys::UBLK_IO_OP_WRITE, 9),
            (sys::UBLK_IO_OP_DISCARD, 601),
            (sys::UBLK_IO_OP_WRITE_ZEROES, 601),
        ] {
            for (start_sector, count) in beyond.into_iter().chain([(0, longer)]) {
                let answer = ask_writable(op, start_sector, count);
                assert_eq!(answer, Err(libc::EINVAL), "{op}: {count} sectors from {start_sector}");
            }
        }
        for op in [sys::UBLK_IO_OP_WRITE_SAME, sys::UBLK_IO_OP_ZONE_APPEND, 0xff] {
            assert_eq!(ask_writable(op, 0, 1), Err(libc::EOPNOTSUPP), "operation {op}");
        }
    }

    #[test]
    fn a_read_inside_the_disk_and_the_buffer_is_served() {
        for (start_sector, count, len_bytes) in [(0, 1, 512), (992, 8, 4096), (999, 1, 512)] {
            let expected = Request::Read { start_sector, len_bytes };
            assert_eq!(ask(sys::UBLK_IO_OP_READ, start_sector, count), Ok(expected));
        }
    }

    #[test]
    fn hints_above_the_operation_do_not_matter() {
        let hints = sys::UBLK_IO_F_META | sys::UBLK_IO_F_FUA | sys::UBLK_IO_F_FAILFAST_DEV;
        assert!(ask(sys::UBLK_IO_OP_READ | hints, 0, 1).is_ok());
        assert_eq!(ask(sys::UBLK_IO_OP_WRITE | hints, 0, 1), Err(libc::EROFS));
    }

    #[test]
    fn a_read_beyond_the_disk_or_the_buffer_is_invalid() {
        for (start_sector, count) in
            [(0, 0), (0, 9), (999, 2), (1000, 1), (u64::MAX, 1), (0, u32::MAX), (u64::MAX - 7, 8)]
        {
            let answer = ask(sys::UBLK_IO_OP_READ, start_sector, count);
            assert_eq!(answer, Err(libc::EINVAL), "{count} sectors from {start_sector}");
        }
    }

    #[test]
    fn a_read_only_disk_flushes_and_refuses_every_change() {
        for (op, answer) in [
            (sys::UBLK_IO_OP_FLUSH, Ok(Request::Flush)),
            (sys::UBLK_IO_OP_WRITE, Err(libc::EROFS)),
            (sys::UBLK_IO_OP_WRITE_SAME, Err(libc::EROFS)),
            (sys::UBLK_IO_OP_DISCARD, Err(libc::EOPNOTSUPP)),
            (sys::UBLK_IO_OP_WRITE_ZEROES, Err(libc::EOPNOTSUPP)),
            (sys::UBLK_IO_OP_ZONE_APPEND, Err(libc::EOPNOTSUPP)),
            (0xff, Err(libc::EOPNOTSUPP)),
        ] {
            assert_eq!(ask(op, 0, 1), answer, "operation {op}");
        }
    }

    #[test]
    fn the_answer_is_the_length_or_the_errors_errno() {
        assert_eq!(done(4096), 4096);
        for (error, answer) in [
            (Error::new(ErrorKind::Integrity, "x"), -libc::EILSEQ),
            (Error::new(ErrorKind::NotFound, "x"), -libc::ENODATA),
            (Error::io("x", &std::io::Error::from_raw_os_error(libc::ENOSPC)), -libc::ENOSPC),
            (Error::io("x", &std::io::Error::from_raw_os_error(libc::EDQUOT)), -libc::ENOSPC),
            (Error::new(ErrorKind::NoSpace, "x"), -libc::ENOSPC),
            // Retried for ever by whoever sits above: never let out.
            (Error::io("x", &std::io::Error::from_raw_os_error(libc::EAGAIN)), -libc::EIO),
            (Error::new(ErrorKind::Busy, "x"), -libc::EIO),
        ] {
            assert_eq!(failed(&error), answer, "{error:?}");
        }
    }

    #[test]
    fn no_answer_of_a_failed_read_can_be_taken_for_success() {
        for errno in [0, -5, i32::MIN, i32::MAX, 4096] {
            assert_eq!(presentable(errno), libc::EIO, "{errno}");
        }
        assert_eq!(presentable(4095), 4095);
    }
}
