//! An image for NBD clients, in this process, until a signal ends it.
//!
//! Needs no driver, no privilege and no folder of devices: the socket's file is all there is. The
//! result file and the refusal of writable configs are those of `attach`.

use super::control::Event;
use super::prepare::{Prepared, prepare, report};
use super::result_file::ResultFile;
use super::serve::check_not_told_to_stop;
use super::served_disk::{How, ServedDisk, Upper};
use super::signals;
use crate::error::{Error, Result};
use crate::image::{Background, HostSettings};
use crate::nbd::{self, Server};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

/// What is to be served to NBD clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// The config.
    pub config: PathBuf,
    /// The service config, if one was given.
    pub service_config: Option<PathBuf>,
    /// Whether a writable config is to be served without writes.
    pub read_only: bool,
    /// Where the socket is to be.
    pub socket: PathBuf,
    /// How long a read of a layer in a registry may take, in seconds, if not the default.
    pub io_deadline_s: Option<u64>,
}

/// A socket that clients can connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdServing {
    /// Its address, as NBD clients take it.
    pub uri: String,
    /// Absolute path of the socket.
    pub socket: PathBuf,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// Serves in this process until SIGTERM, SIGINT or SIGHUP. `announce` is called once, when clients
/// can connect and the result file says so.
///
/// # Errors
/// Whatever keeps the image from being served, also in the result file. Nothing is left then.
pub fn serve_nbd(
    options: &NbdOptions,
    announce: impl FnOnce(&NbdServing) -> Result<()>,
) -> Result<()> {
    signals::block()?;
    let host = HostSettings {
        service_config: options.service_config.as_deref(),
        io_deadline_seconds: options.io_deadline_s,
    };
    let prepared = prepare(&options.config, host, options.read_only, None)?;
    let how = How {
        read_only: prepared.read_only,
        make_upper: false,
        quota_bytes: None,
        io_deadline_s: options.io_deadline_s,
    };
    let (sender, inbox) = channel();
    let up = signals::forward(sender)
        .and_then(|()| bring_up((&prepared, how), &options.socket, &inbox, announce));
    let Up { server, upper, background } =
        up.inspect_err(|error| report(prepared.result_file.as_ref(), error))?;
    // Kept open, the result file would keep its file system from being unmounted.
    drop(prepared);
    // Its sender lives as long as the process.
    while let Ok(event) = inbox.recv() {
        if let Event::Signal(name) = event {
            tracing::info!(signal = name, "asked to end");
            break;
        }
    }
    if let Some(background) = &background {
        background.end();
    }
    server.stop();
    tracing::info!("the socket is gone");
    upper.map_or(Ok(()), |upper| upper.close())
}

/// What serves.
struct Up {
    server: Server,
    upper: Option<Upper>,
    background: Option<Arc<Background>>,
}

fn bring_up(
    (prepared, how): (&Prepared, How),
    socket: &Path,
    inbox: &Receiver<Event>,
    announce: impl FnOnce(&NbdServing) -> Result<()>,
) -> Result<Up> {
    let config = &prepared.config;
    let socket = std::path::absolute(socket)
        .map_err(|error| Error::io(format!("find socket {}", socket.display()), &error))?;
    let service_config = prepared.service_config.as_deref();
    let disk = ServedDisk::open(config, &prepared.text, service_config, how)?;
    let (upper, background) = (disk.upper(), disk.background());
    let read_only = upper.is_none();
    let server = Server::start(disk, &socket)?;
    let size_bytes = server.export().size_bytes;
    let uri = nbd::of_socket(&socket);
    tracing::info!(config = %config.display(), %uri, size_bytes, "serving");
    let reported = prepared.result_file.as_ref().map_or(Ok(()), ResultFile::succeeded);
    let announced = reported.and_then(|()| {
        check_not_told_to_stop(inbox, drop)?;
        announce(&NbdServing { uri, socket, size_bytes, read_only })
    });
    match announced {
        Ok(()) => Ok(Up { server, upper, background }),
        Err(error) => {
            server.stop();
            // Nothing was written.
            if let Some(Err(left)) = upper.map(|upper| upper.close()) {
                tracing::warn!("{left:#}");
            }
            Err(error)
        }
    }
}
