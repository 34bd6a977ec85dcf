//! Keys of groups that a transfer delivers under a KEK that somebody else could know.

use std::sync::Arc;

use kms_domain::{ExposureReason, KeyType, KeyVersion, Meter, Owner, SharedExposures, Stage};

use crate::keys::exposure::expose_to_who_knows_a_kek;
use kms_base::error::ServiceError;
use kms_ledger::View;

/// Notes in the group's row who could know the key that leaves now. A key that leaves under an
/// exposed KEK is exposed to everybody who could know that KEK and record the traffic. The KEK
/// could be known from another meter that has the same key. If an officer has reported that
/// somebody knows the KEK, the row also says that the group's key must be rotated.
pub(super) fn expose_delivered(view: &mut View<'_, '_>, meter: &Meter) -> Result<(), ServiceError> {
    let Some(transfer) = meter.transfer.as_ref().filter(|transfer| matches!(transfer.stage, Stage::Deliver { .. }))
    else {
        return Ok(());
    };
    let Some((key, Owner::Group(id))) = transfer.current().map(|key| (key, key.owner)) else { return Ok(()) };
    let keks = meter.slots.get(transfer.setup, KeyType::KEK);
    let Some((keks, kek)) = keks.and_then(|keks| Some((keks, keks.version(key.kek)?))) else { return Ok(()) };
    let mut shared = SharedExposures::new();
    for id in keks.versions().iter().filter_map(KeyVersion::domain) {
        if let Some(domain) = view.domain(id)? {
            shared.insert(id, domain.exposures.clone());
        }
    }
    let exposures = meter.slots.exposures_of(transfer.setup, kek, &shared);
    if exposures.is_empty() {
        return Ok(());
    }
    let Some(mut group) = view.group(id)? else { return Ok(()) };
    let now = view.now();
    let slot = Arc::make_mut(&mut group).slots.get_mut(transfer.setup, key.key_type);
    let version = slot
        .and_then(|slot| slot.version_mut(key.version))
        .map_err(|error| ServiceError::Internal(error.to_string()))?;
    let mut first = false;
    for exposure in exposures.iter() {
        first |= version.expose(exposure.party.clone(), ExposureReason::TransferUnderExposedKek, now);
    }
    if first {
        view.put_group((*group).clone())?;
    }
    for exposure in exposures.iter().filter(|exposure| exposure.reason == ExposureReason::Reported) {
        let delivered =
            meter.shared_of(key.owner, transfer.setup, key.key_type).filter(|shared| shared.version == key.version);
        expose_to_who_knows_a_kek(view, meter, &delivered.copied().collect::<Vec<_>>(), &exposure.party)?;
    }
    Ok(())
}
