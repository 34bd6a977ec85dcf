//! Campaigns as officers and auditors see them: lists, progress, reports.

use async_recursion::async_recursion as boxed;
use std::{collections::VecDeque, time::Duration};

use kms_domain::{
    Campaign, CampaignAction, CampaignId, CampaignState, GroupId, SystemTitle, TaskState, UnixMillis, WaveCounts,
    WaveResult,
};
use kms_proto::v1;
use kms_store::{RowKind, TaskFilter, TaskTally};
use tokio::sync::mpsc;

use super::{CampaignService, task::message as task_message};
use crate::island::IslandContext;
use crate::watch::{self, Watched};
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;

/// Which tasks a report lists.
#[derive(Clone, Copy, Debug)]
pub struct ReportQuery {
    /// The tasks.
    pub filter: TaskFilter,
    /// After this meter.
    pub after: Option<SystemTitle>,
    /// The most tasks; 0 for none.
    pub page: u32,
}

/// Progress of a campaign, as it happens.
pub struct Watch(mpsc::Receiver<Result<v1::CampaignProgress, ServiceError>>);

impl Watch {
    /// The next progress; `None` when the campaign has ended.
    #[boxed]
    pub async fn next(&mut self) -> Option<Result<v1::CampaignProgress, ServiceError>> {
        self.0.recv().await
    }

    /// The channel, for a stream.
    pub fn into_receiver(self) -> mpsc::Receiver<Result<v1::CampaignProgress, ServiceError>> {
        self.0
    }
}

impl CampaignService {
    /// Up to `limit` campaigns before an id, the newest first.
    ///
    /// # Errors
    /// Not permitted, or the database cannot be reached.
    #[boxed]
    pub async fn list(
        &self,
        caller: &Caller,
        before: Option<CampaignId>,
        limit: usize,
    ) -> Result<Vec<v1::Campaign>, ServiceError> {
        self.island.require(caller, &Action::ListCampaigns).await?;
        let mut campaigns = self.load_all().await?;
        // Ids are time-ordered (UUID version 7).
        campaigns.retain(|campaign| before.is_none_or(|before| campaign.id.octets() < before.octets()));
        campaigns.reverse();
        let mut messages = Vec::new();
        for campaign in campaigns.iter().take(limit) {
            messages.push(self.message(campaign).await?);
        }
        Ok(messages)
    }

    /// One campaign.
    ///
    /// # Errors
    /// Not permitted, no such campaign, or the database cannot be reached.
    #[boxed]
    pub async fn show(&self, caller: &Caller, id: CampaignId) -> Result<v1::Campaign, ServiceError> {
        self.island.require(caller, &Action::ListCampaigns).await?;
        self.message(&*self.load(id).await?).await
    }

    /// Reports the progress at once, at each change, and at the end.
    ///
    /// # Errors
    /// Not permitted, no such campaign, or the database cannot be reached.
    #[boxed]
    pub async fn watch(&self, caller: &Caller, id: CampaignId) -> Result<Watch, ServiceError> {
        self.island.require(caller, &Action::ListCampaigns).await?;
        let mut rate = Rate::default();
        let first = self.progress(&*self.load(id).await?, &mut rate).await?;
        let watched = WatchedCampaign { service: self.clone(), caller: caller.clone(), id, rate };
        Ok(Watch(watch::watch(caller, watched, first, LOOK_EVERY)))
    }

    /// All figures of a campaign, and a page of its tasks.
    ///
    /// # Errors
    /// Not permitted, no such campaign, or the database cannot be reached.
    #[boxed]
    pub async fn report(
        &self,
        caller: &Caller,
        id: CampaignId,
        query: ReportQuery,
    ) -> Result<v1::CampaignReport, ServiceError> {
        self.island.require(caller, &Action::ListCampaigns).await?;
        let campaign = self.load(id).await?;
        let store = &self.island.store;
        let mut report = v1::CampaignReport {
            progress: Some(self.progress(&campaign, &mut Rate::default()).await?),
            ..v1::CampaignReport::default()
        };
        let mut succeeded = 0;
        for (wave, result) in (1..).zip(&campaign.results) {
            report.outcomes.extend(result.tallies.iter().map(|tally| v1::OutcomeCount {
                wave,
                manufacturer: tally.vendor.clone(),
                state: tally.state.name().to_owned(),
                reason: tally.reason.clone(),
                count: tally.tasks,
            }));
            report.timeline.extend(points(result.started, &result.timeline, succeeded));
            succeeded += result.counts().succeeded;
        }
        if is_under_way(&campaign) {
            let tallies = store.task_tallies(id, Some(campaign.wave)).await?;
            report.outcomes.extend(tallies.into_iter().map(|tally| v1::OutcomeCount {
                wave: tally.wave,
                manufacturer: tally.vendor,
                state: tally.state.name().to_owned(),
                reason: tally.reason,
                count: tally.tasks,
            }));
            let span = ((store.now().await?.0 - campaign.wave_started.0) / 60).max(1_000);
            let mut sum = 0;
            let timeline: Vec<(UnixMillis, u64)> = store
                .task_timeline(id, campaign.wave, span)
                .await?
                .into_iter()
                .map(|(time, count)| {
                    sum += count;
                    (time.after(span), sum)
                })
                .collect();
            report.timeline.extend(points(campaign.wave_started, &timeline, succeeded));
        }
        if query.page > 0 {
            let rows = store.task_page(id, query.filter, query.after, query.page).await?;
            if rows.len() == usize::try_from(query.page).unwrap_or(usize::MAX) {
                report.next_page_token =
                    rows.last().map(|row| row.key.meter.octets().to_vec().into()).unwrap_or_default();
            }
            report.tasks = rows.iter().map(task_message).collect();
        }
        Ok(report)
    }

