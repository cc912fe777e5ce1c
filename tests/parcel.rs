//! A parcel carries an image whole, or is refused: every golden disk, and every kind of damage.

// The helpers of a test may panic as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::golden::{Case, Golden, Materialised, hex};
use obd_ublk::disk::{Disk, Worker};
use obd_ublk::error::{Error, ErrorKind};
use obd_ublk::image::{Image, Layer, Parcel, Stack};
use obd_ublk::source::Source;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Kinds that flatten to a virtual disk.
fn is_disk(case: &Case) -> bool {
    let other = ["zfile(plain)", "corrupt", "turboOCI", "prefetch-trace"];
    !other.contains(&case.kind.as_str())
}

fn open(case: &Case, files: &Materialised) -> Image {
    let config = files.config(case);
    Image::open_config(&config, None).unwrap_or_else(|e| panic!("{}: {e:#}", case.name))
}

fn flattened_sha256(image: &Image) -> String {
    let mut hash = Sha256::new();
    image.export_to_stream(&mut hash, &AtomicU64::new(0)).unwrap();
    hex(&hash.finalize())
}

fn bytes_of(memory: &OwnedFd) -> Vec<u8> {
    let file = File::from(memory.try_clone().unwrap());
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn sealed(bytes: &[u8]) -> OwnedFd {
    Parcel::seal(|out| out.write_all(bytes)).unwrap()
}

/// A parcel of the same layers with other bytes.
fn with_bytes(parcel: &Parcel, bytes: &[u8]) -> Parcel {
    let layers = parcel.layers.iter().map(|fd| fd.try_clone().unwrap()).collect();
    Parcel { map: sealed(bytes), layers }
}

/// Makes the checksum fit.
fn repair(bytes: &mut [u8]) {
    let body = bytes.len() - 4;
    let crc = crc32c::crc32c(&bytes[..body]).to_le_bytes();
    bytes[body..].copy_from_slice(&crc);
}

fn refused(parcel: Parcel) -> Error {
    Image::unpack(parcel).expect_err("it was taken")
}

#[test]
fn every_golden_disk_survives_the_loss_of_its_config_and_its_paths() {
    let golden = Golden::load();
    let mut checked = 0;
    for case in golden.cases().iter().filter(|case| is_disk(case)) {
        let files = golden.materialise(case);
        let image = open(case, &files);
        let (geometry, map_bytes) = (image.geometry(), image.map().memory_bytes());
        let parcel = image.pack().unwrap();
        drop(image);
        std::fs::remove_dir_all(files.dir()).unwrap();
        let image = Image::unpack(parcel).unwrap_or_else(|e| panic!("{}: {e:#}", case.name));
        assert_eq!(image.geometry(), geometry, "{}", case.name);
        assert_eq!(image.map().memory_bytes(), map_bytes, "{}", case.name);
        assert_eq!(Some(flattened_sha256(&image)), case.expected_sha256, "{}", case.name);
        checked += 1;
    }
    assert_eq!(checked, 48, "every case of a disk kind");
}

#[test]
fn a_successor_packs_the_same_parcel_for_its_own_successor() {
    let golden = Golden::load();
    for name in ["stack32", "stack3-rw", "zfilelib-zstd-4k-crc1-ow0", "tar-raw"] {
        let case = golden.case(name);
        let files = golden.materialise(case);
        let first = open(case, &files).pack().unwrap();
        let bytes = bytes_of(&first.map);
        let second = Image::unpack(first).unwrap().pack().unwrap();
        assert!(bytes_of(&second.map) == bytes, "{name}");
    }
}

#[test]
fn descriptors_are_closed_at_exec_and_one_per_layer() {
    let golden = Golden::load();
    let case = golden.case("stack3-rw");
    let files = golden.materialise(case);
    let parcel = open(case, &files).pack().unwrap();
    assert_eq!(parcel.layers.len(), 4, "three lowers and the data file");
    for fd in parcel.layers.iter().chain([&parcel.map]) {
        let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, nix::libc::FD_CLOEXEC);
    }
}

