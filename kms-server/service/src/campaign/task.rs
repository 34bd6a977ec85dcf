//! Tasks in the hands of head-ends: leased, renewed, given back; and what a transfer tells of them.

use async_recursion::async_recursion as boxed;
use std::{collections::BTreeSet, sync::Arc};

use kms_domain::{
    CampaignId, CampaignState, CampaignTask, MeterStatus, Outcome, PrincipalId, SecuritySetupId, SystemTitle, TaskEnd,
    TaskError, TaskState, TaskWork, UnixMillis,
};
use kms_proto::v1::{self, TasksChanged, audit_record::Event};
use kms_store::{Reads, TaskKey, TaskRow};

use super::CampaignService;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Entry, Never, Permit, View};

/// What a head-end asks for.
#[derive(Clone, Copy, Debug)]
pub struct LeaseQuery {
    /// Of this campaign; `None`: of any that runs.
    pub campaign: Option<CampaignId>,
    /// The most tasks to hold at once.
    pub most: u32,
    /// How long a lease is.
    pub lease_ms: i64,
}

/// A lease that a head-end holds, or thinks it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskLease {
    /// The campaign.
    pub campaign: CampaignId,
    /// The meter.
    pub meter: SystemTitle,
    /// The fencing token.
    pub fence: u64,
}

impl TaskLease {
    const fn key(&self) -> TaskKey {
        TaskKey { campaign: self.campaign, meter: self.meter }
    }
}

impl CampaignService {
    /// Leases tasks for the caller's own meters, as many as the terms of the campaigns and `most`
    /// leave room for.
    ///
    /// # Errors
    /// The caller is nobody, or the database is away. What is not permitted for a meter is not
    /// offered.
    #[boxed]
    pub async fn lease(&self, caller: &Caller, query: LeaseQuery) -> Result<Vec<v1::Task>, ServiceError> {
        self.island.principal(caller).await?;
        let mut leased = Vec::new();
        let head_end = caller.principal.to_string();
        let campaigns = match query.campaign {
            Some(id) => self.load(id).await.ok().into_iter().collect(),
            None => self.load_all().await?,
        };
        let now = self.island.store.now().await?;
        let mut held = 0;
        for campaign in campaigns.iter().filter(|campaign| campaign.state == CampaignState::Running) {
            let load = self.island.store.task_load(campaign.id, &head_end).await?;
            held += load.in_flight;
            if !campaign.is_open_at(now) {
                continue;
            }
            let terms = &campaign.content.terms;
            let room = [
                u64::from(query.most).saturating_sub(held),
                u64::from(terms.in_flight.get()).saturating_sub(load.in_flight),
                terms
                    .starts_per_minute
                    .map_or(u64::MAX, |rate| u64::from(rate.get()).saturating_sub(load.leased_in_minute)),
            ];
            let room = u32::try_from(room.into_iter().min().unwrap_or_default()).unwrap_or(u32::MAX).min(MOST_LEASED);
            if room == 0 {
                continue;
            }
            let due = self.island.store.due_tasks(campaign.id, &head_end, room).await?;
            if due.is_empty() {
                continue;
            }
            let tasks = self.lease_these(caller, campaign.id, due, query.lease_ms).await?;
            held += tasks.len() as u64;
            leased.extend(tasks.iter().map(message));
        }
        Ok(leased)
    }

    async fn lease_these(
        &self,
        caller: &Caller,
        id: CampaignId,
        due: Vec<SystemTitle>,
        lease_ms: i64,
    ) -> Result<Vec<TaskRow>, ServiceError> {
        Ok(self.island.door.act(caller, None, Lease { campaign: id, due, lease_ms }).await?.value)
    }

    /// Renews leases. Until when, and those that are not held any more.
    ///
    /// # Errors
    /// The caller is nobody, or the database is away.
    #[boxed]
    pub async fn heartbeat(
        &self,
        caller: &Caller,
        leases: Vec<TaskLease>,
        lease_ms: i64,
    ) -> Result<(UnixMillis, Vec<TaskLease>), ServiceError> {
        let until = Arc::new(std::sync::Mutex::new(UnixMillis(0)));
        let told = until.clone();
        let lost = self
            .with_leases(caller, leases, move |view, row, lease, campaign| {
                let clock = view.clock()?;
                if let Ok(mut until) = told.lock() {
                    *until = clock.after(lease_ms);
                }
                // An aborted campaign lets what has begun come to its end.
                if campaign.state == CampaignState::Aborted && row.task.state != TaskState::UnderWay {
                    return Ok(Still::Lost);
                }
                let renewed = row.task.renew(lease.fence, lease_ms, clock);
                Ok(renewed.map_or(Still::Lost, |()| Still::Held(None)))
            })
            .await?;
        let until = until.lock().map_or(UnixMillis(0), |until| *until);
        Ok((until, lost))
    }

