//! From a selection to a plan: one pass over the meters, in memory that does not grow with them.

use async_recursion::async_recursion as boxed;
use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::Arc,
};

use kms_domain::{
    Campaign, CampaignAction, CampaignContent, CampaignId, CampaignName, CampaignSelection, CampaignTerms,
    CounterDomainId, KeyType, Meter, Plan, PlanChain, SecuritySetupId, SharedExposures, SystemTitle, TaskStep,
    TaskWork, UnixMillis, WavePlanner,
};
use kms_proto::v1::{self, CampaignCreated, audit_record::Event};
use kms_store::{Assigned, MeterFilter, MeterRow, Reads, RowKind};

use super::{CampaignService, Request, campaign_row};
use crate::island::Island;
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
    /// Only these; empty: all that meet the conditions.
    pub named: Vec<SystemTitle>,
    /// Order, speed, and when it stops.
    pub terms: CampaignTerms,
}

impl CampaignService {
    /// Finds the meters and cuts the waves; with `commit` stores the draft. Its id is the
    /// request's.
    ///
    /// # Errors
    /// Not permitted, nothing is selected, the request id was used for something else, or the
    /// database is away.
    #[boxed]
    pub async fn create(
        &self,
        caller: &Caller,
        request: Request,
        mut new: NewCampaign,
        commit: bool,
    ) -> Result<v1::CreateCampaignResponse, ServiceError> {
        let principal = self.island.require(caller, &Action::CreateCampaign).await?;
        // I6: a campaign has a person behind it, who does not approve it.
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
            // The same request again: the campaign is there.
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

    /// The key of a group is rotated in one security setup: the one that is asked for, or the only
    /// one that the group has the key in.
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
                format!("group `{}` has a {key_type} in several security setups: name one", group.name),
            )),
        }
    }

    /// Writes the draft, or finds the one that the same request made.
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

    /// Looks at every meter once, a page at a time; the next page is read meanwhile. With `keep`
    /// the titles are kept in the store.
    pub(super) async fn survey(
        &self,
        id: CampaignId,
        new: &Arc<NewCampaign>,
        keep: bool,
    ) -> Result<Survey, ServiceError> {
        if keep {
            // What an earlier attempt left behind.
            self.island.store.delete_unused_chunks(id).await?;
        }
        let domains = Arc::new(self.domains(&new.selection).await?);
        let mut survey = Survey::new(id);
        let mut waiting = Vec::new();
        let mut source =
            Source { service: self, filter: columns(&new.selection), new, after: None, place: 0, unknown: 0 };
        let mut page = source.next().await?;
        while !page.is_empty() {
            let (island, asked, bounds) = (self.island.clone(), new.clone(), domains.clone());
            let looking = tokio::task::spawn_blocking(move || look(&island, &asked, &bounds, &page));
            let (looked, next) = tokio::join!(looking, source.next());
            for found in
                looked.map_err(|_| ServiceError::Internal("a page of meters could not be looked at".to_owned()))?
            {
                match found {
                    Look::Found(found) => {
                        survey.add(&found);
                        waiting.extend_from_slice(&found.title.octets());
                    }
                    Look::LeftOut => survey.preview.left_out += u64::from(!new.named.is_empty()),
                    Look::Refused => survey.preview.refused_rows += 1,
                }
            }
            page = next?;
            while waiting.len() >= PlanChain::CHUNK * 8 {
                let rest = waiting.split_off(PlanChain::CHUNK * 8);
                self.keep(&mut survey, id, mem::replace(&mut waiting, rest), keep).await?;
            }
        }
        if !waiting.is_empty() {
            self.keep(&mut survey, id, waiting, keep).await?;
        }
        survey.preview.left_out += source.unknown;
        survey.finish(&new.terms);
        Ok(survey)
    }

    /// What is known of each key value that several slots share, where the selection asks for it:
    /// duplicate keys are few.
    async fn domains(&self, selection: &CampaignSelection) -> Result<Domains, ServiceError> {
        let (mut domains, mut after) = (Domains::default(), None);
        while selection.counter_used.is_some() || selection.exposed_to.is_some() || selection.exposed_by.is_some() {
            let page = self.island.store.sealed_page(RowKind::CounterDomain, after.as_deref(), PAGE).await?;
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            for (id, row) in &page {
                let Ok(id) = id.as_slice().try_into().map(CounterDomainId) else { continue };
                if let Ok(domain) = self.island.committer.open_domain(id, row) {
                    domains.bounds.insert(id, domain.counters.highest_bound());
                    domains.exposures.insert(id, domain.exposures.clone());
                }
            }
        }
        Ok(domains)
    }

    async fn keep(&self, survey: &mut Survey, id: CampaignId, titles: Vec<u8>, keep: bool) -> Result<(), ServiceError> {
        if keep {
            self.island.store.put_campaign_chunk(id, survey.plan.chunks, &titles).await?;
        }
        survey.plan.chunks += 1;
        survey.chain = survey.chain.link(&titles);
        Ok(())
    }
}

/// Key values that several slots share: how far their counters are used, and who could know them.
#[derive(Default)]
struct Domains {
    bounds: HashMap<CounterDomainId, u64>,
    exposures: SharedExposures,
}

/// Where pages of meters come from: those that were named, or all that the search columns find.
struct Source<'a> {
    service: &'a CampaignService,
    filter: MeterFilter,
    new: &'a Arc<NewCampaign>,
    after: Option<SystemTitle>,
    place: usize,
    /// Named meters that have no row.
    unknown: u64,
}

