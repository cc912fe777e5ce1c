//! From what the caller chose and what the disk is to what the kernel is told: pure.
//!
//! The caller's choices are checked here against our limits before the kernel sees them, so that
//! a refusal names the option and not an `EINVAL`.

use super::DeviceOptions;
use crate::disk::Geometry;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{
    QUEUE_COUNT_MAX, QUEUE_DEPTH_MAX, REQUEST_BYTES_MAX, TAG_BUFFER_BYTES_MAX, VIRTUAL_SECTORS_MAX,
};
use crate::units::whole_sectors;
use libublk::sys;

/// Hardware queues when the caller does not choose, where there are as many processors: four
/// readers got 1.17 times the reads of one queue in the median, one reader lost nothing beyond the
/// noise (`benches/results/ublk-queues.md`). A read that waits occupies its queue, one more
/// reason for a second.
pub(super) const QUEUE_COUNT_DEFAULT: u16 = 2;

/// Requests in flight per queue when the caller does not choose: what the driver and its
/// neighbours (`loop`, `virtio-blk`) settle at, and deep enough for four readers at depth 32.
pub(super) const QUEUE_DEPTH_DEFAULT: u16 = 128;

/// The smallest request buffer: one page, the block layer's own smallest maximum.
const REQUEST_BYTES_MIN: u32 = 4096;

/// A device as the kernel will be asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// The number asked for, if any.
    pub(super) id: Option<i32>,
    /// Hardware queues.
    pub(super) queues: u16,
    /// Requests in flight per queue.
    pub(super) depth: u16,
    /// Largest request.
    pub(super) request_bytes: u32,
}

/// The checked shape of a device on a machine with `cpus` processors.
pub(super) fn shape(options: &DeviceOptions, cpus: usize) -> Result<Shape> {
    let id = match options.id {
        None => None,
        // The driver's numbers are positive `int`s.
        Some(id) => Some(i32::try_from(id).map_err(|_| out_of("id", id, "0", i32::MAX))?),
    };
    let queues = options.queues.unwrap_or(QUEUE_COUNT_DEFAULT);
    if queues == 0 || queues > QUEUE_COUNT_MAX {
        return Err(out_of("queues", queues, "1", QUEUE_COUNT_MAX));
    }
    if options.depth == 0 || options.depth > QUEUE_DEPTH_MAX {
        return Err(out_of("depth", options.depth, "1", QUEUE_DEPTH_MAX));
    }
    let bytes = options.request_bytes;
    if !bytes.is_multiple_of(REQUEST_BYTES_MIN) || bytes == 0 || bytes > REQUEST_BYTES_MAX {
        let least = "a multiple of 4096 from 4096";
        return Err(out_of("request_bytes", bytes, least, REQUEST_BYTES_MAX));
    }
    // The driver clamps to the number of processors; asking for more would only mislead.
    let queues = queues.min(u16::try_from(cpus).unwrap_or(u16::MAX).max(1));
    let buffers = u64::from(queues) * u64::from(options.depth) * u64::from(bytes);
    if buffers > TAG_BUFFER_BYTES_MAX {
        return Err(out_of("queues x depth x request_bytes", buffers, "1", TAG_BUFFER_BYTES_MAX));
    }
    Ok(Shape { id, queues, depth: options.depth, request_bytes: bytes })
}

fn out_of(
    what: &str,
    found: impl std::fmt::Display,
    least: &str,
    most: impl std::fmt::Display,
) -> Error {
    let message = format!("device option {what}: found {found}, expected {least} to {most}");
    Error::new(ErrorKind::Usage, message)
}

