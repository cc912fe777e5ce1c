//! `obd-ublk`: layered overlaybd container images as Linux block devices.
//!
//! ```text
//!   cli ------------- server -------- ublk, nbd      what people run; the kernel, or a socket
//!                       |                  |
//!                       +----- image ------+         one open disk: plan, fetch, decode
//!                            /   |   \
//!                      source   map   format         bytes, addresses, meaning
//! ```
//!
//! A blob that lies elsewhere is read through [`cache`], which keeps what was fetched of it.
//!
//! A writable image puts [`upper`] between the image and those: the pair of files that is written.
//!
//! [`make`] goes the other way: it reads what an image is made of and writes layers.
//!
//! Layers that lie elsewhere are fetched by `registry`, a leaf beside these (feature `registry`).
//!
//! A read walks down once: the front end asks a [`disk::Disk`]; the image asks the merged
//! [`map`] which layer holds each sector; a layer's bytes come from a [`source`] (a mapped file),
//! through the zfile codec in [`mod@format`] where the layer is compressed, straight into the
//! request's buffer. `format` and `map` are pure. `tests/tidy.rs` enforces who may import whom.

pub mod cache;
pub mod disk;
pub mod error;
pub mod format;
pub mod image;
pub mod limits;
pub mod make;
pub mod map;
pub mod nbd;
pub mod server;
pub mod source;
pub mod telemetry;
pub mod units;
pub mod upper;
pub mod waiting;

#[cfg(feature = "registry")]
pub mod registry;

pub mod cli;
#[cfg(feature = "ublk")]
pub mod ublk;
