//! Admission: bounds on handshakes and connections, for each address, each principal and the whole
//! server.
//!
//! When all handshake places are taken, the connection that has been silent longest loses its
//! place. If all have sent octets, the oldest handshake of the address with the most handshakes
//! loses its place. When all connection places are taken, the oldest connection without a call of a
//! known principal loses its place. So connections of strangers and of disabled principals block
//! nobody.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kms_domain::PrincipalId;
use tokio::sync::oneshot;

use crate::usage::{ConnectionUse, PrincipalUse, wide};
use kms_base::bounds::{Bound, Limits};

/// The places of a listener.
pub(crate) struct Doorway {
    limits: Limits,
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    /// Handshakes under way, in the order in which they began.
    handshakes: BTreeMap<u64, Waiting>,
    /// Connections, in the order in which they began.
    connections: BTreeMap<u64, Open>,
    next: u64,
    /// Handshakes and connections of an address.
    addresses: HashMap<Network, u64>,
    principals: HashMap<PrincipalId, Share>,
}

struct Waiting {
    network: Network,
    silent: bool,
    evict: oneshot::Sender<Bound>,
}

struct Open {
    network: Network,
    principal: PrincipalId,
    usage: Arc<ConnectionUse>,
}

#[derive(Default)]
struct Share {
    connections: u64,
    usage: Arc<PrincipalUse>,
}

/// An IPv4 address, or the /64 of an IPv6 address: what one subscriber has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Network {
    Four([u8; 4]),
    Six([u8; 8]),
}

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::Four(address.octets()),
            IpAddr::V6(address) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                Self::Six([a, b, c, d, e, f, g, h])
            }
        }
    }
}

impl Doorway {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, places: Mutex::default() })
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a handshake of this address. A silent handshake may lose its place for it.
    ///
    /// # Errors
    /// The bound that is met.
    pub(crate) fn handshake(self: &Arc<Self>, address: IpAddr) -> Result<HandshakePlace, Bound> {
        let network = Network::from(address);
        let mut places = self.places();
        let refuse = |bound: Bound| {
            bound.count();
            Err(bound)
        };
        if places.addresses.get(&network).copied().unwrap_or_default() >= self.limits.connections_per_address {
            // The address's own silent handshakes and connections without a call lose their places
            // first.
            let of_it = |open: &Open| open.network == network;
            if !places.evict(Bound::ConnectionsPerAddress, Some(network))
                && !places.evict_uncalled(Bound::ConnectionsPerAddress, of_it)
            {
                return refuse(Bound::ConnectionsPerAddress);
            }
        }
        let own = places.handshakes.values().filter(|waiting| waiting.network == network).count();
        if wide(own) >= self.limits.handshakes_per_address && !places.evict(Bound::HandshakesPerAddress, Some(network))
        {
            return refuse(Bound::HandshakesPerAddress);
        }
        if wide(places.handshakes.len()) >= self.limits.handshakes
            && !places.evict(Bound::Handshakes, None)
            && !places.evict_of_the_most(Bound::Handshakes, own)
        {
            return refuse(Bound::Handshakes);
        }
        let number = places.number();
        let (evict, evicted) = oneshot::channel();
        places.handshakes.insert(number, Waiting { network, silent: true, evict });
        *places.addresses.entry(network).or_default() += 1;
        Ok(HandshakePlace { doorway: Arc::clone(self), number, network, evicted: Some(evicted) })
    }
}

impl Places {
    /// Evicts the handshake that has been silent longest; false if none is silent.
    fn evict(&mut self, bound: Bound, of: Option<Network>) -> bool {
        let silent = |waiting: &Waiting| waiting.silent && of.is_none_or(|network| network == waiting.network);
        let Some(number) = self.handshakes.iter().find(|(_, waiting)| silent(waiting)).map(|(number, _)| *number)
        else {
            return false;
        };
        self.leave(number).is_some_and(|waiting| waiting.evict.send(bound).is_ok())
    }

    /// Evicts the oldest handshake of the network that has the most of them; false if no network
    /// has more than `own`.
    fn evict_of_the_most(&mut self, bound: Bound, own: usize) -> bool {
        let mut of: HashMap<Network, usize> = HashMap::new();
        for waiting in self.handshakes.values() {
            *of.entry(waiting.network).or_default() += 1;
        }
        let Some((most, _)) = of.into_iter().max_by_key(|(_, count)| *count).filter(|(_, count)| *count > own) else {
            return false;
        };
        let oldest = self.handshakes.iter().find(|(_, waiting)| waiting.network == most).map(|(number, _)| *number);
        oldest.and_then(|number| self.leave(number)).is_some_and(|waiting| waiting.evict.send(bound).is_ok())
    }

