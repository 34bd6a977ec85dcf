//! Transfers to simulated meters, through the HSM: what the server says that a meter holds is
//! compared with the meter's memory.

use kms_client::sample::SampleShipment;
use kms_domain::{
    Answer, DeviceProfile, KeyState, KeyType, KeyVersion, KeyVersionNumber, Outcome, OwnerKind, RequestId,
    SecuritySetupId, SecuritySuite, SystemTitle, TransferForm, TransferId,
};
use kms_hsm::TransferJob;
use kms_proto::v1::{AuditRecord, audit_record::Event};
use kms_store::AuditFilter;
use meter_sim::{
    Connection, KeyId, Meter, MeterConfig, Obis, SymmetricKey,
    acse::AssociationResponse,
    behaviour::{Behaviour, CounterOnNewKey, Fault, HexBytes, ScriptedFault, Trigger},
    config::SecuritySetupConfig,
    inspect::RepeatedNonce,
    security::unwrap_key,
};
use prost::Message as _;

use super::{NextStep, Order, Report, ReportedAnswer, SendingKind, StepAnswer, TransferService, emit};
use crate::testing::{TestIsland, client_title, island_tests, meter, sample};
use crate::{
    approval::{Change, ProposalService},
    campaign::{CampaignService, NewCampaign},
    frame::unprotect::{ReceivedContent, ReceivedFrame},
    frame::{FrameService, PlainContent, PlainFrame},
    meter::{Compromise, CounterRaise, MeterService},
};
use kms_authz::{Caller, Purpose, Quotas};
use kms_base::error::ServiceError;

/// An island with simulated meters, set up with the keys that their vendor shipped.
pub(crate) struct Field {
    pub(crate) island: TestIsland,
    pub(crate) service: TransferService,
    pub(crate) meters: Vec<Meter>,
    configs: Vec<MeterConfig>,
    requests: std::cell::Cell<u32>,
}

#[derive(serde::Deserialize)]
struct Device {
    system_title: meter_sim::SystemTitle,
    security_suite: meter_sim::SecuritySuite,
    security_setups: Vec<SecuritySetupConfig>,
}

impl Field {
    pub(super) async fn new(island: TestIsland, profile: &str, count: u64) -> Self {
        Self::of(island, &sample(profile, count)).await
    }

    /// The meters of a shipment.
    pub(crate) async fn of(island: TestIsland, shipment: &SampleShipment) -> Self {
        Self::edited(island, shipment, |_| ()).await
    }

    /// The same, with setups that differ from what the vendor shipped.
    async fn with(island: TestIsland, profile: &str, count: u64, edit: impl Fn(&mut SecuritySetupConfig)) -> Self {
        Self::edited(island, &sample(profile, count), edit).await
    }

    async fn edited(island: TestIsland, shipment: &SampleShipment, edit: impl Fn(&mut SecuritySetupConfig)) -> Self {
        let (_, devices) = island.deliver_with_devices(shipment).await;
        let configs: Vec<MeterConfig> = devices
            .split(|octet| *octet == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| {
                let mut line: serde_json::Value = serde_json::from_slice(line).unwrap();
                simulated(&mut line["security_setups"][0]);
                let device: Device = serde_json::from_value(line).unwrap();
                let mut setup = device.security_setups.into_iter().next().unwrap();
                edit(&mut setup);
                let mut config = MeterConfig::ordinary(device.system_title, device.security_suite, setup);
                // Tests count associations. What a challenge brings that could be a request, they
                // choose by themselves.
                config.challenges.answerable = true;
                config
            })
            .collect();
        let meters = configs.iter().map(|config| Meter::new(config.clone()).unwrap()).collect();
        Self {
            service: TransferService::new(island.island.clone()),
            island,
            meters,
            configs,
            requests: std::cell::Cell::new(0),
        }
    }

    pub(crate) fn request(&self) -> RequestId {
        self.requests.set(self.requests.get() + 1);
        let mut octets = [7; 16];
        octets[..4].copy_from_slice(&self.requests.get().to_be_bytes());
        RequestId::from_octets(&octets).unwrap()
    }

    /// The request that was made last.
    pub(super) fn last_request(&self) -> RequestId {
        self.requests.set(self.requests.get() - 1);
        self.request()
    }

    pub(crate) fn title(&self, number: usize) -> SystemTitle {
        SystemTitle::from_octets(self.meters[number].system_title().as_bytes()).unwrap()
    }

    pub(crate) async fn begin(&self, order: Order) -> StepAnswer {
        let (mut steps, _) =
            self.service.begin(&self.island.head_end, self.request(), [1; 32], vec![order]).await.unwrap();
        steps.remove(0)
    }

    pub(crate) async fn report(
        &self,
        caller: &Caller,
        meter: SystemTitle,
        id: TransferId,
        step: u32,
        answer: ReportedAnswer,
    ) -> StepAnswer {
        let (mut steps, _) = self.service.proceed(caller, vec![Report { meter, id, step, answer }]).await.unwrap();
        steps.remove(0)
    }

    /// Carries one transfer out as a head-end does that holds no keys.
    pub(crate) async fn transfer(&self, number: usize, key_type: Option<KeyType>) -> Outcome {
        self.carry_out(number, order(self.title(number), key_type)).await
    }

    pub(crate) async fn carry_out(&self, number: usize, order: Order) -> Outcome {
        let mut connection = Connection::new(self.meters[number].clone(), 1);
        let mut step = self.begin(order).await;
        for _ in 0..60 {
            match step.next.unwrap() {
                NextStep::End { outcome, .. } => return outcome,
                NextStep::Send(sending) => {
                    if sending.kind == SendingKind::Associate {
                        connection = Connection::new(self.meters[number].clone(), 1);
                    }
                    let (id, at) = step.transfer.unwrap();
                    let answer = connection.deliver(&sending.apdu).await.answers.into_iter().next_back();
                    let answer = answer.map_or(ReportedAnswer::Nothing, ReportedAnswer::Apdu);
                    step = self.report(&self.island.head_end, step.meter, id, at, answer).await;
                }
            }
        }
        panic!("the transfer does not end");
    }

    pub(crate) async fn row(&self, number: usize) -> kms_domain::Meter {
        (*self.island.island.meter(self.title(number)).await.unwrap().unwrap()).clone()
    }

    /// Which version of a key the server believes that the meter holds.
    pub(super) async fn held(&self, number: usize, key_type: KeyType) -> u32 {
        self.row(number).await.slots.get(SecuritySetupId::DEFAULT, key_type).unwrap().held().unwrap().number().number()
    }

    /// Compares what the server believes with the meter's memory, byte for byte: the HSM wraps the
    /// key under the KEK, the meter's own KEK opens it.
    pub(super) async fn compare(&self, number: usize) {
        let row = self.row(number).await;
        let memory = self.meters[number].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        let held = |key_type| row.slots.get(SecuritySetupId::DEFAULT, key_type).unwrap().held().unwrap().number();
        for (key_type, key) in [(KeyType::GUEK, &memory.guek), (KeyType::GAK, &memory.gak), (KeyType::KEK, &memory.kek)]
        {
            assert!(
                self.wrapped(&row, held(KeyType::KEK), key_type, held(key_type), &memory.kek).await == *key,
                "{key_type} of meter {number}"
            );
        }
    }

    /// The same of a GBEK of the meter's own, which no exchange shows.
    async fn compare_broadcast_key(&self, number: usize) {
        let row = self.row(number).await;
        let memory = self.meters[number].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        let held = |key_type| row.slots.get(SecuritySetupId::DEFAULT, key_type).unwrap().held().unwrap().number();
        let key = self.wrapped(&row, held(KeyType::KEK), KeyType::GBEK, held(KeyType::GBEK), &memory.kek).await;
        assert!(memory.gbek.is_some_and(|gbek| gbek == key), "GBEK of meter {number}");
    }

    /// I3: whatever happened, what the meter holds is among the candidates.
    pub(super) async fn assert_not_lost(&self, number: usize) {
        let row = self.row(number).await;
        let memory = self.meters[number].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        let candidates = |key_type| {
            row.slots
                .get(SecuritySetupId::DEFAULT, key_type)
                .unwrap()
                .candidates()
                .map(|version| version.number())
                .collect::<Vec<_>>()
        };
        for (key_type, key) in [(KeyType::GUEK, &memory.guek), (KeyType::GAK, &memory.gak), (KeyType::KEK, &memory.kek)]
        {
            let mut found = false;
            for kek in candidates(KeyType::KEK) {
                for version in candidates(key_type) {
                    let job = self.job(&row, kek, key_type, version);
                    let wrapped = self.island.island.hsm.wrap_for_meters(vec![job]).await.unwrap().remove(0).unwrap();
                    found |= unwrap_key(&memory.kek, &wrapped).is_ok_and(|unwrapped| unwrapped == *key);
                }
            }
            assert!(found, "{key_type} of meter {number} is lost");
        }
    }

    pub(super) async fn wrapped(
        &self,
        row: &kms_domain::Meter,
        kek: KeyVersionNumber,
        key_type: KeyType,
        version: KeyVersionNumber,
        meter_kek: &SymmetricKey,
    ) -> SymmetricKey {
        let wrapped = self
            .island
            .island
            .hsm
            .wrap_for_meters(vec![self.job(row, kek, key_type, version)])
            .await
            .unwrap()
            .remove(0)
            .unwrap();
        unwrap_key(meter_kek, &wrapped).expect("the server's KEK is the meter's")
    }

