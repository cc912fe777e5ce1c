//! Handing an open image to another process: what was parsed, and the open files.
//!
//! A device outlives its server: whoever takes over asks [`Image::unpack`] for the image that
//! [`Image::pack`] put into a [`Parcel`], and reads on. Nothing is opened by name (config and
//! layers may have been deleted), no layer is read, and what stood in memory before stands there
//! again: `format::parcel` tells the bytes. They travel in sealed memory, so that nobody, the
//! writer included, changes them between the check and the use; all the same they are checked as
//! if an enemy had sealed them.
//!
//! The descriptors are duplicates, one per layer, lowest first, closed at `exec`. A parcel of 255
//! layers has 256 of them, and a message over a socket takes 253: its sender must split it.

use super::payload::{Payload, Wrapping};
use super::{Image, Parts};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::parcel::{self, LayerFacts, PackedLayer, ParcelLayer};
use crate::map::FlatMap;
use crate::source::{FileIdentity, MappedFile, Source};
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

/// An image on its way into another process.
#[derive(Debug)]
pub struct Parcel {
    /// What was parsed, in sealed memory.
    pub map: OwnedFd,
    /// The file of each layer, lowest first; of a writable pair the data file.
    pub layers: Vec<OwnedFd>,
}

impl Parcel {
    /// Memory that holds what `write` writes and can never change again.
    ///
    /// # Errors
    /// Those of `write`, or when the kernel refuses the memory.
    pub fn seal(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<OwnedFd> {
        let failed = |error: &io::Error| Error::io("seal a parcel", error);
        let mut file = File::from(new_memory().map_err(|errno| failed(&errno.into()))?);
        write(&mut file).map_err(|error| failed(&error))?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals())).map_err(|errno| failed(&errno.into()))?;
        Ok(file.into())
    }
}

/// Nothing can change any more, and that cannot either.
fn seals() -> SealFlag {
    SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE
}

/// An empty memory file that cannot be executed. Kernels before 6.3 do not know that wish; newer
/// ones may be set to refuse memory without it.
fn new_memory() -> nix::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let not_executable = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    match memfd_create(c"obd-ublk-parcel", flags | not_executable) {
        Err(Errno::EINVAL) => memfd_create(c"obd-ublk-parcel", flags),
        other => other,
    }
}

impl Image {
    /// Puts the image into a parcel. Takes as much memory as its jump tables, outside of this
    /// process's own.
    ///
    /// # Errors
    /// `Unsupported` for layers that are no files; `Io` when the kernel refuses memory or
    /// descriptors.
    pub fn pack(&self) -> Result<Parcel> {
        let payloads = &self.parts.payloads;
        let (mut packed, mut layers) = (Vec::new(), Vec::new());
        for (number, payload) in payloads.iter().enumerate() {
            let told = || format!("pack layer {number}");
            let (layer, fd) = pack_layer(payload).context(told)?;
            packed.push(layer);
            layers.push(fd);
        }
        let map = self.parts.map.to_stored();
        let map = Parcel::seal(|out| parcel::encode(&packed, &map, out))?;
        Ok(Parcel { map, layers })
    }

    /// The image that [`Image::pack`] put into a parcel, perhaps in a process that is dead now.
    /// Reads no layer and opens nothing.
    ///
    /// A file that has become shorter since is no error: what is left of it is served.
    ///
    /// # Errors
    /// `Unsupported` for the parcel of another version; `InvalidFormat` for what is no parcel or
    /// not sealed, or layers that are no readable files; `Integrity` or `Corrupt` for a parcel
    /// that was damaged or belongs to other files. Whoever gets one can still open the config.
    pub fn unpack(parcel: Parcel) -> Result<Self> {
        let bytes = read_sealed(parcel.map)?;
        let contents = parcel::decode(&bytes)?;
        if contents.layers.len() != parcel.layers.len() {
            let found = format!("{} files", parcel.layers.len());
            let expected = format!("{}, one for each layer", contents.layers.len());
            return Err(Error::corrupt("parcel: layers", 12, found, expected));
        }
        let sectors_of = |layer: &ParcelLayer| payload_bytes(layer).div_ceil(SECTOR_SIZE);
        let layer_sectors: Vec<u64> = contents.layers.iter().map(sectors_of).collect();
        let map = FlatMap::from_stored(contents.map, &layer_sectors)?;
        let mut payloads = Vec::with_capacity(contents.layers.len());
        for (number, (layer, fd)) in contents.layers.into_iter().zip(parcel.layers).enumerate() {
            payloads.push(unpack_layer(layer, fd).context(|| format!("unpack layer {number}"))?);
        }
        Ok(Self { parts: Arc::new(Parts::new(payloads.into_boxed_slice(), map)) })
    }
}

