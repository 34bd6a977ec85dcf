//! I3 and I4 under every interleaving: transfers checked by a model checker.
//!
//! The server is the crate itself: its state is the octets of the meter's row, read and written in
//! each step. Around it are a meter that does what real meters were seen to do, and a network that
//! belongs to an adversary:
//!
//! - every request stays in the network: it arrives at any later time, in any order, once, often or
//!   never. A crash of the server after its act is stored, and a crash of a head-end, are requests
//!   that never arrive; what is sent again is read from the row and must be the same octets (I4);
//! - every answer stays, too. What reaches the server is any answer that ever was, or none, or an
//!   exception response, which anyone can write. An answer counts as what its octets can be read
//!   as: those to a challenge only for the present challenge, all others whenever the pair of keys
//!   fits;
//! - the meter refuses counters that do not rise, keys that were not wrapped under its KEK, and
//!   other keys than its own. It answers an error although it has applied the key. When its power
//!   fails it goes back to the keys before, all of them; one variant forgets the counters as well.
//!
//! Limits of what is claimed, which are also the limits of I3. No request and no wrapped key
//! arrives later than the retention time. A meter goes back to a key before only within the
//! retention time after the change, and talks to the server again within half of it. Time moves in
//! halves of the retention time, and only when a meter that went back has been noticed.
//!
//! Each test below bounds what happens: the transfers, and how often each kind of trouble comes.
//! All reachable states within the bounds are visited, so requests are lost, repeated and reordered
//! without a bound. All tests together take about a minute of one core.
//!
//! | test | transfers | power failures | halves | states | depth |
//! |---|---|---|---|---|---|
//! | `two_gueks_one_after_another` | GUEK, GUEK | 1 | 0 | 286,087 | 33 |
//! | `a_guek_and_the_retention_time` | GUEK, probe | 1 | 2 | 63,620 | 26 |
//! | `a_compromised_guek_and_skipped_counters` | GUEK | 0 | 2 | 138,301 | 19 |
//! | `a_guek_and_a_meter_that_forgets_its_counters` | GUEK, GUEK | 1 | 0 | 302,223 | 34 |
//! | `a_guek_and_a_gak` | GUEK, GAK | 1 | 0 | 238,606 | 34 |
//! | `a_kek_and_a_guek_after_it` | KEK with GUEK, GUEK | 1 | 0 | 226,103 | 39 |
//! | `a_kek_and_the_retention_time` | KEK with GUEK, probe | 1 | 2 | 229,847 | 32 |
//! | `a_kek_by_a_head_end_that_ciphers` | KEK with GUEK, GUEK | 1 | 0 | 229,090 | 30 |
//! | `two_head_ends` | GUEK, GAK | 0 | 0 | 114,946 | 32 |
//! | `two_gbeks_and_the_retention_time` | GBEK, GBEK | 0 | 2 | 3,301 | 17 |
//! | `a_guek_and_challenges_that_are_not_to_be_answered` | GUEK, probe | 0 | 0 | 44,939 | 24 |
//!
//! The remaining tests break one rule of the server each, and the checker must find what is lost by
//! it.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    hash::{Hash, Hasher},
    num::NonZeroU32,
    sync::Arc,
};

use bytes::Bytes;
use kms_domain::*;
use stateright::{Checker, HasDiscoveries, Model, Property};

/// What a configuration lets happen, and how often.
#[derive(Clone, Debug)]
struct World {
    /// The rules that the server keeps.
    rule: Rule,
    /// The transfers, one after another, and what each may bring.
    transfers: Vec<Vec<Order>>,
    /// Client titles: one of each head-end.
    titles: u8,
    /// Who ciphers the deliveries.
    form: TransferForm,
    /// Power failures.
    reverts: u8,
    /// Whether a power failure makes the meter forget the counters that it accepted.
    forgets_counters: bool,
    /// Whether the meter can answer with an error although it has applied the key.
    applies_and_errs: bool,
    /// Active or new versions of the GUEK that are reported compromised.
    compromises: u8,
    /// Counters that a forged exception makes the server skip, or a crash.
    skipped_counters: u8,
    /// Associations of the meter, true or forged, that bring a challenge which is not to be
    /// answered.
    unfit_challenges: u8,
    /// Halves of the retention time that pass.
    halves: u8,
}

/// The rules of the server: the right ones, or one that is wrong in one respect, to see that the
/// checker finds what comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Those of the crate.
    Sound,
    /// The meter's acceptance counts as proof.
    AcceptanceIsProof,
    /// An answer to `key_transfer` counts although the meter gave it earlier.
    EarlierAnswersCount,
    /// A key leaves before the row that names it is stored.
    LeavesBeforeStored,
    /// Counters are used before the row that reserves them is stored.
    CountersNotStored,
    /// Candidates of a slot are released although another slot shows that the meter went back to
    /// earlier keys.
    ReleasedSlotBySlot,
}

/// What a transfer brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Probe,
    Own(KeyType),
    Compound,
}

