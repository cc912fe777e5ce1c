//! Row 9, with somebody else than the registry to blame: a mirror or a peer that serves wrong bytes
//! as if they were right. Whatever of them was kept, the layer becomes readable, from the registry.

use crate::lab::{LATE, Lab, content};
use crate::mock::{Fault, Mock, Part};
use obd_ublk::cache::{BlobDigest, Cache, CachedBlob, Promotion, Settings};
use obd_ublk::error::ErrorKind;
use obd_ublk::format::lsmt::{SegmentMapping, write_sealed};
use obd_ublk::format::zfile::{self, Algorithm, WriteOptions};
use obd_ublk::image::{Payload, Scratch};
use obd_ublk::registry::{Mirror, Options};
use obd_ublk::source::{Fetch, RemoteBlob, Source};
use obd_ublk::waiting;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const EXTENT_BYTES: u64 = 4096;

const ENOUGH: Duration = Duration::from_secs(30);

/// A registry with one blob, and a mirror of it that lies.
struct Village {
    lab: Lab,
    liar: Mock,
}

impl Village {
    /// The mirror's bytes are those of the registry but where `lie` changes them.
    fn new(blob: Vec<u8>, lie: impl FnOnce(&mut [u8])) -> Self {
        let mut wrong = blob.clone();
        let lab = Lab::of(Mock::start(), blob);
        lie(&mut wrong);
        let liar = Mock::start();
        liar.state().content.blobs.insert(lab.digest.clone(), wrong.into());
        Self { lab, liar }
    }

    /// One process's view of the blob, through the cache in `folder`.
    fn open(&self, folder: &Path) -> CachedBlob {
        let mirror = Mirror { of_host: self.lab.mock.host(), url: self.liar.url() };
        self.open_with(folder, Options { mirrors: vec![mirror], ..Options::default() })
    }

    fn open_with(&self, folder: &Path, options: Options) -> CachedBlob {
        self.open_within(folder, ENOUGH, options)
    }

    fn open_within(&self, folder: &Path, deadline: Duration, options: Options) -> CachedBlob {
        let cache = Cache::open(Settings {
            folder: folder.to_owned(),
            extent_bytes: EXTENT_BYTES,
            threads: 0,
            deadline,
            ..Settings::default()
        });
        let blob = self.lab.blob(&self.lab.registry(options));
        let digest = BlobDigest::parse(&self.lab.digest).unwrap();
        cache.unwrap().blob(&digest, Arc::new(blob)).unwrap()
    }

    fn asked(&self) -> (usize, usize) {
        (self.liar.count(Part::Blob), self.lab.mock.count(Part::Blob))
    }

    fn clear(&self) {
        self.liar.clear();
        self.lab.mock.clear();
    }
}

/// An lz4 layer of so many bytes, with a checksum for each of its blocks; the LSMT file in it.
fn zfile_of(bytes: usize) -> (Vec<u8>, Vec<u8>) {
    let disk = content(bytes, 3);
    let sectors = u64::try_from(bytes).unwrap() / 512;
    let segments: Vec<_> = (0..sectors)
        .step_by(16_000)
        .map(|start_sector| SegmentMapping {
            start_sector,
            sectors: (sectors - start_sector).min(16_000),
            mapped_sector: start_sector + 8,
            zeroed: false,
            tag: 0,
        })
        .collect();
    let lsmt = write_sealed(&segments, &disk, sectors * 512);
    let options =
        WriteOptions { algorithm: Algorithm::Lz4, block_bytes: 4096, ..WriteOptions::default() };
    (zfile::write(&lsmt, &options).unwrap(), lsmt)
}

/// Reads all of a compressed layer as a device would, and compares it.
fn check_layer(payload: &Payload, expected: &[u8]) {
    let mut scratch = Scratch::new(std::iter::once(payload)).unwrap();
    let mut piece = vec![0; 64 << 10];
    for (number, expected) in (0..).zip(expected.chunks(piece.len())) {
        let found = piece.get_mut(..expected.len()).unwrap();
        scratch.read(payload, 0, number * (64 << 10), found).unwrap();
        assert!(found == expected, "piece {number}");
    }
}

