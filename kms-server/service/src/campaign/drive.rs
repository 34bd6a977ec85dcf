//! Drives campaigns: makes the tasks of the present wave, checks their counts, then begins the next
//! wave or pauses the campaign. Every step is one transaction that checks from which state it
//! continues. So any number of servers can drive one campaign, and a crash loses nothing.

use async_recursion::async_recursion as boxed;
use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use kms_domain::{
    Campaign, CampaignId, CampaignState, Group, PlanChain, SecuritySetupId, Slot, SystemTitle, Task, TaskState,
    TaskStep, TaskWork, UnixMillis, WaveDecision, WaveResult, WaveTally,
};
use kms_proto::v1::{CampaignChanged, SecurityEvent, WaveChanged, audit_record::Event};
use kms_store::{MeterRow, Reads, TaskKey, TaskRow};

use super::{
    CampaignService, campaign_row, missing,
    pinned_plan::{PlanLinks, titles_of},
    refused,
};
use crate::island::IslandContext;
use kms_base::error::ServiceError;
use kms_ledger::{Decision, ServerAct};

impl CampaignService {
    /// Drives all running campaigns every `period`, until the task is dropped or aborted.
    pub fn in_background(self, period: Duration) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            for round in 0_u64.. {
                tokio::time::sleep(period).await;
                if let Err(error) = self.lead_all(round).await {
                    tracing::warn!(%error, "campaigns could not be driven; the next round tries again");
                }
            }
        })
    }

    async fn lead_all(&self, round: u64) -> Result<(), ServiceError> {
        for campaign in self.load_all().await? {
            let recent = IslandContext::now().0 - campaign.since.0 < TIDIED_FOR_MS;
            if campaign.state == CampaignState::Running {
                self.lead(campaign.id).await?;
            } else if campaign.state.is_final() && recent {
                self.tidy(&campaign).await?;
                self.plans.lock().unwrap_or_else(PoisonError::into_inner).remove(&campaign.id);
            }
        }
        if round.is_multiple_of(PURGE_ROUNDS) {
            // Plans that were never stored as drafts. Ids are time-ordered (UUID version 7).
            let yesterday = u64::try_from(IslandContext::now().0 - TIDIED_FOR_MS).unwrap_or_default();
            let before = uuid::Builder::from_unix_timestamp_millis(yesterday, &[0; 10]).into_uuid();
            if let Ok(before) = CampaignId::from_octets(before.as_bytes()) {
                self.island.store.purge_unused_chunks(before).await?;
            }
        }
        Ok(())
    }

    /// Takes steps until nothing is to do at the moment.
    ///
    /// # Errors
    /// The HSM or the database cannot be reached.
    #[boxed]
    pub async fn lead(&self, id: CampaignId) -> Result<(), ServiceError> {
        while self.advance(id).await? {}
        Ok(())
    }

    /// Takes one step. True if another step may follow.
    ///
    /// # Errors
    /// No such campaign, or the database cannot be reached.
    #[boxed]
    pub async fn advance(&self, id: CampaignId) -> Result<bool, ServiceError> {
        let campaign = self.load(id).await?;
        if campaign.state != CampaignState::Running {
            return Ok(false);
        }
        if !campaign.is_expanded() {
            return self.expand(&campaign).await;
        }
        let counts = self.wave_counts(&campaign).await?;
        match campaign.decide(&counts) {
            WaveDecision::Wait => self.tidy(&campaign).await,
            WaveDecision::Pause { reason } => {
                self.pause(&campaign, reason, None).await?;
                Ok(false)
            }
            WaveDecision::NextWave | WaveDecision::Finish => {
                let result = self.result(&campaign).await?;
                self.end_wave(&campaign, result).await?;
                Ok(true)
            }
        }
    }

    /// Makes the tasks of the next chunks of the plan.
    async fn expand(&self, campaign: &Campaign) -> Result<bool, ServiceError> {
        let Some(links) = self.verified(campaign).await? else { return Ok(false) };
        let (mut members, mut looked) = (Vec::new(), campaign.expanded);
        while looked < campaign.content.plan.chunks && members.len() < TASKS_AT_ONCE {
            let titles = self.island.store.campaign_chunk(campaign.id, looked).await?.unwrap_or_default();
            // I5, I6: only the approved meters get tasks.
            if !links.fits(looked, &titles) {
                self.plans.lock().unwrap_or_else(PoisonError::into_inner).remove(&campaign.id);
                self.refuse_plan(campaign).await?;
                return Ok(false);
            }
            members.extend(campaign.content.plan.members(campaign.id, campaign.wave, titles_of(&titles)));
            looked += 1;
        }
        let rows = self.island.store.meters(&members).await?;
        let group = match campaign.content.selection.group {
            Some(group) => self.island.group(group).await?.map(|(group, _)| group),
            None => None,
        };
        let (island, planned, content) = (self.island.clone(), Arc::new(campaign.clone()), members);
        let now = self.island.store.now().await?;
        let tasks =
            tokio::task::spawn_blocking(move || tasks(&island, &planned, group.as_deref(), &content, &rows, now));
        let tasks =
            tasks.await.map_err(|_| ServiceError::Internal("the tasks of a wave could not be made".to_owned()))?;
        let (id, wave, expanded) = (campaign.id, campaign.wave, campaign.expanded);
        let reads = Reads { sealed: vec![campaign_row(id)], ..Reads::default() };
        let committed = self.island.committer.act(ServerAct::PLAN_WAVE, reads, move |view| {
            let known = view.campaign(id)?.ok_or_else(|| missing(id))?;
            if (known.state, known.wave, known.expanded) != (CampaignState::Running, wave, expanded) {
                // Another server or an officer was faster.
                return Ok(Decision::unchanged(()));
            }
            let mut campaign = (*known).clone();
            campaign.expanded = looked;
            tasks.iter().cloned().for_each(|task| view.plan_task(task));
            view.append(Event::WaveChanged(WaveChanged {
                campaign_id: id.octets().to_vec().into(),
                wave,
                change: "planned".to_owned(),
                tasks: tasks.len() as u64,
                ..WaveChanged::default()
            }));
            view.put_campaign(campaign)?;
            Ok(Decision::of(view.entry(), ()))
        });
        committed.await?;
        Ok(true)
    }

    /// The chain of the plan, verified from its first chunk to the approved digest. `None` if it
    /// does not fit; then the campaign is paused.
    pub(super) async fn verified(&self, campaign: &Campaign) -> Result<Option<PlanLinks>, ServiceError> {
        if let Some(links) = self.plans.lock().unwrap_or_else(PoisonError::into_inner).get(&campaign.id) {
            return Ok(Some(links.clone()));
        }
        let mut digests = Vec::new();
        let mut link = PlanChain::new(campaign.id);
        for number in 0..campaign.content.plan.chunks {
            link = link.link(&self.island.store.campaign_chunk(campaign.id, number).await?.unwrap_or_default());
            digests.push(link.digest());
        }
        if link.digest() != campaign.content.plan.digest {
            self.refuse_plan(campaign).await?;
            return Ok(None);
        }
        let links = PlanLinks::new(campaign.id, digests);
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).insert(campaign.id, links.clone());
        Ok(Some(links))
    }

    async fn refuse_plan(&self, campaign: &Campaign) -> Result<(), ServiceError> {
        tracing::error!(campaign = %campaign.id, "the plan of a campaign was changed in the database (I5)");
        let reason = "the plan is not the one that was approved: it was changed in the database (I5); abort the campaign and call the security officers";
        self.pause(campaign, reason.to_owned(), Some("campaign-plan-refused")).await
    }

    /// Pauses a campaign if it still runs in the wave of `campaign`.
    async fn pause(
        &self,
        campaign: &Campaign,
        reason: String,
        security_event: Option<&'static str>,
    ) -> Result<(), ServiceError> {
        let (id, wave, accepted) = (campaign.id, campaign.wave, campaign.accepted_failures);
        let reads = Reads { sealed: vec![campaign_row(id)], ..Reads::default() };
        let committed = self.island.committer.act(ServerAct::PAUSE_CAMPAIGN, reads, move |view| {
            let known = view.campaign(id)?.ok_or_else(|| missing(id))?;
            if (known.state, known.wave, known.accepted_failures) != (CampaignState::Running, wave, accepted) {
                return Ok(Decision::unchanged(()));
            }
            let mut campaign = (*known).clone();
            campaign.pause(reason.clone(), view.now()).map_err(refused)?;
            view.append(Event::CampaignChanged(CampaignChanged {
                campaign_id: id.octets().to_vec().into(),
                change: "paused".to_owned(),
                reason: reason.clone(),
            }));
            if let Some(kind) = security_event {
                view.append(Event::SecurityEvent(SecurityEvent {
                    kind: kind.to_owned(),
                    detail: format!("campaign {id}"),
                    ..SecurityEvent::default()
                }));
            }
            view.put_campaign(campaign)?;
            Ok(Decision::of(view.entry(), ()))
        });
        committed.await.map(drop)
    }

    async fn end_wave(&self, campaign: &Campaign, result: WaveResult) -> Result<(), ServiceError> {
        let (id, wave) = (campaign.id, campaign.wave);
        let reads = Reads { sealed: vec![campaign_row(id)], ..Reads::default() };
        let committed = self.island.committer.act(ServerAct::END_WAVE, reads, move |view| {
            let known = view.campaign(id)?.ok_or_else(|| missing(id))?;
            if (known.state, known.wave) != (CampaignState::Running, wave) {
                return Ok(Decision::unchanged(()));
            }
            let mut campaign = (*known).clone();
            campaign.end_wave(result.clone(), view.now()).map_err(refused)?;
            let counts = result.counts();
            view.append(Event::WaveChanged(WaveChanged {
                campaign_id: id.octets().to_vec().into(),
                wave,
                change: "ended".to_owned(),
                tasks: 0,
                succeeded: counts.succeeded,
                failed: counts.failed,
                in_doubt: counts.in_doubt,
                skipped: counts.skipped,
            }));
            if campaign.state == CampaignState::Finished {
                view.append(Event::CampaignChanged(CampaignChanged {
                    campaign_id: id.octets().to_vec().into(),
                    change: "finished".to_owned(),
                    reason: String::new(),
                }));
            }
            view.put_campaign(campaign)?;
            Ok(Decision::of(view.entry(), ()))
        });
        committed.await.map(drop)
    }

    /// The result of the present wave, from its tasks.
    async fn result(&self, campaign: &Campaign) -> Result<WaveResult, ServiceError> {
        let store = &self.island.store;
        let mut tallies: Vec<WaveTally> = Vec::new();
        for tally in store.task_tallies(campaign.id, Some(campaign.wave)).await? {
            let tally =
                WaveTally { vendor: tally.vendor, state: tally.state, reason: tally.reason, tasks: tally.tasks };
            // Head-ends choose the words of reasons. If there are too many different ones, the rest
            // is counted together.
            let kept = tallies.len();
            match tallies
                .iter_mut()
                .find(|known| kept >= MOST_TALLIES && known.state == tally.state && known.vendor == tally.vendor)
            {
                Some(known) => {
                    known.tasks += tally.tasks;
                    known.reason = "several reasons".to_owned();
                }
                None => tallies.push(tally),
            }
        }
        let now = store.now().await?;
        let span = ((now.0 - campaign.wave_started.0) / POINTS).max(1_000);
        let mut sum = 0;
        let points = store.task_timeline(campaign.id, campaign.wave, span).await?;
        let timeline = points.into_iter().map(|(time, count)| {
            sum += count;
            (time.after(span).min(now), sum)
        });
        Ok(WaveResult { started: campaign.wave_started, ended: now, tallies, timeline: timeline.collect() })
    }

    /// Deletes some tasks that have succeeded and whose wave has ended: its result counts them.
    /// True if there may be more.
    async fn tidy(&self, campaign: &Campaign) -> Result<bool, ServiceError> {
        let before = if campaign.state == CampaignState::Finished { campaign.wave + 1 } else { campaign.wave };
        Ok(self.island.store.delete_tasks(campaign.id, before, TaskState::Succeeded, TASKS_AT_ONCE as u32).await? > 0)
    }
}

