//! A device of a shipment that the island knows already: whether it fits, and the counter floors
//! that it brings.

use kms_domain::{
    CounterDomain, CounterOwnership, CounterState, KeyState, KeyType, KeyVersion, Meter, ShipmentLineError,
};

use super::{batch::ReadyDevice, duplicates::lost_domain, error::refuse, verify::Verified};
use kms_base::error::ServiceError;
use kms_ledger::View;

/// Whether a known meter fits the line: the same device with the same keys. A key fits if any
/// version of its slot has the value.
pub(super) fn compare(verified: &Verified, known: &Meter, device: &ReadyDevice) -> Result<(), ShipmentLineError> {
    let Verified { header, profile, .. } = verified;
    if known.class.vendor != header.manufacturer || known.class.profile != header.device_profile {
        return Err(refuse(
            "title",
            format!(
                "{} is already registered, with device profile `{}` of {}",
                device.title, known.class.profile, known.class.vendor
            ),
        ));
    }
    if known.serial != device.serial {
        return Err(refuse("serial", format!("{} is already registered, with another serial number", device.title)));
    }
    for (index, key) in device.keys.iter().enumerate() {
        let same = known
            .slots
            .get(key.setup, key.key_type)
            .is_some_and(|slot| slot.versions().iter().any(|version| version.fingerprint() == Some(key.fingerprint)));
        if !same {
            return Err(refuse(
                &format!("keys[{index}].wrapped"),
                format!("{} is already registered, with another {}", device.title, profile.key_type_name(key.key_type)),
            ));
        }
    }
    Ok(())
}

/// I4: the next counter of a known meter must be at or above the floor of the line. Inside a chunk
/// that a server allocates from, the floor is raised. Above all that is reserved, the line is
/// refused, since it would use up counters: an officer adopts such a floor. True if a counter was
/// raised.
pub(super) fn take_floors(
    view: &mut View<'_, '_>,
    known: &Meter,
    device: &ReadyDevice,
) -> Result<Result<bool, ShipmentLineError>, ServiceError> {
    let fault = |error: &dyn std::fmt::Display| ServiceError::Internal(error.to_string());
    let mut meter = known.clone();
    let mut domains: Vec<CounterDomain> = Vec::new();
    for (index, counter) in device.counters.iter().enumerate().filter(|(_, counter)| counter.owned_by.is_none()) {
        let floor = u64::from(counter.floor);
        for key in device
            .keys
            .iter()
            .filter(|key| key.setup == counter.setup && matches!(key.key_type, KeyType::GUEK | KeyType::GBEK))
        {
            let Ok(slot) = meter.slots.get_mut(key.setup, key.key_type) else { continue };
            let same = |version: &&KeyVersion| {
                version.fingerprint() == Some(key.fingerprint) && version.state() != KeyState::Destroyed
            };
            let Some(number) = slot.versions().iter().find(same).map(KeyVersion::number) else { continue };
            let version = slot.version_mut(number).map_err(|error| fault(&error))?;
            let counters = match version.domain() {
                None => version.counters_mut().map_err(|error| fault(&error))?,
                Some(id) => {
                    if !domains.iter().any(|domain| domain.id == id) {
                        domains.extend(view.domain(id)?.map(|domain| (*domain).clone()));
                    }
                    let Some(domain) = domains.iter_mut().find(|domain| domain.id == id) else {
                        return Err(lost_domain(id, device.title));
                    };
                    &mut domain.counters
                }
            };
            let state = counters.get(counter.key);
            if state.is_some_and(|state| *state.ownership() != CounterOwnership::Kms) {
                continue;
            }
            if floor > state.map_or_else(|| CounterState::FIRST.into(), CounterState::bound) {
                let reason = format!(
                    "{} is already registered, and its counters below {} are not used up: adopt the floor with `kms meter adopt`",
                    device.title, counter.floor
                );
                return Ok(Err(refuse(&format!("counters[{index}].floor"), reason)));
            }
            if state.is_some() {
                counters.raise_floor(counter.key, floor, None).map_err(|error| fault(&error))?;
            }
        }
    }
    let mut raised = false;
    if meter.slots != known.slots {
        raised = true;
        view.put_meter(meter, false)?;
    }
    for domain in domains {
        if view.domain(domain.id)?.is_none_or(|stored| stored.counters != domain.counters) {
            raised = true;
            view.put_domain(domain)?;
        }
    }
    Ok(Ok(raised))
}
