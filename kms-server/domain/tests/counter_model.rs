//! I4 under interleaving: servers that race, crash and come back, floors that rise inside, at the
//! edge of and above the chunk that a server allocates from, head-ends that count for a while, a
//! backup that is restored, and a second meter that turns out to have the same key value. Whatever
//! the order, no (key value, client title, counter) is allocated twice, a newer lease is higher,
//! and nothing is allocated below a floor. Sessions, frames, and what a meter's unproven statement
//! skips together never take more counters than an hour has, whatever transfers reserve meanwhile.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::{collections::HashMap, num::NonZeroU32};

use bytes::Bytes;
use kms_domain::{
    ChunkSize, CounterCap, CounterDomain, CounterDomainId, CounterJump, CounterKey, CounterScope, CounterUse, Counters,
    KeyDerivation, KeyLength, KeyOrigin, KeyState, KeyType, KeyVersionNumber, Lease, LiveChunk, NewKeyVersion,
    PrincipalId, SecuritySetupId, Slot, SystemTitle, UnixMillis, WriterId,
};
use proptest::prelude::*;

/// One step. Small numbers choose among the servers, meters and client titles there are.
#[derive(Clone, Debug)]
enum Step {
    /// A server begins a grant: it reads the rows.
    Read { server: usize, meter: usize, title: usize },
    /// The server continues its grant: it allocates from its chunk or reserves another one, and
    /// commits if no row that it read has changed. `count` is in units of the world's scale; a
    /// transfer takes one or two counters.
    Commit { server: usize, count: u32, counter_use: CounterUse },
    /// A server dies and starts again, as another writer with empty memory.
    Crash { server: usize },
    /// An operator raises a floor, or a meter's answer within a cap: this far below the bound, or
    /// above it by less than 200, in units of the scale.
    RaiseFloor { meter: usize, title: usize, below: u64, above: u64, cap: Option<u32> },
    /// A head-end counts by itself from now on.
    LeaveTo { meter: usize, title: usize },
    /// The counter is adopted from it, or from nobody, with a floor.
    TakeOver { meter: usize, title: usize, below: u64, above: u64 },
    /// An hour goes by.
    Hour,
    /// A copy of the database is made.
    Backup,
    /// It is restored, and the island's jump says so.
    Restore,
    /// The second meter is imported with the same key value.
    ImportDuplicate { floor: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..3usize, 0..2usize, 0..2usize).prop_map(|(server, meter, title)| Step::Read { server, meter, title }),
        8 => (0..3usize, 1..20u32, prop_oneof![Just(CounterUse::Lease), Just(CounterUse::Frames), Just(CounterUse::Transfer)])
            .prop_map(|(server, count, counter_use)| Step::Commit { server, count, counter_use }),
        1 => Just(Step::Hour),
        1 => (0..3usize).prop_map(|server| Step::Crash { server }),
        3 => (0..2usize, 0..2usize, floor(), prop_oneof![Just(None), Just(Some(0)), Just(Some(100)), Just(Some(6_000_000))])
            .prop_map(|(meter, title, (below, above), cap)| Step::RaiseFloor { meter, title, below, above, cap }),
        1 => (0..2usize, 0..2usize).prop_map(|(meter, title)| Step::LeaveTo { meter, title }),
        1 => (0..2usize, 0..2usize, floor()).prop_map(|(meter, title, (below, above))| Step::TakeOver { meter, title, below, above }),
        1 => Just(Step::Backup),
        1 => Just(Step::Restore),
        1 => (0..500u64).prop_map(|floor| Step::ImportDuplicate { floor }),
    ];
    prop::collection::vec(step, 0..120)
}

