//! What the format's rules say of a layer, written down a second time: nothing here uses the
//! program's own parsers, encoders or checksums.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

/// A layer that was taken apart.
pub(crate) struct Checked {
    pub(crate) virtual_bytes: u64,
    pub(crate) uuid: String,
    pub(crate) parent_uuid: String,
    pub(crate) tag: Vec<u8>,
    /// Start sector, sectors, mapped sector, zeroed.
    pub(crate) entries: Vec<(u64, u64, u64, bool)>,
    /// The LSMT file.
    pub(crate) lsmt: Vec<u8>,
    pub(crate) zfile: Option<Zfile>,
}

/// What a zfile's header says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Zfile {
    pub(crate) algorithm: u8,
    pub(crate) level: u8,
    pub(crate) block_bytes: usize,
    pub(crate) has_crc: bool,
    pub(crate) records: usize,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn size(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

/// Raw CRC-32C, bit by bit with a table made here.
pub(crate) fn crc(seed: u32, bytes: &[u8]) -> u32 {
    static TABLE: std::sync::OnceLock<[u32; 256]> = std::sync::OnceLock::new();
    let table = TABLE.get_or_init(|| {
        std::array::from_fn(|at| {
            let mut value = u32::try_from(at).unwrap();
            for _ in 0..8 {
                value = if value & 1 == 1 { (value >> 1) ^ 0x82f6_3b78 } else { value >> 1 };
            }
            value
        })
    });
    bytes.iter().fold(seed, |crc, &byte| {
        let at = usize::try_from((crc ^ u32::from(byte)) & 0xff).unwrap();
        table[at] ^ (crc >> 8)
    })
}

/// Checks every rule and takes the layer apart.
pub(crate) fn check(file: &[u8]) -> Checked {
    let payload = check_tar(file);
    let (lsmt, zfile) = match payload.starts_with(b"ZFile\0\x01\0tuji.yyf@Alibaba") {
        true => {
            let (content, zfile) = check_zfile(payload);
            (content, Some(zfile))
        }
        false => (payload.to_vec(), None),
    };
    check_lsmt(lsmt, zfile)
}

fn check_tar(file: &[u8]) -> &[u8] {
    if &file[257..262] != b"ustar" {
        return file;
    }
    let octal = |at: usize, len: usize| {
        let text = std::str::from_utf8(&file[at..at + len]).unwrap();
        u64::from_str_radix(text.trim_matches([' ', '\0']), 8).unwrap()
    };
    for at in [0, 1024] {
        let mut header = file[at..at + 512].to_vec();
        let stored = octal(at + 148, 8);
        header[148..156].fill(b' ');
        assert_eq!(header.iter().map(|&byte| u64::from(byte)).sum::<u64>(), stored, "tar checksum");
        assert_eq!(&header[257..265], b"ustar\x0000");
    }
    assert!(file.starts_with(b"overlaybd.pax\0") && file[156] == b'x');
    assert!(file[1024..].starts_with(b"overlaybd.commit\0") && file[1024 + 156] == b'0');
    assert_eq!(octal(1024 + 124, 12), 0, "the size is in the pax record alone");
    let length = size(octal(124, 12));
    let record = std::str::from_utf8(&file[512..512 + length]).unwrap();
    let (told, rest) = record.split_once(" size=").unwrap();
    assert_eq!(told.parse::<usize>().unwrap(), length);
    let bytes: usize = rest.strip_suffix('\n').unwrap().parse().unwrap();
    assert!(file[512 + length..1024].iter().all(|&byte| byte == 0));
    let end = 1536 + bytes;
    assert_eq!(file.len(), end.next_multiple_of(512) + 1024, "two blocks of zeros at the end");
    assert!(file[end..].iter().all(|&byte| byte == 0));
    &file[1536..end]
}

fn check_zfile_record(record: &[u8], flags: u64) {
    assert!(record.starts_with(b"ZFile\0\x01\0tuji.yyf@Alibaba"));
    assert_eq!(u32_at(record, 24), 96);
    assert_eq!(u64_at(record, 32), flags);
    let mut blank = record.to_vec();
    blank[28..32].fill(0);
    assert_eq!(u32_at(record, 28), crc(0, &blank), "digest");
    assert!(record[96..].iter().all(|&byte| byte == 0));
    assert_eq!((u32_at(record, 68), record[78], record[79]), (0, 0, 0));
    assert_eq!((u32_at(record, 80), u32_at(record, 84)), (0, 0), "no dictionary");
}

/// The content and what the header says.
pub(crate) fn check_zfile(file: &[u8]) -> (Vec<u8>, Zfile) {
    let (header, trailer) = (&file[..512], &file[file.len() - 512..]);
    check_zfile_record(header, 0b11011);
    check_zfile_record(trailer, 0b10110);
    assert_eq!(header[40..96], trailer[40..96], "the header says what the trailer says");
    let (index, count) = (size(u64_at(trailer, 40)), size(u64_at(trailer, 48)));
    let original = size(u64_at(trailer, 56));
    let block_bytes = size(u64::from(u32_at(trailer, 72)));
    assert!([4096, 8192, 16384, 32768, 65536].contains(&block_bytes));
    assert_eq!(count, original.div_ceil(block_bytes));
    assert_eq!(index + 4 * count + 512, file.len());
    let table = &file[index..index + 4 * count];
    assert_eq!(crc(0, table), u32_at(trailer, 64), "checksum of the jump table");
    let has_crc = trailer[88] == 1;
    assert!(trailer[88] <= 1 && trailer[89..96] == [0; 7]);
    let lengths: Vec<usize> =
        table.chunks(4).map(|entry| size(u64::from(u32_at(entry, 0)))).collect();
    // The reference keeps offsets in a group of 64 KiB as 16 bits.
    for group in lengths.chunks(65536 / block_bytes) {
        assert!(group[..group.len() - 1].iter().sum::<usize>() < 65535);
    }
    let (mut at, mut content) = (512, Vec::with_capacity(original));
    for &length in &lengths {
        assert!(length <= 65536, "the reference fetches at most 64 KiB, found {length}");
        assert!(length > if has_crc { 4 } else { 0 });
        let mut body = &file[at..at + length];
        if has_crc {
            let (front, stored) = body.split_at(length - 4);
            assert_eq!(crc(100_007, front), u32_at(stored, 0), "checksum of a block");
            body = front;
        }
        let mut block = vec![0; block_bytes.min(original - content.len())];
        let len = match trailer[76] {
            1 => lzzzz::lz4::decompress(body, &mut block).unwrap(),
            2 => zstd::bulk::decompress_to_buffer(body, &mut block).unwrap(),
            other => panic!("algorithm {other}"),
        };
        assert_eq!(len, block.len());
        content.extend_from_slice(&block);
        at += length;
    }
    assert_eq!(at, index, "blocks lie without gaps");
    assert_eq!(content.len(), original);
    let (algorithm, level) = (trailer[76], trailer[77]);
    (content, Zfile { algorithm, level, block_bytes, has_crc, records: count })
}

const MAGIC: [u8; 24] = [
    0x4c, 0x53, 0x4d, 0x54, 0, 1, 2, 0, 0x65, 0x7e, 0x63, 0xd2, 0x94, 0x44, 0x08, 0x4c, 0xa2, 0xd2,
    0xc8, 0xec, 0x4f, 0xcf, 0xae, 0x8a,
];

fn check_lsmt_record(record: &[u8], flags: u32) {
    assert!(record.starts_with(&MAGIC));
    assert_eq!((u32_at(record, 24), u32_at(record, 28)), (390, flags));
    assert_eq!(record[130..134], [0, 0, 1, 1], "reserved, version 1.1");
    assert!(record[390..4096].iter().all(|&byte| byte == 0));
    assert_eq!((record[92], record[129]), (0, 0), "UUIDs end with a NUL");
}

fn check_lsmt(lsmt: Vec<u8>, zfile: Option<Zfile>) -> Checked {
    let trailer_at = lsmt.len() - 4096;
    let (header, trailer) = (&lsmt[..4096], &lsmt[trailer_at..]);
    check_lsmt_record(header, 0b111);
    check_lsmt_record(trailer, 0b110);
    assert_eq!((u64_at(header, 32), u64_at(header, 40)), (0, 0));
    assert_eq!(header[48..390], trailer[48..390], "the header says what the trailer says");
    let (index, count) = (size(u64_at(trailer, 32)), size(u64_at(trailer, 40)));
    assert!(index >= 4096 && index.is_multiple_of(512));
    assert!(count.is_multiple_of(256) && count <= 1_000_000);
    assert_eq!(index + 16 * count, trailer_at, "the trailer follows the index");
    let virtual_bytes = u64_at(trailer, 48);
    let (mut entries, mut padding) = (Vec::new(), 0);
    let data_end = u64::try_from(index / 512).unwrap();
    let (mut free_lba, mut free_mapped) = (0, 8);
    for entry in lsmt[index..trailer_at].chunks(16) {
        let (place, mapped) = (u64_at(entry, 0), u64_at(entry, 8));
        let (start, length) = (place & ((1 << 50) - 1), place >> 50);
        if start == (1 << 50) - 1 {
            assert_eq!((length, mapped), (0, 0));
            padding += 1;
            continue;
        }
        assert_eq!(padding, 0, "padding comes last");
        let (sector, zeroed, tag) = (mapped & ((1 << 55) - 1), mapped >> 55 & 1 == 1, mapped >> 56);
        assert_eq!(tag, 0);
        assert!(length > 0 && start >= free_lba, "sorted, free of overlap");
        assert!(start + length <= virtual_bytes / 512 || virtual_bytes == 0, "on the disk");
        let end = if zeroed { sector } else { sector + length };
        assert!(sector >= 8 && end <= data_end, "mapped inside the data");
        assert!(sector >= free_mapped, "data lies in the order of the disk");
        (free_lba, free_mapped) = (start + length, end);
        entries.push((start, length, sector, zeroed));
    }
    assert!(padding < 256);
    let text = |at: usize| String::from_utf8(trailer[at..at + 36].to_vec()).unwrap();
    Checked {
        virtual_bytes,
        uuid: text(56),
        parent_uuid: text(93),
        tag: trailer[134..390].to_vec(),
        entries,
        lsmt,
        zfile,
    }
}

/// What a layer says of each sector of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sector {
    Nothing,
    Zeroed,
    Data(Vec<u8>),
}

impl Checked {
    /// The layer, sector by sector.
    pub(crate) fn sectors(&self) -> Vec<Sector> {
        let mut disk = vec![Sector::Nothing; size(self.virtual_bytes / 512)];
        for &(start, length, mapped, zeroed) in &self.entries {
            for at in 0..length {
                let place = size(mapped + at) * 512;
                disk[size(start + at)] = match zeroed {
                    true => Sector::Zeroed,
                    false => Sector::Data(self.lsmt[place..place + 512].to_vec()),
                };
            }
        }
        disk
    }
}
