//! Which invocation counter a client title uses with a meter, as the device profile says (I4).

use kms_domain::{CounterKey, Meter, OnNewKey, SecuritySetupId, SystemTitle};

use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// The counter of a client title in a meter's security setup: one per client title, or one for the
/// whole setup, as the device profile says.
///
/// # Errors
/// This server does not know the meter's device profile.
pub(crate) fn counter_key(
    island: &IslandContext,
    meter: &Meter,
    setup: SecuritySetupId,
    client: SystemTitle,
) -> Result<CounterKey, ServiceError> {
    if client == meter.title {
        // I4: a client with the meter's title would repeat the nonces of the meter's own answers.
        return Err(ServiceError::denied(format!("a client title that is the meter's own, {client}")));
    }
    let profile =
        island.profiles.get(&meter.class.profile).and_then(|profile| profile.setup(setup)).ok_or_else(|| {
            ServiceError::FailedPrecondition {
                reason: format!(
                    "the device profile `{}` with security setup {setup} is not among this server's",
                    meter.class.profile
                ),
                next_step: "add its file to the folder of device profiles on every server".to_owned(),
            }
        })?;
    Ok(profile.counter.scope.key(client))
}

/// What the meter's counters do when its encryption key changes, as the device profile says.
/// Without a profile they continue, which every meter accepts.
pub(crate) fn on_new_key(island: &IslandContext, meter: &Meter, setup: SecuritySetupId) -> OnNewKey {
    island
        .profiles
        .get(&meter.class.profile)
        .and_then(|profile| profile.setup(setup))
        .map_or(OnNewKey::Continue, |profile| profile.counter.on_new_key)
}
