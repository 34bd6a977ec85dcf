//! Continues transfers: the HSM opens the reported answers, then the next steps are decided.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{
    CHALLENGE, Confirmation, Finding, KeyType, KeyVersionNumber, Meter, Next, Observation, Step, TransferError,
};
use kms_proto::v1::{SecurityEvent, audit_record::Event};
use kms_store::Reads;

use super::{
    TransferService,
    counters::{allocate_counters, follow_counter},
    error::refused,
    exposure::expose_delivered,
    permit::{permits_step, permits_transfer},
    read::ReadReport,
    record::{Advances, refuse_all},
    rows::{extend_by_tasks, group_row, own_meter},
    step::{Decided, DecidedStep, Report, StepAnswer},
    task::tell_task,
};
use crate::island::IslandContext;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, AuditLeaf, Decision, Never, Permit, View};

impl TransferService {
    /// Takes the answers of meters, and continues their transfers. A report for an earlier step
    /// changes nothing and gets the present step.
    ///
    /// # Errors
    /// Errors that concern all meters: the caller, the HSM or the database.
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
}

/// Reported answers of meters, and the next steps of their transfers.
struct Proceed {
    island: Arc<IslandContext>,
    reports: Vec<Report>,
    observations: Vec<Option<ReadReport>>,
    challenges: Vec<[u8; CHALLENGE]>,
    reads: Reads,
}

impl Act for Proceed {
    type Answer = Vec<Decided>;
    // Steps are numbered: a repeated report gets the present step.
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

fn proceed_one(
    view: &mut View<'_, '_>,
    island: &IslandContext,
    permit: &Permit,
    report: &Report,
    observation: Option<&ReadReport>,
    challenge: [u8; CHALLENGE],
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
            let meter = allocate_counters(view, island, (*meter).clone())?;
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

/// The detail of the security event [`EARLIER_KEY_HELD`].
pub(crate) fn earlier_key_held(key_type: KeyType, version: KeyVersionNumber) -> String {
    format!("the meter holds {key_type} version {version}, which is not the active one: rotate the key")
}

/// The kind of the security event for a meter that uses an earlier key again.
pub(crate) const EARLIER_KEY_HELD: &str = "earlier-key-held";

/// Records what officers must see as security events.
fn alert(view: &mut View<'_, '_>, meter: &Meter, findings: &[Finding]) {
    for finding in findings {
        let (kind, detail) = match finding {
            Finding::MeterCounterBackwards { version, known, seen } => (
                "meter-counter-backwards",
                format!(
                    "under GUEK version {version} the meter used counter {seen} after {known} without a key change in between: it may repeat nonces"
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

/// The event in records when the meter's challenge could be a request. The transfer associates
/// again; the counters of the first association are used up (I4).
const ASSOCIATE_AGAIN: &str = "associate-again";
