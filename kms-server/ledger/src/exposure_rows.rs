//! What the index of exposures repeats of sealed rows. It is written in the transaction that writes
//! the row.

use kms_domain::{CounterDomain, IndexedExposure};
use kms_store::{ExposureOwner, ExposureRow, KeyValuePrefix};

use super::sealed::Value;

/// The rows of the index that repeat this row; none for a row without keys.
pub(super) fn exposure_rows(value: &Value) -> Vec<ExposureRow> {
    let (owner, exposures) = match value {
        Value::Meter(meter) => (ExposureOwner::Owner(meter.owner()), meter.indexed_exposures()),
        Value::Group(group) => (ExposureOwner::Owner(group.owner()), group.indexed_exposures()),
        Value::DeviceType(device_type) => (ExposureOwner::Owner(device_type.owner()), device_type.indexed_exposures()),
        Value::CounterDomain(domain) => (of_domain(domain), domain.indexed_exposures()),
        _ => return Vec::new(),
    };
    exposures.into_iter().map(|exposure| row(owner, exposure)).collect()
}

/// What changes in the index when `before` becomes `after`. Nobody forgets a key, so no row goes.
pub(super) fn changed_exposure_rows(before: Option<&Value>, after: &Value) -> Vec<ExposureRow> {
    if let (Some(Value::Meter(before)), Value::Meter(after)) = (before, after) {
        let owner = ExposureOwner::Owner(after.owner());
        return after.indexed_changes(before).into_iter().map(|exposure| row(owner, exposure)).collect();
    }
    let known = before.map(exposure_rows).unwrap_or_default();
    let mut rows = exposure_rows(after);
    rows.retain(|row| !known.contains(row));
    rows
}

const fn of_domain(domain: &CounterDomain) -> ExposureOwner {
    ExposureOwner::KeyValue(KeyValuePrefix::of(domain.id))
}

fn row(owner: ExposureOwner, exposure: IndexedExposure) -> ExposureRow {
    ExposureRow {
        party: exposure.party.into(),
        owner,
        slots: exposure.slots,
        open: exposure.open,
        newest: exposure.newest,
    }
}
