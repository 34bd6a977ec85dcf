//! Keys of a shipment whose values other slots have too: they share one counter domain (I4).

use std::{collections::HashSet, sync::Arc};

use kms_domain::{
    CounterDomain, CounterDomainId, DeviceProfile, KeyVersionNumber, Meter, Owner, SlotError, SystemTitle,
};
use kms_proto::v1::DuplicateKey;
use kms_store::{FingerprintOwner, FingerprintPrefix};

use super::batch::{ReadyBatch, ReadyKey};
use kms_base::error::ServiceError;
use kms_ledger::View;

/// Reads all rows that the keys of a batch need whose values other slots have too. So the
/// transaction reads them at once, and not one after the other.
pub(super) fn read_rows(view: &mut View<'_, '_>, batch: &ReadyBatch) -> Result<(), ServiceError> {
    let mut failed = None;
    let mut seen: HashSet<[u8; 16]> = HashSet::new();
    for device in &batch.devices {
        if let Err(error) = view.meter(device.title) {
            failed = Some(error);
        }
        for key in &device.keys {
            let owners = view.fingerprint_owners(FingerprintPrefix::of(&key.fingerprint)).unwrap_or_else(|error| {
                failed = Some(error);
                Vec::new()
            });
            let again = !seen.insert(key.fingerprint);
            if (again || !owners.is_empty())
                && let Err(error) = view.domain(CounterDomainId(key.fingerprint))
            {
                failed = Some(error);
            }
            for owner in owners {
                if let Owner::Meter(title) = owner.owner
                    && let Err(error) = view.meter(title)
                {
                    failed = Some(error);
                }
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

/// I4: slots with the same key value share one counter domain. If another slot has the value of
/// this key already, both join the domain, and the duplicate is returned. The list of owners holds
/// the first slot with a value only. Later slots find the domain through it.
pub(super) fn join_duplicate(
    view: &mut View<'_, '_>,
    profile: &DeviceProfile,
    line: u64,
    key: &ReadyKey,
    meter: &mut Meter,
) -> Result<Option<DuplicateKey>, ServiceError> {
    let prefix = FingerprintPrefix::of(&key.fingerprint);
    let me = FingerprintOwner {
        owner: Owner::Meter(meter.title),
        setup: key.setup,
        key_type: key.key_type,
        version: KeyVersionNumber::FIRST,
    };
    let Some((first, title)) = first_owner(view, key, meter)? else {
        view.put_fingerprint(prefix, me);
        return Ok(None);
    };
    let id = CounterDomainId(key.fingerprint);
    let named = |meter: &Meter| {
        meter.slots.get(first.setup, first.key_type).and_then(|slot| slot.version(first.version)?.domain())
    };
    let names_one =
        if title == meter.title { named(meter) } else { view.meter(title)?.and_then(|other| named(&other)) }.is_some();
    let mut domain = match view.domain(id)? {
        Some(domain) => (*domain).clone(),
        None if names_one => return Err(lost_domain(id, title)),
        None => CounterDomain::new(id),
    };
    let fault = |error: SlotError| ServiceError::Internal(error.to_string());
    if title == meter.title {
        join(meter, &first, &mut domain).map_err(fault)?;
    } else if !names_one && let Some(mut other) = view.meter(title)? {
        let changed = Arc::make_mut(&mut other);
        join(changed, &first, &mut domain).map_err(fault)?;
        view.put_meter(changed.clone(), false)?;
    }
    join(meter, &me, &mut domain).map_err(fault)?;
    view.put_domain(domain)?;
    Ok(Some(DuplicateKey {
        line,
        meter: meter.title.octets().to_vec().into(),
        key_type: profile.key_type_name(key.key_type),
        other_meter: title.octets().to_vec().into(),
        security_setup: key.setup.obis().to_vec().into(),
    }))
}

/// The first slot with the key's value. The list of owners has a prefix only: the whole fingerprint
/// stands in the owner's sealed row.
fn first_owner(
    view: &mut View<'_, '_>,
    key: &ReadyKey,
    meter: &Meter,
) -> Result<Option<(FingerprintOwner, SystemTitle)>, ServiceError> {
    for owner in view.fingerprint_owners(FingerprintPrefix::of(&key.fingerprint))? {
        // Keys of groups and device types are never imported.
        let Owner::Meter(title) = owner.owner else { continue };
        let fingerprint = |meter: &Meter| {
            meter.slots.get(owner.setup, owner.key_type).and_then(|slot| slot.version(owner.version)?.fingerprint())
        };
        let found = if title == meter.title {
            fingerprint(meter)
        } else {
            view.meter(title)?.and_then(|other| fingerprint(&other))
        };
        if found == Some(key.fingerprint) {
            return Ok(Some((owner, title)));
        }
    }
    Ok(None)
}

fn join(meter: &mut Meter, owner: &FingerprintOwner, domain: &mut CounterDomain) -> Result<(), SlotError> {
    meter.slots.get_mut(owner.setup, owner.key_type)?.join_domain(owner.version, domain)
}

/// I4, I5: a domain that a key version names must have a row. A new domain would allocate counters
/// again that were allocated before.
pub(super) fn lost_domain(id: CounterDomainId, title: SystemTitle) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!(
            "a key of {title} counts in the counter domain {}, whose row is missing: it was deleted, or the database was restored in part",
            hex::encode(id.0)
        ),
        next_step: "restore the row from a copy of the database, then go on with the import".to_owned(),
    }
}
