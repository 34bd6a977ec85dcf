//! Keys that somebody knows who should not: marked, so that they are never granted again.

use std::sync::Arc;

use kms_domain::{KeyType, KeyVersionNumber, Meter, Party, SecuritySetupId, SystemTitle};
use kms_proto::v1::{self, MetersChanged, audit_record::Event};
use kms_store::Reads;

use super::{MeterService, Request};
use crate::{
    audit::{Actor, Asked, Asking, Window},
    authz::{Action, Caller, Resource},
    error::ServiceError,
    island::{facts, principal_row},
    service::{owner::expose_to_who_knows_a_kek, retention::expose_groups_under_equal_keks},
};

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
    /// Marks a version of a key as compromised, and says how the meter stands then. If it was the
    /// active one, nothing of the key is granted until a new version is proven: a transfer brings
    /// it, since the HSM still makes exchanges under every candidate.
    ///
    /// # Errors
    /// Not permitted, which is also said of an unknown meter; there is no such version, or it is
    /// compromised or destroyed already; or the database is away.
    pub async fn report_compromise(
        &self,
        caller: &Caller,
        request: Request,
        report: Compromise,
    ) -> Result<v1::Meter, ServiceError> {
        let asking = Asking::new(caller, request.id, request.digest, Window::Administration);
        let reads = Reads {
            meters: vec![report.meter],
            sealed: vec![principal_row(&caller.principal)],
            requests: asking.reads(),
            ..Reads::default()
        };
        let actor = Actor::caller(caller, Some(request.id), Action::ReportCompromise.name());
        let (island, caller_again, title) = (self.island.clone(), caller.clone(), report.meter);
        let (key_type, version) = (report.key_type, report.version);
        let act = self.island.committer.act(actor, reads, move |view| {
            let principal = view.caller(&caller_again)?;
            let permits = |meter: &Meter| {
                island
                    .policy
                    .load()
                    .permits(&facts(&principal), &Action::ReportCompromise, &Resource::Meters(&meter.class))
                    .is_permit()
            };
            let mut meter = view
                .meter(report.meter)?
                .filter(|meter| permits(meter))
                .ok_or_else(|| ServiceError::denied(format!("reportCompromise with meter {}", report.meter)))?;
            if let Asked::Before(_) = view.asked(&asking)? {
                return Ok(());
            }
            let refuse = |reason: String| ServiceError::FailedPrecondition {
                reason,
                next_step: "look at the meter with `kms meter show`".to_owned(),
            };
            let found = meter.slots.iter().find(|slot| {
                slot.key_type() == report.key_type && report.setup.is_none_or(|setup| slot.setup() == setup)
            });
            let setup = found
                .map(kms_domain::Slot::setup)
                .ok_or_else(|| refuse(format!("the meter has no {} of its own", report.key_type)))?;
            let shared = Arc::make_mut(&mut meter)
                .report_compromise(setup, report.key_type, report.version, &report.known_to, view.now())
                .map_err(|error| refuse(error.to_string()))?;
            view.append(Event::MetersChanged(MetersChanged {
                change: "key-compromised".to_owned(),
                meters: vec![report.meter.octets().to_vec().into()],
                value: format!(
                    "{} version {} in security setup {setup}, known to {}",
                    report.key_type, report.version, report.known_to
                ),
                reason: report.reason.clone(),
            }));
            view.put_meter((*meter).clone(), false)?;
            expose_to_who_knows_a_kek(view, &meter, &shared, &report.known_to)?;
            view.answered(&asking);
            Ok(())
        });
        act.await?;
        // Other meters may have the same value as their KEK. Which ones, no list says: where this
        // is cut off, the next day's housekeeping does it.
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
