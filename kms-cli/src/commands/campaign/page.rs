//! The report as one HTML page with plots, which loads nothing.

use std::{collections::BTreeMap, fmt::Write as _};

use kms_proto::v1 as proto;

use super::{
    acceptance::Acceptance,
    watch::ended,
    wording::{action, selection_text},
};
use crate::output::{self, number, plural};

/// The page. Everything from outside is escaped.
pub(super) fn html(report: &proto::CampaignReport, acceptance: Option<&Acceptance>) -> String {
    let progress = report.progress.clone().unwrap_or_default();
    let campaign = progress.campaign.clone().unwrap_or_default();
    let plan = campaign.plan.clone().unwrap_or_default();
    let total = |count: fn(&proto::WaveProgress) -> u64| progress.waves.iter().map(count).sum::<u64>();
    let succeeded = total(|wave| wave.succeeded);
    let share = if campaign.meters == 0 { 0.0 } else { succeeded as f64 * 100.0 / campaign.meters as f64 };
    let mut page = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n\
         <p>{what}, {meters}. The campaign is <strong>{state}</strong>{why}.</p>\n<div class=\"figures\">",
        title = escape(&plan.name),
        what = escape(&action(&campaign)),
        meters = plural(campaign.meters, "meter"),
        state = escape(&campaign.state),
        why = if campaign.reason.is_empty() { String::new() } else { format!(": {}", escape(&campaign.reason)) },
    );
    for (name, value) in [
        ("succeeded", format!("{} ({share:.1} %)", number(succeeded))),
        ("failed", number(total(|wave| wave.failed))),
        ("in doubt", number(total(|wave| wave.in_doubt))),
        ("skipped", number(total(|wave| wave.skipped))),
        ("to do", number(campaign.meters.saturating_sub(total(ended)))),
    ] {
        let _ = write!(page, "<div><b>{value}</b>{name}</div>");
    }
    page.push_str("</div>\n");
    let approvals: Vec<String> = campaign
        .approvals
        .iter()
        .map(|approval| format!("{} at {}", approval.person, output::time(approval.time_ms)))
        .collect();
    page.push_str("<table>\n");
    for (name, value) in [
        ("Campaign", output::uuid(&campaign.campaign_id)),
        ("Selection", selection_text(&campaign)),
        ("Made by", format!("{} at {}", campaign.requester_person, output::time(campaign.created_ms))),
        ("Approved by", approvals.join(", ")),
        ("Content SHA-256", hex::encode(&campaign.content_sha256)),
        ("Started", output::time(campaign.started_ms)),
        ("State since", output::time(campaign.since_ms)),
    ] {
        let _ = writeln!(page, "<tr><th>{name}</th><td>{}</td></tr>", escape(&value));
    }
    page.push_str("</table>\n");
    section(&mut page, "Progress over time", &line_chart(&report.timeline, campaign.meters));
    let waves: Vec<Bar> =
        progress.waves.iter().map(|wave| Bar { name: format!("wave {}", wave.wave), parts: parts(wave) }).collect();
    section(&mut page, "Outcome by wave", &bars(&waves, &SERIES));
    section(&mut page, "Outcome by manufacturer", &bars(&by_manufacturer(report), &SERIES));
    let reasons: Vec<Bar> =
        progress.reasons.iter().map(|reason| Bar { name: reason.name.clone(), parts: vec![reason.count] }).collect();
    section(&mut page, "Failures by reason", &bars(&reasons, &[("meters", "#b3261e")]));
    if let Some(acceptance) = acceptance {
        section(&mut page, "Acceptance", &accepted(acceptance));
    }
    if !report.tasks.is_empty() {
        let mut rows = String::from(
            "<table>\n<tr><th>Meter</th><th>Manufacturer</th><th>State</th><th>Attempts</th><th>Head-end</th><th>Reason</th></tr>\n",
        );
        for task in &report.tasks {
            let cells = [
                output::octets(&task.meter),
                task.manufacturer.clone(),
                task.state.clone(),
                task.attempts.to_string(),
                task.head_end.clone(),
                task.reason.clone(),
            ];
            let _ = writeln!(
                rows,
                "<tr>{}</tr>",
                cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect::<String>()
            );
        }
        rows.push_str("</table>\n");
        if !report.next_page_token.is_empty() {
            rows.push_str("<p>There are more: the JSON report with --limit 0 has all.</p>\n");
        }
        section(&mut page, "Meters to look after", &rows);
    }
    page.push_str("</body>\n</html>\n");
    page
}

