//! A meter as the contract shows it. Key bytes, wrapped or not, have no way into these messages (I1).

use std::sync::Arc;

use kms_domain::{CounterDomain, CounterKey, CounterOwnership, CounterPlace, Counters, KeyOrigin, KeyType, KeyVersion, Meter, SecuritySetupId, Slot};
use kms_proto::v1;

use crate::island::Island;

/// The meter in a line of a list.
pub(super) fn summary(meter: &Meter) -> v1::MeterSummary {
    v1::MeterSummary {
        meter: meter.title.octets().to_vec().into(),
        manufacturer: meter.class.vendor.to_string(),
        serial: meter.serial.clone(),
        device_profile: meter.class.profile.to_string(),
        status: meter.class.status.to_string(),
        head_end: meter.class.head_end.as_ref().map(ToString::to_string).unwrap_or_default(),
        batch: meter.batch.clone(),
    }
}

/// A meter with the rows that belong to it.
pub(super) struct Shown<'a> {
    pub(super) island: &'a Island,
    pub(super) meter: &'a Meter,
    pub(super) domains: Vec<Arc<CounterDomain>>,
    pub(super) groups: Vec<String>,
}

impl Shown<'_> {
    pub(super) fn to_proto(&self, generation: u64) -> v1::Meter {
        let mut setups: Vec<SecuritySetupId> = self.meter.slots.iter().map(Slot::setup).collect();
        setups.dedup();
        v1::Meter {
            summary: Some(summary(self.meter)),
            security_suite: u32::from(self.meter.suite.number()),
            groups: self.groups.clone(),
            security_setups: setups.into_iter().map(|setup| self.setup(setup)).collect(),
            generation,
        }
    }

    fn setup(&self, setup: SecuritySetupId) -> v1::SecuritySetup {
        // The invocation counters of a setup are those of its unicast encryption key; of a broadcast key where there is no other.
        let counted = [KeyType::GUEK, KeyType::GBEK].into_iter().find_map(|key_type| self.meter.slots.get(setup, key_type));
        v1::SecuritySetup {
            obis: setup.obis().to_vec().into(),
            slots: self.meter.slots.of_setup(setup).map(|slot| self.slot(slot)).collect(),
            counters: counted.into_iter().flat_map(Slot::versions).flat_map(|version| self.counters(version)).collect(),
        }
    }

    fn slot(&self, slot: &Slot) -> v1::KeySlot {
        let profile = self.island.profiles.get(&self.meter.class.profile);
        v1::KeySlot {
            key_type: profile.map_or_else(|| slot.key_type().to_string(), |profile| profile.key_type_name(slot.key_type())),
            versions: slot.versions().iter().map(version).collect(),
        }
    }

    fn counters(&self, version: &KeyVersion) -> Vec<v1::Counter> {
        let counters: Option<&Counters> = match version.counters() {
            CounterPlace::Own(counters) => Some(counters),
            CounterPlace::Domain(id) => self.domains.iter().find(|domain| domain.id == *id).map(|domain| &domain.counters),
        };
        let states = counters.map(Counters::states).unwrap_or_default();
        states
            .iter()
            .map(|state| v1::Counter {
                client_title: match state.key() {
                    CounterKey::ClientTitle(title) => title.octets().to_vec().into(),
                    CounterKey::Setup => bytes::Bytes::new(),
                },
                key_version: version.number().number(),
                reserved_below: state.bound(),
                owned_by: match state.ownership() {
                    CounterOwnership::Kms => String::new(),
                    CounterOwnership::HeadEnd(head_end) => head_end.to_string(),
                },
            })
            .collect()
    }
}

fn version(version: &KeyVersion) -> v1::KeyVersion {
    v1::KeyVersion {
        number: version.number().number(),
        state: version.state().to_string(),
        origin: match version.origin() {
            KeyOrigin::Diversified { .. } => "diversified",
            KeyOrigin::Generated => "generated",
            KeyOrigin::Imported => "imported",
        }
        .to_owned(),
        candidate: version.candidate(),
        duplicate: version.domain().is_some(),
        exposures: version
            .exposures()
            .iter()
            .map(|exposure| v1::Exposure { party: exposure.party.to_string(), since_ms: exposure.since.0, reason: exposure.reason.to_string() })
            .collect(),
    }
}
