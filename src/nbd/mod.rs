//! The other front end: one [`Disk`](crate::disk::Disk) for NBD clients on a Unix socket.
//!
//! ```text
//!   Server::start -- server.rs -- socket.rs      the socket's file, and whose it is
//!                       |
//!                       +-- session.rs -- protocol.rs
//!                           one thread    bytes to requests, requests to plans,
//!                           per client    answers to bytes
//! ```
//!
//! For hosts whose kernel has no ublk, and for programs that read images without a block device:
//! qemu, nbdcopy, fio, libnbd, the kernel's own nbd driver. Called by `server`, which has opened
//! the image. A read comes in on the client's thread, is read there by that thread's
//! [`Worker`](crate::disk::Worker) into the buffer that the reply leaves from, and is answered in
//! order; a client that wants more in parallel opens more connections.
//!
//! A disk that can be written is served so, in whole sectors; of another one the export says that
//! it is read-only, and a write is refused after its payload was skipped. Requests are decoded and
//! planned in one place (`protocol::plan`). A flush is one for all clients: whatever was answered
//! to any of them is durable after it. Simple replies only: a read is whole before its reply
//! begins, so that an error never comes after bytes that look good.
//!
//! This module never opens a layer, never retries a read, and never speaks TLS or TCP: a socket
//! file has an owner, a port does not.

pub mod protocol;
mod server;
mod session;
mod socket;
mod uri;
mod wire;

pub use server::Server;
pub use uri::of_socket;