    /// Gives leases back: with a reason it counts as an attempt. Those that are not held any more.
    ///
    /// # Errors
    /// The caller is nobody, or the database is away.
    #[boxed]
    pub async fn release(
        &self,
        caller: &Caller,
        leases: Vec<TaskLease>,
        reason: String,
    ) -> Result<Vec<TaskLease>, ServiceError> {
        self.with_leases(caller, leases, move |view, row, lease, campaign| {
            let clock = view.clock()?;
            if row.task.release(campaign, lease.fence, &reason, clock).is_err() {
                return Ok(Still::Lost);
            }
            let entry = view.append(Event::TasksChanged(TasksChanged {
                campaign_id: lease.campaign.octets().to_vec().into(),
                change: "released".to_owned(),
                meters: vec![u64::from_be_bytes(lease.meter.octets())],
                reason: reason.clone(),
            }));
            Ok(Still::Held(Some(entry)))
        })
        .await
    }

    /// Changes tasks whose leases the caller holds; `change` says whether it is held. Those that
    /// are not.
    async fn with_leases<F>(
        &self,
        caller: &Caller,
        leases: Vec<TaskLease>,
        change: F,
    ) -> Result<Vec<TaskLease>, ServiceError>
    where
        F: Fn(&mut View<'_, '_>, &mut TaskRow, &TaskLease, &kms_domain::Campaign) -> Result<Still, ServiceError>
            + Send
            + Sync
            + 'static,
    {
        Ok(self.island.door.act(caller, None, Held { leases, change }).await?.value)
    }
}

/// Leases of tasks that are due.
struct Lease {
    campaign: CampaignId,
    due: Vec<SystemTitle>,
    lease_ms: i64,
}

impl Act for Lease {
    type Answer = Vec<TaskRow>;
    // Whoever lost the answer asks for more, and the tasks come back when their leases end.
    type Past = Never;

    fn name(&self) -> &'static str {
        Action::LeaseTasks.name()
    }

    fn reads(&self) -> Reads {
        Reads {
            meters: self.due.clone(),
            campaigns: vec![self.campaign],
            tasks: self.due.iter().map(|meter| TaskKey { campaign: self.campaign, meter: *meter }).collect(),
            clock: true,
            ..Reads::default()
        }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.each())
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Vec<TaskRow>>, ServiceError> {
        let (id, clock) = (self.campaign, view.clock()?);
        let Some(campaign) = view.campaign(id)?.filter(|campaign| campaign.is_open_at(clock)) else {
            return Ok(Decision::unchanged(Vec::new()));
        };
        let caller = &permit.principal().id;
        let mut leased = Vec::new();
        let mut passed_on = false;
        for meter in &self.due {
            let key = TaskKey { campaign: id, meter: *meter };
            // Another server may have leased it meanwhile.
            let Some(mut row) = view.task(key)?.filter(|row| row.task.is_due(clock)) else { continue };
            let meter = match view.meter(key.meter) {
                Ok(meter) => meter,
                // I5: its row was refused, which is on the record.
                Err(ServiceError::PermissionDenied { .. }) => None,
                Err(error) => return Err(error),
            };
            // I5, I8: the sealed row says whose meter it is now, and policy whether they may have
            // the task.
            match meter {
                Some(meter) if matches!(meter.class.status, MeterStatus::Quarantined | MeterStatus::Retired) => {
                    row.task.skip(meter.class.status.name(), clock);
                }
                Some(meter) if meter.class.head_end.as_ref() != Some(caller) => {
                    row.head_end = meter.class.head_end.as_ref().map(ToString::to_string);
                    if row.head_end.is_none() {
                        row.task.skip("no head-end", clock);
                    }
                }
                Some(meter) => {
                    if !permit.permits(&Action::LeaseTasks, &Resource::Meters(&meter.class)) {
                        continue;
                    }
                    // I5: what the meter's row shows as done is not done again: the key was rotated
                    // otherwise, or the task's row is an older one.
                    if row.task.is_reached(&meter) {
                        row.task.end(&campaign, Outcome::Probed, "", &meter, clock);
                    } else if row.task.lease(&campaign, self.lease_ms, clock).map_err(task_error)? {
                        leased.push(row.clone());
                    }
                }
                None => continue,
            }
            passed_on = true;
            view.put_task(row);
        }
        if leased.is_empty() {
            return Ok(if passed_on { Decision::progress(leased) } else { Decision::unchanged(leased) });
        }
        let entry = view.append(Event::TasksChanged(TasksChanged {
            campaign_id: id.octets().to_vec().into(),
            change: "leased".to_owned(),
            meters: leased.iter().map(|row| u64::from_be_bytes(row.key.meter.octets())).collect(),
            reason: String::new(),
        }));
        Ok(Decision::recorded(entry, leased))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Vec<TaskRow>, ServiceError> {
        match never {}
    }
}

/// A change of tasks whose leases the caller holds.
struct Held<F> {
    leases: Vec<TaskLease>,
    change: F,
}

