//! The small types that everything else is made of: names, keys and suites.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

use crate::Error;

/// The system title of a client or a server: 8 bytes, the first three are the FLAG manufacturer id
/// (IEC 62056-5-3). Written as 16 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemTitle([u8; SystemTitle::LENGTH]);

impl SystemTitle {
    /// Length in bytes.
    pub const LENGTH: usize = 8;

    /// The title made of these 8 bytes.
    pub const fn new(bytes: [u8; Self::LENGTH]) -> Self {
        Self(bytes)
    }

    /// The 8 bytes, as they stand in a nonce.
    pub const fn as_bytes(&self) -> &[u8; Self::LENGTH] {
        &self.0
    }
}

impl TryFrom<&[u8]> for SystemTitle {
    type Error = Error;

    fn try_from(bytes: &[u8]) -> Result<Self, Error> {
        Ok(Self(bytes.try_into().map_err(|_| Error::malformed("system title", "is not 8 bytes long"))?))
    }
}

impl FromStr for SystemTitle {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bytes = hex::decode(text).map_err(|_| Error::malformed("system title", "is not hex"))?;
        Self::try_from(bytes.as_slice())
    }
}

impl fmt::Display for SystemTitle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode_upper(self.0))
    }
}

impl fmt::Debug for SystemTitle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SystemTitle({self})")
    }
}

impl Serialize for SystemTitle {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemTitle {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The logical name of a COSEM object (OBIS code, IEC 62056-6-1): 6 bytes, written `1.0.1.8.0.255`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Obis(pub [u8; 6]);

impl Obis {
    /// The current association, class 15.
    pub const CURRENT_ASSOCIATION: Self = Self([0, 0, 40, 0, 0, 255]);
    /// The COSEM logical device name, class 1.
    pub const LOGICAL_DEVICE_NAME: Self = Self([0, 0, 42, 0, 0, 255]);
    /// The first security setup, class 64.
    pub const SECURITY_SETUP: Self = Self([0, 0, 43, 0, 0, 255]);
    /// The invocation counter that belongs to the first security setup, class 1.
    pub const INVOCATION_COUNTER: Self = Self([0, 0, 43, 1, 0, 255]);
    /// The clock, class 8.
    pub const CLOCK: Self = Self([0, 0, 1, 0, 0, 255]);
    /// The disconnect control, class 70.
    pub const DISCONNECT_CONTROL: Self = Self([0, 0, 96, 3, 10, 255]);
    /// Active energy import, total: the register that examples read.
    pub const ACTIVE_ENERGY_IMPORT: Self = Self([1, 0, 1, 8, 0, 255]);
}

impl FromStr for Obis {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fields: Vec<u8> = text
            .split('.')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map_err(|_| Error::malformed("logical name", "has a field that is not a number below 256"))?;
        Ok(Self(
            fields.as_slice().try_into().map_err(|_| Error::malformed("logical name", "does not have six fields"))?,
        ))
    }
}

impl fmt::Display for Obis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a}.{b}.{c}.{d}.{e}.{g}")
    }
}

impl fmt::Debug for Obis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Obis({self})")
    }
}

impl Serialize for Obis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Obis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A security suite of DLMS/COSEM. Only its symmetric part is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SecuritySuite {
    /// AES-GCM-128, AES-128 key wrap.
    #[default]
    Suite0,
    /// AES-GCM-128, AES-128 key wrap, ECDSA and ECDH on P-256.
    Suite1,
    /// AES-GCM-256, AES-256 key wrap, ECDSA and ECDH on P-384.
    Suite2,
}

impl SecuritySuite {
    /// The number of the suite: the low four bits of a security control byte, the value of
    /// attribute 3 of the security setup.
    pub const fn id(self) -> u8 {
        match self {
            Self::Suite0 => 0,
            Self::Suite1 => 1,
            Self::Suite2 => 2,
        }
    }

    /// Length in bytes of GUEK, GBEK, GAK, KEK and dedicated keys.
    pub const fn key_length(self) -> usize {
        match self {
            Self::Suite0 | Self::Suite1 => 16,
            Self::Suite2 => 32,
        }
    }
}

