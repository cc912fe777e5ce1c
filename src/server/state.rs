//! What is written down about a device before it can be used: `state.json`.
//!
//! It is all that a successor needs, and all that tells our devices from those of others. Written
//! to a temporary name, synced and renamed, so a reader sees a whole file or none. A reader
//! believes nothing: another version, another id than the folder's, a file cut short are errors
//! that name the path.

use super::process::{Process, boot_id};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::STATE_BYTES_MAX;
use crate::source::FileIdentity;
use crate::units::{to_u64, to_usize};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The version of the file that this program writes and reads. 2 added recovery.
pub(super) const SCHEMA: u32 = 2;

/// The name of the file in a device's folder.
const FILE_NAME: &str = "state.json";

/// A file beside it of at least its size, which is given up for a state that finds no room: a
/// device must come back although somebody has filled the run folder's file system.
const SPARE_NAME: &str = "spare";

/// To whose multiple a spare file is made: a page, which is what tmpfs gives.
const SPARE_UNIT_BYTES: u64 = 4096;

/// How far a server has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It has its number and opens the image; the kernel may or may not have the device.
    Starting,
    /// The device can be used.
    Live,
    /// A successor takes the device over, and not every kernel lets another one try again.
    Taking,
    /// The device is being taken down.
    Stopping,
}

/// How the last successor took over: milliseconds since the supervisor saw the death.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recovery {
    /// The successor's process ran.
    pub started_ms: f64,
    /// It had the image, verified or from the parcel.
    pub image_ms: f64,
    /// Whether the image came from the supervisor's parcel, without a file being opened.
    pub from_parcel: bool,
    /// The kernel had let go of the dead server.
    pub quiesced_ms: f64,
    /// Requests flowed again.
    pub flowing_ms: f64,
}

/// One device, as its server wrote it down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// `SCHEMA` of the writer.
    pub schema: u32,
    /// The version of the program that wrote this.
    pub program: String,
    /// How far the server has come.
    pub phase: Phase,
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// The kernel's name for the boot this was written in.
    pub boot_id: String,
    /// The server.
    pub server: Process,
    /// The config's absolute path.
    pub config: PathBuf,
    /// The config's content at that time, with absolute paths.
    pub config_content: Value,
    /// The service config's absolute path, if one was given.
    pub service_config: Option<PathBuf>,
    /// Hardware queues: as asked for until the device is there, then what the kernel gave.
    pub queues: Option<u16>,
    /// Requests in flight per queue, likewise.
    pub depth: u16,
    /// Largest request in bytes asked for.
    pub request_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Size of the disk in bytes, once the image is open.
    pub size_bytes: Option<u64>,
    /// Where the server's words go; none if it runs in the foreground.
    pub log: Option<PathBuf>,
    /// When the attach began, in milliseconds since 1970.
    pub attached_unix_ms: u64,
    /// Whether the device waits for a successor when its server dies.
    pub recoverable: bool,
    /// The files of the image's layers, lowest first: whoever opens them anew must find these.
    pub layers: Vec<LayerFile>,
    /// Who asked for it and waits for it: if it does not come up, that one takes it away.
    pub launcher: Process,
    /// Whether it is to go as soon as nobody uses it.
    pub lazy: bool,
    /// How often a successor took over, upgrades included.
    pub recovery_count: u64,
    /// How the last one did.
    pub last_recovery: Option<Recovery>,
    /// The data file of the upper, if it is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upper: Option<LayerFile>,
    /// Whether the upper's files are to go with the device.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ephemeral: bool,
    /// The data and index file of an upper that a snapshot made a layer of, until their names are
    /// gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsettled: Option<(PathBuf, PathBuf)>,
    /// Most bytes of the upper's data file, if that is bounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
    /// How long a read of a layer in a registry may take, in seconds, if not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_deadline_s: Option<u64>,
    /// What successors need of the environment that the device was attached in.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
}

/// What identifies the file of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerFile {
    /// Its path when it was opened.
    pub path: PathBuf,
    /// The file system it is on.
    pub dev: u64,
    /// Its number there.
    pub ino: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl LayerFile {
    /// What the open file at `path` is now.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn of(path: &Path, file: &File) -> Result<Self> {
        let told = |error| Error::io(format!("stat {}", path.display()), &error);
        let found = file.metadata().map_err(told)?;
        let path = path.to_owned();
        Ok(Self { path, dev: found.dev(), ino: found.ino(), bytes: found.len() })
    }

    /// What tells it from every other file.
    pub(super) fn identity(&self) -> FileIdentity {
        FileIdentity { device_number: self.dev, inode: self.ino }
    }
}

