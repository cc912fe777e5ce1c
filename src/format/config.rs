//! The two JSON files of the reference: an image's `config.v1.json` and the host's
//! `overlaybd.json`.
//!
//! Both are written by others (the snapshotter, an administrator), so unknown keys are ignored,
//! every key is optional, and `null` means absent. What is understood is checked: a wrong type
//! fails with its line and column. TurboOCI is recognised and refused by name. Paths are kept as
//! text; finding files is done by `image::open`. `format-spec/image-config.md` tells the format.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::{CONFIG_BYTES_MAX, LAYER_COUNT_MAX, MIRRORS_MAX};
use crate::units::to_u64;
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::path::PathBuf;

/// An image's `config.v1.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ImageConfig {
    /// `https://HOST/v2/REPOSITORY/blobs`: where layers without a local file are.
    pub repo_blob_url: String,
    /// The read-only layers, lowest first.
    pub lowers: Vec<LowerConfig>,
    /// The writable pair on top, if there is one.
    #[serde(deserialize_with = "upper")]
    pub upper: Option<UpperConfig>,
    /// Where the outcome of an attach is written; empty for nowhere.
    pub result_file: String,
    /// Background download; `None` leaves it to the host's config.
    pub download: Option<Download>,
    /// Whether the uppermost lower holds only a trace.
    pub acceleration_layer: bool,
    /// Where to record a trace; empty for nowhere.
    pub record_trace_path: String,
}

/// One read-only layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LowerConfig {
    /// The layer's file.
    pub file: String,
    /// A folder that may hold the layer under one of three names.
    pub dir: String,
    /// `sha256:HEX` of the blob in the registry.
    pub digest: String,
    /// Length of that blob in bytes; 0 when unknown.
    pub size: u64,
    /// This layer's own place in a registry (an extension of a peer), before the image's.
    pub repo_blob_url: String,
    target_file: String,
    target_digest: String,
    gzip_index: String,
}

/// The writable pair.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UpperConfig {
    /// The data file.
    pub data: String,
    /// The index file.
    pub index: String,
    target: String,
    gzip_index: String,
}

/// How the background download behaves. Defaults are the reference's code's, not its README's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Download {
    /// Whether whole layers are downloaded in the background.
    pub enable: bool,
    /// Seconds to wait after attach.
    pub delay: u64,
    /// At most as many seconds more, at random.
    #[serde(rename = "delayExtra")]
    pub delay_extra: u64,
    /// Limit in megabytes a second.
    #[serde(rename = "maxMBps")]
    pub max_mbps: u64,
    /// Attempts per layer.
    #[serde(rename = "tryCnt")]
    pub try_count: u64,
    /// Bytes per request.
    #[serde(rename = "blockSize")]
    pub block_size: u64,
}

impl Default for Download {
    fn default() -> Self {
        Self {
            enable: false,
            delay: 300,
            delay_extra: 30,
            max_mbps: 100,
            try_count: 5,
            block_size: 262_144,
        }
    }
}

impl ImageConfig {
    /// The config in `bytes`.
    ///
    /// # Errors
    /// `InvalidConfig` with line and column, or naming the layer; `Unsupported` for TurboOCI.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let config: Self = parse_json("image config", bytes, &["lowers", "upper", "download"])?;
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidConfig, message));
        let upper_count = usize::from(config.upper.is_some());
        let count = config.lowers.len() + upper_count;
        if count > LAYER_COUNT_MAX {
            return invalid(format!("found {count} layers, expected at most {LAYER_COUNT_MAX}"));
        }
        for (number, lower) in config.lowers.iter().enumerate() {
            if let Some(key) = lower.turbo_oci_key() {
                return Err(turbo_oci(&format!("layer {number}"), key));
            }
        }
        if let Some(upper) = &config.upper {
            upper.check()?;
        }
        if config.acceleration_layer && !config.record_trace_path.is_empty() {
            let message = "accelerationLayer and recordTracePath exclude each other";
            return invalid(message.to_owned());
        }
        if config.stack_lowers().is_empty() && config.upper.is_none() {
            return invalid("there are neither lowers nor an upper".to_owned());
        }
        Ok(config)
    }

    /// Every local path that the image may be read from, in no order that matters.
    #[must_use]
    pub fn input_paths(&self) -> Vec<PathBuf> {
        let lowers = self.lowers.iter().flat_map(LowerConfig::local_candidates);
        let upper = self.upper.iter().flat_map(|upper| [&upper.data, &upper.index]);
        lowers.chain(upper.map(PathBuf::from)).collect()
    }

    /// The lowers that hold the disk, lowest first: without the trace layer, if there is one.
    #[must_use]
    pub fn stack_lowers(&self) -> &[LowerConfig] {
        match self.lowers.split_last() {
            Some((_trace, stack)) if self.acceleration_layer => stack,
            _ => &self.lowers,
        }
    }
}