fn pack_layer(payload: &Payload) -> Result<(PackedLayer<'_>, OwnedFd)> {
    let Source::Mapped(mapped) = payload.source() else {
        let message = format!("{:?}: only a file can be handed on", payload.source());
        return Err(Error::new(ErrorKind::Unsupported, message));
    };
    let failed =
        |error: &io::Error| Error::io(format!("hand on {}", mapped.path().display()), error);
    let identity = FileIdentity::of(mapped.file()).map_err(|error| failed(&error))?;
    let fd = mapped.file().as_fd().try_clone_to_owned().map_err(|error| failed(&error))?;
    let wrapping = payload.wrapping();
    let facts = LayerFacts {
        path: mapped.path().as_os_str().as_bytes().to_vec(),
        file_bytes: mapped.bytes(),
        device_number: identity.device_number,
        inode: identity.inode,
        payload_offset_bytes: wrapping.offset_bytes,
        payload_bytes: wrapping.stored_bytes,
        tar: wrapping.tar,
    };
    let zfile = payload.zfile().map(|part| (&part.header, &part.jump_table));
    Ok((PackedLayer { facts, zfile }, fd))
}

fn unpack_layer(layer: ParcelLayer, fd: OwnedFd) -> Result<Payload> {
    let ParcelLayer { facts, zfile } = layer;
    let path = PathBuf::from(OsString::from_vec(facts.path));
    let identity = FileIdentity { device_number: facts.device_number, inode: facts.inode };
    let mapped = MappedFile::adopt(path, fd, identity, facts.file_bytes)?;
    let wrapping = Wrapping {
        offset_bytes: facts.payload_offset_bytes,
        stored_bytes: facts.payload_bytes,
        tar: facts.tar,
    };
    Ok(Payload::restored(Source::Mapped(Arc::new(mapped)), wrapping, zfile))
}

/// Length of the LSMT file.
fn payload_bytes(layer: &ParcelLayer) -> u64 {
    layer.zfile.as_ref().map_or(layer.facts.payload_bytes, |(header, _)| header.original_bytes)
}

/// The bytes in sealed memory; its seals and its front are looked at before memory is taken.
fn read_sealed(memory: OwnedFd) -> Result<Vec<u8>> {
    let failed = |error: &io::Error| Error::io("read a parcel", error);
    // Only memory has seals: on any other file the question itself fails.
    let found = match fcntl(&memory, FcntlArg::F_GET_SEALS) {
        Ok(found) => SealFlag::from_bits_retain(found),
        Err(Errno::EINVAL) => SealFlag::empty(),
        Err(errno) => return Err(failed(&errno.into())),
    };
    if !found.contains(seals()) {
        let message = format!("parcel: found seals {found:?}, expected {:?}", seals());
        return Err(Error::new(ErrorKind::InvalidFormat, message));
    }
    let file = File::from(memory);
    let bytes = file.metadata().map_err(|error| failed(&error))?.len();
    let mut front = [0; parcel::HEADER_BYTES];
    if bytes < to_u64(front.len()) {
        let expected = format!("at least {}", front.len());
        return Err(Error::field(ErrorKind::InvalidFormat, "parcel: length", 0, bytes, expected));
    }
    file.read_exact_at(&mut front, 0).map_err(|error| failed(&error))?;
    parcel::check_front(&front, bytes)?;
    let mut whole = vec![0; to_usize(bytes).unwrap_or(0)];
    file.read_exact_at(&mut whole, 0).map_err(|error| failed(&error))?;
    Ok(whole)
}
