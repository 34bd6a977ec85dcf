//! New keys for meters over the air (I3). The state machine is in the domain; here it meets the
//! meter's octets, the HSM and the database.
//!
//! A step is decided in one transaction: the meter's row, the counters of the next request and the
//! audit record (I2). What leaves is made in the HSM afterwards, from the row alone, so the same
//! step is the same octets on every server (I4). What came back is read in the HSM before the next
//! step is decided; the transaction checks that the row is still at the step that was read for.

mod emit;
mod read;
#[cfg(test)]
mod task_tests;
#[cfg(test)]
pub(crate) mod tests;

use async_recursion::async_recursion as boxed;
use std::{collections::HashMap, num::NonZeroU32, sync::Arc};

use aws_lc_rs::digest;
use futures::{StreamExt, TryStreamExt, stream};
use kms_domain::{
    CampaignTask, Confirmation, CounterPlace, ExposureReason, Finding, GroupId, KeyOrigin, KeyPair, KeyShape, KeyState,
    KeyType, KeyVersion, KeyVersionNumber, Meter, NewKeyOrigin, NewKeyVersion, Next, Observation, OrderedKeys, Outcome,
    Owner, RequestId, SecuritySetupId, SharedExposures, Stage, Step, SystemTitle, TaskWork, Transfer, TransferError,
    TransferForm, TransferId, TransferOrder, WrappedKey,
};
use kms_hsm::Hsm;
use kms_proto::v1::{HeldVersion, SecurityEvent, TransferAdvance, TransfersAdvanced, audit_record::Event};
use kms_store::Reads;

pub(crate) use self::emit::pair_keys;
use super::{
    campaign::{begin_task, check_task, end_task, holds_task, task_reads},
    keys::{
        counter::{counter_key, on_new_key},
        exposure::expose_to_who_knows_a_kek,
        setup::setup_record,
    },
};
use crate::island::Island;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, AuditLeaf, CounterOf, Decision, Keys, Known, Never, Permit, Request, View};

/// What is asked for one meter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The meter.
    pub meter: SystemTitle,
    /// The security setup; `None` is the meter's first.
    pub setup: Option<SecuritySetupId>,
    /// The key; `None` is a probe.
    pub key_type: Option<KeyType>,
    /// The client title that the requests are sent under.
    pub client_title: SystemTitle,
    /// Who ciphers the delivery.
    pub form: TransferForm,
    /// Go on although the slot is in doubt.
    pub urgent: bool,
    /// How long nobody else may begin a transfer of the meter, in seconds.
    pub lifetime_seconds: u32,
    /// The campaign's task, and its lease.
    pub task: Option<CampaignTask>,
}

/// What a head-end reports of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The meter.
    pub meter: SystemTitle,
    /// The transfer.
    pub id: TransferId,
    /// The step that it answers.
    pub step: u32,
    /// What came.
    pub answer: ReportedAnswer,
}

/// What came back, as the head-end tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportedAnswer {
    /// These octets.
    Apdu(Vec<u8>),
    /// Nothing.
    Nothing,
    /// No octets: the head-end, which holds the new key, says whether the meter uses it.
    Attested(bool),
}

/// The present step of a transfer, for its head-end.
#[derive(Debug)]
pub struct StepAnswer {
    /// The meter.
    pub meter: SystemTitle,
    /// The transfer, and the number of its step.
    pub transfer: Option<(TransferId, u32)>,
    /// What to do.
    pub next: Result<NextStep, ServiceError>,
}

/// What to do next.
#[derive(Debug)]
pub enum NextStep {
    /// Send something.
    Send(Box<Sending>),
    /// The transfer is over.
    End {
        /// How it ended.
        outcome: Outcome,
        /// What the meter showed in this step.
        findings: Vec<Finding>,
    },
}

/// What is to be sent to the meter.
#[derive(Debug)]
pub struct Sending {
    /// Which kind of request.
    pub kind: SendingKind,
    /// The request; empty where the head-end makes it.
    pub apdu: Vec<u8>,
    /// The client's service access point.
    pub client_sap: u16,
    /// What is delivered.
    pub delivery: Option<Delivery>,
}

/// Kinds of requests of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendingKind {
    /// An association request.
    Associate,
    /// The answer to the meter's challenge.
    Authenticate,
    /// A key.
    Deliver,
}

/// A key that leaves for a meter.
#[derive(Debug)]
pub struct Delivery {
    /// Its type.
    pub key_type: KeyType,
    /// Its version.
    pub version: KeyVersionNumber,
    /// Its RFC 3394 wrap under the meter's KEK, 24 or 40 octets.
    pub wrapped: Vec<u8>,
    /// The argument of `key_transfer`, A-XDR.
    pub argument: Vec<u8>,
}

/// The `key_transfer` that a head-end ciphers by itself in a step.
#[derive(Debug)]
pub(crate) struct Brought {
    /// The transfer, and its step.
    pub(crate) transfer: TransferId,
    pub(crate) step: u32,
    /// The plain action-request, with an invoke id of the server's.
    pub(crate) request: Vec<u8>,
}

/// The use case.
#[derive(Clone)]
pub struct TransferService {
    island: Arc<Island>,
    /// For the server itself, or for a caller.
    hsm: Hsm,
}

/// A decided step of one meter.
type Decided = (SystemTitle, Result<DecidedStep, ServiceError>);

/// The meter as it is after a step; with an end where the transfer is over.
struct DecidedStep {
    meter: Arc<Meter>,
    end: Option<(Outcome, Vec<Finding>)>,
}

impl DecidedStep {
    const fn going_on(meter: Arc<Meter>) -> Self {
        Self { meter, end: None }
    }

