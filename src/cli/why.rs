//! `why`: the last failed and slow requests of a device, and where their bytes come from.

use super::args::{DeviceName, trusted_run_dir};
use super::explain;
use super::output;
use super::table::format_utc;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::format::config::ImageConfig;
use crate::image::{Stack, load_image_config, load_service_config};
use crate::map::{Extent, FlatMap};
use crate::server::{RunDir, TROUBLE_NAME};
use crate::telemetry::printable;
use crate::telemetry::trouble::{self, Trouble};
use nix::errno::Errno;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Tell which requests of a device failed or were slow, and from which bytes they come
///
/// Works without the device's server: it leaves its last 256 failed and slow requests behind.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device: N, /dev/ublkbN, or the config it was attached from
    #[arg(value_name = "DEVICE")]
    device: OsString,

    /// Look the sectors up in this config, not in the one that was attached
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let run = trusted_run_dir()?;
    let id = DeviceName::parse(&args.device).resolve(&run)?;
    let records = read_ring(&run, id)?;
    let report = Report::new(id, records, || open_stack(&run, id, args.config.as_deref()));
    if args.json {
        output::print_facts(report.facts(), true)
    } else {
        output::print(&report.text())
    }
}

/// The ring in the device's folder; a device that has none had no trouble.
fn read_ring(run: &RunDir, id: u32) -> Result<Vec<Trouble>> {
    let folder = run.folder(id);
    match trouble::read(&folder.join(TROUBLE_NAME)) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if folder.is_dir() {
                return Ok(Vec::new());
            }
            let message = format!("device {id} was not attached by obd-ublk, or is detached");
            Err(Error::new(ErrorKind::NotFound, message))
        }
        other => other.context(|| format!("read the trouble ring of device {id}")),
    }
}

/// The image that the device shows: as it was attached, unless the caller names a config.
fn open_stack(run: &RunDir, id: u32, config: Option<&Path>) -> Result<Stack> {
    if let Some(path) = config {
        let config = load_image_config(path, None)?;
        return Stack::open(&config, &load_service_config(None)?);
    }
    let Some(state) = run.state(id)? else {
        return Err(Error::new(ErrorKind::NotFound, "there is no state file"));
    };
    let config = ImageConfig::parse(state.config_content.to_string().as_bytes())
        .context(|| "parse the config in the state file".to_owned())?;
    Stack::open(&config, &load_service_config(state.service_config.as_deref())?)
}

/// What one request says of itself.
pub(super) fn record_facts(record: &Trouble) -> Value {
    json!({
        "sequence": record.sequence,
        "time": format_utc(record.unix_ms),
        "unix_ms": record.unix_ms,
        "operation": operation_name(record.operation),
        "start_sector": record.start_sector,
        "sectors": record.sectors,
        "errno": record.errno,
        "errno_name": errno_name(record.errno),
        "duration_us": record.duration_us,
        "queue": record.queue,
        "server_pid": record.server_pid,
        "cause": record.text,
    })
}

/// What is told of one device.
struct Report {
    id: u32,
    /// Each request with the places of its sectors, as far as they can be told.
    records: Vec<(Trouble, Vec<Place>)>,
    /// Why they cannot.
    unexplained: Option<String>,
}

impl Report {
    /// Reads the image only when there is something to look up.
    fn new(id: u32, records: Vec<Trouble>, open: impl FnOnce() -> Result<Stack>) -> Self {
        let opened = if records.is_empty() {
            None
        } else {
            let merged = open().and_then(|stack| Ok((stack.merge()?, stack)));
            Some(merged)
        };
        let (image, unexplained) = match opened {
            None => (None, None),
            Some(Ok(image)) => (Some(image), None),
            Some(Err(error)) => (None, Some(format!("the image cannot be opened: {error:#}"))),
        };
        let places = |record: &Trouble| match &image {
            Some((map, stack)) => places_of(stack, map, record),
            None => Vec::new(),
        };
        let records = records.into_iter().map(|record| {
            let places = places(&record);
            (record, places)
        });
        Self { id, records: records.collect(), unexplained }
    }

    fn facts(&self) -> Value {
        let records = self.records.iter().map(|(record, places)| {
            let places: Vec<&Value> = places.iter().map(|place| &place.facts).collect();
            let mut facts = record_facts(record);
            facts["places"] = json!(places);
            facts
        });
        let records: Vec<Value> = records.collect();
        json!({ "id": self.id, "unexplained": self.unexplained, "records": records })
    }

    fn text(&self) -> String {
        if self.records.is_empty() {
            return format!("device {}: no request failed or was slow\n", self.id);
        }
        let mut text = String::new();
        for (record, places) in &self.records {
            let _ = writeln!(text, "{}", printable(&headline(record)));
            for place in places {
                let sentence = explain::sentence(&place.facts, place.sectors);
                let _ = writeln!(text, "    {}", printable(&sentence));
            }
        }
        if let Some(why) = &self.unexplained {
            let _ = writeln!(text, "layers are not told: {}", printable(why));
        }
        text
    }
}

/// One request in one line.
fn headline(record: &Trouble) -> String {
    format!(
        "{}  {} {} sectors from {}  {}  {}.{:03} ms  queue {}, process {}: {}",
        format_utc(record.unix_ms),
        operation_name(record.operation),
        record.sectors,
        record.start_sector,
        errno_name(record.errno),
        record.duration_us / 1000,
        record.duration_us % 1000,
        record.queue,
        record.server_pid,
        record.text,
    )
}

