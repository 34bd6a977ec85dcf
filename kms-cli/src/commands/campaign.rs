//! `kms campaign`.

mod acceptance;
mod page;
mod report;
mod watch;
mod wording;

use bytes::Bytes;
use kms_client::Connection;
use kms_domain::CampaignId;
use kms_proto::v1 as proto;
use serde_json::json;

use self::{
    acceptance::Acceptance,
    report::{is_take_over, report, report_json, report_text},
    wording::{action, campaign_text, name, preview_text, tasks_text},
};
use super::{PAGE, confirm, octets, read_titles, request_id, text, write};
use crate::{
    arguments::{
        campaign::{ActionArguments, CampaignCommand, CreateCampaign, SelectionArguments, TermsArguments},
        shared::Sure,
    },
    context::Context,
    failure::Failure,
    json, output,
    output::{Rows, number, plural},
    progress::waiting,
};

pub(crate) async fn run(command: CampaignCommand, context: &Context) -> Result<(), Failure> {
    match command {
        CampaignCommand::Create(arguments) => create(*arguments, context).await,
        CampaignCommand::List { limit } => list(limit.limit, context).await,
        CampaignCommand::Show { campaign } => {
            let connection = context.connect().await?;
            show_campaign(&load(&connection, campaign.campaign).await?, context);
            Ok(())
        }
        CampaignCommand::Approve { campaign, content, sure } => {
            approve(campaign.campaign, content, &sure, context).await
        }
        CampaignCommand::Start { campaign, sure } => {
            let connection = context.connect().await?;
            let known = load(&connection, campaign.campaign).await?;
            confirm(
                &format!("`{}` will be started: {} on {}", name(&known), action(&known), plural(known.meters, "meter")),
                &sure,
            )?;
            let request = change(campaign.campaign, String::new());
            let started = waiting("starting", connection.campaigns().start_campaign(request)).await?.into_inner();
            show_campaign(&started, context);
            Ok(())
        }
        CampaignCommand::Pause { campaign, why } => {
            let mut client = context.connect().await?.campaigns();
            let paused =
                waiting("pausing", client.pause_campaign(change(campaign.campaign, why.reason))).await?.into_inner();
            show_campaign(&paused, context);
            Ok(())
        }
        CampaignCommand::Resume { campaign, why, sure } => {
            let connection = context.connect().await?;
            let known = load(&connection, campaign.campaign).await?;
            confirm(&format!("`{}` will resume, although: {}", name(&known), known.reason), &sure)?;
            let resumed =
                waiting("resuming", connection.campaigns().resume_campaign(change(campaign.campaign, why.reason)))
                    .await?
                    .into_inner();
            show_campaign(&resumed, context);
            Ok(())
        }
        CampaignCommand::Abort { campaign, why, sure } => abort(campaign.campaign, why.reason, &sure, context).await,
        CampaignCommand::Watch { campaign, once } => watch::run(campaign.campaign, once, context).await,
        CampaignCommand::Report { campaign, html, json, tasks, acceptance, limit } => {
            let connection = context.connect().await?;
            let states = tasks.map_or_else(|| vec!["failed", "in-doubt"], |state| vec![state.name()]);
            let report = report(&connection, campaign.campaign, &states, false, limit.limit).await?;
            // A take-over is accepted by its result.
            let acceptance = if acceptance || is_take_over(&report) {
                Some(Acceptance::read(&connection, campaign.campaign, limit.limit).await?)
            } else {
                None
            };
            if let Some(path) = &html {
                write(path, false, page::html(&report, acceptance.as_ref()).as_bytes())?;
            }
            let as_json = || report_json(&report, acceptance.as_ref());
            if let Some(path) = &json {
                write(path, false, format!("{:#}\n", as_json()).as_bytes())?;
            }
            if html.is_none() && json.is_none() {
                context.output.show(as_json, || {
                    let accepted =
                        acceptance.as_ref().map(|acceptance| format!("\n{}", acceptance.text())).unwrap_or_default();
                    format!("{}{accepted}", report_text(&report))
                });
            } else {
                for path in [html, json].into_iter().flatten() {
                    eprintln!("written: {}", path.display());
                }
            }
            Ok(())
        }
    }
}

