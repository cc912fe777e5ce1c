//! The on-disk formats: bytes in, values out.
//!
//! Pure: no file, socket, lock, clock or `unsafe` below this folder. Everything here reads hostile
//! input: bounds come before allocation, arithmetic is checked, an error says what, where, found
//! and expected. The formats themselves are told in `format-spec/`.

pub mod config;
mod flags;
pub mod lsmt;
pub mod parcel;
pub mod tar;
pub mod trace;
pub mod zfile;
