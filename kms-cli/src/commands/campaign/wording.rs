//! The wording of a campaign, its preview and its tasks.

use kms_proto::v1 as proto;

use crate::output::{self, Rows, facts, number, plural};

pub(super) fn preview_text(preview: &proto::CampaignPreview) -> String {
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

pub(super) fn campaign_text(campaign: &proto::Campaign) -> String {
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

pub(super) fn selection_text(campaign: &proto::Campaign) -> String {
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

pub(super) fn tasks_text(tasks: &[proto::Task]) -> String {
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

pub(super) fn name(campaign: &proto::Campaign) -> &str {
    campaign.plan.as_ref().map(|plan| plan.name.as_str()).unwrap_or_default()
}

pub(super) fn action(campaign: &proto::Campaign) -> String {
    let Some(plan) = &campaign.plan else { return String::new() };
    match plan.action() {
        proto::CampaignAction::Rotate => format!("rotate {}", plan.key_type),
        proto::CampaignAction::Probe => "probe".to_owned(),
        proto::CampaignAction::TakeOver => "take over".to_owned(),
        proto::CampaignAction::Unspecified => String::new(),
    }
}

const SAMPLE: usize = 5;
const WAVES_SHOWN: usize = 12;