    /// Evicts the oldest of these connections on which no known principal has called; false if
    /// there is none.
    fn evict_uncalled(&mut self, bound: Bound, of: impl Fn(&Open) -> bool) -> bool {
        let number =
            self.connections.iter().find(|(_, open)| !open.usage.is_known() && of(open)).map(|(number, _)| *number);
        let Some(open) = number.and_then(|number| self.leave_connection(number)) else { return false };
        bound.count();
        open.usage.cut();
        true
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn leave_connection(&mut self, number: u64) -> Option<Open> {
        let open = self.connections.remove(&number)?;
        self.leave_address(open.network);
        if let Some(share) = self.principals.get_mut(&open.principal) {
            share.connections = share.connections.saturating_sub(1);
            if share.connections == 0 {
                self.principals.remove(&open.principal);
            }
        }
        Some(open)
    }

    fn leave(&mut self, number: u64) -> Option<Waiting> {
        let waiting = self.handshakes.remove(&number)?;
        self.leave_address(waiting.network);
        Some(waiting)
    }

    fn leave_address(&mut self, network: Network) {
        if let Some(count) = self.addresses.get_mut(&network) {
            *count -= 1;
            if *count == 0 {
                self.addresses.remove(&network);
            }
        }
    }
}

/// A place for a handshake, until it is dropped or evicted.
pub(crate) struct HandshakePlace {
    doorway: Arc<Doorway>,
    number: u64,
    network: Network,
    evicted: Option<oneshot::Receiver<Bound>>,
}

impl HandshakePlace {
    /// Resolves when the handshake is evicted.
    pub(crate) fn evicted(&mut self) -> impl Future<Output = Bound> + use<> {
        let evicted = self.evicted.take();
        async move {
            match evicted {
                Some(evicted) => match evicted.await {
                    Ok(bound) => bound,
                    // The place was dropped, not evicted.
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        }
    }

    /// Notes the first octet of the client, which ends its silence.
    pub(crate) fn spoke(&self) {
        if let Some(waiting) = self.doorway.places().handshakes.get_mut(&self.number) {
            waiting.silent = false;
        }
    }

    /// A place for the connection of a principal, with its counts.
    ///
    /// # Errors
    /// The bound that is met: known principals have called on all connections.
    pub(crate) fn connection(&self, principal: &PrincipalId) -> Result<(ConnectionPlace, Arc<ConnectionUse>), Bound> {
        let limits = &self.doorway.limits;
        let mut places = self.doorway.places();
        let refuse = |bound: Bound| {
            bound.count();
            Err(bound)
        };
        let own = places.principals.get(principal).map_or(0, |share| share.connections);
        if own >= limits.connections_per_principal
            && !places.evict_uncalled(Bound::ConnectionsPerPrincipal, |open| open.principal == *principal)
        {
            return refuse(Bound::ConnectionsPerPrincipal);
        }
        if wide(places.connections.len()) >= limits.connections && !places.evict_uncalled(Bound::Connections, |_| true)
        {
            return refuse(Bound::Connections);
        }
        *places.addresses.entry(self.network).or_default() += 1;
        let share = places.principals.entry(principal.clone()).or_default();
        share.connections += 1;
        let usage = Arc::new(ConnectionUse::new(Arc::clone(&share.usage)));
        let number = places.number();
        places
            .connections
            .insert(number, Open { network: self.network, principal: principal.clone(), usage: Arc::clone(&usage) });
        Ok((ConnectionPlace { doorway: Arc::clone(&self.doorway), number }, usage))
    }
}

impl Drop for HandshakePlace {
    fn drop(&mut self) {
        drop(self.doorway.places().leave(self.number));
    }
}

/// A place for a connection, until it is dropped or evicted.
pub(crate) struct ConnectionPlace {
    doorway: Arc<Doorway>,
    number: u64,
}

impl Drop for ConnectionPlace {
    fn drop(&mut self) {
        drop(self.doorway.places().leave_connection(self.number));
    }
}

#[cfg(test)]
mod tests {
    use kms_domain::{IslandName, Role};

    use super::*;

    fn doorway() -> Arc<Doorway> {
        let small = Limits {
            handshakes: 6,
            handshakes_per_address: 4,
            connections: 5,
            connections_per_principal: 2,
            connections_per_address: 8,
            ..Limits::default()
        };
        Doorway::new(small)
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn principal(name: &str) -> PrincipalId {
        PrincipalId::new(IslandName::parse("north").unwrap(), Role::HeadEnd, name).unwrap()
    }

    #[tokio::test]
    async fn a_silent_handshake_gives_its_place_up_and_one_that_speaks_does_not() {
        let doorway = doorway();
        let mut silent: Vec<HandshakePlace> = (0..4).map(|_| doorway.handshake(address(1)).unwrap()).collect();
        let first = silent[0].evicted();
        let speaking = doorway.handshake(address(1)).unwrap();
        assert_eq!(first.await, Bound::HandshakesPerAddress, "the oldest of the same address");
        speaking.spoke();
        for place in &silent {
            place.spoke();
        }
        assert_eq!(doorway.handshake(address(1)).err(), Some(Bound::HandshakesPerAddress), "all of them speak");
        let other = doorway.handshake(address(2)).unwrap();
        let mut another = doorway.handshake(address(3)).unwrap();
        let evicted = another.evicted();
        // Address 2 was there first, and is the oldest that is silent.
        other.spoke();
        let _last = doorway.handshake(address(4)).unwrap();
        assert_eq!(evicted.await, Bound::Handshakes);
    }

    #[test]
    fn a_principal_and_an_address_have_shares_of_their_own_and_give_them_back() {
        let doorway = doorway();
        let (one, other) = (principal("hes-1"), principal("hes-2"));
        let shake = || doorway.handshake(address(1)).unwrap();
        let call = |principal: &PrincipalId| {
            shake().connection(principal).map(|(place, usage)| {
                usage.note_known();
                place
            })
        };
        let mut open = Vec::new();
        for _ in 0..2 {
            open.push(call(&one).unwrap());
        }
        assert_eq!(call(&one).err(), Some(Bound::ConnectionsPerPrincipal));
        open.push(call(&other).unwrap());
        for name in ["hes-3", "hes-4"] {
            open.push(call(&principal(name)).unwrap());
        }
        assert_eq!(call(&principal("hes-5")).err(), Some(Bound::Connections));
        open.remove(0);
        let again = call(&one).unwrap();
        drop((again, open));
        let places = doorway.places();
        assert_eq!(
            (places.connections.len(), places.addresses.len(), places.principals.len(), places.handshakes.len()),
            (0, 0, 0, 0)
        );
    }

    #[tokio::test]
    async fn who_never_calls_gives_the_place_up() {
        let doorway = doorway();
        let ended =
            |usage: &Arc<ConnectionUse>| usage.is_cut(&std::task::Context::from_waker(std::task::Waker::noop()));
        let open = |name: &str, last| doorway.handshake(address(last)).unwrap().connection(&principal(name)).unwrap();
        let (_first, idle) = open("hes-1", 1);
        let (_second, calling) = open("hes-1", 1);
        calling.note_known();
        let (_third, another) = open("hes-1", 1);
        assert!(ended(&idle) && !ended(&calling) && !ended(&another), "the principal's own connection without a call");
        let mut held = Vec::new();
        for name in ["hes-2", "hes-3", "hes-4"] {
            held.push(open(name, 2));
        }
        // The server is full: the oldest of all that have not called.
        let (_place, newcomer) = open("hes-5", 3);
        assert!(ended(&another) && !ended(&calling) && !ended(&newcomer));
        assert_eq!(doorway.places().connections.len(), 5);
    }

    #[tokio::test]
    async fn an_address_that_has_the_most_handshakes_gives_one_up() {
        let doorway = doorway();
        let mut many: Vec<HandshakePlace> = (0..4).map(|_| doorway.handshake(address(1)).unwrap()).collect();
        let few: Vec<HandshakePlace> = (0..2).map(|_| doorway.handshake(address(2)).unwrap()).collect();
        many.iter().chain(&few).for_each(HandshakePlace::spoke);
        let oldest = many[0].evicted();
        let place = doorway.handshake(address(3)).unwrap();
        assert_eq!(oldest.await, Bound::Handshakes);
        place.spoke();
        let second = doorway.handshake(address(3)).unwrap();
        second.spoke();
        // Two of each now: who has as many as anybody takes none.
        assert_eq!(doorway.handshake(address(3)).err(), Some(Bound::Handshakes));
    }

    #[test]
    fn an_address_is_an_ipv6_network() {
        let network = |text: &str| Network::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:1"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
    }
}