/// A mirror that had filled the cache with thousands of wrong extents once made the layer
/// unreadable: each was fetched again from that mirror, and no more than a thousand a minute.
#[test]
fn row_9_a_layer_that_a_lying_mirror_filled_is_read_right_from_the_registry() {
    let (blob, lsmt) = zfile_of(12 << 20);
    let bytes = u64::try_from(blob.len()).unwrap();
    let extents = bytes / EXTENT_BYTES;
    assert!(extents > 2500, "{extents}");
    let data = 512 << 10..blob.len() - (512 << 10);
    let wrong_extents = u64::try_from(data.len()).unwrap() / EXTENT_BYTES;
    // Both ends are right, so that the layer can be opened.
    let village = Village::new(blob, |wrong| {
        for at in data.step_by(1000) {
            wrong[at] ^= 0x20;
        }
    });
    let folder = tempfile::tempdir().unwrap();
    // Another process has fetched all of it but the end, and looked at nothing.
    village.open(folder.path()).fill(0..bytes - EXTENT_BYTES).unwrap();
    assert_eq!(village.asked().1, 0, "the mirror gave everything");
    village.clear();

    let cached = Arc::new(village.open(folder.path()));
    let payload = Payload::open(Source::Remote(Arc::clone(&cached) as _)).unwrap();
    check_layer(&payload, &lsmt);
    let (liar, registry) = village.asked();
    assert!(liar <= 1, "{liar}: the end of the blob, before anything was noticed");
    let stats = cached.stats();
    assert!(stats.discarded >= wrong_extents, "{} {wrong_extents}", stats.discarded);
    assert!(stats.discarded <= extents, "{}: each once", stats.discarded);
    let registry = u64::try_from(registry).unwrap();
    assert!(registry <= stats.discarded, "{registry}: a request for each");
    village.clear();
    check_layer(&payload, &lsmt);
    assert_eq!(village.asked(), (0, 0), "and then they are right");
    assert_eq!(cached.promote(Instant::now() + ENOUGH).unwrap(), Promotion::Done);
}

#[test]
fn row_9_a_mirror_that_lies_about_everything_costs_a_request_and_each_extent_comes_once() {
    let (blob, lsmt) = zfile_of(4 << 20);
    let bytes = u64::try_from(blob.len()).unwrap();
    let village = Village::new(blob, |wrong| wrong[100_000..].iter_mut().for_each(|b| *b = !*b));
    let folder = tempfile::tempdir().unwrap();
    let cached = Arc::new(village.open(folder.path()));
    // The end is what the structure is read from; who opens a layer throws it away when wrong.
    cached.fill(bytes - 5 * EXTENT_BYTES..bytes).unwrap();
    assert!(cached.discard(bytes - 5 * EXTENT_BYTES, 5 * EXTENT_BYTES));
    let payload = Payload::open(Source::Remote(Arc::clone(&cached) as _)).unwrap();
    check_layer(&payload, &lsmt);
    let (liar, registry) = village.asked();
    assert_eq!(liar, 1);
    let extents = bytes.div_ceil(EXTENT_BYTES);
    assert!(
        u64::try_from(registry).unwrap() <= extents,
        "{registry} requests of {extents} extents"
    );
}

/// Nothing tells that bytes of a raw layer are wrong but the digest of all of them.
#[test]
fn row_9_a_raw_blob_that_a_mirror_made_wrong_is_fetched_anew_past_it_by_all_processes() {
    let village = Village::new(content(300_000, 5), |wrong| wrong[123_456] ^= 1);
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (village.open(folder.path()), village.open(folder.path()));
    one.fill(0..300_000).unwrap();
    assert_eq!(one.promote(Instant::now() + ENOUGH).unwrap(), Promotion::Condemned);
    assert_eq!(village.asked().1, 0, "the mirror gave everything");
    village.clear();
    // The other process has not seen what was wrong, and nor has the next one.
    let next = village.open(folder.path());
    for (reader, range) in [(&other, 0..100_000), (&next, 100_000..200_000), (&one, 0..300_000)] {
        reader.fill(range.clone()).unwrap();
        let mut found = vec![0; 1000];
        reader.read(range.start, &mut found).unwrap();
        let at = usize::try_from(range.start).unwrap();
        assert!(found == village.lab.content[at..at + 1000], "{range:?}");
    }
    assert_eq!(village.asked().0, 0, "it is asked no more");
    assert!(village.asked().1 <= 3, "{:?}", village.asked());
    assert_eq!(one.promote(Instant::now() + ENOUGH).unwrap(), Promotion::Done);
}

