//! What leaves a token in the ceremony: roots wrapped for the custodians and for standby tokens,
//! and fingerprints for the printed record.

use kms_domain::{IslandName, OaepHash};

use crate::label::TokenKey;

/// A root as it left the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedRoot {
    /// Which root; its label names it in files.
    pub key: TokenKey,
    /// CKA_CHECK_VALUE, 3 octets; empty where the module has none.
    pub check_value: Vec<u8>,
    /// RSA-OAEP (the package's hash, MGF1 with the same, no label) of the 32 octets.
    pub wrapped: Vec<u8>,
}

/// The roots for one holder of an RSA key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedRoots {
    /// SHA-256 of the holder's SubjectPublicKeyInfo.
    pub recipient_sha256: [u8; 32],
    /// Hash of RSA-OAEP.
    pub oaep_hash: OaepHash,
    /// The roots.
    pub roots: Vec<WrappedRoot>,
}

/// The package that must be stored before the roots are locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EscrowPackage {
    /// The island.
    pub island: IslandName,
    /// For the custodians.
    pub escrow: WrappedRoots,
    /// For the standby tokens, in the order of the plan.
    pub standby: Vec<WrappedRoots>,
}

/// A key that the ceremony made or found, for the printed record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFingerprint {
    /// CKA_LABEL.
    pub label: String,
    /// `check value` (roots) or `SHA-256` (of a public key: EC point, RSA SubjectPublicKeyInfo).
    pub kind: &'static str,
    /// The fingerprint.
    pub value: Vec<u8>,
}
