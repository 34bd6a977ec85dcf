//! A simulated meter: shared state behind a handle, and the questions of tests.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::behaviour::{Behaviour, CounterOnNewKey, Fault, ScriptedFault, Trigger};
use crate::config::{CounterScope, MeterConfig, SecuritySetupConfig};
use crate::inspect::{InspectedKeys, NonceKey, NonceUse, Refusal};
use crate::objects::Objects;
use crate::{Error, KeyId, Obis, SecuritySuite, SymmetricKey, SystemTitle};

/// A simulated meter. Clones are handles to the same meter; connections to it are
/// [`crate::Connection`]s.
#[derive(Clone)]
pub struct Meter {
    state: Arc<Mutex<MeterState>>,
}

impl Meter {
    /// A meter as `config` describes it. Refuses keys that are not of the suite's length, security
    /// setups with one name, and associations that name a security setup that is not there.
    pub fn new(config: MeterConfig) -> Result<Self, Error> {
        Ok(Self { state: Arc::new(Mutex::new(MeterState::new(config)?)) })
    }

    /// The meter's system title.
    pub fn system_title(&self) -> SystemTitle {
        self.lock().config.system_title
    }

    /// The power fails and returns: every association ends, held requests are gone, and the keys in
    /// [`Behaviour::reverts_on_power_cycle`] return to the ones before.
    pub fn power_cycle(&self) {
        self.lock().power_cycle();
    }

    /// Changes the behaviour of the meter from now on.
    pub fn set_behaviour(&self, behaviour: Behaviour) {
        self.lock().config.behaviour = behaviour;
    }

    /// Adds a fault.
    pub fn add_fault(&self, fault: ScriptedFault) {
        self.lock().config.faults.push(fault);
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.lock().config.faults.clear();
    }

    /// The next challenges begin with these octets, one challenge each; the rest of it comes from
    /// the seed as before.
    pub fn choose_challenges(&self, beginnings: impl IntoIterator<Item = Vec<u8>>) {
        self.lock().chosen_challenges.extend(beginnings);
    }

    /// The number of associations that clients asked for so far, lost requests included: what
    /// [`Trigger::AssociationRequest`] counts.
    pub fn association_requests(&self) -> u64 {
        self.lock().association_requests
    }

    /// The number of requests that clients sent so far, lost ones included: what
    /// [`Trigger::Exchange`] counts.
    pub fn exchanges(&self) -> u64 {
        self.lock().exchanges
    }

    /// The number of `key_transfer` requests that clients sent so far: what
    /// [`Trigger::KeyTransfer`] counts.
    pub fn key_transfers(&self) -> u64 {
        self.lock().key_transfers
    }

    /// Whether the disconnect control object at `logical_name` is connected; `None` if there is
    /// none.
    pub fn is_connected(&self, logical_name: Obis) -> Option<bool> {
        self.lock().objects.is_connected(logical_name)
    }

    /// The keys that the security setup `setup` holds now, in plaintext. For tests only: a real
    /// meter never shows them.
    pub fn keys_for_inspection(&self, setup: Obis) -> Option<InspectedKeys> {
        let state = self.lock();
        let setup = state.setup(setup)?;
        Some(InspectedKeys {
            guek: setup.guek.current().key.clone(),
            gak: setup.gak.current().key.clone(),
            gbek: setup.gbek.as_ref().map(|gbek| gbek.current().key.clone()),
            kek: setup.kek.current().key.clone(),
            vendor_keys: setup.vendor_keys.iter().map(|(id, history)| (*id, history.current().key.clone())).collect(),
        })
    }

    /// The value of a key that the nonce log names. For tests.
    pub fn nonce_key_for_inspection(&self, key: NonceKey) -> Option<SymmetricKey> {
        let state = self.lock();
        match key {
            NonceKey::Unicast { setup, generation } => Some(state.setup(setup)?.guek.record(generation)?.key.clone()),
            NonceKey::Broadcast { setup, generation } => {
                Some(state.setup(setup)?.gbek.as_ref()?.record(generation)?.key.clone())
            }
            NonceKey::Dedicated { generation } => state.dedicated_keys.get(generation).cloned(),
        }
    }

    /// The last accepted invocation counter of `client` under the current GUEK of `setup`, in the
    /// setup's counter scope.
    pub fn last_accepted_counter(&self, setup: Obis, client: &SystemTitle) -> Option<u32> {
        let state = self.lock();
        let setup = state.setup(setup)?;
        setup.guek.current().received.last(setup.counter_scope, client)
    }

    /// Every nonce that the meter saw proven or used itself, in order. It grows with every message.
    pub fn nonce_log(&self) -> Vec<NonceUse> {
        self.lock().nonces.clone()
    }

