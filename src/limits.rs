//! Every bound of the program, each with its reason.
//!
//! What comes from disk, network, kernel or config is checked against these before memory is
//! taken for it.

/// Layers in one stack, the upper included. The reference enforces 255 (`MAX_STACK_LAYERS`), and
/// nobody ships more; our own tag is wider (`u16`).
pub const LAYER_COUNT_MAX: usize = 255;

/// Entries in the index of one sealed layer: the reference's `MAX_LSMT_RO_INDEX_SIZE`. 16 MB on
/// disk; production images of over 50 GB average below 19,000.
pub const SEALED_INDEX_ENTRIES_MAX: u64 = 1_000_000;

/// Entries in the log of a writable pair, and in a merged map: the reference's
/// `MAX_LSMT_INDEX_SIZE`.
pub const INDEX_ENTRIES_MAX: u64 = 128_000_000;

/// Index entries of all layers of a stack together, before they are merged. Merging takes about 110
/// bytes for each, so this is 2.2 GB in the worst case; production images have some 20,000.
pub const MERGE_ENTRIES_MAX: usize = 20_000_000;

/// Sectors of a layer's file that the merged map can address (48 bits, 128 PiB): the map packs
/// layer and sector into one word.
pub const LAYER_SECTORS_MAX: u64 = 1 << 48;

/// Sectors of a virtual disk: the 50 bits that an index entry has for them.
pub const VIRTUAL_SECTORS_MAX: u64 = 1 << 50;

/// Blocks in one zfile: the reference's `MAX_ZFILE_INDEX_SIZE`.
pub const ZFILE_BLOCKS_MAX: u64 = 1_000_000_000;

/// Largest compression block. The reference's reader divides by `65536 / block_size`.
pub const ZFILE_BLOCK_SIZE_MAX: u32 = 64 * 1024;

/// Smallest compression block: the reference's writer offers nothing below a page.
pub const ZFILE_BLOCK_SIZE_MIN: u32 = 4096;

/// Bytes of a config or service config file. Real ones are below 100 KB at 255 layers.
pub const CONFIG_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Bytes of a prefetch trace: ten million records of 24 bytes.
pub const TRACE_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Bytes of one kernel request that we accept; the default buffer per tag. The kernel allows
/// 32 MiB, block devices rarely see more than 1 MiB.
pub const REQUEST_BYTES_MAX: u32 = 512 * 1024;

/// Requests in flight per queue; the kernel's own limit is 4096.
pub const QUEUE_DEPTH_MAX: u16 = 4096;

/// Hardware queues of one device. The kernel clamps to the number of CPUs; more than 32 queue
/// threads per container disk help nobody.
pub const QUEUE_COUNT_MAX: u16 = 32;

/// Bytes of all tag buffers of one device (queues x depth x request size). They are touched
/// lazily, so this is address space, but each buffer may be a mapping of its own and a process has
/// 65530 of those by default; 8192 buffers of 512 KiB are 32 queues at depth 256.
pub const TAG_BUFFER_BYTES_MAX: u64 = 4 << 30;

/// Device numbers that the driver hands out: its `UBLK_MINORS`.
pub const DEVICE_ID_MAX: u32 = (1 << 20) - 1;

/// Numbers that `attach` gives up when other programs have taken them between look and use.
pub const DEVICE_ID_TRIES_MAX: usize = 16;

/// Bytes of a state file: the config's content, indented, and a few hundred bytes of our own.
pub const STATE_BYTES_MAX: u64 = 4 * CONFIG_BYTES_MAX;

/// Bytes of one control request. The longest we send has 30.
pub const CONTROL_REQUEST_BYTES_MAX: u64 = 4096;

/// Bytes of one control reply: counters of every queue and one error text.
pub const CONTROL_REPLY_BYTES_MAX: u64 = 256 * 1024;

/// How long a control client may take to send its request or to take its reply. It is a local
/// process with one short line to write; while it dawdles, the next client waits.
pub const CONTROL_CLIENT_MS_MAX: u64 = 2000;

/// Bytes of an error's text that travel between processes; escaped as JSON they take up to six
/// times as much, which still fits the line.
pub const ERROR_TEXT_BYTES_MAX: usize = 8 * 1024;

/// Bytes of the line by which a server tells its starter how it went: one error text.
pub const READY_LINE_BYTES_MAX: u64 = 64 * 1024;

/// Bytes of a server's last words that a starter keeps to show them.
pub const LAST_WORDS_BYTES_MAX: usize = 4096;

/// How long `attach` waits for its server. Opening 255 local layers takes a few seconds on a cold
/// disk, each command to the kernel has 30 s.
pub const ATTACH_SECONDS_MAX: u64 = 180;

/// How long `detach` waits unless told otherwise. A healthy device is gone within a second; the
/// kernel waits for requests in flight.
pub const DETACH_SECONDS_DEFAULT: u64 = 30;

/// The longest wait `detach` can be told: a day.
pub const DETACH_SECONDS_MAX: u64 = 86_400;
