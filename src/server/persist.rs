//! `/etc/obd-ublk/persist.d`: which devices are to be there again after a reboot.
//!
//! ```text
//!   /etc/obd-ublk/persist.d/     not writable for others: what it names is done as root
//!     N.json                     how to attach device N
//! ```
//!
//! An entry is what was said on the command line, with absolute paths, the folder in which it was
//! said (relative paths in a config are taken from there), and what a server needs of the
//! environment in which it was said. An address of a proxy may have a password in it, so that only
//! the owner can read an entry; no report shows it. It is written to a temporary name, synced and
//! renamed. Nobody but `attach --persist` writes one; `detach` removes it.

use super::environment;
use super::run_dir::{folder_of_host, parse_id};
use super::serve::Order;
use super::state::write_durably;
use super::survey::is_config_at;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::image::is_reference;
use crate::limits::PERSIST_BYTES_MAX;
use crate::units::to_u64;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The variable that moves the folder, for tests and for several instances on one host.
pub const PERSIST_DIR_VARIABLE: &str = "OBD_UBLK_PERSIST_DIR";

/// Where it is otherwise.
const PERSIST_DIR_DEFAULT: &str = "/etc/obd-ublk/persist.d";

/// The version of an entry that this program writes and reads.
const SCHEMA: u32 = 1;

/// The folder of all entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersistDir {
    path: PathBuf,
}

/// One device that is to be there again after a reboot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Persisted {
    /// `SCHEMA` of the writer.
    schema: u32,
    /// The number N of `/dev/ublkbN`.
    pub id: u32,
    /// Absolute path of the config, or of the single layer; or the reference of an image.
    pub config: PathBuf,
    /// Where relative paths in the config start.
    pub folder: PathBuf,
    /// Absolute path of the service config, if one was given.
    pub service_config: Option<PathBuf>,
    /// Hardware queues, or `None` for the default.
    pub queues: Option<u16>,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Whether a writable config is served without writes.
    pub read_only: bool,
    /// Whether a supervisor brings the device back when its server dies.
    pub supervised: bool,
    /// Where it is mounted.
    pub mount: Option<PathBuf>,
    /// Most bytes of the data file of an upper, if that is bounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
    /// How long a read of a layer in a registry may take, in seconds, if not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_deadline_s: Option<u64>,
    /// What its server needs of the environment that it was attached in; empty in an entry of an
    /// older version.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    environment: BTreeMap<String, String>,
}

impl Persisted {
    /// The entry of device `id`, attached by `order` in the working folder `folder` and the
    /// environment of this process.
    #[must_use]
    pub fn new(
        id: u32,
        order: &Order,
        read_only: bool,
        folder: PathBuf,
        mount: Option<PathBuf>,
    ) -> Self {
        let config = &order.config;
        Self {
            schema: SCHEMA,
            id,
            config: if is_reference(config) { config.clone() } else { folder.join(config) },
            service_config: order.service_config.as_ref().map(|path| folder.join(path)),
            folder,
            queues: order.queues,
            depth: order.depth,
            read_only,
            supervised: order.supervised,
            mount,
            quota_bytes: order.quota_bytes,
            io_deadline_s: order.io_deadline_s,
            environment: environment::of_this_process(),
        }
    }

    /// Lets the command that attaches the device have what was kept of the environment, and nothing
    /// of the sort from whoever restores it. An entry of an older version changes nothing.
    pub fn give_environment(&self, command: &mut Command) {
        environment::give(command, &self.environment);
    }

    /// The command line by which the device is attached, after the program's name.
    #[must_use]
    pub fn attach_arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = ["attach", "--json"].map(Into::into).to_vec();
        let mut option = |name: &str, value: Option<OsString>| {
            arguments.extend(value.into_iter().flat_map(|value| [name.into(), value]));
        };
        option("--id", Some(self.id.to_string().into()));
        option("--queues", self.queues.map(|queues| queues.to_string().into()));
        option("--depth", Some(self.depth.to_string().into()));
        option("--service-config", self.service_config.clone().map(Into::into));
        option("--quota", self.quota_bytes.map(|bytes| bytes.to_string().into()));
        option("--io-deadline", self.io_deadline_s.map(|seconds| seconds.to_string().into()));
        option("--mount", self.mount.clone().map(Into::into));
        arguments.extend(self.read_only.then(|| "--read-only".into()));
        arguments.extend((!self.supervised).then(|| "--unsupervised".into()));
        arguments.extend(["--".into(), self.config.clone().into()]);
        arguments
    }
}

