//! Transfers to simulated meters, through the HSM: what the server says that a meter holds is
//! compared with the meter's memory.

mod answers;
mod compromise;
mod counters;
mod doubt;
mod rotation;
mod tasks;

use kms_client::sample::SampleShipment;
use kms_domain::{
    KeyType, KeyVersionNumber, Outcome, RequestId, SecuritySetupId, SystemTitle, TransferForm, TransferId,
};
use kms_hsm::TransferJob;
use meter_sim::{
    Connection, Meter, MeterConfig, Obis, SymmetricKey,
    behaviour::{Fault, ScriptedFault, Trigger},
    config::SecuritySetupConfig,
    nonces::RepeatedNonce,
    security::unwrap_key,
};

use super::{NextStep, Order, Report, ReportedAnswer, SendingKind, StepAnswer, TransferService, emit};
use crate::frame::{FrameService, PlainContent, PlainFrame};
use crate::testing::{TestIsland, client_title, sample};
use kms_authz::{Caller, Purpose, Quotas};
use kms_base::error::ServiceError;
use kms_proto::v1::audit_record::Event;

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

    /// Runs one transfer as a head-end does that holds no keys.
    pub(crate) async fn transfer(&self, number: usize, key_type: Option<KeyType>) -> Outcome {
        self.run(number, order(self.title(number), key_type)).await
    }

    pub(crate) async fn run(&self, number: usize, order: Order) -> Outcome {
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

    /// The steps and outcomes in the audit log.
    async fn transfer_events(&self) -> Vec<String> {
        let advances = |event| match event {
            Event::TransfersAdvanced(event) => Some(event.advances),
            _ => None,
        };
        self.island.recorded(advances).await.into_iter().flatten().map(|advance| advance.event).collect()
    }

    /// The security events about meters.
    pub(crate) async fn security_events(&self) -> Vec<String> {
        let about_meters = |event| match event {
            Event::SecurityEvent(event) if !event.meter.is_empty() => Some(event.kind),
            _ => None,
        };
        self.island.recorded(about_meters).await
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
