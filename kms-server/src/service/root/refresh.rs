//! What a server knows of the roots in use: read from the island's row every few seconds, so that no server needs a restart for a new version.

use std::sync::Arc;

use kms_domain::{Island as IslandRow, KeyClass, RootId, RootPurpose, RootStanding, RowSeal, SealKey, SealKeys, SealRootKey};
use kms_hsm::Hsm;
use kms_store::RowKind;

use super::{RootService, is_missing, no_island, root_version, token_key};
use crate::error::ServiceError;

/// The version of the seal root that the keys of the audit chain and of fingerprints are computed from. It stays: old records and the fingerprints of
/// all keys are checked with them.
pub const CHAIN_KEY_VERSION: u8 = 1;

/// Has the HSM compute the seal key of a version.
///
/// # Errors
/// The root is missing, or trouble of the HSM.
pub async fn seal_key(hsm: &Hsm, version: u8) -> Result<SealKey, ServiceError> {
    let message = SealRootKey::Seal.message(version, hsm.island());
    Ok(SealKey::new(version, &hsm.mac(root_version(version)?, message).await?))
}

impl RootService {
    /// Reads the island's row, and uses the roots that it names from now on.
    ///
    /// # Errors
    /// The row does not verify, a root in use is not in the token, or HSM or database are away.
    pub async fn refresh(&self) -> Result<Arc<IslandRow>, ServiceError> {
        let island = &self.island;
        let stored = island.store.sealed(RowKind::Island, island.name().as_str().as_bytes()).await?.ok_or_else(no_island)?;
        // Another server seals with a version that this one has not heard of yet: the HSM tells whether there is one.
        let version = RowSeal::from_octets(&stored.seal).map_err(|error| ServiceError::Internal(error.to_string()))?.key_version();
        if version > island.committer.seal_key().version() && !island.committer.seal_keys().has(version) {
            let keys = (*island.committer.seal_keys()).clone().with(seal_key(&island.hsm, version).await?);
            island.committer.use_seal_keys(keys);
        }
        let row = island.committer.open_island(&stored)?;
        self.apply(&row).await?;
        Ok(row)
    }

    /// Uses the roots that a verified row of the island names.
    ///
    /// # Errors
    /// A root in use is not in the token, or trouble of the HSM.
    pub async fn apply(&self, row: &Arc<IslandRow>) -> Result<(), ServiceError> {
        let island = &self.island;
        let keys = seal_keys(&island.hsm, row, (*island.committer.seal_keys()).clone()).await?;
        island.committer.use_seal_keys(keys);
        for class in KeyClass::WITH_ROOTS.into_iter().filter(|class| island.hsm.serves(*class)) {
            let Some(roots) = row.roots(class) else { continue };
            let id = RootId { purpose: RootPurpose::StorageKek(class), version: roots.storage_kek_version };
            let known = island.row().roots(class).map(|known| known.storage_kek_version);
            // A key that this server cannot open again must not be stored: the version before is used until the operator has put the copy in.
            let held = if known == Some(id.version) { Ok(()) } else { self.is_in_token(id).await };
            let before = known.map(|version| RootId { version, ..id });
            // I3: nor under one whose destruction was decided: nothing is stored then.
            if held.is_ok() || before.and_then(|before| row.root_standing(before)) == Some(RootStanding::Destroyed) {
                island.hsm.use_storage_kek(class, root_version(id.version)?);
            }
            held?;
        }
        island.row.store(Arc::clone(row));
        Ok(())
    }
}

/// The seal keys that the row asks for, with those that are known already.
///
/// # Errors
/// A seal root in use is not in the token, or trouble of the HSM.
pub async fn seal_keys(hsm: &Hsm, row: &IslandRow, mut keys: SealKeys) -> Result<SealKeys, ServiceError> {
    for id in row.root_versions(RootPurpose::Seal) {
        let standing = row.root_standing(id).unwrap_or(RootStanding::Destroyed);
        if keys.has(id.version) || standing == RootStanding::Destroyed {
            continue;
        }
        match hsm.has_key(token_key(id)?).await {
            Ok(true) => keys = keys.with(seal_key(hsm, id.version).await?),
            Ok(false) if standing == RootStanding::Current || standing == RootStanding::Replaced => {
                return Err(ServiceError::unavailable(format!(
                    "the token does not hold the root `{id}`, which rows are sealed under; install its copy with `kms-server roots install`"
                )));
            }
            Ok(false) => {}
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(keys.using(row.seal_key_version, row.ledger.oldest_seal_key_version))
}