impl PersistDir {
    /// The folder of this host, or what [`PERSIST_DIR_VARIABLE`] says. It need not exist.
    #[must_use]
    pub fn of_host() -> Self {
        Self { path: folder_of_host(PERSIST_DIR_VARIABLE, PERSIST_DIR_DEFAULT) }
    }

    /// The folder at `path`.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes the folder if needed, and checks it.
    ///
    /// # Errors
    /// As [`PersistDir::check`].
    pub fn prepare(&self) -> Result<()> {
        let made = DirBuilder::new().recursive(true).mode(0o755).create(&self.path);
        made.map_err(|error| Error::io(format!("make {}", self.path.display()), &error))?;
        self.check()
    }

    /// Whether the folder can be believed. One that does not exist can: it holds nothing.
    ///
    /// # Errors
    /// `Unsupported` when it belongs to somebody else or others may write to it.
    pub fn check(&self) -> Result<()> {
        let metadata = match std::fs::metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                return Err(Error::io(format!("look at {}", self.path.display()), &error));
            }
        };
        let me = nix::unistd::geteuid().as_raw();
        if metadata.uid() == me && metadata.mode() & 0o022 == 0 {
            return Ok(());
        }
        let message = format!(
            "folder {}: found owner {} and mode {:o}, expected owner {me} and nobody else writing",
            self.path.display(),
            metadata.uid(),
            metadata.mode() & 0o7777
        );
        Err(Error::new(ErrorKind::Unsupported, message))
    }

    fn file(&self, id: u32) -> PathBuf {
        self.path.join(format!("{id}.json"))
    }

    /// The numbers that have an entry, ascending. Other names are not ours and ignored.
    ///
    /// # Errors
    /// As [`PersistDir::check`]; a missing folder is an empty one.
    pub fn ids(&self) -> Result<Vec<u32>> {
        self.check()?;
        let told =
            |error: &std::io::Error| Error::io(format!("read {}", self.path.display()), error);
        let entries = match std::fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(told(&error)),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let name = entry.map_err(|error| told(&error))?.file_name();
            ids.extend(
                name.to_str().and_then(|name| name.strip_suffix(".json")).and_then(parse_id),
            );
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// The entry of device `id`, if there is one.
    ///
    /// # Errors
    /// `Unsupported` for another version, `Corrupt` for anything else that is wrong with it.
    pub fn load(&self, id: u32) -> Result<Option<Persisted>> {
        let path = self.file(id);
        let told = |error: &std::io::Error| Error::io(format!("read {}", path.display()), error);
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = match File::options().read(true).custom_flags(flags.bits()).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(told(&error)),
        };
        let mut text = Vec::new();
        file.take(PERSIST_BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| told(&error))?;
        parse(&text, id).map(Some).context(|| format!("persisted device {}", path.display()))
    }

    /// Writes an entry, durably, in one step.
    ///
    /// # Errors
    /// What the operating system says; `InvalidConfig` for paths that are no UTF-8.
    pub fn save(&self, entry: &Persisted) -> Result<()> {
        let path = self.file(entry.id);
        let mut text = serde_json::to_vec_pretty(entry).map_err(|error| {
            Error::new(ErrorKind::InvalidConfig, format!("write {}: {error}", path.display()))
        })?;
        text.push(b'\n');
        self.prepare()?;
        write_durably(&self.path, &path, &text).map_err(|error| {
            let _ = std::fs::remove_file(path.with_extension("tmp"));
            Error::io(format!("write {}", path.display()), &error)
        })
    }

    /// Removes the entry of device `id`; false when there was none.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn remove(&self, id: u32) -> Result<bool> {
        let path = self.file(id);
        let removed = match std::fs::remove_file(&path) {
            Ok(()) => File::open(&self.path).and_then(|folder| folder.sync_all()).map(|()| true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        };
        removed.map_err(|error| Error::io(format!("remove {}", path.display()), &error))
    }

    /// The numbers of the entries that name the config at `path`. An entry that cannot be
    /// understood cannot be what is meant.
    ///
    /// # Errors
    /// As [`PersistDir::ids`].
    pub fn ids_of_config(&self, path: &Path) -> Result<Vec<u32>> {
        let is_wanted = is_config_at(path);
        let names_it =
            |id: &u32| self.load(*id).ok().flatten().is_some_and(|entry| is_wanted(&entry.config));
        Ok(self.ids()?.into_iter().filter(names_it).collect())
    }
}

