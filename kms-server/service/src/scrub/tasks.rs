//! Compares tasks of campaigns with their marks and with the approved plans (I5, I6). Tasks are not
//! sealed rows with a record of each write, because a fleet has millions of them. So an edited task
//! shows here, but an older row of the same task does not.

use std::collections::HashMap;

use kms_domain::{Campaign, Meter, SystemTitle};
use kms_proto::v1::ScrubFinding;
use kms_store::{RowKind, TaskFilter, TaskRow};

use super::finding::finding;
use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// The walk over the tasks of all campaigns.
pub(super) struct Tasks<'a> {
    island: &'a IslandContext,
    after_campaign: Option<Vec<u8>>,
    campaign: Option<Campaign>,
    after_meter: Option<SystemTitle>,
    findings: Vec<ScrubFinding>,
}

impl<'a> Tasks<'a> {
    pub(super) const fn new(island: &'a IslandContext) -> Self {
        Self { island, after_campaign: None, campaign: None, after_meter: None, findings: Vec::new() }
    }

    /// Checks one more page; false after the last page, and when the number of findings has reached
    /// its limit.
    pub(super) async fn step(&mut self) -> Result<bool, ServiceError> {
        if self.findings.len() >= MOST_FINDINGS {
            return Ok(false);
        }
        let Some(campaign) = &self.campaign else { return self.next_campaign().await };
        let page = self.island.store.task_page(campaign.id, TaskFilter::All, self.after_meter, PAGE).await?;
        let Some(last) = page.last() else {
            self.campaign = None;
            return Ok(true);
        };
        self.after_meter = Some(last.key.meter);
        let former = page.iter().filter(|row| !self.is_sealed(row)).map(|row| row.key.meter).collect::<Vec<_>>();
        let meters: HashMap<SystemTitle, _> =
            self.island.store.meters(&former).await?.into_iter().map(|row| (row.title, row.row)).collect();
        for row in page {
            let meter = meters
                .get(&row.key.meter)
                .and_then(|meter| self.island.committer.open_meter(row.key.meter, meter).ok());
            if let Some(why) = self.fault(campaign, &row, meter.as_deref()) {
                let name = (RowKind::Campaign.number(), campaign.id.octets().to_vec().into());
                self.findings.push(finding(&name, "edited", format!("its task for meter {}: {why}", row.key.meter)));
            }
        }
        Ok(true)
    }

    pub(super) fn finish(self) -> Vec<ScrubFinding> {
        self.findings
    }

    /// If a campaign's own row does not verify, the walk over sealed rows reports it.
    async fn next_campaign(&mut self) -> Result<bool, ServiceError> {
        let page = self.island.store.sealed_page(RowKind::Campaign, self.after_campaign.as_deref(), 1).await?;
        let Some((id, row)) = page.into_iter().next() else { return Ok(false) };
        let campaign = kms_domain::CampaignId::from_octets(&id)
            .ok()
            .and_then(|id| self.island.committer.open_campaign(id, &row).ok());
        (self.campaign, self.after_campaign, self.after_meter) =
            (campaign.map(|campaign| (*campaign).clone()), Some(id), None);
        Ok(true)
    }

    fn is_sealed(&self, row: &TaskRow) -> bool {
        self.island.committer.seal_keys().accept(&row.mark, |key| row.mark_by(key))
    }

    /// What is wrong with a row, by the rules of the transaction that uses it. `meter` is only
    /// needed for marks of earlier servers.
    fn fault(&self, campaign: &Campaign, row: &TaskRow, meter: Option<&Meter>) -> Option<&'static str> {
        let sealed = self.is_sealed(row);
        if !sealed && !self.island.committer.seal_keys().accept(&row.mark, |key| row.former_mark_by(key)) {
            return Some("its mark does not fit");
        }
        let step = &row.task.step;
        let planned = row.task.state.is_final()
            || if sealed { campaign.plans(step) } else { meter.is_some_and(|meter| campaign.plans_for(meter, step)) };
        (!planned).then_some("it is to do what was not approved")
    }
}

const MOST_FINDINGS: usize = 10_000;
/// Rows of one page.
const PAGE: u32 = 1_000;
