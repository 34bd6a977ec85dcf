//! Campaigns: officers create, approve, start and watch them. The server drives them. Head-ends
//! lease their tasks.
//!
//! All state is in the database, so that every server can drive every campaign, and no particular
//! server is needed. A transfer that belongs to a campaign calls [`begin_task`], [`check_task`] and
//! [`end_task`] inside its own acts.

mod accept;
mod drive;
mod lease;
mod pinned_plan;
mod plan;
mod show;
mod survey;
mod task;
#[cfg(test)]
pub(super) mod tests;

use async_recursion::async_recursion as boxed;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use kms_domain::{Campaign, CampaignAction, CampaignError, CampaignId, CampaignState, Principal};
use kms_proto::v1::{self, CampaignApproved, CampaignChanged, audit_record::Event};
use kms_store::{Reads, RowKind};

use self::pinned_plan::PlanLinks;
pub use self::{
    accept::PlanPlace,
    lease::{LeaseQuery, TaskLease},
    plan::{NewCampaign, days_before},
    show::{ReportQuery, Watch},
    task::{begin_task, check_task, drop_task, end_task, holds_task, pass_on_task, task_reads},
};
pub use super::Request;
use super::{owner::NewGroupVersion, principal::people::counted_person};
use crate::island::IslandContext;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Known, Permit, View};

/// The use cases of campaigns. Clones share the plans that were verified.
#[derive(Clone)]
pub struct CampaignService {
    island: Arc<IslandContext>,
    plans: Arc<Mutex<HashMap<CampaignId, PlanLinks>>>,
}

/// What an officer does with a campaign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CampaignChange {
    /// Approves the content with this digest.
    Approve {
        /// SHA-256 of the content that the approver has looked at.
        content_sha256: [u8; 32],
    },
    /// Begins the first wave.
    Start,
    /// Leases no more tasks.
    Pause {
        /// Why.
        reason: String,
    },
    /// Leases tasks again.
    Resume {
        /// Why.
        reason: String,
    },
    /// Ends the campaign.
    Abort {
        /// Why.
        reason: String,
    },
}

impl CampaignChange {
    const fn action(&self) -> Action {
        match self {
            Self::Approve { .. } => Action::ApproveCampaign,
            Self::Start => Action::StartCampaign,
            Self::Pause { .. } => Action::PauseCampaign,
            Self::Resume { .. } => Action::ResumeCampaign,
            Self::Abort { .. } => Action::AbortCampaign,
        }
    }

    /// Executes the change, and returns the event to record.
    fn apply(
        &self,
        campaign: &mut Campaign,
        principal: &Principal,
        failures: &kms_domain::WaveCounts,
        view: &View<'_, '_>,
    ) -> Result<Event, ServiceError> {
        let (id, now) = (bytes::Bytes::copy_from_slice(&campaign.id.octets()), view.now());
        let changed = |change: &str, reason: &str| {
            Event::CampaignChanged(CampaignChanged {
                campaign_id: id.clone(),
                change: change.to_owned(),
                reason: reason.to_owned(),
            })
        };
        let event = match self {
            Self::Approve { content_sha256 } => {
                // I6: a person approves, not a certificate.
                let person = counted_person(view, principal, "approveCampaign")?;
                campaign.approve(principal.id.clone(), person.clone(), content_sha256, now).map_err(refused)?;
                Event::CampaignApproved(CampaignApproved {
                    campaign_id: id.clone(),
                    person: person.as_str().to_owned(),
                    content_sha256: content_sha256.to_vec().into(),
                    complete: campaign.is_approved(),
                })
            }
            Self::Start => {
                campaign.start(now).map_err(refused)?;
                changed("started", "")
            }
            Self::Pause { reason } => {
                campaign.pause(reason.clone(), now).map_err(refused)?;
                changed("paused", reason)
            }
            Self::Resume { reason } => {
                campaign.resume(failures, now).map_err(refused)?;
                changed("resumed", reason)
            }
            Self::Abort { reason } => {
                campaign.abort(reason.clone(), now).map_err(refused)?;
                changed("aborted", reason)
            }
        };
        Ok(event)
    }
}

impl CampaignService {
    /// Campaigns of an island.
    pub fn new(island: Arc<IslandContext>) -> Self {
        Self { island, plans: Arc::default() }
    }

    /// Changes a campaign. A replay changes nothing.
    ///
    /// # Errors
    /// Not permitted, no such campaign, its state or the rules of approval (I6) forbid it, or the
    /// database cannot be reached.
    #[boxed]
    pub async fn change(
        &self,
        caller: &Caller,
        request: Request,
        id: CampaignId,
        change: CampaignChange,
    ) -> Result<v1::Campaign, ServiceError> {
        let action = change.action();
        self.island.require(caller, &action).await?;
        let counts = match &change {
            CampaignChange::Resume { .. } => self.wave_counts(&*self.load(id).await?).await?,
            _ => kms_domain::WaveCounts::default(),
        };
        let new_version = match &change {
            CampaignChange::Start => self.new_group_version(&*self.load(id).await?).await?,
            _ => None,
        };
        let act = ChangeCampaign { id, change, counts, new_version };
        let campaign = self.island.door.act(caller, request, act).await?.value;
        if campaign.state == CampaignState::Running {
            // The first tasks exist when the caller gets the answer. If that fails, the background
            // makes them.
            if let Err(error) = self.advance(id).await {
                tracing::warn!(%error, campaign = %id, "the campaign could not be driven; the next round tries again");
            }
        }
        self.message(&campaign).await
    }