#[test]
fn layers_in_memory_are_not_packed() {
    let golden = Golden::load();
    let path = golden.root().join(&golden.case("lsmt-seal-random").files[0]);
    let source = Source::Memory(Arc::from(std::fs::read(path).unwrap()));
    let layer = Layer::open_sealed("memory".to_owned(), source).unwrap();
    let image = Stack::from_layers(vec![layer]).unwrap().into_image().unwrap();
    let error = image.pack().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(format!("{error:#}").contains("pack layer 0: Memory("), "{error:#}");
}

#[test]
fn every_flipped_bit_every_cut_and_every_growth_is_refused() {
    let golden = Golden::load();
    for name in ["lsmt-seal-discardonly", "zfile-zstd-64k-incompressible"] {
        let case = golden.case(name);
        let files = golden.materialise(case);
        let parcel = open(case, &files).pack().unwrap();
        let bytes = bytes_of(&parcel.map);
        assert!(bytes.len() < 4096, "{name} is a small one: {}", bytes.len());
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << bit;
                refused(with_bytes(&parcel, &bad));
            }
            refused(with_bytes(&parcel, &bytes[..at]));
        }
        for more in [1, 4, 4096] {
            let mut longer = bytes.clone();
            longer.resize(bytes.len() + more, 0);
            refused(with_bytes(&parcel, &longer));
            longer[16..24].copy_from_slice(&(bytes.len() + more).to_le_bytes());
            repair(&mut longer);
            refused(with_bytes(&parcel, &longer));
        }
        assert!(Image::unpack(with_bytes(&parcel, &bytes)).is_ok());
    }
}

#[test]
fn a_flipped_bit_under_a_checksum_that_fits_never_panics() {
    let golden = Golden::load();
    for name in ["lsmt-seal-discardonly", "zfile-zstd-64k-incompressible", "stack1-rw-discard"] {
        let case = golden.case(name);
        let files = golden.materialise(case);
        let parcel = open(case, &files).pack().unwrap();
        let bytes = bytes_of(&parcel.map);
        let mut page = [0; 4096];
        for at in 0..bytes.len() - 4 {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            repair(&mut bad);
            let Ok(image) = Image::unpack(with_bytes(&parcel, &bad)) else { continue };
            let mut worker = image.worker().unwrap();
            for extent in image.map().extents(0, u64::MAX).take(50) {
                let _ = worker.read(extent.start_sector, &mut page[..512]);
            }
        }
    }
}

