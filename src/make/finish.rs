//! From the first byte of the output to the last: wrappers, headers, pieces, index, trailer.

use super::Made;
use super::content::{Content, Feed, Identity};
use super::layout::{Cutter, Fit, Layout};
use super::options::{MakeOptions, Watch};
use super::pipeline::{Pipeline, Placer, Stop, Written};
use super::sink::{Nowhere, Sink};
use crate::error::{Error, ErrorKind, Result};
use crate::format::lsmt::{Flags, Header, SegmentMapping, encode_committed_index};
use crate::format::tar;
use crate::format::zfile::{self, Totals, finished_records};
use crate::image::Payload;
use crate::limits::{MAKE_TABLE_BYTES, ZFILE_BLOCKS_MAX};
use crate::units::{SECTOR_SIZE, to_u64, to_usize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

/// One layer, or one file, to be made.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) options: &'a MakeOptions,
    pub(super) watch: &'a Watch<'a>,
    /// Where a file without a name may lie.
    pub(super) folder: &'a Path,
    /// What the output is called.
    pub(super) name: &'a str,
}

impl Job<'_> {
    /// See [`super::write_layer`].
    pub(super) fn write_layer(
        &self,
        content: &Content,
        identity: &Identity,
        sink: &dyn Sink,
    ) -> Result<Made> {
        for relaxed in [false, true] {
            if relaxed {
                self.check_relaxed(content)?;
            }
            match self.try_layer(content, identity, sink, relaxed) {
                Ok(made) => return Ok(made),
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::LongRecord) => {
                    let told = |error| Error::io(format!("empty {}", self.name), &error);
                    sink.clear().map_err(told)?;
                    self.watch.done.store(0, Ordering::Relaxed);
                }
            }
        }
        Err(long_record(self.name))
    }

    /// Refuses content that makes too many entries when it is laid out relaxed, before anything is
    /// written. Where that depends on what is read, it is read and laid out without being stored.
    fn check_relaxed(&self, content: &Content) -> Result<()> {
        let finds_zeros = self.options.zeros.granule_sectors().is_some();
        if content.relaxed_entries().fit(finds_zeros)? == Fit::Sure {
            return Ok(());
        }
        let options = MakeOptions { zfile: None, ..self.options.clone() };
        let job = Job { options: &options, ..*self };
        let cutter = Cutter::new(to_usize(SECTOR_SIZE).unwrap_or(1), Vec::new());
        let placer = Placer { layout: Some(Layout::relaxed()), cutter };
        let feed = Feed::Layer(content);
        let tried = job.run(feed, &Nowhere, placer, content.data_bytes(), |_| Ok(Vec::new()));
        self.watch.done.store(0, Ordering::Relaxed);
        match tried {
            Ok(_) => Ok(()),
            Err(Stop::Failed(error)) => Err(error),
            Err(Stop::LongRecord) => Err(long_record(self.name)),
        }
    }

    /// See [`super::compress_file`].
    pub(super) fn compress(&self, payload: &Payload, sink: &dyn Sink) -> Result<Made> {
        self.options.check()?;
        let Some(zfile) = &self.options.zfile else {
            return Err(Error::new(ErrorKind::Usage, "compress a file: without a codec"));
        };
        let block_bytes = to_usize(u64::from(zfile.block_bytes)).unwrap_or(1);
        let cutter = Cutter::new(block_bytes, Vec::new());
        let placer = Placer { layout: None, cutter };
        let feed = Feed::File(payload);
        let made = self.run(feed, sink, placer, payload.bytes(), |_| Ok(Vec::new()));
        made.map_err(|stop| match stop {
            Stop::Failed(error) => error,
            Stop::LongRecord => long_record(self.name),
        })
    }

    fn try_layer(
        &self,
        content: &Content,
        identity: &Identity,
        sink: &dyn Sink,
        relaxed: bool,
    ) -> Result<Made, Stop> {
        self.options.check()?;
        let mut header = Header::new(
            Flags::HEADER.with(Flags::DATA_FILE).with(Flags::SEALED),
            identity.virtual_bytes,
            identity.uuid,
            identity.parent_uuid,
        );
        header.user_tag = identity.user_tag;
        let feed = Feed::Layer(content);
        let layout =
            if relaxed { Layout::relaxed() } else { Layout::new(feed.cursor(false).entries_left)? };
        let zfile = self.options.zfile.as_ref();
        let block_bytes = zfile.map_or(SECTOR_SIZE, |zfile| u64::from(zfile.block_bytes));
        let cutter = Cutter::new(to_usize(block_bytes).unwrap_or(1), header.encode());
        let placer = Placer { layout: Some(layout), cutter };
        let made = self.run(feed, sink, placer, content.data_bytes(), |placer| {
            Ok(layer_end(placer, &header))
        })?;
        Ok(Made { relaxed, ..made })
    }

    /// All of it: `end` tells what follows the pieces.
    fn run(
        &self,
        feed: Feed<'_>,
        sink: &dyn Sink,
        placer: Placer,
        bytes_at_most: u64,
        end: impl FnOnce(&Placer) -> Result<Vec<u8>>,
    ) -> Result<Made, Stop> {
        let spill = self.spill(bytes_at_most)?;
        let pipeline = Pipeline {
            feed,
            options: self.options,
            watch: self.watch,
            sink,
            name: self.name,
            base_byte: if self.options.tar { tar::WRITTEN_HEAD_BYTES } else { 0 },
            spill: spill.as_ref(),
        };
        let first_byte = if self.options.zfile.is_some() { zfile::HEADER_BYTES } else { 0 };
        let mut written = pipeline.run(placer, first_byte)?;
        let mut rest = written.placer.cutter.take_rest();
        let content_bytes = written.placer.cutter.content_bytes;
        if self.options.zfile.is_none() {
            // Pieces of a raw layer lie where the cutter says; nothing of them is in the table.
            written.at_byte = content_bytes - to_u64(rest.len());
        }
        let tail = end(&written.placer)?;
        let content_bytes = content_bytes + to_u64(tail.len());
        rest.extend_from_slice(&tail);
        pipeline.append(&mut written, &rest)?;
        let file_bytes = self.close(&pipeline, &mut written, content_bytes)?;
        let layout = written.placer.layout.as_ref();
        Ok(Made {
            file_bytes,
            content_bytes,
            data_sectors: layout.map_or(0, |layout| layout.data_sectors),
            zeroed_sectors: layout.map_or(0, |layout| layout.zeroed_sectors),
            entries: layout.map_or(0, |layout| to_u64(layout.entries().len())),
            blocks: written.table.blocks,
            relaxed: false,
        })
    }

    /// Room for the jump table of what may become of so many bytes, unless it fits the memory.
    fn spill(&self, bytes_at_most: u64) -> Result<Option<File>> {
        let Some(zfile) = &self.options.zfile else { return Ok(None) };
        let blocks = bytes_at_most / u64::from(zfile.block_bytes).max(1);
        if blocks > ZFILE_BLOCKS_MAX - (1 << 20) {
            let message = format!("{blocks} blocks: at most {ZFILE_BLOCKS_MAX} can be read back");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if blocks.saturating_mul(4) < to_u64(MAKE_TABLE_BYTES) {
            return Ok(None);
        }
        let made = tempfile::tempfile_in(self.folder);
        let told = |error| Error::io(format!("make room beside {}", self.name), &error);
        made.map(Some).map_err(told)
    }

    /// Jump table, trailer, headers and wrapper. Returns the length of the file.
    fn close(
        &self,
        pipeline: &Pipeline<'_>,
        written: &mut Written,
        content_bytes: u64,
    ) -> Result<u64> {
        if let Some(options) = &self.options.zfile {
            let table = &written.table;
            let totals = Totals {
                index_offset_bytes: written.at_byte,
                block_count: table.blocks,
                original_bytes: content_bytes,
                index_crc: table.crc,
            };
            let mut at_byte = written.at_byte;
            if let Some(spill) = pipeline.spill {
                at_byte = self.copy_spill(pipeline, spill, table.spilled, at_byte)?;
            }
            pipeline.write(at_byte, &table.bytes)?;
            at_byte += to_u64(table.bytes.len());
            let [header, trailer] = finished_records(options, &totals);
            pipeline.write(at_byte, &trailer)?;
            pipeline.write(0, &header)?;
            written.at_byte = at_byte + to_u64(trailer.len());
        }
        if !self.options.tar {
            return Ok(written.at_byte);
        }
        let tail = tar::encode_tail(written.at_byte);
        pipeline.write(written.at_byte, &tail)?;
        pipeline.write_raw(0, &tar::encode_head(written.at_byte))?;
        Ok(pipeline.base_byte + written.at_byte + to_u64(tail.len()))
    }

    fn copy_spill(
        &self,
        pipeline: &Pipeline<'_>,
        spill: &File,
        bytes: u64,
        at_byte: u64,
    ) -> Result<u64> {
        let mut buffer = vec![0; MAKE_TABLE_BYTES];
        let mut done = 0;
        while done < bytes {
            let len = (bytes - done).min(to_u64(buffer.len()));
            let part = buffer.get_mut(..to_usize(len).unwrap_or(0)).unwrap_or_default();
            spill.read_exact_at(part, done).map_err(|error| {
                Error::io(format!("read back the jump table of {}", self.name), &error)
            })?;
            pipeline.write(at_byte + done, part)?;
            done += len;
        }
        Ok(at_byte + bytes)
    }
}

/// The index and the trailer of a layer with this header.
fn layer_end(placer: &Placer, header: &Header) -> Vec<u8> {
    let layout = placer.layout.as_ref();
    let mut end = vec![0; layout.map_or(0, Layout::blank_end_bytes)];
    let index = encode_committed_index(layout.map_or(&[], Layout::entries));
    let mut trailer = header.clone();
    trailer.flags = Flags::DATA_FILE.with(Flags::SEALED);
    trailer.index_offset_bytes = placer.cutter.content_bytes + to_u64(end.len());
    trailer.index_entries = to_u64(index.len() / SegmentMapping::BYTES);
    end.extend_from_slice(&index);
    end.extend_from_slice(&trailer.encode());
    end
}

#[cold]
fn long_record(name: &str) -> Error {
    let message = format!(
        "{name}: blocks of 64 KiB that do not compress: the reference's reader, whose buffer has \
         64 KiB, could not read them; choose blocks of 32 KiB or less"
    );
    Error::new(ErrorKind::Unsupported, message)
}