    /// The version of the group's key that a campaign brings to all members: one for the whole
    /// campaign, made when it starts.
    async fn new_group_version(&self, campaign: &Campaign) -> Result<Option<NewGroupVersion>, ServiceError> {
        match (campaign.content.action, campaign.content.selection.group) {
            (CampaignAction::Rotate(key_type), Some(group)) if campaign.state == CampaignState::Approved => {
                NewGroupVersion::prepare(&self.island, group, campaign.content.setup, key_type).await
            }
            _ => Ok(None),
        }
    }

    /// A campaign as it is in the database now.
    async fn load(&self, id: CampaignId) -> Result<Arc<Campaign>, ServiceError> {
        let row = self.island.store.sealed(RowKind::Campaign, &id.octets()).await?.ok_or_else(|| missing(id))?;
        match self.island.committer.open_campaign(id, &row) {
            Ok(campaign) => Ok(campaign),
            // A row that was written between reading and opening verifies the second time. One that
            // was tampered with does not (I5).
            Err(_) => {
                let row =
                    self.island.store.sealed(RowKind::Campaign, &id.octets()).await?.ok_or_else(|| missing(id))?;
                self.island.committer.open_campaign(id, &row)
            }
        }
    }

    async fn load_all(&self) -> Result<Vec<Arc<Campaign>>, ServiceError> {
        all(&self.island).await
    }

    /// How many tasks of the present wave are in which state.
    async fn wave_counts(&self, campaign: &Campaign) -> Result<kms_domain::WaveCounts, ServiceError> {
        let mut counts = kms_domain::WaveCounts::default();
        for tally in self.island.store.task_tallies(campaign.id, Some(campaign.wave)).await? {
            counts.add(tally.state, tally.tasks);
        }
        Ok(counts)
    }
}

/// A change of a campaign, as one act.
struct ChangeCampaign {
    id: CampaignId,
    change: CampaignChange,
    /// The counts of the present wave, if the change needs them.
    counts: kms_domain::WaveCounts,
    new_version: Option<NewGroupVersion>,
}

impl Act for ChangeCampaign {
    type Answer = Arc<Campaign>;
    type Past = Known;

    fn name(&self) -> &'static str {
        self.change.action().name()
    }

    fn reads(&self) -> Reads {
        let mut sealed = vec![campaign_row(self.id)];
        sealed.extend(self.new_version.iter().map(|new| (RowKind::Group, new.group.0.to_be_bytes().to_vec())));
        Reads { sealed, ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&self.change.action(), &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Arc<Campaign>>, ServiceError> {
        let mut campaign = Arc::unwrap_or_clone(view.campaign(self.id)?.ok_or_else(|| missing(self.id))?);
        let event = self.change.apply(&mut campaign, permit.principal(), &self.counts, view)?;
        let entry = view.append(event);
        if let Some(new_version) = &self.new_version {
            new_version.begin(view, self.id)?;
        }
        view.put_campaign(campaign.clone())?;
        Ok(Decision::recorded(entry, Arc::new(campaign)))
    }

    fn again(&self, _: Known, _: &Permit, view: &mut View<'_, '_>) -> Result<Arc<Campaign>, ServiceError> {
        view.campaign(self.id)?.ok_or_else(|| missing(self.id))
    }
}

/// All campaigns, oldest first. A campaign whose row does not verify is left out; the scrub reports
/// it (I5).
async fn all(island: &IslandContext) -> Result<Vec<Arc<Campaign>>, ServiceError> {
    let mut campaigns = Vec::new();
    let mut after = None;
    loop {
        let page = island.store.sealed_page(RowKind::Campaign, after.as_deref(), PAGE).await?;
        let Some((last, _)) = page.last() else { return Ok(campaigns) };
        after = Some(last.clone());
        let opened = page
            .iter()
            .filter_map(|(id, row)| island.committer.open_campaign(CampaignId::from_octets(id).ok()?, row).ok());
        campaigns.extend(opened);
    }
}

/// The campaigns that run or are paused, whose tasks have not all ended.
///
/// # Errors
/// The database cannot be reached.
#[boxed]
pub async fn unfinished(island: &IslandContext) -> Result<Vec<CampaignId>, ServiceError> {
    let begun = |campaign: &Arc<Campaign>| matches!(campaign.state, CampaignState::Running | CampaignState::Paused);
    Ok(all(island).await?.iter().filter(|campaign| begun(campaign)).map(|campaign| campaign.id).collect())
}

/// The name of a campaign's row in the store.
pub fn campaign_row(id: CampaignId) -> (RowKind, Vec<u8>) {
    (RowKind::Campaign, id.octets().to_vec())
}

fn refused(error: CampaignError) -> ServiceError {
    let next_step = match &error {
        CampaignError::State { .. } => "check it with `kms campaign show`",
        CampaignError::Approval(error) => error.next_step(),
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}

fn missing(id: CampaignId) -> ServiceError {
    ServiceError::NotFound { what: format!("campaign {id}") }
}

const PAGE: u32 = 200;
