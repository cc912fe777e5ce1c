//! `serve`: an image for programs that speak NBD, where there is no ublk or no need of it.

use super::args::DeadlineArgs;
use super::output;
use crate::error::Result;
use crate::server::{self, NbdOptions, NbdServing};
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Serve an image to NBD clients on a Unix socket and print its address
///
/// Works without ublk and without root. Serves in this process until SIGTERM or SIGINT; requests
/// in flight are finished. The socket can be used by its owner only, and is removed at the end.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image's config.v1.json, or the file of one layer, which is served by itself
    #[arg(value_name = "CONFIG|LAYER")]
    config: PathBuf,

    /// Where to listen
    #[arg(long, value_name = "unix:PATH", value_parser = SocketAddress)]
    nbd: PathBuf,

    /// Serve an image that has a writable upper without writes
    #[arg(long)]
    read_only: bool,

    /// The settings of the host [default: /etc/overlaybd/overlaybd.json if it exists]
    #[arg(long, value_name = "FILE")]
    service_config: Option<PathBuf>,

    #[command(flatten)]
    deadline: DeadlineArgs,

    /// Print what is served as JSON instead of the bare address
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let options = NbdOptions {
        config: args.config.clone(),
        service_config: args.service_config.clone(),
        read_only: args.read_only,
        socket: args.nbd.clone(),
        io_deadline_s: args.deadline.io_deadline,
    };
    server::serve_nbd(&options, |serving| output::print_or_fail(&line(args.json, serving)))
}

fn line(json: bool, serving: &NbdServing) -> String {
    if !json {
        return format!("{}\n", serving.uri);
    }
    let facts = json!({
        "uri": serving.uri,
        "socket": serving.socket.display().to_string(),
        "size_bytes": serving.size_bytes,
        "read_only": serving.read_only,
    });
    format!("{facts}\n")
}

/// Takes `unix:PATH` apart. Paths need not be UTF-8.
#[derive(Clone)]
struct SocketAddress;

impl clap::builder::TypedValueParser for SocketAddress {
    type Value = PathBuf;

    fn parse_ref(
        &self,
        command: &clap::Command,
        _argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> std::result::Result<PathBuf, clap::Error> {
        socket_path(value).ok_or_else(|| {
            let message = format!("--nbd takes unix:PATH, found {}\n", value.display());
            clap::Error::raw(clap::error::ErrorKind::InvalidValue, message).with_cmd(command)
        })
    }
}

fn socket_path(address: &OsStr) -> Option<PathBuf> {
    let path = address.as_bytes().strip_prefix(b"unix:").filter(|path| !path.is_empty())?;
    Some(PathBuf::from(OsString::from_vec(path.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_unix_path() {
        for (address, path) in [
            (&b"unix:/run/s"[..], Some(&b"/run/s"[..])),
            (b"unix:s", Some(b"s")),
            (b"unix:unix:s", Some(b"unix:s")),
            (b"unix:/\xff", Some(b"/\xff")),
            (b"unix:", None),
            (b"/run/s", None),
            (b"tcp:10809", None),
            (b"", None),
        ] {
            let found = socket_path(OsStr::from_bytes(address));
            let found = found.as_deref().map(|path| path.as_os_str().as_bytes());
            assert_eq!(found, path, "{}", address.escape_ascii());
        }
    }

    #[test]
    fn the_line_is_the_address_or_json() {
        let serving = NbdServing {
            uri: "nbd+unix:///?socket=/s".to_owned(),
            socket: "/s".into(),
            size_bytes: 4096,
            read_only: true,
        };
        assert_eq!(line(false, &serving), "nbd+unix:///?socket=/s\n");
        let expected =
            r#"{"uri":"nbd+unix:///?socket=/s","socket":"/s","size_bytes":4096,"read_only":true}"#;
        assert_eq!(line(true, &serving), format!("{expected}\n"));
    }
}
