//! The survey of all meters for a campaign: which meters a selection finds. It reads them once, and
//! its memory does not grow with their number.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::Arc,
};

use kms_domain::{
    CampaignId, CampaignSelection, CampaignTerms, CounterDomainId, KeyType, Meter, Plan, PlanChain, SecuritySetupId,
    SharedExposures, Slot, SystemTitle, TaskStep, TaskWork, WavePlanner,
};
use kms_proto::v1;
use kms_store::{Assigned, MeterFilter, MeterRow, RowKind};

use super::{CampaignService, plan::NewCampaign};
use crate::island::IslandContext;
use kms_base::error::ServiceError;

impl CampaignService {
    /// Examines every meter once, in pages. The next page is read meanwhile. With `keep` the titles
    /// are stored.
    pub(super) async fn survey(
        &self,
        id: CampaignId,
        new: &Arc<NewCampaign>,
        keep: bool,
    ) -> Result<Survey, ServiceError> {
        if keep {
            // An earlier attempt may have left chunks.
            self.island.store.delete_unused_chunks(id).await?;
        }
        let domains = Arc::new(self.domains(&new.selection).await?);
        let mut survey = Survey::new(id);
        let mut waiting = Vec::new();
        let mut source =
            MeterSource { service: self, filter: columns(&new.selection), new, after: None, place: 0, unknown: 0 };
        let mut page = source.next().await?;
        while !page.is_empty() {
            let (island, asked, bounds) = (self.island.clone(), new.clone(), domains.clone());
            let looking = tokio::task::spawn_blocking(move || look(&island, &asked, &bounds, &page));
            let (looked, next) = tokio::join!(looking, source.next());
            for found in
                looked.map_err(|_| ServiceError::Internal("a page of meters could not be examined".to_owned()))?
            {
                match found {
                    Examined::Found(found) => {
                        survey.add(&found);
                        waiting.extend_from_slice(&found.title.octets());
                    }
                    Examined::LeftOut => survey.preview.left_out += u64::from(!new.named.is_empty()),
                    Examined::Refused => survey.preview.refused_rows += 1,
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

    /// The key values that several slots have, if the selection asks for them. Such values are
    /// rare.
    async fn domains(&self, selection: &CampaignSelection) -> Result<SharedValues, ServiceError> {
        let (mut domains, mut after) = (SharedValues::default(), None);
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

/// Key values that several slots have: how far their counters are used, and who could know them.
#[derive(Default)]
struct SharedValues {
    bounds: HashMap<CounterDomainId, u64>,
    exposures: SharedExposures,
}

/// The source of pages of meters: those that were named, or all that the search columns find.
struct MeterSource<'a> {
    service: &'a CampaignService,
    filter: MeterFilter,
    new: &'a Arc<NewCampaign>,
    after: Option<SystemTitle>,
    place: usize,
    /// Named meters that have no row.
    unknown: u64,
}

impl MeterSource<'_> {
    async fn next(&mut self) -> Result<Vec<MeterRow>, ServiceError> {
        let store = &self.service.island.store;
        if self.new.named.is_empty() {
            let page = store.meter_page(&self.filter, self.after, PAGE).await?;
            self.after = page.last().map(|row| row.title).or(self.after);
            return Ok(page);
        }
        // A page of names may have no rows, and the next one may have some.
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

/// The result of a survey.
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

enum Examined {
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

/// I5: the search columns found these meters, and the sealed rows decide.
fn look(island: &IslandContext, new: &NewCampaign, domains: &SharedValues, page: &[MeterRow]) -> Vec<Examined> {
    page.iter()
        .map(|row| {
            let Ok(meter) = island.committer.open_meter(row.title, &row.row) else { return Examined::Refused };
            let step = new.action.first_step(&meter, new.setup);
            let taken = step.is_none_or(|step| is_taken(island, &meter, step));
            let counted = || {
                new.selection
                    .matches_counters(&meter, new.action, new.setup, |domain| domains.bounds.get(&domain).copied())
            };
            if !taken || !new.selection.matches_knowing(&meter, new.action, new.setup, &domains.exposures) || !counted()
            {
                return Examined::LeftOut;
            }
            let in_doubt = step.is_some_and(|step| meter.slots.of_setup(step.setup).any(Slot::in_doubt));
            Examined::Found(Found {
                title: row.title,
                manufacturer: meter.class.vendor.to_string(),
                profile: meter.class.profile.to_string(),
                head_end: meter.class.head_end.as_ref().map(ToString::to_string).unwrap_or_default(),
                in_doubt,
            })
        })
        .collect()
}

fn is_taken(island: &IslandContext, meter: &Meter, step: TaskStep) -> bool {
    let TaskWork::Rotate(key_type) = step.work else { return true };
    takes_over_the_air(island, meter, step.setup, key_type)
}

/// Whether the meter accepts the key by `key_transfer`, as its device profile says.
pub(super) fn takes_over_the_air(
    island: &IslandContext,
    meter: &Meter,
    setup: SecuritySetupId,
    key_type: KeyType,
) -> bool {
    let of_profile = || island.profiles.get(&meter.class.profile)?.key(setup, key_type)?.key_id;
    key_type.standard_key_id().or_else(of_profile).is_some()
}

/// The search columns that find the meters of a selection.
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

const PAGE: u32 = 4_000;
const SAMPLE: usize = 20;
