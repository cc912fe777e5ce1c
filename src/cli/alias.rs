//! The reference's tools by their names: this program under the name of one of them takes its flags
//! and answers with its exit codes, 0 for done and 1 for everything else.
//!
//! Each call is turned into one of our own commands, so that nothing is done in two ways. What a
//! tool asks for that we do not have (uploads, TurboOCI) is refused; what does nothing here (log
//! levels, where a log goes) is taken and ignored.

use clap::{ArgAction, Parser, Subcommand};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// The names, one for each tool.
pub(super) const NAMES: [&str; 6] = [
    "overlaybd-create",
    "overlaybd-commit",
    "overlaybd-merge",
    "overlaybd-zfile",
    "overlaybd-attacher",
    "overlaybd-ublk",
];

/// Exit code of whatever goes wrong.
pub(super) const EXIT_FAILED: u8 = 1;

/// The name of the tool that this program was called by, if it is one.
pub(super) fn called_as() -> Option<&'static str> {
    let program = std::env::args_os().next()?;
    let name = Path::new(&program).file_name()?.to_owned();
    NAMES.into_iter().find(|alias| name == OsStr::new(alias))
}

/// Make the two files of a writable layer
#[derive(Debug, Parser)]
#[command(name = "overlaybd-create")]
struct Create {
    /// The data file
    data_file: PathBuf,
    /// The index file
    index_file: PathBuf,
    /// Size of the disk in GiB
    vsize: u64,
    /// UUID of the layer below
    #[arg(short = 'u')]
    parent_uuid: Option<String>,
    /// In sparse form
    #[arg(short = 's')]
    sparse: bool,
    /// With an ext4 file system
    #[arg(long)]
    mkfs: bool,
    /// Not supported
    #[arg(long = "turboOCI", alias = "fastoci")]
    turbo_oci: bool,
    /// Ignored
    #[arg(long)]
    verbose: bool,
}

/// Write a writable layer as a read-only one
#[derive(Debug, Parser)]
#[command(name = "overlaybd-commit")]
struct Commit {
    /// The data file
    data_file: PathBuf,
    /// The index file; the output with --commit_sealed
    index_file: Option<PathBuf>,
    /// The output
    commit_file: Option<PathBuf>,
    /// Free text for the header
    #[arg(short = 'm')]
    message: Option<String>,
    /// UUID of the layer
    #[arg(long)]
    uuid: Option<String>,
    /// UUID of the layer below
    #[arg(short = 'p', long)]
    parent_uuid: Option<String>,
    /// Compress
    #[arg(short = 'z')]
    compress: bool,
    /// Wrap in a tar
    #[arg(short = 't')]
    tar: bool,
    /// Replace an output that exists
    #[arg(short = 'f')]
    force: bool,
    /// lz4 or zstd
    #[arg(long)]
    algorithm: Option<String>,
    /// Size of a block in KiB
    #[arg(long)]
    bs: Option<u32>,
    /// Seal where it is
    #[arg(long)]
    seal: bool,
    /// The data file is a sealed layer
    #[arg(long = "commit_sealed")]
    commit_sealed: bool,
    /// Threads
    #[arg(long = "compress_threads", default_value_t = 1)]
    threads: usize,
    /// Not supported
    #[arg(long = "turboOCI", alias = "fastoci")]
    turbo_oci: bool,
    #[command(flatten)]
    upload: Upload,
}

/// Write all layers of an image as one
#[derive(Debug, Parser)]
#[command(name = "overlaybd-merge")]
struct Merge {
    /// The image's config
    image_config_path: PathBuf,
    /// The output
    output: PathBuf,
    /// The settings of the host
    #[arg(long = "service_config_path")]
    service_config: Option<PathBuf>,
    /// Compress, which is the default; --compress=false for a raw layer
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true)]
    #[arg(default_missing_value = "true", action = ArgAction::Set)]
    compress: bool,
    /// Wrap in a tar
    #[arg(short = 't')]
    tar: bool,
    #[command(flatten)]
    upload: Upload,
}

/// Compress a file, or extract one
#[derive(Debug, Parser)]
#[command(name = "overlaybd-zfile")]
struct Zfile {
    /// The file that is read
    source_file: PathBuf,
    /// The file that is written
    target_file: PathBuf,
    /// Wrap in a tar, or expect one
    #[arg(short = 't')]
    tar: bool,
    /// Extract
    #[arg(short = 'x')]
    extract: bool,
    /// Replace a target that exists
    #[arg(short = 'f')]
    force: bool,
    /// lz4 or zstd
    #[arg(long, default_value = "lz4")]
    algorithm: String,
    /// Size of a block in KiB
    #[arg(long, default_value_t = 4)]
    bs: u32,
    /// Ignored
    #[arg(long)]
    verbose: bool,
}

