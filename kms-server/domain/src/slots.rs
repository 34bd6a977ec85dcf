//! All key slots of one owner, and who could know the keys in them.

use std::borrow::Cow;

use crate::{
    Exposure, ExposureReason, KeyType, KeyVersion, SecuritySetupId, SharedExposures, Slot, SlotError, exposure::learn,
};

/// All key slots of one owner, in order of security setup and key type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slots(Vec<Slot>);

impl Slots {
    /// These slots.
    ///
    /// # Errors
    /// A slot occurs twice.
    pub fn new(mut slots: Vec<Slot>) -> Result<Self, SlotError> {
        slots.sort_by_key(|slot| (slot.setup(), slot.key_type()));
        Self::from_sorted(slots)
    }

    /// These slots, which are in order.
    pub(crate) fn from_sorted(slots: Vec<Slot>) -> Result<Self, SlotError> {
        let duplicate = slots
            .iter()
            .zip(slots.iter().skip(1))
            .find(|(slot, next)| (slot.setup(), slot.key_type()) >= (next.setup(), next.key_type()));
        match duplicate {
            Some((_, slot)) => Err(SlotError::DuplicateSlot { setup: slot.setup(), key_type: slot.key_type() }),
            None => Ok(Self(slots)),
        }
    }

    /// All slots.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.iter()
    }

    /// All slots, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.0.iter_mut()
    }

    /// The slots of one security setup.
    pub fn of_setup(&self, setup: SecuritySetupId) -> impl Iterator<Item = &Slot> {
        self.0.iter().filter(move |slot| slot.setup() == setup)
    }

    /// One slot.
    pub fn get(&self, setup: SecuritySetupId, key_type: KeyType) -> Option<&Slot> {
        self.0.iter().find(|slot| slot.setup() == setup && slot.key_type() == key_type)
    }

    /// One slot, to be changed.
    ///
    /// # Errors
    /// There is none.
    pub fn get_mut(&mut self, setup: SecuritySetupId, key_type: KeyType) -> Result<&mut Slot, SlotError> {
        self.0
            .iter_mut()
            .find(|slot| slot.setup() == setup && slot.key_type() == key_type)
            .ok_or(SlotError::NoSuchSlot { setup, key_type })
    }

    /// Who outside the HSM could know a version of one of these slots: the exposures of the version
    /// itself, those of the same value in other slots, and those of the KEKs that it travelled
    /// under, if their values are shared with other slots.
    pub fn exposures_of<'a>(
        &self,
        setup: SecuritySetupId,
        version: &'a KeyVersion,
        shared: &SharedExposures,
    ) -> Cow<'a, [Exposure]> {
        let mut exposures = Cow::Borrowed(version.exposures());
        // Most islands have no shared key values.
        if shared.is_empty() {
            return exposures;
        }
        let mut add = |more: &[Exposure]| {
            let mut all = exposures.to_vec();
            if learn(&mut all, more) {
                exposures = Cow::Owned(all);
            }
        };
        if let Some(more) = version.domain().and_then(|domain| shared.get(&domain)) {
            add(more);
        }
        let keks = self.get(setup, KeyType::KEK);
        let mut under = version.transport.kek;
        // A KEK leaves under an earlier KEK, so this loop ends.
        while let Some(kek) = under.and_then(|number| keks?.version(number)) {
            if let Some(known) = kek.domain().and_then(|domain| shared.get(&domain)) {
                let travelled: Vec<Exposure> = known
                    .iter()
                    .map(|exposure| Exposure { reason: ExposureReason::TransferUnderExposedKek, ..exposure.clone() })
                    .collect();
                add(&travelled);
            }
            under = kek.transport.kek.filter(|earlier| *earlier < kek.number);
        }
        exposures
    }

    /// Adds a slot.
    ///
    /// # Errors
    /// It is there already.
    pub fn insert(&mut self, slot: Slot) -> Result<(), SlotError> {
        match self.0.binary_search_by_key(&(slot.setup(), slot.key_type()), |known| (known.setup(), known.key_type())) {
            Ok(_) => Err(SlotError::DuplicateSlot { setup: slot.setup(), key_type: slot.key_type() }),
            Err(at) => {
                self.0.insert(at, slot);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        CounterDomain, CounterDomainId, KeyDerivation, KeyLength, KeyOrigin, KeyState, KeyVersionNumber, NewKeyVersion,
        Party, UnixMillis, WrappedKey,
    };

    const NOW: UnixMillis = UnixMillis(1_000_000);

    fn diversified(state: KeyState) -> NewKeyVersion {
        let origin = KeyOrigin::Diversified {
            root_version: 1,
            derivation: KeyDerivation::Sp800108Cmac,
            length: KeyLength::Aes128,
        };
        NewKeyVersion { state, origin, wrapped: None, fingerprint: None }
    }

    fn generated(state: KeyState) -> NewKeyVersion {
        let wrapped = WrappedKey::new(KeyType::GUEK, 1, Bytes::from_static(&[9; 24])).unwrap();
        NewKeyVersion { state, origin: KeyOrigin::Generated, wrapped: Some(wrapped), fingerprint: None }
    }

    fn slot() -> Slot {
        Slot::new(SecuritySetupId::DEFAULT, KeyType::GUEK)
    }

    #[test]
    fn who_knows_one_slot_of_a_value_knows_all() {
        let party = || Party::Principal(crate::PrincipalId::parse("urn:meterkms:north:head-end:hes-2").unwrap());
        let (mut one, mut other) = (slot(), slot());
        for slot in [&mut one, &mut other] {
            slot.add_version(generated(KeyState::Active), NOW).unwrap();
        }
        one.version_mut(KeyVersionNumber::FIRST).unwrap().expose(party(), ExposureReason::Grant, NOW.after(5));
        let mut domain = CounterDomain::new(CounterDomainId([1; 16]));
        one.join_domain(KeyVersionNumber::FIRST, &mut domain).unwrap();
        other.join_domain(KeyVersionNumber::FIRST, &mut domain).unwrap();
        let known = [Exposure { party: party(), since: NOW.after(5), reason: ExposureReason::Grant }];
        assert_eq!(domain.exposures, known);
        assert!(!domain.learn(&known));
        let earlier = [Exposure { since: NOW, ..known[0].clone() }];
        assert!(domain.learn(&earlier) && domain.exposures == earlier);

        let shared = SharedExposures::from([(domain.id, domain.exposures)]);
        let slots = Slots::new(vec![other]).unwrap();
        let version = slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().active().unwrap();
        assert!(version.exposures().is_empty());
        assert_eq!(*slots.exposures_of(SecuritySetupId::DEFAULT, version, &shared), earlier);
        assert!(slots.exposures_of(SecuritySetupId::DEFAULT, version, &SharedExposures::new()).is_empty());
    }

    #[test]
    fn who_knows_a_kek_by_another_slot_knows_what_left_under_it() {
        let mut kek = Slot::new(SecuritySetupId::DEFAULT, KeyType::KEK);
        kek.add_version(diversified(KeyState::Active), NOW).unwrap();
        let mut domain = CounterDomain::new(CounterDomainId([1; 16]));
        kek.join_domain(KeyVersionNumber::FIRST, &mut domain).unwrap();
        let mut guek = slot();
        let number = guek.add_version(generated(KeyState::PreActive), NOW).unwrap();
        guek.mark_left(number, 1, KeyVersionNumber::FIRST).unwrap();
        let slots = Slots::new(vec![kek, guek]).unwrap();
        let shared = SharedExposures::from([(
            domain.id,
            vec![Exposure { party: Party::Anyone, since: NOW, reason: ExposureReason::Reported }],
        )]);
        let version = slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().version(number).unwrap();
        let known = slots.exposures_of(SecuritySetupId::DEFAULT, version, &shared);
        assert_eq!(
            *known,
            [Exposure { party: Party::Anyone, since: NOW, reason: ExposureReason::TransferUnderExposedKek }]
        );
    }

    #[test]
    fn slots_are_found_and_not_doubled() {
        let mut slots = Slots::new(vec![slot(), Slot::new(SecuritySetupId::DEFAULT, KeyType::KEK)]).unwrap();
        assert_eq!(slots.iter().map(Slot::key_type).collect::<Vec<_>>(), [KeyType::KEK, KeyType::GUEK]);
        assert!(slots.insert(slot()).is_err());
        slots.insert(Slot::new(SecuritySetupId::from_octets([0, 1]), KeyType::KEK)).unwrap();
        assert_eq!(slots.of_setup(SecuritySetupId::DEFAULT).count(), 2);
        assert!(slots.get_mut(SecuritySetupId::DEFAULT, KeyType::GAK).is_err());
    }
}