fn parse(text: &[u8], id: u32) -> Result<Persisted> {
    #[derive(Deserialize)]
    struct Versioned {
        schema: u32,
    }
    let corrupt = |message: String| Error::new(ErrorKind::Corrupt, message);
    if to_u64(text.len()) > PERSIST_BYTES_MAX {
        return Err(corrupt(format!("more than {PERSIST_BYTES_MAX} bytes")));
    }
    let Versioned { schema } =
        serde_json::from_slice(text).map_err(|error| corrupt(error.to_string()))?;
    if schema != SCHEMA {
        let message = format!("schema: found {schema}, expected {SCHEMA}");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let entry: Persisted =
        serde_json::from_slice(text).map_err(|error| corrupt(error.to_string()))?;
    if entry.id != id {
        return Err(corrupt(format!("id: found {}, expected {id}", entry.id)));
    }
    let config = Some(&entry.config).filter(|config| !is_reference(config));
    let paths = [config, Some(&entry.folder), entry.service_config.as_ref()];
    for path in paths.into_iter().chain([entry.mount.as_ref()]).flatten() {
        if !path.is_absolute() {
            return Err(corrupt(format!("path {}: expected an absolute one", path.display())));
        }
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn order() -> Order {
        Order {
            config: "c/-v.json".into(),
            service_config: Some("/s".into()),
            id: None,
            queues: Some(2),
            depth: 64,
            request_bytes: 4096,
            supervised: false,
            upper: None,
            quota_bytes: Some(1 << 30),
            io_deadline_s: Some(9),
        }
    }

    fn entry(id: u32) -> Persisted {
        Persisted::new(id, &order(), true, "/w".into(), Some("/mnt/a b".into()))
    }

    fn persist_dir() -> (tempfile::TempDir, PersistDir) {
        let folder = tempfile::tempdir().unwrap();
        let persist = PersistDir::at(folder.path().join("etc/persist.d"));
        (folder, persist)
    }

    #[test]
    fn an_entry_is_the_command_line_that_made_it() {
        let expected = "attach --json --id 3 --queues 2 --depth 64 --service-config /s --quota \
                        1073741824 --io-deadline 9 --mount M --read-only \
                        --unsupervised -- /w/c/-v.json";
        let expected: Vec<OsString> = expected
            .split(' ')
            .map(|word| if word == "M" { "/mnt/a b".into() } else { word.into() })
            .collect();
        assert_eq!(entry(3).attach_arguments(), expected);
        let plain = Order {
            service_config: None,
            queues: None,
            depth: 128,
            supervised: true,
            quota_bytes: None,
            io_deadline_s: None,
            ..order()
        };
        let plain = Persisted::new(0, &plain, false, "/".into(), None).attach_arguments();
        let plain: Vec<_> = plain.iter().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(plain.join(" "), "attach --json --id 0 --depth 128 -- /c/-v.json");
    }

    #[test]
    fn what_was_saved_is_loaded_and_found_by_number_and_by_config() {
        let (_folder, persist) = persist_dir();
        assert!(persist.ids().unwrap().is_empty());
        assert!(!persist.remove(3).unwrap());
        for id in [10, 3] {
            persist.save(&entry(id)).unwrap();
        }
        let other = Persisted { config: "/other".into(), ..entry(9) };
        persist.save(&other).unwrap();
        for name in ["x.json", "03.json", "4.json.tmp", "5.tmp", "1048576.json"] {
            std::fs::write(persist.path.join(name), "{}").unwrap();
        }
        assert_eq!(persist.ids().unwrap(), [3, 9, 10]);
        assert_eq!(persist.load(10).unwrap(), Some(entry(10)));
        assert_eq!(persist.load(9).unwrap(), Some(other));
        assert_eq!(persist.load(4).unwrap(), None);
        assert_eq!(persist.ids_of_config(Path::new("/w/c/-v.json")).unwrap(), [3, 10]);
        assert!(persist.remove(3).unwrap());
        assert_eq!(persist.ids().unwrap(), [9, 10]);
    }

    /// A device that was attached with a cache, credentials or a proxy of its own used to come back
    /// after a reboot with those of whoever ran `restore`, or not at all.
    #[test]
    fn an_entry_keeps_the_environment_for_its_restore_and_for_the_owners_eyes_only() {
        let (_folder, persist) = persist_dir();
        let kept = [("DOCKER_CONFIG", "/c"), ("HTTPS_PROXY", "http://u:p@h")];
        let kept = kept.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let wanted = Persisted { environment: BTreeMap::from(kept), ..entry(3) };
        persist.prepare().unwrap();
        // Of somebody who had edited the one before.
        std::fs::write(persist.file(3), "{}").unwrap();
        let readable = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(persist.file(3), readable).unwrap();
        persist.save(&wanted).unwrap();
        assert_eq!(std::fs::metadata(persist.file(3)).unwrap().mode() & 0o7777, 0o600);
        let loaded = persist.load(3).unwrap().unwrap();
        assert_eq!(loaded, wanted);
        let told_by = |entry: &Persisted| {
            let mut command = Command::new("/usr/bin/env");
            command.env_clear().env("NO_PROXY", "of somebody else").env("OTHER", "stays");
            entry.give_environment(&mut command);
            let told = String::from_utf8(command.output().unwrap().stdout).unwrap();
            let mut lines: Vec<String> = told.lines().map(ToOwned::to_owned).collect();
            lines.sort_unstable();
            lines
        };
        assert_eq!(
            told_by(&loaded),
            ["DOCKER_CONFIG=/c", "HTTPS_PROXY=http://u:p@h", "OTHER=stays"]
        );
        // Of a version that kept none.
        let mut older: serde_json::Value =
            serde_json::from_slice(&std::fs::read(persist.file(3)).unwrap()).unwrap();
        older.as_object_mut().unwrap().remove("environment").unwrap();
        std::fs::write(persist.file(3), older.to_string()).unwrap();
        let older = persist.load(3).unwrap().unwrap();
        assert_eq!(told_by(&older), ["NO_PROXY=of somebody else", "OTHER=stays"]);
    }

    /// The name of an image in a registry used to become a path below the working folder, from
    /// which no restore could attach anything.
    #[test]
    fn a_reference_is_kept_as_it_was_said_and_found_by_itself() {
        let (_folder, persist) = persist_dir();
        let reference = Path::new("docker://reg.example.com:5000/img:v1");
        let order = Order { config: reference.into(), ..order() };
        let entry = Persisted::new(3, &order, true, "/w".into(), None);
        persist.save(&entry).unwrap();
        let loaded = persist.load(3).unwrap().unwrap();
        assert_eq!(loaded.attach_arguments().last().unwrap(), reference);
        assert_eq!(persist.ids_of_config(reference).unwrap(), [3]);
        let other = Path::new("docker://reg.example.com:5000/img:v2");
        assert!(persist.ids_of_config(other).unwrap().is_empty());
    }

    #[test]
    fn an_entry_that_cannot_be_believed_is_refused_by_its_path() {
        let (_folder, persist) = persist_dir();
        persist.save(&entry(7)).unwrap();
        let path = persist.file(7);
        let whole = std::fs::read_to_string(&path).unwrap();
        let newer = whole.replace("\"schema\": 1", "\"schema\": 2");
        let relative = whole.replace("\"/mnt/a b\"", "\"mnt\"");
        let long = " ".repeat(usize::try_from(PERSIST_BYTES_MAX).unwrap()) + &whole;
        for (text, kind, told) in [
            ("", ErrorKind::Corrupt, "EOF"),
            (&whole[..whole.len() / 2], ErrorKind::Corrupt, "EOF"),
            ("{\"schema\":1}", ErrorKind::Corrupt, "missing field"),
            (&newer, ErrorKind::Unsupported, "found 2, expected 1"),
            (&relative, ErrorKind::Corrupt, "path mnt: expected an absolute one"),
            (&long, ErrorKind::Corrupt, "more than"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = persist.load(7).unwrap_err();
            assert_eq!(error.kind(), kind, "{error:#}");
            let message = format!("{error:#}");
            assert!(message.contains(told) && message.contains("7.json"), "{message}");
        }
        std::fs::rename(&path, persist.file(8)).unwrap();
        std::fs::write(persist.file(8), &whole).unwrap();
        let error = format!("{:#}", persist.load(8).unwrap_err());
        assert!(error.ends_with("id: found 7, expected 8"), "{error}");
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_not_believed() {
        let (_folder, persist) = persist_dir();
        persist.save(&entry(1)).unwrap();
        for mode in [0o777, 0o775, 0o757] {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&persist.path, permissions).unwrap();
            for error in [persist.ids().unwrap_err(), persist.save(&entry(2)).unwrap_err()] {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert!(error.to_string().contains(&format!("mode {mode:o}")), "{error}");
            }
        }
    }

    #[test]
    fn a_save_that_fails_leaves_the_entry_that_was_there_and_nothing_else() {
        let (_folder, persist) = persist_dir();
        persist.save(&entry(1)).unwrap();
        // The rename fails: its target is a folder with something in it.
        std::fs::create_dir_all(persist.file(2).join("x")).unwrap();
        assert!(persist.save(&entry(2)).is_err());
        let mut names: Vec<_> = std::fs::read_dir(&persist.path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["1.json", "2.json"]);
        assert_eq!(persist.load(1).unwrap(), Some(entry(1)));
    }
}
