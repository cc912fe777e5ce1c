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

/// Bytes of a zfile's jump table, or of the log of a writable pair, that are read at a time; a
/// multiple of both entry sizes. Memory grows with what was read and found possible, never with
/// what a header or a file's length promises. A hole reads as zeros: impossible lengths in a jump
/// table, which end it, and blank slots in a log, which take no memory. So a sparse file costs one
/// piece; what is really there costs, per entry, 4.125 bytes in memory for 4 in the file (jump
/// table; twice that while it grows) or 32 for 16 (log; 64 while it grows).
pub const INDEX_PIECE_BYTES: u64 = 1 << 20;

/// Blocks in one zfile: the reference's `MAX_ZFILE_INDEX_SIZE`. Their table is 4 GB in the file.
pub const ZFILE_BLOCKS_MAX: u64 = 1_000_000_000;

/// Largest compression block. The reference's reader divides by `65536 / block_size`.
pub const ZFILE_BLOCK_SIZE_MAX: u32 = 64 * 1024;

/// Smallest compression block: the reference's writer offers nothing below a page.
pub const ZFILE_BLOCK_SIZE_MIN: u32 = 4096;

/// Bytes of a parcel, by which a server hands its parsed image on: the jump tables of one billion
/// blocks, which is 4 TB of image at the smallest block size, and the rest.
pub const PARCEL_BYTES_MAX: u64 = 4 << 30;

/// Bytes of a config or service config file. Real ones are below 100 KB at 255 layers.
pub const CONFIG_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Bytes of a prefetch trace: 699,049 records of 24 bytes, ten times as many as a replay has steps.
/// It may come with an image, and is in memory twice while it is parsed: 32 MiB in all.
pub const TRACE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Bytes of one kernel request that we accept; the default buffer per tag. The kernel allows
/// 32 MiB, block devices rarely see more than 1 MiB.
pub const REQUEST_BYTES_MAX: u32 = 512 * 1024;

/// Sectors of one discard, or of one write of zeros: 256 MiB. To an append upper it is 32 entries
/// of its index; a disk that has to store the zeros needs about a second, as long as a request
/// should take at most.
pub const ZEROES_SECTORS_MAX: u32 = 512 * 1024;

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

/// Records of a device's trouble ring: 128 KB of memory at most, and enough to see how trouble
/// began when a reader retries a few times.
pub const TROUBLE_RECORDS_MAX: usize = 256;

/// Bytes of a layer's front that are fetched with its tail when it is opened: a tar wrapper, and
/// the headers of zfile and LSMT.
pub const OPEN_HEAD_BYTES: u64 = 4096;

/// Bytes of a layer's tail that are fetched when it is opened: trailers, and of all but very large
/// layers the jump table and the index (19,000 entries take 300 KB, compressed less).
pub const OPEN_TAIL_BYTES: u64 = 256 * 1024;

/// How often a layer whose structure is wrong is fetched again where it was looked at, when it is
/// opened: head, jump table, header and trailer of what it holds, and index.
pub const OPEN_REFETCHES_MAX: u32 = 5;

/// Layers that are opened at a time where some are in a registry: each waits for an answer or two.
pub const OPEN_REMOTE_THREADS_MAX: usize = 32;

/// Seconds for finding an image, or the length of a blob, in a registry: as a read may take.
pub const RESOLVE_SECONDS_MAX: u64 = 60;

/// Threads of one device that wait for bytes from elsewhere. A registry's answer takes some 100 ms;
/// so many requests of 256 KiB at a time fill a link of 600 Mbit/s, and more than that is the
/// readahead's to ask for.
pub const MISS_THREADS_MAX: usize = 32;

/// Seconds after which such a thread ends that has nothing to do: an idle device has none.
pub const MISS_IDLE_SECONDS: u64 = 10;

/// From how long on a request that succeeds counts as slow. A cold read of the slowest disk or
/// network file system takes some 100 ms; the kernel itself begins to complain after seconds.
pub const SLOW_IO_MS: u64 = 1000;

/// Seconds for which a file system is frozen at most: programs that write to it stand still, and
/// some give up. A snapshot stops writes for less than one on any disk that keeps up.
pub const FREEZE_SECONDS_MAX: u64 = 30;

/// Bytes of one control request. The longest names three paths of up to 4096 bytes, each of which
/// may take six characters in JSON.
pub const CONTROL_REQUEST_BYTES_MAX: u64 = 80 * 1024;

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

