//! The keys that the HSM computes from the seal root: seal keys of rows, and keys of the audit log.

use async_recursion::async_recursion as boxed;

use kms_domain::{Island as IslandRow, RootId, RootPurpose, RootStanding, SealKey, SealKeys, SealRootKey};
use kms_hsm::{Hsm, HsmError, Purpose, TokenKey};

use super::token::{root_version, token_key};
use kms_base::error::ServiceError;
use kms_ledger::{AuditKey, AuditKeys};

/// The version of the seal root from which the fingerprint key is computed. It never changes: the
/// fingerprints of all keys are checked with this key.
pub(crate) const FINGERPRINT_KEY_VERSION: u8 = 1;

/// Has the HSM compute the seal key of a version.
///
/// # Errors
/// The root is missing, or a failure of the HSM.
#[boxed]
pub(crate) async fn seal_key(hsm: &Hsm, version: u8) -> Result<SealKey, ServiceError> {
    let message = SealRootKey::Seal.message(version, hsm.island());
    Ok(SealKey::new(version, &hsm.mac(root_version(version)?, message).await?))
}

/// Has the HSM compute the audit key of a version.
///
/// # Errors
/// The root is missing, or a failure of the HSM.
pub(crate) async fn audit_key(hsm: &Hsm, version: u8) -> Result<AuditKey, ServiceError> {
    let message = SealRootKey::AuditChain.message(version, hsm.island());
    Ok(AuditKey::new(version, &*hsm.mac(root_version(version)?, message).await?))
}

/// The audit key of a version; `None` if the tokens do not hold the root.
///
/// # Errors
/// A failure of the HSM.
#[boxed]
pub(crate) async fn held_audit_key(hsm: &Hsm, version: u8) -> Result<Option<AuditKey>, ServiceError> {
    if holds_seal_root(hsm, version).await? { audit_key(hsm, version).await.map(Some) } else { Ok(None) }
}

/// The audit keys that are still accepted and whose roots the tokens hold. New chains begin with
/// `current`.
///
/// # Errors
/// The root of that version is missing, or a failure of the HSM.
#[boxed]
pub(crate) async fn audit_keys(hsm: &Hsm, current: u8, oldest: u8) -> Result<AuditKeys, ServiceError> {
    let mut keys = AuditKeys::from(audit_key(hsm, current).await?);
    for version in oldest..current {
        if let Some(key) = held_audit_key(hsm, version).await? {
            keys = keys.with(key);
        }
    }
    Ok(keys)
}

/// The seal keys that the island's row names, together with those in `keys`. The second value names
/// replaced versions that the tokens do not hold: rows under them cannot be verified here, and
/// everything else works.
///
/// # Errors
/// The current seal root is not in the token, or a failure of the HSM.
#[boxed]
pub(crate) async fn seal_keys(
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

/// Adds the seal keys of all versions in the tokens, whether the island's row names them or not.
/// After an older database was restored, what this server keeps outside the database may be sealed
/// under a version that the database does not name.
///
/// # Errors
/// A failure of the HSM.
#[boxed]
pub(crate) async fn all_seal_keys(hsm: &Hsm, mut keys: SealKeys) -> Result<SealKeys, ServiceError> {
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

/// Whether the token holds no such key.
const fn is_missing(error: &HsmError) -> bool {
    matches!(error, HsmError::KeyMissing { .. })
}
