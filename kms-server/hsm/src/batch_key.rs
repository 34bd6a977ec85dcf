//! The key that a vendor has wrapped the keys of one shipment with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kms_domain::OaepHash;

use crate::label::RootVersion;

/// A vendor's batch key in the HSM. A session unwraps it when it first needs it, so the batch key
/// outlives a lost session. The session objects are destroyed after the last clone is dropped.
#[derive(Clone)]
pub struct BatchKey(Arc<BatchKeyRecipe>);

/// What a session needs to unwrap the batch key.
pub(crate) struct BatchKeyRecipe {
    /// Unique in the process.
    pub(crate) number: u64,
    pub(crate) hash: OaepHash,
    pub(crate) transport_version: RootVersion,
    pub(crate) ciphertext: Vec<u8>,
}

impl BatchKey {
    pub(crate) fn new(transport_version: RootVersion, hash: OaepHash, ciphertext: Vec<u8>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(Arc::new(BatchKeyRecipe {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            hash,
            transport_version,
            ciphertext,
        }))
    }

    pub(crate) fn recipe(&self) -> &Arc<BatchKeyRecipe> {
        &self.0
    }
}
