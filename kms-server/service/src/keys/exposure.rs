//! Exposure of group keys: written into the group's row and recorded.

use std::sync::Arc;

use kms_domain::{
    ExposureReason, Group, GroupId, KeyType, KeyVersionNumber, Meter, Owner, Party, SecuritySetupId, SharedKey,
};
use kms_proto::v1::{SecurityEvent, audit_record::Event};

use kms_base::error::ServiceError;
use kms_ledger::View;

/// A meter left these groups. The group keys that it holds are exposed and must be rotated.
///
/// # Errors
/// A group's row was not read yet.
pub(crate) fn expose_to_former_member(
    view: &mut View<'_, '_>,
    meter: &Meter,
    groups: &[GroupId],
    reason: ExposureReason,
) -> Result<(), ServiceError> {
    for id in groups {
        let mut group = match view.group(*id) {
            Ok(Some(group)) => group,
            // I5: the group's row was refused, which is recorded. The meter leaves nevertheless.
            Ok(None) | Err(ServiceError::PermissionDenied { .. }) => continue,
            Err(error) => return Err(error),
        };
        let exposed = Arc::make_mut(&mut group).expose_to_former_member(&meter.shared, reason, view.now());
        tell_exposed(view, meter, &group, &exposed, &format!("a former member ({reason})"))?;
    }
    Ok(())
}

/// A meter's KEK is compromised, and group keys were sent to the meter under it. These keys are
/// exposed to the party that knows the KEK, and must be rotated. The meter's KEK is rotated first:
/// otherwise the next version would be sent under the compromised KEK.
///
/// # Errors
/// A group's row was not read yet.
pub(crate) fn expose_to_who_knows_a_kek(
    view: &mut View<'_, '_>,
    meter: &Meter,
    delivered: &[SharedKey],
    party: &Party,
) -> Result<(), ServiceError> {
    let mut groups: Vec<GroupId> =
        delivered.iter().filter_map(|key| if let Owner::Group(id) = key.owner { Some(id) } else { None }).collect();
    groups.sort_unstable();
    groups.dedup();
    for id in groups {
        let mut group = match view.group(id) {
            Ok(Some(group)) => group,
            // I5: the group's row was refused, which is recorded. The meter's own exposure is noted
            // nevertheless.
            Ok(None) | Err(ServiceError::PermissionDenied { .. }) => continue,
            Err(error) => return Err(error),
        };
        let exposed = Arc::make_mut(&mut group).expose_to_who_knows_a_kek(delivered, party, view.now());
        tell_exposed(
            view,
            meter,
            &group,
            &exposed,
            &format!("{party}, who knows the KEK of the member that it left under"),
        )?;
    }
    Ok(())
}

fn tell_exposed(
    view: &mut View<'_, '_>,
    meter: &Meter,
    group: &Group,
    exposed: &[(SecuritySetupId, KeyType, KeyVersionNumber)],
    known_to: &str,
) -> Result<(), ServiceError> {
    if exposed.is_empty() {
        return Ok(());
    }
    let wanted =
        |setup, key_type, number| group.newest(setup, key_type).is_some_and(|newest| newest.number() == number);
    for (setup, key_type, number) in exposed {
        let next = if wanted(*setup, *key_type, *number) { ": rotate it" } else { "" };
        let detail = format!(
            "group {}: {key_type} version {number} in security setup {setup} is known to {known_to}{next}",
            group.name
        );
        let meter = meter.title.octets().to_vec().into();
        view.append(Event::SecurityEvent(SecurityEvent { kind: "group-key-exposed".to_owned(), detail, meter }));
    }
    view.put_group(group.clone())
}