impl TryFrom<u8> for SecuritySuite {
    type Error = Error;

    fn try_from(id: u8) -> Result<Self, Error> {
        match id {
            0 => Ok(Self::Suite0),
            1 => Ok(Self::Suite1),
            2 => Ok(Self::Suite2),
            _ => Err(Error::malformed("security suite", "is not 0, 1 or 2")),
        }
    }
}

impl Serialize for SecuritySuite {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.id())
    }
}

impl<'de> Deserialize<'de> for SecuritySuite {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::try_from(u8::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// An AES key of 16 or 32 bytes. It is wiped on drop, printed as its length only, and compared in
/// constant time. In configuration it is hex.
#[derive(Clone)]
pub struct SymmetricKey(Zeroizing<Vec<u8>>);

impl SymmetricKey {
    /// Takes a copy of `bytes`, which are 16 or 32.
    pub fn new(bytes: &[u8]) -> Result<Self, Error> {
        match bytes.len() {
            16 | 32 => Ok(Self(Zeroizing::new(bytes.to_vec()))),
            _ => Err(Error::malformed("key", "is not 16 or 32 bytes long")),
        }
    }

    /// A random key of the length that `suite` asks for.
    pub fn random(suite: SecuritySuite) -> Result<Self, Error> {
        let mut bytes = Zeroizing::new(vec![0; suite.key_length()]);
        getrandom::fill(&mut bytes).map_err(|_| Error::Random)?;
        Ok(Self(bytes))
    }

    /// The key itself. The caller must not copy it into memory that is not wiped.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl PartialEq for SymmetricKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for SymmetricKey {}

impl fmt::Debug for SymmetricKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SymmetricKey({} bytes)", self.0.len())
    }
}

impl<'de> Deserialize<'de> for SymmetricKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut text = String::deserialize(deserializer)?;
        let bytes = hex::decode(&text).map(Zeroizing::new);
        text.zeroize();
        let bytes = bytes.map_err(|_| serde::de::Error::custom("a key is not hex"))?;
        Self::new(&bytes).map_err(serde::de::Error::custom)
    }
}

/// A password (LLS secret): any bytes, wiped on drop, never printed. In configuration it is hex.
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes a copy of `bytes`.
    pub fn new(bytes: &[u8]) -> Self {
        Self(Zeroizing::new(bytes.to_vec()))
    }

    /// Whether `candidate` is the secret; takes the same time for every candidate of one length.
    pub fn matches(&self, candidate: &[u8]) -> bool {
        self.0.ct_eq(candidate).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut text = String::deserialize(deserializer)?;
        let bytes = hex::decode(&text).map(Zeroizing::new);
        text.zeroize();
        Ok(Self(bytes.map_err(|_| serde::de::Error::custom("a secret is not hex"))?))
    }
}

/// The symmetric keys of a security setup, numbered as in `key_transfer` (IEC 62056-6-2, class 64,
/// method 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyId {
    /// Global unicast encryption key (GUEK), 0.
    GlobalUnicastEncryption,
    /// Global broadcast encryption key (GBEK), 1.
    GlobalBroadcastEncryption,
    /// Global authentication key (GAK), 2.
    GlobalAuthentication,
    /// Master key (KEK), 3.
    Master,
    /// A key of the vendor's, 4 to 255.
    Vendor(u8),
}

impl KeyId {
    /// The number on the wire.
    pub const fn id(self) -> u8 {
        match self {
            Self::GlobalUnicastEncryption => 0,
            Self::GlobalBroadcastEncryption => 1,
            Self::GlobalAuthentication => 2,
            Self::Master => 3,
            Self::Vendor(id) => id,
        }
    }
}

impl From<u8> for KeyId {
    fn from(id: u8) -> Self {
        match id {
            0 => Self::GlobalUnicastEncryption,
            1 => Self::GlobalBroadcastEncryption,
            2 => Self::GlobalAuthentication,
            3 => Self::Master,
            other => Self::Vendor(other),
        }
    }
}
