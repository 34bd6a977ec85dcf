//! `kms campaign`.

mod acceptance;
mod page;
mod watch;

use bytes::Bytes;
use kms_client::Connection;
use kms_domain::CampaignId;
use kms_proto::v1 as proto;
use serde_json::json;

use self::acceptance::Acceptance;
use super::{confirm, octets, read_titles, request_id, text, write};
use crate::{
    Context, Failure,
    arguments::{ActionArguments, CampaignCommand, CreateCampaign, SelectionArguments, Sure, TermsArguments},
    json, output,
    output::{Rows, facts, number, plural},
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
            // A take-over is accepted by what it came to.
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

/// The report, with up to `limit` tasks (0: all) in each of the states.
async fn report(
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

fn change(campaign: CampaignId, reason: String) -> proto::ChangeCampaignRequest {
    proto::ChangeCampaignRequest { request_id: request_id(), campaign_id: octets(campaign.octets()), reason }
}

fn show_campaign(campaign: &proto::Campaign, context: &Context) {
    context.output.show(|| json::message("Campaign", campaign), || campaign_text(campaign));
}

fn preview_text(preview: &proto::CampaignPreview) -> String {
    let mut result = facts([
        ("meters", number(preview.meters)),
        (
            "in doubt",
            if preview.in_doubt == 0 {
                String::new()
            } else {
                format!("{}: they are probed first", number(preview.in_doubt))
            },
        ),
        (
            "not reachable",
            if preview.not_reachable == 0 {
                String::new()
            } else {
                format!("{} have no head-end: they are skipped", number(preview.not_reachable))
            },
        ),
        (
            "left out",
            if preview.left_out == 0 {
                String::new()
            } else {
                format!("{} are unknown, out of service, or do not match", number(preview.left_out))
            },
        ),
        (
            "refused rows",
            if preview.refused_rows == 0 {
                String::new()
            } else {
                format!("{} (I5): run `kms audit scrub`", number(preview.refused_rows))
            },
        ),
        ("waves", waves_text(&preview.waves)),
    ]);
    for (heading, counts) in [
        ("manufacturer", &preview.manufacturers),
        ("device profile", &preview.device_profiles),
        ("head-end", &preview.head_ends),
    ] {
        let mut rows = Rows::new(&[heading, "meters"]).numbers(&[1]);
        for count in counts {
            rows.row([
                if count.name.is_empty() { "(none)".to_owned() } else { count.name.clone() },
                number(count.count),
            ]);
        }
        result.push('\n');
        result.push_str(&rows.text_or(""));
    }
    let sample: Vec<String> = preview.sample.iter().take(SAMPLE).map(|meter| output::octets(meter)).collect();
    result.push_str(&format!("\nfor example {}\n", sample.join(", ")));
    result
}

fn campaign_text(campaign: &proto::Campaign) -> String {
    let plan = campaign.plan.clone().unwrap_or_default();
    let terms = plan.terms.clone().unwrap_or_default();
    let windows = if terms.windows.is_empty() {
        "always".to_owned()
    } else {
        format!("{} ({})", terms.windows.join(", "), terms.time_zone)
    };
    let approvals =
        campaign.approvals.iter().map(|approval| format!("{} at {}", approval.person, output::time(approval.time_ms)));
    let opening = match (campaign.window_open, campaign.next_opening_ms) {
        (true, _) => "open now".to_owned(),
        (false, 0) => "shut for more than a week".to_owned(),
        (false, next) => format!("opens at {}", output::time(next)),
    };
    let attempts = format!("{}, the second after {} s", terms.attempts, terms.back_off_seconds);
    facts([
        ("campaign", output::uuid(&campaign.campaign_id)),
        ("name", plan.name.clone()),
        ("what", action(campaign)),
        (
            "security setup",
            if plan.security_setup.is_empty() { String::new() } else { output::obis(&plan.security_setup) },
        ),
        ("selection", selection_text(campaign)),
        ("meters", number(campaign.meters)),
        ("waves", waves_text(&campaign.waves)),
        (
            "must succeed",
            format!(
                "{} % of a wave, at most {} failures",
                terms.success_threshold,
                terms.failure_limit.unwrap_or_default()
            ),
        ),
        ("windows", format!("{windows}; {opening}")),
        ("speed", speed_text(&terms)),
        ("attempts", attempts),
        (
            "made by",
            format!("{} ({}) at {}", campaign.requester_person, campaign.requester, output::time(campaign.created_ms)),
        ),
        ("approved by", approvals.collect::<Vec<_>>().join(", ")),
        ("approvals needed", terms.quorum.unwrap_or_default().to_string()),
        ("content SHA-256", hex::encode(&campaign.content_sha256)),
        ("state", format!("{} since {}", campaign.state, output::time(campaign.since_ms))),
        ("why", campaign.reason.clone()),
        (
            "wave",
            if campaign.wave == 0 { String::new() } else { format!("{} of {}", campaign.wave, campaign.waves.len()) },
        ),
    ])
}

fn selection_text(campaign: &proto::Campaign) -> String {
    let selection = campaign.plan.as_ref().and_then(|plan| plan.selection.clone()).unwrap_or_default();
    let given = |name: &str, value: &str| if value.is_empty() { None } else { Some(format!("{name} {value}")) };
    let parts = [
        selection.whole_island.then(|| "whole island".to_owned()),
        (campaign.named_meters > 0).then(|| format!("{} by name", plural(campaign.named_meters, "meter"))),
        given("manufacturer", &selection.manufacturer),
        given("device profile", &selection.device_profile),
        given("group", &selection.group),
        given("assigned to", &selection.head_end),
        given("batch", &selection.batch),
        (selection.older_than_days > 0)
            .then(|| format!("key older than {}", plural(selection.older_than_days.into(), "day"))),
        given("key exposed to", &selection.exposed_to),
        given("key exposed by", &selection.exposed_by),
        selection.imported.then(|| "imported key".to_owned()),
        (selection.counter_used_percent > 0).then(|| format!("{} % of a counter used", selection.counter_used_percent)),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn speed_text(terms: &proto::CampaignTerms) -> String {
    let starts = if terms.starts_per_minute == 0 {
        String::new()
    } else {
        format!("{} starts a minute, ", number(terms.starts_per_minute.into()))
    };
    format!("{starts}{} at once, for each head-end", number(terms.in_flight.into()))
}

fn waves_text(waves: &[u64]) -> String {
    let shown: Vec<String> = waves.iter().take(WAVES_SHOWN).map(|meters| number(*meters)).collect();
    let more = if waves.len() > WAVES_SHOWN {
        format!(" and {} more", number((waves.len() - WAVES_SHOWN) as u64))
    } else {
        String::new()
    };
    format!("{}{more}", shown.join(", "))
}

fn report_text(report: &proto::CampaignReport) -> String {
    let Some(progress) = &report.progress else { return "no report\n".to_owned() };
    let campaign = progress.campaign.as_ref().map(campaign_text).unwrap_or_default();
    let mut result = format!("{campaign}\n{}", watch::waves_table(progress));
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

fn report_json(report: &proto::CampaignReport, acceptance: Option<&Acceptance>) -> serde_json::Value {
    let mut report = json::message("CampaignReport", report);
    if let (Some(fields), Some(acceptance)) = (report.as_object_mut(), acceptance) {
        fields.insert("acceptance".to_owned(), acceptance.json());
    }
    report
}

fn is_take_over(report: &proto::CampaignReport) -> bool {
    let plan = report
        .progress
        .as_ref()
        .and_then(|progress| progress.campaign.as_ref())
        .and_then(|campaign| campaign.plan.as_ref());
    plan.is_some_and(|plan| plan.action() == proto::CampaignAction::TakeOver)
}

fn tasks_text(tasks: &[proto::Task]) -> String {
    let mut rows = Rows::new(&["meter", "manufacturer", "state", "to do", "attempts", "head-end", "why"])
        .numbers(&[4])
        .sentences(&[6]);
    for task in tasks {
        let work = if task.key_type.is_empty() { "probe".to_owned() } else { format!("rotate {}", task.key_type) };
        let head_end = task.head_end.rsplit(':').next().unwrap_or_default();
        rows.row([
            output::octets(&task.meter),
            task.manufacturer.clone(),
            task.state.clone(),
            work,
            task.attempts.to_string(),
            head_end.to_owned(),
            task.reason.clone(),
        ]);
    }
    rows.text_or("no tasks")
}

fn name(campaign: &proto::Campaign) -> &str {
    campaign.plan.as_ref().map(|plan| plan.name.as_str()).unwrap_or_default()
}

fn action(campaign: &proto::Campaign) -> String {
    let Some(plan) = &campaign.plan else { return String::new() };
    match plan.action() {
        proto::CampaignAction::Rotate => format!("rotate {}", plan.key_type),
        proto::CampaignAction::Probe => "probe".to_owned(),
        proto::CampaignAction::TakeOver => "take over".to_owned(),
        proto::CampaignAction::Unspecified => String::new(),
    }
}

const PAGE: usize = 1_000;
const SAMPLE: usize = 5;
const WAVES_SHOWN: usize = 12;
