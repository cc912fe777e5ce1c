//! The golden set: images made by the reference tools, with the sha256 of what must be read back.
//!
//! `tests/fixtures/golden/manifest.json` names every case; `tests/fixtures/README.md` tells how
//! the files are kept. A test takes a case, [`Golden::materialise`]s it into a temporary folder
//! and works there: the checked-in files are never opened for writing, and the files whose holes
//! carry meaning get their holes back.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Bytes of the LSMT header that a packed sparse file starts with.
pub(crate) const PACKED_HEADER_BYTES: u64 = 4096;

/// Listed by the manifest, not kept: the tar files that a TurboOCI layer points into. We refuse
/// that kind, and the refusal needs the config and the small metadata only.
pub(crate) const NOT_KEPT: [&str; 2] = ["turbooci-gz/layer.tar.gz", "turbooci-tar/layer.tar"];

/// The whole set.
#[derive(Debug)]
pub(crate) struct Golden {
    root: PathBuf,
    cases: Vec<Case>,
}

/// The two files of a writable top, relative to the set's folder.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Upper {
    pub(crate) data: String,
    pub(crate) index: String,
}

/// One case as the manifest tells it. Paths are relative to the set's folder.
#[derive(Debug, Deserialize)]
pub(crate) struct Case {
    pub(crate) name: String,
    /// `lsmt-sealed(close_seal)`, `zfile(lsmt)+tar`, `stack`, `corrupt`, `turboOCI`...
    pub(crate) kind: String,
    pub(crate) files: Vec<String>,
    /// Size of the virtual disk in bytes; absent for plain zfiles and corrupt cases.
    pub(crate) virtual_size: Option<u64>,
    /// Of the flattened virtual disk; absent where the reference must refuse.
    pub(crate) expected_sha256: Option<String>,
    pub(crate) file_sha256: BTreeMap<String, String>,
    pub(crate) file_size: BTreeMap<String, u64>,
    /// Bottom first.
    #[serde(default)]
    pub(crate) lowers: Vec<String>,
    pub(crate) upper: Option<Upper>,
    pub(crate) sparse_file: Option<String>,
    /// Byte ranges `[start, end)` of `sparse_file` that hold data; everything else from byte 4096
    /// on is a hole.
    #[serde(default)]
    pub(crate) data_extents: Vec<[u64; 2]>,
    #[serde(default)]
    pub(crate) note: String,
    /// What only some kinds have (`algo`, `block_size`, `records`, `upstream_stderr`...).
    #[serde(flatten)]
    pub(crate) rest: Map<String, Value>,
}

#[derive(Deserialize)]
struct Manifest {
    cases: Vec<Case>,
}

impl Golden {
    /// Reads the manifest.
    pub(crate) fn load() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
        let text = fs::read_to_string(root.join("manifest.json")).expect("read manifest.json");
        let manifest: Manifest = serde_json::from_str(&text).expect("parse manifest.json");
        assert_eq!(manifest.cases.len(), 76, "the set is complete");
        Self { root, cases: manifest.cases }
    }

    /// The folder with the checked-in files. Sparse ones are packed there.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// The cases whose kind starts with `prefix`; never none.
    pub(crate) fn of_kind<'a>(&'a self, prefix: &str) -> Vec<&'a Case> {
        let found: Vec<_> = self.cases.iter().filter(|c| c.kind.starts_with(prefix)).collect();
        assert!(!found.is_empty(), "no case of kind {prefix}");
        found
    }

    pub(crate) fn case(&self, name: &str) -> &Case {
        let found = self.cases.iter().find(|case| case.name == name);
        found.unwrap_or_else(|| panic!("no case named {name}"))
    }

    /// A private, writable copy of the case's files, at the same relative paths.
    pub(crate) fn materialise(&self, case: &Case) -> Materialised {
        let dir = tempfile::tempdir().expect("make a temporary folder");
        let shipped = case.config().filter(|config| !case.files.contains(config));
        for file in case.files.iter().chain(&case.lowers).chain(shipped.as_ref()) {
            let target = dir.path().join(file);
            if NOT_KEPT.contains(&file.as_str()) || target.exists() {
                continue;
            }
            fs::create_dir_all(target.parent().expect("a file has a folder")).expect("mkdir");
            if case.sparse_file.as_ref() == Some(file) {
                let packed = self.root.join(format!("{file}.packed"));
                unpack(&packed, &target, case.file_size[file], &case.extents());
            } else {
                fs::copy(self.root.join(file), &target)
                    .unwrap_or_else(|e| panic!("copy {file}: {e}"));
            }
        }
        Materialised { dir }
    }
}