    /// The progress of a campaign.
    async fn progress(&self, campaign: &Campaign, rate: &mut Rate) -> Result<v1::CampaignProgress, ServiceError> {
        let tallies = if is_under_way(campaign) {
            self.island.store.task_tallies(campaign.id, Some(campaign.wave)).await?
        } else {
            Vec::new()
        };
        let mut counts = WaveCounts::default();
        tallies.iter().for_each(|tally| counts.add(tally.state, tally.tasks));
        let waves: Vec<v1::WaveProgress> = (1..)
            .zip(&campaign.content.plan.waves)
            .zip(campaign.results.iter().map(Some).chain(std::iter::repeat(None)))
            .map(|((wave, planned), result)| match result {
                Some(result) => wave_message(wave, planned.meters, &result.counts(), result.started, result.ended),
                None if wave == campaign.wave => {
                    wave_message(wave, planned.meters, &counts, campaign.wave_started, UnixMillis(0))
                }
                None => wave_message(wave, planned.meters, &WaveCounts::default(), UnixMillis(0), UnixMillis(0)),
            })
            .collect();
        let ended = |wave: &v1::WaveProgress| wave.succeeded + wave.failed + wave.in_doubt + wave.skipped;
        let done: u64 = waves.iter().map(ended).sum();
        let succeeded: u64 = waves.iter().map(|wave| wave.succeeded).sum();
        let now = IslandContext::now();
        let per_minute =
            if campaign.state == CampaignState::Running { rate.of(now, succeeded, campaign.started) } else { 0.0 };
        let left = campaign.content.plan.meters.saturating_sub(done);
        Ok(v1::CampaignProgress {
            campaign: Some(self.message(campaign).await?),
            waves,
            per_minute,
            eta_seconds: eta_seconds(left, per_minute),
            reasons: reasons(&campaign.results, &tallies),
        })
    }