/// The `resultFile` of a config, as far as it can be found: the rest may be nonsense or cut off, so
/// that the failure can still be told there. `None` when it names none.
#[must_use]
pub fn result_file_of(bytes: &[u8]) -> Option<String> {
    if to_u64(bytes.len()) > CONFIG_BYTES_MAX {
        return None;
    }
    let mut found = None;
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    // The outcome does not matter: what was seen before the first error is in `found`.
    let _ = reader.deserialize_map(ResultFileVisitor { found: &mut found });
    found.filter(|path| !path.is_empty())
}

struct ResultFileVisitor<'a> {
    found: &'a mut Option<String>,
}

impl<'de> Visitor<'de> for ResultFileVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "resultFile" {
                *self.found = Some(map.next_value::<String>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

impl LowerConfig {
    /// Where the layer's file may be, in the reference's order; the first that exists is taken.
    #[must_use]
    pub fn local_candidates(&self) -> Vec<PathBuf> {
        let mut candidates = Vec::new();
        if !self.file.is_empty() {
            candidates.push(PathBuf::from(&self.file));
        }
        if !self.dir.is_empty() {
            let names = ["overlaybd.commit", ".commit", "overlaybd.sealed"];
            candidates.extend(names.map(|name| PathBuf::from(&self.dir).join(name)));
        }
        candidates
    }

    fn turbo_oci_key(&self) -> Option<&'static str> {
        [
            ("targetFile", &self.target_file),
            ("targetDigest", &self.target_digest),
            ("gzipIndex", &self.gzip_index),
        ]
        .into_iter()
        .find_map(|(key, value)| (!value.is_empty()).then_some(key))
    }
}

impl UpperConfig {
    fn check(&self) -> Result<()> {
        for (key, value) in [("target", &self.target), ("gzipIndex", &self.gzip_index)] {
            if !value.is_empty() {
                return Err(turbo_oci("the upper", key));
            }
        }
        // The reference silently serves such a config read-only; whoever wrote half a pair
        // expects to write to it.
        let missing = match (self.data.is_empty(), self.index.is_empty()) {
            (true, false) => "data",
            (false, true) => "index",
            _ => return Ok(()),
        };
        let message = format!("the upper is half a pair: it has no {missing}");
        Err(Error::new(ErrorKind::InvalidConfig, message))
    }
}

fn turbo_oci(place: &str, key: &str) -> Error {
    let message = format!("{place} has {key}: TurboOCI images are not supported");
    Error::new(ErrorKind::Unsupported, message)
}

/// The host's `overlaybd.json`, as far as it concerns us. Defaults are the reference's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceConfig {
    /// Legacy place of the cache's size in GB.
    #[serde(rename = "registryCacheSizeGB")]
    pub registry_cache_size_gb: u64,
    /// The cache of registry reads.
    pub cache_config: CacheConfig,
    /// Legacy place of the credential file.
    pub credential_file_path: String,
    /// Where credentials come from.
    pub credential_config: CredentialConfig,
    /// Background download where the image's config says nothing.
    pub download: Download,
    /// The prefix of a peer-to-peer network.
    pub p2p_config: P2pConfig,
    /// Replay of traces.
    pub prefetch_config: PrefetchConfig,
    /// Client certificate for registries.
    pub cert_config: CertConfig,
    /// Ours alone: ways to registries, and whom to trust there.
    pub registries: RegistriesConfig,
    /// The reference's I/O engine; ours is io_uring whatever it says. 0, 1 or 2.
    pub io_engine: u32,
    /// What we call ourselves to registries; empty for our name and version.
    pub user_agent: String,
    /// How long a read of a layer in a registry may take, as the command line says; no file does.
    #[serde(skip)]
    pub io_deadline_seconds: Option<u64>,
}

impl Default for ServiceConfig {
    fn default() -> Self {
        Self {
            registry_cache_size_gb: 4,
            cache_config: CacheConfig::default(),
            credential_file_path: "/opt/overlaybd/cred.json".to_owned(),
            credential_config: CredentialConfig::default(),
            download: Download::default(),
            p2p_config: P2pConfig::default(),
            prefetch_config: PrefetchConfig::default(),
            cert_config: CertConfig::default(),
            registries: RegistriesConfig::default(),
            io_engine: 0,
            user_agent: String::new(),
            io_deadline_seconds: None,
        }
    }
}

