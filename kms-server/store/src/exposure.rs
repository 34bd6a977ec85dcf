//! The index of exposures: search columns that repeat what sealed rows say of who could know keys
//! (I5: they find rows, and the sealed rows decide).

use kms_domain::{CounterDomainId, DeviceTypeId, GroupId, IndexedParty, Owner, PrincipalId, SystemTitle, UnixMillis};

/// A row of the index: what one sealed row says of one party.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExposureRow {
    /// The party.
    pub party: ExposureParty,
    /// The sealed row.
    pub owner: ExposureOwner,
    /// How many slots of the owner have a version that the party could know.
    pub slots: u32,
    /// In how many of them such a version still opens something.
    pub open: u32,
    /// When the party last came to know one.
    pub newest: UnixMillis,
}

/// A party of the index.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExposureParty {
    /// Anyone.
    Anyone,
    /// A principal.
    Principal(PrincipalId),
    /// Whoever knows the value of a counter domain.
    KeyValue(KeyValuePrefix),
}

impl From<IndexedParty> for ExposureParty {
    fn from(party: IndexedParty) -> Self {
        match party {
            IndexedParty::Anyone => Self::Anyone,
            IndexedParty::Principal(principal) => Self::Principal(principal),
            IndexedParty::KeyValue(domain) => Self::KeyValue(KeyValuePrefix::of(domain)),
        }
    }
}

/// Whose sealed row a row of the index repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExposureOwner {
    /// An owner of keys.
    Owner(Owner),
    /// A counter domain: the row says who knows its value.
    KeyValue(KeyValuePrefix),
}

/// The first 8 octets of the id of a counter domain. Different domains can have the same prefix:
/// the sealed rows decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyValuePrefix(pub [u8; 8]);

impl KeyValuePrefix {
    /// The prefix of a counter domain's id.
    pub const fn of(domain: CounterDomainId) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = domain.0;
        Self([a, b, c, d, e, f, g, h])
    }
}

impl ExposureOwner {
    /// Kind and id in the database.
    pub(crate) const fn numbers(self) -> (i64, i64) {
        match self {
            Self::Owner(owner) => (owner.kind().number() as i64, i64::from_be_bytes(owner.id())),
            Self::KeyValue(prefix) => (KEY_VALUE_OWNER, i64::from_be_bytes(prefix.0)),
        }
    }

    /// The owner with these numbers, if there can be one.
    pub(crate) fn from_numbers(kind: i64, id: i64) -> Option<Self> {
        Some(match kind {
            0 => Self::Owner(Owner::Meter(SystemTitle::from_i64(id).ok()?)),
            1 => Self::Owner(Owner::Group(GroupId(id.cast_unsigned()))),
            2 => Self::Owner(Owner::DeviceType(DeviceTypeId(id.cast_unsigned()))),
            KEY_VALUE_OWNER => Self::KeyValue(KeyValuePrefix(id.to_be_bytes())),
            _ => return None,
        })
    }
}

/// The place of a row in the index, as the database numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExposureCursor {
    pub(crate) party_kind: i64,
    pub(crate) party: i64,
    pub(crate) owner_kind: i64,
    pub(crate) owner: i64,
}

/// How much the index says of one party. Sums over search columns, which are not sealed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExposureTotals {
    /// Owners of which the party could know keys.
    pub owners: u64,
    /// Their slots of which it could know a version.
    pub slots: u64,
    /// Slots in which such a version still opens something.
    pub open: u64,
    /// Further owners that have a key value which the party knows by another slot.
    pub equal_keys: u64,
}

/// The kinds of parties in the database.
pub(crate) const ANYONE: i64 = 1;
pub(crate) const PRINCIPAL: i64 = 2;
pub(crate) const KEY_VALUE: i64 = 3;
/// The kind of a counter domain among owners.
pub(crate) const KEY_VALUE_OWNER: i64 = 3;