/// What we do not have, and what does nothing.
#[derive(Debug, clap::Args)]
struct Upload {
    /// Not supported
    #[arg(long)]
    upload: Option<String>,
    /// Ignored
    #[arg(long = "upload_bs")]
    upload_bs: Option<i64>,
    /// Ignored
    #[arg(long = "cred_file_path")]
    cred_file_path: Option<PathBuf>,
    /// Ignored
    #[arg(long = "tls_key_path")]
    tls_key_path: Option<PathBuf>,
    /// Ignored
    #[arg(long = "tls_cert_path")]
    tls_cert_path: Option<PathBuf>,
    /// Ignored
    #[arg(long)]
    verbose: bool,
}

/// Attach and detach devices
#[derive(Debug, Parser)]
#[command(name = "overlaybd-attacher")]
struct Attacher {
    /// What to do
    #[arg(value_parser = ["attach", "detach"])]
    action: String,
    /// The number of the device
    #[arg(long)]
    id: String,
    /// The image's config
    #[arg(long)]
    config: Option<PathBuf>,
    /// Tell more
    #[arg(short = 'v', long)]
    verbose: bool,
    /// Ignored: a device has its number here
    #[arg(long = "with-devid")]
    with_devid: bool,
}

/// Devices through ublk
#[derive(Debug, Parser)]
#[command(name = "overlaybd-ublk")]
struct Ublk {
    #[command(subcommand)]
    action: UblkAction,
}

#[derive(Debug, Subcommand)]
enum UblkAction {
    /// Attach an image
    Add {
        /// Its config
        #[arg(long)]
        config: PathBuf,
        /// The number of the device
        #[arg(short = 'n', long = "dev-id")]
        id: Option<u32>,
        /// Requests in flight
        #[arg(long, default_value_t = 128)]
        depth: u16,
        /// The settings of the host
        #[arg(long = "service-config", alias = "service_config")]
        service_config: Option<PathBuf>,
        /// Ignored
        #[arg(long = "log-path", alias = "log_path")]
        log_path: Option<PathBuf>,
        /// Ignored
        #[arg(long = "cache-dir", alias = "cache_dir")]
        cache_dir: Option<PathBuf>,
        /// Ignored
        #[arg(long = "instance-id", alias = "instance_id")]
        instance_id: Option<String>,
        /// Serve in this process
        #[arg(long)]
        foreground: bool,
    },
    /// Detach a device
    Del {
        /// Its number
        #[arg(short = 'n', long = "dev-id")]
        id: u32,
        /// Whatever is in the way
        #[arg(long)]
        force: bool,
    },
    /// List the devices
    List,
}

/// Why a call of a tool is not turned into one of ours.
#[derive(Debug)]
pub(super) enum Refusal {
    /// Its arguments are wrong, or ask for help.
    Usage(clap::Error),
    /// It asks for what we do not do.
    Told(String),
}

impl From<clap::Error> for Refusal {
    fn from(error: clap::Error) -> Self {
        Self::Usage(error)
    }
}

type Translated = Result<Vec<OsString>, Refusal>;

/// Our own command line for a call of the tool `name` with these arguments, the name in front.
pub(super) fn translate(name: &str, arguments: Vec<OsString>) -> Translated {
    match name {
        "overlaybd-create" => create(Create::try_parse_from(arguments)?),
        "overlaybd-commit" => commit(Commit::try_parse_from(arguments)?),
        "overlaybd-merge" => merge(Merge::try_parse_from(arguments)?),
        "overlaybd-zfile" => zfile(Zfile::try_parse_from(arguments)?),
        "overlaybd-attacher" => Ok(attacher(Attacher::try_parse_from(arguments)?)),
        _ => Ok(ublk(Ublk::try_parse_from(arguments)?.action)),
    }
}

/// A command line in the making.
struct Line(Vec<OsString>);

impl Line {
    fn new(command: &str) -> Self {
        Self(vec!["obd-ublk".into(), command.into()])
    }

    fn flag(mut self, given: bool, flag: &str) -> Self {
        if given {
            self.0.push(flag.into());
        }
        self
    }