async fn create(arguments: CreateCampaign, context: &Context) -> Result<(), Failure> {
    let request = proto::CreateCampaignRequest {
        request_id: request_id(),
        commit: arguments.commit,
        plan: Some(proto::CampaignPlan {
            name: arguments.name.to_string(),
            security_setup: arguments.selection.security_setup.map(|setup| octets(setup.obis())).unwrap_or_default(),
            selection: Some(selection(&arguments.selection)?),
            terms: Some(terms(&arguments.terms)),
            ..action_message(&arguments.action)
        }),
    };
    let mut client = context.connect().await?.campaigns();
    let answer = waiting("reading the meters", client.create_campaign(request)).await?.into_inner();
    context.output.show(
        || json::message("CreateCampaignResponse", &answer),
        || {
            let preview = answer.preview.as_ref().map(preview_text).unwrap_or_default();
            match &answer.campaign {
                Some(campaign) => format!(
                    "{preview}\n{}\nanother person approves it: kms campaign approve {}\n",
                    campaign_text(campaign),
                    output::uuid(&campaign.campaign_id)
                ),
                None => format!("{preview}\nnothing was stored: --commit stores it as a draft\n"),
            }
        },
    );
    Ok(())
}

fn action_message(arguments: &ActionArguments) -> proto::CampaignPlan {
    let action = match (arguments.rotate, arguments.probe) {
        (Some(_), _) => proto::CampaignAction::Rotate,
        (None, true) => proto::CampaignAction::Probe,
        (None, false) => proto::CampaignAction::TakeOver,
    };
    proto::CampaignPlan {
        action: action.into(),
        key_type: text(arguments.rotate.as_ref()),
        ..proto::CampaignPlan::default()
    }
}

fn selection(arguments: &SelectionArguments) -> Result<proto::CampaignSelection, Failure> {
    let mut meters: Vec<Bytes> = arguments.meters.iter().map(|meter| octets(meter.octets())).collect();
    if let Some(path) = &arguments.meters_file {
        meters.extend(read_titles(path)?);
    }
    let selection = proto::CampaignSelection {
        whole_island: arguments.whole_island,
        manufacturer: text(arguments.manufacturer.as_ref()),
        device_profile: text(arguments.device_profile.as_ref()),
        group: text(arguments.group.as_ref()),
        head_end: text(arguments.head_end.as_ref()),
        batch: text(arguments.batch.as_ref()),
        older_than_days: arguments.older_than_days.unwrap_or_default(),
        exposed_to: text(arguments.exposed_to.as_ref()),
        exposed_by: text(arguments.exposed_by.as_ref()),
        imported: arguments.imported,
        counter_used_percent: arguments.counter_used.unwrap_or_default(),
        meters,
    };
    if selection == proto::CampaignSelection::default() {
        return Err(Failure::usage(
            "no meters are selected: give a condition such as --batch or --manufacturer, name meters, or add --whole-island",
        ));
    }
    Ok(selection)
}

fn terms(arguments: &TermsArguments) -> proto::CampaignTerms {
    proto::CampaignTerms {
        quorum: Some(arguments.quorum.number().into()),
        canary: Some(arguments.canary),
        waves: arguments.waves.iter().map(ToString::to_string).collect(),
        success_threshold: arguments.success_threshold,
        failure_limit: Some(arguments.failure_limit),
        time_zone: arguments.time_zone.clone(),
        windows: arguments.windows.iter().map(ToString::to_string).collect(),
        starts_per_minute: arguments.starts_per_minute.unwrap_or_default(),
        in_flight: arguments.in_flight,
        attempts: arguments.attempts,
        back_off_seconds: arguments.back_off_seconds,
    }
}

