//! Which keys a meter most likely holds: the KEK that the next key is wrapped under, and the pairs
//! of GUEK and GAK that an exchange tries.

use std::collections::BTreeMap;

use super::state::KeyPair;
use crate::{Evidence, KeyState, KeyType, KeyVersion, KeyVersionNumber, Meter, SecuritySetupId};

impl Meter {
    /// The KEK to wrap the next key under: the candidate that the meter most likely holds. Each key
    /// that left under a KEK since that KEK was shown, and was not shown itself, halves the odds of
    /// the KEK. A new KEK starts with the odds of the KEK that it left under. So every candidate is
    /// tried after a bounded number of transfers.
    pub fn kek_for_transfer(&self, setup: SecuritySetupId) -> Option<KeyVersionNumber> {
        let slot = self.slots.get(setup, KeyType::KEK)?;
        let (held, shown) = slot.held().map_or((None, 0), |held| (Some(held.number()), held.transport().confirmed));
        let candidates = slot.candidates().filter(|kek| kek.state() != KeyState::Destroyed);
        // Another KEK was shown since this one left: the meter holds it only if it went back to it.
        let superseded = |kek: &KeyVersion| Some(kek.number()) != held && kek.transport().left <= shown;
        let mut odds: BTreeMap<_, KekOdds> = candidates
            .map(|kek| (kek.number(), KekOdds { halvings: u32::from(superseded(kek)), in_vain: 0 }))
            .collect();
        for shared in self.shared.iter().filter(|shared| shared.setup == setup && !shared.acknowledged) {
            odds.entry(shared.kek).and_modify(KekOdds::halve);
        }
        let mut in_vain: Vec<_> = self
            .slots
            .of_setup(setup)
            .flat_map(|slot| slot.versions().iter().map(|version| (slot.key_type(), version)))
            .collect();
        in_vain.retain(|(_, version)| {
            let transport = version.transport();
            let under = transport.kek.and_then(|kek| slot.version(kek));
            transport.evidence == Evidence::None && under.is_some_and(|kek| transport.left > kek.transport().confirmed)
        });
        in_vain.sort_by_key(|(_, version)| version.transport().left);
        for (key_type, version) in in_vain {
            let Some(kek) = version.transport().kek.and_then(|kek| odds.get_mut(&kek)) else { continue };
            kek.halve();
            let inherited = kek.halvings;
            if key_type == KeyType::KEK {
                odds.entry(version.number()).and_modify(|own| own.halvings = own.halvings.max(inherited));
            }
        }
        // With equal odds: first the KEK that was tried less often, then the newer one.
        odds.into_iter().min_by_key(|(number, odds)| (*odds, std::cmp::Reverse(*number))).map(|(number, _)| number)
    }

    /// The pairs of keys that are tried in a round, the likeliest first; `target` counts as the
    /// likeliest of its key type. At most twelve, however many candidates there are. If there are
    /// more pairs than a round has, each round tries the likeliest, and the others in turn, so that
    /// a bounded number of probes finds the right pair.
    pub fn pairs(&self, setup: SecuritySetupId, target: Option<(KeyType, KeyVersionNumber)>) -> Vec<KeyPair> {
        let ranked = |key_type: KeyType| {
            let Some(slot) = self.slots.get(setup, key_type) else { return Vec::new() };
            let held = slot.held().map(KeyVersion::number);
            let mut numbers: Vec<KeyVersionNumber> = slot.candidates().map(KeyVersion::number).collect();
            numbers.sort_by_key(|number| {
                (target != Some((key_type, *number)), Some(*number) != held, std::cmp::Reverse(*number))
            });
            numbers
        };
        let (encryption, authentication) = (ranked(KeyType::GUEK), ranked(KeyType::GAK));
        let all = encryption.len().saturating_mul(authentication.len());
        let others = if all > PAIRS_OF_A_ROUND { all - LIKELIEST_PAIRS } else { 0 };
        let at_once = PAIRS_OF_A_ROUND - LIKELIEST_PAIRS;
        // The sequence stays the same within a round, and grows by one from probe to probe.
        let turn = usize::try_from(self.sequence).unwrap_or_default() % others.div_ceil(at_once).max(1);
        let places =
            (0..LIKELIEST_PAIRS).chain((LIKELIEST_PAIRS..all).skip(turn.saturating_mul(at_once)).take(at_once));
        let pair = |place| {
            let (encrypts, authenticates) = place_by_rank(place, encryption.len(), authentication.len())?;
            Some(KeyPair {
                encryption: *encryption.get(encrypts)?,
                authentication: *authentication.get(authenticates)?,
            })
        };
        places.map_while(pair).collect()
    }
}

/// The place of a pair in two ranked lists, by its place among all pairs: the smallest sum of both
/// ranks first, and among equal sums the lower rank in the first list first. It steps over whole
/// diagonals, so its cost is at most the length of the lists.
const fn place_by_rank(place: usize, first: usize, second: usize) -> Option<(usize, usize)> {
    let (mut left, mut sum) = (place, 0);
    while sum + 1 < first + second {
        let from = (sum + 1).saturating_sub(second);
        let to = if sum < first { sum + 1 } else { first };
        if let Some(beyond) = left.checked_sub(to - from) {
            left = beyond;
        } else {
            return Some((from + left, sum - from - left));
        }
        sum += 1;
    }
    None
}

/// How likely it is that a meter holds a KEK, by what has left under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct KekOdds {
    /// How often the odds were halved.
    halvings: u32,
    /// Keys that left under it and were not shown.
    in_vain: u32,
}

impl KekOdds {
    const fn halve(&mut self) {
        self.halvings = self.halvings.saturating_add(1);
        self.in_vain = self.in_vain.saturating_add(1);
    }
}

/// The most pairs that a round tries.
const PAIRS_OF_A_ROUND: usize = 12;
/// How many of them every round tries.
const LIKELIEST_PAIRS: usize = 8;
