//! A meter as the contract shows it. These messages have no fields for keys, wrapped or not (I1).

use std::sync::Arc;

use kms_domain::{
    CounterDomain, CounterKey, CounterOwnership, CounterPlace, Counters, DeviceProfile, Exposure, KeyOrigin, KeyType,
    KeyVersion, Meter, SecuritySetupId, SharedExposures, Slot, Slots, Transfer,
};
use kms_proto::v1;

/// The meter as an entry of a list.
pub(super) fn summary(meter: &Meter) -> v1::MeterSummary {
    v1::MeterSummary {
        meter: meter.title.octets().to_vec().into(),
        manufacturer: meter.class.vendor.to_string(),
        serial: meter.serial.clone(),
        device_profile: meter.class.profile.to_string(),
        status: meter.class.status.to_string(),
        head_end: meter.class.head_end.as_ref().map(ToString::to_string).unwrap_or_default(),
        batch: meter.batch.clone(),
        rotation_due: meter.slots.iter().filter_map(Slot::held).any(KeyVersion::rotation_due),
        compromised: meter.slots.iter().any(Slot::compromised),
    }
}

/// The keys of a row, with the rows that belong to them.
pub(crate) struct Shown<'a> {
    /// Names the key types that are its own.
    pub(crate) profile: Option<&'a DeviceProfile>,
    /// The keys.
    pub(crate) slots: &'a Slots,
    /// The counter domains that they name.
    pub(crate) domains: Vec<Arc<CounterDomain>>,
}

impl Shown<'_> {
    /// The meter that has these keys.
    pub(super) fn meter(
        &self,
        meter: &Meter,
        groups: Vec<String>,
        shared_keys: Vec<v1::SharedKey>,
        generation: u64,
    ) -> v1::Meter {
        v1::Meter {
            summary: Some(summary(meter)),
            security_suite: u32::from(meter.suite.number()),
            groups,
            security_setups: self.setups(),
            generation,
            shared_keys,
            transfer: meter.transfer.as_ref().map(|transfer| self.transfer(transfer)),
        }
    }

    fn transfer(&self, transfer: &Transfer) -> v1::MeterTransfer {
        let keys = transfer.keys.iter().enumerate().map(|(index, key)| v1::TransferredKey {
            key_type: self.key_type(key.key_type),
            version: key.version.number(),
            left: index < transfer.delivered,
        });
        v1::MeterTransfer {
            transfer_id: transfer.id.octets().to_vec().into(),
            security_setup: transfer.setup.obis().to_vec().into(),
            keys: keys.collect(),
            head_end: transfer.head_end.to_string(),
            client_title: transfer.client_title.octets().to_vec().into(),
            step: transfer.step,
            stage: transfer.stage.name().to_owned(),
            not_after_ms: transfer.not_after.0,
            campaign_id: transfer.campaign.map(|task| task.campaign.octets().to_vec().into()).unwrap_or_default(),
        }
    }

    /// All security setups with their keys.
    pub(crate) fn setups(&self) -> Vec<v1::SecuritySetup> {
        let mut setups: Vec<SecuritySetupId> = self.slots.iter().map(Slot::setup).collect();
        setups.dedup();
        setups.into_iter().map(|setup| self.setup(setup)).collect()
    }

    fn setup(&self, setup: SecuritySetupId) -> v1::SecuritySetup {
        // The invocation counters of a setup are those of its unicast encryption key; of a
        // broadcast key where there is no other.
        let counted = [KeyType::GUEK, KeyType::GBEK].into_iter().find_map(|key_type| self.slots.get(setup, key_type));
        v1::SecuritySetup {
            obis: setup.obis().to_vec().into(),
            slots: self.slots.of_setup(setup).map(|slot| self.slot(slot)).collect(),
            counters: counted.into_iter().flat_map(Slot::versions).flat_map(|version| self.counters(version)).collect(),
        }
    }

    fn slot(&self, slot: &Slot) -> v1::KeySlot {
        let shared: SharedExposures = self.domains.iter().map(|domain| (domain.id, domain.exposures.clone())).collect();
        let version = |version: &KeyVersion| {
            let exposures = self.slots.exposures_of(slot.setup(), version, &shared);
            v1::KeyVersion { exposures: exposures.iter().map(shown_exposure).collect(), ..shown_version(version) }
        };
        v1::KeySlot {
            key_type: self.key_type(slot.key_type()),
            versions: slot.versions().iter().map(version).collect(),
            in_doubt: slot.in_doubt(),
            compromised: slot.compromised(),
        }
    }

    fn key_type(&self, key_type: KeyType) -> String {
        self.profile.map_or_else(|| key_type.to_string(), |profile| profile.key_type_name(key_type))
    }

    fn counters(&self, version: &KeyVersion) -> Vec<v1::Counter> {
        let counters: Option<&Counters> = match version.counters() {
            CounterPlace::Own(counters) => Some(counters),
            CounterPlace::Domain(id) => {
                self.domains.iter().find(|domain| domain.id == *id).map(|domain| &domain.counters)
            }
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
                rotation_due: state.rotation_due(),
            })
            .collect()
    }
}

/// A key version as the contract shows it.
pub(crate) fn shown_version(version: &KeyVersion) -> v1::KeyVersion {
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
        exposures: version.exposures().iter().map(shown_exposure).collect(),
    }
}

fn shown_exposure(exposure: &Exposure) -> v1::Exposure {
    v1::Exposure { party: exposure.party.to_string(), since_ms: exposure.since.0, reason: exposure.reason.to_string() }
}
