//! I4 under interleaving: servers that race, crash and come back, floors that rise, and a second meter that turns out to have
//! the same key value. Whatever the order, no (key value, client title, counter) is leased twice, and a newer lease is higher.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::{collections::HashMap, num::NonZeroU32};

use bytes::Bytes;
use kms_domain::{
    ChunkSize, CounterDomain, CounterDomainId, CounterJump, CounterKey, CounterScope, CounterUse, Counters, KeyDerivation, KeyLength, KeyOrigin, KeyState,
    KeyType, KeyVersionNumber, Lease, LiveChunk, NewKeyVersion, SecuritySetupId, Slot, SystemTitle, UnixMillis, WriterId,
};
use proptest::prelude::*;

/// One step. Small numbers choose among the servers, meters and client titles there are.
#[derive(Clone, Debug)]
enum Step {
    /// A server begins a grant: it reads the rows.
    Read { server: usize, meter: usize, title: usize },
    /// It goes on: deals from its chunk or reserves another one, and commits if no row that it read has changed.
    Commit { server: usize, count: u32 },
    /// A server dies and starts again, as another writer with empty memory.
    Crash { server: usize },
    /// An operator or a meter raises a floor.
    RaiseFloor { meter: usize, title: usize, above: u64 },
    /// The second meter is imported with the same key value.
    ImportDuplicate { floor: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..3usize, 0..2usize, 0..2usize).prop_map(|(server, meter, title)| Step::Read { server, meter, title }),
        8 => (0..3usize, 1..20u32).prop_map(|(server, count)| Step::Commit { server, count }),
        1 => (0..3usize).prop_map(|server| Step::Crash { server }),
        1 => (0..2usize, 0..2usize, 0..200u64).prop_map(|(meter, title, above)| Step::RaiseFloor { meter, title, above }),
        1 => (0..500u64).prop_map(|floor| Step::ImportDuplicate { floor }),
    ];
    prop::collection::vec(step, 0..120)
}

/// A row and its generation.
#[derive(Clone)]
struct Row<T> {
    generation: u64,
    value: T,
}

/// What is durable.
#[derive(Clone)]
struct Database {
    meters: Vec<Row<Slot>>,
    domain: Option<Row<CounterDomain>>,
}

impl Database {
    /// The counters of a meter's key and where they are: `None` for its own row, which holds them.
    fn counters(&self, meter: usize) -> Option<&Counters> {
        match self.meters[meter].value.versions()[0].counters() {
            kms_domain::CounterPlace::Own(counters) => Some(counters),
            kms_domain::CounterPlace::Domain(_) => self.domain.as_ref().map(|row| &row.value.counters),
        }
    }

    fn change_counters(&mut self, meter: usize, change: impl FnOnce(&mut Counters)) {
        let row = &mut self.meters[meter];
        match row.value.version_mut(KeyVersionNumber::FIRST).unwrap().counters_mut() {
            Ok(counters) => {
                change(counters);
                row.generation += 1;
            }
            Err(_) => {
                let domain = self.domain.as_mut().unwrap();
                change(&mut domain.value.counters);
                domain.generation += 1;
            }
        }
    }

    fn generations(&self, meter: usize) -> (u64, u64) {
        (self.meters[meter].generation, self.domain.as_ref().map_or(0, |row| row.generation))
    }
}

/// A server's memory.
struct Server {
    writer: WriterId,
    chunks: HashMap<(usize, CounterKey), LiveChunk>,
    reading: Option<(Database, usize, SystemTitle)>,
}

struct World {
    database: Database,
    servers: Vec<Server>,
    writers: u8,
    scopes: [CounterScope; 2],
    /// All leases of the one key value, by client title.
    leases: HashMap<SystemTitle, Vec<Lease>>,
}

impl World {
    fn new(scopes: [CounterScope; 2]) -> Self {
        let database = Database { meters: vec![Row { generation: 1, value: slot() }], domain: None };
        let mut world = Self { database, servers: Vec::new(), writers: 0, scopes, leases: HashMap::new() };
        for _ in 0..3 {
            let server = world.start();
            world.servers.push(server);
        }
        world
    }

