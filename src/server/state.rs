//! What is written down about a device before it can be used: `state.json`.
//!
//! It is all that a successor needs, and all that tells our devices from those of others. Written
//! to a temporary name, synced and renamed, so a reader sees a whole file or none. A reader
//! believes nothing: another version, another id than the folder's, a file cut short are errors
//! that name the path.

use super::process::{Process, boot_id};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::STATE_BYTES_MAX;
use crate::units::to_u64;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The version of the file that this program writes and reads.
pub(super) const SCHEMA: u32 = 1;

/// The name of the file in a device's folder.
const FILE_NAME: &str = "state.json";

/// How far a server has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It has its number and opens the image; the kernel may or may not have the device.
    Starting,
    /// The device can be used.
    Live,
}

/// One device, as its server wrote it down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Hardware queues asked for; the program's default if none.
    pub queues: Option<u16>,
    /// Requests in flight per queue asked for.
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
        write_durably(folder, &path, &text).map_err(|error| Error::io(told(), &error))
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
            "schema: found {schema}, expected {SCHEMA}; use the version of obd-ublk that wrote it"
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let state: State = serde_json::from_slice(text).map_err(|error| corrupt(error.to_string()))?;
    if state.id != id {
        return Err(corrupt(format!("id: found {}, expected {id}", state.id)));
    }
    Ok(state)
}

fn write_durably(folder: &Path, path: &Path, text: &[u8]) -> std::io::Result<()> {
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
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing temporary");
    }

    #[test]
    fn a_state_file_that_cannot_be_believed_is_refused_by_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        sample(7).save(folder.path()).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        let newer = whole.replace("\"schema\": 1", "\"schema\": 2");
        for (text, kind, told) in [
            (&whole[..whole.len() / 2], ErrorKind::Corrupt, "EOF while parsing"),
            ("", ErrorKind::Corrupt, "EOF while parsing"),
            ("{}", ErrorKind::Corrupt, "missing field `schema`"),
            (r#"{"schema":1}"#, ErrorKind::Corrupt, "missing field"),
            (&newer, ErrorKind::Unsupported, "schema: found 2, expected 1"),
            (r#"{"schema":2,"else":[]}"#, ErrorKind::Unsupported, "found 2"),
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