/// How far a floor is below and above the bound: mostly inside the chunk of 50, and often at its
/// edge.
fn floor() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![4 => (0..70u64).prop_map(|below| (below, 0)), 2 => (0..2u64).prop_map(|below| (below, 0)), 2 => (0..200u64).prop_map(|above| (0, above))]
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
    /// How often it was restored: what was read before is none of it.
    restores: u64,
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

    fn generations(&self, meter: usize) -> (u64, u64, u64) {
        if meter >= self.meters.len() {
            return (self.restores, 0, 0);
        }
        (self.restores, self.meters[meter].generation, self.domain.as_ref().map_or(0, |row| row.generation))
    }
}

/// A server's memory.
struct Server {
    writer: WriterId,
    /// With the place of the counter, and the hour that the chunk was reserved in.
    chunks: HashMap<(usize, CounterKey), (LiveChunk, Hour)>,
    reading: Option<(Database, usize, SystemTitle)>,
}

/// A counter (whether it is in the domain, or else whose; which one) in one hour.
type Hour = (Option<usize>, CounterKey, i64);

struct World {
    /// How many counters a unit of the steps is: with 1 no hour has too few, with [`MANY`] three
    /// chunks are more than one has.
    scale: u32,
    hour: i64,
    /// What sessions and frames used of chunks that were reserved in an hour, and a meter's word
    /// skipped in it.
    taken: HashMap<Hour, u64>,
    database: Database,
    servers: Vec<Server>,
    writers: u8,
    scopes: [CounterScope; 2],
    backup: Option<Database>,
    jump: CounterJump,
    /// The highest floor of each client title: what is allocated from now on is at or above it.
    floors: HashMap<SystemTitle, u64>,
    /// What was allocated below a floor.
    below_floor: Vec<(SystemTitle, Lease, u64)>,
    /// All leases of the one key value, by client title.
    leases: HashMap<SystemTitle, Vec<Lease>>,
}

