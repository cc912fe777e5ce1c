//! Blobs that lie in an OCI registry, as a source of bytes.
//!
//! ```text
//!   image                    docker://REF, oci-layout:DIR -> layers, every document verified
//!   blob (source::Fetch)     ranges of one blob, in pieces, by several connections
//!     tries                  again, with pauses, until it works or there is no point
//!       route                one way: the registry, a mirror, a peer; redirects, remembered
//!         access             what to show, renewed in time; a line for those who were refused
//!         |  refusals, token, credentials, credential_file, flight
//!         transport          one request and one answer, at a pace that is watched
//!            resolver, runtime
//!
//!   range  challenge  retry  rest  holds  redirect  reference  digest  blob_url  manifest
//!                            text and numbers
//! ```
//!
//! `image` opens blobs and hands them to `cache`, which knows only [`Fetch`](crate::source::Fetch);
//! nothing here keeps bytes. The files at the bottom are pure: what an answer means is decided
//! there, and tested without a socket.
//!
//! **Ways.** Peers and mirrors are asked first, and the registry where they fail. One that cannot
//! be reached rests, longer each time; one that gave wrong bytes is gone past for as long as
//! whoever noticed says so ([`fetch_from_origin`](crate::source::Fetch::fetch_from_origin)).
//!
//! **Strict.** Only a 206 with the Content-Range asked for, or a 200 from the start of a small
//! blob, is data. What is shorter, longer, shifted or encoded is an error, asked for again a few
//! times. Nothing is trusted further than that: a blob's content is checked by the codecs and, when
//! it is complete, by its digest.
//!
//! **Patient, within a deadline.** What passes is retried with growing pauses and jitter, from
//! where it stopped. All that concerns one registry shares a budget of retries. Whoever asks for a
//! pause with `Retry-After`, be it a registry, store, mirror or token server, gets it from
//! everybody, and others serve meanwhile. A refusal (401, 403) waits for a credential that works.
//! What will not change (404, 416, another length, a digest, a certificate) fails at once. The
//! error's kind is that of the last thing that went wrong, so that errno and exit code say why.
//!
//! **Apart.** Calls block their own thread; sockets are polled by threads that the process has for
//! this, started at first use, on which nothing blocks. Each host, whatever its part, and each blob
//! has its own line of requests: one that is slow delays nobody else. One that floods us with what
//! is no data delays what shares its thread: the first four registries have one each, and their
//! mirrors and stores are on it. No lock is held across I/O.
//!
//! **Discreet.** Credentials go to the origin that they are for, to the realm that it names, and to
//! a peer-to-peer prefix that was configured; never to a mirror or the target of a redirect. The
//! prefix is that of an agent which pulls in the reader's name, as Dragonfly's and the reference's
//! do, and cannot pull without; a mirror answers for itself, by credentials for its own host.
//! Passwords and tokens are [`Secret`]; URLs are shown without query and user; what helpers and
//! files contain is not repeated.
//!
//! Why HTTP/1.1 only: parallel ranges want connections of their own, not shares of one flow-control
//! window, and a connection that hangs should take one request with it.

mod access;
mod blob;
mod blob_url;
mod challenge;
mod client;
mod credential_file;
mod credentials;
mod digest;
mod fault;
mod flight;
#[cfg(test)]
mod flight_tests;
mod holds;
mod image;
mod manifest;
mod options;
mod range;
mod redirect;
mod reference;
mod refusals;
mod resolver;
mod rest;
mod retry;
mod route;
mod runtime;
mod secret;
mod sync;
mod token;
mod transport;
mod tries;

pub use blob::Blob;
pub use blob_url::{BlobPlace, Origin};
pub use client::{Counts, Registry};
pub use credentials::Source as CredentialSource;
pub use digest::Digest;
pub use fault::result_text;
pub use image::{Image, Layer, open_layout};
pub use manifest::Platform;
pub use options::{Mirror, Options, Pace};
pub use reference::Reference;
pub use secret::Secret;
