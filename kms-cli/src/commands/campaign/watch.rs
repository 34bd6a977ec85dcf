//! `kms campaign watch`: bars on a terminal, lines elsewhere.

use std::io::{IsTerminal as _, Write as _};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use kms_domain::CampaignId;
use kms_proto::v1 as proto;

use crate::{
    commands::octets,
    context::Context,
    failure::Failure,
    json,
    output::{Rows, number},
};

pub(super) async fn run(campaign: CampaignId, once: bool, context: &Context) -> Result<(), Failure> {
    let mut client = context.connect().await?.campaigns();
    let mut stream = client
        .watch_campaign(proto::WatchCampaignRequest { campaign_id: octets(campaign.octets()) })
        .await?
        .into_inner();
    let as_json = context.output.is_json();
    let mut view = (!as_json && !once && std::io::stderr().is_terminal()).then(View::new);
    let mut last = None;
    while let Some(progress) = stream.message().await? {
        let told = if as_json {
            writeln!(std::io::stdout(), "{}", json::message("CampaignProgress", &progress))
        } else if let Some(view) = &mut view {
            view.show(&progress);
            Ok(())
        } else if once {
            Ok(())
        } else {
            writeln!(std::io::stdout(), "{}", line(&progress))
        };
        last = Some(progress);
        // Ends when the reader has closed the pipe.
        if once || told.is_err() {
            break;
        }
    }
    if let Some(view) = view {
        view.clear();
    }
    if let Some(progress) = last.filter(|_| !as_json) {
        let _ = write!(std::io::stdout(), "{}", text(&progress));
    }
    Ok(())
}

/// Bars by wave, and a line for the whole.
struct View {
    bars: MultiProgress,
    waves: Vec<(u32, ProgressBar)>,
    summary: ProgressBar,
}

impl View {
    fn new() -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let summary = bars
            .add(ProgressBar::new_spinner().with_style(
                ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()),
            ));
        Self { bars, waves: Vec::new(), summary }
    }

    fn show(&mut self, progress: &proto::CampaignProgress) {
        for wave in shown(progress) {
            let known = self.waves.iter().find(|(number, _)| *number == wave.wave).map(|(_, bar)| bar.clone());
            let bar = known.unwrap_or_else(|| {
                let style = ProgressStyle::with_template("{prefix:>8} {bar:30} {human_pos}/{human_len}  {msg}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                let bar = self.bars.insert_before(
                    &self.summary,
                    ProgressBar::new(wave.planned).with_style(style.progress_chars("##-")),
                );
                bar.set_prefix(format!("wave {}", wave.wave));
                self.waves.push((wave.wave, bar.clone()));
                bar
            });
            bar.set_position(ended(wave));
            bar.set_message(counts(wave));
        }
        self.summary.set_message(line(progress));
        self.summary.tick();
    }

    fn clear(self) {
        self.waves.iter().for_each(|(_, bar)| bar.finish_and_clear());
        self.summary.finish_and_clear();
    }
}

/// The wave under way, the last ones before it, the next one, and every wave with failures or
/// doubt.
fn shown(progress: &proto::CampaignProgress) -> impl Iterator<Item = &proto::WaveProgress> {
    let current = progress.campaign.as_ref().map_or(0, |campaign| campaign.wave);
    progress.waves.iter().filter(move |wave| {
        (wave.wave + BEFORE > current && wave.wave <= current + 1) || wave.failed + wave.in_doubt > 0
    })
}

/// The campaign in one line.
fn line(progress: &proto::CampaignProgress) -> String {
    let campaign = progress.campaign.clone().unwrap_or_default();
    let done: u64 = progress.waves.iter().map(ended).sum();
    let mut parts = vec![format!("{}: {} of {}", campaign.state, number(done), number(campaign.meters))];
    if campaign.wave > 0 {
        parts.push(format!("wave {} of {}", campaign.wave, campaign.waves.len()));
    }
    if progress.per_minute > 0.0 {
        parts.push(format!("{:.0} a minute", progress.per_minute));
    }
    if progress.eta_seconds > 0 {
        parts.push(format!("{} left", indicatif::HumanDuration(std::time::Duration::from_secs(progress.eta_seconds))));
    }
    if campaign.state == "running" && !campaign.window_open {
        parts.push(match campaign.next_opening_ms {
            0 => "the window is shut".to_owned(),
            next => format!("the window opens at {}", crate::output::time(next)),
        });
    }
    if !campaign.reason.is_empty() {
        parts.push(campaign.reason.clone());
    }
    parts.extend(progress.reasons.iter().take(3).map(|reason| format!("{}: {}", reason.name, number(reason.count))));
    parts.join(" | ")
}

fn text(progress: &proto::CampaignProgress) -> String {
    let mut result = format!("{}\n\n{}", line(progress), waves_table(progress));
    if !progress.reasons.is_empty() {
        let mut rows = Rows::new(&["reason", "meters"]).numbers(&[1]);
        for reason in &progress.reasons {
            rows.row([reason.name.clone(), number(reason.count)]);
        }
        result.push_str(&format!("\n{}", rows.text_or("")));
    }
    result
}

/// A row for each wave.
pub(super) fn waves_table(progress: &proto::CampaignProgress) -> String {
    let mut rows = Rows::new(&[
        "wave",
        "meters",
        "waiting",
        "leased",
        "under way",
        "succeeded",
        "failed",
        "in doubt",
        "skipped",
        "began",
        "ended",
    ])
    .numbers(&[0, 1, 2, 3, 4, 5, 6, 7, 8]);
    for wave in &progress.waves {
        rows.row([
            wave.wave.to_string(),
            number(wave.planned),
            number(wave.pending),
            number(wave.leased),
            number(wave.under_way),
            number(wave.succeeded),
            number(wave.failed),
            number(wave.in_doubt),
            number(wave.skipped),
            crate::output::time(wave.started_ms),
            crate::output::time(wave.ended_ms),
        ]);
    }
    rows.text_or("no waves")
}

pub(super) const fn ended(wave: &proto::WaveProgress) -> u64 {
    wave.succeeded + wave.failed + wave.in_doubt + wave.skipped
}

fn counts(wave: &proto::WaveProgress) -> String {
    let parts = [
        ("under way", wave.under_way + wave.leased),
        ("waiting", wave.pending),
        ("failed", wave.failed),
        ("in doubt", wave.in_doubt),
        ("skipped", wave.skipped),
    ];
    parts
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{} {name}", number(count)))
        .collect::<Vec<_>>()
        .join(", ")
}

/// The number of waves shown before the one under way.
const BEFORE: u32 = 4;
