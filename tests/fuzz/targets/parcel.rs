//! Strategy: a good parcel of three layers (zfile, raw, zfile in a tar wrapper) with the input's
//! edits; checksum repaired nine times of ten. Unpacks and reads it. Invariant: two readers of what
//! was unpacked agree, and a successor of it packs and unpacks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use obd_ublk::disk::{Disk, Worker};
use obd_ublk::image::{Image, Layer, Parcel, Stack};
use obd_ublk::source::Source;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

const LAYERS: [&str; 3] = [
    "zfile-zstd-64k-incompressible/overlaybd.commit",
    "lsmt-seal-random/layer.lsmt",
    "zfilelib-lz4-16k-crc1-ow0-tar/overlaybd.commit",
];

/// Extents read per image.
const EXTENTS_READ_MAX: usize = 64;

struct Base {
    bytes: Vec<u8>,
    layers: Vec<OwnedFd>,
}

fn bytes_of(memory: &OwnedFd) -> Vec<u8> {
    let file = File::from(memory.try_clone().expect("a descriptor"));
    let mut bytes = vec![0; file.metadata().expect("a length").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("its bytes");
    bytes
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/golden");
        let open = |name: &&str| {
            let source = Source::open(&golden.join(name)).expect("the fixture");
            Layer::open_sealed((*name).to_owned(), source).expect("a good layer")
        };
        let layers = LAYERS.iter().map(open).collect();
        let image = Stack::from_layers(layers).and_then(Stack::into_image).expect("a good stack");
        let parcel = image.pack().expect("files are packed");
        Base { bytes: bytes_of(&parcel.map), layers: parcel.layers }
    })
}

/// Applies edits of 8 bytes each: place u32, what u8, value of 3 bytes.
fn edit(bytes: &mut Vec<u8>, edits: &[u8]) {
    for edit in edits.chunks_exact(8) {
        let at = u32::from_le_bytes([edit[0], edit[1], edit[2], edit[3]]) as usize;
        let at = at % bytes.len().max(1);
        let value = &edit[5..8];
        match edit[4] % 8 {
            0 => bytes.truncate(at),
            1 => drop(bytes.splice(at..at, value.iter().copied())),
            2 => drop(bytes.drain(at..(at + usize::from(value[0])).min(bytes.len()))),
            3 => bytes.iter_mut().skip(at).take(8).for_each(|byte| *byte = value[0]),
            _ => bytes.iter_mut().skip(at).zip(value).for_each(|(byte, new)| *byte = *new),
        }
    }
}

/// Makes length and checksum fit.
fn repair(bytes: &mut [u8]) {
    if bytes.len() < 36 {
        return;
    }
    let (total, body) = (bytes.len() as u64, bytes.len() - 4);
    bytes[16..24].copy_from_slice(&total.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..body]).to_le_bytes();
    bytes[body..].copy_from_slice(&crc);
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, edits)) = data.split_first() else { return };
    let base = base();
    let mut bytes = base.bytes.clone();
    edit(&mut bytes, edits);
    if choice % 10 != 0 {
        repair(&mut bytes);
    }
    let layers = || base.layers.iter().map(|fd| fd.try_clone().expect("a descriptor")).collect();
    let sealed = Parcel::seal(|out| out.write_all(&bytes)).expect("memory");
    let Ok(image) = Image::unpack(Parcel { map: sealed, layers: layers() }) else { return };
    let again = image.pack().and_then(Image::unpack).expect("what was unpacked is good");
    let mut worker = image.worker().expect("memory");
    let mut other = again.worker().expect("memory");
    let (mut first, mut second) = (vec![0; 64 * 512], vec![1; 64 * 512]);
    for extent in image.map().extents(0, u64::MAX).take(EXTENTS_READ_MAX) {
        let len = extent.sectors.min(64) as usize * 512;
        let one = worker.read(extent.start_sector, &mut first[..len]);
        let two = other.read(extent.start_sector, &mut second[..len]);
        assert_eq!(one.is_ok(), two.is_ok());
        if one.is_ok() {
            assert!(first[..len] == second[..len]);
        }
    }
});