#[test]
fn only_sealed_memory_of_this_version_is_believed() {
    let golden = Golden::load();
    let case = golden.case("lsmt-seal-random");
    let files = golden.materialise(case);
    let parcel = open(case, &files).pack().unwrap();
    let bytes = bytes_of(&parcel.map);
    let layers = || parcel.layers.iter().map(|fd| fd.try_clone().unwrap()).collect();

    let on_disk = tempfile::tempfile().unwrap();
    on_disk.write_all_at(&bytes, 0).unwrap();
    let error = refused(Parcel { map: on_disk.into(), layers: layers() });
    assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{error:#}");

    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let three = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
    for seals in [SealFlag::empty(), SealFlag::F_SEAL_WRITE, three] {
        let memory = memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let file = File::from(memory.try_clone().unwrap());
        file.write_all_at(&bytes, 0).unwrap();
        fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        let error = refused(Parcel { map: memory, layers: layers() });
        assert!(error.to_string().contains("found seals"), "{seals:?}: {error:#}");
    }
    let mut newer = bytes.clone();
    newer[8] += 1;
    repair(&mut newer);
    assert_eq!(refused(with_bytes(&parcel, &newer)).kind(), ErrorKind::Unsupported);
}

#[test]
fn layers_that_are_not_the_packed_files_are_refused() {
    let golden = Golden::load();
    let case = golden.case("stack3");
    let files = golden.materialise(case);
    let parcel = open(case, &files).pack().unwrap();
    let bytes = bytes_of(&parcel.map);
    let fds =
        || -> Vec<OwnedFd> { parcel.layers.iter().map(|fd| fd.try_clone().unwrap()).collect() };
    let refused = |layers| refused(Parcel { map: sealed(&bytes), layers });
    let mut swapped = fds();
    swapped.swap(0, 2);
    let error = refused(swapped);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:#}");
    assert!(format!("{error:#}").contains("unpack layer 0: take over"), "{error:#}");
    let mut missing = fds();
    missing.pop();
    assert!(refused(missing).to_string().contains("found 2 files, expected 3"));

    let path = files.path(&case.lowers[1]);
    let copy = files.path("copy");
    std::fs::copy(&path, &copy).unwrap();
    let write_only = File::options().write(true).open(&path).unwrap();
    let by_path = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
    let by_path = nix::fcntl::open(&path, by_path, nix::sys::stat::Mode::empty()).unwrap();
    let (pipe, _other_end) = nix::unistd::pipe().unwrap();
    for (what, fd, kind) in [
        ("a copy", File::open(&copy).unwrap().into(), ErrorKind::Corrupt),
        ("write-only", write_only.into(), ErrorKind::InvalidFormat),
        ("by path only", by_path, ErrorKind::InvalidFormat),
        ("a pipe", pipe, ErrorKind::InvalidFormat),
        ("a folder", File::open(files.dir()).unwrap().into(), ErrorKind::InvalidFormat),
        ("a device", File::open("/dev/zero").unwrap().into(), ErrorKind::InvalidFormat),
    ] {
        let mut layers = fds();
        layers[1] = fd;
        let error = refused(layers);
        assert_eq!(error.kind(), kind, "{what}: {error:#}");
    }
}

#[test]
fn a_layer_that_became_shorter_fails_only_the_reads_it_lost() {
    let golden = Golden::load();
    for name in ["lsmt-seal-random", "zfile-lz4-4k-random"] {
        let case = golden.case(name);
        let files = golden.materialise(case);
        let image = open(case, &files);
        let mut before = image.worker().unwrap();
        let sectors = image.geometry().sectors;
        let path = files.path(&case.files[0]);
        let len = std::fs::metadata(&path).unwrap().len();
        let whole: Vec<Vec<u8>> = (0..sectors)
            .map(|sector| {
                let mut bytes = vec![0; 512];
                before.read(sector, &mut bytes).unwrap();
                bytes
            })
            .collect();
        let parcel = image.pack().unwrap();
        // Not on a page's boundary: what is missing of that page would read as zeros.
        File::options().write(true).open(&path).unwrap().set_len(len / 2 + 100).unwrap();
        let after = Image::unpack(parcel).unwrap();
        assert_eq!(after.geometry().sectors, sectors);
        // The one that is taken over from is no measure before it has met the loss itself.
        let (mut old, mut new) = (image.worker().unwrap(), after.worker().unwrap());
        let (mut lost, mut bytes) = (0, vec![0; 512]);
        for (sector, expected) in (0..).zip(&whole) {
            let by_old = old.read(sector, &mut bytes).map(|()| bytes.clone());
            match new.read(sector, &mut bytes) {
                Ok(()) => {
                    assert_eq!(bytes, *expected, "{name}: sector {sector}");
                    assert_eq!(by_old.unwrap(), *expected, "{name}: sector {sector}");
                }
                Err(error) => {
                    lost += 1;
                    assert_eq!(error.errno(), nix::libc::EIO, "{error:#}");
                    assert!(format!("{error:#}").contains(&format!("it had {len} bytes")));
                    assert!(by_old.is_err(), "{name}: sector {sector}");
                }
            }
        }
        assert!(lost > 0 && lost < sectors, "{name}: {lost} of {sectors} sectors");
    }
}