    const fn over(meter: Arc<Meter>, outcome: Outcome, findings: Vec<Finding>) -> Self {
        Self { meter, end: Some((outcome, findings)) }
    }
}

impl TransferService {
    /// Transfers of an island.
    pub fn new(island: Arc<Island>) -> Self {
        Self { hsm: island.hsm.clone(), island }
    }

    /// The same, whose work in the HSM is the caller's.
    fn paid_by(&self, caller: &Caller) -> Self {
        Self { hsm: self.island.hsm_for(caller), island: self.island.clone() }
    }

    /// Begins transfers. What concerns one meter is in its answer.
    ///
    /// # Errors
    /// What concerns all: the caller, the request id, HSM or database.
    #[boxed]
    pub async fn begin(
        &self,
        caller: &Caller,
        request: RequestId,
        digest: [u8; 32],
        orders: Vec<Order>,
    ) -> Result<(Vec<StepAnswer>, Option<AuditLeaf>), ServiceError> {
        let asker = self.island.asker(caller).await?;
        let known = self.meters(orders.iter().map(|order| order.meter)).await?;
        // Denied before the HSM makes a key.
        let permitted: Vec<bool> = orders
            .iter()
            .map(|order| known.get(&order.meter).is_some_and(|meter| permits_order(&asker, meter, order).is_ok()))
            .collect();
        let paid = self.paid_by(caller);
        let prepared = paid.prepare(&orders, &permitted, &known).await?;
        let groups =
            orders.iter().filter_map(|order| known.get(&order.meter)).flat_map(|meter| meter.class.groups.clone());
        let mut sealed = vec![self.island.row_name()];
        sealed.extend(groups.map(group_row));
        let mut reads = Reads { meters: orders.iter().map(|order| order.meter).collect(), sealed, ..Reads::default() };
        for (order, permitted) in orders.iter().zip(&permitted) {
            if let Some(task) = order.task.filter(|_| *permitted) {
                reads.extend(&task_reads(task.campaign, [order.meter]));
            }
        }
        extend_by_tasks(&mut reads, known.values());
        let act = Begin { island: self.island.clone(), request, orders, prepared, reads };
        let committed = self.island.door.act(caller, Request { id: request, digest }, act).await?;
        Ok((paid.answer(committed.value).await?, committed.leaves.first().copied()))
    }

    /// Reports what came back, and goes on. A report for an earlier step changes nothing and gets
    /// the present step.
    ///
    /// # Errors
    /// What concerns all: the caller, HSM or database.
    #[boxed]
    pub async fn proceed(
        &self,
        caller: &Caller,
        reports: Vec<Report>,
    ) -> Result<(Vec<StepAnswer>, Option<AuditLeaf>), ServiceError> {
        let asker = self.island.asker(caller).await?;
        let known = self.meters(reports.iter().map(|report| report.meter)).await?;
        let expected: Vec<Option<Arc<Meter>>> = reports
            .iter()
            .map(|report| {
                let meter = known.get(&report.meter)?;
                let transfer = meter
                    .transfer
                    .as_ref()
                    .filter(|transfer| transfer.id == report.id && transfer.step == report.step)?;
                permits_transfer(&asker, meter, transfer).ok().map(|()| meter.clone())
            })
            .collect();
        let paid = self.paid_by(caller);
        let observations = paid.read(&reports, &expected).await?;
        let challenges = paid.challenges(reports.len()).await?;
        let sealed = known.values().flat_map(|meter| meter.class.groups.iter().copied().map(group_row)).collect();
        let mut reads =
            Reads { meters: reports.iter().map(|report| report.meter).collect(), sealed, ..Reads::default() };
        extend_by_tasks(&mut reads, known.values());
        let act = Proceed { island: self.island.clone(), reports, observations, challenges, reads };
        let committed = self.island.door.act(caller, None, act).await?;
        Ok((paid.answer(committed.value).await?, committed.leaves.first().copied()))
    }

    /// Ends transfers. What has left stays a candidate (I3).
    ///
    /// # Errors
    /// What concerns all: the caller or the database.
    #[boxed]
    pub async fn withdraw(
        &self,
        caller: &Caller,
        request: RequestId,
        transfers: Vec<(SystemTitle, TransferId)>,
        reason: String,
    ) -> Result<Vec<StepAnswer>, ServiceError> {
        let known = self.meters(transfers.iter().map(|(meter, _)| *meter)).await?;
        let mut reads = Reads { meters: transfers.iter().map(|(meter, _)| *meter).collect(), ..Reads::default() };
        extend_by_tasks(&mut reads, known.values());
        let committed = self.island.door.act(caller, Some(request), Withdraw { transfers, reason, reads }).await?;
        self.paid_by(caller).answer(committed.value).await
    }

    /// The meters as they stand now, for what is done before the transaction.
    async fn meters(
        &self,
        titles: impl Iterator<Item = SystemTitle>,
    ) -> Result<HashMap<SystemTitle, Arc<Meter>>, ServiceError> {
        let titles: Vec<SystemTitle> = titles.collect();
        let rows = self.island.store.meters(&titles).await?;
        // A row that does not verify is as good as absent (I5); the transaction tells the officers.
        Ok(rows
            .iter()
            .filter_map(|row| Some((row.title, self.island.committer.open_meter(row.title, &row.row).ok()?)))
            .collect())
    }

    /// Random challenges of the HSM.
    async fn challenges(&self, count: usize) -> Result<Vec<[u8; kms_domain::CHALLENGE]>, ServiceError> {
        let octets = self.hsm.random(count.saturating_mul(kms_domain::CHALLENGE)).await?;
        Ok(octets.as_chunks().0.to_vec())
    }