/// Where nothing is kept, each read is a fetch: the second one goes past the mirror.
#[test]
fn row_9_without_a_cache_the_next_fetch_goes_past_the_liar_too() {
    let (blob, lsmt) = zfile_of(1 << 20);
    let end = blob.len() - (256 << 10);
    let village =
        Village::new(blob, |wrong| wrong[200_000..end].iter_mut().for_each(|byte| *byte = !*byte));
    let file = tempfile::NamedTempFile::new().unwrap();
    let settings = Settings { folder: file.path().join("no"), threads: 0, ..Settings::default() };
    let mirror = Mirror { of_host: village.lab.mock.host(), url: village.liar.url() };
    let options = Options { mirrors: vec![mirror], ..Options::default() };
    let blob = village.lab.blob(&village.lab.registry(options));
    let digest = BlobDigest::parse(&village.lab.digest).unwrap();
    let cached = Cache::open_or_bypass(settings).blob(&digest, Arc::new(blob)).unwrap();
    let payload = Payload::open(Source::Remote(Arc::new(cached))).unwrap();
    check_layer(&payload, &lsmt);
    let (_, registry) = village.asked();
    village.liar.clear();
    check_layer(&payload, &lsmt);
    assert!(registry > 0 && village.liar.count(Part::Blob) == 0);
}

/// Once each read of what is damaged waited for its whole deadline.
#[test]
fn row_9_a_damaged_plain_file_is_an_error_at_once_while_nobody_can_tell_what_it_should_hold() {
    let (blob, _) = zfile_of(1 << 20);
    let bytes = u64::try_from(blob.len()).unwrap();
    let village = Village::new(blob, |_| ());
    let folder = tempfile::tempdir().unwrap();
    let cached = village.open(folder.path());
    cached.fill(0..bytes).unwrap();
    assert_eq!(cached.promote(Instant::now() + ENOUGH).unwrap(), Promotion::Done);
    let whole = folder.path().join("whole");
    let whole = std::fs::read_dir(whole).unwrap().next().unwrap().unwrap().path();
    let mut held = std::fs::read(&whole).unwrap();
    held[300_000] ^= 1;
    std::fs::set_permissions(&whole, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(&whole, held).unwrap();
    let cached = village.open(folder.path());
    village.clear();
    village.lab.mock.fail(Part::Blob, u64::MAX, Fault::Delay(60_000));
    let begun = Instant::now();
    assert!(!cached.discard(299_000, 4000));
    let took = begun.elapsed();
    assert!(took < ENOUGH / 2, "{took:?}");
    for at in [299_000, 310_000, 320_000] {
        assert!(!cached.discard(at, 4000));
    }
    assert_eq!(village.asked(), (0, 1), "one question, to the registry, that nobody answered");
    assert!(begun.elapsed() < ENOUGH / 2, "and no further wait");
    assert!(whole.exists());
}

/// A request that takes several fetches once had the deadline for each of them.
#[test]
fn all_reads_of_one_request_have_one_deadline() {
    let village = Village::new(content(300_000, 6), |_| ());
    let folder = tempfile::tempdir().unwrap();
    let deadline = Duration::from_millis(1500);
    let cached = village.open_within(folder.path(), deadline, Options::default());
    village.lab.mock.fail(Part::Blob, u64::MAX, Fault::Delay(600));
    let mut found = vec![0; 100];
    {
        let _request = waiting::Request::begin();
        let begun = Instant::now();
        let mut read = |at| cached.read(at, &mut found).map_err(|error| error.kind());
        let reads = [read(0), read(100_000), read(200_000), read(250_000), read(50)];
        let late = Err(ErrorKind::Timeout);
        assert_eq!(reads, [Ok(()), Ok(()), late, late, Ok(())], "what is here is read");
        assert!(begun.elapsed() < deadline + LATE, "{:?}", begun.elapsed());
    }
    assert!(cached.read(200_000, &mut found).is_ok(), "the next one has a time of its own");
}

#[test]
fn from_its_origin_a_blob_is_fetched_past_mirrors_and_peers_alone() {
    let lab = Lab::new();
    let (peer, mirror) = (Lab::new(), Lab::new());
    let options = Options {
        p2p_prefix: Some(peer.mock.url()),
        mirrors: vec![Mirror { of_host: lab.mock.host(), url: mirror.mock.url() }],
        ..Options::default()
    };
    let registry = lab.registry(options);
    let blob = lab.blob(&registry);
    let mut found = vec![0; 1000];
    blob.fetch_from_origin(5, &mut found, Instant::now() + ENOUGH).unwrap();
    assert!(found == lab.content[5..1005]);
    assert_eq!((peer.mock.count(Part::Blob), mirror.mock.count(Part::Blob)), (0, 0));
    // Nor when the registry fails: they gave wrong bytes.
    lab.mock.fail(Part::Blob, u64::MAX, Fault::status(404));
    let error = blob.fetch_from_origin(5, &mut found, Instant::now() + ENOUGH).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!((peer.mock.count(Part::Blob), mirror.mock.count(Part::Blob)), (0, 0));
    assert!(lab.read(&blob, 5..1005, ENOUGH).is_ok(), "others may ask them");
}