/// Bytes of one packet between a server and its supervisor: a note of some hundred bytes, or one
/// error text (see [`ERROR_TEXT_BYTES_MAX`]), escaped.
pub const PACKET_BYTES_MAX: usize = 64 * 1024;

/// Open files of one packet: below the kernel's 253, so that an image of 255 layers takes two.
pub const PACKET_FILES_MAX: usize = 200;

/// Open files that the supervisor keeps for one device: its map and its layers.
pub const PARCEL_FILES_MAX: usize = LAYER_COUNT_MAX + 1;

/// Files of parcels that systemd keeps for the supervisor: their names fit into one variable of the
/// environment (128 KiB), and systemd, which compares each new one with all that it has, takes less
/// than a millisecond for that. Enough for 100 devices of 30 layers; those beyond are opened anew
/// when their server and the supervisor die together.
pub const STORED_FILES_MAX: usize = 3500;

/// Connections that the supervisor has at one time: a link for each device, and some for people.
/// More devices than this on one host need more than one run folder.
pub const SUPERVISOR_LINKS_MAX: usize = 4096;

/// Successors that the supervisor tries for one device whose servers die early. The sixth early
/// death in a row is no accident.
pub const RECOVERY_TRIES_MAX: u32 = 5;

/// How long a server must have served for its death not to count as early.
pub const RECOVERY_SETTLED_MS: u64 = 10_000;

/// How long a successor may take from its start to requests flowing: opening and verifying an image
/// anew, when the parcel is lost, takes the time of an attach.
pub const RECOVERY_SECONDS_MAX: u64 = ATTACH_SECONDS_MAX;

/// Bytes of a server's log; at this size it is moved aside and a new one begun, so that a device's
/// words take at most twice this of the run folder, which is memory.
pub const LOG_BYTES_MAX: u64 = 1024 * 1024;

/// Bytes of one NBD read, and of a refused write's payload that is read and forgotten: what the
/// protocol has clients assume of a server that says nothing.
pub const NBD_REQUEST_BYTES_MAX: u32 = 32 * 1024 * 1024;

/// Bytes of the data of one NBD option that we look at: a name may have 4096, and a client asks
/// for a handful of facts. Longer data is skipped and refused.
pub const NBD_OPTION_BYTES_MAX: u32 = 8 * 1024;

/// How long the whole of an NBD handshake may take. It is a few hundred bytes of a local process;
/// meanwhile the client holds one of the connections below.
pub const NBD_HANDSHAKE_MS_MAX: u64 = 10_000;

/// NBD clients at one time; one more is hung up on. Clients that open several connections open 4
/// to 16. With the largest requests on each, the buffers are 4 GiB, like those of a device.
pub const NBD_CONNECTIONS_MAX: usize = 128;

/// How long a server that was told to stop waits for the NBD requests in flight, each of which may
/// read 32 MiB from a slow disk, before it hangs up.
pub const NBD_STOP_MS_MAX: u64 = 5000;

/// Bytes of the path of a Unix socket: the kernel's `sun_path`, without the zero at its end and
/// the `.new` that the name has until the socket listens.
pub const SOCKET_PATH_BYTES_MAX: usize = 103;

/// How long a server waits for others that are making a socket in the same folder. They need
/// microseconds each.
pub const SOCKET_LOCK_MS_MAX: u64 = 5000;

/// Bytes of the entry of a device that is to be there after a reboot: four paths and sixteen values
/// of the environment, of at most 4096 bytes each, escaped (six for one), and some numbers.
pub const PERSIST_BYTES_MAX: u64 = 512 * 1024;

/// Devices that `restore` attaches at a time. Each opens its image with threads of its own and
/// waits for the kernel meanwhile; more than this only queue up in the driver.
pub const RESTORE_AT_ONCE_MAX: usize = 8;

/// Lines of each log, and failed requests of each device, that a bug report repeats.
pub const REPORT_LINES_MAX: usize = 50;

/// Bytes at the end of a log in which those lines are looked for: 1.3 KB for each, of which most
/// need a tenth.
pub const REPORT_TAIL_BYTES: u64 = 64 * 1024;