    /// The new versions of each order, and its first challenge.
    async fn prepare(
        &self,
        orders: &[Order],
        permitted: &[bool],
        known: &HashMap<SystemTitle, Arc<Meter>>,
    ) -> Result<Vec<Prepared>, ServiceError> {
        let challenges = self.challenges(orders.len()).await?;
        let each: Vec<_> = orders
            .iter()
            .zip(permitted)
            .zip(challenges)
            .map(|((order, permitted), challenge)| {
                self.prepare_one(order.clone(), known.get(&order.meter).filter(|_| *permitted).cloned(), challenge)
            })
            .collect();
        stream::iter(each).buffered(KEYS_AT_ONCE).try_collect().await
    }

    async fn prepare_one(
        &self,
        order: Order,
        meter: Option<Arc<Meter>>,
        challenge: [u8; kms_domain::CHALLENGE],
    ) -> Result<Prepared, ServiceError> {
        let wanted = match order.key_type {
            Some(KeyType::KEK) => vec![KeyType::KEK, KeyType::GUEK],
            Some(one) => vec![one],
            None => Vec::new(),
        };
        let mut keys = Vec::with_capacity(wanted.len());
        if let Some(meter) = meter {
            for key_type in wanted {
                keys.extend(self.new_version(&meter, order.setup, key_type).await?);
            }
        }
        Ok(Prepared { keys, challenge })
    }

    /// A new version as the device profile has it made; none for keys that the meter does not own.
    async fn new_version(
        &self,
        meter: &Meter,
        setup: Option<SecuritySetupId>,
        key_type: KeyType,
    ) -> Result<Option<NewKeyVersion>, ServiceError> {
        let Ok(setup) = setup_of(meter, setup) else { return Ok(None) };
        // Nor for those that it does not take by key_transfer.
        if meter.slots.get(setup, key_type).is_none() || emit::key_id(&self.island, meter, setup, key_type).is_none() {
            return Ok(None);
        }
        let profile = self.island.profiles.get(&meter.class.profile).and_then(|profile| profile.key(setup, key_type));
        let length = match profile.map(|key| key.shape) {
            Some(KeyShape::Aes(length)) => length,
            _ => meter.suite.key_length(),
        };
        let root = self.island.row().roots(key_type.class()).and_then(kms_domain::ClassRoots::current);
        let (origin, wrapped) = match (profile.map(|key| key.origin), root) {
            (Some(NewKeyOrigin::Diversified), Some(root)) => {
                (KeyOrigin::Diversified { root_version: root.version, derivation: root.derivation, length }, None)
            }
            _ => {
                let stored = self.hsm.generate_stored(key_type, length).await?;
                let version = u8::try_from(stored.storage_kek_version.number()).unwrap_or_default();
                let wrapped = WrappedKey::new(key_type, version, stored.blob.into())
                    .map_err(|error| ServiceError::Internal(error.to_string()))?;
                (KeyOrigin::Generated, Some(wrapped))
            }
        };
        Ok(Some(NewKeyVersion { state: KeyState::PreActive, origin, wrapped, fingerprint: None }))
    }
}

/// What an order needs that the transaction cannot make.
struct Prepared {
    keys: Vec<NewKeyVersion>,
    challenge: [u8; kms_domain::CHALLENGE],
}

/// Transfers that a caller begins.
struct Begin {
    island: Arc<Island>,
    request: RequestId,
    orders: Vec<Order>,
    prepared: Vec<Prepared>,
    reads: Reads,
}

impl Act for Begin {
    type Answer = Vec<Decided>;
    type Past = Known<Keys>;

    fn name(&self) -> &'static str {
        "beginTransfer"
    }

    fn reads(&self) -> Reads {
        self.reads.clone()
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.each())
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Vec<Decided>>, ServiceError> {
        let mut advances = Advances::default();
        let mut decided: Vec<Decided> = Vec::with_capacity(self.orders.len());
        for (order, prepared) in self.orders.iter().zip(&self.prepared) {
            let begun = advances.attempt(view, |view, advances| {
                begin_one(view, &self.island, permit, order, prepared, self.request, advances)
            });
            decided.push((order.meter, begun.map(DecidedStep::going_on)));
        }
        refuse_all(view, &decided);
        advances.record(view);
        if decided.iter().all(|(_, step)| step.is_err()) {
            return Ok(Decision::forgotten(decided));
        }
        Ok(Decision::of(view.entry(), decided))
    }

    fn again(&self, _: Known<Keys>, permit: &Permit, view: &mut View<'_, '_>) -> Result<Vec<Decided>, ServiceError> {
        let mut decided: Vec<Decided> = Vec::with_capacity(self.orders.len());
        for order in &self.orders {
            let begun = began(view, permit, order, self.request);
            decided.push((order.meter, begun.map(DecidedStep::going_on)));
        }
        refuse_all(view, &decided);
        Ok(decided)
    }
}

/// What came back from meters, and the next steps of their transfers.
struct Proceed {
    island: Arc<Island>,
    reports: Vec<Report>,
    observations: Vec<Option<read::Read>>,
    challenges: Vec<[u8; kms_domain::CHALLENGE]>,
    reads: Reads,
}

impl Act for Proceed {
    type Answer = Vec<Decided>;
    // Steps are numbered: a report that comes again gets the present step.
    type Past = Never;

