//! The acceptance report of a campaign: for each meter of the plan, which keys only the utility
//! knows, and what remedies the others.

use async_recursion::async_recursion as boxed;
use kms_domain::{
    CampaignId, CounterDomainId, KeyAcceptance, KeyVersion, Meter, Party, Remedy, SecuritySetupId, SharedExposures,
    Slot, SystemTitle,
};
use kms_proto::v1;
use kms_store::RowKind;

use super::{CampaignService, pinned_plan::titles_of, survey::takes_over_the_air};
use crate::island::IslandContext;
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;

/// A place in a plan: where a page of the report begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanPlace {
    /// The chunk of the plan.
    pub chunk: u64,
    /// The meter in the chunk.
    pub meter: usize,
}

impl CampaignService {
    /// The present acceptance of the keys of up to `limit` meters of the plan, and where the next
    /// page begins.
    ///
    /// # Errors
    /// Not permitted, no such campaign, a plan that was changed (I5), or the database cannot be
    /// reached.
    #[boxed]
    pub async fn acceptance(
        &self,
        caller: &Caller,
        id: CampaignId,
        from: PlanPlace,
        limit: usize,
    ) -> Result<(Vec<v1::MeterAcceptance>, Option<PlanPlace>), ServiceError> {
        self.island.require(caller, &Action::ListCampaigns).await?;
        let campaign = self.load(id).await?;
        let changed = || ServiceError::FailedPrecondition {
            reason: "the plan is not the one that was approved: it was changed in the database (I5)".to_owned(),
            next_step: "run `kms audit scrub` and call the security officers".to_owned(),
        };
        let links = self.verified(&campaign).await?.ok_or_else(changed)?;
        let (mut titles, mut place) = (Vec::new(), from);
        while place.chunk < campaign.content.plan.chunks && titles.len() < limit {
            let chunk = self.island.store.campaign_chunk(id, place.chunk).await?.unwrap_or_default();
            if !links.fits(place.chunk, &chunk) {
                return Err(changed());
            }
            let members: Vec<SystemTitle> = titles_of(&chunk).collect();
            let taken: Vec<SystemTitle> =
                members.iter().skip(place.meter).take(limit - titles.len()).copied().collect();
            place.meter += taken.len();
            titles.extend(taken);
            if place.meter >= members.len() {
                place = PlanPlace { chunk: place.chunk + 1, meter: 0 };
            }
        }
        let next = Some(place).filter(|place| place.chunk < campaign.content.plan.chunks);
        let rows = self.island.store.meters(&titles).await?;
        let mut found = std::collections::HashMap::with_capacity(rows.len());
        for row in &rows {
            // A row that was written between reading and opening verifies the second time. One that
            // was tampered with does not (I5).
            let meter = match self.island.committer.open_meter(row.title, &row.row) {
                Ok(meter) => Some(meter),
                Err(_) => self.island.meter(row.title).await.ok().flatten(),
            };
            found.insert(row.title, meter);
        }
        let shared = self.shared_exposures(found.values().flatten().map(AsRef::as_ref)).await?;
        let message = |title: SystemTitle| match found.get(&title) {
            Some(Some(meter)) => message(&self.island, meter, campaign.content.setup, &shared),
            Some(None) => problem(title, "its sealed row is refused (I5): run `kms audit scrub`"),
            None => problem(title, "it is unknown"),
        };
        Ok((titles.into_iter().map(message).collect(), next))
    }

    /// Who could know the keys of these meters whose values other slots have too. Such keys are
    /// rare.
    async fn shared_exposures(&self, meters: impl Iterator<Item = &Meter>) -> Result<SharedExposures, ServiceError> {
        let versions = meters.flat_map(|meter| meter.slots.iter()).flat_map(Slot::versions);
        let ids: std::collections::HashSet<CounterDomainId> = versions.filter_map(KeyVersion::domain).collect();
        let mut shared = SharedExposures::with_capacity(ids.len());
        for id in ids {
            if let Some(row) = self.island.store.sealed(RowKind::CounterDomain, &id.0).await? {
                shared.insert(id, self.island.committer.open_domain(id, &row)?.exposures.clone());
            }
        }
        Ok(shared)
    }
}

fn message(
    island: &IslandContext,
    meter: &Meter,
    setup: Option<SecuritySetupId>,
    shared: &SharedExposures,
) -> v1::MeterAcceptance {
    let keys =
        meter.acceptance_knowing(setup, shared, |setup, key_type| takes_over_the_air(island, meter, setup, key_type));
    v1::MeterAcceptance {
        meter: meter.title.octets().to_vec().into(),
        manufacturer: meter.class.vendor.to_string(),
        batch: meter.batch.clone(),
        security_suite: meter.suite.number().into(),
        keys: keys.iter().map(key_message).collect(),
        problem: String::new(),
    }
}

fn key_message(key: &KeyAcceptance) -> v1::KeyAcceptance {
    v1::KeyAcceptance {
        security_setup: key.setup.obis().to_vec().into(),
        key_type: key.key_type.to_string(),
        version: key.version.map_or(0, kms_domain::KeyVersionNumber::number),
        evidence: key.evidence.name().to_owned(),
        verdict: key.verdict.name().to_owned(),
        known_to: key.known_to.iter().map(Party::to_string).collect(),
        remedy: key.remedy.map(Remedy::name).unwrap_or_default().to_owned(),
    }
}

fn problem(title: SystemTitle, problem: &str) -> v1::MeterAcceptance {
    v1::MeterAcceptance {
        meter: title.octets().to_vec().into(),
        problem: problem.to_owned(),
        ..v1::MeterAcceptance::default()
    }
}
