//! `kms campaign report`: the figures of a campaign, page by page, as text and as JSON.

use bytes::Bytes;
use kms_client::Connection;
use kms_domain::CampaignId;
use kms_proto::v1 as proto;

use super::{
    acceptance::Acceptance,
    watch::waves_table,
    wording::{campaign_text, tasks_text},
};
use crate::{
    commands::{PAGE, octets},
    failure::Failure,
    json,
    output::{Rows, number},
    progress::waiting,
};

/// The report, with up to `limit` tasks (0: all) in each of the states.
pub(super) async fn report(
    connection: &Connection,
    campaign: CampaignId,
    states: &[&str],
    in_doubt: bool,
    limit: usize,
) -> Result<proto::CampaignReport, Failure> {
    let mut client = connection.campaigns();
    let mut whole: Option<proto::CampaignReport> = None;
    for state in states {
        let (mut page_token, mut taken) = (Bytes::new(), 0);
        loop {
            let wanted = if limit == 0 { PAGE } else { PAGE.min(limit - taken) };
            let request = proto::ReportCampaignRequest {
                campaign_id: octets(campaign.octets()),
                state: (*state).to_owned(),
                in_doubt,
                page_size: wanted as u32,
                page_token,
            };
            let page = waiting("reading the report", client.report_campaign(request)).await?.into_inner();
            taken += page.tasks.len();
            page_token = page.next_page_token.clone();
            match &mut whole {
                Some(whole) => whole.tasks.extend(page.tasks),
                None => whole = Some(page),
            }
            if page_token.is_empty() || (limit > 0 && taken >= limit) {
                break;
            }
        }
        if let Some(whole) = &mut whole {
            whole.next_page_token = page_token;
        }
    }
    Ok(whole.unwrap_or_default())
}

pub(super) fn report_text(report: &proto::CampaignReport) -> String {
    let Some(progress) = &report.progress else { return "no report\n".to_owned() };
    let campaign = progress.campaign.as_ref().map(campaign_text).unwrap_or_default();
    let mut result = format!("{campaign}\n{}", waves_table(progress));
    let mut outcomes =
        Rows::new(&["wave", "manufacturer", "state", "meters", "reason"]).numbers(&[0, 3]).sentences(&[4]);
    for outcome in &report.outcomes {
        outcomes.row([
            outcome.wave.to_string(),
            outcome.manufacturer.clone(),
            outcome.state.clone(),
            number(outcome.count),
            outcome.reason.clone(),
        ]);
    }
    result.push_str(&format!("\n{}", outcomes.text_or("no meter was tried yet")));
    if !report.tasks.is_empty() {
        result.push_str(&format!("\n{}", tasks_text(&report.tasks)));
    }
    if !report.next_page_token.is_empty() {
        result.push_str("\nthere are more: --limit 0 shows all\n");
    }
    result
}

pub(super) fn report_json(report: &proto::CampaignReport, acceptance: Option<&Acceptance>) -> serde_json::Value {
    let mut report = json::message("CampaignReport", report);
    if let (Some(fields), Some(acceptance)) = (report.as_object_mut(), acceptance) {
        fields.insert("acceptance".to_owned(), acceptance.json());
    }
    report
}

pub(super) fn is_take_over(report: &proto::CampaignReport) -> bool {
    let plan = report
        .progress
        .as_ref()
        .and_then(|progress| progress.campaign.as_ref())
        .and_then(|campaign| campaign.plan.as_ref());
    plan.is_some_and(|plan| plan.action() == proto::CampaignAction::TakeOver)
}