/// A step of someone.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    /// A transfer begins, by a head-end with this client title. An earlier one is given up: its
    /// time has run out.
    Begin { order: Order, title: u8 },
    /// A request arrives at the meter.
    Arrive { request: Request, errs: bool },
    /// A report arrives at the server.
    Report { observation: Observation },
    /// As before, but the server dies after the request has left and before the row is stored.
    ReportAndCrash { observation: Observation },
    /// The meter's power fails, and it goes back to the keys before.
    Revert,
    /// An officer reports the newest or the active version of the GUEK compromised.
    Compromise { version: KeyVersionNumber },
    /// The server dies with reserved counters in its memory.
    SkipCounters,
    /// Half of the retention time passes; released versions are destroyed.
    Half,
}

/// GUEK and GAK.
type Pair = (u32, u32);

/// A request in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Request {
    /// The head-end.
    title: u8,
    /// The keys that protect it; `None` where the head-end uses a session of its own, under
    /// whatever the meter holds.
    pair: Option<Pair>,
    /// The last of its counters.
    counter: u32,
    content: Content,
    /// When it left.
    sent: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Content {
    Associate { challenge: u64 },
    Authenticate { meter_challenge: u64 },
    Deliver { key: usize, version: u32, kek: u32 },
}

/// An answer of the meter, protected under a pair of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Reply {
    Associated { pair: Pair, meter_challenge: u64 },
    Authenticated { pair: Pair, challenge: u64, meter_counter: u32 },
    Answered { pair: Pair, result: u8, meter_counter: u32 },
}

/// The meter.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Device {
    /// The versions that it uses, in the order of [`KEYS`].
    keys: [u32; 4],
    /// The version before, and when it changed: what it may go back to.
    former: [Option<(u32, u8)>; 4],
    /// The last counter that it accepted, by version of the GUEK and client title.
    accepted: BTreeMap<(u32, u8), u32>,
    /// The association that waits for the answer to its challenge.
    association: Option<(Pair, u64, u64)>,
    /// Its own counters by version of the GUEK.
    counters: BTreeMap<u32, u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    /// All that the server knows.
    row: Row,
    time: u8,
    device: Device,
    requests: BTreeSet<Request>,
    replies: BTreeSet<Reply>,
    begun: u8,
    reverts: u8,
    compromises: u8,
    skipped_counters: u8,
    unfit_challenges: u8,
    /// The meter went back to earlier keys, and has not shown it yet.
    unnoticed: bool,
    /// The versions that the meter ever held, by key.
    ever_held: [BTreeSet<u32>; 4],
    /// The pairs that it held since the present challenge was drawn.
    held_since_challenge: BTreeSet<Pair>,
    /// The last request, by version of the GUEK and client title.
    last: BTreeMap<(u32, u8), Request>,
    outcome: Option<Outcome>,
    fault: Option<Fault>,
}

/// The octets of the meter's row, and what was read from them.
#[derive(Clone)]
struct Row(Vec<u8>, Arc<Meter>);

impl Row {
    fn new(meter: &Meter) -> Self {
        let octets = meter.to_row().unwrap();
        let read = Meter::from_row(title(), &island(), Bytes::copy_from_slice(&octets)).unwrap();
        Self(octets, Arc::new(read))
    }
}

impl PartialEq for Row {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Row {}

impl Hash for Row {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Debug for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.1.fmt(f)
    }
}

