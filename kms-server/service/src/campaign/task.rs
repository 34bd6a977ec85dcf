//! The task that a transfer belongs to: begun, checked and ended inside the acts of the transfer.

use kms_domain::{
    CampaignId, CampaignState, CampaignTask, Outcome, PrincipalId, SecuritySetupId, SystemTitle, TaskEnd, TaskError,
    TaskState, TaskWork,
};
use kms_proto::v1;
use kms_store::{Reads, TaskKey, TaskRow};

use kms_base::error::ServiceError;
use kms_ledger::View;

/// Begins a task with its transfer or probe. This principal must hold its lease with this fencing
/// token, the campaign must run with an open window, and the task must ask for this work. The act
/// that begins the transfer calls this inside [`View::attempt`], so that neither begins without the
/// other.
///
/// # Errors
/// Permission denied: there is no such task of this principal. Failed precondition: the lease is
/// lost, the campaign does not run, the task asks for other work, or the meter's row shows that it
/// is done. Or a row was not read yet.
pub fn begin_task(
    view: &mut View<'_, '_>,
    task: CampaignTask,
    meter: SystemTitle,
    principal: &PrincipalId,
    setup: SecuritySetupId,
    work: TaskWork,
) -> Result<(), ServiceError> {
    let CampaignTask { campaign, fence } = task;
    let clock = view.clock()?;
    let mut row = own_task(view, task, meter, principal)?;
    let running = view.campaign(campaign)?.ok_or_else(|| denied(campaign, meter))?;
    if !running.is_open_at(clock) {
        let reason = if running.state == CampaignState::Running {
            "its maintenance window is closed".to_owned()
        } else {
            format!("it is {}", running.state)
        };
        return Err(ServiceError::FailedPrecondition {
            reason: format!("campaign {campaign} does not begin work now: {reason}"),
            next_step: "give the lease back".to_owned(),
        });
    }
    // I5: the task's row may be an older one. Work that was approved once is done once.
    if work != TaskWork::Probe && view.meter(meter)?.is_some_and(|meter| row.task.is_reached(&meter)) {
        return Err(ServiceError::FailedPrecondition {
            reason: format!(
                "the task of campaign {campaign} is done: meter {meter} has a later version than the one to replace"
            ),
            next_step: "begin a probe for the task, which ends it, or give the lease back".to_owned(),
        });
    }
    row.task.begin(fence, setup, work, clock).map_err(task_error)?;
    view.put_task(row);
    Ok(())
}

/// Whether this principal still holds the task lease that a transfer began under. Acts that take a
/// report or repeat a step call this.
///
/// # Errors
/// Permission denied: there is no such task of this principal. Failed precondition: the lease is
/// not held any more. Or a row was not read yet.
pub fn check_task(
    view: &mut View<'_, '_>,
    task: CampaignTask,
    meter: SystemTitle,
    principal: &PrincipalId,
) -> Result<(), ServiceError> {
    let clock = view.clock()?;
    let row = own_task(view, task, meter, principal)?;
    row.task.check(task.fence, clock).map_err(task_error)
}

/// Whether anybody still holds the task lease that a transfer began under.
///
/// # Errors
/// A row was not read yet.
pub fn holds_task(view: &mut View<'_, '_>, task: CampaignTask, meter: SystemTitle) -> Result<bool, ServiceError> {
    let clock = view.clock()?;
    Ok(view
        .task(TaskKey { campaign: task.campaign, meter })?
        .is_some_and(|row| row.task.check(task.fence, clock).is_ok()))
}

/// Ends a task with the outcome of its transfer or probe. The act that ends the transfer calls this
/// after it has put the meter. `reason` adds to the outcome in reports; it may be empty. If the
/// lease was lost meanwhile, nothing changes: another head-end works on the task.
///
/// # Errors
/// A row was not read yet, or was refused.
pub fn end_task(
    view: &mut View<'_, '_>,
    task: CampaignTask,
    meter: SystemTitle,
    outcome: Outcome,
    reason: &str,
) -> Result<TaskEnd, ServiceError> {
    let clock = view.clock()?;
    let Some(known) = view.campaign(task.campaign)? else { return Ok(TaskEnd::Unchanged) };
    let Some(mut row) = task_under_way(view, task, meter)? else { return Ok(TaskEnd::Unchanged) };
    let Some(meter) = view.meter(meter)? else { return Ok(TaskEnd::Unchanged) };
    let end = row.task.end(&known, outcome, reason, &meter, clock);
    if end != TaskEnd::Unchanged {
        view.put_task(row);
    }
    Ok(end)
}