impl<F> Act for Held<F>
where
    F: Fn(&mut View<'_, '_>, &mut TaskRow, &TaskLease, &kms_domain::Campaign) -> Result<Still, ServiceError>
        + Send
        + Sync
        + 'static,
{
    type Answer = Vec<TaskLease>;
    // A lease is renewed once more, or given back only once.
    type Past = Never;

    fn name(&self) -> &'static str {
        Action::LeaseTasks.name()
    }

    fn reads(&self) -> Reads {
        let campaigns: BTreeSet<CampaignId> = self.leases.iter().map(|lease| lease.campaign).collect();
        Reads {
            campaigns: campaigns.into_iter().collect(),
            tasks: self.leases.iter().map(TaskLease::key).collect(),
            clock: true,
            ..Reads::default()
        }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker.without_policy("policy was asked when the task was leased, and its fencing token is the proof"))
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Vec<TaskLease>>, ServiceError> {
        view.clock()?;
        let head_end = permit.principal().id.to_string();
        let (mut lost, mut entry) = (Vec::new(), None);
        for lease in &self.leases {
            let campaign = view.campaign(lease.campaign)?;
            let row = view.task(lease.key())?.filter(|row| row.head_end.as_deref() == Some(head_end.as_str()));
            let held = match (campaign, row) {
                (Some(campaign), Some(mut row)) => match (self.change)(view, &mut row, lease, &campaign)? {
                    Still::Held(recorded) => {
                        entry = entry.or(recorded);
                        Some(row)
                    }
                    Still::Lost => None,
                },
                _ => None,
            };
            match held {
                Some(row) => view.put_task(row),
                None => lost.push(*lease),
            }
        }
        Ok(match entry {
            Some(entry) => Decision::recorded(entry, lost),
            None if lost.len() < self.leases.len() => Decision::progress(lost),
            None => Decision::unchanged(lost),
        })
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Vec<TaskLease>, ServiceError> {
        match never {}
    }
}

/// Whether a lease is still held, and what was recorded of it.
enum Still {
    Held(Option<Entry>),
    Lost,
}

/// Lets a transfer or probe begin for a task: its lease is held by this principal with this fencing
/// token, the campaign runs and its window is open, and the task asks for this. For the act that
/// begins the transfer, which is tried as a whole ([`View::attempt`]): so neither begins without
/// the other.
///
/// # Errors
/// Permission denied: there is no such task of this principal. Failed precondition: the lease is
/// lost, the campaign does not run, the task asks for something else, or it is done as the meter's
/// row shows. Or a row was not read yet.
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
            "its maintenance window is over".to_owned()
        } else {
            format!("it is {}", running.state)
        };
        return Err(ServiceError::FailedPrecondition {
            reason: format!("campaign {campaign} begins no work now: {reason}"),
            next_step: "give the lease back".to_owned(),
        });
    }
    // I5: the task's row may be an older one. What was approved once is done once.
    if work != TaskWork::Probe && view.meter(meter)?.is_some_and(|meter| row.task.is_reached(&meter)) {
        return Err(ServiceError::FailedPrecondition {
            reason: format!(
                "meter {meter} has a later version than the task of campaign {campaign} is to replace: it is done"
            ),
            next_step: "begin a probe for the task, which ends it, or give the lease back".to_owned(),
        });
    }
    row.task.begin(fence, setup, work, clock).map_err(task_error)?;
    view.put_task(row);
    Ok(())
}

/// Whether this principal still holds the lease that a transfer began under: for the act that takes
/// a report of it, or tells its step again.
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

/// Whether anybody still holds the lease that a transfer began under.
///
/// # Errors
/// A row was not read yet.
pub fn holds_task(view: &mut View<'_, '_>, task: CampaignTask, meter: SystemTitle) -> Result<bool, ServiceError> {
    let clock = view.clock()?;
    Ok(view
        .task(TaskKey { campaign: task.campaign, meter })?
        .is_some_and(|row| row.task.check(task.fence, clock).is_ok()))
}

/// Takes the outcome of a transfer or probe, in the act that ends it, after the meter was put.
/// `reason` says more than the outcome's name does, for reports; empty where there is nothing more.
/// The task of a lease that was lost meanwhile is not concerned: somebody else works on it.
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

/// Ends the task of a transfer that ends because its meter goes out of service, in the act that
/// does so: what a key has left for stays in doubt.
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

/// Passes a task on to the head-end that its meter was assigned to, in the act that does so;
/// without one it is not to be done any more.
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

/// The task, while what began under this lease is what it waits for.
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

fn task_error(error: TaskError) -> ServiceError {
    let next_step = match error {
        TaskError::NotHeld => "stop working on this meter, and lease tasks again",
        TaskError::OtherWork { .. } => "do what the task asks for",
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

/// Tasks of one call.
const MOST_LEASED: u32 = 500;
