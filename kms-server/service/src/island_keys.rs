//! What a server needs to open an island: the island's row, and the keys that the HSM computes from
//! the seal root.

use async_recursion::async_recursion as boxed;
use std::{sync::Arc, time::Duration};

use kms_base::ServiceError;
use kms_domain::{FingerprintKey, Generation, IslandName, RowId, RowSeal, SealError, SealKeys, SealRootKey};
use kms_hsm::{ErrorKind, Hsm, HsmError, RootVersion};
use kms_ledger::{AuditKeys, RestoreSettings};
use kms_store::{RowKind, Store, StoreError};

use crate::keys::seal::{FINGERPRINT_KEY_VERSION, all_seal_keys, audit_keys, seal_key, seal_keys};

/// The keys that the HSM computes from the seal root, and the island's row that they verify.
pub struct IslandKeys {
    /// The island's row.
    pub row: kms_domain::Island,
    /// The seal keys.
    pub seal: SealKeys,
    /// The audit keys.
    pub audit: AuditKeys,
    /// The key of key fingerprints.
    pub fingerprint: FingerprintKey,
}

impl IslandKeys {
    /// Reads the row and has the HSM compute the keys.
    ///
    /// # Errors
    /// The database does not hold the island; its row does not verify; or the HSM or the database
    /// is unavailable.
    #[boxed]
    pub async fn open(
        store: &Arc<dyn Store>,
        hsm: &Hsm,
        island: &IslandName,
        restore: &RestoreSettings,
    ) -> Result<Self, IslandKeysError> {
        let stored = store
            .sealed(RowKind::Island, island.as_str().as_bytes())
            .await?
            .ok_or_else(|| IslandKeysError::NoIsland { island: island.clone() })?;
        hsm.usable(USABLE_WITHIN).await?;
        let damaged = |reason: String| IslandKeysError::Row { island: island.clone(), reason };
        let mark = RowSeal::from_octets(&stored.seal).map_err(|error| damaged(error.to_string()))?;
        let seal = seal_key(hsm, mark.key_version()).await?;
        // I5: the island's own row too.
        let generation = i64::try_from(stored.generation)
            .ok()
            .and_then(|number| Generation::from_i64(number).ok())
            .ok_or_else(|| damaged("generation".to_owned()))?;
        seal.verify(&RowId::Island(island.clone()), generation, &stored.body, &mark)
            .map_err(|error: SealError| damaged(error.to_string()))?;
        let row = kms_domain::Island::from_row(island.clone(), stored.body.into())
            .map_err(|error| damaged(error.to_string()))?;
        if mark.key_version() < row.ledger.oldest_seal_key_version {
            return Err(damaged(format!("its seal is of version {}, which was retired", mark.key_version())));
        }
        let (seal, missing) = seal_keys(hsm, &row, seal.into()).await;
        if let Some(missing) = missing {
            tracing::warn!(
                roots = missing,
                "the token lacks roots that rows may be sealed under; such rows are refused"
            );
        }
        let seal = all_seal_keys(hsm, seal?).await?;
        // I5: a retired seal key stays retired, even if the row says otherwise: an attacker who
        // learned the key could have written the row.
        let oldest = restore.oldest_seal_key(island, &seal);
        if mark.key_version() < oldest {
            return Err(damaged(format!(
                "its seal is of version {}, and this server remembers that versions before {oldest} were retired; if you have put an older database back, run `kms-server restored`",
                mark.key_version()
            )));
        }
        let seal = seal.not_below(oldest);
        let audit = audit_keys(hsm, seal.current().version(), seal.oldest()).await?;
        let fingerprint =
            hsm.mac(RootVersion::FIRST, SealRootKey::Fingerprint.message(FINGERPRINT_KEY_VERSION, island)).await?;
        Ok(Self { row, seal, audit, fingerprint: FingerprintKey::new(&fingerprint) })
    }
}

/// Why an island cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum IslandKeysError {
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// A key cannot be made.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The database is not that of the island.
    #[error(
        "the database does not hold the island `{island}`; hold its ceremony with `kms-server init`, or correct `storage`"
    )]
    NoIsland {
        /// The island.
        island: IslandName,
    },
    /// The island's row does not verify.
    #[error(
        "the row of the island `{island}` is refused (I5): {reason}; the database and the token do not belong together, or the row was edited"
    )]
    Row {
        /// The island.
        island: IslandName,
        /// Why.
        reason: String,
    },
}

impl IslandKeysError {
    /// Whether the error can pass without a change of the configuration.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Store(StoreError::Unavailable { .. } | StoreError::Contention { .. }) => true,
            Self::Hsm(error) => matches!(error.kind(), ErrorKind::Transient | ErrorKind::OperatorFixable),
            Self::Service(error) => matches!(error, ServiceError::Unavailable { .. }),
            _ => false,
        }
    }
}

/// How long tokens may take at a start.
const USABLE_WITHIN: Duration = Duration::from_secs(10);
