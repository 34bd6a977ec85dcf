//! Key types, their classes, and the sizes that a security suite gives them.

use std::fmt;

use crate::{ParseError, id::excerpt};

/// The use of a key in a meter. The number (1–63) is part of every diversified key and of every
/// stored row, and never changes.
///
/// Source: DLMS UA 1000-2 (Green Book), security keys; numbers are this system's own
/// (docs/formats.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyType(u8);

impl KeyType {
    /// Master key, the key encryption key that wraps new keys in `key_transfer`.
    pub const KEK: Self = Self(1);
    /// Global unicast encryption key.
    pub const GUEK: Self = Self(2);
    /// Global broadcast encryption key.
    pub const GBEK: Self = Self(3);
    /// Global authentication key: associated data of AES-GCM in DLMS.
    pub const GAK: Self = Self(4);
    /// Dedicated key of one association.
    pub const DEDICATED: Self = Self(5);
    /// Secret of low-level security (a password).
    pub const LLS_SECRET: Self = Self(6);
    /// Secret of high-level security mechanisms that use one.
    pub const HLS_SECRET: Self = Self(7);
    /// Key of firmware images.
    pub const FIRMWARE: Self = Self(8);
    /// Key of the optical port.
    pub const OPTICAL_PORT: Self = Self(9);
    /// Key of an M-Bus child device.
    pub const M_BUS_CHILD: Self = Self(10);

    /// The first number that device profiles may give to key types of their own; the last is 63.
    pub const FIRST_OF_PROFILES: u8 = 32;

    /// The number, 1–63.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The type with this number.
    ///
    /// # Errors
    /// The number is 0, above 63, or between the named types and [`Self::FIRST_OF_PROFILES`].
    pub fn from_number(number: u8) -> Result<Self, ParseError> {
        match number {
            1..=10 | Self::FIRST_OF_PROFILES..=63 => Ok(Self(number)),
            _ => Err(ParseError::new(
                "key type",
                format!("`{number}` is not a key type: 1 to 10 are named, 32 to 63 belong to device profiles"),
            )),
        }
    }

    /// The type with this name, as [`fmt::Display`] prints it (`GUEK`, `LLS-SECRET`, `PROFILE-32`);
    /// case does not matter.
    ///
    /// # Errors
    /// No type has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        let upper = name.to_ascii_uppercase();
        if let Some((number, _)) = NAMES.iter().find(|(_, known)| *known == upper) {
            return Ok(Self(*number));
        }
        upper
            .strip_prefix("PROFILE-")
            .and_then(|number| number.parse().ok())
            .filter(|number| (Self::FIRST_OF_PROFILES..=63).contains(number))
            .map(Self)
            .ok_or_else(|| ParseError::new("key type", format!("`{}` is unknown; known are KEK, GUEK, GBEK, GAK, DEDICATED, LLS-SECRET, HLS-SECRET, FIRMWARE, OPTICAL-PORT, M-BUS-CHILD and PROFILE-32 to PROFILE-63", excerpt(name))))
    }

    /// The class whose roots protect keys of this type. Of the types of device profiles, 32–55 are
    /// in class session and 56–63 in class authentication. The class follows from the number alone,
    /// so an edited profile cannot move a key to another root.
    pub const fn class(self) -> KeyClass {
        match self {
            Self::KEK => KeyClass::Kek,
            // I1: the GAK, which may be read for frames in the HSM, and secrets that clients must
            // know have their own roots.
            Self::GAK | Self::LLS_SECRET | Self::HLS_SECRET | Self::DEDICATED | Self(56..=63) => {
                KeyClass::Authentication
            }
            _ => KeyClass::Session,
        }
    }

    /// The id that `key_transfer` has for the type (IEC 62056-6-2, class 64, method 2): 0 GUEK, 1
    /// GBEK, 2 GAK, 3 KEK. Other types have one only where a device profile says so
    /// ([`crate::KeyProfile::key_id`]).
    pub const fn standard_key_id(self) -> Option<u8> {
        match self {
            Self::GUEK => Some(0),
            Self::GBEK => Some(1),
            Self::GAK => Some(2),
            Self::KEK => Some(3),
            _ => None,
        }
    }

    /// Whether an exchange shows which version a meter holds. A meter can only acknowledge keys of
    /// other types.
    pub const fn is_shown_by_exchanges(self) -> bool {
        matches!(self, Self::KEK | Self::GUEK | Self::GAK)
    }

    /// Whether `key_transfer` can carry a key of this type: a permanent AES key, wrapped under the
    /// meter's KEK. Secrets (class 15: LLS secret, `change_HLS_secret`) would travel in plaintext
    /// inside a ciphered request, and no secret leaves the HSM like this (I1).
    pub const fn is_transferable(self) -> bool {
        self.is_aes() && !matches!(self, Self::DEDICATED)
    }

    /// Whether keys of this type are AES keys; the others are secrets of 1–255 octets
    /// (docs/formats.md).
    pub const fn is_aes(self) -> bool {
        !matches!(self, Self::LLS_SECRET | Self::HLS_SECRET)
    }
}