/// The tasks of these meters, decided on their present sealed rows.
fn tasks(
    island: &IslandContext,
    campaign: &Campaign,
    group: Option<&Group>,
    members: &[SystemTitle],
    rows: &[MeterRow],
    now: UnixMillis,
) -> Vec<TaskRow> {
    let nothing = TaskStep { setup: SecuritySetupId::DEFAULT, work: TaskWork::Probe, from: 0 };
    let task = |title: SystemTitle| {
        let row = |vendor: String, head_end, task| TaskRow {
            key: TaskKey { campaign: campaign.id, meter: title },
            generation: 1,
            wave: campaign.wave,
            vendor,
            head_end,
            mark: [0; 16],
            task,
        };
        let found =
            rows.binary_search_by_key(&title.as_i64(), |row| row.title.as_i64()).ok().and_then(|at| rows.get(at));
        // I5: nothing is done for a meter whose row does not verify.
        let Some(meter) = found.and_then(|row| island.committer.open_meter(title, &row.row).ok()) else {
            let vendor = title
                .octets()
                .first_chunk::<3>()
                .map(|flag| String::from_utf8_lossy(flag).into_owned())
                .unwrap_or_default();
            return row(vendor, None, Task::skipped(nothing, "its row is gone or was refused", now));
        };
        let vendor = meter.class.vendor.to_string();
        let head_end = meter.class.head_end.as_ref().map(ToString::to_string);
        let Some(step) = campaign.content.action.first_step(&meter, campaign.content.setup) else {
            return row(vendor, head_end, Task::skipped(nothing, "nothing to do", now));
        };
        if !meter.class.status.may_grant() {
            return row(vendor, head_end, Task::skipped(step, meter.class.status.name(), now));
        }
        if head_end.is_none() {
            return row(vendor, None, Task::skipped(step, "no head-end", now));
        }
        if let (TaskWork::Rotate(key_type), Some(group), false) = (step.work, group, step.is_own(&meter))
            && let Some(newest) = group.newest(step.setup, key_type)
            && meter
                .acknowledged(group.owner(), step.setup, key_type)
                .is_some_and(|acknowledged| acknowledged >= newest.number())
        {
            return row(vendor, head_end, Task::skipped(step, "it has the group's new key", now));
        }
        let unresolved = meter.slots.of_setup(step.setup).any(Slot::unresolved);
        row(vendor, head_end, Task { probe: unresolved && step.work != TaskWork::Probe, ..Task::new(step, now) })
    };
    members.iter().copied().map(task).collect()
}

/// About how many tasks one transaction makes. More would delay grants.
const TASKS_AT_ONCE: usize = 2_000;
/// Points of a wave's timeline.
const POINTS: i64 = 60;
const MOST_TALLIES: usize = 200;
/// For how long after its end the tasks of a campaign are tidied; and the age of a plan that was
/// never stored as a draft.
const TIDIED_FOR_MS: i64 = 24 * 3_600 * 1_000;
/// After how many rounds unused plans are removed.
const PURGE_ROUNDS: u64 = 300;