/// The acceptance: by batch, how many keys nobody else could know, and what heals the others.
fn accepted(acceptance: &Acceptance) -> String {
    let mut part = format!("<p><strong>{}</strong></p>\n<p>{EXPLANATION}</p>\n", escape(&acceptance.sentence()));
    let mut by_type: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (key_type, keys) in acceptance.batches.values().flatten() {
        let parts = by_type.entry(key_type).or_insert_with(|| vec![0; VERDICTS.len()]);
        parts.iter_mut().zip(keys.counts).for_each(|(part, count)| *part += count);
    }
    let chart: Vec<Bar> = by_type.into_iter().map(|(name, parts)| Bar { name: name.to_owned(), parts }).collect();
    part.push_str(&bars(&chart, &VERDICTS));
    part.push_str(
        "<table>\n<tr><th>Batch</th><th>Key</th><th>Healed</th><th>Not healed</th><th>Not replaced</th><th>In doubt</th><th>What heals it</th></tr>\n",
    );
    for (batch, types) in &acceptance.batches {
        for (key_type, keys) in types {
            let [healed, not_healed, not_replaced, in_doubt] = keys.counts.map(number);
            let cells = [batch, key_type, &healed, &not_healed, &not_replaced, &in_doubt, &keys.remedies_text()];
            let _ = writeln!(
                part,
                "<tr>{}</tr>",
                cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect::<String>()
            );
        }
    }
    part.push_str("</table>\n");
    if !acceptance.open.is_empty() {
        part.push_str("<h3>Keys that are not healed</h3>\n<table>\n<tr>");
        for heading in ["Meter", "Batch", "Key", "Version", "Shown", "Verdict", "Known to", "What heals it"] {
            let _ = write!(part, "<th>{heading}</th>");
        }
        part.push_str("</tr>\n");
        for row in acceptance.open_rows() {
            let _ = writeln!(
                part,
                "<tr>{}</tr>",
                row.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect::<String>()
            );
        }
        part.push_str("</table>\n");
        if acceptance.more {
            part.push_str("<p>There are more: the JSON report with --limit 0 has all.</p>\n");
        }
    }
    part
}

fn section(page: &mut String, heading: &str, content: &str) {
    let content = if content.is_empty() { "<p>Nothing yet.</p>\n" } else { content };
    let _ = write!(page, "<h2>{heading}</h2>\n{content}");
}

struct Bar {
    name: String,
    /// One length for each series.
    parts: Vec<u64>,
}

fn parts(wave: &proto::WaveProgress) -> Vec<u64> {
    vec![wave.succeeded, wave.failed, wave.in_doubt, wave.skipped, wave.planned.saturating_sub(ended(wave))]
}

fn by_manufacturer(report: &proto::CampaignReport) -> Vec<Bar> {
    let mut manufacturers: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for outcome in &report.outcomes {
        let series = match outcome.state.as_str() {
            "succeeded" => 0,
            "failed" => 1,
            "in-doubt" => 2,
            "skipped" => 3,
            _ => 4,
        };
        let parts = manufacturers.entry(&outcome.manufacturer).or_insert_with(|| vec![0; SERIES.len()]);
        if let Some(part) = parts.get_mut(series) {
            *part += outcome.count;
        }
    }
    manufacturers.into_iter().map(|(name, parts)| Bar { name: name.to_owned(), parts }).collect()
}

/// Horizontal bars, each cut into its series.
fn bars(bars: &[Bar], series: &[(&str, &str)]) -> String {
    let longest = bars.iter().map(|bar| bar.parts.iter().sum::<u64>()).max().unwrap_or_default();
    if longest == 0 {
        return String::new();
    }
    let height = bars.len() * ROW + ROW;
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n");
    for (at, (name, colour)) in series.iter().enumerate() {
        let x = LEFT + at * 110;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"4\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"14\">{}</text>",
            x + 14,
            escape(name)
        );
    }
    for (row, bar) in (1..).zip(bars) {
        let y = row * ROW;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            LEFT - 8,
            y + 14,
            escape(&shortened(&bar.name))
        );
        let mut x = LEFT as f64;
        for (part, (name, colour)) in bar.parts.iter().zip(series) {
            let width = *part as f64 / longest as f64 * (WIDTH - LEFT - 70) as f64;
            if *part > 0 {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"><title>{}: {} {}</title></rect>",
                    ROW - 6,
                    escape(&bar.name),
                    number(*part),
                    escape(name)
                );
            }
            x += width;
        }
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{}\">{}</text>", x + 6.0, y + 14, number(bar.parts.iter().sum()));
    }
    svg.push_str("</svg>\n");
    svg
}

/// The number of meters that have succeeded, over time.
fn line_chart(timeline: &[proto::TimelinePoint], meters: u64) -> String {
    let (Some(first), Some(last)) = (timeline.first(), timeline.last()) else { return String::new() };
    if last.succeeded == 0 || meters == 0 {
        return String::new();
    }
    let span = (last.time_ms - first.time_ms).max(1) as f64;
    let (width, height) = ((WIDTH - LEFT - 20) as f64, 200.0);
    let place = |point: &proto::TimelinePoint| {
        let x = LEFT as f64 + (point.time_ms - first.time_ms) as f64 / span * width;
        let y = 10.0 + height - point.succeeded as f64 / meters as f64 * height;
        format!("{x:.1},{y:.1}")
    };
    let points: Vec<String> = timeline.iter().map(place).collect();
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} 250\" role=\"img\">\n");
    for percent in [0, 25, 50, 75, 100] {
        let y = 10.0 + height - f64::from(percent) / 100.0 * height;
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{y}\" x2=\"{:.1}\" y2=\"{y}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{}\" text-anchor=\"end\">{percent} %</text>",
            LEFT as f64 + width,
            LEFT - 8,
            y + 4.0
        );
    }
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#1b6e3c\" stroke-width=\"2.5\"/>",
        points.join(" ")
    );
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"240\">{}</text>", output::time(first.time_ms));
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"240\" text-anchor=\"end\">{}</text>",
        LEFT as f64 + width,
        output::time(last.time_ms)
    );
    svg.push_str("</svg>\n");
    svg
}