/// What went wrong in a step.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Fault {
    NonceRepeated,
    FalseOutcome(Outcome),
    StepRefused(String),
    ChallengeCounted,
}

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let slots = KEYS.map(|key_type| {
            let mut slot = Slot::new(SETUP, key_type);
            slot.add_version(diversified(KeyState::Active), moment(0)).unwrap();
            slot
        });
        let meter = Meter {
            title: title(),
            class: MeterClass {
                vendor: FlagId::parse("KAM").unwrap(),
                profile: DeviceProfileName::parse("generic-suite0").unwrap(),
                status: MeterStatus::InService,
                groups: Vec::new(),
                head_end: None,
            },
            serial: "10000001".to_owned(),
            suite: SecuritySuite::Suite0,
            batch: String::new(),
            added: moment(0),
            retired: None,
            slots: Slots::new(slots.to_vec()).unwrap(),
            sequence: 0,
            transfer: None,
            shared: Vec::new(),
        };
        vec![State {
            row: Row::new(&meter),
            time: 0,
            device: Device {
                keys: [1; 4],
                former: [None; 4],
                accepted: BTreeMap::new(),
                association: None,
                counters: BTreeMap::new(),
            },
            requests: BTreeSet::new(),
            replies: BTreeSet::new(),
            begun: 0,
            reverts: 0,
            compromises: 0,
            skipped_counters: 0,
            unfit_challenges: 0,
            unnoticed: false,
            ever_held: [(); 4].map(|()| BTreeSet::from([1])),
            held_since_challenge: BTreeSet::new(),
            last: BTreeMap::new(),
            outcome: None,
            fault: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if matches!(state.fault, Some(Fault::NonceRepeated | Fault::StepRefused(_))) {
            return;
        }
        let meter = state.meter();
        if let Some(orders) = self.transfers.get(usize::from(state.begun)) {
            for title in 0..self.titles {
                actions.extend(orders.iter().map(|order| Action::Begin { order: *order, title }));
            }
        }
        for request in &state.requests {
            actions.push(Action::Arrive { request: *request, errs: false });
            if self.applies_and_errs && matches!(request.content, Content::Deliver { .. }) {
                actions.push(Action::Arrive { request: *request, errs: true });
            }
        }
        for observation in self.observations(state, meter) {
            if self.rule == Rule::LeavesBeforeStored {
                actions.push(Action::ReportAndCrash { observation: observation.clone() });
            }
            actions.push(Action::Report { observation });
        }
        if state.reverts < self.reverts && state.device.former.iter().any(Option::is_some) {
            actions.push(Action::Revert);
        }
        if state.compromises < self.compromises {
            let slot = meter.slots.get(SETUP, KeyType::GUEK).unwrap();
            let newest = slot.versions().last().unwrap();
            let versions = BTreeSet::from_iter(slot.active().into_iter().chain([newest]).map(KeyVersion::number));
            actions.extend(versions.into_iter().map(|version| Action::Compromise { version }));
        }
        if state.skipped_counters < self.skipped_counters && meter.transfer.is_some() {
            actions.push(Action::SkipCounters);
        }
        if state.time < self.halves && !state.unnoticed {
            actions.push(Action::Half);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        let mut meter = state.meter().clone();
        match action {
            Action::Begin { order, title } => {
                meter.begin_transfer(self.order(order, title, state), moment(state.time)).ok()?;
                next.begun += 1;
                next.outcome = None;
                self.send(&mut next, &mut meter);
            }
            Action::Arrive { request, errs } => {
                next.replies.extend(next.device.receive(request, errs, state.time));
                next.note_held();
            }
            Action::Report { observation } => self.report(&mut next, &mut meter, observation),
            Action::ReportAndCrash { observation } => {
                self.report(&mut next, &mut meter, observation);
                meter = state.meter().clone();
            }
            Action::Revert => {
                next.device.revert(self.forgets_counters);
                next.note_held();
                next.reverts += 1;
                next.unnoticed = true;
            }
            Action::Compromise { version } => {
                meter
                    .slots
                    .get_mut(SETUP, KeyType::GUEK)
                    .unwrap()
                    .transition(version, KeyState::Compromised, moment(state.time))
                    .ok()?;
                next.compromises += 1;
            }
            Action::SkipCounters => {
                let transfer = meter.transfer.clone()?;
                let version = meter
                    .slots
                    .get_mut(SETUP, KeyType::GUEK)
                    .unwrap()
                    .version_mut(transfer.pair()?.encryption)
                    .unwrap();
                version
                    .counters_mut()
                    .unwrap()
                    .reserve(
                        CounterKey::ClientTitle(transfer.client_title),
                        CounterUse::Frames,
                        writer(2),
                        ONE,
                        0,
                        CounterJump::NONE,
                    )
                    .unwrap();
                next.skipped_counters += 1;
            }
            Action::Half => self.half(&mut next, &mut meter),
        }
        next.prune(self, &meter);
        if meter != *state.meter() {
            next.row = Row::new(&meter);
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::<Self>::always(CANDIDATES, |_, state| {
                let meter = state.meter();
                KEYS.iter().zip(state.device.keys).all(|(key_type, held)| {
                    let version = meter.slots.get(SETUP, *key_type).unwrap().version(number(held));
                    version.is_some_and(|version| version.candidate() && version.state() != KeyState::Destroyed)
                })
            }),
            Property::<Self>::always(ACTIVE, |_, state| {
                let meter = state.meter();
                KEYS.iter().zip(&state.ever_held).all(|(key_type, held)| {
                    meter
                        .slots
                        .get(SETUP, *key_type)
                        .unwrap()
                        .active()
                        .is_none_or(|active| held.contains(&active.number().number()))
                })
            }),
            Property::<Self>::always(GRANTED, |_, state| {
                state
                    .meter()
                    .slots
                    .iter()
                    .flat_map(Slot::grantable)
                    .all(|granted| matches!(granted.version.state(), KeyState::Active | KeyState::Deactivated))
            }),
            Property::<Self>::always(NONCE, |_, state| state.fault != Some(Fault::NonceRepeated)),
            Property::<Self>::always(SAME_OCTETS, |_, state| {
                let meter = state.meter();
                let Some(transfer) = &meter.transfer else { return true };
                let request = request(transfer, 0);
                request.pair.is_none_or(|pair| {
                    state
                        .last
                        .get(&(pair.0, request.title))
                        .is_some_and(|last| *last == Request { sent: last.sent, ..request })
                })
            }),
            Property::<Self>::always(OUTCOME, |_, state| !matches!(state.fault, Some(Fault::FalseOutcome(_)))),
            Property::<Self>::always(REFUSED, |_, state| !matches!(state.fault, Some(Fault::StepRefused(_)))),
            Property::<Self>::always(UNFIT, |_, state| state.fault != Some(Fault::ChallengeCounted)),
            Property::<Self>::always(HEALS, Self::heals),
            Property::<Self>::sometimes("a transfer is proven", |_, state| {
                state.outcome.is_some_and(Outcome::is_success)
            }),
            Property::<Self>::sometimes("a transfer ends in doubt", |_, state| state.outcome == Some(Outcome::InDoubt)),
        ];
        if self.transfers.len() > 1 && self.rotates_one_key() {
            properties.push(Property::<Self>::sometimes("three candidates", |_, state| {
                state.meter().slots.iter().any(|slot| slot.candidates().count() >= 3)
            }));
        }
        if self.reverts > 0 && self.transfers.len() > 1 {
            properties.push(Property::<Self>::sometimes(
                "the meter showed an earlier key than the active one",
                |_, state| {
                    let meter = state.meter();
                    meter.slots.iter().any(|slot| {
                        slot.held().zip(slot.active()).is_some_and(|(held, active)| held.number() < active.number())
                    })
                },
            ));
        }
        if self.halves > 1 {
            properties.push(Property::<Self>::sometimes(
                "a version is destroyed that the meter had used",
                |_, state| {
                    state
                        .meter()
                        .slots
                        .iter()
                        .flat_map(Slot::versions)
                        .any(|version| version.state() == KeyState::Destroyed && version.number().number() == 1)
                },
            ));
        }
        properties
    }
}

impl World {
    fn order(&self, order: Order, title: u8, state: &State) -> TransferOrder {
        let new = diversified(KeyState::PreActive);
        TransferOrder {
            id: TransferId::from_octets(&[state.begun + 1; 16]).unwrap(),
            setup: SETUP,
            head_end: PrincipalId::new(island(), Role::HeadEnd, if title == 0 { "north" } else { "south" }).unwrap(),
            campaign: None,
            client_title: client(title),
            form: self.form,
            keys: match order {
                Order::Probe => OrderedKeys::Probe,
                Order::Own(key_type) => OrderedKeys::Own { key_type, new },
                Order::Compound => OrderedKeys::Compound { kek: new.clone(), guek: new },
            },
            urgent: true,
            // Its time has run out at once: whoever begins another may give it up.
            not_after: moment(state.time),
            challenge: challenge(state.begun + 1, 0),
        }
    }

    /// Whether all transfers may bring the same key.
    fn rotates_one_key(&self) -> bool {
        KEYS.iter().any(|key_type| self.transfers.iter().flatten().filter(|order| order.brings(*key_type)).count() > 1)
    }

    /// What the server may read in the octets that a report brings.
    fn observations(&self, state: &State, meter: &Meter) -> Vec<Observation> {
        let Some(transfer) = &meter.transfer else { return Vec::new() };
        let mut observations = vec![Observation::Nothing];
        let now = transfer.pair().map(|pair| (pair.encryption.number(), pair.authentication.number()));
        let answer = |result, meter_counter| {
            let meter_counter = if self.rule == Rule::EarlierAnswersCount { u32::MAX } else { meter_counter };
            Observation::Answered { result, meter_counter }
        };
        match &transfer.stage {
            Stage::Associate { .. } => {
                if transfer.retries == 0 && state.skipped_counters < self.skipped_counters {
                    observations.push(Observation::CounterFollowed);
                }
                if state.unfit_challenges < self.unfit_challenges {
                    observations.push(Observation::ChallengeUnfit);
                }
            }
            Stage::Authenticate { .. } => {}
            Stage::Deliver { pair } => {
                observations.push(Observation::Refusal);
                if pair.is_none() {
                    // A head-end that ciphers by itself can write any answer.
                    observations.extend([0, 9].map(|result| answer(result, 0)));
                }
            }
        }
        for reply in &state.replies {
            match (*reply, &transfer.stage) {
                (Reply::Associated { pair, meter_challenge }, Stage::Associate { .. }) if Some(pair) == now => {
                    observations.push(Observation::Associated {
                        meter_challenge: meter_challenge.to_be_bytes().to_vec(),
                        meter_counter: 0,
                    });
                }
                (
                    Reply::Authenticated { pair, challenge, meter_counter },
                    Stage::Authenticate { challenge: sent, .. },
                ) if Some(pair) == now && challenge == short(sent) => {
                    observations.push(Observation::Authenticated { meter_counter });
                }
                (Reply::Answered { pair, result, meter_counter }, Stage::Deliver { .. }) if Some(pair) == now => {
                    observations.push(answer(result, meter_counter))
                }
                _ => {}
            }
        }
        observations
    }

    /// The server takes a report: one transaction.
    fn report(&self, next: &mut State, meter: &mut Meter, observation: Observation) {
        let transfer = meter.transfer.clone().unwrap();
        let now = moment(next.time);
        if observation == Observation::CounterFollowed {
            let version = meter
                .slots
                .get_mut(SETUP, KeyType::GUEK)
                .unwrap()
                .version_mut(transfer.pair().unwrap().encryption)
                .unwrap();
            let counters = version.counters_mut().unwrap();
            let floor = counters.highest_bound() + 1;
            counters.raise_floor(CounterKey::ClientTitle(transfer.client_title), floor, Some(10)).unwrap();
            next.skipped_counters += 1;
        }
        if self.rule == Rule::AcceptanceIsProof
            && let (Stage::Deliver { .. }, Observation::Answered { result: 0, .. }) = (&transfer.stage, &observation)
        {
            let key = transfer.current().unwrap();
            meter
                .slots
                .get_mut(SETUP, key.key_type)
                .unwrap()
                .confirm(key.version, meter.sequence, Evidence::Proven, now)
                .unwrap();
            meter.withdraw_transfer(transfer.id, now).unwrap();
            return next.end(Outcome::Proven, &transfer);
        }
        let proven = matches!(observation, Observation::Authenticated { .. });
        let unfit = observation == Observation::ChallengeUnfit;
        next.unfit_challenges += u8::from(unfit);
        let before = unfit.then(|| meter.clone());
        match meter.observe(transfer.id, transfer.step, observation, challenge(next.begun, transfer.step), now) {
            Ok(Step { next: Next::Send, .. }) => self.send(next, meter),
            Ok(Step { next: Next::Done(outcome), .. }) => next.end(outcome, &transfer),
            Err(error) => next.fault = Some(Fault::StepRefused(error.to_string())),
        }
        if before.is_some_and(|before| !only_associates_again(&before, &transfer, meter)) {
            next.fault = Some(Fault::ChallengeCounted);
        }
        let held = (next.device.keys[1], next.device.keys[2]);
        if proven
            && transfer.pair().is_some_and(|pair| (pair.encryption.number(), pair.authentication.number()) == held)
        {
            next.unnoticed = false;
        }
    }

    /// The request of the present step leaves, with counters that the same transaction reserves.
    fn send(&self, next: &mut State, meter: &mut Meter) {
        let transfer = meter.transfer.clone().unwrap();
        if let Some(pair) = transfer.pair() {
            let mut reserved = meter.clone();
            let version = reserved.slots.get_mut(SETUP, KeyType::GUEK).unwrap().version_mut(pair.encryption).unwrap();
            let size = if matches!(transfer.stage, Stage::Authenticate { .. }) { TWO } else { ONE };
            let key = CounterKey::ClientTitle(transfer.client_title);
            let reservation = version
                .counters_mut()
                .unwrap()
                .reserve(key, CounterUse::Frames, writer(1), size, 0, CounterJump::NONE)
                .unwrap();
            if self.rule != Rule::CountersNotStored {
                *meter = reserved;
            }
            meter.transfer.as_mut().unwrap().counters =
                (reservation.first..).take(usize::try_from(size.get()).unwrap()).collect();
        }
        let request = request(meter.transfer.as_ref().unwrap(), next.time);
        if let Some(pair) = request.pair {
            let first = meter.transfer.as_ref().unwrap().counters[0];
            // I4: each counter once, and upwards.
            if next.last.get(&(pair.0, request.title)).is_some_and(|last| last.counter >= first) {
                next.fault = Some(Fault::NonceRepeated);
            }
            next.last.insert((pair.0, request.title), request);
        }
        next.requests.insert(request);
        if matches!(request.content, Content::Associate { .. }) {
            next.held_since_challenge = BTreeSet::from([next.pair()]);
        }
    }

    fn half(&self, next: &mut State, meter: &mut Meter) {
        next.time += 1;
        let (time, now) = (next.time, moment(next.time));
        // Nothing is as old as the retention time.
        next.requests.retain(|request| request.sent + RETENTION > time);
        for former in &mut next.device.former {
            *former = former.filter(|(_, changed)| changed + RETENTION > time);
        }
        if self.rule == Rule::ReleasedSlotBySlot {
            meter.slots.iter_mut().for_each(|slot| _ = slot.release_candidates(RETENTION.into(), now));
        } else {
            meter.release_candidates(RETENTION.into(), now);
        }
        for slot in meter.slots.iter_mut() {
            let under_way =
                |version: &KeyVersion| version.state() == KeyState::PreActive && version.transport().left == 0;
            let released: Vec<_> = slot
                .versions()
                .iter()
                .filter(|version| !version.candidate() && !under_way(version))
                .map(KeyVersion::number)
                .collect();
            for version in released {
                // Destroyed versions stay as they are.
                let _ = slot.transition(version, KeyState::Destroyed, now);
            }
        }
    }

    /// From here on nothing is lost and nobody lies: after some transfers the meter has a new key.
    fn heals(&self, state: &State) -> bool {
        let mut meter = state.meter().clone();
        if meter.transfer.is_some() || state.fault.is_some() {
            return true;
        }
        let mut next = State { requests: BTreeSet::new(), replies: BTreeSet::new(), begun: 100, ..state.clone() };
        for _ in 0..MOST_TO_HEAL {
            let order = World { form: TransferForm::Frames, ..self.clone() }.order(Order::Own(KeyType::GUEK), 0, &next);
            if meter.begin_transfer(order, moment(next.time)).is_err() {
                return false;
            }
            next.begun += 1;
            self.send(&mut next, &mut meter);
            next.outcome = None;
            while next.outcome.is_none() && next.fault.is_none() {
                let request = next.requests.pop_first().unwrap();
                next.replies = next.device.receive(request, false, next.time).into_iter().collect();
                let observation =
                    self.observations(&next, &meter).pop().filter(|observation| *observation != Observation::Refusal);
                self.report(&mut next, &mut meter, observation.unwrap_or(Observation::Nothing));
            }
            if next.outcome == Some(Outcome::Proven) {
                return true;
            }
        }
        false
    }

    /// Checks all reachable states. Prints how many there are.
    fn check(self, name: &str) {
        let start = std::time::Instant::now();
        let checker = self.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        println!(
            "{name}: {} states, depth {}, {:?}",
            checker.unique_state_count(),
            checker.max_depth(),
            start.elapsed()
        );
        checker.assert_properties();
    }

    /// Checks that a wrong rule is found out.
    fn check_violates(self, property: &'static str) {
        let checker = self.checker().finish_when(HasDiscoveries::AllOf(BTreeSet::from([property]))).spawn_bfs().join();
        let path = checker.discovery(property);
        let found: Vec<_> = checker.discoveries().into_keys().collect();
        assert!(path.is_some(), "not found in {} states: {property}; but {found:?}", checker.unique_state_count());
        println!(
            "{property}: found after {} states: {:#?}",
            checker.unique_state_count(),
            path.unwrap().into_actions()
        );
    }
}

impl Order {
    fn brings(self, key_type: KeyType) -> bool {
        match self {
            Self::Probe => false,
            Self::Own(own) => own == key_type,
            Self::Compound => [KeyType::KEK, KeyType::GUEK].contains(&key_type),
        }
    }
}

impl State {
    fn meter(&self) -> &Meter {
        &self.row.1
    }

    const fn pair(&self) -> Pair {
        (self.device.keys[1], self.device.keys[2])
    }

    fn note_held(&mut self) {
        for (ever, held) in self.ever_held.iter_mut().zip(self.device.keys) {
            ever.insert(held);
        }
        self.held_since_challenge.insert(self.pair());
    }

    fn end(&mut self, outcome: Outcome, transfer: &Transfer) {
        let target = transfer.keys.last().map(|key| (key.key_type, key.version.number()));
        let holds = |pair: &Pair| target == Some((KeyType::GUEK, pair.0)) || target == Some((KeyType::GAK, pair.1));
        let is_true = match outcome {
            Outcome::Proven => self.held_since_challenge.iter().any(holds),
            Outcome::NotApplied => !self.held_since_challenge.iter().all(holds),
            Outcome::Probed => !self.held_since_challenge.is_empty(),
            _ => true,
        };
        if !is_true {
            self.fault = Some(Fault::FalseOutcome(outcome));
        }
        self.outcome = Some(outcome);
        self.held_since_challenge.clear();
    }

    /// Forgets what can make no difference any more, so that fewer states are told apart.
    fn prune(&mut self, world: &World, meter: &Meter) {
        let stage = meter.transfer.as_ref().map(|transfer| &transfer.stage);
        let (challenged, waits) = match stage {
            Some(Stage::Associate { challenge, .. }) => (Some(short(challenge)), true),
            Some(Stage::Authenticate { challenge, .. }) => (Some(short(challenge)), false),
            _ => (None, false),
        };
        let may_forget = world.forgets_counters && self.reverts < world.reverts;
        let device = &self.device;
        self.requests.retain(|request| {
            let Some(pair) = request.pair else { return true };
            let accepted = device.accepted.get(&(pair.0, request.title)).is_some_and(|last| *last >= request.counter);
            let answerable = match request.content {
                // To process an earlier one only uses up counters: the same as losing the later
                // ones.
                Content::Associate { challenge } => waits && Some(challenge) == challenged,
                Content::Authenticate { meter_challenge } => {
                    device.association.is_some_and(|(_, _, waiting)| waiting == meter_challenge)
                }
                Content::Deliver { .. } => true,
            };
            answerable && (!accepted || may_forget)
        });
        self.replies.retain(|reply| match reply {
            Reply::Authenticated { challenge, .. } => Some(*challenge) == challenged,
            _ => true,
        });
        // Earlier associations differ in nothing that the server can see.
        let live = device.association.map(|(_, _, waiting)| waiting);
        self.replies = std::mem::take(&mut self.replies)
            .into_iter()
            .map(|reply| match reply {
                Reply::Associated { pair, meter_challenge } if Some(meter_challenge) != live => {
                    Reply::Associated { pair, meter_challenge: EARLIER }
                }
                other => other,
            })
            .collect();
        if challenged.is_none() {
            self.held_since_challenge.clear();
        }
    }
}

impl Device {
    /// What a meter does with a request.
    fn receive(&mut self, request: Request, errs: bool, time: u8) -> Option<Reply> {
        let held = (self.keys[1], self.keys[2]);
        if let Some(pair) = request.pair {
            let last = self.accepted.entry((pair.0, request.title)).or_insert(0);
            // Other keys, or a counter that does not rise: an exception response, which anyone can
            // write.
            if pair != held || request.counter <= *last {
                return None;
            }
            *last = request.counter;
        }
        // A head-end's own session has a dedicated key, and counters of its own.
        let counter = self.counters.entry(held.0).or_insert(0);
        *counter += u32::from(request.pair.is_some());
        let meter_counter = *counter;
        match request.content {
            Content::Associate { challenge } => {
                let meter_challenge = (u64::from(request.counter) << 8) | u64::from(request.title);
                self.association = Some((held, challenge, meter_challenge));
                Some(Reply::Associated { pair: held, meter_challenge })
            }
            Content::Authenticate { meter_challenge } => match self.association.take() {
                Some((pair, challenge, waiting)) if pair == held && waiting == meter_challenge => {
                    Some(Reply::Authenticated { pair, challenge, meter_counter })
                }
                _ => None,
            },
            Content::Deliver { key, version, kek } => {
                let unwrapped = kek == self.keys[0];
                if unwrapped && self.keys[key] != version {
                    self.former[key] = Some((self.keys[key], time));
                    self.keys[key] = version;
                }
                let result = if unwrapped && !errs { 0 } else { 9 };
                request.pair.is_some().then_some(Reply::Answered { pair: held, result, meter_counter })
            }
        }
    }

    fn revert(&mut self, forgets_counters: bool) {
        // The GBEK stays: no exchange would show that it went back.
        for (key, former) in self.keys.iter_mut().zip(&mut self.former).take(3) {
            if let Some((version, _)) = former.take() {
                *key = version;
            }
        }
        self.former[3] = None;
        self.association = None;
        if forgets_counters {
            self.accepted.clear();
        }
    }
}

/// Whether a challenge that is not to be answered has changed nothing but the association, its
/// counters and their number.
fn only_associates_again(before: &Meter, transfer: &Transfer, after: &Meter) -> bool {
    let Some(now) = &after.transfer else { return false };
    let (Stage::Associate { purpose, pair, .. }, Stage::Associate { purpose: earlier_purpose, pair: earlier_pair, .. }) =
        (&now.stage, &transfer.stage)
    else {
        return false;
    };
    let shown = |meter: &Meter| {
        meter
            .slots
            .iter()
            .flat_map(Slot::versions)
            .map(|version| (version.state(), version.candidate(), version.transport()))
            .collect::<Vec<_>>()
    };
    (purpose, pair) == (earlier_purpose, earlier_pair)
        && (now.tried, now.retries, now.delivered, now.answer)
            == (transfer.tried, transfer.retries, transfer.delivered, transfer.answer)
        && (after.sequence, shown(after)) == (before.sequence, shown(before))
}

/// The request of a transfer's present step, made of nothing but the row.
fn request(transfer: &Transfer, sent: u8) -> Request {
    Request {
        title: u8::from(transfer.client_title == client(1)),
        pair: transfer.pair().map(|pair| (pair.encryption.number(), pair.authentication.number())),
        counter: transfer.counters.last().copied().unwrap_or(0),
        content: match &transfer.stage {
            Stage::Associate { challenge, .. } => Content::Associate { challenge: short(challenge) },
            Stage::Authenticate { meter_challenge, .. } => Content::Authenticate {
                meter_challenge: u64::from_be_bytes(meter_challenge.as_slice().try_into().unwrap()),
            },
            Stage::Deliver { .. } => {
                let key = transfer.current().unwrap();
                let at = KEYS.iter().position(|key_type| *key_type == key.key_type).unwrap();
                Content::Deliver { key: at, version: key.version.number(), kek: key.kek.number() }
            }
        },
        sent,
    }
}

fn diversified(state: KeyState) -> NewKeyVersion {
    let origin =
        KeyOrigin::Diversified { root_version: 1, derivation: KeyDerivation::Sp800108Cmac, length: KeyLength::Aes128 };
    NewKeyVersion { state, origin, wrapped: None, fingerprint: None }
}

/// Each challenge once: by transfer and step.
fn challenge(transfer: u8, step: u32) -> [u8; CHALLENGE] {
    let mut octets = [0; CHALLENGE];
    octets[..8].copy_from_slice(&((u64::from(transfer) << 32) | (u64::from(step) + 1)).to_be_bytes());
    octets
}

fn short(challenge: &[u8; CHALLENGE]) -> u64 {
    u64::from_be_bytes(challenge[..8].try_into().unwrap())
}

const fn moment(time: u8) -> UnixMillis {
    UnixMillis(1 + time as i64)
}

fn number(number: u32) -> KeyVersionNumber {
    KeyVersionNumber::new(number).unwrap()
}

fn title() -> SystemTitle {
    SystemTitle::parse("4B414D0000000001").unwrap()
}

fn client(title: u8) -> SystemTitle {
    SystemTitle::from_octets(&[b'K', b'M', b'S', 0, 0, 0, 0, 1 + title]).unwrap()
}

fn island() -> IslandName {
    IslandName::parse("north").unwrap()
}

fn writer(server: u8) -> WriterId {
    WriterId::from_octets(&[server; 16]).unwrap()
}

const SETUP: SecuritySetupId = SecuritySetupId::DEFAULT;
const KEYS: [KeyType; 4] = [KeyType::KEK, KeyType::GUEK, KeyType::GAK, KeyType::GBEK];
const ONE: ChunkSize = ChunkSize::new(NonZeroU32::MIN);
const TWO: ChunkSize = ChunkSize::new(NonZeroU32::new(2).unwrap());
const GUEK: Order = Order::Own(KeyType::GUEK);
const GAK: Order = Order::Own(KeyType::GAK);
const GBEK: Order = Order::Own(KeyType::GBEK);
/// In halves.
const RETENTION: u8 = 2;
/// The meter's challenge of an association that is over.
const EARLIER: u64 = u64::MAX;
/// Transfers after which an honest network has brought a new key: each KEK that the meter may hold
/// gets its turn.
const MOST_TO_HEAL: u8 = 8;

const CANDIDATES: &str = "I3: what the meter holds is a candidate and not destroyed";
const ACTIVE: &str = "I3: the meter held the active version after it left";
const GRANTED: &str = "I3: what is granted is active or deactivated";
const NONCE: &str = "I4: no counter is used twice";
const SAME_OCTETS: &str = "I4: what is sent again is the same";
const OUTCOME: &str = "an outcome is what the meter did";
const REFUSED: &str = "no step is refused";
const UNFIT: &str = "a challenge that is not to be answered costs an association and nothing else";
const HEALS: &str = "an honest network brings a new key to the meter";

#[test]
fn two_gueks_one_after_another() {
    World { transfers: vec![vec![GUEK], vec![GUEK]], reverts: 1, applies_and_errs: true, ..WORLD }
        .check("two_gueks_one_after_another");
}

#[test]
fn a_guek_and_the_retention_time() {
    World { transfers: vec![vec![GUEK], vec![Order::Probe]], reverts: 1, halves: 2, ..WORLD }
        .check("a_guek_and_the_retention_time");
}

#[test]
fn a_compromised_guek_and_skipped_counters() {
    World { transfers: vec![vec![GUEK]], compromises: 1, skipped_counters: 1, halves: 2, ..WORLD }
        .check("a_compromised_guek_and_skipped_counters");
}

#[test]
fn a_guek_and_a_meter_that_forgets_its_counters() {
    World { transfers: vec![vec![GUEK], vec![GUEK]], reverts: 1, forgets_counters: true, ..WORLD }
        .check("a_guek_and_a_meter_that_forgets_its_counters");
}

#[test]
fn a_guek_and_a_gak() {
    World { transfers: vec![vec![GUEK], vec![GAK]], reverts: 1, applies_and_errs: true, ..WORLD }
        .check("a_guek_and_a_gak");
}

#[test]
fn a_kek_and_a_guek_after_it() {
    World { transfers: vec![vec![Order::Compound], vec![GUEK]], reverts: 1, ..WORLD }
        .check("a_kek_and_a_guek_after_it");
}

#[test]
fn a_kek_and_the_retention_time() {
    World { transfers: vec![vec![Order::Compound], vec![Order::Probe]], reverts: 1, halves: 2, ..WORLD }
        .check("a_kek_and_the_retention_time");
}

#[test]
fn a_kek_by_a_head_end_that_ciphers() {
    World { transfers: vec![vec![Order::Compound], vec![GUEK]], form: TransferForm::WrappedKey, reverts: 1, ..WORLD }
        .check("a_kek_by_a_head_end_that_ciphers");
}

#[test]
fn two_head_ends() {
    World { transfers: vec![vec![GUEK], vec![GAK]], titles: 2, ..WORLD }.check("two_head_ends");
}

#[test]
fn two_gbeks_and_the_retention_time() {
    World { transfers: vec![vec![GBEK], vec![GBEK]], applies_and_errs: true, halves: 2, ..WORLD }
        .check("two_gbeks_and_the_retention_time");
}

#[test]
fn a_guek_and_challenges_that_are_not_to_be_answered() {
    World { transfers: vec![vec![GUEK], vec![Order::Probe]], unfit_challenges: 2, ..WORLD }
        .check("a_guek_and_challenges_that_are_not_to_be_answered");
}

#[test]
fn acceptance_as_proof_would_lose_the_meter() {
    World {
        rule: Rule::AcceptanceIsProof,
        transfers: vec![vec![GUEK]],
        form: TransferForm::WrappedKey,
        halves: 2,
        ..WORLD
    }
    .check_violates(CANDIDATES);
}

#[test]
fn earlier_answers_as_acknowledgement_would_lose_a_gbek() {
    World { rule: Rule::EarlierAnswersCount, transfers: vec![vec![GBEK], vec![GBEK]], halves: 2, ..WORLD }
        .check_violates(CANDIDATES);
}

#[test]
fn a_key_that_leaves_before_it_is_stored_would_lose_the_meter() {
    World { rule: Rule::LeavesBeforeStored, transfers: vec![vec![GUEK]], ..WORLD }.check_violates(CANDIDATES);
}

#[test]
fn counters_that_are_used_before_they_are_stored_would_repeat() {
    World { rule: Rule::CountersNotStored, transfers: vec![vec![GUEK]], ..WORLD }.check_violates(NONCE);
}

#[test]
fn release_slot_by_slot_would_lose_the_kek() {
    World {
        rule: Rule::ReleasedSlotBySlot,
        transfers: vec![vec![Order::Compound], vec![Order::Probe]],
        reverts: 1,
        halves: 2,
        ..WORLD
    }
    .check_violates(CANDIDATES);
}

/// What the configurations start from.
const WORLD: World = World {
    rule: Rule::Sound,
    transfers: Vec::new(),
    titles: 1,
    form: TransferForm::Frames,
    reverts: 0,
    forgets_counters: false,
    applies_and_errs: false,
    compromises: 0,
    skipped_counters: 0,
    unfit_challenges: 0,
    halves: 0,
};
