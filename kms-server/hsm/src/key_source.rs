//! Where a key comes from: derived from a root, unwrapped from a stored blob, or new.

use kms_domain::{DiversificationContext, KeyClass, KeyDerivation, KeyLength, KeyShape, KeyType};

use crate::label::RootVersion;

/// Where a key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// Derived from the diversification root of its key type's class.
    Diversified {
        /// Version of the root.
        root_version: RootVersion,
        /// The derivation that the root version records.
        derivation: KeyDerivation,
        /// The input that makes the key differ from every other.
        context: DiversificationContext,
    },
    /// Unwrapped from a blob under the storage KEK of its key type's class.
    Stored {
        /// The key's type.
        key_type: KeyType,
        /// Version of the storage KEK.
        storage_kek_version: RootVersion,
        /// What the blob holds.
        shape: KeyShape,
        /// RFC 3394 wrap: 24 or 40 octets for AES keys, 24–264 for secrets.
        blob: Vec<u8>,
    },
    /// A new AES key that is stored nowhere: a dedicated key.
    Fresh(KeyLength),
}

impl KeySource {
    /// The class whose token makes the key. Fresh keys are dedicated keys.
    pub const fn class(&self) -> KeyClass {
        self.key_type().class()
    }

    pub(crate) const fn key_type(&self) -> KeyType {
        match self {
            Self::Diversified { context, .. } => context.key_type,
            Self::Stored { key_type, .. } => *key_type,
            Self::Fresh(_) => KeyType::DEDICATED,
        }
    }
}