    /// The last 1,024 requests that the meter refused, oldest first.
    pub fn refusals(&self) -> Vec<Refusal> {
        self.lock().refusals.iter().copied().collect()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, MeterState> {
        // A panic of a test thread must not hide the meter from the others.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Meter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Meter({})", self.system_title())
    }
}

/// The state that the connections to one meter share.
pub(crate) struct MeterState {
    pub(crate) config: MeterConfig,
    pub(crate) objects: Objects,
    pub(crate) setups: Vec<Setup>,
    /// Counts power cycles: an association of an earlier epoch has ended.
    pub(crate) epoch: u64,
    pub(crate) dedicated_keys: Vec<SymmetricKey>,
    pub(crate) exchanges: u64,
    pub(crate) held: Vec<HeldRequest>,
    /// The fault of the `key_transfer` under way.
    pub(crate) transfer_fault: Option<Fault>,
    key_transfers: u64,
    association_requests: u64,
    /// The number of challenges so far.
    challenges: u64,
    chosen_challenges: VecDeque<Vec<u8>>,
    nonces: Vec<NonceUse>,
    seen_nonces: HashSet<NonceUse>,
    refusals: VecDeque<Refusal>,
}

/// A request that the network holds back.
pub(crate) struct HeldRequest {
    pub(crate) apdu: Vec<u8>,
    /// Arrives before the request with this number.
    pub(crate) until_exchange: u64,
    pub(crate) answered: bool,
}

impl MeterState {
    fn new(mut config: MeterConfig) -> Result<Self, Error> {
        let length = config.security_suite.key_length();
        let mut setups: Vec<Setup> = Vec::new();
        for setup in &config.security_setups {
            let keys = [&setup.guek, &setup.gak, &setup.kek];
            if keys.into_iter().chain(&setup.gbek).any(|key| key.expose().len() != length) {
                return Err(Error::malformed("security setup", "has a key that is not of the suite's length"));
            }
            if setups.iter().any(|other| other.name == setup.logical_name) {
                return Err(Error::malformed("security setup", "has a name twice"));
            }
            setups.push(Setup::new(setup));
        }
        for association in &config.associations {
            let known = match association.security_setup {
                Some(name) => setups.iter().any(|setup| setup.name == name),
                None => !matches!(association.mechanism, crate::config::MechanismConfig::HighGmac),
            };
            if !known {
                return Err(Error::malformed("association", "names no security setup that the meter has"));
            }
        }
        let objects = Objects::new(std::mem::take(&mut config.objects));
        // From here on the keys live in the setups only.
        config.security_setups.clear();
        let chosen_challenges =
            std::mem::take(&mut config.challenges.chosen).into_iter().map(|beginning| beginning.0).collect();
        Ok(Self {
            config,
            objects,
            setups,
            epoch: 0,
            dedicated_keys: Vec::new(),
            exchanges: 0,
            held: Vec::new(),
            transfer_fault: None,
            key_transfers: 0,
            association_requests: 0,
            challenges: 0,
            chosen_challenges,
            nonces: Vec::new(),
            seen_nonces: HashSet::new(),
            refusals: VecDeque::new(),
        })
    }

    pub(crate) fn suite(&self) -> SecuritySuite {
        self.config.security_suite
    }

    pub(crate) fn setup(&self, name: Obis) -> Option<&Setup> {
        self.setups.iter().find(|setup| setup.name == name)
    }

    pub(crate) fn setup_mut(&mut self, name: Obis) -> Option<&mut Setup> {
        self.setups.iter_mut().find(|setup| setup.name == name)
    }

    pub(crate) fn power_cycle(&mut self) {
        self.epoch += 1;
        self.held.clear();
        self.transfer_fault = None;
        let behaviour = &self.config.behaviour;
        let keeps_counting = behaviour.counter_on_new_key == CounterOnNewKey::KeepCounting;
        for setup in &mut self.setups {
            for id in &behaviour.reverts_on_power_cycle {
                if let Some(history) = setup.history_mut(*id) {
                    history.revert(keeps_counting);
                }
            }
        }
    }

    /// The next challenge, of this many bytes.
    pub(crate) fn next_challenge(&mut self, length: usize) -> Vec<u8> {
        let (seed, answerable) = (self.config.challenges.seed, self.config.challenges.answerable);
        let title = u64::from_be_bytes(*self.config.system_title.as_bytes());
        loop {
            self.challenges += 1;
            let mut random = SplitMix64(seed ^ SplitMix64(title).next() ^ SplitMix64(self.challenges).next());
            let mut challenge: Vec<u8> =
                (0..length.div_ceil(8)).flat_map(|_| random.next().to_be_bytes()).take(length).collect();
            match self.chosen_challenges.pop_front() {
                Some(beginning) => {
                    for (octet, chosen) in challenge.iter_mut().zip(beginning) {
                        *octet = chosen;
                    }
                    return challenge;
                }
                None if answerable && challenge.first().is_some_and(|first| REQUESTS.contains(first)) => {}
                None => return challenge,
            }
        }
    }

