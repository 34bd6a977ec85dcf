//! A key slot: all versions that a key has had, and the candidates of I3.

use crate::{
    CounterDomain, CounterDomainId, CounterJump, CounterKey, CounterPlace, Counters, DiversificationContext, Evidence,
    KeyLength, KeyMaterial, KeyOrigin, KeyShape, KeyState, KeyType, KeyVersion, KeyVersionNumber, Owner,
    SecuritySetupId, Transport, UnixMillis, WrappedKey,
};

/// A key version to be added to a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewKeyVersion {
    /// [`KeyState::PreActive`], or [`KeyState::Active`] for a key that the meter already holds.
    pub state: KeyState,
    /// Where it comes from.
    pub origin: KeyOrigin,
    /// Its wrapped form; `None` exactly when it is diversified.
    pub wrapped: Option<WrappedKey>,
    /// The fingerprint of its value, if one was taken.
    pub fingerprint: Option<[u8; 16]>,
}

/// A key version that may be granted, and how likely it is that the meter uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grantable<'a> {
    /// The version.
    pub version: &'a KeyVersion,
    /// Its standing.
    pub standing: Standing,
}

/// The standing of a grantable version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Standing {
    /// The active version.
    Active,
    /// An earlier version to which the meter may have gone back.
    FormerCandidate,
}

/// A key slot: (owner, security setup, key type), and all versions that its key has had.
///
/// Always true: version numbers increase; at most one version is active; a destroyed version has no
/// key and is no candidate (I3); a diversified version stores no key, and every other version
/// stores one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    setup: SecuritySetupId,
    key_type: KeyType,
    versions: Vec<KeyVersion>,
}

impl Slot {
    /// A slot without versions.
    pub const fn new(setup: SecuritySetupId, key_type: KeyType) -> Self {
        Self { setup, key_type, versions: Vec::new() }
    }

    /// A slot with these versions, oldest first.
    ///
    /// # Errors
    /// The versions break a rule that is always true of a slot.
    pub(crate) fn from_versions(
        setup: SecuritySetupId,
        key_type: KeyType,
        versions: Vec<KeyVersion>,
    ) -> Result<Self, SlotError> {
        let slot = Self { setup, key_type, versions };
        slot.check()?;
        Ok(slot)
    }

    /// The security setup.
    pub const fn setup(&self) -> SecuritySetupId {
        self.setup
    }

    /// The key type.
    pub const fn key_type(&self) -> KeyType {
        self.key_type
    }

    /// All versions, oldest first.
    pub fn versions(&self) -> &[KeyVersion] {
        &self.versions
    }

    /// The version with this number.
    pub fn version(&self, number: KeyVersionNumber) -> Option<&KeyVersion> {
        // Numbers increase. Storing a meter reads all of its versions, so this search must be fast.
        self.versions.binary_search_by_key(&number, KeyVersion::number).ok().and_then(|at| self.versions.get(at))
    }

    /// The version with this number, to change its counters and exposures.
    ///
    /// # Errors
    /// There is none.
    pub fn version_mut(&mut self, number: KeyVersionNumber) -> Result<&mut KeyVersion, SlotError> {
        let at = self.versions.binary_search_by_key(&number, KeyVersion::number).ok();
        at.and_then(|at| self.versions.get_mut(at)).ok_or(SlotError::NoSuchVersion { number })
    }

    /// The active version.
    pub fn active(&self) -> Option<&KeyVersion> {
        self.versions.iter().find(|version| version.state == KeyState::Active)
    }

    /// I3: every version that the meter may hold.
    pub fn candidates(&self) -> impl Iterator<Item = &KeyVersion> {
        self.versions.iter().filter(|version| version.candidate)
    }

    /// The version that the meter holds as far as is known: the candidate that it showed last. If
    /// it has shown none: the active version, or the version that was active until it was reported
    /// as compromised.
    pub fn held(&self) -> Option<&KeyVersion> {
        let shown = self
            .candidates()
            .filter(|version| version.transport.confirmed > 0)
            .max_by_key(|version| version.transport.confirmed);
        let reported = || {
            self.candidates()
                .filter(|version| version.state == KeyState::Compromised && version.transport.left == 0)
                .last()
        };
        shown.or_else(|| self.active()).or_else(reported)
    }