/// Index entries of writes that are not flushed yet, in the journal of a writable pair. 1 MiB of
/// memory for each device; at writes of 4 KiB, 256 MiB between two flushes, where file systems
/// flush after seconds. A writer that finds it full flushes first.
pub const UPPER_JOURNAL_ENTRIES_MAX: u32 = 65_536;

/// Sectors of one batch in the log of a writable pair: a full journal and the mark. A longer tail
/// behind the last mark is nothing that a power cut left of one batch.
pub const LOG_BATCH_SECTORS_MAX: u64 = 2049;

/// Entries of a log from which on it is rewritten when most of it is overwritten: 1 MiB, which is
/// read in a millisecond at open.
pub const LOG_REWRITE_ENTRIES_MIN: u64 = 65_536;

/// How many times the entries that its live map needs a log may have before it is rewritten. A
/// rewrite then costs at most a third of what was appended since the last one.
pub const LOG_REWRITE_FACTOR: u64 = 4;

/// Free extents of a data file that are remembered, and as many that wait for readers: some 100 MB
/// of memory at most. What is not remembered is found again at the next open.
pub const UPPER_FREE_EXTENTS_MAX: usize = 1 << 20;

/// Bytes of one block of an upper in sparse form: what a write into a hole fills. The header is
/// one, so that blocks of the disk are blocks of the file; a page, below which no file system we
/// know tells holes from data in the page cache.
pub const SPARSE_BLOCK_BYTES: u64 = 4096;

/// Bytes that the compaction of a writable pair copies at a time.
pub const UPPER_COPY_BYTES: usize = 1 << 20;

/// How often a write that found the quota used up flushes, or waits a millisecond for the reads
/// that hold covered space back: as long as a slow disk takes for a read.
pub const UPPER_ROOM_TRIES_MAX: u32 = 100;

/// From which share of its quota on a writable pair warns: what is left is a tenth, some seconds to
/// minutes of writing.
pub const UPPER_QUOTA_WARN_PERCENT: u64 = 90;

/// Below which share of its quota it takes the warning back.
pub const UPPER_QUOTA_CALM_PERCENT: u64 = 80;

/// Below how much room on the file system of a writable pair it warns: a second of writing to a
/// quick disk. Of a file system smaller than 5 GiB, a twentieth.
pub const UPPER_ROOM_BYTES_MIN: u64 = 256 << 20;

/// How long an answer of that file system counts: one on another host may take milliseconds.
pub const UPPER_ROOM_CHECK_MS: u64 = 1000;
/// Bytes of one extent of the cache: what is fetched, checked and stored as one. At 100 ms to a
/// first byte, 64 to 256 KiB cost a registry about the same; the kernel reads ahead 128 KiB of a
/// mapped file, so that checking a whole extent at its first use reads what would be read anyway.
pub const CACHE_EXTENT_BYTES: u64 = 128 * 1024;

/// Smallest extent: a page. Below it records would outweigh data.
pub const CACHE_EXTENT_BYTES_MIN: u64 = 4096;

/// Largest extent: a random read of 4 KiB waits for all of it.
pub const CACHE_EXTENT_BYTES_MAX: u64 = 1024 * 1024;

/// Extents of one blob in the cache: 512 GiB at 128 KiB, 4 MiB of memory for their states and 64
/// MiB of records on disk. A larger blob is refused: no layer is, but a server may say so.
pub const CACHE_EXTENTS_MAX: u64 = 1 << 22;

/// Bytes of neighbouring extents that are fetched by one request: its buffer, and how long who
/// needs one of them may wait for the others.
pub const CACHE_JOIN_BYTES_MAX: u64 = 1024 * 1024;

/// Buffers for what requests bring that a process keeps to use again, of that size each: one for
/// each thread that fetches ahead.
pub const CACHE_BUFFERS_MAX: usize = CACHE_THREADS_MAX;

/// Bytes that are fetched ahead of a reader that has just proved sequential.
pub const CACHE_AHEAD_BYTES_MIN: u64 = 256 * 1024;

/// Bytes that are fetched ahead of a sequential reader at most: eight requests of 1 MiB at a time,
/// 80 MB/s where each takes 100 ms.
pub const CACHE_AHEAD_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// The same once half of the blob is here: as many requests as one blob may have for what nobody
/// waits for yet, 120 MB/s where each takes 100 ms.
pub const CACHE_AHEAD_REST_BYTES_MAX: u64 = 12 * 1024 * 1024;

