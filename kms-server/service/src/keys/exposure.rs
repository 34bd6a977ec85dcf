//! Keys of groups that somebody knows who must not: noted in the group's row, and put on the record.

use std::sync::Arc;

use kms_domain::{
    ExposureReason, Group, GroupId, KeyType, KeyVersionNumber, Meter, Owner, Party, SecuritySetupId, SharedKey,
};
use kms_proto::v1::{SecurityEvent, audit_record::Event};

use kms_base::error::ServiceError;
use kms_ledger::View;

/// A member is gone from these groups: what it holds of their keys is exposed, and the keys have to
/// be rotated.
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
            // I5: its row was refused, which is on the record. The meter goes all the same.
            Ok(None) | Err(ServiceError::PermissionDenied { .. }) => continue,
            Err(error) => return Err(error),
        };
        let exposed = Arc::make_mut(&mut group).expose_to_former_member(&meter.shared, reason, view.now());
        tell_exposed(view, meter, &group, &exposed, &format!("a former member ({reason})"))?;
    }
    Ok(())
}

/// A KEK of a meter is compromised, under which keys of groups left for it: they are exposed to
/// whoever knows it, and have to be rotated. The meter's KEK first: else the next version would
/// leave under it.
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
            // I5: its row was refused, which is on the record. What is known of the meter is noted
            // all the same.
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