/// Extents told of one request: it may cross many, and the error names the one.
const EXTENTS_TOLD_MAX: usize = 8;

/// One extent of a request, in the words of `explain`.
struct Place {
    sectors: u64,
    facts: Value,
}

/// What the sectors of a request come from.
fn places_of(stack: &Stack, map: &FlatMap, record: &Trouble) -> Vec<Place> {
    let extents = map.extents(record.start_sector, u64::from(record.sectors));
    let place = |extent: Extent| Place {
        sectors: extent.sectors,
        facts: explain::facts(stack, extent.start_sector, extent.sectors),
    };
    extents.take(EXTENTS_TOLD_MAX).map(place).collect()
}

/// The names of the driver's operations.
fn operation_name(operation: u8) -> String {
    let name = match operation {
        0 => "read",
        1 => "write",
        2 => "flush",
        3 => "discard",
        4 => "write-same",
        5 => "write-zeroes",
        other => return format!("operation {other}"),
    };
    name.to_owned()
}

/// `EIO`; for a request that was right, what else it was.
fn errno_name(errno: i32) -> String {
    match Errno::from_raw(errno) {
        _ if errno == 0 => "slow".to_owned(),
        Errno::UnknownErrno => format!("errno {errno}"),
        known => format!("{known:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Layer;
    use crate::source::Source;

    fn record(start_sector: u64, sectors: u32) -> Trouble {
        Trouble {
            sequence: 9,
            unix_ms: 1_700_000_000_123,
            start_sector,
            sectors,
            errno: libc::EILSEQ,
            duration_us: 12_345,
            queue: 3,
            server_pid: 42,
            text: "read: checksum\n\x1b[31mred".to_owned(),
            ..Trouble::default()
        }
    }

    fn stack() -> Result<Stack> {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
        let layer = |name: &str| {
            let source = Source::open(&golden.join(name))?;
            Layer::open_sealed("a.commit".to_owned(), source)
        };
        Stack::from_layers(vec![layer("zfile-lz4-64k-text/overlaybd.commit")?])
    }

    #[test]
    fn a_request_is_one_line_without_control_characters_and_its_places_follow() {
        let stack_now = stack().unwrap();
        let map = stack_now.merge().unwrap();
        let data = |extent: &Extent| matches!(extent.target, crate::map::Target::Data { .. });
        let extent = map.extents(0, u64::MAX).find(data).unwrap();
        let text = Report::new(7, vec![record(extent.start_sector, 1)], stack).text();
        let lines: Vec<&str> = text.lines().collect();
        let start = extent.start_sector;
        let head = format!(
            "2023-11-14 22:13:20.123Z  read 1 sectors from {start}  EILSEQ  12.345 ms  queue 3, \
             process 42: read: checksum\\n\\u{{1b}}[31mred"
        );
        assert_eq!(lines[0], head);
        let facts = explain::facts(&stack_now, start, 1);
        let block = facts["zfile_block"].as_u64().unwrap();
        let bytes = &facts["file_bytes"];
        let place = format!(
            "    sectors {start}..{}: layer 0 (a.commit), file bytes {}..{}, zblock {block}, data",
            start + 1,
            bytes["start"],
            bytes["end"]
        );
        assert_eq!(lines[1..], [place]);
    }

    #[test]
    fn a_request_over_several_extents_has_a_place_for_each_up_to_a_limit() {
        let map = stack().unwrap().merge().unwrap();
        let all = map.extents(0, u64::MAX).count();
        assert!(all > EXTENTS_TOLD_MAX, "{all} extents");
        let sectors = u32::try_from(map.virtual_sectors()).unwrap();
        let facts = Report::new(7, vec![record(0, sectors)], stack).facts();
        let places = facts["records"][0]["places"].as_array().unwrap();
        assert_eq!(places.len(), EXTENTS_TOLD_MAX);
        for (place, extent) in places.iter().zip(map.extents(0, u64::MAX)) {
            assert_eq!(place["sector"], extent.start_sector);
        }
        let beyond = Report::new(7, vec![record(u64::MAX, 8)], stack).facts();
        assert_eq!(beyond["records"][0]["places"], json!([]));
    }

    #[test]
    fn an_image_that_is_gone_costs_the_places_only() {
        let gone = || Err(Error::new(ErrorKind::NotFound, "no such file").context("open layer 0"));
        let report = Report::new(7, vec![record(8, 8)], gone);
        let text = report.text();
        let end = "layers are not told: the image cannot be opened: open layer 0: no such file\n";
        assert!(text.starts_with("2023-11-14 22:13:20.123Z  read 8 sectors from 8"), "{text}");
        assert!(text.ends_with(end) && text.lines().count() == 2, "{text}");
        let facts = report.facts();
        assert_eq!(facts["records"][0]["errno_name"], "EILSEQ");
        assert!(facts["unexplained"].as_str().unwrap().contains("no such file"));
    }

    #[test]
    fn without_records_the_image_is_not_opened() {
        let report = Report::new(7, Vec::new(), || panic!("it was opened"));
        assert_eq!(report.text(), "device 7: no request failed or was slow\n");
    }

    #[test]
    fn operations_and_errnos_have_names() {
        let names = [0, 1, 2, 3, 4, 5, 15].map(operation_name);
        let expected =
            ["read", "write", "flush", "discard", "write-same", "write-zeroes", "operation 15"];
        assert_eq!(names, expected);
        let names = [0, libc::EIO, 4000, -1].map(errno_name);
        assert_eq!(names, ["slow", "EIO", "errno 4000", "errno -1"]);
    }
}