    fn name(&self) -> &'static str {
        "continueTransfer"
    }

    fn reads(&self) -> Reads {
        self.reads.clone()
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.each())
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Vec<Decided>>, ServiceError> {
        let mut advances = Advances::default();
        let mut decided: Vec<Decided> = Vec::with_capacity(self.reports.len());
        for ((report, observation), challenge) in self.reports.iter().zip(&self.observations).zip(&self.challenges) {
            let step = advances.attempt(view, |view, advances| {
                proceed_one(view, &self.island, permit, report, observation.as_ref(), *challenge, advances)
            });
            decided.push((report.meter, step));
        }
        refuse_all(view, &decided);
        advances.record(view);
        Ok(Decision::of(view.entry(), decided))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Vec<Decided>, ServiceError> {
        match never {}
    }
}

/// Transfers that are ended before their time.
struct Withdraw {
    transfers: Vec<(SystemTitle, TransferId)>,
    reason: String,
    reads: Reads,
}

impl Withdraw {
    fn withdraw(
        &self,
        permit: &Permit,
        view: &mut View<'_, '_>,
        title: SystemTitle,
        id: TransferId,
        advances: &mut Advances,
    ) -> Result<DecidedStep, ServiceError> {
        let mut meter = own_meter(view, title)?;
        let own = meter.class.head_end.as_ref() == Some(&permit.principal().id);
        if !permit.permits(&Action::WithdrawTransfer { own }, &Resource::Meters(&meter.class)) {
            return Err(denied(title));
        }
        let changed = Arc::make_mut(&mut meter);
        let transfer = changed.transfer.clone();
        changed.withdraw_transfer(id, view.now()).map_err(|error| refused(&error))?;
        view.put_meter(changed.clone(), false)?;
        if let Some(transfer) = transfer {
            advances.push(&meter, &transfer, Outcome::Withdrawn.name(), 0, &[]);
            tell_task(view, &transfer, meter.title, Outcome::Withdrawn, &self.reason)?;
        }
        Ok(DecidedStep::over(meter, Outcome::Withdrawn, Vec::new()))
    }
}

impl Act for Withdraw {
    type Answer = Vec<Decided>;
    // What is withdrawn is over, and its row says so.
    type Past = Never;

    fn name(&self) -> &'static str {
        "withdrawTransfer"
    }

    fn reads(&self) -> Reads {
        self.reads.clone()
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.each())
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Vec<Decided>>, ServiceError> {
        let mut advances = Advances { reason: self.reason.clone(), ..Advances::default() };
        let mut decided: Vec<Decided> = Vec::with_capacity(self.transfers.len());
        for (title, id) in &self.transfers {
            let withdrawn = advances.attempt(view, |view, advances| self.withdraw(permit, view, *title, *id, advances));
            decided.push((*title, withdrawn));
        }
        refuse_all(view, &decided);
        advances.record(view);
        Ok(Decision::of(view.entry(), decided))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Vec<Decided>, ServiceError> {
        match never {}
    }
}

fn begin_one(
    view: &mut View<'_, '_>,
    island: &Island,
    permit: &Permit,
    order: &Order,
    prepared: &Prepared,
    request: RequestId,
    advances: &mut Advances,
) -> Result<Arc<Meter>, ServiceError> {
    let principal = permit.principal();
    if !principal.client_titles.contains(&order.client_title) {
        return Err(ServiceError::denied(format!("beginTransfer under client title {}", order.client_title)));
    }
    let mut meter = own_meter(view, order.meter)?;
    permits_order(permit.asker(), &meter, order)?;
    let setup = setup_of(&meter, order.setup)?;
    if let Some(key_type) = order.key_type.filter(|key_type| emit::key_id(island, &meter, setup, *key_type).is_none()) {
        return Err(ServiceError::FailedPrecondition {
            reason: format!("meters of device profile `{}` do not take a {key_type} by key_transfer in security setup {setup}", meter.class.profile),
            next_step: "give the key its vendor's `key_id` in the device profile, if key_transfer brings it; else it is changed on site".to_owned(),
        });
    }
    let keys = ordered_keys(view, island, &meter, setup, order, prepared)?;
    let transfer_order = TransferOrder {
        id: transfer_id(request, order.meter)?,
        setup,
        head_end: principal.id.clone(),
        campaign: order.task,
        client_title: order.client_title,
        form: order.form,
        keys,
        urgent: order.urgent,
        not_after: view.now().after(i64::from(order.lifetime_seconds) * 1_000),
        challenge: prepared.challenge,
    };
    if let Some(task) = order.task {
        // I8: policy gives a task of a campaign more than another order, so nobody's word for it
        // counts.
        begin_task(
            view,
            task,
            order.meter,
            &principal.id,
            setup,
            order.key_type.map_or(TaskWork::Probe, TaskWork::Rotate),
        )?;
    }
    let changed = Arc::make_mut(&mut meter);
    let earlier = changed.transfer.clone();
    if let Some(earlier) = &earlier
        && is_lost(view, earlier, order.meter)?
    {
        changed.withdraw_transfer(earlier.id, view.now()).map_err(|error| refused(&error))?;
    }
    changed.begin_transfer(transfer_order, view.now()).map_err(|error| refused(&error))?;
    expose_delivered(view, changed)?;
    let meter = deal_counters(view, island, changed.clone())?;
    if let Some(earlier) = earlier {
        // It was given up: its time was over, or its lease was lost.
        advances.push(&meter, &earlier, Outcome::Withdrawn.name(), 0, &[]);
        if earlier.campaign != order.task {
            tell_task(view, &earlier, meter.title, Outcome::Withdrawn, "another transfer was begun after its time")?;
        }
    }
    if let Some(transfer) = &meter.transfer {
        advances.push(&meter, transfer, transfer.stage.name(), transfer.step, &[]);
    }
    Ok(meter)
}