impl Case {
    /// The config file that the set ships for this case, if any.
    pub(crate) fn config(&self) -> Option<String> {
        if let Some(step) = self.name.strip_prefix("ext4-3layers-") {
            return Some(format!("ext4-3layers/config.{step}.json"));
        }
        self.files.iter().find(|file| file.ends_with("config.v1.json")).cloned()
    }

    /// The read-only layer files, bottom first.
    pub(crate) fn layers(&self) -> Vec<String> {
        let layer = |file: &String| !file.ends_with(".json") && !file.ends_with("trace");
        if !self.lowers.is_empty() {
            self.lowers.clone()
        } else if self.upper().is_some() {
            Vec::new()
        } else {
            self.files.iter().filter(|file| layer(file)).cloned().collect()
        }
    }

    /// The writable top, if the case has one.
    pub(crate) fn upper(&self) -> Option<Upper> {
        let find = |name: &str| self.files.iter().find(|f| f.ends_with(name)).cloned();
        let pair = || Some(Upper { data: find("data.lsmt")?, index: find("index.lsmt")? });
        self.upper.clone().or_else(pair)
    }

    /// [`Case::data_extents`] as ranges.
    pub(crate) fn extents(&self) -> Vec<Range<u64>> {
        self.data_extents.iter().map(|&[start, end]| start..end).collect()
    }
}

/// One case's files in a folder of its own, which disappears with this value.
#[derive(Debug)]
pub(crate) struct Materialised {
    dir: tempfile::TempDir,
}

impl Materialised {
    /// The set's folder: the working directory from which the shipped configs resolve.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where one of the case's files is now.
    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// A config file with absolute paths for the case's layers and writable top, for callers that
    /// cannot change their working directory. Made from the manifest, so it also exists for cases
    /// that ship no config.
    pub(crate) fn config(&self, case: &Case) -> PathBuf {
        let absolute = |file: &String| self.path(file).display().to_string();
        let lowers: Vec<_> = case.layers().iter().map(|f| json!({"file": absolute(f)})).collect();
        let upper = case.upper().map_or_else(
            || json!({}),
            |upper| json!({"data": absolute(&upper.data), "index": absolute(&upper.index)}),
        );
        let config = json!({"repoBlobUrl": "", "lowers": lowers, "upper": upper, "resultFile": ""});
        let path = self.path("config.absolute.json");
        fs::write(&path, config.to_string()).expect("write the config");
        path
    }
}

/// Rebuilds a sparse file of `size` bytes from its packed form: the header, then the bytes of
/// each extent with nothing between them. What is in no extent is never written: a hole.
fn unpack(packed: &Path, target: &Path, size: u64, extents: &[Range<u64>]) {
    let mut source = File::open(packed).unwrap_or_else(|e| panic!("{}: {e}", packed.display()));
    let mut sparse = File::create(target).expect("create the sparse file");
    sparse.set_len(size).expect("size the sparse file");
    for extent in std::iter::once(&(0..PACKED_HEADER_BYTES)).chain(extents) {
        let mut bytes = vec![0; usize::try_from(extent.end - extent.start).expect("fits")];
        source.read_exact(&mut bytes).expect("the packed file has every extent");
        sparse.seek(SeekFrom::Start(extent.start)).expect("seek");
        sparse.write_all(&bytes).expect("write an extent");
    }
    assert_eq!(source.read(&mut [0]).expect("read"), 0, "nothing follows the last extent");
}

/// sha256 of a file, as lower-case hex.
pub(crate) fn sha256_of_file(path: &Path) -> String {
    let mut hasher = Sha256::new();
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    std::io::copy(&mut file, &mut hasher).expect("read the file");
    hex(&hasher.finalize())
}

/// Lower-case hex, as the manifest writes digests.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
