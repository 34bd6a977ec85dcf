//! The versions of an island's roots.
//!
//! A version is *made* in the token, escrowed, and noted in the island's row. It becomes *current*
//! when an officer begins its rotation: from then on new keys and seals use it. A pass over all
//! rows ([`crate::RootRotation`]) moves what still uses an earlier version; diversified keys move
//! when their meters rotate. A version that nothing uses any more may be destroyed.

pub(crate) mod rotation;

use std::fmt;

use crate::{KeyClass, KeyDerivation, KeyMaterial, KeyOrigin, KeyType, KeyVersion, ParseError, UnixMillis};

/// What a root is for: the roots that have versions of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RootPurpose {
    /// AES-256: diversified keys of the class are derived from it.
    Diversification(KeyClass),
    /// AES-256: stored keys of the class are wrapped under it.
    StorageKek(KeyClass),
    /// HMAC key: sealed rows.
    Seal,
    /// RSA key pair: vendors encrypt batch keys to it.
    VendorTransport,
}

impl RootPurpose {
    /// All purposes, in the order of output.
    pub const ALL: [Self; 8] = [
        Self::Diversification(KeyClass::Kek),
        Self::Diversification(KeyClass::Session),
        Self::Diversification(KeyClass::Authentication),
        Self::StorageKek(KeyClass::Kek),
        Self::StorageKek(KeyClass::Session),
        Self::StorageKek(KeyClass::Authentication),
        Self::Seal,
        Self::VendorTransport,
    ];

    /// The purpose of this name, in the form of labels in the token: `session/storage-kek`, `seal`.
    ///
    /// # Errors
    /// No purpose has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|purpose| purpose.to_string() == name).ok_or_else(|| {
            let names = Self::ALL.map(|purpose| purpose.to_string()).join(", ");
            ParseError::new("root", format!("`{name}` is unknown; known are {names}"))
        })
    }

    /// Its number in rows, from 1.
    pub fn number(self) -> u8 {
        match self {
            Self::Diversification(KeyClass::Kek) => 1,
            Self::Diversification(KeyClass::Session) => 2,
            Self::Diversification(_) => 3,
            Self::StorageKek(KeyClass::Kek) => 4,
            Self::StorageKek(KeyClass::Session) => 5,
            Self::StorageKek(_) => 6,
            Self::Seal => 7,
            Self::VendorTransport => 8,
        }
    }

    /// The purpose with this number.
    ///
    /// # Errors
    /// No purpose has the number.
    pub fn from_number(number: u32) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|purpose| u32::from(purpose.number()) == number)
            .ok_or_else(|| ParseError::new("root", format!("`{number}` is not 1 to 8")))
    }

    /// The class whose token holds it; none for roots that serve all classes.
    pub const fn class(self) -> Option<KeyClass> {
        match self {
            Self::Diversification(class) | Self::StorageKek(class) => Some(class),
            Self::Seal | Self::VendorTransport => None,
        }
    }

    /// Whether a pass over all rows moves what uses an earlier version to the current one.
    /// Diversified keys move when their meters rotate, and a vendor's shipment is read once.
    pub const fn has_pass(self) -> bool {
        matches!(self, Self::StorageKek(_) | Self::Seal)
    }
}

impl fmt::Display for RootPurpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Diversification(class) => write!(f, "{class}/diversification"),
            Self::StorageKek(class) => write!(f, "{class}/storage-kek"),
            Self::Seal => f.write_str("seal"),
            Self::VendorTransport => f.write_str("vendor-transport"),
        }
    }
}

/// One version of one root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId {
    /// What it is for.
    pub purpose: RootPurpose,
    /// Its version, from 1.
    pub version: u8,
}

impl RootId {
    /// The octets in seals and names of rows: purpose(1) ‖ version(1).
    pub fn octets(self) -> [u8; 2] {
        [self.purpose.number(), self.version]
    }

    /// The version of these octets.
    ///
    /// # Errors
    /// Not two octets, an unknown purpose, or version 0.
    pub fn from_octets(octets: &[u8]) -> Result<Self, ParseError> {
        match octets {
            [purpose, version @ 1..=255] => {
                Ok(Self { purpose: RootPurpose::from_number(u32::from(*purpose))?, version: *version })
            }
            _ => Err(ParseError::new("root version", format!("`{octets:02x?}` is not a purpose and a version from 1"))),
        }
    }

