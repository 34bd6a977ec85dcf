//! The rotation of a group's key: one version for all members, a threshold, an overlap, and what a
//! member that goes takes with it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::Bytes;
use kms_domain::*;

const NOW: UnixMillis = UnixMillis(1_795_165_200_000);
const SETUP: SecuritySetupId = SecuritySetupId::DEFAULT;
const GBEK: KeyType = KeyType::GBEK;

fn number(number: u32) -> KeyVersionNumber {
    KeyVersionNumber::new(number).unwrap()
}

fn new(state: KeyState) -> NewKeyVersion {
    let wrapped = WrappedKey::new(GBEK, 1, Bytes::from_static(&[0; 24])).unwrap();
    NewKeyVersion { state, origin: KeyOrigin::Generated, wrapped: Some(wrapped), fingerprint: None }
}

/// A group whose members hold version 1.
fn group() -> Group {
    let mut slot = Slot::new(SETUP, GBEK);
    slot.add_version(new(KeyState::Active), NOW).unwrap();
    Group {
        slots: Slots::new(vec![slot]).unwrap(),
        ..Group::new(GroupId(3), "north".to_owned(), SecuritySuite::Suite0, NOW)
    }
}

fn begin(group: &mut Group) -> BegunRotation {
    group.begin_rotation(SETUP, GBEK, &new(KeyState::PreActive), None, NOW).unwrap()
}

fn counts(members: u64, acknowledged: u64) -> MemberCounts {
    MemberCounts { members, acknowledged, unacknowledged: 0 }
}

fn issuable(group: &Group, named: Option<u32>) -> Option<u32> {
    group.issuable(SETUP, GBEK, named.map(number)).map(|version| version.number().number())
}

fn delivered(version: u32) -> SharedKey {
    SharedKey {
        owner: Owner::Group(GroupId(3)),
        setup: SETUP,
        key_type: GBEK,
        version: number(version),
        kek: number(1),
        acknowledged: false,
    }
}

#[test]
fn one_version_for_all_members_and_both_in_the_overlap() {
    let mut group = group();
    assert_eq!(
        (issuable(&group, None), issuable(&group, Some(1)), issuable(&group, Some(2))),
        (Some(1), Some(1), None)
    );
    assert_eq!(begin(&mut group), BegunRotation { version: number(2), made: true, given_up: None });
    // A further campaign goes on with the version that is rolled out.
    assert_eq!(begin(&mut group), BegunRotation { version: number(2), made: false, given_up: None });
    assert_eq!(group.newest(SETUP, GBEK).unwrap().number(), number(2));
    // I3: it is issued to nobody before the switch.
    assert_eq!((issuable(&group, None), issuable(&group, Some(2))), (Some(1), None));
    assert_eq!(
        group.switch(SETUP, GBEK, number(2), false, NOW),
        Err(GroupError::TooFew { threshold: SwitchThreshold::DEFAULT })
    );
    assert!(!group.note_members(SETUP, GBEK, number(2), counts(100, 94), NOW));
    assert!(!group.note_members(SETUP, GBEK, number(1), counts(100, 100), NOW), "another version");
    assert!(group.note_members(SETUP, GBEK, number(2), counts(100, 95), NOW));
    assert_eq!(group.rotation(SETUP, GBEK).unwrap().stage(), RotationStage::MaySwitch);
    assert_eq!(group.switch(SETUP, GBEK, number(1), false, NOW), Err(GroupError::NotRolledOut { version: number(1) }));
    assert_eq!(group.switch(SETUP, GBEK, number(2), false, NOW), Ok(Some(number(1))));
    assert_eq!(
        (issuable(&group, None), issuable(&group, Some(1)), issuable(&group, Some(2))),
        (Some(2), Some(1), Some(2))
    );
    assert!(group.switch(SETUP, GBEK, number(2), true, NOW).is_err(), "it has switched");
    // The overlap ends with the last member.
    assert!(!group.note_members(SETUP, GBEK, number(2), counts(100, 99), NOW));
    assert!(group.note_members(SETUP, GBEK, number(2), counts(100, 100), NOW));
    assert_eq!((issuable(&group, None), issuable(&group, Some(1))), (Some(2), None));
    // I3: the former version stays a candidate until the retention time has passed.
    assert_eq!(group.slots.get(SETUP, GBEK).unwrap().candidates().count(), 2);
    assert_eq!(begin(&mut group).version, number(3));
}

#[test]
fn a_threshold_is_1_to_100_percent_of_at_least_one_member() {
    assert!(SwitchThreshold::new(0).is_err() && SwitchThreshold::new(101).is_err());
    let all = SwitchThreshold::new(100).unwrap();
    assert!(
        !all.is_reached(counts(0, 0))
            && !all.is_reached(counts(u64::MAX, u64::MAX - 1))
            && all.is_reached(counts(u64::MAX, u64::MAX))
    );
    assert!(SwitchThreshold::new(1).unwrap().is_reached(counts(100, 1)));
    let mut group = group();
    begin(&mut group);
    assert_eq!(group.switch(SETUP, GBEK, number(2), true, NOW), Ok(Some(number(1))), "early, by someone who says so");
}

#[test]
fn a_member_that_goes_takes_its_versions_with_it() {
    let mut group = group();
    let exposed = group.expose_to_former_member(&[], ExposureReason::MemberLeft, NOW);
    assert_eq!(exposed, [(SETUP, GBEK, number(1))]);
    assert_eq!(group.rotation_wanted(SETUP, GBEK), [ExposureReason::MemberLeft]);
    // The next one for the same reason changes nothing.
    assert_eq!(group.expose_to_former_member(&[], ExposureReason::MemberLeft, NOW), []);
    begin(&mut group);
    assert_eq!(group.rotation_wanted(SETUP, GBEK), [], "the version that is rolled out is known to no former member");
    // To this one the new version had not left; to the next one it had.
    assert_eq!(
        group.expose_to_former_member(&[delivered(1)], ExposureReason::MemberRetired, NOW),
        [(SETUP, GBEK, number(1))]
    );
    assert_eq!(
        group.expose_to_former_member(&[delivered(2)], ExposureReason::MemberCompromised, NOW),
        [(SETUP, GBEK, number(1)), (SETUP, GBEK, number(2))]
    );
    assert_eq!(group.rotation_wanted(SETUP, GBEK), [ExposureReason::MemberCompromised]);
    // So it is given up, and the next version takes its place.
    assert_eq!(begin(&mut group), BegunRotation { version: number(3), made: true, given_up: Some(number(2)) });
    assert_eq!(group.slots.get(SETUP, GBEK).unwrap().version(number(2)).unwrap().state(), KeyState::Compromised);
    assert_eq!(group.rotation_wanted(SETUP, GBEK), []);
    assert_eq!(group.rotation(SETUP, GBEK).unwrap().version, number(3));
}
