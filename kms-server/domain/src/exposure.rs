//! The ledger of exposures: who outside the HSM could know a key version, since when, and why.

use std::{collections::HashMap, fmt};

use crate::{CounterDomainId, ParseError, PrincipalId, UnixMillis};

/// One way by which someone outside the HSM could know a key version.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Exposure {
    /// Who.
    pub party: Party,
    /// Since when: the first time counts.
    pub since: UnixMillis,
    /// How.
    pub reason: ExposureReason,
}

/// Who could know the key values that several slots share, by counter domain: a party that knows
/// the key of one slot knows the keys of all.
pub type SharedExposures = HashMap<CounterDomainId, Vec<Exposure>>;

/// Adds to `known` the exposures that it lacks: each party and reason once, since the first time.
/// Returns whether an exposure was new.
pub(crate) fn learn(known: &mut Vec<Exposure>, more: &[Exposure]) -> bool {
    let mut learned = false;
    for exposure in more {
        match known.iter_mut().find(|one| one.party == exposure.party && one.reason == exposure.reason) {
            Some(one) if one.since <= exposure.since => continue,
            Some(one) => one.since = exposure.since,
            None => known.push(exposure.clone()),
        }
        learned = true;
    }
    learned
}

/// Someone who may know a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    /// The vendor of the meter, who made the key.
    Vendor,
    /// Anyone who recorded the traffic, or read an unprotected delivery.
    Anyone,
    /// A principal of the island.
    Principal(PrincipalId),
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor => f.write_str("vendor"),
            Self::Anyone => f.write_str("anyone"),
            Self::Principal(principal) => principal.fmt(f),
        }
    }
}

/// Why a party may know a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExposureReason {
    /// The vendor made the key and sent it wrapped.
    Shipment,
    /// The vendor sent the key unprotected.
    PlainShipment,
    /// The key was granted to the party.
    Grant,
    /// The key was in a bundle of the party.
    Bundle,
    /// The key travelled wrapped under a master key that was exposed itself.
    TransferUnderExposedKek,
    /// An officer reported that the party knows the key.
    Reported,
    /// A meter that held the group's key has left the group.
    MemberLeft,
    /// A meter that held the group's key was retired or replaced.
    MemberRetired,
    /// A meter that held the group's key, or the KEK under which it got the key, was reported as
    /// compromised.
    MemberCompromised,
}

impl ExposureReason {
    /// All reasons.
    pub const ALL: [Self; 9] = [
        Self::Shipment,
        Self::PlainShipment,
        Self::Grant,
        Self::Bundle,
        Self::TransferUnderExposedKek,
        Self::Reported,
        Self::MemberLeft,
        Self::MemberRetired,
        Self::MemberCompromised,
    ];

    /// The reasons for which the key of a group must be rotated: a meter that is no member any more
    /// holds it.
    pub const OF_MEMBERS: [Self; 3] = [Self::MemberLeft, Self::MemberRetired, Self::MemberCompromised];

    /// The number in rows and audit records, from 1; it never changes.
    pub const fn number(self) -> u32 {
        match self {
            Self::Shipment => 1,
            Self::PlainShipment => 2,
            Self::Grant => 3,
            Self::Bundle => 4,
            Self::TransferUnderExposedKek => 5,
            Self::Reported => 6,
            Self::MemberLeft => 7,
            Self::MemberRetired => 8,
            Self::MemberCompromised => 9,
        }
    }

    /// The reason with this number.
    ///
    /// # Errors
    /// No reason has the number.
    pub fn from_number(number: u32) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|reason| reason.number() == number)
            .ok_or_else(|| ParseError::new("exposure reason", format!("`{number}` is not 1 to 9")))
    }

    /// The name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Shipment => "shipment",
            Self::PlainShipment => "plain-shipment",
            Self::Grant => "grant",
            Self::Bundle => "bundle",
            Self::TransferUnderExposedKek => "transfer-under-exposed-kek",
            Self::Reported => "reported",
            Self::MemberLeft => "member-left",
            Self::MemberRetired => "member-retired",
            Self::MemberCompromised => "member-compromised",
        }
    }
}

impl fmt::Display for ExposureReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