impl fmt::Display for KeyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(number, _)| *number == self.0) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "PROFILE-{}", self.0),
        }
    }
}

/// The class of a key. Keys of one class share roots, and each class may have its own token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyClass {
    /// Master keys of meters.
    Kek,
    /// Encryption keys: unicast, broadcast, firmware and the like.
    Session,
    /// Authentication keys, dedicated keys and secrets: what may be readable as a session object
    /// for one call (I1).
    Authentication,
    /// Keys of certification authorities.
    Ca,
}

impl KeyClass {
    /// The classes that have a diversification root and a storage KEK.
    pub const WITH_ROOTS: [Self; 3] = [Self::Kek, Self::Session, Self::Authentication];

    /// The name that labels, configuration and output use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kek => "kek",
            Self::Session => "session",
            Self::Authentication => "authentication",
            Self::Ca => "ca",
        }
    }
}

impl fmt::Display for KeyClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// DLMS security suite (Green Book, security suites): which cipher and key size a meter uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SecuritySuite {
    /// AES-GCM-128, no public-key cryptography.
    Suite0,
    /// AES-GCM-128, ECDSA and ECDH P-256.
    Suite1,
    /// AES-GCM-256, ECDSA and ECDH P-384.
    Suite2,
}

impl SecuritySuite {
    /// The suite's number, 0–2, as the security control byte carries it.
    pub const fn number(self) -> u8 {
        match self {
            Self::Suite0 => 0,
            Self::Suite1 => 1,
            Self::Suite2 => 2,
        }
    }

    /// The suite with this number.
    ///
    /// # Errors
    /// The number is above 2.
    pub fn from_number(number: u8) -> Result<Self, ParseError> {
        match number {
            0 => Ok(Self::Suite0),
            1 => Ok(Self::Suite1),
            2 => Ok(Self::Suite2),
            _ => Err(ParseError::new("security suite", format!("`{number}` is not 0, 1 or 2"))),
        }
    }

    /// The length of the suite's AES keys.
    pub const fn key_length(self) -> KeyLength {
        match self {
            Self::Suite0 | Self::Suite1 => KeyLength::Aes128,
            Self::Suite2 => KeyLength::Aes256,
        }
    }
}

/// The length of an AES key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyLength {
    /// 16 octets.
    Aes128,
    /// 32 octets.
    Aes256,
}

impl KeyLength {
    /// The length in octets, 16 or 32.
    pub const fn octets(self) -> usize {
        match self {
            Self::Aes128 => 16,
            Self::Aes256 => 32,
        }
    }

    /// The length of the RFC 3394 wrapped key in octets, 24 or 40.
    pub const fn wrapped_octets(self) -> usize {
        self.octets() + 8
    }

    /// The length of this many octets.
    ///
    /// # Errors
    /// Neither 16 nor 32.
    pub fn from_octets(octets: usize) -> Result<Self, ParseError> {
        match octets {
            16 => Ok(Self::Aes128),
            32 => Ok(Self::Aes256),
            _ => Err(ParseError::new("key length", format!("`{octets}` octets is neither 16 nor 32"))),
        }
    }
}

/// What a key is to the HSM: the type of object that an unwrapped or derived key becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyShape {
    /// CKK_AES.
    Aes(KeyLength),
    /// CKK_GENERIC_SECRET in the encoding of docs/formats.md: a multiple of 8 octets, 16–256.
    Secret,
}

const NAMES: [(u8, &str); 10] = [
    (1, "KEK"),
    (2, "GUEK"),
    (3, "GBEK"),
    (4, "GAK"),
    (5, "DEDICATED"),
    (6, "LLS-SECRET"),
    (7, "HLS-SECRET"),
    (8, "FIRMWARE"),
    (9, "OPTICAL-PORT"),
    (10, "M-BUS-CHILD"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_and_name_comes_back() {
        for number in 0..=255 {
            let Ok(key_type) = KeyType::from_number(number) else { continue };
            assert_eq!(KeyType::parse(&key_type.to_string()), Ok(key_type));
            assert_eq!(key_type.number(), number);
        }
        assert!(KeyType::parse("GEK").is_err());
        assert!(KeyType::from_number(0).is_err() && KeyType::from_number(64).is_err());
    }
}