/// Sequential readers of one blob that are followed at a time.
pub const CACHE_STREAMS_MAX: usize = 8;

/// Threads that fetch ahead, for all blobs of a process: as many requests as the widest window is
/// cut into, 12 MiB of buffers.
pub const CACHE_THREADS_MAX: usize = 12;

/// Fetches ahead of reads that one blob has under way at a time, by those threads, replays and
/// downloads together: of the requests that it may have, a quarter is left to reads, which so never
/// wait for one of these to end.
pub const CACHE_AHEAD_AT_ONCE_MAX: usize = 12;
const _: () = assert!(CACHE_AHEAD_AT_ONCE_MAX < BLOB_REQUESTS_AT_ONCE_MAX);
// One fetch of the cache is one request.
const _: () = assert!(CACHE_JOIN_BYTES_MAX <= REGISTRY_PIECE_BYTES_MAX);

/// Jobs that wait for those threads: two windows for each of eight readers. One more is dropped,
/// and what it would have brought is fetched when it is needed.
pub const CACHE_JOBS_MAX: usize = 128;

/// How long the files of a blob that is opened may be busy in other processes. They hold the lock
/// for some system calls; who waits longer reads past the cache.
pub const CACHE_LOCK_MS_MAX: u64 = 2000;

/// Pause between two looks at what another process is fetching. Some 1 ms at first.
pub const CACHE_POLL_MS_MAX: u64 = 20;

/// How long a read waits for what somebody else is fetching: a request of 1 MiB takes less even at
/// 1 Mbit/s, so that whoever takes longer is stuck, and then each fetches for itself.
pub const CACHE_PATIENCE_MS: u64 = 10_000;

/// How long an extent whose content was wrong is not fetched again for that reason: what is wrong
/// at its origin stays so, and who reads it gets an error meanwhile.
pub const CACHE_DISCARD_REST_MS: u64 = 60_000;

/// How long the origin may take to tell what a damaged plain file should hold: a request of 1 MiB
/// at 2 Mbit/s. The read that wants to know fails without an answer.
pub const CACHE_COMPARE_MS_MAX: u64 = 5000;

/// For how long nobody is asked again who did not tell: a read of what is damaged fails at once.
pub const CACHE_COMPARE_REST_MS: u64 = 30_000;

/// How long a blob of which wrong bytes were noticed is fetched from its origin alone. A mirror
/// that goes on giving wrong ones costs one discarded extent in this time; a single accident costs
/// the registry ten minutes of one blob's traffic.
pub const CACHE_DISTRUST_MS: u64 = 600_000;

/// For how long who waited in vain only waits shortly.
pub const CACHE_IMPATIENCE_MS: u64 = 30_000;

/// How long fills are not tried again after the cache's disk was full or failed.
pub const CACHE_PAUSE_MS: u64 = 5000;

/// Bytes that a cache may take of its disk unless told otherwise: some dozens of images of which a
/// tenth is read.
pub const CACHE_QUOTA_BYTES_DEFAULT: u64 = 16 << 30;

/// Bytes that one process stores between two looks at the quota at most: by so much times the
/// number of processes the quota may be exceeded for a moment.
pub const CACHE_CHECK_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// How often the background looks after open blobs: notes that they are in use, lets go of files
/// that were evicted, and notices blobs that several processes completed together.
pub const CACHE_TICK_MS: u64 = 10_000;

/// How long a blob that is open must not have been read before it is evicted all the same: its
/// files stay until its readers notice, within a tick.
pub const CACHE_IDLE_MS: u64 = 60_000;

/// How long a complete blob that could not be promoted is left alone at most: the pause begins with
/// two ticks and doubles, because each try reads all of it.
pub const CACHE_PROMOTE_PAUSE_MS_MAX: u64 = 3_600_000;

/// Blobs that a folder of the cache may hold; what lies beyond is not looked at. 100,000 layers
/// are more than a host has, and 30 MB of memory to list.
pub const CACHE_BLOBS_MAX: usize = 100_000;

/// Folders that one blob is put into once it is complete: one for each image of a process that has
/// the layer.
pub const CACHE_COMMITS_MAX: usize = 256;

/// Runs of extents that a pull remembers to come back to, because other processes were fetching
/// them. Each process has a few.
pub const CACHE_TAKEN_MAX: usize = 1024;

