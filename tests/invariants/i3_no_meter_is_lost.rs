//! I3: no version that a meter may hold is destroyed, and none is granted before it is proven.
//! Transfers over the air come with the rotation work; this is the rule that they will stand on.

use kms_domain::{
    Confirmation, Evidence, KeyDerivation, KeyLength, KeyOrigin, KeyState, KeyType, KeyVersionNumber, NewKeyVersion,
    SecuritySetupId, Slot, SlotError, UnixMillis,
};

const DAY: i64 = 86_400_000;

fn new(state: KeyState) -> NewKeyVersion {
    let origin =
        KeyOrigin::Diversified { root_version: 1, derivation: KeyDerivation::Sp800108Cmac, length: KeyLength::Aes128 };
    NewKeyVersion { state, origin, wrapped: None, fingerprint: None }
}

#[test]
fn a_candidate_cannot_be_destroyed_and_a_pre_active_version_is_granted_to_nobody() {
    let now = UnixMillis(DAY);
    let mut slot = Slot::new(SecuritySetupId::DEFAULT, KeyType::GUEK);
    let first = slot.add_version(new(KeyState::Active), now).unwrap();
    let second = slot.add_version(new(KeyState::PreActive), now).unwrap();
    slot.mark_left(second, 1, KeyVersionNumber::FIRST).unwrap();
    // Its wrapped form has left: errors and silence prove nothing, so neither version may go.
    assert_eq!(
        slot.transition(second, KeyState::Destroyed, now),
        Err(SlotError::CandidateDestroyed { number: second })
    );
    assert!(slot.transition(first, KeyState::Destroyed, now).is_err());
    assert!(slot.grantable().all(|grantable| grantable.version.number() == first));
    // Proven: the earlier version stays until retention has passed.
    slot.confirm(second, 2, Evidence::Proven, now).unwrap();
    assert_eq!(slot.transition(first, KeyState::Destroyed, now), Err(SlotError::CandidateDestroyed { number: first }));
    assert!(!slot.release_candidates(DAY, now.after(DAY - 1)));
    assert_eq!(slot.transition(first, KeyState::Destroyed, now), Err(SlotError::CandidateDestroyed { number: first }));
    assert!(slot.release_candidates(DAY, now.after(DAY)));
    slot.transition(first, KeyState::Destroyed, now.after(DAY)).unwrap();
}

#[test]
fn a_compromised_version_never_comes_back() {
    let now = UnixMillis(DAY);
    let mut slot = Slot::new(SecuritySetupId::DEFAULT, KeyType::GUEK);
    let first = slot.add_version(new(KeyState::Active), now).unwrap();
    slot.transition(first, KeyState::Compromised, now).unwrap();
    for state in KeyState::ALL {
        if state != KeyState::Destroyed {
            assert!(slot.transition(first, state, now).is_err(), "{state}");
        }
    }
    assert_eq!(slot.confirm(first, 3, Evidence::Proven, now), Ok(Confirmation::Compromised));
    assert_eq!(slot.grantable().count(), 0);
}
