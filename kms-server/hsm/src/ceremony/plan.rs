//! What the ceremony makes in a token, and which standby tokens get copies of roots.

use kms_domain::{IslandName, KeyClass};

use crate::label::Purpose;

/// What the ceremony makes in one token.
#[derive(Clone, Debug)]
pub struct CeremonyPlan {
    /// The island.
    pub island: IslandName,
    /// Classes whose roots the token gets; with [`KeyClass::Ca`], the CA's key pair.
    pub classes: Vec<KeyClass>,
    /// Whether the token gets the keys of no class: seal root, fingerprint KEK, audit signing key,
    /// vendor transport key.
    pub general: bool,
    /// The custodians' escrow key: DER of an RSA SubjectPublicKeyInfo, at least 3072 bits.
    pub escrow_public_key: Vec<u8>,
    /// Tokens that get copies of roots.
    pub standby: Vec<StandbyToken>,
}

/// A token that gets copies of roots.
#[derive(Clone, Debug)]
pub struct StandbyToken {
    /// Its transport key ([`crate::create_standby_transport`]): DER of an RSA SubjectPublicKeyInfo,
    /// at least 3072 bits.
    pub public_key: Vec<u8>,
    /// Classes whose roots it gets. It always gets the seal root and the fingerprint KEK, which
    /// belong to no class.
    pub classes: Vec<KeyClass>,
}

impl StandbyToken {
    /// Whether the token gets this root.
    pub(super) fn gets(&self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Diversification(class) | Purpose::StorageKek(class) => self.classes.contains(&class),
            // A server without the seal root could not read a row.
            other => other.is_root(),
        }
    }
}
