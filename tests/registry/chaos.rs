//! Everything at once: faults by lot, tokens and redirects that end, many readers.

use crate::lab::{LATE, Lab};
use crate::mock::answer::Bearer;
use crate::mock::{Auth, Mock, Part, fault};
use obd_ublk::registry::{Blob, Options, Pace};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Requests of a run, unless this variable asks for more.
const REQUESTS: u64 = 10_000;
const VARIABLE: &str = "OBD_UBLK_CHAOS_REQUESTS";

const THREADS: u64 = 16;
const FAULT_PERCENT: u64 = 20;
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
struct Tally {
    reads: AtomicU64,
    wrong: AtomicU64,
    late: AtomicU64,
    failed: AtomicU64,
}

#[test]
fn chaos_of_faults_tokens_and_redirects_never_gives_wrong_bytes() {
    let wanted = std::env::var(VARIABLE).map_or(REQUESTS, |text| text.parse().unwrap());
    let seed = std::env::var("OBD_UBLK_CHAOS_SEED").map_or(1, |text| text.parse().unwrap());
    let (lab, store) = (Lab::with_content(4 << 20), Mock::start());
    let content = Arc::clone(&lab.content);
    store.state().content.blobs.insert(lab.digest.clone(), content);
    let realm = format!("{}/token", lab.mock.url());
    let bearer = Bearer { good_ms: 700, told_seconds: Some(1), ..Bearer::at(&realm) };
    lab.mock.state().auth = Auth::Bearer(bearer);
    lab.mock.state().redirect = Some((store.url(), 500));
    lab.mock.chaos(FAULT_PERCENT, seed);
    store.chaos(FAULT_PERCENT, seed ^ 1);

    let pace = Pace { head: Duration::from_secs(5), ..Pace::default() };
    let registry = lab.registry(Options { pace, ..Options::default() });
    let blob = lab.blob(&registry);
    let tally = Tally::default();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (lab, blob, tally, registry) = (&lab, &blob, &tally, &registry);
            scope.spawn(move || {
                for number in 0.. {
                    if registry.counts().requests >= wanted {
                        break;
                    }
                    read_one(lab, blob, tally, fault::mix(seed ^ thread << 32, number));
                }
            });
        }
    });
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (reads, failed) = (load(&tally.reads), load(&tally.failed));
    let counts = registry.counts();
    let tokens = u64::try_from(lab.mock.count(Part::Token)).unwrap();
    println!(
        "{reads} reads, {failed} failed, {counts:?}, {tokens} tokens, {:?}",
        started.elapsed()
    );
    assert_eq!(load(&tally.wrong), 0, "wrong bytes");
    assert_eq!(load(&tally.late), 0, "reads past their deadline");
    // What lies four times is given up. Eleven of twenty faults are lies, so that one read in some
    // thousands meets that many.
    assert!(failed * 500 <= reads + 5000, "{failed} of {reads} reads failed");
    // Each read takes one request and its share of retries, refused tokens and resolved redirects.
    assert!(counts.requests <= 2 * reads, "{counts:?} for {reads} reads");
    assert!(counts.requests >= wanted);
    let seconds = started.elapsed().as_secs() + 1;
    assert!(tokens <= 8 * seconds, "{tokens} tokens in {seconds} s");
}

fn read_one(lab: &Lab, blob: &Blob, tally: &Tally, lot: u64) {
    let total = u64::try_from(lab.content.len()).unwrap();
    let length = 1 + lot % 20_000;
    let start = (lot >> 20) % (total - length);
    let began = Instant::now();
    let found = lab.read(blob, start..start + length, DEADLINE);
    tally.reads.fetch_add(1, Ordering::Relaxed);
    if began.elapsed() > DEADLINE + LATE {
        tally.late.fetch_add(1, Ordering::Relaxed);
    }
    match found {
        Err(error) => {
            println!("{error:#}");
            tally.failed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(bytes) => {
            let range = usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap();
            if bytes != lab.content[range] {
                tally.wrong.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
