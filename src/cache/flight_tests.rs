//! Flights, in the orders that are easily made; `tests/cache_interleavings.rs` has all of them.

use super::flight::{Begun, Flight, Flights, Outcome, Ticket};
use crate::error::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn mine(begun: Begun<'_>) -> Ticket<'_> {
    match begun {
        Begun::Mine(ticket) => ticket,
        Begun::Theirs(flight) => panic!("{flight:?}"),
    }
}

fn theirs(begun: &Begun<'_>) -> Arc<Flight> {
    match begun {
        Begun::Theirs(flight) => Arc::clone(flight),
        Begun::Mine(ticket) => panic!("{ticket:?}"),
    }
}

#[test]
fn a_flight_stops_where_another_is_on_its_way() {
    let flights = Flights::default();
    let middle = mine(flights.begin(5..8, 1));
    let front = mine(flights.begin(2..10, 1));
    assert_eq!(front.extents(), 2..5);
    let joined = theirs(&flights.begin(6..20, 2));
    assert!(joined.is_by(1) && !joined.is_by(2));
    middle.land(Outcome::Stored);
    assert!(matches!(joined.wait(Instant::now()), Ok(Outcome::Stored)));
    assert_eq!(mine(flights.begin(6..20, 2)).extents(), 6..20);
}

#[test]
fn a_flight_that_is_dropped_has_failed_and_a_waiter_has_its_own_deadline() {
    let flights = Flights::default();
    let ticket = mine(flights.begin(0..1, 1));
    let joined = theirs(&flights.begin(0..1, 1));
    let late = joined.wait(Instant::now() + Duration::from_millis(5)).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Timeout);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| joined.wait(Instant::now() + Duration::from_secs(60)));
        drop(ticket);
        let outcome = waiting.join().unwrap().unwrap();
        assert!(matches!(outcome, Outcome::Failed(ErrorKind::Canceled, _)), "{outcome:?}");
    });
}
