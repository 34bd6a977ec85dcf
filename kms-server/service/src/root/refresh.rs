//! What a server knows of the roots in use: read from the island's row every few seconds, so that
//! no server needs a restart for a new version.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{
    Island as IslandRow, KeyClass, RootId, RootPurpose, RootStanding, RowSeal, SealKey, SealKeys, SealRootKey,
};
use kms_hsm::{Hsm, Purpose, TokenKey};
use kms_store::{RowKind, Store};

use super::{RootService, is_missing, no_island, root_version, token_key};
use kms_base::error::ServiceError;
use kms_ledger::{AuditKey, AuditKeys, Committer};

/// The version of the seal root that the key of fingerprints is computed from. It stays: the
/// fingerprints of all keys are checked with it.
pub const FINGERPRINT_KEY_VERSION: u8 = 1;

/// Has the HSM compute the seal key of a version.
///
/// # Errors
/// The root is missing, or trouble of the HSM.
#[boxed]
pub async fn seal_key(hsm: &Hsm, version: u8) -> Result<SealKey, ServiceError> {
    let message = SealRootKey::Seal.message(version, hsm.island());
    Ok(SealKey::new(version, &hsm.mac(root_version(version)?, message).await?))
}

/// Has the HSM compute the audit key of a version.
///
/// # Errors
/// The root is missing, or trouble of the HSM.
pub(super) async fn audit_key(hsm: &Hsm, version: u8) -> Result<AuditKey, ServiceError> {
    let message = SealRootKey::AuditChain.message(version, hsm.island());
    Ok(AuditKey::new(version, &*hsm.mac(root_version(version)?, message).await?))
}

/// The audit key of a version; none: the tokens lack the root.
///
/// # Errors
/// Trouble of the HSM.
#[boxed]
pub async fn held_audit_key(hsm: &Hsm, version: u8) -> Result<Option<AuditKey>, ServiceError> {
    if holds_seal_root(hsm, version).await? { audit_key(hsm, version).await.map(Some) } else { Ok(None) }
}

/// The audit keys that are believed still, as far as the tokens hold their roots; chains begin with
/// `current`.
///
/// # Errors
/// The root of that version is missing, or trouble of the HSM.
#[boxed]
pub async fn audit_keys(hsm: &Hsm, current: u8, oldest: u8) -> Result<AuditKeys, ServiceError> {
    let mut keys = AuditKeys::from(audit_key(hsm, current).await?);
    for version in oldest..current {
        if let Some(key) = held_audit_key(hsm, version).await? {
            keys = keys.with(key);
        }
    }
    Ok(keys)
}

impl RootService {
    /// Reads the island's row, and uses the roots that it names from now on, as far as this
    /// server's tokens hold them.
    ///
    /// # Errors
    /// The row does not verify, a root in use is not in the token, or HSM or database are away.
    #[boxed]
    pub async fn refresh(&self) -> Result<Arc<IslandRow>, ServiceError> {
        let island = &self.island;
        // One at a time: an older row never takes the place of a newer one.
        let mut known_problems = island.refreshing.lock().await;
        let row = read_island(&*island.store, &island.hsm, &island.committer).await?;
        let (seal, missing) = seal_keys(&island.hsm, &row, (*island.committer.seal_keys()).clone()).await;
        if let Some(missing) = missing
            && known_problems.is_news(&missing)
        {
            tracing::error!(
                roots = missing,
                "rows that are sealed under roots which this token lacks are refused; install the copies with `kms-server roots install`"
            );
        }
        let retired = seal.as_ref().is_ok_and(|keys| keys.oldest() > island.committer.seal_keys().oldest());
        let seal = seal.map(|keys| island.committer.use_seal_keys(keys));
        if retired {
            // I5: outside of the database, before anyone could put a row of before back.
            island.committer.remember().await;
        }
        let storage = self.use_storage_keks(&row).await;
        // I3: what is stored from now on is judged by the newest row, whatever the tokens lack.
        island.row.store(Arc::clone(&row));
        let audit = self.use_audit_key(row.seal_key_version).await;
        seal.and(storage).and(audit).map(|()| row)
    }

    /// Links records with the audit key of this version of the seal root from now on.
    async fn use_audit_key(&self, version: u8) -> Result<(), ServiceError> {
        let committer = &self.island.committer;
        let mut keys = (*committer.audit_keys()).clone();
        if keys.current().version() == version && committer.is_linked_with(version) {
            return Ok(());
        }
        if keys.get(version).is_none() {
            keys = keys.with(audit_key(&self.island.hsm, version).await?);
        }
        committer.use_audit_keys(keys.using(version)).await
    }

