//! Security events for officers: what a meter's answer to a challenge showed.

use kms_domain::{KeyType, KeyVersionNumber, SecuritySetupId, SystemTitle};
use kms_proto::v1::{self, audit_record::Event};
use kms_store::Reads;

use crate::transfer::{EARLIER_KEY_HELD, earlier_key_held};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};

/// What a meter's answer to a challenge showed.
#[derive(Clone, Copy)]
pub(super) struct Alert {
    pub(super) meter: SystemTitle,
    pub(super) setup: SecuritySetupId,
    pub(super) shown: Shown,
}

#[derive(Clone, Copy)]
pub(super) enum Shown {
    /// The meter used a counter below one that it had used before under the same key.
    Backwards { version: KeyVersionNumber, known: u32, seen: u32 },
    /// The meter used a version that is no longer active.
    EarlierKey { key_type: KeyType, version: KeyVersionNumber },
}

/// What identifies an alert, so that it is recorded once: meter, security setup, event, key type
/// and version.
pub(super) type AlertKey = (SystemTitle, SecuritySetupId, &'static str, KeyType, KeyVersionNumber);

impl Alert {
    pub(super) const fn kind(&self) -> &'static str {
        match self.shown {
            Shown::Backwards { .. } => "meter-counter-backwards",
            Shown::EarlierKey { .. } => EARLIER_KEY_HELD,
        }
    }

    pub(super) fn detail(&self) -> String {
        match self.shown {
            Shown::Backwards { version, known, seen } => {
                format!(
                    "under GUEK version {version} the meter used counter {seen} after {known}, and its key was not changed in between: it may repeat nonces"
                )
            }
            Shown::EarlierKey { key_type, version } => earlier_key_held(key_type, version),
        }
    }

    pub(super) const fn key(&self) -> AlertKey {
        let (key_type, version) = match self.shown {
            Shown::Backwards { version, .. } => (KeyType::GUEK, version),
            Shown::EarlierKey { key_type, version } => (key_type, version),
        };
        (self.meter, self.setup, self.kind(), key_type, version)
    }
}

/// The act that records what a caller's frames showed.
pub(super) struct Alerts(pub(super) Vec<Alert>);

impl Act for Alerts {
    type Answer = ();
    type Past = Never;

    fn name(&self) -> &'static str {
        "unprotectFrame"
    }

    fn reads(&self) -> Reads {
        Reads::default()
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        Ok(asker
            .without_policy("the frames were opened under a policy's permit; this puts on the record what they showed"))
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<()>, ServiceError> {
        let mut entry = None;
        for found in &self.0 {
            entry = Some(view.append(Event::SecurityEvent(v1::SecurityEvent {
                kind: found.kind().to_owned(),
                detail: found.detail(),
                meter: found.meter.octets().to_vec().into(),
            })));
        }
        Ok(Decision::of(entry, ()))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<(), ServiceError> {
        match never {}
    }
}
