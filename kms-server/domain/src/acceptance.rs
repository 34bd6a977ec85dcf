//! Acceptance: which keys of a meter are the utility's alone, which are not, and what heals them.
//!
//! A new key is no secret from whoever could open it on its way: a version that left wrapped under
//! a KEK that its vendor knows is readable to the vendor, if it recorded the traffic. Rotation over
//! the air takes that KEK out of use; it does not undo what was recorded. What a principal was
//! granted is no lack: it is meant to know it.

use crate::{
    Evidence, ExposureReason, KeyOrigin, KeyState, KeyType, KeyVersion, KeyVersionNumber, Meter, Party,
    SecuritySetupId, SecuritySuite, SharedExposures, Slot,
};

/// How one key of a meter stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyAcceptance {
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The key type.
    pub key_type: KeyType,
    /// The version that the meter holds, as far as is known.
    pub version: Option<KeyVersionNumber>,
    /// How the meter showed that.
    pub evidence: Evidence,
    /// How the key stands.
    pub verdict: Verdict,
    /// Who could know it: each party once. Empty where it is healed or in doubt.
    pub known_to: Vec<Party>,
    /// What heals it; `None` where nothing needs to be healed.
    pub remedy: Option<Remedy>,
}

/// How a key stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Nobody outside the HSM could know it but those it was granted to.
    Healed,
    /// It was made here, and somebody who recorded the traffic could know it; or it is compromised,
    /// or one that the meter went back to.
    NotHealed,
    /// It is still one that somebody else made.
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

/// What heals a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Remedy {
    /// An exchange that shows which version the meter holds.
    Probe,
    /// A new version over the air.
    Rotation,
    /// A new KEK by key agreement (security suites 1 and 2), whose value is never on the air, and
    /// then the others again under it.
    KeyAgreement,
    /// New keys set on site, beside the network.
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
    /// How each key of the meter stands, in order of security setup and key type; keys that the
    /// meter never had are left out. `taken_over_the_air` tells whether the meter takes a key by
    /// `key_transfer`, which its device profile says.
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
            // Who knows the GUEK computes the GAK from recorded traffic: AES-GCM's tag is linear in
            // the associated data, which holds the GAK.
            self.slots.get(slot.setup(), KeyType::GUEK).and_then(Slot::held).into_iter().for_each(&mut count);
        }
        let made_here = held.is_some_and(|version| version.origin() != KeyOrigin::Imported);
        let active = held.is_some_and(|version| version.state() == KeyState::Active);
        let verdict = match (slot.unresolved(), made_here) {
            (true, _) => Verdict::InDoubt,
            (false, false) => Verdict::NotReplaced,
            // Compromised, or an earlier version that the meter went back to, is not healed either.
            (false, true) if !active || !known_to.is_empty() => Verdict::NotHealed,
            (false, true) => Verdict::Healed,
        };
        let remedy = match verdict {
            Verdict::Healed => None,
            // An exchange shows a GUEK and a GAK; what it cannot show is decided by another
            // version.
            Verdict::InDoubt => Some(if self.is_decided_by_probe(slot) { Remedy::Probe } else { Remedy::Rotation }),
            Verdict::NotReplaced if !taken_over_the_air => Some(Remedy::LocalVisit),
            Verdict::NotReplaced => Some(Remedy::Rotation),
            // As soon as the KEK is nobody else's, a rotation heals what travels under it.
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

    /// Whether a probe may show which version the meter holds: of a KEK, by a GUEK that left under
    /// it.
    fn is_decided_by_probe(&self, slot: &Slot) -> bool {
        let shows = match slot.key_type() {
            KeyType::GUEK | KeyType::GAK => Some(slot),
            KeyType::KEK => self.slots.get(slot.setup(), KeyType::GUEK),
            _ => None,
        };
        shows.is_some_and(Slot::unresolved)
    }

    /// Whether what leaves under the meter's KEK is readable to nobody.
    fn has_secret_kek(&self, setup: SecuritySetupId, shared: &SharedExposures) -> bool {
        let kek = self.slots.get(setup, KeyType::KEK).filter(|slot| !slot.in_doubt()).and_then(Slot::held);
        kek.is_some_and(|kek| {
            self.slots.exposures_of(setup, kek, shared).iter().all(|exposure| is_meant(exposure.reason))
        })
    }
}

/// Whether the party is one that was to know the key.
const fn is_meant(reason: ExposureReason) -> bool {
    matches!(reason, ExposureReason::Grant | ExposureReason::Bundle)
}
