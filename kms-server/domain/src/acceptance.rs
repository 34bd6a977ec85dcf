//! Acceptance: which keys of a meter only the utility knows, which keys others could know, and the
//! remedy for these.
//!
//! A new key is no secret from a party that could open it on its way: a version that left wrapped
//! under a KEK that its vendor knows is readable to the vendor, if the vendor recorded the traffic.
//! Rotation over the air takes that KEK out of use; it does not undo what was recorded. A key that
//! was granted to a principal is not counted: the principal is meant to know it.

use crate::{
    Evidence, ExposureReason, KeyOrigin, KeyState, KeyType, KeyVersion, KeyVersionNumber, Meter, Party,
    SecuritySetupId, SecuritySuite, SharedExposures, Slot,
};

/// The acceptance of one key of a meter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyAcceptance {
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The key type.
    pub key_type: KeyType,
    /// The version that the meter holds, as far as is known.
    pub version: Option<KeyVersionNumber>,
    /// How the meter showed this.
    pub evidence: Evidence,
    /// The verdict on the key.
    pub verdict: Verdict,
    /// Who could know it: each party once. Empty if the key is healed or in doubt.
    pub known_to: Vec<Party>,
    /// The remedy; `None` if none is needed.
    pub remedy: Option<Remedy>,
}

/// The verdict on a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Outside the HSM, only grantees could know it.
    Healed,
    /// This system made it, but somebody who recorded the traffic could know it. Or it is
    /// compromised, or a version to which the meter went back.
    NotHealed,
    /// It is still a key that somebody else made.
    NotReplaced,
    /// It is in doubt which version the meter holds.
    InDoubt,
}

impl Verdict {
    /// All verdicts.
    pub const ALL: [Self; 4] = [Self::Healed, Self::NotHealed, Self::NotReplaced, Self::InDoubt];

    /// The name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Healed => "healed",
            Self::NotHealed => "not-healed",
            Self::NotReplaced => "not-replaced",
            Self::InDoubt => "in-doubt",
        }
    }
}

/// The remedy for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Remedy {
    /// An exchange that shows which version the meter holds.
    Probe,
    /// A new version over the air.
    Rotation,
    /// A new KEK by key agreement (security suites 1 and 2), whose value is never transmitted. Then
    /// the other keys again under it.
    KeyAgreement,
    /// New keys that are set on site, not over the network.
    LocalVisit,
}

impl Remedy {
    /// The name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Rotation => "rotation",
            Self::KeyAgreement => "key-agreement",
            Self::LocalVisit => "local-visit",
        }
    }
}

impl Meter {
    /// The acceptance of each key of the meter, in order of security setup and key type, without
    /// keys that the meter never had. `taken_over_the_air` says whether the meter accepts a key by
    /// `key_transfer`, which is in its device profile.
    pub fn acceptance(
        &self,
        setup: Option<SecuritySetupId>,
        taken_over_the_air: impl Fn(SecuritySetupId, KeyType) -> bool,
    ) -> Vec<KeyAcceptance> {
        self.acceptance_knowing(setup, &SharedExposures::new(), taken_over_the_air)
    }

    /// As [`Self::acceptance`], with what is known of key values that several slots share.
    pub fn acceptance_knowing(
        &self,
        setup: Option<SecuritySetupId>,
        shared: &SharedExposures,
        taken_over_the_air: impl Fn(SecuritySetupId, KeyType) -> bool,
    ) -> Vec<KeyAcceptance> {
        let slots =
            self.slots.iter().filter(|slot| setup.is_none_or(|setup| slot.setup() == setup) && slot.held().is_some());
        slots.map(|slot| self.accept(slot, shared, taken_over_the_air(slot.setup(), slot.key_type()))).collect()
    }

    fn accept(&self, slot: &Slot, shared: &SharedExposures, taken_over_the_air: bool) -> KeyAcceptance {
        let key_type = slot.key_type();
        let held = slot.held();
        let mut known_to: Vec<Party> = Vec::new();
        let mut count = |version: &KeyVersion| {
            for exposure in self
                .slots
                .exposures_of(slot.setup(), version, shared)
                .iter()
                .filter(|exposure| !is_meant(exposure.reason))
            {
                if !known_to.contains(&exposure.party) {
                    known_to.push(exposure.party.clone());
                }
            }
        };
        held.into_iter().for_each(&mut count);
        if key_type == KeyType::GAK {
            // A party that knows the GUEK can compute the GAK from recorded traffic: AES-GCM's tag
            // is linear in the associated data, which contains the GAK.
            self.slots.get(slot.setup(), KeyType::GUEK).and_then(Slot::held).into_iter().for_each(&mut count);
        }
        let made_here = held.is_some_and(|version| version.origin() != KeyOrigin::Imported);
        let active = held.is_some_and(|version| version.state() == KeyState::Active);
        let verdict = match (slot.unresolved(), made_here) {
            (true, _) => Verdict::InDoubt,
            (false, false) => Verdict::NotReplaced,
            // A compromised version, or an earlier one to which the meter went back, is not healed.
            (false, true) if !active || !known_to.is_empty() => Verdict::NotHealed,
            (false, true) => Verdict::Healed,
        };
        let remedy = match verdict {
            Verdict::Healed => None,
            // An exchange shows a GUEK and a GAK. For a key that it cannot show, only another
            // version settles the doubt.
            Verdict::InDoubt => Some(if self.is_decided_by_probe(slot) { Remedy::Probe } else { Remedy::Rotation }),
            Verdict::NotReplaced if !taken_over_the_air => Some(Remedy::LocalVisit),
            Verdict::NotReplaced => Some(Remedy::Rotation),
            // When nobody else knows the KEK, a rotation heals what travels under it.
            Verdict::NotHealed if key_type != KeyType::KEK && self.has_secret_kek(slot.setup(), shared) => {
                Some(Remedy::Rotation)
            }
            Verdict::NotHealed if self.suite != SecuritySuite::Suite0 => Some(Remedy::KeyAgreement),
            Verdict::NotHealed => Some(Remedy::LocalVisit),
        };
        if matches!(verdict, Verdict::InDoubt) {
            known_to.clear();
        }
        KeyAcceptance {
            setup: slot.setup(),
            key_type,
            version: held.map(KeyVersion::number),
            evidence: held.map_or(Evidence::None, |version| version.transport().evidence),
            verdict,
            known_to,
            remedy,
        }
    }

    /// Whether a probe can show which version the meter holds. A KEK is shown by a GUEK that left
    /// under it.
    fn is_decided_by_probe(&self, slot: &Slot) -> bool {
        let shows = match slot.key_type() {
            KeyType::GUEK | KeyType::GAK => Some(slot),
            KeyType::KEK => self.slots.get(slot.setup(), KeyType::GUEK),
            _ => None,
        };
        shows.is_some_and(Slot::unresolved)
    }

    /// Whether nobody else can read what leaves under the meter's KEK.
    fn has_secret_kek(&self, setup: SecuritySetupId, shared: &SharedExposures) -> bool {
        let kek = self.slots.get(setup, KeyType::KEK).filter(|slot| !slot.in_doubt()).and_then(Slot::held);
        kek.is_some_and(|kek| {
            self.slots.exposures_of(setup, kek, shared).iter().all(|exposure| is_meant(exposure.reason))
        })
    }
}

/// Whether the party is meant to know the key.
const fn is_meant(reason: ExposureReason) -> bool {
    matches!(reason, ExposureReason::Grant | ExposureReason::Bundle)
}