    /// Counts a request and takes the faults that the script has for it.
    pub(crate) fn count_request(&mut self, kind: RequestKind) -> Vec<Fault> {
        self.exchanges += 1;
        match kind {
            RequestKind::KeyTransfer => self.key_transfers += 1,
            RequestKind::AssociationRequest => self.association_requests += 1,
            RequestKind::Other => {}
        }
        let mut due = Vec::new();
        let (exchanges, key_transfers, association_requests) =
            (self.exchanges, self.key_transfers, self.association_requests);
        self.config.faults.retain(|scripted| {
            let is_due = match scripted.at {
                Trigger::Exchange(n) => n == exchanges,
                Trigger::KeyTransfer(n) => kind == RequestKind::KeyTransfer && n == key_transfers,
                Trigger::AssociationRequest(n) => kind == RequestKind::AssociationRequest && n == association_requests,
            };
            if is_due {
                due.push(scripted.fault.clone());
            }
            !is_due
        });
        due
    }

    /// Records a proven nonce. A copy of a message that was recorded before is not recorded again,
    /// so that a replay cannot fill the memory.
    pub(crate) fn record_nonce(&mut self, nonce_use: NonceUse) {
        let seen = NonceUse { accepted: true, ..nonce_use };
        if self.seen_nonces.insert(seen) {
            self.nonces.push(nonce_use);
        }
    }

    pub(crate) fn record_refusal(&mut self, refusal: Refusal) {
        if self.refusals.len() == MAX_REFUSALS {
            self.refusals.pop_front();
        }
        self.refusals.push_back(refusal);
    }

    /// The number of this dedicated key among those that the meter has seen.
    pub(crate) fn dedicated_generation(&mut self, key: &SymmetricKey) -> usize {
        let known = self.dedicated_keys.iter().position(|known| known == key);
        known.unwrap_or_else(|| {
            self.dedicated_keys.push(key.clone());
            self.dedicated_keys.len() - 1
        })
    }
}

/// Pseudo-random numbers from a seed.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

/// The first bytes of the services that a meter executes (IEC 62056-5-3, the choices of
/// xDLMS-APDU). A careful client does not answer a challenge that begins with one of them.
pub const REQUESTS: [u8; 10] = [0x01, 0x05, 0x06, 0x10, 0x16, 0xC0, 0xC1, 0xC3, 0xD9, 0xE0];

/// What a request is, for the fault script.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestKind {
    KeyTransfer,
    AssociationRequest,
    Other,
}

/// The state of a security setup.
pub(crate) struct Setup {
    pub(crate) name: Obis,
    pub(crate) invocation_counter_object: Obis,
    pub(crate) guek: KeyHistory,
    pub(crate) gak: KeyHistory,
    pub(crate) gbek: Option<KeyHistory>,
    pub(crate) kek: KeyHistory,
    pub(crate) vendor_keys: BTreeMap<u8, KeyHistory>,
    pub(crate) client_titles: Option<Vec<SystemTitle>>,
    pub(crate) counter_scope: CounterScope,
    pub(crate) accept_authenticated_only: bool,
}

impl Setup {
    fn new(config: &SecuritySetupConfig) -> Self {
        let mut guek = KeyHistory::new(config.guek.clone());
        let record = guek.current_mut();
        record.received.per_title = config.counter_floors.clone();
        record.next_own = u64::from(config.server_counter);
        Self {
            name: config.logical_name,
            invocation_counter_object: config.invocation_counter_object,
            guek,
            gak: KeyHistory::new(config.gak.clone()),
            gbek: config.gbek.clone().map(KeyHistory::new),
            kek: KeyHistory::new(config.kek.clone()),
            vendor_keys: config.vendor_keys.iter().map(|(id, key)| (*id, KeyHistory::new(key.clone()))).collect(),
            client_titles: config.client_titles.clone(),
            counter_scope: config.counter_scope,
            accept_authenticated_only: config.accept_authenticated_only,
        }
    }