/// `cacheConfig`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CacheConfig {
    /// `file`, `ocf` or `download`; empty for the default.
    pub cache_type: String,
    /// The reference's cache folder; never ours.
    pub cache_dir: String,
    /// Quota in GB.
    #[serde(rename = "cacheSizeGB")]
    pub cache_size_gb: u64,
    /// Bytes per refill.
    pub refill_size: u64,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            cache_type: String::new(),
            cache_dir: String::new(),
            cache_size_gb: 4,
            refill_size: 262_144,
        }
    }
}

/// `credentialConfig`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CredentialConfig {
    /// `file`, `http`, `https` or `uds`; empty for the legacy file.
    pub mode: String,
    /// File, URL or socket.
    pub path: String,
    /// Seconds.
    pub timeout: u64,
    /// Certificate file to show to the service at an `https` URL.
    pub client_cert_path: String,
    /// Its key file.
    pub client_key_path: String,
    /// The only authority to trust there; empty for the system's.
    pub server_ca_path: String,
}

impl Default for CredentialConfig {
    fn default() -> Self {
        Self {
            mode: String::new(),
            path: String::new(),
            timeout: 1,
            client_cert_path: String::new(),
            client_key_path: String::new(),
            server_ca_path: String::new(),
        }
    }
}

/// `p2pConfig`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct P2pConfig {
    /// Whether blob URLs get the prefix.
    pub enable: bool,
    /// The prefix.
    pub address: String,
}

impl Default for P2pConfig {
    fn default() -> Self {
        Self { enable: false, address: "http://localhost:9731/accelerator".to_owned() }
    }
}

/// `prefetchConfig`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PrefetchConfig {
    /// Reads in flight during replay.
    pub concurrency: u32,
}

impl Default for PrefetchConfig {
    fn default() -> Self {
        Self { concurrency: 16 }
    }
}

/// `certConfig`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CertConfig {
    /// Certificate file.
    pub cert_file: String,
    /// Key file.
    pub key_file: String,
}

/// `registries`: the reference does not know it, and ignores it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RegistriesConfig {
    /// Other places that have a registry's repositories, asked first, in this order.
    pub mirrors: Vec<MirrorConfig>,
    /// Files of authorities (PEM) to trust besides the system's.
    pub ca_files: Vec<String>,
    /// `HOST` or `HOST:PORT` whose certificate is not verified.
    pub insecure_hosts: Vec<String>,
    /// `HOST` or `HOST:PORT` to which an image's reference means plain http.
    pub plain_hosts: Vec<String>,
}

/// An element of `registries.mirrors`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MirrorConfig {
    /// The registry, `HOST` or `HOST:PORT`.
    pub host: String,
    /// `https://HOST` of the mirror.
    pub url: String,
}

impl ServiceConfig {
    /// The config in `bytes`.
    ///
    /// # Errors
    /// `InvalidConfig` with line and column.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let config: Self = parse_json("service config", bytes, &SERVICE_OBJECTS)?;
        if config.io_engine > 2 {
            let message = format!("ioEngine: found {}, expected 0, 1 or 2", config.io_engine);
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        let found = config.registries.mirrors.len();
        if found > MIRRORS_MAX {
            let message = format!("registries: found {found} mirrors, expected {MIRRORS_MAX}");
            return Err(Error::new(ErrorKind::InvalidConfig, format!("{message} at most")));
        }
        Ok(config)
    }
}

/// Keys of the service config whose values are objects.
const SERVICE_OBJECTS: [&str; 7] = [
    "cacheConfig",
    "credentialConfig",
    "download",
    "p2pConfig",
    "prefetchConfig",
    "certConfig",
    "registries",
];

