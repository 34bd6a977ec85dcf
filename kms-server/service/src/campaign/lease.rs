//! Task leases of head-ends: allocated, renewed, given back.

use async_recursion::async_recursion as boxed;
use std::{collections::BTreeSet, sync::Arc};

use kms_domain::{CampaignId, CampaignState, MeterStatus, Outcome, SystemTitle, TaskState, UnixMillis};
use kms_proto::v1::{self, TasksChanged, audit_record::Event};
use kms_store::{Reads, TaskKey, TaskRow};

use super::{
    CampaignService,
    task::{message, task_error},
};
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Entry, Never, Permit, View};

/// Which tasks a head-end asks for.
#[derive(Clone, Copy, Debug)]
pub struct LeaseQuery {
    /// Tasks of this campaign; `None`: of any that runs.
    pub campaign: Option<CampaignId>,
    /// The most tasks to hold at once.
    pub most: u32,
    /// How long a task lease lasts, in ms.
    pub lease_ms: i64,
}

/// A task lease that a head-end states to hold.
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
    /// Leases tasks for the caller's own meters, within the terms of the campaigns and `most`.
    ///
    /// # Errors
    /// An unknown caller, or the database cannot be reached. Tasks that policy does not permit are
    /// left out.
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
        Ok(self.island.door.act(caller, None, LeaseTasks { campaign: id, due, lease_ms }).await?.value)
    }

    /// Renews task leases. Returns until when they last, and those that the caller does not hold
    /// any more.
    ///
    /// # Errors
    /// An unknown caller, or the database cannot be reached.
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
                // Tasks of an aborted campaign that have begun may end.
                if campaign.state == CampaignState::Aborted && row.task.state != TaskState::UnderWay {
                    return Ok(Standing::Lost);
                }
                let renewed = row.task.renew(lease.fence, lease_ms, clock);
                Ok(renewed.map_or(Standing::Lost, |()| Standing::Held(None)))
            })
            .await?;
        let until = until.lock().map_or(UnixMillis(0), |until| *until);
        Ok((until, lost))
    }

    /// Gives task leases back. With a reason this counts as an attempt. Returns those that the
    /// caller does not hold any more.
    ///
    /// # Errors
    /// An unknown caller, or the database cannot be reached.
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
                return Ok(Standing::Lost);
            }
            let entry = view.append(Event::TasksChanged(TasksChanged {
                campaign_id: lease.campaign.octets().to_vec().into(),
                change: "released".to_owned(),
                meters: vec![u64::from_be_bytes(lease.meter.octets())],
                reason: reason.clone(),
            }));
            Ok(Standing::Held(Some(entry)))
        })
        .await
    }

    /// Changes tasks whose leases the caller holds. `change` decides whether a lease is held.
    /// Returns those that are not.
    async fn with_leases<F>(
        &self,
        caller: &Caller,
        leases: Vec<TaskLease>,
        change: F,
    ) -> Result<Vec<TaskLease>, ServiceError>
    where
        F: Fn(&mut View<'_, '_>, &mut TaskRow, &TaskLease, &kms_domain::Campaign) -> Result<Standing, ServiceError>
            + Send
            + Sync
            + 'static,
    {
        Ok(self.island.door.act(caller, None, ChangeHeldTasks { leases, change }).await?.value)
    }
}

/// The leasing of tasks that are due, as one act.
struct LeaseTasks {
    campaign: CampaignId,
    due: Vec<SystemTitle>,
    lease_ms: i64,
}

impl Act for LeaseTasks {
    type Answer = Vec<TaskRow>;
    // A head-end that lost the answer asks again. The tasks are due again when their leases end.
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
                // I5: its row was refused, which is recorded.
                Err(ServiceError::PermissionDenied { .. }) => None,
                Err(error) => return Err(error),
            };
            // I5, I8: the sealed row says which head-end the meter is assigned to now. Policy
            // decides whether it gets the task.
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
                    // I5: a task that is done, as the meter's row shows, is not done again. The key
                    // was rotated otherwise, or the task's row is an older one.
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

/// A change of tasks whose leases the caller holds, as one act.
struct ChangeHeldTasks<F> {
    leases: Vec<TaskLease>,
    change: F,
}

impl<F> Act for ChangeHeldTasks<F>
where
    F: Fn(&mut View<'_, '_>, &mut TaskRow, &TaskLease, &kms_domain::Campaign) -> Result<Standing, ServiceError>
        + Send
        + Sync
        + 'static,
{
    type Answer = Vec<TaskLease>;
    // A repetition renews a lease once more, or finds that it was given back.
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
                    Standing::Held(recorded) => {
                        entry = entry.or(recorded);
                        Some(row)
                    }
                    Standing::Lost => None,
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

/// Whether a task lease is still held, and its record.
enum Standing {
    Held(Option<Entry>),
    Lost,
}

/// The most tasks that one call leases of a campaign.
const MOST_LEASED: u32 = 500;