    fn start(&mut self) -> Server {
        self.writers += 1;
        Server { writer: WriterId::from_octets(&[self.writers; 16]).unwrap(), chunks: HashMap::new(), reading: None }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Read { server, meter, title } if meter < self.database.meters.len() => {
                self.servers[server].reading = Some((self.database.clone(), meter, client(title)));
            }
            Step::Commit { server, count } => self.commit(server, NonZeroU32::new(count).unwrap()),
            Step::Crash { server } => {
                let fresh = self.start();
                self.servers[server] = fresh;
            }
            Step::RaiseFloor { meter, title, above } if meter < self.database.meters.len() => {
                let key = self.scopes[meter].key(client(title));
                let floor = self.database.counters(meter).map_or(0, Counters::highest_bound) + above;
                self.database.change_counters(meter, |counters| counters.raise_floor(key, floor, None).unwrap());
            }
            Step::ImportDuplicate { floor } if self.database.meters.len() == 1 => self.import_duplicate(floor),
            _ => {}
        }
    }

    /// The second half of a grant, as a server does it: one transaction that fails if a row that was read has changed.
    fn commit(&mut self, server: usize, count: NonZeroU32) {
        let server = &mut self.servers[server];
        let Some((read, meter, title)) = server.reading.take() else { return };
        let key = self.scopes[meter].key(title);
        let unchanged = read.generations(meter) == self.database.generations(meter);
        let state = read.counters(meter).and_then(|counters| counters.get(key)).cloned();
        let chunk = server.chunks.get_mut(&(meter, key));
        let at_least = chunk.as_ref().map_or(0, |chunk| chunk.bound());
        if let (Some(chunk), Some(state)) = (chunk, &state)
            && let Ok(lease) = chunk.deal(state, count, CounterJump::NONE)
        {
            if unchanged {
                self.leases.entry(title).or_default().push(lease);
            }
            return;
        }
        if !unchanged {
            return;
        }
        let mut reservation = None;
        let writer = server.writer;
        let chunk_size = ChunkSize::new(NonZeroU32::new(50).unwrap());
        self.database.change_counters(meter, |counters| {
            reservation = Some(counters.reserve(key, CounterUse::Lease, writer, chunk_size, at_least, CounterJump::NONE).unwrap())
        });
        let mut chunk = LiveChunk::new(reservation.unwrap());
        let lease = chunk.deal(self.database.counters(meter).unwrap().get(key).unwrap(), count, CounterJump::NONE).unwrap();
        server.chunks.insert((meter, key), chunk);
        self.leases.entry(title).or_default().push(lease);
    }

    /// One transaction: the new meter, the domain, and the first meter that joins it.
    fn import_duplicate(&mut self, floor: u64) {
        let mut domain = CounterDomain::new(CounterDomainId([9; 16]));
        let mut second = slot();
        let counters = second.version_mut(KeyVersionNumber::FIRST).unwrap().counters_mut().unwrap();
        counters.raise_floor(self.scopes[1].key(client(0)), floor, None).unwrap();
        for slot in [&mut self.database.meters[0].value, &mut second] {
            slot.join_domain(KeyVersionNumber::FIRST, &mut domain).unwrap();
        }
        self.database.meters[0].generation += 1;
        self.database.meters.push(Row { generation: 1, value: second });
        self.database.domain = Some(Row { generation: 1, value: domain });
    }
}

fn slot() -> Slot {
    let mut slot = Slot::new(SecuritySetupId::DEFAULT, KeyType::GUEK);
    let origin = KeyOrigin::Diversified { root_version: 1, derivation: KeyDerivation::Sp800108Cmac, length: KeyLength::Aes128 };
    slot.add_version(NewKeyVersion { state: KeyState::Active, origin, wrapped: None, fingerprint: None }, UnixMillis(1)).unwrap();
    slot
}

fn client(number: usize) -> SystemTitle {
    SystemTitle::from_octets(&[0x4D, 0x4D, 0x4D, 0, 0, 0, 0, u8::try_from(number).unwrap() + 1]).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_counter_twice_and_newer_leases_are_higher(
        steps in steps(),
        first in prop_oneof![Just(CounterScope::ClientTitle), Just(CounterScope::Setup)],
        second in prop_oneof![Just(CounterScope::ClientTitle), Just(CounterScope::Setup)],
    ) {
        let mut world = World::new([first, second]);
        for step in &steps {
            world.step(step);
        }
        for (title, leases) in &world.leases {
            for pair in leases.windows(2) {
                prop_assert!(pair[0].last() < pair[1].first, "{title}: {:?} then {:?}", pair[0], pair[1]);
            }
        }
    }
}

/// The model must be able to fail: it deals leases, hands chunks over and lets a meter join.
#[test]
fn the_model_reaches_what_it_is_about() {
    let mut world = World::new([CounterScope::ClientTitle; 2]);
    let grant = |server, meter| [Step::Read { server, meter, title: 0 }, Step::Commit { server, count: 10 }];
    let steps = [grant(0, 0), grant(0, 0), grant(1, 0), grant(0, 0)].concat();
    for step in steps.iter().chain([&Step::ImportDuplicate { floor: 400 }]).chain(&grant(0, 1)).chain(&grant(1, 0)) {
        world.step(step);
    }
    let firsts: Vec<u32> = world.leases[&client(0)].iter().map(|lease| lease.first).collect();
    assert_eq!(firsts, [1, 11, 51, 101, 400, 450]);
    // Rows keep what the model's servers saw.
    let row = world.database.domain.unwrap().value.to_row();
    let island = kms_domain::IslandName::parse("dev").unwrap();
    let read = CounterDomain::from_row(CounterDomainId([9; 16]), &island, Bytes::from(row)).unwrap();
    assert_eq!(read.counters.highest_bound(), 500);
}
