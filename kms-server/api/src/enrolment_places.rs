//! Admission at the enrolment door: places for connections of strangers, and attempts of each
//! network address. It has places of its own, so that strangers here take none of the
//! ordinary listener ([`crate::doorway`]).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::doorway::Network;
use crate::usage::wide;
use kms_base::bounds::{Bound, Limits};

/// The places for connections to the enrolment door.
pub(crate) struct EnrolmentPlaces {
    limits: Limits,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    /// Connections, in the order in which they began. Each is here until its socket is closed.
    connections: BTreeMap<u64, Held>,
    next: u64,
}

/// A connection that holds a place.
struct Held {
    network: Network,
    /// `None`: it is evicted, and being closed.
    evict: Option<oneshot::Sender<()>>,
}

impl EnrolmentPlaces {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, taken: Mutex::default() })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for a connection of this address. If all are taken, the address with the most
    /// of them loses its oldest one. An evicted connection counts for its address until it is
    /// closed, so there are never more sockets than places and connections that are being closed.
    ///
    /// # Errors
    /// The bound that is met.
    pub(crate) fn take(self: &Arc<Self>, address: IpAddr) -> Result<EnrolmentPlace, Bound> {
        let network = Network::from(address);
        let mut taken = self.taken();
        let of_address = taken.connections.values().filter(|held| held.network == network).count();
        if wide(of_address) >= self.limits.enrolment_connections_per_address {
            Bound::EnrolmentConnectionsPerAddress.count();
            return Err(Bound::EnrolmentConnectionsPerAddress);
        }
        if wide(taken.open().count()) >= self.limits.enrolment_connections {
            Bound::EnrolmentConnections.count();
            let own = taken.open().filter(|(_, held)| held.network == network).count();
            if !taken.evict_of_the_most(own) {
                return Err(Bound::EnrolmentConnections);
            }
        }
        taken.next += 1;
        let number = taken.next;
        let (evict, evicted) = oneshot::channel();
        taken.connections.insert(number, Held { network, evict: Some(evict) });
        Ok(EnrolmentPlace { places: Arc::clone(self), number, network, since: Instant::now(), evicted })
    }
}

impl Taken {
    /// The connections that are not evicted.
    fn open(&self) -> impl Iterator<Item = (&u64, &Held)> {
        self.connections.iter().filter(|(_, held)| held.evict.is_some())
    }

    /// Evicts the oldest connection of the network that has the most; false if none has more than
    /// `own`.
    fn evict_of_the_most(&mut self, own: usize) -> bool {
        let mut of: HashMap<Network, usize> = HashMap::new();
        for (_, held) in self.open() {
            *of.entry(held.network).or_default() += 1;
        }
        let Some((most, _)) = of.into_iter().max_by_key(|(_, count)| *count).filter(|(_, count)| *count > own) else {
            return false;
        };
        let oldest = self.open().find(|(_, held)| held.network == most).map(|(number, _)| *number);
        let evict = oldest.and_then(|number| self.connections.get_mut(&number)).and_then(|held| held.evict.take());
        evict.is_some_and(|evict| {
            // It fails if the connection has just ended.
            let _ = evict.send(());
            true
        })
    }
}

/// A place for a connection, until it is dropped.
pub(crate) struct EnrolmentPlace {
    places: Arc<EnrolmentPlaces>,
    number: u64,
    pub(crate) network: Network,
    since: Instant,
    /// Resolves when the connection is to end.
    pub(crate) evicted: oneshot::Receiver<()>,
}

impl Drop for EnrolmentPlace {
    /// The place is kept for a moment after a connection that was short: each handshake costs a
    /// signature, so their number in a second has a bound.
    fn drop(&mut self) {
        let (places, number) = (Arc::clone(&self.places), self.number);
        let rest = SHORTEST_PLACE.saturating_sub(self.since.elapsed());
        let leave = move || drop(places.taken().connections.remove(&number));
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
    fn one_address_has_its_share_and_the_address_with_the_most_gives_way() {
        let limits = Limits { enrolment_connections: 5, enrolment_connections_per_address: 3, ..Limits::default() };
        let places = EnrolmentPlaces::new(limits);
        let mut of_one: Vec<EnrolmentPlace> = (0..3).map(|_| places.take(address(1)).unwrap()).collect();
        assert_eq!(places.take(address(1)).err(), Some(Bound::EnrolmentConnectionsPerAddress));
        let others = [places.take(address(2)).unwrap(), places.take(address(3)).unwrap()];
        let newcomer = places.take(address(4)).unwrap();
        assert!(of_one[0].evicted.try_recv().is_ok(), "the oldest of the address with the most");
        assert!(of_one[1].evicted.try_recv().is_err());
        // It counts until it is closed: its address opens no further socket meanwhile.
        assert_eq!(places.taken().connections.len(), 6);
        assert_eq!(places.take(address(1)).err(), Some(Bound::EnrolmentConnectionsPerAddress));
        // The next one costs the address its second place. Then nobody has more than another.
        let _second = places.take(address(5)).unwrap();
        assert!(of_one[1].evicted.try_recv().is_ok() && of_one[2].evicted.try_recv().is_err());
        assert_eq!(places.take(address(2)).err(), Some(Bound::EnrolmentConnections));
        drop((of_one, others, newcomer));
        assert_eq!(places.taken().connections.len(), 1);
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