    /// Whether the meter's memory holds this version of a group's GBEK, byte for byte: the HSM
    /// wraps it under the KEK, the meter's own KEK opens it.
    pub(crate) async fn holds_group_key(
        &self,
        number: usize,
        group: &kms_domain::Group,
        version: KeyVersionNumber,
    ) -> bool {
        let row = self.row(number).await;
        let memory = self.meters[number].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        let kek = row.slots.get(SecuritySetupId::DEFAULT, KeyType::KEK).unwrap().held().unwrap().number();
        let key = emit::version_source(group.owner(), &group.slots, SecuritySetupId::DEFAULT, KeyType::GBEK, version)
            .unwrap();
        let job = TransferJob { kek: self.job(&row, kek, KeyType::KEK, kek).kek, key };
        let wrapped = self.island.island.hsm.wrap_for_meters(vec![job]).await.unwrap().remove(0).unwrap();
        memory.gbek.is_some_and(|gbek| unwrap_key(&memory.kek, &wrapped).is_ok_and(|unwrapped| unwrapped == gbek))
    }

    pub(super) fn job(
        &self,
        row: &kms_domain::Meter,
        kek: KeyVersionNumber,
        key_type: KeyType,
        version: KeyVersionNumber,
    ) -> TransferJob {
        let source = |key_type, version| {
            emit::version_source(row.owner(), &row.slots, SecuritySetupId::DEFAULT, key_type, version).unwrap()
        };
        TransferJob { kek: source(KeyType::KEK, kek), key: source(key_type, version) }
    }

    /// What the record says of steps and outcomes.
    async fn transfer_events(&self) -> Vec<String> {
        let filter = AuditFilter { kind: Some(31), ..AuditFilter::default() };
        let rows = self.island.island.store.audit_page(&filter, None, 1_000).await.unwrap();
        let records = rows.iter().map(|row| AuditRecord::decode(row.record.record.as_slice()).unwrap().event);
        let advances = records.flat_map(|event| match event {
            Some(Event::TransfersAdvanced(event)) => event.advances,
            _ => Vec::new(),
        });
        advances.map(|advance| advance.event).collect()
    }

    /// Those about meters.
    pub(crate) async fn security_events(&self) -> Vec<String> {
        let filter = AuditFilter { kind: Some(24), ..AuditFilter::default() };
        let rows = self.island.island.store.audit_page(&filter, None, 1_000).await.unwrap();
        rows.iter()
            .filter_map(|row| match AuditRecord::decode(row.record.record.as_slice()).unwrap().event {
                Some(Event::SecurityEvent(event)) if !event.meter.is_empty() => Some(event.kind),
                _ => None,
            })
            .collect()
    }

    /// What a meter answers at each place of a transfer that goes well.
    async fn answers(&self, number: usize, key_type: KeyType) -> Vec<Vec<u8>> {
        let (mut answers, mut delivered) = (vec![Vec::new(); PLACES], false);
        let mut connection = Connection::new(self.meters[number].clone(), 1);
        let mut step = self.begin(order(self.title(number), Some(key_type))).await;
        for _ in 0..60 {
            match step.next.unwrap() {
                NextStep::End { outcome, .. } => {
                    assert!(outcome.is_success(), "{key_type} of meter {number}: {}", outcome.name());
                    return answers;
                }
                NextStep::Send(sending) => {
                    if sending.kind == SendingKind::Associate {
                        connection = Connection::new(self.meters[number].clone(), 1);
                    }
                    let (id, at) = step.transfer.unwrap();
                    let answer = connection.exchange(&sending.apdu).unwrap();
                    answers[place(sending.kind, delivered)].clone_from(&answer);
                    delivered |= sending.kind == SendingKind::Deliver;
                    step = self.report(&self.island.head_end, step.meter, id, at, ReportedAnswer::Apdu(answer)).await;
                }
            }
        }
        panic!("the transfer does not end");
    }

    /// Carries out a transfer in which an answer of the next meter is reported at one place: it
    /// moves no state. Afterwards the meter itself answers. How it ended.
    async fn deceived(&self, number: usize, key_type: KeyType, at: usize, foreign: Foreign) -> Outcome {
        let case = format!("{key_type}, place {at}, {foreign:?}");
        let own_exchange =
            if foreign == Foreign::OwnExchange { self.answers(number + 1, key_type).await } else { Vec::new() };
        // Requests are replayed to a double of the next meter: where both meters have the same
        // keys, it takes the key that was made for the first one.
        let mut config = self.configs[number + 1].clone();
        let alike = config.security_setups[0].guek == self.configs[number].security_setups[0].guek;
        // Its own counter is far ahead: none of its answers is left aside only because it is an old
        // one.
        config.security_setups[0].server_counter = 1_000;
        config.challenges.seed = !config.challenges.seed;
        let double = Meter::new(config).unwrap();
        let doubles_keys = || double.keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        let shipped = doubles_keys();
        let client = meter_sim::SystemTitle::new(client_title().octets());
        let (mut line, mut doubles_line) =
            (Connection::new(self.meters[number].clone(), 1), Connection::new(double.clone(), 1));
        let (mut delivered, mut told) = (false, false);
        let mut step = self.begin(order(self.title(number), Some(key_type))).await;
        for _ in 0..60 {
            let sending = match step.next.unwrap() {
                NextStep::End { outcome, .. } => {
                    assert!(told, "{case}: it was not come to");
                    return outcome;
                }
                NextStep::Send(sending) => sending,
            };
            match sending.kind {
                SendingKind::Associate => {
                    line = Connection::new(self.meters[number].clone(), 1);
                    doubles_line = Connection::new(double.clone(), 1);
                }
                // The double's own authentication has failed: what was answered is the first
                // meter's challenge.
                SendingKind::Deliver => doubles_line = Connection::pre_established(double.clone(), 1, client).unwrap(),
                SendingKind::Authenticate => {}
            }
            let (id, present) = step.transfer.unwrap();
            let place = place(sending.kind, delivered);
            delivered |= sending.kind == SendingKind::Deliver;
            let mut answer = line.exchange(&sending.apdu).unwrap();
            let doubles_answer = doubles_line.exchange(&sending.apdu).unwrap();
            if told || place != at {
                // Nothing protects the challenge in an AARE: the double's takes the place of the
                // meter's own, and the server answers it.
                if !told
                    && place + 1 == at
                    && (sending.kind, foreign) == (SendingKind::Associate, Foreign::Replayed)
                    && let Ok(theirs) = AssociationResponse::parse(&doubles_answer)
                {
                    let response = AssociationResponse::parse(&answer).unwrap();
                    answer =
                        AssociationResponse { authentication_value: theirs.authentication_value, ..response }.encode();
                }
                step = self.report(&self.island.head_end, step.meter, id, present, ReportedAnswer::Apdu(answer)).await;
                continue;
            }
            let reported = match foreign {
                Foreign::OwnExchange => own_exchange[at].clone(),
                Foreign::Replayed => doubles_answer,
                Foreign::Renamed => match AssociationResponse::parse(&doubles_answer) {
                    Ok(theirs) => {
                        AssociationResponse { server_title: Some(self.meters[number].system_title()), ..theirs }
                            .encode()
                    }
                    Err(_) => doubles_answer,
                },
            };
            if alike && foreign != Foreign::OwnExchange {
                // The double has understood and done what it was asked: only its title tells.
                assert_ne!(reported[0], EXCEPTION_RESPONSE, "{case}");
                assert!(sending.kind == SendingKind::Associate || doubles_line.is_associated(), "{case}");
                assert!(sending.kind != SendingKind::Deliver || doubles_keys() != shipped, "{case}");
            }
            let before = self.row(number).await;
            step = self.report(&self.island.head_end, step.meter, id, present, ReportedAnswer::Apdu(reported)).await;
            let after = self.row(number).await;
            assert_eq!(shown(&after), shown(&before), "{case}");
            told = true;
            let counted =
                after.transfer.is_some_and(|transfer| matches!(transfer.answer, Answer::Accepted | Answer::Refused(_)));
            assert!(at != DELIVER || !counted, "{case}");
            assert!(
                matches!(&step.next, Ok(NextStep::Send(_) | NextStep::End { outcome: Outcome::InDoubt, .. })),
                "{case}: {:?}",
                step.next
            );
        }
        panic!("the transfer does not end");
    }

    /// A GET protected in the HSM for the head-end.
    async fn frame(&self, number: usize) -> Result<Vec<u8>, ServiceError> {
        let frame = PlainFrame {
            meter: self.title(number),
            setup: None,
            client_title: client_title(),
            protection: kms_dlms::Protection::AuthenticatedEncrypted,
            content: PlainContent::Apdu { apdu: hex::decode("C001C100030100010800FF0200").unwrap(), general: false },
        };
        let service = FrameService::new(self.island.island.clone());
        let (mut outcomes, _) =
            service.protect(&self.island.head_end, self.request(), [5; 32], Purpose::Read, vec![frame], true).await?;
        outcomes.remove(0).octets
    }

    pub(crate) fn assert_no_nonce_twice(&self) {
        assert_eq!(RepeatedNonce::find(&self.meters), []);
    }
}

/// How an answer of another meter comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Foreign {
    /// The other meter gave it at the same place of a transfer of its own.
    OwnExchange,
    /// It was sent the very request that was made for the first one.
    Replayed,
    /// The same, and the title that stands in it in plaintext is replaced by that of the first one.
    Renamed,
}

/// Where a request stands in a transfer of one key: association and authentication, the delivery,
/// and the same two again for the proof.
const fn place(kind: SendingKind, delivered: bool) -> usize {
    match (kind, delivered) {
        (SendingKind::Associate, false) => 0,
        (SendingKind::Authenticate, false) => 1,
        (SendingKind::Deliver, _) => DELIVER,
        (SendingKind::Associate, true) => 3,
        (SendingKind::Authenticate, true) => 4,
    }
}

const DELIVER: usize = 2;
const PLACES: usize = 5;
const EXCEPTION_RESPONSE: u8 = 0xD8;