impl Source<'_> {
    async fn next(&mut self) -> Result<Vec<MeterRow>, ServiceError> {
        let store = &self.service.island.store;
        if self.new.named.is_empty() {
            let page = store.meter_page(&self.filter, self.after, PAGE).await?;
            self.after = page.last().map(|row| row.title).or(self.after);
            return Ok(page);
        }
        // A page of names may have no rows at all; the next one may.
        while let Some(titles) = self.new.named.chunks(usize::try_from(PAGE).unwrap_or(usize::MAX)).nth(self.place) {
            self.place += 1;
            let rows = store.meters(titles).await?;
            self.unknown += titles.len().saturating_sub(rows.len()) as u64;
            if !rows.is_empty() {
                return Ok(rows);
            }
        }
        Ok(Vec::new())
    }
}

/// What a survey found.
pub(super) struct Survey {
    pub(super) preview: v1::CampaignPreview,
    pub(super) plan: Plan,
    planner: WavePlanner,
    chain: PlanChain,
    manufacturers: BTreeMap<String, u64>,
    profiles: BTreeMap<String, u64>,
    head_ends: BTreeMap<String, u64>,
}

impl Survey {
    fn new(id: CampaignId) -> Self {
        Self {
            preview: v1::CampaignPreview::default(),
            plan: Plan { meters: 0, chunks: 0, digest: [0; 32], waves: Vec::new() },
            planner: WavePlanner::new(id),
            chain: PlanChain::new(id),
            manufacturers: BTreeMap::new(),
            profiles: BTreeMap::new(),
            head_ends: BTreeMap::new(),
        }
    }

    fn add(&mut self, found: &Found) {
        self.planner.add(found.title);
        count(&mut self.manufacturers, &found.manufacturer);
        count(&mut self.profiles, &found.profile);
        count(&mut self.head_ends, &found.head_end);
        self.preview.in_doubt += u64::from(found.in_doubt);
        self.preview.not_reachable += u64::from(found.head_end.is_empty());
        if self.preview.sample.len() < SAMPLE {
            self.preview.sample.push(found.title.octets().to_vec().into());
        }
    }

    fn finish(&mut self, terms: &CampaignTerms) {
        self.plan.meters = self.planner.total();
        self.plan.digest = self.chain.digest();
        self.plan.waves = self.planner.waves(terms.canary, &terms.waves);
        let named = |counts: &mut BTreeMap<String, u64>| {
            mem::take(counts).into_iter().map(|(name, count)| v1::NamedCount { name, count }).collect()
        };
        self.preview.meters = self.plan.meters;
        self.preview.waves = self.plan.waves.iter().map(|wave| wave.meters).collect();
        self.preview.manufacturers = named(&mut self.manufacturers);
        self.preview.device_profiles = named(&mut self.profiles);
        self.preview.head_ends = named(&mut self.head_ends);
    }
}

enum Look {
    Found(Found),
    LeftOut,
    Refused,
}

struct Found {
    title: SystemTitle,
    manufacturer: String,
    profile: String,
    head_end: String,
    in_doubt: bool,
}

/// I5: the search columns found them, the sealed rows decide.
fn look(island: &Island, new: &NewCampaign, domains: &Domains, page: &[MeterRow]) -> Vec<Look> {
    page.iter()
        .map(|row| {
            let Ok(meter) = island.committer.open_meter(row.title, &row.row) else { return Look::Refused };
            let step = new.action.first_step(&meter, new.setup);
            let taken = step.is_none_or(|step| is_taken(island, &meter, step));
            let counted = || {
                new.selection
                    .matches_counters(&meter, new.action, new.setup, |domain| domains.bounds.get(&domain).copied())
            };
            if !taken || !new.selection.matches_knowing(&meter, new.action, new.setup, &domains.exposures) || !counted()
            {
                return Look::LeftOut;
            }
            let in_doubt = step.is_some_and(|step| meter.slots.of_setup(step.setup).any(kms_domain::Slot::in_doubt));
            Look::Found(Found {
                title: row.title,
                manufacturer: meter.class.vendor.to_string(),
                profile: meter.class.profile.to_string(),
                head_end: meter.class.head_end.as_ref().map(ToString::to_string).unwrap_or_default(),
                in_doubt,
            })
        })
        .collect()
}

fn is_taken(island: &Island, meter: &Meter, step: TaskStep) -> bool {
    let TaskWork::Rotate(key_type) = step.work else { return true };
    takes_over_the_air(island, meter, step.setup, key_type)
}

/// Whether the meter takes the key by `key_transfer`, as its device profile says.
pub(super) fn takes_over_the_air(island: &Island, meter: &Meter, setup: SecuritySetupId, key_type: KeyType) -> bool {
    let of_profile = || island.profiles.get(&meter.class.profile)?.key(setup, key_type)?.key_id;
    key_type.standard_key_id().or_else(of_profile).is_some()
}

/// The search columns that find them.
fn columns(selection: &CampaignSelection) -> MeterFilter {
    MeterFilter {
        vendor: selection.vendor.map(|vendor| vendor.to_string()),
        profile: selection.profile.as_ref().map(ToString::to_string),
        status: None,
        head_end: selection.head_end.as_ref().map_or(Assigned::Any, |head_end| Assigned::To(head_end.to_string())),
        batch: selection.batch.clone().filter(|batch| !batch.is_empty()),
        group: selection.group.map(|group| group.0),
    }
}

fn count(counts: &mut BTreeMap<String, u64>, name: &str) {
    match counts.get_mut(name) {
        Some(count) => *count += 1,
        None => {
            counts.insert(name.to_owned(), 1);
        }
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
    /// None: the campaign is known to be drafted already.
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

const PAGE: u32 = 4_000;
const SAMPLE: usize = 20;