    pub(crate) fn history_mut(&mut self, id: KeyId) -> Option<&mut KeyHistory> {
        match id {
            KeyId::GlobalUnicastEncryption => Some(&mut self.guek),
            KeyId::GlobalBroadcastEncryption => self.gbek.as_mut(),
            KeyId::GlobalAuthentication => Some(&mut self.gak),
            KeyId::Master => Some(&mut self.kek),
            KeyId::Vendor(id) => self.vendor_keys.get_mut(&id),
        }
    }

    /// Puts `key` in its place.
    pub(crate) fn install(&mut self, id: KeyId, key: SymmetricKey, counter: CounterOnNewKey) {
        match (self.history_mut(id), id) {
            (Some(history), _) => history.install(key, counter),
            (None, KeyId::GlobalBroadcastEncryption) => {
                self.gbek = Some(KeyHistory::new(key));
            }
            (None, _) => {}
        }
    }
}

/// The values that one key has had, each with its counters, and the one in force.
pub(crate) struct KeyHistory {
    records: Vec<KeyRecord>,
    current: usize,
    previous: Option<usize>,
}

impl KeyHistory {
    fn new(key: SymmetricKey) -> Self {
        Self { records: vec![KeyRecord::new(key)], current: 0, previous: None }
    }

    pub(crate) fn generation(&self) -> usize {
        self.current
    }

    pub(crate) fn record(&self, generation: usize) -> Option<&KeyRecord> {
        self.records.get(generation)
    }

    pub(crate) fn record_mut(&mut self, generation: usize) -> Option<&mut KeyRecord> {
        self.records.get_mut(generation)
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "`current` is always the position of a record: records are never removed"
    )]
    pub(crate) fn current(&self) -> &KeyRecord {
        &self.records[self.current]
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "`current` is always the position of a record: records are never removed"
    )]
    pub(crate) fn current_mut(&mut self) -> &mut KeyRecord {
        &mut self.records[self.current]
    }

    fn install(&mut self, key: SymmetricKey, counter: CounterOnNewKey) {
        let (received, next_own) = match counter {
            CounterOnNewKey::KeepCounting => {
                let record = self.current();
                (record.received.clone(), record.next_own)
            }
            CounterOnNewKey::RestartAt(first) => {
                (ReceivedCounters { per_title: BTreeMap::new(), floor: first.checked_sub(1) }, u64::from(first))
            }
        };
        let known = self.records.iter().position(|record| record.key == key);
        let generation = known.unwrap_or(self.records.len());
        match self.records.get_mut(generation) {
            Some(record) => {
                record.received = received;
                record.next_own = next_own;
            }
            None => self.records.push(KeyRecord { key, received, next_own }),
        }
        if generation != self.current {
            self.previous = Some(self.current);
            self.current = generation;
        }
    }

    fn revert(&mut self, keeps_counting: bool) {
        let Some(previous) = self.previous.take() else {
            return;
        };
        let (received, next_own) = {
            let record = self.current();
            (record.received.clone(), record.next_own)
        };
        self.current = previous;
        if keeps_counting {
            let record = self.current_mut();
            record.received = received;
            record.next_own = next_own;
        }
    }
}

/// One value of a key, and the counters that belong to it.
#[derive(Clone)]
pub(crate) struct KeyRecord {
    pub(crate) key: SymmetricKey,
    pub(crate) received: ReceivedCounters,
    next_own: u64,
}

impl KeyRecord {
    pub(crate) fn new(key: SymmetricKey) -> Self {
        Self { key, received: ReceivedCounters::default(), next_own: 0 }
    }

    /// Uses up the meter's own next counter; `None`: there are no more.
    pub(crate) fn draw_own_counter(&mut self) -> Option<u32> {
        let counter = u32::try_from(self.next_own).ok()?;
        self.next_own += 1;
        Some(counter)
    }

    /// Skips the meter's own counters up to `counter`.
    pub(crate) fn go_on_after(&mut self, counter: u32) {
        self.next_own = self.next_own.max(u64::from(counter) + 1);
    }
}

/// The last accepted invocation counters of clients.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReceivedCounters {
    per_title: BTreeMap<SystemTitle, u32>,
    floor: Option<u32>,
}

impl ReceivedCounters {
    pub(crate) fn last(&self, scope: CounterScope, title: &SystemTitle) -> Option<u32> {
        match scope {
            CounterScope::PerClientTitle => self.per_title.get(title).copied().or(self.floor),
            CounterScope::PerSecuritySetup => self.highest(),
        }
    }

    /// The highest over all titles: what the invocation counter object shows.
    pub(crate) fn highest(&self) -> Option<u32> {
        self.per_title.values().copied().max().or(self.floor)
    }

    pub(crate) fn accept(&mut self, title: SystemTitle, counter: u32) {
        self.per_title.insert(title, counter);
    }
}

const MAX_REFUSALS: usize = 1024;
