//! The record of the steps of one act (I2), and of what was refused.

use kms_domain::{Answer, Confirmation, Evidence, Finding, Meter, Stage, Transfer};
use kms_proto::v1::{HeldVersion, TransferAdvance, TransfersAdvanced, audit_record::Event};

use super::step::Decided;
use crate::keys::setup::setup_record;
use kms_base::error::ServiceError;
use kms_ledger::View;

/// The steps of one act, for its record (I2).
#[derive(Default)]
pub(super) struct Advances {
    advances: Vec<TransferAdvance>,
    reason: String,
}

impl Advances {
    /// No steps yet, and why they are recorded.
    pub(super) fn because(reason: String) -> Self {
        Self { advances: Vec::new(), reason }
    }

    /// Tries the step of one meter. A step that fails changes nothing and is not recorded.
    pub(super) fn attempt<T>(
        &mut self,
        view: &mut View<'_, '_>,
        step: impl FnOnce(&mut View<'_, '_>, &mut Self) -> Result<T, ServiceError>,
    ) -> Result<T, ServiceError> {
        let before = self.advances.len();
        let outcome = view.attempt(|view| step(view, self));
        if outcome.is_err() {
            self.advances.truncate(before);
        }
        outcome
    }

    pub(super) fn push(&mut self, meter: &Meter, transfer: &Transfer, event: &str, step: u32, findings: &[Finding]) {
        let delivered = match transfer.stage {
            Stage::Deliver { .. } if step > 0 => transfer.current().copied(),
            _ => None,
        };
        let held = findings
            .iter()
            .filter_map(|finding| match finding {
                Finding::Held { key_type, version, evidence, confirmation } => Some(HeldVersion {
                    key_type: key_type.to_string(),
                    version: version.number(),
                    evidence: evidence.name().to_owned(),
                    confirmation: match confirmation {
                        Confirmation::Activated => "activated",
                        Confirmation::Active => "active",
                        Confirmation::Compromised => "compromised",
                        Confirmation::NotActive => "not-active",
                    }
                    .to_owned(),
                }),
                Finding::SharedAcknowledged { key_type, version, .. } => Some(HeldVersion {
                    key_type: key_type.to_string(),
                    version: version.number(),
                    evidence: Evidence::Acknowledged.name().to_owned(),
                    confirmation: "active".to_owned(),
                }),
                Finding::MeterCounterBackwards { .. } => None,
            })
            .collect();
        self.advances.push(TransferAdvance {
            meter: u64::from_be_bytes(meter.title.octets()),
            transfer_id: transfer.id.octets().to_vec().into(),
            step,
            event: event.to_owned(),
            security_setup: setup_record(transfer.setup),
            key_type: delivered.map(|key| key.key_type.to_string()).unwrap_or_default(),
            key_version: delivered.map_or(0, |key| key.version.number()),
            kek_version: delivered.map_or(0, |key| key.kek.number()),
            invocation_counters: if step > 0 { transfer.counters.clone() } else { Vec::new() },
            guek_version: transfer.pair().map_or(0, |pair| pair.encryption.number()),
            client_title: transfer.client_title.octets().to_vec().into(),
            held,
            answer: match transfer.answer {
                Answer::Silence => "silence",
                Answer::Accepted => "accepted",
                Answer::Refused(_) => "refused",
                Answer::Exception => "exception",
            }
            .to_owned(),
            campaign_id: transfer.campaign.map(|task| task.campaign.octets().to_vec().into()).unwrap_or_default(),
        });
    }

    pub(super) fn record(self, view: &mut View<'_, '_>) {
        if !self.advances.is_empty() {
            view.append(Event::TransfersAdvanced(TransfersAdvanced { advances: self.advances, reason: self.reason }));
        }
    }
}

/// Counts the refusals of single meters.
pub(super) fn refuse_all(view: &mut View<'_, '_>, decided: &[Decided]) {
    for (_, step) in decided {
        if let Err(error) = step {
            view.refuse(match error {
                ServiceError::PermissionDenied { .. } => "not permitted for a meter of the request".to_owned(),
                other => other.to_string(),
            });
        }
    }
}