    /// A campaign as a message.
    pub(super) async fn message(&self, campaign: &Campaign) -> Result<v1::Campaign, ServiceError> {
        let content = &campaign.content;
        let now = IslandContext::now();
        let windows = &content.terms.windows;
        let group = match content.selection.group {
            Some(group) => self.group_name(group).await?,
            None => String::new(),
        };
        let text = |value: Option<String>| value.unwrap_or_default();
        let days = content.selection.active_before.map_or(0, |before| (content.created.0 - before.0) / DAY_MS);
        let selection = v1::CampaignSelection {
            whole_island: content.selection.whole_island,
            manufacturer: text(content.selection.vendor.map(|vendor| vendor.to_string())),
            device_profile: text(content.selection.profile.as_ref().map(ToString::to_string)),
            group,
            head_end: text(content.selection.head_end.as_ref().map(ToString::to_string)),
            batch: text(content.selection.batch.clone()),
            older_than_days: u32::try_from(days).unwrap_or_default(),
            exposed_to: text(content.selection.exposed_to.as_ref().map(ToString::to_string)),
            exposed_by: text(content.selection.exposed_by.map(|reason| reason.to_string())),
            imported: content.selection.imported,
            counter_used_percent: content.selection.counter_used.unwrap_or_default().into(),
            meters: Vec::new(),
        };
        let terms = v1::CampaignTerms {
            quorum: Some(content.terms.quorum.number().into()),
            canary: Some(content.terms.canary),
            waves: content.terms.waves.iter().map(ToString::to_string).collect(),
            success_threshold: content.terms.success_threshold.into(),
            failure_limit: Some(content.terms.failure_limit),
            time_zone: windows.zone().to_owned(),
            windows: windows.windows().iter().map(ToString::to_string).collect(),
            starts_per_minute: content.terms.starts_per_minute.map_or(0, std::num::NonZeroU32::get),
            in_flight: content.terms.in_flight.get(),
            attempts: content.terms.attempts.get().into(),
            back_off_seconds: content.terms.back_off_seconds,
        };
        let (action, key_type) = match content.action {
            CampaignAction::Rotate(key_type) => (v1::CampaignAction::Rotate, key_type.to_string()),
            CampaignAction::Probe => (v1::CampaignAction::Probe, String::new()),
            CampaignAction::TakeOver => (v1::CampaignAction::TakeOver, String::new()),
        };
        Ok(v1::Campaign {
            campaign_id: campaign.id.octets().to_vec().into(),
            plan: Some(v1::CampaignPlan {
                name: content.name.to_string(),
                action: action.into(),
                key_type,
                security_setup: content.setup.map(|setup| setup.obis().to_vec().into()).unwrap_or_default(),
                selection: Some(selection),
                terms: Some(terms),
            }),
            state: campaign.state.name().to_owned(),
            reason: campaign.reason.clone(),
            since_ms: campaign.since.0,
            content_sha256: campaign.content_digest().to_vec().into(),
            requester: content.requester.to_string(),
            requester_person: content.requester_person.as_str().to_owned(),
            created_ms: content.created.0,
            started_ms: campaign.started.map_or(0, |started| started.0),
            approvals: campaign
                .approvals
                .iter()
                .map(|approval| v1::CampaignApproval {
                    principal: approval.principal.to_string(),
                    person: approval.person.as_str().to_owned(),
                    time_ms: approval.time.0,
                })
                .collect(),
            meters: content.plan.meters,
            waves: content.plan.waves.iter().map(|wave| wave.meters).collect(),
            wave: campaign.wave,
            window_open: windows.is_open_at(now),
            next_opening_ms: if windows.is_open_at(now) {
                0
            } else {
                windows.next_opening(now).map_or(0, |next| next.0)
            },
            named_meters: content.selection.named,
        })
    }

    async fn group_name(&self, group: GroupId) -> Result<String, ServiceError> {
        Ok(match self.island.store.sealed(RowKind::Group, &group.0.to_be_bytes()).await? {
            Some(row) => self.island.committer.open_group(group, &row)?.name.clone(),
            None => format!("group {}", group.0),
        })
    }

    /// The group of a name.
    ///
    /// # Errors
    /// No group has this name, or the database cannot be reached.
    #[boxed]
    pub async fn group(&self, name: &str) -> Result<GroupId, ServiceError> {
        let mut after = None;
        loop {
            let page = self.island.store.sealed_page(RowKind::Group, after.as_deref(), 500).await?;
            let Some((last, _)) = page.last() else {
                return Err(ServiceError::invalid(
                    "plan.selection.group",
                    format!("there is no group `{}`", name.escape_debug()),
                ));
            };
            after = Some(last.clone());
            for (id, row) in &page {
                let Some(id) = id.as_slice().try_into().ok().map(u64::from_be_bytes).map(GroupId) else { continue };
                if self.island.committer.open_group(id, row).is_ok_and(|group| group.name == name) {
                    return Ok(id);
                }
            }
        }
    }
}

/// A campaign that somebody watches.
struct WatchedCampaign {
    service: CampaignService,
    caller: Caller,
    id: CampaignId,
    rate: Rate,
}

impl Watched for WatchedCampaign {
    type Standing = v1::CampaignProgress;

    async fn look(&mut self) -> Result<v1::CampaignProgress, ServiceError> {
        self.service.island.require(&self.caller, &Action::ListCampaigns).await?;
        self.service.progress(&*self.service.load(self.id).await?, &mut self.rate).await
    }

    fn is_alike(known: &v1::CampaignProgress, now: &v1::CampaignProgress) -> bool {
        now.waves == known.waves && now.campaign == known.campaign && now.reasons == known.reasons
    }

    fn has_ended(progress: &v1::CampaignProgress) -> bool {
        progress.campaign.as_ref().is_none_or(|campaign| is_over(&campaign.state))
    }
}

/// How many tasks succeed in a minute: over the last minute that was watched, or since the start
/// before that.
#[derive(Default)]
struct Rate(VecDeque<(i64, u64)>);

impl Rate {
    fn of(&mut self, now: UnixMillis, succeeded: u64, started: Option<UnixMillis>) -> f64 {
        while self.0.front().is_some_and(|(time, _)| now.0 - time > 60_000) {
            self.0.pop_front();
        }
        let (since, before) = match self.0.front() {
            Some((time, count)) if now.0 - time > 10_000 => (*time, *count),
            _ => (started.map_or(now.0, |started| started.0), 0),
        };
        self.0.push_back((now.0, succeeded));
        let minutes = (now.0 - since).max(1_000) as f64 / 60_000.0;
        succeeded.saturating_sub(before) as f64 / minutes
    }
}