/// Whether a transfer goes no further because the lease of the task that it began for was lost:
/// nobody has to wait until its time is over.
fn is_lost(view: &mut View<'_, '_>, transfer: &Transfer, meter: SystemTitle) -> Result<bool, ServiceError> {
    transfer.campaign.map_or(Ok(false), |task| holds_task(view, task, meter).map(|held| !held))
}

/// The present step of a transfer that the same request began before.
fn began(
    view: &mut View<'_, '_>,
    permit: &Permit,
    order: &Order,
    request: RequestId,
) -> Result<Arc<Meter>, ServiceError> {
    let meter = own_meter(view, order.meter)?;
    let id = transfer_id(request, order.meter)?;
    match meter.transfer.as_ref().filter(|transfer| transfer.id == id) {
        Some(transfer) => permits_step(view, permit, &meter, transfer).map(|()| meter.clone()),
        // Or it was refused then, and a replay begins nothing new.
        None => Err(ServiceError::Aborted {
            reason: "the transfer that this request began is over, or none was begun".to_owned(),
            next_step: "look at the meter's slots, and begin another with a new request id".to_owned(),
        }),
    }
}

fn proceed_one(
    view: &mut View<'_, '_>,
    island: &Island,
    permit: &Permit,
    report: &Report,
    observation: Option<&read::Read>,
    challenge: [u8; kms_domain::CHALLENGE],
    advances: &mut Advances,
) -> Result<DecidedStep, ServiceError> {
    let mut meter = own_meter(view, report.meter)?;
    let Some(transfer) = meter.transfer.clone().filter(|transfer| transfer.id == report.id) else {
        return Err(refused(&TransferError::NotUnderWay));
    };
    permits_step(view, permit, &meter, &transfer)?;
    if report.step < transfer.step {
        return Ok(DecidedStep::going_on(meter));
    }
    let Some(read) = observation.filter(|_| report.step == transfer.step) else {
        return Err(refused(&TransferError::OtherStep { at: transfer.step }));
    };
    let mut observation = read.observation.clone();
    if let Observation::Attested { .. } = observation {
        let key_type = transfer.keys.last().map_or(KeyType::GUEK, |key| key.key_type);
        permit.require(&Action::AttestKey { key_type }, &Resource::Meters(&meter.class))?;
    }
    if let Some(last_accepted) = read.last_accepted.filter(|_| transfer.follows_counter()) {
        observation = follow_counter(view, island, &mut meter, &transfer, last_accepted)?;
    }
    let changed = Arc::make_mut(&mut meter);
    let Step { next, findings } =
        changed.observe(report.id, report.step, observation, challenge, view.now()).map_err(|error| refused(&error))?;
    alert(view, &meter, &findings);
    match next {
        Next::Send => {
            expose_delivered(view, &meter)?;
            let meter = deal_counters(view, island, (*meter).clone())?;
            if let Some(now) = &meter.transfer {
                let event = if now.unfit > transfer.unfit { ASSOCIATE_AGAIN } else { now.stage.name() };
                advances.push(&meter, now, event, now.step, &findings);
            }
            Ok(DecidedStep::going_on(meter))
        }
        Next::Done(outcome) => {
            view.put_meter((*meter).clone(), false)?;
            advances.push(&meter, &transfer, outcome.name(), 0, &findings);
            tell_task(view, &transfer, meter.title, outcome, "")?;
            Ok(DecidedStep::over(meter, outcome, findings))
        }
    }
}