    /// Whether the meter holds, as far as is known, a compromised version: it needs a new one.
    pub fn compromised(&self) -> bool {
        self.held().is_some_and(|held| held.state == KeyState::Compromised)
    }

    /// Whether it is in doubt that the meter holds the active version: a version left since the
    /// meter last showed one, or the version that it showed is not the active one. A report of
    /// compromise does not change what the meter holds.
    pub fn in_doubt(&self) -> bool {
        match self.held() {
            Some(held) => {
                self.unresolved()
                    || !(held.state == KeyState::Active
                        || held.state == KeyState::Compromised && self.active().is_none())
            }
            None => self.candidates().next().is_some(),
        }
    }

    /// Whether a version left since the meter last showed which one it holds. A compromised
    /// version, or one to which the meter went back, is no such doubt: the version is known and
    /// must be replaced.
    pub fn unresolved(&self) -> bool {
        let (held, shown) = self.held().map_or((None, 0), |held| (Some(held.number), held.transport.confirmed));
        self.candidates().any(|version| Some(version.number) != held && version.transport.left > shown)
    }

    /// The versions that may be granted, the active version first: never a pre-active (I3),
    /// suspended, compromised or destroyed one. Policy decides which of these a grantee gets;
    /// [`crate::MeterStatus::may_grant`] decides whether the meter's status permits grants.
    pub fn grantable(&self) -> impl Iterator<Item = Grantable<'_>> {
        let former =
            self.versions.iter().rev().filter(|version| version.state == KeyState::Deactivated && version.candidate);
        self.active()
            .map(|version| Grantable { version, standing: Standing::Active })
            .into_iter()
            .chain(former.map(|version| Grantable { version, standing: Standing::FormerCandidate }))
    }

    /// The number of the next version. It is derived or generated with this number.
    pub fn next_number(&self) -> KeyVersionNumber {
        self.versions.last().map_or(KeyVersionNumber::FIRST, |version| version.number.next())
    }

    /// What the HSM derives a diversified version from.
    pub const fn diversification(
        &self,
        owner: Owner,
        number: KeyVersionNumber,
        length: KeyLength,
    ) -> DiversificationContext {
        DiversificationContext { owner, setup: self.setup, key_type: self.key_type, version: number, length }
    }

    /// Adds a version, with the number [`Self::next_number`]. A version that starts active counts
    /// as held by the meter.
    ///
    /// # Errors
    /// The state is neither pre-active nor active, another version is active, or wrapped form and
    /// origin do not fit.
    pub fn add_version(&mut self, new: NewKeyVersion, now: UnixMillis) -> Result<KeyVersionNumber, SlotError> {
        if !matches!(new.state, KeyState::PreActive | KeyState::Active) {
            return Err(SlotError::Transition { number: self.next_number(), from: KeyState::PreActive, to: new.state });
        }
        let number = self.next_number();
        self.versions.push(KeyVersion {
            number,
            state: new.state,
            since: now,
            origin: new.origin,
            material: new.wrapped.map_or(KeyMaterial::Derived, KeyMaterial::Wrapped),
            fingerprint: new.fingerprint,
            candidate: new.state == KeyState::Active,
            exposures: Vec::new(),
            counters: CounterPlace::Own(Counters::default()),
            transport: Transport::default(),
        });
        self.check().inspect_err(|_| {
            self.versions.pop();
        })?;
        Ok(number)
    }

    /// Adds a version that the meter does not hold yet.
    ///
    /// # Errors
    /// It is not pre-active, or wrapped form and origin do not fit.
    pub(crate) fn add_pre_active(
        &mut self,
        new: &NewKeyVersion,
        now: UnixMillis,
    ) -> Result<KeyVersionNumber, SlotError> {
        if new.state != KeyState::PreActive {
            return Err(SlotError::Transition { number: self.next_number(), from: KeyState::PreActive, to: new.state });
        }
        self.add_version(new.clone(), now)
    }

    /// Moves a version to another state. A destroyed version loses its wrapped form.
    ///
    /// # Errors
    /// SP 800-57 does not have this transition, another version is active, or a candidate would be
    /// destroyed (I3).
    pub fn transition(&mut self, number: KeyVersionNumber, to: KeyState, now: UnixMillis) -> Result<(), SlotError> {
        let another_is_active = self.active().is_some_and(|active| active.number != number);
        let version = self.version_mut(number)?;
        if !version.state.may_become(to) {
            return Err(SlotError::Transition { number, from: version.state, to });
        }
        if to == KeyState::Active && another_is_active {
            return Err(SlotError::TwoActive);
        }
        if to == KeyState::Destroyed {
            // I3: nothing that the meter may hold is destroyed.
            if version.candidate {
                return Err(SlotError::CandidateDestroyed { number });
            }
            version.material = KeyMaterial::Destroyed;
        }
        version.state = to;
        version.since = now;
        Ok(())
    }

    /// Destroys a version that never left for the meter. Of several such versions in a row only the
    /// newest is kept, so that orders that are withdrawn repeatedly leave one version and not many.
    /// The kept version holds the number, which never names another key.
    ///
    /// # Errors
    /// There is no such version, or the meter may hold it (I3).
    pub(crate) fn discard(&mut self, number: KeyVersionNumber, now: UnixMillis) -> Result<(), SlotError> {
        self.transition(number, KeyState::Destroyed, now)?;
        while let [.., earlier, last] = self.versions.as_slice()
            && earlier.is_blank()
            && last.is_blank()
        {
            let at = self.versions.len().saturating_sub(2);
            self.versions.remove(at);
        }
        Ok(())
    }

    /// I3: makes a version a candidate. Its wrapped form leaves for the meter at `moment` of the
    /// meter's sequence, under this version of the KEK. The row is stored before that.
    ///
    /// # Errors
    /// There is no such version, it is destroyed, or it has left under another KEK.
    pub fn mark_left(&mut self, number: KeyVersionNumber, moment: u32, kek: KeyVersionNumber) -> Result<(), SlotError> {
        let version = self.version_mut(number)?;
        if version.state == KeyState::Destroyed {
            return Err(SlotError::CandidateDestroyed { number });
        }
        if version.transport.kek.is_some_and(|known| known != kek) {
            return Err(SlotError::OtherKek { number });
        }
        version.candidate = true;
        version.transport.left = moment;
        version.transport.kek = Some(kek);
        Ok(())
    }

    /// Records that the meter showed at `moment` of its sequence that it holds a version. A
    /// pre-active version above the active one becomes active. No other version changes its state:
    /// an earlier version never becomes active again, and a compromised one never becomes active.
    ///
    /// # Errors
    /// The version never left for the meter.
    pub fn confirm(
        &mut self,
        number: KeyVersionNumber,
        moment: u32,
        evidence: Evidence,
        now: UnixMillis,
    ) -> Result<Confirmation, SlotError> {
        let active = self.active().map(KeyVersion::number);
        let version = self.version_mut(number)?;
        if !version.candidate {
            return Err(SlotError::NotCandidate { number });
        }
        version.transport.confirmed = moment;
        version.transport.evidence = version.transport.evidence.max(evidence);
        match version.state {
            KeyState::PreActive if active.is_none_or(|active| active < number) => {
                self.prove(number, now)?;
                Ok(Confirmation::Activated)
            }
            KeyState::Active => Ok(Confirmation::Active),
            // No version has replaced it yet, so the meter is expected to hold it.
            KeyState::Compromised if active.is_none_or(|active| active < number) => Ok(Confirmation::Compromised),
            _ => Ok(Confirmation::NotActive),
        }
    }

    /// Makes a version active that the meter was shown to hold, and deactivates the active one
    /// before it. Earlier candidates stay until [`Self::release_candidates`]: a meter may go back
    /// to one when its power fails.
    ///
    /// # Errors
    /// The version is not a candidate, or its state cannot become active (for example compromised).
    fn prove(&mut self, number: KeyVersionNumber, now: UnixMillis) -> Result<(), SlotError> {
        let version = self.version(number).ok_or(SlotError::NoSuchVersion { number })?;
        if !version.candidate {
            return Err(SlotError::NotCandidate { number });
        }
        if version.state == KeyState::Active {
            return Ok(());
        }
        if !version.state.may_become(KeyState::Active) {
            return Err(SlotError::Transition { number, from: version.state, to: KeyState::Active });
        }
        if let Some(former) = self.active().map(KeyVersion::number) {
            self.transition(former, KeyState::Deactivated, now)?;
        }
        self.transition(number, KeyState::Active, now)
    }

    /// Makes a pre-active version active, of a key that no exchange proves, and deactivates the
    /// active one before it. Returns the number of that one, if there was one. Both stay
    /// candidates: some meters hold the one, some the other.
    ///
    /// # Errors
    /// There is no such version, or it is not pre-active.
    pub(crate) fn switch_to(
        &mut self,
        number: KeyVersionNumber,
        now: UnixMillis,
    ) -> Result<Option<KeyVersionNumber>, SlotError> {
        let former = self.active().map(KeyVersion::number);
        let version = self.version_mut(number)?;
        if version.state != KeyState::PreActive {
            return Err(SlotError::Transition { number, from: version.state, to: KeyState::Active });
        }
        version.candidate = true;
        self.prove(number, now)?;
        Ok(former)
    }

    /// I3: releases the candidates before the active version, once that has been active for
    /// `retention` milliseconds: the retention time has passed since a later version was proven.
    /// Returns whether a candidate was released. For a meter, see
    /// [`crate::Meter::release_candidates`].
    pub fn release_candidates(&mut self, retention: i64, now: UnixMillis) -> bool {
        let Some((active, since)) = self.active().map(|version| (version.number, version.since)) else { return false };
        // I3: a meter that went back, or may have gone back, to an earlier version still needs it.
        if since.after(retention) > now || self.in_doubt() {
            return false;
        }
        let mut released = false;
        for version in self.versions.iter_mut().filter(|version| version.number < active && version.candidate) {
            version.candidate = false;
            released = true;
        }
        released
    }

    /// Replaces the wrap `old` of a version by its wrap under another storage KEK. The key stays
    /// the same, with its fingerprint, counters and exposures. False: the version does not hold
    /// `old` any more, and nothing was changed.
    ///
    /// # Errors
    /// There is no such version, or `new` cannot hold the same key.
    pub fn rewrap(&mut self, number: KeyVersionNumber, old: &WrappedKey, new: WrappedKey) -> Result<bool, SlotError> {
        let version = self.version_mut(number)?;
        match &version.material {
            KeyMaterial::Wrapped(held) if held == old => {}
            _ => return Ok(false),
        }
        if old.shape() != new.shape() || old.blob().len() != new.blob().len() {
            return Err(SlotError::Material { number });
        }
        version.material = KeyMaterial::Wrapped(new);
        Ok(true)
    }

    /// Where a new version's counter starts if the meter continues to count when its key changes:
    /// above all earlier versions. Pass it as `at_least` to [`Counters::reserve`]. Versions in a
    /// domain are not included: ask the domain. `jump` is the island's.
    pub fn continued_counter(&self, key: CounterKey, jump: CounterJump) -> u64 {
        self.versions
            .iter()
            .filter_map(|version| match &version.counters {
                CounterPlace::Own(counters) => counters.get(key),
                CounterPlace::Domain(_) => None,
            })
            .map(|state| state.bound_after(jump))
            .max()
            .unwrap_or(0)
    }

    /// I4: moves a version's counters to the domain of its value. Afterwards the slot names the
    /// domain.
    ///
    /// # Errors
    /// There is no such version, or it is in another domain.
    pub fn join_domain(&mut self, number: KeyVersionNumber, domain: &mut CounterDomain) -> Result<(), SlotError> {
        let version = self.version_mut(number)?;
        match &version.counters {
            CounterPlace::Domain(id) if *id == domain.id => return Ok(()),
            CounterPlace::Domain(id) => return Err(SlotError::OtherDomain { number, domain: *id }),
            CounterPlace::Own(counters) => domain.join(counters),
        }
        domain.learn(&version.exposures);
        version.counters = CounterPlace::Domain(domain.id);
        Ok(())
    }

    /// Checks what is always true of a slot.
    fn check(&self) -> Result<(), SlotError> {
        if self.versions.iter().zip(self.versions.iter().skip(1)).any(|(earlier, later)| earlier.number >= later.number)
        {
            return Err(SlotError::NumbersNotIncreasing);
        }
        if self.versions.iter().filter(|version| version.state == KeyState::Active).count() > 1 {
            return Err(SlotError::TwoActive);
        }
        for version in &self.versions {
            let number = version.number;
            let destroyed = version.state == KeyState::Destroyed;
            if destroyed && version.candidate {
                return Err(SlotError::CandidateDestroyed { number });
            }
            let diversified = matches!(version.origin, KeyOrigin::Diversified { .. });
            let fits = match &version.material {
                KeyMaterial::Destroyed => destroyed,
                KeyMaterial::Derived => !destroyed && diversified && self.key_type.is_aes(),
                KeyMaterial::Wrapped(wrapped) => {
                    !destroyed && !diversified && self.key_type.is_aes() == matches!(wrapped.shape(), KeyShape::Aes(_))
                }
            };
            if !fits {
                return Err(SlotError::Material { number });
            }
        }
        Ok(())
    }
}

