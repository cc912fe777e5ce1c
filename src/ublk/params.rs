//! From what the caller chose and what the disk is to what the kernel is told: pure.
//!
//! The caller's choices are checked here against our limits before the kernel sees them, so that
//! a refusal names the option and not an `EINVAL`.

use super::DeviceOptions;
use crate::disk::Geometry;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{
    QUEUE_COUNT_MAX, QUEUE_DEPTH_MAX, REQUEST_BYTES_MAX, TAG_BUFFER_BYTES_MAX, VIRTUAL_SECTORS_MAX,
    ZEROES_SECTORS_MAX,
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
    /// Whether the device outlives its server, for another to take over.
    pub(super) recoverable: bool,
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
    let recoverable = options.recoverable;
    Ok(Shape { id, queues, depth: options.depth, request_bytes: bytes, recoverable })
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

/// What a device's attributes say of writing: a disk that can be written has a volatile cache and
/// knows writes that are durable when they are answered.
const WRITING: u32 = sys::UBLK_ATTR_READ_ONLY | WRITABLE;
const WRITABLE: u32 = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;

/// The unit of discards where the disk has none: the driver wants one that is not 0, and nothing
/// comes of it.
const DISCARD_BYTES_DEFAULT: u32 = 4096;

/// Ways for data that leave the tag's buffer to us; we only know the driver's own copying, which
/// has a write's data in the buffer before the request is seen.
const OTHER_DATA_PATHS: u64 = (sys::UBLK_F_NEED_GET_DATA
    | sys::UBLK_F_USER_COPY
    | sys::UBLK_F_SUPPORT_ZERO_COPY
    | sys::UBLK_F_AUTO_BUF_REG) as u64;

/// The kernel's parameters of a disk. Read-ahead follows from `io_opt`; no zoning.
///
/// A read-only disk has no volatile cache ("write through" in sysfs), so the kernel never flushes,
/// and no discard. A writable one has a cache ("write back"), durable writes, writes of zeros, and
/// discards if it gives the space back.
pub(super) fn kernel_params(geometry: &Geometry, request_bytes: u32) -> Result<sys::ublk_params> {
    if geometry.sectors == 0 || geometry.sectors > VIRTUAL_SECTORS_MAX {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("a disk of {} sectors: expected 1 to {VIRTUAL_SECTORS_MAX}", geometry.sectors),
        ));
    }
    let optimal_bytes = geometry.optimal_io_bytes.clamp(4096, request_bytes.max(4096));
    let io_opt_shift = u8::try_from(optimal_bytes.ilog2()).unwrap_or(12);
    let max_sectors = u32::try_from(whole_sectors(u64::from(request_bytes))).unwrap_or(u32::MAX);
    let discard = discard_params(geometry);
    let types = if geometry.read_only { 0 } else { sys::UBLK_PARAM_TYPE_DISCARD };
    Ok(sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC | types,
        basic: sys::ublk_param_basic {
            attrs: if geometry.read_only { sys::UBLK_ATTR_READ_ONLY } else { WRITABLE },
            logical_bs_shift: 9,
            physical_bs_shift: 12,
            io_opt_shift,
            io_min_shift: 12,
            max_sectors,
            dev_sectors: geometry.sectors,
            ..Default::default()
        },
        discard,
        ..Default::default()
    })
}

/// What a disk announces of discards and writes of zeros; zeros of a read-only one.
fn discard_params(geometry: &Geometry) -> sys::ublk_param_discard {
    if geometry.read_only {
        return sys::ublk_param_discard::default();
    }
    let wished = geometry.discard_granularity_bytes;
    let is_unit = |bytes: &u32| bytes.is_power_of_two() && *bytes >= 512;
    sys::ublk_param_discard {
        discard_granularity: wished.filter(is_unit).unwrap_or(DISCARD_BYTES_DEFAULT),
        max_discard_sectors: wished.map_or(0, |_| ZEROES_SECTORS_MAX),
        max_write_zeroes_sectors: ZEROES_SECTORS_MAX,
        // The driver knows no more.
        max_discard_segments: 1,
        ..Default::default()
    }
}

/// The longest discard or write of zeros of a device that was announced with `params`.
pub(super) fn zeroes_sectors_max(params: &sys::ublk_params) -> u32 {
    if params.types & sys::UBLK_PARAM_TYPE_DISCARD == 0 {
        return 0;
    }
    params.discard.max_discard_sectors.max(params.discard.max_write_zeroes_sectors)
}

