//! Assigns, retires and replaces meters.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{ExposureReason, Meter, MeterStatus, PrincipalId, PrincipalStatus, Role, SlotError, SystemTitle};
use kms_proto::v1::{self, MetersChanged, audit_record::Event};
use kms_store::Reads;

use super::{CHUNK, ChunkOutcome, Code, Filter, MeterService, NOT_PERMITTED, Request, Selection};
use crate::{
    campaign::{drop_task, pass_on_task, task_reads, unfinished},
    keys::exposure::expose_to_former_member,
};
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::principal_row;
use kms_ledger::{Decision, Entry, Permit, View};

/// Which meters are assigned to which head-end.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// Which meters.
    pub selection: Selection,
    /// The head-end; `None` unassigns the meters.
    pub head_end: Option<PrincipalId>,
    /// Count only, and change nothing.
    pub dry_run: bool,
}

impl MeterService {
    /// Assigns meters to a head-end, or unassigns them. A meter in stock goes into service when it
    /// is assigned: policy lets a head-end talk to its own meters in service. A meter that is
    /// unassigned stays in service, and nobody gets its keys. Grants of the former head-end cannot
    /// be repeated any more. It may use the keys that it holds until the grant's end, so revoke the
    /// grants if that matters.
    ///
    /// # Errors
    /// Unknown caller or head-end, a request id that was used for another request, or the database
    /// cannot be reached. Errors of single meters are in the answer.
    #[boxed]
    pub async fn assign(
        &self,
        caller: &Caller,
        request: Request,
        assignment: Assignment,
    ) -> Result<v1::ChangeMetersResponse, ServiceError> {
        if let Some(head_end) = &assignment.head_end
            && (head_end.role() != Role::HeadEnd || head_end.island() != self.island.name())
        {
            return Err(ServiceError::invalid("head_end", format!("`{head_end}` is no head-end of this island")));
        }
        if assignment.dry_run {
            return self.count(caller, assignment).await;
        }
        let mut response = v1::ChangeMetersResponse::default();
        let mut after = None;
        for index in 0.. {
            let (titles, more) = self.titles(&assignment.selection, index, after).await?;
            let outcome = self.assign_chunk(caller, request, index, titles, more, &assignment).await?;
            let (last, done) = (outcome.last, outcome.done);
            outcome.add_to(&mut response);
            if done {
                break;
            }
            // In a replay, the chunk ends where it ended before.
            after = SystemTitle::from_octets(&last.to_be_bytes()).ok();
        }
        Ok(response)
    }

    /// The meters of a chunk, and whether there may be more.
    async fn titles(
        &self,
        selection: &Selection,
        index: u32,
        after: Option<SystemTitle>,
    ) -> Result<(Vec<SystemTitle>, bool), ServiceError> {
        match selection {
            Selection::Meters(meters) => {
                let mut chunks = meters.chunks(CHUNK).skip(usize::try_from(index).unwrap_or(usize::MAX));
                Ok((chunks.next().unwrap_or_default().to_vec(), chunks.next().is_some()))
            }
            Selection::Filter(filter) => {
                let rows = self
                    .island
                    .store
                    .meter_page(&filter.columns(), after, u32::try_from(CHUNK).unwrap_or(u32::MAX))
                    .await?;
                let full = rows.len() == CHUNK;
                Ok((rows.into_iter().map(|row| row.title).collect(), full))
            }
        }
    }

    async fn assign_chunk(
        &self,
        caller: &Caller,
        request: Request,
        index: u32,
        titles: Vec<SystemTitle>,
        more: bool,
        assignment: &Assignment,
    ) -> Result<ChunkOutcome, ServiceError> {
        let mut reads = Reads {
            meters: titles.clone(),
            sealed: assignment.head_end.as_ref().map(principal_row).into_iter().collect(),
            ..Reads::default()
        };
        let campaigns = unfinished(&self.island).await?;
        for campaign in &campaigns {
            reads.extend(&task_reads(*campaign, titles.iter().copied()));
        }
        let head_end = assignment.head_end.clone();
        let filter = match &assignment.selection {
            Selection::Filter(filter) => filter.clone(),
            Selection::Meters(_) => Filter::default(),
        };
        self.change_chunk(caller, Action::AssignMeters, request, index, reads, move |view, permit| {
            if let Some(head_end) = &head_end
                && view.principal(head_end)?.is_none_or(|known| known.status != PrincipalStatus::Enabled)
            {
                return Err(ServiceError::invalid(
                    "head_end",
                    format!("`{head_end}` is no enabled head-end of this island"),
                ));
            }
            let mut outcome = ChunkOutcome {
                last: titles.last().map_or(0, |title| u64::from_be_bytes(title.octets())),
                done: !more,
                ..ChunkOutcome::default()
            };
            let mut changed = Vec::new();
            for title in &titles {
                let Some(meter) = permitted(view, permit, &Action::AssignMeters, *title, &mut outcome) else {
                    continue;
                };
                if !filter.matches(&meter) {
                    outcome.problem(
                        *title,
                        Code::RowRefused,
                        "its sealed row is not what the filter found (I5); run `kms audit scrub`",
                    );
                    continue;
                }
                match assigned(&meter, head_end.as_ref()) {
                    Ok(None) => outcome.unchanged += 1,
                    Ok(Some(meter)) => {
                        changed.push(*title);
                        view.put_meter(meter, true)?;
                        for campaign in &campaigns {
                            pass_on_task(view, *campaign, *title, head_end.as_ref())?;
                        }
                    }
                    Err(reason) => outcome.problem(*title, Code::Status, reason),
                }
            }
            let value = head_end.as_ref().map(ToString::to_string).unwrap_or_default();
            let entry = record(view, &mut outcome, "assigned", &changed, value, String::new());
            Ok(Decision::of(entry, outcome))
        })
        .await
    }