/// How long so many meters take at this rate; 0 if the rate is not known.
fn eta_seconds(left: u64, per_minute: f64) -> u64 {
    if per_minute > 0.0 && left > 0 { (left as f64 / per_minute * 60.0).ceil() as u64 } else { 0 }
}

fn is_over(state: &str) -> bool {
    [CampaignState::Aborted, CampaignState::Finished].iter().any(|over| over.name() == state)
}

/// Whether the figures of the present wave are in its tasks.
fn is_under_way(campaign: &Campaign) -> bool {
    campaign.wave > 0 && campaign.results.len() < usize::try_from(campaign.wave).unwrap_or(usize::MAX)
}

fn wave_message(
    wave: u32,
    planned: u64,
    counts: &WaveCounts,
    started: UnixMillis,
    ended: UnixMillis,
) -> v1::WaveProgress {
    v1::WaveProgress {
        wave,
        planned,
        pending: counts.pending,
        leased: counts.leased,
        under_way: counts.under_way,
        succeeded: counts.succeeded,
        failed: counts.failed,
        in_doubt: counts.in_doubt,
        skipped: counts.skipped,
        started_ms: started.0,
        ended_ms: ended.0,
    }
}

fn points(started: UnixMillis, timeline: &[(UnixMillis, u64)], before: u64) -> Vec<v1::TimelinePoint> {
    let first = v1::TimelinePoint { time_ms: started.0, succeeded: before };
    std::iter::once(first)
        .chain(timeline.iter().map(|(time, count)| v1::TimelinePoint { time_ms: time.0, succeeded: before + count }))
        .collect()
}

/// Why attempts failed: in waves that have ended, and in the present wave.
fn reasons(results: &[WaveResult], tallies: &[TaskTally]) -> Vec<v1::NamedCount> {
    let past =
        results.iter().flat_map(|result| result.tallies.iter().map(|tally| (tally.state, &tally.reason, tally.tasks)));
    let present = tallies.iter().map(|tally| (tally.state, &tally.reason, tally.tasks));
    let mut reasons: Vec<v1::NamedCount> = Vec::new();
    for (_, name, count) in
        past.chain(present).filter(|(state, reason, _)| *state != TaskState::Succeeded && !reason.is_empty())
    {
        match reasons.iter_mut().find(|known| known.name == *name) {
            Some(known) => known.count += count,
            None => reasons.push(v1::NamedCount { name: name.clone(), count }),
        }
    }
    reasons.sort_by(|one, other| other.count.cmp(&one.count).then_with(|| one.name.cmp(&other.name)));
    reasons.truncate(MOST_REASONS);
    reasons
}

const LOOK_EVERY: Duration = Duration::from_secs(1);
const DAY_MS: i64 = 24 * 3_600 * 1_000;
const MOST_REASONS: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    const START: i64 = 1_800_000_000_000;

    /// The rates that a watcher sees, by milliseconds after the start and tasks that have
    /// succeeded.
    fn rates(looks: &[(i64, u64)]) -> Vec<f64> {
        let mut rate = Rate::default();
        looks
            .iter()
            .map(|(after, succeeded)| rate.of(UnixMillis(START + after), *succeeded, Some(UnixMillis(START))))
            .collect()
    }

    // The times are such that no division leaves a remainder in binary.
    #[test]
    fn the_rate_is_that_of_the_last_minute_watched_and_before_that_since_the_start() {
        // The first look, and one that comes too soon after it to say more.
        assert_eq!(rates(&[(30_000, 20), (37_500, 30)]), [40.0, 48.0]);
        // Fifteen since the first look; then thirty in a minute, whatever was before it.
        assert_eq!(rates(&[(30_000, 20), (45_000, 35), (105_000, 65)]), [40.0, 60.0, 30.0]);
    }

    #[test]
    fn nothing_done_is_no_rate_and_no_time_of_arrival() {
        assert_eq!(rates(&[(0, 0), (30_000, 0), (45_000, 0)]), [0.0; 3]);
        // It went well once, and nothing has succeeded for a minute.
        assert_eq!(rates(&[(30_000, 20), (90_000, 20)]), [40.0, 0.0]);
        // It has not started.
        assert_eq!(Rate::default().of(UnixMillis(START), 0, None), 0.0);
        assert_eq!(eta_seconds(80, 0.0), 0);
    }

    #[test]
    fn the_time_of_arrival_is_what_is_left_at_the_rate() {
        assert_eq!(eta_seconds(80, 40.0), 120);
        assert_eq!(eta_seconds(1, 40.0), 2, "a second and a half, rounded up");
        assert_eq!(eta_seconds(1_000_000, 500.0), 120_000);
        assert_eq!(eta_seconds(0, 40.0), 0);
    }
}