/// What follows when a meter shows that it holds a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Confirmation {
    /// It became the active version.
    Activated,
    /// It is the active version.
    Active,
    /// It was active until it was reported as compromised, and no later version has replaced it:
    /// the meter needs a new key.
    Compromised,
    /// It is an earlier version, or a suspended one. The meter needs a new key.
    NotActive,
}

/// Why a slot refuses a change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// The slot has no version with this number.
    #[error("key version {number} does not exist")]
    NoSuchVersion {
        /// The number.
        number: KeyVersionNumber,
    },
    /// SP 800-57 does not have this transition.
    #[error("key version {number} is {from} and cannot become {to}")]
    Transition {
        /// The version.
        number: KeyVersionNumber,
        /// Its state.
        from: KeyState,
        /// The state asked for.
        to: KeyState,
    },
    /// A second version would be active.
    #[error("another key version is active: deactivate it first")]
    TwoActive,
    /// A version that the meter may hold would be destroyed, or a destroyed one used (I3).
    #[error(
        "the meter may hold key version {number}: it can be destroyed only after a later version is proven and the retention time has passed"
    )]
    CandidateDestroyed {
        /// The version.
        number: KeyVersionNumber,
    },
    /// The version never left, so no answer can prove it.
    #[error("key version {number} never left for the meter, so no answer of the meter can prove it")]
    NotCandidate {
        /// The version.
        number: KeyVersionNumber,
    },
    /// A version would leave under a second KEK. A meter that holds it would then not show which
    /// KEK it has.
    #[error("key version {number} has left wrapped under another version of the KEK; make a new version of the key")]
    OtherKek {
        /// The version.
        number: KeyVersionNumber,
    },
    /// The stored form does not fit origin, type or state.
    #[error("the stored form of key version {number} does not fit its origin, key type or state")]
    Material {
        /// The version.
        number: KeyVersionNumber,
    },
    /// The version is in another counter domain.
    #[error("key version {number} is already in counter domain {domain}")]
    OtherDomain {
        /// The version.
        number: KeyVersionNumber,
        /// Its domain.
        domain: CounterDomainId,
    },
    /// Version numbers repeat or go backwards.
    #[error("key version numbers do not increase")]
    NumbersNotIncreasing,
    /// The slot exists already.
    #[error("the slot {setup} {key_type} exists already")]
    DuplicateSlot {
        /// The security setup.
        setup: SecuritySetupId,
        /// The key type.
        key_type: KeyType,
    },
    /// The owner has no such slot.
    #[error("there is no slot {setup} {key_type}")]
    NoSuchSlot {
        /// The security setup.
        setup: SecuritySetupId,
        /// The key type.
        key_type: KeyType,
    },
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{CounterError, CounterOwnership, ExposureReason, KeyDerivation, Party};

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

    fn granted(slot: &Slot) -> Vec<(u32, Standing)> {
        slot.grantable().map(|grantable| (grantable.version.number().number(), grantable.standing)).collect()
    }

    #[test]
    fn a_rotation_from_one_version_to_the_next() {
        let mut slot = slot();
        let first = slot.add_version(diversified(KeyState::Active), NOW).unwrap();
        let second = slot.add_version(generated(KeyState::PreActive), NOW).unwrap();
        assert_eq!(slot.confirm(second, 2, Evidence::Proven, NOW), Err(SlotError::NotCandidate { number: second }));
        slot.mark_left(second, 1, KeyVersionNumber::FIRST).unwrap();
        assert!(slot.in_doubt());
        // I3: the pre-active version is granted to nobody.
        assert_eq!(granted(&slot), [(1, Standing::Active)]);

        assert_eq!(slot.confirm(second, 2, Evidence::Proven, NOW.after(5)), Ok(Confirmation::Activated));
        assert!(!slot.in_doubt());
        assert_eq!(granted(&slot), [(2, Standing::Active), (1, Standing::FormerCandidate)]);
        // I3: no destruction before the retention time has passed.
        assert_eq!(
            slot.transition(first, KeyState::Destroyed, NOW),
            Err(SlotError::CandidateDestroyed { number: first })
        );
        assert!(!slot.release_candidates(100, NOW.after(104)));
        assert!(slot.release_candidates(100, NOW.after(105)));
        slot.transition(first, KeyState::Destroyed, NOW).unwrap();
        assert_eq!(granted(&slot), [(2, Standing::Active)]);
        assert_eq!(slot.next_number().number(), 3);
    }

    #[test]
    fn a_wrap_is_replaced_only_by_one_of_the_same_key_that_it_was_made_from() {
        let mut slot = slot();
        let number = slot.add_version(generated(KeyState::Active), NOW).unwrap();
        let wrap = |kek, octet: u8, octets: usize| {
            WrappedKey::new(KeyType::GUEK, kek, Bytes::from(vec![octet; octets])).unwrap()
        };
        let (old, new) = (wrap(1, 9, 24), wrap(2, 7, 24));
        assert_eq!(slot.rewrap(number, &old, wrap(2, 7, 40)), Err(SlotError::Material { number }));
        assert_eq!(slot.rewrap(number, &old, new.clone()), Ok(true));
        assert_eq!(slot.version(number).unwrap().material(), &KeyMaterial::Wrapped(new.clone()));
        // A server that was slower finds that there is nothing to do.
        assert_eq!(slot.rewrap(number, &old, wrap(2, 8, 24)), Ok(false));
        slot.transition(number, KeyState::Compromised, NOW).unwrap();
        assert_eq!(slot.rewrap(number, &new, wrap(3, 8, 24)), Ok(true), "whatever its state, it may be needed");
    }

    #[test]
    fn a_compromised_version_is_never_granted_nor_active_again() {
        let mut slot = slot();
        let number = slot.add_version(generated(KeyState::Active), NOW).unwrap();
        slot.transition(number, KeyState::Compromised, NOW).unwrap();
        assert_eq!(granted(&slot), []);
        for state in KeyState::ALL {
            assert!(slot.clone().transition(number, state, NOW).is_err(), "{state}: it is still a candidate");
        }
        // The meter holds what it held: nothing of that is in doubt.
        assert!(slot.compromised() && !slot.in_doubt() && slot.held().is_some_and(|held| held.number() == number));
        assert_eq!(slot.confirm(number, 1, Evidence::Proven, NOW), Ok(Confirmation::Compromised));
        assert_eq!(slot.candidates().count(), 1);
        assert!(slot.compromised() && !slot.in_doubt());

        // Another version is on its way, and is shown.
        let second = slot.add_version(generated(KeyState::PreActive), NOW).unwrap();
        slot.mark_left(second, 2, KeyVersionNumber::FIRST).unwrap();
        assert!(slot.in_doubt() && slot.unresolved());
        assert_eq!(slot.confirm(second, 3, Evidence::Proven, NOW), Ok(Confirmation::Activated));
        assert!(!slot.in_doubt() && !slot.compromised());
        // The meter goes back to the compromised one: that is news.
        assert_eq!(slot.confirm(number, 4, Evidence::Proven, NOW), Ok(Confirmation::NotActive));
        assert!(slot.in_doubt() && slot.compromised());
    }

    #[test]
    fn destroying_drops_the_key() {
        let mut slot = slot();
        let number = slot.add_version(generated(KeyState::PreActive), NOW).unwrap();
        slot.transition(number, KeyState::Destroyed, NOW).unwrap();
        assert_eq!(slot.version(number).unwrap().material(), &KeyMaterial::Destroyed);
        assert_eq!(slot.version(number).unwrap().shape(), None);
        assert!(slot.mark_left(number, 1, KeyVersionNumber::FIRST).is_err());
    }

    #[test]
    fn a_second_active_version_and_ill_fitting_material_are_refused() {
        let mut slot = slot();
        slot.add_version(diversified(KeyState::Active), NOW).unwrap();
        assert_eq!(slot.add_version(diversified(KeyState::Active), NOW), Err(SlotError::TwoActive));
        assert!(slot.add_version(diversified(KeyState::Suspended), NOW).is_err());
        let without_key = NewKeyVersion { wrapped: None, ..generated(KeyState::PreActive) };
        assert!(matches!(slot.add_version(without_key, NOW), Err(SlotError::Material { .. })));
        assert_eq!(slot.versions().len(), 1);
        let mut secret = Slot::new(SecuritySetupId::DEFAULT, KeyType::LLS_SECRET);
        assert!(secret.add_version(diversified(KeyState::Active), NOW).is_err());
    }

    #[test]
    fn the_first_exposure_counts() {
        let mut slot = slot();
        let number = slot.add_version(diversified(KeyState::Active), NOW).unwrap();
        let version = slot.version_mut(number).unwrap();
        assert!(version.expose(Party::Vendor, ExposureReason::Shipment, NOW));
        assert!(!version.expose(Party::Vendor, ExposureReason::Shipment, NOW.after(9)));
        assert!(version.expose(Party::Vendor, ExposureReason::Reported, NOW.after(9)));
        assert_eq!(version.exposures().first().unwrap().since, NOW);
    }

    #[test]
    fn a_new_key_may_count_on_and_a_domain_takes_the_counters_over() {
        let mut slot = slot();
        let first = slot.add_version(diversified(KeyState::Active), NOW).unwrap();
        let counters = slot.version_mut(first).unwrap().counters_mut().unwrap();
        counters.raise_floor(CounterKey::Setup, 700, None).unwrap();
        assert_eq!(slot.continued_counter(CounterKey::Setup, CounterJump::NONE), 700);
        let mut domain = CounterDomain::new(CounterDomainId([1; 16]));
        slot.join_domain(first, &mut domain).unwrap();
        slot.join_domain(first, &mut domain).unwrap();
        assert_eq!((domain.members, domain.counters.highest_bound()), (1, 700));
        assert_eq!(domain.counters.get(CounterKey::Setup).unwrap().ownership(), &CounterOwnership::Kms);
        assert!(matches!(slot.version_mut(first).unwrap().counters_mut(), Err(CounterError::InDomain { .. })));
        assert!(slot.join_domain(first, &mut CounterDomain::new(CounterDomainId([2; 16]))).is_err());
    }
}