/// Parses, and insists on objects at the root and under the keys `objects` (or in their lists):
/// the derived parsers would take an array as the fields in order.
fn parse_json<T: DeserializeOwned>(what: &str, bytes: &[u8], objects: &[&str]) -> Result<T> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidConfig, message);
    if to_u64(bytes.len()) > CONFIG_BYTES_MAX {
        return Err(invalid(format!("{what}: more than {CONFIG_BYTES_MAX} bytes")));
    }
    let failed = |error: serde_json::Error| {
        invalid(format!("{what}: {}", without_its_text(&error.to_string())))
    };
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(failed)?;
    let Some(root) = value.as_object() else {
        return Err(invalid(format!("{what}: expected an object at line 1 column 1")));
    };
    for key in objects {
        let items = match root.get(*key) {
            Some(serde_json::Value::Array(items)) if *key == "lowers" => items.as_slice(),
            Some(other) if *key != "lowers" => std::slice::from_ref(other),
            // Absent, or of a type that the typed parser refuses.
            _ => continue,
        };
        if items.iter().any(|item| !item.is_object() && !item.is_null()) {
            return Err(invalid(format!("{what}: expected an object in {key}")));
        }
    }
    // Without its nulls; what is wrong then is told from the text, with line and column.
    let mut value = value;
    drop_nulls(&mut value);
    T::deserialize(value).map_err(|error| {
        let told: std::result::Result<T, _> = serde_json::from_slice(bytes);
        failed(told.err().unwrap_or(error))
    })
}

/// What the parser says, without the string that it found in the place of something else: there may
/// be a password in it.
fn without_its_text(told: &str) -> String {
    const BEFORE: &str = ": string \"";
    const AFTER: &str = "\", expected ";
    match (told.find(BEFORE), told.rfind(AFTER)) {
        (Some(begin), Some(end)) if begin + BEFORE.len() <= end => {
            let (before, after) = (told.get(..begin), told.get(end + 1..));
            format!("{}: a string{}", before.unwrap_or_default(), after.unwrap_or_default())
        }
        _ => told.to_owned(),
    }
}