impl World {
    fn new(scopes: [CounterScope; 2], scale: u32) -> Self {
        let database = Database { restores: 0, meters: vec![Row { generation: 1, value: slot() }], domain: None };
        let mut world = Self {
            scale,
            hour: 400_000,
            taken: HashMap::new(),
            database,
            servers: Vec::new(),
            writers: 0,
            scopes,
            backup: None,
            jump: CounterJump::NONE,
            floors: HashMap::new(),
            below_floor: Vec::new(),
            leases: HashMap::new(),
        };
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
            Step::Commit { server, count, counter_use } => {
                let count = if counter_use == CounterUse::Transfer { 1 + count % 2 } else { count * self.scale };
                self.commit(server, NonZeroU32::new(count).unwrap(), counter_use);
            }
            Step::Hour => self.hour += 1,
            Step::Crash { server } => {
                let fresh = self.start();
                self.servers[server] = fresh;
            }
            Step::RaiseFloor { meter, title, below, above, cap } if meter < self.database.meters.len() => {
                let (key, floor) = self.floor(meter, title, below, above);
                let (mut raised, mut skipped, now) = (false, 0, self.now());
                self.database.change_counters(meter, |counters| match cap {
                    None => raised = counters.raise_floor(key, floor, None).is_ok(),
                    Some(cap) => {
                        let bound = |counters: &Counters| counters.get(key).map_or(1, kms_domain::CounterState::bound);
                        // What a first counter of all titles joins is above the bounds of all.
                        let before =
                            if key == CounterKey::Setup { counters.highest_bound().max(1) } else { bound(counters) };
                        raised = counters.follow(key, floor, cap, CAP, now).is_ok();
                        skipped = if raised { bound(counters) - before } else { 0 };
                    }
                });
                if raised {
                    self.note_floor(key, floor);
                }
                if skipped > 0 {
                    *self.taken.entry(self.this_hour(meter, key)).or_default() += skipped;
                }
            }
            Step::LeaveTo { meter, title } if meter < self.database.meters.len() => {
                let key = self.scopes[meter].key(client(title));
                self.database.change_counters(meter, |counters| counters.leave_to(key, head_end()));
            }
            Step::TakeOver { meter, title, below, above } if meter < self.database.meters.len() => {
                let (key, floor) = self.floor(meter, title, below, above);
                self.database.change_counters(meter, |counters| counters.take_over(key, floor));
                self.note_floor(key, floor);
            }
            Step::Backup => self.backup = Some(self.database.clone()),
            Step::Restore => {
                if let Some(backup) = self.backup.clone() {
                    let counted = (0..self.database.meters.len())
                        .filter_map(|meter| self.database.counters(meter))
                        .map(Counters::highest_bound)
                        .max();
                    let restores = self.database.restores + 1;
                    // What the hour had taken is lost with the rows.
                    self.hour += 2;
                    self.database = Database { restores, ..backup };
                    // More than can have been counted since: what the committer of a server finds
                    // out when it starts on an older database.
                    self.jump = self.jump.raised_by(u32::try_from(counted.unwrap_or(0)).unwrap_or(u32::MAX));
                }
            }
            Step::ImportDuplicate { floor } if self.database.meters.len() == 1 => self.import_duplicate(floor),
            _ => {}
        }
    }

    /// A counter of a meter, and a floor relative to its bound.
    fn floor(&self, meter: usize, title: usize, below: u64, above: u64) -> (CounterKey, u64) {
        let key = self.scopes[meter].key(client(title));
        let bound = self.database.counters(meter).map_or(0, Counters::highest_bound);
        let scale = u64::from(self.scale);
        (key, (bound + above * scale).saturating_sub(below * scale))
    }

    fn now(&self) -> UnixMillis {
        UnixMillis(self.hour * 3_600_000)
    }

    fn this_hour(&self, meter: usize, key: CounterKey) -> Hour {
        let own =
            matches!(self.database.meters[meter].value.versions()[0].counters(), kms_domain::CounterPlace::Own(_));
        let counter = self
            .database
            .counters(meter)
            .and_then(|counters| counters.get(key))
            .map_or(key, kms_domain::CounterState::key);
        (own.then_some(meter), counter, self.hour)
    }

    fn note_floor(&mut self, key: CounterKey, floor: u64) {
        for title in [client(0), client(1)] {
            if key == CounterKey::Setup || key == CounterKey::ClientTitle(title) {
                let known = self.floors.entry(title).or_default();
                *known = floor.max(*known);
            }
        }
    }

    /// `hour` is that of the chunk's reservation, where the cap counts it.
    fn allocated(&mut self, title: SystemTitle, lease: Lease, counter_use: CounterUse, hour: Hour) {
        if counter_use != CounterUse::Transfer {
            *self.taken.entry(hour).or_default() += u64::from(lease.count);
        }
        let floor = self.floors.get(&title).copied().unwrap_or_default();
        if u64::from(lease.first) < floor {
            self.below_floor.push((title, lease, floor));
        }
        self.leases.entry(title).or_default().push(lease);
    }

    /// The second half of a grant, as a server does it: one transaction that fails if a row that
    /// was read has changed.
    fn commit(&mut self, server: usize, count: NonZeroU32, counter_use: CounterUse) {
        let jump = self.jump;
        let server_number = server;
        let server = &mut self.servers[server_number];
        let Some((read, meter, title)) = server.reading.take() else { return };
        let key = self.scopes[meter].key(title);
        let unchanged = read.generations(meter) == self.database.generations(meter);
        let state = read.counters(meter).and_then(|counters| counters.get(key)).cloned();
        let chunk = server.chunks.get_mut(&(meter, key));
        let at_least = chunk.as_ref().map_or(0, |(chunk, _)| chunk.bound());
        if let (Some((chunk, hour)), Some(state)) = (chunk, &state)
            && chunk.serves(counter_use)
            && let Ok(lease) = chunk.allocate(state, count, jump)
        {
            let hour = *hour;
            if unchanged {
                self.allocated(title, lease, counter_use, hour);
            }
            return;
        }
        if !unchanged {
            return;
        }
        let mut reserved = None;
        let writer = server.writer;
        let chunk_size = ChunkSize::new(NonZeroU32::new(50 * self.scale).unwrap()).serving(counter_use, count);
        let now = UnixMillis(self.hour * 3_600_000);
        self.database.change_counters(meter, |counters| {
            let mut changed = counters.clone();
            let reservation = changed.reserve(key, counter_use, writer, chunk_size, at_least, jump);
            let counted = reservation.and_then(|reservation| {
                changed.count_into_hour(reservation, counter_use, CAP, now).map(|_| reservation)
            });
            if counted.is_ok() {
                *counters = changed;
            }
            reserved = Some(counted);
        });
        // Nothing while a head-end counts, or when the hour has no more.
        let Ok(reservation) = reserved.unwrap() else { return };
        let hour = self.this_hour(meter, key);
        let mut chunk = LiveChunk::new(reservation);
        // Fewer than were asked for, at the end of the counter space.
        let lease = chunk.allocate(self.database.counters(meter).unwrap().get(key).unwrap(), count, jump);
        self.servers[server_number].chunks.insert((meter, key), (chunk, hour));
        if let Ok(lease) = lease {
            self.allocated(title, lease, counter_use, hour);
        }
    }

    fn most_taken(&self) -> u64 {
        self.taken.values().copied().max().unwrap_or(0)
    }

    /// One transaction: the new meter, the domain, and the first meter that joins it.
    fn import_duplicate(&mut self, floor: u64) {
        let mut domain = CounterDomain::new(CounterDomainId([9; 16]));
        let mut second = slot();
        let counters = second.version_mut(KeyVersionNumber::FIRST).unwrap().counters_mut().unwrap();
        let key = self.scopes[1].key(client(0));
        counters.raise_floor(key, floor, None).unwrap();
        for slot in [&mut self.database.meters[0].value, &mut second] {
            slot.join_domain(KeyVersionNumber::FIRST, &mut domain).unwrap();
        }
        self.database.meters[0].generation += 1;
        self.database.meters.push(Row { generation: 1, value: second });
        self.database.domain = Some(Row { generation: 1, value: domain });
        self.note_floor(key, floor);
    }
}