    fn option(mut self, option: &str, value: Option<impl Into<OsString>>) -> Self {
        if let Some(value) = value {
            // One word, so that a value that starts with a dash stays one.
            let mut word = OsString::from(option);
            word.push("=");
            word.push(value.into());
            self.0.push(word);
        }
        self
    }

    fn files(mut self, files: impl IntoIterator<Item = PathBuf>) -> Vec<OsString> {
        self.0.push("--".into());
        self.0.extend(files.into_iter().map(PathBuf::into_os_string));
        self.0
    }
}

fn refuse(asked: bool, what: &str) -> Result<(), Refusal> {
    if asked { Err(Refusal::Told(format!("{what} is not supported"))) } else { Ok(()) }
}

/// An output that is there is only replaced with -f, as the tools have it.
fn refuse_existing(output: Option<&Path>, force: bool) -> Result<(), Refusal> {
    match output.filter(|output| !force && output.symlink_metadata().is_ok()) {
        None => Ok(()),
        Some(output) => Err(Refusal::Told(format!("{} exists already", output.display()))),
    }
}

fn create(call: Create) -> Translated {
    refuse(call.turbo_oci, "TurboOCI")?;
    Ok(Line::new("create")
        .flag(call.sparse, "--sparse")
        .flag(call.mkfs, "--mkfs")
        .option("--parent-uuid", call.parent_uuid)
        .files([call.data_file, call.index_file, call.vsize.to_string().into()]))
}

fn commit(call: Commit) -> Translated {
    refuse(call.turbo_oci, "TurboOCI")?;
    refuse(call.upload.upload.is_some(), "an upload")?;
    if call.seal {
        let files = [Some(call.data_file), call.index_file].into_iter().flatten();
        return Ok(Line::new("commit").flag(true, "--seal").files(files));
    }
    let output = if call.commit_sealed { &call.index_file } else { &call.commit_file };
    refuse_existing(output.as_deref(), call.force)?;
    let codec = call.compress;
    let files = if call.commit_sealed {
        [Some(call.data_file), call.index_file, None]
    } else {
        [Some(call.data_file), call.index_file, call.commit_file]
    };
    Ok(Line::new("commit")
        .flag(call.compress, "-z")
        .flag(call.tar, "-t")
        .flag(call.commit_sealed, "--commit_sealed")
        // Ignored without -z, as there.
        .option("--algorithm", call.algorithm.filter(|_| codec))
        .option("--bs", call.bs.filter(|_| codec).map(|kib| kib.to_string()))
        .option("--threads", Some(call.threads.to_string()))
        .option("--uuid", call.uuid)
        .option("--parent-uuid", call.parent_uuid)
        .option("--user-tag", call.message)
        .files(files.into_iter().flatten()))
}

fn merge(call: Merge) -> Translated {
    refuse(call.upload.upload.is_some(), "an upload")?;
    Ok(Line::new("merge")
        .flag(!call.compress, "--raw")
        .flag(call.tar, "-t")
        .option("--service-config", call.service_config)
        .files([call.image_config_path, call.output]))
}

fn zfile(call: Zfile) -> Translated {
    refuse_existing(Some(&call.target_file), call.force)?;
    let files = [call.source_file, call.target_file];
    if call.extract {
        return Ok(Line::new("zfile").flag(true, "-x").files(files));
    }
    Ok(Line::new("zfile")
        .flag(call.tar, "-t")
        .option("--algorithm", Some(call.algorithm))
        .option("--bs", Some(call.bs.to_string()))
        .files(files))
}

fn attacher(call: Attacher) -> Vec<OsString> {
    if call.action == "detach" {
        return Line::new("detach").flag(call.verbose, "-v").files([call.id.into()]);
    }
    Line::new("attach").flag(call.verbose, "-v").option("--id", Some(call.id)).files(call.config)
}

