//! Arguments of the commands that make layers, and what they tell.

use super::output;
use super::output::with_progress;
use super::table::format_bytes;
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::UuidText;
use crate::format::zfile::{Algorithm, WriteOptions};
use crate::make::{Content, Identity, Made, MakeOptions, Watch, ZeroDetection, write_layer};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AlgorithmArg {
    /// Fast to read.
    Lz4,
    /// Smaller.
    Zstd,
}

/// What becomes of zeros that are stored as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ZerosArg {
    /// Blocks of 4 KiB of the disk are left out.
    Block,
    /// Single sectors are left out.
    Sector,
    /// They stay data, as with overlaybd's own tools.
    Off,
}

/// How a zfile is written.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ZfileArgs {
    /// How to compress [default: lz4]
    #[arg(long, value_enum)]
    pub(crate) algorithm: Option<AlgorithmArg>,

    /// How hard to try: 3 to 12 for lz4, 1 to 22 for zstd [default: fast for lz4, 3 for zstd]
    #[arg(long, value_name = "N")]
    pub(crate) level: Option<u8>,

    /// Size of a block in KiB: 4, 8, 16, 32 or 64 [default: 4]
    #[arg(long = "bs", value_name = "KIB")]
    pub(crate) block_kib: Option<u32>,

    /// Leave out the checksums of blocks
    #[arg(long)]
    pub(crate) no_crc: bool,
}

impl ZfileArgs {
    pub(crate) fn is_default(&self) -> bool {
        self.algorithm.is_none() && self.level.is_none() && self.block_kib.is_none() && !self.no_crc
    }

    /// The words of a command line that say the same.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut words = Vec::new();
        if let Some(algorithm) = self.algorithm.and_then(|it| it.to_possible_value()) {
            words.push(format!("--algorithm={}", algorithm.get_name()));
        }
        words.extend(self.level.map(|level| format!("--level={level}")));
        words.extend(self.block_kib.map(|kib| format!("--bs={kib}")));
        words.extend(self.no_crc.then(|| "--no-crc".to_owned()));
        words
    }

    /// # Errors
    /// `Usage` for a block size that no reader knows.
    pub(crate) fn options(&self) -> Result<WriteOptions> {
        let kib = self.block_kib.unwrap_or(4);
        let Some(block_bytes) = kib.checked_mul(1024) else {
            let message = format!("blocks of {kib} KiB: expected 4, 8, 16, 32 or 64");
            return Err(Error::new(ErrorKind::Usage, message));
        };
        Ok(WriteOptions {
            algorithm: match self.algorithm {
                None | Some(AlgorithmArg::Lz4) => Algorithm::Lz4,
                Some(AlgorithmArg::Zstd) => Algorithm::Zstd,
            },
            level: self.level.unwrap_or(0),
            block_bytes,
            block_crc: !self.no_crc,
            overwrite_header: true,
        })
    }
}

/// How a layer is written.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LayerArgs {
    #[command(flatten)]
    pub(crate) zfile: ZfileArgs,

    /// Wrap the layer as registries expect it
    #[arg(short = 't', long)]
    pub(crate) tar: bool,

    /// What becomes of zeros that are stored as data
    #[arg(long, value_enum, default_value = "block", value_name = "UNIT")]
    pub(crate) zero_detection: ZerosArg,

    /// Keep zeros as data: the same as --zero-detection off
    #[arg(long, conflicts_with = "zero_detection")]
    pub(crate) no_zero_detection: bool,

    /// Threads; they change nothing but the time [default: one for each core]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    pub(crate) threads: usize,

    /// UUID of the layer [default: that of its content]
    #[arg(long, value_parser = parse_uuid, value_name = "UUID")]
    pub(crate) uuid: Option<UuidText>,

    /// UUID of the layer below [default: that of the content]
    #[arg(short = 'p', long, value_parser = parse_uuid, value_name = "UUID")]
    pub(crate) parent_uuid: Option<UuidText>,

    /// Free text for the layer's header, at most 256 bytes
    #[arg(short = 'm', long, value_name = "TEXT")]
    pub(crate) user_tag: Option<String>,
}

impl LayerArgs {
    pub(crate) fn options(&self, compress: bool) -> Result<MakeOptions> {
        Ok(MakeOptions {
            zfile: if compress { Some(self.zfile.options()?) } else { None },
            tar: self.tar,
            zeros: match self.zero_detection {
                _ if self.no_zero_detection => ZeroDetection::Off,
                ZerosArg::Block => ZeroDetection::Blocks,
                ZerosArg::Sector => ZeroDetection::Sectors,
                ZerosArg::Off => ZeroDetection::Off,
            },
            threads: self.threads,
        })
    }

    pub(crate) fn identity(&self, content: &Content) -> Result<Identity> {
        let found = content.identity().clone();
        let identity = Identity {
            uuid: self.uuid.unwrap_or(found.uuid),
            parent_uuid: self.parent_uuid.unwrap_or(found.parent_uuid),
            ..found
        };
        match &self.user_tag {
            None => Ok(identity),
            Some(text) => identity.with_user_tag(text),
        }
    }
}

pub(crate) fn parse_uuid(text: &str) -> Result<UuidText, String> {
    UuidText::from_text(text).ok_or_else(|| "expected a UUID (8-4-4-4-12 digits)".to_owned())
}

/// Writes the layer, with a progress bar, and tells what was made.
pub(crate) fn make(
    content: &Content,
    args: &LayerArgs,
    compress: bool,
    output: &Path,
    json: bool,
) -> Result<()> {
    let (identity, options) = (args.identity(content)?, args.options(compress)?);
    let canceled = AtomicBool::new(false);
    let made = with_progress(content.data_bytes(), |done| {
        let watch = Watch { done, canceled: &canceled };
        write_layer(content, &identity, &options, output, &watch)
    })?;
    tell(&made, json)
}

/// Prints what was made.
pub(crate) fn tell(made: &Made, json: bool) -> Result<()> {
    if json {
        return output::print_facts(facts(made), true);
    }
    let mut text = format!(
        "{} in the file, {} before compression",
        format_bytes(made.file_bytes),
        format_bytes(made.content_bytes)
    );
    if made.entries > 0 {
        let zeroed = made.zeroed_sectors.saturating_mul(512);
        text.push_str(&format!(", {} entries, {} zeroed", made.entries, format_bytes(zeroed)));
    }
    if made.relaxed {
        text.push_str(", blank sectors in each block so that overlaybd can read it");
    }
    output::print(&format!("{text}\n"))
}

fn facts(made: &Made) -> Value {
    json!({
        "file_bytes": made.file_bytes,
        "content_bytes": made.content_bytes,
        "data_sectors": made.data_sectors,
        "zeroed_sectors": made.zeroed_sectors,
        "entries": made.entries,
        "blocks": made.blocks,
        "relaxed": made.relaxed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Words {
        #[command(flatten)]
        zfile: ZfileArgs,
    }

    #[test]
    fn arguments_say_what_they_were_parsed_from() {
        for words in [
            &[][..],
            &["--algorithm=zstd"],
            &["--algorithm=lz4", "--level=9", "--bs=64", "--no-crc"],
        ] {
            let all = std::iter::once("x").chain(words.iter().copied());
            assert_eq!(Words::try_parse_from(all).unwrap().zfile.arguments(), words);
        }
    }
}