/// The one field that every version of the file has.
#[derive(Deserialize)]
struct Versioned {
    schema: u32,
}

impl State {
    /// `/dev/ublkbN`.
    #[must_use]
    pub fn device_path(&self) -> PathBuf {
        device_path(self.id)
    }

    /// Whether both tell of the same attach: a number may be another device's by now.
    #[must_use]
    pub fn is_same_attach(&self, other: &Self) -> bool {
        let identity =
            |state: &Self| (state.boot_id.clone(), state.attached_unix_ms, state.launcher);
        identity(self) == identity(other)
    }

    /// Whether this was written since the machine came up. Kernel devices do not outlive a boot.
    #[must_use]
    pub fn is_of_this_boot(&self) -> bool {
        self.boot_id == boot_id()
    }

    /// Whether the server that wrote this still runs.
    #[must_use]
    pub fn server_is_alive(&self) -> bool {
        self.is_of_this_boot() && self.server.is_alive()
    }

    /// Writes the state into the folder of its device, durably, in one step.
    ///
    /// # Errors
    /// What the operating system says; `InvalidConfig` for paths that are no UTF-8.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE_NAME);
        let told = || format!("write {}", path.display());
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| {
            Error::new(ErrorKind::InvalidConfig, format!("{}: {error}", told()))
        })?;
        text.push(b'\n');
        let written = match write_durably(folder, &path, &text) {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                // Without one there is nothing to win; the next attempt tells.
                let _ = std::fs::remove_file(folder.join(SPARE_NAME));
                write_durably(folder, &path, &text)
            }
            written => written,
        };
        written.map_err(|error| Error::io(told(), &error))?;
        keep_spare(folder, to_u64(text.len()));
        Ok(())
    }

    /// Reads the state from the folder of device `id`; `None` when there is no state file.
    ///
    /// # Errors
    /// `Unsupported` for another version, `Corrupt` for anything else that is wrong with it.
    pub fn load(folder: &Path, id: u32) -> Result<Option<Self>> {
        let path = folder.join(FILE_NAME);
        let file = match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("open {}", path.display()), &error)),
        };
        let mut text = Vec::new();
        file.take(STATE_BYTES_MAX + 1)
            .read_to_end(&mut text)
            .map_err(|error| Error::io(format!("read {}", path.display()), &error))?;
        let state = parse(&text, id);
        state.map(Some).map_err(|error| error.context(format!("state file {}", path.display())))
    }
}

/// `/dev/ublkbN` of device `id`.
#[must_use]
pub fn device_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

