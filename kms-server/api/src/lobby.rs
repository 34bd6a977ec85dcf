//! Admission at the enrolment door: places for connections of strangers, and attempts of each
//! network address. It has places of its own, so that a crowd here takes none of the ordinary
//! listener ([`crate::doorway`]).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::doorway::Network;
use crate::usage::wide;
use kms_base::bounds::{Bound, Limits};

/// The places of the enrolment door.
pub(crate) struct Lobby {
    limits: Limits,
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    /// Connections, in the order in which they began.
    guests: BTreeMap<u64, Guest>,
    next: u64,
}

struct Guest {
    network: Network,
    evict: oneshot::Sender<()>,
}

impl Lobby {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, places: Mutex::default() })
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection of this address. If all are taken, the address with the most of
    /// them loses its oldest one.
    ///
    /// # Errors
    /// The bound that is met.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Result<Place, Bound> {
        let network = Network::from(address);
        let mut places = self.places();
        let own = places.guests.values().filter(|guest| guest.network == network).count();
        if wide(own) >= self.limits.enrolment_connections_per_address {
            Bound::EnrolmentConnectionsPerAddress.count();
            return Err(Bound::EnrolmentConnectionsPerAddress);
        }
        if wide(places.guests.len()) >= self.limits.enrolment_connections {
            Bound::EnrolmentConnections.count();
            if !places.evict_of_the_most(own) {
                return Err(Bound::EnrolmentConnections);
            }
        }
        places.next += 1;
        let number = places.next;
        let (evict, evicted) = oneshot::channel();
        places.guests.insert(number, Guest { network, evict });
        Ok(Place { lobby: Arc::clone(self), number, network, since: Instant::now(), evicted })
    }
}

impl Places {
    /// Evicts the oldest connection of the network that has the most; false if none has more than
    /// `own`.
    fn evict_of_the_most(&mut self, own: usize) -> bool {
        let mut of: HashMap<Network, usize> = HashMap::new();
        for guest in self.guests.values() {
            *of.entry(guest.network).or_default() += 1;
        }
        let Some((most, _)) = of.into_iter().max_by_key(|(_, count)| *count).filter(|(_, count)| *count > own) else {
            return false;
        };
        let oldest = self.guests.iter().find(|(_, guest)| guest.network == most).map(|(number, _)| *number);
        oldest.and_then(|number| self.guests.remove(&number)).is_some_and(|guest| {
            // It fails if the connection has just ended.
            let _ = guest.evict.send(());
            true
        })
    }
}

/// A place for a connection, until it is dropped or evicted.
pub(crate) struct Place {
    lobby: Arc<Lobby>,
    number: u64,
    pub(crate) network: Network,
    since: Instant,
    /// Resolves when the connection is to end.
    pub(crate) evicted: oneshot::Receiver<()>,
}

impl Drop for Place {
    /// The place is kept for a moment after a connection that was short: each handshake costs a
    /// signature, so their number in a second has a bound.
    fn drop(&mut self) {
        let (lobby, number) = (Arc::clone(&self.lobby), self.number);
        let rest = SHORTEST_PLACE.saturating_sub(self.since.elapsed());
        let leave = move || drop(lobby.places().guests.remove(&number));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if !rest.is_zero() => drop(runtime.spawn(async move {
                tokio::time::sleep(rest).await;
                leave();
            })),
            _ => leave(),
        }
    }
}

/// The attempts of each network in the present hour.
#[derive(Default)]
pub(crate) struct Attempts(Mutex<HashMap<Network, Attempted>>);

#[derive(Clone, Copy)]
struct Attempted {
    since: Instant,
    calls: u64,
}

impl Attempts {
    /// Counts a call.
    ///
    /// # Errors
    /// The network has made `most` calls in its hour. The time until it ends.
    pub(crate) fn count(&self, network: Network, most: u64, now: Instant) -> Result<(), Duration> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST_NETWORKS && !known.contains_key(&network) {
            known.retain(|_, attempted| now.duration_since(attempted.since) < HOUR);
            // Who has so many networks is bounded by the places of the door.
            if known.len() >= MOST_NETWORKS
                && let Some(oldest) =
                    known.iter().min_by_key(|(_, attempted)| attempted.since).map(|(network, _)| *network)
            {
                known.remove(&oldest);
            }
        }
        let attempted = known.entry(network).or_insert(Attempted { since: now, calls: 0 });
        let passed = now.duration_since(attempted.since);
        if passed >= HOUR {
            *attempted = Attempted { since: now, calls: 0 };
        } else if attempted.calls >= most {
            return Err(HOUR.saturating_sub(passed));
        }
        attempted.calls += 1;
        Ok(())
    }
}

/// With 8 places, an address makes 32 handshakes in a second.
const SHORTEST_PLACE: Duration = Duration::from_millis(250);
const HOUR: Duration = Duration::from_hours(1);
/// Networks whose attempts are counted at a time.
const MOST_NETWORKS: usize = 4_096;

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn one_address_has_its_share_and_a_crowd_gives_way() {
        let limits = Limits { enrolment_connections: 5, enrolment_connections_per_address: 3, ..Limits::default() };
        let lobby = Lobby::new(limits);
        let mut crowd: Vec<Place> = (0..3).map(|_| lobby.enter(address(1)).unwrap()).collect();
        assert_eq!(lobby.enter(address(1)).err(), Some(Bound::EnrolmentConnectionsPerAddress));
        let others = [lobby.enter(address(2)).unwrap(), lobby.enter(address(3)).unwrap()];
        let newcomer = lobby.enter(address(4)).unwrap();
        assert!(crowd[0].evicted.try_recv().is_ok(), "the oldest of the address with the most");
        assert!(crowd[1].evicted.try_recv().is_err());
        // The next one costs the crowd its second place. Then nobody has more than another.
        let _second = lobby.enter(address(5)).unwrap();
        assert_eq!(lobby.enter(address(2)).err(), Some(Bound::EnrolmentConnections));
        drop((crowd, others, newcomer));
        assert_eq!(lobby.places().guests.len(), 1);
    }

    #[test]
    fn attempts_are_counted_for_an_hour_and_not_for_ever() {
        let (attempts, now) = (Attempts::default(), Instant::now());
        let network = |last: u8| Network::from(address(last));
        for _ in 0..3 {
            attempts.count(network(1), 3, now).unwrap();
        }
        assert_eq!(attempts.count(network(1), 3, now + HOUR / 2), Err(HOUR / 2));
        attempts.count(network(2), 3, now).unwrap();
        attempts.count(network(1), 3, now + HOUR).unwrap();
        // Many networks do not fill the memory.
        for number in 0..2 * u64::try_from(MOST_NETWORKS).unwrap() {
            let [.., a, b, c] = number.to_be_bytes();
            attempts.count(Network::from(IpAddr::from([10, a, b, c])), 3, now + HOUR).unwrap();
        }
        assert!(attempts.0.lock().unwrap().len() <= MOST_NETWORKS);
    }
}