/// An hour's counters.
const CAP: CounterCap = CounterCap::DEFAULT;
/// A chunk of 50 units is 1,500,000 counters then.
const MANY: u32 = 30_000;

fn slot() -> Slot {
    let mut slot = Slot::new(SecuritySetupId::DEFAULT, KeyType::GUEK);
    let origin =
        KeyOrigin::Diversified { root_version: 1, derivation: KeyDerivation::Sp800108Cmac, length: KeyLength::Aes128 };
    slot.add_version(
        NewKeyVersion { state: KeyState::Active, origin, wrapped: None, fingerprint: None },
        UnixMillis(1),
    )
    .unwrap();
    slot
}

fn head_end() -> PrincipalId {
    PrincipalId::new(kms_domain::IslandName::parse("dev").unwrap(), kms_domain::Role::HeadEnd, "hes").unwrap()
}

fn client(number: usize) -> SystemTitle {
    SystemTitle::from_octets(&[0x4D, 0x4D, 0x4D, 0, 0, 0, 0, u8::try_from(number).unwrap() + 1]).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_counter_twice_none_below_a_floor_and_newer_leases_are_higher(
        steps in steps(),
        first in prop_oneof![Just(CounterScope::ClientTitle), Just(CounterScope::Setup)],
        second in prop_oneof![Just(CounterScope::ClientTitle), Just(CounterScope::Setup)],
        scale in prop_oneof![Just(1), Just(MANY)],
    ) {
        let mut world = World::new([first, second], scale);
        for step in &steps {
            world.step(step);
        }
        prop_assert!(world.most_taken() <= u64::from(CAP.get()), "taken in an hour: {:?}", world.taken);
        prop_assert!(world.below_floor.is_empty(), "below a floor: {:?}", world.below_floor);
        for (title, leases) in &world.leases {
            for pair in leases.windows(2) {
                prop_assert!(pair[0].last() < pair[1].first, "{title}: {:?} then {:?}", pair[0], pair[1]);
            }
        }
    }
}