    /// The outcome that an assignment would have.
    async fn count(&self, caller: &Caller, assignment: Assignment) -> Result<v1::ChangeMetersResponse, ServiceError> {
        let asker = self.island.asker(caller).await?;
        let mut response = v1::ChangeMetersResponse::default();
        let mut after = None;
        for index in 0.. {
            let (titles, more) = self.titles(&assignment.selection, index, after).await?;
            let mut outcome = ChunkOutcome::default();
            let rows = self.island.store.meters(&titles).await?;
            for title in &titles {
                let row = rows.iter().find(|row| row.title == *title);
                let meter = row.and_then(|row| self.island.committer.open_meter(*title, &row.row).ok());
                let meter = meter.filter(|meter| asker.permits(&Action::AssignMeters, &Resource::Meters(&meter.class)));
                match meter.as_deref().map(|meter| assigned(meter, assignment.head_end.as_ref())) {
                    None => {
                        // No act follows that would count the refusal.
                        self.island.committer.refused(
                            Some(&caller.principal),
                            Action::AssignMeters.name(),
                            "not permitted for a meter of the request".to_owned(),
                        );
                        outcome.problem(*title, Code::NotPermitted, NOT_PERMITTED);
                    }
                    Some(Ok(None)) => outcome.unchanged += 1,
                    Some(Ok(Some(_))) => outcome.changed += 1,
                    Some(Err(reason)) => outcome.problem(*title, Code::Status, reason),
                }
            }
            outcome.add_to(&mut response);
            after = titles.last().copied();
            if !more {
                break;
            }
        }
        Ok(response)
    }

    /// Retires meters: ends their identity. From then on there is no session, no frame and no
    /// repeated grant, and the active key versions are deactivated. Earlier grants stay valid until
    /// their end. Wrapped keys stay in the rows. They are candidates (I3) until the retention time
    /// has passed; then [`crate::retention`] destroys them.
    ///
    /// # Errors
    /// Unknown caller, a request id that was used for another request, or the database cannot be
    /// reached.
    #[boxed]
    pub async fn retire(
        &self,
        caller: &Caller,
        request: Request,
        meters: Vec<SystemTitle>,
        reason: String,
    ) -> Result<v1::ChangeMetersResponse, ServiceError> {
        let mut response = v1::ChangeMetersResponse::default();
        for (index, titles) in (0..).zip(meters.chunks(CHUNK).map(<[SystemTitle]>::to_vec)) {
            let reason = reason.clone();
            let reads = Reads { meters: titles.clone(), ..Reads::default() };
            let outcome = self
                .change_chunk(caller, Action::RetireMeters, request, index, reads, move |view, permit| {
                    let mut outcome = ChunkOutcome::default();
                    let mut changed = Vec::new();
                    for title in &titles {
                        let Some(mut meter) = permitted(view, permit, &Action::RetireMeters, *title, &mut outcome)
                        else {
                            continue;
                        };
                        if meter.class.status == MeterStatus::Retired {
                            outcome.unchanged += 1;
                            continue;
                        }
                        retire(view, &mut meter)?;
                        changed.push(*title);
                    }
                    let entry = record(view, &mut outcome, "retired", &changed, String::new(), reason.clone());
                    Ok(Decision::of(entry, outcome))
                })
                .await?;
            outcome.add_to(&mut response);
        }
        Ok(response)
    }