/// What the server takes for known of a meter's keys: held, active, granted, and all that it may
/// hold, each with its evidence and the meter's own counter.
fn shown(row: &kms_domain::Meter) -> Vec<String> {
    let version = |version: &KeyVersion| (version.number(), version.state(), version.transport());
    let slots = row.slots.iter().map(|slot| {
        let granted: Vec<_> = slot.grantable().map(|grantable| grantable.version.number()).collect();
        let candidates: Vec<_> = slot.candidates().map(version).collect();
        let (held, active) = (slot.held().map(version), slot.active().map(version));
        format!(
            "{} {}: held {held:?}, active {active:?}, granted {granted:?}, candidates {candidates:?}",
            slot.setup(),
            slot.key_type()
        )
    });
    slots.collect()
}

/// In each way, and at each place of a transfer: another meter's answer counts for nothing, and the
/// meter's own ones prove it in the end. A pair of meters for each.
async fn report_answers_of_another_meter(island: TestIsland, equal_keys: u64) {
    let mut cases = vec![(KeyType::GUEK, 0, Foreign::Renamed), (KeyType::GUEK, 3, Foreign::Renamed)];
    for foreign in [Foreign::OwnExchange, Foreign::Replayed] {
        cases.extend((0..PLACES).map(|at| (KeyType::GUEK, at, foreign)));
        // Here the answer alone decides.
        cases.push((KeyType::GBEK, DELIVER, foreign));
    }
    let meters = 2 * u64::try_from(cases.len()).unwrap();
    let field = Field::of(island, &SampleShipment { equal_keys, ..sample("generic-suite0", meters) }).await;
    for (pair, (key_type, at, foreign)) in cases.into_iter().enumerate() {
        let (number, case) = (2 * pair, format!("{key_type}, place {at}, {foreign:?}"));
        let (ended, next, last) = match (key_type, at) {
            // Nothing has left, and there is no other pair of keys to try: another transfer.
            (KeyType::GUEK, 0 | 1) => (Outcome::InDoubt, Some(KeyType::GUEK), Outcome::Proven),
            // The proof follows, and the answer is not needed.
            (KeyType::GUEK, DELIVER) => (Outcome::Proven, None, Outcome::Probed),
            // The meter does not answer under the earlier pair, which is tried next: a probe finds
            // what it holds.
            (KeyType::GUEK, _) => (Outcome::InDoubt, None, Outcome::Probed),
            _ => (Outcome::InDoubt, Some(key_type), Outcome::Acknowledged),
        };
        assert_eq!(field.deceived(number, key_type, at, foreign).await, ended, "{case}");
        field.assert_not_lost(number).await;
        assert_eq!(field.transfer(number, next).await, last, "{case}");
        assert!(field.held(number, key_type).await > 1, "{case}");
        for number in [number, number + 1] {
            field.compare(number).await;
            field.compare_broadcast_key(number).await;
        }
    }
    field.assert_no_nonce_twice();
}

/// Of a gateway's keys, simulated meters have those of the standard and the one of the optical
/// port, by its id in `key_transfer`.
fn simulated(setup: &mut serde_json::Value) {
    let keys = setup.as_object_mut().unwrap();
    if let Some(optical_port) = keys.remove("optical_port") {
        keys.insert("vendor_keys".to_owned(), serde_json::json!({ OPTICAL_PORT_ID.to_string(): optical_port }));
    }
    for other in ["lls_secret", "hls_secret", "m_bus_child"] {
        keys.remove(other);
    }
}

/// As the profile `gateway-suite0` has it.
const OPTICAL_PORT_ID: u8 = 16;

/// The watcher of all tests sees what it is there for: this one repeats a nonce.
#[test]
#[ignore = "breaks I4 on purpose, for the test below"]
fn repeats_a_nonce() {
    crate::testing::run(concat!(module_path!(), "::repeats_a_nonce"), |island| async move {
        let field = Field::new(island, "generic-suite0", 1).await;
        let row = field.row(0).await;
        let keys =
            emit::pair_keys(&row, SecuritySetupId::DEFAULT, row.pairs(SecuritySetupId::DEFAULT, None)[0]).unwrap();
        let nonce = kms_dlms::Nonce::new(client_title(), 9);
        for content in [1, 2] {
            let parameters =
                kms_hsm::FrameParameters::new(kms_dlms::HlsGmac::control(row.suite).octet(), *nonce.octets()).unwrap();
            let input = kms_hsm::FrameInput { parameters, plaintext: vec![content; 16] };
            field.island.island.hsm.protect_batch(vec![(keys.clone(), input)]).await.unwrap().remove(0).unwrap();
        }
    });
}

/// SoftHSM2 notes nothing; what the record says of counters is looked at on both modules.
#[test]
fn a_test_that_repeats_a_nonce_fails() {
    let failed = std::panic::catch_unwind(repeats_a_nonce)
        .err()
        .map(|panic| panic.downcast_ref::<String>().cloned().unwrap_or_default());
    let seen = failed.as_ref().is_some_and(|failed| failed.contains("a nonce was repeated (I4)"));
    assert_eq!(seen, crate::testing::notes_nonces(), "{failed:?}");
}

/// The counter of the head-end's title under the key that the vendor shipped.
fn first_guek(meter: SystemTitle) -> kms_ledger::CounterOf {
    kms_ledger::CounterOf {
        owner: kms_domain::Owner::Meter(meter),
        setup: SecuritySetupId::DEFAULT,
        key_type: KeyType::GUEK,
        version: KeyVersionNumber::FIRST,
        counter: kms_domain::CounterKey::ClientTitle(client_title()),
        on_new_key: kms_domain::OnNewKey::Continue,
    }
}

/// The bound of the counter under the first GUEK.
async fn own_bound(field: &Field, number: usize) -> u64 {
    let row = field.row(number).await;
    let version =
        row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().version(KeyVersionNumber::FIRST).unwrap();
    let kms_domain::CounterPlace::Own(counters) = version.counters() else { panic!("in a domain") };
    counters.highest_bound()
}

/// A probe whose requests reach no meter: each is answered by a counter that is as far ahead as the
/// profile lets a meter be. The bound after the order and after each answer.
async fn forge_answers(field: &Field, number: usize) -> Vec<u64> {
    let mut step = field.begin(order(field.title(number), None)).await;
    let mut bounds = Vec::new();
    loop {
        let bound = own_bound(field, number).await;
        bounds.push(bound);
        let (Some((id, at)), NextStep::Send(_)) = (step.transfer, step.next.unwrap()) else { return bounds };
        let said = u32::try_from(bound - 1 + 100_000).unwrap();
        let answer = [&[0xD8, 1, 6][..], &said.to_be_bytes()].concat();
        step = field.report(&field.island.head_end, step.meter, id, at, ReportedAnswer::Apdu(answer)).await;
    }
}

/// Meters that are ahead of the server's counter, inside its chunk, at its edge and above it, are
/// reached by the request after their answer: on the server that holds the chunk, on another one,
/// and after a restart. Of `equal_keys` meters at a time the keys are equal.
async fn reach_meters_ahead(island: TestIsland, equal_keys: u64) {
    const AHEAD: [u32; 4] = [1, 5_000, 65_536, 70_000];
    let number = std::cell::Cell::new(0);
    let ahead = |setup: &mut SecuritySetupConfig| {
        let at = number.replace(number.get() + 1);
        setup
            .counter_floors
            .insert(meter_sim::SystemTitle::new(client_title().octets()), AHEAD[at / 3 % AHEAD.len()] + 1);
    };
    let shipment = SampleShipment { equal_keys, ..sample("generic-suite0", 3 * AHEAD.len() as u64) };
    let mut field = Field::edited(island, &shipment, ahead).await;
    let services = [
        field.service.clone(),
        TransferService::new(field.island.another_server().await),
        TransferService::new(std::sync::Arc::new(field.island.restarted().await)),
    ];
    for number in 0..field.meters.len() {
        let step = field.begin(order(field.title(number), None)).await;
        let (id, at) = step.transfer.unwrap();
        let NextStep::Send(sending) = step.next.unwrap() else { panic!("nothing to send") };
        let [sent] = field.row(number).await.transfer.unwrap().counters[..] else { panic!("one counter") };
        let mut connection = Connection::new(field.meters[number].clone(), 1);
        let answer = connection.exchange(&sending.apdu).unwrap();
        let said = u32::from_be_bytes(answer[answer.len() - 4..].try_into().unwrap());
        field.service = services[number % services.len()].clone();
        let step = field.report(&field.island.head_end, step.meter, id, at, ReportedAnswer::Apdu(answer)).await;
        if sent > AHEAD[number / 3] + 1 {
            continue;
        }
        let followed = field.row(number).await.transfer.unwrap().counters;
        assert!(followed[0] > said, "counter {sent}, then {followed:?}, and the meter has accepted {said}");
        let NextStep::Send(sending) = step.next.unwrap() else { panic!("nothing to send") };
        let answer = Connection::new(field.meters[number].clone(), 1).exchange(&sending.apdu).unwrap();
        assert_eq!(answer[0], 0x61, "the meter takes the next request: {}", hex::encode(&answer));
        field.service = services[0].clone();
    }
    let events = field.security_events().await;
    assert!(events.iter().all(|event| event == "counter-followed"), "{events:?}");
    field.assert_no_nonce_twice();
}

pub(crate) fn order(meter: SystemTitle, key_type: Option<KeyType>) -> Order {
    Order {
        meter,
        setup: None,
        key_type,
        client_title: client_title(),
        form: TransferForm::Frames,
        urgent: false,
        lifetime_seconds: 3_600,
        task: None,
    }
}

pub(crate) fn at_key_transfer(number: u64, fault: Fault) -> ScriptedFault {
    ScriptedFault { at: Trigger::KeyTransfer(number), fault }
}

