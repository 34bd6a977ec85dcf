//! A question about exposures, and the lines of its answer.

use kms_domain::{FlagId, KeyType, KnownKey, MeterStatus, Owner, Party, SecuritySetupId, SystemTitle, UnixMillis};
use kms_store::ExposureOwner;

/// Whose exposures are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExposureSubject {
    /// All parties that could know keys of this meter, or of groups whose keys left for it.
    Meter(SystemTitle),
    /// All parties that could know keys of the group with this name.
    Group(String),
    /// What a principal, or anyone, could know.
    Known(Party),
    /// What the vendor of this manufacturer's meters could know.
    Manufacturer(FlagId),
    /// What the vendor could know of the meters of this batch.
    Batch(String),
}

/// A question about exposures.
#[derive(Clone, Debug)]
pub struct ExposureQuery {
    /// Whose.
    pub subject: ExposureSubject,
    /// Only what became known then or later.
    pub since: Option<UnixMillis>,
    /// Owners after this one.
    pub after: Option<ExposureOwner>,
    /// How many owners, at most.
    pub limit: u32,
}

/// A key version of an owner that a party could know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExposedKey {
    /// Whose key.
    pub owner: Owner,
    /// The name of a group or device type; empty for a meter.
    pub name: String,
    /// The status of a meter.
    pub status: Option<MeterStatus>,
    /// The key version, and who could know it.
    pub key: KnownKey,
}

/// A part of an answer: all lines of some owners.
#[derive(Clone, Debug, Default)]
pub struct ExposurePage {
    /// All lines of an owner together.
    pub keys: Vec<ExposedKey>,
    /// Owners whose rows do not verify (I5), and why: what they say is not in the answer.
    pub unreadable: Vec<(Owner, String)>,
    /// Where the next page begins; `None` behind the last.
    pub next: Option<ExposureOwner>,
}

/// A slot of which a party could know the key that is in use: what a containment has to rotate.
/// Nothing contains exposures yet: only tests ask for these slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpenSlot {
    /// Whose slot.
    pub owner: Owner,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The key type.
    pub key_type: KeyType,
}