/// Names in such a folder that are looked at for what killed copies left. The reference keeps a
/// handful of files there.
pub const COMMIT_FOLDER_NAMES_MAX: usize = 4096;

/// Layers that `prefetch` pulls at a time unless told otherwise. Each is fetched by several
/// requests already; more layers help where the larger ones are slow to begin.
pub const PREFETCH_LAYERS_DEFAULT: u16 = 4;

/// Layers that `prefetch` pulls at a time at most: as many as fit the requests to one host.
pub const PREFETCH_LAYERS_MAX: u16 = 32;

/// Times that a layer is filled and checked: it may be evicted, or found damaged, meanwhile.
pub const PREFETCH_ROUNDS_MAX: u32 = 3;

/// How long another process may take to check a complete layer: this, and the time of its bytes at
/// the rate below. One that is stopped meanwhile holds up who waits for it no longer than that.
pub const PREFETCH_CHECK_SECONDS_MIN: u64 = 20;

/// Bytes of a layer that are read, hashed and copied in a second by a slow machine that has more to
/// do: a tenth of what one core hashes.
pub const PREFETCH_CHECK_BYTES_PER_SECOND_MIN: u64 = 50_000_000;

/// How long `export` waits for another process that takes the digest of a layer: hashing is half a
/// gigabyte a second, and what is not known in time is no error.
pub const EXPORT_CHECK_SECONDS_MAX: u64 = 60;

/// How often the background of an image looks around when nothing is due: whether most of a layer
/// was wanted meanwhile. One wake-up in ten seconds for a device that is not all here.
pub const BACKGROUND_LOOK_MS: u64 = 10_000;

/// How long one step of the background waits for reads that wait for the same cache. Where there
/// are always some, it goes on at five steps a second.
pub const BACKGROUND_YIELD_MS: u64 = 200;

/// From which part of a layer on the rest is fetched unasked: who wanted three quarters is likely
/// to want the rest, and a whole layer is checked against its digest and read like a local file.
pub const BACKGROUND_WHOLE_PERCENT: u64 = 75;

/// Bytes of one step of a background download, whatever `blockSize` says: an extent at least.
pub const DOWNLOAD_PIECE_BYTES_MIN: u64 = CACHE_EXTENT_BYTES;

/// Bytes of one step of a background download at most: a second at 8 MB/s, in which reads wait.
pub const DOWNLOAD_PIECE_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Times that a background download tries each layer, whatever `tryCnt` says: with growing pauses,
/// a day.
pub const DOWNLOAD_TRIES_MAX: u32 = 1000;

/// Threads that replay a trace, whatever `concurrency` says.
pub const REPLAY_THREADS_MAX: usize = 8;

/// Bytes of one step of a replay.
pub const REPLAY_PIECE_BYTES_MAX: u64 = 1024 * 1024;

/// Steps of one replay, whatever a trace says: 64 GiB of full ones, 1.5 MiB of memory. A trace of
/// small scattered reads has one for each, and a start that needs more of them is no longer helped
/// by what comes last.
pub const REPLAY_PIECES_MAX: usize = 1 << 16;

/// Fetches of a replay that may fail before it is given up.
pub const REPLAY_FAILURES_MAX: u32 = 8;

/// First touches of chunks before a trace is judged by them: 8 MiB.
pub const REPLAY_JUDGE_MIN: u64 = 128;

/// How long the first touches of an image are learned: a container has started by then.
pub const LEARN_MS_MAX: u64 = 300_000;

/// Chunks of one layer that are told apart: 64 KiB each up to 64 GiB, larger ones beyond. Two bits
/// for each, 256 KiB of memory.
pub const TOUCH_CHUNKS_MAX: u64 = 1 << 20;

/// First touches that are learned: 4 GiB of an image, 1.5 MiB of memory.
pub const TOUCH_RECORDS_MAX: usize = 1 << 16;

/// Bytes of a log of first touches that are read: what [`TOUCH_RECORDS_MAX`] records take, and some
/// more.
pub const TOUCH_LOG_BYTES_MAX: u64 = 2 * 1024 * 1024;

/// Images whose first touches are kept, 1.5 MiB each at most and 20 KB as a rule.
pub const TOUCH_LOGS_MAX: usize = 1024;

/// Bytes that all of these take of the disk: three times the rule.
pub const TOUCH_LOGS_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// How old a file must be that is not yet a log before it is taken for what a killed writer left:
/// writing one takes milliseconds.
pub const TOUCH_LOG_STRAY_MS: u64 = 600_000;