    /// The root that a key needs: the storage KEK that it is wrapped under, or the diversification
    /// root that it is derived from. None for a version that is destroyed.
    pub fn needed_by(key_type: KeyType, version: &KeyVersion) -> Option<Self> {
        let class = key_type.class();
        match (version.material(), version.origin()) {
            (KeyMaterial::Wrapped(wrap), _) => {
                Some(Self { purpose: RootPurpose::StorageKek(class), version: wrap.storage_kek_version() })
            }
            (KeyMaterial::Derived, KeyOrigin::Diversified { root_version, .. }) => {
                Some(Self { purpose: RootPurpose::Diversification(class), version: root_version })
            }
            _ => None,
        }
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.purpose, self.version)
    }
}

/// What the island's row says about one version. There is an entry for each version that was made
/// after the ceremony, and for each that was destroyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootEntry {
    /// Which.
    pub id: RootId,
    /// How it derives keys; for diversification roots only.
    pub derivation: Option<KeyDerivation>,
    /// When it was made.
    pub made: UnixMillis,
    /// Its fingerprint: the CKA_CHECK_VALUE of a symmetric root (3 octets; empty where the module
    /// has none), or SHA-256 of a public key.
    pub fingerprint: Vec<u8>,
    /// When its destruction was decided.
    pub destroyed: Option<UnixMillis>,
}

/// The versions of an island's roots beside those of the ceremony, and which are in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootLedger {
    /// In order, each once.
    pub entries: Vec<RootEntry>,
    /// The oldest version of the seal key that is accepted in rows.
    pub oldest_seal_key_version: u8,
    /// The version of the vendor transport key that vendors are given.
    pub vendor_transport_version: u8,
    /// The oldest version of the vendor transport key that shipments may be encrypted to.
    pub oldest_vendor_transport_version: u8,
}

impl Default for RootLedger {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            oldest_seal_key_version: 1,
            vendor_transport_version: 1,
            oldest_vendor_transport_version: 1,
        }
    }
}

/// The state of one version of a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RootStanding {
    /// Made and escrowed; nothing uses it yet.
    Made,
    /// New keys and seals use it.
    Current,
    /// Replaced by a later version and still accepted: keys and seals that were made with it may
    /// still use it.
    Replaced,
    /// Not accepted any more: a seal root or a vendor transport key after its retirement.
    Retired,
    /// Its destruction was decided.
    Destroyed,
}

impl RootStanding {
    /// The name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Made => "made",
            Self::Current => "current",
            Self::Replaced => "replaced",
            Self::Retired => "retired",
            Self::Destroyed => "destroyed",
        }
    }
}

/// Why a root version is not made, used or destroyed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// The island has no such root.
    #[error("the island has no root `{purpose}`")]
    NoSuchRoot {
        /// The root that was asked for.
        purpose: RootPurpose,
    },
    /// There is no such version.
    #[error("there is no root `{id}`")]
    NoSuchVersion {
        /// The version that was asked for.
        id: RootId,
    },
    /// 255 versions were made.
    #[error("the root `{purpose}` has had 255 versions, which is the limit")]
    NoMoreVersions {
        /// Which root.
        purpose: RootPurpose,
    },
    /// It is not the next version.
    #[error("the root `{id}` cannot be added: it is not the next version")]
    NotNext {
        /// Which version.
        id: RootId,
    },
    /// It is current or was current before.
    #[error("the root `{id}` is {}: there is no newer version to rotate to; make one first", standing.name())]
    NotMade {
        /// Which version.
        id: RootId,
        /// Its state.
        standing: RootStanding,
    },
    /// It was made a moment ago.
    #[error(
        "the root `{id}` was made {seconds} s ago; wait until {settling} s have passed, when every server knows it"
    )]
    NotSettled {
        /// Which version.
        id: RootId,
        /// How long ago it was made.
        seconds: i64,
        /// How long it must be.
        settling: i64,
    },
    /// It is destroyed already.
    #[error("the root `{id}` is destroyed already")]
    Destroyed {
        /// Which version.
        id: RootId,
    },
    /// It is in use, or about to be used.
    #[error("the root `{id}` is {}: it is still needed", standing.name())]
    Needed {
        /// Which version.
        id: RootId,
        /// Its state.
        standing: RootStanding,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_those_of_labels_and_rows() {
        assert_eq!(RootPurpose::parse("session/storage-kek"), Ok(RootPurpose::StorageKek(KeyClass::Session)));
        assert!(RootPurpose::parse("session/seal").is_err());
        for purpose in RootPurpose::ALL {
            assert_eq!(RootPurpose::parse(&purpose.to_string()), Ok(purpose));
            let id = RootId { purpose, version: 255 };
            assert_eq!(RootId::from_octets(&id.octets()), Ok(id));
        }
        for wrong in [[0, 1].as_slice(), &[9, 1], &[1, 0], &[1], &[1, 1, 1]] {
            assert!(RootId::from_octets(wrong).is_err(), "{wrong:?}");
        }
    }
}