/// Removes every key that is `null`, as deep as the parser allowed. Not list elements: a layer that
/// is `null` is a layer that is missing.
fn drop_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// The snapshotter writes `"upper":{}` for "none".
fn upper<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<UpperConfig>, D::Error> {
    let upper: Option<UpperConfig> = Option::deserialize(deserializer)?;
    Ok(upper.filter(|upper| *upper != UpperConfig::default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the snapshotter writes it.
    const REAL: &str = r#"{"repoBlobUrl":"https://registry-1.docker.io/v2/overlaybd/redis/blobs",
        "lowers":[{"digest":"sha256:abc","size":4739584,"dir":"/snapshots/1/fs"},{"file":"/x"}],
        "upper":{},"resultFile":"/snapshots/7/block/init-debug.log"}"#;

    #[test]
    fn a_config_of_the_snapshotter_is_understood() {
        let config = ImageConfig::parse(REAL.as_bytes()).unwrap();
        assert_eq!(config.lowers.len(), 2);
        assert_eq!(config.lowers[0].size, 4_739_584);
        assert_eq!(config.upper, None);
        assert_eq!(
            config.lowers[0].local_candidates(),
            ["overlaybd.commit", ".commit", "overlaybd.sealed"]
                .map(|name| PathBuf::from("/snapshots/1/fs").join(name))
        );
        assert_eq!(config.lowers[1].local_candidates(), [PathBuf::from("/x")]);
    }

    #[test]
    fn a_string_in_the_wrong_place_is_told_by_its_place_alone() {
        for text in [
            r#"{"registries":{"mirrors":["https://u:hunter2@h"]}}"#,
            r#"{"cacheConfig":{"cacheSizeGB":"hunter2\", expected none"}}"#,
            r#"{"ioEngine":"hunter2"}"#,
        ] {
            let told = ServiceConfig::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(!told.contains("hunter2"), "{told}");
            assert!(told.contains("a string, expected"), "{told}");
            assert!(told.contains(" at line 1 column "), "{told}");
        }
    }

    #[test]
    fn unknown_keys_and_nulls_are_ignored() {
        let text = r#"{"new":[{}],"lowers":[{"file":"a","dir":null,"size":null}],"upper":null,
            "resultFile":null,"download":{"delay":null},"accelerationLayer":null}"#;
        let config = ImageConfig::parse(text.as_bytes()).unwrap();
        assert_eq!((config.lowers.len(), config.result_file.as_str()), (1, ""));
    }

    #[test]
    fn wrong_configs_are_refused_with_the_place() {
        let cases = [
            ("", ErrorKind::InvalidConfig, "line 1 column 0"),
            ("[]", ErrorKind::InvalidConfig, "line 1 column"),
            (r#"{"lowers":[{"file":"a"},null]}"#, ErrorKind::InvalidConfig, "null"),
            (r#"{"lowers":[["a"]]}"#, ErrorKind::InvalidConfig, "an object in lowers"),
            (r#"{"upper":["a","b"]}"#, ErrorKind::InvalidConfig, "an object in upper"),
            (r#"{"lowers":7}"#, ErrorKind::InvalidConfig, "line 1 column 11"),
            (r#"{"lowers":[{"size":-1}]}"#, ErrorKind::InvalidConfig, "line 1 column"),
            (r#"{"lowers":[]}"#, ErrorKind::InvalidConfig, "neither lowers nor an upper"),
            (r#"{"upper":{"data":"d"}}"#, ErrorKind::InvalidConfig, "it has no index"),
            (r#"{"upper":{"index":"i"}}"#, ErrorKind::InvalidConfig, "it has no data"),
            (
                r#"{"lowers":[{"file":"a"},{"targetFile":"t"}]}"#,
                ErrorKind::Unsupported,
                "layer 1 has targetFile: TurboOCI",
            ),
            (r#"{"lowers":[{"gzipIndex":"t"}]}"#, ErrorKind::Unsupported, "TurboOCI"),
            (r#"{"upper":{"target":"t"}}"#, ErrorKind::Unsupported, "the upper has target"),
            (
                r#"{"lowers":[{"file":"a"}],"accelerationLayer":true,"recordTracePath":"r"}"#,
                ErrorKind::InvalidConfig,
                "exclude each other",
            ),
            (
                r#"{"lowers":[{"file":"a"}],"accelerationLayer":true}"#,
                ErrorKind::InvalidConfig,
                "neither",
            ),
        ];
        for (text, kind, wanted) in cases {
            let error = ImageConfig::parse(text.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), kind, "{text}: {error}");
            assert!(error.to_string().contains(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn more_layers_than_the_stack_can_have_are_refused() {
        let text = |count: usize| {
            let lowers = vec![r#"{"file":"a"}"#; count].join(",");
            format!(r#"{{"lowers":[{lowers}]}}"#)
        };
        assert!(ImageConfig::parse(text(255).as_bytes()).is_ok());
        let error = ImageConfig::parse(text(256).as_bytes()).unwrap_err();
        assert!(error.to_string().contains("found 256 layers, expected at most 255"), "{error}");
    }

    #[test]
    fn the_trace_layer_is_no_part_of_the_stack() {
        let text = r#"{"lowers":[{"file":"a"},{"file":"trace"}],"accelerationLayer":true}"#;
        let config = ImageConfig::parse(text.as_bytes()).unwrap();
        assert_eq!(config.stack_lowers().len(), 1);
        assert_eq!(config.stack_lowers()[0].file, "a");
    }

    #[test]
    fn the_result_file_is_found_in_an_otherwise_invalid_config() {
        let cases: [(&str, Option<&str>); 6] = [
            (r#"{"resultFile":"/r","lowers":7}"#, Some("/r")),
            (r#"{"resultFile":""}"#, None),
            (r#"{"resultFile":7}"#, None),
            (r#"{"resultFile":"/r""#, Some("/r")),
            (r#"{"lowers":[{"file""#, None),
            ("[]", None),
        ];
        for (text, found) in cases {
            assert_eq!(result_file_of(text.as_bytes()).as_deref(), found, "{text}");
        }
    }

    #[test]
    fn an_empty_service_config_has_the_references_defaults() {
        let config = ServiceConfig::parse(b"{}").unwrap();
        assert_eq!(config, ServiceConfig::default());
        assert_eq!((config.download.delay, config.prefetch_config.concurrency), (300, 16));
        assert_eq!(config.cache_config.refill_size, 262_144);
    }

    #[test]
    fn a_service_config_is_read_and_checked() {
        let text = r#"{"logConfig":{"logLevel":1},"ioEngine":1,"download":{"enable":true,
            "maxMBps":7},"p2pConfig":{"enable":true,"address":"http://p"},
            "credentialConfig":{"mode":"https","server_ca_path":"/ca","client_cert_path":"/c",
            "client_key_path":"/k"}}"#;
        let config = ServiceConfig::parse(text.as_bytes()).unwrap();
        assert_eq!(
            (config.io_engine, config.download.max_mbps, config.download.delay),
            (1, 7, 300)
        );
        let service = &config.credential_config;
        let paths = [&service.server_ca_path, &service.client_cert_path, &service.client_key_path];
        assert_eq!(paths, ["/ca", "/c", "/k"]);
        let error = ServiceConfig::parse(br#"{"ioEngine":3}"#).unwrap_err();
        assert!(error.to_string().contains("ioEngine: found 3"), "{error}");
    }
}