fn parse(text: &[u8], id: u32) -> Result<State> {
    let corrupt = |message: String| Error::new(ErrorKind::Corrupt, message);
    if to_u64(text.len()) > STATE_BYTES_MAX {
        return Err(corrupt(format!("more than {STATE_BYTES_MAX} bytes")));
    }
    let Versioned { schema } =
        serde_json::from_slice(text).map_err(|error| corrupt(error.to_string()))?;
    if schema != SCHEMA {
        let message = format!(
            "schema: found {schema}, expected {SCHEMA}; use the version of obd-ublk that wrote it, \
             or `obd-ublk detach --force {id}`"
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let state: State = serde_json::from_slice(text).map_err(|error| corrupt(error.to_string()))?;
    if state.id != id {
        return Err(corrupt(format!("id: found {}, expected {id}", state.id)));
    }
    Ok(state)
}

/// Sees to a spare file for a state of `bytes`. Only a precaution: without room for it now, the
/// next save tries again.
fn keep_spare(folder: &Path, bytes: u64) {
    let path = folder.join(SPARE_NAME);
    let bytes = bytes.next_multiple_of(SPARE_UNIT_BYTES);
    if std::fs::metadata(&path).is_ok_and(|spare| spare.len() >= bytes) {
        return;
    }
    // Written, not only lengthened: a hole holds no room.
    let zeros = vec![0; to_usize(bytes).unwrap_or(0)];
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path);
    if file.and_then(|mut file| file.write_all(&zeros)).is_err() {
        let _ = std::fs::remove_file(&path);
    }
}

/// Writes `text` as the whole of the file `path` in `folder`, in one step.
pub(super) fn write_durably(folder: &Path, path: &Path, text: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(text)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
pub(super) fn sample(id: u32) -> State {
    State {
        schema: SCHEMA,
        program: "0.1.0".to_owned(),
        phase: Phase::Live,
        id,
        boot_id: boot_id(),
        server: Process::current(),
        config: PathBuf::from("/images/a/config.v1.json"),
        config_content: serde_json::json!({"lowers": []}),
        service_config: None,
        queues: None,
        depth: 128,
        request_bytes: 512 * 1024,
        read_only: true,
        size_bytes: Some(1 << 30),
        log: None,
        attached_unix_ms: 1_700_000_000_000,
        recoverable: false,
        layers: Vec::new(),
        launcher: Process { pid: 1, start_ticks: 1 },
        lazy: false,
        upper: None,
        ephemeral: false,
        unsettled: None,
        quota_bytes: None,
        io_deadline_s: None,
        environment: BTreeMap::new(),
        recovery_count: 0,
        last_recovery: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(State::load(folder.path(), 7).unwrap(), None);
        let mut state = sample(7);
        state.save(folder.path()).unwrap();
        assert_eq!(State::load(folder.path(), 7).unwrap(), Some(state.clone()));
        state.phase = Phase::Starting;
        state.size_bytes = None;
        state.save(folder.path()).unwrap();
        assert_eq!(State::load(folder.path(), 7).unwrap(), Some(state));
        let names =
            std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        assert_eq!(names, [SPARE_NAME, FILE_NAME], "nothing temporary");
        assert_eq!(std::fs::metadata(folder.path().join(SPARE_NAME)).unwrap().len(), 4096);
    }

    #[test]
    fn a_quota_is_kept_and_a_state_of_before_there_were_any_has_none() {
        let state = State { quota_bytes: Some(1 << 30), ..sample(7) };
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(parse(text.as_bytes(), 7).unwrap().quota_bytes, Some(1 << 30));
        let before = text.replace(",\"quota_bytes\":1073741824", "");
        assert_ne!(before, text);
        assert_eq!(parse(before.as_bytes(), 7).unwrap().quota_bytes, None);
    }

    #[test]
    fn a_deadline_is_kept_and_a_state_of_before_there_were_any_has_none() {
        let state = State { io_deadline_s: Some(5), ..sample(7) };
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(parse(text.as_bytes(), 7).unwrap().io_deadline_s, Some(5));
        let before = text.replace(",\"io_deadline_s\":5", "");
        assert_ne!(before, text);
        assert_eq!(parse(before.as_bytes(), 7).unwrap().io_deadline_s, None);
    }

    #[test]
    fn a_state_file_that_cannot_be_believed_is_refused_by_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        sample(7).save(folder.path()).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        let newer = whole.replace("\"schema\": 2", "\"schema\": 3");
        let older = whole.replace("\"schema\": 2", "\"schema\": 1");
        for (text, kind, told) in [
            (&whole[..whole.len() / 2], ErrorKind::Corrupt, "EOF while parsing"),
            ("", ErrorKind::Corrupt, "EOF while parsing"),
            ("{}", ErrorKind::Corrupt, "missing field `schema`"),
            (r#"{"schema":2}"#, ErrorKind::Corrupt, "missing field"),
            (&newer, ErrorKind::Unsupported, "schema: found 3, expected 2"),
            (&older, ErrorKind::Unsupported, "or `obd-ublk detach --force 7`"),
            (r#"{"schema":3,"else":[]}"#, ErrorKind::Unsupported, "found 3"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = State::load(folder.path(), 7).unwrap_err();
            let message = format!("{error:#}");
            assert_eq!(error.kind(), kind, "{message}");
            assert!(message.contains(told), "{message}");
            assert!(message.contains(path.to_str().unwrap()), "{message}");
        }
        std::fs::write(&path, &whole).unwrap();
        let error = State::load(folder.path(), 8).unwrap_err();
        assert!(format!("{error:#}").ends_with("id: found 7, expected 8"), "{error:#}");
    }

    #[test]
    fn a_server_of_an_earlier_boot_is_dead_whatever_runs_under_its_pid() {
        let state = sample(0);
        assert!(state.server_is_alive());
        let earlier = State { boot_id: "0".repeat(36), ..state };
        assert!(!earlier.server_is_alive());
    }
}