fn ublk(action: UblkAction) -> Vec<OsString> {
    match action {
        UblkAction::Add { config, id, depth, service_config, foreground, .. } => {
            Line::new("attach")
                .flag(foreground, "--foreground")
                .option("--id", id.map(|id| id.to_string()))
                .option("--depth", Some(depth.to_string()))
                .option("--service-config", service_config)
                .files([config])
        }
        UblkAction::Del { id, force } => {
            Line::new("detach").flag(force, "--force").files([id.to_string().into()])
        }
        UblkAction::List => Line::new("list").0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> String {
        let words: Vec<OsString> = text.split(' ').map(OsString::from).collect();
        let name = NAMES.into_iter().find(|name| words[0] == *name).unwrap();
        match translate(name, words) {
            Ok(line) => {
                let words: Vec<String> =
                    line.into_iter().map(|word| word.into_string().unwrap()).collect();
                words.join(" ")
            }
            Err(Refusal::Told(told)) => format!("refused: {told}"),
            Err(Refusal::Usage(_)) => "usage".to_owned(),
        }
    }

    /// The calls that the converters make, and those that people type.
    #[test]
    fn every_call_of_a_tool_has_its_own_in_ours() {
        for (theirs, ours) in [
            ("overlaybd-create d i 64 -s --mkfs", "obd-ublk create --sparse --mkfs -- d i 64"),
            ("overlaybd-create d i 0", "obd-ublk create -- d i 0"),
            ("overlaybd-create d i 64 --turboOCI", "refused: TurboOCI is not supported"),
            ("overlaybd-create d i", "usage"),
            (
                "overlaybd-commit d i o -z -t --uuid U --parent-uuid P",
                "obd-ublk commit -z -t --threads=1 --uuid=U --parent-uuid=P -- d i o",
            ),
            (
                "overlaybd-commit -z --algorithm zstd --bs 16 --compress_threads 4 d i o -m hello",
                "obd-ublk commit -z --algorithm=zstd --bs=16 --threads=4 --user-tag=hello -- d i o",
            ),
            ("overlaybd-commit --bs 16 d i o", "obd-ublk commit --threads=1 -- d i o"),
            ("overlaybd-commit --seal d i", "obd-ublk commit --seal -- d i"),
            (
                "overlaybd-commit --commit_sealed d o -z -t",
                "obd-ublk commit -z -t --commit_sealed --threads=1 -- d o",
            ),
            ("overlaybd-commit d i /", "refused: / exists already"),
            ("overlaybd-commit d i o --upload u", "refused: an upload is not supported"),
            (
                "overlaybd-merge --service_config_path s c o",
                "obd-ublk merge --service-config=s -- c o",
            ),
            ("overlaybd-merge --compress=false c o", "obd-ublk merge --raw -- c o"),
            ("overlaybd-merge --compress -t c o", "obd-ublk merge -t -- c o"),
            ("overlaybd-zfile a b", "obd-ublk zfile --algorithm=lz4 --bs=4 -- a b"),
            ("overlaybd-zfile -x a b", "obd-ublk zfile -x -- a b"),
            ("overlaybd-zfile -x a /", "refused: / exists already"),
            ("overlaybd-zfile -f -t a b", "obd-ublk zfile -t --algorithm=lz4 --bs=4 -- a b"),
            ("overlaybd-attacher attach --id 3 --config c -v", "obd-ublk attach -v --id=3 -- c"),
            ("overlaybd-attacher detach --id 3 --config c", "obd-ublk detach -- 3"),
            ("overlaybd-attacher fly --id 3", "usage"),
            (
                "overlaybd-ublk add --config c -n 2 --depth 64 --foreground",
                "obd-ublk attach --foreground --id=2 --depth=64 -- c",
            ),
            ("overlaybd-ublk del -n 2 --force", "obd-ublk detach --force -- 2"),
            ("overlaybd-ublk list", "obd-ublk list"),
        ] {
            assert_eq!(line(theirs), ours, "{theirs}");
        }
    }

    #[test]
    fn every_translation_is_one_of_our_command_lines() {
        for call in [
            "overlaybd-create d i 64 -s -u 00000000-1111-2222-3333-444444444444",
            "overlaybd-commit -z -t --algorithm zstd --bs 16 -m x d i o -p \
             00000000-1111-2222-3333-444444444444",
            "overlaybd-commit --seal d i",
            "overlaybd-commit --commit_sealed d o -z -t",
            "overlaybd-merge --compress=false -t c o",
            "overlaybd-zfile -t a b",
            "overlaybd-zfile -x a b",
            "overlaybd-attacher attach --id 3 --config c -v --with-devid",
            "overlaybd-attacher detach --id 3 --config c",
            "overlaybd-ublk add --config c --service-config s --log-path l --cache-dir d",
            "overlaybd-ublk del -n 2",
            "overlaybd-ublk list",
        ] {
            let words: Vec<OsString> = call.split_whitespace().map(OsString::from).collect();
            let name = NAMES.into_iter().find(|name| words[0] == *name).unwrap();
            let ours = translate(name, words).unwrap();
            let parsed = super::super::definition().try_get_matches_from(&ours);
            assert!(parsed.is_ok(), "{call}: {ours:?}: {}", parsed.unwrap_err());
        }
    }
}
