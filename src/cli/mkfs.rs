//! A file system in a new upper: made by e2fsprogs in a file without a name, and copied without
//! its zeros while the pair has no names yet. Whatever ends the process leaves no pair that is
//! half one.
//!
//! The parameters are those of the reference's converter (no journal, no checksums of metadata, no
//! UUID, no time), so that the same size gives the same bytes with the same e2fsprogs.

use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{DATA_START_SECTOR, HEADER_BYTES, SegmentMapping, encode_index};
use crate::source::data_extents_of;
use crate::units::{SECTOR_SIZE, to_u64, to_usize, whole_sectors};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Bytes copied at a time, and looked at together for zeros.
const PIECE_BYTES: usize = 4096;

/// Where mke2fs is when the search path of a user does not lead there.
const SEARCH: &str = ":/usr/sbin:/sbin:/usr/local/sbin";

/// What the reference's converter asks its library for.
const FEATURES: &str = "none,ext_attr,resize_inode,dir_index,sparse_super2,filetype,extents,64bit,\
                        flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize";

const NIL: &str = "00000000-0000-0000-0000-000000000000";

/// The seed of directory hashes. Not zero as the converter's: mke2fs takes that for "choose one".
const HASH_SEED: &str = "00000000-0000-0000-0000-000000000001";

/// An ext4 of so many bytes, in a file without a name that lies beside `data`.
///
/// # Errors
/// `Unsupported` without mke2fs; what it says when it fails; what writing says.
pub(super) fn make_ext4(data: &Path, virtual_bytes: u64) -> Result<File> {
    let folder = match data.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let told = |error| Error::io("make a file for the file system", &error);
    let plain = tempfile::tempfile_in(folder).map_err(told)?;
    plain.set_len(virtual_bytes).map_err(told)?;
    run_mke2fs(plain.try_clone().map_err(told)?)?;
    Ok(plain)
}

/// Has mke2fs make a file system in `target`, which it gets as its standard input.
fn run_mke2fs(target: File) -> Result<()> {
    let mut search = std::env::var_os("PATH").unwrap_or_default();
    search.push(SEARCH);
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "5"])
        .args(["-O", FEATURES, "-U", NIL, "-E"])
        .arg(format!("hash_seed={HASH_SEED},root_owner=0:0,lazy_itable_init=1"))
        .arg("/proc/self/fd/0")
        .env("PATH", search)
        // The host's own wishes are not those of the layer; and time stands still.
        .env("MKE2FS_CONFIG", "/dev/null")
        .env("E2FSPROGS_FAKE_TIME", "1")
        .env("SOURCE_DATE_EPOCH", "1")
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .stdin(target)
        .stdout(Stdio::null())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let message = "mke2fs is not there: --mkfs needs e2fsprogs";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Err(error) => return Err(Error::io("run mke2fs", &error)),
    };
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(ErrorKind::Io, format!("mke2fs: {}: {}", output.status, said.trim())))
}

/// Hands over every block that is not zero, with its first byte.
fn each_block(plain: &File, mut take: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    let told = |error| Error::io("read the file system", &error);
    let bytes = plain.metadata().map_err(told)?.len();
    let mut block = vec![0; PIECE_BYTES];
    for extent in data_extents_of(plain, "the file system", 0..bytes)? {
        let mut here = extent.start;
        while here < extent.end {
            let len = (extent.end - here).min(to_u64(PIECE_BYTES));
            let part = block.get_mut(..to_usize(len).unwrap_or(0)).unwrap_or_default();
            plain.read_exact_at(part, here).map_err(told)?;
            if part.iter().any(|&byte| byte != 0) {
                take(here, part)?;
            }
            here += len;
        }
    }
    Ok(())
}

fn told(error: io::Error) -> Error {
    Error::io("write the file system", &error)
}

/// Copies the file system to the data file of a new pair in sparse form.
///
/// # Errors
/// What reading and writing say.
pub(super) fn copy_sparse(plain: &File, data: &File) -> Result<()> {
    each_block(plain, |at, block| {
        data.write_all_at(block, HEADER_BYTES.saturating_add(at)).map_err(told)
    })?;
    data.sync_all().map_err(told)
}

/// Copies the file system to the files of a new pair in append form: the data, and the entries that
/// name it, as the reference writes them.
///
/// # Errors
/// What reading and writing say.
pub(super) fn copy_append(plain: &File, data: &File, index: &File) -> Result<()> {
    let mut segments: Vec<SegmentMapping> = Vec::new();
    let mut next_sector = DATA_START_SECTOR;
    each_block(plain, |at, block| {
        let to_byte = next_sector.saturating_mul(SECTOR_SIZE);
        data.write_all_at(block, to_byte).map_err(told)?;
        let (start_sector, sectors) = (whole_sectors(at), whole_sectors(to_u64(block.len())));
        match segments.last_mut() {
            Some(last)
                if last.end_sector() == start_sector
                    && last.sectors + sectors <= SegmentMapping::SECTORS_MAX =>
            {
                last.sectors += sectors;
            }
            _ => segments.push(SegmentMapping {
                start_sector,
                sectors,
                mapped_sector: next_sector,
                zeroed: false,
                tag: 0,
            }),
        }
        next_sector += sectors;
        Ok(())
    })?;
    data.sync_all().map_err(told)?;
    let written = index.write_all_at(&encode_index(&segments), HEADER_BYTES);
    written.and_then(|()| index.sync_all()).map_err(told)
}
