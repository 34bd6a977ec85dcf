//! Compromised keys: key versions that somebody knows who must not are marked, and never granted
//! again.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{KeyType, KeyVersionNumber, Meter, Party, SecuritySetupId, Slot, SystemTitle};
use kms_proto::v1::{self, MetersChanged, audit_record::Event};
use kms_store::Reads;

use super::{MeterService, Request};
use crate::{equal_keys::expose_groups_under_equal_keks, keys::exposure::expose_to_who_knows_a_kek};
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Known, Permit, View};

/// A version that is compromised.
#[derive(Clone, Debug)]
pub struct Compromise {
    /// Of which meter.
    pub meter: SystemTitle,
    /// Of which security setup; `None`: the meter's first that has the key.
    pub setup: Option<SecuritySetupId>,
    /// Of which key.
    pub key_type: KeyType,
    /// Which version.
    pub version: KeyVersionNumber,
    /// Who knows it.
    pub known_to: Party,
    /// Why.
    pub reason: String,
}

impl MeterService {
    /// Marks a key version as compromised, and returns the meter. If it was the active version, the
    /// key is not granted until a new version is proven. A transfer can deliver that version,
    /// because the HSM still uses every candidate.
    ///
    /// # Errors
    /// Not permitted, which is also the answer for an unknown meter; the version does not exist, or
    /// is compromised or destroyed already; or the database cannot be reached.
    #[boxed]
    pub async fn report_compromise(
        &self,
        caller: &Caller,
        request: Request,
        report: Compromise,
    ) -> Result<v1::Meter, ServiceError> {
        let (title, key_type, version) = (report.meter, report.key_type, report.version);
        self.island.door.act(caller, request, report).await?;
        // Other meters may have the same value as their KEK, and no list says which. If this is
        // interrupted, the daily retention pass completes it.
        let equal = |meter: &Meter| {
            let mut versions =
                meter.slots.iter().filter(|slot| slot.key_type() == key_type).flat_map(kms_domain::Slot::versions);
            versions.any(|known| known.number() == version && known.domain().is_some())
        };
        if self.island.meter(title).await?.is_some_and(|meter| equal(&meter)) {
            expose_groups_under_equal_keks(&self.island).await?;
        }
        self.show(caller, title).await
    }
}

impl Act for Compromise {
    type Answer = ();
    type Past = Known;

    fn name(&self) -> &'static str {
        Action::ReportCompromise.name()
    }

    fn reads(&self) -> Reads {
        Reads { meters: vec![self.meter], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        let meter = view.meter(self.meter)?.ok_or_else(|| self.denied())?;
        asker.require_or(&Action::ReportCompromise, &Resource::Meters(&meter.class), || self.denied())
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<()>, ServiceError> {
        let mut meter = view.meter(self.meter)?.ok_or_else(|| self.denied())?;
        let refuse = |reason: String| ServiceError::FailedPrecondition {
            reason,
            next_step: "check the meter with `kms meter show`".to_owned(),
        };
        let wanted =
            |slot: &&Slot| slot.key_type() == self.key_type && self.setup.is_none_or(|setup| slot.setup() == setup);
        let setup = meter.slots.iter().find(wanted).map(Slot::setup);
        let setup = setup.ok_or_else(|| refuse(format!("the meter has no {} of its own", self.key_type)))?;
        let shared = Arc::make_mut(&mut meter)
            .report_compromise(setup, self.key_type, self.version, &self.known_to, view.now())
            .map_err(|error| refuse(error.to_string()))?;
        let entry = view.append(Event::MetersChanged(MetersChanged {
            change: "key-compromised".to_owned(),
            meters: vec![self.meter.octets().to_vec().into()],
            value: format!(
                "{} version {} in security setup {setup}, known to {}",
                self.key_type, self.version, self.known_to
            ),
            reason: self.reason.clone(),
        }));
        view.put_meter((*meter).clone(), false)?;
        expose_to_who_knows_a_kek(view, &meter, &shared, &self.known_to)?;
        Ok(Decision::recorded(entry, ()))
    }

    fn again(&self, _: Known, _: &Permit, _: &mut View<'_, '_>) -> Result<(), ServiceError> {
        Ok(())
    }
}

impl Compromise {
    /// The same answer for an unknown meter and for one that the caller may not change.
    fn denied(&self) -> ServiceError {
        ServiceError::denied(format!("reportCompromise with meter {}", self.meter))
    }
}
