//! Creating a campaign: its plan is surveyed and pinned in a draft.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{
    Campaign, CampaignAction, CampaignContent, CampaignId, CampaignName, CampaignSelection, CampaignTerms, Plan,
    SecuritySetupId, SystemTitle, UnixMillis,
};
use kms_proto::v1::{self, CampaignCreated, audit_record::Event};
use kms_store::{Reads, RowKind};

use super::{CampaignService, Request, campaign_row};
use crate::principal::people::counted_person;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Known, Permit, View, used_for_another};

/// What an officer asks for.
#[derive(Clone, Debug)]
pub struct NewCampaign {
    /// The name.
    pub name: CampaignName,
    /// What is done to each meter.
    pub action: CampaignAction,
    /// In which security setup.
    pub setup: Option<SecuritySetupId>,
    /// Which meters.
    pub selection: CampaignSelection,
    /// Only these meters; empty: all that meet the conditions.
    pub named: Vec<SystemTitle>,
    /// Order, speed, and when the campaign stops.
    pub terms: CampaignTerms,
}

impl CampaignService {
    /// Finds the meters and divides them into waves. With `commit` it stores the draft, whose id is
    /// the request's.
    ///
    /// # Errors
    /// Not permitted, nothing is selected, the request id was used for another request, or the
    /// database cannot be reached.
    #[boxed]
    pub async fn create(
        &self,
        caller: &Caller,
        request: Request,
        mut new: NewCampaign,
        commit: bool,
    ) -> Result<v1::CreateCampaignResponse, ServiceError> {
        let principal = self.island.require(caller, &Action::CreateCampaign).await?;
        // I6: a campaign has a requester who is a person, and who does not approve it.
        if principal.person.is_none() {
            return Err(ServiceError::denied(Action::CreateCampaign.name()));
        }
        new.named.sort_unstable_by_key(|title| title.as_i64());
        new.named.dedup();
        new.selection.named = new.named.len() as u64;
        new.selection.check().map_err(ServiceError::parse("plan.selection"))?;
        new.terms.check().map_err(ServiceError::parse("plan.terms"))?;
        self.pin_group_setup(&mut new).await?;
        let id = CampaignId::from_octets(&request.id.octets()).map_err(ServiceError::parse("request_id"))?;
        let new = Arc::new(new);
        let stored = self.island.store.sealed(RowKind::Campaign, &id.octets()).await?.is_some();
        let survey = if stored { None } else { Some(self.survey(id, &new, commit).await?) };
        let Some(survey) = survey.filter(|_| commit || !stored) else {
            // A replay: the campaign exists.
            let campaign = self.draft(caller, request, id, new, None).await?;
            return Ok(v1::CreateCampaignResponse { preview: None, campaign: Some(self.message(&campaign).await?) });
        };
        let preview = survey.preview;
        if !commit {
            return Ok(v1::CreateCampaignResponse { preview: Some(preview), campaign: None });
        }
        let campaign = match self.draft(caller, request, id, new, Some(survey.plan)).await {
            Ok(campaign) => campaign,
            Err(error) => {
                self.island.store.delete_unused_chunks(id).await?;
                return Err(error);
            }
        };
        Ok(v1::CreateCampaignResponse { preview: Some(preview), campaign: Some(self.message(&campaign).await?) })
    }

    /// A group's key is rotated in one security setup: the one that is asked for, or the only one
    /// in which the group has the key.
    async fn pin_group_setup(&self, new: &mut NewCampaign) -> Result<(), ServiceError> {
        let (CampaignAction::Rotate(key_type), Some(id), None) = (new.action, new.selection.group, new.setup) else {
            return Ok(());
        };
        let Some((group, _)) = self.island.group(id).await? else { return Ok(()) };
        let setups: Vec<SecuritySetupId> =
            group.slots.iter().filter(|slot| slot.key_type() == key_type).map(kms_domain::Slot::setup).collect();
        match setups.as_slice() {
            [] => Ok(()),
            [setup] => {
                new.setup = Some(*setup);
                Ok(())
            }
            _ => Err(ServiceError::invalid(
                "plan.security_setup",
                format!("group `{}` has a {key_type} in several security setups: name one of them", group.name),
            )),
        }
    }

    /// Writes the draft, or finds the draft that the same request made.
    pub(super) async fn draft(
        &self,
        caller: &Caller,
        request: Request,
        id: CampaignId,
        new: Arc<NewCampaign>,
        plan: Option<Plan>,
    ) -> Result<Arc<Campaign>, ServiceError> {
        Ok(self.island.door.act(caller, request, Draft { id, new, plan }).await?.value)
    }
}

/// The moment before which a key is older than so many days.
pub fn days_before(days: u32, now: UnixMillis) -> UnixMillis {
    now.after(-i64::from(days) * 24 * 3_600 * 1_000)
}

/// The draft of a campaign, with its plan.
struct Draft {
    id: CampaignId,
    new: Arc<NewCampaign>,
    /// `None` if the campaign was drafted already.
    plan: Option<Plan>,
}

impl Act for Draft {
    type Answer = Arc<Campaign>;
    type Past = Known;

    fn name(&self) -> &'static str {
        Action::CreateCampaign.name()
    }

    fn reads(&self) -> Reads {
        Reads { sealed: vec![campaign_row(self.id)], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&Action::CreateCampaign, &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Arc<Campaign>>, ServiceError> {
        let (id, new) = (self.id, &self.new);
        let (None, Some(plan)) = (view.campaign(id)?, self.plan.clone()) else { return Err(used_for_another()) };
        let content = CampaignContent {
            name: new.name.clone(),
            action: new.action,
            setup: new.setup,
            selection: new.selection.clone(),
            terms: new.terms.clone(),
            requester: permit.principal().id.clone(),
            requester_person: counted_person(view, permit.principal(), self.name())?,
            created: view.now(),
            plan,
        };
        let campaign = Campaign::draft(id, content).map_err(ServiceError::parse("plan.selection"))?;
        let entry = view.append(Event::CampaignCreated(CampaignCreated {
            campaign_id: id.octets().to_vec().into(),
            name: new.name.to_string(),
            action: new.action.to_string(),
            meters: campaign.content.plan.meters,
            content_sha256: campaign.content_digest().to_vec().into(),
        }));
        view.put_campaign(campaign.clone())?;
        Ok(Decision::recorded(entry, Arc::new(campaign)))
    }

    fn again(&self, _: Known, _: &Permit, view: &mut View<'_, '_>) -> Result<Arc<Campaign>, ServiceError> {
        view.campaign(self.id)?.ok_or_else(used_for_another)
    }
}
