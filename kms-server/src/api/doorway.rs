//! Who may come in: places for handshakes and connections, for each address, each principal, and the server as a whole.
//!
//! Places for handshakes go to those who speak: where they are short, the connection that has been silent longest gives its place up. So idle
//! connections of strangers hold up nobody's handshake.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kms_domain::PrincipalId;
use tokio::sync::oneshot;

use super::intake::PrincipalUse;
use crate::bounds::{Bound, Limits};

/// The places of a listener.
pub(super) struct Doorway {
    limits: Limits,
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    /// Handshakes under way, in the order in which they began.
    handshakes: BTreeMap<u64, Waiting>,
    next: u64,
    connections: u64,
    /// Handshakes and connections of an address.
    addresses: HashMap<Network, u64>,
    principals: HashMap<PrincipalId, Share>,
}

struct Waiting {
    network: Network,
    silent: bool,
    evict: oneshot::Sender<Bound>,
}

#[derive(Default)]
struct Share {
    connections: u64,
    usage: Arc<PrincipalUse>,
}

/// An IPv4 address, or the /64 of an IPv6 address: what one subscriber has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Network {
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
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, places: Mutex::default() })
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a handshake of this address. Who is silent gives up theirs for it.
    ///
    /// # Errors
    /// The bound that is met.
    pub(super) fn handshake(self: &Arc<Self>, address: IpAddr) -> Result<HandshakePlace, Bound> {
        let network = Network::from(address);
        let mut places = self.places();
        let refuse = |bound: Bound| {
            bound.count();
            Err(bound)
        };
        if places.addresses.get(&network).copied().unwrap_or_default() >= self.limits.connections_per_address {
            // One of its own silent handshakes counts there too.
            if !places.evict(Bound::ConnectionsPerAddress, Some(network)) {
                return refuse(Bound::ConnectionsPerAddress);
            }
        }
        let own = places.handshakes.values().filter(|waiting| waiting.network == network).count();
        if wide(own) >= self.limits.handshakes_per_address && !places.evict(Bound::HandshakesPerAddress, Some(network)) {
            return refuse(Bound::HandshakesPerAddress);
        }
        if wide(places.handshakes.len()) >= self.limits.handshakes && !places.evict(Bound::Handshakes, None) {
            return refuse(Bound::Handshakes);
        }
        let number = places.next;
        places.next += 1;
        let (evict, evicted) = oneshot::channel();
        places.handshakes.insert(number, Waiting { network, silent: true, evict });
        *places.addresses.entry(network).or_default() += 1;
        Ok(HandshakePlace { doorway: Arc::clone(self), number, network, evicted: Some(evicted) })
    }
}

impl Places {
    /// Takes the place of the handshake that has been silent longest; false if all speak.
    fn evict(&mut self, bound: Bound, of: Option<Network>) -> bool {
        let silent = |waiting: &Waiting| waiting.silent && of.is_none_or(|network| network == waiting.network);
        let Some(number) = self.handshakes.iter().find(|(_, waiting)| silent(waiting)).map(|(number, _)| *number) else { return false };
        self.leave(number).is_some_and(|waiting| waiting.evict.send(bound).is_ok())
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

/// A place for a handshake, until it is dropped or somebody else needs it.
pub(super) struct HandshakePlace {
    doorway: Arc<Doorway>,
    number: u64,
    network: Network,
    evicted: Option<oneshot::Receiver<Bound>>,
}

impl HandshakePlace {
    /// Resolves when the place is somebody else's.
    pub(super) fn evicted(&mut self) -> impl Future<Output = Bound> + use<> {
        let evicted = self.evicted.take();
        async move {
            match evicted {
                Some(evicted) => match evicted.await {
                    Ok(bound) => bound,
                    // The place was given back in the ordinary way.
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        }
    }

    /// The client has sent its first octet: it keeps the place until the handshake has ended.
    pub(super) fn spoke(&self) {
        if let Some(waiting) = self.doorway.places().handshakes.get_mut(&self.number) {
            waiting.silent = false;
        }
    }

    /// A place for the connection of a principal, and what is counted over all its connections.
    ///
    /// # Errors
    /// The bound that is met.
    pub(super) fn connection(&self, principal: &PrincipalId) -> Result<(ConnectionPlace, Arc<PrincipalUse>), Bound> {
        let limits = &self.doorway.limits;
        let mut places = self.doorway.places();
        let bound = if places.principals.get(principal).is_some_and(|share| share.connections >= limits.connections_per_principal) {
            Some(Bound::ConnectionsPerPrincipal)
        } else if places.connections >= limits.connections {
            Some(Bound::Connections)
        } else {
            None
        };
        if let Some(bound) = bound {
            bound.count();
            return Err(bound);
        }
        places.connections += 1;
        *places.addresses.entry(self.network).or_default() += 1;
        let share = places.principals.entry(principal.clone()).or_default();
        share.connections += 1;
        let usage = Arc::clone(&share.usage);
        Ok((ConnectionPlace { doorway: Arc::clone(&self.doorway), network: self.network, principal: principal.clone() }, usage))
    }
}

impl Drop for HandshakePlace {
    fn drop(&mut self) {
        drop(self.doorway.places().leave(self.number));
    }
}

/// A place for a connection, until it is dropped.
pub(super) struct ConnectionPlace {
    doorway: Arc<Doorway>,
    network: Network,
    principal: PrincipalId,
}

impl Drop for ConnectionPlace {
    fn drop(&mut self) {
        let mut places = self.doorway.places();
        places.connections = places.connections.saturating_sub(1);
        places.leave_address(self.network);
        if let Some(share) = places.principals.get_mut(&self.principal) {
            share.connections = share.connections.saturating_sub(1);
            if share.connections == 0 {
                places.principals.remove(&self.principal);
            }
        }
    }
}

fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use kms_domain::{IslandName, Role};

    use super::*;

    fn doorway() -> Arc<Doorway> {
        let small =
            Limits { handshakes: 6, handshakes_per_address: 4, connections: 5, connections_per_principal: 2, connections_per_address: 8, ..Limits::default() };
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
        let mut open = Vec::new();
        for _ in 0..2 {
            open.push(shake().connection(&one).unwrap().0);
        }
        assert_eq!(shake().connection(&one).err(), Some(Bound::ConnectionsPerPrincipal));
        open.push(shake().connection(&other).unwrap().0);
        for name in ["hes-3", "hes-4"] {
            open.push(shake().connection(&principal(name)).unwrap().0);
        }
        assert_eq!(shake().connection(&principal("hes-5")).err(), Some(Bound::Connections));
        open.remove(0);
        let again = shake().connection(&one).unwrap();
        drop((again, open));
        let places = doorway.places();
        assert_eq!((places.connections, places.addresses.len(), places.principals.len(), places.handshakes.len()), (0, 0, 0, 0));
    }

    #[test]
    fn an_address_is_an_ipv6_network() {
        let network = |text: &str| Network::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:1"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
    }
}