    /// Wraps new keys under the storage KEKs that the row names, class by class: one that cannot be
    /// used does not hold up the others.
    async fn use_storage_keks(&self, row: &IslandRow) -> Result<(), ServiceError> {
        let hsm = &self.island.hsm;
        let mut outcome = Ok(());
        for class in KeyClass::WITH_ROOTS.into_iter().filter(|class| hsm.serves(*class)) {
            let Some(roots) = row.roots(class) else { continue };
            let id = RootId { purpose: RootPurpose::StorageKek(class), version: roots.storage_kek_version };
            let used = hsm.storage_kek(class);
            if used == root_version(id.version)? {
                continue;
            }
            // A key that this server cannot open again must not be stored: the version before is
            // used until the operator has put the copy in.
            let held = self.is_in_token(id).await;
            let before = u8::try_from(used.number()).ok().map(|version| RootId { version, ..id });
            // I3: nor under one whose destruction was decided: nothing is stored then.
            if held.is_ok() || before.is_none_or(|before| !row.may_store_under(before)) {
                hsm.use_storage_kek(class, root_version(id.version)?);
            }
            outcome = outcome.and(held);
        }
        outcome
    }
}

/// Reads the island's row and verifies it (I5). Where another server has sealed it with a version
/// of the seal key that this one has not heard of yet, the HSM tells whether there is one.
///
/// # Errors
/// The row does not verify, the root that it is sealed under is not in the token, or HSM or
/// database are away.
async fn read_island(store: &dyn Store, hsm: &Hsm, committer: &Committer) -> Result<Arc<IslandRow>, ServiceError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let stored = store.sealed(RowKind::Island, hsm.island().as_str().as_bytes()).await?.ok_or_else(no_island)?;
        let version = RowSeal::from_octets(&stored.seal)
            .map_err(|error| ServiceError::Internal(error.to_string()))?
            .key_version();
        if version > committer.seal_key().version() && !committer.seal_keys().has(version) {
            committer.use_seal_keys((*committer.seal_keys()).clone().with(seal_key(hsm, version).await?));
        }
        match committer.open_island(&stored) {
            // It may have been written between being read and being opened: only what does not
            // verify again was tampered with.
            Err(_) if attempts < 2 => {}
            other => return other,
        }
    }
}

/// Reads the island's row, and seals with the keys that it names from now on: for a server whose
/// island is not open yet.
///
/// # Errors
/// The row does not verify, the root that it is sealed under is not in the token, or HSM or
/// database are away.
#[boxed]
pub async fn learn_seal_keys(store: &dyn Store, hsm: &Hsm, committer: &Committer) -> Result<(), ServiceError> {
    let row = read_island(store, hsm, committer).await?;
    let (keys, _) = seal_keys(hsm, &row, (*committer.seal_keys()).clone()).await;
    committer.use_seal_keys(keys?);
    Ok(())
}

/// The seal keys that the row asks for, with those that are known already; and the names of
/// replaced versions that the token lacks: their rows cannot be checked here, which holds up
/// nothing else.
///
/// # Errors
/// The current seal root is not in the token, or trouble of the HSM.
#[boxed]
pub async fn seal_keys(
    hsm: &Hsm,
    row: &IslandRow,
    mut keys: SealKeys,
) -> (Result<SealKeys, ServiceError>, Option<String>) {
    let mut missing = Vec::new();
    for id in row.root_versions(RootPurpose::Seal) {
        let standing = row.root_standing(id).unwrap_or(RootStanding::Destroyed);
        if keys.has(id.version) || standing == RootStanding::Destroyed {
            continue;
        }
        match held_seal_key(hsm, id).await {
            Ok(Some(key)) => keys = keys.with(key),
            Ok(None) if standing == RootStanding::Current => {
                let reason = format!(
                    "the token does not hold the root `{id}`, which rows are sealed under; install its copy with `kms-server roots install`"
                );
                return (Err(ServiceError::unavailable(reason)), None);
            }
            Ok(None) if standing == RootStanding::Replaced => missing.push(id.to_string()),
            Ok(None) => {}
            Err(error) => return (Err(error), None),
        }
    }
    let missing = (!missing.is_empty()).then(|| missing.join(", "));
    (Ok(keys.using(row.seal_key_version, row.ledger.oldest_seal_key_version)), missing)
}

/// With the seal keys of all versions in the tokens, whether the island's row names them or not:
/// what this server keeps outside the database may be sealed under a newer one than a database
/// knows that was put back.
///
/// # Errors
/// Trouble of the HSM.
#[boxed]
pub async fn all_seal_keys(hsm: &Hsm, mut keys: SealKeys) -> Result<SealKeys, ServiceError> {
    for object in hsm.inventory().await?.into_iter().flat_map(|(_, objects)| objects) {
        let Some(TokenKey { purpose: Purpose::Seal, version }) = TokenKey::of_label(&object.label, hsm.island()) else {
            continue;
        };
        let Ok(version) = u8::try_from(version.number()) else { continue };
        if !keys.has(version)
            && let Some(key) = held_seal_key(hsm, RootId { purpose: RootPurpose::Seal, version }).await?
        {
            keys = keys.with(key);
        }
    }
    Ok(keys)
}

async fn held_seal_key(hsm: &Hsm, id: RootId) -> Result<Option<SealKey>, ServiceError> {
    if holds_seal_root(hsm, id.version).await? { seal_key(hsm, id.version).await.map(Some) } else { Ok(None) }
}

async fn holds_seal_root(hsm: &Hsm, version: u8) -> Result<bool, ServiceError> {
    match hsm.has_key(token_key(RootId { purpose: RootPurpose::Seal, version })?).await {
        Err(error) if is_missing(&error) => Ok(false),
        other => Ok(other?),
    }
}