    /// Retires a meter, and assigns the head-end of the old meter to a registered new meter at the
    /// same place. The new meter does not get keys, counters or groups of the old one.
    ///
    /// # Errors
    /// Not permitted; the new meter is unknown, retired, or another head-end's; or the database
    /// cannot be reached.
    #[boxed]
    pub async fn replace(
        &self,
        caller: &Caller,
        request: Request,
        old: SystemTitle,
        new: SystemTitle,
        reason: String,
    ) -> Result<v1::ChangeMetersResponse, ServiceError> {
        if old == new {
            return Err(ServiceError::invalid(
                "new_meter",
                "it is the old meter; a refurbished meter needs a new system title",
            ));
        }
        let reads = Reads { meters: vec![old, new], ..Reads::default() };
        let outcome = self
            .change_chunk(caller, Action::ReplaceMeter, request, 0, reads, move |view, permit| {
                let mut outcome = ChunkOutcome::default();
                let action = Action::ReplaceMeter;
                let refused = |title| ServiceError::denied(format!("replaceMeter with meter {title}"));
                // The act is refused as a whole, so the door counts the refusal.
                let find = |view: &mut View<'_, '_>, title| {
                    let meter = view
                        .meter(title)
                        .ok()
                        .flatten()
                        .filter(|meter| permit.permits(&action, &Resource::Meters(&meter.class)));
                    meter.ok_or_else(|| refused(title))
                };
                let mut former = find(view, old)?;
                let mut successor = find(view, new)?;
                let precondition = |reason: String| ServiceError::FailedPrecondition {
                    reason,
                    next_step: "check both meters with `kms meter show`".to_owned(),
                };
                if former.class.status == MeterStatus::Retired {
                    return Err(precondition(format!("{old} is retired already")));
                }
                if !matches!(successor.class.status, MeterStatus::InStock | MeterStatus::InService) {
                    return Err(precondition(format!("{new} is {}", successor.class.status)));
                }
                if successor.class.head_end.is_some() && successor.class.head_end != former.class.head_end {
                    return Err(precondition(format!("{new} is assigned to another head-end")));
                }
                let changed = Arc::make_mut(&mut successor);
                changed.class.head_end.clone_from(&former.class.head_end);
                changed.set_status(former.class.status).map_err(ServiceError::parse("new_meter"))?;
                retire(view, &mut former)?;
                view.put_meter((*successor).clone(), true)?;
                let entry = record(view, &mut outcome, "replaced", &[old, new], new.to_string(), reason.clone());
                Ok(Decision::of(entry, outcome))
            })
            .await?;
        let mut response = v1::ChangeMetersResponse::default();
        outcome.add_to(&mut response);
        Ok(response)
    }
}

/// The meter, if policy lets the principal change it. If not, a problem is added, the same as for
/// an unknown meter.
pub(super) fn permitted(
    view: &mut View<'_, '_>,
    permit: &Permit,
    action: &Action,
    title: SystemTitle,
    outcome: &mut ChunkOutcome,
) -> Option<Arc<Meter>> {
    // An error means that the row does not verify and counts as absent (I5), or that it is read for
    // the next attempt.
    let meter =
        view.meter(title).ok().flatten().filter(|meter| permit.permits(action, &Resource::Meters(&meter.class)));
    if meter.is_none() {
        view.refuse("not permitted for a meter of the request".to_owned());
        outcome.problem(title, Code::NotPermitted, NOT_PERMITTED);
    }
    meter
}

/// The meter with the assignment; `None` if it has it already.
fn assigned(meter: &Meter, head_end: Option<&PrincipalId>) -> Result<Option<Meter>, String> {
    if meter.class.status == MeterStatus::Retired {
        return Err("it is retired".to_owned());
    }
    let goes_into_service = head_end.is_some() && meter.class.status == MeterStatus::InStock;
    if meter.class.head_end.as_ref() == head_end && !goes_into_service {
        return Ok(None);
    }
    let mut changed = meter.clone();
    changed.class.head_end = head_end.cloned();
    if goes_into_service {
        changed.class.status = MeterStatus::InService;
    }
    Ok(Some(changed))
}

/// Retires a meter, and skips the campaign's task of a transfer that ends with it.
fn retire(view: &mut View<'_, '_>, meter: &mut Arc<Meter>) -> Result<(), ServiceError> {
    let task = meter.transfer.as_ref().and_then(|transfer| transfer.campaign);
    let now = view.now();
    Arc::make_mut(meter).retire(now).map_err(fault)?;
    view.put_meter((**meter).clone(), true)?;
    expose_to_former_member(view, meter, &meter.class.groups, ExposureReason::MemberRetired)?;
    task.map_or(Ok(()), |task| drop_task(view, task, meter.title, MeterStatus::Retired.name()))
}

/// A verified row breaks a rule of slots: a fault of this program.
fn fault(error: SlotError) -> ServiceError {
    ServiceError::Internal(error.to_string())
}

/// The record of a change, if there was one (I2).
pub(super) fn record(
    view: &mut View<'_, '_>,
    outcome: &mut ChunkOutcome,
    change: &str,
    meters: &[SystemTitle],
    value: String,
    reason: String,
) -> Option<Entry> {
    if meters.is_empty() {
        return None;
    }
    outcome.changed += meters.len() as u64;
    let meters = meters.iter().map(|title| title.octets().to_vec().into()).collect();
    Some(view.append(Event::MetersChanged(MetersChanged { change: change.to_owned(), meters, value, reason })))
}
