//! What the kernel asks and what it is told: pure numbers, no kernel needed to test them.
//!
//! The queue thread copies the descriptor of a tag out of the shared page, [`decode`]s it and
//! answers with one `i32`: the bytes read, or a negative errno. A read is never answered with 0
//! (the driver would make it `EIO`, hiding the reason) and never with more than it asked for (the
//! driver would hand out memory that nobody filled).

use crate::error::Error;
use crate::units::{range_from, sectors_to_bytes, to_usize};
use libublk::sys;

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
}

/// A request that can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the first `len_bytes` of the tag's buffer.
    Read {
        /// First sector.
        start_sector: u64,
        /// Whole sectors, at least one, at most the buffer.
        len_bytes: usize,
    },
    /// Nothing is volatile on a read-only disk: done before it is asked.
    Flush,
}

/// The request in `descriptor`, or the positive errno that refuses it.
pub(super) fn decode(descriptor: Descriptor, bounds: Bounds) -> Result<Request, i32> {
    match descriptor.op_flags & 0xff {
        sys::UBLK_IO_OP_READ => decode_read(descriptor, bounds).ok_or(libc::EINVAL),
        sys::UBLK_IO_OP_FLUSH => Ok(Request::Flush),
        // The device is announced read-only, so the kernel itself refuses these; a write that
        // comes all the same must not look like it was done.
        sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_OP_WRITE_SAME => Err(libc::EROFS),
        _ => Err(libc::EOPNOTSUPP),
    }
}

fn decode_read(descriptor: Descriptor, bounds: Bounds) -> Option<Request> {
    let sector_count = u64::from(descriptor.sector_count);
    let len_bytes = to_usize(sectors_to_bytes(sector_count)?)?;
    let range = range_from(descriptor.start_sector, sector_count)?;
    let fits = len_bytes > 0 && len_bytes <= bounds.buffer_bytes && range.end <= bounds.sectors;
    fits.then_some(Request::Read { start_sector: range.start, len_bytes })
}

/// The answer to a read of `len_bytes` that succeeded.
pub(super) fn done(len_bytes: usize) -> i32 {
    // A tag's buffer is at most 32 MiB (the driver's own limit), so this never saturates.
    i32::try_from(len_bytes).unwrap_or(-libc::EIO)
}

/// The answer to a read that failed with `error`.
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
        errno => errno,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const BOUNDS: Bounds = Bounds { sectors: 1000, buffer_bytes: 4096 };

    fn ask(op_flags: u32, start_sector: u64, sector_count: u32) -> Result<Request, i32> {
        decode(Descriptor { op_flags, sector_count, start_sector }, BOUNDS)
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