/// Skips the task of a transfer that ends because its meter goes out of service, in the act that
/// ends it. If a key has left, it stays in doubt.
///
/// # Errors
/// A row was not read yet.
pub fn drop_task(
    view: &mut View<'_, '_>,
    task: CampaignTask,
    meter: SystemTitle,
    reason: &str,
) -> Result<(), ServiceError> {
    let clock = view.clock()?;
    if let Some(mut row) = task_under_way(view, task, meter)? {
        row.task.skip(reason, clock);
        view.put_task(row);
    }
    Ok(())
}

/// Passes a task on to the head-end that its meter is assigned to, in the act that assigns it.
/// Without a head-end the task is skipped.
///
/// # Errors
/// A row was not read yet.
pub fn pass_on_task(
    view: &mut View<'_, '_>,
    campaign: CampaignId,
    meter: SystemTitle,
    head_end: Option<&PrincipalId>,
) -> Result<(), ServiceError> {
    let clock = view.clock()?;
    let assigned = head_end.map(ToString::to_string);
    if let Some(mut row) =
        view.task(TaskKey { campaign, meter })?.filter(|row| !row.task.state.is_final() && row.head_end != assigned)
    {
        row.head_end = assigned;
        if head_end.is_some() {
            row.task.pass_on(clock);
        } else {
            row.task.skip("no head-end", clock);
        }
        view.put_task(row);
    }
    Ok(())
}

/// The rows that [`begin_task`], [`check_task`] and [`end_task`] read, so that a transaction reads
/// them at once.
pub fn task_reads(campaign: CampaignId, meters: impl IntoIterator<Item = SystemTitle>) -> Reads {
    let tasks = meters.into_iter().map(|meter| TaskKey { campaign, meter }).collect();
    Reads { campaigns: vec![campaign], tasks, clock: true, ..Reads::default() }
}

/// The task, if it is this principal's.
fn own_task(
    view: &mut View<'_, '_>,
    task: CampaignTask,
    meter: SystemTitle,
    principal: &PrincipalId,
) -> Result<TaskRow, ServiceError> {
    let row = view.task(TaskKey { campaign: task.campaign, meter })?;
    row.filter(|row| row.head_end.as_deref() == Some(principal.to_string().as_str()))
        .ok_or_else(|| denied(task.campaign, meter))
}

/// The task, if it waits for the transfer that began under this lease.
fn task_under_way(
    view: &mut View<'_, '_>,
    task: CampaignTask,
    meter: SystemTitle,
) -> Result<Option<TaskRow>, ServiceError> {
    let row = view.task(TaskKey { campaign: task.campaign, meter })?;
    Ok(row.filter(|row| row.task.state == TaskState::UnderWay && row.task.fence == task.fence))
}

fn denied(campaign: CampaignId, meter: SystemTitle) -> ServiceError {
    ServiceError::denied(format!("a task of campaign {campaign} with meter {meter}"))
}

pub(super) fn task_error(error: TaskError) -> ServiceError {
    let next_step = match error {
        TaskError::NotHeld => "stop working on this meter, and lease tasks again",
        TaskError::OtherWork { .. } => "order the work that the task asks for",
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}

/// A task as a message.
pub(super) fn message(row: &TaskRow) -> v1::Task {
    let task = &row.task;
    let leased = matches!(task.state, TaskState::Leased | TaskState::UnderWay);
    let (work, key_type) = match task.work() {
        TaskWork::Probe => (v1::CampaignAction::Probe, String::new()),
        TaskWork::Rotate(key_type) => (v1::CampaignAction::Rotate, key_type.to_string()),
    };
    v1::Task {
        campaign_id: row.key.campaign.octets().to_vec().into(),
        meter: row.key.meter.octets().to_vec().into(),
        work: work.into(),
        key_type,
        security_setup: task.step.setup.obis().to_vec().into(),
        fence: task.fence,
        lease_expires_ms: if leased { task.due.0 } else { 0 },
        attempts: task.attempts,
        wave: row.wave,
        state: task.state.name().to_owned(),
        reason: task.reason.clone(),
        manufacturer: row.vendor.clone(),
        head_end: row.head_end.clone().unwrap_or_default(),
        ended_ms: task.ended.0,
    }
}