async fn list(limit: usize, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.campaigns();
    let (mut campaigns, mut page_token) = (Vec::new(), Bytes::new());
    loop {
        let wanted = if limit == 0 { PAGE } else { PAGE.min(limit - campaigns.len()) };
        let request = proto::ListCampaignsRequest { page_size: wanted as u32, page_token };
        let page = waiting("reading campaigns", client.list_campaigns(request)).await?.into_inner();
        campaigns.extend(page.campaigns);
        page_token = page.next_page_token;
        if page_token.is_empty() || (limit > 0 && campaigns.len() >= limit) {
            break;
        }
    }
    context.output.show(
        || json!({"campaigns": campaigns.iter().map(|campaign| json::message("Campaign", campaign)).collect::<Vec<_>>(), "more": !page_token.is_empty()}),
        || {
            let mut rows = Rows::new(&["campaign", "name", "what", "meters", "state", "wave", "since", "why"]).numbers(&[3]).sentences(&[7]);
            for campaign in &campaigns {
                rows.row([
                    output::uuid(&campaign.campaign_id),
                    name(campaign).to_owned(),
                    action(campaign),
                    number(campaign.meters),
                    campaign.state.clone(),
                    if campaign.wave == 0 { String::new() } else { format!("{} of {}", campaign.wave, campaign.waves.len()) },
                    output::time(campaign.since_ms),
                    campaign.reason.clone(),
                ]);
            }
            let more = if page_token.is_empty() { "" } else { "\nthere are more: --limit shows them\n" };
            format!("{}{more}", rows.text_or("no campaigns"))
        },
    );
    Ok(())
}

async fn approve(
    campaign: CampaignId,
    content: Option<[u8; 32]>,
    sure: &Sure,
    context: &Context,
) -> Result<(), Failure> {
    let connection = context.connect().await?;
    let content_sha256 = match content {
        Some(content) => octets(content),
        None if sure.yes => {
            return Err(Failure::usage(
                "--yes needs --content HEX: the SHA-256 of the content that you have reviewed, from `kms campaign show`",
            ));
        }
        None => {
            let known = load(&connection, campaign).await?;
            eprintln!("{}", campaign_text(&known));
            confirm(
                &format!("you approve exactly this: {} on {}", action(&known), plural(known.meters, "meter")),
                sure,
            )?;
            known.content_sha256
        }
    };
    let request = proto::ApproveCampaignRequest {
        request_id: request_id(),
        campaign_id: octets(campaign.octets()),
        content_sha256,
    };
    let approved = waiting("approving", connection.campaigns().approve_campaign(request)).await?.into_inner();
    show_campaign(&approved, context);
    Ok(())
}

async fn abort(campaign: CampaignId, reason: String, sure: &Sure, context: &Context) -> Result<(), Failure> {
    let connection = context.connect().await?;
    let known = load(&connection, campaign).await?;
    confirm(&format!("`{}` will end for good", name(&known)), sure)?;
    waiting("aborting", connection.campaigns().abort_campaign(change(campaign, reason))).await?;
    let report = report(&connection, campaign, &[""], true, 0).await?;
    context.output.show(
        || json::message("CampaignReport", &report),
        || {
            let ended = report
                .progress
                .as_ref()
                .and_then(|progress| progress.campaign.as_ref())
                .map(campaign_text)
                .unwrap_or_default();
            let in_doubt = match report.tasks.len() as u64 {
                0 => "no meter is in doubt".to_owned(),
                tasks => {
                    format!("{} in doubt, or still under way: probe them before anything else", plural(tasks, "meter"))
                }
            };
            format!(
                "{ended}\n{in_doubt}\n{}",
                if report.tasks.is_empty() { String::new() } else { format!("\n{}", tasks_text(&report.tasks)) }
            )
        },
    );
    Ok(())
}

async fn load(connection: &Connection, campaign: CampaignId) -> Result<proto::Campaign, Failure> {
    let request = proto::ShowCampaignRequest { campaign_id: octets(campaign.octets()) };
    Ok(waiting("reading the campaign", connection.campaigns().show_campaign(request)).await?.into_inner())
}

fn change(campaign: CampaignId, reason: String) -> proto::ChangeCampaignRequest {
    proto::ChangeCampaignRequest { request_id: request_id(), campaign_id: octets(campaign.octets()), reason }
}

fn show_campaign(campaign: &proto::Campaign, context: &Context) {
    context.output.show(|| json::message("Campaign", campaign), || campaign_text(campaign));
}