fn shortened(name: &str) -> String {
    if name.chars().count() <= LONGEST_NAME {
        name.to_owned()
    } else {
        format!("{}…", name.chars().take(LONGEST_NAME - 1).collect::<String>())
    }
}

/// Text for HTML, in elements and in quoted attributes.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            letter => escaped.push(letter),
        }
    }
    escaped
}

const SERIES: [(&str, &str); 5] = [
    ("succeeded", "#1b6e3c"),
    ("failed", "#b3261e"),
    ("in doubt", "#e0a100"),
    ("skipped", "#8a8a8a"),
    ("to do", "#d5dde6"),
];
const VERDICTS: [(&str, &str); 4] =
    [("healed", "#1b6e3c"), ("not healed", "#e0a100"), ("not replaced", "#b3261e"), ("in doubt", "#8a8a8a")];
const EXPLANATION: &str = "A key is healed when nobody outside the HSM could know it but those it was granted to. A new key that travelled wrapped under a \
master key which its vendor knows is not healed against recorded traffic: the vendor could read it, if it recorded what was sent. The vendor's old keys are \
out of use all the same. A visit to the meter heals that, and so would key agreement (security suites 1 and 2), which this system does not offer yet; then the \
other keys are rotated once more.";
const WIDTH: usize = 860;
const LEFT: usize = 190;
const ROW: usize = 24;
const LONGEST_NAME: usize = 26;
const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#1c1c1c}h2{margin-top:2em}\
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.25em .75em .25em 0;border-bottom:1px solid #e4e4e4;vertical-align:top}\
td{overflow-wrap:anywhere}svg{width:100%;font:12px system-ui,sans-serif}.figures{display:flex;flex-wrap:wrap;gap:1em;margin:1em 0}\
.figures div{border:1px solid #ddd;border-radius:6px;padding:.5em 1em;min-width:7em}.figures b{display:block;font-size:1.5em}";

#[cfg(test)]
mod tests {
    use super::{super::acceptance::Keys, *};

    #[test]
    fn the_page_has_the_figures_and_runs_nothing_from_outside() {
        let wave =
            proto::WaveProgress { wave: 1, planned: 10, succeeded: 7, failed: 2, in_doubt: 1, ..Default::default() };
        let hostile = "<script>alert(1)</script>\" onload='x'";
        let report = proto::CampaignReport {
            progress: Some(proto::CampaignProgress {
                campaign: Some(proto::Campaign {
                    plan: Some(proto::CampaignPlan { name: hostile.into(), ..Default::default() }),
                    state: "paused".into(),
                    reason: hostile.into(),
                    meters: 10,
                    ..Default::default()
                }),
                waves: vec![wave],
                reasons: vec![proto::NamedCount { name: hostile.into(), count: 3 }],
                ..Default::default()
            }),
            outcomes: vec![proto::OutcomeCount {
                wave: 1,
                manufacturer: hostile.into(),
                state: "failed".into(),
                reason: hostile.into(),
                count: 3,
            }],
            timeline: vec![
                proto::TimelinePoint { time_ms: 1_795_248_000_000, succeeded: 0 },
                proto::TimelinePoint { time_ms: 1_795_248_060_000, succeeded: 7 },
            ],
            tasks: vec![proto::Task { reason: hostile.into(), ..Default::default() }],
            ..Default::default()
        };
        let mut acceptance = Acceptance { meters: 2, healed: 1, ..Acceptance::default() };
        let keys = Keys { counts: [1, 1, 0, 0], remedies: [("local-visit".to_owned(), 1)].into() };
        acceptance.batches.insert(hostile.into(), [("KEK".to_owned(), keys)].into());
        let key = proto::KeyAcceptance {
            key_type: "KEK".into(),
            version: 2,
            verdict: "not-healed".into(),
            known_to: vec![hostile.into()],
            ..Default::default()
        };
        acceptance.open.push(proto::MeterAcceptance { batch: hostile.into(), keys: vec![key], ..Default::default() });
        let page = html(&report, Some(&acceptance));
        for words in [
            "7 (70.0 %)",
            "Progress over time",
            "polyline",
            "Outcome by wave",
            "wave 1",
            "Failures by reason",
            "&lt;script&gt;",
            "1 of 2 meters have only keys",
            "1 by a local visit",
            "not healed against recorded traffic",
        ] {
            assert!(page.contains(words), "{words}\n{page}");
        }
        for words in ["<script", "onload='x'", "http://", "https://", "src=", "href="] {
            assert!(!page.contains(words), "{words}\n{page}");
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        // A campaign that has not begun.
        assert!(html(&proto::CampaignReport::default(), None).contains("Nothing yet."));
    }
}
