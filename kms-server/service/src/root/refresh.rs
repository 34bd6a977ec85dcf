//! Which roots are in use: a server reads the island's row every few seconds, so that no server
//! needs a restart for a new version.

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{Island as IslandRow, KeyClass, RootId, RootPurpose, RowSeal};
use kms_hsm::Hsm;
use kms_store::{RowKind, Store};

use super::{RootService, no_island};
use crate::keys::seal::{audit_key, seal_key, seal_keys};
use crate::keys::token::root_version;
use kms_base::error::ServiceError;
use kms_ledger::Committer;

impl RootService {
    /// Reads the island's row. From now on this server uses the roots that the row names, if its
    /// tokens hold them.
    ///
    /// # Errors
    /// The row does not verify, a root in use is not in the token, or the HSM or the database is
    /// unavailable.
    #[boxed]
    pub async fn refresh(&self) -> Result<Arc<IslandRow>, ServiceError> {
        let island = &self.island;
        // One at a time: an older row never replaces a newer one.
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
            // I5: this is kept outside the database, so that an older row cannot be put back
            // unnoticed.
            island.committer.remember().await;
        }
        let storage = self.use_storage_keks(&row).await;
        // I3: keys are stored by the rules of the newest row, even if the tokens lack roots.
        island.row.store(Arc::clone(&row));
        let audit = self.use_audit_key(row.seal_key_version).await;
        seal.and(storage).and(audit).map(|()| row)
    }

    /// From now on, links records with the audit key of this version of the seal root.
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

    /// Wraps new keys under the storage KEKs that the row names. If the KEK of one class cannot be
    /// used, the other classes go on.
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
            // A key that this server could not open again must not be stored. So the version before
            // is used until the operator has installed the copy.
            let held = self.is_in_token(id).await;
            let before = u8::try_from(used.number()).ok().map(|version| RootId { version, ..id });
            // I3: nothing is stored under a version whose destruction was decided.
            if held.is_ok() || before.is_none_or(|before| !row.may_store_under(before)) {
                hsm.use_storage_kek(class, root_version(id.version)?);
            }
            outcome = outcome.and(held);
        }
        outcome
    }
}

/// Reads the island's row and verifies it (I5). If another server sealed the row with a version of
/// the seal key that this server does not know yet, the HSM computes that version.
///
/// # Errors
/// The row does not verify, the root that it is sealed under is not in the token, or the HSM or the
/// database is unavailable.
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
            // Another server may have written the row after it was read here. So it is read once
            // more: only a row that fails twice was tampered with.
            Err(_) if attempts < 2 => {}
            other => return other,
        }
    }
}

/// Reads the island's row and seals with the keys that it names from now on: for a server whose
/// island is not open yet.
///
/// # Errors
/// The row does not verify, the root that it is sealed under is not in the token, or the HSM or the
/// database is unavailable.
#[boxed]
pub async fn learn_seal_keys(store: &dyn Store, hsm: &Hsm, committer: &Committer) -> Result<(), ServiceError> {
    let row = read_island(store, hsm, committer).await?;
    let (keys, _) = seal_keys(hsm, &row, (*committer.seal_keys()).clone()).await;
    committer.use_seal_keys(keys?);
    Ok(())
}