/// The shape of a device that exists, from what the kernel says about it.
///
/// # Errors
/// `Unsupported` for a device that this program would not have made.
pub(super) fn shape_of(info: &sys::ublksrv_ctrl_dev_info) -> Result<Shape> {
    if info.flags & OTHER_DATA_PATHS != 0 {
        let message = format!("device flags {:#x}: the data takes ways not ours", info.flags);
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let options = DeviceOptions {
        id: Some(info.dev_id),
        queues: Some(info.nr_hw_queues),
        depth: info.queue_depth,
        request_bytes: info.max_io_buf_bytes,
        recoverable: true,
    };
    // Processors may have gone since: the kernel's number of queues stays.
    shape(&options, usize::MAX).map_err(|error| {
        Error::new(ErrorKind::Unsupported, format!("the kernel's device is not ours: {error}"))
    })
}

/// Whether a disk of `geometry` may go on as the device that was announced with `params`.
///
/// # Errors
/// `Corrupt` when the mode or the size differ: the image is not the one that was attached. (A disk
/// that is written may have grown.)
/// `Unsupported` when more was announced than this program does, or less than it needs: without a
/// volatile cache, nobody would ever flush.
pub(super) fn check_same_disk(geometry: &Geometry, params: &sys::ublk_params) -> Result<()> {
    let read_only = params.basic.attrs & sys::UBLK_ATTR_READ_ONLY != 0;
    // Of a server that died between the two steps of a resize: the disk has grown, the device not.
    let has_grown = !read_only && geometry.sectors > params.basic.dev_sectors;
    let is_of_size = params.basic.dev_sectors == geometry.sectors || has_grown;
    if is_of_size && read_only == geometry.read_only {
        let (attrs, zeroes) = (params.basic.attrs & WRITING, zeroes_sectors_max(params));
        let as_we_would = if read_only { sys::UBLK_ATTR_READ_ONLY } else { WRITABLE };
        if attrs == as_we_would && zeroes <= ZEROES_SECTORS_MAX {
            return Ok(());
        }
        let message = format!(
            "the device was announced with attributes {attrs:#x} and {zeroes} sectors to be zeroed \
             at most: expected {as_we_would:#x} and {ZEROES_SECTORS_MAX}"
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let message = format!(
        "the device was announced with {} sectors (read-only: {read_only}), the image has {} \
         (read-only: {}): it is not the image that was attached",
        params.basic.dev_sectors, geometry.sectors, geometry.read_only
    );
    Err(Error::new(ErrorKind::Corrupt, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> DeviceOptions {
        DeviceOptions::default()
    }

    fn read_only(sectors: u64) -> Geometry {
        let (optimal_io_bytes, discard_granularity_bytes) = (4096, None);
        Geometry { sectors, read_only: true, optimal_io_bytes, discard_granularity_bytes }
    }

    #[test]
    fn the_defaults_are_valid_on_any_machine() {
        for (cpus, queues) in [(0, 1), (1, 1), (2, 2), (4096, 2)] {
            let expected = Shape {
                id: None,
                queues,
                depth: 128,
                request_bytes: 512 * 1024,
                recoverable: false,
            };
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
        let geometry = Geometry { optimal_io_bytes: 65536, ..read_only(4097) };
        let params = kernel_params(&geometry, 512 * 1024).unwrap();
        assert_eq!(params.types, sys::UBLK_PARAM_TYPE_BASIC);
        assert_eq!(params.basic.attrs, sys::UBLK_ATTR_READ_ONLY);
        assert_eq!((params.basic.dev_sectors, params.basic.max_sectors), (4097, 1024));
        assert_eq!((params.basic.io_min_shift, params.basic.io_opt_shift), (12, 16));
    }

    fn writable(discard_granularity_bytes: Option<u32>) -> Geometry {
        Geometry { read_only: false, discard_granularity_bytes, ..read_only(4097) }
    }

    #[test]
    fn a_writable_disk_announces_its_cache_durable_writes_and_what_it_discards() {
        let most = ZEROES_SECTORS_MAX;
        for (wished, unit, discard) in [
            (None, 4096, 0),
            (Some(512), 512, most),
            (Some(65536), 65536, most),
            // Whatever a disk says, the driver gets a unit that it takes.
            (Some(0), 4096, most),
            (Some(5000), 4096, most),
        ] {
            let params = kernel_params(&writable(wished), 4096).unwrap();
            assert_eq!(params.types, sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD);
            let attrs = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
            assert_eq!(params.basic.attrs, attrs);
            let told = params.discard;
            assert_eq!((told.discard_granularity, told.max_discard_sectors), (unit, discard));
            assert_eq!((told.max_write_zeroes_sectors, told.max_discard_segments), (most, 1));
            assert_eq!(zeroes_sectors_max(&params), most);
        }
        let params = kernel_params(&read_only(8), 4096).unwrap();
        assert_eq!(zeroes_sectors_max(&params), 0);
    }

    #[test]
    fn a_writable_device_is_only_taken_over_as_it_would_be_announced() {
        let geometry = writable(Some(4096));
        let params = kernel_params(&geometry, 4096).unwrap();
        assert!(check_same_disk(&geometry, &params).is_ok());
        assert!(check_same_disk(&writable(None), &params).is_ok(), "discards write zeros");
        let mut no_cache = params;
        no_cache.basic.attrs = 0;
        let mut no_fua = params;
        no_fua.basic.attrs = sys::UBLK_ATTR_VOLATILE_CACHE;
        let mut longer = params;
        longer.discard.max_write_zeroes_sectors += 1;
        for odd in [no_cache, no_fua, longer] {
            let error = check_same_disk(&geometry, &odd).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{odd:?}");
        }
        let error = check_same_disk(&read_only(4097), &params).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        // A server may die between the two steps of a resize.
        let grown = Geometry { sectors: geometry.sectors + 8, ..geometry.clone() };
        assert!(check_same_disk(&grown, &params).is_ok());
        let params = kernel_params(&grown, 4096).unwrap();
        let error = check_same_disk(&geometry, &params).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "a device larger than its disk");
    }

    #[test]
    fn a_device_whose_data_takes_another_way_is_not_ours() {
        let info = sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: 1,
            queue_depth: 16,
            max_io_buf_bytes: 65536,
            ..Default::default()
        };
        assert!(shape_of(&info).is_ok());
        for flag in [2, 7, 0, 11] {
            let odd = sys::ublksrv_ctrl_dev_info { flags: 1 << flag, ..info };
            assert_eq!(shape_of(&odd).unwrap_err().kind(), ErrorKind::Unsupported, "{flag}");
        }
    }

    #[test]
    fn the_optimal_size_stays_between_a_page_and_a_request() {
        for (optimal_io_bytes, request_bytes, shift) in
            [(0, 4096, 12), (65536, 4096, 12), (4096, 524_288, 12), (1 << 24, 524_288, 19)]
        {
            let geometry = Geometry { optimal_io_bytes, ..read_only(8) };
            let params = kernel_params(&geometry, request_bytes).unwrap();
            assert_eq!(params.basic.io_opt_shift, shift, "{optimal_io_bytes}");
        }
    }

    #[test]
    fn disks_that_cannot_be_served_are_refused() {
        for sectors in [0, VIRTUAL_SECTORS_MAX + 1] {
            let error = kernel_params(&read_only(sectors), 4096).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{sectors}");
        }
    }

    #[test]
    fn a_device_is_taken_over_with_the_shape_and_the_size_it_was_made_with() {
        let info = sys::ublksrv_ctrl_dev_info {
            dev_id: 7,
            nr_hw_queues: 3,
            queue_depth: 16,
            max_io_buf_bytes: 65536,
            ..Default::default()
        };
        let shape = shape_of(&info).unwrap();
        assert_eq!((shape.id, shape.queues, shape.depth), (Some(7), 3, 16));
        assert_eq!((shape.request_bytes, shape.recoverable), (65536, true));
        let odd = sys::ublksrv_ctrl_dev_info { max_io_buf_bytes: 32 << 20, ..info };
        assert_eq!(shape_of(&odd).unwrap_err().kind(), ErrorKind::Unsupported);

        let geometry = read_only(100);
        let params = kernel_params(&geometry, 65536).unwrap();
        assert!(check_same_disk(&geometry, &params).is_ok());
        for other in [
            Geometry { sectors: 101, ..geometry.clone() },
            Geometry { read_only: false, ..geometry.clone() },
        ] {
            let error = check_same_disk(&other, &params).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{other:?}");
        }
    }
}