/// Whoever has transfers take counters between its sessions, on one server or on two in turn, gets
/// no more than an hour has; nor does who forges the answers of a meter.
#[test]
fn transfers_and_answers_open_no_way_past_the_hour() {
    let commit = |server, count, counter_use| {
        [Step::Read { server, meter: 0, title: 0 }, Step::Commit { server, count, counter_use }]
    };
    let answer = || vec![Step::RaiseFloor { meter: 0, title: 0, below: 0, above: 5, cap: Some(150_000) }];
    for servers in [[0, 0], [0, 1]] {
        for forged in [false, true] {
            let mut world = World::new([CounterScope::ClientTitle; 2], MANY);
            for turn in 0..60 {
                let server = servers[turn % 2];
                let mut steps = commit(server, 1, CounterUse::Transfer).to_vec();
                // What a chunk of 50 units has beside the transfer's counters, as nearly as units
                // go.
                steps.extend(
                    [
                        commit(server, 19, CounterUse::Lease),
                        commit(server, 19, CounterUse::Frames),
                        commit(server, 11, CounterUse::Lease),
                    ]
                    .concat(),
                );
                steps.extend(if forged { answer() } else { Vec::new() });
                steps.iter().for_each(|step| world.step(step));
            }
            let most = world.most_taken();
            assert!(
                (500_000..=u64::from(CAP.get())).contains(&most),
                "{most} counters in an hour, servers {servers:?}, forged {forged}"
            );
            // The key has them for the next hours.
            assert!(world.database.counters(0).unwrap().highest_bound() < 2 * u64::from(CAP.get()));
            let transfers = world.leases[&client(0)].len();
            commit(0, 1, CounterUse::Transfer).iter().for_each(|step| world.step(step));
            assert_eq!(world.leases[&client(0)].len(), transfers + 1, "a transfer is never refused");
        }
    }
}

/// The model must be able to fail: it allocates leases, hands chunks over and lets a meter join.
#[test]
fn the_model_reaches_what_it_is_about() {
    let mut world = World::new([CounterScope::ClientTitle; 2], 1);
    let grant = |server, meter| {
        [Step::Read { server, meter, title: 0 }, Step::Commit { server, count: 10, counter_use: CounterUse::Lease }]
    };
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

/// Floors inside the chunk, at its edge and above it, for the server that allocates from it and for
/// another one that has read the row.
#[test]
fn a_floor_binds_every_server_at_once() {
    let raise = |below, above| Step::RaiseFloor { meter: 0, title: 0, below, above, cap: Some(100) };
    let grant = |server| {
        [Step::Read { server, meter: 0, title: 0 }, Step::Commit { server, count: 10, counter_use: CounterUse::Frames }]
    };
    for (floor, expected) in [
        (raise(30, 0), 21),
        (raise(10, 0), 41),
        (raise(9, 0), 51),
        (raise(0, 0), 51),
        (raise(0, 1), 52),
        (raise(0, 70), 121),
    ] {
        let mut world = World::new([CounterScope::ClientTitle; 2], 1);
        let [read, commit] = grant(1);
        for step in grant(0).iter().chain([&read, &floor, &commit]) {
            world.step(step);
        }
        assert_eq!(world.leases[&client(0)].len(), 1, "another server's row was old");
        for step in &grant(0) {
            world.step(step);
        }
        assert_eq!(world.leases[&client(0)][1].first, expected, "{floor:?}");
        for step in &grant(1) {
            world.step(step);
        }
        assert!(world.leases[&client(0)][2].first > expected && world.below_floor.is_empty());
    }
}