/// The kernel's parameters of a read-only disk.
///
/// Read-only and no volatile cache ("write through" in sysfs), so the kernel never flushes; no
/// discard, no zoning. Read-ahead follows from `io_opt`.
pub(super) fn kernel_params(geometry: &Geometry, request_bytes: u32) -> Result<sys::ublk_params> {
    if !geometry.read_only {
        let message = "writable disks cannot be served as block devices yet";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    if geometry.sectors == 0 || geometry.sectors > VIRTUAL_SECTORS_MAX {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("a disk of {} sectors: expected 1 to {VIRTUAL_SECTORS_MAX}", geometry.sectors),
        ));
    }
    let optimal_bytes = geometry.optimal_io_bytes.clamp(4096, request_bytes.max(4096));
    let io_opt_shift = u8::try_from(optimal_bytes.ilog2()).unwrap_or(12);
    let max_sectors = u32::try_from(whole_sectors(u64::from(request_bytes))).unwrap_or(u32::MAX);
    Ok(sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC,
        basic: sys::ublk_param_basic {
            attrs: sys::UBLK_ATTR_READ_ONLY,
            logical_bs_shift: 9,
            physical_bs_shift: 12,
            io_opt_shift,
            io_min_shift: 12,
            max_sectors,
            dev_sectors: geometry.sectors,
            ..Default::default()
        },
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> DeviceOptions {
        DeviceOptions::default()
    }

    #[test]
    fn the_defaults_are_valid_on_any_machine() {
        for (cpus, queues) in [(0, 1), (1, 1), (2, 2), (4096, 2)] {
            let expected = Shape { id: None, queues, depth: 128, request_bytes: 512 * 1024 };
            assert_eq!(shape(&options(), cpus).unwrap(), expected, "{cpus} processors");
        }
    }

    #[test]
    fn more_queues_than_processors_are_not_asked_for() {
        let options = DeviceOptions { queues: Some(8), ..options() };
        assert_eq!(shape(&options, 2).unwrap().queues, 2);
        assert_eq!(shape(&options, 16).unwrap().queues, 8);
    }

    #[test]
    fn a_bad_option_is_named() {
        for (options, name) in [
            (DeviceOptions { id: Some(u32::MAX), ..options() }, "option id"),
            (DeviceOptions { queues: Some(0), ..options() }, "option queues"),
            (DeviceOptions { queues: Some(33), ..options() }, "option queues"),
            (DeviceOptions { depth: 0, ..options() }, "option depth"),
            (DeviceOptions { depth: 4097, ..options() }, "option depth"),
            (DeviceOptions { request_bytes: 0, ..options() }, "option request_bytes"),
            (DeviceOptions { request_bytes: 5000, ..options() }, "option request_bytes"),
            (DeviceOptions { request_bytes: 1 << 20, ..options() }, "option request_bytes"),
            (DeviceOptions { queues: Some(32), depth: 4096, ..options() }, "x depth x"),
        ] {
            let error = shape(&options, 64).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{options:?}");
            assert!(error.to_string().contains(name), "{error:?}");
        }
    }

    #[test]
    fn a_read_only_disk_says_so_and_claims_no_cache_and_no_discard() {
        let geometry = Geometry { sectors: 4097, read_only: true, optimal_io_bytes: 65536 };
        let params = kernel_params(&geometry, 512 * 1024).unwrap();
        assert_eq!(params.types, sys::UBLK_PARAM_TYPE_BASIC);
        assert_eq!(params.basic.attrs, sys::UBLK_ATTR_READ_ONLY);
        assert_eq!((params.basic.dev_sectors, params.basic.max_sectors), (4097, 1024));
        assert_eq!((params.basic.io_min_shift, params.basic.io_opt_shift), (12, 16));
    }

    #[test]
    fn the_optimal_size_stays_between_a_page_and_a_request() {
        for (optimal_io_bytes, request_bytes, shift) in
            [(0, 4096, 12), (65536, 4096, 12), (4096, 524_288, 12), (1 << 24, 524_288, 19)]
        {
            let geometry = Geometry { sectors: 8, read_only: true, optimal_io_bytes };
            let params = kernel_params(&geometry, request_bytes).unwrap();
            assert_eq!(params.basic.io_opt_shift, shift, "{optimal_io_bytes}");
        }
    }

    #[test]
    fn disks_that_cannot_be_served_are_refused() {
        for (sectors, read_only) in [(8, false), (0, true), (VIRTUAL_SECTORS_MAX + 1, true)] {
            let geometry = Geometry { sectors, read_only, optimal_io_bytes: 4096 };
            let error = kernel_params(&geometry, 4096).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{sectors} {read_only}");
        }
    }
}
