//! The state of a group key's rotation, as the gRPC contract shows it.

use kms_domain::{Group, KeyType, KeyVersion, MemberCounts, SecuritySetupId};
use kms_proto::v1;

/// How many members of its group have a key.
pub(crate) fn rotation_message(
    group: &Group,
    setup: SecuritySetupId,
    key_type: KeyType,
    counts: MemberCounts,
) -> v1::GroupRotation {
    let slot = group.slots.get(setup, key_type);
    let number = |version: Option<&KeyVersion>| version.map_or(0, |version| version.number().number());
    let shown = v1::GroupRotation {
        group: group.name.clone(),
        security_setup: setup.obis().to_vec().into(),
        key_type: key_type.to_string(),
        active_version: number(slot.and_then(kms_domain::Slot::active)),
        threshold_percent: u32::from(group.switch_at.percent()),
        members: counts.members,
        acknowledged: counts.acknowledged,
        unacknowledged: counts.unacknowledged,
        wanted_because: group.rotation_wanted(setup, key_type).iter().map(ToString::to_string).collect(),
        ..v1::GroupRotation::default()
    };
    let Some(rotation) = group.rotation(setup, key_type) else { return shown };
    let former = slot.into_iter().flat_map(|slot| slot.versions().iter().rev()).find(|version| {
        version.number() < rotation.version
            && group
                .issuable(setup, key_type, Some(version.number()))
                .is_some_and(|issuable| issuable.number() == version.number())
    });
    let moment = |moment: Option<kms_domain::UnixMillis>| moment.map_or(0, |moment| moment.0);
    v1::GroupRotation {
        version: rotation.version.number(),
        stage: rotation.stage().name().to_owned(),
        former_version: if rotation.switched.is_some() { number(former) } else { 0 },
        campaign_id: rotation.campaign.map(|campaign| campaign.octets().to_vec().into()).unwrap_or_default(),
        begun_ms: rotation.begun.0,
        threshold_reached_ms: moment(rotation.reached),
        switched_ms: moment(rotation.switched),
        complete_ms: moment(rotation.completed),
        ..shown
    }
}