/// Tells the campaign's task how its transfer ended. `reason` says more than the outcome; empty
/// where there is nothing more.
fn tell_task(
    view: &mut View<'_, '_>,
    transfer: &Transfer,
    meter: SystemTitle,
    outcome: Outcome,
    reason: &str,
) -> Result<(), ServiceError> {
    let Some(task) = transfer.campaign else { return Ok(()) };
    match end_task(view, task, meter, outcome, reason) {
        // I5: the campaign's row was refused, which is on the record. What the meter has shown
        // stays a fact.
        Ok(_) | Err(ServiceError::PermissionDenied { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Reads the tasks of the transfers that these meters are in, too.
fn extend_by_tasks<'a>(reads: &mut Reads, meters: impl Iterator<Item = &'a Arc<Meter>>) {
    for meter in meters {
        if let Some(task) = meter.transfer.as_ref().and_then(|transfer| transfer.campaign) {
            reads.extend(&task_reads(task.campaign, [meter.title]));
        }
    }
}

/// I4: a counter that only an unauthenticated answer names is followed within bounds:
/// [`View::follow_counter`].
fn follow_counter(
    view: &mut View<'_, '_>,
    island: &Island,
    meter: &mut Arc<Meter>,
    transfer: &Transfer,
    last_accepted: u32,
) -> Result<Observation, ServiceError> {
    let Some(pair) = transfer.pair() else { return Ok(Observation::Refusal) };
    let jump_cap = island
        .profiles
        .get(&meter.class.profile)
        .and_then(|profile| profile.setup(transfer.setup))
        .map_or(0, |setup| setup.counter.jump_cap);
    let of = step_counter(island, meter, transfer, pair)?;
    let followed = view.follow_counter(of, u64::from(last_accepted) + 1, jump_cap)?;
    let (kind, detail, observation) = match followed {
        Ok(()) => (
            "counter-followed",
            format!("the meter says that it accepted counter {last_accepted}; the reservation follows"),
            Observation::CounterFollowed,
        ),
        Err(error) => (
            "counter-jump-refused",
            format!("the meter says that it accepted counter {last_accepted}, and it is not believed: {error}"),
            Observation::Refusal,
        ),
    };
    view.append(Event::SecurityEvent(SecurityEvent {
        kind: kind.to_owned(),
        detail,
        meter: meter.title.octets().to_vec().into(),
    }));
    // With the floor, where the meter's own row has it.
    *meter = own_meter(view, meter.title)?;
    Ok(observation)
}

/// Gives the present step its counters, and stores the meter. // I4: the step's octets are made
/// from these only.
///
/// The counters come out of the row as it was, so that the reservation is not lost when the meter
/// is put.
fn deal_counters(view: &mut View<'_, '_>, island: &Island, mut meter: Meter) -> Result<Arc<Meter>, ServiceError> {
    let Some(transfer) = meter.transfer.clone() else { return Err(refused(&TransferError::NotUnderWay)) };
    let wanted = match &transfer.stage {
        Stage::Associate { .. } | Stage::Deliver { pair: Some(_) } => 1,
        Stage::Authenticate { .. } => 2,
        Stage::Deliver { pair: None } => 0,
    };
    let mut counters = Vec::new();
    if let (Some(pair), Some(wanted)) = (transfer.pair(), NonZeroU32::new(wanted)) {
        let of = step_counter(island, &meter, &transfer, pair)?;
        let lease = view.transfer_counters(of, wanted)?;
        counters.extend(lease.first..=lease.last());
        // What was reserved just now is in the row that the view has.
        let fault = |error: &dyn std::fmt::Display| ServiceError::Internal(error.to_string());
        let stored = own_meter(view, meter.title)?;
        let reserved = stored.slots.get(transfer.setup, KeyType::GUEK).and_then(|slot| slot.version(pair.encryption));
        let reserved = reserved.ok_or_else(|| fault(&"a key of the step is gone"))?.counters().clone();
        let version = meter
            .slots
            .get_mut(transfer.setup, KeyType::GUEK)
            .and_then(|slot| slot.version_mut(pair.encryption))
            .map_err(|error| fault(&error))?;
        if let CounterPlace::Own(reserved) = reserved {
            *version.counters_mut().map_err(|error| fault(&error))? = reserved;
        }
    }
    let pinned = (!counters.is_empty()).then(|| emit::pinned(island, &meter)).transpose()?;
    if let Some(transfer) = &mut meter.transfer {
        transfer.counters = counters;
        transfer.pinned = pinned;
    }
    view.put_meter(meter.clone(), false)?;
    Ok(Arc::new(meter))
}

/// The counter that the requests of a step are numbered by.
fn step_counter(island: &Island, meter: &Meter, transfer: &Transfer, pair: KeyPair) -> Result<CounterOf, ServiceError> {
    Ok(CounterOf {
        owner: Owner::Meter(meter.title),
        setup: transfer.setup,
        key_type: KeyType::GUEK,
        version: pair.encryption,
        counter: counter_key(island, meter, transfer.setup, transfer.client_title)?,
        on_new_key: on_new_key(island, meter, transfer.setup),
    })
}

/// The key of a group that leaves under an exposed KEK is exposed to whoever knows that and
/// recorded the traffic, be it by another meter that has the same KEK. Its own row says so; and
/// that the key has to be rotated, where an officer has reported that somebody knows the KEK.
fn expose_delivered(view: &mut View<'_, '_>, meter: &Meter) -> Result<(), ServiceError> {
    let Some(transfer) = meter.transfer.as_ref().filter(|transfer| matches!(transfer.stage, Stage::Deliver { .. }))
    else {
        return Ok(());
    };
    let Some((key, Owner::Group(id))) = transfer.current().map(|key| (key, key.owner)) else { return Ok(()) };
    let keks = meter.slots.get(transfer.setup, KeyType::KEK);
    let Some((keks, kek)) = keks.and_then(|keks| Some((keks, keks.version(key.kek)?))) else { return Ok(()) };
    let mut shared = SharedExposures::new();
    for id in keks.versions().iter().filter_map(KeyVersion::domain) {
        if let Some(domain) = view.domain(id)? {
            shared.insert(id, domain.exposures.clone());
        }
    }
    let exposures = meter.slots.exposures_of(transfer.setup, kek, &shared);
    if exposures.is_empty() {
        return Ok(());
    }
    let Some(mut group) = view.group(id)? else { return Ok(()) };
    let now = view.now();
    let slot = Arc::make_mut(&mut group).slots.get_mut(transfer.setup, key.key_type);
    let version = slot
        .and_then(|slot| slot.version_mut(key.version))
        .map_err(|error| ServiceError::Internal(error.to_string()))?;
    let mut first = false;
    for exposure in exposures.iter() {
        first |= version.expose(exposure.party.clone(), ExposureReason::TransferUnderExposedKek, now);
    }
    if first {
        view.put_group((*group).clone())?;
    }
    for exposure in exposures.iter().filter(|exposure| exposure.reason == ExposureReason::Reported) {
        let delivered =
            meter.shared_of(key.owner, transfer.setup, key.key_type).filter(|shared| shared.version == key.version);
        expose_to_who_knows_a_kek(view, meter, &delivered.copied().collect::<Vec<_>>(), &exposure.party)?;
    }
    Ok(())
}

/// What the record says of a meter that went back to an earlier key.
pub(crate) fn earlier_key_held(key_type: KeyType, version: KeyVersionNumber) -> String {
    format!("the meter holds {key_type} version {version}, which is not the active one: it needs a new key")
}

/// The event of a meter that went back to an earlier key.
pub(crate) const EARLIER_KEY_HELD: &str = "earlier-key-held";

/// What officers have to see.
fn alert(view: &mut View<'_, '_>, meter: &Meter, findings: &[Finding]) {
    for finding in findings {
        let (kind, detail) = match finding {
            Finding::MeterCounterBackwards { version, known, seen } => (
                "meter-counter-backwards",
                format!(
                    "under GUEK version {version} the meter used counter {seen} after {known}, and its key was not changed in between: it may repeat nonces"
                ),
            ),
            Finding::Held { key_type, version, confirmation: Confirmation::NotActive, .. } => {
                (EARLIER_KEY_HELD, earlier_key_held(*key_type, *version))
            }
            _ => continue,
        };
        view.append(Event::SecurityEvent(SecurityEvent {
            kind: kind.to_owned(),
            detail,
            meter: meter.title.octets().to_vec().into(),
        }));
    }
}

fn ordered_keys(
    view: &mut View<'_, '_>,
    island: &Island,
    meter: &Meter,
    setup: SecuritySetupId,
    order: &Order,
    prepared: &Prepared,
) -> Result<OrderedKeys, ServiceError> {
    let changed = || ServiceError::Aborted {
        reason: "the meter has changed meanwhile".to_owned(),
        next_step: "repeat the request".to_owned(),
    };
    match (order.key_type, prepared.keys.as_slice()) {
        (None, _) => Ok(OrderedKeys::Probe),
        (Some(KeyType::KEK), [kek, guek]) => Ok(OrderedKeys::Compound { kek: kek.clone(), guek: guek.clone() }),
        (Some(KeyType::KEK), _) => Err(changed()),
        (Some(key_type), [new]) => Ok(OrderedKeys::Own { key_type, new: new.clone() }),
        (Some(key_type), _) => {
            let owned_by_group = island
                .profiles
                .get(&meter.class.profile)
                .and_then(|profile| profile.key(setup, key_type))
                .is_some_and(|key| key.owner == kms_domain::OwnerKind::Group);
            // A campaign is about one group; another order brings the key of the first group that
            // has one.
            let campaign = order.task.map(|task| view.campaign(task.campaign)).transpose()?.flatten();
            let asked = campaign.and_then(|campaign| campaign.content.selection.group);
            for group in meter
                .class
                .groups
                .iter()
                .copied()
                .filter(|group| owned_by_group && asked.is_none_or(|asked| asked == *group))
            {
                let Some(found) = view.group(group)? else { continue };
                // The version that is being rolled out, else the active one.
                if let Some(version) = found.newest(setup, key_type) {
                    return Ok(OrderedKeys::Shared { owner: Owner::Group(group), key_type, version: version.number() });
                }
            }
            Err(ServiceError::FailedPrecondition {
                reason: format!("the meter has no {key_type} in security setup {setup}"),
                next_step: "look at its slots with `kms meter show`, and at its groups".to_owned(),
            })
        }
    }
}

/// I8: a transfer is permitted for the meter's class and the kind of key; the KEK has an action of
/// its own.
fn permits_order(asker: &Asker, meter: &Meter, order: &Order) -> Result<(), ServiceError> {
    permits(asker, meter, order.key_type, order.form, order.urgent, order.task.is_some())
}

fn permits_transfer(asker: &Asker, meter: &Meter, transfer: &Transfer) -> Result<(), ServiceError> {
    if transfer.head_end != asker.principal().id {
        return Err(denied(meter.title));
    }
    let key_type = transfer.keys.first().map(|key| key.key_type);
    permits(asker, meter, key_type, transfer.form, false, transfer.campaign.is_some())
}

/// [`permits_transfer`], in the transaction: who has lost the lease of a campaign's task goes no
/// further with its transfer.
fn permits_step(
    view: &mut View<'_, '_>,
    permit: &Permit,
    meter: &Meter,
    transfer: &Transfer,
) -> Result<(), ServiceError> {
    permits_transfer(permit.asker(), meter, transfer)?;
    transfer.campaign.map_or(Ok(()), |task| check_task(view, task, meter.title, &permit.principal().id))
}

fn permits(
    asker: &Asker,
    meter: &Meter,
    key_type: Option<KeyType>,
    form: TransferForm,
    urgent: bool,
    campaign: bool,
) -> Result<(), ServiceError> {
    let in_frames = form == TransferForm::Frames;
    let action = match key_type {
        None => Action::ProbeKeys { campaign },
        Some(KeyType::KEK) => Action::TransferMasterKey { in_frames, urgent, campaign },
        Some(key_type) => Action::TransferKey { key_type, in_frames, urgent, campaign },
    };
    let permitted = meter.class.status.may_grant() && asker.permits(&action, &Resource::Meters(&meter.class));
    if permitted { Ok(()) } else { Err(denied(meter.title)) }
}

/// The meter's row, in the transaction.
fn own_meter(view: &mut View<'_, '_>, title: SystemTitle) -> Result<Arc<Meter>, ServiceError> {
    view.meter(title)?.ok_or_else(|| denied(title))
}

/// Counts what was refused of single meters.
fn refuse_all(view: &mut View<'_, '_>, decided: &[Decided]) {
    for (_, step) in decided {
        if let Err(error) = step {
            view.refuse(match error {
                ServiceError::PermissionDenied { .. } => "not permitted for a meter of the request".to_owned(),
                other => other.to_string(),
            });
        }
    }
}

/// The steps of one act, for its record (I2).
#[derive(Default)]
struct Advances {
    advances: Vec<TransferAdvance>,
    reason: String,
}

impl Advances {
    /// Tries the step of one meter. One that fails leaves neither a change nor a word of one.
    fn attempt<T>(
        &mut self,
        view: &mut View<'_, '_>,
        step: impl FnOnce(&mut View<'_, '_>, &mut Self) -> Result<T, ServiceError>,
    ) -> Result<T, ServiceError> {
        let before = self.advances.len();
        let outcome = view.attempt(|view| step(view, self));
        if outcome.is_err() {
            self.advances.truncate(before);
        }
        outcome
    }

    fn push(&mut self, meter: &Meter, transfer: &Transfer, event: &str, step: u32, findings: &[Finding]) {
        let delivered = match transfer.stage {
            Stage::Deliver { .. } if step > 0 => transfer.current().copied(),
            _ => None,
        };
        let held = findings
            .iter()
            .filter_map(|finding| match finding {
                Finding::Held { key_type, version, evidence, confirmation } => Some(HeldVersion {
                    key_type: key_type.to_string(),
                    version: version.number(),
                    evidence: evidence.name().to_owned(),
                    confirmation: match confirmation {
                        Confirmation::Activated => "activated",
                        Confirmation::Active => "active",
                        Confirmation::Compromised => "compromised",
                        Confirmation::NotActive => "not-active",
                    }
                    .to_owned(),
                }),
                Finding::SharedAcknowledged { key_type, version, .. } => Some(HeldVersion {
                    key_type: key_type.to_string(),
                    version: version.number(),
                    evidence: kms_domain::Evidence::Acknowledged.name().to_owned(),
                    confirmation: "active".to_owned(),
                }),
                Finding::MeterCounterBackwards { .. } => None,
            })
            .collect();
        self.advances.push(TransferAdvance {
            meter: u64::from_be_bytes(meter.title.octets()),
            transfer_id: transfer.id.octets().to_vec().into(),
            step,
            event: event.to_owned(),
            security_setup: setup_record(transfer.setup),
            key_type: delivered.map(|key| key.key_type.to_string()).unwrap_or_default(),
            key_version: delivered.map_or(0, |key| key.version.number()),
            kek_version: delivered.map_or(0, |key| key.kek.number()),
            invocation_counters: if step > 0 { transfer.counters.clone() } else { Vec::new() },
            guek_version: transfer.pair().map_or(0, |pair| pair.encryption.number()),
            client_title: transfer.client_title.octets().to_vec().into(),
            held,
            answer: match transfer.answer {
                kms_domain::Answer::Silence => "silence",
                kms_domain::Answer::Accepted => "accepted",
                kms_domain::Answer::Refused(_) => "refused",
                kms_domain::Answer::Exception => "exception",
            }
            .to_owned(),
            campaign_id: transfer.campaign.map(|task| task.campaign.octets().to_vec().into()).unwrap_or_default(),
        });
    }

    fn record(self, view: &mut View<'_, '_>) {
        if !self.advances.is_empty() {
            view.append(Event::TransfersAdvanced(TransfersAdvanced { advances: self.advances, reason: self.reason }));
        }
    }
}

/// The id of the transfer that a request begins for a meter: the same each time it is asked.
fn transfer_id(request: RequestId, meter: SystemTitle) -> Result<TransferId, ServiceError> {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"meterkms/transfer");
    context.update(&request.octets());
    context.update(&meter.octets());
    let digest = context.finish();
    TransferId::from_octets(digest.as_ref().get(..16).unwrap_or_default())
        .map_err(|error| ServiceError::Internal(error.to_string()))
}

fn setup_of(meter: &Meter, setup: Option<SecuritySetupId>) -> Result<SecuritySetupId, ServiceError> {
    setup.or_else(|| meter.slots.iter().next().map(kms_domain::Slot::setup)).ok_or_else(|| {
        ServiceError::FailedPrecondition {
            reason: "the meter has no keys".to_owned(),
            next_step: "import its shipment".to_owned(),
        }
    })
}

fn group_row(group: GroupId) -> (kms_store::RowKind, Vec<u8>) {
    (kms_store::RowKind::Group, group.0.to_be_bytes().to_vec())
}

fn refused(error: &TransferError) -> ServiceError {
    let next_step = match error {
        TransferError::SlotFull { wait, .. } => {
            return ServiceError::ResourceExhausted { reason: error.to_string(), retry_after: *wait };
        }
        TransferError::UnderWay { .. } => "let it end, or have it withdrawn",
        TransferError::NotUnderWay | TransferError::OtherStep { .. } => {
            "look at the meter; report the present step only"
        }
        TransferError::InDoubt { .. } => {
            "probe the meter first; or, where a policy permits it, order an urgent transfer, which adds a candidate"
        }
        TransferError::TooManyCandidates { key_type: KeyType::KEK, .. } => {
            "rotate the GUEK until a transfer is proven, which shows the KEK that it left under; then order the KEK"
        }
        TransferError::TooManyCandidates { .. } => {
            "probe the meter: when it has shown what it holds, another version can be brought"
        }
        TransferError::KekAlone => "order the KEK: its GUEK comes with it",
        TransferError::NotShared { .. } => "order a new version of the meter's own key",
        TransferError::SequenceUsedUp => "replace the meter: a new system title has a sequence of its own",
        TransferError::NoKek { .. } | TransferError::NoKeys { .. } => "import or enrol the meter's keys",
        TransferError::Status { .. } => "an officer decides about its status",
        TransferError::Slot(_) => "look at the meter's slots with `kms meter show`",
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}

/// The same answer for a meter that does not exist and one that the caller may not use.
fn denied(meter: SystemTitle) -> ServiceError {
    ServiceError::denied(format!("transferKey with meter {meter}"))
}

const KEYS_AT_ONCE: usize = 16;
/// In records: the step before brought a challenge that could be a request. The counters of its
/// association are spent (I4).
const ASSOCIATE_AGAIN: &str = "associate-again";
