//! How the roots and other token keys of an island are named: CKA_LABEL, and CKA_ID where a module
//! wants one.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use kms_domain::{IslandName, KeyClass, ParseError};

/// The version of a root, from 1. A key version names the root version that it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootVersion(u32);

impl RootVersion {
    /// The first version.
    pub const FIRST: Self = Self(1);

    /// The version of this number.
    ///
    /// # Errors
    /// The number is 0.
    pub fn new(number: u32) -> Result<Self, ParseError> {
        if number == 0 {
            return Err(ParseError::new("root version", "versions start at 1"));
        }
        Ok(Self(number))
    }

    /// The number.
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for RootVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a token key is for: one use each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// AES-256, derive only: diversified keys of the class come from it.
    Diversification(KeyClass),
    /// AES-256, wrap and unwrap only: stored keys of the class are RFC 3394 blobs under it.
    StorageKek(KeyClass),
    /// 32-octet HMAC key, sign (MAC) only.
    Seal,
    /// AES-256, wrap only: its RFC 3394 wraps are never unwrapped, they are the input of
    /// fingerprints.
    FingerprintKek,
    /// P-256 key pair, sign only: audit checkpoints.
    AuditSign,
    /// P-256 key pair, sign only: the island's certification authority.
    Ca,
    /// RSA-3072 key pair, unwrap only: vendors encrypt batch keys to it.
    VendorTransport,
    /// RSA-3072 key pair, unwrap only: a standby token receives copies of roots under it.
    StandbyTransport,
    /// RSA public key, wrap only, trusted: the custodians' escrow key.
    Escrow,
    /// RSA public key, wrap only, trusted: a standby token's transport key, in the token that is
    /// copied.
    StandbyRecipient(u8),
}

impl Purpose {
    /// Whether the key is a symmetric root that the ceremony escrows.
    pub const fn is_root(self) -> bool {
        matches!(self, Self::Diversification(_) | Self::StorageKek(_) | Self::Seal | Self::FingerprintKek)
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Diversification(class) => write!(f, "{class}/diversification"),
            Self::StorageKek(class) => write!(f, "{class}/storage-kek"),
            Self::Seal => f.write_str("seal"),
            Self::FingerprintKek => f.write_str("fingerprint-kek"),
            Self::AuditSign => f.write_str("audit-sign"),
            Self::Ca => f.write_str("ca"),
            Self::VendorTransport => f.write_str("vendor-transport"),
            Self::StandbyTransport => f.write_str("standby-transport"),
            Self::Escrow => f.write_str("escrow"),
            Self::StandbyRecipient(number) => write!(f, "standby-recipient-{number}"),
        }
    }
}

/// A token key of an island: purpose and version. Within one token, the island is the token's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenKey {
    /// What it is for.
    pub purpose: Purpose,
    /// Its version.
    pub version: RootVersion,
}

impl TokenKey {
    /// The first version of a purpose.
    pub const fn first(purpose: Purpose) -> Self {
        Self { purpose, version: RootVersion::FIRST }
    }

    /// CKA_LABEL: `meterkms/ISLAND/PURPOSE/VERSION`, for example
    /// `meterkms/north/session/diversification/1`.
    pub fn label(&self, island: &IslandName) -> String {
        format!("meterkms/{island}/{}/{}", self.purpose, self.version)
    }

    /// The key that a label of this island names, if it is one of ours.
    pub fn of_label(label: &str, island: &IslandName) -> Option<Self> {
        let (_, version) = label.rsplit_once('/')?;
        let version = RootVersion::new(version.parse().ok()?).ok()?;
        let mut purposes = vec![
            Purpose::Seal,
            Purpose::FingerprintKek,
            Purpose::AuditSign,
            Purpose::Ca,
            Purpose::VendorTransport,
            Purpose::StandbyTransport,
        ];
        purposes.extend(
            KeyClass::WITH_ROOTS
                .into_iter()
                .flat_map(|class| [Purpose::Diversification(class), Purpose::StorageKek(class)]),
        );
        purposes.into_iter().map(|purpose| Self { purpose, version }).find(|key| key.label(island) == label)
    }

    /// CKA_ID: the first 16 octets of the label's SHA-256. A public and a private key of one pair
    /// share it.
    pub fn id(&self, island: &IslandName) -> [u8; 16] {
        let mut id = [0; 16];
        for (octet, value) in id.iter_mut().zip(digest(&SHA256, self.label(island).as_bytes()).as_ref()) {
            *octet = *value;
        }
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_as_documented() {
        let island = IslandName::parse("north").unwrap();
        assert_eq!(
            TokenKey::first(Purpose::Diversification(KeyClass::Session)).label(&island),
            "meterkms/north/session/diversification/1"
        );
        assert_eq!(
            TokenKey::first(Purpose::StorageKek(KeyClass::Kek)).label(&island),
            "meterkms/north/kek/storage-kek/1"
        );
        assert_eq!(
            TokenKey { purpose: Purpose::Seal, version: RootVersion::new(2).unwrap() }.label(&island),
            "meterkms/north/seal/2"
        );
        let key = TokenKey::first(Purpose::Diversification(KeyClass::Authentication));
        assert_eq!(TokenKey::of_label(&key.label(&island), &island), Some(key));
        assert_eq!(TokenKey::of_label("meterkms/south/seal/1", &island), None);
    }
}