pub(super) fn at_association(number: u64, fault: Fault) -> ScriptedFault {
    ScriptedFault { at: Trigger::AssociationRequest(number), fault }
}

/// A KEK is changed by campaigns only; here a policy lets the head-end do it.
fn permit_master_keys(island: &TestIsland) {
    permit(island, r#"action in [Action::"transferMasterKey", Action::"attestKey"]"#);
}

/// Whoever a meter is assigned to may order what no shipped policy permits.
fn permit_urgent(island: &TestIsland) {
    permit(island, r#"action == Action::"transferKey""#);
}

/// The shipped policies, and one more for head-ends and their meters.
fn permit(island: &TestIsland, action: &str) {
    let policies = concat!(env!("CARGO_MANIFEST_DIR"), "/../../policies");
    let mut files: Vec<_> = std::fs::read_dir(policies)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cedar"))
        .map(|path| (path.clone(), std::fs::read_to_string(path).unwrap()))
        .collect();
    let more = format!(
        "permit (principal is HeadEnd, {action}, resource) when {{ resource has head_end && resource.head_end == principal }};"
    );
    files.push(("more.cedar".into(), more));
    island.island.policy.store(std::sync::Arc::new(
        kms_policy::from_files(files, (Quotas::FILE.into(), Quotas::SHIPPED.to_owned())).unwrap(),
    ));
}

island_tests! {
    async fn every_key_of_a_meter_is_rotated_and_proven(island) {
        permit_master_keys(&island);
        let field = Field::new(island, "generic-suite0", 1).await;
        for (round, key_type) in [KeyType::GUEK, KeyType::GAK, KeyType::KEK, KeyType::GUEK].into_iter().enumerate() {
            assert_eq!(field.transfer(0, Some(key_type)).await, Outcome::Proven, "round {round}");
            field.compare(0).await;
        }
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        let row = field.row(0).await;
        let guek = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert_eq!(guek.active().unwrap().number().number(), 4);
        assert!(!guek.in_doubt() && row.transfer.is_none());
        // What left under a KEK that its vendor knows is exposed to the vendor, if it recorded the
        // traffic.
        assert!(
            guek.version(KeyVersionNumber::new(2).unwrap())
                .unwrap()
                .exposures()
                .iter()
                .any(|exposure| exposure.reason == kms_domain::ExposureReason::TransferUnderExposedKek)
        );
        field.assert_no_nonce_twice();
    }

    async fn every_key_of_a_meter_of_suite_1_or_2_is_rotated_and_proven(island) {
        permit_master_keys(&island);
        let (mut island, mut requests, mut suites) = (island, 0, Vec::new());
        for (first_number, (name, text)) in (1..).zip(DeviceProfile::SHIPPED) {
            let profile = DeviceProfile::parse(text).unwrap();
            if profile.suite == SecuritySuite::Suite0 {
                continue;
            }
            let field = Field::of(island, &SampleShipment { first_number, ..sample(name, 1) }).await;
            // No request id serves twice on one island.
            field.requests.set(requests);
            // The last GUEK leaves under a KEK that came over the air.
            for key_type in [KeyType::GUEK, KeyType::GAK, KeyType::KEK, KeyType::GUEK] {
                assert_eq!(field.transfer(0, Some(key_type)).await, Outcome::Proven, "{key_type} of {name}");
                field.compare(0).await;
            }
            // That of a group is brought by the group's rotations.
            if profile.key(SecuritySetupId::DEFAULT, KeyType::GBEK).is_some_and(|key| key.owner == OwnerKind::Meter) {
                assert_eq!(field.transfer(0, Some(KeyType::GBEK)).await, Outcome::Acknowledged, "GBEK of {name}");
                assert_eq!(field.held(0, KeyType::GBEK).await, 2, "GBEK of {name}");
                field.compare_broadcast_key(0).await;
            }
            let memory = field.meters[0].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
            let octets = if profile.suite == SecuritySuite::Suite2 { 32 } else { 16 };
            assert!([&memory.guek, &memory.gak, &memory.kek].into_iter().chain(&memory.gbek).all(|key| key.expose().len() == octets), "{name}");
            field.assert_no_nonce_twice();
            suites.push(profile.suite);
            requests = field.requests.get();
            island = field.island;
        }
        assert!(suites.contains(&SecuritySuite::Suite1) && suites.contains(&SecuritySuite::Suite2), "{suites:?}");
    }

    async fn a_vendors_key_is_brought_by_the_id_of_its_profile_and_acknowledged(island) {
        let field = Field::new(island, "gateway-suite0", 1).await;
        let optical_port = |row: &kms_domain::Meter| row.slots.get(SecuritySetupId::DEFAULT, KeyType::OPTICAL_PORT).unwrap().clone();
        assert_eq!(field.transfer(0, Some(KeyType::OPTICAL_PORT)).await, Outcome::Acknowledged);
        let memory = || field.meters[0].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        let holds = async |version| {
            let row = field.row(0).await;
            field.wrapped(&row, KeyVersionNumber::FIRST, KeyType::OPTICAL_PORT, KeyVersionNumber::new(version).unwrap(), &memory().kek).await
                == memory().vendor_keys[&OPTICAL_PORT_ID]
        };
        assert!(holds(2).await);
        let version = optical_port(&field.row(0).await).active().unwrap().clone();
        assert_eq!((version.number().number(), version.transport().evidence), (2, kms_domain::Evidence::Acknowledged));
        // An answer that is lost leaves it in doubt; no exchange could settle that, so the next
        // order is no urgent one.
        field.meters[0].add_fault(at_key_transfer(2, Fault::LoseAnswer));
        assert_eq!(field.transfer(0, Some(KeyType::OPTICAL_PORT)).await, Outcome::InDoubt);
        let slot = optical_port(&field.row(0).await);
        assert!(slot.in_doubt() && slot.candidates().count() == 3 && holds(3).await, "I3");
        assert_eq!(field.transfer(0, Some(KeyType::OPTICAL_PORT)).await, Outcome::Acknowledged);
        assert!(holds(4).await && !optical_port(&field.row(0).await).in_doubt());
        // What key_transfer does not bring, and what the meter does not own.
        for key_type in [KeyType::M_BUS_CHILD, KeyType::FIRMWARE, KeyType::LLS_SECRET, KeyType::HLS_SECRET] {
            let before = field.row(0).await;
            let refused = field.begin(order(field.title(0), Some(key_type))).await.next;
            assert!(matches!(&refused, Err(ServiceError::FailedPrecondition { reason, .. }) if reason.contains("key_transfer")), "{key_type}: {refused:?}");
            assert_eq!(field.row(0).await, before);
        }
        field.assert_no_nonce_twice();
    }

    async fn no_fault_loses_a_meter(island) {
        permit_master_keys(&island);
        let faults: Vec<(&str, Vec<ScriptedFault>)> = vec![
            ("lost request", vec![at_key_transfer(1, Fault::LoseRequest)]),
            ("lost answer", vec![at_key_transfer(1, Fault::LoseAnswer)]),
            ("held request", vec![at_key_transfer(1, Fault::HoldRequest(2))]),
            ("held request and answer", vec![at_key_transfer(1, Fault::HoldRequestAndAnswer(1))]),
            ("duplicated request", vec![at_key_transfer(1, Fault::DuplicateRequest)]),
            ("duplicated answer", vec![at_key_transfer(1, Fault::DuplicateAnswer)]),
            ("applied but error", vec![at_key_transfer(1, Fault::AppliedButError(9))]),
            ("refused", vec![at_key_transfer(1, Fault::RefusedWithoutApplying(250))]),
            ("success without applying", vec![at_key_transfer(1, Fault::SuccessWithoutApplying)]),
            ("forged answer", vec![at_key_transfer(1, Fault::WrongAnswer(HexBytes(vec![0xD8, 1, 5])))]),
            ("forged counter", vec![at_key_transfer(1, Fault::WrongAnswer(HexBytes(vec![0xD8, 1, 6, 0xFF, 0xFF, 0xFF, 0xFF])))]),
            ("corrupt answer", vec![at_key_transfer(1, Fault::CorruptAnswer(3))]),
            ("connection cut", vec![at_key_transfer(1, Fault::CloseConnection)]),
            ("power fails before the answer", vec![at_key_transfer(1, Fault::PowerCycleBeforeAnswer)]),
            ("the proof's association is lost", vec![at_association(2, Fault::LoseRequest)]),
            ("both associations are lost", vec![at_association(2, Fault::LoseAnswer), at_association(3, Fault::LoseAnswer)]),
            ("lost answer twice", vec![at_key_transfer(1, Fault::LoseAnswer), at_key_transfer(2, Fault::LoseAnswer)]),
        ];
        let field = Field::new(island, "generic-suite0", faults.len() as u64).await;
        for (number, (name, script)) in faults.into_iter().enumerate() {
            for fault in script {
                field.meters[number].add_fault(fault);
            }
            for key_type in [KeyType::GUEK, KeyType::GAK, KeyType::KEK] {
                for attempt in 0.. {
                    let outcome = field.transfer(number, Some(key_type)).await;
                    field.assert_not_lost(number).await;
                    if outcome == Outcome::Proven {
                        break;
                    }
                    assert!(attempt < 6, "{name}: {key_type} is {}", outcome.name());
                    // What is in doubt is probed before it is tried again.
                    field.transfer(number, None).await;
                    field.assert_not_lost(number).await;
                }
            }
            field.compare(number).await;
        }
        field.assert_no_nonce_twice();
    }

    async fn a_meter_that_goes_back_to_its_former_key_is_found_and_healed(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        field.meters[0].set_behaviour(Behaviour { reverts_on_power_cycle: [KeyId::GlobalUnicastEncryption].into(), ..Behaviour::default() });
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.meters[0].power_cycle();
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        // The meter holds version 1, which does not become active again.
        assert_eq!(field.held(0, KeyType::GUEK).await, 1);
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert_eq!(slot.active().unwrap().number().number(), 2);
        assert!(slot.in_doubt());
        assert_eq!(slot.version(KeyVersionNumber::FIRST).unwrap().state(), KeyState::Deactivated);
        assert!(field.security_events().await.contains(&"earlier-key-held".to_owned()));
        field.assert_not_lost(0).await;
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven, "it is known what it holds: nothing urgent");
        assert_eq!(field.held(0, KeyType::GUEK).await, 3);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    // I4: whoever takes counters as fast as it can uses up an hour's, and keeps the next key from
    // no meter.
    async fn an_hour_s_counters_that_are_used_up_stop_no_transfer(island) {
        let field = Field::new(island, "generic-suite0", 2).await;
        let million = std::num::NonZeroU32::new(1_000_000).unwrap();
        let lease = |number: usize, count| {
            let of = first_guek(field.title(number));
            let act = field.island.island.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), kms_store::Reads::default(), move |view| {
                view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
                view.lease(of, count, kms_domain::UnixMillis(0))
            });
            async move { act.await.map(|committed| committed.value) }
        };
        // An hour may end meanwhile.
        let mut refused = None;
        for _ in 0..9 {
            if let Err(error) = lease(0, million).await {
                refused = Some(error);
                break;
            }
        }
        let Some(ServiceError::ResourceExhausted { reason, retry_after }) = refused else { panic!("{refused:?}") };
        assert!(reason.contains("counters_per_hour") && reason.contains("4000000"), "{reason}");
        assert!(retry_after <= std::time::Duration::from_hours(1));
        assert!(field.security_events().await.contains(&"counter-use-high".to_owned()), "long before");
        // What is reserved already is used; another meter's counters are its own.
        assert!(lease(1, million).await.is_ok());
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    // A12: an unauthenticated exception that names a counter can be forged as often as a head-end
    // may probe.
    async fn a_forged_counter_uses_up_neither_the_key_nor_more_than_an_hour_has(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let mut refused = false;
        // An hour may end meanwhile: 4,000,000 counters are three jumps of 100,000 in each of 14
        // probes.
        for _ in 0..30 {
            let bounds = forge_answers(&field, 0).await;
            assert!(bounds.len() <= 5, "{bounds:?}");
            if let [.., last_followed, in_vain] = bounds[..] {
                assert_eq!(last_followed, in_vain, "the answer after the last retry raises nothing");
            }
            refused = field.security_events().await.contains(&"counter-jump-refused".to_owned());
            if refused {
                break;
            }
        }
        assert!(refused, "never, up to {}", own_bound(&field, 0).await);
        assert!(own_bound(&field, 0).await < 8_100_000);
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    async fn neither_forged_counters_nor_two_servers_use_up_what_transfers_have(island) {
        let end = kms_domain::CounterState::SESSIONS_END;
        let mut field = Field::new(island, "generic-suite0", 1).await;
        field.island.take_counters_over(field.title(0), end).await;
        for _ in 0..5 {
            assert_eq!(forge_answers(&field, 0).await.len(), 2, "not followed at all");
        }
        assert!(own_bound(&field, 0).await <= end + 5, "one association each");
        let services = [field.service.clone(), TransferService::new(field.island.another_server().await)];
        for turn in 0..10 {
            field.service = services[turn % 2].clone();
            let step = field.begin(order(field.title(0), None)).await;
            let (id, _) = step.transfer.unwrap();
            field.service.withdraw(&field.island.head_end, field.request(), vec![(step.meter, id)], "again".to_owned()).await.unwrap();
        }
        field.service = services[0].clone();
        assert!(own_bound(&field, 0).await <= end + 15, "a change of the server throws nothing away");
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        // The meter goes on counting, so the new key gives sessions nothing back, and the refusal
        // says what does.
        let Err(ServiceError::FailedPrecondition { reason, next_step }) = field.frame(0).await else { panic!("a frame in the reserve") };
        assert!(reason.contains("none left for sessions and frames") && next_step.contains("another client title"), "{reason}; {next_step}");
        field.assert_no_nonce_twice();
    }

    async fn transfers_between_sessions_open_no_way_past_the_hour(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let most = std::num::NonZeroU32::new(65_535).unwrap();
        let mut refused = None;
        // What a chunk has beside one counter of a transfer: 61 of them are an hour's, and an hour
        // may end meanwhile.
        for _ in 0..125 {
            let step = field.begin(order(field.title(0), None)).await;
            let (id, _) = step.transfer.unwrap();
            field.service.withdraw(&field.island.head_end, field.request(), vec![(step.meter, id)], "again".to_owned()).await.unwrap();
            let of = first_guek(field.title(0));
            let act = field.island.island.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), kms_store::Reads::default(), move |view| {
                view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
                view.lease(of, most, kms_domain::UnixMillis(0))
            });
            if let Err(error) = act.await {
                refused = Some(error);
                break;
            }
        }
        assert!(matches!(refused, Some(ServiceError::ResourceExhausted { .. })), "{refused:?}, up to {}", own_bound(&field, 0).await);
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        field.assert_no_nonce_twice();
    }

    async fn the_last_counters_of_a_key_bring_the_next_one(island) {
        let field = Field::new(island, "counter-resets", 1).await;
        field.meters[0].set_behaviour(Behaviour { counter_on_new_key: CounterOnNewKey::RestartAt(250), ..Behaviour::default() });
        field.island.take_counters_over(field.title(0), kms_domain::CounterState::SESSIONS_END).await;
        let refused = field.frame(0).await;
        assert!(matches!(refused, Err(ServiceError::FailedPrecondition { .. })), "{refused:?}");
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        assert!(field.frame(0).await.is_ok(), "under the new key");
        field.assert_no_nonce_twice();
    }

    async fn a_meter_that_is_ahead_is_reached_in_the_next_step(island) {
        reach_meters_ahead(island, 1).await;
    }

    async fn meters_of_a_counter_domain_that_are_ahead_are_reached_in_the_next_step(island) {
        reach_meters_ahead(island, 2).await;
    }

    async fn a_meter_that_is_truly_ahead_is_followed_when_two_people_say_so(island) {
        let ahead = |setup: &mut SecuritySetupConfig| {
            setup.counter_floors.insert(meter_sim::SystemTitle::new(client_title().octets()), 3_000_000_000);
        };
        let field = Field::with(island, "generic-suite0", 1, ahead).await;
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::InDoubt);
        assert!(field.security_events().await.contains(&"counter-jump-refused".to_owned()));
        assert!(!field.row(0).await.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().in_doubt(), "nothing has left");
        // What the officers have read at the meter.
        let meters = MeterService::new(field.island.island.clone());
        let raise = CounterRaise {
            meter: field.title(0),
            setup: None,
            key_type: KeyType::GUEK,
            version: None,
            client_title: client_title(),
            to: 3_000_000_001,
            reason: "read at the meter".to_owned(),
            quorum: kms_domain::Quorum::ONE,
        };
        let request = || (field.request(), [3; 32]);
        let (id, digest) = request();
        let proposal = meters.propose_raise(&field.island.officer, crate::meter::Request { id, digest }, raise).await.unwrap();
        let proposals = ProposalService::new(field.island.island.clone());
        let proposed = kms_domain::ProposalId::from_octets(&proposal.proposal_id).unwrap();
        let colleague = field.island.colleague().await;
        let change = |by: &Caller, change: Change| {
            let ((id, digest), by, proposals) = (request(), by.clone(), proposals.clone());
            async move { proposals.change(&by, crate::Request { id, digest }, proposed, change).await }
        };
        assert!(change(&field.island.officer, Change::CarryOut).await.is_err());
        change(&colleague, Change::Approve { content_sha256: proposal.content_sha256.as_ref().try_into().unwrap() }).await.unwrap();
        change(&colleague, Change::CarryOut).await.unwrap();
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    async fn urgent_transfers_are_for_policy_to_permit_and_bounded(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let candidates = |row: &kms_domain::Meter| row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().candidates().count();
        let urgent = || Order { urgent: true, form: TransferForm::WrappedKey, lifetime_seconds: 1, ..order(field.title(0), Some(KeyType::GUEK)) };
        assert!(matches!(field.begin(urgent()).await.next, Err(ServiceError::PermissionDenied { .. })));
        permit_urgent(&field.island);
        // Each leaves at once, and nothing comes back.
        for made in 2..=kms_domain::MOST_CANDIDATES {
            let step = field.begin(urgent()).await;
            let (id, _) = step.transfer.unwrap();
            assert!(matches!(step.next, Ok(NextStep::Send(_))), "{:?}", step.next);
            field.service.withdraw(&field.island.head_end, field.request(), vec![(field.title(0), id)], String::new()).await.unwrap();
            assert_eq!(candidates(&field.row(0).await), made);
        }
        let before = field.row(0).await;
        match field.begin(urgent()).await.next {
            Err(ServiceError::FailedPrecondition { reason, next_step }) => assert!(reason.contains('8') && next_step.contains("probe"), "{reason}; {next_step}"),
            other => panic!("{other:?}"),
        }
        // I3: none was dropped for it, and the way out is a probe.
        assert_eq!(field.row(0).await, before);
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.assert_not_lost(0).await;
        field.assert_no_nonce_twice();
    }

    // Whoever plays its own meter has nothing in doubt, and needs no permission for urgent
    // transfers.
    async fn versions_of_a_slot_are_bounded_in_doubt_or_not(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let guek = |row: &kms_domain::Meter| row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().clone();
        // Begun and withdrawn: one version stays, whatever the number of calls.
        let mut kept = Vec::new();
        for _ in 0..4 {
            let (id, _) = field.begin(order(field.title(0), Some(KeyType::GUEK))).await.transfer.unwrap();
            field.service.withdraw(&field.island.head_end, field.request(), vec![(field.title(0), id)], String::new()).await.unwrap();
            kept.push(guek(&field.row(0).await).versions().len());
        }
        assert_eq!(kept, [2; 4]);
        // As it is after many transfers that the meter seems not to have applied.
        let (title, made) = (field.title(0), kms_domain::MOST_VERSIONS - 1);
        let reads = kms_store::Reads { meters: vec![title], ..kms_store::Reads::default() };
        let act = field.island.island.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), reads, move |view| {
            let mut meter = (*view.meter(title)?.unwrap()).clone();
            let now = view.now();
            let slot = meter.slots.get_mut(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
            for _ in 0..made {
                let origin = kms_domain::KeyOrigin::Diversified {
                    root_version: 1,
                    derivation: kms_domain::KeyDerivation::Sp800108Cmac,
                    length: kms_domain::KeyLength::Aes128,
                };
                let new = kms_domain::NewKeyVersion { state: KeyState::PreActive, origin, wrapped: None, fingerprint: None };
                let number = slot.add_version(new, now).unwrap();
                slot.mark_left(number, 1, KeyVersionNumber::FIRST).unwrap();
                slot.confirm(KeyVersionNumber::FIRST, 1, kms_domain::Evidence::Proven, now).unwrap();
            }
            view.put_meter(meter, false)?;
            view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
            Ok(())
        });
        act.await.unwrap();
        let before = field.row(0).await;
        assert!(!guek(&before).unresolved() && guek(&before).candidates().count() == kms_domain::MOST_VERSIONS);
        for form in [TransferForm::Frames, TransferForm::WrappedKey] {
            match field.begin(Order { form, ..order(title, Some(KeyType::GUEK)) }).await.next {
                Err(ServiceError::ResourceExhausted { reason, retry_after }) => {
                    assert!(reason.contains("128") && reason.contains("once a day"), "{reason}");
                    assert!(!retry_after.is_zero() && retry_after <= std::time::Duration::from_hours(24));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(field.row(0).await, before);
        // Other keys of the meter have room, and what it holds can be asked.
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GAK)).await, Outcome::Proven);
        field.assert_no_nonce_twice();
    }

    async fn a_second_urgent_rotation_in_doubt_makes_three_candidates(island) {
        permit_urgent(&island);
        let field = Field::new(island, "generic-suite0", 1).await;
        let candidates = |row: &kms_domain::Meter| row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().candidates().count();
        // The first new key arrives and nothing comes back any more; then the second is lost on its
        // way.
        field.meters[0].add_fault(at_key_transfer(1, Fault::LoseAnswer));
        field.meters[0].add_fault(at_association(2, Fault::LoseRequest));
        field.meters[0].add_fault(at_association(3, Fault::LoseRequest));
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::InDoubt);
        assert_eq!(candidates(&field.row(0).await), 2);
        assert!(matches!(field.begin(order(field.title(0), Some(KeyType::GUEK))).await.next, Err(ServiceError::FailedPrecondition { .. })));
        field.assert_not_lost(0).await;
        // Only the opening of the second transfer gets through, and then nothing.
        field.meters[0].add_fault(at_key_transfer(2, Fault::LoseRequest));
        for number in 6..20 {
            field.meters[0].add_fault(at_association(number, Fault::LoseRequest));
        }
        let urgent = Order { urgent: true, ..order(field.title(0), Some(KeyType::GUEK)) };
        assert_eq!(field.carry_out(0, urgent).await, Outcome::InDoubt);
        let row = field.row(0).await;
        assert_eq!(candidates(&row), 3);
        field.assert_not_lost(0).await;
        field.assert_no_nonce_twice();
    }

    /// A challenge that could be a request is no answer of other keys: it costs another
    /// association, and nothing else.
    async fn a_challenge_that_could_be_a_request_is_asked_for_anew(island) {
        let field = Field::new(island, "generic-suite0", meter_sim::REQUESTS.len() as u64).await;
        for (number, first) in meter_sim::REQUESTS.into_iter().enumerate() {
            let meter = &field.meters[number];
            let (refused, answerable) = (|| vec![first, 1, 1], || vec![b'A']);
            // At the opening and at the proof.
            meter.choose_challenges([refused(), answerable(), refused(), refused(), answerable()]);
            assert_eq!(field.transfer(number, Some(KeyType::GUEK)).await, Outcome::Proven, "{first:02X}");
            assert_eq!((meter.association_requests(), field.held(number, KeyType::GUEK).await), (5, 2), "{first:02X}");
            // At every association that a transfer bears.
            let most = usize::try_from(kms_domain::MOST_UNFIT).unwrap();
            meter.choose_challenges(std::iter::repeat_with(refused).take(most).chain([answerable()]));
            meter.choose_challenges(std::iter::repeat_with(refused).take(most));
            assert_eq!(field.transfer(number, Some(KeyType::GAK)).await, Outcome::Proven, "{first:02X}");
            assert_eq!(meter.association_requests(), 5 + 2 * (u64::from(kms_domain::MOST_UNFIT) + 1), "{first:02X}");
            field.compare(number).await;
            // A meter that sends nothing else counts as silent in the end, and what is known of its
            // keys stays.
            let before = field.row(number).await;
            // Under its own keys only it sends any.
            meter.choose_challenges(std::iter::repeat_with(refused).take(most + 1));
            assert_eq!(field.transfer(number, None).await, Outcome::InDoubt, "{first:02X}");
            assert_eq!(shown(&field.row(number).await), shown(&before), "{first:02X}");
            assert_eq!(field.transfer(number, None).await, Outcome::Probed, "{first:02X}");
        }
        // I4: the counters of associations that led nowhere are spent.
        field.assert_no_nonce_twice();
        // The probe has tried the former keys, too, whose counters the meter has gone on with.
        assert!(field.security_events().await.iter().all(|event| event == "counter-followed"));
        let events = field.transfer_events().await;
        let again = events.iter().filter(|event| *event == "associate-again").count();
        assert_eq!(again, meter_sim::REQUESTS.len() * (3 + 3 * usize::try_from(kms_domain::MOST_UNFIT).unwrap()));
    }

    async fn a_compromised_version_is_granted_to_nobody_and_the_meter_is_not_lost(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let meters = MeterService::new(field.island.island.clone());
        let compromise = |version: u32| Compromise {
            meter: title,
            setup: None,
            key_type: KeyType::GUEK,
            version: KeyVersionNumber::new(version).unwrap(),
            known_to: kms_domain::Party::Anyone,
            reason: "found in a log".to_owned(),
        };
        let report = |by: &Caller, version: u32| {
            let (meters, by, found) = (meters.clone(), by.clone(), compromise(version));
            let request = crate::meter::Request { id: field.request(), digest: [4; 32] };
            async move { meters.report_compromise(&by, request, found).await }
        };
        assert!(matches!(report(&field.island.head_end, 1).await, Err(ServiceError::PermissionDenied { .. })));
        let shown = report(&field.island.officer, 1).await.unwrap();
        assert!(shown.security_setups[0].slots.iter().any(|slot| slot.key_type == "GUEK" && slot.versions[0].state == "compromised"));
        assert!(matches!(report(&field.island.officer, 1).await, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(report(&field.island.officer, 9).await, Err(ServiceError::FailedPrecondition { .. })));
        // No frame under it, and nothing to grant, while a transfer still opens with it.
        assert!(field.frame(0).await.is_err());
        assert_eq!(field.row(0).await.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().grantable().count(), 0);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        let granted: Vec<u32> = slot.grantable().map(|grantable| grantable.version.number().number()).collect();
        assert_eq!(granted, [2], "the compromised candidate is not offered beside the new one");
        assert_eq!(slot.candidates().count(), 2);
        assert!(field.frame(0).await.is_ok());
        // In doubt between a new version and the compromised one.
        field.meters[0].set_behaviour(Behaviour { reverts_on_power_cycle: [KeyId::GlobalUnicastEncryption].into(), ..Behaviour::default() });
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        report(&field.island.officer, 2).await.unwrap();
        field.meters[0].power_cycle();
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.held(0, KeyType::GUEK).await, 2);
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert!(slot.grantable().all(|grantable| grantable.version.number().number() == 3), "never granted again, even in doubt");
        field.assert_not_lost(0).await;
        field.assert_no_nonce_twice();
    }

    async fn a_compromised_version_is_what_a_campaign_is_for_and_to_replace_it_is_no_news(island) {
        let field = Field::new(island, "generic-suite0", 3).await;
        let meters = MeterService::new(field.island.island.clone());
        let campaigns = CampaignService::new(field.island.island.clone());
        let report = async |number: usize, version: u32| {
            let found = Compromise {
                meter: field.title(number),
                setup: None,
                key_type: KeyType::GUEK,
                version: KeyVersionNumber::new(version).unwrap(),
                known_to: kms_domain::Party::Anyone,
                reason: "found in a log".to_owned(),
            };
            let request = crate::meter::Request { id: field.request(), digest: [4; 32] };
            meters.report_compromise(&field.island.officer, request, found).await.unwrap()
        };
        let selected = async || {
            let new = NewCampaign {
                name: kms_domain::CampaignName::parse("reported").unwrap(),
                action: kms_domain::CampaignAction::rotate(KeyType::GUEK).unwrap(),
                setup: None,
                selection: kms_domain::CampaignSelection { exposed_by: Some(kms_domain::ExposureReason::Reported), ..Default::default() },
                named: Vec::new(),
                terms: kms_domain::CampaignTerms {
                    quorum: kms_domain::Quorum::ONE,
                    canary: 0,
                    waves: vec![kms_domain::WaveSize::Percent(100)],
                    success_threshold: 50,
                    failure_limit: 3,
                    windows: kms_domain::MaintenanceWindows::always(),
                    starts_per_minute: None,
                    in_flight: 100.try_into().unwrap(),
                    attempts: 2.try_into().unwrap(),
                    back_off_seconds: 1,
                },
            };
            let request = crate::campaign::Request { id: field.request(), digest: [1; 32] };
            let found = campaigns.create(&field.island.officer, request, new, false).await;
            found.map_or(Vec::new(), |answer| answer.preview.unwrap().sample)
        };
        let title = |number: usize| bytes::Bytes::from(field.title(number).octets().to_vec());
        assert_eq!(selected().await, Vec::<bytes::Bytes>::new());

        // One whose GUEK was proven, and one whose GUEK was never used.
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        for (number, version) in [(0, 2), (1, 1)] {
            let shown = report(number, version).await;
            assert!(shown.summary.unwrap().compromised);
            let slot = shown.security_setups[0].slots.iter().find(|slot| slot.key_type == "GUEK").unwrap();
            // Of what the meter holds nothing is in doubt for that.
            assert!(slot.compromised && !slot.in_doubt, "{slot:?}");
        }
        assert_eq!(selected().await, [title(0), title(1)]);
        let accepted = field.row(1).await.acceptance(None, |_, _| true);
        assert!(accepted.iter().any(|key| key.key_type == KeyType::GUEK && key.verdict == kms_domain::Verdict::NotReplaced), "{accepted:?}");

        for number in [0, 1] {
            assert_eq!(field.transfer(number, Some(KeyType::GUEK)).await, Outcome::Proven);
            field.compare(number).await;
        }
        let events = field.security_events().await;
        assert!(!events.contains(&"earlier-key-held".to_owned()), "{events:?}");
        assert_eq!(selected().await, Vec::<bytes::Bytes>::new(), "what is replaced is done");
        assert!(!meters.show(&field.island.officer, field.title(0)).await.unwrap().summary.unwrap().compromised);
        field.assert_no_nonce_twice();
    }

    async fn a_compromised_kek_exposes_what_left_under_it(island) {
        permit_master_keys(&island);
        let field = Field::new(island, "generic-suite0", 1).await;
        for key_type in [KeyType::KEK, KeyType::GAK] {
            assert_eq!(field.transfer(0, Some(key_type)).await, Outcome::Proven);
        }
        let mut row = field.row(0).await;
        row.report_compromise(SecuritySetupId::DEFAULT, KeyType::KEK, KeyVersionNumber::FIRST, &kms_domain::Party::Anyone, kms_domain::UnixMillis(9)).unwrap();
        // KEK 2 left under KEK 1, GUEK 2 and GAK 2 under KEK 2.
        for key_type in [KeyType::KEK, KeyType::GUEK, KeyType::GAK] {
            let slot = row.slots.get(SecuritySetupId::DEFAULT, key_type).unwrap();
            let second = slot.version(KeyVersionNumber::new(2).unwrap()).unwrap();
            assert!(second.exposures().iter().any(|exposure| exposure.party == kms_domain::Party::Anyone), "{key_type}");
            assert_eq!(second.state(), KeyState::Active);
        }
    }

    async fn a_take_over_says_what_it_did_not_heal(island) {
        use kms_domain::{Remedy, Verdict};
        permit_master_keys(&island);
        let field = Field::new(island, "generic-suite0", 1).await;
        let accepted = |row: &kms_domain::Meter| {
            let mut keys = row.acceptance(None, |_, key_type| key_type.standard_key_id().is_some());
            keys.retain(|key| [KeyType::KEK, KeyType::GUEK, KeyType::GAK].contains(&key.key_type));
            assert_eq!(keys.len(), 3);
            keys
        };
        let before = accepted(&field.row(0).await);
        assert!(before.iter().all(|key| (key.verdict, key.remedy) == (Verdict::NotReplaced, Some(Remedy::Rotation))), "{before:?}");
        // In the order of a take-over: the KEK with its GUEK, then the GAK. All of it under a KEK
        // that the vendor knows.
        for key_type in [KeyType::KEK, KeyType::GAK] {
            assert_eq!(field.transfer(0, Some(key_type)).await, Outcome::Proven);
        }
        let mut row = field.row(0).await;
        for key in &accepted(&row) {
            assert_eq!((key.verdict, key.remedy), (Verdict::NotHealed, Some(Remedy::LocalVisit)), "{key:?}");
            assert_eq!(key.known_to, [kms_domain::Party::Vendor], "{key:?}");
            assert_eq!((key.version.unwrap().number(), key.evidence), (2, kms_domain::Evidence::Proven), "{key:?}");
        }
        row.suite = kms_domain::SecuritySuite::Suite1;
        let kek = |row: &kms_domain::Meter| row.acceptance(None, |_, key_type| key_type.standard_key_id().is_some()).into_iter().find(|key| key.key_type == KeyType::KEK).unwrap();
        assert_eq!(kek(&row).remedy, Some(Remedy::KeyAgreement));
        // Another rotation over the air heals nothing: it travels under a KEK that could be known.
        assert_eq!(field.transfer(0, Some(KeyType::KEK)).await, Outcome::Proven);
        assert_eq!(kek(&field.row(0).await).verdict, Verdict::NotHealed);
    }

    async fn a_meter_whose_counter_starts_again_under_the_same_key_is_a_security_event(island) {
        let mut field = Field::new(island, "generic-suite0", 1).await;
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert!(field.security_events().await.is_empty());
        // Its memory of counters is lost, its keys are not.
        field.meters[0] = Meter::new(field.configs[0].clone()).unwrap();
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.security_events().await, ["meter-counter-backwards"]);
        // The same in a frame that answers a challenge: said once, and opened all the same.
        let row = field.row(0).await;
        let known = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().active().unwrap().transport().meter_counter;
        assert!(known > 0);
        let pair = row.pairs(SecuritySetupId::DEFAULT, None)[0];
        let keys = emit::pair_keys(&row, SecuritySetupId::DEFAULT, pair).unwrap();
        let nonce = kms_dlms::Nonce::new(row.title, known - 1);
        let parameters = kms_hsm::FrameParameters::new(kms_dlms::HlsGmac::control(row.suite).octet(), *nonce.octets()).unwrap();
        let input = kms_hsm::FrameInput { parameters, plaintext: vec![7; 16] };
        let made = field.island.island.hsm.protect_batch(vec![(keys, input)]).await.unwrap().remove(0).unwrap();
        let response = kms_dlms::HlsGmac { suite: row.suite, counter: known - 1, tag: kms_dlms::AuthenticationTag(made.tag) }.octets().to_vec();
        let service = FrameService::new(field.island.island.clone());
        for _ in 0..2 {
            let frame =
                ReceivedFrame { meter: row.title, setup: None, content: ReceivedContent::HlsResponse { response: response.clone(), challenge: vec![7; 16] } };
            let outcomes = service.unprotect(&field.island.head_end, Purpose::Read, vec![frame]).await.unwrap();
            assert!(outcomes[0].octets.is_ok(), "{:?}", outcomes[0].octets);
        }
        assert_eq!(field.security_events().await.len(), 2);
    }

    async fn a_profile_that_resets_counters_starts_new_keys_low(island) {
        let field = Field::new(island, "counter-resets", 1).await;
        field.meters[0].set_behaviour(Behaviour { counter_on_new_key: CounterOnNewKey::RestartAt(250), ..Behaviour::default() });
        field.island.take_counters_over(field.title(0), 3_500_000_000).await;
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        let row = field.row(0).await;
        let bound = |number| {
            let version = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().version(KeyVersionNumber::new(number).unwrap()).unwrap();
            let kms_domain::CounterPlace::Own(counters) = version.counters() else { panic!("in a domain") };
            (counters.highest_bound(), version.rotation_due())
        };
        assert!(bound(1).0 > 3_500_000_000 && bound(1).1);
        assert!(bound(2).0 < 1_000_000 && !bound(2).1, "{:?}", bound(2));
        // The old key asked for its rotation, once.
        assert_eq!(field.security_events().await, ["counter-rotation-due"]);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    async fn the_counters_of_a_former_key_are_no_reason_to_jump_where_a_profile_resets_them(island) {
        let field = Field::new(island, "counter-resets", 1).await;
        field.island.take_counters_over(field.title(0), 3_000_000_000).await;
        // The meter goes on counting against its profile. Its answer could be forged, and would use
        // up most of the new key.
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::InDoubt);
        assert!(field.security_events().await.contains(&"counter-jump-refused".to_owned()));
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        let kms_domain::CounterPlace::Own(counters) = slot.version(KeyVersionNumber::new(2).unwrap()).unwrap().counters() else { panic!("in a domain") };
        assert!(counters.highest_bound() < 1_000_000, "{}", counters.highest_bound());
        field.assert_not_lost(0).await;
        field.assert_no_nonce_twice();
    }

    async fn a_new_key_counts_above_those_of_a_domain(island) {
        let field = Field::of(island, &SampleShipment { equal_keys: 2, ..sample("generic-suite0", 2) }).await;
        field.island.take_counters_over(field.title(0), 3_000_000_000).await;
        for number in [0, 1] {
            assert_eq!(field.transfer(number, Some(KeyType::GUEK)).await, Outcome::Proven);
            field.compare(number).await;
        }
        assert!(!field.security_events().await.contains(&"counter-followed".to_owned()), "no meter refused a counter");
        field.assert_no_nonce_twice();
    }

    async fn a_counter_that_starts_again_with_a_new_key_does_no_harm(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        field.meters[0].set_behaviour(Behaviour { counter_on_new_key: CounterOnNewKey::RestartAt(250), ..Behaviour::default() });
        for _ in 0..3 {
            assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
            field.compare(0).await;
        }
        field.assert_no_nonce_twice();
    }

    async fn only_the_present_step_of_ones_own_transfer_moves_anything(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let first_request = RequestId::from_octets(&[3; 16]).unwrap();
        let begin = |digest| {
            let orders = vec![order(title, Some(KeyType::GUEK))];
            field.service.begin(&field.island.head_end, first_request, digest, orders)
        };
        let step = begin([1; 32]).await.unwrap().0.remove(0);
        let (id, at) = step.transfer.unwrap();
        let NextStep::Send(sent) = step.next.unwrap() else { panic!("nothing to send") };
        // The same request: the same transfer, the same octets (I4).
        let again = begin([1; 32]).await.unwrap().0.remove(0);
        let NextStep::Send(sent_again) = again.next.unwrap() else { panic!("nothing to send") };
        assert_eq!((again.transfer, &sent_again.apdu), (step.transfer, &sent.apdu));
        assert!(matches!(begin([2; 32]).await, Err(ServiceError::InvalidArgument { .. })));
        // A second transfer, other head-ends, other steps, other ids.
        assert!(matches!(field.begin(order(title, Some(KeyType::GAK))).await.next, Err(ServiceError::FailedPrecondition { .. })));
        let before = field.row(0).await;
        let nothing = || ReportedAnswer::Nothing;
        assert!(matches!(field.report(&field.island.other_head_end, title, id, at, nothing()).await.next, Err(ServiceError::PermissionDenied { .. })));
        assert!(matches!(field.report(&field.island.head_end, title, id, at + 1, nothing()).await.next, Err(ServiceError::FailedPrecondition { .. })));
        let other = TransferId::from_octets(&[9; 16]).unwrap();
        assert!(matches!(field.report(&field.island.head_end, title, other, at, nothing()).await.next, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(field.begin(order(meter(77), None)).await.next, Err(ServiceError::PermissionDenied { .. })));
        assert_eq!(field.row(0).await, before);

        // An answer that is cut proves nothing and associates with nobody.
        let mut connection = Connection::new(field.meters[0].clone(), 1);
        let genuine = connection.exchange(&sent.apdu).unwrap();
        let mut cut = genuine.clone();
        cut.truncate(genuine.len() - 1);
        let step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Apdu(genuine)).await;
        let (_, second) = step.transfer.unwrap();
        assert_eq!(second, at + 1);
        // A report of the first step comes again, another one: nothing moves.
        let before = field.row(0).await;
        let step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Apdu(cut.clone())).await;
        assert_eq!(step.transfer, Some((id, second)));
        assert_eq!(field.row(0).await, before);
        // What is cut proves nothing; the meter has only one pair of keys to try, so nothing was
        // shown, and nothing has left.
        let step = field.report(&field.island.head_end, title, id, second, ReportedAnswer::Apdu(cut)).await;
        assert!(matches!(step.next, Ok(NextStep::End { outcome: Outcome::InDoubt, .. })));
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert!(!slot.in_doubt() && slot.active().unwrap().number().number() == 1);
    }

    // I3: what is not the meter's own answer proves nothing.
    async fn a_foreign_meters_answer_never_moves_a_state(island) {
        report_answers_of_another_meter(island, 1).await;
    }

    // The system title in the nonce is all that tells the two meters apart.
    async fn a_foreign_meters_answer_never_moves_a_state_even_if_both_have_the_same_keys(island) {
        report_answers_of_another_meter(island, 2).await;
    }

    async fn nobody_s_word_makes_an_order_a_task_of_a_campaign(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let before = field.row(0).await;
        // The shipped policies permit a KEK to tasks of campaigns only.
        let refused = field.begin(order(title, Some(KeyType::KEK))).await.next;
        assert!(matches!(refused, Err(ServiceError::PermissionDenied { .. })));
        let task = Some(kms_domain::CampaignTask { campaign: kms_domain::CampaignId::from_octets(&[5; 16]).unwrap(), fence: 1 });
        let refused = field.begin(Order { task, ..order(title, Some(KeyType::KEK)) }).await.next;
        assert!(matches!(refused, Err(ServiceError::PermissionDenied { .. })));
        assert_eq!(field.row(0).await, before);
    }

    async fn without_counters_nothing_of_a_transfer_is_stored(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        field.island.leave_counters(title).await;
        let before = field.row(0).await;
        let refused = field.begin(order(title, Some(KeyType::GUEK))).await.next;
        assert!(matches!(refused, Err(ServiceError::FailedPrecondition { .. })));
        assert_eq!(field.row(0).await, before);
    }

    async fn a_head_end_with_keys_of_its_own_delivers_and_the_hsm_proves(island) {
        permit_master_keys(&island);
        let field = Field::new(island, "generic-suite0", 2).await;
        for (number, attests) in [(0, false), (1, true)] {
            let memory = field.meters[number].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
            let mut session = meter_sim::client::ClientSession::new(meter_sim::client::ClientConfig {
                client_title: meter_sim::SystemTitle::new(client_title().octets()),
                suite: meter_sim::SecuritySuite::default(),
                keys: meter_sim::security::Ciphering { encryption: memory.guek.clone(), authentication: memory.gak.clone() },
                dedicated_key: None,
                counters: 1..=100,
                general_ciphering: true,
            })
            .unwrap();
            let mut connection = Connection::new(field.meters[number].clone(), 1);
            let request = session.association_request().unwrap();
            session.process_association_response(&connection.exchange(&request).unwrap()).unwrap();
            let request = session.hls_request().unwrap();
            session.process_hls_response(&connection.exchange(&request).unwrap()).unwrap();
            // Counters that the head-end has used by itself are taken over before the server makes
            // frames.
            field.island.take_counters_over(field.title(number), 200).await;

            let order = Order { form: TransferForm::WrappedKey, ..order(field.title(number), Some(KeyType::GUEK)) };
            let step = field.begin(order).await;
            let (id, at) = step.transfer.unwrap();
            let NextStep::Send(sending) = step.next.unwrap() else { panic!("nothing to send") };
            assert!(sending.apdu.is_empty());
            let delivery = sending.delivery.unwrap();
            let request = session.key_transfer_request(Obis::SECURITY_SETUP, &[(KeyId::GlobalUnicastEncryption, &delivery.wrapped)]).unwrap();
            let answer = connection.exchange(&request).unwrap();
            let mut step = field.report(&field.island.head_end, step.meter, id, at, ReportedAnswer::Apdu(answer)).await;
            let mut connection = Connection::new(field.meters[number].clone(), 1);
            let outcome = loop {
                match step.next.unwrap() {
                    NextStep::End { outcome, .. } => break outcome,
                    NextStep::Send(sending) => {
                        let (id, at) = step.transfer.unwrap();
                        let answer = match attests {
                            true => ReportedAnswer::Attested(true),
                            false => ReportedAnswer::Apdu(connection.exchange(&sending.apdu).unwrap()),
                        };
                        step = field.report(&field.island.head_end, step.meter, id, at, answer).await;
                    }
                }
            };
            assert_eq!(outcome, if attests { Outcome::Attested } else { Outcome::Proven });
            field.compare(number).await;
        }
        field.assert_no_nonce_twice();
    }

    async fn an_attestation_is_refused_by_the_shipped_policies(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let step = field.begin(Order { form: TransferForm::WrappedKey, ..order(title, Some(KeyType::GUEK)) }).await;
        let (id, at) = step.transfer.unwrap();
        // The key never gets to the meter, and its head-end says that the meter uses it.
        let mut step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Nothing).await;
        let (id, at) = step.transfer.unwrap();
        let before = field.row(0).await;
        for holds in [true, false] {
            let refused = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Attested(holds)).await.next;
            assert!(matches!(refused, Err(ServiceError::PermissionDenied { .. })), "I8: {refused:?}");
            assert_eq!(field.row(0).await, before);
        }
        // The transfer goes on, and the meter itself shows what it holds.
        let mut connection = Connection::new(field.meters[0].clone(), 1);
        let outcome = loop {
            match step.next.unwrap() {
                NextStep::End { outcome, .. } => break outcome,
                NextStep::Send(sending) => {
                    let (id, at) = step.transfer.unwrap();
                    let answer = connection.exchange(&sending.apdu).unwrap();
                    step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Apdu(answer)).await;
                }
            }
        };
        assert_eq!(outcome, Outcome::NotApplied);
        assert_eq!(field.held(0, KeyType::GUEK).await, 1);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    async fn a_withdrawn_transfer_leaves_its_version_in_doubt(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let mut connection = Connection::new(field.meters[0].clone(), 1);
        let mut step = field.begin(order(title, Some(KeyType::GUEK))).await;
        // Up to the delivery, whose answer never comes.
        let id = loop {
            let (id, at) = step.transfer.unwrap();
            let NextStep::Send(sending) = step.next.unwrap() else { panic!("over") };
            let answer = connection.exchange(&sending.apdu).unwrap();
            if sending.kind == SendingKind::Deliver {
                break id;
            }
            step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Apdu(answer)).await;
        };
        let ended = field.service.withdraw(&field.island.head_end, field.request(), vec![(title, id)], "test".to_owned()).await.unwrap().remove(0);
        assert!(matches!(ended.next, Ok(NextStep::End { outcome: Outcome::Withdrawn, .. })));
        assert!(field.row(0).await.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().in_doubt());
        assert!(matches!(field.begin(order(title, Some(KeyType::GUEK))).await.next, Err(ServiceError::FailedPrecondition { .. })));
        field.assert_not_lost(0).await;
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.held(0, KeyType::GUEK).await, 2);
        field.compare(0).await;
    }
}