/// Reads that one recording keeps, which is what can be replayed: 15 MB of memory, hours of a
/// container's start.
pub const RECORD_COUNT_MAX: usize = 600_000;

/// Bytes of one record: the buffer into which the reference replays one.
pub const RECORD_BYTES_MAX: u64 = 1024 * 1024;

/// How long a read may take when the blob has to be fetched, unless told otherwise.
pub const CACHE_READ_MS_DEFAULT: u64 = 60_000;
/// Bytes of the name of an image: a host of 255 and a repository of 255, as registries limit them,
/// a tag of 128 and a digest of 135.
pub const REFERENCE_BYTES_MAX: usize = 1024;

/// Bytes of an index or a manifest: what registries accept by the OCI's advice.
pub const MANIFEST_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Indexes on the way to a manifest. One is usual, an index in an OCI layout makes two.
pub const INDEX_DEPTH_MAX: usize = 3;

/// How long a fetch may take unless told otherwise, with all its attempts: long enough for a
/// registry to be restarted, shorter than the 120 s after which the kernel reports a hung task.
pub const IO_DEADLINE_MS_DEFAULT: u64 = 60_000;

/// The longest time for a fetch that can be asked for. Whoever reads waits in the kernel meanwhile.
pub const IO_DEADLINE_SECONDS_MAX: u64 = 3600;

/// Bytes of a blob that a 200 may have while fewer were asked for. Below this it costs less to read
/// them than to give up a server that knows no ranges; it is not read to its end either way.
pub const REGISTRY_WHOLE_BODY_BYTES_MAX: u64 = 1024 * 1024;

/// Bytes of one range request. Larger fetches are split, so that what fails is asked for again in
/// pieces of this size, and several connections carry one large read.
pub const REGISTRY_PIECE_BYTES_MAX: u64 = 1024 * 1024;

/// Mirrors in a host's config: one that hangs holds a read up for seconds before it rests, so more
/// than a few help nobody.
pub const MIRRORS_MAX: usize = 8;

/// Range requests under way for one fetch: with 100 ms to the first byte, 8 pieces of 1 MiB are
/// 80 MB/s.
pub const REGISTRY_PIECES_AT_ONCE_MAX: usize = 8;

/// Requests under way to one host, those of all blobs together. Connections are not shared by
/// requests under way, so this is also the number of sockets; registries begin to refuse at some
/// hundreds from one address.
pub const REGISTRY_REQUESTS_AT_ONCE_MAX: usize = 64;

/// Requests under way for one blob: a quarter of the above, so that three other blobs of the same
/// host go on while one is slow.
pub const BLOB_REQUESTS_AT_ONCE_MAX: usize = 16;

/// Hosts that are remembered with their budgets. An image has one registry, and that a few stores.
pub const REGISTRY_HOSTS_MAX: usize = 256;

/// How old a redirect may be that is used for bytes which were wrong before: young enough to be to
/// another store if the registry knows of one, old enough that it is not asked for each extent.
pub const REDIRECT_RECENT_MS: u64 = 10_000;

/// Executors, of which each serves one registry: a thread and some files for each. Most images have
/// one, with layers of another that they were made upon; further ones share.
pub const REGISTRY_EXECUTORS_MAX: usize = 4;

/// Attempts of one request, whatever the deadline: with pauses of up to 5 s, more than fit in a
/// minute, unless a server fails at once and asks to be asked again at once.
pub const REGISTRY_ATTEMPTS_MAX: u32 = 24;

/// Attempts that may end in an answer that must not be believed. The fourth is no accident.
pub const REGISTRY_MALFORMED_MAX: u32 = 4;

/// The first pause before a request is made again: a connection that broke is no sign of load.
pub const REGISTRY_BACKOFF_MS_MIN: u64 = 100;

/// The longest pause: a registry that is back is noticed after 5 s.
pub const REGISTRY_BACKOFF_MS_MAX: u64 = 5000;

/// The longest pause that a server can ask for. A read cannot wait longer for anything, and half of
/// its usual deadline must be left to do it.
pub const REGISTRY_RETRY_AFTER_MS_MAX: u64 = 30_000;

/// Retries to one host before the rate below: as many as the requests that can be under way, so
/// that one cut of the network costs no pause.
pub const REGISTRY_RETRIES_BURST: i64 = 64;

