//! The acceptance report: by batch, how many keys of the campaign's meters nobody else could know,
//! and what heals the others.

use std::collections::BTreeMap;

use bytes::Bytes;
use kms_client::Connection;
use kms_domain::{CampaignId, Remedy, Verdict};
use kms_proto::v1 as proto;
use serde_json::{Value, json};

use crate::{
    commands::{PAGE, octets},
    failure::Failure,
    json,
    output::{self, Rows, number, plural},
    progress::waiting,
};

/// The verdicts on the keys.
#[derive(Debug, Default)]
pub(super) struct Acceptance {
    /// Meters of the plan.
    pub(super) meters: u64,
    /// Those whose every key is healed.
    pub(super) healed: u64,
    /// By batch and key type.
    pub(super) batches: BTreeMap<String, BTreeMap<String, Keys>>,
    /// Meters with a key that is not healed, up to the requested number.
    pub(super) open: Vec<proto::MeterAcceptance>,
    /// Whether there are more of them.
    pub(super) more: bool,
}

/// Keys of one type.
#[derive(Debug, Default)]
pub(super) struct Keys {
    /// The number of keys with each verdict, in the order of [`Verdict::ALL`].
    pub(super) counts: [u64; 4],
    /// What heals the others.
    pub(super) remedies: BTreeMap<String, u64>,
}

impl Keys {
    /// The remedies for the keys that are not healed, in words.
    pub(super) fn remedies_text(&self) -> String {
        self.remedies
            .iter()
            .map(|(remedy, count)| format!("{} by {}", number(*count), remedy_text(remedy)))
            .collect::<Vec<_>>()
            .join(", ")
    }
}

impl Acceptance {
    /// Reads all pages; keeps up to `limit` meters that are not healed, 0 for all.
    pub(super) async fn read(connection: &Connection, campaign: CampaignId, limit: usize) -> Result<Self, Failure> {
        let mut client = connection.campaigns();
        let (mut acceptance, mut page_token) = (Self::default(), Bytes::new());
        loop {
            let request = proto::ReportAcceptanceRequest {
                campaign_id: octets(campaign.octets()),
                page_size: PAGE as u32,
                page_token,
            };
            let page = waiting("reading the keys of the meters", client.report_acceptance(request)).await?.into_inner();
            page.meters.into_iter().for_each(|meter| acceptance.add(meter, limit));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(acceptance);
            }
        }
    }

    fn add(&mut self, meter: proto::MeterAcceptance, limit: usize) {
        self.meters += 1;
        let types = self
            .batches
            .entry(if meter.batch.is_empty() { "(none)".to_owned() } else { meter.batch.clone() })
            .or_default();
        let mut healed = meter.problem.is_empty();
        for key in &meter.keys {
            let keys = types.entry(key.key_type.clone()).or_default();
            let at = Verdict::ALL.iter().position(|verdict| verdict.name() == key.verdict);
            if let Some(count) = at.and_then(|at| keys.counts.get_mut(at)) {
                *count += 1;
            }
            if key.verdict != Verdict::Healed.name() {
                healed = false;
                *keys.remedies.entry(key.remedy.clone()).or_default() += 1;
            }
        }
        if healed {
            self.healed += 1;
        } else if limit == 0 || self.open.len() < limit {
            self.open.push(meter);
        } else {
            self.more = true;
        }
    }

    /// One sentence for managers.
    pub(super) fn sentence(&self) -> String {
        format!(
            "{} of {} have only keys that nobody else could know.",
            number(self.healed),
            plural(self.meters, "meter")
        )
    }

    pub(super) fn text(&self) -> String {
        let mut rows =
            Rows::new(&["batch", "key", "healed", "not healed", "not replaced", "in doubt", "what heals it"])
                .numbers(&[2, 3, 4, 5])
                .sentences(&[6]);
        for (batch, types) in &self.batches {
            for (key_type, keys) in types {
                let [healed, not_healed, not_replaced, in_doubt] = keys.counts.map(number);
                rows.row([
                    batch.clone(),
                    key_type.clone(),
                    healed,
                    not_healed,
                    not_replaced,
                    in_doubt,
                    keys.remedies_text(),
                ]);
            }
        }
        let mut result = format!("acceptance: {}\n\n{}", self.sentence(), rows.text_or("no meters"));
        if !self.open.is_empty() {
            let mut rows =
                Rows::new(&["meter", "batch", "key", "version", "shown", "verdict", "known to", "what heals it"])
                    .numbers(&[3])
                    .sentences(&[6]);
            for cells in self.open_rows() {
                rows.row(cells);
            }
            result.push_str(&format!("\n{}", rows.text_or("")));
        }
        if self.more {
            result.push_str("\nthere are more: --limit 0 shows all\n");
        }
        result
    }

    /// A line for each key that is not healed.
    pub(super) fn open_rows(&self) -> Vec<[String; 8]> {
        let mut rows = Vec::new();
        for meter in &self.open {
            let title = output::octets(&meter.meter);
            if !meter.problem.is_empty() {
                rows.push([
                    title,
                    String::new(),
                    String::new(),
                    String::new(),
                    String::new(),
                    meter.problem.clone(),
                    String::new(),
                    String::new(),
                ]);
                continue;
            }
            for key in meter.keys.iter().filter(|key| key.verdict != Verdict::Healed.name()) {
                rows.push([
                    title.clone(),
                    meter.batch.clone(),
                    key.key_type.clone(),
                    key.version.to_string(),
                    key.evidence.clone(),
                    verdict_text(&key.verdict).to_owned(),
                    key.known_to.join(", "),
                    remedy_text(&key.remedy).to_owned(),
                ]);
            }
        }
        rows
    }

    pub(super) fn json(&self) -> Value {
        let batches: Vec<Value> = self
            .batches
            .iter()
            .flat_map(|(batch, types)| {
                types.iter().map(move |(key_type, keys)| {
                    let counts: serde_json::Map<String, Value> = Verdict::ALL
                        .iter()
                        .zip(keys.counts)
                        .map(|(verdict, count)| (verdict.name().replace('-', "_"), json!(count)))
                        .collect();
                    json!({"batch": batch, "key_type": key_type, "keys": counts, "remedies": keys.remedies})
                })
            })
            .collect();
        let open: Vec<Value> = self.open.iter().map(|meter| json::message("MeterAcceptance", meter)).collect();
        json!({"meters": self.meters, "healed": self.healed, "batches": batches, "not_healed": open, "more": self.more})
    }
}

fn verdict_text(verdict: &str) -> &str {
    match verdict {
        "not-healed" => "not healed against recorded traffic",
        "not-replaced" => "not replaced: somebody else made it",
        "in-doubt" => "in doubt",
        other => other,
    }
}

fn remedy_text(remedy: &str) -> &str {
    match remedy {
        name if name == Remedy::KeyAgreement.name() => "key agreement",
        name if name == Remedy::LocalVisit.name() => "a local visit",
        name if name == Remedy::Rotation.name() => "a rotation",
        name if name == Remedy::Probe.name() => "a probe",
        other => other,
    }
}
