//! How a new key is made: diversified or generated, as the device profile says.

use kms_domain::{
    KeyLength, KeyMaterial, KeyOrigin, KeyProfile, KeyShape, KeyState, KeyType, KeyVersion, NewKeyOrigin,
    NewKeyVersion, SecuritySetupId, SecuritySuite, Slot, UnixMillis, WrappedKey,
};
use kms_hsm::Hsm;

use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// How the first version of a key is made.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// The security setup.
    pub(crate) setup: SecuritySetupId,
    /// The key type.
    pub(crate) key_type: KeyType,
    /// Diversified or generated.
    pub(crate) origin: KeyOrigin,
    length: KeyLength,
}

impl Recipe {
    /// The recipe of a key; `None` for a secret, which is not made here. A diversified key becomes
    /// a generated one where the module derives nothing.
    pub(crate) fn of(island: &IslandContext, setup: SecuritySetupId, key: &KeyProfile) -> Option<Self> {
        // I1: the HSM cannot make a secret in the encoding of docs/formats.md, and this server's
        // memory must not.
        let KeyShape::Aes(length) = key.shape else { return None };
        let root = island.row().roots(key.key_type.class()).and_then(kms_domain::ClassRoots::current);
        let origin = match (key.origin, root) {
            (NewKeyOrigin::Diversified, Some(root)) => {
                KeyOrigin::Diversified { root_version: root.version, derivation: root.derivation, length }
            }
            _ => KeyOrigin::Generated,
        };
        Some(Self { setup, key_type: key.key_type, origin, length })
    }

    /// The recipe of the next version of a slot: the same as of the version before.
    pub(crate) fn again(island: &IslandContext, slot: &Slot, suite: SecuritySuite) -> Self {
        let last = slot.versions().last();
        let root = island.row().roots(slot.key_type().class()).and_then(kms_domain::ClassRoots::current);
        let length = match last.map(|version| (version.origin(), version.material())) {
            Some((KeyOrigin::Diversified { length, .. }, _)) => length,
            Some((_, KeyMaterial::Wrapped(wrapped))) if let KeyShape::Aes(length) = wrapped.shape() => length,
            _ => suite.key_length(),
        };
        let origin = match (last.map(KeyVersion::origin), root) {
            (Some(KeyOrigin::Diversified { .. }), Some(root)) => {
                KeyOrigin::Diversified { root_version: root.version, derivation: root.derivation, length }
            }
            _ => KeyOrigin::Generated,
        };
        Self { setup: slot.setup(), key_type: slot.key_type(), origin, length }
    }

    /// A random key that the HSM makes and wraps under its storage KEK; `None` for a diversified
    /// key, which is not stored.
    ///
    /// # Errors
    /// A failure of the HSM.
    pub(crate) async fn generate(&self, hsm: &Hsm) -> Result<Option<WrappedKey>, ServiceError> {
        if self.origin != KeyOrigin::Generated {
            return Ok(None);
        }
        let stored = hsm.generate_stored(self.key_type, self.length).await?;
        let version = u8::try_from(stored.storage_kek_version.number()).unwrap_or_default();
        WrappedKey::new(self.key_type, version, stored.blob.into())
            .map(Some)
            .map_err(|error| ServiceError::Internal(error.to_string()))
    }

    /// The slot with version 1.
    ///
    /// # Errors
    /// `wrapped` does not come from [`Self::generate`].
    pub(crate) fn slot(
        &self,
        wrapped: Option<WrappedKey>,
        state: KeyState,
        now: UnixMillis,
    ) -> Result<Slot, ServiceError> {
        let mut slot = Slot::new(self.setup, self.key_type);
        slot.add_version(self.version(wrapped, state), now)
            .map_err(|error| ServiceError::Internal(error.to_string()))?;
        Ok(slot)
    }

    /// A version for a slot. `wrapped` comes from [`Self::generate`].
    pub(crate) const fn version(&self, wrapped: Option<WrappedKey>, state: KeyState) -> NewKeyVersion {
        NewKeyVersion { state, origin: self.origin, wrapped, fingerprint: None }
    }
}