/// Retries a second to one host that answers nothing else: enough to notice that it is back, and no
/// load.
pub const REGISTRY_RETRIES_PER_SECOND: i64 = 10;

/// How long a connection may take, TLS included. Three losses of the first packet take 7 s.
pub const REGISTRY_CONNECT_MS_MAX: u64 = 10_000;

/// How long an answer's head may take. Object stores take some 100 ms; a registry that pulls the
/// blob through from another takes seconds.
pub const REGISTRY_HEAD_MS_MAX: u64 = 15_000;

/// How often the speed of a body is judged.
pub const REGISTRY_PACE_MS: u64 = 5000;

/// Bytes of body that must come within that time: 20 kB/s, a tenth of the slowest link that anyone
/// would start an image over. A body that is slower is asked for anew, from where it stopped.
pub const REGISTRY_PACE_BYTES_MIN: u64 = 100_000;

/// Redirects that are followed in a row: registry, its store, and three more.
pub const REDIRECTS_MAX: usize = 5;

/// How long a redirect is used that does not say how long it is good for: what the reference does.
pub const REDIRECT_SECONDS_DEFAULT: u64 = 300;

/// Bytes of an answer of a token server. The largest tokens known have some 10 KB.
pub const TOKEN_BYTES_MAX: u64 = 256 * 1024;

/// How long a token is good for that does not say it: the protocol's default.
pub const TOKEN_SECONDS_DEFAULT: u64 = 60;

/// Tokens that are kept: one for each repository of each registry in use.
pub const TOKENS_MAX: usize = 1024;

/// Bytes of a credential file, or of a credential helper's answer.
pub const CREDENTIAL_BYTES_MAX: u64 = 1024 * 1024;

/// How long a credential helper may take. It talks to another program or asks a cloud.
pub const CREDENTIAL_HELPER_MS_MAX: u64 = 10_000;

/// Threads that read credential files and start helpers at the same time, of those that a process
/// has for what blocks. A disk that hangs keeps them for ever: names of hosts need some, too.
pub const CREDENTIAL_THREADS_MAX: usize = 2;

/// How often the credentials are looked at while an I/O waits for one that works.
pub const CREDENTIAL_LOOK_MS: u64 = 500;

/// The longest pause before a registry is asked again with credentials that it refused, by one for
/// all who wait: it may have been told to allow them meanwhile, or a credential service may have
/// others, which nothing else shows.
pub const UNAUTHORIZED_PAUSE_MS_MAX: u64 = 64_000;

/// How long a mirror that failed is left alone at first. Meanwhile the registry itself is asked.
pub const MIRROR_REST_MS: u64 = 30_000;

/// How long a mirror is left alone that cannot be reached again and again: each time twice as long,
/// because each time one read waits for it; one that is back is noticed after ten minutes.
pub const MIRROR_REST_MS_MAX: u64 = 600_000;

/// How long the outcome of the one request that tries a mirror again is waited for: as long as its
/// head and some of its body may take.
pub const MIRROR_TRIAL_MS: u64 = 15_000;

/// How long the head of a mirror's answer may take. There is another way to the same bytes, so less
/// than that of a registry; a peer that has to fetch the blob itself begins to pass it on in less.
pub const MIRROR_HEAD_MS_MAX: u64 = 4000;

/// How long the addresses of a host are used without asking again.
pub const ADDRESS_MS_MAX: u64 = 30_000;

/// Bytes of a layer that a thread reads, compresses and writes at a time while layers are made: it
/// fits the second-level cache with what becomes of it, and is a multiple of every block size. The
/// bytes of a layer depend on it: a change is a change of `make::CONSISTENCY`.
pub const MAKE_PIECE_BYTES: usize = 256 * 1024;

/// Threads that make one layer: more than any disk can feed.
pub const MAKE_THREADS_MAX: usize = 64;

/// Compressed pieces for each thread that may wait for their turn to be written.
pub const MAKE_WAITING_PER_THREAD: usize = 4;

/// Bytes of a jump table that are held in memory while blocks are written; more goes to a file
/// without a name.
pub const MAKE_TABLE_BYTES: usize = 1 << 20;

/// Differing extents that `diff` tells of: what a terminal or a program can still use.
pub const DIFF_EXTENTS_MAX: usize = 10_000_000;
